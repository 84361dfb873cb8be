// SPDX-License-Identifier: GPL-2.0-only

//! What a btrfs is at that holds its write gate for long: its freeze would wait for that to end, and all
//! writers for the freeze. A balance and its like are shown in sysfs; for a scrub the file system has to be asked,
//! and that may hang. So it has to be for whether an error has ended all writing.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Duration;

use crate::apart::Questions;
use crate::mounts::DevId;
use crate::process;
use crate::superblocks::{self, Entry};
use crate::sys;

/// Since when the freeze of a btrfs ends a scrub (`should_cancel_scrub` in `fs/btrfs/scrub.c`). Before, it
/// waits for it, which takes hours, and nothing but the version tells.
const FREEZE_ENDS_SCRUB: (u32, u32) = (6, 19);

/// How long the kernel may take to say something: it waits for a commit, and that for a disk.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Each btrfs that is at something which sysfs shows: its devices, and what it is.
pub fn shown() -> Vec<(Vec<DevId>, String)> {
    let entries = superblocks::entries(&BTreeSet::from(["btrfs".to_owned()])).unwrap_or_default();
    let operation = |entry: &Entry| {
        let path = superblocks::folder_for(entry).join("exclusive_operation");
        let said = fs::read_to_string(path).ok()?;
        match said.trim() {
            // The last is over in a moment.
            "none" | "balance paused" | "swap activate" => None,
            operation => Some((superblocks::devices_of(entry), operation.to_owned())),
        }
    };
    entries.iter().filter_map(operation).collect()
}

/// What a btrfs on these devices, open, is at.
pub fn with(devices: &[DevId], fd: BorrowedFd<'_>) -> Option<String> {
    let is_it = |of: &[DevId]| of.iter().any(|dev| devices.contains(dev));
    let operation = shown().into_iter().find(|(of, _)| is_it(of));
    operation
        .map(|(_, operation)| operation)
        .or_else(|| unshown(fd).map(str::to_owned))
}

/// What a btrfs, open, is at that sysfs does not show: it is being scrubbed, or does not say in time whether it is.
pub fn unshown(fd: BorrowedFd<'_>) -> Option<&'static str> {
    static ASKED: Questions<DevId> = Questions::new();
    // The kernel that runs stays what it is.
    static MAY_WAIT: LazyLock<bool> =
        LazyLock::new(|| process::kernel_version().is_some_and(|it| it < FREEZE_ENDS_SCRUB));
    if !*MAY_WAIT {
        return None;
    }
    let dev = sys::identify(fd).ok()?.dev();
    let is_scrubbed = |fds: Vec<OwnedFd>| {
        let said = fds.first().map(|it| sys::is_scrubbed(it.as_fd()));
        said.is_some_and(|it| it.unwrap_or(false))
    };
    match ASKED.ask(dev, &[fd], ANSWER_TIME, is_scrubbed) {
        Ok(is_scrubbed) => is_scrubbed.then_some("scrub"),
        Err(_) => Some("a commit that hangs"),
    }
}

/// Whether an error has made a btrfs, open, read-only. One that somebody has made so syncs nothing, and says that all is
/// well (`btrfs_start_delalloc_roots` in `fs/btrfs/inode.c`). `None` of one that does not say it in time.
pub fn has_failed(fd: BorrowedFd<'_>) -> Option<bool> {
    static ASKED: Questions<DevId> = Questions::new();
    let found = sys::identify(fd).ok()?;
    let sync = |fds: Vec<OwnedFd>| fds.first().map(|it| sys::btrfs_sync(it.as_fd()));
    let said = ASKED.ask(found.dev(), &[fd], ANSWER_TIME, sync);
    match said.ok()?? {
        Ok(()) => Some(false),
        Err(error) => (error.raw_os_error() == Some(libc::EROFS)).then_some(true),
    }
}
