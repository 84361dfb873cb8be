// SPDX-License-Identifier: GPL-2.0-only

//! What an operator can do beside a daemon that serves, whichever module it serves and whoever holds
//! what is frozen.

use super::deadman::{released, RELEASED};
use super::lifecycle::take_over;
use super::{case, observe, start, stop, wait_for_daemon, Case};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal, refused};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::vss::VERSIONS;
use hyperv_sim::ic::{status, FRAMEWORKS};

pub const CASES: &[Case] = &[
    case(
        "control/thaw",
        "thaw by hand reaches the daemon that has frozen: all goes on, its backup fails",
        thaw,
    ),
    case(
        "control/thaw-under-a-stopped-daemon",
        "stock module: thaw by hand thaws under a daemon that does not reply",
        thaw_under_a_stopped_daemon,
    ),
    case(
        "control/rehearsal",
        "a rehearsal beside a daemon that serves freezes and thaws, and the next backup is good",
        rehearsal,
    ),
    case(
        "control/hand-over",
        "from the stock module to ours under a running daemon: it freezes by what each offers",
        hand_over,
    ),
    case(
        "control/footprint",
        "held by the module: one process of 3.5 MiB at most; else a guard beside it",
        footprint,
    ),
];

const THAW: &str = "/payload/hv_vss_daemon thaw";

fn make_one(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/writer")?;
    Ok(guest.writer_start("/mnt/a/w")?)
}

fn all_stand_still(guest: &Guest) -> Result<()> {
    guest.wait_until("both writers stand still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
    })
}

fn thaw(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let vss = guest.vss();
    for module in [Module::Stock, Module::Ours] {
        let daemon = start(guest, module, Daemon::Ours)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        all_stand_still(guest)?;
        let ended = guest.try_sh(THAW)?;
        ensure!(
            ended.status == Some(0) && ended.err.contains("its backup fails"),
            "thaw should reach the daemon, it was: {ended:?}"
        );
        released(guest, "thaw by hand", guest.clock()?, RELEASED)?;
        answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
        let again = guest.try_sh(THAW)?;
        ensure!(
            again.status == Some(0) && again.err.contains("nothing is recorded as frozen"),
            "there should be nothing left to thaw, it was: {again:?}"
        );
        let seen = observe(guest)?;
        equal(
            "the next backup",
            seen,
            super::good(&["/writer", "/mnt/a/w"]),
        )?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn thaw_under_a_stopped_daemon(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let vss = guest.vss();
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 19)?;
    all_stand_still(guest)?;
    let ended = guest.try_sh(THAW)?;
    ensure!(
        ended.status == Some(0) && ended.err.contains("thawed under a process"),
        "thaw should go by the record, it was: {ended:?}"
    );
    released(guest, "thaw by hand", guest.clock()?, RELEASED)?;
    guest.signal(&daemon, 18)?;
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    stop(guest, Module::Stock, &daemon)
}

fn rehearsal(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    for module in [Module::Stock, Module::Ours] {
        let daemon = start(guest, module, Daemon::Ours)?;
        guest.writers_reset()?;
        guest.sh("/payload/hv_vss_daemon freeze --for 1s")?;
        for writer in guest.writers()? {
            ensure!(
                writer.longest_us > 900_000,
                "the writer of {} should have stood still for a second: {writer:?}",
                writer.path
            );
        }
        for path in ["/", "/mnt/a"] {
            refused("FITHAW after the rehearsal", guest.thaw(path), "EINVAL")?;
        }
        let seen = observe(guest)?;
        equal(
            "the next backup",
            seen,
            super::good(&["/writer", "/mnt/a/w"]),
        )?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

fn hand_over(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let guards = || -> Result<usize> {
        let pids = guest.try_sh("pidof hv_vss_guard")?.out;
        Ok(pids.split_whitespace().count())
    };
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let both = super::good(&["/writer", "/mnt/a/w"]);
    equal(
        "a backup with the stock module",
        observe(guest)?,
        both.clone(),
    )?;
    equal("guards with the stock module", guards()?, 1)?;
    // Its descriptor keeps hv_utils loaded, but not bound.
    guest.load(Module::Ours, &[])?;
    take_over(guest)?;
    guest.vss().negotiate(&FRAMEWORKS, &VERSIONS, STEP)?;
    wait_for_daemon(guest)?;
    equal("a backup with ours", observe(guest)?, both)?;
    let said = guest.output(&daemon)?;
    let holds = said.contains("the module holds what is frozen");
    equal("guards with ours", guards()?, usize::from(!holds))?;
    stop(guest, Module::Ours, &daemon)?;
    guest.unload(Module::Stock).map(drop)
}

fn footprint(guest: &Guest) -> Result<()> {
    const MOST_KIB: u64 = 3584;
    make_one(guest)?;
    for module in [Module::Stock, Module::Ours] {
        let daemon = start(guest, module, Daemon::Ours)?;
        let held = guest.output(&daemon)?.contains("the module holds");
        observe(guest)?;
        let resident: u64 = guest
            .sh(&format!(
                "awk '/^VmRSS/ {{ print $2 }}' /proc/{}/status",
                daemon.pid
            ))?
            .trim()
            .parse()?;
        let guards = guest.try_sh("pidof hv_vss_guard")?.out;
        println!(
            "     {module:?}: {resident} KiB resident, guards: {:?}",
            guards.trim()
        );
        equal("whether there is no guard", guards.trim().is_empty(), held)?;
        ensure!(
            !held || resident <= MOST_KIB,
            "{resident} KiB are resident, {MOST_KIB} are allowed"
        );
        stop(guest, module, &daemon)?;
    }
    Ok(())
}
