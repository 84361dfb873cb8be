// SPDX-License-Identifier: GPL-2.0-only

//! The host side of the key-value pair integration component, as far as its versions.
//!
//! Linux answers none of its messages, the offer of versions among them, before a daemon for it has the device open
//! (`hv_kvp_onchannelcallback`).

use crate::channel::IcChannel;
use crate::ic::Version;
use crate::vmbus::protocol::Guid;
use std::ops::Deref;

/// Device class of key-value pairs (`HV_KVP_GUID`).
pub const CLASS: Guid = Guid::new(
    0xa9a0f4e7,
    0x5a45,
    0x4d96,
    [0xb8, 0x27, 0x8a, 0x84, 0x1e, 0x8c, 0x03, 0xe6],
);

/// The message versions that openvmm offers (`hyperv_ic/src/kvp.rs`).
pub const VERSIONS: [Version; 3] = [Version::new(3, 0), Version::new(4, 0), Version::new(5, 0)];

/// The channel of key-value pairs: an [`IcChannel`], of which no message is known but the offer of versions.
#[derive(Clone)]
pub struct Kvp {
    channel: IcChannel,
}

impl Deref for Kvp {
    type Target = IcChannel;

    fn deref(&self) -> &IcChannel {
        &self.channel
    }
}

impl Kvp {
    pub(crate) fn new(channel: IcChannel) -> Self {
        Kvp { channel }
    }
}
