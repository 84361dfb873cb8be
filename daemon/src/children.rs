// SPDX-License-Identifier: GPL-2.0-only

//! Starts processes.
//!
//! From its fork to its exec a process has open what its parent had, and that exec may take as long as anything: a
//! security agent that judges it may wait for a disk that is frozen. So long the device would not be released
//! although this process is dead, nor the locks, and whoever starts it would hang. So it is started by a thread that
//! has nothing open but what the new process is to have, and whoever wants it waits for as long as they like. Until
//! the exec it shares that thread's memory (`vfork`): no page of what is locked is made to be copied, and nothing is
//! done on the way. It begins as this very program, which is in memory, and makes of itself what it is to be. What it is
//! started for it does not know.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError, SendError};
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::SigSet;
use nix::sys::socket::{send, MsgFlags};

use crate::apart::Questions;
use crate::process;

/// What a process begins as that becomes another program, on the command line of `hv_vss_daemon`; not for people.
pub const SUBCOMMAND: &str = "become";

/// How many of a kind may hang in their start before no more of it is started.
const MOST_HANGING: usize = 8;
/// How long a process waits to become another program. The word for it is said within a moment.
const PATIENCE: Duration = Duration::from_secs(60);
/// The exit status of one that waited in vain.
pub(crate) const NO_WORD: u8 = 125;

static STARTS: Questions<&'static str> = Questions::up_to(MOST_HANGING);

/// A process that is being started. When this is dropped before it was there it is killed once it is, and reaped.
pub struct Starting(Receiver<io::Result<Child>>);

impl Starting {
    /// The process, or why there is none, if that is known within this time.
    pub fn within(&self, limit: Duration) -> Option<io::Result<Child>> {
        match self.0.recv_timeout(limit) {
            Ok(started) => Some(started),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(io::Error::other("nobody starts it"))),
        }
    }

    /// The same for whoever goes without it then: an error of [`io::ErrorKind::TimedOut`].
    pub fn in_time(&self, limit: Duration) -> io::Result<Child> {
        self.within(limit).unwrap_or_else(|| Err(silent()))
    }
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

/// A command line for this very program, in memory as it is.
pub fn this_program(subcommand: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("hv_vss_daemon").arg(subcommand);
    command
}

/// One for a process that becomes `program` once a byte comes over its standard input, in the root and with what every
/// process has of the processor, of memory and of open files.
pub fn becoming(program: impl AsRef<OsStr>) -> Command {
    let mut command = this_program(SUBCOMMAND);
    command.arg(program);
    command
}

/// Has it started, with copies of these as its standard input, output and error; those that are not there lead nowhere.
/// `command` must not set any of them, and nothing that is done before the exec. `kind` tells it from what may be started
/// although that hangs.
pub fn start(
    kind: &'static str,
    mut command: Command,
    fds: &[BorrowedFd<'_>],
) -> io::Result<Starting> {
    // What is sent is taken, or comes back: nothing is left in between.
    let (tell, told) = sync_channel(0);
    STARTS.put(kind, fds, move |fds| {
        let mut fds = fds.into_iter().map(Stdio::from);
        let mut next = || fds.next().unwrap_or_else(Stdio::null);
        command.stdin(next()).stdout(next()).stderr(next());
        let started = command.spawn();
        drop(command);
        if let Err(SendError(Ok(mut late))) = tell.send(started) {
            // One that has ended by itself is reaped all the same.
            let _ = late.kill();
            let _ = late.wait();
        }
    })?;
    Ok(Starting(told))
}

/// Becomes the first of `args`, called with the others, once standard input has the word for it. It returns only
/// when that fails, with the exit status that a shell has then. Why it failed goes back to where the word came from, as
/// the number of the error, if that is a socket, which is closed once it is the other program; else to standard error.
pub fn become_other(mut args: impl Iterator<Item = OsString>) -> u8 {
    process::be_ordinary();
    // Whoever has started it has them blocked.
    let _ = SigSet::empty().thread_set_mask();
    if !has_word(&io::stdin()) {
        // Whoever would have called is dead, and nobody knows of this call.
        return NO_WORD;
    }
    let from = io::stdin().as_fd().try_clone_to_owned();
    let path = args.next().unwrap_or_default();
    let mut other = Command::new(&path);
    let error = other
        .args(args)
        .stdin(Stdio::null())
        .current_dir("/")
        .exec();
    let number = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
    let told = from.map(|it| send(it.as_raw_fd(), &number, MsgFlags::MSG_NOSIGNAL));
    if !matches!(told, Ok(Ok(_))) {
        // If not, the exit status says as much.
        let _ = writeln!(io::stderr(), "it cannot be run: {error}");
    }
    match error.kind() {
        io::ErrorKind::NotFound => 127,
        _ => 126,
    }
}

/// Waits for the word. That a dead process cannot give it is not seen as long as a thread of that is inside the
/// kernel, which keeps all open: so not for ever.
fn has_word(input: &io::Stdin) -> bool {
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let has_come = matches!(poll(&mut fds, timeout), Ok(1));
    has_come && matches!(input.lock().read(&mut [0]), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::time::Instant;

    /// What `main` does with such a first argument: these tests start this very program, too.
    #[used]
    #[expect(
        unsafe_code,
        reason = "the linker puts it where what runs first is looked for"
    )]
    #[link_section = ".init_array"]
    static BEGIN: extern "C" fn() = {
        extern "C" fn begin() {
            let mut args = std::env::args_os().skip(1);
            if args.next().is_some_and(|it| it == SUBCOMMAND) {
                std::process::exit(become_other(args).into());
            }
        }
        begin
    };

    /// Longer than any step of a test takes.
    const LONG: Duration = Duration::from_secs(60);

    /// One that hangs on the way to its exec, says who it is and in how many descriptors it has `ours` open, and goes on
    /// when told to.
    #[expect(
        unsafe_code,
        reason = "it hangs where a child does that does not come to its exec"
    )]
    fn hanging(ours: &OwnedFd) -> Command {
        let inode = fstat(ours).unwrap().st_ino;
        let hang = move || -> io::Result<()> {
            let is_ours = |number: &i32| {
                // SAFETY: it is not closed by that, nor need it be open.
                let fd = unsafe { BorrowedFd::borrow_raw(*number) };
                fstat(fd).is_ok_and(|it| it.st_ino == inode)
            };
            let count = (0..256).filter(is_ours).count() as u32;
            let said = [std::process::id(), count].map(u32::to_ne_bytes);
            nix::unistd::write(io::stdout(), said.as_flattened())?;
            nix::unistd::read(io::stdin(), &mut [0])?;
            Ok(())
        };
        let mut command = Command::new("sleep");
        command.arg("4711");
        // SAFETY: it makes system calls only.
        unsafe { command.pre_exec(hang) };
        command
    }

    #[test]
    fn one_that_hangs_on_its_way_has_nothing_of_ours_and_is_reaped_when_it_comes_too_late() {
        let (ours, _other) = nix::unistd::pipe().unwrap();
        let (waits, go_on) = nix::unistd::pipe().unwrap();
        let (said, theirs) = nix::unistd::pipe().unwrap();
        let starting = start("test", hanging(&ours), &[waits.as_fd(), theirs.as_fd()]).unwrap();
        let mut words = [0; 8];
        File::from(said).read_exact(&mut words).unwrap();
        let (pid, open) = words.split_at(4);
        let pid = u32::from_ne_bytes(pid.try_into().unwrap());
        assert_eq!(open, [0; 4], "it has what we have open");
        let error = starting.in_time(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!process::is_dead(pid));
        drop(starting);
        File::from(go_on).write_all(&[0]).unwrap();
        let until = Instant::now() + LONG;
        while std::fs::exists(format!("/proc/{pid}")).unwrap() {
            assert!(Instant::now() < until, "nobody has reaped it");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
