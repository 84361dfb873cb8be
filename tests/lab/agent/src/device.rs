// SPDX-License-Identifier: GPL-2.0-only

//! Devices that the test works itself, one system call a time.

use crate::error::Error;
use crate::storm::{self, Plan};
use crate::{lock, sys};
use lab_agent::{from_hex, to_hex, Descriptor, Put, Storm};
use nix::poll::{poll, PollFd, PollFlags};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

/// The open devices, by handle.
#[derive(Default)]
pub struct Devices {
    open: Mutex<(u64, BTreeMap<u64, Arc<File>>)>,
}

impl Devices {
    /// Opens a device and returns its handle.
    pub fn open(&self, path: &str, nonblock: bool) -> Result<u64, Error> {
        let flags = if nonblock { nix::libc::O_NONBLOCK } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?;
        let mut open = lock(&self.open);
        open.0 += 1;
        let handle = open.0;
        open.1.insert(handle, Arc::new(file));
        Ok(handle)
    }

    fn get(&self, handle: u64) -> Result<Arc<File>, Error> {
        let open = lock(&self.open);
        let file = open.1.get(&handle).cloned();
        file.ok_or_else(|| Error::Call(format!("no device is open as {handle}")))
    }

    /// A copy of the descriptor, for a program that is started.
    pub fn copy(&self, handle: u64) -> Result<Stdio, Error> {
        Ok(self.get(handle)?.try_clone()?.into())
    }

    /// One read; its bytes in hexadecimal.
    pub fn read(&self, handle: u64, len: usize, nowait: bool) -> Result<String, Error> {
        let file = self.get(handle)?;
        let mut buffer = vec![0; len];
        let got = if nowait {
            sys::read_now(&file, &mut buffer)?
        } else {
            file.as_ref().read(&mut buffer)?
        };
        Ok(to_hex(buffer.get(..got).unwrap_or(&[])))
    }

    /// One write; how many bytes were taken.
    pub fn write(&self, handle: u64, hex: &str) -> Result<usize, Error> {
        let file = self.get(handle)?;
        let bytes = from_hex(hex).ok_or_else(|| Error::Call("not hexadecimal".into()))?;
        Ok(file.as_ref().write(&bytes)?)
    }

    /// One poll; the names of what was reported.
    pub fn poll(
        &self,
        handle: u64,
        timeout_ms: u16,
        events: &[String],
    ) -> Result<Vec<String>, Error> {
        let file = self.get(handle)?;
        let mut wanted = PollFlags::empty();
        for name in events {
            wanted |= PollFlags::from_name(name)
                .ok_or_else(|| Error::Call(format!("{name} is no poll event")))?;
        }
        let mut fds = [PollFd::new(file.as_fd(), wanted)];
        poll(&mut fds, timeout_ms)?;
        let [fd] = fds;
        let reported = fd.revents().unwrap_or(PollFlags::empty());
        Ok(reported
            .iter_names()
            .map(|(name, _)| name.to_owned())
            .collect())
    }

    /// One ioctl.
    pub fn ioctl(
        &self,
        handle: u64,
        request: u32,
        hex: &str,
        put: Option<&Put>,
    ) -> Result<(), Error> {
        let file = self.get(handle)?;
        let mut argument = from_hex(hex).ok_or_else(|| Error::Call("not hexadecimal".into()))?;
        let Some(Put { at, what }) = put else {
            return Ok(sys::ioctl(&file, request, &argument)?);
        };
        // It is open until the call returns.
        let (path, flags) = match what {
            Descriptor::Path(path) => (path, nix::libc::O_NONBLOCK),
            Descriptor::PathOnly(path) => (path, nix::libc::O_PATH),
        };
        let target = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)?;
        let number = target.as_raw_fd().to_ne_bytes();
        let place = argument
            .get_mut(*at..)
            .and_then(|it| it.get_mut(..number.len()));
        let place = place.ok_or_else(|| Error::Call("no place for the descriptor".into()))?;
        place.copy_from_slice(&number);
        Ok(sys::ioctl(&file, request, &argument)?)
    }

    /// Many writes at once.
    pub fn storm(&self, handle: u64, plan: &Plan) -> Result<Storm, Error> {
        storm::run(&*self.get(handle)?, plan)
    }

    /// Closes the device.
    pub fn close(&self, handle: u64) -> Result<(), Error> {
        match lock(&self.open).1.remove(&handle) {
            Some(_) => Ok(()),
            None => Err(Error::Call(format!("no device is open as {handle}"))),
        }
    }

    /// Closes all devices.
    pub fn close_all(&self) {
        lock(&self.open).1.clear();
    }
}
