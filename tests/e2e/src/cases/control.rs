// SPDX-License-Identifier: GPL-2.0-only

//! What an operator can do beside a daemon that serves, whichever module it serves and whoever holds
//! what is frozen.

use super::deadman::{hang_writes, make_hung, released, remove_hung, HANG, RELEASED, UNHANG};
use super::hooks::{self, hook, noted};
use super::lifecycle::{end_override, take_over};
use super::{
    all_frozen, case, load, module_holds, observe, reply_within, start, stood_for_a_second, stop,
    wait_for_daemon, Case,
};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Op, SHORT_BODY};
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "control/thaw",
        "thaw by hand reaches the daemon that has frozen: all goes on, its backup fails",
        thaw,
    ),
    case(
        "control/thaw-under-a-stopped-daemon",
        "thaw by hand under a daemon that does not reply: thaws, stock module; says that it cannot, ours",
        thaw_under_a_stopped_daemon,
    ),
    case(
        "control/thaw-of-a-dead-disk",
        "thaw by hand while a disk is dead, stock module: it waits for the daemon, which gives that one up, and says so",
        thaw_of_a_dead_disk,
    ),
    case(
        "control/rehearsal",
        "the daemon that serves rehearses, by what a backup freezes with: all goes on and hooks are let go after its time \
         and when whoever asked is killed, FREEZE during it is good by a freeze of its own, and so is the next backup",
        rehearsal,
    ),
    case(
        "control/hand-over",
        "from the stock module to ours under a running daemon: it freezes by what each offers",
        hand_over,
    )
    .asking_our_module(),
    case(
        "control/status-and-history",
        "status while idle, frozen, after a backup that failed, without a daemon; the history says when, how \
         and why, survives the daemon, and is drawn; each outcome has its exit status",
        status_and_history,
    ),
    case(
        "control/history-not-written",
        "where the history cannot be written, status says of the last backup what the daemon knows",
        history_not_written,
    ),
    case(
        "control/ended-amid-a-backup",
        "a backup that a stop or the death of the daemon ends is in the history, once, and status says so",
        ended_amid_a_backup,
    ),
    case(
        "control/hung-tasks",
        "a start warns of a kernel that panics before the deadline when a writer waits",
        hung_tasks,
    ),
    case(
        "control/check",
        "check names what would fail a backup and what is known to be trouble, and so does a start that \
         cannot be",
        check,
    ),
    case(
        "control/check-while-refusing",
        "check and status say so while each FREEZE is refused: behind a freeze that hangs, stock module, and beside what \
         another process has frozen",
        check_while_refusing,
    ).long(),
    case(
        "control/reload",
        "reload by hand and by SIGHUP: another rule is in force with the next backup; a bad file, named \
         with line and column, changes nothing",
        reload,
    ),
    case(
        "control/reload-that-hangs",
        "a reload that hangs on a disk fails in time and changes nothing, and the next one succeeds once the file is \
         another, also while the first one hangs",
        reload_that_hangs,
    ),
    case(
        "control/reload-while-waiting",
        "while another program has the device, status says so and a reload succeeds: the configuration of then is in \
         force once it is ours",
        reload_while_waiting,
    ).long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/systemctl-reload",
            "systemctl reload puts a drop-in in force; with a bad one it fails and the journal says where",
            systemctl_reload,
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/check-next-boot",
            "check warns of a unit that does not serve after the next boot, and of a history that cannot be written; not of \
             a daemon that was started without the unit",
            check_next_boot,
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/varlink",
            "varlinkctl has the service describe itself, and calls it: status, history, check",
            varlink,
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/no-device",
            "systemctl start without the device starts nothing, fails nothing, and the journal says what to do",
            no_device,
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/hand-over-held-open",
            "whoever has the stock module's device open hangs no hand-over: it ends, says who that is, and the device is \
             moved once it is let go",
            |guest| hand_over_held_open(guest, Asks::Script),
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/hand-over-held-open-by-udev",
            "the same when udev's rule has asked, which kills what that leaves running",
            |guest| hand_over_held_open(guest, Asks::Udev),
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        ..case(
            "control/check-privileges",
            "check names what a drop-in of the unit takes from the daemon, and FREEZE fails for want of it",
            check_privileges,
        )
    }.long(),
    Case {
        machine: Machine::SYSTEMD,
        // systemd reads all its units again some thirty times, and starts as many.
        per_round: Duration::from_secs(15),
        ..case(
            "control/gives-way",
            "the units of Fedora's and of SUSE's daemon stay away while ours is enabled, and only so long",
            gives_way,
        )
    }.long(),
    case(
        "control/log-not-read",
        "a system log that is stopped holds up no backup, and has all of them once it goes on",
        log_not_read,
    )
    .comparing(),
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
    guest.wait_until("both writers stand still", STEP, || all_frozen(guest))
}

fn thaw(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let vss = guest.vss();
    for &module in guest.modules() {
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
    stop(guest, Module::Stock, &daemon)?;
    if !guest.modules().contains(&Module::Ours) {
        return Ok(());
    }
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let holds = !guest.held()?.is_empty();
    guest.signal(&daemon, 19)?;
    all_stand_still(guest)?;
    let ended = guest.try_sh(THAW)?;
    let remedy = format!("kill -9 {}", daemon.pid);
    ensure!(
        !holds || ended.status == Some(1) && ended.err.contains(&remedy),
        "thaw should say that it cannot, and what can: {ended:?}"
    );
    guest.sh(&remedy)?;
    released(guest, "the death of the daemon", guest.clock()?, RELEASED)?;
    guest.wait(&daemon, STEP)?;
    Ok(())
}

fn thaw_of_a_dead_disk(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    make_hung(guest)?;
    let vss = guest.vss();
    // With ours it is the module that thaws then, and only its worker hangs.
    load(guest, Module::Stock, &[])?;
    // Longer than whoever asks waits for a reply, and than the healthy may be held up.
    let give_up = Duration::from_secs(7).max(guest.host().patience(RELEASED) * 2);
    let daemon = guest.start_daemon_with(&format!("give_up = {}", give_up.as_secs()))?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    all_stand_still(guest)?;
    guest.sh(HANG)?;
    let at = guest.clock()?;
    let ended = guest.try_sh(THAW);
    let goes_on = released(guest, "thaw by hand", at, RELEASED);
    guest.sh(UNHANG)?;
    let (ended, _) = (ended?, goes_on?);
    let says = |words: &str| ended.err.contains(words);
    ensure!(
        ended.status == Some(0) && says("waiting for it") && says("its backup fails"),
        "thaw should wait for the daemon, it was: {ended:?}"
    );
    ensure!(!says("kill"), "nobody has to be killed: {ended:?}");
    answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
    guest.wait_until("what was given up is back", STEP, || {
        Ok(guest.try_sh("timeout 1 touch /mnt/hung/now")?.status == Some(0))
    })?;
    super::backup(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    remove_hung(guest)
}

/// A rehearsal in which all stands still, by the daemon that serves `module`.
fn rehearse(guest: &Guest, module: Module) -> Result<Process> {
    let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
    all_stand_still(guest)?;
    noted(guest, "a rehearsal", &["10-a freeze "])?;
    let status = asked(guest, "status", 5)?;
    ensure!(
        status.contains("rehearsing") && status.contains("/mnt/a (ext4"),
        "{status}"
    );
    let record = guest.try_sh("test -e /run/hv_vss/frozen.json")?;
    match module {
        Module::Ours => equal("what the module holds", guest.held()?.len(), 2)?,
        Module::Stock => equal("the record", record.status, Some(0))?,
    }
    Ok(rehearsal)
}

fn rehearsal(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.sh("rm -f /run/notes; mkdir -p /etc/hv_vss/hooks.d")?;
    hook(guest, "10-a", "")?;
    for &module in guest.modules() {
        let daemon = start(guest, module, Daemon::Ours)?;
        guest.writers_reset()?;
        let said = guest.sh("/payload/hv_vss_daemon freeze --for 1s")?;
        ensure!(
            said.contains("/mnt/a (ext4") && said.contains("frozen for 1."),
            "it should say what it has frozen, it was: {said}"
        );
        for writer in guest.writers()? {
            ensure!(
                stood_for_a_second(guest, &writer),
                "the writer of {} should have stood still for a second: {writer:?}",
                writer.path
            );
        }
        guest.not_frozen("after the rehearsal", &["/", "/mnt/a"])?;
        noted(guest, "a rehearsal", &["10-a freeze ", "10-a thaw good"])?;

        let rehearsal = rehearse(guest, module)?;
        guest.signal(&rehearsal, 9)?;
        let what = "whoever asked is killed";
        released(guest, what, guest.clock()?, RELEASED)?;
        noted(guest, what, &["10-a thaw good"])?;
        guest.wait(&rehearsal, STEP)?;

        let rehearsal = rehearse(guest, module)?;
        let seen = observe(guest)?;
        equal(
            "FREEZE during one",
            seen,
            super::good(&["/writer", "/mnt/a/w"]),
        )?;
        let own = ["10-a thaw broken", "10-a freeze ", "10-a thaw good"];
        noted(guest, "FREEZE during one", &own)?;
        let ended = guest.wait(&rehearsal, STEP)?;
        let said = guest.output(&rehearsal)?;
        ensure!(
            ended.status == Some(4) && said.contains("the host has begun a backup"),
            "it should say why it has ended, it was: {ended:?}\n{said}"
        );

        let rehearsal = rehearse(guest, module)?;
        guest.sh(THAW)?;
        released(guest, "thaw by hand", guest.clock()?, RELEASED)?;
        noted(guest, "thaw by hand", &["10-a thaw broken"])?;
        guest.wait(&rehearsal, STEP)?;
        let seen = observe(guest)?;
        equal(
            "the next backup",
            seen,
            super::good(&["/writer", "/mnt/a/w"]),
        )?;
        noted(
            guest,
            "the next backup",
            &["10-a freeze ", "10-a thaw good"],
        )?;
        stop(guest, module, &daemon)?;
    }
    hooks::end(guest)
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
    guest.vss().agree(STEP)?;
    wait_for_daemon(guest)?;
    equal("a backup with ours", observe(guest)?, both)?;
    let holds = module_holds(guest)?;
    equal("guards with ours", guards()?, usize::from(!holds))?;
    stop(guest, Module::Ours, &daemon)?;
    end_override(guest)?;
    guest.unload(Module::Stock).map(drop)
}

/// The program with these words must end so; returns what it has printed.
pub(super) fn asked(guest: &Guest, words: &str, code: i32) -> Result<String> {
    let ended = guest.try_sh(&format!("/payload/hv_vss_daemon {words}"))?;
    ensure!(
        ended.status == Some(code),
        "{words} should end with {code}, it was: {ended:?}"
    );
    Ok(ended.out + &ended.err)
}

fn status_and_history(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let vss = guest.vss();
    asked(guest, "status", 3)?;
    equal(
        "no history",
        asked(guest, "history --json", 0)?.trim(),
        "[]",
    )?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let text = asked(guest, "status", 0)?;
    ensure!(text.contains("none is remembered"), "{text}");
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let text = asked(guest, "status", 5)?;
    let is_named = |name: &str| {
        let mut lines = text.lines();
        lines.any(|line| line.starts_with("frozen ") && line.contains(name))
    };
    ensure!(is_named(" /mnt/a (") && is_named(" / ("), "{text}");
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    guest.wait_until("nothing is held any more", STEP, || {
        let out = guest.try_sh("/payload/hv_vss_daemon status --json")?.out;
        let status: serde_json::Value = serde_json::from_str(&out)?;
        Ok(status["daemon"]["frozen"]
            .as_array()
            .is_some_and(Vec::is_empty))
    })?;
    let all = remembered(guest, 1)?;
    let names: Vec<&str> = all[0]["file_systems"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|it| it["name"].as_str())
        .collect();
    ensure!(
        all[0]["result"] == "good"
            && names.len() == 2
            && names[0].starts_with("/mnt/a (ext4")
            && names[1].starts_with("/ (ext4"),
        "what is remembered: {all}"
    );
    asked(guest, "status", 0)?;
    // One whose hook fails.
    guest.sh("mkdir -p /etc/hv_vss/hooks.d
         printf '#!/bin/sh\\n[ $1 != freeze ]\\n' >/etc/hv_vss/hooks.d/10-a
         chmod 755 /etc/hv_vss/hooks.d/10-a")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let all = remembered(guest, 2)?;
    ensure!(
        all[1]["result"] == "failed"
            && all[1]["why"] == "hook 10-a: it failed with exit status 1"
            && all[1]["hooks"].as_array().map(Vec::len) == Some(2),
        "what is remembered: {all}"
    );
    let text = asked(guest, "history", 4)?;
    ensure!(
        text.lines().count() == 3 && text.contains("exit status 1"),
        "{text}"
    );
    asked(guest, "status", 4)?;
    stop(guest, guest.module(), &daemon)?;
    asked(guest, "status", 3)?;
    asked(guest, "history", 4)?;
    for (number, word) in [(2, "/mnt/a (ext4"), (1, "hook 10-a")] {
        asked(
            guest,
            &format!("history --svg /run/a.svg --number {number}"),
            0,
        )?;
        let svg = guest.read("/run/a.svg")?;
        ensure!(svg.starts_with("<svg") && svg.contains(word), "{svg}");
    }
    asked(guest, "history --svg /run/a.svg --number 3", 1).map(drop)
}

fn history_not_written(guest: &Guest) -> Result<()> {
    const HOOK: &str = "/etc/hv_vss/hooks.d/10-a";
    make_one(guest)?;
    let vss = guest.vss();
    guest.sh("mkdir -p /etc/hv_vss/hooks.d /var/lib/hv_vss
         mount -t tmpfs none /var/lib/hv_vss")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    observe(guest)?;
    remembered(guest, 1)?;
    guest.sh(&format!(
        "mount -o remount,ro /var/lib/hv_vss
         printf '#!/bin/sh\\n[ $1 != freeze ]\\n' >{HOOK} && chmod 755 {HOOK}"
    ))?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    guest.wait_until("the log says that it is not in the history", STEP, || {
        Ok(guest.output(&daemon)?.contains("of the history"))
    })?;
    let text = asked(guest, "status", 4)?;
    ensure!(
        text.contains("exit status 1") && text.contains("does not have this backup"),
        "status should go by what the daemon knows:\n{text}"
    );
    // With room again it has the next one.
    guest.sh(&format!("mount -o remount,rw /var/lib/hv_vss && rm {HOOK}"))?;
    observe(guest)?;
    remembered(guest, 2)?;
    asked(guest, "status", 0)?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount /var/lib/hv_vss").map(drop)
}

/// The history, once it has so many entries.
fn remembered(guest: &Guest, number: usize) -> Result<serde_json::Value> {
    let mut all = serde_json::Value::Null;
    guest.wait_until("the backup is remembered", STEP, || {
        let out = guest.try_sh("/payload/hv_vss_daemon history --json")?.out;
        all = serde_json::from_str(&out)?;
        Ok(all.as_array().map(Vec::len) == Some(number))
    })?;
    Ok(all)
}

fn ended_amid_a_backup(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    let vss = guest.vss();
    let mut daemon = start(guest, guest.module(), Daemon::Ours)?;
    let mut number = 0;
    for (signal, why) in [
        (15, "the daemon was stopped"),
        (9, "the daemon died during it"),
    ] {
        observe(guest)?;
        number += 1;
        remembered(guest, number)?;
        asked(guest, "status", 0)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.signal(&daemon, signal)?;
        guest.wait(&daemon, STEP)?;
        number += 1;
        if signal == 15 {
            // There need not be another start.
            let all: serde_json::Value = serde_json::from_str(&asked(guest, "history --json", 4)?)?;
            equal("entries", all.as_array().map(Vec::len), Some(number))?;
        }
        daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        answered("THAW after it", &vss.thaw(STEP)?, status::FAIL)?;
        let all = remembered(guest, number)?;
        let last = &all[number - 1];
        ensure!(
            last["result"] == "broken" && last["why"] == why,
            "what is remembered: {last}"
        );
        asked(guest, "status", 4)?;
    }
    stop(guest, guest.module(), &daemon)
}

fn hung_tasks(guest: &Guest) -> Result<()> {
    guest.sh("echo 10 >/proc/sys/kernel/hung_task_timeout_secs
         echo 1 >/proc/sys/kernel/hung_task_panic")?;
    let started = start(guest, guest.module(), Daemon::Ours);
    guest.sh("echo 0 >/proc/sys/kernel/hung_task_panic
         echo 120 >/proc/sys/kernel/hung_task_timeout_secs")?;
    let daemon = started?;
    guest.wait_until("it warns", STEP, || {
        Ok(guest.output(&daemon)?.contains("hung_task_panic is set"))
    })?;
    stop(guest, guest.module(), &daemon)
}

fn check(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    guest.sh("mkdir -p /etc/hv_vss/hooks.d")?;
    let says = |text: &str, words: &[&str]| {
        for word in words {
            ensure!(
                text.contains(word),
                "check should say {word:?}, it said:\n{text}"
            );
        }
        Ok(())
    };
    let text = asked(guest, "check", 6)?;
    says(&text, &["PROBLEM", "no driver is loaded: modprobe hv_vss"])?;
    let text = asked(guest, "run -n", 1)?;
    says(&text, &["no /dev/vmbus/hv_vss: no driver is loaded"])?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let text = asked(guest, "check", 0)?;
    says(&text, &["serves /dev/vmbus/hv_vss", "2 are to be frozen"])?;
    guest.sh("echo 10 >/proc/sys/kernel/hung_task_timeout_secs
         echo 1 >/proc/sys/kernel/hung_task_panic")?;
    guest.watch_opens("/mnt/a", Some("/run/opens"))?;
    guest.sh("cat >/etc/hv_vss/daemon.toml <<'END'
exclude.types = ['zfs']
hooks = { qemu = true, optional = ['9*'] }
END")?;
    let theirs = "/etc/vmware-tools/backupScripts.d";
    guest.sh(&format!(
        "touch /etc/hv_vss/hooks.d/20-b; mkdir -p {theirs}; ln -s /bin/true {theirs}/10-a"
    ))?;
    asked(guest, "reload", 0)?;
    let text = asked(guest, "check", 7);
    guest.sh("rm -r /etc/vmware-tools")?;
    guest.release_opens()?;
    guest.sh("echo 0 >/proc/sys/kernel/hung_task_panic
         echo 120 >/proc/sys/kernel/hung_task_timeout_secs")?;
    says(
        &text?,
        &[
            "hung_task_panic",
            "(fanotify)",
            "exclude type zfs matches no file system",
            "the rule hooks.optional 9* matches no hook",
            "hooks.qemu is set, and there is no hook",
            "20-b is not called: it is not executable",
            "backupScripts.d are not called: hooks.open_vm_tools is not set",
        ],
    )?;
    guest.sh("cd /etc/hv_vss/hooks.d && touch 10-a && chmod 777 10-a
         printf '#!/bin/sh\\r\\nexit 0\\r\\n' >30-c && chmod 755 30-c
         echo 'deadline = 0' >/etc/hv_vss/daemon.toml")?;
    let text = asked(guest, "check", 6)?;
    says(
        &text,
        &[
            "10-a is not run",
            "others than root",
            "30-c cannot be run: its interpreter \"/bin/sh\\r\"",
            "line 1, column 12",
            "the next start fails",
        ],
    )?;
    let json = asked(guest, "check --json", 6)?;
    let all: serde_json::Value = serde_json::from_str(&json)?;
    let problems = all.as_array().into_iter().flatten();
    let problems = problems.filter(|it| it["grade"] == "problem").count();
    equal("problems in JSON", problems, 2)?;
    stop(guest, guest.module(), &daemon)?;

    guest.sh(
        "rm -rf /etc/hv_vss/hooks.d; echo 'listed_disks_only = true' >/etc/hv_vss/daemon.toml",
    )?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let text = asked(guest, "check", 7)?;
    says(&text, &["listed_disks_only does nothing"])?;
    guest.sh("rm -rf /etc/hv_vss")?;
    asked(guest, "reload", 0)?;
    asked(guest, "check", 0)?;
    // The package for DKMS is installed: the module is there, or it is not, for want of headers.
    guest.sh(
        "mkdir -p /usr/src/hv_vss-1/kmod/dkms && cd /usr/src/hv_vss-1/kmod/dkms
         printf '#!/bin/sh\\necho \"not built for $2: no headers\"\\n' >build
         chmod 755 build",
    )?;
    // As a user's shell may be, which finds nothing that is root's.
    const CHECK: &str = "env PATH=/usr/bin:/bin /payload/hv_vss_daemon check";
    // Found before the system's.
    const MODINFO: &str = "/usr/local/sbin/modinfo";
    let with = guest.try_sh(CHECK)?;
    guest.sh(&format!(
        "mkdir -p $(dirname {MODINFO}) && printf '#!/bin/sh\\nexit 1\\n' >{MODINFO} && chmod 755 {MODINFO}"
    ))?;
    let without = guest.try_sh(CHECK)?;
    equal("how check with it ends", with.status, Some(7))?;
    says(&with.out, &["hv_vss is built and hv_utils serves"])?;
    equal("how check without it ends", without.status, Some(7))?;
    let release = guest.sh("uname -r")?;
    let line = format!("not built for {}: no headers", release.trim());
    says(&without.out, &[&line])?;
    stop(guest, Module::Stock, &daemon)?;

    let theirs = start(guest, Module::Stock, Daemon::Debian)?;
    let told = guest.try_sh(CHECK)?;
    guest.sh(&format!("rm -rf /usr/src/hv_vss-1 {MODINFO}"))?;
    equal("how check beside theirs ends", told.status, Some(6))?;
    says(
        &told.out,
        &[
            "no daemon of ours serves",
            &format!("(process {}, /", theirs.pid),
            ") has /dev/vmbus/hv_vss",
            &line,
        ],
    )?;
    stop(guest, Module::Stock, &theirs)?;

    // What a drop-in of the unit may take from it.
    load(guest, guest.module(), &[])?;
    let daemon = guest.spawn(&["unshare", "-m", "/payload/hv_vss_daemon", "-n"])?;
    wait_for_daemon(guest)?;
    let text = asked(guest, "check", 7)?;
    says(&text, &["has a mount namespace of its own"])?;
    stop(guest, guest.module(), &daemon)
}

fn check_while_refusing(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    make_hung(guest)?;
    load(guest, Module::Stock, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(1))?;
    wait_for_daemon(guest)?;
    let graded = |wanted: &str| {
        let found = asked(guest, "check --json", if wanted == "ok" { 0 } else { 6 })?;
        let all: serde_json::Value = serde_json::from_str(&found)?;
        ensure!(
            all[0]["what"] == "daemon" && all[0]["grade"] == wanted,
            "check of the daemon should be {wanted}: {found}"
        );
        Ok(all[0]["text"].to_string())
    };
    let serves_again = || {
        guest.wait_until("no FREEZE is refused any more", STEP, || {
            let out = guest.try_sh("/payload/hv_vss_daemon status --json")?.out;
            let status: serde_json::Value = serde_json::from_str(&out)?;
            Ok(status["daemon"]["refuses"].is_null() && status["daemon"]["phase"] == "idle")
        })?;
        graded("ok")
    };
    graded("ok")?;
    guest.sh(&format!("sync && {}", hang_writes("hung")))?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let text = graded("problem")?;
    let says = text.contains("refuses each FREEZE") && text.contains("/mnt/hung");
    ensure!(says, "{text}");
    asked(guest, "status", 3)?;
    guest.sh(UNHANG)?;
    serves_again()?;
    stop(guest, Module::Stock, &daemon)?;

    let config = "/run/rehearsal.toml";
    guest.sh(&format!("echo 'deadline = 3600' >{config}"))?;
    let rehearse = [
        "/payload/hv_vss_daemon",
        "-c",
        config,
        "freeze",
        "--for",
        "59m",
    ];
    let rehearsal = guest.spawn(&rehearse)?;
    all_stand_still(guest)?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    let text = graded("problem")?;
    ensure!(text.contains("is not undone"), "{text}");
    let text = asked(guest, "status", 3)?;
    ensure!(text.contains("is not undone"), "{text}");
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    guest.signal(&rehearsal, 15)?;
    guest.wait(&rehearsal, STEP)?;
    serves_again()?;
    super::backup(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    remove_hung(guest)
}

fn reload(guest: &Guest) -> Result<()> {
    const RELOAD: &str = "/payload/hv_vss_daemon reload";
    const FOLDER: &str = "/etc/hv_vss/daemon.toml.d";
    make_one(guest)?;
    guest.sh(&format!("mkdir -p {FOLDER}"))?;
    let put = |path: &str, text: &str| guest.sh(&format!("printf '{text}' >{path}"));
    let all = super::good(&["/writer", "/mnt/a/w"]);
    let root_alone = super::Seen {
        still: vec!["/writer".into()],
        moving: vec!["/mnt/a/w".into()],
        ..all.clone()
    };
    put("/etc/hv_vss/daemon.toml", "strict = false\\n")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("a backup by the file", observe(guest)?, all.clone())?;
    put(
        &format!("{FOLDER}/10-a.toml"),
        "exclude.paths = [\"/mnt/a\"]\\n",
    )?;
    equal("a backup before the reload", observe(guest)?, all.clone())?;
    let text = asked(guest, "check", 7)?;
    ensure!(
        text.contains("changed since it was read, and not in force"),
        "{text}"
    );
    guest.sh(RELOAD)?;
    equal("a backup after it", observe(guest)?, root_alone.clone())?;
    put(
        &format!("{FOLDER}/20-b.toml"),
        "exclude.paths = []\\ndeadlin = 5\\n",
    )?;
    let ended = guest.try_sh(RELOAD)?;
    ensure!(
        ended.status == Some(1)
            && ended.err.contains("20-b.toml")
            && ended.err.contains("line 2, column 1"),
        "reload should say what is wrong, it was: {ended:?}"
    );
    equal("a backup after a bad one", observe(guest)?, root_alone)?;
    let text = asked(guest, "check", 7)?;
    let says = text.contains("20-b.toml") && text.contains("the next start fails");
    ensure!(says, "{text}");
    put(
        &format!("{FOLDER}/20-b.toml"),
        "exclude.paths = []\\nrun_dir = \"/run/other\"\\n",
    )?;
    guest.signal(&daemon, 1)?;
    guest.wait_until(
        "it has read it again and said what is no setting",
        STEP,
        || {
            let said = guest.output(&daemon)?;
            Ok(said.contains("run_dir is not a setting any more")
                && said.matches("the configuration is read again").count() == 2)
        },
    )?;
    equal("a backup after SIGHUP", observe(guest)?, all)?;
    let text = asked(guest, "check", 7)?;
    ensure!(text.contains("run_dir is not a setting any more"), "{text}");
    stop(guest, guest.module(), &daemon)?;
    let text = asked(guest, "reload", 1)?;
    ensure!(text.contains("no daemon serves"), "{text}");
    Ok(())
}

fn reload_that_hangs(guest: &Guest) -> Result<()> {
    const FILE: &str = "/etc/hv_vss/daemon.toml.d/10-a.toml";
    make_one(guest)?;
    make_hung(guest)?;
    // Nothing of it is in memory once it was mounted anew.
    guest.sh(&format!(
        "mkdir -p /etc/hv_vss/daemon.toml.d
         echo 'give_up = 8' >/mnt/hung/a.toml && umount /mnt/hung
         echo 'give_up = 7' >{FILE}"
    ))?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let in_force = |seconds: u64| {
        let out = guest.try_sh("/payload/hv_vss_daemon status --json")?.out;
        let status: serde_json::Value = serde_json::from_str(&out)?;
        let found = &status["daemon"]["configuration"]["in_force"]["give_up"];
        equal("give_up in force", found, &seconds.into())
    };
    in_force(7)?;
    guest.sh(&format!(
        "ln -sf /mnt/hung/a.toml {FILE} && mount -o barrier=0 /dev/mapper/hung /mnt/hung && {HANG}"
    ))?;
    let check = || {
        let text = asked(guest, "reload", 1)?;
        ensure!(text.contains("does not answer"), "{text}");
        // Whoever asks for the status reads it as well, and rm without -f asks whether it may be written to.
        guest.sh(&format!("rm -f {FILE} && echo 'give_up = 9' >{FILE}"))?;
        in_force(7)?;
        asked(guest, "reload", 0)?;
        in_force(9)?;
        // Whoever asks while another's read hangs hears of his own.
        guest.sh(&format!("ln -sf /mnt/hung/a.toml {FILE}"))?;
        let first = guest.spawn(&["/payload/hv_vss_daemon", "reload"])?;
        guest.sh(&format!(
            "sleep 2; rm -f {FILE} && echo 'give_up = 6' >{FILE}"
        ))?;
        asked(guest, "reload", 0)?;
        in_force(6)?;
        equal("the first", guest.wait(&first, STEP)?.status, Some(1))
    };
    let seen = check();
    guest.sh(UNHANG)?;
    seen?;
    super::backup(guest)?;
    stop(guest, guest.module(), &daemon)?;
    remove_hung(guest)
}

fn reload_while_waiting(guest: &Guest) -> Result<()> {
    make_one(guest)?;
    for by_signal in [true, false] {
        let theirs = start(guest, Module::Stock, Daemon::Debian)?;
        guest.sh("echo 'strict = false' >/run/waiting.toml")?;
        // As a service manager starts it.
        let line = "NOTIFY_SOCKET=/run/nobody exec /payload/hv_vss_daemon -n -c /run/waiting.toml";
        let daemon = guest.spawn(&["sh", "-c", line])?;
        guest.wait_until("it waits", STEP, || {
            let said = guest.output(&daemon)?;
            Ok(said.contains("another program serves the device"))
        })?;
        let ask = |what: &str| {
            guest.try_sh(&format!(
                "/payload/hv_vss_daemon {what} -c /run/waiting.toml"
            ))
        };
        guest.wait_until("status says so", STEP, || {
            let status = ask("status")?;
            Ok(
                status.status == Some(3)
                    && status.out.contains("another program serves the device"),
            )
        })?;
        if !by_signal {
            guest.sh("echo 'exclude.paths = x' >/run/waiting.toml")?;
            let bad = ask("reload")?;
            ensure!(bad.status == Some(1), "a reload of a bad file: {bad:?}");
        }
        guest.sh("echo 'exclude.paths = [\"/mnt/a\"]' >/run/waiting.toml")?;
        match by_signal {
            true => guest.signal(&daemon, 1)?,
            false => equal("a reload", ask("reload")?.status, Some(0))?,
        }
        guest.signal(&theirs, 15)?;
        guest.wait(&theirs, STEP)?;
        guest.wait_until("it serves", STEP, || {
            ensure!(!guest.has_ended(&daemon)?, "SIGHUP has ended it");
            let said = guest.output(&daemon)?;
            Ok(
                said.contains("the configuration is read again")
                    && said.contains("registered with"),
            )
        })?;
        guest.vss().wait_open(STEP)?;
        guest.vss().agree(STEP)?;
        let root_alone = super::Seen {
            still: vec!["/writer".into()],
            moving: vec!["/mnt/a/w".into()],
            ..super::good(&["/writer", "/mnt/a/w"])
        };
        equal("a backup by the file of then", observe(guest)?, root_alone)?;
        stop(guest, Module::Stock, &daemon)?;
    }
    guest.sh("rm /run/waiting.toml").map(drop)
}

fn systemctl_reload(guest: &Guest) -> Result<()> {
    const JOURNAL: &str = "journalctl --quiet --boot --unit hv_vss";
    guest.sh("modprobe hv_vss")?;
    guest.wait_until("the service serves", STEP, || {
        let status = guest.try_sh("/usr/sbin/hv_vss status --json")?;
        Ok(status.status == Some(0) && status.out.contains("held"))
    })?;
    let put = |text: &str| {
        guest.sh(&format!(
            "mkdir -p /etc/hv_vss/daemon.toml.d
             echo '{text}' >/etc/hv_vss/daemon.toml.d/test.toml"
        ))
    };
    put("deadline = 30")?;
    guest.sh("systemctl reload hv_vss")?;
    put("deadline = x")?;
    let ended = guest.try_sh("systemctl reload hv_vss")?;
    ensure!(
        ended.status != Some(0),
        "systemctl reload should fail with a bad file: {ended:?}"
    );
    guest.wait_until("the journal says where", STEP, || {
        let text = guest.sh(JOURNAL)?;
        Ok(text.contains("the configuration is read again")
            && text.contains("test.toml")
            && text.contains("line 1, column 12")
            && text.contains("the configuration stays as it was"))
    })?;
    let active = guest.sh("systemctl is-active hv_vss")?;
    equal("the service", active.trim(), "active")?;
    guest
        .sh("rm /etc/hv_vss/daemon.toml.d/test.toml; systemctl stop hv_vss")
        .map(drop)
}

/// Starts the service of the systemd guest.
fn start_service(guest: &Guest) -> Result<()> {
    guest.sh("modprobe hv_vss && udevadm settle && systemctl restart hv_vss")?;
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    Ok(())
}

fn check_next_boot(guest: &Guest) -> Result<()> {
    const NOT_ENABLED: &str = "hv_vss.service is not enabled";
    const MASKED: &str = "hv_vss.service is masked";
    const NOT_KEPT: &str = "no backup is remembered";
    let warns_of = |when: &str, expected: &[&str]| -> Result<()> {
        let ended = guest.try_sh("hv_vss check")?;
        for words in [NOT_ENABLED, MASKED, NOT_KEPT] {
            ensure!(
                ended.out.contains(words) == expected.contains(&words),
                "{when} check should warn of {expected:?}, it was: {ended:?}"
            );
        }
        let is_known = expected.is_empty() || ended.status == Some(7);
        ensure!(is_known, "{when} check should end with 7: {ended:?}");
        Ok(())
    };
    start_service(guest)?;
    warns_of("at first", &[])?;
    guest.sh("systemctl disable --quiet hv_vss")?;
    warns_of("once it is disabled", &[NOT_ENABLED])?;
    guest.sh("systemctl enable --quiet --runtime hv_vss")?;
    warns_of("enabled until the next boot", &[NOT_ENABLED])?;
    guest.sh("systemctl disable --quiet --runtime hv_vss; systemctl enable --quiet hv_vss && systemctl mask --quiet hv_vss")?;
    warns_of("once it is masked", &[MASKED])?;
    guest.sh("systemctl unmask --quiet hv_vss && mkdir -p /var/lib/hv_vss")?;
    for (what, options) in [("read-only", "ro"), ("full", "size=64k")] {
        guest.sh(&format!(
            "mount -t tmpfs -o {options} none /var/lib/hv_vss
             {{ head -c 100k /dev/zero >/var/lib/hv_vss/zero; }} 2>/dev/null || true"
        ))?;
        warns_of(&format!("with a disk that is {what}"), &[NOT_KEPT])?;
        guest.sh("umount /var/lib/hv_vss")?;
    }
    warns_of("at last", &[])?;

    // Whoever has it started otherwise may have that done after each boot.
    guest.sh("systemctl disable --quiet --now hv_vss")?;
    let daemon = guest.spawn(&["/usr/libexec/hv_vss_daemon", "run", "-n"])?;
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    guest.wait_until("it serves", STEP, || {
        Ok(guest
            .try_sh("hv_vss check")?
            .out
            .contains("serves /dev/vmbus/hv_vss"))
    })?;
    warns_of("beside a daemon without the unit", &[])?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    guest.sh("systemctl enable --quiet hv_vss").map(drop)
}

fn varlink(guest: &Guest) -> Result<()> {
    const SOCKET: &str = "/run/hv_vss/control";
    const NAME: &str = "org.hv-vss.Daemon";
    start_service(guest)?;
    let says = |line: &str, word: &str| {
        let text = guest.sh(line)?;
        ensure!(text.contains(word), "{line} should say {word}:\n{text}");
        Ok(())
    };
    says(&format!("varlinkctl info {SOCKET}"), NAME)?;
    let line = format!("varlinkctl introspect {SOCKET} {NAME}");
    says(&line, "method Check() ->")?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let called = |method: &str| -> Result<serde_json::Value> {
        let line = format!("varlinkctl call --json=short {SOCKET} {NAME}.{method} '{{}}'");
        Ok(serde_json::from_str(&guest.sh(&line)?)?)
    };
    guest.wait_until("the backup is remembered", STEP, || {
        let backups = &called("History")?["backups"];
        Ok(backups[0]["result"] == "good" && backups[1].is_null())
    })?;
    equal("status", &called("Status")?["phase"], &"idle".into())?;
    equal("thaw", &called("Thaw")?["thawed"], &false.into())?;
    let found = &called("Check")?["findings"];
    ensure!(found[0]["what"] == "daemon", "what check finds: {found}");
    guest.sh("systemctl stop hv_vss").map(drop)
}

fn no_device(guest: &Guest) -> Result<()> {
    const JOURNAL: &str = "journalctl --quiet --boot --unit hv_vss";
    guest.sh("systemctl stop hv_vss; modprobe -r hv_vss; udevadm settle")?;
    let then = guest.sh(JOURNAL)?.len();
    guest.sh("systemctl start hv_vss")?;
    guest.wait_until("the journal says what to do", STEP, || {
        let text = guest.sh(JOURNAL)?;
        let new = text.get(then..).unwrap_or_default();
        Ok(new.contains("no /dev/vmbus/hv_vss: no driver is loaded: modprobe hv_vss"))
    })?;
    let line = "systemctl show --property=ActiveState,Result,NRestarts hv_vss";
    guest.wait_until("the service is at rest", STEP, || {
        Ok(guest.sh(line)?.contains("ActiveState=inactive"))
    })?;
    let state = guest.sh(line)?;
    ensure!(
        state.contains("NRestarts=0"),
        "it should not be started again:\n{state}"
    );
    start_service(guest)?;
    guest.sh("systemctl stop hv_vss").map(drop)
}

/// Who asks for the device to be handed over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// As the packages' scripts do.
    Script,
    /// As when the device comes.
    Udev,
}

fn hand_over_held_open(guest: &Guest, asks: Asks) -> Result<()> {
    const SCRIPT: &str = "/usr/libexec/hv_vss_hand_over";
    const DRIVER: &str = "cd /sys/bus/vmbus/devices
         for it in *; do grep -q 35fa2e29 $it/class_id && basename \"$(readlink $it/driver)\"; done";
    let driver = || Ok::<_, anyhow::Error>(guest.try_sh(DRIVER)?.out.trim().to_owned());
    guest.sh(&format!(
        "systemctl mask --quiet --runtime --now hv_vss
         modprobe hv_vss && modprobe hv_utils && udevadm settle && {SCRIPT} give"
    ))?;
    equal("the driver before", driver()?, "hv_utils".to_owned())?;
    let line = "exec 3</dev/vmbus/hv_vss && exec sleep 1000";
    let holder = guest.spawn(&["sh", "-c", line])?;
    guest.wait_until("it has the device open", STEP, || {
        let fd = format!("readlink /proc/{}/fd/3", holder.pid);
        Ok(guest.try_sh(&fd)?.out.contains("hv_vss"))
    })?;
    let said = match asks {
        Asks::Script => {
            let take = guest.spawn(&[SCRIPT, "take"])?;
            guest.wait(&take, STEP * 3)?;
            guest.output(&take)?
        }
        Asks::Udev => {
            let device = format!("/sys/bus/vmbus/devices/{}", guest.vss().instance());
            let trigger = ["udevadm", "trigger", "--action=add", "--settle", &device];
            let trigger = guest.spawn(&trigger)?;
            guest.wait(&trigger, STEP * 3)?;
            // What an event has left running is killed once there is nobody left to work on another.
            guest.wait_until("udev is at rest", STEP, || {
                Ok(guest
                    .try_sh("! grep -q udev-worker /proc/[0-9]*/comm")?
                    .status
                    == Some(0))
            })?;
            guest.sh("journalctl --quiet --boot --identifier=hv_vss_hand_over")?
        }
    };
    let who = format!("sleep (process {})", holder.pid);
    ensure!(said.contains(&who), "it should say who has it open: {said}");
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    guest.wait_until("it is moved all the same", STEP, || {
        Ok(driver()? == "hv_vss")
    })?;
    guest
        .sh("systemctl unmask --quiet --runtime hv_vss && modprobe -r hv_utils")
        .map(drop)
}

fn check_privileges(guest: &Guest) -> Result<()> {
    const DROP_IN: &str = "/run/systemd/system/hv_vss.service.d";
    guest.sh(&format!(
        "mkdir -p {DROP_IN}
         printf '[Service]\nCapabilityBoundingSet=~CAP_SYS_ADMIN\nPrivateTmp=yes\n' >{DROP_IN}/test.conf
         systemctl daemon-reload"
    ))?;
    start_service(guest)?;
    let ended = guest.try_sh("hv_vss check")?;
    for words in ["lacks CAP_SYS_ADMIN", "has a mount namespace of its own"] {
        ensure!(
            ended.status == Some(6) && ended.out.contains(words),
            "check should say {words:?}, it was: {ended:?}"
        );
    }
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::FAIL)?;
    guest
        .sh(&format!(
            "rm -r {DROP_IN}; systemctl stop hv_vss; systemctl daemon-reload"
        ))
        .map(drop)
}

/// Debian's own is seen to by `packages/*`.
fn gives_way(guest: &Guest) -> Result<()> {
    start_service(guest)?;
    for unit in ["hypervvssd.service", "hv_vss_daemon.service"] {
        let file = format!("/run/systemd/system/{unit}");
        guest.sh(&format!(
            "printf '[Service]\nExecStart=/bin/sleep 1000\n' >{file} && systemctl daemon-reload"
        ))?;
        let becomes = |expected: &str, when: &str| -> Result<()> {
            // A condition that does not hold is no failure.
            guest.sh(&format!("systemctl start {unit}"))?;
            let line = format!("systemctl show --property=ActiveState --value {unit}");
            equal(
                &format!("{unit} while ours {when}"),
                guest.sh(&line)?.trim(),
                expected,
            )?;
            guest.sh(&format!("systemctl stop {unit}")).map(drop)
        };
        becomes("inactive", "is enabled")?;
        for (spoil, mend) in [
            ("mask", "unmask"),
            ("mask --runtime", "unmask --runtime"),
            ("disable", "enable"),
        ] {
            guest.sh(&format!("systemctl --quiet {spoil} hv_vss"))?;
            becomes("active", &format!("is set aside ({spoil})"))?;
            guest.sh(&format!("systemctl --quiet {mend} hv_vss"))?;
            becomes("inactive", "is enabled again")?;
        }
        guest.sh(&format!("rm {file} && systemctl daemon-reload"))?;
    }
    guest.sh("systemctl stop hv_vss").map(drop)
}

fn log_not_read(guest: &Guest) -> Result<()> {
    // It has room for some ten lines.
    const ROUNDS: usize = 3;
    make_one(guest)?;
    let syslogd = guest.spawn(&["syslogd", "-n", "-O", "/run/messages"])?;
    guest.wait_until("the system log is there", STEP, || {
        Ok(guest.try_sh("test -S /dev/log")?.status == Some(0))
    })?;
    super::load(guest, guest.module(), &[])?;
    guest.sh("/payload/hv_vss_daemon")?;
    wait_for_daemon(guest)?;
    // Whoever read the configuration first has stayed in the foreground.
    asked(guest, "reload", 0)?;
    guest.signal(&syslogd, 19)?;
    let both = super::good(&["/writer", "/mnt/a/w"]);
    for _ in 0..ROUNDS {
        equal("a backup", observe(guest)?, both.clone())?;
    }
    asked(guest, "status", 0)?;
    guest.signal(&syslogd, 18)?;
    guest.wait_until("the log has them", STEP, || {
        let text = guest.read("/run/messages")?;
        Ok(text.matches("the backup is good").count() == ROUNDS)
    })?;
    // It ends, too, while nobody takes what it says last.
    guest.signal(&syslogd, 19)?;
    for _ in 0..ROUNDS {
        equal("a backup", observe(guest)?, both.clone())?;
    }
    guest.sh("kill $(pidof hv_vss_daemon)")?;
    guest.wait_until("the daemon has ended", STEP, || {
        Ok(guest.try_sh("pidof hv_vss_daemon")?.status == Some(1))
    })?;
    guest.signal(&syslogd, 18)?;
    guest.unload(guest.module())?;
    let peer = peer_log_not_read(guest, &syslogd, 2 * ROUNDS)?;
    guest.compare(
        &format!(
            "the system log is stopped (SIGSTOP), {} backups",
            2 * ROUNDS
        ),
        &format!("{} are good", 2 * ROUNDS),
        &peer,
    );
    guest.signal(&syslogd, 9)?;
    guest.wait(&syslogd, STEP)?;
    guest.sh("rm -f /run/messages").map(drop)
}

/// What becomes of so many backups by the peer while the log is stopped, in words.
fn peer_log_not_read(guest: &Guest, syslogd: &Process, rounds: usize) -> Result<String> {
    /// The machine's own time.
    const LIMIT: Duration = Duration::from_secs(5);
    let vss = guest.vss();
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    guest.signal(syslogd, 19)?;
    let mut words = format!("{rounds} are good");
    for round in 1..=rounds {
        let stuck = |what: &str| -> Result<String> {
            let still = guest.writers()?.iter().map(|it| it.in_write_us).min();
            let still = Duration::from_micros(still.unwrap_or_default());
            let since = match still < LIMIT / 2 {
                true => "all goes on".to_owned(),
                false => format!("all has stood still for {:.0} s", still.as_secs_f64()),
            };
            let number = round - 1;
            Ok(format!(
                "{number} are good, then {what} is not answered within {} s, {since}",
                LIMIT.as_secs()
            ))
        };
        let freeze = vss.send_freeze(&[])?;
        let early = reply_within(guest, freeze, LIMIT)?;
        let freezes_late = early.is_none();
        if freezes_late {
            words = stuck("FREEZE")?;
            guest.signal(syslogd, 18)?;
        }
        let answer = early.map_or_else(|| vss.wait(freeze, STEP), Ok)?;
        answered("the peer's FREEZE, at last", &answer, status::OK)?;
        all_stand_still(guest)?;
        let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
        let late = reply_within(guest, thaw, LIMIT)?;
        let thaws_late = late.is_none() && !freezes_late;
        if thaws_late {
            words = stuck("THAW")?;
            guest.signal(syslogd, 18)?;
        }
        late.map_or_else(|| vss.wait(thaw, STEP), Ok)?;
        // Whoever asks whether one is frozen thaws it: first those are looked at who wait for it.
        let stuck = super::stuck_writers(guest)?;
        equal("who is stuck once the log goes on", stuck, Vec::new())?;
        guest.not_frozen("then", &["/", "/mnt/a"])?;
        if freezes_late || thaws_late {
            break;
        }
    }
    guest.signal(syslogd, 18)?;
    stop(guest, Module::Stock, &daemon)?;
    Ok(words)
}

fn footprint(guest: &Guest) -> Result<()> {
    const MOST_KIB: u64 = 3584;
    make_one(guest)?;
    for &module in guest.modules() {
        // A page of a library that is needed brings in those around it that are in memory for others anyway. With
        // how many that is, is luck, by 100 KiB and more; what the daemon needs is the least of some starts.
        let mut least = u64::MAX;
        for _ in 0..4 {
            let daemon = start(guest, module, Daemon::Ours)?;
            let held = module_holds(guest)?;
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
            least = least.min(resident);
            let line = "awk '/^[0-9a-f]+-/ { name = $2 \" \" $6 } /^Rss/ { print $2, name }'";
            let parts = guest.sh(&format!("{line} /proc/{}/smaps", daemon.pid))?;
            stop(guest, module, &daemon)?;
            if !held || least <= MOST_KIB {
                break;
            }
            println!("     {}", parts.trim_end().replace('\n', "\n     "));
        }
        let is_stock = module == Module::Stock;
        ensure!(
            is_stock || least <= MOST_KIB,
            "{least} KiB are resident, {MOST_KIB} are allowed"
        );
    }
    Ok(())
}
