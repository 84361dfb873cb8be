// SPDX-License-Identifier: GPL-2.0-only

//! Kinds of hosts, as far as a guest can tell one from another by what is said on the bus.
//!
//! What is known of them is public: the VMBus version of each Windows is in a comment of the kernel's
//! `include/linux/hyperv.h`; the versions of the VSS messages and the Windows that brought each are in
//! openvmm's `hyperv_ic_protocol/src/vss.rs`; how a host speaks that serves its components by way of
//! message pipes is read off openvmm (`hyperv_ic/src/common.rs`, `vmbus_async/src/pipe.rs`,
//! `vmbus_core/src/protocol.rs`). Whether Windows itself offers the components as pipes, and which
//! transaction ids it uses, is not documented: those profiles do what this host has always done, which
//! is the other way of each.

use crate::ic::{vss, Version, FRAMEWORKS};
use crate::vmbus::protocol::VmbusVersion;

/// One kind of host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Profile {
    /// A short name, for people.
    pub name: &'static str,
    /// The newest VMBus version that it accepts; it accepts all of [`VmbusVersion::ALL`] before that,
    /// too. Without any from 5.0 on it has no connection 4 either.
    pub vmbus: VmbusVersion,
    /// The framework versions that its components offer.
    pub frameworks: &'static [Version],
    /// The message versions that its VSS component offers.
    pub vss: &'static [Version],
    /// How it carries the messages of its components.
    pub carriage: Carriage,
}

/// How a host carries the messages of its integration components.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Carriage {
    /// As packets: each has a transaction id of its own, in the ring's descriptor and in the message, and
    /// asks for a completion. The channel is silent after its opening until somebody wants something.
    Packets,
    /// As a message pipe: the offer says so, all transaction ids are 0 and no completion is asked for. The
    /// offer of versions is in the ring when the guest learns that the channel is open. Answers are told
    /// apart by what they repeat of their request.
    Pipe,
}

/// The VSS versions of Windows Server 2012 R2.
const VSS_2012_R2: [Version; 2] = [Version::new(4, 0), Version::new(5, 0)];
/// Those of the first Windows 10 and Server 2016 ("Threshold").
const VSS_2016: [Version; 3] = [Version::new(4, 0), Version::new(5, 0), Version::new(6, 0)];

impl Profile {
    /// A host with the versions of Windows Server 2012 R2 in its components. Its VMBus is newer: stock
    /// kernels speak none before 4.0.
    pub const SERVER_2012_R2: Profile = Profile {
        name: "server-2012-r2",
        vmbus: VmbusVersion::V4_0,
        frameworks: &FRAMEWORKS,
        vss: &VSS_2012_R2,
        carriage: Carriage::Packets,
    };
    /// Windows Server 2016.
    pub const SERVER_2016: Profile = Profile {
        name: "server-2016",
        vss: &VSS_2016,
        ..Profile::SERVER_2012_R2
    };
    /// Windows 10 of autumn 2017 (RS3).
    pub const WINDOWS_10_RS3: Profile = Profile {
        name: "windows-10-rs3",
        vmbus: VmbusVersion::V4_1,
        ..Profile::CURRENT
    };
    /// The Windows 10 after that: the first whose guests connect by connection 4.
    pub const WINDOWS_10_V5: Profile = Profile {
        name: "windows-10-v5",
        vmbus: VmbusVersion::V5_0,
        ..Profile::CURRENT
    };
    /// Windows Server 2019.
    pub const SERVER_2019: Profile = Profile {
        name: "server-2019",
        vmbus: VmbusVersion::V5_2,
        ..Profile::CURRENT
    };
    /// Windows Server 2022.
    pub const SERVER_2022: Profile = Profile {
        name: "server-2022",
        vmbus: VmbusVersion::V5_3,
        ..Profile::CURRENT
    };
    /// The newest of everything.
    pub const CURRENT: Profile = Profile {
        name: "current",
        vmbus: VmbusVersion::V6_0,
        frameworks: &FRAMEWORKS,
        vss: &vss::VERSIONS,
        carriage: Carriage::Packets,
    };
    /// OpenVMM.
    pub const OPENVMM: Profile = Profile {
        name: "openvmm",
        carriage: Carriage::Pipe,
        ..Profile::CURRENT
    };

    /// All of them, the oldest first.
    pub const ALL: [Profile; 8] = [
        Profile::SERVER_2012_R2,
        Profile::SERVER_2016,
        Profile::WINDOWS_10_RS3,
        Profile::WINDOWS_10_V5,
        Profile::SERVER_2019,
        Profile::SERVER_2022,
        Profile::CURRENT,
        Profile::OPENVMM,
    ];
}

impl Default for Profile {
    fn default() -> Self {
        Profile::CURRENT
    }
}
