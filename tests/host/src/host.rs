// SPDX-License-Identifier: GPL-2.0-only

//! The host that a test holds: what it offers, what can go wrong with it, and waiting for it.

use crate::balloon::{self, Account, Balloon, BalloonDevice};
use crate::bus::{lock, Bus};
use crate::channel::{Channel, IcChannel, Tx};
use crate::console::Console;
use crate::device::{Device, Outgoing, Place};
use crate::event::{Event, EventKind};
use crate::ic::device::{Component, Dialogue, IcDevice};
use crate::ic::heartbeat::{self, Heartbeat};
use crate::ic::kvp::{self, Kvp};
use crate::ic::shutdown::{self, Shutdown};
use crate::ic::timesync::{self, TimeSync};
use crate::ic::vss::{self, Vss};
use crate::ic::{message_type, Version};
use crate::kvm;
use crate::profile::{Carriage, Profile};
use crate::storage::controller::{ControllerDevice, Units};
use crate::storage::{vstor, Controller};
use crate::synic::{Registers, SynIc};
use crate::vm::Exit;
use crate::vmbus::protocol::{Guid, VmbusVersion};
use kvm_ioctls::VmFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::errno;

/// What the host offers.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// What kind of host it is.
    pub profile: Profile,
    /// Whether VSS is offered from the start (else after [`Channel::offer`]).
    pub vss: bool,
    /// Whether the heartbeat is offered from the start.
    pub heartbeat: bool,
    /// Whether shutdown is offered from the start.
    pub shutdown: bool,
    /// Whether time synchronisation is offered from the start.
    pub timesync: bool,
    /// Whether key-value pairs are offered from the start.
    pub kvp: bool,
    /// Whether dynamic memory is offered from the start.
    pub balloon: bool,
    /// How many SCSI controllers there are, without disks at first; at most
    /// [`HostConfig::MAX_SCSI_CONTROLLERS`].
    pub scsi_controllers: u8,
    /// How many times longer than asked whoever waits for the guest waits: limits are made for a
    /// stock kernel on a machine that is not busy elsewhere.
    pub patience: f64,
}

impl Default for HostConfig {
    /// The newest of everything, all components but key-value pairs, no dynamic memory, no disks.
    fn default() -> Self {
        HostConfig {
            profile: Profile::CURRENT,
            vss: true,
            heartbeat: true,
            shutdown: true,
            timesync: true,
            kvp: false,
            balloon: false,
            scsi_controllers: 0,
            patience: 1.0,
        }
    }
}

impl HostConfig {
    /// As many as a machine of a real host can have.
    pub const MAX_SCSI_CONTROLLERS: u8 = SCSI_NAMES.len() as u8;
}

/// What can go wrong between host and guest.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The event that was waited for did not come.
    #[error("{channel}: no {what} within {after:?}; seen on the channel:\n{seen}\nthe console ends:\n{console}")]
    Timeout {
        /// Where.
        channel: &'static str,
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// The channel's last events, one a line.
        seen: String,
        /// The last lines of the guest's console.
        console: String,
    },
    /// The guest ended while it was waited for.
    #[error("{channel}: the guest ended ({exit:?}) before {what}; the console ends:\n{console}")]
    GuestGone {
        /// Where.
        channel: &'static str,
        /// What was waited for.
        what: String,
        /// How the guest ended.
        exit: Exit,
        /// The last lines of the guest's console.
        console: String,
    },
    /// The channel is not open, or was closed before the answer came.
    #[error("{channel}: the guest has not opened the channel, or closed it before {what}")]
    NotOpen {
        /// Where.
        channel: &'static str,
        /// What was to be done.
        what: String,
    },
    /// The packet is larger than the ring that the guest gave.
    #[error(
        "{channel}: a packet of {packet} bytes can never fit the guest's ring of {ring} bytes"
    )]
    TooLarge {
        /// Where.
        channel: &'static str,
        /// Bytes in the ring, descriptor and trailer included.
        packet: usize,
        /// Data bytes of the ring.
        ring: usize,
    },
    /// More disks than a FREEZE can name.
    #[error("a FREEZE cannot name {luns} disks")]
    TooManyLuns {
        /// How many.
        luns: usize,
    },
    /// The guest's answer makes no sense.
    #[error("{channel}: bad reply: {what}")]
    BadReply {
        /// Where.
        channel: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The guest accepts none of the versions.
    #[error("{channel}: the guest refused all versions (framework {frameworks:?}, messages {messages:?})")]
    NegotiationRefused {
        /// Where.
        channel: &'static str,
        /// Framework versions that were offered.
        frameworks: Vec<Version>,
        /// Message versions that were offered.
        messages: Vec<Version>,
    },
    /// The guest answered with a status other than success.
    #[error("the guest refused to {what}: status {status:#x}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its status.
        status: u32,
    },
    /// The guest's reference time cannot be read.
    #[error("cannot read the guest's reference time")]
    ReferenceTime(#[source] errno::Error),
    /// The transaction was never sent on this channel, or is forgotten.
    #[error("{channel}: no transaction {tx:?}")]
    UnknownTransaction {
        /// Where.
        channel: &'static str,
        /// Which.
        tx: Tx,
    },
}

/// Relids, and with them the places of the channels.
const VSS: u32 = 1;
const HEARTBEAT: u32 = 2;
const SHUTDOWN: u32 = 3;
const SECOND_VSS: u32 = 4;
const FIRST_SCSI: u32 = 5;
const TIMESYNC: u32 = FIRST_SCSI + SCSI_NAMES.len() as u32;
const BALLOON: u32 = TIMESYNC + 1;
const KVP: u32 = BALLOON + 1;

const SCSI_NAMES: [&str; 4] = ["scsi-0", "scsi-1", "scsi-2", "scsi-3"];

/// The instance GUIDs are this host's own; only the classes are fixed.
const fn instance(relid: u32) -> Guid {
    Guid::new(
        0x6876_5f73,
        0x696d,
        0x4000,
        [0x80, 0, 0, 0, 0, 0, 0, relid as u8],
    )
}

const fn component(
    name: &'static str,
    relid: u32,
    class: Guid,
    message_type: u16,
    default_version: Version,
    versions: fn(&Profile) -> &'static [Version],
) -> Component {
    Component {
        place: Place {
            name,
            relid,
            class,
            instance: instance(relid),
            pipe: false,
        },
        message_type,
        default_version,
        versions,
    }
}

const COMPONENTS: [Component; 6] = [
    component(
        "vss",
        VSS,
        vss::CLASS,
        message_type::VSS,
        Version::new(5, 0),
        |profile| profile.vss,
    ),
    component(
        "heartbeat",
        HEARTBEAT,
        heartbeat::CLASS,
        message_type::HEARTBEAT,
        Version::new(3, 0),
        |profile| profile.heartbeat,
    ),
    component(
        "shutdown",
        SHUTDOWN,
        shutdown::CLASS,
        message_type::SHUTDOWN,
        Version::new(3, 0),
        |profile| profile.shutdown,
    ),
    component(
        "second-vss",
        SECOND_VSS,
        vss::CLASS,
        message_type::VSS,
        Version::new(5, 0),
        |profile| profile.vss,
    ),
    component(
        "timesync",
        TIMESYNC,
        timesync::CLASS,
        message_type::TIMESYNC,
        Version::new(3, 0),
        |profile| profile.timesync,
    ),
    component(
        "kvp",
        KVP,
        kvp::CLASS,
        message_type::KVP,
        Version::new(4, 0),
        |_| &kvp::VERSIONS,
    ),
];

const BALLOON_PLACE: Place = Place {
    name: "balloon",
    relid: BALLOON,
    class: balloon::message::CLASS,
    instance: instance(BALLOON),
    pipe: false,
};

/// The place of a SCSI controller.
fn scsi_place(index: u8) -> Option<Place> {
    let name = SCSI_NAMES.get(usize::from(index))?;
    let relid = FIRST_SCSI + u32::from(index);
    Some(Place {
        name,
        relid,
        class: vstor::CLASS,
        instance: instance(relid),
        pipe: false,
    })
}

struct Shared {
    /// Goes before the bus does, with which the guest's memory may go.
    vm: Arc<VmFd>,
    bus: Mutex<Bus>,
    /// Notified after every change of the bus.
    changed: Condvar,
    /// What was asked and answered on the components' channels, in the order of [`COMPONENTS`].
    dialogues: [Arc<Mutex<Dialogue>>; COMPONENTS.len()],
    /// The memory that the host has of the guest's.
    balloon: Arc<Account>,
    /// The disks of the SCSI controllers.
    units: Vec<Arc<Mutex<Units>>>,
    console: Arc<Console>,
    profile: Profile,
    /// See [`HostConfig::patience`]; the bits of an `f64`.
    patience: AtomicU64,
}

/// A handle that does not keep the host alive: for the threads of its devices.
#[derive(Clone)]
pub(crate) struct WeakHost(Weak<Shared>);

impl WeakHost {
    /// A handle of no host: what is sent goes nowhere.
    #[cfg(test)]
    pub(crate) fn nobody() -> Self {
        WeakHost(Weak::new())
    }

    /// Sends what belongs to one opening of a channel, if that is not over.
    pub(crate) fn send_within(&self, relid: u32, opening: u64, packet: Outgoing) {
        if let Some(shared) = self.0.upgrade() {
            lock(&shared.bus).send_within(relid, opening, packet);
            shared.changed.notify_all();
        }
    }
}

/// The host's side of one guest's VMBus. Clones are handles to the same.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
}

impl Host {
    pub(crate) fn new(
        config: &HostConfig,
        vm: Arc<VmFd>,
        memory: GuestMemoryMmap,
        synic: Arc<SynIc>,
        console: Arc<Console>,
    ) -> Self {
        let wanted = [
            config.vss,
            config.heartbeat,
            config.shutdown,
            false,
            config.timesync,
            config.kvp,
        ];
        let count = Arc::default();
        let profile = config.profile;
        let dialogues = COMPONENTS.map(|component| {
            let dialogue =
                Dialogue::new(Arc::clone(&count), &profile, (component.versions)(&profile));
            Arc::new(Mutex::new(dialogue))
        });
        let mut devices: Vec<(Box<dyn Device>, bool)> = Vec::new();
        for ((component, dialogue), wanted) in COMPONENTS.iter().zip(&dialogues).zip(wanted) {
            let place = Place {
                pipe: profile.carriage == Carriage::Pipe,
                ..component.place
            };
            let device = IcDevice::new(place, dialogue.clone());
            devices.push((Box::new(device), wanted));
        }
        let balloon = Arc::<Account>::default();
        let device = BalloonDevice::new(BALLOON_PLACE, memory.clone(), balloon.clone());
        devices.push((Box::new(device), config.balloon));
        let shared = Arc::new_cyclic(|weak| {
            let mut units = Vec::new();
            for place in (0..config.scsi_controllers).map_while(scsi_place) {
                let disks = Arc::<Mutex<Units>>::default();
                let host = WeakHost(weak.clone());
                let device = ControllerDevice::new(place, memory.clone(), host, disks.clone());
                devices.push((Box::new(device), true));
                units.push(disks);
            }
            let mut versions = VmbusVersion::ALL.to_vec();
            versions.retain(|it| *it <= profile.vmbus);
            let bus = Bus::new(memory, synic, versions, devices);
            Shared {
                vm,
                bus: Mutex::new(bus),
                changed: Condvar::new(),
                dialogues,
                balloon,
                units,
                console,
                profile,
                patience: AtomicU64::new(config.patience.to_bits()),
            }
        });
        Host { shared }
    }

    /// What kind of host it is.
    pub fn profile(&self) -> &Profile {
        &self.shared.profile
    }

    /// How long to wait for this guest where one with a stock kernel is given so much time. All
    /// methods with a limit do that by themselves.
    pub fn patience(&self, limit: Duration) -> Duration {
        limit.mul_f64(f64::from_bits(self.shared.patience.load(Ordering::Relaxed)))
    }

    /// Changes [`HostConfig::patience`], for what begins to wait from now on.
    pub fn set_patience(&self, patience: f64) {
        let bits = patience.to_bits();
        self.shared.patience.store(bits, Ordering::Relaxed);
    }

    /// Time since the machine was started: the clock of all events.
    pub fn now(&self) -> Duration {
        self.bus().since_start(Instant::now())
    }

    /// What the guest's reference time is now (`HV_X64_MSR_TIME_REF_COUNT`), in units of 100 ns.
    pub fn reference_time(&self) -> Result<u64, HostError> {
        kvm::reference_time(&self.shared.vm).map_err(HostError::ReferenceTime)
    }

    /// Waits until the guest has connected to the bus, and says with which version.
    pub fn wait_connected(&self, timeout: Duration) -> Result<VmbusVersion, HostError> {
        self.wait_for("vmbus", "connection", timeout, |bus| bus.version().map(Ok))
    }

    /// The VSS integration component.
    pub fn vss(&self) -> Vss {
        Vss::new(self.component::<0>())
    }

    /// Another device of the same class, which no host has; offered only by [`Channel::offer`].
    pub fn second_vss(&self) -> Vss {
        Vss::new(self.component::<3>())
    }

    /// The heartbeat integration component.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(self.component::<1>())
    }

    /// The shutdown integration component.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown::new(self.component::<2>())
    }

    /// The time synchronisation integration component.
    pub fn timesync(&self) -> TimeSync {
        TimeSync::new(self.component::<4>())
    }

    /// The integration component for key-value pairs.
    pub fn kvp(&self) -> Kvp {
        Kvp::new(self.component::<5>())
    }

    /// Dynamic memory.
    pub fn balloon(&self) -> Balloon {
        let account = self.shared.balloon.clone();
        Balloon::new(self.channel(BALLOON_PLACE), account)
    }

    /// A SCSI controller, by its number from 0 on.
    pub fn scsi(&self, index: u8) -> Option<Controller> {
        let units = self.shared.units.get(usize::from(index))?.clone();
        Some(Controller::new(self.channel(scsi_place(index)?), units))
    }

    /// Where a moment is on the clock of all events.
    pub fn time_of(&self, moment: Instant) -> Duration {
        self.bus().since_start(moment)
    }

    /// How many pieces of memory the guest shares with the host (GPADLs): one for each open channel,
    /// unless it leaks them.
    pub fn gpadls(&self) -> usize {
        self.bus().gpadls()
    }

    /// All events so far, in the order in which they happened (the oldest are dropped beyond
    /// 100,000).
    pub fn events(&self) -> Vec<Event> {
        self.bus().log().cloned().collect()
    }

    /// The rules that the guest has broken since then on the clock of [`Host::now`], an answer that is
    /// none among them.
    pub fn violations(&self, since: Duration) -> Vec<Event> {
        let bus = self.bus();
        let violations = bus.violations().filter(|it| it.at >= since);
        violations.cloned().collect()
    }

    /// The requests to integration components that the guest has and has not answered, each with its channel.
    pub fn unanswered(&self) -> Vec<String> {
        let _bus = self.bus();
        let all = COMPONENTS.iter().zip(&self.shared.dialogues);
        let owed = all.flat_map(|(component, dialogue)| {
            let names = lock(dialogue).unanswered().into_iter();
            names.map(|name| format!("{}: {name}", component.place.name))
        });
        owed.collect()
    }

    fn component<const N: usize>(&self) -> IcChannel {
        let (component, dialogue) = const {
            assert!(N < COMPONENTS.len());
            (COMPONENTS[N], N)
        };
        let channel = self.channel(component.place);
        let dialogue = self.shared.dialogues[dialogue].clone();
        IcChannel::new(channel, component, dialogue)
    }

    fn channel(&self, place: Place) -> Channel {
        Channel {
            host: self.clone(),
            place,
        }
    }

    pub(crate) fn bus(&self) -> MutexGuard<'_, Bus> {
        lock(&self.shared.bus)
    }

    /// Changes the bus and wakes whoever waits for a change.
    pub(crate) fn change<T>(&self, f: impl FnOnce(&mut Bus) -> T) -> T {
        let result = f(&mut self.bus());
        self.shared.changed.notify_all();
        result
    }

    /// Waits until `f` has something to say about the bus.
    pub(crate) fn wait_for<T>(
        &self,
        channel: &'static str,
        what: &str,
        timeout: Duration,
        mut f: impl FnMut(&mut Bus) -> Option<Result<T, HostError>>,
    ) -> Result<T, HostError> {
        let timeout = self.patience(timeout);
        let start = Instant::now();
        let mut bus = self.bus();
        loop {
            if let Some(result) = f(&mut bus) {
                return result;
            }
            if let Some(error) = self.guest_gone(&bus, channel, what) {
                return Err(error);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(HostError::Timeout {
                    channel,
                    what: what.to_string(),
                    after: timeout,
                    seen: last_events(&bus, channel),
                    console: self.shared.console.tail(),
                });
            }
            bus = self
                .shared
                .changed
                .wait_timeout(bus, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(crate) fn guest_gone(
        &self,
        bus: &Bus,
        channel: &'static str,
        what: &str,
    ) -> Option<HostError> {
        bus.gone.clone().map(|exit| HostError::GuestGone {
            channel,
            what: what.to_string(),
            exit,
            console: self.shared.console.tail(),
        })
    }

    // What the machine reports.

    pub(crate) fn hypercall(&self, input: u64, params: [u64; 2]) -> u64 {
        self.change(|bus| bus.hypercall(input, params))
    }

    pub(crate) fn synic_changed(&self, vp: u32, registers: Registers) {
        self.change(|bus| bus.synic_changed(vp, registers));
    }

    pub(crate) fn slot_acknowledged(&self) {
        self.change(Bus::slot_acknowledged);
    }

    pub(crate) fn guest_crashed(&self) {
        self.change(|bus| bus.note("vmbus", EventKind::Crash));
    }

    pub(crate) fn guest_ended(&self, exit: Exit) {
        self.change(|bus| bus.gone = Some(exit));
    }
}

/// The last events of a channel and of the bus, one a line.
fn last_events(bus: &Bus, channel: &str) -> String {
    let events = bus.log().rev();
    let mut lines: Vec<String> = events
        .filter(|event| event.channel == channel || event.channel == "vmbus")
        .take(20)
        .map(ToString::to_string)
        .collect();
    lines.reverse();
    if lines.is_empty() {
        return "(nothing)".to_string();
    }
    lines.join("\n")
}
