// SPDX-License-Identifier: GPL-2.0-only

//! The freeze cases that the QEMU guest agent is tested with, by the names that they have there
//! (`qemu/tests/cfg/qemu_guest_agent.cfg` of tp-qemu), as far as they are about more than the agent's own
//! commands: what its users rely on holds here too. What differs is said at the case.

use super::disks::{load_driver, Attached};
use super::{all_frozen, backup, case, good, observe, start, stop, wait_for_daemon, Case};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, STEP};
use hyperv_sim::ic::shutdown::Action;
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use hyperv_sim::Exit;

pub const CASES: &[Case] = &[
    case(
        "tp-qemu/check_thaw_unfrozen",
        "a THAW with nothing frozen does no harm, and the next backup is good",
        thaw_unfrozen,
    )
    .long(),
    on_disks(
        "tp-qemu/check_snapshot",
        "a large copy is under way: it ends after the backup, and both files are the same",
        snapshot,
    ),
    on_disks(
        "tp-qemu/check_hotplug_frozen",
        "a disk added while frozen is seen, can be given a file system, and is taken away again",
        hotplug_frozen,
    ),
    on_disks(
        "tp-qemu/check_umount_frozen",
        "an unmount while frozen is refused and leaves nothing frozen; after the thaw it is clean, and can be mounted again",
        umount_frozen,
    ),
    case(
        "tp-qemu/check_fsfreeze_hook_script",
        "an own script in the folder of hooks is called for freeze and for thaw",
        hook_script,
    )
    .long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "tp-qemu/check_reboot_shutdown_fsfreeze",
            "the host shuts the guest down while it is frozen: it thaws and powers off",
            shut_down,
        )
    }
    .long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "tp-qemu/check_reboot_shutdown_fsfreeze/reboot",
            "the host restarts the guest while it is frozen: its root is clean, and the next backup good",
            restarted,
        )
    }
    .long(),
];

const fn on_disks(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        machine: Machine::SCSI,
        ..case(name, about, run)
    }
    .long()
}

/// A disk with ext4, mounted there.
fn mounted(guest: &Guest, at: &str) -> Result<Attached> {
    let disk = Attached::new(guest, 0, 0, 128, Image::default())?;
    load_driver(guest)?;
    let node = disk.node(guest)?;
    guest.sh(&format!(
        "mkdir -p {at} && mkfs.ext4 -q -F {node} && mount {node} {at}"
    ))?;
    Ok(disk)
}

fn thaw_unfrozen(guest: &Guest) -> Result<()> {
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    guest.writer_start("/w")?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    equal("the next backup", observe(guest)?, good(&["/w"]))?;
    stop(guest, guest.module(), &daemon)
}

fn snapshot(guest: &Guest) -> Result<()> {
    let _disk = mounted(guest, "/mnt/a")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    guest.sh("dd if=/dev/urandom of=/run/large bs=64k count=96 2>/dev/null")?;
    guest.writer_start("/mnt/a/w")?;
    let line = "n=0; while [ $n -lt 96 ]; do
        dd if=/run/large of=/mnt/a/large bs=64k count=1 skip=$n seek=$n conv=notrunc,fsync 2>/dev/null || exit 1
        n=$((n + 1))
    done";
    let copy = guest.spawn(&["sh", "-c", line])?;
    let size = || -> Result<u64> {
        let text = guest.sh("stat -c %s /mnt/a/large 2>/dev/null || echo 0")?;
        Ok(text.trim().parse()?)
    };
    guest.wait_until("the copy has begun", STEP, || Ok(size()? > 0))?;
    equal("the backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    let (then, whole) = (size()?, 96 * 64 * 1024);
    ensure!(then < whole, "the copy ended before the backup did");
    equal(
        "how the copy ended",
        guest.wait(&copy, STEP * 6)?.status,
        Some(0),
    )?;
    guest.sh("cmp /run/large /mnt/a/large && rm /run/large")?;
    stop(guest, guest.module(), &daemon)
}

fn hotplug_frozen(guest: &Guest) -> Result<()> {
    let _disk = mounted(guest, "/mnt/a")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    stand_still(guest, "/mnt/a/w")?;
    let added = Attached::new(guest, 1, 0, 64, Image::default())?;
    let node = added.node(guest)?;
    guest.sh(&format!("mkfs.ext4 -q -F {node}"))?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    guest.sh(&format!("mkdir -p /mnt/b && mount {node} /mnt/b"))?;
    guest.writer_start("/mnt/b/w")?;
    let both = good(&["/mnt/a/w", "/mnt/b/w"]);
    equal("the next backup", observe(guest)?, both)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/b")?;
    added.detach(guest)?;
    backup(guest)?;
    stop(guest, guest.module(), &daemon)
}

/// There the unmount is expected to succeed. Our daemon has open what it has frozen, until it is thawed.
fn umount_frozen(guest: &Guest) -> Result<()> {
    let disk = mounted(guest, "/mnt/a")?;
    let node = disk.node(guest)?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    guest.sh("echo before >/mnt/a/file")?;
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    let umount = guest.try_sh("umount /mnt/a")?;
    ensure!(umount.err.contains("busy"), "umount: {umount:?}");
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    guest.sh("umount /mnt/a")?;
    guest.sh(&format!(
        "e2fsck -f -n {node} && mount {node} /mnt/a && grep -q before /mnt/a/file"
    ))?;
    guest.writer_start("/mnt/a/w")?;
    equal("the next backup", observe(guest)?, good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)
}

fn hook_script(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /etc/hv_vss/hooks.d
         printf '#!/bin/sh\\necho $1 >>/run/called\\n' >/etc/hv_vss/hooks.d/mine
         chmod 755 /etc/hv_vss/hooks.d/mine")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    backup(guest)?;
    guest.wait_until("it was called for both", STEP, || {
        Ok(guest.sh("cat /run/called")? == "freeze\nthaw\n")
    })?;
    guest.sh("rm /run/called")?;
    stop(guest, guest.module(), &daemon)
}

/// A guest under systemd, frozen by the daemon that it has started.
fn frozen(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    vss.wait_open(STEP * 4)?;
    vss.agree(STEP)?;
    wait_for_daemon(guest)?;
    stand_still(guest, "/writer")
}

/// FREEZE, until whoever writes there stands still.
fn stand_still(guest: &Guest, file: &str) -> Result<()> {
    guest.writer_start(file)?;
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    guest.wait_until(&format!("{file} stands still"), STEP, || all_frozen(guest))
}

/// There such a request is refused while frozen. Here it comes from the host, which may have lost its own
/// THAW: the guest obeys, and is not held up by what it has frozen.
fn shut_down(guest: &Guest) -> Result<()> {
    frozen(guest)?;
    let shutdown = guest.host().shutdown();
    shutdown.wait_open(STEP)?;
    guest.ends()?;
    shutdown.power_off(STEP)?;
    let exit = guest.vm().wait_exit(STEP * 6)?;
    equal("how the guest ended", exit, Exit::PowerOff)
}

fn restarted(guest: &Guest) -> Result<()> {
    let root = guest.root_disk().context("its root is elsewhere")?;
    frozen(guest)?;
    let shutdown = guest.host().shutdown();
    shutdown.wait_open(STEP)?;
    guest.ends()?;
    let reply = shutdown.request(Action::Restart, STEP)?;
    answered("the request to restart", &reply, status::OK)?;
    let exit = guest.vm().wait_exit(STEP * 6)?;
    equal("how the guest ended", exit, Exit::Reset)?;

    let next = &guest.start_from(root.snapshot()?)?;
    let log = next.sh("dmesg")?;
    ensure!(
        log.contains("EXT4-fs (sda): mounted filesystem") && !log.contains("recovery complete"),
        "the root was not clean when the guest went on:\n{log}"
    );
    frozen(next)?;
    answered("THAW", &next.vss().thaw(STEP)?, status::OK)?;
    next.close()
}
