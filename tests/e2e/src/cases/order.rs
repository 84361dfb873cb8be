// SPDX-License-Identifier: GPL-2.0-only

//! In which order our daemon freezes: what lies on a file before the file system that holds the
//! file, the root last, thaws in reverse.

use super::{case, describe, observe, start, stop, Case};
use anyhow::{ensure, Context, Result};
use e2e::check::equal;
use e2e::guest::{Daemon, Guest, Module};
use hyperv_sim::ic::status;

pub const CASES: &[Case] = &[
    case(
        "order/loop-on-loop",
        "an image in an image in a file system: from the inside out, all stand still",
        loop_on_loop,
    ),
    case(
        "order/dm-on-loop",
        "a device-mapper target on a loop device is frozen before the image's file system",
        dm_on_loop,
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
fn frozen_in_order(log: &str, names: &[&str]) -> Result<()> {
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
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let ours = observe(guest)?;
    equal("FREEZE", ours.freeze, status::OK)?;
    equal("THAW", ours.thaw, Some(status::OK))?;
    equal("writers that stood still", ours.still.len(), 3)?;
    equal("writers that are stuck", ours.stuck.len(), 0)?;
    let log = guest.output(&daemon)?;
    frozen_in_order(&log, &["/mnt/inner", "/mnt/image", "/mnt/disk"])?;
    stop(guest, Module::Ours, &daemon)?;

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
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let ours = observe(guest)?;
    equal("FREEZE", ours.freeze, status::OK)?;
    equal("THAW", ours.thaw, Some(status::OK))?;
    equal("writers that stood still", ours.still.len(), 2)?;
    equal("writers that are stuck", ours.stuck.len(), 0)?;
    frozen_in_order(&guest.output(&daemon)?, &["/mnt/volume", "/mnt/disk"])
}

fn root_last(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b
              for n in 1 2; do mkfs.ext4 -q -F /dev/ram$n || exit 1; done
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b")?;
    guest.writer_start("/writer")?;
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let seen = observe(guest)?;
    equal("THAW", seen.thaw, Some(status::OK))?;
    let log = guest.output(&daemon)?;
    frozen_in_order(&log, &["/mnt/a", "/"])?;
    frozen_in_order(&log, &["/mnt/b", "/"])
}
