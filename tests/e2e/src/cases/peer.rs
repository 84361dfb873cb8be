// SPDX-License-Identifier: GPL-2.0-only

//! What the stock `hv_utils` and Debian's daemon are known to do. An independent host has measured
//! the same: where a case here fails, the simulated host is wrong.

use super::{all_frozen, case, make_file_systems, Case};
use anyhow::{bail, ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::vss::{vss_flags, Op, SHORT_BODY};
use hyperv_sim::ic::{status, Version, FRAMEWORKS};
use hyperv_sim::HostError;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "peer/answers",
        "HOT_BACKUP body 0, GET_DM_INFO 0, unknown operations 0, THAW without FREEZE 0",
        answers,
    ),
    case(
        "peer/freeze-twice",
        "the second FREEZE succeeds too, and one THAW releases",
        freeze_twice,
    ),
    case(
        "peer/no-daemon",
        "without a daemon all but GET_DM_INFO fails at once",
        no_daemon,
    ),
    case(
        "peer/daemon-killed-while-frozen",
        "file systems stay frozen, THAW fails; a new daemon and a THAW release them",
        daemon_killed_while_frozen,
    ),
    case(
        "peer/host-offers-4.0",
        "a host with VSS 4.0 only is refused",
        host_offers_4,
    ),
    case(
        "peer/long-packet-wedges",
        "a message beyond 8,192 bytes wedges the channel until the module is reloaded",
        long_packet_wedges,
    ),
];

fn start(guest: &Guest) -> Result<()> {
    guest.load(Module::Stock, &[])?;
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    Ok(())
}

fn start_with_daemon(guest: &Guest) -> Result<()> {
    start(guest)?;
    guest.start_daemon(Daemon::Debian)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the daemon is there",
        STEP,
        || Ok(guest.vss().hot_backup(STEP)?.status() == status::OK),
    )
}

fn answers(guest: &Guest) -> Result<()> {
    start_with_daemon(guest)?;
    let vss = guest.vss();
    let reply = vss.hot_backup(STEP)?;
    answered("HOT_BACKUP", &reply, status::OK)?;
    equal("flags of HOT_BACKUP (ours: 5)", vss_flags(&reply), Some(0))?;
    equal("flags of the header", reply.header.flags, 0x5)?;
    let reply = vss.get_dm_info(STEP)?;
    answered("GET_DM_INFO", &reply, status::OK)?;
    equal("flags of GET_DM_INFO", vss_flags(&reply), Some(0))?;
    for number in [0, 1, 4, 7, 9] {
        let reply = vss.op(Op(number), &SHORT_BODY, STEP)?;
        answered(&format!("operation {number}"), &reply, status::OK)?;
    }
    answered("THAW without FREEZE", &vss.thaw(STEP)?, status::OK)
}

fn freeze_twice(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    start_with_daemon(guest)?;
    let vss = guest.vss();
    guest.writer_start("/mnt/xfs/w")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("FREEZE again", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("it stands still", STEP, || all_frozen(guest))?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    guest.writers_stop()?;
    guest.not_frozen("after the one THAW", &["/mnt/xfs"])
}

fn no_daemon(guest: &Guest) -> Result<()> {
    start(guest)?;
    let vss = guest.vss();
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE", &freeze, status::FAIL)?;
    ensure!(
        freeze.latency < guest.host().patience(Duration::from_secs(5)),
        "FREEZE should fail at once, it took {:?}",
        freeze.latency
    );
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::FAIL)?;
    answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)
}

fn daemon_killed_while_frozen(guest: &Guest) -> Result<()> {
    make_file_systems(guest)?;
    guest.load(Module::Stock, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    let daemon = guest.start_daemon(Daemon::Debian)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the daemon is there",
        STEP,
        || Ok(vss.hot_backup(STEP)?.status() == status::OK),
    )?;
    for path in ["/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 9)?;
    guest.wait(&daemon, STEP)?;

    answered("THAW with the daemon dead", &vss.thaw(STEP)?, status::FAIL)?;
    guest.wait_until("every writer is in a write older than 500 ms", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 500_000))
    })?;

    // A new daemon does not thaw by itself; it does when the host asks.
    guest.start_daemon(Daemon::Debian)?;
    guest.wait_until(
        "HOT_BACKUP is answered 0: the new daemon is there",
        STEP,
        || Ok(vss.hot_backup(STEP)?.status() == status::OK),
    )?;
    ensure!(
        guest.writers()?.iter().all(|it| it.in_write_us > 500_000),
        "with a new daemon every writer should still stand: {:?}",
        guest.writers()?
    );
    answered("THAW with the new daemon", &vss.thaw(STEP)?, status::OK)?;
    equal("who is stuck", super::stuck_writers(guest)?, Vec::new())
}

fn host_offers_4(guest: &Guest) -> Result<()> {
    guest.load(Module::Stock, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    match vss.negotiate(&FRAMEWORKS, &[Version::new(4, 0)], STEP) {
        Err(HostError::NegotiationRefused { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(agreed) => bail!("4.0 should be refused, the guest agreed to {agreed:?}"),
    }
}

fn long_packet_wedges(guest: &Guest) -> Result<()> {
    start_with_daemon(guest)?;
    let vss = guest.vss();
    // What it says then is cut, or left over from before.
    guest.expect_in_log(&[
        "AUTO_RECOVER: the length in the ring of an answer",
        "answers nothing",
    ])?;
    let tx = vss.send(Op::AUTO_RECOVER, &vec![0; 8500])?;
    let cut = vss.wait(tx, STEP)?;
    ensure!(
        cut.raw.len() <= 8192,
        "the answer should be cut to the driver's 8192 bytes, it has {}",
        cut.raw.len()
    );
    match vss.freeze(&[], Duration::from_secs(3)) {
        Ok(reply) if reply.status() == status::OK => {
            bail!("FREEZE after the long message should not be served, it was answered 0")
        }
        Ok(_) | Err(HostError::Timeout { .. }) => {}
        Err(error) => return Err(error.into()),
    }

    // Only opening the channel anew helps.
    guest.sh("kill -9 $(pidof hv_vss_daemon)")?;
    guest.wait_until("hv_utils can be unloaded", STEP, || {
        Ok(guest.try_sh("rmmod hv_utils")?.status == Some(0))
    })?;
    vss.wait_closed(STEP)?;
    start_with_daemon(guest)
}
