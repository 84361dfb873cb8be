// SPDX-License-Identifier: GPL-2.0-only

//! Why a call could not be done.

use lab_agent::Outcome;
use nix::errno::Errno;

/// Why a call could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed; the test is told the errno by name.
    #[error("{0}")]
    Errno(#[from] Errno),
    /// The call itself makes no sense.
    #[error("{0}")]
    Call(String),
    /// Another agent could not do it, and says so.
    #[error("{0:?}")]
    Told(Outcome),
    /// None of these.
    #[error("{0}")]
    Io(std::io::Error),
}

impl Error {
    /// What the test is told.
    pub fn outcome(self) -> Outcome {
        match self {
            Error::Errno(errno) => Outcome::Errno(format!("{errno:?}")),
            Error::Told(outcome) => outcome,
            error => Outcome::Failed(error.to_string()),
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Error::Errno(Errno::from_raw(number)),
            None => Error::Io(error),
        }
    }
}
