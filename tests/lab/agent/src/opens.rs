// SPDX-License-Identifier: GPL-2.0-only

//! What a security agent does to everybody else: every open below a mount waits for its verdict
//! (fanotify, `FAN_OPEN_PERM`), as with fapolicyd and the like.

use crate::error::Error;
use crate::{lock, start_thread};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// How often the one who judges looks whether it is to stop.
const LOOK_MS: u16 = 50;

struct Group {
    fanotify: Fanotify,
    stop: AtomicBool,
}

/// The watch over opens, if there is one.
#[derive(Default)]
pub struct Opens {
    group: Mutex<Option<Arc<Group>>>,
}

impl Opens {
    /// From now on each open on the mount at `path` waits: with a `log` until a line is written
    /// there, without one until [`Opens::release`].
    pub fn watch(&self, path: &str, log: Option<&str>) -> Result<(), Error> {
        let log = log.map(|log| OpenOptions::new().create(true).append(true).open(log));
        let log = log.transpose()?;
        let class = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC;
        let events = EventFFlags::O_RDONLY | EventFFlags::O_LARGEFILE | EventFFlags::O_CLOEXEC;
        let group = Arc::new(Group {
            fanotify: Fanotify::init(class, events)?,
            stop: AtomicBool::new(false),
        });
        group.fanotify.mark(
            MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_MOUNT,
            MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_ONDIR,
            AT_FDCWD,
            Some(path),
        )?;
        if let Some(mut log) = log {
            let group = group.clone();
            start_thread(move || {
                while !group.stop.load(SeqCst) {
                    if group.judge(&mut log).is_err() {
                        // The group ends with this thread, and lets everybody pass.
                        return;
                    }
                }
            })?;
        }
        *lock(&self.group) = Some(group);
        Ok(())
    }

    /// Lets everybody pass who waits, now and from now on.
    pub fn release(&self) {
        // The group ends with its last handle, and the kernel then allows what it held up.
        if let Some(group) = lock(&self.group).take() {
            group.stop.store(true, SeqCst);
        }
    }
}

impl Group {
    /// Judges what has come, within [`LOOK_MS`].
    fn judge(&self, log: &mut File) -> Result<(), Errno> {
        let mut fds = [PollFd::new(self.fanotify.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, LOOK_MS)? == 0 {
            return Ok(());
        }
        for event in self.fanotify.read_events()? {
            // Judged only when written down; what cannot be written down is let through.
            let _ = writeln!(log, "opened by {}", event.pid());
            if let Some(fd) = event.fd() {
                let verdict = FanotifyResponse::new(fd, Response::FAN_ALLOW);
                self.fanotify.write_response(verdict)?;
            }
        }
        Ok(())
    }
}
