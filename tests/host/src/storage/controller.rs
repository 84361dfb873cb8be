// SPDX-License-Identifier: GPL-2.0-only

//! A SCSI controller as a device on the bus, and the handle of it that a test holds.
//!
//! The device answers the guest's initialisation at once and hands every command to its disk, whose
//! thread sends the completion. What a command means it does not know, but for those that are
//! answered without a disk.

use super::disk::{Command, Disk, Outcome, Way};
use super::lent::{Lease, Lent};
use super::scsi::{self, Action, Sense};
use super::vstor::{self, operation, scsi_status, srb_status, status};
use super::vstor::{ChannelProperties, Request, ScsiRequest};
use crate::bus::{chain, lock};
use crate::channel::Channel;
use crate::device::{Device, Outgoing, Place, Wishes};
use crate::event::EventKind;
use crate::host::WeakHost;
use crate::ic::vss::Lun;
use crate::vmbus::protocol::packet_type;
use crate::vmbus::ring::{Descriptor, Packet};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vm_memory::GuestMemoryMmap;
use zerocopy::little_endian::{U16, U32};
use zerocopy::IntoBytes;

/// The most that one command may move, in bytes: what scsi.rs takes.
const MAX_TRANSFER: u32 = 1 << 20;

/// How far the guest has come with its initialisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Opened,
    Begun,
    Versioned,
    Queried,
    Ready,
}

/// What device and handle share. It is looked at under the bus's lock, or for a moment.
#[derive(Default)]
pub(crate) struct Units {
    disks: BTreeMap<u8, Disk>,
    stage: Stage,
}

/// The device.
pub(crate) struct ControllerDevice {
    place: Place,
    memory: GuestMemoryMmap,
    host: WeakHost,
    units: Arc<Mutex<Units>>,
    opening: u64,
    lease: Lease,
}

impl ControllerDevice {
    pub(crate) fn new(
        place: Place,
        memory: GuestMemoryMmap,
        host: WeakHost,
        units: Arc<Mutex<Units>>,
    ) -> Self {
        ControllerDevice {
            place,
            memory,
            host,
            units,
            opening: 0,
            lease: Lease::new(),
        }
    }

    /// Answers a message of the initialisation with a status and a body.
    fn initialise(&self, request: &Request, wishes: &mut Wishes) -> (u32, Vec<u8>) {
        let stage = &mut lock(&self.units).stage;
        let (status, body, next) = match (&request, *stage) {
            (Request::BeginInitialization, _) => (status::SUCCESS, Vec::new(), Stage::Begun),
            (Request::QueryProtocolVersion(version), Stage::Begun) => {
                let body = version.to_le_bytes().to_vec();
                match vstor::VERSIONS.contains(version) {
                    true => (status::SUCCESS, body, Stage::Versioned),
                    false => (status::REVISION_MISMATCH, body, Stage::Begun),
                }
            }
            (Request::QueryProperties, Stage::Versioned) => {
                let properties = ChannelProperties {
                    reserved: U32::new(0),
                    max_sub_channels: U16::new(0),
                    reserved1: U16::new(0),
                    flags: U32::new(1),
                    max_transfer_bytes: U32::new(MAX_TRANSFER),
                    reserved2: [U32::new(0); 2],
                };
                let body = properties.as_bytes().to_vec();
                (status::SUCCESS, body, Stage::Queried)
            }
            (Request::EndInitialization, Stage::Queried) => {
                (status::SUCCESS, Vec::new(), Stage::Ready)
            }
            // Linux asks after the end of the initialisation, Windows before.
            (Request::CreateSubChannels(0), Stage::Queried | Stage::Ready) => {
                (status::SUCCESS, Vec::new(), *stage)
            }
            (Request::CreateSubChannels(_), Stage::Queried | Stage::Ready) => {
                (status::INVALID_PARAMETER, Vec::new(), *stage)
            }
            (request, stage) => {
                let what = format!("{request:?} from a guest that is {stage:?}");
                wishes.notes.push(EventKind::Violation(what));
                (status::INVALID_DEVICE_STATE, Vec::new(), stage)
            }
        };
        *stage = next;
        (status, body)
    }

    /// Hands a command to its disk, or answers it when there is none.
    fn execute(&self, request: ScsiRequest, packet: &Packet, at: Instant) -> Option<Completion> {
        let (status, srb) = (status::SUCCESS, srb_status::SUCCESS);
        let bad = |status, srb| Some(Completion::new(request, status, srb));
        let lent = Lent::parse(self.memory.clone(), self.lease.clone(), &packet.extra);
        // What it says of its data is all of it, and has to be there.
        let len = request.data_length.get() as usize;
        let Some(lent) = lent.ok().and_then(|lent| lent.first(len)) else {
            return bad(status::INVALID_PARAMETER, srb_status::INVALID_REQUEST);
        };
        let Some(cdb) = request.payload.get(..request.cdb_length.into()) else {
            return bad(status::INVALID_PARAMETER, srb_status::INVALID_REQUEST);
        };
        let units = lock(&self.units);
        // All disks are on the first target of the first bus.
        let disks = match (request.path, request.target) {
            (0, 0) => &units.disks,
            _ => &BTreeMap::new(),
        };
        let answer = match scsi::report_luns(cdb, disks.keys().copied()) {
            Some(answer) => answer,
            None => match (disks.get(&request.lun), scsi::absent_inquiry(cdb)) {
                (Some(disk), _) => {
                    disk.submit(self.command(request, cdb, lent, packet.transaction, at));
                    return None;
                }
                (None, Some(answer)) => answer,
                (None, None) => return bad(status::DEVICE_DOES_NOT_EXIST, srb_status::INVALID_LUN),
            },
        };
        let mut completion = Completion::new(request, status, srb);
        match answer {
            Ok(Action::Answer(_)) if way(&request) != Way::In => {
                return bad(status::INVALID_PARAMETER, srb_status::INVALID_REQUEST)
            }
            Ok(Action::Answer(bytes)) => match lent.write(&bytes) {
                Ok(moved) => completion.moved(moved as u32),
                Err(_) => return bad(status::INVALID_PARAMETER, srb_status::INVALID_REQUEST),
            },
            Ok(_) => return bad(status::IO_DEVICE_ERROR, srb_status::ERROR),
            Err(sense) => completion.check(sense),
        }
        Some(completion)
    }

    /// The command for the disk, which sends the completion itself.
    fn command(
        &self,
        request: ScsiRequest,
        cdb: &[u8],
        data: Lent,
        transaction: u64,
        arrived: Instant,
    ) -> Command {
        let (host, relid, opening) = (self.host.clone(), self.place.relid, self.opening);
        Command {
            cdb: cdb.to_vec(),
            data,
            way: way(&request),
            arrived,
            from: relid,
            done: Box::new(move |outcome| {
                let completion = Completion::of(request, outcome);
                host.send_within(relid, opening, completion.packet(transaction));
            }),
        }
    }

    fn disks(&self) -> Vec<Disk> {
        lock(&self.units).disks.values().cloned().collect()
    }
}

impl Device for ControllerDevice {
    fn offer(&self) -> Place {
        self.place
    }

    fn opened(&mut self, opening: u64, _: &mut Wishes) {
        self.opening = opening;
        self.lease = Lease::new();
        lock(&self.units).stage = Stage::Opened;
    }

    fn packet(&mut self, packet: Packet, at: Instant, wishes: &mut Wishes) {
        let transaction = packet.transaction;
        let request = match Request::parse(&packet.payload) {
            Ok(request) => request,
            Err(error) => {
                wishes.notes.push(EventKind::Violation(chain(&error)));
                let message =
                    vstor::message(operation::COMPLETE_IO, status::INVALID_PARAMETER, &[]);
                wishes.send.push(completion(transaction, message));
                return;
            }
        };
        let message = match request {
            Request::ExecuteSrb(request) if lock(&self.units).stage == Stage::Ready => {
                if let Some(completion) = self.execute(request, &packet, at) {
                    wishes.send.push(completion.packet(transaction));
                }
                return;
            }
            Request::Reset if lock(&self.units).stage == Stage::Ready => {
                // The aborted commands are completed on the way out of the bus's lock, so by a
                // thread of their own; the guest waits for all of them after this answer.
                let (disks, from) = (self.disks(), self.place.relid);
                std::thread::spawn(move || disks.iter().for_each(|disk| disk.abort(from)));
                vstor::message(operation::COMPLETE_IO, status::SUCCESS, &[])
            }
            other => {
                let (status, body) = self.initialise(&other, wishes);
                vstor::message(operation::COMPLETE_IO, status, &body)
            }
        };
        wishes.send.push(completion(transaction, message));
    }

    fn sent(&mut self, _: u64, _: usize, _: Instant) -> Option<EventKind> {
        None
    }

    fn closed(&mut self) {
        self.lease.end();
        lock(&self.units).stage = Stage::Opened;
    }
}

/// Which way the data of a command goes. One that says that it sends none sends none.
fn way(request: &ScsiRequest) -> Way {
    match (request.data_in, request.data_length.get()) {
        (_, 0) => Way::None,
        (vstor::DATA_OUT, _) => Way::Out,
        (vstor::DATA_IN, _) => Way::In,
        _ => Way::None,
    }
}

/// A completion that is being filled in.
struct Completion {
    status: u32,
    request: ScsiRequest,
}

impl Completion {
    /// One that has moved nothing.
    fn new(mut request: ScsiRequest, status: u32, srb_status: u8) -> Self {
        request.srb_status = srb_status;
        request.scsi_status = scsi_status::GOOD;
        request.data_length = U32::new(0);
        request.sense_length = 0;
        Completion { status, request }
    }

    fn of(request: ScsiRequest, outcome: Outcome) -> Self {
        let new = |status, srb| Completion::new(request, status, srb);
        match outcome {
            Outcome::Good { moved } => {
                let mut completion = new(status::SUCCESS, srb_status::SUCCESS);
                completion.moved(moved);
                completion
            }
            Outcome::Check(sense) => {
                let mut completion = new(status::SUCCESS, srb_status::SUCCESS);
                completion.check(sense);
                completion
            }
            Outcome::BadMemory => new(status::INVALID_PARAMETER, srb_status::INVALID_REQUEST),
            // Of storvsc's own list; what was moved is nothing.
            Outcome::Overrun => new(status::INVALID_PARAMETER, srb_status::DATA_OVERRUN),
            Outcome::Aborted => new(status::CANCELLED, srb_status::ABORTED),
        }
    }

    fn moved(&mut self, bytes: u32) {
        self.request.data_length = U32::new(bytes);
    }

    fn check(&mut self, sense: Sense) {
        self.status = status::IO_DEVICE_ERROR;
        self.request.srb_status = srb_status::ERROR | srb_status::AUTOSENSE_VALID;
        self.request.scsi_status = scsi_status::CHECK_CONDITION;
        self.request.sense_length = scsi::SENSE_LEN as u8;
        self.request.payload = [0; 20];
        if let Some(room) = self.request.payload.get_mut(..scsi::SENSE_LEN) {
            room.copy_from_slice(&sense.bytes());
        }
    }

    fn packet(self, transaction: u64) -> Outgoing {
        let body = self.request.as_bytes();
        let message = vstor::message(operation::COMPLETE_IO, self.status, body);
        completion(transaction, message)
    }
}

/// The packet that ends a transaction of the guest.
fn completion(transaction: u64, payload: Vec<u8>) -> Outgoing {
    Outgoing {
        transaction,
        id: transaction,
        descriptor: Descriptor::new(packet_type::COMPLETION, 0),
        payload,
    }
}

/// A SCSI controller of the host. All that a [`Channel`] can do, it can do too.
#[derive(Clone)]
pub struct Controller {
    channel: Channel,
    units: Arc<Mutex<Units>>,
}

impl Deref for Controller {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Controller {
    pub(crate) fn new(channel: Channel, units: Arc<Mutex<Units>>) -> Self {
        Controller { channel, units }
    }

    /// Puts a disk on the controller in place of what is there. A guest that has a driver is told to
    /// look.
    pub fn attach(&self, lun: u8, disk: &Disk) {
        lock(&self.units).disks.insert(lun, disk.clone());
        self.announce();
    }

    /// Takes a disk off. A guest that has a driver is told to look; what it had asked of the disk
    /// still ends.
    pub fn detach(&self, lun: u8) -> Option<Disk> {
        let disk = lock(&self.units).disks.remove(&lun);
        self.announce();
        disk
    }

    /// The disks that are on it now.
    pub fn disks(&self) -> BTreeMap<u8, Disk> {
        lock(&self.units).disks.clone()
    }

    /// Whether the guest's driver has come so far that it sends commands.
    pub fn is_ready(&self) -> bool {
        lock(&self.units).stage == Stage::Ready
    }

    /// How a FREEZE names one of its disks.
    pub fn lun(&self, lun: u8) -> Lun {
        Lun::scsi(self.channel.instance(), 0, 0, lun)
    }

    /// Tells a guest that listens that the disks have changed.
    fn announce(&self) {
        self.channel.host.change(|bus| {
            if !self.is_ready() {
                return;
            }
            let packet = Outgoing {
                // Of no transaction of the guest's.
                transaction: 0,
                id: 0,
                descriptor: Descriptor::new(packet_type::DATA_INBAND, 0),
                payload: vstor::message(operation::ENUMERATE_BUS, status::SUCCESS, &[]),
            };
            // A guest that closes the channel at this moment looks when it opens it again.
            let _ = bus.send(self.channel.place.relid, packet);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Image;
    use crate::vmbus::protocol::{Guid, PAGE_SIZE};
    use vm_memory::{Bytes, GuestAddress};

    const PLACE: Place = Place {
        name: "scsi-0",
        relid: 5,
        class: vstor::CLASS,
        instance: Guid([5; 16]),
        pipe: false,
    };

    /// A controller with a guest's memory, and no bus behind it.
    struct Rig {
        device: ControllerDevice,
        memory: GuestMemoryMmap,
        /// What commands say of their data.
        data_in: u8,
        data_length: u32,
    }

    impl Rig {
        fn new() -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let units = Arc::<Mutex<Units>>::default();
            let host = WeakHost::nobody();
            let mut device = ControllerDevice::new(PLACE, memory.clone(), host, units);
            device.opened(1, &mut Wishes::default());
            Rig {
                device,
                memory,
                data_in: vstor::DATA_IN,
                data_length: PAGE_SIZE as u32,
            }
        }

        /// Sends a message and returns the completion's status, its body and what was noted.
        fn ask(&mut self, operation: u32, body: &[u8], extra: &[u8]) -> Option<(u32, Vec<u8>)> {
            let packet = Packet {
                packet_type: packet_type::DATA_INBAND,
                flags: 1,
                transaction: 77,
                extra: extra.to_vec(),
                payload: vstor::message(operation, 0, body),
            };
            let mut wishes = Wishes::default();
            self.device.packet(packet, Instant::now(), &mut wishes);
            let answer = wishes.send.pop()?;
            assert_eq!(answer.transaction, 77);
            assert_eq!(
                answer.descriptor,
                Descriptor::new(packet_type::COMPLETION, 0)
            );
            assert_eq!(answer.payload[..4], operation::COMPLETE_IO.to_le_bytes());
            let status = answer.payload[8..12].try_into().unwrap();
            Some((u32::from_le_bytes(status), answer.payload[12..].to_vec()))
        }

        fn initialise(&mut self) {
            for (operation, body) in [
                (operation::BEGIN_INITIALIZATION, &[][..]),
                (operation::QUERY_PROTOCOL_VERSION, &[2, 6]),
                (operation::QUERY_PROPERTIES, &[]),
                (operation::END_INITIALIZATION, &[]),
            ] {
                let (status, _) = self.ask(operation, body, &[]).unwrap();
                assert_eq!(status, 0, "operation {operation}");
            }
        }

        /// A command whose data goes to page 3; the SRB status and the bytes that were moved.
        fn command(&mut self, target: u8, lun: u8, cdb: &[u8]) -> Option<(u8, Vec<u8>)> {
            let mut body = vec![0; vstor::BODY];
            (body[6], body[7], body[8], body[10]) = (target, lun, cdb.len() as u8, self.data_in);
            body[12..16].copy_from_slice(&self.data_length.to_le_bytes());
            body[16..16 + cdb.len()].copy_from_slice(cdb);
            let mut extra = Vec::new();
            for word in [0, 1, PAGE_SIZE as u32, 0, 3, 0] {
                extra.extend(word.to_le_bytes());
            }
            let (_, body) = self.ask(operation::EXECUTE_SRB, &body, &extra)?;
            let moved = u32::from_le_bytes(body[12..16].try_into().unwrap());
            let mut bytes = vec![0; moved as usize];
            let page = GuestAddress(3 * PAGE_SIZE as u64);
            self.memory.read_slice(&mut bytes, page).unwrap();
            Some((body[2], bytes))
        }
    }

    const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];
    const REPORT_LUNS: [u8; 12] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0];

    #[test]
    fn the_initialisation_has_an_order_and_versions_are_refused_until_one_is_known() {
        let mut rig = Rig::new();
        let state = status::INVALID_DEVICE_STATE;
        let status = |answer: Option<(u32, Vec<u8>)>| answer.unwrap().0;
        assert_eq!(
            status(rig.ask(operation::QUERY_PROPERTIES, &[], &[])),
            state
        );
        assert_eq!(status(rig.ask(operation::EXECUTE_SRB, &[], &[])), state);
        assert_eq!(
            status(rig.ask(operation::BEGIN_INITIALIZATION, &[], &[])),
            0
        );
        let refused = rig.ask(operation::QUERY_PROTOCOL_VERSION, &[2, 4], &[]);
        assert_eq!(status(refused), status::REVISION_MISMATCH);
        assert_eq!(
            status(rig.ask(operation::END_INITIALIZATION, &[], &[])),
            state
        );
        rig.initialise();
        let none = rig.ask(operation::CREATE_SUB_CHANNELS, &[0, 0], &[]);
        assert_eq!(status(none), 0);
        let some = rig.ask(operation::CREATE_SUB_CHANNELS, &[1, 0], &[]);
        assert_eq!(status(some), status::INVALID_PARAMETER);
        assert_eq!(status(rig.ask(99, &[], &[])), status::INVALID_PARAMETER);
        rig.device.closed();
        rig.device.opened(2, &mut Wishes::default());
        assert_eq!(status(rig.ask(operation::EXECUTE_SRB, &[], &[])), state);
    }

    #[test]
    fn without_a_disk_the_controller_answers_itself() {
        let mut rig = Rig::new();
        rig.initialise();
        // The unit that is asked for the others says that it is none.
        let (srb, data) = rig.command(0, 0, &INQUIRY).unwrap();
        assert_eq!((srb, data[0]), (srb_status::SUCCESS, 0x7f));
        let (srb, data) = rig.command(0, 0, &REPORT_LUNS).unwrap();
        assert_eq!((srb, data), (srb_status::SUCCESS, vec![0; 8]));
        assert_eq!(
            rig.command(0, 0, &[0; 6]).unwrap().0,
            srb_status::INVALID_LUN
        );
        // So says every other target: the guest takes no data for a disk, whatever the status.
        let (srb, data) = rig.command(1, 0, &INQUIRY).unwrap();
        assert_eq!((srb, data[0]), (srb_status::SUCCESS, 0x7f));
    }

    #[test]
    fn what_a_request_says_of_its_data_counts() {
        let mut rig = Rig::new();
        rig.initialise();
        // Less than was lent is all that there is.
        rig.data_length = 5;
        let (srb, data) = rig.command(0, 0, &INQUIRY).unwrap();
        assert_eq!((srb, data.len()), (srb_status::SUCCESS, 5));
        // More than was lent is not there.
        rig.data_length = PAGE_SIZE as u32 + 1;
        let (srb, _) = rig.command(0, 0, &INQUIRY).unwrap();
        assert_eq!(srb, srb_status::INVALID_REQUEST);
        // An answer has another way.
        (rig.data_length, rig.data_in) = (36, vstor::DATA_OUT);
        let (srb, _) = rig.command(0, 0, &INQUIRY).unwrap();
        assert_eq!(srb, srb_status::INVALID_REQUEST);
    }

    #[test]
    fn a_command_goes_to_its_disk_and_the_list_of_disks_does_not() {
        let mut rig = Rig::new();
        rig.initialise();
        let disk = Disk::in_memory(Guid([1; 16]), 1 << 20, Image::default()).unwrap();
        disk.set_hung(true);
        lock(&rig.device.units).disks.insert(3, disk.clone());
        assert!(rig.command(0, 3, &INQUIRY).is_none());
        assert_eq!(disk.waiting(), 1);
        let (_, list) = rig.command(0, 3, &REPORT_LUNS).unwrap();
        assert_eq!(list, [0, 0, 0, 8, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(disk.waiting(), 1);
    }
}
