// SPDX-License-Identifier: GPL-2.0-only

//! Parts of the packages' scripts that are worth a look of their own, as the shell runs them.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

const CONFIGURES: &str = "../.debian/hv-vss-daemon.postinst";
const INSTALLS_MODULE: &str = "../.debian/hv-vss-dkms.postinst";
const REMOVES_MODULE: &str = "../.debian/hv-vss-dkms.prerm";
const REMOVES: &str = "../.debian/hv-vss-daemon.postrm";
const MARIADB: &str = "hooks/mariadb";
const BUILDS: &str = "../kmod/dkms/build";
const HANDS_OVER: &str = "../kmod/hand-over/hv_vss_hand_over";

fn text_of(script: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    std::fs::read_to_string(path).unwrap()
}

/// The function `name` of `script`.
fn function_of(script: &str, name: &str) -> String {
    let script = text_of(script);
    let begin = script.find(&format!("{name}() {{")).unwrap();
    let rest = &script[begin..];
    let first = rest.lines().next().unwrap();
    let function = match first.ends_with('}') {
        true => first,
        false => &rest[..rest.find("\n}\n").unwrap() + 3],
    };
    function.to_owned()
}

/// What the shell makes of `line` after the function `name` of `script`.
fn with_function(script: &str, name: &str, line: &str, argument: &str) -> String {
    let text = format!("{}\n{line}", function_of(script, name));
    let mut shell = Command::new("sh");
    let ended = shell.args(["-c", &text, "sh", argument]).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    String::from_utf8(ended.stdout).unwrap()
}

#[test]
fn a_path_of_the_mount_table_is_read_as_the_kernel_wrote_it() {
    for (escaped, path) in [
        ("/mnt/a", "/mnt/a"),
        ("/mnt/disk\\0401", "/mnt/disk 1"),
        ("/mnt/disk\\0437\\0400", "/mnt/disk#7 0"),
        ("/mnt/\\0112\\0123", "/mnt/\t2\n3"),
        ("/mnt/back\\1340slash", "/mnt/back\\0slash"),
        ("/mnt/%s\\040%b", "/mnt/%s %b"),
    ] {
        let found = with_function(CONFIGURES, "unescaped", "unescaped \"$1\"", escaped);
        assert_eq!(found, path, "{escaped}");
    }
}

#[test]
fn mariadb_is_held_for_longer_than_a_backup_takes() {
    let script = text_of(MARIADB);
    let hold = script.lines().find_map(|it| it.strip_prefix("HOLD="));
    let hold: u32 = hold.unwrap().parse().unwrap();
    // What the host waits for FREEZE, and the longest deadline that the configuration takes.
    assert!(hold > 900 + 3600, "{hold}");
}

#[test]
fn each_server_is_locked_by_what_it_has() {
    const FLUSH: &str = "FLUSH TABLES WITH READ LOCK\n";
    const STAGE: &str = "BACKUP STAGE START; BACKUP STAGE BLOCK_COMMIT\n";
    for (version, lock) in [
        ("8.4.3", FLUSH),
        ("9.1.0-commercial", FLUSH),
        ("5.5.68-MariaDB", FLUSH),
        ("10.1.48-MariaDB-0+deb9u2", FLUSH),
        ("10.3.39-MariaDB-0+deb10u2", FLUSH),
        ("10.4.34-MariaDB", STAGE),
        ("10.11.6-MariaDB-0+deb12u1", STAGE),
        ("11.8.3-MariaDB-0+deb13u1", STAGE),
    ] {
        let found = with_function(MARIADB, "lock_for", "lock_for \"$1\"", version);
        assert_eq!(found, lock, "{version}");
    }
}

/// Others would wait for its table, and a lock that is given up does not undo that.
#[test]
fn no_server_is_asked_to_flush_tables_behind_a_long_statement() {
    let line = "WAIT=2; sleep() { :; }
        exec 3>/dev/null 4<<END
$1
END
        none_is_long 2>&1 && echo flush";
    let long =
        "statements that run for long: 1; the lock would wait for them, and others behind it";
    for (answers, expected) in [
        ("running 0", "flush\n".to_owned()),
        ("running 3\nrunning 0", "flush\n".to_owned()),
        (
            "running 3\na warning\nrunning 1\nrunning 0",
            format!("a warning\n{long}\n"),
        ),
        ("ERROR 1 at line 1", "ERROR 1 at line 1\n".to_owned()),
    ] {
        let line = format!("{line} || true");
        let said = with_function(MARIADB, "none_is_long", &line, answers);
        assert_eq!(said, expected, "{answers}");
    }
}

/// What MySQL 8 lists of a replica whose applier has nothing to do: it is no statement, for however long. Those of users
/// are, and so is what the server itself was asked to do.
#[test]
fn what_applies_for_a_replica_is_no_long_statement() {
    let line = "WAIT=1; sleep() { :; }
        exec 3>&1 4</dev/null
        none_is_long || true";
    let statement = with_function(MARIADB, "none_is_long", line, "");
    let (_, conditions) = statement.trim_end().split_once(" WHERE ").unwrap();
    let conditions = conditions.strip_suffix(';').unwrap();
    // User, command, seconds, statement.
    type Listed = (&'static str, &'static str, u32, Option<&'static str>);
    let holds = |condition: &str, (user, command, time, info): Listed| match condition {
        "COMMAND IN ('Query', 'Execute')" => ["Query", "Execute"].contains(&command),
        "TIME >= 1" => time >= 1,
        "ID <> CONNECTION_ID()" => true,
        "USER <> 'system user'" => user != "system user",
        "INFO IS NOT NULL" => info.is_some(),
        other => panic!("{other}"),
    };
    let is_counted = |it| {
        conditions
            .split(" AND ")
            .all(|condition| holds(condition, it))
    };
    for (listed, expected) in [
        (("system user", "Connect", 86400, None), false),
        (("system user", "Query", 7200, None), false),
        (
            (
                "system user",
                "Query",
                7200,
                Some("INSERT INTO t VALUES (1)"),
            ),
            false,
        ),
        (("event_scheduler", "Daemon", 86400, None), false),
        (("app", "Query", 3, None), false),
        (("app", "Sleep", 3, None), false),
        (("app", "Query", 0, Some("SELECT SLEEP(9)")), false),
        (("app", "Query", 1, Some("SELECT SLEEP(9)")), true),
        (("app", "Execute", 1, Some("SELECT SLEEP(?)")), true),
        (("root", "Query", 600, Some("ALTER TABLE t FORCE")), true),
    ] {
        assert_eq!(is_counted(listed), expected, "{listed:?}");
    }
}

#[test]
fn a_purge_takes_the_links_to_our_hooks_and_nothing_of_the_administrators() {
    use std::os::unix::fs::symlink;
    let dir = programs("purge", &[]);
    let etc = dir.join("etc");
    let purge = || {
        let line = "forget_hooks \"$1\"";
        with_function(REMOVES, "forget_hooks", line, etc.to_str().unwrap())
    };
    // Where nothing is there is nothing to do.
    purge();
    let hooks = etc.join("hooks.d");
    std::fs::create_dir_all(&hooks).unwrap();
    std::fs::create_dir_all(etc.join("daemon.toml.d")).unwrap();
    for (name, to) in [
        ("50-mariadb", "/usr/share/hv_vss/hooks/mariadb"),
        ("60-a", "../../../usr/share/hv_vss/hooks/postgresql"),
        ("70-theirs", "/opt/theirs/hook"),
    ] {
        symlink(to, hooks.join(name)).unwrap();
    }
    purge();
    let left = std::fs::read_dir(&hooks).unwrap().flatten();
    let left: Vec<_> = left.map(|it| it.file_name()).collect();
    assert_eq!(left, ["70-theirs"]);
    std::fs::remove_file(hooks.join("70-theirs")).unwrap();
    purge();
    assert!(!etc.exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

/// So that each can be let go by hand, or by the package once it is there again.
#[test]
fn a_removal_leaves_on_record_what_is_owed_to_hooks_and_names_them() {
    let all = [("systemctl", ""), ("systemd-run", "")];
    let dir = programs("removal", &all);
    let run = dir.join("run/hv_vss");
    // What the hook of MariaDB lets go by.
    let session = dir.join("run/hv_vss_hooks/mariadb");
    let text = text_of(REMOVES).replace("/run/", "./run/");
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    // With systemd there, and with word of a backup that broke just now, or not.
    let remove_where = |record: Option<&str>, has_systemd: bool, is_broken: bool| {
        for folder in [&run, &session] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(run.join("lock"), "").unwrap();
        if let Some(record) = record {
            std::fs::write(run.join("hooks.json"), record).unwrap();
        }
        if has_systemd {
            std::fs::create_dir_all(dir.join("run/systemd/system")).unwrap();
        }
        if is_broken {
            std::fs::write(run.join("broken"), "").unwrap();
        }
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", &text, "sh", "remove"]);
        let shell = shell.current_dir(&dir).env("PATH", &path);
        let ended = shell.output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        // What is left where a backup broke goes later.
        assert_eq!(run.join("lock").exists(), is_broken);
        assert_eq!(ended.stdout.is_empty(), !is_broken, "{ended:?}");
        assert_eq!(session.exists(), record.is_some());
        assert_eq!(run.join("hooks.json").exists(), record.is_some());
        assert_eq!(run.exists(), is_broken || record.is_some());
        let _ = std::fs::remove_dir_all(dir.join("run"));
        String::from_utf8(ended.stderr).unwrap()
    };
    let remove = |record: Option<&str>| {
        let said = remove_where(record, false, false);
        for is_broken in [false, true] {
            assert_eq!(remove_where(record, true, is_broken), said);
        }
        said
    };
    assert_eq!(remove(None), "");
    let owed = |path: &str| hv_vss_daemon::calls::Owed {
        hook: hv_vss_daemon::hooks::Hook {
            path: path.into(),
            contract: hv_vss_daemon::hooks::Contract::Qemu,
        },
        process: None,
        thaws_since_s: None,
        lacks: None,
    };
    let record = hv_vss_daemon::calls::HookRecord {
        owed: vec![owed("/etc/a"), owed("/etc/b c")],
        ..Default::default()
    };
    let said = remove(Some(&serde_json::to_string(&record).unwrap()));
    let begin = "hooks that were called with freeze are not let go: /etc/b c /etc/a; call";
    assert!(
        said.starts_with(begin) && said.lines().count() == 1,
        "{said}"
    );
    // One that is none, of another version perhaps.
    let said = remove(Some("{"));
    assert!(said.contains("run/hv_vss/hooks.json; call"), "{said}");
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A folder for programs, with those that these lines are.
fn programs(name: &str, all: &[(&str, &str)]) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = std::env::temp_dir().join(format!("hv-vss-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, line) in all {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{line}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

/// Calls this hook with `freeze` where there are these programs alone.
fn freeze(hook: &str, dir: &Path) -> std::process::Output {
    call(hook, "freeze", dir)
}

fn call(hook: &str, verb: &str, dir: &Path) -> std::process::Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(hook);
    let mut shell = Command::new("/bin/sh");
    let shell = shell.arg(path).arg(verb).env("PATH", dir);
    shell.output().unwrap()
}

#[test]
fn where_no_server_is_left_no_client_is_missed() {
    let dir = programs("no-client", &[("pidof", "exit 1")]);
    let ended = freeze(MARIADB, &dir);
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(
        ended.status.success() && said.contains("no server is running"),
        "{ended:?}"
    );
    let ended = call(MARIADB, "thaw", &dir);
    assert!(ended.status.success(), "{ended:?}");
    std::fs::remove_dir_all(&dir).unwrap();
    let dir = programs("no-client", &[("pidof", "echo 7")]);
    let ended = freeze(MARIADB, &dir);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.code() == Some(1) && said.contains("nor mysql is here"),
        "{ended:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn nobody_says_that_no_server_runs_who_cannot_know() {
    let dir = programs("no-pidof", &[("mariadb", "exit 1")]);
    let ended = freeze(MARIADB, &dir);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.code() == Some(1) && said.contains("pidof"),
        "{ended:?}"
    );
    // Which fails no backup, and tries.
    let timeout = ("timeout", "[ \"$2\" != cat ] || exec /bin/cat; exit 1");
    let dir = programs_for_postgresql("no-pidof", &[("mariadb", "exit 1"), timeout]);
    let ended = freeze("hooks/postgresql", &dir);
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(
        ended.status.success() && said.contains("no checkpoint is known to be complete"),
        "{ended:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
    let timeout = ("timeout", "shift; exec \"$@\"");
    let all = [("mariadb", "exit 1"), ("pidof", "exit 1"), timeout];
    let dir = programs_for_postgresql("pidof", &all);
    for hook in [MARIADB, "hooks/postgresql"] {
        let ended = freeze(hook, &dir);
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(
            ended.status.success() && said.contains("no server is running"),
            "{ended:?}"
        );
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// What is said, and what word is left, where another daemon was stopped and this is the mount table: with the
/// programs of this folder before those of the system, after the line `first`.
fn thaw_all(first: &str, table: &str, dir: &Path) -> (String, Option<String>) {
    std::fs::write(dir.join("mounts"), table).unwrap();
    let functions = ["unescaped", "has_ended", "thaw_all"].map(|it| function_of(CONFIGURES, it));
    let text = format!(
        "set -e\n{}\n{first}\nthaw_all mounts word 2>&1",
        functions.join("\n")
    );
    let path = std::env::var("PATH").unwrap();
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &text]).current_dir(dir);
    let shell = shell.env("PATH", format!("{}:{path}", dir.display()));
    let ended = shell.output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8(ended.stdout).unwrap();
    (said, std::fs::read_to_string(dir.join("word/broken")).ok())
}

#[test]
fn a_thaw_that_never_comes_back_keeps_no_other_one_frozen_and_nobody_waits_for_it() {
    const TABLE: &str = "proc /proc proc rw 0 0\n/dev/sda / ext4 rw 0 0\n/dev/sdb /a ext4 rw 0 0\n\
                         /dev/sdc /b\\040c ext4 rw 0 0\n";
    let fsfreeze = "echo \"$2\" >>asked
         case $2 in
         /a) while [ -e hangs ]; do sleep 0.1; done ;;
         /*c) [ -e is-frozen ] ;;
         *) exit 1 ;;
         esac";
    let dir = programs("thaw-all", &[("fsfreeze", fsfreeze)]);
    let touch = |name: &str| std::fs::write(dir.join(name), "").unwrap();
    let asked = || {
        let text = std::fs::read_to_string(dir.join("asked")).unwrap();
        let mut all: Vec<String> = text.lines().map(str::to_owned).collect();
        all.sort();
        std::fs::remove_file(dir.join("asked")).unwrap();
        all
    };
    let without = TABLE.replace("/a ", "/d ");
    let (said, word) = thaw_all("", &without, &dir);
    assert_eq!((said.as_str(), word), ("", None));
    assert_eq!(asked(), ["/", "/b c", "/d"]);
    touch("is-frozen");
    let (said, word) = thaw_all("", &without, &dir);
    assert!(said.is_empty() && word.is_some(), "{said}");
    asked();
    std::fs::remove_dir_all(dir.join("word")).unwrap();
    std::fs::remove_file(dir.join("is-frozen")).unwrap();

    touch("hangs");
    let (said, word) = thaw_all("", TABLE, &dir);
    assert!(
        said.starts_with("/a: its disk does not answer") && said.lines().count() == 1,
        "{said}"
    );
    // Nobody knows whether that one is frozen.
    assert!(word.is_some());
    assert_eq!(asked(), ["/", "/a", "/b c"]);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn where_there_is_no_room_for_a_word_all_is_thawed_all_the_same() {
    const TABLE: &str = "/dev/sda /a ext4 rw 0 0\n/dev/sdb /b ext4 rw 0 0\n";
    // Of a file there is room for its name.
    const FULL: &str = "trap '' XFSZ; ulimit -f 0";
    let fsfreeze = ("fsfreeze", "true >\"asked-for-${2#/}\"");
    let (mktemp, mkdir) = (("mktemp", "exit 1"), ("mkdir", "exit 1"));
    for (first, all, word_left, words) in [
        (FULL, &[fsfreeze][..], Some(""), ""),
        ("", &[fsfreeze, mktemp, mkdir], None, "cannot be told"),
    ] {
        let dir = programs("no-room", all);
        let (said, word) = thaw_all(first, TABLE, &dir);
        for name in ["asked-for-a", "asked-for-b"] {
            assert!(dir.join(name).exists(), "{name}: {said}");
        }
        // Which is as good as any.
        assert_eq!(word.as_deref(), word_left, "{said}");
        assert!(said.contains(words), "{said}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn what_theirs_has_left_is_thawed_once_it_has_ended_and_not_before() {
    let systemctl = "case \"$2 $3\" in
         ' ') echo \"$1 waits for a root that is frozen\" ;;
         'is-active hv_vss.service') [ -e serves ] ;;
         *' theirs') [ -e \"$2\" ] ;;
         *) exit 1 ;;
         esac";
    // By policy-rc.d; that is no failure.
    let invoke =
        "if [ -e forbidden ]; then echo 'policy-rc.d returned 101' >&2; else rm is-active; fi";
    let functions = function_of(CONFIGURES, "take_over");
    let text = format!(
        "set -e\ntheirs=theirs\n{functions}\nthaw_all() {{ echo \"thaws $*\"; }}\ntake_over 2>&1"
    );
    const THAWS: &str = "thaws /proc/mounts /run/hv_vss\n";
    for (state, says) in [
        (&[][..], ""),
        (&["is-active"], THAWS),
        (
            &["is-active", "forbidden"],
            "policy-rc.d returned 101\ntheirs still runs",
        ),
        // It has crashed.
        (&["is-failed"], THAWS),
        // What is frozen now is of ours.
        (&["is-failed", "serves"], ""),
    ] {
        let all = [("systemctl", systemctl), ("deb-systemd-invoke", invoke)];
        let dir = programs("take-over", &all);
        for name in state {
            std::fs::write(dir.join(name), "").unwrap();
        }
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", &text]).current_dir(&dir);
        let shell = shell.env("PATH", format!("{}:{path}", dir.display()));
        let ended = shell.output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success(), "{state:?}: {ended:?}");
        let is_it = said.starts_with(says) && said.contains("thaws") == (says == THAWS);
        assert!(
            is_it && (said.is_empty() == says.is_empty()),
            "{state:?}: {said}"
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

/// Hands over, in this folder, on a bus whose driver waits for as long as nobody reads what it was told, and is asked
/// again meanwhile, when none is to be seen any more; whoever has asked for it is killed afterwards, with all that it
/// has started, if it is `of_udev`.
fn hand_over(dir: &Path, of_udev: bool) {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::os::unix::process::CommandExt as _;
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("devices/dev/driver_override", "");
    put("drivers_probe", "");
    put("drivers/hv_utils/name", "");
    std::os::unix::fs::symlink("../../drivers/hv_utils", dir.join("devices/dev/driver")).unwrap();
    let unbind = dir.join("drivers/hv_utils/unbind");
    let made = Command::new("mkfifo").arg(&unbind).status().unwrap();
    assert!(made.success());
    let functions = ["seconds", "driver", "move", "bind_to"].map(|it| function_of(HANDS_OVER, it));
    let text = format!(
        "set -u\nbus=$PWD\ndevice=dev\nLIMIT=1\nsystemd=$bus/systemd\n{}\n\
         bind_to hv_utils && echo has\nbind_to hv_vss\necho $?\n\
         rm devices/dev/driver\nbind_to hv_vss\necho $?",
        functions.join("\n")
    );
    let path = std::env::var("PATH").unwrap();
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &text]).current_dir(dir);
    let shell = shell.env("PATH", format!("{}:{path}", dir.display()));
    let shell = shell.stdout(std::process::Stdio::piped()).process_group(0);
    let shell = shell.spawn().unwrap();
    let group = shell.id();
    let ended = shell.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert_eq!(said, "has\n2\n2\n", "{ended:?}");
    if of_udev {
        let group = nix::unistd::Pid::from_raw(group.try_into().unwrap());
        // It fails when nothing is left there.
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    }
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    assert_eq!(read("devices/dev/driver_override"), "hv_vss\n");
    assert_eq!(read("drivers_probe"), "");
    // It does: the rest is done, without whoever had asked for it.
    let no_wait = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut told = std::fs::OpenOptions::new();
    let mut told = told.read(true).custom_flags(no_wait).open(&unbind).unwrap();
    let mut text = String::new();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    // The second one asks the bus too, and what it writes to is empty for a moment.
    while text != "dev\n"
        || read("devices/dev/driver_override") != "\n"
        || read("drivers_probe") != "dev\n"
    {
        assert!(std::time::Instant::now() < until, "it is not moved");
        std::thread::sleep(std::time::Duration::from_millis(10));
        // It fails as long as whoever writes has written nothing.
        let _ = told.read_to_string(&mut text);
    }
    // The second one may be at it, and finds nothing to do.
    while std::fs::remove_dir_all(dir).is_err() {
        assert!(std::time::Instant::now() < until, "somebody writes there");
    }
}

#[test]
fn a_driver_that_does_not_let_the_device_go_is_waited_for_by_another() {
    hand_over(&programs("hand-over", &[]), false);
    // Where systemd does not start anything.
    let dir = programs("hand-over", &[("systemd-run", "exit 1")]);
    std::fs::create_dir(dir.join("systemd")).unwrap();
    hand_over(&dir, false);
}

/// As those that udev's rules leave running are.
#[test]
fn the_one_who_waits_is_not_killed_with_whoever_has_asked() {
    let run = "while [ \"$1\" != sh ]; do shift; done; setsid \"$@\" &";
    let dir = programs("hand-over-of-udev", &[("systemd-run", run)]);
    std::fs::create_dir(dir.join("systemd")).unwrap();
    hand_over(&dir, true);
}

/// The whole script that hands over, with these arguments, in this folder: on a bus whose device `driver` has. What it
/// says, and whether it has taken the device from that.
fn hand_over_whole(dir: &Path, arguments: &[&str], driver: &str) -> (String, bool) {
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let mut text = text_of(HANDS_OVER);
    for (line, ours) in [
        ("\nbus=/sys/bus/vmbus\n", "\nbus=$PWD/bus\n"),
        ("\nloaded=/sys/module/hv_vss\n", "\nloaded=$PWD/bus\n"),
        ("\nsystemd=/run/systemd/system\n", "\nsystemd=$PWD/none\n"),
        ("\nsources=/usr/src\n", "\nsources=$PWD/src\n"),
        ("\nmodules=/lib/modules\n", "\nmodules=$PWD/modules\n"),
    ] {
        assert!(text.contains(line), "{line}");
        text = text.replace(line, ours);
    }
    put("hv_vss_hand_over", &text);
    let class = "{35fa2e29-ea23-4236-96ae-3a6ebacba440}\n";
    put("bus/devices/dev/class_id", class);
    put("bus/devices/dev/driver_override", "");
    put("bus/drivers_probe", "");
    let unbind = format!("bus/drivers/{driver}/unbind");
    put(&unbind, "");
    let link = dir.join("bus/devices/dev/driver");
    let to = Path::new("../../drivers").join(driver);
    std::os::unix::fs::symlink(to, &link).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut shell = Command::new("sh");
    let shell = shell.arg(dir.join("hv_vss_hand_over")).args(arguments);
    let shell = shell.env("PATH", format!("{}:{path}", dir.display()));
    let ended = shell.current_dir(dir).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let is_taken = !std::fs::read_to_string(dir.join(unbind))
        .unwrap()
        .is_empty();
    std::fs::remove_dir_all(dir.join("bus")).unwrap();
    let said = [ended.stdout, ended.stderr].concat();
    (String::from_utf8(said).unwrap(), is_taken)
}

/// Of another one nobody knows whether it has frozen anything.
#[test]
fn a_package_takes_the_device_from_a_daemon_of_ours_only() {
    let find = "[ ! -e holder ] || echo \"/proc/$(cat holder)/fd/3\"";
    let none = ["modinfo", "modprobe", "logger"].map(|it| (it, ""));
    let dir = programs("unless-served", &[&none[..], &[("find", find)]].concat());
    let (ours, theirs) = (dir.join("hv_vss_daemon"), dir.join("theirs/hv_vss_daemon"));
    std::fs::create_dir(dir.join("theirs")).unwrap();
    for path in [&ours, &theirs] {
        std::fs::copy("/bin/sleep", path).unwrap();
    }
    const WAITS: [&str; 2] = ["take", "--unless-served"];
    for (arguments, driver, holder, is_taken) in [
        (&WAITS[..], "hv_utils", None, true),
        (&WAITS, "hv_utils", Some(&ours), true),
        (&WAITS, "hv_utils", Some(&theirs), false),
        // At boot, and where an administrator asks for it.
        (&["take"], "hv_utils", Some(&theirs), true),
        (&["give"], "hv_vss", None, true),
        (&["give"], "hv_vss", Some(&ours), true),
        (&["give"], "hv_vss", Some(&theirs), false),
    ] {
        let mut holds = holder.map(|it| Command::new(it).arg("1000").spawn().unwrap());
        if let Some(holds) = &holds {
            std::fs::write(dir.join("holder"), holds.id().to_string()).unwrap();
        }
        let (said, was_taken) = hand_over_whole(&dir, arguments, driver);
        if let Some(holds) = &mut holds {
            holds.kill().unwrap();
            holds.wait().unwrap();
            std::fs::remove_file(dir.join("holder")).unwrap();
        }
        assert_eq!(was_taken, is_taken, "{arguments:?} {holder:?}: {said}");
        let says = said
            .lines()
            .any(|it| it.contains("is not taken from hv_vss_daemon (process"));
        assert_eq!(says, !is_taken, "{arguments:?} {holder:?}: {said}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// By its package, or by `make install` for this kernel or for another.
#[test]
fn a_module_that_was_asked_for_and_is_not_taken_is_explained_by_what_has_brought_it() {
    let refused = "echo 'Key was rejected by service'; exit 1";
    let not_there = ("modinfo", "exit 1");
    let not_signed = ("modinfo", "");
    let signed = ("modinfo", "[ \"$1\" != -F ] || echo us");
    for (modinfo, file, has_dkms, words) in [
        (not_there, None, false, ""),
        (
            not_there,
            Some("old/updates/hv_vss.ko"),
            false,
            "not built for kernel 7.3, and is there for another",
        ),
        (
            not_there,
            Some("old/extra/hv_vss.ko.xz"),
            false,
            "(make && make install)",
        ),
        (not_there, Some("old/updates/dkms/hv_vss.ko"), false, ""),
        (not_there, None, true, "see 'dkms status hv_vss'"),
        (
            not_signed,
            None,
            false,
            "Sign it with a key that the kernel knows",
        ),
        (not_signed, None, true, "dkms build --force hv_vss/1 -k 7.3"),
        (
            signed,
            None,
            false,
            "Enrol its certificate with 'mokutil --import' and",
        ),
        (signed, None, true, "/var/lib/dkms/mok.pub"),
    ] {
        let all = [
            modinfo,
            ("modprobe", refused),
            ("uname", "echo 7.3"),
            ("logger", ""),
        ];
        let dir = programs("asked-for", &all);
        if let Some(file) = file {
            let file = dir.join("modules").join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        }
        if has_dkms {
            let folder = dir.join("src/hv_vss-1/kmod/dkms");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::copy(dir.join("logger"), folder.join("build")).unwrap();
        }
        let (said, is_taken) = hand_over_whole(&dir, &["take"], "hv_utils");
        let lines = usize::from(!words.is_empty());
        let is_it = said.contains(words) && said.lines().count() == lines;
        assert!(
            is_it && !is_taken,
            "{modinfo:?} {file:?} {has_dkms}: {said}"
        );
        assert!(has_dkms || !said.contains("dkms"), "{said}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

/// What comes of a build for a kernel by "rustc 1.82" and "gcc 14", where these are the compilers: what `rustc` says, in
/// two folders of PATH, in the second by this name, and `gcc`. The status, and what is said, `make` telling of its
/// compiler. The archive has the package rustc-1.82, as Ubuntu's.
fn build(why_not: bool, rustc: [&str; 2], second: &str, gcc: &str) -> (Option<i32>, String) {
    let makes = ("make", "echo \"made by $(rustc --version)\"");
    let all = [
        ("rustc", rustc[0]),
        ("gcc", gcc),
        ("bindgen", ""),
        makes,
        ("logger", ""),
        (
            "apt-cache",
            "[ \"$3\" != rustc-1.82 ] || echo \"Package: $3\"",
        ),
    ];
    // Several tests build at a time.
    static BUILDS_BEGUN: AtomicU32 = AtomicU32::new(0);
    let number = BUILDS_BEGUN.fetch_add(1, Ordering::Relaxed);
    let dir = programs(&format!("build-{number}"), &all);
    let second = programs(&format!("build-{number}/second"), &[(second, rustc[1])]);
    let rust = dir.join("headers/rust");
    std::fs::create_dir_all(&rust).unwrap();
    const CONFIG: &str =
        "CONFIG_RUST=y\nCONFIG_HYPERV_VMBUS=m\nCONFIG_CC_VERSION_TEXT=\"gcc 14\"\n";
    std::fs::write(dir.join("headers/.config"), CONFIG).unwrap();
    std::fs::write(rust.join("libkernel.rmeta"), "").unwrap();
    // Of 16 bytes nothing is asked.
    let wrote = [&[0; 16][..], &[10], b"rustc 1.82 and so on"].concat();
    std::fs::write(rust.join("libcore.rmeta"), wrote).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{}:{path}", dir.display(), second.display());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(BUILDS);
    let made_for = text_of("../Kbuild");
    let made_for = made_for
        .lines()
        .find_map(|it| it.strip_prefix("hv_vss_kernels := "));
    let release = format!("{}.0-test", made_for.unwrap().split(' ').next().unwrap());
    let mut bash = Command::new("bash");
    let bash = bash.arg(script).args(why_not.then_some("--why-not"));
    let bash = bash.arg(release).arg(dir.join("headers"));
    let ended = bash.current_dir(&dir).env("PATH", path).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let said = [ended.stdout, ended.stderr].concat();
    (ended.status.code(), String::from_utf8(said).unwrap())
}

/// DKMS leaves the kernel out then, and its package is installed all the same.
#[test]
fn whatever_goes_wrong_with_a_compiler_the_module_is_refused() {
    const RIGHT: &str = "echo rustc 1.82";
    const OTHER: &str = "echo rustc 2";
    const FAILS: &str = "exit 1";
    const GCC: &str = "echo gcc 14";
    for (rustc, gcc, says) in [
        (
            [OTHER, OTHER],
            GCC,
            "the compiler here is 'rustc 2'; install rustc-1.82",
        ),
        ([FAILS, FAILS], GCC, "it was built by 'rustc 1.82', "),
        (
            [RIGHT, RIGHT],
            "echo gcc 13",
            "the compiler here is 'gcc 13'",
        ),
        ([RIGHT, RIGHT], FAILS, "--version"),
    ] {
        let line = |said: &str| {
            let is_one = said.lines().count() == 1;
            is_one && said.starts_with("hv_vss is not built for kernel") && said.contains(says)
        };
        let (status, said) = build(false, rustc, "rustc", gcc);
        assert!(status == Some(77) && line(&said), "{status:?} {said}");
        let (status, said) = build(true, rustc, "rustc", gcc);
        assert!(status == Some(0) && line(&said), "{status:?} {said}");
    }
}

#[test]
fn a_kernel_that_is_too_old_is_refused_with_the_name_of_a_newer_one() {
    let has = |name: &str, version: &str, suite: &str| {
        format!("{name} | {version} | http://mirror.invalid/debian {suite}/main amd64 Packages\n")
    };
    const IMAGE: &str = "linux-image-cloud-amd64";
    let stock = has(IMAGE, "6.12.117-1", "trixie");
    let newer = has(IMAGE, "7.3.4-1~bpo13+1", "trixie-backports");
    let older = has(IMAGE, "7.2.9-1", "testing");
    let unknown = has(IMAGE, "7.30-1", "experimental");
    let other = has("linux-signed-amd64", "7.3.4+1", "trixie");
    let install = |suite: &str| {
        let all = ["image-cloud-amd64", "headers-cloud-amd64", "source"];
        let all = all.map(|it| format!(" linux-{it}/{suite}")).concat();
        format!("; 'apt install{all}', and reboot")
    };
    for (archive, says) in [
        (String::new(), String::new()),
        ([&*stock, &other].concat(), String::new()),
        (
            [&*unknown, &newer, &stock, &older].concat(),
            install("trixie-backports"),
        ),
        ([&*stock, &older].concat(), install("testing")),
    ] {
        for release in ["6.12.48+deb13-cloud-amd64", "6.1.0-13-cloud-amd64"] {
            let cache = format!("[ \"$*\" = 'madison {IMAGE}' ] && cat <<END\n{archive}END");
            let dir = programs("too-old", &[("apt-cache", &cache)]);
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(BUILDS);
            let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
            let mut bash = Command::new("bash");
            let bash = bash.arg(script).args(["--why-not", release]);
            let ended = bash.env("PATH", path).output().unwrap();
            std::fs::remove_dir_all(&dir).unwrap();
            let said = String::from_utf8_lossy(&ended.stdout);
            let expected =
                format!("hv_vss is not built for kernel {release}: it is older than 7.2{says}\n");
            assert_eq!(said, expected, "{ended:?}");
        }
    }
}

/// That of rustup may come first, with or without a tool chain.
#[test]
fn of_all_compilers_that_are_there_the_right_one_builds_the_module() {
    const RIGHT: &str = "echo rustc 1.82";
    for second in ["rustc", "rustc-1.82"] {
        for first in [RIGHT, "exit 1", "echo rustc 2"] {
            let built = build(false, [first, RIGHT], second, "echo gcc 14");
            let expected = (Some(0), "made by rustc 1.82\n".into());
            assert_eq!(built, expected, "{first} {second}");
            let asked = build(true, [first, RIGHT], second, "echo gcc 14");
            assert_eq!(asked, (Some(0), String::new()), "{first} {second}");
        }
    }
}

/// The kernel has few numbers for many reasons.
#[test]
fn why_the_kernel_has_refused_the_module_is_told_apart() {
    const EPERM: &str = "modprobe: ERROR: could not insert 'hv_vss': Operation not permitted";
    const REJECTED: &str =
        "modprobe: ERROR: could not insert 'hv_vss': Key was rejected by service";
    const OTHER: &str = "modprobe: ERROR: could not insert 'hv_vss': Exec format error";
    let functions = [
        "is_barred_at_boot",
        "newest_build",
        "rebuild",
        "why_refused",
    ];
    let functions = functions.map(|it| function_of(HANDS_OVER, it));
    let text = format!(
        "set -u\ncommand_line=line closed=closed lockdown=lockdown sources=src\n{}\nwhy_refused \"$1\"",
        functions.join("\n")
    );
    const AGAIN: &str =
        "dkms build --force hv_vss/0.10.0 -k 7.3 && dkms install --force hv_vss/0.10.0 -k 7.3";
    const STRICT: &str = "none [integrity] confidentiality";
    for (said, line, closed, lockdown, signer, words) in [
        (
            EPERM,
            "quiet",
            "0",
            STRICT,
            "us",
            "the kernel does not know the key",
        ),
        (
            REJECTED,
            "quiet",
            "0",
            "",
            "us",
            "the kernel does not know the key",
        ),
        (
            EPERM,
            "quiet",
            "0",
            "",
            "us",
            "the kernel does not know the key",
        ),
        (EPERM, "quiet", "0", STRICT, "", "it is not signed"),
        (REJECTED, "quiet", "0", "", "", "it is not signed"),
        (REJECTED, "quiet", "0", "", "", AGAIN),
        (
            EPERM,
            "ro module_blacklist=a,hv_vss,b",
            "0",
            STRICT,
            "us",
            "command line",
        ),
        (
            EPERM,
            "module_blacklist=hv_vss",
            "0",
            "",
            "",
            "command line",
        ),
        (
            EPERM,
            "module_blacklist=hv_vss2,a_hv_vss",
            "0",
            STRICT,
            "",
            "not signed",
        ),
        (EPERM, "quiet", "1", STRICT, "", "modules_disabled"),
        (EPERM, "quiet", "0", "[none] integrity", "", EPERM),
        (OTHER, "module_blacklist=hv_vss2", "0", STRICT, "", OTHER),
    ] {
        let modinfo = format!("echo {signer}");
        let dir = programs("refused", &[("modinfo", &modinfo), ("uname", "echo 7.3")]);
        for version in ["0.9.0", "0.10.0"] {
            let folder = dir.join(format!("src/hv_vss-{version}/kmod/dkms"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::copy(dir.join("uname"), folder.join("build")).unwrap();
        }
        for (name, text) in [("line", line), ("closed", closed), ("lockdown", lockdown)] {
            std::fs::write(dir.join(name), format!("{text}\n")).unwrap();
        }
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", &text, "sh", said]).current_dir(&dir);
        let shell = shell.env("PATH", format!("{}:{path}", dir.display()));
        let ended = shell.output().unwrap();
        let why = String::from_utf8_lossy(&ended.stdout);
        let is_one = why.lines().count() == 1 && ended.stderr.is_empty();
        assert!(is_one && why.contains(words), "{said} {line}: {ended:?}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn one_server_that_is_locked_is_not_taken_for_two() {
    let dir = programs(
        "two-servers",
        &[
            ("pidof", "echo 7 8"),
            ("readlink", "echo 'pid:[1]'"),
            ("mariadb", "exit 1"),
        ],
    );
    let ended = freeze(MARIADB, &dir);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.code() == Some(1) && said.starts_with("2 servers are running (processes 7 8)"),
        "{ended:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A server to be found, and a client of one that calls itself `VERSION`, whose session is the thread `THREAD`, if it
/// tells, and whose `pid_file` has `NUMBER`. The hook has its session here.
struct Server {
    dir: std::path::PathBuf,
    process: std::process::Child,
}

impl Server {
    fn new(name: &str) -> Server {
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let found = format!("echo {}", process.id());
        let client = "echo \"$*\" >\"${0%/*}/arguments\"
            while read -r line; do
                case $line in
                *VERSION*) echo a warning; echo \"$VERSION\" ;;
                *\"'thread '\"*) [ -z \"$THREAD\" ] || echo \"thread $THREAD\" ;;
                *\"'pid_file '\"*) echo \"pid_file ${0%/*}/number\" ;;
                *\"'running '\"*) echo running 0 ;;
                *\"'locked'\"*) echo >\"${0%/*}/locked\"; echo locked ;;
                *held*) echo held ;;
                *) exit ;;
                esac
            done";
        let dir = programs(name, &[("pidof", &found), ("mariadb", client)]);
        let hook = text_of(MARIADB);
        let ours = format!("session={}", dir.join("session").display());
        let hook = hook.replace("session=/run/hv_vss_hooks/mariadb", &ours);
        std::fs::write(dir.join("hook"), hook).unwrap();
        Server { dir, process }
    }

    fn call(&self, verb: &str, version: &str, thread: &str, number: &str) -> Command {
        std::fs::write(self.dir.join("number"), format!("{number}\n")).unwrap();
        let path = format!("{}:{}", self.dir.display(), std::env::var("PATH").unwrap());
        let mut shell = Command::new("/bin/sh");
        shell.arg(self.dir.join("hook")).arg(verb).env("PATH", path);
        shell.env("VERSION", version).env("THREAD", thread);
        shell
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Root's own configuration may lead the client to that of a container, which is not what is copied.
#[test]
fn the_server_that_is_locked_is_the_one_that_was_found() {
    let server = Server::new("led-astray");
    let (own, other) = (
        server.process.id().to_string(),
        std::process::id().to_string(),
    );
    let (own, other) = (own.as_str(), other.as_str());
    const MARIADB_11: &str = "11.8.3-MariaDB-0+deb13u1";
    const LED: &str = "the client is led to another server";
    const UNKNOWN: &str = "it is not known whether the client is led to";
    for (version, thread, number, why_not) in [
        (MARIADB_11, own, own, None),
        // Its file need not be readable, and another's has the same name.
        (MARIADB_11, own, "", None),
        (MARIADB_11, other, own, Some(LED)),
        ("10.5.29-MariaDB-0+deb11u1", other, own, Some(LED)),
        ("8.4.3", own, "", None),
        ("8.4.3", other, own, Some(LED)),
        // Without a performance schema, or of an age.
        ("8.4.3", "", own, None),
        ("8.4.3", "", other, Some(UNKNOWN)),
        ("5.5.68-MariaDB", "", own, None),
        ("5.5.68-MariaDB", "", "", Some(UNKNOWN)),
    ] {
        let what = format!("{version} {thread} {number}");
        let ended = server
            .call("freeze", version, thread, number)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        let was_locked = std::fs::remove_file(server.dir.join("locked")).is_ok();
        assert_eq!(
            ended.status.success(),
            why_not.is_none(),
            "{what}: {ended:?}"
        );
        // Nobody else's is, for nothing.
        assert_eq!(was_locked, why_not.is_none(), "{what}: {ended:?}");
        if let Some(why_not) = why_not {
            let is_it = said.contains(why_not) && said.contains(version) && said.contains(own);
            assert!(is_it, "{what}: {ended:?}");
        }
        let ended = server
            .call("thaw", version, thread, number)
            .output()
            .unwrap();
        assert!(ended.status.success(), "{what}: {ended:?}");
        assert!(!server.dir.join("session").exists());
    }
}

/// It would call a server locked after an error, or lose the lock and go on, or write what nobody understands.
#[test]
fn what_an_administrators_client_does_by_choice_the_hooks_does_not() {
    let server = Server::new("choices");
    let own = server.process.id().to_string();
    for verb in ["freeze", "thaw"] {
        let ended = server
            .call(verb, "11.8.3-MariaDB", &own, &own)
            .output()
            .unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
    let arguments = std::fs::read_to_string(server.dir.join("arguments")).unwrap();
    for overruled in [
        "force",
        "reconnect",
        "table",
        "vertical",
        "html",
        "xml",
        "binary-mode",
    ] {
        let overruled = format!(" --skip-{overruled} ");
        assert!(arguments.contains(&overruled), "{overruled}: {arguments}");
    }
    for chosen in [" --delimiter=; ", " --init-command=DO 0"] {
        assert!(arguments.contains(chosen), "{chosen}: {arguments}");
    }
}

/// The lock is gone then, and the client does not say so before it is asked.
#[test]
fn a_session_whose_server_has_ended_ends_so_that_the_daemon_sees_it() {
    use std::os::unix::process::CommandExt as _;
    let mut server = Server::new("server-ends");
    let own = server.process.id().to_string();
    let mut hook = server.call("freeze", "11.8.3-MariaDB", &own, &own);
    let mut hook = hook.process_group(0).spawn().unwrap();
    let group = nix::unistd::Pid::from_raw(hook.id().try_into().unwrap());
    assert!(hook.wait().unwrap().success());
    let is_there = || nix::sys::signal::killpg(group, None).is_ok();
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(is_there());
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while is_there() {
        assert!(std::time::Instant::now() < until, "it is there still");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let ended = server.call("thaw", "", "", "").output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.code() == Some(1) && said.contains("had ended before"),
        "{ended:?}"
    );
}

#[test]
fn a_server_in_a_container_is_not_one_of_this_machine() {
    let readlink = "case $1 in */[89]/*) echo 'pid:[2]' ;; *) echo 'pid:[1]' ;; esac";
    // Without a client it ends when it has counted them.
    const ONE: &str = "1 server in a container (process 8) is not held\n";
    for (servers, named, expected) in [
        ("7", "", "a server is running"),
        ("7 8", ONE, "a server is running"),
        ("8", ONE, "no other server is running"),
        (
            "8 9",
            "2 servers in containers (processes 8 9) are not held\n",
            "no other server is running",
        ),
        ("", "", "no server is running"),
    ] {
        let pidof = format!("echo {servers}");
        let all = [("pidof", &*pidof), ("readlink", readlink)];
        let dir = programs("in-a-container", &all);
        let ended = freeze(MARIADB, &dir);
        let said = [ended.stdout, ended.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let begin = format!("{named}{expected}");
        assert!(said.starts_with(&begin), "{servers}: {said}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

/// What the hook of PostgreSQL needs of the system, and these.
fn programs_for_postgresql(name: &str, these: &[(&str, &str)]) -> std::path::PathBuf {
    let system = [
        ("cat", "exec /bin/cat"),
        ("setsid", "exec /usr/bin/setsid \"$@\""),
    ];
    programs(name, &[&system, these].concat())
}

#[test]
fn a_cluster_that_does_not_let_itself_be_looked_at_fails_no_backup() {
    let hangs = "[ \"$1\" = --no-header ] && exec /bin/sleep 60";
    let all = [
        ("pidof", "echo 7"),
        ("timeout", "exec /usr/bin/timeout \"$@\""),
        ("pg_lsclusters", hangs),
    ];
    let dir = programs_for_postgresql("hangs", &all);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks/postgresql");
    let mut shell = Command::new("/bin/sh");
    let shell = shell.arg(path).arg("freeze").env("PATH", &dir);
    let ended = shell.env("HV_VSS_LIMIT", "1").output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(
        ended.status.success() && said.contains("not all has answered in time"),
        "{ended:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_checkpoint_is_waited_for_no_longer_than_its_call_may_take() {
    // Its own limit comes last: it is that of what it waits for.
    let said = "[ \"$2\" != cat ] || cat; echo \"$1\"";
    let all = [("pidof", "echo 7"), ("timeout", said)];
    let dir = programs_for_postgresql("limit", &all);
    for (limit, expected) in [
        (None, ["20", "25"]),
        (Some("30"), ["20", "25"]),
        (Some("3600"), ["20", "25"]),
        (Some("10"), ["6.6", "8.3"]),
        (Some("1"), ["0.6", "0.8"]),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks/postgresql");
        let mut shell = Command::new("/bin/sh");
        let shell = shell.arg(path).arg("freeze").env("PATH", &dir);
        let ended = shell.envs(limit.map(|it| ("HV_VSS_LIMIT", it))).output();
        let ended = ended.unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        let limits: Vec<_> = said.lines().filter(|it| !it.contains(' ')).collect();
        assert_eq!(limits, expected, "{limit:?}: {ended:?}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn each_cluster_of_debian_is_asked_by_its_name() {
    let list = "cat <<END
16 old 5433 online postgres /var/lib/postgresql/16/old /log
17 app 5434 online app /srv/app /log
17 copy 5435 online,recovery postgres /var/lib/postgresql/17/copy /log
17 down 5436 down postgres /var/lib/postgresql/17/down /log
END";
    let all = [
        ("pidof", "echo 7"),
        ("id", "echo 7"),
        ("pg_lsclusters", list),
        ("timeout", "shift; exec \"$@\""),
        ("setpriv", "echo \"$1\" \"$7\" \"$8\" \"$9\""),
    ];
    let dir = programs_for_postgresql("clusters", &all);
    let ended = freeze("hooks/postgresql", &dir);
    let said = String::from_utf8_lossy(&ended.stdout);
    let mut asked: Vec<&str> = said.lines().collect();
    asked.sort_unstable();
    assert_eq!(
        asked,
        [
            "--reuid=app --no-password --cluster 17/app",
            "--reuid=postgres --no-password --cluster 16/old",
        ],
        "{ended:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
}

/// What this script of the module's package asks of the hand-over, called so, where systemd runs: in a container or not.
fn asked_of_hand_over(script: &str, verb: &str, in_container: bool) -> String {
    let all = [
        ("hand_over", "echo \"$1\" >>said; [ $1 != settle ]"),
        (
            "systemd-detect-virt",
            match in_container {
                true => "[ $1 = -qc ]",
                false => "exit 1",
            },
        ),
    ];
    let dir = programs(&format!("{verb}-{in_container}"), &all);
    let text = text_of(script)
        .replace("/usr/libexec/hv_vss_hand_over", "./hand_over")
        .replace("/lib/modules", "./modules")
        .replace("/run/systemd/system", ".");
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &text, "sh", verb]).current_dir(&dir);
    let shell = shell.env("DKMS_VERSION", "0.1.0").env("PATH", path);
    let ended = shell.output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let said = std::fs::read_to_string(dir.join("said")).unwrap_or_default();
    std::fs::remove_dir_all(&dir).unwrap();
    said
}

/// What the module's package says when it is configured, and for which kernels it has the module built: by these
/// arguments, with the module there for some kernels (`modules/*/has`), an obstacle to its build for others
/// (`modules/*/why-not`), and loaded or not.
fn configures_module(arguments: &[&str], is_loaded: bool) -> (String, String) {
    configures_module_where(arguments, is_loaded, None)
}

/// The same, where that of the version before was kept for the kernel `kept`.
fn configures_module_where(
    arguments: &[&str],
    is_loaded: bool,
    kept: Option<&str>,
) -> (String, String) {
    let build = "[ $1 = --why-not ] && cat modules/$2/why-not 2>/dev/null";
    let modinfo = "if [ $1 = -k ]; then [ -e modules/$2/has ]; else [ -e modules/running/has ]; fi";
    // It has forgotten what was kept then.
    let dkms = "echo \"$7\" >>asked; touch modules/$7/has; rm -rf modules/$7/updates";
    let all = [("modinfo", modinfo), ("dkms", dkms), ("build", build)];
    let dir = programs("configures-module", &all);
    for (kernel, file) in [
        ("running", "why-not"),
        ("newest", "has"),
        ("older", "headers"),
    ] {
        let folder = dir.join("modules").join(kernel);
        std::fs::create_dir_all(folder.join("build")).unwrap();
        std::fs::write(folder.join(file), format!("not for {kernel}\n")).unwrap();
    }
    if let Some(kept) = kept {
        let folder = dir.join("modules").join(kept);
        std::fs::create_dir_all(folder.join("updates/hv_vss")).unwrap();
        std::fs::write(folder.join("has"), "").unwrap();
    }
    let (loaded, text) = (dir.join("loaded"), text_of(INSTALLS_MODULE));
    if is_loaded {
        std::fs::write(&loaded, "").unwrap();
    }
    let text = text
        .replace("\"$source/kmod/dkms/build\"", "./build")
        .replace("/lib/modules", "./modules")
        .replace("/sys/module/hv_vss", "./loaded")
        .replace("/run/systemd/system", "./no-systemd");
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &text, "sh"]).args(arguments);
    let shell = shell.current_dir(&dir).env("DKMS_VERSION", "0.1.0");
    let ended = shell.env("PATH", path).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let asked = std::fs::read_to_string(dir.join("asked")).unwrap_or_default();
    std::fs::remove_dir_all(&dir).unwrap();
    (String::from_utf8(ended.stdout).unwrap(), asked)
}

/// What is left there for `kernel`, in the folders of DKMS and of what was kept.
fn modules_of(dir: &Path, kernel: &str) -> [Option<String>; 2] {
    let updates = dir.join("modules").join(kernel).join("updates");
    ["dkms", "hv_vss"].map(|it| std::fs::read_to_string(updates.join(it).join("hv_vss.ko.xz")).ok())
}

/// The source of an older kernel goes when that of the next comes, and DKMS cannot build the new module for it then.
#[test]
fn an_upgrade_leaves_a_kernel_the_module_that_it_has_until_there_is_another() {
    let dir = programs("keeps", &[("depmod", "echo \"$*\" >>asked")]);
    let put = |path: &str, text: &str| {
        let path = dir.join("modules").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("old/kernel/there", "");
    put("old/modules.dep", "");
    put("old/updates/dkms/hv_vss.ko.xz", "the first");
    put("new/updates/dkms/hv_vss.ko.xz", "the second");
    put("none/kernel/there", "");
    put(
        "forget",
        &text_of("../kmod/dkms/forget").replace("=/lib/modules", "=modules"),
    );
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    let run = |text: &str, argument: &str| {
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", text, "sh", argument]).current_dir(&dir);
        let shell = shell.env("PATH", &path).env("DKMS_VERSION", "0.1.0");
        let ended = shell.output().unwrap();
        let is_silent = ended.stdout.is_empty() && ended.stderr.is_empty();
        assert!(ended.status.success() && is_silent, "{ended:?}");
        std::fs::read_to_string(dir.join("asked")).unwrap_or_default()
    };
    // As dpkg calls it, with what DKMS does then.
    let removes = text_of(REMOVES_MODULE)
        .replace("/lib/modules", "modules")
        .replace(
            "\"/usr/src/hv_vss-$DKMS_VERSION/kmod/dkms/forget\"",
            "sh modules/forget",
        )
        .replace("/run/systemd/system", "./no-systemd")
        .replace("#DEBHELPER#", "rm -r modules/*/updates/dkms");
    let forget = "exec sh modules/forget \"$1\"";
    let kept = |text: &str| [None, Some(text.to_owned())];
    assert_eq!(run(&removes, "upgrade"), "");
    assert_eq!(modules_of(&dir, "old"), kept("the first"));
    assert_eq!(modules_of(&dir, "new"), kept("the second"));
    assert!(!dir.join("modules/none/updates").exists());
    // DKMS installs the next one for a kernel; nobody has modules.dep there.
    assert_eq!(run(forget, "new"), "");
    assert!(!dir.join("modules/new").exists());
    put("new/updates/dkms/hv_vss.ko.xz", "the third");
    // Another upgrade: one that was kept already stays.
    run(&removes, "upgrade");
    assert_eq!(modules_of(&dir, "old"), kept("the first"));
    assert_eq!(modules_of(&dir, "new"), kept("the third"));
    put("new/updates/dkms/hv_vss.ko.xz", "the fourth");
    assert_eq!(run(&removes, "remove"), "old\n");
    for kernel in ["old", "new"] {
        assert_eq!(modules_of(&dir, kernel), [None, None], "{kernel}");
    }
    assert!(dir.join("modules/old/kernel").exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

/// DKMS takes it from all, and builds the new one for the kernel that runs and the newest.
#[test]
fn an_upgrade_of_the_module_builds_it_for_each_kernel_and_says_where_it_is_lost() {
    const WHY: &str = "not for running\n";
    let (said, asked) = configures_module(&["configure", "0.0.9"], true);
    assert_eq!(asked, "older\n");
    let rest = said.strip_prefix(WHY).unwrap();
    assert!(
        rest.contains("of this kernel again, hv_utils serves") && rest.lines().count() == 1,
        "{said}"
    );
    // Unless it was kept.
    let (said, asked) = configures_module_where(&["configure", "0.0.9"], true, Some("running"));
    assert_eq!(asked, "older\n");
    let kept = "not for running; until it is, that of the version before stays there\n";
    assert_eq!(said, kept);
    let (said, asked) = configures_module_where(&["configure", "0.0.9"], true, Some("newest"));
    assert!(
        asked.contains("newest\n") && said.starts_with(WHY),
        "{said} {asked}"
    );
    // Of a first installation it is DKMS's choice.
    let first = configures_module(&["configure", ""], false);
    assert_eq!(first, (WHY.into(), "".into()));
    let source = configures_module(&["triggered", "/usr/src/x"], false);
    assert_eq!(source, (WHY.into(), "older\n".into()));
}

/// With the device the daemon that serves it would lose the backup that is under way.
#[test]
fn a_backup_is_waited_for_before_the_module_takes_the_device() {
    const WAITS: &str = "hv_vss_hand_over: a backup is under way; waiting for its end\n";
    let status = "[ \"$1\" = status ] && [ ! -s bus/drivers/hv_utils/unbind ] || exit 9
         [ -e ended ] || { touch ended; exit 5; }";
    let there = ["modinfo", "modprobe", "logger"].map(|it| (it, ""));
    let not_there = [("modinfo", "exit 1"), ("logger", "")];
    for (programs_there, driver, says, is_taken) in [
        (&there[..], "hv_utils", WAITS, true),
        // Nothing is taken, and nobody waits.
        (&there, "hv_vss", "", false),
        (&not_there, "hv_utils", "", false),
    ] {
        let all = [programs_there, &[("hv_vss_daemon", status)]].concat();
        let dir = programs("settles", &all);
        let (said, was_taken) = hand_over_whole(&dir, &["take"], driver);
        let is_it = said.starts_with(says) && said.is_empty() == says.is_empty();
        assert!(is_it && was_taken == is_taken, "{driver}: {said}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
    let asked = asked_of_hand_over(INSTALLS_MODULE, "configure", false);
    assert_eq!(asked, "take\n");
    assert_eq!(
        asked_of_hand_over(REMOVES_MODULE, "remove", false),
        "give\n"
    );
}

/// A container with systemd may see the devices of its host, whose they are.
#[test]
fn in_a_container_the_module_takes_and_gives_no_device() {
    assert_eq!(asked_of_hand_over(INSTALLS_MODULE, "configure", true), "");
    assert_eq!(asked_of_hand_over(REMOVES_MODULE, "remove", true), "");
}

/// What `step` of an installation says, with systemd and the daemon's `can-start` as these do, and whether it has started
/// the daemon anew.
fn installs(step: &str, systemctl: &str, can_start: &str) -> (String, bool) {
    let invoke = "echo \"$*\" >>asked";
    let all = [
        ("systemctl", systemctl),
        ("daemon", can_start),
        ("deb-systemd-invoke", invoke),
        ("hand_over", invoke),
    ];
    let dir = programs("serves", &all);
    let functions = [
        "why_it_cannot_start",
        "replace_daemon",
        "tell_if_none_serves",
    ];
    let functions = functions.map(|it| function_of(CONFIGURES, it)).join("\n");
    let text = functions.replace("/usr/libexec/hv_vss_daemon", "daemon");
    let text = text.replace("/usr/libexec/hv_vss_hand_over", "hand_over");
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    let text = format!("set -e\n{text}\n{step}");
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &text]).current_dir(&dir);
    let ended = shell.env("PATH", path).output().unwrap();
    let asked = std::fs::read_to_string(dir.join("asked")).unwrap_or_default();
    std::fs::remove_dir_all(&dir).unwrap();
    // An upgrade ends well all the same.
    assert!(
        ended.status.success() && ended.stdout.is_empty(),
        "{ended:?}"
    );
    // A backup under way is waited for.
    let restarts = "settle\nrestart hv_vss.service\n";
    assert!(["", restarts].contains(&asked.as_str()), "{asked}");
    let said = String::from_utf8(ended.stderr).unwrap();
    (said, !asked.is_empty())
}

const RUNS: &str = "[ \"$*\" = '--quiet is-active hv_vss.service' ]";
const DOES_NOT_RUN: &str = "exit 3";
const CAN_START: &str = "[ \"$*\" = can-start ] && echo a warning >&2";
const CANNOT_START: &str = "echo 'a.toml is not valid: line 3' >&2; echo '  more' >&2; exit 78";

#[test]
fn an_upgrade_whose_daemon_does_not_start_says_so_and_why() {
    let none_serves = |device: &str, systemctl, can_start| {
        let step = format!("tell_if_none_serves {device}");
        let (said, is_restarted) = installs(&step, systemctl, can_start);
        assert!(!is_restarted);
        said
    };
    assert_eq!(none_serves("/dev/null", RUNS, CANNOT_START), "");
    assert_eq!(none_serves("/absent", DOES_NOT_RUN, CANNOT_START), "");
    let said = none_serves("/dev/null", DOES_NOT_RUN, CANNOT_START);
    assert_eq!(
        said,
        "hv_vss.service does not run, and each backup by the host fails until it does: a.toml is not valid: line 3; \
         see 'journalctl -u hv_vss', then 'systemctl restart hv_vss'\n"
    );
    let said = none_serves("/dev/null", DOES_NOT_RUN, CAN_START);
    assert!(said.contains("until it does: see 'journalctl"), "{said}");
}

#[test]
fn an_upgrade_puts_no_daemon_that_cannot_start_in_the_place_of_one_that_serves() {
    let replace = |systemctl, can_start| installs("replace_daemon", systemctl, can_start);
    assert_eq!(replace(RUNS, CAN_START), ("".into(), true));
    // What does not run was started before, if it is to.
    assert_eq!(replace(DOES_NOT_RUN, CAN_START), ("".into(), false));
    assert_eq!(replace(DOES_NOT_RUN, CANNOT_START), ("".into(), false));
    let (said, is_restarted) = replace(RUNS, CANNOT_START);
    assert!(!is_restarted);
    assert_eq!(
        said,
        "hv_vss.service goes on with the version of before, since this one cannot start: a.toml is not valid: line 3; \
         mend that, then 'systemctl restart hv_vss'\n"
    );
    let (said, is_restarted) = replace(RUNS, "exit 124");
    assert!(
        !is_restarted && said.contains("cannot be read in time"),
        "{said}"
    );
}
