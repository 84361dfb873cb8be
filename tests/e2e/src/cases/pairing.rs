// SPDX-License-Identifier: GPL-2.0-only

//! The main case: one backup, from one source for all four pairings of module and daemon.

use super::{all_frozen, case, Case};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, STEP};
use hyperv_sim::ic::vss::{Lun, Op, CLASS, SHORT_BODY};
use hyperv_sim::ic::{status, Version};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "pairing/ours-ours",
        "a backup with our module and our daemon",
        |guest| backup(guest, Module::Ours, Daemon::Ours),
    ),
    case(
        "pairing/ours-debian",
        "a backup with our module and Debian's daemon, unmodified",
        |guest| backup(guest, Module::Ours, Daemon::Debian),
    ),
    case(
        "pairing/stock-ours",
        "a backup with the stock hv_utils and our daemon",
        |guest| backup(guest, Module::Stock, Daemon::Ours),
    ),
    case(
        "pairing/stock-debian",
        "a backup with the stock hv_utils and Debian's daemon",
        |guest| backup(guest, Module::Stock, Daemon::Debian),
    ),
    Case {
        machine: Machine::TWO_CPUS.on_one_cpu("a machine with one is what it is about"),
        ..case(
            "pairing/ours-ours-one-cpu",
            "a backup with our module and our daemon on one virtual CPU",
            |guest| backup(guest, Module::Ours, Daemon::Ours),
        )
    }
    .long(),
];

/// Makes and mounts an ext4, an xfs and a btrfs file system, on `/mnt/ext4` and so on.
pub fn make_file_systems(guest: &Guest) -> Result<()> {
    guest
        .sh("mkdir -p /mnt/ext4 /mnt/xfs /mnt/btrfs
             modprobe xfs; modprobe btrfs
             mkfs.ext4 -q -F /dev/ram1 && mount -t ext4 /dev/ram1 /mnt/ext4 &&
             mkfs.xfs -q -f /dev/ram2 && mount -t xfs /dev/ram2 /mnt/xfs &&
             mkfs.btrfs -q -f /dev/ram3 && mount -t btrfs /dev/ram3 /mnt/btrfs")
        .map(drop)
}

fn backup(guest: &Guest, module: Module, daemon: Daemon) -> Result<()> {
    // Four file systems, the root among them, and a writer on each.
    make_file_systems(guest)?;
    for path in ["/writer", "/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }

    // The module negotiates 5.0 as soon as it has the channel, without a daemon.
    guest.load(module, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    let agreed = vss.agree(STEP)?;
    equal("framework version", agreed.framework, Version::new(3, 0))?;
    equal("VSS version", agreed.message, Version::new(5, 0))?;

    // A daemon registers; from then on HOT_BACKUP is answered with success.
    let process = guest.start_daemon(daemon)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the daemon is there",
        STEP,
        || Ok(vss.op(Op::HOT_BACKUP, &SHORT_BODY, STEP)?.status() == status::OK),
    )?;
    let before = guest.writers()?;
    guest.wait_until("every writer writes", STEP, || {
        let now = guest.writers()?;
        Ok(before
            .iter()
            .zip(&now)
            .all(|(then, now)| now.count > then.count + 10))
    })?;

    // FREEZE, at its full size with a list of disks, is answered 0.
    let disks = [Lun::scsi(CLASS, 0, 0, 0), Lun::scsi(CLASS, 0, 0, 1)];
    let frozen = vss.freeze(&disks, STEP * 2)?;
    answered("FREEZE", &frozen, status::OK)?;
    ensure!(
        frozen.raw.len() == 28 + 6260,
        "the answer to FREEZE should be as long as the request, 6288 bytes; it has {}",
        frozen.raw.len()
    );

    // Every writer stands still, inside one write that grows older while its count does not move.
    guest.wait_until("every writer is in a write older than 300 ms", STEP, || {
        all_frozen(guest)
    })?;
    let still = guest.writers()?;
    guest.wait_until("every writer is in a write older than 600 ms", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 600_000))
    })?;
    for (then, now) in still.iter().zip(&guest.writers()?) {
        ensure!(
            then.count == now.count && now.in_write_us > then.in_write_us,
            "the writer of {} went on while frozen: {then:?}, then {now:?}",
            now.path
        );
    }

    // THAW is answered 0, and every writer goes on.
    answered("THAW", &vss.thaw(STEP * 2)?, status::OK)?;
    guest.wait_until("every writer goes on", STEP, || {
        let now = guest.writers()?;
        Ok(still
            .iter()
            .zip(&now)
            .all(|(then, now)| now.count > then.count + 10))
    })?;
    for writer in guest.writers()? {
        ensure!(writer.errors == 0, "writes have failed: {writer:?}");
        ensure!(
            Duration::from_micros(writer.longest_us) > Duration::from_millis(600),
            "the writer of {} stood still for {} us only",
            writer.path,
            writer.longest_us
        );
    }

    // Nothing is left frozen.
    guest.not_frozen(
        "after the THAW",
        &["/", "/mnt/ext4", "/mnt/xfs", "/mnt/btrfs"],
    )?;

    // The daemon still runs, and ends when asked to.
    guest.signal(&process, 15)?;
    guest.wait(&process, STEP)?;
    Ok(())
}
