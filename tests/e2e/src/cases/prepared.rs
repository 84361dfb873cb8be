// SPDX-License-Identifier: GPL-2.0-only

//! The daemon has a plan ready before the host asks for a freeze. Whatever changes in between, it
//! freezes what is mounted when the host asks.
//!
//! Each case lets the daemon prepare (HOT_BACKUP has it look whether its plan still holds), makes one
//! change that the plan cannot know of, and backs up.

use super::deadman::{hang_writes, make_dirty, make_hung, UNHANG};
use super::disks::{self, load_driver, Attached};
use super::hangs::in_freeze;
use super::scope::in_a_namespace;
use super::{
    case, good, good_backup, load, logged, logged_all, observe, start, stop, wait_for_daemon, Case,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use hyperv_sim::Tx;

pub const CASES: &[Case] = &[
    case(
        "freeze/mounted-since",
        "a file system that is mounted after the plan was made stands still",
        mounted_since,
    ),
    case(
        "freeze/mounted-elsewhere-since",
        "the same in another mount namespace, and in one that is new",
        mounted_elsewhere_since,
    ),
    case(
        "freeze/writable-since",
        "a read-only file system that has become writable through another namespace stands still",
        writable_since,
    ),
    case(
        "freeze/writable-while-frozen",
        "one that becomes writable before THAW is named, and fails THAW when strict; an unmount does not",
        writable_while_frozen,
    ),
    case(
        "freeze/number-of-another-while-frozen",
        "a btrfs that is mounted before THAW under the number of a tmpfs that has gone is named, and fails THAW \
         when strict",
        number_of_another,
    ),
    case(
        "freeze/moved-since",
        "a file system that was moved to another directory stands still",
        moved_since,
    ),
    case(
        "freeze/mounted-while-it-syncs",
        "a file system that is mounted while another is written back stands still",
        |guest| mounted_meanwhile(guest, guest.module(), Stage::Syncing),
    ),
    case(
        "freeze/mounted-while-it-freezes",
        "a file system that is mounted while another is being frozen stands still",
        |guest| mounted_meanwhile(guest, Module::Ours, Stage::Freezing),
    )
    .asking_our_module(),
    case(
        "freeze/mounted-while-it-freezes-stock-module",
        "the same with the stock hv_utils and FIFREEZE",
        |guest| mounted_meanwhile(guest, Module::Stock, Stage::Freezing),
    ),
    case(
        "freeze/writable-while-it-syncs",
        "so does one elsewhere that is made writable meanwhile, beside a namespace without any mount",
        writable_while_it_syncs,
    ),
    case(
        "freeze/unmounted-while-it-syncs",
        "a file system that is unmounted while another is written back has nothing begun anew",
        |guest| unmounted_meanwhile(guest, Stage::Syncing),
    ),
    case(
        "freeze/unmounted-while-it-freezes",
        "the same while another is being frozen",
        |guest| unmounted_meanwhile(guest, Stage::Freezing),
    ),
    case(
        "freeze/mounted-while-frozen",
        "a file system that is mounted before THAW is named in the log, and fails THAW when strict",
        |guest| mounted_while_frozen(guest, "ext4"),
    ),
    case(
        "freeze/mounted-while-frozen-exfat",
        "the same for a type that is not listed in sysfs",
        |guest| mounted_while_frozen(guest, "exfat"),
    ),
    case(
        "freeze/mounted-while-frozen-no-loss",
        "what is mounted read-only, or where the configuration leaves it out, fails no strict THAW",
        mounted_while_frozen_no_loss,
    ),
    case(
        "freeze/mounted-while-it-freezes-exfat",
        "an exfat that is mounted while another is being frozen has it begun anew and is known then",
        exfat_meanwhile,
    ),
    disks::case(
        "freeze/unwanted-while-it-freezes",
        "what a rule leaves out may come all the time: a strict backup is good all the same",
        unwanted_meanwhile,
    ),
    case(
        "freeze/mounted-before-another-freeze",
        "a file system that is mounted while the rest is frozen stands still after another FREEZE",
        mounted_before_another_freeze,
    ),
    case(
        "freeze/moves-since",
        "LVM that begins to move extents before THAW is named in the log, and fails THAW when strict",
        moves_since,
    ),
    case(
        "freeze/lazily-unmounted-since-exfat",
        "an exfat that was seen and unmounted lazily while in use fails FREEZE when strict, by name, after \
         a reload as well, unless a rule for where it was leaves it out",
        lazily_unmounted_since,
    ),
    case(
        "freeze/stacked-since",
        "a mapped disk that was changed to stand on a file is frozen before that file's file system",
        stacked_since,
    ),
];

/// Lets the daemon prepare and waits until it has: requests are answered in order, but it prepares
/// after it has answered.
fn prepare(guest: &Guest) -> Result<()> {
    for _ in 0..2 {
        answered("HOT_BACKUP", &guest.vss().hot_backup(STEP)?, status::OK)?;
    }
    // Two backups: after each the daemon looks again, so the second finds what the first left.
    for _ in 0..2 {
        answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    }
    Ok(())
}

fn mounted_since(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a",
    )?;
    guest.writer_start("/mnt/a/w")?;
    start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    guest.sh("mount /dev/ram2 /mnt/b")?;
    guest.writer_start("/mnt/b/w")?;
    equal(
        "the backup",
        &observe(guest)?,
        &good(&["/mnt/a/w", "/mnt/b/w"]),
    )?;
    // One goes and one comes: as many as before, but not the same.
    guest.sh("mkdir -p /mnt/c && mkfs.ext4 -q -F /dev/ram3")?;
    prepare(guest)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/a && mount /dev/ram3 /mnt/c")?;
    guest.writer_start("/mnt/b/w")?;
    guest.writer_start("/mnt/c/w")?;
    equal(
        "the next backup",
        &observe(guest)?,
        &good(&["/mnt/b/w", "/mnt/c/w"]),
    )
}

/// What the daemon waits for when the file system comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Syncing,
    Freezing,
}

/// Has the host ask for a freeze and waits until the daemon is at that stage with a disk that hangs.
fn hang_in(guest: &Guest, daemon: &Process, stage: Stage) -> Result<Tx> {
    if stage == Stage::Syncing {
        make_dirty(guest, "/mnt/hung")?;
    } else {
        guest.sh("sync")?;
    }
    guest.sh(&hang_writes("hung"))?;
    let freeze = guest.vss().send_freeze(&[])?;
    guest.wait_until("it waits for the disk that hangs", STEP, || {
        let out = guest.try_sh("/payload/hv_vss_daemon status --json")?.out;
        let status: serde_json::Value = serde_json::from_str(&out)?;
        let doing = status["daemon"]["doing"].as_str().unwrap_or_default();
        Ok(doing.contains("/mnt/hung"))
    })?;
    equal(
        "threads in a freeze",
        in_freeze(guest, daemon)?,
        usize::from(stage == Stage::Freezing),
    )?;
    Ok(freeze)
}

fn mounted_meanwhile(guest: &Guest, module: Module, stage: Stage) -> Result<()> {
    make_hung(guest)?;
    guest.sh("mkdir -p /mnt/b && mkfs.ext4 -q -F /dev/ram2")?;
    let daemon = start(guest, module, Daemon::Ours)?;
    prepare(guest)?;
    let freeze = hang_in(guest, &daemon, stage)?;
    guest.sh("mount /dev/ram2 /mnt/b")?;
    guest.writer_start("/mnt/b/w")?;
    guest.sh(UNHANG)?;
    answered("FREEZE", &guest.vss().wait(freeze, STEP)?, status::OK)?;
    // A second one is answered with what is frozen.
    equal("the backup", &observe(guest)?, &good(&["/mnt/b/w"]))?;
    let said = logged(guest, &daemon)?;
    ensure!(said.contains("begun anew"), "{said}");
    stop(guest, module, &daemon)
}

/// Whether the kernel tells of a mount in another namespace without a path to it: by statmount(2).
fn tells_of_mounts_elsewhere(guest: &Guest) -> Result<bool> {
    let found = guest.try_sh("grep -qw __x64_sys_statmount /proc/kallsyms")?;
    Ok(found.status == Some(0))
}

fn writable_while_it_syncs(guest: &Guest) -> Result<()> {
    make_hung(guest)?;
    guest.sh("mkdir -p /mnt/b && mkfs.ext4 -q -F /dev/ram2")?;
    let there = in_a_namespace(guest, "mount -o ro /dev/ram2 /mnt/b")?;
    let empty = guest.spawn(&["/payload/lab-agent", "unmounted"])?;
    guest.wait_until("there is a namespace without mounts", STEP, || {
        Ok(guest.output(&empty)?.contains("nothing is mounted"))
    })?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    let freeze = hang_in(guest, &daemon, Stage::Syncing)?;
    guest.sh(&format!(
        "nsenter --mount=/proc/{}/ns/mnt mount -o remount,rw /mnt/b",
        there.pid
    ))?;
    let file = format!("/proc/{}/root/mnt/b/w", there.pid);
    guest.writer_start(&file)?;
    guest.sh(UNHANG)?;
    answered("FREEZE", &guest.vss().wait(freeze, STEP)?, status::OK)?;
    let seen = observe(guest)?;
    let said = logged(guest, &daemon)?;
    // A kernel that does not tell of a mount elsewhere is asked when all is thawed, and then it is named.
    let words = if tells_of_mounts_elsewhere(guest)? {
        equal("the backup", &seen, &good(&[&file]))?;
        let times = said.matches("begun anew").count();
        equal("how often it was begun anew", times, 1)?;
        "begun anew"
    } else {
        equal("what went on", &seen.moving, &vec![file])?;
        "/mnt/b (ext4, 1:2, in another mount namespace) was made writable while the rest was frozen"
    };
    ensure!(said.contains(words), "{said}");
    guest.writers_stop()?;
    for process in [&empty, &there] {
        guest.signal(process, 9)?;
        guest.wait(process, STEP)?;
    }
    stop(guest, guest.module(), &daemon)
}

fn unmounted_meanwhile(guest: &Guest, stage: Stage) -> Result<()> {
    make_hung(guest)?;
    // What is writable is open meanwhile, and what is read-only is looked at.
    guest.sh(
        "mkdir -p /mnt/b /mnt/c && mkfs.ext4 -q -F /dev/ram2 && mkfs.ext4 -q -F /dev/ram3
              mount /dev/ram2 /mnt/b && mount -o ro /dev/ram3 /mnt/c",
    )?;
    load(guest, guest.module(), &[])?;
    // It hangs for as long as the guest takes for the unmounts, however slow that is.
    let config = "give_up = 600\n[exclude]\npaths = ['/mnt/b']";
    let daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    prepare(guest)?;
    let freeze = hang_in(guest, &daemon, stage)?;
    guest.sh("umount /mnt/b && umount /mnt/c && [ ! -e /sys/fs/ext4/ram2 ]")?;
    guest.sh(UNHANG)?;
    answered("FREEZE", &guest.vss().wait(freeze, STEP)?, status::OK)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    let said = logged(guest, &daemon)?;
    ensure!(!said.contains("begun anew"), "{said}");
    stop(guest, guest.module(), &daemon)
}

fn exfat_meanwhile(guest: &Guest) -> Result<()> {
    make_hung(guest)?;
    guest.sh("modprobe exfat; mkdir -p /mnt/b && mkfs.exfat /dev/ram2")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    let freeze = hang_in(guest, &daemon, Stage::Freezing)?;
    guest.sh("mount -t exfat /dev/ram2 /mnt/b")?;
    guest.sh(UNHANG)?;
    answered("FREEZE", &guest.vss().wait(freeze, STEP)?, status::OK)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    guest.wait_until("the log ends", STEP, || {
        Ok(guest.output(&daemon)?.contains("the backup is good"))
    })?;
    let said = guest.output(&daemon)?;
    ensure!(said.contains("begun anew"), "{said}");
    ensure!(!said.contains("was mounted while"), "{said}");
    guest.sh("umount /mnt/b")?;
    stop(guest, guest.module(), &daemon)
}

fn unwanted_meanwhile(guest: &Guest) -> Result<()> {
    let slow = Attached::new(guest, 0, 0, 64, Image::default())?;
    load_driver(guest)?;
    let node = slow.node(guest)?;
    guest.sh(&format!(
        "mkdir -p /mnt/a /mnt/b /mnt/c && mkfs.ext4 -q -F {node} && mount {node} /mnt/a
         mkfs.ext4 -q -F /dev/ram2 && mkfs.ext4 -q -F /dev/ram3 && mount /dev/ram3 /mnt/c && sync"
    ))?;
    load(guest, guest.module(), &[])?;
    // It hangs for as long as the guest takes for mounts and unmounts, however slow that is.
    let config =
        "strict = true\ngive_up = 600\ndeadline = 600\n[exclude]\ndevices = ['1:2', '1:3']";
    let daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    slow.disk.set_hung(true);
    let vss = guest.vss();
    let tx = vss.send_freeze(&[])?;
    // Whenever its freeze, or the thaw before the next, is about to end, one of the two has come.
    let mut turns = [("ram2 /mnt/b", "/mnt/c"), ("ram3 /mnt/c", "/mnt/b")]
        .into_iter()
        .cycle();
    let mut reply = None;
    guest.wait_until("FREEZE is answered", STEP * 2, || {
        if slow.disk.waiting() > 0 {
            let (comes, goes) = turns.next().unwrap_or_default();
            guest.sh(&format!("mount /dev/{comes} && umount {goes}"))?;
            slow.disk.end_waiting();
        }
        reply = vss.try_reply(tx);
        Ok(reply.is_some())
    })?;
    slow.disk.set_hung(false);
    let reply = reply.context("no answer")?;
    answered("FREEZE with strict = true", &reply, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let log = logged_all(guest, &daemon, 2)?;
    ensure!(
        log.matches("it is begun anew").count() > 1,
        "it should have been begun anew more than once:\n{log}"
    );
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount /mnt/a; umount /mnt/b; umount /mnt/c; true")?;
    slow.detach(guest)
}

fn mounted_while_frozen_no_loss(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/b /mnt/c && mkfs.ext4 -q -F /dev/ram2 && mkfs.ext4 -q -F /dev/ram3
              mount /dev/ram2 /mnt/b && umount /mnt/b",
    )?;
    let vss = guest.vss();
    for &module in guest.modules() {
        load(guest, module, &[])?;
        let config = "strict = true\n[exclude]\npaths = ['/mnt/c']";
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.sh("busybox mount -t ext4 -n -o ro /dev/ram2 /mnt/b
                  busybox mount -t ext4 -n /dev/ram3 /mnt/c")?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        guest.sh("umount /mnt/b && umount /mnt/c")?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn mounted_before_another_freeze(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/b && mkfs.ext4 -q -F /dev/ram2")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    guest.sh("busybox mount -t ext4 -n /dev/ram2 /mnt/b")?;
    guest.writer_start("/mnt/b/w")?;
    equal("the second", &observe(guest)?, &good(&["/mnt/b/w"]))?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/b")?;
    stop(guest, guest.module(), &daemon)
}

fn lazily_unmounted_since(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe exfat; mkdir -p /mnt/b && mkfs.exfat /dev/ram2 >/dev/null
              mount -t exfat /dev/ram2 /mnt/b",
    )?;
    guest.writer_start("/mnt/b/w")?;
    let vss = guest.vss();
    load(guest, guest.module(), &[])?;
    let config = "/run/lazily.toml";
    let configure = |text: &str| guest.sh(&format!("printf '{text}' >{config}"));
    let reload = || guest.sh("/payload/hv_vss_daemon reload");
    configure("strict = true\\n")?;
    let daemon = guest.spawn(&["/payload/hv_vss_daemon", "-n", "-c", config])?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    guest.sh("umount -l /mnt/b")?;
    for _ in 0..2 {
        answered("FREEZE when held", &vss.freeze(&[], STEP)?, status::FAIL)?;
    }
    guest.wait_until("the log names it, and who has it open", STEP, || {
        let log = guest.output(&daemon)?;
        let name = "/mnt/b (exfat, 1:2, mounted no longer, open at /proc/";
        Ok(log.contains(name))
    })?;
    reload()?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE after a reload", &freeze, status::FAIL)?;
    configure("strict = true\\nexclude.paths = [\"/mnt/b\"]\\n")?;
    reload()?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE with a rule for it", &freeze, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    guest.wait_until("the log says by which rule", STEP, || {
        let rule = "left out: excluded by exclude path /mnt/b";
        Ok(guest.output(&daemon)?.contains(rule))
    })?;
    configure("strict = true\\n")?;
    reload()?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE without the rule", &freeze, status::FAIL)?;
    guest.writers_stop()?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh(&format!("rm {config}")).map(drop)
}

fn moves_since(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe dm-mod; mkdir -p /mnt/v
              dmsetup create vg-data --noudevsync --uuid LVM-data --table '0 65536 linear /dev/ram2 0'
              [ -e /dev/mapper/vg-data ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/vg-data && mount /dev/mapper/vg-data /mnt/v",
    )?;
    let vss = guest.vss();
    for (line, expected) in [
        ("strict = false", status::OK),
        ("strict = true", status::FAIL),
    ] {
        load(guest, guest.module(), &[])?;
        let daemon = guest.start_daemon_with(line)?;
        wait_for_daemon(guest)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        // As LVM does it: the volume is put onto one that copies. That has no need of the frozen root, as
        // long as all that runs is in memory.
        guest.sh(
            "dmsetup create vg-pvmove0 --noudevsync --uuid LVM-move \\
                  --table '0 32768 linear /dev/ram2 0
32768 32768 linear /dev/ram3 0' >/dev/null
              dmsetup suspend --nolockfs --noudevsync vg-data
              dmsetup reload vg-data --table \"0 65536 linear $(dmsetup info -c --noheadings -o major,minor \\
                  --separator : vg-pvmove0) 0\"
              dmsetup resume --noudevsync vg-data",
        )?;
        answered(line, &vss.thaw(STEP)?, expected)?;
        guest.wait_until("the log names it", STEP, || {
            Ok(guest.output(&daemon)?.contains("(pvmove) copies from disk"))
        })?;
        guest.sh("dmsetup suspend --noudevsync vg-data
              dmsetup reload vg-data --table '0 65536 linear /dev/ram2 0'
              dmsetup resume --noudevsync vg-data && dmsetup remove --noudevsync vg-pvmove0")?;
        stop(guest, guest.module(), &daemon)?;
    }
    guest.sh("umount /mnt/v && dmsetup remove --noudevsync vg-data")?;
    Ok(())
}

fn mounted_while_frozen(guest: &Guest, fs_type: &str) -> Result<()> {
    // Mounted once, so that nothing has to be loaded while root is frozen.
    guest.sh(&format!(
        "mkdir -p /mnt/b && modprobe {fs_type}; wipefs -aq /dev/ram2; mkfs.{fs_type} /dev/ram2 </dev/null >/dev/null
              mount -t {fs_type} /dev/ram2 /mnt/b && umount /mnt/b"
    ))?;
    let vss = guest.vss();
    for &module in guest.modules() {
        for (line, expected) in [
            ("strict = false", status::OK),
            ("strict = true", status::FAIL),
        ] {
            load(guest, module, &[])?;
            let daemon = guest.start_daemon_with(line)?;
            wait_for_daemon(guest)?;
            answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
            guest.sh(&format!("busybox mount -t {fs_type} -n /dev/ram2 /mnt/b"))?;
            answered(line, &vss.thaw(STEP)?, expected)?;
            guest.wait_until("the log names it", STEP, || {
                let name = format!("/mnt/b ({fs_type}, 1:2) was mounted while");
                Ok(guest.output(&daemon)?.contains(&name))
            })?;
            guest.sh("umount /mnt/b")?;
            stop(guest, module, &daemon)?;
        }
    }
    Ok(())
}

fn mounted_elsewhere_since(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2")?;
    let apart = ["unshare", "--mount", "--propagation", "private"];
    let holder = guest.spawn(&[&apart[..], &["sleep", "1000"]].concat())?;
    let pid = holder.pid;
    guest.wait_until("the namespace is there", STEP, || {
        let same = format!("[ $(readlink /proc/{pid}/ns/mnt) = $(readlink /proc/1/ns/mnt) ]");
        Ok(guest.try_sh(&same)?.status == Some(1))
    })?;
    start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    guest.sh(&format!(
        "nsenter --mount=/proc/{pid}/ns/mnt mount /dev/ram1 /mnt/a"
    ))?;
    let first = format!("/proc/{pid}/root/mnt/a/w");
    guest.writer_start(&first)?;
    equal("the backup", &observe(guest)?, &good(&[&first]))?;

    prepare(guest)?;
    let mount = "mount /dev/ram2 /mnt/b && touch /run/mounted && exec sleep 1000";
    let second = guest.spawn(&[&apart[..], &["sh", "-c", mount]].concat())?;
    guest.wait_until("it is mounted over there", STEP, || {
        Ok(guest.try_sh("rm /run/mounted")?.status == Some(0))
    })?;
    let second = format!("/proc/{}/root/mnt/b/w", second.pid);
    guest.writer_start(&second)?;
    equal(
        "the next backup",
        &observe(guest)?,
        &good(&[&first, &second]),
    )
}

fn writable_since(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount -o ro /dev/ram1 /mnt/a")?;
    start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    // The table of the daemon's own namespace does not change by this.
    guest.sh(
        "unshare --mount --propagation private mount -o remount,rw /mnt/a
              mount -o remount,bind,rw /mnt/a 2>/dev/null; true",
    )?;
    let writable = guest.try_sh("touch /mnt/a/w")?;
    equal(
        "touch of the file system that is writable now",
        writable.status,
        Some(0),
    )?;
    guest.writer_start("/mnt/a/w")?;
    equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))
}

fn writable_while_frozen(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount -o ro /dev/ram1 /mnt/a",
    )?;
    let vss = guest.vss();
    for (line, expected) in [
        ("strict = false", status::OK),
        ("strict = true", status::FAIL),
    ] {
        load(guest, guest.module(), &[])?;
        let daemon = guest.start_daemon_with(line)?;
        wait_for_daemon(guest)?;
        guest.sh("mount -o ro /dev/ram2 /mnt/b")?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.sh("umount /mnt/b")?;
        answered("THAW after an unmount", &vss.thaw(STEP)?, status::OK)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.sh("busybox mount -o remount,rw /mnt/a")?;
        answered(line, &vss.thaw(STEP)?, expected)?;
        guest.wait_until("the log names it, and nothing else", STEP, || {
            let log = guest.output(&daemon)?;
            let names = |it: &&str| it.contains("while the rest was frozen, and was not frozen");
            let named: Vec<&str> = log.lines().filter(names).collect();
            Ok(named.len() == 1 && named[0].contains("/mnt/a (ext4, 1:1) was made writable"))
        })?;
        guest.sh("mount -o remount,ro /mnt/a")?;
        stop(guest, guest.module(), &daemon)?;
    }
    Ok(())
}

fn number_of_another(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe btrfs; mkdir -p /mnt/a /mnt/b /mnt/t && mkfs.ext4 -q -F /dev/ram1 &&
         mount /dev/ram1 /mnt/a && mkfs.btrfs -q -f /dev/ram2 && mount -t tmpfs none /mnt/t",
    )?;
    let number_at = |path: &str| -> Result<String> {
        let table = guest.read("/proc/self/mountinfo")?;
        let mut lines = table.lines().map(|it| it.split(' ').collect::<Vec<_>>());
        let line = lines.find(|it| it.get(4) == Some(&path));
        Ok(line.context("it is not mounted")?[2].to_owned())
    };
    let number = number_at("/mnt/t")?;
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh("umount /mnt/t && mount -t btrfs /dev/ram2 /mnt/b")?;
    equal("its number", &number_at("/mnt/b")?, &number)?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    let words = format!("/mnt/b (btrfs, {number}) was mounted while the rest was frozen");
    guest.wait_until("the log names it", STEP, || {
        Ok(guest.output(&daemon)?.contains(&words))
    })?;
    stop(guest, guest.module(), &daemon)
}

fn moved_since(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    guest.sh("mount --move /mnt/a /mnt/b")?;
    equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))
}

fn stacked_since(guest: &Guest) -> Result<()> {
    // What is mounted stays the same; what it stands on does not.
    guest.sh(
        "modprobe dm-mod; modprobe loop; mkdir -p /mnt/disk /mnt/mapped
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 32M /mnt/disk/image && losetup /dev/loop0 /mnt/disk/image
              dmsetup create mapped --noudevsync --table '0 65536 linear /dev/ram2 0'
              [ -e /dev/mapper/mapped ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/mapped && mount /dev/mapper/mapped /mnt/mapped",
    )?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    prepare(guest)?;
    guest.sh(
        "dmsetup suspend mapped && dd if=/dev/ram2 of=/dev/loop0 bs=1M count=32 2>/dev/null
              dmsetup reload mapped --table '0 65536 linear /dev/loop0 0' && dmsetup resume mapped",
    )?;
    guest.writer_start("/mnt/disk/w")?;
    guest.writer_start("/mnt/mapped/w")?;
    let files = ["/mnt/disk/w", "/mnt/mapped/w"];
    equal("the backup", &observe(guest)?, &good(&files))?;
    let log = logged(guest, &daemon)?;
    let last = log
        .rsplit("FREEZE from the host")
        .next()
        .unwrap_or_default();
    let frozen: Vec<&str> = last
        .lines()
        .filter(|line| line.contains(" frozen, took "))
        .filter_map(|line| line.split(": ").nth(2)?.split(' ').next())
        .collect();
    equal(
        "the order of the freeze",
        frozen,
        vec!["/mnt/mapped", "/mnt/disk", "/"],
    )
}
