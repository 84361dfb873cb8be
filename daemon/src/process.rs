// SPDX-License-Identifier: GPL-2.0-only

//! What the daemon and its guard do to themselves before they may freeze anything: lock their
//! memory, so that no page has to be read from a frozen disk, and get out of the way of limits.

use std::cell::Cell;
use std::fs;
use std::io::{self, Write as _};

use nix::sys::mman::{mlockall, MlockAllFlags};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::unistd::Pid;

use crate::sys;

/// How many files a process may have open that nobody has said anything else of.
const USUAL_FILES: u64 = 1024;

/// Locks what is mapped now and later: each page once it has been touched.
///
/// With `MCL_ONFAULT` pages that were never touched, most of the C library among them, do not
/// become resident, and what only the start needed is let go of first. [`crate::guard`] and
/// [`crate::job`] then go through their freeze path once, so that what they need is there.
pub fn lock_memory() -> io::Result<()> {
    sys::give_back_memory();
    sys::drop_resident_text()?;
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let flags = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault;
    Ok(mlockall(flags)?)
}

/// Allows as many descriptors as an administrator would: each frozen file system takes one.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// Makes this one that shares the processor and dies for want of memory as others do, whatever its parent does, and gives
/// it the usual limit of open files.
pub fn be_ordinary() {
    // None of it takes privilege.
    let _ = go_along();
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(USUAL_FILES), hard);
    }
    let _ = fs::write("/proc/self/oom_score_adj", "0");
}

/// Whoever freezes goes before all others on its processor: they wait for what is frozen, and each turn that one of them
/// takes between two steps makes that longer for all. Nice alone is no help there: whoever wakes up gets its turn. It
/// must wait for nobody by [yielding](std::thread::yield_now): only its like would run.
pub fn go_first() -> io::Result<()> {
    let first = sys::run_before_others(sys::THIS_THREAD, FIRST);
    GOES_FIRST.set(first.is_ok());
    first.or_else(|_| go_ahead())
}

/// Has another thread of this process [do so](go_first), or no longer.
pub fn have_go_first(thread: Pid, is_to: bool) {
    // Where that is refused, it is as quick as it is.
    let _ = match is_to {
        true => sys::run_before_others(thread, FIRST),
        false => sys::run_by_turns(thread),
    };
}

/// Whether this thread [does](go_first).
pub fn goes_first() -> bool {
    GOES_FIRST.get()
}

/// Above [`go_second`]'s, and below all that an administrator would choose.
const FIRST: i32 = 2;

thread_local! {
    static GOES_FIRST: Cell<bool> = const { Cell::new(false) };
}

/// And before all but that goes whoever gives the host the answer.
pub fn go_second() -> io::Result<()> {
    const PRIORITY: i32 = 1;
    sys::run_before_others(sys::THIS_THREAD, PRIORITY).or_else(|_| go_ahead())
}

/// Goes ahead of others, and leaves them a little: for what is waited for and may take long.
pub fn go_ahead() -> io::Result<()> {
    run_by_turns();
    sys::set_nice(-20)
}

/// Takes that back, for one that only waits and must not be in the way.
pub fn go_along() -> io::Result<()> {
    run_by_turns();
    sys::set_nice(0)
}

fn run_by_turns() {
    GOES_FIRST.set(false);
    // Where that is refused, so was the other.
    let _ = sys::run_by_turns(sys::THIS_THREAD);
}

/// Dies at once when it dies: without a dump of core. That would be written to what this process has frozen,
/// by itself or by the program that the kernel starts for it, and until then neither its device is closed
/// nor its guard told.
pub fn leave_no_dump() -> io::Result<()> {
    Ok(nix::sys::prctl::set_dumpable(false)?)
}

/// Makes a panic in any thread the end of the process: whoever minds what is frozen thaws it then. A
/// daemon with a thread missing would go on to tell its watchdog that all is well.
///
/// Why it panicked goes to the kernel's log. Standard error may be on a disk that is frozen.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tell_kernel(&panic.to_string());
        std::process::abort();
    }));
}

/// The first two numbers of the kernel's version, where those tell what nothing else does.
pub fn kernel_version() -> Option<(u32, u32)> {
    version_in(&fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

/// Of a release such as "6.12.117+deb13-amd64".
fn version_in(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Puts a line into the kernel's log, which waits for no disk.
pub fn tell_kernel(text: &str) {
    let text = format!("hv_vss_daemon: {text}\n");
    let kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    // There is nobody to tell if that fails.
    let _ = kmsg.and_then(|mut kmsg| kmsg.write_all(text.as_bytes()));
}

/// As much of `/proc/<pid>/stat` as tells the state of a process: the longest name has 64 bytes there.
pub const STAT_BYTES: usize = 512;

/// Whether what `/proc/<pid>/stat` says of a process means that it has ended, though a thread of it
/// may still be inside the kernel.
pub fn has_ended(stat: &[u8]) -> bool {
    matches!(state_in(stat), Some(b'Z' | b'X' | b'x') | None)
}

/// The name, field 2, is in parentheses and may itself hold any character; the state follows it.
fn state_in(stat: &[u8]) -> Option<u8> {
    let after = stat.iter().rposition(|&b| b == b')').unwrap_or(0);
    stat.get(after + 2).copied()
}

/// Whether there is no such process, or only what is left of it, or what does nothing any more but end: it has yet to
/// come to its turn for that where others go before it.
pub fn is_dead(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/stat")).map_or(true, |stat| is_dead_by(&stat, pid))
}

/// Whether it is [dead](is_dead) and listed all the same: it, or a thread of it, is still inside the kernel and has open
/// what the process had, or nobody has asked how it ended.
pub fn lingers(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_dead_by(&stat, pid))
}

fn is_dead_by(stat: &[u8], pid: u32) -> bool {
    let is_killed = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        is_killed_by(&status)
    };
    has_ended(stat) || ends_by(stat) || is_killed()
}

/// Whether it closes by now what it had open: `PF_EXITING` of `linux/sched.h`, in field 9.
fn ends_by(stat: &[u8]) -> bool {
    const EXITING: u64 = 0x4;
    field_in(stat, 6).is_some_and(|flags| flags & EXITING != 0)
}

/// Whether nothing of it is run any more that is not inside the kernel: SIGKILL has come to it, be it by another signal
/// that ends it.
fn is_killed_by(status: &str) -> bool {
    ["SigPnd:", "ShdPnd:"]
        .iter()
        .any(|mask| is_in(status, mask, libc::SIGKILL))
}

/// When a process that has not ended was started, in ticks since the machine was: with its number it
/// tells it from any other.
pub fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    (!has_ended(&stat)).then(|| start_in(&stat))?
}

/// Whether that process, and not another of its number, is stopped: by a signal or by a tracer.
pub fn is_stopped((pid, start): (u32, u64)) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    start_in(&stat) == Some(start) && is_stopped_by(&stat)
}

/// Whether it means that it waits in the kernel, and no signal ends that.
pub fn waits_for_the_kernel(stat: &[u8]) -> bool {
    state_in(stat) == Some(b'D')
}

/// Whether what `/proc/<pid>/stat` says of a process means that it is stopped.
pub fn is_stopped_by(stat: &[u8]) -> bool {
    matches!(state_in(stat), Some(b'T' | b't'))
}

/// A process of this group that is not [dead](is_dead), with the time of its start.
pub fn member_of(group: u32) -> Option<(u32, u64)> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|it| it.file_name().to_str()?.parse().ok());
    pids.into_iter().find_map(|pid: u32| {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        let is_one = field_in(&stat, 2) == Some(group.into()) && !is_dead_by(&stat, pid);
        is_one.then_some((pid, start_in(&stat)?))
    })
}

/// Field 22 of `/proc/<pid>/stat`, counted from 1.
fn start_in(stat: &[u8]) -> Option<u64> {
    field_in(stat, 19)
}

/// The number in a field that is so many after the state, which is field 3. The name, field 2, may hold any character.
fn field_in(stat: &[u8], number: usize) -> Option<u64> {
    let after = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(stat.get(after + 1..)?).ok()?;
    rest.split_whitespace().nth(number)?.parse().ok()
}

/// Whether this process was started so that this signal does nothing.
pub fn ignores(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    is_in(&status, "SigIgn:", signal)
}

/// Whether the line of `/proc/<pid>/status` that begins so has this signal.
fn is_in(status: &str, line: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|it| it.strip_prefix(line));
    let mask = mask.and_then(|it| u64::from_str_radix(it.trim(), 16).ok());
    mask.unwrap_or_default() >> (signal - 1) & 1 == 1
}

/// Makes the kernel never choose this process when memory runs out (proc(5), `oom_score_adj`).
pub fn escape_oom_killer() -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "-1000")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::ptrace;
    use nix::sys::wait::{waitpid, WaitStatus};
    use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
    use std::process::Command;

    #[test]
    fn a_release_tells_its_version() {
        assert_eq!(version_in("6.12.117+deb13-amd64\n"), Some((6, 12)));
        assert_eq!(version_in("7.4-rc1"), Some((7, 4)));
        assert_eq!(version_in("strange"), None);
    }

    #[test]
    fn a_panic_in_any_thread_ends_the_process() {
        // It is run once more, in a process of its own, by itself.
        const CHILD: &str = "HV_VSS_TEST_PANICS";
        const NAME: &str = "process::tests::a_panic_in_any_thread_ends_the_process";
        if std::env::var_os(CHILD).is_some() {
            abort_on_panic();
            let thread = std::thread::spawn(|| panic!("as it should"));
            // It does not come to this.
            let _ = thread.join();
            return;
        }
        let this = std::env::current_exe().unwrap();
        let ended = Command::new(this)
            .args(["--exact", NAME])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:?}");
    }

    #[test]
    fn the_start_of_a_process_is_read_whatever_its_name() {
        let stat = b"7 (x) y) S 1 7 7 0 -1 1 2 3 4 5 6 7 8 9 20 0 1 0 4711 99 100";
        assert_eq!(start_in(stat), Some(4711));
        assert_eq!(start_in(b"7 (x) S 1"), None);
        assert_eq!(field_in(b"7 (x) 1 9) S 1 4 7", 2), Some(4));
        assert!(start_of(std::process::id()).is_some());
        assert!(is_dead(u32::MAX) && !lingers(u32::MAX));
        assert!(!lingers(std::process::id()));
    }

    #[test]
    fn what_is_ignored_is_told_by_its_bit() {
        let status =
            "SigBlk:\t0000000000000004\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(is_in(status, "SigIgn:", libc::SIGHUP) && is_in(status, "SigIgn:", libc::SIGPIPE));
        assert!(
            !is_in(status, "SigIgn:", libc::SIGINT) && !is_in(status, "SigIgn:", libc::SIGQUIT)
        );
        assert!(!is_in("", "SigIgn:", libc::SIGHUP));
        // As Rust starts each program.
        assert!(ignores(libc::SIGPIPE));
    }

    #[test]
    fn a_zombie_has_ended_whatever_its_name() {
        assert!(has_ended(b"7 (a) S (b) Z 1 7 7"));
        assert!(has_ended(b""));
        assert!(!has_ended(b"7 (hv_vss_daemon) D 1 7 7"));
        assert!(!has_ended(b"7 (x) Z) S 1 7 7"));
    }

    #[test]
    fn one_that_has_but_to_end_is_dead() {
        assert!(ends_by(b"7 (x) R 1 7 7 0 -1 4194308 1 2"));
        assert!(!ends_by(b"7 (x) R 1 7 7 0 -1 4194304 1 2"));
        let mut sleep = Command::new("sleep");
        let mut child = sleep.arg("1000").process_group(0).spawn().unwrap();
        let (id, pid) = (child.id(), Pid::from_raw(child.id().try_into().unwrap()));
        // It stops before it has closed anything.
        ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACEEXIT).unwrap();
        assert!(!is_dead(id) && member_of(id).is_some());
        child.kill().unwrap();
        assert!(is_dead(id) && lingers(id) && member_of(id).is_none());
        let stopped = waitpid(pid, None).unwrap();
        assert!(
            matches!(stopped, WaitStatus::PtraceEvent(..)),
            "{stopped:?}"
        );
        assert!(start_of(id).is_some(), "it has ended");
        assert!(is_dead(id) && lingers(id) && member_of(id).is_none());
        ptrace::cont(pid, None).unwrap();
        child.wait().unwrap();
    }
}
