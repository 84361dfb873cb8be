// SPDX-License-Identifier: GPL-2.0-only

//! What an operator does by hand, and what happens when it is done wrong.

use super::{case, load, start, wait_for_daemon, Case};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal, refused};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::status;

pub const CASES: &[Case] = &[
    case(
        "commands/list",
        "list shows order and reasons, as text and JSON, and freezes nothing",
        list,
    ),
    case(
        "commands/rehearsal",
        "freeze --for freezes, thaws and needs no host",
        rehearsal,
    ),
    case(
        "commands/rehearsal-ended-early",
        "SIGTERM ends a rehearsal at once, SIGKILL does too",
        rehearsal_ended_early,
    ),
    case(
        "commands/one-at-a-time",
        "a rehearsal during a backup is refused, and a backup during a rehearsal fails",
        one_at_a_time,
    ),
    case(
        "commands/bad-configuration",
        "a malformed configuration is refused with line and column",
        bad_configuration,
    ),
    case(
        "commands/bad-start",
        "no device, a wrong one, one in use, no privilege: clear errors",
        bad_start,
    ),
];

const OURS: &str = "/payload/hv_vss_daemon";

/// Runs what follows without privilege.
const SOMEBODY: &str = "unshare --setuid 1000 --setgid 1000";

fn make_one(guest: &Guest) -> Result<()> {
    guest
        .sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")
        .map(drop)
}

fn list(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.sh("mkdir -p /mnt/vfat && modprobe -a vfat nls_cp437 nls_ascii
              mkfs.vfat /dev/ram2 >/dev/null && mount -t vfat /dev/ram2 /mnt/vfat")?;
    let text = guest.sh(&format!("{OURS} list"))?;
    let place = |word: &str| text.find(word);
    ensure!(
        place("/mnt/a (ext4") < place("  / (ext4") && place("/mnt/a (ext4").is_some(),
        "/mnt/a should come before the root:\n{text}"
    );
    ensure!(
        place("tmpfs") > place("left out") && place("left out").is_some(),
        "tmpfs should be left out:\n{text}"
    );
    ensure!(
        text.contains("/mnt/vfat (vfat") && text.contains("synced only"),
        "vfat should be said to be synced only:\n{text}"
    );
    let json = guest.sh(&format!("{OURS} list --json"))?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    equal(
        "the first path in JSON",
        &json["frozen"][0]["paths"][0],
        &"/mnt/a".into(),
    )?;
    for path in ["/", "/mnt/a"] {
        refused("FITHAW after the list", guest.thaw(path), "EINVAL")?;
    }
    Ok(())
}

fn rehearsal(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/writer")?;
    guest.writer_start("/mnt/a/w")?;
    let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "1s"])?;
    let ended = guest.wait(&rehearsal, STEP)?;
    let said = guest.output(&rehearsal)?;
    ensure!(
        ended.status == Some(0),
        "the rehearsal should succeed, it ended with {ended:?}:\n{said}"
    );
    for writer in guest.writers()? {
        ensure!(
            writer.longest_us > 900_000,
            "the writer of {} should have stood still for a second: {writer:?}\n{said}",
            writer.path
        );
    }
    for path in ["/", "/mnt/a"] {
        refused("FITHAW after the rehearsal", guest.thaw(path), "EINVAL")?;
    }
    Ok(())
}

fn rehearsal_ended_early(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/writer")?;
    guest.writer_start("/mnt/a/w")?;
    for signal in [15, 9] {
        let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s"])?;
        guest.wait_until("both writers stand still", STEP, || {
            Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
        })?;
        guest.signal(&rehearsal, signal)?;
        guest.wait(&rehearsal, STEP)?;
        guest.wait_until("both writers go on", STEP, || {
            Ok(guest.writers()?.iter().all(|it| it.in_write_us < 100_000))
        })?;
    }
    Ok(())
}

fn one_at_a_time(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/mnt/a/w")?;
    start(guest, Module::Ours, Daemon::Ours)?;
    let vss = guest.vss();

    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let second = guest.try_sh(&format!("{OURS} freeze --for 1s"))?;
    ensure!(
        second.status == Some(1) && second.err.contains("another daemon or a rehearsal"),
        "a rehearsal during a backup should be refused, it was: {second:?}"
    );
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;

    let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s"])?;
    guest.wait_until("the writer stands still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 300_000))
    })?;
    answered(
        "FREEZE during a rehearsal",
        &vss.freeze(&[], STEP)?,
        status::FAIL,
    )?;
    guest.signal(&rehearsal, 15)?;
    guest.wait(&rehearsal, STEP)?;
    answered("FREEZE after it", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)
}

fn bad_configuration(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &["grace_ms=0"])?;
    guest.sh("printf 'strict = true\\ndeadline = \"soon\"\\n' >/run/bad.toml")?;
    for command in ["-n", "list", "freeze --for 1s", "thaw"] {
        let ended = guest.try_sh(&format!("{OURS} -c /run/bad.toml {command}"))?;
        ensure!(
            ended.status == Some(1)
                && ended.err.contains("/run/bad.toml")
                && ended.err.contains("line 2, column 12"),
            "'{command}' should name file, line and column, it was: {ended:?}"
        );
    }
    let ended = guest.try_sh(&format!("{OURS} -c /run/absent.toml list"))?;
    ensure!(
        ended.status == Some(1) && ended.err.contains("/run/absent.toml"),
        "a configuration that is not there should be named, it was: {ended:?}"
    );
    refused("FITHAW of the root", guest.thaw("/"), "EINVAL")
}

fn bad_start(guest: &Guest) -> Result<()> {
    let fails = |what: &str, command: &str, words: &[&str]| -> Result<()> {
        let ended = guest.try_sh(command)?;
        ensure!(
            ended.status == Some(1) && words.iter().all(|word| ended.err.contains(word)),
            "{what} should fail and say {words:?}, it was: {ended:?}"
        );
        Ok(())
    };
    fails(
        "a start without the module",
        &format!("{OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "No such file"],
    )?;
    fails(
        "a start on another device",
        &format!("{OURS} -n --device /dev/zero"),
        &["/dev/zero"],
    )?;
    fails(
        "a rehearsal without privilege",
        &format!("{SOMEBODY} {OURS} freeze --for 1s"),
        &["only root may freeze"],
    )?;
    load(guest, Module::Ours, &[])?;
    fails(
        "a start without privilege",
        &format!("{SOMEBODY} {OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "Permission denied"],
    )?;
    guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    fails(
        "a second daemon",
        &format!("{OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "busy"],
    )?;
    refused("FITHAW of the root", guest.thaw("/"), "EINVAL")
}
