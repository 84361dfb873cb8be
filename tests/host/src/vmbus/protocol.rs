// SPDX-License-Identifier: GPL-2.0-only

//! Layouts and numbers of VMBus.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in its wire form: the first three fields little-endian.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The GUID that is written `a-b-c-d`, the last two groups together in `d`.
    pub const fn new(a: u32, b: u16, c: u16, d: [u8; 8]) -> Self {
        let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        Guid([
            a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5],
            d[6], d[7],
        ])
    }
}

impl std::fmt::Display for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, rest @ ..] = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{d0:02x}{d1:02x}-",
            u32::from_le_bytes([a0, a1, a2, a3]),
            u16::from_le_bytes([b0, b1]),
            u16::from_le_bytes([c0, c1]),
        )?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A VMBus protocol version: major in the upper, minor in the lower half.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmbusVersion(pub u32);

impl VmbusVersion {
    /// 4.0: Windows 10 and Server 2016.
    pub const V4_0: Self = Self(4 << 16);
    /// 4.1.
    pub const V4_1: Self = Self(4 << 16 | 1);
    /// 5.0.
    pub const V5_0: Self = Self(5 << 16);
    /// 5.1.
    pub const V5_1: Self = Self(5 << 16 | 1);
    /// 5.2.
    pub const V5_2: Self = Self(5 << 16 | 2);
    /// 5.3: MODIFYCHANNEL is answered from here on.
    pub const V5_3: Self = Self(5 << 16 | 3);
    /// 6.0.
    pub const V6_0: Self = Self(6 << 16);

    /// All that this host speaks, oldest first.
    pub const ALL: [Self; 7] = [
        Self::V4_0,
        Self::V4_1,
        Self::V5_0,
        Self::V5_1,
        Self::V5_2,
        Self::V5_3,
        Self::V6_0,
    ];
}

impl std::fmt::Display for VmbusVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

impl std::fmt::Debug for VmbusVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The types of packets in a ring (`enum vmbus_packet_type`).
pub mod packet_type {
    /// Data that follows the descriptor (`VM_PKT_DATA_INBAND`).
    pub const DATA_INBAND: u16 = 6;
    /// Completion (`VM_PKT_COMP`).
    pub const COMPLETION: u16 = 11;
}
