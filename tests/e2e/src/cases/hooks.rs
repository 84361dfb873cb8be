// SPDX-License-Identifier: GPL-2.0-only

//! Hooks: programs of an administrator that are called before the freeze and let go after the thaw.
//!
//! Each hook here notes what it is told in a file in memory, and writes to the disk that is frozen, as a
//! database would.

use super::sleep::idles;
use super::{
    all_frozen, case, good, load, logged, observe, start, stop, wait_for_daemon, wait_out, Case,
};
use anyhow::{ensure, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::Lun;
use hyperv_sim::Guid;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "hooks/backup",
        "both modules: called in order before the freeze, let go in reverse after it, told what it is \
         about and whether it lasted; what they say is logged after the thaw",
        backup,
    ),
    case(
        "hooks/failing",
        "one that is required fails: so does FREEZE, and all that were started are let go; one that is \
         optional may fail, and what fails at thaw is a warning of the backup",
        failing,
    ),
    case(
        "hooks/session-ended",
        "what a hook has left running ends before FREEZE is answered: FREEZE fails, or the backup has a warning if \
         the hook is optional; while all is frozen it is a warning",
        session_ended,
    ).long(),
    case(
        "hooks/hung",
        "one that hangs is killed at its limit with all it has started, and let go",
        hung,
    ).long(),
    case(
        "hooks/hung-interpreter",
        "one whose interpreter nobody gets to is killed at its limit, and the next backup is good",
        hung_interpreter,
    ),
    case(
        "hooks/hung-start",
        "nobody gets to the daemon's own program, as which each hook begins: FREEZE fails at the limit, and SIGTERM \
         ends it before",
        hung_start,
    ),
    case(
        "hooks/hung-look-up",
        "a link into a file system that does not answer: an optional hook costs nobody the backup, a required \
         one that alone, and no later start; it is let go once it answers",
        hung_look_up,
    ).long(),
    case(
        "hooks/away",
        "a hook is not there when all is thawed: it is let go should it come back within seconds, as in an upgrade, and \
         else by the daemon once it is there; so long status and check name it",
        away,
    ).long(),
    case(
        "hooks/the-hosts-limit",
        "the host's time is over first: FREEZE fails in time, and what hangs is killed and let go",
        the_hosts_limit,
    ).long().asking_our_module(),
    case(
        "hooks/slow-thaw",
        "one that takes long to let go holds up neither the thaw nor the answer; the next FREEZE waits",
        slow_thaw,
    ).long(),
    case(
        "hooks/slow-stop",
        "the device goes while one lets go, and the daemon is asked to stop: it waits for that, and idles",
        slow_stop,
    ).asking_our_module(),
    case(
        "hooks/killed",
        "the daemon is killed while a hook is at freeze, and while all is frozen: the next start lets go, \
         once; so does thaw by hand",
        killed,
    ).long(),
    case(
        "hooks/rehearsal",
        "a rehearsal calls hooks as a backup does, also when its terminal is closed or stops it, or nobody reads its log, \
         fails with one that is required, and calls none when told so",
        rehearsal,
    ).long(),
    case(
        "hooks/rehearsal-killed",
        "a rehearsal is killed beside a daemon, while a hook is at freeze and while all is frozen: the daemon lets go at \
         once; without one check names what is owed",
        rehearsal_killed,
    ),
    case(
        "hooks/in-vain",
        "what somebody has left cannot be read, or not be written anew: the daemon says so and idles, and all is let go \
         once it can be",
        in_vain,
    ),
    case(
        "hooks/unfit",
        "a file that others than root may write, or that cannot be found behind its link, is not run, and no \
         backup is called good without it",
        unfit,
    ).long(),
    case(
        "hooks/other-contracts",
        "by choice those of the QEMU guest agent and of open-vm-tools are called, as they are by these; one that is asked for \
         and not called is a warning, or fails the backup if strict",
        other_contracts,
    )
    .long()
    .comparing(),
];

const FOLDER: &str = "/etc/hv_vss/hooks.d";
/// There as long as a hook has yet to be let go.
pub(super) const OWED: &str = "/run/hv_vss/hooks.json";
/// What each hook does first.
const NOTE: &str = "echo \"${0##*/} $1 $HV_VSS_OUTCOME\" >>/run/notes; echo x >/mnt/a/${0##*/}";

/// An empty folder for hooks, a file system for them to write to, and writers on it and on the root.
fn prepare(guest: &Guest) -> Result<()> {
    guest.sh(&format!(
        "rm -rf /etc/hv_vss /etc/qemu /etc/vmware-tools /run/notes; mkdir -p {FOLDER}
         mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a"
    ))?;
    guest.writer_start("/writer")?;
    Ok(guest.writer_start("/mnt/a/w")?)
}

/// Ends the daemon once all hooks are let go.
pub(super) fn stop_at_rest(guest: &Guest, module: Module, daemon: &Process) -> Result<()> {
    guest.wait_until("all hooks are let go", STEP, || {
        let left = guest.try_sh(&format!("test ! -e {OWED}"))?;
        Ok(left.status == Some(0))
    })?;
    stop(guest, module, daemon)
}

/// What is asked for and not called is a warning of each backup, and is to fail it where that is to be strict. The
/// agent's hooks are where Fedora has them, and `qemu` is where Debian has its dispatcher.
fn asked_for_and_not_called(guest: &Guest, qemu: &str) -> Result<()> {
    const THEIRS: &str = "/etc/qemu-ga/fsfreeze-hook.d/10-agent";
    let warned = |words: &[&str]| {
        super::broken::remembered(guest, &format!("warnings of {words:?}"), |last| {
            let all = last["warnings"].as_array();
            let all = all.into_iter().flatten().filter_map(|it| it.as_str());
            let all: Vec<&str> = all.collect();
            all.len() == words.len() && all.iter().zip(words).all(|(it, words)| it.contains(words))
        })
    };
    guest.sh(&format!("rm -r {qemu}* /etc/vmware-tools"))?;
    hook_at(guest, THEIRS, "")?;
    let config = "hooks = { qemu = true }";
    let daemon = start_with(guest, guest.module(), &[], config)?;
    good_backup(guest, "a backup with those of Fedora's agent")?;
    let expected = [
        "10-ours freeze ",
        "10-agent freeze ",
        "10-agent thaw good",
        "10-ours thaw good",
    ];
    noted(guest, "those of Fedora's agent", &expected)?;
    guest.sh(&format!("touch {FOLDER}/20-b && rm {THEIRS}"))?;
    good_backup(guest, "a backup without some that are asked for")?;
    let expected = ["10-ours freeze ", "10-ours thaw good"];
    noted(guest, "without some", &expected)?;
    warned(&["20-b is not called", "hooks.qemu is set"])?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    let config = "strict = true\nhooks = { qemu = true }";
    let daemon = start_with(guest, guest.module(), &[], config)?;
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::FAIL)?;
    guest.wait_until("the log says why", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(said.contains("20-b is not called") && said.contains("(strict)"))
    })?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    equal("what is called then", notes(guest)?, Vec::new())
}

/// Back to a guest without hooks.
pub(super) fn end(guest: &Guest) -> Result<()> {
    let line = "rm -rf /etc/hv_vss /etc/qemu /etc/qemu-ga /etc/vmware-tools /run/notes";
    guest.sh(line).map(drop)
}

fn hook_at(guest: &Guest, path: &str, body: &str) -> Result<()> {
    guest
        .sh(&format!(
            "mkdir -p $(dirname {path})
             cat >{path} <<'END'\n#!/bin/sh\n{NOTE}\n{body}\nEND\nchmod 755 {path}"
        ))
        .map(drop)
}

/// Makes a hook, which writes to `/mnt/a` as well.
pub(super) fn hook(guest: &Guest, name: &str, body: &str) -> Result<()> {
    hook_at(guest, &format!("{FOLDER}/{name}"), body)
}

/// What the hooks have noted so far, which is forgotten by that.
fn notes(guest: &Guest) -> Result<Vec<String>> {
    let text = guest.sh("cat /run/notes 2>/dev/null; rm -f /run/notes")?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Waits until the hooks have noted this.
pub(super) fn noted(guest: &Guest, what: &str, expected: &[&str]) -> Result<()> {
    let mut seen = Vec::new();
    let enough = guest.wait_until(what, STEP, || {
        let text = guest.sh("cat /run/notes 2>/dev/null || true")?;
        seen = text.lines().map(str::to_owned).collect();
        Ok(seen.len() >= expected.len())
    });
    ensure!(
        enough.is_ok() && seen == expected,
        "{what}: expected {expected:?}, saw {seen:?}"
    );
    guest.sh("rm /run/notes").map(drop)
}

fn start_with(guest: &Guest, module: Module, parameters: &[&str], config: &str) -> Result<Process> {
    load(guest, module, parameters)?;
    let daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    Ok(daemon)
}

/// A backup that is good, in which both writers stand still.
fn good_backup(guest: &Guest, what: &str) -> Result<()> {
    equal(what, observe(guest)?, good(&["/writer", "/mnt/a/w"]))
}

fn backup(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    for &module in guest.modules() {
        hook(guest, "10-a", "")?;
        let about = "printf '%s|%s|%s|%s\\n' \"$HV_VSS_REQUEST\" \"$HV_VSS_BACKUP_TYPE\" \
                     \"$HV_VSS_DISKS\" \"$HV_VSS_FILE_SYSTEMS\" >>/run/about; echo I am ready";
        hook(guest, "20-b", about)?;
        hook(guest, "30-c~", "")?;
        guest.sh("rm -f /run/about")?;
        let daemon = start(guest, module, Daemon::Ours)?;
        let id = Guid::new(0x1234_5678, 0x9abc, 0xdef0, [1, 2, 3, 4, 5, 6, 7, 8]);
        let luns = [Lun::scsi(id, 0, 1, 2)];
        answered("FREEZE", &vss.freeze(&luns, STEP)?, status::OK)?;
        noted(
            guest,
            "before the freeze",
            &["10-a freeze ", "20-b freeze "],
        )?;
        let told = guest.sh("cat /run/about")?;
        let words: Vec<&str> = told.trim_end().split('|').collect();
        let disk = match module {
            // It has no words for that.
            Module::Stock => "",
            Module::Ours => "12345678-9abc-def0-0102-030405060708:0:1:2",
        };
        let kind = if module == Module::Ours { "0" } else { "" };
        ensure!(
            words.get(1..) == Some(&[kind, disk, "/mnt/a /"][..])
                && (module == Module::Stock) == (words.first() == Some(&"0")),
            "{module:?}: a hook was told {told:?}"
        );
        guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        equal("hooks while frozen", notes(guest)?.len(), 0)?;
        let said = guest.output(&daemon)?;
        ensure!(!said.contains("I am ready"), "said while frozen:\n{said}");
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        let expected = ["20-b thaw good", "10-a thaw good"];
        noted(guest, "after the thaw", &expected)?;
        guest.wait_until("what they said is logged", STEP, || {
            Ok(guest
                .output(&daemon)?
                .contains("hook 20-b, freeze: I am ready"))
        })?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        let expected = ["10-a freeze ", "20-b freeze "];
        noted(guest, "before one that does not last", &expected)?;
        // On a slow machine it does not wait for the reply, and is heard all the same.
        guest.try_sh("/payload/hv_vss_daemon thaw")?;
        let expected = ["20-b thaw broken", "10-a thaw broken"];
        noted(guest, "after a thaw by hand", &expected)?;
        answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
        good_backup(guest, "the next backup")?;
        stop_at_rest(guest, module, &daemon)?;
        guest.sh("rm -f /run/notes")?;
    }
    end(guest)
}

fn failing(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    hook(
        guest,
        "20-b",
        "[ $1 != freeze ] || { echo no such table; exit 7; }",
    )?;
    hook(guest, "30-c", "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw failed",
        "10-a thaw failed",
    ];
    noted(guest, "a backup that fails", &expected)?;
    guest.wait_until("the log says why", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(
            said.contains("FREEZE fails: hook 20-b: it failed with exit status 7")
                && said.contains("hook 20-b, freeze: no such table"),
        )
    })?;
    equal(
        "writers that stand still",
        super::stuck_writers(guest)?,
        vec![],
    )?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    let config = "[hooks]\noptional = ['20-*']";
    let daemon = start_with(guest, guest.module(), &[], config)?;
    good_backup(guest, "a backup with that one optional")?;
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "30-c freeze ",
        "30-c thaw good",
        "20-b thaw good",
        "10-a thaw good",
    ];
    noted(guest, "with one optional", &expected)?;
    told(guest, "hook 20-b, freeze: it failed with exit status 7")?;
    hook(guest, "20-b", "[ $1 != thaw ]")?;
    good_backup(guest, "a backup with one that fails at thaw")?;
    told(guest, "hook 20-b, thaw: it failed with exit status 1")?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

/// Waits until `status` says this of the last backup.
fn told(guest: &Guest, words: &str) -> Result<()> {
    guest.wait_until(&format!("status says {words:?}"), STEP, || {
        let status = guest.try_sh("/payload/hv_vss_daemon status")?;
        Ok(status.out.contains(words))
    })
}

fn session_ended(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    let stays = "[ $1 != freeze ] || { sleep 4711 & echo $! >/run/session; }";
    hook(guest, "10-a", stays)?;
    // It takes long enough for the session to be one.
    let ends = "[ $1 != freeze ] || { sleep 1; kill -9 $(cat /run/session); }";
    hook(guest, "20-b", ends)?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw failed",
        "10-a thaw failed",
    ];
    noted(guest, "a session that has ended", &expected)?;
    let why = "hook 10-a: what it had left running has ended before all was frozen";
    guest.wait_until("the log says why", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(said.contains(&format!("FREEZE fails, it is called off: {why}")))
    })?;
    equal(
        "writers that stand still",
        super::stuck_writers(guest)?,
        vec![],
    )?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    let config = "[hooks]\noptional = ['10-*']";
    let daemon = start_with(guest, guest.module(), &[], config)?;
    good_backup(guest, "a backup with that one optional")?;
    told(guest, why)?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    hook(guest, "20-b", "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("both writers stand still", STEP, || {
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > 700_000))
    })?;
    guest.sh("kill -9 $(cat /run/session)")?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    told(
        guest,
        "hook 10-a: what it had left running has ended while all was frozen",
    )?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    guest.sh("rm -f /run/session")?;
    end(guest)
}

/// A hook that hangs at freeze, in a child.
const HANGS: &str = "[ $1 != freeze ] || { sleep 4711 & wait; }";

/// How long the daemon may be at something that it gives up on.
const SOON: Duration = Duration::from_secs(5);

/// Waits until nothing of [`HANGS`] is left.
fn nothing_hangs(guest: &Guest) -> Result<()> {
    guest.wait_until("what the hook had started is gone", STEP, || {
        // The shell and grep are processes as well, and others end meanwhile.
        let found = guest.sh("grep -sl 4711 /proc/[0-9]*/cmdline; [ $? -le 2 ]")?;
        for path in found.lines() {
            match guest.read(path) {
                Ok(command) if command.starts_with("sleep") => return Ok(false),
                Ok(_) => {}
                Err(error) if matches!(error.errno(), Some("ENOENT" | "ESRCH")) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    })
}

fn hung(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    hook(guest, "20-b", HANGS)?;
    let daemon = start_with(guest, guest.module(), &[], "[hooks]\nlimit = 2")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw failed",
        "10-a thaw failed",
    ];
    noted(guest, "a hook that hangs", &expected)?;
    nothing_hangs(guest)?;
    let said = logged(guest, &daemon)?;
    ensure!(
        said.contains("hook 20-b: killed, it took longer than 2 s (hooks.limit)"),
        "the log should say why:\n{said}"
    );
    hook(guest, "20-b", "")?;
    good_backup(guest, "the next backup")?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

fn hung_interpreter(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    guest.sh(&format!(
        "mkdir -p /mnt/b && mount -t tmpfs none /mnt/b && cp $(readlink -f /bin/sh) /mnt/b/sh
         printf '#!/mnt/b/sh\\n' >{FOLDER}/10-a && chmod 755 {FOLDER}/10-a"
    ))?;
    let daemon = start_with(guest, guest.module(), &[], "[hooks]\nlimit = 2")?;
    guest.watch_opens("/mnt/b", None)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    guest.wait_until("it is let go as far as it can be", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(
            said.contains("hook 10-a: killed, it took longer than 2 s (hooks.limit)")
                && said.contains("hook 10-a, thaw: killed"),
        )
    })?;
    guest.release_opens()?;
    good_backup(guest, "the next backup")?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    guest.sh("umount /mnt/b")?;
    end(guest)
}

fn hung_start(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    guest
        .sh("mkdir -p /mnt/b && mount -t tmpfs none /mnt/b && cp /payload/hv_vss_daemon /mnt/b/")?;
    for (limit, ends) in [(2, false), (3600, true)] {
        guest.sh(&format!(
            "printf '[hooks]\nlimit = {limit}\n' >/run/hung-start.toml"
        ))?;
        load(guest, guest.module(), &[])?;
        let daemon = guest.spawn(&[
            "/mnt/b/hv_vss_daemon",
            "run",
            "-n",
            "-c",
            "/run/hung-start.toml",
        ])?;
        wait_for_daemon(guest)?;
        guest.watch_opens("/mnt/b", None)?;
        let freeze = vss.send_freeze(&[])?;
        if ends {
            wait_out(guest, Duration::from_secs(1))?;
            guest.signal(&daemon, 15)?;
            guest.wait(&daemon, STEP)?;
        }
        answered("FREEZE", &vss.wait(freeze, STEP)?, status::FAIL)?;
        if !ends {
            let said = logged(guest, &daemon)?;
            ensure!(
                said.contains("hook 10-a: it cannot be started: it does not answer"),
                "the log should say why:\n{said}"
            );
        }
        guest.release_opens()?;
        if !ends {
            good_backup(guest, "the next backup")?;
            let expected = ["10-a freeze ", "10-a thaw good"];
            noted(guest, "once it can be started", &expected)?;
            stop_at_rest(guest, guest.module(), &daemon)?;
        }
    }
    guest.unload(guest.module())?;
    vss.wait_closed(STEP)?;
    guest.sh("umount /mnt/b")?;
    end(guest)
}

fn hung_look_up(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    guest.sh("modprobe fuse; mkdir -p /mnt/dead")?;
    let server = super::scope::silent_fuse(guest, "-t fuse /dev/fuse /mnt/dead")?;
    guest.sh(&format!("ln -s /mnt/dead/hook {FOLDER}/10-a"))?;
    hook(guest, "20-b", "")?;
    let silent = "/etc/hv_vss/hooks.d/10-a cannot be looked up: it does not answer";
    let says = |daemon: &Process| {
        guest.wait_until("it is named", STEP, || {
            Ok(guest.output(daemon)?.contains(silent))
        })
    };
    let daemon = start_with(guest, guest.module(), &[], "")?;
    answered(
        "FREEZE with a required one",
        &vss.freeze(&[], STEP)?,
        status::FAIL,
    )?;
    says(&daemon)?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    let daemon = start_with(guest, guest.module(), &[], "[hooks]\noptional = [\"10-a\"]")?;
    good_backup(guest, "a backup with an optional one")?;
    says(&daemon)?;
    // It was called, and the daemon dies then: the next one has to look it up as well.
    let owed = format!(
        "{{\"pid\":{},\"context\":[],\"limit_ms\":2000,\"owed\":[{{\"hook\":{{\"path\":\"{FOLDER}/10-a\",\
         \"contract\":\"qemu\"}},\"process\":null}}]}}",
        daemon.pid
    );
    guest.signal(&daemon, 9)?;
    guest.wait(&daemon, STEP)?;
    guest.sh(&format!("echo '{owed}' >{OWED}"))?;
    let daemon = guest.start_daemon_with("[hooks]\noptional = [\"10-a\"]")?;
    wait_for_daemon(guest)?;
    says(&daemon)?;
    good_backup(guest, "a backup after the next start")?;
    // It is owed its thaw until it can be called: before that backup and after it that was tried as well, and what is
    // known is not said again.
    let said = logged(guest, &daemon)?;
    let owed = format!("hook 10-a is not let go yet: {silent}");
    equal("how often it is said", said.matches(&owed).count(), 1)?;
    let known = guest.sh("/payload/hv_vss_daemon status")?;
    ensure!(known.contains(&owed), "status should name it:\n{known}");
    super::scope::end(guest, &server, "/mnt/dead")?;
    hook_at(guest, "/mnt/dead/hook", "")?;
    guest.sh("rm -f /run/notes")?;
    good_backup(guest, "a backup once it answers")?;
    let expected = [
        "10-a thaw unknown",
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw good",
        "10-a thaw good",
    ];
    noted(guest, "a hook that is called at last", &expected)?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

fn away(guest: &Guest) -> Result<()> {
    /// After which the daemon tries again, and a step.
    const AGAIN: Duration = Duration::from_secs(30);
    const OUT: &str = "mv /etc/hv_vss/hooks.d/10-a /run/10-a";
    const BACK: &str = "mv /run/10-a /etc/hv_vss/hooks.d/10-a";
    prepare(guest)?;
    // What is frozen lets nobody take it away.
    guest.sh("mount -t tmpfs -o mode=755 none /etc/hv_vss")?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let says = |command: &str| -> Result<bool> {
        let said = guest.try_sh(&format!("/payload/hv_vss_daemon {command}"))?;
        let is_owed = "hook 10-a is not let go yet: it cannot be run: No such file";
        Ok(said.out.contains(is_owed))
    };
    for is_soon in [true, false] {
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.sh(OUT)?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        if is_soon {
            wait_out(guest, Duration::from_secs(2))?;
            guest.sh(BACK)?;
            noted(guest, "back soon", &["10-a freeze ", "10-a thaw good"])?;
            continue;
        }
        guest.wait_until("status names it", STEP, || says("status"))?;
        ensure!(says("check")?, "check should name it");
        let last = guest.sh("/payload/hv_vss_daemon status")?;
        ensure!(
            last.contains("hook 10-a, thaw: it cannot be run"),
            "it should be a warning of the backup:\n{last}"
        );
        equal(
            "what it was told",
            notes(guest)?,
            vec!["10-a freeze ".into()],
        )?;
        // When it is tried again somebody has the lock.
        let other = guest.spawn(&["flock", "/run/hv_vss/hooks.lock", "sleep", "36"])?;
        wait_out(guest, AGAIN)?;
        idles(guest, &daemon, SOON)?;
        guest.wait(&other, STEP)?;
        guest.sh(BACK)?;
        guest.wait_until("the daemon lets it go", AGAIN + STEP, || {
            let left = guest.try_sh(&format!("test ! -e {OWED}"))?;
            Ok(left.status == Some(0))
        })?;
        noted(guest, "back late", &["10-a thaw unknown"])?;
        guest.wait_until("nothing is owed", STEP, || Ok(!says("status")?))?;
    }
    stop_at_rest(guest, guest.module(), &daemon)?;
    guest.sh("umount /etc/hv_vss")?;
    end(guest)
}

fn the_hosts_limit(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "20-b", HANGS)?;
    let daemon = start_with(
        guest,
        Module::Ours,
        &["freeze_timeout_ms=6000"],
        "[hooks]\nlimit = 3600",
    )?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let expected = ["20-b freeze ", "20-b thaw failed"];
    noted(guest, "a hook that hangs", &expected)?;
    nothing_hangs(guest)?;
    let said = logged(guest, &daemon)?;
    ensure!(
        said.contains("called off: the host would not wait any longer")
            && !said.contains("the answer to FREEZE was refused"),
        "the daemon should have answered before its time was over:\n{said}"
    );
    stop_at_rest(guest, Module::Ours, &daemon)?;
    end(guest)
}

/// A hook that lets go when it is told to.
const WAITS: &str = "[ $1 != thaw ] || until [ -e /run/let-go ]; do sleep 0.1; done";

fn slow_thaw(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", WAITS)?;
    guest.sh("rm -f /run/let-go")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let sent = guest.clock()?;
    good_backup(guest, "a backup with a hook that is slow to let go")?;
    // With a look at the writers, so it is far more than FREEZE takes here.
    let took = Duration::from_micros(guest.clock()? - sent);
    noted(guest, "a slow hook", &["10-a freeze ", "10-a thaw good"])?;
    let freeze = vss.send_freeze(&[])?;
    wait_out(guest, took * 2)?;
    // It has not come as far as its own hook either.
    equal("hooks before the last one lets go", notes(guest)?, vec![])?;
    ensure!(
        vss.try_reply(freeze).is_none(),
        "FREEZE should wait for the hook of the last backup"
    );
    equal(
        "writers that stand still",
        super::stuck_writers(guest)?,
        vec![],
    )?;
    guest.sh("touch /run/let-go")?;
    let reply = super::reply_within(guest, freeze, STEP)?;
    ensure!(
        reply.is_some_and(|it| it.status() == status::OK),
        "FREEZE should be good after all"
    );
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    noted(guest, "after it", &["10-a freeze ", "10-a thaw good"])?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

fn slow_stop(guest: &Guest) -> Result<()> {
    /// By then it tries to open the device for the third time.
    const TRIED: Duration = Duration::from_secs(1);
    prepare(guest)?;
    hook(guest, "10-a", WAITS)?;
    guest.sh("rm -f /run/let-go")?;
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    good_backup(guest, "a backup with a hook that is slow to let go")?;
    noted(guest, "a slow hook", &["10-a freeze ", "10-a thaw good"])?;
    let device = guest.vss().instance().to_string();
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &device)?;
    guest.vss().wait_closed(STEP)?;
    guest.signal(&daemon, 15)?;
    wait_out(guest, TRIED)?;
    let seen = idles(guest, &daemon, SOON);
    guest.sh("touch /run/let-go")?;
    let ended = guest.wait(&daemon, STEP)?;
    seen?;
    equal("how the daemon ended", ended.status, Some(0))?;
    guest.sh(&format!("test ! -e {OWED}"))?;
    guest.unload(Module::Ours)?;
    end(guest)
}

fn killed(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    for &module in guest.modules() {
        // While one is at freeze.
        hook(guest, "20-b", HANGS)?;
        let daemon = start(guest, module, Daemon::Ours)?;
        let freeze = vss.send_freeze(&[])?;
        noted(guest, "at freeze", &["10-a freeze ", "20-b freeze "])?;
        guest.signal(&daemon, 9)?;
        guest.wait(&daemon, STEP)?;
        let daemon = guest.start_daemon(Daemon::Ours)?;
        let expected = ["20-b thaw unknown", "10-a thaw unknown"];
        noted(guest, "the next start lets go", &expected)?;
        nothing_hangs(guest)?;
        let reply = super::reply_within(guest, freeze, STEP * 2)?;
        ensure!(
            reply.is_some_and(|it| it.status() != status::OK),
            "{module:?}: FREEZE should fail, its daemon was killed"
        );
        // While all is frozen.
        hook(guest, "20-b", "")?;
        wait_for_daemon(guest)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        noted(
            guest,
            "before the freeze",
            &["10-a freeze ", "20-b freeze "],
        )?;
        guest.signal(&daemon, 9)?;
        guest.wait(&daemon, STEP)?;
        super::deadman::released(
            guest,
            "the daemon was killed",
            guest.clock()?,
            super::deadman::RELEASED,
        )?;
        let ended = guest.try_sh("/payload/hv_vss_daemon thaw")?;
        ensure!(
            ended.status == Some(0) && ended.err.contains("hooks that were called are let go"),
            "thaw by hand should let go, it was: {ended:?}"
        );
        noted(guest, "thaw by hand", &expected)?;
        let daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        equal("hooks after that", notes(guest)?.len(), 0)?;
        answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
        good_backup(guest, "the next backup")?;
        let all = [
            "10-a freeze ",
            "20-b freeze ",
            "20-b thaw good",
            "10-a thaw good",
        ];
        noted(guest, "the next backup", &all)?;
        stop_at_rest(guest, module, &daemon)?;
    }
    end(guest)
}

fn rehearsal(guest: &Guest) -> Result<()> {
    const REHEARSAL: &str = "/payload/hv_vss_daemon freeze --for 100ms";
    prepare(guest)?;
    hook(guest, "10-a", "")?;
    guest.sh(REHEARSAL)?;
    noted(guest, "a rehearsal", &["10-a freeze ", "10-a thaw good"])?;
    guest.sh(&format!("{REHEARSAL} --no-hooks"))?;
    equal("hooks that are not to be called", notes(guest)?.len(), 0)?;
    // The terminal that it was started from is closed, and the keys of that which quit and stop.
    for signal in [1, 3, 20] {
        let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
        guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        guest.signal(&rehearsal, signal)?;
        guest.wait(&rehearsal, STEP)?;
        let expected = ["10-a freeze ", "10-a thaw good"];
        noted(guest, &format!("signal {signal}"), &expected)?;
    }
    let stuck = format!(
        "mkfifo /run/stuck; exec 3<>/run/stuck; head -c 65536 /dev/zero >&3; exec {REHEARSAL} 2>&3"
    );
    let rehearsal = guest.spawn(&["sh", "-c", &stuck])?;
    let expected = ["10-a freeze ", "10-a thaw good"];
    let seen = noted(guest, "a log that nobody reads", &expected);
    guest.signal(&rehearsal, 9)?;
    guest.wait(&rehearsal, STEP)?;
    guest.sh("rm /run/stuck; /payload/hv_vss_daemon thaw")?;
    seen?;
    hook(guest, "20-b", "[ $1 != freeze ]")?;
    let ended = guest.try_sh(REHEARSAL)?;
    ensure!(
        ended.status == Some(4)
            && ended
                .err
                .contains("hook 20-b: it failed with exit status 1"),
        "a rehearsal with a hook that fails should fail: {ended:?}"
    );
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw failed",
        "10-a thaw failed",
    ];
    noted(guest, "a rehearsal that fails", &expected)?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    hook(guest, "20-b", HANGS)?;
    // One by the daemon that serves does not die with whoever asked.
    let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "1s"])?;
    noted(
        guest,
        "one by the daemon",
        &["10-a freeze ", "20-b freeze "],
    )?;
    guest.signal(&rehearsal, 9)?;
    guest.wait(&rehearsal, STEP)?;
    let failed = ["20-b thaw failed", "10-a thaw failed"];
    noted(guest, "whoever asked has gone", &failed)?;
    guest.sh(&format!("{REHEARSAL} --no-hooks"))?;
    equal("hooks that it is not to call", notes(guest)?.len(), 0)?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

fn rehearsal_killed(guest: &Guest) -> Result<()> {
    const LET_GO: [&str; 2] = ["20-b thaw unknown", "10-a thaw unknown"];
    prepare(guest)?;
    hook(guest, "10-a", "")?;
    let begun = || -> Result<Process> {
        let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
        noted(guest, "a rehearsal", &["10-a freeze ", "20-b freeze "])?;
        Ok(rehearsal)
    };
    let killed = |rehearsal| -> Result<()> {
        guest.signal(&rehearsal, 9)?;
        guest.wait(&rehearsal, STEP)?;
        Ok(())
    };
    for is_frozen in [false, true] {
        hook(guest, "20-b", if is_frozen { "" } else { HANGS })?;
        let rehearsal = begun()?;
        if is_frozen {
            guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        }
        // It has begun before there was a daemon, and so goes by itself.
        let daemon = start(guest, guest.module(), Daemon::Ours)?;
        // The kernel tells of the end of a lock before it lets it go. Here the next one has it then, whose own end is not
        // told, for it has not opened it to write.
        let next = guest.spawn(&["flock", "/run/hv_vss/hooks.lock", "sleep", "1"])?;
        guest.wait_until("another waits for the lock", STEP, || {
            Ok(guest.sh("cat /proc/locks")?.contains("->"))
        })?;
        killed(rehearsal)?;
        noted(guest, "what a dead rehearsal has called", &LET_GO)?;
        guest.wait(&next, STEP)?;
        guest.wait_until("the daemon is done with its freeze", STEP, || {
            let status = guest.try_sh("/payload/hv_vss_daemon status --json")?;
            Ok(status.out.contains("\"refuses\": null"))
        })?;
        hook(guest, "20-b", "")?;
        good_backup(guest, "the next backup")?;
        let expected = [
            "10-a freeze ",
            "20-b freeze ",
            "20-b thaw good",
            "10-a thaw good",
        ];
        noted(guest, "the next backup", &expected)?;
        stop_at_rest(guest, guest.module(), &daemon)?;
    }
    nothing_hangs(guest)?;
    killed(begun()?)?;
    let check = guest.try_sh("/payload/hv_vss_daemon check")?;
    ensure!(
        check.out.contains("hook 10-a is not let go"),
        "check should name what is owed: {check:?}"
    );
    guest.sh("/payload/hv_vss_daemon thaw")?;
    noted(guest, "what is let go by hand", &LET_GO)?;
    end(guest)
}

fn in_vain(guest: &Guest) -> Result<()> {
    const RUN: &str = "/run/hv_vss";
    let called = ["10-a freeze ", "10-a thaw good"];
    prepare(guest)?;
    hook(guest, "10-a", "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    guest.sh(&format!("mkdir {OWED}; : >>{RUN}/hooks.lock"))?;
    let tried = |log: &str| {
        let words = "hooks that a dead process has called";
        log.lines().filter(|it| it.contains(words)).count()
    };
    guest.wait_until("the daemon says why", STEP, || {
        Ok(tried(&guest.output(&daemon)?) > 0)
    })?;
    let seen = idles(guest, &daemon, SOON);
    let said = guest.output(&daemon)?;
    guest.sh(&format!("rmdir {OWED}"))?;
    seen?;
    equal("how often it is tried", tried(&said), 1)?;
    good_backup(guest, "the next backup")?;
    noted(guest, "the next backup", &called)?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    // What a rehearsal has left is not there, and there is no room for another record.
    guest.sh(&format!("mount -t tmpfs -o size=64k none {RUN}"))?;
    let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
    guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
    guest.signal(&rehearsal, 9)?;
    guest.wait(&rehearsal, STEP)?;
    guest.sh(&format!(
        "mv {FOLDER}/10-a /run/10-a; ! head -c 1M /dev/zero >{RUN}/full"
    ))?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let is_owed = || -> Result<bool> {
        let said = guest.try_sh("/payload/hv_vss_daemon status")?;
        Ok(said.out.contains("hook 10-a is not let go yet"))
    };
    guest.wait_until("status names it", STEP, is_owed)?;
    idles(guest, &daemon, SOON)?;
    guest.sh(&format!(
        "mv /run/10-a {FOLDER}/10-a; rm {RUN}/full; /payload/hv_vss_daemon thaw"
    ))?;
    let expected = ["10-a freeze ", "10-a thaw unknown"];
    noted(guest, "what is let go by hand", &expected)?;
    guest.wait_until("nothing is owed", STEP, || Ok(!is_owed()?))?;
    good_backup(guest, "the next backup with room")?;
    noted(guest, "the next backup with room", &called)?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    guest.sh(&format!("umount {RUN}"))?;
    end(guest)
}

fn unfit(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-a", "")?;
    hook(guest, "20-b", "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    for (what, spoil, mend, word) in [
        (
            "a file that its group may write",
            format!("chmod 775 {FOLDER}/20-b"),
            format!("chmod 755 {FOLDER}/20-b"),
            "others than root may write to it",
        ),
        (
            "a file of somebody else",
            format!("chown 1000 {FOLDER}/20-b"),
            format!("chown 0 {FOLDER}/20-b"),
            "it belongs to user 1000",
        ),
        (
            "a link that leads nowhere",
            format!("mv {FOLDER}/20-b /run/20-b; ln -s /run/nowhere {FOLDER}/20-b"),
            format!("mv /run/20-b {FOLDER}/20-b"),
            "/run/nowhere: No such file",
        ),
        (
            "a folder in which others may write",
            format!("chmod 777 {FOLDER}; rm {FOLDER}/10-a"),
            format!("chmod 755 {FOLDER}"),
            "hooks.d: others than root may write to it",
        ),
        (
            "a link of root's in a folder of somebody else, which another link leads to",
            format!(
                "mkdir -p /srv/h && mv {FOLDER}/20-b /run/20-b && rmdir {FOLDER}
                 ln -s /srv/h {FOLDER}; ln -s /run/20-b /srv/h/20-b; chown 1000 /srv/h"
            ),
            format!("rm {FOLDER}; rm -r /srv/h; mkdir {FOLDER}; mv /run/20-b {FOLDER}"),
            "/srv/h: it belongs to user 1000",
        ),
    ] {
        guest.sh(&spoil)?;
        answered(what, &vss.freeze(&[], STEP)?, status::FAIL)?;
        guest.wait_until("the log says why", STEP, || {
            let said = guest.output(&daemon)?;
            Ok(said.contains("hook 20-b: it is not run") && said.contains(word))
        })?;
        guest.wait_until("all is over", STEP, || {
            let said = guest.sh("/payload/hv_vss_daemon thaw 2>&1")?;
            Ok(said.contains("nothing is recorded"))
        })?;
        let told = notes(guest)?;
        ensure!(
            !told.iter().any(|it| it.starts_with("20-b")),
            "{what}: it was run: {told:?}"
        );
        guest.sh(&mend)?;
    }
    good_backup(guest, "the next backup")?;
    noted(
        guest,
        "the next backup",
        &["20-b freeze ", "20-b thaw good"],
    )?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    end(guest)
}

fn other_contracts(guest: &Guest) -> Result<()> {
    prepare(guest)?;
    let vss = guest.vss();
    hook(guest, "10-ours", "")?;
    let qemu = "/etc/qemu/fsfreeze-hook";
    hook_at(guest, qemu, "")?;
    let tools = "/etc/vmware-tools/backupScripts.d";
    hook_at(guest, &format!("{tools}/10-tools"), "")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    good_backup(guest, "a backup with ours alone")?;
    noted(
        guest,
        "ours alone",
        &["10-ours freeze ", "10-ours thaw good"],
    )?;
    stop_at_rest(guest, guest.module(), &daemon)?;

    let config = "hooks = { qemu = true, open_vm_tools = true }";
    let daemon = start_with(guest, guest.module(), &[], config)?;
    good_backup(guest, "a backup with all")?;
    let expected = [
        "10-ours freeze ",
        "fsfreeze-hook freeze ",
        "10-tools freeze ",
        "10-tools thaw good",
        "fsfreeze-hook thaw good",
        "10-ours thaw good",
    ];
    noted(guest, "all", &expected)?;
    let agents = |notes: &[&str]| -> Vec<String> {
        let mut calls = Vec::new();
        for note in notes {
            let mut words = note.split_whitespace();
            if words.next() == Some("fsfreeze-hook") {
                calls.extend(words.next().map(str::to_owned));
            }
        }
        calls
    };
    let ours = agents(&expected);
    // Instead of the dispatcher of the QEMU guest agent, what that would run; and a freeze that fails.
    hook_at(guest, &format!("{qemu}.d/10-qemu"), "")?;
    hook_at(guest, &format!("{tools}/20-fails"), "[ $1 != freeze ]")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::FAIL)?;
    let expected = [
        "10-ours freeze ",
        "10-qemu freeze ",
        "10-tools freeze ",
        "20-fails freeze ",
        "20-fails freezeFail failed",
        "10-tools freezeFail failed",
        "10-qemu thaw failed",
        "10-ours thaw failed",
    ];
    noted(guest, "a freeze that fails", &expected)?;
    stop_at_rest(guest, guest.module(), &daemon)?;
    asked_for_and_not_called(guest, qemu)?;

    hook_at(guest, qemu, "")?;
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    good_backup(guest, "a backup by the peer")?;
    stop(guest, Module::Stock, &daemon)?;
    let seen = notes(guest)?;
    let peer = agents(&seen.iter().map(String::as_str).collect::<Vec<_>>());
    let words = |calls: &[String]| match calls {
        [] => "a good backup, it is not called".to_owned(),
        calls => format!("a good backup, it is called: {}", calls.join(", ")),
    };
    guest.compare(
        "a hook of the QEMU guest agent (hooks.qemu set for ours)",
        &words(&ours),
        &words(&peer),
    );
    end(guest)
}
