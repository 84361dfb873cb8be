// SPDX-License-Identifier: GPL-2.0-only

//! What an operator does by hand, and what happens when it is done wrong.

use super::{
    all_frozen, case, load, observe, start, stood_for_a_second, stop, stuck_writers,
    wait_for_daemon, Case,
};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{how_it_ended, Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;

pub const CASES: &[Case] = &[
    case(
        "commands/list",
        "list shows order and reasons, as text and JSON, and freezes nothing",
        list,
    ),
    case(
        "commands/check-strict-vfat",
        "check and list say what cannot freeze before a strict backup fails of it",
        check_strict_vfat,
    ),
    case(
        "commands/check-lost",
        "where the only one that can freeze has shut down, beside one that is synced, check says that each FREEZE fails",
        check_lost,
    ),
    case(
        "commands/rehearsal",
        "freeze --for freezes, thaws and needs neither host nor daemon; for longer than the deadline it is refused",
        rehearsal,
    ),
    case(
        "commands/rehearsal-ended-early",
        "SIGTERM ends a rehearsal at once, SIGKILL does too",
        rehearsal_ended_early,
    ),
    case(
        "commands/one-at-a-time",
        "a rehearsal during a backup or another is refused, FREEZE during one is good by a freeze of its own; the exit \
         status tells one from the other, and the JSON says what came of it",
        one_at_a_time,
    ),
    case(
        "commands/thaw",
        "thaw by hand: nothing to do, and under a backup, which is then not good",
        thaw,
    ),
    case(
        "commands/configuration",
        "leave out or choose by path, type and device, with patterns",
        configuration,
    )
    .long(),
    case(
        "commands/bad-configuration",
        "a malformed configuration is refused with line and column, and freezes nothing",
        bad_configuration,
    ),
    case(
        "commands/bad-start",
        "no device, a wrong one, one in use, no privilege, no place in memory: clear errors",
        bad_start,
    )
    .comparing(),
];

const OURS: &str = "/payload/hv_vss_daemon";

/// Runs what follows without privilege.
const SOMEBODY: &str = "unshare --setuid 1000 --setgid 1000";

fn make_one(guest: &Guest) -> Result<()> {
    guest
        .sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")
        .map(drop)
}

fn make_vfat(guest: &Guest) -> Result<()> {
    guest
        .sh("mkdir -p /mnt/vfat && modprobe -a vfat nls_cp437 nls_ascii
              mkfs.vfat /dev/ram2 >/dev/null && mount -t vfat /dev/ram2 /mnt/vfat")
        .map(drop)
}

fn list(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    make_vfat(guest)?;
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
        place("/mnt/vfat (vfat") > place("synced, without means")
            && place("/mnt/vfat (vfat") < place("left out"),
        "vfat is on a disk and cannot freeze:\n{text}"
    );
    let json = guest.sh(&format!("{OURS} list --json"))?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    equal(
        "the first path in JSON",
        &json["frozen"][0]["paths"][0],
        &"/mnt/a".into(),
    )?;
    equal(
        "what is only synced",
        &json["synced"][0]["paths"][0],
        &"/mnt/vfat".into(),
    )?;
    guest.not_frozen("after the list", &["/", "/mnt/a"])
}

fn check_strict_vfat(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    make_vfat(guest)?;
    // Warning and problem, as the exit status has them.
    for (strict, status, freeze) in [(false, 7, status::OK), (true, 6, status::FAIL)] {
        load(guest, guest.module(), &[])?;
        let daemon = guest.start_daemon_with(&format!("strict = {strict}"))?;
        wait_for_daemon(guest)?;
        guest.sh(&format!("echo 'strict = {strict}' >/run/strict.toml"))?;
        let check = guest.try_sh(&format!("{OURS} -c /run/strict.toml check"))?;
        let says = check
            .out
            .contains("/mnt/vfat (vfat, 1:2) has no means to freeze");
        ensure!(
            check.status == Some(status) && says,
            "check should name it and end with {status}, strict = {strict}: {check:?}"
        );
        let vss = guest.vss();
        answered("FREEZE", &vss.freeze(&[], STEP)?, freeze)?;
        if freeze == status::OK {
            answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        }
        stop(guest, guest.module(), &daemon)?;
    }
    Ok(())
}

fn check_lost(guest: &Guest) -> Result<()> {
    const CONFIG: &str = "[include]\npaths = ['/mnt/*']";
    guest.expect_in_log(&["EXT4-fs (ram1)", "Aborting journal on device ram1"])?;
    make_one(guest)?;
    make_vfat(guest)?;
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with(CONFIG)?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    let agree = |exit, freeze| -> Result<()> {
        let check = guest.try_sh(&format!("{OURS} check"))?;
        ensure!(
            check.status == Some(exit),
            "check should end with {exit}: {check:?}"
        );
        answered("FREEZE", &vss.freeze(&[], STEP)?, freeze)?;
        if freeze == status::OK {
            answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        }
        Ok(())
    };
    // That vfat has no means to freeze is a warning.
    agree(7, status::OK)?;
    guest.sh("xfs_io -x -c shutdown /mnt/a")?;
    agree(6, status::FAIL)?;
    guest.sh("umount /mnt/a && mount /dev/ram1 /mnt/a")?;
    agree(7, status::OK)?;
    stop(guest, guest.module(), &daemon)
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
            stood_for_a_second(guest, &writer),
            "the writer of {} should have stood still for a second: {writer:?}\n{said}",
            writer.path
        );
    }
    guest.not_frozen("after the rehearsal", &["/", "/mnt/a"])?;

    let too_long = |what: &str| -> Result<()> {
        let refused = guest.try_sh(&format!("{OURS} freeze --for 1h"))?;
        ensure!(
            refused.status == Some(1) && refused.err.contains("shorter than the deadline"),
            "a rehearsal that cannot last, {what}: {refused:?}"
        );
        guest.not_frozen("after it", &["/", "/mnt/a"])
    };
    too_long("without a daemon")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    too_long("beside one that serves")?;
    stop(guest, guest.module(), &daemon)
}

fn rehearsal_ended_early(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/writer")?;
    guest.writer_start("/mnt/a/w")?;
    for signal in [15, 9] {
        let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s"])?;
        guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        guest.signal(&rehearsal, signal)?;
        guest.wait(&rehearsal, STEP)?;
        equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
    }
    Ok(())
}

fn one_at_a_time(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    let no_rehearsal = |when: &str| -> Result<()> {
        let second = guest.try_sh(&format!("{OURS} freeze --for 1s"))?;
        ensure!(
            second.status == Some(5) && second.err.contains("is under way"),
            "a rehearsal during a {when} should be refused, it was: {second:?}"
        );
        Ok(())
    };
    let still = || guest.wait_until("the writer stands still", STEP, || all_frozen(guest));
    let ends = |rehearsal: &Process, why: &str| -> Result<()> {
        let ended = guest.wait(rehearsal, STEP)?;
        let said = guest.output(rehearsal)?;
        ensure!(
            ended.status == Some(4) && said.contains(why),
            "the rehearsal should have ended because {why}, it was: {ended:?}\n{said}"
        );
        Ok(())
    };
    for &module in guest.modules() {
        let daemon = start(guest, module, Daemon::Ours)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        no_rehearsal("backup")?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;

        let another = guest.try_sh(&format!("{OURS} -n"))?;
        ensure!(
            another.status == Some(1) && another.err.contains("busy"),
            "a second daemon should be refused, it was: {another:?}"
        );

        let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s"])?;
        still()?;
        no_rehearsal("rehearsal")?;
        let seen = observe(guest)?;
        equal("FREEZE during it", seen, super::good(&["/mnt/a/w"]))?;
        ends(&rehearsal, "the host has begun a backup")?;

        let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s"])?;
        still()?;
        // In v1 it may be that of the last backup, which had another.
        let said = match module {
            Module::Stock => status::FAIL,
            Module::Ours => status::OK,
        };
        answered("THAW of nothing", &vss.thaw(STEP)?, said)?;
        ends(&rehearsal, "the host has said THAW")?;
        guest.not_frozen("after it", &["/", "/mnt/a"])?;

        let good = guest.sh(&format!("{OURS} freeze --for 100ms --json"))?;
        rehearsed(&good, "good", &serde_json::Value::Null)?;
        let rehearsal = guest.spawn(&[OURS, "freeze", "--for", "50s", "--json"])?;
        still()?;
        guest.sh(&format!("{OURS} thaw"))?;
        let why = "an operator asked for the thaw";
        ends(&rehearsal, why)?;
        rehearsed(&guest.output(&rehearsal)?, "broken", &why.into())?;
        stop(guest, module, &daemon)?;
    }
    Ok(())
}

/// What a rehearsal prints as JSON is this, of all that there is to freeze.
fn rehearsed(printed: &str, result: &str, why: &serde_json::Value) -> Result<()> {
    let entry: serde_json::Value = serde_json::from_str(printed)?;
    let file_systems = entry["file_systems"].as_array().map(Vec::len);
    ensure!(
        entry["result"] == result && entry["why"] == *why && file_systems == Some(2),
        "the rehearsal should be {result}, it was: {printed}"
    );
    Ok(())
}

fn thaw(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.writer_start("/writer")?;
    guest.writer_start("/mnt/a/w")?;
    let by_hand = |words: &str| -> Result<()> {
        let ended = guest.try_sh(&format!("{OURS} thaw"))?;
        ensure!(
            ended.status == Some(0) && ended.err.contains(words),
            "thaw should succeed and say {words:?}, it was: {ended:?}"
        );
        Ok(())
    };
    by_hand("nothing is recorded as frozen")?;
    start(guest, guest.module(), Daemon::Ours)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
    by_hand("the daemon that serves has thawed; its backup fails")?;
    equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
    answered("THAW after a thaw by hand", &vss.thaw(STEP)?, status::FAIL)?;
    by_hand("nothing is recorded as frozen")?;
    answered("FREEZE, the next", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW of that", &vss.thaw(STEP)?, status::OK)
}

/// What `list` says would be frozen with this configuration.
fn chosen(guest: &Guest, config: &str) -> Result<Vec<String>> {
    guest.sh(&format!("cat >/run/choice.toml <<'END'\n{config}\nEND"))?;
    let json = guest.sh(&format!("{OURS} -c /run/choice.toml list --json"))?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let frozen = json["frozen"].as_array().into_iter().flatten();
    let paths = frozen.map(|it| it["paths"][0].as_str().unwrap_or_default().to_owned());
    let mut paths: Vec<String> = paths.collect();
    paths.sort();
    Ok(paths)
}

fn configuration(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/data-1 /mnt/data-2 /mnt/other && modprobe btrfs
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/data-1
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/data-2
              mkfs.btrfs -q -f /dev/ram3 && mount /dev/ram3 /mnt/other",
    )?;
    let (one, two, other) = ("/mnt/data-1", "/mnt/data-2", "/mnt/other");
    let choices: [(&str, &[&str]); 12] = [
        ("", &["/", one, two, other]),
        ("[exclude]\npaths = ['/mnt/data-1']", &["/", two, other]),
        ("[exclude]\npaths = ['/mnt/*-[12]']", &["/", other]),
        ("[exclude]\ntypes = ['btrfs']", &["/", one, two]),
        ("[exclude]\ntypes = ['ext?']", &[other]),
        ("[exclude]\ndevices = ['/dev/ram[13]']", &["/", two]),
        ("[exclude]\ndevices = ['1:2']", &["/", one, other]),
        ("[include]\npaths = ['/mnt/*']", &[one, two, other]),
        ("[include]\ntypes = ['b*']", &[other]),
        ("[include]\ndevices = ['/dev/ram2', '1:1']", &[one, two]),
        ("[include]\npaths = ['/']", &["/"]),
        // What is left out stays out, whatever chooses it.
        (
            "[include]\npaths = ['/mnt/data*']\n[exclude]\ndevices = ['/dev/ram1']",
            &[two],
        ),
    ];
    for (config, expected) in choices {
        let expected: Vec<String> = expected.iter().map(|it| it.to_string()).collect();
        equal(config, chosen(guest, config)?, expected)?;
    }
    let text = guest.sh(&format!("{OURS} -c /run/choice.toml list"))?;
    for reason in [
        "excluded by exclude device /dev/ram1",
        "excluded by include",
    ] {
        ensure!(
            text.contains(reason),
            "the list should say {reason:?}:\n{text}"
        );
    }

    // And that is what is frozen.
    for path in ["/mnt/data-1/w", "/mnt/data-2/w", "/mnt/other/w"] {
        guest.writer_start(path)?;
    }
    load(guest, guest.module(), &[])?;
    guest.start_daemon_with("[include]\ntypes = ['ext4']\n[exclude]\npaths = ['*-1']")?;
    wait_for_daemon(guest)?;
    let seen = observe(guest)?;
    equal(
        "what stood still",
        seen.still,
        vec!["/mnt/data-2/w".to_owned()],
    )?;
    equal("THAW", seen.thaw, Some(status::OK))
}

fn bad_configuration(guest: &Guest) -> Result<()> {
    let no_grace: &[&str] = match guest.module() {
        Module::Ours => &["grace_ms=0"],
        Module::Stock => &[],
    };
    load(guest, guest.module(), no_grace)?;
    guest.sh("printf 'strict = true\\ndeadline = \"soon\"\\n' >/run/bad.toml")?;
    // By which the unit tells a start that is of no use a second time.
    const NOT_CONFIGURED: i32 = 78;
    for (command, code) in [("-n", NOT_CONFIGURED), ("list", 1), ("freeze --for 1s", 1)] {
        let ended = guest.try_sh(&format!("{OURS} -c /run/bad.toml {command}"))?;
        ensure!(
            ended.status == Some(code)
                && ended.err.contains("/run/bad.toml")
                && ended.err.contains("line 2, column 12"),
            "'{command}' should name file, line and column, it was: {ended:?}"
        );
    }
    for (config, place, words) in [
        (
            "strict = true\nstrikt = true",
            "line 2, column 1",
            "unknown field",
        ),
        (
            "[exclude]\npath = ['/x']",
            "line 2, column 1",
            "unknown field",
        ),
        (
            "\n\ndeadline = 0",
            "line 3, column 12",
            "not between 1 and 3600",
        ),
        (
            "parallel = 1000",
            "line 1, column 12",
            "not between 1 and 256",
        ),
        (
            "[exclude]\npaths = ['/a', '/b[']",
            "line 2, column",
            "not a pattern",
        ),
        ("strict true", "line 1, column 8", ""),
        ("strict = [", "line 1, column", ""),
    ] {
        guest.sh(&format!("cat >/run/bad.toml <<'END'\n{config}\nEND"))?;
        let ended = guest.try_sh(&format!("{OURS} -c /run/bad.toml -n"))?;
        ensure!(
            ended.status == Some(NOT_CONFIGURED)
                && ended.err.contains(place)
                && ended.err.contains(words),
            "{config:?} should be refused at {place} with {words:?}, it was: {ended:?}"
        );
    }
    for command in ["list", "-n"] {
        let ended = guest.try_sh(&format!("{OURS} -c /run/absent.toml {command}"))?;
        ensure!(
            ended.status == Some(1) && ended.err.contains("/run/absent.toml"),
            "a configuration that is not there should be named, it was: {ended:?}"
        );
    }
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::FAIL)?;
    guest.not_frozen("after that", &["/"])
}

/// What each daemon says where it is started without a driver.
fn compare_no_driver(guest: &Guest) -> Result<()> {
    let syslogd = guest.spawn(&["syslogd", "-n", "-O", "/run/messages"])?;
    guest.wait_until("the system log is there", STEP, || {
        Ok(guest.try_sh("test -S /dev/log")?.status == Some(0))
    })?;
    let told = |daemon: Daemon| -> Result<String> {
        guest.sh(": >/run/messages")?;
        let ended = guest.try_sh(&format!("timeout 20 {}", daemon.argv().join(" ")))?;
        let end = how_it_ended(&ended);
        let said = (ended.out + &ended.err).trim().to_owned();
        let said = match said.as_str() {
            "" => "says nothing".to_owned(),
            said => format!("says \"{said}\""),
        };
        // Without time, machine and who it is. The server of the log says that it has started.
        let log = guest.read("/run/messages")?;
        let mut lines = log.lines().filter(|it| !it.contains("syslogd"));
        let logged = match lines.next_back().and_then(|it| it.split_once(": ")) {
            None => "nothing in the system log".to_owned(),
            Some((_, line)) => format!("in the system log \"{line}\""),
        };
        Ok(format!("{said}, {logged}; {end}"))
    };
    let (ours, peer) = (told(Daemon::Ours)?, told(Daemon::Debian)?);
    guest.signal(&syslogd, 9)?;
    guest.wait(&syslogd, STEP)?;
    guest.sh("rm -f /run/messages /dev/log")?;
    guest.compare("a start by hand with no driver loaded", &ours, &peer);
    Ok(())
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
        &["no /dev/vmbus/hv_vss", "modprobe hv_vss"],
    )?;
    compare_no_driver(guest)?;
    fails(
        "a start on another device",
        &format!("{OURS} -n --device /dev/zero"),
        &["/dev/zero"],
    )?;
    // Nothing is written to what is no device, and a FIFO is not waited for.
    guest.sh("echo precious >/run/file && mkfifo /run/fifo")?;
    for path in ["/run/file", "/run/fifo"] {
        fails(
            "a start on something else",
            &format!("{OURS} -n --device {path}"),
            &[path, "not a character device"],
        )?;
    }
    fails(
        "a start on a folder",
        &format!("{OURS} -n --device /run"),
        &["cannot open /run", "directory"],
    )?;
    equal(
        "what the file holds",
        guest.read("/run/file")?.as_str(),
        "precious\n",
    )?;
    fails(
        "a thaw without privilege",
        &format!("{SOMEBODY} {OURS} thaw"),
        &["only root may freeze and thaw"],
    )?;
    fails(
        "a rehearsal without privilege",
        &format!("{SOMEBODY} {OURS} freeze --for 1s"),
        &["only root may freeze"],
    )?;
    for (command, words) in [
        ("status", "only root may ask the daemon"),
        ("reload", "only root may ask the daemon"),
        ("history", "only root may read the history"),
        ("check", "only root may look at all"),
    ] {
        fails(
            "a question without privilege",
            &format!("{SOMEBODY} {OURS} {command}"),
            &[words],
        )?;
    }
    load(guest, guest.module(), &[])?;
    fails(
        "a start without privilege",
        &format!("{SOMEBODY} {OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "Permission denied"],
    )?;
    guest.sh("mkdir -p /root/run /run/hv_vss && mount --bind /root/run /run/hv_vss")?;
    for command in ["-n", "freeze --for 1s"] {
        fails(
            "a record on a disk",
            &format!("{OURS} {command}"),
            &["/run/hv_vss", "on a disk"],
        )?;
    }
    guest.sh("umount /run/hv_vss && rm -r /root/run")?;
    guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    fails(
        "a second daemon",
        &format!("{OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "busy"],
    )?;
    // What a rehearsal has left that died beside the one that serves does not make that a dead one.
    let left = "{\"pid\":4000000,\"context\":[],\"limit_ms\":2000,\"owed\":[]}";
    guest.sh(&format!("echo '{left}' >/run/hv_vss/hooks.json"))?;
    fails(
        "a second daemon, with hooks of a dead process",
        &format!("timeout 10 {OURS} -n"),
        &["cannot open /dev/vmbus/hv_vss", "busy"],
    )?;
    let status = guest.try_sh(&format!("{OURS} status"))?;
    ensure!(
        status.out.contains("serves;"),
        "the one that serves should be asked still: {status:?}"
    );
    guest.sh("rm /run/hv_vss/hooks.json")?;
    guest.not_frozen("after all that", &["/"])
}
