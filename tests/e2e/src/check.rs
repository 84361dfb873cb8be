// SPDX-License-Identifier: GPL-2.0-only

//! The few checks that nearly every case needs. Each says what was expected and what was seen.

use crate::agent::CallError;
use anyhow::{bail, Result};
use hyperv_sim::Reply;

/// The same number, by its usual name where it has one.
pub fn status_name(status: u32) -> String {
    match status {
        0 => "0 (success)".into(),
        0x8000_4005 => "0x80004005 (failed)".into(),
        0x8007_0032 => "0x80070032 (not supported)".into(),
        other => format!("{other:#x}"),
    }
}

/// The host must have been told `status`.
pub fn answered(what: &str, reply: &Reply, status: u32) -> Result<()> {
    if reply.status() != status {
        bail!(
            "{what} should be answered {}, the guest answered {} after {:?}",
            status_name(status),
            status_name(reply.status()),
            reply.latency
        );
    }
    Ok(())
}

/// The system call must have failed with `errno`.
pub fn refused<T: std::fmt::Debug>(
    what: &str,
    result: Result<T, CallError>,
    errno: &str,
) -> Result<()> {
    match result {
        Err(error) if error.errno() == Some(errno) => Ok(()),
        Err(error) => bail!("{what} should fail with {errno}, it gave: {error}"),
        Ok(value) => bail!("{what} should fail with {errno}, it succeeded: {value:?}"),
    }
}

/// The two must be equal.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, expected: T) -> Result<()> {
    if seen != expected {
        bail!("{what}: expected {expected:?}, saw {seen:?}");
    }
    Ok(())
}
