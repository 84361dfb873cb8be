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
//!
//! Of heartbeat, shutdown and time sync it is known what Linux took from which host before it negotiated
//! (`util_probe` in `drivers/hv/hv_util.c` until 4.11, a switch over the VMBus version): of Windows 7 to 8.1
//! 3.0 of each, from Windows 10 on 4.0 of time sync. openvmm has 4.0 of time sync alone
//! (`hyperv_ic/src/timesync.rs`), 1.0, 3.0, 3.1 and 3.2 of shutdown (`hyperv_ic_protocol/src/shutdown.rs`) and
//! no heartbeat at all, nor VSS: those speak in that profile as they do in the newest other, by a pipe. Which
//! Windows brought 3.1 and 3.2 of shutdown is not documented; here the first Windows 10 after Server 2016 has
//! 3.1, and the next one 3.2.
//!
//! The order of a backup is none of this. Whether AUTO_RECOVER is sent is decided by what the guest
//! answers to HOT_BACKUP, the same with all; that it comes after THAW is what the states of Windows' own
//! client say (none, freeze, thaw, auto-recovery, backup complete), of which one list is known and none that
//! goes another way. openvmm sends no VSS request.

use crate::ic::{heartbeat, shutdown, timesync, vss, Version, FRAMEWORKS};
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
    /// The same of its heartbeat.
    pub heartbeat: &'static [Version],
    /// The same of shutdown.
    pub shutdown: &'static [Version],
    /// The same of time synchronisation.
    pub timesync: &'static [Version],
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

/// What Linux took of the shutdown of all hosts from Windows 7 on, and before.
const SHUTDOWN_3: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
/// With the version after that.
const SHUTDOWN_3_1: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), Version::new(3, 1)];

/// What Linux took of the time synchronisation of Windows 7 to 8.1, and before.
const TIMESYNC_3: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
/// All that openvmm offers of it.
const TIMESYNC_OPENVMM: [Version; 1] = [Version::new(4, 0)];

impl Profile {
    /// A host with the versions of Windows Server 2012 R2 in its components. Its VMBus is newer: stock
    /// kernels speak none before 4.0.
    pub const SERVER_2012_R2: Profile = Profile {
        name: "server-2012-r2",
        vmbus: VmbusVersion::V4_0,
        frameworks: &FRAMEWORKS,
        vss: &VSS_2012_R2,
        heartbeat: &heartbeat::VERSIONS,
        shutdown: &SHUTDOWN_3,
        timesync: &TIMESYNC_3,
        carriage: Carriage::Packets,
    };
    /// Windows Server 2016.
    pub const SERVER_2016: Profile = Profile {
        name: "server-2016",
        vss: &VSS_2016,
        timesync: &timesync::VERSIONS,
        ..Profile::SERVER_2012_R2
    };
    /// Windows 10 of autumn 2017 (RS3).
    pub const WINDOWS_10_RS3: Profile = Profile {
        name: "windows-10-rs3",
        vmbus: VmbusVersion::V4_1,
        shutdown: &SHUTDOWN_3_1,
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
        heartbeat: &heartbeat::VERSIONS,
        shutdown: &shutdown::VERSIONS,
        timesync: &timesync::VERSIONS,
        carriage: Carriage::Packets,
    };
    /// OpenVMM.
    pub const OPENVMM: Profile = Profile {
        name: "openvmm",
        timesync: &TIMESYNC_OPENVMM,
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
