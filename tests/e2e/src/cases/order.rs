// SPDX-License-Identifier: GPL-2.0-only

//! In which order our daemon freezes: what lies on a file before the file system that holds the
//! file, the root last, thaws in reverse.

use super::control::asked;
use super::deadman::{hang_writes, released, RELEASED};
use super::hangs::in_freeze;
use super::{
    all_frozen, case, describe, good_backup, is_frozen, load, logged, logged_all, observe,
    reply_within, start, stop,
};
use super::{wait_for_daemon, Case, Seen};
use crate::runner::Skipped;
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "order/loop-on-loop",
        "an image in an image in a file system: from the inside out, all stand still",
        loop_on_loop,
    )
    .comparing(),
    case(
        "order/dm-on-loop",
        "a device-mapper target on a loop device is frozen before the image's file system",
        dm_on_loop,
    ),
    case(
        "order/partition-of-loop",
        "a partition of a loop device is frozen before the image's file system",
        partition_of_loop,
    ),
    case(
        "order/md-on-loop",
        "a RAID over loop devices is frozen before the images' file system",
        md_on_loop,
    ),
    case(
        "order/nbd",
        "what a program serves from a file (nbd) is frozen before that file's file system",
        nbd,
    )
    .comparing(),
    case(
        "order/nbd-or-another-hangs",
        "a disk that a program serves hangs in its freeze, and then another: neither costs a backup but its own",
        nbd_or_another_hangs,
    )
    .long()
    .asking_our_module(),
    case(
        "order/nvme-fabrics",
        "an NVMe namespace that the machine serves to itself is frozen before its file's file system",
        nvme_fabrics,
    ),
    case(
        "order/parallel",
        "independent file systems are frozen at the same time, as many as configured",
        parallel,
    ),
    case(
        "order/root-last",
        "the root is frozen last and thawed first",
        root_last,
    ),
];

/// Where in the daemon's log `words` are said of `name`.
fn line_of(log: &str, name: &str, words: &str) -> Result<usize> {
    log.lines()
        .position(|line| line.contains(&format!(": {name} (")) && line.contains(words))
        .with_context(|| format!("the daemon's log has no {words:?} for {name}:\n{log}"))
}

/// Each of `names` must be frozen before the next, and thawed after it.
pub fn frozen_in_order(log: &str, names: &[&str]) -> Result<()> {
    for pair in names.windows(2) {
        let [inner, outer] = pair else { continue };
        ensure!(
            line_of(log, inner, " frozen, took")? < line_of(log, outer, " frozen, took")?,
            "{inner} should be frozen before {outer}:\n{log}"
        );
        ensure!(
            line_of(log, inner, " thawed, was")? > line_of(log, outer, " thawed, was")?,
            "{inner} should be thawed after {outer}:\n{log}"
        );
    }
    Ok(())
}

fn loop_on_loop(guest: &Guest) -> Result<()> {
    guest.sh("modprobe loop; mkdir -p /mnt/disk /mnt/image /mnt/inner
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 100M /mnt/disk/image && mkfs.ext4 -q -F /mnt/disk/image
              mount -o loop /mnt/disk/image /mnt/image
              truncate -s 50M /mnt/image/image && mkfs.ext4 -q -F /mnt/image/image
              mount -o loop /mnt/image/image /mnt/inner
              dd if=/dev/zero of=/mnt/inner/dirty bs=1M count=10 2>/dev/null")?;
    for path in ["/mnt/disk/w", "/mnt/image/w", "/mnt/inner/w"] {
        guest.writer_start(path)?;
    }
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let ours = observe(guest)?;
    equal("FREEZE", ours.freeze, status::OK)?;
    equal("THAW", ours.thaw, Some(status::OK))?;
    equal("writers that stood still", ours.still.len(), 3)?;
    equal("writers that are stuck", ours.stuck.len(), 0)?;
    let log = logged(guest, &daemon)?;
    frozen_in_order(&log, &["/mnt/inner", "/mnt/image", "/mnt/disk"])?;
    stop(guest, guest.module(), &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let peer = observe(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "an image in an image, loop-mounted",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn dm_on_loop(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe loop; modprobe dm-mod; mkdir -p /mnt/disk /mnt/volume
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 64M /mnt/disk/image
              device=$(losetup --find --show /mnt/disk/image)
              dmsetup create volume --noudevsync --table \"0 131072 linear $device 0\"
              [ -e /dev/mapper/volume ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/volume && mount /dev/mapper/volume /mnt/volume
              dd if=/dev/zero of=/mnt/volume/dirty bs=1M count=10 2>/dev/null",
    )?;
    for path in ["/mnt/disk/w", "/mnt/volume/w"] {
        guest.writer_start(path)?;
    }
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let ours = observe(guest)?;
    equal("FREEZE", ours.freeze, status::OK)?;
    equal("THAW", ours.thaw, Some(status::OK))?;
    equal("writers that stood still", ours.still.len(), 2)?;
    equal("writers that are stuck", ours.stuck.len(), 0)?;
    frozen_in_order(&logged(guest, &daemon)?, &["/mnt/volume", "/mnt/disk"])
}

/// One good backup with ours in which `inner` is frozen before `outer`, and all writers stand still.
pub fn inner_before_outer(guest: &Guest, inner: &str, outer: &str) -> Result<Seen> {
    guest.sh(&format!(
        "dd if=/dev/zero of={inner}/dirty bs=1M count=10 2>/dev/null"
    ))?;
    guest.writer_start(&format!("{inner}/w"))?;
    guest.writer_start(&format!("{outer}/w"))?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let ours = observe(guest)?;
    equal("FREEZE", ours.freeze, status::OK)?;
    equal("THAW", ours.thaw, Some(status::OK))?;
    equal("writers that stood still", ours.still.len(), 2)?;
    equal("writers that are stuck", ours.stuck.len(), 0)?;
    frozen_in_order(&logged(guest, &daemon)?, &[inner, outer])?;
    stop(guest, guest.module(), &daemon)?;
    Ok(ours)
}

fn partition_of_loop(guest: &Guest) -> Result<()> {
    // The table has one partition: from sector 2048 on, 129024 of them, type 0x83.
    guest.sh("modprobe loop; mkdir -p /mnt/disk /mnt/part
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              cd /mnt/disk && truncate -s 64M image
              printf '\\0\\0\\0\\0\\203\\0\\0\\0\\0\\10\\0\\0\\0\\370\\1\\0' |
                  dd of=image bs=1 seek=446 conv=notrunc 2>/dev/null
              printf '\\125\\252' | dd of=image bs=1 seek=510 conv=notrunc 2>/dev/null
              device=$(losetup --find --show --partscan image)
              mkfs.ext4 -q -F ${device}p1 && mount ${device}p1 /mnt/part")?;
    inner_before_outer(guest, "/mnt/part", "/mnt/disk").map(drop)
}

fn md_on_loop(guest: &Guest) -> Result<()> {
    guest.sh("modprobe -a loop raid1; mkdir -p /mnt/disk /mnt/raid
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 48M /mnt/disk/one /mnt/disk/two
              echo md_lab >/sys/module/md_mod/parameters/new_array
              cd /sys/block/md_lab/md
              echo none >metadata_version && echo raid1 >level && echo 2 >raid_disks
              for image in one two; do
                  device=$(losetup --find --show /mnt/disk/$image)
                  cat /sys/class/block/${device#/dev/}/dev >new_dev || exit 1
              done
              slot=0
              for device in dev-loop*; do
                  echo 49152 >$device/size && echo $slot >$device/slot || exit 1
                  slot=$((slot + 1))
              done
              echo 49152 >component_size && echo active >array_state
              mkfs.ext4 -q -F /dev/md_lab && mount /dev/md_lab /mnt/raid")?;
    inner_before_outer(guest, "/mnt/raid", "/mnt/disk")?;
    guest.writers_stop()?;
    guest
        .sh("umount /mnt/raid && echo clear >/sys/block/md_lab/md/array_state")
        .map(drop)
}

/// A disk that a program serves from a file on another, each with a file system, and that program.
pub(super) fn make_nbd(guest: &Guest, options: &str) -> Result<Process> {
    guest.sh("modprobe nbd nbds_max=1; mkdir -p /mnt/disk /mnt/nbd
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 64M /mnt/disk/image")?;
    let server = guest.spawn(&["/payload/lab-agent", "nbd", "10809", "/mnt/disk/image"])?;
    guest.wait_until("the server takes its client", STEP, || {
        let connect = "nbd-client 127.0.0.1 10809 /dev/nbd0";
        Ok(guest.try_sh(connect)?.status == Some(0))
    })?;
    guest.wait_until("the device has a size", STEP, || {
        Ok(guest.read("/sys/block/nbd0/size")?.trim() == "131072")
    })?;
    guest.sh(&format!(
        "mkfs.ext4 -q -F /dev/nbd0 && mount -o {options} /dev/nbd0 /mnt/nbd"
    ))?;
    Ok(server)
}

pub(super) fn end_nbd(guest: &Guest, server: &Process) -> Result<()> {
    guest.sh("umount /mnt/nbd && nbd-client -d /dev/nbd0")?;
    guest.wait(server, STEP)?;
    Ok(())
}

fn nbd(guest: &Guest) -> Result<()> {
    let server = make_nbd(guest, "rw")?;
    let ours = inner_before_outer(guest, "/mnt/nbd", "/mnt/disk")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let check = asked(guest, "check", 7)?;
    let words = "/mnt/nbd (ext4, 43:0) is on nbd0, which the host does not give";
    ensure!(
        check.lines().any(|it| it.contains(words)) && !check.contains("/mnt/disk"),
        "check should say {words:?}, and nothing of /mnt/disk:\n{check}"
    );
    stop(guest, guest.module(), &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let peer = hangs_or_not(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.writers_stop()?;
    end_nbd(guest, &server)?;
    guest.compare(
        "a network block device that a program here serves from a file here",
        &describe(&ours),
        &peer,
    );
    Ok(())
}

fn nbd_or_another_hangs(guest: &Guest) -> Result<()> {
    // Without barriers a sync of what is clean has nothing to wait for.
    let server = make_nbd(guest, "barrier=0")?;
    guest.sh("modprobe dm-mod; mkdir -p /mnt/v
              dmsetup create v --noudevsync --table '0 131072 linear /dev/ram2 0'
              [ -e /dev/mapper/v ] || dmsetup mknodes
              mkfs.ext4 -q -F /dev/mapper/v && mount -o barrier=0 /dev/mapper/v /mnt/v")?;
    for path in ["/mnt/disk/w", "/writer"] {
        guest.writer_start(path)?;
    }
    let vss = guest.vss();
    load(guest, Module::Ours, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(1))?;
    wait_for_daemon(guest)?;
    for (round, hung) in (1..).zip(["/mnt/nbd", "/mnt/v"]) {
        guest.sh("sync")?;
        match hung {
            "/mnt/v" => drop(guest.sh("dmsetup suspend --noflush --nolockfs v")?),
            _ => drop(guest.signal_all(&[server.pid], 19)?),
        }
        let back_up = || -> Result<()> {
            // It is found out once, and then it is known.
            for _ in 0..2 {
                answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
                let stand_still =
                    guest.wait_until("the others stand still", STEP, || all_frozen(guest));
                answered("THAW", &vss.thaw(STEP)?, status::OK)?;
                stand_still?;
                released(guest, "after it", guest.clock()?, RELEASED)?;
            }
            Ok(())
        };
        let seen = back_up();
        match hung {
            "/mnt/v" => drop(guest.sh("dmsetup resume v")?),
            _ => drop(guest.signal_all(&[server.pid], 18)?),
        }
        seen.with_context(|| {
            format!(
                "{hung} hangs:\n{}",
                guest.output(&daemon).unwrap_or_default()
            )
        })?;
        guest.wait_until("nothing is held any more", STEP, || {
            Ok(guest.held()?.is_empty())
        })?;
        good_backup(guest).context("the next backup")?;
        let log = logged_all(guest, &daemon, 3 * round)?;
        let named = log
            .lines()
            .filter(|it| it.contains(hung) && it.contains("left out"));
        ensure!(
            named.count() == 2 && log.matches("3 frozen").count() == 2 * round,
            "{hung} should be left out, and nothing else, twice:\n{log}"
        );
        let whole = log.matches("4 frozen").count();
        ensure!(whole == round, "all should be there again:\n{log}");
    }
    stop(guest, Module::Ours, &daemon)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/v && dmsetup remove --retry v")?;
    end_nbd(guest, &server)
}

/// One backup of the peer, which may wait for what it has frozen itself.
fn hangs_or_not(guest: &Guest) -> Result<String> {
    let vss = guest.vss();
    guest.sh("dd if=/dev/zero of=/mnt/nbd/dirty bs=1M count=10 conv=notrunc 2>/dev/null")?;
    let tx = vss.send_freeze(&[])?;
    let limit = guest.host().patience(Duration::from_secs(3));
    if let Some(reply) = reply_within(guest, tx, limit)? {
        let thaw = vss.thaw(STEP)?.status();
        let (freeze, thaw) = (status_name(reply.status()), status_name(thaw));
        return Ok(format!("FREEZE {freeze}; THAW {thaw}"));
    }
    let writers = guest.writers()?;
    let frozen = writers.iter().filter(|it| is_frozen(guest, it)).count();
    // The server's file system is what has to be thawed for anything to go on.
    guest.thaw("/mnt/disk")?;
    vss.wait(tx, STEP)?;
    vss.thaw(STEP)?;
    Ok(format!(
        "FREEZE hangs behind its own freeze, after {:.0} s {frozen} of {} writers stand still",
        limit.as_secs_f64(),
        writers.len()
    ))
}

fn nvme_fabrics(guest: &Guest) -> Result<()> {
    if guest.module() == Module::Stock && guest.try_sh("modprobe nvme-loop")?.status != Some(0) {
        return Err(Skipped("this kernel has no nvme-loop").into());
    }
    guest.sh("modprobe nvme-loop; mkdir -p /mnt/disk /mnt/nvme
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 64M /mnt/disk/image
              mount -t configfs none /sys/kernel/config && cd /sys/kernel/config/nvmet
              mkdir subsystems/lab && echo 1 >subsystems/lab/attr_allow_any_host
              mkdir subsystems/lab/namespaces/1 ports/1
              echo /mnt/disk/image >subsystems/lab/namespaces/1/device_path
              echo 1 >subsystems/lab/namespaces/1/enable
              echo loop >ports/1/addr_trtype && ln -s $PWD/subsystems/lab ports/1/subsystems/lab
              echo transport=loop,nqn=lab >/dev/nvme-fabrics")?;
    guest.wait_until("the namespace is there", STEP, || {
        Ok(guest.try_sh("test -b /dev/nvme0n1")?.status == Some(0))
    })?;
    guest.sh("mkfs.ext4 -q -F /dev/nvme0n1 && mount /dev/nvme0n1 /mnt/nvme")?;
    inner_before_outer(guest, "/mnt/nvme", "/mnt/disk")?;
    guest.writers_stop()?;
    guest
        .sh(
            "umount /mnt/nvme && echo 1 >/sys/class/nvme/nvme0/delete_controller
              cd /sys/kernel/config/nvmet && rm ports/1/subsystems/lab && rmdir ports/1
              rmdir subsystems/lab/namespaces/1 subsystems/lab
              cd / && umount /sys/kernel/config",
        )
        .map(drop)
}

fn parallel(guest: &Guest) -> Result<()> {
    guest.sh("modprobe dm-mod; for n in 1 2 3 4; do
                  dmsetup create hung$n --noudevsync --table \"0 65536 linear /dev/ram$n 0\"
                  [ -e /dev/mapper/hung$n ] || dmsetup mknodes
                  mkfs.ext4 -q -F /dev/mapper/hung$n && mkdir -p /mnt/$n || exit 1
                  mount -o barrier=0 /dev/mapper/hung$n /mnt/$n || exit 1
              done")?;
    load(guest, guest.module(), &[])?;
    for (limit, at_once) in [(2, 2), (32, 4)] {
        let daemon = guest.start_daemon_with(&format!("parallel = {limit}"))?;
        wait_for_daemon(guest)?;
        // Each stays in its freeze for as long as its disk hangs. Without barriers a sync of what is
        // clean has nothing to wait for.
        guest.sh("sync")?;
        for n in 1..=4 {
            guest.sh(&hang_writes(&format!("hung{n}")))?;
        }
        let tx = guest.vss().send_freeze(&[])?;
        guest.wait_until("as many freezes as allowed are under way", STEP, || {
            Ok(in_freeze(guest, &daemon)? == at_once)
        })?;
        // The threads of the rest, if there are too many, need no longer than these did.
        let later = guest.clock()? + 500_000;
        guest.wait_until("half a second has passed", STEP, || {
            Ok(guest.clock()? > later)
        })?;
        equal("freezes under way", in_freeze(guest, &daemon)?, at_once)?;
        guest.sh("for n in 1 2 3 4; do
                      dmsetup suspend --noflush --nolockfs hung$n && dmsetup resume hung$n
                  done")?;
        answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
        guest.signal(&daemon, 15)?;
        guest.wait(&daemon, STEP)?;
    }
    Ok(())
}

fn root_last(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b
              for n in 1 2; do mkfs.ext4 -q -F /dev/ram$n || exit 1; done
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b")?;
    guest.writer_start("/writer")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    equal("THAW", seen.thaw, Some(status::OK))?;
    let log = logged(guest, &daemon)?;
    frozen_in_order(&log, &["/mnt/a", "/"])?;
    frozen_in_order(&log, &["/mnt/b", "/"])
}
