// SPDX-License-Identifier: GPL-2.0-only

//! A host, and a daemon, that send whatever comes to mind. Whatever it is: no warning in the log,
//! nothing leaks, nobody starves, and the next real backup is good.
//!
//! What is random comes from a seed: `e2e run --rounds N --seed S`; a round is [`PACKETS`] packets,
//! and in one case [`WRITES`] writes besides.

use super::{backup, limit, load, rounds, seed, start, wait_for_daemon};
use super::{Case, Growth, ModuleState, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Blocking, Daemon, Guest, Machine, Module, STEP};
use fastrand::Rng;
use hv_vss_uapi::{frame, op, thawed, Answer, FrameHdr, Register, Thawed, VssMsg, ABI_V2};
use hyperv_sim::ic::vss::{message, FreezeBody, Lun, Op, Vss, CLASS, SHORT_BODY, VERSIONS};
use hyperv_sim::ic::{message_type, negotiate_body, status, Envelope, Version, FRAMEWORKS};
use hyperv_sim::vmbus::protocol::packet_type::DATA_INBAND;
use hyperv_sim::{Descriptor, Field, Side, Tx};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

pub const CASES: &[Case] = &[
    storm(
        "hostile/packets",
        "random and spoilt packets, with our daemon attached",
        packets,
    ),
    storm(
        "hostile/both-sides",
        "random packets from the host and random writes from four threads at once",
        both_sides,
    ),
    super::case(
        "hostile/flood",
        "a full ring starves nobody: heartbeat, a process and a good request go on",
        flood,
    ),
    super::case(
        "hostile/all-sizes",
        "packets of all sizes from nothing to the whole ring, none wedges the channel",
        all_sizes,
    ),
    super::case(
        "hostile/ring-header",
        "nonsense in the headers of both rings harms nobody but this channel",
        ring_header,
    ),
    super::case(
        "hostile/ring-never-empty",
        "a host whose write index lies outside of the ring leads nobody astray",
        never_empty,
    ),
];

/// A case whose length is asked for: `e2e run --rounds N`.
const fn storm(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        name,
        about,
        machine: Machine::TWO_CPUS,
        per_round: Duration::from_secs(6),
        when: When::Always,
        asks_our_module: false,
        compares: false,
        run,
    }
}

/// Packets and writes in a round: 400 rounds are 100,000 of the one and 1,000,000 of the other.
const PACKETS: u32 = 250;
const WRITES: u64 = 2500;

/// Packets that are sent before the host waits for the guest.
const BATCH: u32 = 50;

/// Heartbeats in which a guest has read a batch, unless it was led astray.
const PATIENCE: u32 = 30;

/// In which a guest that is not starved answers. In calm it takes some milliseconds; the rest is for
/// the emulation.
const BOUND: Duration = Duration::from_secs(10);

/// Good messages of a host, from the short to the long.
fn good(random: &mut Rng) -> Vec<u8> {
    let version = Version::new(5, 0);
    let (kind, body) = match random.u8(0..32) {
        0 => {
            let disks = [Lun::scsi(CLASS, 0, 0, 1)];
            let body = FreezeBody::new(1, 0, &disks).map(|body| body.as_bytes().to_vec());
            let body = message(Op::FREEZE, &body.unwrap_or_default());
            (message_type::VSS, body)
        }
        1..=3 => (message_type::VSS, message(Op::THAW, &SHORT_BODY)),
        4..=8 => (message_type::VSS, message(Op::HOT_BACKUP, &SHORT_BODY)),
        9..=14 => (message_type::VSS, message(Op::GET_DM_INFO, &SHORT_BODY)),
        15 => (message_type::VSS, message(Op::AUTO_RECOVER, &[0; 12_492])),
        16..=20 => (message_type::VSS, message(Op(random.u8(..)), &SHORT_BODY)),
        21..=24 => (random.u16(..8), message(Op(random.u8(..9)), &SHORT_BODY)),
        _ => (
            message_type::NEGOTIATE,
            negotiate_body(&FRAMEWORKS, &VERSIONS),
        ),
    };
    let envelope = Envelope {
        framework: Version::new(3, 0),
        message_type: kind,
        message: version,
        transaction: random.u8(..),
    };
    envelope.request(&body)
}

/// Has `hv_utils` answer heartbeats; the VSS device is taken.
fn with_heartbeat(guest: &Guest) -> Result<()> {
    guest.load(Module::Stock, &[])?;
    guest.host().heartbeat().wait_open(STEP)?;
    Ok(())
}

/// A number that programs get wrong.
fn odd_number(random: &mut Rng) -> u32 {
    match random.u8(0..6) {
        0 => 0,
        1 => u32::MAX,
        2 => 1 << random.u8(..32),
        3 => random.u32(..300),
        4 => random.u32(..32_768),
        _ => random.u32(..),
    }
}

/// A good message with something changed, or bytes from nowhere.
fn spoilt(random: &mut Rng) -> Vec<u8> {
    if random.u8(0..8) == 0 {
        let longest = if random.bool() { 80 } else { 28_000 };
        let mut bytes = vec![0; random.usize(..=longest)];
        random.fill(&mut bytes);
        return bytes;
    }
    let mut bytes = good(random);
    for _ in 0..random.u8(0..4) {
        // The headers, where most of the meaning is, three times in four.
        let reach = if random.u8(0..4) > 0 { 48 } else { bytes.len() };
        let at = random.usize(..reach.clamp(1, bytes.len().max(1)));
        let number = odd_number(random).to_le_bytes();
        match random.u8(0..5) {
            0 => bytes.truncate(random.usize(..=bytes.len())),
            1 => bytes.resize(random.usize(..=bytes.len() * 2), random.u8(..)),
            2 => bytes
                .iter_mut()
                .skip(at & !1)
                .zip(&number[..2])
                .for_each(|(to, from)| *to = *from),
            3 => bytes
                .iter_mut()
                .skip(at & !3)
                .zip(&number)
                .for_each(|(to, from)| *to = *from),
            _ => bytes
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|byte| *byte ^= 1 << random.u8(..8)),
        }
    }
    // The longest that fits a ring of 28,672 bytes with descriptor and trailer.
    bytes.truncate(28_640);
    bytes
}

/// The descriptor of a packet, one in eight with a type or flags that nobody knows, one in
/// sixty-four with a lie about its lengths, which hides what follows in its batch.
fn descriptor(random: &mut Rng) -> Descriptor {
    let mut descriptor = Descriptor::new(DATA_INBAND, random.u16(..2));
    if random.u8(0..8) == 0 {
        descriptor.packet_type = random.u16(..20);
        descriptor.flags = random.u16(..);
    }
    if random.u8(0..64) == 0 {
        let number = odd_number(random) as u16;
        match random.bool() {
            true => descriptor.offset8 = Some(number),
            false => descriptor.len8 = Some(number),
        }
    }
    descriptor
}

/// Gives up what the host's lies have hidden from the guest or kept it from looking at.
///
/// A guest that was led astray may be anywhere in the ring and on the move. It stops at the end that
/// it is shown, and has stopped when it has read nothing more until after a heartbeat, which the same
/// processor answers. A host that masks the guest's interrupts keeps them from nobody but itself.
fn make_up(guest: &Guest) -> Result<()> {
    let (vss, heartbeat) = (guest.vss(), guest.host().heartbeat());
    vss.poke(Side::ToGuest, Field::InterruptMask, 0)?;
    vss.poke(Side::ToGuest, Field::FeatureBits, 1)?;
    vss.signal();
    // One that takes longer is lost in the ring.
    for _ in 0..PATIENCE {
        if vss.is_read()? {
            break;
        }
        heartbeat.beat(0, BOUND)?;
    }
    guest.wait_until("the guest has stopped reading", STEP, || {
        vss.resync()?;
        heartbeat.beat(0, BOUND)?;
        Ok(vss.resync()?)
    })?;
    vss.forget();
    Ok(())
}

/// Sends [`PACKETS`] of them, and looks after every [`BATCH`] whether a good request is answered.
fn packets_of_a_round(guest: &Guest, random: &mut Rng, slowest: &mut Duration) -> Result<()> {
    let vss = guest.vss();
    for _ in 0..PACKETS / BATCH {
        for _ in 0..BATCH {
            vss.send_packet(descriptor(random), &spoilt(random))?;
            // Wishes about signals that a host may change at any time.
            let wish = [
                Field::PendingSendSize,
                Field::InterruptMask,
                Field::FeatureBits,
            ];
            if let (0, Some(field)) = (random.u8(0..32), random.choice(wish)) {
                vss.poke(Side::ToGuest, field, odd_number(random))?;
            }
        }
        make_up(guest)?;
        let reply = vss.get_dm_info(BOUND)?;
        answered("GET_DM_INFO after a batch", &reply, status::OK)?;
        *slowest = (*slowest).max(reply.latency);
    }
    Ok(())
}

/// After a storm: what may have been left frozen is thawed, and a backup is good.
fn calm(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    vss.agree(STEP)?;
    wait_for_daemon(guest)?;
    // Whether there is something to thaw, and whether it still can be called good, is open.
    vss.thaw(STEP)?;
    vss.forget();
    backup(guest)?;
    equal("packets that answer nothing", vss.take_strays().len(), 0)
}

/// Whoever is shown packets that are none answers what nobody has asked.
const MISLED: &[&str] = &["answers nothing"];

fn packets(guest: &Guest) -> Result<()> {
    guest.expect_in_log(MISLED)?;
    start(guest, Module::Ours, Daemon::Ours)?;
    with_heartbeat(guest)?;
    // The memory that the daemon locks for a freeze is not what leaks.
    backup(guest)?;
    let mut random = Rng::with_seed(seed());
    let mut slowest = Duration::ZERO;
    let mut growth = Growth::default();
    let grown = growth.over(guest, rounds(), |_| {
        packets_of_a_round(guest, &mut random, &mut slowest)
    })?;
    calm(guest)?;
    let state = ModuleState::of(guest)?;
    println!(
        "     {} packets, seed {}, of which the module saw {}: {} dropped, {} negotiations, {} without a place in the queue; \
         a good request took {slowest:?} at most; {grown}",
        growth.rounds() * PACKETS,
        seed(),
        packets_seen(guest)?,
        state.number("bad_packets")?,
        state.number("negotiations")?,
        state.number("overruns")?,
    );
    Ok(())
}

fn frame_header(kind: u32, id: u64) -> FrameHdr {
    FrameHdr {
        version: ABI_V2,
        size: 32,
        kind,
        reserved: 0,
        id,
    }
}

fn both_sides(guest: &Guest) -> Result<()> {
    guest.expect_in_log(MISLED)?;
    // That of the daemon goes to the host as it is.
    guest.expect_in_log(&["the status of an answer is"])?;
    // Short times, since nobody answers what the host asks, except by chance; enough for a backup.
    let second = guest.host().patience(Duration::from_secs(1));
    let (timeout, freeze) = (
        limit("timeout", second),
        limit("freeze_timeout", second * 5),
    );
    load(guest, Module::Ours, &[&timeout, &freeze, "grace_ms=50"])?;
    with_heartbeat(guest)?;
    let register = Register {
        frame: frame_header(frame::REGISTER, 0),
        max_version: ABI_V2,
        features: 0,
    };
    let answer = Answer {
        frame: frame_header(frame::ANSWER, 1),
        status: status::OK,
        operation: op::HOT_BACKUP.into(),
    };
    let notice = Thawed {
        frame: frame_header(frame::THAWED, 1),
        reason: thawed::DEADLINE,
        reserved: 0,
    };
    let (v1, v1_answer) = (VssMsg::new(op::REGISTER1), VssMsg::answer_v1(status::OK));
    let templates = [
        register.as_bytes(),
        answer.as_bytes(),
        notice.as_bytes(),
        v1.as_bytes(),
        v1_answer.as_bytes(),
    ];

    let mut random = Rng::with_seed(seed());
    let mut slowest = Duration::ZERO;
    let (mut taken, mut refused, mut read) = (0, 0, 0);
    let mut growth = Growth::default();
    let grown = growth.over(guest, rounds(), |_| {
        // A fresh descriptor: which ABI it is for is settled by the first write that is taken.
        let device = guest.open_device(Blocking::No)?;
        let storm = device.start_storm(4, WRITES, random.u64(..), &templates)?;
        packets_of_a_round(guest, &mut random, &mut slowest)?;
        let storm = device.finish_storm(storm, STEP * 4)?;
        device.close()?;
        taken += storm.taken;
        refused += storm.refused.values().sum::<u64>();
        read += storm.read;
        let known = ["EINVAL", "EPROTO", "ESTALE", "EBADMSG"];
        for errno in storm.refused.keys() {
            ensure!(
                known.contains(&errno.as_str()),
                "a write should be refused with one of {known:?}, not with {errno}"
            );
        }
        Ok(())
    })?;
    let writes = u64::from(growth.rounds()) * WRITES;
    equal("writes taken or refused", taken + refused, writes)?;
    let state = ModuleState::of(guest)?;
    let counters = [
        "malformed_frames",
        "frames_out_of_turn",
        "stale_frames",
        "frames_for_another_operation",
    ];
    let mut counted = 0;
    for counter in counters {
        counted += state.number(counter)?;
    }
    equal("writes counted as refused", counted, refused)?;
    guest.start_daemon(Daemon::Ours)?;
    calm(guest)?;
    println!(
        "     {} packets, seed {}, of which the module saw {}, and {writes} writes: \
         {taken} taken, {read} reads with a message; \
         a good request took {slowest:?} at most; {grown}",
        growth.rounds() * PACKETS,
        seed(),
        packets_seen(guest)?,
    );
    Ok(())
}

/// Keeps the guest's ring full of `packet` until told to stop.
fn keep_full(vss: &Vss, packet: &[u8], stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let mut open: Vec<Tx> = Vec::new();
    while !stop.load(SeqCst) {
        for _ in 0..64 {
            open.push(vss.send_raw(packet)?);
            sent.fetch_add(1, SeqCst);
        }
        // From then on the ring is full, and being emptied.
        vss.wait_sent(STEP)?;
        open.retain(|tx| vss.try_reply(*tx).is_none());
        // Those that are never answered.
        let old = open.len().saturating_sub(10_000);
        open.drain(..old);
    }
    Ok(())
}

fn flood(guest: &Guest) -> Result<()> {
    start(guest, Module::Ours, Daemon::Ours)?;
    with_heartbeat(guest)?;
    let (vss, heartbeat) = (guest.vss(), guest.host().heartbeat());
    // On a tmpfs, which nobody freezes.
    guest.writer_start("/run/flood")?;
    let envelope = |message_type| Envelope {
        framework: Version::new(3, 0),
        message_type,
        message: Version::new(5, 0),
        transaction: 0,
    };
    let vss_message = |op| envelope(message_type::VSS).request(&message(op, &SHORT_BODY));
    let floods = [
        ("packets that are none", vec![0xff; 64]),
        (
            "negotiations",
            envelope(0).request(&negotiate_body(&FRAMEWORKS, &VERSIONS)),
        ),
        ("GET_DM_INFO", vss_message(Op::GET_DM_INFO)),
        ("HOT_BACKUP", vss_message(Op::HOT_BACKUP)),
    ];
    let calm_beat = heartbeat.beat(1, BOUND)?.1;
    for (what, packet) in &floods {
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut slowest = Duration::ZERO;
        let mut beat = Duration::ZERO;
        let began = Instant::now();
        let start = writes(guest)?;
        std::thread::scope(|scope| {
            let flooder = scope.spawn(|| keep_full(&vss, packet, &stop, &sent));
            let mut others = || -> Result<()> {
                for number in 0..5 {
                    let (answer, took) = heartbeat.beat(number, BOUND)?;
                    equal("the heartbeat's answer", answer, number + 1)?;
                    beat = beat.max(took);
                    let info = vss.get_dm_info(BOUND)?;
                    answered("GET_DM_INFO in the flood", &info, status::OK)?;
                    let check = vss.hot_backup(BOUND)?;
                    // When the flood is of such requests, the queue may be full of them.
                    if *what != "HOT_BACKUP" {
                        answered("HOT_BACKUP in the flood", &check, status::OK)?;
                    }
                    slowest = slowest.max(info.latency).max(check.latency);
                }
                guest.wait_until("a process has written 50 times", STEP, || {
                    Ok(writes(guest)? > start + 50)
                })?;
                guest.wait_until("it is a flood", STEP, || Ok(sent.load(SeqCst) > 3000))
            };
            let result = others();
            stop.store(true, SeqCst);
            let flooder = flooder.join();
            flooder.map_err(|_| anyhow::anyhow!("the flooder panicked"))??;
            result
        })
        .with_context(|| format!("in a flood of {what}"))?;
        let took = began.elapsed();
        let written = writes(guest)? - start;
        println!(
            "     {} {what} in {took:.1?}: heartbeat {beat:.1?} at most (in calm {calm_beat:.1?}), \
             good request {slowest:.1?} at most, {written} writes of a process",
            sent.load(SeqCst)
        );
    }
    vss.wait_sent(STEP)?;
    guest.writers_stop()?;
    calm(guest)
}

/// How often the one writer has written.
fn writes(guest: &Guest) -> Result<u64> {
    let writers = guest.writers()?;
    Ok(writers.first().context("no writer")?.count)
}

fn all_sizes(guest: &Guest) -> Result<()> {
    start(guest, Module::Ours, Daemon::Ours)?;
    let vss = guest.vss();
    // A message of an operation that the daemon has no part in, as long as asked for.
    let whole = Envelope {
        framework: Version::new(3, 0),
        message_type: message_type::VSS,
        message: Version::new(5, 0),
        transaction: 0,
    }
    .request(&message(Op::BU_COMPLETE, &vec![0x5a; 28_640]));
    // VMBus counts in eights. Descriptor and trailer take 24 bytes, and a ring is never quite full.
    let longest = 28_672 - 24 - 8;
    let mut sent = Vec::new();
    for len in (0..=longest).step_by(8) {
        sent.push((len, vss.send_raw(whole.get(..len).context("too short")?)?));
    }
    vss.wait_sent(STEP)?;
    answered(
        "GET_DM_INFO after them",
        &vss.get_dm_info(STEP)?,
        status::OK,
    )?;
    for (len, tx) in sent {
        // Headers have 28 bytes, a VSS message begins with 8.
        match vss.try_reply(tx) {
            Some(reply) if len >= 40 => {
                answered(&format!("a message of {len} bytes"), &reply, status::OK)?;
                equal("length of its answer", reply.raw.len(), len)?;
            }
            Some(_) => anyhow::bail!("{len} bytes are no message, they were answered"),
            None => ensure!(len < 40, "a message of {len} bytes was not answered"),
        }
    }
    // One more does not fit, which is the host's to know.
    ensure!(vss.send_raw(&vec![0; longest + 8]).is_err());
    calm(guest)
}

/// Indices and sizes at and beyond every edge.
const EDGES: [u32; 12] = [
    1,
    4,
    8,
    12,
    28_664,
    28_672,
    28_680,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fff0,
    0xffff_fff8,
    0xffff_ffff,
];

fn ring_header(guest: &Guest) -> Result<()> {
    guest.expect_in_log(MISLED)?;
    start(guest, Module::Ours, Daemon::Ours)?;
    with_heartbeat(guest)?;
    let (vss, heartbeat) = (guest.vss(), guest.host().heartbeat());
    let mut number = 0;
    let mut alive = |what: &str| -> Result<()> {
        number += 1;
        let (answer, _) = heartbeat
            .beat(number, BOUND)
            .with_context(|| what.to_owned())?;
        equal("the heartbeat's answer", answer, number + 1)
    };
    let fields = [
        Field::WriteIndex,
        Field::ReadIndex,
        Field::InterruptMask,
        Field::PendingSendSize,
        Field::FeatureBits,
    ];
    // What the host writes and the guest reads.
    for field in fields {
        for value in EDGES {
            let what = format!("{field:?} {value:#x} in the ring to the guest");
            let before = vss.poke(Side::ToGuest, field, value)?;
            vss.signal();
            alive(&what)?;
            let calm = match field {
                Field::ReadIndex => before,
                Field::WriteIndex | Field::InterruptMask | Field::PendingSendSize => 0,
                Field::FeatureBits => 1,
            };
            vss.poke(Side::ToGuest, field, calm)?;
            make_up(guest).with_context(|| what.clone())?;
            let reply = vss.get_dm_info(BOUND).with_context(|| what.clone())?;
            answered(&what, &reply, status::OK)?;
        }
    }
    // What the guest writes and the host reads. A request in between makes it write; where its answer
    // goes to nobody can say, so the channel is taken back and offered again.
    // Not the write index: hv_vmbus takes its own from there, and writes wherever the host has it
    // point.
    let harmless = |field: &Field| !matches!(field, Field::WriteIndex);
    for field in fields.into_iter().filter(harmless) {
        for value in EDGES {
            let what = format!("{field:?} {value:#x} in the ring from the guest");
            vss.poke(Side::FromGuest, field, value)?;
            vss.send(Op::GET_DM_INFO, &SHORT_BODY)?;
            alive(&what)?;
            let openings = vss.openings();
            vss.rescind();
            vss.wait_released(STEP).with_context(|| what.clone())?;
            vss.offer();
            vss.wait_openings(openings + 1, STEP)?;
            let reply = vss.get_dm_info(BOUND).with_context(|| what.clone())?;
            answered(&what, &reply, status::OK)?;
        }
    }
    calm(guest)
}

/// How many packets the module has looked at, whatever they were.
fn packets_seen(guest: &Guest) -> Result<u64> {
    let state = ModuleState::of(guest)?;
    let mut sum = state.number("bad_packets")? + state.number("negotiations")?;
    for operation in ["hot_backup", "get_dm_info", "freeze", "thaw", "other"] {
        sum += state.number(operation)?;
    }
    Ok(sum)
}

fn never_empty(guest: &Guest) -> Result<()> {
    start(guest, Module::Ours, Daemon::Ours)?;
    with_heartbeat(guest)?;
    let vss = guest.vss();
    // Whatever is read of this is a packet without a proper length.
    vss.send_raw(&vec![0xff; 28_640])?;
    answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
    let before = packets_seen(guest)?;
    // There is always more to read than the ring holds. Whoever moves on by what he could read at
    // once must still stay inside: 3,584 packets are one for each place in the ring.
    vss.poke(Side::ToGuest, Field::WriteIndex, 0xffff_fff8)?;
    vss.signal();
    guest.wait_until(
        "the module has read the ring a few times over",
        STEP,
        || Ok(packets_seen(guest)? > before + 12_000),
    )?;
    make_up(guest)?;
    calm(guest)
}
