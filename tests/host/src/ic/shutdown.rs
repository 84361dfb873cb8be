// SPDX-License-Identifier: GPL-2.0-only

//! The host side of the shutdown integration component (`struct shutdown_msg_data`).

use crate::channel::{IcChannel, Reply};
use crate::host::HostError;
use crate::ic::Version;
use crate::vmbus::protocol::Guid;
use std::ops::Deref;
use std::time::Duration;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Device class of the shutdown component (`HV_SHUTDOWN_GUID`).
pub const CLASS: Guid = Guid::new(
    0x0e0b6031,
    0x5213,
    0x4934,
    [0x81, 0x8b, 0x38, 0xd9, 0x0c, 0xed, 0x39, 0xdb],
);

/// The message versions that a current host offers.
pub const VERSIONS: [Version; 4] = [
    Version::new(1, 0),
    Version::new(3, 0),
    Version::new(3, 1),
    Version::new(3, 2),
];

/// What the guest is asked to do, in [`ShutdownBody::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Power off.
    PowerOff,
    /// Reboot.
    Restart,
    /// Hibernate (from version 3.2).
    Hibernate,
}

impl Action {
    fn flags(self) -> u32 {
        match self {
            Action::PowerOff => 0,
            Action::Restart => 2,
            Action::Hibernate => 4,
        }
    }
}

/// A shutdown request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ShutdownBody {
    /// Windows' reason code.
    pub reason: U32,
    /// How long the guest may take, in seconds.
    pub timeout_s: U32,
    /// What to do; bit 0 forces it.
    pub flags: U32,
    /// Text for the guest's users, UTF-8, ended by zero.
    pub text: [u8; 2048],
}

const _: () = assert!(size_of::<ShutdownBody>() == 2060);

/// The shutdown channel. All that an [`IcChannel`] can do, it can do too.
#[derive(Clone)]
pub struct Shutdown {
    channel: IcChannel,
}

impl Deref for Shutdown {
    type Target = IcChannel;

    fn deref(&self) -> &IcChannel {
        &self.channel
    }
}

impl Shutdown {
    pub(crate) fn new(channel: IcChannel) -> Self {
        Shutdown { channel }
    }

    /// Asks the guest for `action` and returns its answer (status 0: it will), negotiating first when
    /// the channel has not been negotiated since it was opened.
    pub fn request(&self, action: Action, timeout: Duration) -> Result<Reply, HostError> {
        self.channel.agree_once(timeout)?;
        let body = ShutdownBody {
            reason: U32::new(0),
            timeout_s: U32::new(0),
            flags: U32::new(action.flags()),
            text: [0; 2048],
        };
        let name = match action {
            Action::PowerOff => "power off",
            Action::Restart => "restart",
            Action::Hibernate => "hibernate",
        };
        let tx = self.channel.send_request(name, body.as_bytes())?;
        self.channel.wait(tx, timeout)
    }

    /// Asks the guest to power off; an answer other than status 0 is an error. The end itself is seen
    /// with [`crate::Vm::wait_exit`].
    pub fn power_off(&self, timeout: Duration) -> Result<(), HostError> {
        let reply = self.request(Action::PowerOff, timeout)?;
        match reply.status() {
            crate::ic::status::OK => Ok(()),
            status => Err(HostError::Refused {
                what: "power off",
                status,
            }),
        }
    }
}
