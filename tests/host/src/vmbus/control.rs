// SPDX-License-Identifier: GPL-2.0-only

//! The control plane: what the host does with the guest's messages, without any I/O.
//!
//! [`Server`] takes messages and the host's own wishes (offer, rescind) and returns [`Effect`]s in
//! the order in which they are to be carried out. It knows no rings, no clock and no guest memory:
//! page numbers go through it unread.
//!
//! A guest can break every rule; then the message is dropped with a [`Effect::Violation`] that says
//! why, and where the protocol has an answer for failure the guest gets that.

use super::protocol::*;
use std::collections::BTreeMap;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::IntoBytes;

/// The connection on which a guest starts, from VMBus 5.0 on (`VMBUS_MESSAGE_CONNECTION_ID_4`).
pub const CONNECTION_V5: u32 = 4;
/// The connection on which a guest starts, before 5.0 (`VMBUS_MESSAGE_CONNECTION_ID`).
pub const CONNECTION: u32 = 1;
/// The message port to which the host's messages belong (`VMBUS_MESSAGE_PORT_ID`).
pub const MESSAGE_PORT: u32 = 1;

/// GPADLs that a guest may have at a time, and pages in each.
const MAX_GPADLS: usize = 1024;
const MAX_GPADL_PAGES: usize = 8192;

/// Status for a failed open or GPADL (`STATUS_UNSUCCESSFUL`).
const UNSUCCESSFUL: u32 = 0xC000_0001;

/// One channel that the host may offer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// The channel's number on the bus, at least 1.
    pub relid: u32,
    /// Class of the device.
    pub class: Guid,
    /// Instance of the device.
    pub instance: Guid,
    /// The connection on which the guest signals.
    pub connection_id: u32,
    /// Whether it is a message pipe.
    pub pipe: bool,
}

/// A channel that the guest opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Page numbers of both rings; the guest's own ring (guest to host) is first.
    pub pages: Vec<u64>,
    /// The page at which the other ring starts.
    pub downstream_page: usize,
    /// The virtual processor to signal.
    pub target_vp: u32,
}

/// Something to be done, or to be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Post these bytes as a channel message to this virtual processor.
    Post {
        /// Virtual processor.
        vp: u32,
        /// The message.
        message: Vec<u8>,
    },
    /// The guest connected.
    Connected(VmbusVersion),
    /// The guest left the bus. Its channels were closed before.
    Unloaded,
    /// The channel was offered.
    Offered(u32),
    /// The guest opened the channel. The result has not been posted: [`Server::open_result`] does
    /// that when the rings are found good.
    Opened(u32, Opening),
    /// The channel is closed: its rings must not be touched any more.
    Closed(u32),
    /// The channel was taken back.
    Rescinded(u32),
    /// The guest has released the channel.
    Released(u32),
    /// The channel's interrupts go to another virtual processor.
    Retargeted(u32, u32),
    /// The guest broke a rule.
    Violation(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest does not know of it.
    Hidden,
    /// Offered, not open.
    Offered,
    /// The guest asked to open it and has no answer yet.
    Opening { open_id: u32, gpadl: u32 },
    /// Open, with its rings on this GPADL.
    Open { gpadl: u32 },
    /// Rescinded, not yet released.
    Revoked,
}

#[derive(Debug)]
struct Chan {
    offer: Offer,
    /// Whether the host wants it offered.
    wanted: bool,
    state: State,
}

#[derive(Debug)]
struct Gpadl {
    relid: u32,
    pages: Vec<u64>,
    /// How many pages it is to have.
    total: usize,
}

#[derive(Debug)]
struct Connection {
    version: VmbusVersion,
    vp: u32,
    offers_requested: bool,
}

/// The host's end of the control plane of one guest.
#[derive(Debug)]
pub struct Server {
    accepted: Vec<VmbusVersion>,
    connection: Option<Connection>,
    channels: BTreeMap<u32, Chan>,
    gpadls: BTreeMap<u32, Gpadl>,
}

impl Server {
    /// A host that accepts these versions and knows these channels; each is offered at once or when
    /// [`Server::offer`] says so.
    pub fn new(
        accepted: Vec<VmbusVersion>,
        offers: impl IntoIterator<Item = (Offer, bool)>,
    ) -> Self {
        let channels = offers.into_iter().map(|(offer, wanted)| {
            let state = State::Hidden;
            let channel = Chan {
                offer,
                wanted,
                state,
            };
            (offer.relid, channel)
        });
        Server {
            accepted,
            connection: None,
            channels: channels.collect(),
            gpadls: BTreeMap::new(),
        }
    }

    /// Whether messages on this connection are taken at all.
    pub fn has_connection(&self, id: u32) -> bool {
        match id {
            CONNECTION => true,
            CONNECTION_V5 => self.accepted.iter().any(|v| *v >= VmbusVersion::V5_0),
            _ => false,
        }
    }

    /// The version in force.
    pub fn version(&self) -> Option<VmbusVersion> {
        self.connection.as_ref().map(|c| c.version)
    }

    /// GPADLs that the guest has made and not torn down.
    pub fn gpadls(&self) -> usize {
        self.gpadls.len()
    }

    /// Takes a message that came on a connection.
    pub fn message(&mut self, connection_id: u32, bytes: &[u8]) -> Vec<Effect> {
        let mut out = Vec::new();
        let message = match GuestMessage::parse(bytes) {
            Ok(message) => message,
            Err(error) => return vec![Effect::Violation(error.to_string())],
        };
        if let GuestMessage::InitiateContact(contact) = message {
            self.contact(connection_id, &contact, &mut out);
            return out;
        }
        let Some(connection) = &mut self.connection else {
            return vec![Effect::Violation(format!(
                "{message:?} before the guest has connected"
            ))];
        };
        match message {
            GuestMessage::InitiateContact(_) => {}
            GuestMessage::RequestOffers => {
                connection.offers_requested = true;
                let vp = connection.vp;
                let relids: Vec<u32> = self.channels.keys().copied().collect();
                for relid in relids {
                    self.offer_if_possible(relid, &mut out);
                }
                out.push(post(vp, MessageHeader::new(message::ALLOFFERS_DELIVERED)));
            }
            GuestMessage::OpenChannel(open) => self.open(&open, &mut out),
            GuestMessage::CloseChannel { relid } => self.close(relid, &mut out),
            GuestMessage::GpadlHeader { header, pages } => {
                self.gpadl_header(&header, pages, &mut out);
            }
            GuestMessage::GpadlBody { gpadl, pages } => self.gpadl_body(gpadl, pages, &mut out),
            GuestMessage::GpadlTeardown { relid: _, gpadl } => {
                let in_use = |it: &&Chan| {
                    matches!(it.state,
                        State::Opening { gpadl: of, .. } | State::Open { gpadl: of } if of == gpadl)
                };
                if let Some(channel) = self.channels.values().find(in_use) {
                    out.push(Effect::Violation(format!(
                        "GPADL_TEARDOWN of {gpadl}, which has the rings of channel {}",
                        channel.offer.relid
                    )));
                }
                // A guest waits for this answer even when the GPADL went with its channel.
                self.gpadls.remove(&gpadl);
                let header = MessageHeader::new(message::GPADL_TORNDOWN);
                let id = U32::new(gpadl);
                self.post(OneId { header, id }, &mut out);
            }
            GuestMessage::RelidReleased { relid } => self.released(relid, &mut out),
            GuestMessage::Unload => {
                let vp = connection.vp;
                self.leave(&mut out);
                out.push(Effect::Unloaded);
                out.push(post(vp, MessageHeader::new(message::UNLOAD_RESPONSE)));
            }
            GuestMessage::ModifyChannel { relid, target_vp } => {
                let answered = connection.version >= VmbusVersion::V5_3;
                let known = self.channels.contains_key(&relid);
                if known {
                    out.push(Effect::Retargeted(relid, target_vp));
                } else {
                    out.push(Effect::Violation(format!("MODIFYCHANNEL of {relid}")));
                }
                if answered {
                    let response = TwoIds {
                        header: MessageHeader::new(message::MODIFYCHANNEL_RESPONSE),
                        relid: U32::new(relid),
                        value: U32::new(if known { 0 } else { UNSUCCESSFUL }),
                    };
                    self.post(response, &mut out);
                }
            }
        }
        out
    }

    /// Offers a channel now, or as soon as the guest can take it.
    pub fn offer(&mut self, relid: u32) -> Vec<Effect> {
        let mut out = Vec::new();
        if let Some(channel) = self.channels.get_mut(&relid) {
            channel.wanted = true;
            self.offer_if_possible(relid, &mut out);
        }
        out
    }

    /// Takes a channel back from the guest.
    pub fn rescind(&mut self, relid: u32) -> Vec<Effect> {
        let mut out = Vec::new();
        let Some(channel) = self.channels.get_mut(&relid) else {
            return out;
        };
        channel.wanted = false;
        let was_open = match channel.state {
            State::Hidden | State::Revoked => return out,
            State::Offered | State::Opening { .. } => false,
            State::Open { .. } => true,
        };
        channel.state = State::Revoked;
        if was_open {
            out.push(Effect::Closed(relid));
        }
        let header = MessageHeader::new(message::RESCIND_CHANNELOFFER);
        let id = U32::new(relid);
        self.post(OneId { header, id }, &mut out);
        out.push(Effect::Rescinded(relid));
        out
    }

    /// Does not offer a channel any more when the guest connects the next time.
    pub fn withhold(&mut self, relid: u32) {
        if let Some(channel) = self.channels.get_mut(&relid) {
            channel.wanted = false;
        }
    }

    /// Answers a guest that asked to open a channel ([`Effect::Opened`]).
    ///
    /// Stock Linux does not survive a failure here: it is for rings that cannot be used at all.
    pub fn open_result(&mut self, relid: u32, good: bool) -> Vec<Effect> {
        let mut out = Vec::new();
        let Some(channel) = self.channels.get_mut(&relid) else {
            return out;
        };
        if let State::Opening { open_id, gpadl } = channel.state {
            channel.state = match good {
                true => State::Open { gpadl },
                false => State::Offered,
            };
            let status = if good { 0 } else { UNSUCCESSFUL };
            self.post_open_result(relid, open_id, status, &mut out);
        }
        out
    }

    fn contact(&mut self, connection_id: u32, contact: &InitiateContact, out: &mut Vec<Effect>) {
        // A guest that starts again (kexec, resume) has forgotten all it knew.
        if self.connection.is_some() {
            self.leave(out);
            out.push(Effect::Unloaded);
        }
        let version = VmbusVersion(contact.version.get());
        let vp = contact.target_vp.get();
        let supported = self.accepted.contains(&version);
        let response = VersionResponse {
            header: MessageHeader::new(message::VERSION_RESPONSE),
            supported: supported.into(),
            connection_state: 0,
            padding: U16::new(0),
            connection_id: U32::new(connection_id),
        };
        if supported {
            self.connection = Some(Connection {
                version,
                vp,
                offers_requested: false,
            });
            out.push(Effect::Connected(version));
        }
        out.push(post(vp, response));
    }

    /// Forgets all that the guest did.
    fn leave(&mut self, out: &mut Vec<Effect>) {
        for (relid, channel) in &mut self.channels {
            match channel.state {
                State::Open { .. } => out.push(Effect::Closed(*relid)),
                State::Revoked => out.push(Effect::Released(*relid)),
                State::Hidden | State::Offered | State::Opening { .. } => {}
            }
            channel.state = State::Hidden;
        }
        self.gpadls.clear();
        self.connection = None;
    }

    fn offer_if_possible(&mut self, relid: u32, out: &mut Vec<Effect>) {
        let ready = self
            .connection
            .as_ref()
            .is_some_and(|connection| connection.offers_requested);
        let Some(channel) = self.channels.get_mut(&relid) else {
            return;
        };
        if !ready || !channel.wanted || channel.state != State::Hidden {
            return;
        }
        channel.state = State::Offered;
        let offer = channel.offer;
        let mut user_defined = [0; 120];
        if offer.pipe {
            user_defined[..4].copy_from_slice(&PIPE_MESSAGE.to_le_bytes());
        }
        let message = OfferChannel {
            header: MessageHeader::new(message::OFFERCHANNEL),
            class: offer.class,
            instance: offer.instance,
            reserved: [U64::new(0); 2],
            flags: U16::new(if offer.pipe { NAMED_PIPE_MODE } else { 0 }),
            mmio_megabytes: U16::new(0),
            user_defined,
            sub_channel_index: U16::new(0),
            reserved2: U16::new(0),
            relid: U32::new(relid),
            monitor_id: 0xff,
            monitor_allocated: 0,
            is_dedicated_interrupt: U16::new(1),
            connection_id: U32::new(offer.connection_id),
        };
        self.post(message, out);
        out.push(Effect::Offered(relid));
    }

    fn open(&mut self, open: &OpenChannel, out: &mut Vec<Effect>) {
        let (relid, open_id) = (open.relid.get(), open.open_id.get());
        let gpadl = self.gpadls.get(&open.gpadl.get());
        let Some(channel) = self.channels.get_mut(&relid) else {
            out.push(Effect::Violation(format!(
                "OPENCHANNEL of the unknown {relid}"
            )));
            self.post_open_result(relid, open_id, UNSUCCESSFUL, out);
            return;
        };
        match channel.state {
            State::Offered => {}
            State::Revoked => {
                // The guest will see the rescind; a failure would only hit its error path.
                self.post_open_result(relid, open_id, 0, out);
                return;
            }
            State::Hidden | State::Opening { .. } | State::Open { .. } => {
                out.push(Effect::Violation(format!(
                    "OPENCHANNEL of {relid}, which is {:?}",
                    channel.state
                )));
                self.post_open_result(relid, open_id, UNSUCCESSFUL, out);
                return;
            }
        }
        // Each ring has a page of header and at least one of data.
        let downstream_page = open.downstream_page.get() as usize;
        match gpadl {
            Some(gpadl)
                if gpadl.relid == relid
                    && gpadl.pages.len() == gpadl.total
                    && downstream_page >= 2
                    && downstream_page.saturating_add(2) <= gpadl.total =>
            {
                channel.state = State::Opening {
                    open_id,
                    gpadl: open.gpadl.get(),
                };
                let opening = Opening {
                    pages: gpadl.pages.clone(),
                    downstream_page,
                    target_vp: open.target_vp.get(),
                };
                out.push(Effect::Opened(relid, opening));
            }
            _ => {
                out.push(Effect::Violation(format!(
                    "OPENCHANNEL of {relid} without proper rings: {open:?}"
                )));
                self.post_open_result(relid, open_id, UNSUCCESSFUL, out);
            }
        }
    }

    fn close(&mut self, relid: u32, out: &mut Vec<Effect>) {
        match self.channels.get_mut(&relid) {
            Some(channel) if matches!(channel.state, State::Open { .. }) => {
                channel.state = State::Offered;
                out.push(Effect::Closed(relid));
            }
            // The guest closes what was just taken from it.
            Some(channel) if channel.state == State::Revoked => {}
            _ => out.push(Effect::Violation(format!(
                "CLOSECHANNEL of {relid}, which is not open"
            ))),
        }
    }

    fn gpadl_header(&mut self, header: &GpadlHeader, pages: Vec<u64>, out: &mut Vec<Effect>) {
        let (relid, id) = (header.relid.get(), header.gpadl.get());
        let total = (usize::from(header.range_bytes.get()).saturating_sub(8)) / 8;
        let spanned = u64::from(header.byte_offset.get()) + u64::from(header.byte_count.get());
        let wrong = if !self.channels.contains_key(&relid) {
            Some("of an unknown channel")
        } else if self.gpadls.contains_key(&id) {
            Some("that exists already")
        } else if header.range_count.get() != 1 {
            Some("of other than one range")
        } else if header.byte_offset.get() != 0
            || total == 0
            || total > MAX_GPADL_PAGES
            || spanned != (total * PAGE_SIZE) as u64
        {
            Some("of other than whole pages")
        } else if self.gpadls.len() >= MAX_GPADLS {
            Some("too many")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            out.push(Effect::Violation(format!("a GPADL {wrong}: {header:?}")));
            self.post_gpadl_created(relid, id, UNSUCCESSFUL, out);
            return;
        }
        let gpadl = Gpadl {
            relid,
            pages: Vec::with_capacity(total),
            total,
        };
        self.gpadls.insert(id, gpadl);
        self.gpadl_body(id, pages, out);
    }

    fn gpadl_body(&mut self, id: u32, mut pages: Vec<u64>, out: &mut Vec<Effect>) {
        let Some(gpadl) = self.gpadls.get_mut(&id) else {
            out.push(Effect::Violation(format!("GPADL_BODY of the unknown {id}")));
            return;
        };
        let missing = gpadl.total - gpadl.pages.len();
        if missing == 0 {
            out.push(Effect::Violation(format!(
                "GPADL_BODY of {id}, which is whole"
            )));
            return;
        }
        // A message is padded to its full length on some guests: what is too much does not count.
        pages.truncate(missing);
        gpadl.pages.append(&mut pages);
        if gpadl.pages.len() == gpadl.total {
            // Also for a channel that was just rescinded: Linux breaks when this fails.
            let relid = gpadl.relid;
            self.post_gpadl_created(relid, id, 0, out);
        }
    }

    fn released(&mut self, relid: u32, out: &mut Vec<Effect>) {
        match self.channels.get_mut(&relid) {
            Some(channel) if channel.state == State::Revoked => {
                channel.state = State::Hidden;
                self.gpadls.retain(|_, gpadl| gpadl.relid != relid);
                out.push(Effect::Released(relid));
                self.offer_if_possible(relid, out);
            }
            _ => out.push(Effect::Violation(format!(
                "RELID_RELEASED of {relid}, which was not rescinded"
            ))),
        }
    }

    fn post_open_result(&self, relid: u32, open_id: u32, status: u32, out: &mut Vec<Effect>) {
        let result = ThreeIds {
            header: MessageHeader::new(message::OPENCHANNEL_RESULT),
            relid: U32::new(relid),
            id: U32::new(open_id),
            status: U32::new(status),
        };
        self.post(result, out);
    }

    fn post_gpadl_created(&self, relid: u32, gpadl: u32, status: u32, out: &mut Vec<Effect>) {
        let created = ThreeIds {
            header: MessageHeader::new(message::GPADL_CREATED),
            relid: U32::new(relid),
            id: U32::new(gpadl),
            status: U32::new(status),
        };
        self.post(created, out);
    }

    fn post(&self, message: impl IntoBytes + zerocopy::Immutable, out: &mut Vec<Effect>) {
        if let Some(connection) = &self.connection {
            out.push(post(connection.vp, message));
        }
    }
}

fn post(vp: u32, message: impl IntoBytes + zerocopy::Immutable) -> Effect {
    Effect::Post {
        vp,
        message: message.as_bytes().to_vec(),
    }
}

#[cfg(test)]
mod tests;
