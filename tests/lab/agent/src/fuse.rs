// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent fuse FOLDER UID DEVICE`: a FUSE file system that belongs to somebody else, as a desktop's
//! portal or an sshfs does, with a disk mounted on the one folder in it (`linux/fuse.h`).
//!
//! Nobody but its owner may look into it, root included, and each look-up asks the program again. It
//! goes into the disk's root as its working directory, so that there is a way to it.
//!
//! `lab-agent fuse-file FOLDER FILE`: the same for everybody, with a file in it as well, `image`, whose content is
//! that of FILE. A program that is stopped answers for it no longer.

use crate::error::Error;
use crate::sys;
use nix::mount::{mount, MsFlags};
use nix::unistd::{setresgid, setresuid, Gid, Uid};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::channel;
use std::thread;

const ROOT: u64 = 1;
/// The folder, and its name.
const FOLDER: u64 = 2;
const NAME: &[u8] = b"disk\0";
/// The file, and its name.
const IMAGE: u64 = 3;
const IMAGE_NAME: &[u8] = b"image\0";

/// `enum fuse_opcode`, as far as it is understood.
mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
}

/// Mounts, and serves until somebody ends it.
pub fn serve(folder: &str, uid: u32, device: &str) -> Result<(), Error> {
    let line = mount_at(folder, uid, "")?;
    let (tell, ended) = channel();
    thread::spawn(move || {
        // Nobody listens any more when the process ends.
        let _ = tell.send(answer(line, None));
    });
    // Only the owner finds the way to the folder, only root mounts.
    sys::keep_capabilities()?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    let below = format!("{folder}/disk");
    let none = MsFlags::empty();
    mount(Some(device), &*below, Some("ext4"), none, None::<&str>)?;
    std::env::set_current_dir(&below)?;
    println!("mounted");
    ended
        .recv()
        .unwrap_or_else(|_| Err(Error::Call("the server ended without a word".into())))
}

/// The same for everybody, with a file in it.
pub fn serve_file(folder: &str, file: &str) -> Result<(), Error> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let line = mount_at(folder, 0, ",allow_other")?;
    println!("mounted");
    answer(line, Some(&file))
}

/// Mounts it for this owner, with these further options; requests come over what is returned.
fn mount_at(folder: &str, uid: u32, more: &str) -> Result<File, Error> {
    let line = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open("/dev/fuse")?;
    let fd = line.as_raw_fd();
    let options = format!("fd={fd},rootmode=40000,user_id={uid},group_id={uid}{more}");
    let none = MsFlags::empty();
    mount(Some("lab"), folder, Some("fuse"), none, Some(&*options))?;
    Ok(line)
}

/// Answers each request until the file system is unmounted.
fn answer(mut line: File, image: Option<&File>) -> Result<(), Error> {
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
        let size = match image {
            Some(image) if node == IMAGE || body == IMAGE_NAME => image.metadata()?.len(),
            _ => 0,
        };
        let (errno, data) = match (opcode, image) {
            (op::INIT, _) => (None, init()),
            (op::GETATTR, _) => (None, [&[0; 16][..], &attributes(node, size)].concat()),
            (op::LOOKUP, _) if body == NAME => (None, entry(FOLDER, size)),
            (op::LOOKUP, Some(_)) if body == IMAGE_NAME => (None, entry(IMAGE, size)),
            (op::LOOKUP, _) => (Some(nix::libc::ENOENT), Vec::new()),
            (op::STATFS, _) => (None, statistics()),
            // struct fuse_open_out: nothing to remember, nothing special.
            (op::OPEN, Some(_)) => (None, vec![0; 16]),
            (op::READ, Some(image)) => (None, read(image, body).ok_or_else(odd)?),
            (op::WRITE, Some(image)) => (None, write(image, body).ok_or_else(odd)?),
            (op::FLUSH | op::FSYNC | op::RELEASE, Some(_)) => (None, Vec::new()),
            (op::FORGET | op::BATCH_FORGET | op::INTERRUPT, _) => continue,
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

/// Offset and size, in the second and third field of `struct fuse_read_in` and `struct fuse_write_in` alike, and what
/// follows those 40 bytes.
fn range(body: &[u8]) -> Option<(u64, usize, &[u8])> {
    let (range, data) = body.split_first_chunk::<40>()?;
    let (_, rest) = range.split_first_chunk::<8>()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let size = u32::from_ne_bytes(*rest.first_chunk()?);
    Some((u64::from_ne_bytes(*offset), size as usize, data))
}

/// What is there, as much as there is.
fn read(image: &File, body: &[u8]) -> Option<Vec<u8>> {
    let (offset, size, _) = range(body)?;
    let mut data = vec![0; size];
    let length = image.read_at(&mut data, offset).ok()?;
    data.truncate(length);
    Some(data)
}

/// `struct fuse_write_out`, once it is there.
fn write(image: &File, body: &[u8]) -> Option<Vec<u8>> {
    let (offset, size, data) = range(body)?;
    image.write_all_at(data.get(..size)?, offset).ok()?;
    let mut written = Vec::from((size as u32).to_ne_bytes());
    written.resize(8, 0);
    Some(written)
}

/// `struct fuse_kstatfs`: an overlay wants to know how long names may be.
fn statistics() -> Vec<u8> {
    let mut data = vec![0; 40];
    for word in [4096u32, 255, 4096] {
        data.extend(word.to_ne_bytes());
    }
    data.resize(80, 0);
    data
}

/// `struct fuse_entry_out`: nothing in it may be kept for later.
fn entry(node: u64, size: u64) -> Vec<u8> {
    let mut data = Vec::from(node.to_ne_bytes());
    data.resize(40, 0);
    data.extend(attributes(node, size));
    data
}

/// `struct fuse_attr` of a folder, or of the file.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let (mode, links) = match node {
        IMAGE => (nix::libc::S_IFREG | 0o600, 1u32),
        ROOT => (nix::libc::S_IFDIR | 0o700, 3),
        _ => (nix::libc::S_IFDIR | 0o700, 2),
    };
    let mut data = Vec::from(node.to_ne_bytes());
    data.extend(size.to_ne_bytes());
    data.resize(60, 0);
    data.extend(mode.to_ne_bytes());
    data.extend(links.to_ne_bytes());
    data.resize(88, 0);
    data
}
