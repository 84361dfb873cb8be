// SPDX-License-Identifier: GPL-2.0-only

//! Dynamic memory: the host takes pages from the guest and gives them back, and is told how much the
//! guest needs.
//!
//! The device answers the guest's greeting at once and keeps account of the pages; the handle asks.
//! What the guest gives is the host's from then on: its content is overwritten, so that a guest that
//! still uses it comes to grief. Memory is never added to what the guest was started with.

pub mod message;

use self::message::{Capabilities, Message, PageRange, Status, MAX_RANGES};
use crate::bus::{chain, lock};
use crate::channel::Channel;
use crate::device::{Device, Outgoing, Place, Wishes};
use crate::event::EventKind;
use crate::host::HostError;
use crate::vmbus::protocol::{packet_type, PAGE_SIZE};
use crate::vmbus::ring::{Descriptor, Packet};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What is in a page that the host has taken.
const TAKEN: [u8; PAGE_SIZE] = [0xdb; PAGE_SIZE];

/// How far the guest has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Closed,
    Opened,
    Versioned,
    Ready,
}

/// What the host has asked for and was not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// So many pages, of which it has got some.
    Pages { wanted: u32, got: u64 },
    /// To take so many back.
    TakeBack(u64),
}

/// What device and handles share.
#[derive(Default)]
pub(crate) struct Account {
    /// It is looked at under the bus's lock, or for a moment.
    state: Mutex<State>,
    /// Held by whoever asks: the guest is asked for one thing at a time.
    turn: Mutex<()>,
}

#[derive(Default)]
struct State {
    stage: Stage,
    capabilities: Option<Capabilities>,
    /// The last one, and how many there were.
    status: Option<Status>,
    reports: u64,
    asked: Option<Asked>,
    /// How many pages what was asked last has moved, when it is over.
    moved: Option<u64>,
    /// The pages that the host has: how many, by the first of each range. A guest that closes the
    /// channel does not get them back.
    taken: BTreeMap<u64, u32>,
    /// The number of the last request.
    transaction: u32,
}

impl State {
    /// The messages that ask for it.
    fn begin(&mut self, asked: Asked) -> Vec<Vec<u8>> {
        self.asked = Some(asked);
        self.moved = None;
        self.transaction = self.transaction.wrapping_add(1);
        match asked {
            Asked::Pages { wanted, .. } => {
                vec![message::balloon_request(self.transaction, wanted)]
            }
            Asked::TakeBack(_) => {
                let taken = self.taken.iter();
                let ranges: Vec<PageRange> = taken
                    .map(|(first, count)| PageRange {
                        first: *first,
                        count: *count,
                    })
                    .collect();
                let mut chunks = ranges.chunks(MAX_RANGES).peekable();
                let mut messages = Vec::new();
                while let Some(chunk) = chunks.next() {
                    let more = chunks.peek().is_some();
                    messages.push(message::unballoon_request(self.transaction, chunk, more));
                }
                messages
            }
        }
    }

    fn end(&mut self, moved: u64) {
        self.asked = None;
        self.moved = Some(moved);
    }

    fn taken_pages(&self) -> u64 {
        self.taken.values().copied().map(u64::from).sum()
    }

    /// The guest gives these pages.
    fn take(&mut self, ranges: &[PageRange], memory: &GuestMemoryMmap) -> Result<(), String> {
        let Some(Asked::Pages { wanted, got }) = &mut self.asked else {
            return Err("pages that nobody has asked for".into());
        };
        for PageRange { first, count } in ranges.iter().copied() {
            let (pages, end) = (u64::from(count), first + u64::from(count));
            let text = format!("pages {first:#x} to {end:#x}");
            if pages == 0 || *got + pages > u64::from(*wanted) {
                return Err(format!("{text}, after {got} of {wanted}"));
            }
            // Of those that begin before its end, the last would be in its way.
            let last = self.taken.range(..end).next_back();
            if last.is_some_and(|(it, count)| it + u64::from(*count) > first) {
                return Err(format!("{text}, some of which the host has already"));
            }
            for page in first..end {
                let address = GuestAddress(page * PAGE_SIZE as u64);
                let filled = memory.write_slice(&TAKEN, address);
                filled.map_err(|_| format!("{text}, some of which it does not have"))?;
            }
            self.taken.insert(first, count);
            *got += pages;
        }
        Ok(())
    }

    /// What the guest has said: the answer, if it gets one, and what is wrong with it.
    fn heard(
        &mut self,
        transaction: u32,
        message: &Message,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<Vec<u8>>, String> {
        match (message, self.stage, self.asked) {
            (Message::Version(version), Stage::Opened, _) => {
                let accepted = *version == message::VERSION;
                if accepted {
                    self.stage = Stage::Versioned;
                }
                return Ok(Some(message::version_response(transaction, accepted)));
            }
            (Message::Capabilities(capabilities), Stage::Versioned, _) => {
                self.stage = Stage::Ready;
                self.capabilities = Some(*capabilities);
                return Ok(Some(message::capabilities_response(transaction)));
            }
            (Message::Status(status), Stage::Ready, _) => {
                self.status = Some(*status);
                self.reports += 1;
            }
            (Message::Ballooned { more, ranges }, _, _) => {
                let taken = self.take(ranges, memory);
                if let (false, Some(Asked::Pages { got, .. })) = (more, self.asked) {
                    self.end(got);
                }
                taken?;
            }
            (Message::Unballooned, Stage::Ready, Some(Asked::TakeBack(pages))) => self.end(pages),
            (message, stage, asked) => {
                return Err(format!(
                    "{message:?} from a guest that is {stage:?} and was asked {asked:?}"
                ));
            }
        }
        Ok(None)
    }
}

/// The device.
pub(crate) struct BalloonDevice {
    place: Place,
    memory: GuestMemoryMmap,
    account: Arc<Account>,
}

impl BalloonDevice {
    pub(crate) fn new(place: Place, memory: GuestMemoryMmap, account: Arc<Account>) -> Self {
        BalloonDevice {
            place,
            memory,
            account,
        }
    }
}

impl Device for BalloonDevice {
    fn offer(&self) -> Place {
        self.place
    }

    fn opened(&mut self, _: u64, _: &mut Wishes) {
        lock(&self.account.state).stage = Stage::Opened;
    }

    fn packet(&mut self, packet: Packet, _: Instant, wishes: &mut Wishes) {
        let heard = match (packet.packet_type, Message::parse(&packet.payload)) {
            (packet_type::DATA_INBAND, Ok((transaction, message))) => {
                let mut state = lock(&self.account.state);
                state.heard(transaction, &message, &self.memory)
            }
            (packet_type::DATA_INBAND, Err(error)) => Err(chain(&error)),
            (other, _) => Err(format!("a packet of type {other}")),
        };
        match heard {
            Ok(answer) => wishes.send.extend(answer.map(outgoing)),
            Err(what) => wishes.notes.push(EventKind::Violation(what)),
        }
    }

    fn sent(&mut self, _: u64, _: usize, _: Instant) -> Option<EventKind> {
        None
    }

    fn closed(&mut self) {
        let mut state = lock(&self.account.state);
        state.stage = Stage::Closed;
        state.asked = None;
    }
}

/// The packet with a message, which has no transaction but that in its own header.
fn outgoing(payload: Vec<u8>) -> Outgoing {
    Outgoing {
        transaction: 0,
        id: 0,
        descriptor: Descriptor::new(packet_type::DATA_INBAND, 0),
        payload,
    }
}

/// The guest's memory, as far as the host takes and gives it. All that a [`Channel`] can do, it can do
/// too. All pages have 4 KiB.
#[derive(Clone)]
pub struct Balloon {
    channel: Channel,
    account: Arc<Account>,
}

impl Deref for Balloon {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Balloon {
    pub(crate) fn new(channel: Channel, account: Arc<Account>) -> Self {
        Balloon { channel, account }
    }

    /// Waits until the guest's driver has agreed on the version, and returns what it can do.
    pub fn wait_ready(&self, timeout: Duration) -> Result<Capabilities, HostError> {
        self.wait("report of capabilities", timeout, |state| {
            let ready = state.stage == Stage::Ready;
            ready.then_some(Ok(state.capabilities?))
        })
    }

    /// Waits for the guest's next report of its memory; one comes about every second.
    pub fn wait_status(&self, timeout: Duration) -> Result<Status, HostError> {
        let before = lock(&self.account.state).reports;
        self.wait("report of memory", timeout, |state| {
            (state.reports > before).then_some(Ok(state.status?))
        })
    }

    /// How many pages the host has of the guest's.
    pub fn taken_pages(&self) -> u64 {
        lock(&self.account.state).taken_pages()
    }

    /// Asks the guest for so many pages and returns how many it has given: fewer, if it needs them.
    pub fn take(&self, pages: u32, timeout: Duration) -> Result<u64, HostError> {
        let asked = Asked::Pages {
            wanted: pages,
            got: 0,
        };
        self.ask("balloon up", timeout, |_| asked)
    }

    /// Gives the guest back all that was taken, and returns how many pages that was.
    pub fn give_back(&self, timeout: Duration) -> Result<u64, HostError> {
        if self.taken_pages() == 0 {
            return Ok(0);
        }
        self.ask("balloon down", timeout, |state| {
            Asked::TakeBack(state.taken_pages())
        })
    }

    /// Asks for something as soon as nothing else is under way, and waits for the last answer.
    fn ask(
        &self,
        what: &str,
        timeout: Duration,
        wish: impl Fn(&State) -> Asked,
    ) -> Result<u64, HostError> {
        let _turn = lock(&self.account.turn);
        let host = &self.channel.host;
        let name = self.place.name;
        host.wait_for(name, "end of what was asked before", timeout, |bus| {
            let (asked, messages) = {
                let mut state = lock(&self.account.state);
                match (state.stage, state.asked) {
                    (Stage::Ready, None) => {}
                    (Stage::Ready, Some(_)) => return None,
                    _ => return Some(Err(self.not_open(what))),
                }
                let asked = wish(&state);
                (asked, state.begin(asked))
            };
            let mut messages = messages.into_iter().map(outgoing);
            let sent = messages.try_for_each(|it| bus.send(self.place.relid, it));
            let mut state = lock(&self.account.state);
            match (&sent, asked) {
                // They are the guest's as soon as it reads of them, which it has yet to say.
                (Ok(()), Asked::TakeBack(_)) => state.taken.clear(),
                (Ok(()), Asked::Pages { .. }) => {}
                (Err(_), _) => state.asked = None,
            }
            Some(sent.map_err(|error| self.not_sent(what, error)))
        })?;
        self.wait(&format!("answer to {what}"), timeout, |state| {
            match (state.moved, state.asked) {
                (Some(moved), _) => Some(Ok(moved)),
                (None, Some(_)) => None,
                (None, None) => Some(Err(self.not_open(what))),
            }
        })
    }

    /// Waits until the state has something to say.
    fn wait<T>(
        &self,
        what: &str,
        timeout: Duration,
        look: impl Fn(&State) -> Option<Result<T, HostError>>,
    ) -> Result<T, HostError> {
        let host = &self.channel.host;
        host.wait_for(self.place.name, what, timeout, |_| {
            look(&lock(&self.account.state))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::message::tests::{ballooned, capabilities, of_words};
    use super::message::{message_type, VERSION};
    use super::*;
    use crate::vmbus::protocol::Guid;

    const PLACE: Place = Place {
        name: "balloon",
        relid: 10,
        class: message::CLASS,
        instance: Guid([10; 16]),
        pipe: false,
    };

    /// A device of a guest with 16 pages, and no bus behind it.
    struct Rig(BalloonDevice);

    impl Rig {
        fn new() -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let mut device = BalloonDevice::new(PLACE, memory, Arc::default());
            device.opened(1, &mut Wishes::default());
            Rig(device)
        }

        /// One whose guest has introduced itself.
        fn ready() -> Self {
            let mut rig = Rig::new();
            rig.says(of_words(message_type::VERSION_REQUEST, &[VERSION, 1]))
                .unwrap();
            rig.says(capabilities(1)).unwrap();
            rig
        }

        /// The guest sends this: the answer, or what is wrong with it.
        fn says(&mut self, payload: Vec<u8>) -> Result<Option<Vec<u8>>, String> {
            let packet = Packet {
                packet_type: packet_type::DATA_INBAND,
                flags: 0,
                transaction: 0,
                extra: Vec::new(),
                payload,
            };
            let mut wishes = Wishes::default();
            self.0.packet(packet, Instant::now(), &mut wishes);
            match wishes.notes.pop() {
                Some(EventKind::Violation(what)) => Err(what),
                Some(other) => panic!("{other:?}"),
                None => Ok(wishes.send.pop().map(|it| it.payload)),
            }
        }

        fn state(&self) -> std::sync::MutexGuard<'_, State> {
            lock(&self.0.account.state)
        }

        fn asks_for(&self, wanted: u32) {
            self.state().begin(Asked::Pages { wanted, got: 0 });
        }
    }

    #[test]
    fn the_guest_introduces_itself_in_order() {
        let mut rig = Rig::new();
        let report = || of_words(message_type::STATUS_REPORT, &[5, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
        assert!(rig.says(capabilities(1)).is_err(), "no version yet");
        assert!(rig.says(report()).is_err());
        let refused = rig.says(of_words(message_type::VERSION_REQUEST, &[1 << 16, 0]));
        assert_eq!(refused.unwrap().unwrap()[8], 0);
        assert!(rig.says(capabilities(1)).is_err(), "still none");
        let version = || of_words(message_type::VERSION_REQUEST, &[VERSION, 1]);
        let accepted = rig.says(version()).unwrap().unwrap();
        assert_eq!((accepted[4], accepted[8]), (7, 1));
        assert_eq!(rig.says(capabilities(1)).unwrap().unwrap()[8], 1);
        assert_eq!(rig.says(report()), Ok(None));
        assert_eq!(rig.state().status.unwrap().committed_pages, 6);
        assert!(rig.says(version()).is_err(), "once is enough");
        rig.0.closed();
        rig.0.opened(2, &mut Wishes::default());
        assert!(rig.says(report()).is_err(), "it begins anew");
    }

    #[test]
    fn pages_are_taken_in_several_messages_and_given_back_as_they_came() {
        let mut rig = Rig::ready();
        rig.asks_for(7);
        assert_eq!(rig.says(ballooned(&[(8, 4), (2, 1)], true)), Ok(None));
        assert_eq!(rig.state().moved, None);
        assert_eq!(rig.says(ballooned(&[(3, 1)], false)), Ok(None));
        assert_eq!(rig.state().moved, Some(6));
        assert_eq!(rig.state().taken_pages(), 6);
        let mut page = [0; 1];
        for (number, taken) in [(2, true), (4, false), (8, true), (11, true), (12, false)] {
            let address = GuestAddress(number * PAGE_SIZE as u64 + 4095);
            rig.0.memory.read_slice(&mut page, address).unwrap();
            assert_eq!(page[0] == TAKEN[0], taken, "page {number}");
        }
        let messages = rig.state().begin(Asked::TakeBack(6));
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].len(), 16 + 3 * 8);
        let back = of_words(message_type::UNBALLOON_RESPONSE, &[]);
        assert_eq!(rig.says(back.clone()), Ok(None));
        assert_eq!(rig.state().moved, Some(6));
        assert!(rig.says(back).is_err(), "nothing is asked any more");
    }

    #[test]
    fn many_ranges_are_given_back_in_several_messages() {
        let taken = (0..MAX_RANGES as u64 + 1).map(|it| (2 * it, 1)).collect();
        let mut state = State {
            taken,
            ..State::default()
        };
        let messages = state.begin(Asked::TakeBack(state.taken_pages()));
        let seen: Vec<_> = messages.iter().map(|it| (it.len(), it[8])).collect();
        assert_eq!(seen, [(4096, 1), (24, 0)]);
    }

    #[test]
    fn a_guest_that_lies_about_pages_is_caught() {
        let mut rig = Rig::ready();
        assert!(rig.says(ballooned(&[(1, 1)], false)).is_err(), "unasked");
        rig.asks_for(4);
        assert_eq!(rig.says(ballooned(&[(5, 2)], true)), Ok(None));
        for (first, count) in [
            (5, 1),
            (6, 2),
            (4, 2),
            (1, 3),
            (1, 0),
            (1, 0xff_ffff),
            (15, 2),
            (16, 1),
            (0xff_ffff_ffff, 1),
        ] {
            let said = rig.says(ballooned(&[(first, count)], true));
            assert!(said.is_err(), "{count} pages from {first}");
        }
        assert_eq!(rig.state().taken_pages(), 2);
        // Who waits for the pages is not left waiting.
        assert!(rig.says(ballooned(&[(5, 1)], false)).is_err());
        assert_eq!(rig.state().moved, Some(2));
    }
}
