// SPDX-License-Identifier: GPL-2.0-only

//! Freezes that the module holds for whoever has its device open.
//!
//! Nobody else can thaw them, and the module does when this process ends, in whatever way, at the
//! deadline, and before the machine sleeps. So there is nothing to guard and nothing to record.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

use hv_vss_uapi::IocFreeze;
use nix::errno::Errno;

use crate::device::Hold;
use crate::door::{Door, DoorError};
use crate::freeze::Target;
use crate::sys;

/// Instead of the id of a FREEZE, for a rehearsal.
pub const NOBODY: u64 = 0;
const STACK_BYTES: usize = 64 * 1024;

/// The door, for one FREEZE of the host, or a rehearsal.
pub struct Held {
    hold: Hold,
    id: u64,
    deadline: Duration,
    /// How many are to be frozen, once that is known.
    count: AtomicU32,
    /// Whether nothing of it is held any more but what hangs.
    is_over: Arc<AtomicBool>,
}

impl Held {
    /// For the FREEZE with this id, or for [`NOBODY`].
    pub fn new(hold: Hold, id: u64, deadline: Duration) -> Self {
        Held {
            hold,
            id,
            deadline,
            count: AtomicU32::new(0),
            is_over: Arc::default(),
        }
    }

    /// Has the module thaw that, if it is held for this.
    fn ask_to_thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::let_go(self.hold.device.as_fd(), self.id, fd)
    }
}

fn is_no_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESTALE)
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Whether it is the device of the module that has gone away, by what that says to a thaw of what is not held.
fn is_gone(said: io::Result<()>) -> bool {
    said.is_err_and(|error| is_no_device(&error))
}

impl Door for Held {
    fn arm(&self, targets: &[Target]) -> Result<(), DoorError> {
        let count = u32::try_from(targets.len()).unwrap_or(u32::MAX);
        if count > self.hold.most {
            return Err(DoorError::TooMany {
                wanted: targets.len(),
                most: self.hold.most,
            });
        }
        self.count.store(count, Ordering::Relaxed);
        Ok(())
    }

    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let freeze = IocFreeze {
            id: self.id,
            fd: fd.as_raw_fd(),
            // Whichever of several threads comes first brings both.
            deadline_ms: u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX),
            count: self.count.load(Ordering::Relaxed),
            ..IocFreeze::default()
        };
        let device = self.hold.device.as_fd();
        match sys::hold(device, &freeze) {
            // A disk that has gone says the same. It is not held, so that this only asks.
            Err(e) if is_no_device(&e) && is_gone(self.ask_to_thaw(fd)) => {
                // That is no fault of a file system: none is tried any more.
                Err(io::Error::other("the device has gone away"))
            }
            // Nor is that one: the FREEZE has come to the module already, and will be read.
            Err(e) if self.id == NOBODY && is_stale(&e) => {
                Err(io::Error::other("the host asks, and comes first"))
            }
            other => other,
        }
    }

    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self.ask_to_thaw(fd) {
            // Without its device the module holds nothing.
            Err(e) if is_no_device(&e) => Err(Errno::EINVAL.into()),
            // It has let go by itself, and is at that, or is done and holds it for another.
            Err(e) if is_busy(&e) || is_stale(&e) => Err(Errno::EINVAL.into()),
            other => other,
        }
    }

    fn takes_paths(&self) -> bool {
        self.hold.takes_paths
    }

    fn can_call_off(&self) -> bool {
        true
    }

    fn goes_on(&self) -> bool {
        true
    }

    /// By a notice. Without a device it is no matter what the answer would be.
    fn says_what_it_has_thawed(&self) -> bool {
        true
    }

    fn call_off(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ask_to_thaw(fd)
    }

    fn is_stuck(&self, fd: BorrowedFd<'_>) -> bool {
        // It is not held, so that this only asks.
        self.ask_to_thaw(fd).is_err_and(|error| is_busy(&error))
    }

    /// It is held beside others, so there is nothing of theirs here.
    fn leave(&self, _index: usize) -> bool {
        true
    }

    fn claim(&self, _index: usize) {}

    fn own(&self, _index: usize) {}

    fn freezes_are_over(&self) -> bool {
        true
    }

    fn settle(&self, _targets: &[Target]) {}

    /// The module does by itself when the FREEZE is failed or told to have ended, which has been done. Of a rehearsal
    /// nobody has told it, and whoever does may have to wait for a disk.
    fn let_go(&self) {
        if self.id != NOBODY {
            return;
        }
        let (hold, is_over) = (self.hold.clone(), Arc::clone(&self.is_over));
        let thaw = move || {
            // By then it might be another's.
            if !is_over.load(Ordering::SeqCst) {
                // What it cannot thaw the module goes on with.
                let _ = sys::let_all_go(hold.device.as_fd(), NOBODY);
            }
        };
        let builder = Builder::new().name("let go".into());
        // Without it the session thaws, behind what holds it up.
        let _ = builder.stack_size(STACK_BYTES).spawn(thaw);
    }

    /// The module goes on by itself with what is left.
    fn disarm(&self, _targets: &[Target]) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    fn watched_every(&self) -> Option<Duration> {
        None
    }
}
