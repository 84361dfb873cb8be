// SPDX-License-Identifier: GPL-2.0-only

//! Others freeze and thaw, too; daemons are stopped and guards; configurations have typing errors. What
//! the host is told is true all the same, and nothing stays frozen.
//!
//! Where the module holds what is frozen nobody else can thaw it, so that much of this is a matter of
//! FIFREEZE, which is what there is with the stock `hv_utils`.

use super::deadman::{
    guard_of, hang_writes, make_hung, released, released_at, remove_hung, RELEASED, UNHANG,
};
use super::disks::{self, load_driver, Attached};
use super::{
    all_frozen, case, good_backup, load, logged, module_holds, observe, start, stop,
    wait_for_daemon, wait_out, who_stands_still, Case,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "foreign/suspended-for-a-moment",
        "a volume suspended when FREEZE comes and resumed a moment later is frozen, stock module",
        |guest| suspended(guest, Module::Stock),
    )
    .comparing(),
    case(
        "foreign/suspended-for-a-moment-ours",
        "the same with our module",
        |guest| suspended(guest, Module::Ours),
    )
    .asking_our_module(),
    case(
        "foreign/suspended-all-the-time",
        "suspend and resume in a loop, stock module: never good with a writer moving",
        |guest| loops(guest, Module::Stock, SUSPEND_LOOP),
    )
    .long(),
    case(
        "foreign/frozen-all-the-time",
        "fsfreeze -f and -u in a loop, stock module: never good with a writer moving",
        |guest| loops(guest, Module::Stock, FREEZE_LOOP),
    ),
    case(
        "foreign/frozen-all-the-time-ours",
        "the same with our module",
        |guest| loops(guest, Module::Ours, FREEZE_LOOP),
    )
    .long()
    .asking_our_module(),
    case(
        "foreign/released-in-the-window",
        "frozen by an administrator before, thawed in the window: THAW fails and names it",
        released_in_the_window,
    ),
    case(
        "foreign/thawed-for-a-moment",
        "thawed and frozen again between two looks, stock module: THAW fails and names it",
        thawed_for_a_moment,
    )
    .comparing(),
    case(
        "foreign/kept-frozen",
        "frozen by an administrator all the time: it counts and stays theirs",
        kept_frozen,
    )
    .long(),
    case(
        "foreign/image-on-kept-frozen",
        "stock module: an image on what an administrator keeps frozen is left out by name, others are good, and all is again \
         when that is thawed",
        image_on_kept_frozen,
    ),
    case(
        "foreign/kept-frozen-and-daemon-killed",
        "kill -9 of the daemon while it waits for what an administrator has frozen, or the deadline, stock module: \
         it stays theirs",
        kept_frozen_and_daemon_killed,
    ),
    case(
        "foreign/suspended-at-thaw",
        "a volume is suspended in the window and still is at THAW, both modules: the backup is good",
        suspended_at_thaw,
    )
    .long(),
    case(
        "foreign/quit-key",
        "SIGQUIT to the group of a rehearsal (Ctrl-\\) leaves nothing frozen",
        quit_key,
    ),
    case(
        "foreign/stopped-and-started",
        "stock module: stopped while frozen and started again, the daemon fails the THAW",
        stopped_and_started,
    )
    .long(),
    case(
        "foreign/guard-stopped",
        "the guard is stopped (SIGSTOP) and the host never thaws: the daemon does; no other signal ends a guard",
        guard_stopped,
    ),
    case(
        "foreign/guard-stopped-and-daemon-killed",
        "the guard is stopped and the daemon killed while frozen: thaw comes to its end, and so does a start",
        guard_stopped_and_daemon_killed,
    ),
    case(
        "foreign/half-frozen",
        "somebody's freeze still waits for a writer: it does not count, strict fails; with its end it does",
        half_frozen,
    ),
    disks::case(
        "foreign/exported-image",
        "stock module: what the kernel writes to a file past the freeze, for others who have it as a disk, is not taken for \
         a thaw",
        exported_image,
    ),
    case(
        "foreign/frozen-history",
        "an administrator has frozen what the history is on, both modules: each backup is good all the same",
        frozen_history,
    ),
    case(
        "foreign/bad-configuration",
        "daemon and guard killed, the configuration broken: thaw thaws, and so does a start",
        bad_configuration,
    )
    .long(),
    case(
        "foreign/nothing-to-freeze",
        "an [include] that names nothing: said in the log, and fails when strict",
        nothing_to_freeze,
    ),
    case(
        "foreign/late-answer",
        "a THAW whose answer comes too late is not called good",
        late_answer,
    )
    .asking_our_module(),
    case(
        "foreign/hung-neighbour",
        "one that hangs in its freeze is given up, the others go on long before; ours backs them up",
        hung_neighbour,
    )
    .comparing()
    .long(),
];

/// How many backups a loop has to spoil.
const BACKUPS: usize = 12;

const SUSPEND_LOOP: &str = "while :; do
    dmsetup suspend v; sleep 0.05; dmsetup resume v; sleep 0.05
done";
const FREEZE_LOOP: &str = "while :; do
    fsfreeze -f /mnt/v 2>/dev/null; sleep 0.05; fsfreeze -u /mnt/v 2>/dev/null; sleep 0.05
done";

/// A volume that can be suspended, and a file system beside it, each with a writer.
fn make_volume(guest: &Guest) -> Result<()> {
    guest.sh("modprobe dm-mod; mkdir -p /mnt/a /mnt/v
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              dmsetup create v --noudevsync --table '0 131072 linear /dev/ram2 0'
              [ -e /dev/mapper/v ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/v && mount /dev/mapper/v /mnt/v")?;
    guest.writer_start("/mnt/a/w")?;
    Ok(guest.writer_start("/mnt/v/w")?)
}

fn suspended(guest: &Guest, module: Module) -> Result<()> {
    make_volume(guest)?;
    let daemon = start(guest, module, Daemon::Ours)?;
    let seen = with_resume(guest)?;
    equal(
        "both answered 0, both stood still",
        &seen,
        &super::good(&["/mnt/a/w", "/mnt/v/w"]),
    )?;
    stop(guest, module, &daemon)?;
    if module == Module::Stock {
        let ours = super::describe(&seen);
        let peer = start(guest, Module::Stock, Daemon::Debian)?;
        let seen = with_resume(guest)?;
        stop(guest, Module::Stock, &peer)?;
        guest.compare(
            "a volume is suspended (LVM snapshot) when FREEZE comes, and resumed 1 s later",
            &ours,
            &super::describe(&seen),
        );
    }
    Ok(())
}

/// A backup that begins while the volume is suspended, which is over a second later.
fn with_resume(guest: &Guest) -> Result<super::Seen> {
    guest.sh("dmsetup suspend v")?;
    let resume = guest.spawn(&["sh", "-c", "sleep 1; dmsetup resume v"])?;
    let seen = observe(guest)?;
    guest.wait(&resume, STEP)?;
    Ok(seen)
}

/// Two hold it then, and a thaw leaves it to the other one: no kernel is to say that it was not frozen.
fn suspended_at_thaw(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    for &module in guest.modules() {
        let daemon = start(guest, module, Daemon::Ours)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        // Up to 6.7 there can be one only, and then a volume that is frozen cannot be suspended.
        let is_suspended = guest.try_sh("dmsetup suspend v")?.status == Some(0);
        let thaw = vss.thaw(STEP)?;
        let at = guest.clock()?;
        println!(
            "     {module:?}: the volume is suspended: {is_suspended}; THAW {}",
            status_name(thaw.status())
        );
        answered("THAW", &thaw, status::OK)?;
        if is_suspended {
            guest.sh("dmsetup resume v")?;
        }
        released(guest, "after THAW and resume", at, RELEASED)?;
        guest.not_frozen("after it", &["/", "/mnt/a", "/mnt/v"])?;
        good_backup(guest)?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn loops(guest: &Guest, module: Module, rude: &str) -> Result<()> {
    make_volume(guest)?;
    load(guest, module, &[])?;
    guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let rude = guest.spawn(&["sh", "-c", rude])?;
    let vss = guest.vss();
    let (mut good, mut failed) = (0, 0);
    for number in 1..=BACKUPS {
        if vss.freeze(&[], STEP)?.status() != status::OK {
            failed += 1;
            continue;
        }
        let (_, moving) = who_stands_still(guest)?;
        let thaw = vss.thaw(STEP)?.status();
        ensure!(
            thaw != status::OK || moving.is_empty(),
            "backup {number} was called good, but these were written while frozen: {moving:?}"
        );
        match thaw {
            status::OK => good += 1,
            _ => failed += 1,
        }
    }
    println!("     {good} backups good with nobody moving, {failed} failed");
    // With the stock module all may be spoilt; what ours holds nobody else can thaw.
    ensure!(
        good > 0 || module == Module::Stock,
        "none of {BACKUPS} backups was good"
    );
    guest.signal(&rude, 9)?;
    guest.wait(&rude, STEP)?;
    guest.sh("dmsetup resume v; fsfreeze -u /mnt/v 2>/dev/null; true")?;
    good_backup(guest)
        .map(drop)
        .context("the first backup without the loop")
}

fn released_in_the_window(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    for (module, freeze, thaw) in [
        (Module::Stock, status::OK, status::FAIL),
        // What the module holds beside the administrator stays frozen.
        (Module::Ours, status::OK, status::OK),
    ] {
        if !guest.modules().contains(&module) {
            continue;
        }
        let daemon = start(guest, module, Daemon::Ours)?;
        let held = module_holds(guest)?;
        guest.freeze("/mnt/v")?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, freeze)?;
        guest.thaw("/mnt/v")?;
        // Long enough for a write, if there can be one.
        who_stands_still(guest)?;
        let expected = if held { thaw } else { status::FAIL };
        answered("THAW", &vss.thaw(STEP)?, expected)?;
        if !held {
            guest.wait_until("the log names it", STEP, || {
                let said = guest.output(&daemon)?;
                Ok(said.contains("error: ") && said.contains("/mnt/v"))
            })?;
        }
        released(guest, "after THAW", guest.clock()?, RELEASED)?;
        guest.not_frozen("after it", &["/mnt/v"])?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn thawed_for_a_moment(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    let mut told = Vec::new();
    for daemon in [Daemon::Ours, Daemon::Debian] {
        let process = start(guest, Module::Stock, daemon)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        // While it is stopped it cannot look, however often it does.
        guest.signal(&process, 19)?;
        let before = count_of(guest, "/mnt/v/w")?;
        guest.thaw("/mnt/v")?;
        guest.wait_until("the writer has gone on", STEP, || {
            Ok(count_of(guest, "/mnt/v/w")? > before + 1)
        })?;
        guest.freeze("/mnt/v")?;
        guest.signal(&process, 18)?;
        let thaw = vss.thaw(STEP)?.status();
        released(guest, "after THAW", guest.clock()?, RELEASED)?;
        told.push(format!(
            "a writer goes on in the window; THAW {}",
            status_name(thaw)
        ));
        if daemon == Daemon::Ours {
            equal("THAW", thaw, status::FAIL)?;
            guest.wait_until("the log names it", STEP, || {
                let said = guest.output(&process)?;
                Ok(said.contains("/mnt/v") && said.contains("was written to"))
            })?;
            good_backup(guest)?;
            untold(guest, &process)?;
        }
        stop(guest, Module::Stock, &process)?;
    }
    guest.compare(
        "an administrator thaws one file system for a moment and freezes it again, stock hv_utils",
        told.first().map_or("", String::as_str),
        told.last().map_or("", String::as_str),
    );
    Ok(())
}

/// Where the volume does not count, what was written tells nothing, and the log says so.
fn untold(guest: &Guest, daemon: &Process) -> Result<()> {
    let volume = guest.sh("dmsetup info -c --noheadings -o blkdevname v")?;
    let folder = format!("/sys/block/{}", volume.trim());
    guest.sh(&format!("echo 0 >{folder}/queue/iostats"))?;
    let written = || guest.sh(&format!("sync && awk '{{ print $7 }}' {folder}/stat"));
    let before = written()?;
    let writes = count_of(guest, "/mnt/v/w")?;
    guest.wait_until("the writer has gone on", STEP, || {
        Ok(count_of(guest, "/mnt/v/w")? > writes + 1)
    })?;
    // Before 6.4 it counts all the same.
    if written()? == before {
        good_backup(guest)?;
        guest.wait_until("the log says what is not seen", STEP, || {
            let said = guest.output(daemon)?;
            let mut lines = said.lines().filter(|it| it.contains("that is not seen"));
            Ok(lines.any(|it| it.contains("/mnt/v (ext4") && it.contains("counters are off")))
        })?;
    }
    guest
        .sh(&format!("echo 1 >{folder}/queue/iostats"))
        .map(drop)
}

/// How often the writer of this file has written.
fn count_of(guest: &Guest, path: &str) -> Result<u64> {
    let writers = guest.writers()?;
    let mut counts = writers.iter().filter(|it| it.path == path);
    Ok(counts.next().map_or(0, |it| it.count))
}

fn kept_frozen(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    for &module in guest.modules() {
        let daemon = start(guest, module, Daemon::Ours)?;
        guest.freeze("/mnt/v")?;
        let seen = observe(guest)?;
        equal("FREEZE", seen.freeze, status::OK)?;
        equal("THAW", seen.thaw, Some(status::OK))?;
        equal("who moved in the window", seen.moving, Vec::new())?;
        equal(
            "who stands still after it",
            seen.stuck,
            vec!["/mnt/v/w".to_owned()],
        )?;
        guest.thaw("/mnt/v")?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn image_on_kept_frozen(guest: &Guest) -> Result<()> {
    const IMAGE: &str = "/mnt/image";
    make_volume(guest)?;
    guest.sh(&format!(
        "modprobe loop; mkdir -p {IMAGE} && truncate -s 32M /mnt/v/image && mkfs.ext4 -q -F /mnt/v/image &&
         mount -o loop /mnt/v/image {IMAGE} && sync"
    ))?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    guest.freeze("/mnt/v")?;
    // One whose freeze hangs would fail all that come after it, too.
    for _ in 0..2 {
        let seen = observe(guest)?;
        equal("FREEZE", seen.freeze, status::OK)?;
        equal("THAW", seen.thaw, Some(status::OK))?;
        equal("who moved in the window", seen.moving, Vec::new())?;
    }
    let words = "somebody else has frozen; it is left out";
    says(guest, &daemon, "warning", words)?;
    guest.thaw("/mnt/v")?;
    let seen = observe(guest)?;
    equal("THAW after it", seen.thaw, Some(status::OK))?;
    says(guest, &daemon, "/mnt/image (ext4", "frozen, took")?;
    stop(guest, Module::Stock, &daemon)?;
    guest
        .sh(&format!("umount {IMAGE} && rm /mnt/v/image"))
        .map(drop)
}

/// Of some kernels what an administrator is freezing seems to be frozen while writers are under way. Of the others a freeze
/// of ours waits with theirs.
fn half_frozen(guest: &Guest) -> Result<()> {
    make_hung(guest)?;
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.sh(&format!(
        "dd if=/dev/zero of=/mnt/hung/file bs=64k count=1 2>/dev/null && sync && {}",
        hang_writes("hung")
    ))?;
    let waits_in = |it: &Process, call: &str| {
        let file = format!("/proc/{}/syscall", it.pid);
        guest.wait_until("it waits", STEP, || {
            Ok(guest.read(&file)?.starts_with(call))
        })
    };
    let file = "of=/mnt/hung/file";
    let write = [
        "dd",
        "if=/dev/zero",
        file,
        "bs=64k",
        "count=1",
        "oflag=direct",
        "conv=notrunc",
    ];
    let write = guest.spawn(&write)?;
    waits_in(&write, "1 0x1 ")?;
    let freeze = guest.spawn(&["fsfreeze", "-f", "/mnt/hung"])?;
    waits_in(&freeze, "16 0x3 0xc0045877 ")?;
    let other = guest.spawn(&["fsfreeze", "-f", "/mnt/hung"])?;
    let seems_frozen = guest.wait(&other, Duration::from_secs(2)).is_ok();
    guest.writer_start("/mnt/a/w")?;
    for (config, expected) in [
        ("give_up = 2", status::OK),
        ("give_up = 2\nstrict = true", status::FAIL),
    ] {
        if !seems_frozen {
            continue;
        }
        load(guest, Module::Stock, &[])?;
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        let answer = guest.vss().freeze(&[], STEP)?;
        answered("FREEZE beside half a freeze", &answer, expected)?;
        if expected == status::OK {
            answered("THAW", &guest.vss().thaw(STEP)?, expected)?;
        }
        guest.wait_until("it is named", STEP, || {
            let said = guest.output(&daemon)?;
            ensure!(!said.contains("it counts"), "it should not count:\n{said}");
            Ok(said.contains("/mnt/hung (ext4, 254:0) is being frozen by fsfreeze"))
        })?;
        stop(guest, Module::Stock, &daemon)?;
    }
    guest.sh(UNHANG)?;
    guest.wait(&write, STEP)?;
    guest.wait(&freeze, STEP)?;
    if !seems_frozen {
        guest.wait(&other, STEP)?;
    }
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let seen = observe(guest)?;
    equal("FREEZE beside a whole one", seen.freeze, status::OK)?;
    let said = guest.output(&daemon)?;
    ensure!(
        said.contains("it counts and stays theirs"),
        "it should count:\n{said}"
    );
    guest.sh("fsfreeze -u /mnt/hung")?;
    stop(guest, Module::Stock, &daemon)?;
    guest.writers_stop()?;
    remove_hung(guest)
}

/// Of some kernels the disk of an image is written to while its file system is frozen, of others that waits.
fn exported_image(guest: &Guest) -> Result<()> {
    let disk = Attached::new(guest, 0, 0, 64, Image::default())?;
    load_driver(guest)?;
    let node = disk.node(guest)?;
    let name = node.trim_start_matches("/dev/").to_owned();
    // Neither has it a folder of its own here, nor all kinds of disks, nor does it know what a disk is asked today.
    guest.expect_in_log(&[
        "db_root: cannot open: /etc/target",
        "Unable to load target_core_",
        "MODE SENSE: unimplemented page",
    ])?;
    // With the time of each write ext4 would notice that it is frozen, and complain.
    guest.sh(&format!(
        "mkdir -p /mnt/v && mkfs.ext4 -q -F {node} && mount -o lazytime {node} /mnt/v &&
         dd if=/dev/zero of=/mnt/v/image bs=1M count=8 2>/dev/null && sync && modprobe -a target_core_file tcm_loop
         [ -e /sys/kernel/config/target ] || mount -t configfs none /sys/kernel/config
         cd /sys/kernel/config/target && mkdir -p core/fileio_0/image {LOOPBACK}/lun/lun_0 &&
         echo fd_dev_name=/mnt/v/image,fd_dev_size=8388608,fd_async_io=1 >core/fileio_0/image/control &&
         echo 1 >core/fileio_0/image/enable && echo naa.6001405000000002 >{LOOPBACK}/nexus &&
         ln -s /sys/kernel/config/target/core/fileio_0/image {LOOPBACK}/lun/lun_0/it"
    ))?;
    let mut exported = String::new();
    guest.wait_until("the image is a disk", STEP, || {
        let said = guest
            .try_sh("grep -l LIO-ORG /sys/block/sd*/device/vendor")?
            .out;
        exported = said.split('/').nth(3).unwrap_or_default().to_owned();
        Ok(!exported.is_empty()
            && guest.try_sh(&format!("test -b /dev/{exported}"))?.status == Some(0))
    })?;
    let written = || -> Result<String> {
        let stat = guest.read(&format!("/sys/block/{name}/stat"))?;
        Ok(stat.split_whitespace().nth(6).unwrap_or_default().into())
    };
    let vss = guest.vss();
    for is_strict in [false, true] {
        load(guest, Module::Stock, &[])?;
        let daemon = guest.start_daemon_with(&format!("strict = {is_strict}"))?;
        wait_for_daemon(guest)?;
        answered(
            "FREEZE",
            &vss.freeze(&[disk.in_backup()], STEP)?,
            status::OK,
        )?;
        let before = written()?;
        let write =
            format!("dd if=/dev/zero of=/dev/{exported} bs=64k count=4 oflag=direct 2>/dev/null");
        let write = guest.spawn(&["sh", "-c", &write])?;
        wait_out(guest, Duration::from_secs(1))?;
        let passes = written()? != before;
        let expected = match passes && is_strict {
            true => status::FAIL,
            false => status::OK,
        };
        answered("THAW", &vss.thaw(STEP)?, expected)?;
        guest.wait(&write, STEP)?;
        let told = format!("something was written to {node} while");
        let log = logged(guest, &daemon)?;
        ensure!(
            log.contains(&told) == passes
                && (!passes || log.contains("to the file of fileio_0/image")),
            "it was written to: {passes}, which should be said:\n{log}"
        );
        stop(guest, Module::Stock, &daemon)?;
    }
    guest.sh(&format!(
        "cd /sys/kernel/config/target && rm {LOOPBACK}/lun/lun_0/it && rmdir {LOOPBACK}/lun/lun_0 {LOOPBACK} &&
         rmdir loopback/naa.6001405000000001 &&
         rmdir core/fileio_0/image core/fileio_0 && umount /mnt/v"
    ))?;
    disk.detach(guest)
}

/// Where it is exported to this machine itself.
const LOOPBACK: &str = "loopback/naa.6001405000000001/tpgt_1";

fn kept_frozen_and_daemon_killed(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    // It waits for longer than a deadline of so much.
    for kills in [true, false] {
        load(guest, Module::Stock, &[])?;
        let daemon = match kills {
            true => guest.start_daemon(Daemon::Ours)?,
            false => {
                let limit = Duration::from_secs(3);
                guest.start_daemon_within("deadline", limit)?.0
            }
        };
        wait_for_daemon(guest)?;
        guest.freeze("/mnt/v")?;
        let freeze = vss.send_freeze(&[])?;
        guest.wait_until("the freeze is on record", STEP, || {
            Ok(guest.try_sh("test -e /run/hv_vss/frozen.json")?.status == Some(0))
        })?;
        wait_out(guest, Duration::from_millis(500))?;
        if kills {
            stop_between_attempts(guest, &daemon)?;
            guest.signal(&daemon, 9)?;
            guest.wait(&daemon, STEP)?;
            guest.sh("/payload/hv_vss_daemon thaw")?;
        }
        answered("FREEZE", &vss.wait(freeze, STEP)?, status::FAIL)?;
        let before = count_of(guest, "/mnt/v/w")?;
        wait_out(guest, RELEASED)?;
        equal(
            &format!("who stands still, killed: {kills}"),
            super::stuck_writers(guest)?,
            vec!["/mnt/v/w".to_owned()],
        )?;
        equal("writes there", count_of(guest, "/mnt/v/w")?, before)?;
        guest.thaw("/mnt/v").context("their own thaw")?;
        if !kills {
            good_backup(guest)?;
            guest.signal(&daemon, 9)?;
            guest.wait(&daemon, STEP)?;
        }
        guest.unload(Module::Stock)?;
        vss.wait_closed(STEP)?;
    }
    Ok(())
}

/// Stops the daemon where it is nearly all the time while it waits for what somebody else has frozen: of one that dies in
/// the very attempt nobody could tell whether that has frozen it.
fn stop_between_attempts(guest: &Guest, daemon: &Process) -> Result<()> {
    // `nanosleep` of the thread that freezes.
    let sleeps = format!(
        "for it in /proc/{}/task/*; do
             read name <$it/comm; [ $name != backup ] || cut -d ' ' -f 1 <$it/syscall
         done",
        daemon.pid
    );
    guest.wait_until("it is stopped between two attempts", STEP, || {
        guest.signal(daemon, 19)?;
        let is_between = guest.sh(&sleeps)?.trim() == "230";
        if !is_between {
            guest.signal(daemon, 18)?;
        }
        Ok(is_between)
    })
}

fn quit_key(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    for signal in ["QUIT", "INT", "KILL"] {
        // A group of its own, as a shell with job control gives a command.
        let line = "exec setsid sh -c 'echo $$ >/run/group; \
                    exec /payload/hv_vss_daemon freeze --for 50s'";
        let rehearsal = guest.spawn(&["sh", "-c", line])?;
        guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        guest.sh(&format!("kill -s {signal} -- -$(cat /run/group)"))?;
        let at = guest.clock()?;
        released(guest, &format!("SIG{signal} to the group"), at, RELEASED)?;
        guest.wait(&rehearsal, STEP)?;
        guest.not_frozen("after it", &["/", "/mnt/a", "/mnt/v"])?;
    }
    Ok(())
}

fn stopped_and_started(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    released(guest, "the stop", guest.clock()?, RELEASED)?;
    // Whatever has come into the configuration meanwhile, it is the heir of that one.
    let daemon = guest.start_daemon_with("run_dir = '/run/other'")?;
    wait_for_daemon(guest)?;
    answered("THAW after a new start", &vss.thaw(STEP)?, status::FAIL)?;
    answered("THAW once more", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    // With that it is forgotten.
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    // The same where there is no room left to remember it in.
    guest.sh("mkdir -p /run/hv_vss && mount -t tmpfs -o size=64k none /run/hv_vss")?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("THAW of nothing", &vss.thaw(STEP)?, status::OK)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(
        "dd if=/dev/zero of=/run/hv_vss/fill bs=4k 2>/dev/null; ! echo full >/run/hv_vss/more",
    )?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    guest.sh("rm /run/hv_vss/fill")?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("THAW after a start", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.sh("umount /run/hv_vss").map(drop)
}

fn guard_stopped(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    let (daemon, deadline) = guest.start_daemon_within("deadline", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    let guard = guard_of(guest, &daemon)?;
    guest.signal_all(&[guard], 19)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let frozen = guest.clock()?;
    // The daemon gives the guard a second.
    released_at(guest, "the deadline", frozen, deadline + RELEASED)?;
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    // It is not left to be: nobody would mind the next ones, and what it was handed could not be unmounted.
    guest.wait_until("it is replaced", STEP, || {
        Ok(guest.output(&daemon)?.contains("the guard is replaced"))
    })?;
    good_backup(guest).context("the next backup")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    // A service manager that stops the rest of a group, a terminal that is closed, a key.
    let guard = guard_of(guest, &daemon)?;
    for signal in [15, 2, 3, 1] {
        guest.signal_all(&[guard], signal)?;
    }
    guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
    equal("the guard, after them", guard_of(guest, &daemon)?, guard)?;
    let killed = guest.signal_all(&[daemon.pid], 9)?;
    released(guest, "the death of the daemon", killed, RELEASED)?;
    guest.wait(&daemon, STEP)?;
    Ok(())
}

fn guard_stopped_and_daemon_killed(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    for remedy in ["thaw", "a start"] {
        let daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        let guard = guard_of(guest, &daemon)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.signal_all(&[guard], 19)?;
        guest.signal(&daemon, 9)?;
        guest.wait(&daemon, STEP)?;
        if remedy == "thaw" {
            let thaw = guest.spawn(&["/payload/hv_vss_daemon", "thaw"])?;
            let ended = guest.wait(&thaw, STEP)?;
            equal("the exit status of thaw", ended.status, Some(0))?;
        }
        let daemon = guest.start_daemon(Daemon::Ours)?;
        released(guest, remedy, guest.clock()?, RELEASED * 2)?;
        wait_for_daemon(guest)?;
        answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
        if remedy == "a start" {
            guest.wait_until("all is undone", STEP, || {
                let said = guest.output(&daemon)?;
                Ok(said.contains("the freeze of another process is undone"))
            })?;
        }
        good_backup(guest).context("the next backup")?;
        guest.signal(&daemon, 15)?;
        guest.wait(&daemon, STEP)?;
    }
    Ok(())
}

fn frozen_history(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/writer")?;
    // It is not waited for what is not to be frozen.
    let config = "state_dir = '/mnt/a/s'\n[exclude]\npaths = ['/mnt/a']";
    for &module in guest.modules() {
        guest.sh("rm -rf /mnt/a/s")?;
        load(guest, module, &[])?;
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        guest.freeze("/mnt/a")?;
        for number in 1..=2 {
            let seen = observe(guest)?;
            equal(&format!("backup {number}"), seen, super::good(&["/writer"]))?;
        }
        guest.thaw("/mnt/a")?;
        guest.wait_until("both are in the history", STEP, || {
            let text = guest.try_sh("cat /mnt/a/s/history.jsonl")?;
            Ok(text.out.lines().count() == 2)
        })?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn bad_configuration(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    let with_config = ["/payload/hv_vss_daemon", "-n", "-c", "/run/typo.toml"];
    let fifo = "rm /run/typo.toml && mkfifo /run/typo.toml";
    for (remedy, spoil) in [
        ("thaw", fifo),
        ("-n", "printf 'deadlin = 50\\n' >/run/typo.toml"),
        ("-n", fifo),
    ] {
        guest.sh("rm -f /run/typo.toml; printf 'deadline = 50\\nrun_dir = \"/run/other\"\\n' >/run/typo.toml")?;
        let daemon = guest.spawn(&with_config)?;
        wait_for_daemon(guest)?;
        let guard = guard_of(guest, &daemon)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.signal_all(&[daemon.pid, guard], 19)?;
        guest.signal_all(&[guard, daemon.pid], 9)?;
        guest.wait(&daemon, STEP)?;
        guest.sh(spoil)?;
        let line = format!("/payload/hv_vss_daemon -c /run/typo.toml {remedy}");
        let ended = guest.try_sh(&line)?;
        // The one reads no configuration, the other cannot go on without.
        let is_start = remedy == "-n";
        ensure!(
            ended.status == Some(i32::from(is_start))
                && ended.err.contains("/run/typo.toml") == is_start,
            "'{remedy}' should thaw, and say what is wrong if it cannot go on: {ended:?}"
        );
        released(guest, remedy, guest.clock()?, RELEASED)?;
        guest.not_frozen("after it", &["/", "/mnt/a", "/mnt/v"])?;
        // The THAW that is still to come fails, with the typing error mended.
        let daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        answered("THAW after all", &vss.thaw(STEP)?, status::FAIL)?;
        guest.signal(&daemon, 15)?;
        guest.wait(&daemon, STEP)?;
    }
    Ok(())
}

fn nothing_to_freeze(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    load(guest, guest.module(), super::short_grace(guest.module()))?;
    let typo = "[include]\npaths = ['/srw/*']";
    let daemon = guest.start_daemon_with(typo)?;
    wait_for_daemon(guest)?;
    answered("FREEZE of nothing", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    says(guest, &daemon, "warning: ", "nothing at all is frozen")?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;

    let daemon = guest.start_daemon_with(&format!("strict = true\n{typo}"))?;
    wait_for_daemon(guest)?;
    answered("FREEZE when strict", &vss.freeze(&[], STEP)?, status::FAIL)?;
    says(guest, &daemon, "error: ", "there is nothing to freeze")
}

/// Waits for a line of the log with both.
fn says(guest: &Guest, daemon: &Process, level: &str, words: &str) -> Result<()> {
    guest.wait_until(&format!("the log says {words:?}"), STEP, || {
        let said = guest.output(daemon)?;
        let mut lines = said.lines();
        Ok(lines.any(|line| line.contains(level) && line.contains(words)))
    })
}

fn late_answer(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    let vss = guest.vss();
    // What hangs the daemon leaves to itself after 1.5 s at the earliest, and answers then.
    load(guest, Module::Ours, &["timeout_ms=1000"])?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    // ext4 writes its superblock at a thaw, and that takes longer than the module waits.
    guest.sh("dmsetup suspend --noflush --nolockfs v")?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    guest.sh("dmsetup resume v")?;
    released(guest, "the resume", guest.clock()?, RELEASED)?;
    let said = logged(guest, &daemon)?;
    ensure!(
        !said.contains("the backup is good"),
        "the host was told that it failed, the log says:\n{said}"
    );
    good_backup(guest).context("the next backup")?;
    stop(guest, Module::Ours, &daemon)
}

fn hung_neighbour(guest: &Guest) -> Result<()> {
    make_volume(guest)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/v && mount -o barrier=0 /dev/mapper/v /mnt/v")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/writer")?;
    let vss = guest.vss();
    let mut ours = String::new();
    for (module, config, expected) in [
        // Nobody can call off one FIFREEZE: its disk is asked before.
        (Module::Stock, "give_up = 2", status::OK),
        (Module::Ours, "give_up = 2", status::OK),
        (Module::Ours, "give_up = 2\nstrict = true", status::FAIL),
    ] {
        if !guest.modules().contains(&module) {
            continue;
        }
        load(guest, module, &[])?;
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        guest.sh("sync && dmsetup suspend --noflush --nolockfs v")?;
        guest.writers_reset()?;
        let sent = guest.clock()?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, expected)?;
        let took = Duration::from_micros(guest.clock()? - sent);
        let longest = guest.writers()?.iter().map(|it| it.longest_us).max();
        ensure!(
            took < guest.host().patience(Duration::from_secs(5)),
            "it should have been given up after 2 s, it was after {took:?}"
        );
        // Who is frozen beside it stands still until it is given up.
        let short = guest.host().patience(Duration::from_secs(1));
        let short = short.min(Duration::from_millis(1500)).as_micros() as u64;
        ensure!(
            longest.is_some_and(|it| it < short),
            "a neighbour stood still for {longest:?} us"
        );
        if expected == status::OK {
            ours = format!(
                "FREEZE {} after {:.0} s without that one, neighbours stood still for {} ms",
                status_name(expected),
                took.as_secs_f64(),
                longest.unwrap_or_default() / 1000
            );
        }
        // What has failed by itself, with nothing frozen, needs none.
        if expected == status::OK {
            answered("THAW", &vss.thaw(STEP)?, expected)?;
        }
        // It is known then.
        let again = vss.freeze(&[], STEP)?;
        answered("FREEZE while it hangs", &again, expected)?;
        ensure!(
            again.latency < guest.host().patience(Duration::from_secs(1)),
            "it waited for {:?} again",
            again.latency
        );
        if expected == status::OK {
            answered("THAW while it hangs", &vss.thaw(STEP)?, expected)?;
        }
        guest.sh("dmsetup resume v")?;
        if module == Module::Ours {
            guest.wait_until("nothing is held any more", STEP, || {
                Ok(guest.held()?.is_empty())
            })?;
            guest.not_frozen("when what hung is back", &["/mnt/v"])?;
        }
        good_backup(guest).context("the next backup")?;
        // The log is held until the last of it is thawed.
        let level = if expected == status::OK {
            "warning: "
        } else {
            "error: "
        };
        says(guest, &daemon, level, "/mnt/v")?;
        says(guest, &daemon, "", "3 frozen, 0 frozen by others")?;
        stop(guest, module, &daemon)?;
    }
    if guest.module() == Module::Stock {
        // Beside the peer stands what our module makes of it.
        return Ok(());
    }
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    guest.sh("sync && dmsetup suspend --noflush --nolockfs v")?;
    guest.writers_reset()?;
    let tx = vss.send_freeze(&[])?;
    let early = super::reply_within(guest, tx, Duration::from_secs(4))?;
    let longest = guest.writers()?.iter().map(|it| it.longest_us).max();
    guest.sh("dmsetup resume v")?;
    let reply = early.map_or_else(|| vss.wait(tx, STEP), Ok)?;
    let peer = format!(
        "FREEZE {}, neighbours stood still for {} ms when the disk came back after 4 s",
        status_name(reply.status()),
        longest.unwrap_or_default() / 1000
    );
    vss.thaw(STEP)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "one file system hangs in its freeze (give_up set to 2 s for ours)",
        &ours,
        &peer,
    );
    Ok(())
}
