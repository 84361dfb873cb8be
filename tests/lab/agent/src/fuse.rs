// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent fuse FOLDER UID DEVICE`: a FUSE file system that belongs to somebody else, as a desktop's
//! portal or an sshfs does, with a disk mounted on the one folder in it (`linux/fuse.h`).
//!
//! Nobody but its owner may look into it, root included, and each look-up asks the program again. It
//! goes into the disk's root as its working directory, so that there is a way to it.

use crate::error::Error;
use crate::sys;
use nix::mount::{mount, MsFlags};
use nix::unistd::{setresgid, setresuid, Gid, Uid};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc::channel;
use std::thread;

const ROOT: u64 = 1;
/// The folder, and its name.
const FOLDER: u64 = 2;
const NAME: &[u8] = b"disk\0";

/// `enum fuse_opcode`, as far as it is understood.
mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
}

/// Mounts, and serves until somebody ends it.
pub fn serve(folder: &str, uid: u32, device: &str) -> Result<(), Error> {
    let line = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open("/dev/fuse")?;
    let fd = line.as_raw_fd();
    let options = format!("fd={fd},rootmode=40000,user_id={uid},group_id={uid}");
    let none = MsFlags::empty();
    mount(Some("lab"), folder, Some("fuse"), none, Some(&*options))?;
    let (tell, ended) = channel();
    thread::spawn(move || {
        // Nobody listens any more when the process ends.
        let _ = tell.send(answer(line));
    });
    // Only the owner finds the way to the folder, only root mounts.
    sys::keep_capabilities()?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    let below = format!("{folder}/disk");
    mount(Some(device), &*below, Some("ext4"), none, None::<&str>)?;
    std::env::set_current_dir(&below)?;
    println!("mounted");
    ended
        .recv()
        .unwrap_or_else(|_| Err(Error::Call("the server ended without a word".into())))
}

/// Answers each request until the file system is unmounted.
fn answer(mut line: File) -> Result<(), Error> {
    let mut request = vec![0; 1 << 17];
    loop {
        let length = line.read(&mut request)?;
        let request = request.get(..length).unwrap_or_default();
        let odd = || Error::Call(format!("not a request: {request:x?}"));
        // struct fuse_in_header: length, opcode, unique, node, and 16 bytes of no interest.
        let (header, body) = request.split_first_chunk::<40>().ok_or_else(odd)?;
        let (_, rest) = header.split_first_chunk::<4>().ok_or_else(odd)?;
        let (opcode, rest) = rest.split_first_chunk::<4>().ok_or_else(odd)?;
        let (unique, rest) = rest.split_first_chunk::<8>().ok_or_else(odd)?;
        let node = u64::from_ne_bytes(*rest.first_chunk().ok_or_else(odd)?);
        let opcode = u32::from_ne_bytes(*opcode);
        let (errno, data) = match opcode {
            op::INIT => (None, init()),
            op::GETATTR => (None, [&[0; 16][..], &attributes(node)].concat()),
            op::LOOKUP if body == NAME => (None, entry()),
            op::LOOKUP => (Some(nix::libc::ENOENT), Vec::new()),
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => continue,
            _ => (Some(nix::libc::ENOSYS), Vec::new()),
        };
        // struct fuse_out_header.
        let length = 16 + data.len() as u32;
        let mut reply = Vec::from(length.to_ne_bytes());
        reply.extend((-errno.unwrap_or(0)).to_ne_bytes());
        reply.extend(unique);
        reply.extend(data);
        line.write_all(&reply)?;
    }
}

/// `struct fuse_init_out` of 7.31, with nothing that is optional.
fn init() -> Vec<u8> {
    let mut data = Vec::new();
    for word in [7u32, 31, 0, 0, 0, 4096, 0, 0] {
        data.extend(word.to_ne_bytes());
    }
    data.resize(64, 0);
    data
}

/// `struct fuse_entry_out` of the folder: nothing in it may be kept for later.
fn entry() -> Vec<u8> {
    let mut data = Vec::from(FOLDER.to_ne_bytes());
    data.resize(40, 0);
    data.extend(attributes(FOLDER));
    data
}

/// `struct fuse_attr` of a folder.
fn attributes(node: u64) -> Vec<u8> {
    const MODE: u32 = nix::libc::S_IFDIR | 0o700;
    let mut data = Vec::from(node.to_ne_bytes());
    data.resize(60, 0);
    data.extend(MODE.to_ne_bytes());
    let links = if node == ROOT { 3u32 } else { 2 };
    data.extend(links.to_ne_bytes());
    data.resize(88, 0);
    data
}
