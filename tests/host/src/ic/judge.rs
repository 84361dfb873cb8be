// SPDX-License-Identifier: GPL-2.0-only

//! What a strict host expects of an answer: that it repeats its request but for what an answer says, and that it
//! says one of what there is to say.

use crate::ic::{flags, message_type, parse_negotiated, parse_offer, status};
use crate::ic::{IcHeader, NegotiateHeader, Version};
use crate::vmbus::protocol::packet_type;
use crate::vmbus::ring::Packet;
use std::fmt::Display;
use zerocopy::FromBytes;

/// Bytes of `struct vmbuspipe_hdr`.
const PIPE_HEADER: usize = 8;

/// What the body of an answer to an offer of versions is as long as. Linux says so here and nowhere else, also
/// where it chooses none.
const CHOICE: usize = size_of::<NegotiateHeader>() + 2 * size_of::<Version>();

/// What an answer may say of how it went.
const STATUSES: [u32; 3] = [status::OK, status::FAIL, status::NOT_SUPPORTED];

/// What an answer has to repeat.
#[derive(Debug)]
pub(crate) struct Asked {
    header: IcHeader,
    /// The first byte of the body, which says what a request of VSS is for (`struct hv_vss_hdr`). A service
    /// that answers with the body of another request, or with none, is seen by that. The rest of a body, and
    /// that of other components, is the guest's to change.
    operation: Option<u8>,
    /// The versions of framework and messages that it offers, of which an answer chooses.
    offer: Option<(Vec<Version>, Vec<Version>)>,
}

impl Asked {
    /// By this request, if it is long enough for one.
    pub(crate) fn by(request: &[u8]) -> Option<Asked> {
        let (header, body) = IcHeader::read_from_prefix(request).ok()?;
        let is_vss = header.message_type.get() == message_type::VSS;
        let operation = body.first().copied().filter(|_| is_vss);
        let is_offer = header.message_type.get() == message_type::NEGOTIATE;
        Some(Asked {
            header,
            operation,
            offer: parse_offer(body).filter(|_| is_offer),
        })
    }

    /// Whether `answer` is of the same kind of message for the same operation.
    pub(crate) fn is_like(&self, answer: &[u8]) -> bool {
        Asked::by(answer).is_some_and(|it| {
            it.header.message_type == self.header.message_type && it.operation == self.operation
        })
    }
}

/// What is wrong with `answer` as one to what was asked in a packet with the number `id`, if anything, in words.
pub(crate) fn judge(asked: &Asked, id: u64, answer: &Packet) -> Result<(), String> {
    let request = &asked.header;
    let Ok((header, body)) = IcHeader::read_from_prefix(&answer.payload) else {
        return Err(format!(
            "an answer of {} bytes has no room for its headers",
            answer.payload.len()
        ));
    };
    let pipe_size = header.pipe_size.get() as usize;
    let in_ring = PIPE_HEADER.saturating_add(pipe_size).next_multiple_of(8);
    let message_size = match asked.offer {
        Some(_) => CHOICE,
        None => request.message_size.get().into(),
    };
    let answers = flags::TRANSACTION | flags::RESPONSE;
    let expected: [(&str, &dyn Display, &dyn Display); 13] = [
        (
            "packet type",
            &answer.packet_type,
            &packet_type::DATA_INBAND,
        ),
        // With any the host would owe a completion, which no component looks for: it would be taken for a request.
        ("descriptor's flags", &answer.flags, &0),
        (
            "length between descriptor and data",
            &answer.extra.len(),
            &0,
        ),
        ("transaction id in the ring", &answer.transaction, &id),
        ("length in the ring", &answer.payload.len(), &in_ring),
        ("pipe flags", &header.pipe_flags, &request.pipe_flags),
        ("pipe size", &header.pipe_size, &request.pipe_size),
        ("message size", &header.message_size, &message_size),
        ("message type", &header.message_type, &request.message_type),
        ("framework version", &header.framework, &request.framework),
        ("message version", &header.message, &request.message),
        ("transaction id", &header.transaction, &request.transaction),
        ("flags", &header.flags, &answers),
    ];
    for (what, seen, expected) in expected {
        let (seen, expected) = (seen.to_string(), expected.to_string());
        if seen != expected {
            return Err(format!(
                "the {what} of an answer is {seen}, it should be {expected}"
            ));
        }
    }
    let code = header.status.get();
    if !STATUSES.contains(&code) {
        return Err(format!("the status of an answer is {code:#x}"));
    }
    if let Some((frameworks, messages)) = &asked.offer {
        let chosen =
            parse_negotiated(body).map_err(|what| format!("a choice of versions: {what}"))?;
        if let Some((framework, message)) = chosen {
            if !frameworks.contains(&framework) || !messages.contains(&message) {
                return Err(format!(
                    "framework {framework} and messages {message} were chosen, and not offered"
                ));
            }
        }
    }
    let operation = body.first().copied();
    if asked.operation.is_some() && operation != asked.operation {
        return Err(format!(
            "the operation of an answer is {operation:?}, it should be {:?}",
            asked.operation
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ic::{negotiate_body, Envelope, FRAMEWORKS};

    fn request(message_type: u16, body: &[u8]) -> Vec<u8> {
        let envelope = Envelope {
            framework: Version::new(3, 0),
            message_type,
            message: Version::new(5, 0),
            transaction: 9,
        };
        envelope.request(body)
    }

    /// The answer that the request becomes when the guest changes nothing but the flags, and then this.
    fn judged(change: impl FnOnce(&mut Packet)) -> Result<(), String> {
        judged_as(message_type::VSS, change)
    }

    fn judged_as(message_type: u16, change: impl FnOnce(&mut Packet)) -> Result<(), String> {
        judged_of(message_type, &[0; 33], change)
    }

    fn judged_of(
        message_type: u16,
        body: &[u8],
        change: impl FnOnce(&mut Packet),
    ) -> Result<(), String> {
        let mut payload = request(message_type, body);
        let asked = Asked::by(&payload).unwrap();
        payload[25] = flags::TRANSACTION | flags::RESPONSE;
        payload.resize(payload.len().next_multiple_of(8), 0);
        let mut packet = Packet {
            packet_type: packet_type::DATA_INBAND,
            flags: 0,
            transaction: 9,
            extra: Vec::new(),
            payload,
        };
        change(&mut packet);
        judge(&asked, 9, &packet)
    }

    #[test]
    fn a_request_sent_back_with_the_flags_of_an_answer_is_one() {
        assert_eq!(judged(|_| {}), Ok(()));
        for code in [status::OK, status::FAIL, status::NOT_SUPPORTED] {
            let code = code.to_le_bytes();
            let with = judged(|packet| packet.payload[20..24].copy_from_slice(&code));
            assert_eq!(with, Ok(()));
        }
        assert!(
            judged(|packet| packet.payload[20] = 5).is_err(),
            "no status"
        );
        assert_eq!(judged(|packet| packet.payload[30] = 5), Ok(()), "the flags");
    }

    #[test]
    fn each_byte_of_the_headers_counts() {
        for byte in 0..26 {
            let wrong = judged(|packet| packet.payload[byte] ^= 0x40);
            assert!(wrong.is_err(), "byte {byte}");
        }
    }

    #[test]
    fn an_answer_stands_alone_in_the_ring() {
        let wrong = judged(|packet| packet.flags = 1).unwrap_err();
        assert!(wrong.contains("descriptor's flags"), "{wrong}");
        assert!(judged(|packet| packet.flags = 0x8000).is_err());
        let wrong = judged(|packet| packet.extra = vec![0; 8]).unwrap_err();
        assert!(wrong.contains("between descriptor and data"), "{wrong}");
        // What a list of pages, or the header of transfer pages, would be.
        for kind in [0, 7, 9, packet_type::COMPLETION] {
            let wrong = judged(|packet| packet.packet_type = kind).unwrap_err();
            assert!(wrong.contains("packet type"), "{wrong}");
        }
    }

    #[test]
    fn the_operation_counts_where_it_is_one() {
        let other = |packet: &mut Packet| packet.payload[28] = 2;
        let wrong = judged(other).unwrap_err();
        assert!(wrong.contains("operation"), "{wrong}");
        // That of a heartbeat is a number that the guest counts up.
        assert_eq!(judged_as(message_type::HEARTBEAT, other), Ok(()));
        let request = |message_type| request(message_type, &[0; 33]);
        let asked = Asked::by(&request(message_type::VSS)).unwrap();
        assert!(asked.is_like(&request(message_type::VSS)));
        assert!(!asked.is_like(&request(message_type::HEARTBEAT)));
        let mut other = request(message_type::VSS);
        other[28] = 2;
        assert!(!asked.is_like(&other));
    }

    #[test]
    fn the_versions_chosen_are_two_of_those_offered_or_none() {
        let offered = negotiate_body(&FRAMEWORKS, &[Version::new(4, 0), Version::new(5, 0)]);
        let chosen = |framework, message| negotiate_body(&[framework], &[message]);
        let judged = |body: &[u8], size: u8| {
            judged_of(message_type::NEGOTIATE, &offered, |packet| {
                packet.payload[28..28 + body.len()].copy_from_slice(body);
                packet.payload[18] = size;
            })
        };
        let (three, five) = (Version::new(3, 0), Version::new(5, 0));
        assert_eq!(judged(&chosen(three, five), 16), Ok(()));
        assert_eq!(judged(&negotiate_body(&[], &[]), 16), Ok(()));
        for size in [8, 15, 17, 24] {
            assert!(judged(&chosen(three, five), size).is_err(), "{size}");
        }
        for (framework, message) in [(five, five), (three, three), (three, Version::new(6, 0))] {
            let wrong = judged(&chosen(framework, message), 16).unwrap_err();
            assert!(wrong.contains("offered"), "{wrong}");
        }
        assert!(judged(&offered, 16).is_err(), "all that were offered");
    }

    #[test]
    fn one_cut_short_or_of_another_kind_is_none() {
        assert!(judged(|packet| packet.payload.truncate(24)).is_err());
        assert!(judged(|packet| packet.payload.truncate(56)).is_err());
        assert!(judged(|packet| packet.payload.extend([0; 8])).is_err());
        assert!(judged(|packet| packet.packet_type = packet_type::COMPLETION).is_err());
        let wrong = judged(|packet| packet.transaction = 8).unwrap_err();
        assert!(wrong.contains("transaction id in the ring"), "{wrong}");
    }
}
