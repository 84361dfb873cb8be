// SPDX-License-Identifier: GPL-2.0-only

//! Microsoft's own cases for this service, named as they were (Linux Integration Services, later LISA:
//! `VSS-BACKUP...`; deleted in August 2020), as far as a guest can tell that they are run. What was looked
//! for then was that the backup completed and that a file was there in what it restored; here it is looked
//! for that all stands still for it and goes on, which `restore/*` shows to be what a restore wants.
//!
//! Not here: those that differ only on the host's side (a differencing disk, Secure Boot, a checkpoint of
//! either kind), iSCSI, and the machine that is saved or off when it is backed up.

use super::disks::{load_driver, Attached};
use super::{
    all_frozen, case, good, load, logged, observe, start, stop, wait_for_daemon, Case, Seen,
};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use hyperv_sim::HostError;
use std::time::Duration;

pub const CASES: &[Case] = &[
    on_disks(
        "lis/vss-backuprestore-multifs-vhdx",
        "three disks with ext4, xfs and btrfs, mounted",
        multi_fs,
    ),
    on_disks(
        "lis/vss-backuprestore-iso-nonetwork",
        "an ISO 9660 disk is mounted, and the network is down",
        iso_no_network,
    ),
    on_disks(
        "lis/vss-backup-restore-mount-multi-paths",
        "one partition is mounted at two paths",
        multi_paths,
    ),
    on_disks(
        "lis/vss-backup-restore-mount-squashfs",
        "an image with squashfs is mounted from a file on a disk: it is no matter of the backup",
        squashfs_on_a_file,
    ),
    on_disks(
        "lis/vss-backup-restore-diskstress",
        "a disk is written to without a pause",
        disk_stress,
    ),
    on_disks(
        "lis/vss-backup-change-hypervvssd",
        "no good backup while the daemon is stopped, a good one when it is started again",
        change_daemon,
    ),
    on_disks(
        "lis/vss-backup-disable-enable-vss",
        "the service is switched off on the host, and on again",
        disable_enable,
    ),
    on_disks(
        "lis/vss-backup-restore-state-paused",
        "the machine is paused when FREEZE is sent, and again while it is frozen: both go on when it does",
        paused,
    ),
    on_disks(
        "lis/vss-backup-restore-fail",
        "one file system is frozen by hand: it is in the backup and stays frozen",
        frozen_by_hand,
    ),
];

const fn on_disks(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        machine: Machine::SCSI,
        ..case(name, about, run)
    }
    .long()
}

/// A disk with this file system, mounted there, and somebody who writes to it.
fn mounted(guest: &Guest, lun: u8, mkfs: &str, at: &str) -> Result<Attached> {
    let disk = Attached::new(guest, 0, lun, 384, Image::default())?;
    load_driver(guest)?;
    let node = disk.node(guest)?;
    guest.sh(&format!(
        "mkdir -p {at} && {mkfs} {node} && mount {node} {at}"
    ))?;
    guest.writer_start(&format!("{at}/w"))?;
    Ok(disk)
}

fn ext4(guest: &Guest) -> Result<Attached> {
    mounted(guest, 0, "mkfs.ext4 -q -F", "/mnt/a")
}

/// A whole backup with our daemon on the guest's module.
fn backed_up(guest: &Guest) -> Result<Seen> {
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    stop(guest, guest.module(), &daemon)?;
    Ok(seen)
}

fn multi_fs(guest: &Guest) -> Result<()> {
    guest.sh("modprobe -a xfs btrfs")?;
    let _disks = [
        mounted(guest, 0, "mkfs.ext4 -q -F", "/mnt/ext4")?,
        mounted(guest, 1, "mkfs.xfs -q -f", "/mnt/xfs")?,
        mounted(guest, 2, "mkfs.btrfs -q -f", "/mnt/btrfs")?,
    ];
    let seen = backed_up(guest)?;
    equal(
        "the backup",
        seen,
        good(&["/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"]),
    )
}

/// The smallest ISO 9660 there is (ECMA-119): a volume descriptor, the end of those, and an empty root.
fn iso() -> Vec<u8> {
    const SECTOR: usize = 2048;
    const ROOT: u8 = 18;
    let both = |number: u32| [number.to_le_bytes(), number.to_be_bytes()].concat();
    let both16 = |number: u16| [number.to_le_bytes(), number.to_be_bytes()].concat();
    // A record of 34 bytes: where the folder is and how long, its flags, and a name of one byte.
    let record = |name: u8| {
        let mut it = vec![34, 0];
        it.extend(both(ROOT.into()));
        it.extend(both(SECTOR as u32));
        it.extend([0; 7]);
        it.extend([2, 0, 0]);
        it.extend(both16(1));
        it.extend([1, name]);
        it
    };
    let mut image = vec![0; 20 * SECTOR];
    let mut put = |sector: usize, offset: usize, bytes: &[u8]| {
        let from = sector * SECTOR + offset;
        image[from..from + bytes.len()].copy_from_slice(bytes);
    };
    put(16, 0, b"\x01CD001\x01");
    put(16, 80, &both(20));
    put(16, 120, &both16(1));
    put(16, 124, &both16(1));
    put(16, 128, &both16(SECTOR as u16));
    put(16, 156, &record(0));
    put(16, 881, &[1]);
    put(17, 0, b"\xffCD001\x01");
    put(ROOT.into(), 0, &[record(0), record(1)].concat());
    image
}

fn iso_no_network(guest: &Guest) -> Result<()> {
    let _disk = ext4(guest)?;
    let mut content = Image::default();
    content.write(0, &iso());
    let dvd = Attached::new(guest, 0, 1, 1, content)?;
    let node = dvd.node(guest)?;
    guest.sh(&format!(
        "ip link set lo down; modprobe isofs && mkdir -p /mnt/dvd &&
         mount -t iso9660 -o ro {node} /mnt/dvd"
    ))?;
    equal("the backup", backed_up(guest)?, good(&["/mnt/a/w"]))
}

fn multi_paths(guest: &Guest) -> Result<()> {
    let disk = ext4(guest)?;
    let node = disk.node(guest)?;
    guest.sh(&format!("mkdir -p /mnt/b && mount {node} /mnt/b"))?;
    guest.writer_start("/mnt/b/v")?;
    let seen = backed_up(guest)?;
    equal("the backup", seen, good(&["/mnt/a/w", "/mnt/b/v"]))
}

/// What is read in [`squashfs`].
const SQUASHED: &str = "squashed\n";

/// The smallest squashfs with a file in it, nothing of it compressed (the kernel's `squashfs_fs.h`, version
/// 4.0): the superblock, the file's only block, the tables of inodes, of folders and of owners.
fn squashfs() -> Vec<u8> {
    const NAME: &[u8] = b"file";
    const SUPERBLOCK: u64 = 96;
    const BLOCK_LOG: u16 = 17;
    // There is no table of fragments, of extended attributes, of inodes to export.
    const NONE: u64 = u64::MAX;
    const UNCOMPRESSED_BLOCK: u32 = 1 << 24;
    /// Numbers as they lie in it: all are little endian, one behind the other.
    fn words(into: &mut Vec<u8>, words: &[u16]) {
        into.extend(words.iter().flat_map(|it| it.to_le_bytes()));
    }
    fn longs(into: &mut Vec<u8>, longs: &[u32]) {
        into.extend(longs.iter().flat_map(|it| it.to_le_bytes()));
    }
    /// A block of a table, marked as not compressed.
    fn table(image: &mut Vec<u8>, block: &[u8]) -> u64 {
        let at = image.len() as u64;
        words(image, &[0x8000 | block.len() as u16]);
        image.extend(block);
        at
    }

    let mut image = vec![0; SUPERBLOCK as usize];
    image.extend(SQUASHED.as_bytes());
    let (mut inodes, mut folder) = (Vec::new(), Vec::new());
    // Type, mode, owner, group, when, number; then what its type has.
    words(&mut inodes, &[1, 0o755, 0, 0]);
    longs(&mut inodes, &[0, 1, 0, 2]);
    words(&mut inodes, &[3 + 12 + 8 + NAME.len() as u16, 0]);
    longs(&mut inodes, &[3]);
    let file = inodes.len() as u16;
    words(&mut inodes, &[2, 0o644, 0, 0]);
    longs(&mut inodes, &[0, 2, SUPERBLOCK as u32, u32::MAX, 0]);
    let len = SQUASHED.len() as u32;
    longs(&mut inodes, &[len, len | UNCOMPRESSED_BLOCK]);
    // How many but one, the block of the inodes, the number of the first; where, number from there, type, length.
    longs(&mut folder, &[0, 0, 2]);
    words(&mut folder, &[file, 0, 2, NAME.len() as u16 - 1]);
    folder.extend(NAME);

    let inodes = table(&mut image, &inodes);
    let folders = table(&mut image, &folder);
    let root_user = table(&mut image, &[0; 4]);
    let owners = image.len() as u64;
    image.extend(root_user.to_le_bytes());
    let used = image.len() as u64;

    let mut superblock = b"hsqs".to_vec();
    longs(&mut superblock, &[2, 0, 1 << BLOCK_LOG, 0]);
    // zlib, which nothing is compressed with; inodes and data are not, no fragments, no attributes; one owner.
    words(&mut superblock, &[1, BLOCK_LOG, 0x213, 1, 4, 0]);
    for number in [0, used, owners, NONE, inodes, folders, NONE, NONE] {
        superblock.extend(number.to_le_bytes());
    }
    image[..superblock.len()].copy_from_slice(&superblock);
    image
}

fn squashfs_on_a_file(guest: &Guest) -> Result<()> {
    let _disk = ext4(guest)?;
    let mut content = Image::default();
    content.write(0, &squashfs());
    let brought = Attached::new(guest, 0, 1, 1, content)?;
    let node = brought.node(guest)?;
    // Asked for writing, as people do: it is read-only by itself.
    guest.sh(&format!(
        "modprobe -a loop squashfs && cat {node} >/mnt/a/image && mkdir -p /mnt/packed &&
         mount -t squashfs -o loop /mnt/a/image /mnt/packed"
    ))?;
    equal("its file", guest.read("/mnt/packed/file")?, SQUASHED.into())?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("the backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    let log = logged(guest, &daemon)?;
    ensure!(
        !log.contains("squashfs") && !log.contains("/mnt/packed") && log.contains("/mnt/a (ext4, "),
        "nothing is to be said of what nobody can write to:\n{log}"
    );
    stop(guest, guest.module(), &daemon)
}

fn disk_stress(guest: &Guest) -> Result<()> {
    let _disk = ext4(guest)?;
    let line = "exec 2>/dev/null; while :; do
        dd if=/dev/zero of=/mnt/a/large bs=64k count=512 && sync /mnt/a/large
    done";
    let stress = guest.spawn(&["sh", "-c", line])?;
    let seen = backed_up(guest)?;
    guest.signal(&stress, 9)?;
    equal("the backup", seen, good(&["/mnt/a/w"]))
}

fn change_daemon(guest: &Guest) -> Result<()> {
    let _disk = ext4(guest)?;
    let module = guest.module();
    let daemon = start(guest, module, Daemon::Ours)?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE without a daemon", &freeze, status::FAIL)?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    equal("the next backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    stop(guest, module, &daemon)
}

fn disable_enable(guest: &Guest) -> Result<()> {
    let _disk = ext4(guest)?;
    let vss = guest.vss();
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    vss.rescind();
    vss.wait_released(STEP)?;
    let refused = vss.freeze(&[], STEP);
    ensure!(
        matches!(refused, Err(HostError::NotOpen { .. })),
        "the service is off, and FREEZE was sent: {refused:?}"
    );
    vss.offer();
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    wait_for_daemon(guest)?;
    equal("the next backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)
}

/// There the host backs a paused machine up without asking it. One that asks it has its answer later.
fn paused(guest: &Guest) -> Result<()> {
    const FOR: Duration = Duration::from_secs(2);
    let _disk = ext4(guest)?;
    let (vm, vss) = (guest.vm(), guest.vss());
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    ensure!(vm.pause(), "a virtual CPU does not leave the guest");
    let freeze = vss.send_freeze(&[])?;
    std::thread::sleep(FOR);
    let early = vss.try_reply(freeze);
    vm.resume();
    ensure!(
        early.is_none(),
        "a machine that is paused answers: {early:?}"
    );
    answered("FREEZE", &vss.wait(freeze, STEP)?, status::OK)?;
    ensure!(vm.pause(), "a virtual CPU does not leave the guest");
    std::thread::sleep(FOR);
    vm.resume();
    equal("who writes", moved(guest)?, 0)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    equal("the next backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)
}

/// How much is written in a while in which nobody should.
fn moved(guest: &Guest) -> Result<u64> {
    let written = || -> Result<u64> { Ok(guest.writers()?.iter().map(|it| it.count).sum()) };
    guest.wait_until("all stand still", STEP, || all_frozen(guest))?;
    let before = written()?;
    let over = guest.clock()? + 500_000;
    guest.wait_until("a while is over", STEP, || Ok(guest.clock()? > over))?;
    Ok(written()? - before)
}

fn frozen_by_hand(guest: &Guest) -> Result<()> {
    let _disks = [
        ext4(guest)?,
        mounted(guest, 1, "mkfs.ext4 -q -F", "/mnt/b")?,
    ];
    guest.freeze("/mnt/b")?;
    let expected = Seen {
        stuck: vec!["/mnt/b/w".into()],
        ..good(&["/mnt/a/w", "/mnt/b/w"])
    };
    let seen = backed_up(guest);
    guest.thaw("/mnt/b")?;
    equal("the backup", seen?, expected)
}
