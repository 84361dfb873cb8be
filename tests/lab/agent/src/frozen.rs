// SPDX-License-Identifier: GPL-2.0-only

//! Whether a file system is frozen, whoever has frozen it.

use crate::error::Error;
use crate::{open_any, start_thread, sys};
use lab_agent::Frozen;
use nix::errno::Errno;
use std::ffi::CString;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

/// See [`lab_agent::Command::AskFrozen`].
pub fn ask(path: &str, limit: Duration) -> Result<Frozen, Error> {
    match sys::thaw(&open_any(path)?) {
        Ok(()) => return Ok(Frozen::ForAnybody),
        Err(Errno::EINVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let place = CString::new(path).map_err(|_| Errno::EINVAL)?;
    match in_time(limit, move || sys::ask_to_write(&place))? {
        None => Ok(Frozen::ForItsOwner),
        // It was never asked.
        Some(Err(error @ (Errno::ENOTDIR | Errno::ENOENT | Errno::ELOOP))) => Err(error.into()),
        // It may be read-only, know no attributes, or be gone, and lets nobody wait.
        Some(_) => Ok(Frozen::No),
    }
}

/// What `work` returns, on a thread of its own, if it does in time. Later nobody waits for it.
fn in_time<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, Error> {
    let (tell, told) = channel();
    start_thread(move || {
        let _ = tell.send(work());
    })?;
    match told.recv_timeout(limit) {
        Ok(result) => Ok(Some(result)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Error::Call("its thread has died".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_too_long_is_told_from_who_is_refused() {
        let (free, wait) = channel::<()>();
        let stuck = move || {
            let _ = wait.recv();
        };
        assert!(in_time(Duration::from_millis(20), stuck).unwrap().is_none());
        drop(free);
        let long = Duration::from_secs(60);
        let refused = |path: &str| {
            let place = CString::new(path).unwrap();
            in_time(long, move || sys::ask_to_write(&place)).unwrap()
        };
        let asked = refused(std::env::temp_dir().to_str().unwrap());
        assert!(
            matches!(asked, Some(Err(error)) if error != Errno::ENOENT),
            "{asked:?}"
        );
        assert_eq!(refused("/nowhere/at/all"), Some(Err(Errno::ENOENT)));
    }
}
