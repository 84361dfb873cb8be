// SPDX-License-Identifier: GPL-2.0-only

//! What a btrfs is at that holds its write gate for long: its freeze would wait for that to end, and all
//! writers for the freeze. A balance and its like are shown in sysfs; for a scrub the file system has to be asked,
//! and that may hang. So it has to be for whether an error has ended all writing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
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

/// Each btrfs that is at something which sysfs shows, and what it is. It is not told by its devices, of which another
/// may have some as well, those of a seed.
pub fn shown() -> BTreeMap<Entry, String> {
    let entries = superblocks::entries(&BTreeSet::from(["btrfs".to_owned()])).unwrap_or_default();
    let operation = |entry: &Entry| {
        let path = superblocks::folder_for(entry).join("exclusive_operation");
        let said = fs::read_to_string(path).ok()?;
        match said.trim() {
            // The last is over in a moment.
            "none" | "balance paused" | "swap activate" => None,
            operation => Some((entry.clone(), operation.to_owned())),
        }
    };
    entries.iter().filter_map(operation).collect()
}

/// What this btrfs, open, is at.
pub fn with(listed: Option<&Entry>, fd: BorrowedFd<'_>) -> Option<String> {
    let unshown = || {
        let dev = sys::identify(fd).ok()?.dev();
        unshown(&[(dev, fd)]).pop().flatten().map(str::to_owned)
    };
    listed.and_then(|it| shown().remove(it)).or_else(unshown)
}

/// What each btrfs of these, open, is at that sysfs does not show: it is being scrubbed, or does not say in time whether
/// it is. Those that hang are waited for together.
pub fn unshown(open: &[(DevId, BorrowedFd<'_>)]) -> Vec<Option<&'static str>> {
    static ASKED: Questions<DevId> = Questions::new();
    // The kernel that runs stays what it is.
    static MAY_WAIT: LazyLock<bool> =
        LazyLock::new(|| process::kernel_version().is_some_and(|it| it < FREEZE_ENDS_SCRUB));
    if !*MAY_WAIT {
        return vec![None; open.len()];
    }
    let is_scrubbed = |fd: BorrowedFd<'_>| sys::is_scrubbed(fd).unwrap_or(false);
    let said = ASKED.ask_each(open, ANSWER_TIME, is_scrubbed);
    let words = said.into_iter().map(|it| match it {
        Ok(is_scrubbed) => is_scrubbed.then_some("scrub"),
        Err(_) => Some("a commit that hangs"),
    });
    words.collect()
}

/// Whether an error has made each btrfs of these, open, read-only. One that somebody has made so syncs nothing, and says
/// that all is well (`btrfs_start_delalloc_roots` in `fs/btrfs/inode.c`). `None` of one that does not say it in time. Those
/// that hang are waited for together.
pub fn have_failed(open: &[(DevId, BorrowedFd<'_>)]) -> Vec<Option<bool>> {
    static ASKED: Questions<DevId> = Questions::new();
    let said = ASKED.ask_each(open, ANSWER_TIME, sys::btrfs_sync);
    let has_failed = |it: io::Result<io::Result<()>>| match it.ok()? {
        Ok(()) => Some(false),
        Err(error) => (error.raw_os_error() == Some(libc::EROFS)).then_some(true),
    };
    said.into_iter().map(has_failed).collect()
}
