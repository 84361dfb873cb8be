// SPDX-License-Identifier: GPL-2.0-only

//! Freezes and thaws the file systems of a Linux guest when its Hyper-V host takes a backup.
//!
//! The order of reading is the order of a request: [`device`] carries frames from and to the
//! kernel, [`service`] is the event loop, and [`backup`] decides what happens, as a machine without I/O.
//! [`job`] is one backup from end to end: [`machine`] looks at what is mounted ([`mounts`],
//! [`namespaces`], [`superblocks`], [`unlisted`]) and on what it stands ([`topology`], and the host's [`disks`]), [`plan`]
//! turns that into an order (a pure function, as is [`ground`], the way down to the disks), [`open`] gets
//! a descriptor for each file system, [`cache`] does both beforehand as far as [`watch`] sees no change,
//! and [`freeze`] does the work on them, through a [`door`], and what may hang on a disk [`apart`]; [`answers`] tell which disks do. Behind that is the module ([`held`]), or where
//! the module has no such thing [`fifreeze`] with its [`guard`], the process that thaws when all of this
//! cannot, and a [`record`], from which [`recovery`] undoes what is left after a death; [`writes`] show
//! whether others thawed meanwhile, or wrote to a disk itself, [`moving`] what copies from disk to disk
//! below it all, [`busy`] what a freeze would wait for, and [`stalled`] what a write would. [`hooks`] are an administrator's programs that take part, and [`calls`] calls them.
//! [`history`] remembers what came of each backup. [`control`] is
//! how others ask the daemon; [`check`], [`report`] and [`timeline`] are what an operator is told.
//!
//! It knows nothing of VMBus: what the host says arrives as frames of `uapi/hv_vss.rs`.

#![deny(unsafe_code)]
pub mod answers;
pub mod apart;
pub mod backup;
pub mod busy;
pub mod cache;
pub mod calls;
pub mod check;
pub mod children;
pub mod clock;
pub mod commands;
pub mod config;
pub mod control;
pub mod device;
pub mod disks;
pub mod door;
pub mod fifreeze;
pub mod freeze;
pub mod freezers;
pub mod ground;
pub mod guard;
pub mod held;
pub mod history;
pub mod hooks;
pub mod job;
pub mod logbook;
pub mod lost;
pub mod machine;
pub mod mounts;
pub mod moving;
pub mod namespaces;
pub mod open;
pub mod plan;
pub mod pool;
pub mod process;
pub mod progress;
pub mod record;
pub mod recovery;
pub mod report;
pub mod rescue;
pub mod service;
pub mod stalled;
pub mod superblocks;
#[expect(unsafe_code, reason = "system calls that no library wraps")]
pub mod sys;
pub mod timeline;
pub mod topology;
pub mod turned;
pub mod unlisted;
pub mod waiting;
pub mod watch;
pub mod writes;
