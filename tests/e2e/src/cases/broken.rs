// SPDX-License-Identifier: GPL-2.0-only

//! One file system that is out of order costs nobody else the backup: it is left out and named with
//! its reason, `list` says so beforehand, and only a strict backup fails.

use super::control::asked;
use super::deadman::{make_dirty, make_hung, HANG, UNHANG};
use super::disks::{self, load_driver, Attached};
use super::{
    case, describe, good, good_backup, is_frozen, load, logged, observe, start, stop,
    wait_for_daemon, Case, Seen,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::{Fault, Image, Kind};
use serde_json::Value;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "broken/read-only-since-an-error",
        "ext4 with errors=remount-ro that met an error: left out, the others are frozen",
        read_only_since_an_error,
    )
    .comparing(),
    case(
        "broken/btrfs-read-only-since-an-error",
        "the same with a btrfs whose disk has failed, of which one mount was read-only before",
        btrfs_read_only_since_an_error,
    )
    .comparing(),
    case(
        "broken/vfat-read-only-since-an-error",
        "and a vfat that an error has made read-only, which it tells nobody: named, and fails a strict backup",
        vfat_read_only_since_an_error,
    ),
    disks::case(
        "broken/btrfs-read-only-after-a-backup",
        "and so is one whose disk fails after a good backup, when the plan is still there, of which nobody tells",
        btrfs_read_only_after_a_backup,
    ),
    case(
        "broken/shut-down",
        "the same with ext4 and xfs that were shut down",
        shut_down,
    )
    .comparing()
    .long(),
    case(
        "broken/not-written-back",
        "a page that a disk does not take is named, though all is frozen then; strict fails",
        not_written_back,
    ),
    case(
        "broken/disk-gone",
        "the same with a disk that was taken away under its file system",
        disk_gone,
    )
    .comparing(),
    case(
        "broken/write-protected",
        "a disk made read-only under its file system is written to all the same, and stands still",
        write_protected,
    ),
    disks::case(
        "broken/btrfs-balance",
        "a btrfs that is being balanced is left out, and its writers go on; then it is frozen again",
        btrfs_balance,
    ),
    disks::case(
        "broken/balance-begins-in-the-sync",
        "the same with a balance that begins while another file system is written back",
        balance_begins_in_the_sync,
    ),
    case(
        "broken/btrfs-scrub",
        "a btrfs that is being scrubbed is left out where its freeze would wait for that, else frozen",
        btrfs_scrub,
    )
    .long(),
    case(
        "broken/md-repair",
        "an md that copies from disk to disk below a frozen file system is named; strict fails",
        md_repair,
    ),
    case(
        "broken/md-repair-below-another-namespace",
        "the same below a btrfs that only another namespace has mounted, by a node of its own",
        md_repair_below_another_namespace,
    ),
    case(
        "broken/mapper-merge",
        "and so is a volume of the device mapper that merges a snapshot into another disk",
        mapper_merge,
    ),
    case(
        "broken/raid-journal",
        "and so is a RAID whose journal answers writes that its other disks get later",
        raid_journal,
    ),
    case(
        "broken/full-pool",
        "stock: a thin volume whose pool is full, and has writes wait for that, costs no backup but its own",
        full_pool,
    ),
    case(
        "broken/mirror-that-waits",
        "the same with a mirror of the device mapper that has lost a disk, and writes wait for a program to see to that",
        mirror_that_waits,
    ),
];

/// The healthy one.
const HEALTHY: &str = "mkdir -p /mnt/good /mnt/bad
    mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/good";

/// With ours: those with these names are left out and named, `/mnt/good` stands still, a strict backup
/// fails and names them. Returns what was seen.
fn left_out(guest: &Guest, names: &[&str]) -> Result<Seen> {
    left_out_with(guest, guest.module(), names)
}

/// The same with this module.
fn left_out_with(guest: &Guest, module: Module, names: &[&str]) -> Result<Seen> {
    guest.writer_start("/mnt/good/w")?;
    let daemon = start(guest, module, Daemon::Ours)?;
    let seen = observe(guest)?;
    equal("the backup", &seen, &good(&["/mnt/good/w"]))?;
    for name in names {
        let mut log = String::new();
        let said = guest.wait_until("it is named", STEP, || {
            log = guest.output(&daemon)?;
            let mut lines = log.lines();
            Ok(lines.any(|line| line.contains(name) && line.contains("left out")))
        });
        said.with_context(|| format!("{name} is not named:\n{log}"))?;
        remembered(guest, &format!("{name} as left out"), |last| {
            let all = last["file_systems"].as_array().into_iter().flatten();
            let mut all = all.filter(|it| it["how"] == "left-out" && it["reason"].is_string());
            all.any(|it| it["name"].as_str().is_some_and(|it| it.contains(name)))
        })?;
        let status = guest.try_sh("/payload/hv_vss_daemon status")?.out;
        // What follows the name is why.
        let is_named =
            |it: &str| it.starts_with("left out") && it.contains(name) && it.contains("): ");
        ensure!(
            status.lines().any(is_named),
            "status should name {name}, and say why:\n{status}"
        );
    }
    checked(guest, names, 7)?;
    stop(guest, module, &daemon)?;

    load(guest, module, &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    checked(guest, names, 6)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    // What failed is written when the host has its answer.
    guest.wait_until("one of them is named", STEP, || {
        let log = guest.output(&daemon)?;
        Ok(names.iter().any(|name| log.contains(name)))
    })?;
    stop(guest, module, &daemon)?;
    Ok(seen)
}

/// `check` ends with `code` for these, names each as left out, and none but these.
fn checked(guest: &Guest, names: &[&str], code: i32) -> Result<()> {
    let check = asked(guest, "check", code)?;
    let left_out: Vec<&str> = check
        .lines()
        .filter(|it| it.contains("is left out"))
        .collect();
    let is_named = |name: &&str| left_out.iter().any(|it| it.contains(*name));
    ensure!(
        left_out.len() == names.len() && names.iter().all(is_named),
        "check should name {names:?}, and no other, as left out:\n{check}"
    );
    Ok(())
}

/// Waits until the history has this of the last backup.
pub(super) fn remembered(guest: &Guest, what: &str, has: impl Fn(&Value) -> bool) -> Result<()> {
    let mut all = Value::Null;
    let waited = guest.wait_until(&format!("the history has {what}"), STEP, || {
        all = serde_json::from_str(&guest.try_sh("/payload/hv_vss_daemon history --json")?.out)?;
        let last = all.as_array().and_then(|it| it.last());
        Ok(last.is_some_and(&has))
    });
    waited.with_context(|| format!("the history is: {all}"))
}

/// `list` says that this one is out of order, and nothing against the healthy one.
fn listed(guest: &Guest, name: &str, how: &str) -> Result<()> {
    let list = guest.sh("/payload/hv_vss_daemon list")?;
    let line = list.lines().find(|line| line.contains(name));
    ensure!(
        line.is_some_and(|it| it.contains("out of order") && it.contains(how)),
        "list should say {how:?} of {name}:\n{list}"
    );
    let healthy = list.lines().find(|line| line.contains("/mnt/good"));
    ensure!(
        healthy.is_some_and(|it| !it.contains("out of order")),
        "/mnt/good is in order:\n{list}"
    );
    Ok(())
}

/// The same with the peer, for the comparison.
fn compare(guest: &Guest, what: &str, ours: &Seen) -> Result<()> {
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let peer = observe(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(what, &describe(ours), &describe(&peer));
    Ok(())
}

fn read_only_since_an_error(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&["(device ram2)", "EXT4-fs (ram2)"])?;
    guest.sh(HEALTHY)?;
    guest.sh(
        "mkfs.ext4 -q -F /dev/ram2 && mount -o errors=remount-ro /dev/ram2 /mnt/bad
              echo x >/sys/fs/ext4/ram2/trigger_fs_error",
    )?;
    let write = guest.try_sh("touch /mnt/bad/file")?;
    ensure!(
        write.status == Some(1),
        "nothing can be written there: {write:?}"
    );
    // From 6.12 to 6.14 the kernel keeps it to itself until somebody writes, or freezes.
    let table = guest.sh("grep ' /mnt/bad ' /proc/self/mountinfo")?;
    if table.contains("emergency_ro") || table.contains("/dev/ram2 ro") {
        listed(guest, "/mnt/bad (ext4, 1:2)", "read-only since an error")?;
    }
    let ours = left_out(guest, &["/mnt/bad (ext4, 1:2)"])?;
    compare(
        guest,
        "one ext4 is read-only since an error, weeks ago",
        &ours,
    )?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("[exclude]\npaths = ['/', '/mnt/good']")?;
    wait_for_daemon(guest)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE of nothing but that", &freeze, status::FAIL)?;
    stop(guest, guest.module(), &daemon)
}

fn btrfs_read_only_since_an_error(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&["BTRFS", "dm-0"])?;
    guest.sh(HEALTHY)?;
    guest.sh("modprobe -a dm-mod btrfs
         dmsetup create bad --noudevsync --table '0 655360 linear /dev/ram2 0'
         [ -e /dev/mapper/bad ] || dmsetup mknodes
         mkfs.btrfs -q -f /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad
         mkdir -p /mnt/bad-ro && mount --bind /mnt/bad /mnt/bad-ro &&
         mount -o remount,bind,ro /mnt/bad-ro
         echo 1 >/mnt/bad/f && sync
         dmsetup suspend bad
         dmsetup load bad --table '0 655360 error' && dmsetup resume bad
         echo 2 >/mnt/bad/f; sync; true")?;
    let table = guest.sh("grep ' /mnt/bad ' /proc/self/mountinfo")?;
    ensure!(
        table.contains("/bad ro"),
        "it should have become read-only: {table}"
    );
    listed(guest, "/mnt/bad (btrfs, ", "read-only since an error")?;
    let ours = left_out(guest, &["/mnt/bad (btrfs, "])?;
    compare(guest, "one btrfs is read-only since its disk failed", &ours)?;
    guest
        .sh("umount /mnt/bad-ro && umount /mnt/bad && dmsetup remove bad")
        .map(drop)
}

/// The kernel says so once, drops the page, and freezes.
fn not_written_back(guest: &Guest) -> Result<()> {
    /// One file has all blocks, so that a bad one is its.
    const MAKE: &str = "modprobe dm-mod
        dmsetup create bad --noudevsync --table '0 131072 linear /dev/ram2 0'
        [ -e /dev/mapper/bad ] || dmsetup mknodes
        mkfs.ext4 -q -F -E packed_meta_blocks=1 /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad
        dd if=/dev/zero of=/mnt/bad/f bs=1M 2>/dev/null; sync; dmsetup suspend bad
        printf '0 98304 linear /dev/ram2 0\n98304 8 error\n98312 32760 linear /dev/ram2 98312\n' |
            dmsetup load bad
        dmsetup resume bad";
    /// Nothing but its pages.
    const DIRTY: &str = "dd if=/dev/zero of=/mnt/bad/f bs=1M conv=notrunc 2>/dev/null; true";
    guest.expect_in_log(&["dm-0", "buffer_io_error: "])?;
    guest.sh(HEALTHY)?;
    guest.sh(MAKE)?;
    guest.writer_start("/mnt/good/w")?;
    let how = "has not been written back as a whole";
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    guest.sh(DIRTY)?;
    equal("the backup", &observe(guest)?, &good(&["/mnt/good/w"]))?;
    remembered(guest, "a warning", |last| {
        let all = last["warnings"].as_array().into_iter().flatten();
        let mut all = all.filter_map(Value::as_str);
        all.any(|it| it.contains("/mnt/bad (ext4, ") && it.contains(how))
    })?;
    // It has been said, and the next one has all that there is.
    good_backup(guest).context("the next one")?;
    remembered(guest, "no warning", |last| last["warnings"].is_null())?;
    stop(guest, guest.module(), &daemon)?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    guest.sh(DIRTY)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    guest.wait_until("it is named", STEP, || {
        let log = guest.output(&daemon)?;
        Ok(log
            .lines()
            .any(|it| it.contains("strict") && it.contains(how)))
    })?;
    good_backup(guest).context("the next strict one")?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount /mnt/bad && dmsetup remove bad").map(drop)
}

fn vfat_read_only_since_an_error(guest: &Guest) -> Result<()> {
    /// One with a file of many clusters, that nobody has read since it was mounted.
    const MAKE: &str = "mkfs.vfat /dev/ram2 >/dev/null
        mount /dev/ram2 /mnt/bad && dd if=/dev/zero of=/mnt/bad/file bs=1M count=1 2>/dev/null &&
        umount /mnt/bad && mount /dev/ram2 /mnt/bad";
    guest.expect_in_log(&["FAT-fs (ram2)"])?;
    guest.sh(HEALTHY)?;
    guest.sh("modprobe -a vfat nls_cp437 nls_ascii")?;
    // The first sectors of the table of clusters are lost, in which that file is.
    let meets_an_error = || -> Result<()> {
        guest.sh(
            "at=$(dd if=/dev/ram2 bs=1 skip=14 count=2 2>/dev/null | od -An -tu2)
             dd if=/dev/zero of=/dev/ram2 bs=512 seek=$((at)) count=8 conv=notrunc 2>/dev/null
             cat /mnt/bad/file >/dev/null 2>&1; true",
        )?;
        let table = guest.sh("grep ' /mnt/bad ' /proc/self/mountinfo")?;
        ensure!(
            table.contains("/dev/ram2 ro"),
            "it should have become read-only: {table}"
        );
        Ok(())
    };
    guest.sh(MAKE)?;
    meets_an_error()?;
    left_out(guest, &["/mnt/bad (vfat, 1:2)"])?;
    guest.sh("umount /mnt/bad")?;

    // With a mount that was read-only before only whoever has seen it writable knows.
    guest.sh(MAKE)?;
    guest.sh("mkdir -p /mnt/bad-ro && mount --bind /mnt/bad /mnt/bad-ro && mount -o remount,bind,ro /mnt/bad-ro")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    good_backup(guest).context("before the error")?;
    meets_an_error()?;
    good_backup(guest).context("after the error")?;
    let how = "/mnt/bad (vfat, 1:2): read-only though mounted for writing, perhaps since an error";
    let said = || -> Result<bool> {
        let status = guest.sh("/payload/hv_vss_daemon status --json")?;
        let status: Value = serde_json::from_str(&status)?;
        Ok(status["daemon"]["turned"] == serde_json::json!(["1:2"]))
    };
    guest.wait_until("the daemon says what it knows", STEP, said)?;
    let list = guest.sh("/payload/hv_vss_daemon list")?;
    ensure!(list.contains(how), "list should say {how:?}:\n{list}");
    let list = guest.sh("/payload/hv_vss_daemon list --json")?;
    ensure!(
        list.contains("perhaps since an error"),
        "so should list --json:\n{list}"
    );
    checked(guest, &["/mnt/bad (vfat, 1:2)"], 7)?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount /mnt/bad-ro && umount /mnt/bad").map(drop)
}

fn btrfs_read_only_after_a_backup(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&[
        "BTRFS",
        "critical medium error",
        "I/O error",
        "status: scsi 0x2 srb 0x84",
    ])?;
    load_driver(guest)?;
    guest.sh(HEALTHY)?;
    guest.sh("modprobe btrfs")?;
    for (lun, (config, expected)) in (0..).zip([
        ("strict = false", status::OK),
        ("strict = true", status::FAIL),
    ]) {
        let bad = Attached::new(guest, 0, lun, 128, Image::default())?;
        let node = bad.node(guest)?;
        guest.sh(&format!(
            "mkfs.btrfs -q -f {node} && mount {node} /mnt/bad && sync"
        ))?;
        load(guest, guest.module(), &[])?;
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        good_backup(guest).context("before its disk fails")?;
        good_backup(guest).context("by the same plan")?;
        bad.disk.set_faults(&[Fault::all(Kind::Write)]);
        guest.try_sh("touch /mnt/bad/file; sync -f /mnt/bad")?;
        guest.wait_until("the error has made it read-only", STEP, || {
            let table = guest.sh("grep ' /mnt/bad ' /proc/self/mountinfo")?;
            Ok(table.contains(&format!(" {node} ro")))
        })?;
        let vss = guest.vss();
        let freeze = vss.freeze(&[], STEP)?;
        answered(&format!("FREEZE with {config}"), &freeze, expected)?;
        if expected == status::OK {
            answered("THAW", &vss.thaw(STEP)?, expected)?;
        }
        let mut log = String::new();
        let said = guest.wait_until("it is named", STEP, || {
            log = guest.output(&daemon)?;
            let words = ["/mnt/bad (btrfs", "left out", "read-only since an error"];
            let mut lines = log.lines();
            Ok(lines.any(|line| words.iter().all(|word| line.contains(word))))
        });
        said.with_context(|| format!("it is not named:\n{log}"))?;
        stop(guest, guest.module(), &daemon)?;
        bad.disk.set_faults(&[]);
        guest.sh("umount /mnt/bad")?;
        bad.detach(guest)?;
    }
    Ok(())
}

fn shut_down(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&["EXT4-fs (ram2)", "XFS (ram3)"])?;
    guest.sh(HEALTHY)?;
    guest.sh("modprobe -a xfs btrfs; mkdir -p /mnt/xfs /mnt/btrfs
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/bad
              mkfs.xfs -q -f /dev/ram3 && mount /dev/ram3 /mnt/xfs
              xfs_io -x -c shutdown /mnt/bad && xfs_io -x -c shutdown /mnt/xfs")?;
    listed(guest, "/mnt/xfs (xfs, 1:3)", "Input/output error")?;
    let ours = left_out(guest, &["/mnt/bad (ext4, 1:2)", "/mnt/xfs (xfs, 1:3)"])?;
    compare(guest, "ext4 and xfs that were shut down", &ours)?;
    // Whoever tidies up cannot even look at it.
    guest.sh("umount /mnt/xfs").map(drop)
}

fn disk_gone(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&["(sda)", "(device sda)", "dev sda", "for sda-8"])?;
    guest.sh(HEALTHY)?;
    guest.sh("modprobe sd_mod && modprobe scsi_debug dev_size_mb=48")?;
    guest.wait_until("the disk is there", STEP, || {
        Ok(guest.try_sh("[ -b /dev/sda ]")?.status == Some(0))
    })?;
    guest.sh("mkfs.ext4 -q -F /dev/sda && mount /dev/sda /mnt/bad
              echo 1 >/sys/block/sda/device/delete")?;
    guest.wait_until("the disk is gone", STEP, || {
        Ok(guest.try_sh("[ ! -e /sys/block/sda ]")?.status == Some(0))
    })?;
    listed(guest, "/mnt/bad (ext4, 8:0)", "")?;
    let ours = left_out(guest, &["/mnt/bad (ext4, 8:0)"])?;
    compare(guest, "a disk was taken away under its file system", &ours)?;
    guest.sh("umount /mnt/bad && rmmod scsi_debug").map(drop)
}

fn write_protected(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    guest.sh("mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/bad
              blockdev --setro /dev/ram2")?;
    guest.writer_start("/mnt/good/w")?;
    guest.writer_start("/mnt/bad/w")?;
    start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    guest.sh("blockdev --setrw /dev/ram2")?;
    equal("the backup", &seen, &good(&["/mnt/good/w", "/mnt/bad/w"]))
}

/// Makes a btrfs on that disk, with something to be balanced.
fn make_btrfs(guest: &Guest, disk: &Attached) -> Result<()> {
    let node = disk.node(guest)?;
    guest.sh(HEALTHY)?;
    guest
        .sh(&format!(
            "modprobe btrfs && mkfs.btrfs -q -f {node} && mount {node} /mnt/bad &&
             dd if=/dev/zero of=/mnt/bad/file bs=1M count=48 2>/dev/null && sync"
        ))
        .map(drop)
}

/// Has it balanced, slowly.
fn begin_balance(guest: &Guest, disk: &Attached) -> Result<Process> {
    // It is to outlast what the guest does meanwhile, however slow that is.
    let delay = guest.host().patience(Duration::from_millis(300));
    disk.disk.set_delay(delay);
    let line = "exec btrfs balance start --full-balance /mnt/bad";
    let process = guest.spawn(&["sh", "-c", line])?;
    guest.wait_until("it is being balanced", STEP, || is_balanced(guest))?;
    Ok(process)
}

fn is_balanced(guest: &Guest) -> Result<bool> {
    let said = guest.sh("cat /sys/fs/btrfs/*-*/exclusive_operation")?;
    Ok(said.trim() == "balance")
}

fn end_balance(guest: &Guest, disk: &Attached, process: &Process) -> Result<()> {
    disk.disk.set_delay(Duration::ZERO);
    guest.sh("btrfs balance cancel /mnt/bad; true")?;
    guest.wait(process, STEP * 2)?;
    Ok(())
}

fn balance_begins_in_the_sync(guest: &Guest) -> Result<()> {
    let disk = Attached::new(guest, 0, 0, 256, Image::default())?;
    load_driver(guest)?;
    make_btrfs(guest, &disk)?;
    make_hung(guest)?;
    guest.writer_start("/mnt/good/w")?;
    guest.writer_start("/mnt/bad/w")?;
    let vss = guest.vss();
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    make_dirty(guest, "/mnt/hung")?;
    guest.sh(HANG)?;
    let tx = vss.send_freeze(&[])?;
    guest.wait_until("only the one that hangs is written back", STEP, || {
        let said = guest.try_sh("/payload/hv_vss_daemon status")?.out;
        // Others may be named by what it says of the last backup.
        let mut lines = said.lines();
        Ok(lines.any(|it| it.contains("still at /mnt/hung") && !it.contains("/mnt/bad")))
    })?;
    let process = begin_balance(guest, &disk)?;
    guest.sh(UNHANG)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::OK)?;
    let before = guest.writers()?;
    guest.wait_until("one stands still, the other goes on", STEP, || {
        let mut pairs = before.iter().zip(guest.writers()?);
        Ok(pairs.all(|(then, now)| match now.path.as_str() {
            "/mnt/bad/w" => now.count > then.count + 10,
            _ => is_frozen(guest, &now),
        }))
    })?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    ensure!(is_balanced(guest)?, "the balance had ended before");
    let mut log = String::new();
    let said = guest.wait_until("it is named", STEP, || {
        log = guest.output(&daemon)?;
        Ok(log.contains("before its balance has ended; it is left out"))
    });
    said.with_context(|| format!("it is not named:\n{log}"))?;
    end_balance(guest, &disk, &process)?;
    stop(guest, guest.module(), &daemon)
}

/// A balance holds the write gate from its beginning to its end: a freeze would wait for it, and every
/// writer for the freeze.
fn btrfs_balance(guest: &Guest) -> Result<()> {
    let disk = Attached::new(guest, 0, 0, 256, Image::default())?;
    load_driver(guest)?;
    make_btrfs(guest, &disk)?;
    guest.writer_start("/mnt/bad/w")?;
    let process = begin_balance(guest, &disk)?;
    let name = "/mnt/bad (btrfs, ";
    let list = guest.sh("/payload/hv_vss_daemon list")?;
    let line = list.lines().find(|line| line.contains(name));
    ensure!(
        line.is_some_and(|it| it.contains("busy") && it.contains("balance")),
        "list should say that it is busy:\n{list}"
    );
    guest.writer_start("/mnt/good/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    let told = (seen.freeze, seen.thaw, seen.stuck.len());
    equal(
        "the answers, who is stuck",
        told,
        (status::OK, Some(status::OK), 0),
    )?;
    equal(
        "who stood still",
        &seen.still,
        &vec!["/mnt/good/w".to_owned()],
    )?;
    let log = logged(guest, &daemon)?;
    let mut lines = log.lines();
    ensure!(
        lines.any(|it| it.contains(name) && it.contains("left out: busy")),
        "it should be named:\n{log}"
    );
    // Or the balance had ended before.
    ensure!(is_balanced(guest)?, "the balance had ended before");
    end_balance(guest, &disk, &process)?;
    let seen = observe(guest)?;
    equal("who stands still after it", seen.still.len(), 2)?;
    stop(guest, guest.module(), &daemon)?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let process = begin_balance(guest, &disk)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    end_balance(guest, &disk, &process)?;
    stop(guest, guest.module(), &daemon)
}

/// Makes a RAID 1 of two disks, by their names, under ext4 on /mnt/bad, and says what it is called:
/// otherwise each time, as md takes a name away some time after it was told to.
pub(super) fn raid(guest: &Guest, disks: [&str; 2]) -> Result<String> {
    let name = empty_raid(guest, disks)?;
    guest.sh(&format!(
        "mkfs.ext4 -q -F /dev/{name} && mount /dev/{name} /mnt/bad"
    ))?;
    Ok(name)
}

/// The same with nothing on it.
fn empty_raid(guest: &Guest, [first, second]: [&str; 2]) -> Result<String> {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("md_lab{}", MADE.fetch_add(1, Ordering::Relaxed));
    // What a vfat has left in the first block is taken for a table of partitions.
    for disk in [first, second] {
        guest.sh(&format!(
            "dd if=/dev/zero of=/dev/{disk} bs=4k count=1 conv=fsync 2>&1"
        ))?;
    }
    guest.sh(&format!(
        "modprobe raid1 && mkdir -p /mnt/bad && echo {name} >/sys/module/md_mod/parameters/new_array &&
         cd /sys/block/{name}/md &&
         echo none >metadata_version && echo raid1 >level && echo 2 >raid_disks &&
         for disk in {first} {second}; do
             cat /sys/class/block/$disk/dev >new_dev && echo 65536 >dev-$disk/size || exit 1
         done &&
         echo 0 >dev-{first}/slot && echo 1 >dev-{second}/slot && echo none >resync_start &&
         echo 65536 >component_size && echo active >array_state &&
         echo 1 >sync_speed_min"
    ))?;
    Ok(name)
}

/// Takes it away again.
pub(super) fn no_raid(guest: &Guest, name: &str) -> Result<()> {
    guest
        .sh(&format!(
            "umount /mnt/bad && echo clear >/sys/block/{name}/md/array_state"
        ))
        .map(drop)
}

fn btrfs_scrub(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    // It takes a minute, at so many bytes a second.
    guest.sh(
        "modprobe btrfs && mkfs.btrfs -q -f /dev/ram2 && mount /dev/ram2 /mnt/bad &&
         dd if=/dev/zero of=/mnt/bad/file bs=1M count=60 2>/dev/null && sync &&
         echo 1048576 >$(echo /sys/fs/btrfs/*-*/devinfo/1/scrub_speed_max)",
    )?;
    guest.writer_start("/mnt/good/w")?;
    guest.writer_start("/mnt/bad/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let scrub = guest.spawn(&["sh", "-c", "exec btrfs scrub start -B /mnt/bad 2>&1"])?;
    guest.wait_until("it is being scrubbed", STEP, || {
        let status = guest.try_sh("btrfs scrub status /mnt/bad")?;
        Ok(status.out.contains("running"))
    })?;
    let seen = observe(guest)?;
    guest.sh("echo 0 >$(echo /sys/fs/btrfs/*-*/devinfo/1/scrub_speed_max)")?;
    guest.wait(&scrub, STEP * 4)?;
    let said = guest.output(&scrub)?;
    let log = logged(guest, &daemon)?;
    let words = "busy: it cannot be frozen before its scrub has ended";
    if said.contains("aborted") {
        equal("the backup", &seen, &good(&["/mnt/good/w", "/mnt/bad/w"]))?;
        ensure!(!log.contains(words), "it was frozen:\n{log}");
    } else {
        let told = (seen.freeze, seen.thaw, seen.stuck.len());
        equal(
            "the answers, and who is stuck",
            told,
            (status::OK, Some(status::OK), 0),
        )?;
        equal(
            "who stood still",
            &seen.still,
            &vec!["/mnt/good/w".to_owned()],
        )?;
        ensure!(log.contains(words), "it should be named:\n{log}");
    }
    stop(guest, guest.module(), &daemon)
}

/// What is on such a volume is on the second disk until it is merged into the first.
fn mapper_merge(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    guest.sh(HEALTHY)?;
    let table = |kind: &str| format!("'0 131072 {kind} /dev/ram2 /dev/ram3 P 8'");
    guest.sh(&format!(
        "modprobe -a dm-mod dm-snapshot && dd if=/dev/zero of=/dev/ram3 bs=1M count=1 2>/dev/null
         dmsetup create bad --noudevsync --table {}
         [ -e /dev/mapper/bad ] || dmsetup mknodes
         mkfs.ext4 -q -F /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad",
        table("snapshot")
    ))?;
    for path in ["/mnt/good/w", "/mnt/bad/w"] {
        guest.writer_start(path)?;
    }
    let node = guest.sh("dmsetup info -c --noheadings -o blkdevname bad")?;
    let copies = format!("{} (merge) copies from disk to disk", node.trim());
    let all = good(&["/mnt/good/w", "/mnt/bad/w"]);
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    equal("without a merge", observe(guest)?, all.clone())?;
    // It begins in the window.
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(&format!(
        "dmsetup suspend --nolockfs bad && dmsetup load bad --table {} && dmsetup resume --noudevsync bad",
        table("snapshot-merge")
    ))?;
    answered("THAW with strict = true", &vss.thaw(STEP)?, status::FAIL)?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    let log = logged(guest, &daemon)?;
    ensure!(log.contains(&copies), "it should be named:\n{log}");
    stop(guest, guest.module(), &daemon)?;

    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("the backup", observe(guest)?, all)?;
    remembered(guest, "the warning", |last| {
        let mut all = last["warnings"].as_array().into_iter().flatten();
        all.any(|it| it.as_str().is_some_and(|it| it.contains(&copies)))
    })?;
    let check = guest.try_sh("/payload/hv_vss_daemon check")?.out;
    ensure!(check.contains(&copies), "check should name it:\n{check}");
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/bad && dmsetup remove bad").map(drop)
}

fn raid_journal(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    guest.sh("modprobe -a dm-raid && mkdir -p /mnt/bad")?;
    // Made anew: what is on it was made in that mode.
    let make = |mode: &str| -> Result<String> {
        guest.sh(&format!(
            "dd if=/dev/zero of=/dev/ram5 bs=1M count=1 2>/dev/null
             dmsetup create bad --noudevsync --table '0 131072 raid raid5_ls 6 64 nosync \
                 journal_dev /dev/ram5 journal_mode {mode} 3 - /dev/ram2 - /dev/ram3 - /dev/ram4'
             [ -e /dev/mapper/bad ] || dmsetup mknodes
             mkfs.ext4 -q -F /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad"
        ))?;
        let node = guest.sh("dmsetup info -c --noheadings -o blkdevname bad")?;
        Ok(format!(
            "{} (write-back) copies from disk to disk",
            node.trim()
        ))
    };
    let end = || guest.sh("umount /mnt/bad && dmsetup remove bad").map(drop);
    let all = good(&["/mnt/good/w", "/mnt/bad/w"]);
    let copies = make("writeback")?;
    for path in ["/mnt/good/w", "/mnt/bad/w"] {
        guest.writer_start(path)?;
    }
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("the backup", observe(guest)?, all.clone())?;
    remembered(guest, "the warning", |last| {
        let mut all = last["warnings"].as_array().into_iter().flatten();
        all.any(|it| it.as_str().is_some_and(|it| it.contains(&copies)))
    })?;
    let check = guest.try_sh("/payload/hv_vss_daemon check")?.out;
    ensure!(check.contains(&copies), "check should name it:\n{check}");
    stop(guest, guest.module(), &daemon)?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    end()?;

    make("writethrough")?;
    for path in ["/mnt/good/w", "/mnt/bad/w"] {
        guest.writer_start(path)?;
    }
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    equal("a journal that writes through", observe(guest)?, all)?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    end()
}

fn md_repair(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    guest.sh(HEALTHY)?;
    let array = raid(guest, ["ram2", "ram3"])?;
    let copies = format!("{array} (repair) copies from disk to disk");
    for path in ["/mnt/good/w", "/mnt/bad/w"] {
        guest.writer_start(path)?;
    }
    let act = |action: &str| -> Result<()> {
        // While it holds itself back it hears nothing.
        let speed = if action == "idle" { 200_000 } else { 1 };
        guest.sh(&format!(
            "cd /sys/block/{array}/md && echo {speed} >sync_speed_max && echo {action} >sync_action"
        ))?;
        guest.wait_until("md does as it is told", STEP, || {
            let now = guest.read(&format!("/sys/block/{array}/md/sync_action"))?;
            Ok(now.trim() == action)
        })
    };
    // It can be frozen as ever, and is; what goes on below is said.
    act("repair")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let all = good(&["/mnt/good/w", "/mnt/bad/w"]);
    equal("the backup", observe(guest)?, all.clone())?;
    guest.wait_until("it is named", STEP, || {
        Ok(guest.output(&daemon)?.contains(&copies))
    })?;
    remembered(guest, "the warning", |last| {
        let mut all = last["warnings"].as_array().into_iter().flatten();
        all.any(|it| it.as_str().is_some_and(|it| it.contains(&copies)))
    })?;
    let check = guest.try_sh("/payload/hv_vss_daemon check")?.out;
    ensure!(check.contains(&copies), "check should name it:\n{check}");
    stop(guest, guest.module(), &daemon)?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    act("idle")?;
    equal("the next backup", observe(guest)?, all)?;
    // It begins in the window.
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    act("repair")?;
    answered("THAW with strict = true", &vss.thaw(STEP)?, status::FAIL)?;
    act("idle")?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    no_raid(guest, &array)
}

fn md_repair_below_another_namespace(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    guest.writer_start("/mnt/good/w")?;
    let array = empty_raid(guest, ["ram2", "ram3"])?;
    // So small a one is mixed.
    guest.sh(&format!(
        "modprobe btrfs && mkfs.btrfs -q -f -M /dev/{array}"
    ))?;
    let script = format!(
        "mount -t tmpfs none /run && mknod /run/x b $(tr : ' ' </sys/block/{array}/dev) &&
         mount -t btrfs /run/x /mnt/bad && exec sleep 1000"
    );
    let apart = ["unshare", "--mount", "--propagation", "private"];
    let holder = guest.spawn(&[apart.as_slice(), &["sh", "-c", &script]].concat())?;
    guest.wait_until("it is mounted there", STEP, || {
        let here = format!("grep -q ' - btrfs ' /proc/{}/mountinfo", holder.pid);
        Ok(guest.try_sh(&here)?.status == Some(0))
    })?;
    guest.sh(&format!(
        "cd /sys/block/{array}/md && echo 1 >sync_speed_max && echo repair >sync_action"
    ))?;
    let copies = format!("{array} (repair) copies from disk to disk");
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("the backup", observe(guest)?, good(&["/mnt/good/w"]))?;
    guest.wait_until("it is named", STEP, || {
        Ok(guest.output(&daemon)?.contains(&copies))
    })?;
    stop(guest, guest.module(), &daemon)?;

    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    guest.wait_until("it is named", STEP, || {
        Ok(guest.output(&daemon)?.contains(&copies))
    })?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    guest.sh(&format!(
        "cd /sys/block/{array}/md && echo 200000 >sync_speed_max && echo idle >sync_action"
    ))?;
    guest.wait_until("the array is let go", STEP, || {
        let clear = format!("echo clear >/sys/block/{array}/md/array_state");
        Ok(guest.try_sh(&clear)?.status == Some(0))
    })
}

/// A thin volume of a pool that has no room left. A snapshot has all that is on it as well, so whatever is written there
/// waits.
fn full_pool(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    guest.sh(
        "modprobe -a dm-mod dm-thin-pool && echo 0 >/sys/module/dm_thin_pool/parameters/no_space_timeout
         dd if=/dev/zero of=/dev/ram3 bs=4k count=1 2>/dev/null
         make() { dmsetup create $1 --noudevsync --table \"$2\" && { [ -e /dev/mapper/$1 ] || dmsetup mknodes; }; }
         make pool '0 65536 thin-pool /dev/ram3 /dev/ram2 128 0 1 no_discard_passdown' && dmsetup message pool 0 'create_thin 0' &&
         make bad '0 49152 thin /dev/mapper/pool 0' &&
         mkfs.ext4 -q -F /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad && sync &&
         dmsetup suspend --noudevsync bad && dmsetup message pool 0 'create_snap 1 0' && dmsetup resume --noudevsync bad &&
         dmsetup message pool 0 'create_thin 2' && make fill '0 65536 thin /dev/mapper/pool 2'",
    )?;
    let fill = "dd if=/dev/zero of=/dev/mapper/fill bs=64k oflag=direct 2>/dev/null";
    let fill = guest.spawn(&["sh", "-c", fill])?;
    guest.expect_in_log(&["reached low water mark for data device"])?;
    guest.wait_until("the pool is full", STEP, || {
        let status = guest.sh("dmsetup status --noflush pool")?;
        Ok(status.contains(" out_of_data_space "))
    })?;
    left_out_while_it_waits(guest, "is full")?;
    guest.sh(
        "dmsetup suspend --noudevsync --noflush pool &&
         dmsetup load pool --table '0 131072 thin-pool /dev/ram3 /dev/ram2 128 0 1 no_discard_passdown' && dmsetup resume --noudevsync pool",
    )?;
    guest.wait(&fill, STEP)?;
    frozen_again(guest)?;
    guest
        .sh("umount /mnt/bad && for it in fill bad pool; do dmsetup remove $it; done")
        .map(drop)
}

fn mirror_that_waits(guest: &Guest) -> Result<()> {
    guest.sh(HEALTHY)?;
    let half = |kind: &str| {
        format!("dmsetup load half --table '0 65536 {kind}' && dmsetup resume --noudevsync half")
    };
    guest.sh(
        "modprobe -a dm-mod dm-mirror
         make() { dmsetup create $1 --noudevsync --table \"$2\" && { [ -e /dev/mapper/$1 ] || dmsetup mknodes; }; }
         make half '0 65536 linear /dev/ram3 0' &&
         make bad '0 65536 mirror core 2 1024 nosync 2 /dev/ram2 0 /dev/mapper/half 0 1 handle_errors' &&
         mkfs.ext4 -q -F /dev/mapper/bad && mount /dev/mapper/bad /mnt/bad && sync",
    )?;
    guest.sh(&half("error"))?;
    let lost = "dd if=/dev/zero of=/mnt/bad/lost bs=4k count=1 oflag=direct 2>/dev/null";
    let lost = guest.spawn(&["sh", "-c", lost])?;
    guest.wait_until("the mirror has lost a disk", STEP, || {
        Ok(guest.sh("dmsetup status bad")?.contains(" AD "))
    })?;
    left_out_while_it_waits(guest, "lost a disk")?;
    // As dmeventd does: what waits is written to the other one.
    guest.sh(
        "dmsetup suspend --noudevsync --noflush --nolockfs bad &&
         dmsetup load bad --table '0 65536 linear /dev/ram2 0' && dmsetup resume --noudevsync bad",
    )?;
    guest.wait(&lost, STEP)?;
    frozen_again(guest)?;
    guest
        .sh("umount /mnt/bad && dmsetup remove bad && dmsetup remove half")
        .map(drop)
}

/// `/mnt/bad` is left out with the kernel's own module, and `list` says that, and why.
fn left_out_while_it_waits(guest: &Guest, why: &str) -> Result<()> {
    let list = guest.sh("/payload/hv_vss_daemon list")?;
    let line = list.lines().find(|line| line.contains("/mnt/bad"));
    ensure!(
        line.is_some_and(|it| it.contains(why)),
        "list should say that what /mnt/bad is on {why}:\n{list}"
    );
    left_out_with(guest, Module::Stock, &["/mnt/bad"])?;
    guest.writers_stop()?;
    Ok(())
}

/// And then it is not.
fn frozen_again(guest: &Guest) -> Result<()> {
    let paths = ["/mnt/good/w", "/mnt/bad/w"];
    for path in paths {
        guest.writer_start(path)?;
    }
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    equal("the next backup", observe(guest)?, good(&paths))?;
    stop(guest, Module::Stock, &daemon)?;
    guest.writers_stop()?;
    Ok(())
}
