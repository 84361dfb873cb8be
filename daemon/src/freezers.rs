// SPDX-License-Identifier: GPL-2.0-only

//! Who is in the middle of a freeze, as `/proc` tells.
//!
//! FIFREEZE says `EBUSY` of what is frozen, and before Linux 6.6 also of what somebody is freezing who still waits for
//! writers that were there before, for hours if one of those is at a balance (`freeze_super` in `fs/super.c`). Nothing
//! else shows that; but whoever waits so is a thread inside of that call. Where there is none, it is frozen as a whole.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::apart::Questions;
use crate::mounts::DevId;
use crate::process;

/// Since when a freeze waits for the end of another that is under way, before it says `EBUSY`
/// (`wait_for_partially_frozen` in `fs/super.c`).
const WAITS_FOR_OTHERS: (u32, u32) = (6, 6);

/// What a system call is told, as `/proc` has it: the request of FIFREEZE, and of the device mapper's suspension, which
/// freezes what is on a device (`DM_DEV_SUSPEND`), without the size of its argument.
const FIFREEZE: u64 = 0xc004_5877;
const SUSPEND: u64 = 0xfd06;

/// For how long it is looked who is at it, and how often at most. Whoever freezes waits for one disk write after the other
/// while it syncs, and does not in between, so that not every look shows it; whoever freezes what is frozen already does
/// not wait, but for others who do something with it.
const MOMENT: Duration = Duration::from_millis(100);
const LOOKS: u32 = 10;

/// How long that may take in all: what is read of a process may have to wait for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of the first namespace of processes, in which all are seen (`PROC_PID_INIT_INO`).
const FIRST_NAMESPACE: u64 = 0xeffffffc;

/// Why a file system that is said to be frozen, on these devices, may not be yet, in words.
pub fn under_way(dev: DevId, devices: &[DevId]) -> Option<String> {
    // The kernel that runs stays what it is.
    static WAITS: LazyLock<bool> =
        LazyLock::new(|| process::kernel_version().is_some_and(|it| it >= WAITS_FOR_OTHERS));
    if *WAITS {
        return None;
    }
    let devices = devices.to_vec();
    in_time(dev, PATIENCE, move || is_at_it(dev, &devices))
}

/// What that `look` says. If it hangs nobody knows.
fn in_time(
    dev: DevId,
    limit: Duration,
    look: impl FnOnce() -> Option<String> + Send + 'static,
) -> Option<String> {
    static ASKED: Questions<DevId> = Questions::new();
    let said = ASKED.ask(dev, &[], limit, move |_| look());
    said.unwrap_or_else(|_| Some("may be frozen by half: who is at it is not told in time".into()))
}

/// Who is at it, if anybody, in words.
fn is_at_it(dev: DevId, devices: &[DevId]) -> Option<String> {
    let proc = Path::new("/proc");
    let sees_all = fs::metadata("/proc/self/ns/pid").is_ok_and(|it| it.ino() == FIRST_NAMESPACE);
    if !sees_all {
        return Some("may be frozen by half: not all processes are seen".into());
    }
    let is_mapped = |dev: &DevId| Path::new(&format!("/sys/dev/block/{dev}/dm")).exists();
    let is_mapped = devices.iter().any(is_mapped);
    let until = Instant::now() + MOMENT;
    let looks = (0..LOOKS).map_while(|number| {
        if number > 0 {
            thread::sleep(MOMENT / LOOKS);
        }
        // Of one that takes long there are two all the same.
        (number < 2 || Instant::now() < until).then(|| waiting(proc, dev, is_mapped))
    });
    let (pid, what) = seen_twice(looks)?;
    Some(format!("{what} (process {pid}), which is not done"))
}

/// Whoever is seen by two of these looks.
fn seen_twice<T: Ord>(looks: impl Iterator<Item = BTreeSet<T>>) -> Option<T> {
    let mut seen = BTreeSet::new();
    for them in looks {
        for it in them {
            if seen.contains(&it) {
                return Some(it);
            }
            seen.insert(it);
        }
    }
    None
}

/// The threads that are, or may be, in the middle of that, each with its process and what is said of it.
fn waiting(proc: &Path, dev: DevId, is_mapped: bool) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for (pid, folder) in numbered(proc) {
        for (_, thread) in numbered(&folder.join("task")) {
            let what = at(&thread, dev, is_mapped);
            found.extend(what.map(|what| (pid.clone(), what)));
        }
    }
    found
}

/// The folders with a number for a name.
fn numbered(folder: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    let all = all.map(|it| (it.file_name().to_string_lossy().into_owned(), it.path()));
    all.filter(|(name, _)| name.bytes().all(|it| it.is_ascii_digit()))
}

/// What this thread is at, if that is a freeze of that file system, or may be.
fn at(thread: &Path, dev: DevId, is_mapped: bool) -> Option<String> {
    let stat = fs::read(thread.join("stat")).ok()?;
    if !process::waits_for_the_kernel(&stat) {
        return None;
    }
    let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
    let name = name.trim_end().escape_debug().to_string();
    let call = match fs::read_to_string(thread.join("syscall")) {
        Ok(call) => call,
        // It has ended.
        Err(_) if !thread.exists() => return None,
        Err(_) => return Some(format!("may be being frozen by {name}")),
    };
    match request_of(&call)? {
        (fd, FIFREEZE) if is_on(thread, fd, dev) => Some(format!("is being frozen by {name}")),
        (_, request) if request & 0xffff == SUSPEND && is_mapped => {
            Some(format!("may be being frozen by {name}"))
        }
        _ => None,
    }
}

/// Descriptor and request, if it is a call with such. The numbers of calls are others on each machine, and what such a
/// request is in another call nobody has for the second argument.
fn request_of(call: &str) -> Option<(u64, u64)> {
    let hexadecimal = |it: &str| u64::from_str_radix(it.strip_prefix("0x")?, 16).ok();
    let mut arguments = call.split_ascii_whitespace().skip(1).map(hexadecimal);
    Some((arguments.next()??, arguments.next()?? & 0xffff_ffff))
}

/// Whether a descriptor of a thread is on that file system, or may be: one of another namespace is in no table here. The
/// file system itself is not asked.
fn is_on(thread: &Path, fd: u64, dev: DevId) -> bool {
    let read = |path: &str| fs::read_to_string(thread.join(path)).ok();
    let found = || {
        let info = read(&format!("fdinfo/{fd}"))?;
        let id = info.lines().find_map(|it| it.strip_prefix("mnt_id:"))?;
        let table = read("mountinfo")?;
        let of_it = |line: &&str| line.split(' ').next() == Some(id.trim());
        let line = table.lines().find(of_it)?;
        line.split(' ').nth(2)?.parse::<DevId>().ok()
    };
    found().is_none_or(|it| it == dev)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn whoever_is_seen_now_and_then_is_at_it() {
        let seen = |looks: &[&[u32]]| {
            let looks = looks.iter().map(|them| them.iter().copied().collect());
            seen_twice(looks)
        };
        assert_eq!(seen(&[]), None);
        assert_eq!(seen(&[&[1, 2], &[], &[3]]), None);
        assert_eq!(seen(&[&[], &[1], &[2], &[], &[2, 3]]), Some(2));
    }

    #[test]
    fn who_is_at_it_is_not_known_if_a_look_hangs() {
        static HANGS: Barrier = Barrier::new(2);
        let dev = DevId {
            major: 8,
            minor: 77,
        };
        let hang = || {
            HANGS.wait();
            None
        };
        assert!(in_time(dev, Duration::from_millis(50), hang).is_some());
        // Nobody waits for it again.
        assert!(in_time(dev, Duration::from_secs(60), || None).is_some());
        assert!(in_time(DevId::default(), Duration::from_secs(60), || None).is_none());
        HANGS.wait();
    }

    #[test]
    fn who_waits_in_a_freeze_of_it_is_found_by_descriptor_and_mount() {
        let root = std::env::temp_dir().join(format!("hv-vss-freezers-{}", std::process::id()));
        let thread = |pid: u32, state: char, call: &str| {
            let folder = root.join(format!("{pid}/task/{pid}"));
            fs::create_dir_all(folder.join("fdinfo")).unwrap();
            let put = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
            put("stat", &format!("{pid} (a) S (b) {state} 1 1"));
            put("comm", "fsfreeze\n");
            put("syscall", call);
            put(
                "mountinfo",
                "21 1 8:1 / / rw - ext4 a rw\n22 21 8:2 / /b rw - ext4 b rw\n",
            );
            put(
                "fdinfo/3",
                "pos:\t0\nflags:\t0100000\nmnt_id:\t22\nino:\t2\n",
            );
            put("fdinfo/4", "pos:\t0\nmnt_id:\t99\n");
        };
        let ioctl =
            |fd: u32, request: &str| format!("16 0x{fd:x} {request} 0x0 0x0 0x0 0x0 0x7ff 0x7ff\n");
        let freeze = ioctl(3, "0xc0045877");
        thread(1, 'D', &freeze);
        // It is awake, in another call, and at something else.
        thread(2, 'S', &freeze);
        thread(3, 'D', "1 0x3 0x7ff0 0x10 0x0 0x0 0x0 0x7ff 0x7ff\n");
        thread(4, 'D', "running\n");
        let dev = |minor| DevId { major: 8, minor };
        let found = |minor, is_mapped| {
            let all = waiting(&root, dev(minor), is_mapped);
            all.into_iter().map(|it| it.0).collect::<Vec<_>>()
        };
        assert_eq!(found(2, true), ["1"]);
        assert_eq!(found(1, true).len(), 0);
        // One of another namespace may be any, as what is suspended.
        thread(5, 'D', &ioctl(4, "0xc0045877"));
        thread(6, 'D', &ioctl(9, "0xc138fd06"));
        assert_eq!(found(1, false), ["5"]);
        assert_eq!(found(1, true), ["5", "6"]);
        // What it waits for is not shown.
        fs::remove_file(root.join("3/task/3/syscall")).unwrap();
        assert_eq!(found(1, false), ["3", "5"]);
        fs::remove_dir_all(&root).unwrap();
    }
}
