// SPDX-License-Identifier: GPL-2.0-only

//! The door through which file systems are frozen. Behind it is one of two: [`crate::held`], where the
//! module freezes and answers for the thaw, or [`crate::fifreeze`], where the ioctl that everybody has
//! does and the guard answers for the thaw. Whoever stands before it need not know which.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::freeze::Target;
use crate::guard::GuardError;
use crate::record::RecordError;

/// Why nothing can be frozen.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Somebody else freezes, or `/run` cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Without a guard nothing is frozen.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// More than the module holds.
    #[error("{wanted} file systems are to be frozen, and the module holds {most} at most")]
    TooMany {
        /// How many there are.
        wanted: usize,
        /// How many it holds.
        most: u32,
    },
}

/// Writes all dirty data of a file system back without freezing.
pub type Syncer = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

/// One freeze goes through it: armed, frozen and thawed any number of times, disarmed.
pub trait Door: Send + Sync {
    /// Sees to it that these are thawed whatever becomes of this process. Before the first freeze.
    fn arm(&self, targets: &[Target]) -> Result<(), DoorError>;

    /// What syncs. It has nothing of the door, so that one that hangs for good keeps nothing of it open.
    fn syncer(&self) -> Syncer {
        Arc::new(|fd| Ok(nix::unistd::syncfs(fd)?))
    }

    /// Freezes: `EBUSY` when it is frozen already, `EOPNOTSUPP` when it cannot.
    fn freeze(&self, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether that, and its thaw, takes no more than a path (`O_PATH`).
    fn takes_paths(&self) -> bool {
        false
    }

    /// Thaws: `EINVAL` when it is not frozen.
    fn thaw(&self, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether the freeze of one, under way on another thread, can be called off with nobody else's.
    fn can_call_off(&self) -> bool {
        false
    }

    /// Does that: the call ends at once, and what becomes of the freeze is undone the moment it comes back.
    fn call_off(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    /// Whether a thaw that fails is tried again behind it until it is done. Whoever stands before it must not,
    /// and could meet the next freeze.
    fn goes_on(&self) -> bool {
        false
    }

    /// Whether what it does not find frozen when it thaws was thawed by whoever is behind it, who says so elsewhere and
    /// why, and that nobody else can. Else it is a freeze that did not last.
    fn says_what_it_has_thawed(&self) -> bool {
        false
    }

    /// Whether a freeze of it that was called off, or a thaw, has not come back, whoever began it.
    fn is_stuck(&self, _fd: BorrowedFd<'_>) -> bool {
        false
    }

    /// Whether what says that it is frozen already, by somebody else, may not be as a whole: who is at it, in words.
    fn is_half_frozen(&self, _target: &Target) -> Option<String> {
        None
    }

    /// Target number `index` was frozen by somebody else and is theirs to thaw. Whether that was heard: if not, it is
    /// to be said again.
    fn leave(&self, index: usize) -> bool;

    /// What target number `index` was left for may be over: if a freeze of it succeeds now, it is ours. Until that is
    /// known it is thawed only should this process die.
    fn claim(&self, index: usize);

    /// It has succeeded: from here on that one is as if it had never been left.
    fn own(&self, index: usize);

    /// No freeze is under way any more, and none follows: what is not frozen by now is not ours to thaw. Whether that
    /// was heard, as with [`Door::leave`].
    fn freezes_are_over(&self) -> bool;

    /// The host has said that it is to be thawed: the deadline has been kept, and the thaw has one of its own.
    fn thaw_begins(&self) {}

    /// The host knows of all that is frozen.
    fn settle(&self, targets: &[Target]);

    /// Thaws all at once, without waiting, while others may still be inside a freeze.
    fn let_go(&self);

    /// After the thaw. What the kernel has refused to thaw is still ours.
    fn disarm(&self, targets: &[Target]);

    /// How often to look whether what is frozen still is, where others can thaw it.
    fn watched_every(&self) -> Option<Duration>;
}
