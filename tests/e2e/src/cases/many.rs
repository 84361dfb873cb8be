// SPDX-License-Identifier: GPL-2.0-only

//! A machine with hundreds of file systems, as one that runs containers has.

use super::disks::{load_driver, Attached};
use super::{start, stop, stuck_writers, who_stands_still, Case, When};
use anyhow::{Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use std::time::Duration;

pub const CASES: &[Case] = &[Case {
    name: "many/600",
    about: "300 ext4 on device-mapper volumes and 300 on loop devices, both modules and the peer",
    machine: Machine::SCSI,
    per_round: Duration::from_secs(100),
    when: When::All,
    asks_our_module: false,
    compares: true,
    run: six_hundred,
}];

/// Of each kind.
const COUNT: u32 = 300;
/// Made by one command, which has a limit of its own.
const AT_A_TIME: usize = 20;
/// Large enough for a journal.
const MIB: u32 = 4;
/// The kernel has nothing left to make while whoever comes first is measured.
const READY: &str = "lazy_itable_init=0,lazy_journal_init=0";
/// A writer on the root, and one on a file system of each kind.
const FILES: [&str; 3] = ["/w", "/mnt/v/7/w", "/mnt/l/7/w"];

fn six_hundred(guest: &Guest) -> Result<()> {
    load_driver(guest)?;
    // Something is said of each volume and each mount, until it is too much.
    guest.expect_in_log(&[
        "set_capacity_and_notify",
        "EXT4-fs mount",
        "EXT4-fs unmount",
    ])?;
    let size = u64::from(COUNT * MIB) + 64;
    let volumes = Attached::new(guest, 0, 0, size, Image::default())?.node(guest)?;
    let images = Attached::new(guest, 1, 0, size, Image::default())?.node(guest)?;
    guest.sh(&format!(
        "modprobe -a loop dm_mod; mkdir -p /mnt/images /mnt/v /mnt/l &&
         mkfs.ext4 -q -F {images} && mount {images} /mnt/images"
    ))?;
    let sectors = MIB * 2048;
    let numbers: Vec<u32> = (1..=COUNT).collect();
    for some in numbers.chunks(AT_A_TIME) {
        let (first, last) = (some[0], some[some.len() - 1]);
        guest.sh(&format!(
            "for n in $(seq {first} {last}); do
                 mkdir -p /mnt/v/$n /mnt/l/$n
                 dmsetup create v$n --noudevsync --table \"0 {sectors} linear {volumes} $((n * {sectors}))\" &&
                 {{ [ -e /dev/mapper/v$n ] || dmsetup mknodes v$n; }} &&
                 mkfs.ext4 -q -F -E {READY} /dev/mapper/v$n && mount /dev/mapper/v$n /mnt/v/$n || exit 1
             done"
        ))?;
        guest.sh(&format!(
            "for n in $(seq {first} {last}); do
                 truncate -s {MIB}M /mnt/images/$n && mkfs.ext4 -q -F -E {READY} /mnt/images/$n &&
                 mount -o loop /mnt/images/$n /mnt/l/$n || exit 1
             done"
        ))?;
    }
    for path in FILES {
        guest.writer_start(path)?;
    }
    // With the root, and what holds the images.
    let count = 2 * COUNT + 2;
    let mut seen = Vec::new();
    let stacks = [
        (Module::Ours, Daemon::Ours),
        (Module::Stock, Daemon::Ours),
        (Module::Stock, Daemon::Debian),
    ];
    for (module, daemon) in stacks {
        let process = start(guest, module, daemon)?;
        // Once for nothing: with each the first one after its start takes longer.
        let first = backup(guest)?.0;
        let (freeze, still, thaw) = backup(guest)?;
        let mut frozen = format!("of {} writers {} stand still", FILES.len(), still.len());
        if daemon == Daemon::Ours {
            let words = format!("FREEZE answered: {count} frozen");
            guest.wait_until("the log says that all are frozen", STEP, || {
                Ok(guest.output(&process)?.contains(&words))
            })?;
            equal("who stands still", still, FILES.map(String::from).to_vec())?;
            frozen = format!("{count} are frozen, {frozen}");
        }
        let words = format!(
            "FREEZE {:.1} s, {frozen}; THAW {:.1} s",
            freeze.as_secs_f64(),
            thaw.as_secs_f64(),
        );
        println!("     {module:?}, {daemon:?}: the first FREEZE {first:.1?}, then {words}");
        seen.push(words);
        stop(guest, module, &process)?;
    }
    guest.compare("300 ext4 on LVM and 300 in image files", &seen[0], &seen[2]);
    guest.writers_stop()?;
    // Whoever tidies up after a case is not given that long.
    for some in numbers.chunks(AT_A_TIME) {
        let (first, last) = (some[0], some[some.len() - 1]);
        guest.sh(&format!(
            "for n in $(seq {first} {last}); do
                 umount /mnt/v/$n && umount -d /mnt/l/$n && dmsetup remove --noudevsync v$n || exit 1
             done"
        ))?;
    }
    Ok(())
}

/// A good backup after which all go on: how long its two steps took, and who stood still between them.
fn backup(guest: &Guest) -> Result<(Duration, Vec<String>, Duration)> {
    let vss = guest.vss();
    let limit = STEP * 20;
    let freeze = vss.freeze(&[], limit)?;
    answered("FREEZE", &freeze, status::OK)?;
    let (still, _) = who_stands_still(guest)?;
    let thaw = vss.thaw(limit).context("THAW")?;
    answered("THAW", &thaw, status::OK)?;
    equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
    Ok((freeze.latency, still, thaw.latency))
}
