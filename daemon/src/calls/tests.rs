// SPDX-License-Identifier: GPL-2.0-only

//! Real programs, called as a backup calls them.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{channel, Receiver};

use nix::sys::ptrace;

use super::*;
use crate::hooks::Contract;
use crate::logbook::Sink;

/// Longer than any step of a test takes.
const LONG: Duration = Duration::from_secs(60);

/// Whether what takes root can be tested. If not that is said, past what keeps a test's output back.
fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        let test = std::thread::current();
        let name = test.name().unwrap_or_default();
        let _ = writeln!(io::stderr(), "{name}: not tested, that takes root");
    }
    is_root
}

/// A folder with hooks, a run directory, and a file in which the hooks note what they are told.
struct Scene {
    dir: PathBuf,
    log: Logbook,
    outcomes: Option<Receiver<HookOutcome>>,
}

impl Scene {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("hv-vss-calls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("run")).unwrap();
        Scene {
            dir,
            log: Logbook::new(Sink::Memory),
            outcomes: None,
        }
    }

    fn hook(&self, name: &str, body: &str) -> Found {
        let path = self.dir.join(name);
        let notes = self.dir.join("notes");
        let script = format!("#!/bin/sh\nnotes={}\n{body}\n", notes.display());
        // Not by rename: the kernel would find it busy if another test forked while it was written.
        let new = self.dir.join("new");
        std::fs::write(&new, script).unwrap();
        std::fs::set_permissions(&new, Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(new, &path).unwrap();
        Found {
            hook: Hook {
                path,
                contract: Contract::OpenVmTools,
            },
            required: true,
            fault: None,
        }
    }

    fn run(&self) -> RunDir {
        RunDir::new(self.dir.join("run"))
    }

    fn start(&mut self, hooks: Vec<Found>, limit: Duration) -> Calling {
        let (sender, outcomes) = channel();
        self.outcomes = Some(outcomes);
        let means = Means {
            run: self.run(),
            log: self.log.clone(),
            limit,
            context: Context::new(
                7,
                Some(2),
                &["/dev/sdb".into()],
                &["/".into(), "/a b".into()],
            ),
        };
        let tell = move |outcome| sender.send(outcome).unwrap();
        Calling::start(hooks, means, Arc::default(), tell).unwrap()
    }

    fn quiesced(&self) -> Result<(), String> {
        match self.outcomes.as_ref().unwrap().recv_timeout(LONG).unwrap() {
            HookOutcome::Quiesced(result) => result,
            HookOutcome::Released { called, .. } => panic!("released: {called:?}"),
        }
    }

    fn released(&self) -> Vec<Called> {
        match self.outcomes.as_ref().unwrap().recv_timeout(LONG).unwrap() {
            HookOutcome::Released { called, .. } => called,
            HookOutcome::Quiesced(result) => panic!("quiesced: {result:?}"),
        }
    }

    fn notes(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join("notes")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn log(&self) -> String {
        let lines = self.log.held().into_iter().map(|(_, line)| line);
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const NOTE: &str = "echo \"${0##*/} $1 $HV_VSS_OUTCOME\" >>$notes";

#[test]
fn hooks_are_called_in_order_and_let_go_in_reverse_and_told_what_it_is_about() {
    let mut scene = Scene::new("order");
    let told =
        "printf '%s %s %s %s %s\\n' \"$HV_VSS_REQUEST\" \"$HV_VSS_BACKUP_TYPE\" \"$HV_VSS_DISKS\" \
            \"$HV_VSS_FILE_SYSTEMS\" \"$HV_VSS_LIMIT\" >>$notes
        echo ready; echo careful >&2";
    let hooks = vec![
        scene.hook("10-a", NOTE),
        scene.hook("20-b", &format!("{NOTE}; {told}")),
    ];
    let calling = scene.start(hooks, LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    let about = format!("7 copy /dev/sdb / /a\\040b {}", LONG.as_secs());
    assert_eq!(scene.notes(), ["10-a freeze ", "20-b freeze ", &*about]);
    // What was called is on record, and what it said is not logged as long as all may be frozen.
    assert_eq!(scene.run().read_hooks().unwrap().unwrap().owed.len(), 2);
    assert!(!scene.log().contains("careful"), "{}", scene.log());
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    calling.join();
    let notes = scene.notes();
    assert_eq!(notes[3..], ["20-b thaw good", &*about, "10-a thaw good"]);
    assert_eq!(called.len(), 4);
    assert!(called.iter().all(|it| it.fault.is_none()), "{called:?}");
    assert_eq!(scene.run().read_hooks().unwrap(), None);
    scene.run().lock_hooks().unwrap();
    let log = scene.log();
    assert!(
        log.contains("hook 20-b, freeze: ready\nhook 20-b, freeze: careful"),
        "{log}"
    );
}

#[test]
fn what_was_started_is_let_go_including_the_one_that_failed_and_the_rest_is_not_called() {
    let mut scene = Scene::new("failing");
    let hooks = vec![
        scene.hook("10-a", NOTE),
        scene.hook("20-b", &format!("{NOTE}; [ $1 != freeze ] || exit 3")),
        scene.hook("30-c", NOTE),
    ];
    let calling = scene.start(hooks, LONG);
    let why = scene.quiesced().unwrap_err();
    assert_eq!(why, "hook 20-b: it failed with exit status 3");
    calling.release(Some(Verdict::Failed));
    scene.released();
    assert_eq!(
        scene.notes(),
        [
            "10-a freeze ",
            "20-b freeze ",
            "20-b freezeFail failed",
            "10-a freezeFail failed"
        ]
    );
}

#[test]
fn one_that_is_let_go_is_told_what_came_of_the_backup() {
    let mut scene = Scene::new("outcome");
    for (verdict, word) in [
        (Some(Verdict::Good), "good"),
        (Some(Verdict::Broken), "broken"),
        (Some(Verdict::Failed), "failed"),
        (None, "unknown"),
    ] {
        let calling = scene.start(vec![scene.hook("10-a", NOTE)], LONG);
        assert_eq!(scene.quiesced(), Ok(()));
        calling.release(verdict);
        scene.released();
        calling.join();
        let told = scene.notes().pop().unwrap_or_default();
        assert_eq!(told.split(' ').next_back(), Some(word), "{verdict:?}");
    }
}

#[test]
fn one_that_cannot_be_run_fails_and_is_owed_nothing_and_the_log_says_why() {
    let mut scene = Scene::new("unrunnable");
    let mut without = scene.hook("10-a", "");
    without.required = false;
    std::fs::write(&without.hook.path, "#!/no/such/program\n").unwrap();
    let forbidden = scene.hook("20-b", "");
    std::fs::set_permissions(&forbidden.hook.path, Permissions::from_mode(0o644)).unwrap();
    let calling = scene.start(vec![without, forbidden], LONG);
    let why = scene.quiesced().unwrap_err();
    assert_eq!(
        why,
        "hook 20-b: it cannot be run: Permission denied (os error 13)"
    );
    calling.release(Some(Verdict::Failed));
    let called = scene.released();
    assert!(
        called.iter().all(|it| it.verb == Verb::Freeze),
        "{called:?}"
    );
    assert!(scene.run().read_hooks().unwrap().is_none());
    let log = scene.log();
    for part in [
        "hook 10-a, which is optional: it cannot be run: No such file",
        "hook 10-a, freeze: it cannot be run: No such file",
        "hook 20-b, freeze: it cannot be run: Permission denied",
    ] {
        assert!(log.contains(part), "{part}:\n{log}");
    }
}

#[test]
fn one_that_is_optional_may_fail_and_one_that_must_not_run_is_not_run() {
    let mut scene = Scene::new("optional");
    let mut optional = scene.hook("10-a", &format!("{NOTE}; exit 1"));
    optional.required = false;
    let mut unfit = scene.hook("20-b", NOTE);
    unfit.fault = Some("others may write".into());
    let calling = scene.start(vec![optional, unfit, scene.hook("30-c", NOTE)], LONG);
    let why = scene.quiesced().unwrap_err();
    assert_eq!(why, "hook 20-b: it is not run: others may write");
    calling.release(Some(Verdict::Failed));
    scene.released();
    calling.join();
    // What an optional one lacks is remembered, though it was never run.
    let mut unfit = scene.hook("20-b", NOTE);
    unfit.required = false;
    unfit.fault = Some("others may write".into());
    let calling = scene.start(vec![unfit], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    let fault = called[0].fault.as_deref();
    assert_eq!(fault, Some("it is not run: others may write"));
    assert_eq!(scene.notes(), ["10-a freeze ", "10-a freezeFail failed"]);
}

#[test]
fn a_hung_hook_is_killed_with_all_it_has_started() {
    let mut scene = Scene::new("hung");
    let body = format!("{NOTE}; [ $1 != freeze ] || {{ sleep 1000 & echo $! >>$notes; wait; }}");
    let hooks = vec![scene.hook("10-a", &body)];
    let calling = scene.start(hooks, Duration::from_millis(500));
    let why = scene.quiesced().unwrap_err();
    assert!(
        why.starts_with("hook 10-a: killed, it took longer than 0.5 s"),
        "{why}"
    );
    calling.release(Some(Verdict::Failed));
    let called = scene.released();
    assert!(called[0].took < LONG / 2, "{called:?}");
    let notes = scene.notes();
    assert_eq!(notes[0], "10-a freeze ");
    assert_eq!(notes[2], "10-a freezeFail failed");
    let child: u32 = notes[1].parse().unwrap();
    let until = Instant::now() + LONG;
    while !process::is_dead(child) {
        assert!(Instant::now() < until, "what it had started goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_word_to_let_go_ends_a_call_under_way() {
    let mut scene = Scene::new("word");
    let body = format!("{NOTE}; [ $1 != freeze ] || sleep 1000");
    let hooks = vec![scene.hook("10-a", &body), scene.hook("20-b", NOTE)];
    let calling = scene.start(hooks, LONG);
    let until = Instant::now() + LONG;
    while scene.notes().is_empty() {
        assert!(Instant::now() < until, "it is not called");
        std::thread::sleep(Duration::from_millis(5));
    }
    calling.release(Some(Verdict::Failed));
    // Nobody hears that it is quiesced.
    let called = scene.released();
    assert_eq!(called[0].fault.as_deref(), Some("called off"));
    assert_eq!(scene.notes(), ["10-a freeze ", "10-a freezeFail failed"]);
}

#[test]
fn one_that_stays_may_write_as_much_as_it_likes_and_is_killed_when_its_thaw_fails() {
    let mut scene = Scene::new("stays");
    // More than a pipe takes, so that it comes to its end only if somebody reads.
    let stays =
        "(head -c 300000 /dev/zero; echo written >>$notes; exec sleep 1000) & echo $! >>$notes";
    let body = format!("if [ $1 = freeze ]; then {stays}; else exit 1; fi");
    let hooks = vec![scene.hook("10-a", &body)];
    let calling = scene.start(hooks, LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    let until = Instant::now() + LONG;
    while !scene.notes().iter().any(|it| it == "written") {
        assert!(Instant::now() < until, "it hangs in a write");
        std::thread::sleep(Duration::from_millis(5));
    }
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    assert_eq!(
        called[1].fault.as_deref(),
        Some("it failed with exit status 1")
    );
    let lost = 300_000 - MOST_OUTPUT;
    let log = scene.log();
    assert!(
        log.contains(&format!("{lost} further bytes were not kept")),
        "{log}"
    );
    let notes = scene.notes();
    let child: u32 = notes.iter().find_map(|it| it.parse().ok()).unwrap();
    let until = Instant::now() + LONG;
    while !process::is_dead(child) {
        assert!(Instant::now() < until, "its session goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until it is noted.
fn noted(scene: &Scene, word: &str) {
    let until = Instant::now() + LONG;
    while !scene.notes().iter().any(|it| it == word) {
        assert!(Instant::now() < until, "no {word}: {:?}", scene.notes());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_is_started_at_thaw_may_write_when_all_have_been_let_go() {
    let mut scene = Scene::new("outlives");
    // It waits for a word, and writes more than a pipe takes.
    let starts =
        "(while [ ! -e $notes.go ]; do sleep 0.01; done; head -c 300000 /dev/zero; echo x; \
                  echo alive $me >>$notes) &";
    let body = format!("me=${{0##*/}}; [ $1 = freeze ] || {{ {starts} }}");
    let hooks = vec![scene.hook("10-a", &body), scene.hook("20-b", &body)];
    let calling = scene.start(hooks, LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    calling.release(Some(Verdict::Good));
    scene.released();
    calling.join();
    std::fs::write(scene.dir.join("notes.go"), "").unwrap();
    noted(&scene, "alive 10-a");
    noted(&scene, "alive 20-b");
    let log = scene.log();
    let said =
        "hook 20-b, thaw: what it has left running can still write, which is not logged any more";
    assert!(log.contains(said), "{log}");
    assert!(!log.contains("10-a, freeze: what"), "{log}");
}

#[test]
fn what_a_call_with_thaw_has_started_goes_on_though_that_call_fails() {
    let mut scene = Scene::new("restarts");
    let body = "[ $1 = freeze ] || { sleep 1000 >/dev/null 2>&1 & echo $! >>$notes; exit 1; }";
    let calling = scene.start(vec![scene.hook("10-a", body)], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    calling.join();
    let fault = called[1].fault.as_deref();
    assert_eq!(fault, Some("it failed with exit status 1"));
    let pid: u32 = scene.notes()[0].parse().unwrap();
    // A signal that was sent has come by then.
    std::thread::sleep(Duration::from_millis(100));
    let goes_on = !process::is_dead(pid);
    let pid = Pid::from_raw(pid.try_into().unwrap());
    let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
    assert!(goes_on);
}

/// What is left of a daemon that died: its record, and nobody who holds the lock.
#[test]
fn what_a_dead_daemon_has_called_is_let_go_once_by_whoever_comes() {
    // Everything on the way to it is root's: that is looked at, since it may be long ago.
    if !is_root() {
        return;
    }
    let scene = Scene::new("dead");
    let run = scene.run();
    let sleeper = Command::new("sleep").arg("1000").process_group(0).spawn();
    let mut sleeper = sleeper.unwrap();
    let hook = |path: &str| Hook {
        path: path.into(),
        contract: Contract::Qemu,
    };
    let owed = |path: &str, process| Owed {
        hook: hook(path),
        process,
        thaws_since_s: None,
        lacks: None,
    };
    let start = process::start_of(sleeper.id()).unwrap();
    let record = HookRecord {
        pid: u32::MAX,
        context: Context::default(),
        limit_ms: 60_000,
        owed: vec![
            owed("/bin/true", Some((sleeper.id(), start))),
            // Another process has got that number meanwhile.
            owed("/bin/echo", Some((std::process::id(), start + 1))),
            owed(&scene.dir.join("unfit").to_string_lossy(), None),
        ],
    };
    run.write_hooks(&record).unwrap();
    assert!(recover(&run, &scene.log).unwrap());
    let log = scene.log();
    assert!(
        log.contains("hook true of a dead daemon still runs: killed"),
        "{log}"
    );
    assert!(log.contains("hook echo, thaw: thaw"), "{log}");
    assert!(log.contains("hook true, thaw: ended well"), "{log}");
    assert!(log.contains("hook unfit is not let go yet"), "{log}");
    assert!(!sleeper.wait().unwrap().success());
    let left = run.read_hooks().unwrap().unwrap();
    assert_eq!(left.owed.len(), 1, "{left:?}");
    run.remove_hooks().unwrap();
    assert!(!recover(&run, &scene.log).unwrap());
    // As long as somebody lives who has called, nobody else lets go.
    let record = HookRecord {
        pid: std::process::id(),
        ..record
    };
    run.write_hooks(&record).unwrap();
    let lock = run.lock_hooks().unwrap();
    assert!(!recover(&run, &scene.log).unwrap());
    drop(lock);
    assert!(recover(&run, &scene.log).unwrap());
    // Of two who come, one does; also where the dead one keeps the lock.
    let record = HookRecord {
        pid: u32::MAX,
        ..record
    };
    run.write_hooks(&record).unwrap();
    let lock = run.lock_hooks().unwrap();
    let first = Calls::left(&run, &scene.log).unwrap();
    assert!(Calls::left(&run, &scene.log).unwrap().is_none());
    assert!(!first.unwrap().thaw(None).is_empty());
    drop(lock);
}

#[test]
fn a_call_with_thaw_that_a_dead_daemon_has_begun_is_left_its_time_and_no_more() {
    if !is_root() {
        return;
    }
    for (name, seconds, began, limit_ms) in [
        ("begun", "1", 0, 60_000),
        ("begun-long-ago", "1000", 5, 5_000),
    ] {
        let scene = Scene::new(name);
        let notes = scene.dir.join("notes");
        let mut call = Command::new("sh")
            .args(["-c", "sleep $0; echo through >$1", seconds])
            .arg(&notes)
            .process_group(0)
            .spawn()
            .unwrap();
        let start = process::start_of(call.id()).unwrap();
        let record = HookRecord {
            pid: u32::MAX,
            context: Context::default(),
            limit_ms,
            owed: vec![Owed {
                hook: Hook {
                    path: "/bin/true".into(),
                    contract: Contract::Qemu,
                },
                process: Some((call.id(), start)),
                thaws_since_s: Some(boot_time().as_secs().saturating_sub(began)),
                lacks: None,
            }],
        };
        scene.run().write_hooks(&record).unwrap();
        assert!(recover(&scene.run(), &scene.log).unwrap());
        let has_time = began == 0;
        assert_eq!(call.wait().unwrap().success(), has_time);
        assert_eq!(scene.notes().len(), usize::from(has_time));
        let log = scene.log();
        let is_killed = log.contains("hook true, thaw: killed, it took longer than 5 s");
        assert_eq!(is_killed, !has_time, "{log}");
        // How that ended nobody knows.
        let place = |words: &str| log.find(words).unwrap_or_else(|| panic!("{words}: {log}"));
        assert!(place("it still runs: waiting for it") < place("hook true, thaw: ended well"));
        assert_eq!(scene.run().read_hooks().unwrap(), None);
    }
}

#[test]
fn what_somebody_has_left_beside_us_is_let_go_before_ours_are_called() {
    if !is_root() {
        return;
    }
    let mut scene = Scene::new("beside");
    let mut owed = scene.hook("10-a", NOTE).hook;
    // That of the tests is where anybody may write.
    owed.path = "/bin/echo".into();
    let record = HookRecord {
        pid: u32::MAX,
        context: Context::default(),
        limit_ms: 60_000,
        owed: vec![Owed {
            hook: owed,
            process: None,
            thaws_since_s: None,
            lacks: None,
        }],
    };
    scene.run().write_hooks(&record).unwrap();
    let calling = scene.start(vec![scene.hook("20-b", NOTE)], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    let log = scene.log();
    let place = |words: &str| log.find(words).unwrap_or_else(|| panic!("{words}: {log}"));
    assert!(place("hook echo, thaw: ended well") < place("hook 20-b, freeze: ended well"));
    calling.release(Some(Verdict::Good));
    scene.released();
}

#[test]
fn what_could_not_be_called_is_owed_until_it_is() {
    if !is_root() {
        return;
    }
    let mut scene = Scene::new("owed");
    let owed = |path: &str| Owed {
        hook: Hook {
            path: path.into(),
            contract: Contract::Qemu,
        },
        process: None,
        thaws_since_s: None,
        lacks: None,
    };
    // No program can be given such a variable.
    let variable = ("HV_VSS_DISKS".to_owned(), "a\0b".to_owned());
    let record = HookRecord {
        pid: u32::MAX,
        context: Context(vec![variable]),
        limit_ms: 50,
        owed: vec![owed("/bin/true"), owed("/bin/echo")],
    };
    scene.run().write_hooks(&record).unwrap();
    assert!(recover(&scene.run(), &scene.log).unwrap());
    let log = scene.log();
    assert!(
        log.contains("hook echo, thaw: it cannot be started"),
        "{log}"
    );
    assert!(
        log.contains("hook true, thaw: it cannot be started"),
        "{log}"
    );
    let left = scene.run().read_hooks().unwrap().unwrap();
    let hooks = |all: &[Owed]| all.iter().map(|it| it.hook.clone()).collect::<Vec<_>>();
    assert_eq!(hooks(&left.owed), hooks(&record.owed));

    // Both are tried before the next backup, and after it.
    let calling = scene.start(vec![scene.hook("20-b", NOTE)], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    let names: Vec<_> = called
        .iter()
        .map(|it| (it.name.as_str(), it.verb))
        .collect();
    let expected = [
        ("20-b", Verb::Freeze),
        ("20-b", Verb::Thaw),
        ("echo", Verb::Thaw),
        ("true", Verb::Thaw),
    ];
    assert_eq!(names, expected);
    assert!(called.iter().all(|it| it.fault.is_none()));
    assert!(scene.run().read_hooks().unwrap().is_none());
}

#[test]
fn where_there_is_no_room_for_another_record_what_is_left_is_the_one_before() {
    let scene = Scene::new("room");
    let record = HookRecord {
        pid: u32::MAX,
        context: Context::default(),
        limit_ms: 50,
        owed: vec![Owed {
            hook: Hook {
                path: scene.dir.join("away"),
                contract: Contract::OpenVmTools,
            },
            process: None,
            thaws_since_s: None,
            lacks: None,
        }],
    };
    let run = scene.run();
    run.write_hooks(&record).unwrap();
    std::fs::create_dir(run.path().join("hooks.new")).unwrap();
    let (sender, outcomes) = channel();
    let tell = move |outcome| sender.send(outcome).unwrap();
    let calling = Calling::recover(&run, &scene.log, tell).unwrap().unwrap();
    let HookOutcome::Released { owed, left, .. } = outcomes.recv_timeout(LONG).unwrap() else {
        panic!("nobody was to be called");
    };
    calling.join();
    assert_eq!((owed.len(), left), (1, Ok(Some(record))));
}

/// A folder that nobody but root may write to, for hooks that are looked up again.
struct RootsOwn(PathBuf);

impl RootsOwn {
    fn new(name: &str) -> Self {
        let dir = format!("/run/hv-vss-calls-{name}-{}", std::process::id());
        std::fs::create_dir_all(&dir).unwrap();
        RootsOwn(dir.into())
    }
}

impl Drop for RootsOwn {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_is_away_for_a_moment_is_let_go_once_it_is_there_again() {
    let mut scene = Scene::new("moment");
    let [upgraded, edited] = ["10-a", "20-b"].map(|it| scene.hook(it, NOTE));
    let away = scene.dir.join("away");
    std::fs::create_dir(&away).unwrap();
    let paths = [&upgraded, &edited].map(|it| it.hook.path.clone());
    let calling = scene.start(vec![upgraded, edited], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    let move_all = |back: bool| {
        for path in &paths {
            let other = away.join(path.file_name().unwrap());
            let (from, to) = if back { (&other, path) } else { (path, &other) };
            std::fs::rename(from, to).unwrap();
        }
    };
    move_all(false);
    calling.release(Some(Verdict::Good));
    let until = Instant::now() + LONG;
    while !scene
        .log()
        .contains("20-b, thaw: it cannot be run: No such file")
    {
        assert!(Instant::now() < until, "{}", scene.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    move_all(true);
    let called = scene.released();
    assert!(called.iter().all(|it| it.fault.is_none()), "{called:?}");
    let expected = [
        "10-a freeze ",
        "20-b freeze ",
        "20-b thaw good",
        "10-a thaw good",
    ];
    assert_eq!(scene.notes(), expected);
    assert!(scene.run().read_hooks().unwrap().is_none());
}

#[test]
fn what_was_called_is_owed_its_thaw_until_that_has_run() {
    if !is_root() {
        return;
    }
    let mut scene = Scene::new("away");
    let own = RootsOwn::new("away");
    let limit = Duration::from_secs(2);
    // At its end with a status that a shell has for what it does not find, which says nothing of the hook itself.
    let hook = |scene: &Scene, name: &str| {
        let mut found = scene.hook(name, &format!("{NOTE}; [ $1 = freeze ] || exit 127"));
        let path = own.0.join(name);
        std::fs::copy(&found.hook.path, &path).unwrap();
        found.hook.path = path;
        found
    };
    let hooks = vec![
        hook(&scene, "10-a"),
        hook(&scene, "20-b"),
        hook(&scene, "30-c"),
    ];
    let path = |name: &str| own.0.join(name);
    let calling = scene.start(hooks, limit);
    assert_eq!(scene.quiesced(), Ok(()));
    std::fs::rename(path("10-a"), path("10-a.old")).unwrap();
    std::fs::set_permissions(path("20-b"), Permissions::from_mode(0o644)).unwrap();
    calling.release(Some(Verdict::Good));
    let called = scene.released();
    calling.join();
    let of = |called: &[Called], name: &str| {
        let mut its = called.iter().filter(|it| it.name == name);
        its.next_back().and_then(|it| it.fault.clone())
    };
    for (name, why) in [("10-a", "No such file"), ("20-b", "Permission denied")] {
        let fault = of(&called, name).unwrap_or_default();
        assert!(
            fault.contains("cannot be run") && fault.contains(why),
            "{fault}"
        );
    }
    let fault = of(&called, "30-c");
    assert_eq!(fault.as_deref(), Some("it failed with exit status 127"));
    let owed = || {
        let left = scene.run().read_hooks().unwrap();
        let left = left.map(|it| it.owed).unwrap_or_default();
        left.iter().map(|it| it.hook.name()).collect::<Vec<_>>()
    };
    assert_eq!(owed(), ["10-a", "20-b"]);

    // Whoever comes finds that one of them is not there, and that others than root may write to the other.
    std::fs::set_permissions(path("20-b"), Permissions::from_mode(0o777)).unwrap();
    assert!(recover(&scene.run(), &scene.log).unwrap());
    assert_eq!(owed(), ["10-a", "20-b"]);
    let log = scene.log();
    for (name, why) in [("10-a", "No such file"), ("20-b", "others than root")] {
        let is_said = |it: &str| {
            it.starts_with(&format!("hook {name} is not let go yet")) && it.contains(why)
        };
        assert!(log.lines().any(is_said), "{log}");
    }
    std::fs::rename(path("10-a.old"), path("10-a")).unwrap();
    std::fs::set_permissions(path("20-b"), Permissions::from_mode(0o755)).unwrap();
    assert!(recover(&scene.run(), &scene.log).unwrap());
    assert_eq!(owed(), Vec::<String>::new());
    assert_eq!(
        scene.notes()[4..],
        ["20-b thaw unknown", "10-a thaw unknown"]
    );
}

#[test]
fn one_that_is_called_again_meanwhile_is_owed_one_thaw() {
    if !is_root() {
        return;
    }
    let mut scene = Scene::new("again");
    let own = RootsOwn::new("again");
    let mut found = scene.hook("10-a", NOTE);
    let path = own.0.join("10-a");
    let (there, away) = (found.hook.path.clone(), own.0.join("10-a.old"));
    std::fs::copy(there, &path).unwrap();
    found.hook.path.clone_from(&path);
    // Whoever looks it up before the next backup must not run it.
    std::fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
    for _ in 0..3 {
        let calling = scene.start(vec![found.clone()], Duration::from_secs(1));
        assert_eq!(scene.quiesced(), Ok(()));
        std::fs::rename(&path, &away).unwrap();
        calling.release(Some(Verdict::Good));
        scene.released();
        calling.join();
        std::fs::rename(&away, &path).unwrap();
        let left = scene.run().read_hooks().unwrap().unwrap();
        assert_eq!(left.owed.len(), 1);
    }
    assert_eq!(scene.notes(), ["10-a freeze "; 3]);
}

#[test]
fn what_was_not_let_go_for_a_day_is_given_up_on() {
    if !is_root() {
        return;
    }
    let scene = Scene::new("day");
    let mut record = HookRecord {
        pid: u32::MAX,
        context: Context::default(),
        limit_ms: 1000,
        owed: vec![Owed {
            hook: Hook {
                path: "/run/no such hook".into(),
                contract: Contract::Qemu,
            },
            process: None,
            thaws_since_s: None,
            lacks: None,
        }],
    };
    scene.run().write_hooks(&record).unwrap();
    let now = boot_time().as_secs();
    assert!(recover(&scene.run(), &scene.log).unwrap());
    let left = scene.run().read_hooks().unwrap().unwrap();
    let lacks = left.owed[0].lacks.clone().unwrap();
    assert!(
        lacks.since_s >= now && lacks.why.contains("No such file"),
        "{lacks:?}"
    );
    // Not every machine of a test has been up for a day.
    let days = |count: u64| {
        Lack {
            since_s: now,
            ..lacks.clone()
        }
        .is_over(now + count * GIVEN_UP_AFTER.as_secs())
    };
    assert_eq!([0, 1].map(days), [false, true]);
    let Some(since_s) = now.checked_sub(GIVEN_UP_AFTER.as_secs()) else {
        return;
    };
    record.owed[0].lacks = Some(Lack { since_s, ..lacks });
    scene.run().write_hooks(&record).unwrap();
    assert!(recover(&scene.run(), &scene.log).unwrap());
    assert!(scene.run().read_hooks().unwrap().is_none());
    assert!(scene.log().contains("given up on"), "{}", scene.log());
}

#[test]
fn what_cannot_be_read_is_put_aside_and_costs_no_backup() {
    for text in [&b"{"[..], b"{\"pid\":7}", b"\xff"] {
        let mut scene = Scene::new("malformed");
        let path = scene.run().path().join("hooks.json");
        let is_aside = |scene: &Scene| {
            let aside = std::fs::read(scene.run().hooks_aside()).unwrap_or_default();
            !path.exists() && aside == text && scene.log().contains("hooks.json.bad")
        };
        std::fs::write(&path, text).unwrap();
        // Somebody who lives has it.
        let lock = scene.run().lock_hooks().unwrap();
        assert!(recover(&scene.run(), &scene.log).is_err() && path.exists());
        drop(lock);
        assert!(!recover(&scene.run(), &scene.log).unwrap());
        assert!(is_aside(&scene), "{}", scene.log());

        std::fs::write(&path, text).unwrap();
        std::fs::remove_file(scene.run().hooks_aside()).unwrap();
        let hook = scene.hook("10-a", "echo $1 >>$notes");
        let calling = scene.start(vec![hook], LONG);
        assert_eq!(scene.quiesced(), Ok(()));
        calling.release(Some(Verdict::Good));
        scene.released();
        assert!(scene.run().hooks_aside().exists(), "{}", scene.log());
        assert_eq!(scene.notes(), ["freeze", "thaw"]);
    }
}

#[test]
fn no_hook_is_run_before_its_process_is_on_record() {
    let mut scene = Scene::new("record");
    let record = scene.dir.join("run/hooks.json");
    let seen = format!("grep -c \"process.:.$$,\" {} >>$notes", record.display());
    let calling = scene.start(vec![scene.hook("10-a", &seen)], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    calling.release(Some(Verdict::Good));
    scene.released();
    calling.join();
    assert_eq!(scene.notes(), ["1", "1"]);

    let hook = scene.hook("20-b", "echo run >>$notes").hook;
    let means = Means {
        run: scene.run(),
        log: scene.log.clone(),
        limit: LONG,
        context: Context::default(),
    };
    let mut calls = Calls::new(means, None, None);
    // As when we die before it is there.
    let Call {
        mut child, word, ..
    } = calls
        .spawn(&hook, Verb::Freeze, None, Instant::now() + LONG)
        .unwrap();
    drop(word);
    assert_eq!(child.wait().unwrap().code(), Some(children::NO_WORD.into()));
    // And when it cannot be written.
    std::fs::create_dir(&record).unwrap();
    let end = calls.call_to_freeze(hook, true);
    assert!(matches!(end, End::Bad(_)));
    assert!(calls.record.owed.is_empty());
    assert_eq!(scene.notes(), ["1", "1"]);
}

/// Waits until so many sessions are known.
fn know(calling: &Calling, number: usize) {
    let until = Instant::now() + LONG;
    while calling.sessions.all().len() != number {
        assert!(Instant::now() < until, "{:?}", calling.sessions);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_session_that_ends_by_itself_is_told_of_once_and_what_only_ends_late_is_none() {
    let mut scene = Scene::new("session");
    // In two processes, as a client and what holds its input; the second goes on alone for a while.
    let stays = "sleep 1000 & echo $! >>$notes; sleep 1000 & echo $! >>$notes";
    let stays = format!("[ $1 != freeze ] || {{ {stays}; }}");
    // It ends when nobody writes to it any more, and somewhat later.
    let pipe = "mkfifo $notes.pipe; cat <$notes.pipe >/dev/null & exec 3>$notes.pipe";
    let logger = format!("[ $1 != freeze ] || {{ {pipe}; }}");
    let left = "[ $1 != freeze ] || { setsid sleep 1 & }";
    let mut optional = scene.hook("20-b", &stays);
    optional.required = false;
    let hooks = vec![
        scene.hook("10-a", &stays),
        optional,
        scene.hook("30-c", &logger),
        scene.hook("40-d", left),
        // By its end it is known of all others.
        scene.hook("50-e", "[ $1 != freeze ] || sleep 1"),
    ];
    let calling = scene.start(hooks, LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    know(&calling, 2);
    assert_eq!(calling.sessions_ended(), []);
    let pids: Vec<u32> = scene.notes().iter().map(|it| it.parse().unwrap()).collect();
    let end = |pid: u32| {
        nix::sys::signal::kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        let until = Instant::now() + LONG;
        while !process::is_dead(pid) {
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    for (pid, ended) in pids.into_iter().zip([None, Some(true), None, Some(false)]) {
        end(pid);
        let told = calling.sessions_ended();
        let told: Vec<bool> = told.iter().map(|it| it.required).collect();
        assert_eq!(told, ended.as_slice());
    }
    assert_eq!(calling.sessions_ended(), []);
    calling.release(Some(Verdict::Good));
    scene.released();
}

/// Kills it, and has it stop before it has closed anything.
fn kill_halfway(child: &mut Child) {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACEEXIT).unwrap();
    child.kill().unwrap();
    let stopped = nix::sys::wait::waitpid(pid, None).unwrap();
    assert!(
        matches!(stopped, WaitStatus::PtraceEvent(..)),
        "{stopped:?}"
    );
}

fn have_end(mut child: Child) {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    ptrace::cont(pid, None).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_session_that_has_but_to_end_has_ended() {
    let mut sleep = Command::new("sleep");
    let mut child = sleep.arg("1000").process_group(0).spawn().unwrap();
    let mut session = Session {
        hook: "10-a".into(),
        required: true,
        group: child.id(),
        process: process::member_of(child.id()).unwrap(),
    };
    assert!(!session.has_ended());
    kill_halfway(&mut child);
    assert!(session.has_ended());
    have_end(child);
}

#[test]
fn what_one_has_called_that_has_but_to_end_is_let_go() {
    let scene = Scene::new("halfway");
    let run = scene.run();
    let lock = run.path().join("hooks.lock");
    let script = format!("exec 9>{0}; flock 9; exec sleep 1000", lock.display());
    let mut owner = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let until = Instant::now() + LONG;
    while run.is_free_of_hooks() {
        assert!(Instant::now() < until, "it does not take the lock");
        std::thread::sleep(Duration::from_millis(5));
    }
    let record = HookRecord {
        pid: owner.id(),
        ..HookRecord::default()
    };
    run.write_hooks(&record).unwrap();
    assert!(!recover(&run, &scene.log).unwrap(), "it lives");
    kill_halfway(&mut owner);
    assert!(recover(&run, &scene.log).unwrap());
    assert_eq!(left_in(&run), Ok(None));
    have_end(owner);
}

#[test]
fn what_is_let_go_has_not_ended_by_itself() {
    let mut scene = Scene::new("let-go");
    let stays = "case $1 in freeze) sleep 1000 & echo $! >$notes ;; *) kill $(cat $notes) ;; esac";
    let calling = scene.start(vec![scene.hook("10-a", stays)], LONG);
    assert_eq!(scene.quiesced(), Ok(()));
    know(&calling, 1);
    calling.release(Some(Verdict::Good));
    scene.released();
    let pid: u32 = scene.notes()[0].parse().unwrap();
    let until = Instant::now() + LONG;
    while !process::is_dead(pid) {
        assert!(Instant::now() < until, "it goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(calling.sessions_ended(), []);
}

#[test]
fn more_file_systems_than_a_variable_holds_are_counted_and_a_program_can_be_started() {
    let paths: Vec<String> = (0..3000)
        .map(|i| format!("/{i:04} {}", "x".repeat(60)))
        .collect();
    let told = |paths: &[String]| {
        let Context(variables) = Context::new(1, None, &[], paths);
        let shown = Command::new("env")
            .env_clear()
            .envs(variables)
            .env("PATH", PATH)
            .output();
        let text = String::from_utf8(shown.unwrap().stdout).unwrap();
        let value = |name: &str| {
            let mut lines = text.lines();
            lines.find_map(|it| {
                it.strip_prefix(&format!("HV_VSS_{name}="))
                    .map(str::to_owned)
            })
        };
        let listed = value("FILE_SYSTEMS").unwrap();
        let more = value("FILE_SYSTEMS_MORE").map(|it| it.parse::<usize>().unwrap());
        (
            listed.split(' ').map(str::to_owned).collect::<Vec<_>>(),
            more,
        )
    };
    let escaped: Vec<String> = paths.iter().map(|it| escape(it)).collect();
    let (listed, more) = told(&paths);
    assert_eq!(listed, escaped[..listed.len()]);
    assert_eq!(Some(3000 - listed.len()), more);
    assert_eq!(told(&paths[..100]), (escaped[..100].to_vec(), None));
}
