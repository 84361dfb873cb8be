// SPDX-License-Identifier: GPL-2.0-only

//! Our module at its two edges: the device, where the case plays the daemon, and the channel, where
//! it plays hosts that real guests also meet.

use super::owned::hold;
use super::{
    case, good, limit, load, observe, stop, stuck_writers, wait_for_daemon, Case, ModuleState, Seen,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, refused};
use e2e::guest::{Blocking, Daemon, Device, Guest, Module, DEVICE, STEP};
use hv_vss_uapi::{
    feature, frame, op, thawed, Answer, FrameHdr, FreezeInfo, Register, Registered, Request,
};
use hv_vss_uapi::{Thawed, VssMsg, ABI_V2, MAX_FRAME};
use hyperv_sim::ic::vss::{vss_flags, Lun, Op, CLASS, SHORT_BODY};
use hyperv_sim::ic::{message_type, vss};
use hyperv_sim::ic::{status, Envelope, IcHeader, Version, FRAMEWORKS, MAX_MESSAGE};
use hyperv_sim::{HostError, Reply, Tx};
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

pub const CASES: &[Case] = &[
    case(
        "abi/device-node",
        "the device is there with mode 0600, and gone after unload; so are the threads that a thaw without memory takes",
        device_node,
    ),
    case(
        "abi/second-opener",
        "a second open gives EBUSY, and works after the first is closed",
        second_opener,
    ),
    case(
        "abi/v1-registration",
        "REGISTER1 is answered 129, REGISTER not at all, and both serve",
        v1_registration,
    ),
    case(
        "abi/v2-registration",
        "a v2 registration is answered with version and largest frame",
        v2_registration,
    ),
    case(
        "abi/v2-freeze",
        "a v2 FREEZE carries time left and the host's disks, THAW neither",
        v2_freeze,
    ),
    case(
        "abi/writes-before-registration",
        "short, long and out-of-turn first writes are refused",
        writes_before_registration,
    ),
    case(
        "abi/v1-bad-writes",
        "short, long and out-of-turn v1 answers are refused and change nothing",
        v1_bad_writes,
    ),
    case(
        "abi/v2-bad-writes",
        "wrong id, operation, size, version or turn: refused, nothing changes",
        v2_bad_writes,
    ),
    case(
        "abi/reads",
        "O_NONBLOCK gives EAGAIN, a short buffer EINVAL and loses nothing",
        reads,
    ),
    case(
        "abi/read-now",
        "RWF_NOWAIT gives EAGAIN on a descriptor that waits, and what there is",
        read_now,
    ),
    case(
        "abi/blocking-read",
        "a blocking read waits for the next request",
        blocking_read,
    ),
    case(
        "abi/poll",
        "poll tells readable from idle, and wakes for a request",
        poll,
    ),
    case(
        "abi/reply-timeout",
        "an unanswered request fails after its time, a late answer gets ESTALE",
        reply_timeout,
    ),
    case(
        "abi/closed-in-the-middle",
        "a daemon that closes with a request open fails it at once",
        closed_in_the_middle,
    ),
    case(
        "abi/host-offers-3.0",
        "a host with VSS 3.0 only is refused, and 5.0 works afterwards",
        |guest| old_host(guest, Version::new(3, 0)),
    ),
    case(
        "abi/host-offers-4.0",
        "a host with VSS 4.0 only is refused, and 5.0 works afterwards",
        |guest| old_host(guest, Version::new(4, 0)),
    ),
    case(
        "abi/hot-backup-flags",
        "HOT_BACKUP is answered with flags 5, GET_DM_INFO with 0",
        hot_backup_flags,
    ),
    case(
        "abi/unknown-operations",
        "operations without meaning to a guest are answered 0",
        unknown_operations,
    ),
    case(
        "abi/back-to-back",
        "FREEZE and THAW sent together are served in order",
        back_to_back,
    ),
    case(
        "abi/short-packets",
        "packets too short for their headers do not disturb the next",
        short_packets,
    ),
    case(
        "abi/long-packets",
        "messages of up to 13,312 bytes are answered whole, none wedges the channel",
        long_packets,
    ),
    case(
        "abi/early-thaw",
        "a notice that the freeze has ended fails the host's THAW, and only that one",
        early_thaw,
    ),
    case(
        "abi/debugfs",
        "the state file says versions, daemon, request, freeze, counters and latencies",
        debugfs,
    ),
    case(
        "abi/tracepoints",
        "each step of a request is traced with its id and the host's transaction",
        tracepoints,
    ),
    case(
        "abi/example",
        "the header's example in C holds a file system from FREEZE to THAW; with the stock module it says that it \
         cannot, and fails FREEZE",
        |guest| {
            let modules = guest.modules().iter();
            modules.copied().try_for_each(|module| example(guest, module, "hv_vss_example"))
        },
    ),
    case(
        "abi/example-of-32-bits",
        "so it does as a program of 32 bits",
        |guest| example(guest, Module::Ours, "hv_vss_example_32"),
    ),
    case(
        "abi/modinfo",
        "modinfo names licence, device class and what each parameter is for",
        modinfo,
    ),
];

/// A v1 message that registers.
pub(super) const REGISTER1: VssMsg = VssMsg::new(op::REGISTER1);

fn frame_header(kind: u32, size: usize, id: u64) -> FrameHdr {
    FrameHdr {
        version: ABI_V2,
        size: size as u32,
        kind,
        reserved: 0,
        id,
    }
}

fn register_v2() -> Register {
    Register {
        frame: frame_header(frame::REGISTER, size_of::<Register>(), 0),
        max_version: ABI_V2,
        features: 0,
    }
}

pub(super) fn answer_v2(id: u64, operation: u8, status: u32) -> Answer {
    Answer {
        frame: frame_header(frame::ANSWER, size_of::<Answer>(), id),
        status,
        operation: operation.into(),
    }
}

pub(super) fn thawed_v2(id: u64, reason: u32) -> Thawed {
    Thawed {
        frame: frame_header(frame::THAWED, size_of::<Thawed>(), id),
        reason,
        reserved: 0,
    }
}

/// Loads our module and agrees on 5.0.
fn load_and_negotiate(guest: &Guest, parameters: &[&str]) -> Result<()> {
    guest.load(Module::Ours, parameters)?;
    guest.vss().wait_open(STEP)?;
    guest.vss().agree(STEP)?;
    Ok(())
}

/// Registers for v2 and reads the reply.
pub(super) fn register(device: Device<'_>) -> Result<()> {
    device.write(register_v2().as_bytes())?;
    let reply = device.read(MAX_FRAME)?;
    let reply = Registered::read_from_bytes(&reply)
        .map_err(|_| anyhow::anyhow!("the reply has {} bytes, not 40", reply.len()))?;
    equal("the ABI in force", reply.abi_version, ABI_V2)
}

/// A frame that a v2 daemon reads.
#[derive(Clone, Debug)]
pub(super) enum Received {
    /// A request and what follows it.
    Request(Request, Vec<u8>),
    /// What the module held is thawed.
    Thawed(Thawed),
}

impl Received {
    /// Reads the next one.
    pub(super) fn read(device: Device<'_>) -> Result<Self> {
        let bytes = device.read(MAX_FRAME)?;
        let few = || format!("{} bytes are too few for a frame", bytes.len());
        let (header, _) = FrameHdr::read_from_prefix(&bytes).ok().with_context(few)?;
        equal("size of the frame", header.size as usize, bytes.len())?;
        Ok(match header.kind {
            frame::THAWED => {
                let notice = Thawed::read_from_bytes(&bytes).ok();
                Received::Thawed(notice.with_context(few)?)
            }
            kind => {
                equal("kind of the frame", kind, frame::REQUEST)?;
                let (request, payload) =
                    Request::read_from_prefix(&bytes).ok().with_context(few)?;
                Received::Request(request, payload.to_vec())
            }
        })
    }
}

/// Reads one v2 request and what follows it.
pub(super) fn read_request(device: Device<'_>) -> Result<(Request, Vec<u8>)> {
    match Received::read(device)? {
        Received::Request(request, payload) => Ok((request, payload)),
        other => anyhow::bail!("a request was due, it is {other:?}"),
    }
}

fn device_node(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let seen = guest.sh(&format!("stat -c '%F %a %u:%g' {DEVICE}"))?;
    equal(
        "the device node",
        seen.trim(),
        "character special file 600 0:0",
    )?;
    // Each queue has one that works where there is no memory for another (WQ_MEM_RECLAIM).
    let rescuers = || -> Result<String> {
        // Processes end meanwhile.
        let found = guest.sh("cat /proc/[0-9]*/comm 2>/dev/null | grep kworker/R-hv_vss | sort")?;
        Ok(found.trim().into())
    };
    let expected = "kworker/R-hv_vss_freeze\nkworker/R-hv_vss_thaw";
    equal("the rescuers of the queues", &*rescuers()?, expected)?;
    guest.unload(Module::Ours)?;
    equal("what is left of them", &*rescuers()?, "")?;
    refused(
        "an open after the unload",
        guest.open_device(Blocking::Yes),
        "ENOENT",
    )
}

fn second_opener(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let first = guest.open_device(Blocking::Yes)?;
    refused("a second open", guest.open_device(Blocking::Yes), "EBUSY")?;
    first.write(REGISTER1.as_bytes())?;
    refused(
        "a second open after the first has registered",
        guest.open_device(Blocking::No),
        "EBUSY",
    )?;
    first.close()?;
    let next = guest.open_device(Blocking::Yes)?;
    next.write(REGISTER1.as_bytes())?;
    equal("the reply", next.read(12)?, 129u32.to_ne_bytes().to_vec())
}

fn v1_registration(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    for (registration, reply) in [(op::REGISTER1, Some(129u32)), (op::REGISTER, None)] {
        let device = guest.open_device(Blocking::Yes)?;
        equal(
            "bytes taken of the registration",
            device.write(VssMsg::new(registration).as_bytes())?,
            12,
        )?;
        if let Some(version) = reply {
            equal(
                "the reply",
                device.read(64)?,
                version.to_ne_bytes().to_vec(),
            )?;
        }
        let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
        equal(
            "the request as read",
            device.read(12)?,
            VssMsg::new(op::HOT_BACKUP).as_bytes().to_vec(),
        )?;
        device.write(VssMsg::answer_v1(status::OK).as_bytes())?;
        answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)?;
        device.close()?;
    }
    Ok(())
}

fn v2_registration(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let device = guest.open_device(Blocking::Yes)?;
    device.write(register_v2().as_bytes())?;
    let bytes = device.read(4096)?;
    let reply = Registered::read_from_bytes(&bytes)
        .map_err(|_| anyhow::anyhow!("the reply has {} bytes, not 40", bytes.len()))?;
    equal(
        "the reply",
        reply,
        Registered {
            frame: frame_header(frame::REGISTERED, 40, 0),
            abi_version: 2,
            max_frame: 6300,
            features: feature::HOLD | feature::PATHS,
            max_held: 2048,
        },
    )?;

    // A daemon that can do more than the module is served with what the module can do.
    device.close()?;
    let device = guest.open_device(Blocking::Yes)?;
    let mut newer = register_v2();
    newer.max_version = 3;
    newer.features = u32::MAX;
    device.write(&longer(newer.as_bytes()))?;
    equal("the reply to a newer daemon", device.read(4096)?, bytes)?;
    let tx = guest.vss().send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    let answer = answer_v2(request.frame.id, op::HOT_BACKUP, status::OK);
    device.write(&longer(answer.as_bytes()))?;
    answered("HOT_BACKUP", &guest.vss().wait(tx, STEP)?, status::OK)
}

/// The frame as a newer daemon may write it: longer, by a field that nobody here knows.
fn longer(frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    bytes.extend_from_slice(&[0xa5; 8]);
    let size = bytes.len() as u32;
    // Where FrameHdr has it.
    if let Some(field) = bytes.get_mut(4..8) {
        field.copy_from_slice(&size.to_ne_bytes());
    }
    bytes
}

fn v2_freeze(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &["freeze_timeout_ms=600000", "timeout_ms=20000"])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;

    let disks = [Lun::scsi(CLASS, 1, 2, 3), Lun::scsi(CLASS, 0, 0, 9)];
    let tx = vss.send_freeze(&disks)?;
    let (request, payload) = read_request(device)?;
    equal("size of the frame", request.frame.size, MAX_FRAME as u32)?;
    equal("payload size", request.payload_size as usize, payload.len())?;
    equal("the message", request.msg, VssMsg::new(op::FREEZE))?;
    ensure!(request.frame.id != 0, "a request should have an id");
    ensure!(
        (500_000..=600_000).contains(&request.time_left_ms),
        "of 600000 ms, 500000 at least should be left; it says {}",
        request.time_left_ms
    );
    let info = FreezeInfo::read_from_bytes(&payload)
        .map_err(|_| anyhow::anyhow!("the payload has {} bytes, not 6252", payload.len()))?;
    equal("disks", info.lun_count, 2)?;
    let first = info.luns.first().context("no disks")?;
    equal(
        "the first disk",
        (
            first.bus_type,
            first.controller,
            first.port,
            first.target,
            first.lun,
        ),
        (1, CLASS.0, 1, 2, 3),
    )?;
    device.write(answer_v2(request.frame.id, op::FREEZE, status::OK).as_bytes())?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::OK)?;

    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    let (thaw, payload) = read_request(device)?;
    equal("payload of THAW", payload.len(), 0)?;
    equal("size of the frame", thaw.frame.size, 48)?;
    ensure!(
        thaw.frame.id > request.frame.id,
        "ids should ascend: {} after {}",
        thaw.frame.id,
        request.frame.id
    );
    ensure!(
        thaw.time_left_ms <= 20_000,
        "THAW should have 20000 ms at most, it says {}",
        thaw.time_left_ms
    );
    device.write(answer_v2(thaw.frame.id, op::THAW, status::OK).as_bytes())?;
    answered("THAW", &vss.wait(tx, STEP)?, status::OK)
}

fn writes_before_registration(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &["grace_ms=0"])?;
    let device = guest.open_device(Blocking::No)?;
    let mut long = register_v2().as_bytes().to_vec();
    long.push(0);
    let mut misnamed = register_v2();
    misnamed.frame.size = 31;
    let mut old = register_v2();
    old.max_version = 1;
    let v1_answer = VssMsg::answer_v1(status::OK);
    let v2_answer = answer_v2(1, op::FREEZE, status::OK);
    let attempts: [(&str, &[u8], &str); 9] = [
        ("an empty write", &[], "EINVAL"),
        ("11 bytes", &[129; 11], "EINVAL"),
        ("13 bytes", &[129; 13], "EINVAL"),
        ("a v1 answer", v1_answer.as_bytes(), "EPROTO"),
        ("a v2 answer", v2_answer.as_bytes(), "EPROTO"),
        ("a v2 registration with a byte more", &long, "EINVAL"),
        (
            "a v2 registration that lies about its size",
            misnamed.as_bytes(),
            "EINVAL",
        ),
        ("a v2 registration without v2", old.as_bytes(), "EINVAL"),
        ("8000 bytes", &[0; 8000], "EINVAL"),
    ];
    for (what, bytes, errno) in attempts {
        refused(what, device.write(bytes), errno)?;
        refused(&format!("a read after {what}"), device.read(64), "EAGAIN")?;
    }
    // None of that has registered anybody, and none hinders a registration.
    let none = guest.vss().hot_backup(STEP)?;
    answered("HOT_BACKUP without a daemon", &none, status::FAIL)?;
    register(device)
}

fn v1_bad_writes(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    device.write(REGISTER1.as_bytes())?;
    device.read(12)?;
    let ok = VssMsg::answer_v1(status::OK);
    refused(
        "an answer without a request",
        device.write(ok.as_bytes()),
        "ESTALE",
    )?;

    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    ensure!(
        !device.poll(&["POLLIN"], STEP)?.is_empty(),
        "the request should become readable"
    );
    refused(
        "an answer before the request was read",
        device.write(ok.as_bytes()),
        "ESTALE",
    )?;
    device.read(12)?;
    refused(
        "an answer of 11 bytes",
        device.write(&ok.as_bytes()[..11]),
        "EINVAL",
    )?;
    refused("an answer of 13 bytes", device.write(&[0; 13]), "EINVAL")?;
    refused(
        "a v2 answer to v1",
        device.write(answer_v2(1, op::HOT_BACKUP, 0).as_bytes()),
        "EINVAL",
    )?;
    ensure!(
        vss.try_reply(tx).is_none(),
        "the refused writes should not have answered the host"
    );
    // The status 129 lies where a registration has its operation; it is an answer all the same.
    guest.expect_in_log(&["the status of an answer is 0x81"])?;
    device.write(VssMsg::answer_v1(129).as_bytes())?;
    answered("HOT_BACKUP", &vss.wait(tx, STEP)?, 129)?;
    refused("the answer again", device.write(ok.as_bytes()), "ESTALE")
}

fn v2_bad_writes(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let early = answer_v2(1, op::HOT_BACKUP, status::OK);
    refused(
        "an answer without a request",
        device.write(early.as_bytes()),
        "ESTALE",
    )?;

    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    let id = request.frame.id;
    let good = answer_v2(id, op::HOT_BACKUP, status::OK);
    let mut future = good;
    future.frame.version = 3;
    let mut short = good;
    short.frame.size = 24;
    let mut reserved = good;
    reserved.frame.reserved = 1;
    let mut unknown = good;
    unknown.frame.kind = 77;
    let other_id = answer_v2(id + 1, op::HOT_BACKUP, status::OK);
    let no_id = answer_v2(0, op::HOT_BACKUP, status::OK);
    let other_operation = answer_v2(id, op::FREEZE, status::OK);
    let registration = register_v2();
    let v1_answer = VssMsg::answer_v1(status::OK);
    let attempts: [(&str, &[u8], &str); 10] = [
        ("an id that was never given", other_id.as_bytes(), "ESTALE"),
        ("id 0", no_id.as_bytes(), "ESTALE"),
        ("another operation", other_operation.as_bytes(), "EBADMSG"),
        ("a second registration", registration.as_bytes(), "EPROTO"),
        ("a v1 answer", v1_answer.as_bytes(), "EINVAL"),
        ("31 bytes", &good.as_bytes()[..31], "EINVAL"),
        ("version 3", future.as_bytes(), "EINVAL"),
        ("a size that is not its own", short.as_bytes(), "EINVAL"),
        (
            "a reserved field that is set",
            reserved.as_bytes(),
            "EINVAL",
        ),
        ("an unknown kind", unknown.as_bytes(), "EINVAL"),
    ];
    for (what, bytes, errno) in attempts {
        refused(what, device.write(bytes), errno)?;
    }
    ensure!(
        vss.try_reply(tx).is_none(),
        "the refused writes should not have answered the host"
    );
    device.write(good.as_bytes())?;
    answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)?;
    refused("the answer again", device.write(good.as_bytes()), "ESTALE")
}

fn reads(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::No)?;
    refused("a read before the registration", device.read(64), "EAGAIN")?;
    device.write(register_v2().as_bytes())?;
    refused(
        "a read of the reply with 39 bytes",
        device.read(39),
        "EINVAL",
    )?;
    equal("bytes of the reply", device.read(40)?.len(), 40)?;
    refused(
        "a read with nothing to read",
        device.read(MAX_FRAME),
        "EAGAIN",
    )?;

    let tx = vss.send_freeze(&[])?;
    ensure!(
        !device.poll(&["POLLIN"], STEP)?.is_empty(),
        "FREEZE should become readable"
    );
    refused("a read of FREEZE with 48 bytes", device.read(48), "EINVAL")?;
    refused(
        "a read of FREEZE with 6299 bytes",
        device.read(6299),
        "EINVAL",
    )?;
    let (request, _) = read_request(device)?;
    refused("a read of what was read", device.read(MAX_FRAME), "EAGAIN")?;
    device.write(answer_v2(request.frame.id, op::FREEZE, status::FAIL).as_bytes())?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)
}

fn read_now(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    let nothing = |when: &str| {
        let what = format!("a read that must not wait, {when}");
        refused(&what, device.read_now(MAX_FRAME), "EAGAIN")
    };
    nothing("before the registration")?;
    register(device)?;
    nothing("with nothing to read")?;

    let tx = vss.send_freeze(&[])?;
    ensure!(
        !device.poll(&["POLLIN"], STEP)?.is_empty(),
        "FREEZE should become readable"
    );
    refused("one with 6299 bytes", device.read_now(6299), "EINVAL")?;
    let bytes = device.read_now(MAX_FRAME)?;
    let (request, _) = Request::read_from_prefix(&bytes)
        .map_err(|_| anyhow::anyhow!("FREEZE has {} bytes only", bytes.len()))?;
    equal("the message", request.msg, VssMsg::new(op::FREEZE))?;
    nothing("of what was read")?;
    device.write(answer_v2(request.frame.id, op::FREEZE, status::FAIL).as_bytes())?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)
}

fn blocking_read(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let read = device.start_read(MAX_FRAME)?;
    // The reader is in the kernel once its thread sleeps in our read.
    guest.wait_until("a thread of the agent waits in a read", STEP, || {
        let stacks = guest.try_sh("cat /proc/$(pidof lab-agent)/task/*/stack")?;
        Ok(stacks.out.contains("hv_vss"))
    })?;
    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let bytes = device.finish_read(read, STEP)?;
    let request = Request::read_from_bytes(&bytes)
        .map_err(|_| anyhow::anyhow!("HOT_BACKUP has {} bytes, not 48", bytes.len()))?;
    equal("the message", request.msg, VssMsg::new(op::HOT_BACKUP))?;
    device.write(answer_v2(request.frame.id, op::HOT_BACKUP, status::OK).as_bytes())?;
    answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)
}

fn poll(guest: &Guest) -> Result<()> {
    const NOW: Duration = Duration::ZERO;
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::No)?;
    let none = Vec::<String>::new();
    equal(
        "poll before the registration",
        device.poll(&["POLLIN"], NOW)?,
        none.clone(),
    )?;
    device.write(register_v2().as_bytes())?;
    let readable = vec!["POLLIN".to_string()];
    equal(
        "poll with the reply waiting",
        device.poll(&["POLLIN"], NOW)?,
        readable.clone(),
    )?;
    device.read(MAX_FRAME)?;
    equal(
        "poll after the reply was read",
        device.poll(&["POLLIN"], NOW)?,
        none.clone(),
    )?;

    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    equal(
        "poll that waits for a request",
        device.poll(&["POLLIN"], STEP)?,
        readable,
    )?;
    let (request, _) = read_request(device)?;
    equal(
        "poll after the request was read",
        device.poll(&["POLLIN"], NOW)?,
        none,
    )?;
    device.write(answer_v2(request.frame.id, op::HOT_BACKUP, status::OK).as_bytes())?;
    answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)
}

fn reply_timeout(guest: &Guest) -> Result<()> {
    // What is answered has to be so in time, however slow the machine is.
    let [freeze_ms, other_ms] = [1500, 700].map(|ms| {
        let limit = guest.host().patience(Duration::from_millis(ms));
        limit.as_millis() as u64
    });
    let parameters = [
        format!("freeze_timeout_ms={freeze_ms}"),
        format!("timeout_ms={other_ms}"),
    ];
    load_and_negotiate(guest, &parameters.each_ref().map(String::as_str))?;
    let vss = guest.vss();
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;

    for (operation, code, limit_ms) in [
        (Op::FREEZE, op::FREEZE, freeze_ms),
        (Op::THAW, op::THAW, other_ms),
    ] {
        let tx = match operation {
            Op::FREEZE => vss.send_freeze(&[])?,
            other => vss.send(other, &SHORT_BODY)?,
        };
        let (request, _) = read_request(device)?;
        let reply = vss.wait(tx, STEP)?;
        answered(
            &format!("{operation} without an answer"),
            &reply,
            status::FAIL,
        )?;
        ensure!(
            reply.latency >= Duration::from_millis(limit_ms),
            "{operation} should have {limit_ms} ms, it was failed after {:?}",
            reply.latency
        );
        refused(
            &format!("a late answer to {operation}"),
            device.write(answer_v2(request.frame.id, code, status::OK).as_bytes()),
            "ESTALE",
        )?;
        serve_thaw(device)?;
    }

    // The next request is a new one.
    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    device.write(answer_v2(request.frame.id, op::HOT_BACKUP, status::OK).as_bytes())?;
    answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)
}

fn closed_in_the_middle(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &["grace_ms=0"])?;
    let vss = guest.vss();
    // Offered and not even read; read and not answered.
    for read in [false, true] {
        let device = guest.open_device(Blocking::Yes)?;
        register(device)?;
        let tx = vss.send_freeze(&[])?;
        ensure!(
            !device.poll(&["POLLIN"], STEP)?.is_empty(),
            "FREEZE should become readable"
        );
        if read {
            read_request(device)?;
        }
        device.close()?;
        let reply = vss.wait(tx, STEP)?;
        answered("FREEZE when the daemon went", &reply, status::FAIL)?;
    }
    Ok(())
}

fn old_host(guest: &Guest, only: Version) -> Result<()> {
    guest.load(Module::Ours, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    match vss.negotiate(&FRAMEWORKS, &[only], STEP) {
        Err(HostError::NegotiationRefused { .. }) => {}
        Err(error) => return Err(error.into()),
        Ok(agreed) => anyhow::bail!("{only} should be refused, the guest agreed to {agreed:?}"),
    }
    let agreed = vss.agree(STEP)?;
    equal("VSS version afterwards", agreed.message, Version::new(5, 0))
}

fn hot_backup_flags(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    // GET_DM_INFO needs no daemon.
    let info = vss.get_dm_info(STEP)?;
    answered("GET_DM_INFO", &info, status::OK)?;
    equal("flags of GET_DM_INFO", vss_flags(&info), Some(0))?;
    for daemon in [Daemon::Ours, Daemon::Debian] {
        let process = guest.start_daemon(daemon)?;
        let reply = vss.hot_backup(STEP)?;
        answered("HOT_BACKUP", &reply, status::OK)?;
        equal(
            "flags of HOT_BACKUP",
            vss_flags(&reply),
            Some(vss::HBU_NO_AUTO_RECOVERY),
        )?;
        guest.signal(&process, 9)?;
        guest.wait(&process, STEP)?;
    }
    Ok(())
}

fn unknown_operations(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    for number in [0, 1, 4, 7, 8, 9, 127, 128, 129, 255] {
        let reply = vss.op(Op(number), &SHORT_BODY, STEP)?;
        answered(&format!("operation {number}"), &reply, status::OK)?;
        // 28 bytes of headers and 32 of message; VMBus counts in eights.
        equal(
            &format!("bytes of the answer to operation {number}"),
            reply.raw.len(),
            (28 + 32_usize).next_multiple_of(8),
        )?;
    }
    Ok(())
}

fn back_to_back(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    guest.start_daemon(Daemon::Ours)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
    for round in 1..=5 {
        let freeze = vss.send_freeze(&[])?;
        let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
        let (frozen, thawed) = (vss.wait(freeze, STEP)?, vss.wait(thaw, STEP)?);
        // The THAW fails a FREEZE that is not done, so that nobody freezes for a host that is over it. It is
        // failed itself by a daemon that has begun to freeze by then.
        answered(&format!("FREEZE of round {round}"), &frozen, status::FAIL)?;
        let status = thawed.status();
        ensure!(
            [status::OK, status::FAIL].contains(&status),
            "THAW of round {round} was answered {status:#x}"
        );
        ensure!(
            frozen.at <= thawed.at,
            "FREEZE should be answered before THAW"
        );
    }
    // Once the last one has ended, a backup is as good as any.
    guest.wait_until("FREEZE is answered 0", STEP, || {
        let done = vss.freeze(&[], STEP)?.status() == status::OK;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        Ok(done)
    })
}

fn short_packets(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    guest.start_daemon(Daemon::Ours)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
    let whole = Envelope {
        framework: Version::new(3, 0),
        message_type: message_type::VSS,
        message: Version::new(5, 0),
        transaction: 0,
    }
    .request(&vss::message(Op::HOT_BACKUP, &SHORT_BODY));
    for len in [0, 1, 8, 20, 27, 28, 32] {
        vss.send_raw(whole.get(..len).context("no such prefix")?)?;
        let reply = vss.hot_backup(STEP)?;
        answered(
            &format!("HOT_BACKUP after a packet of {len} bytes"),
            &reply,
            status::OK,
        )?;
    }
    // An IC message of another component is none of ours.
    let mut foreign = whole;
    if let Ok((header, _)) = IcHeader::mut_from_prefix(&mut foreign) {
        header.message_type = message_type::KVP.into();
    }
    vss.send_raw(&foreign)?;
    answered(
        "HOT_BACKUP after a KVP message",
        &vss.hot_backup(STEP)?,
        status::OK,
    )?;
    equal("packets that answer nothing", vss.take_strays().len(), 0)
}

fn long_packets(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let vss = guest.vss();
    guest.start_daemon(Daemon::Ours)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
    // AUTO_RECOVER at its full 12,500 bytes; the peer's buffer of 8,192 and around it; the longest
    // message of all, twice.
    let longest = MAX_MESSAGE - size_of::<IcHeader>();
    for body in [12_500, 8_163, 8_164, 8_165, 8_508, longest, longest] {
        let reply = vss.op(Op::AUTO_RECOVER, &vec![0x5a; body - 8], STEP)?;
        answered(&format!("a message with {body} bytes"), &reply, status::OK)?;
        ensure!(
            reply.raw.len() >= size_of::<IcHeader>() + body,
            "the answer to {body} bytes should be as long as the request, it has {} bytes",
            reply.raw.len()
        );
    }
    // A real backup, still.
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    equal("packets that answer nothing", vss.take_strays().len(), 0)
}

/// Reads the THAW that no host waits for, and answers it: what may be frozen is thawed, and the next
/// request can come.
fn serve_thaw(device: Device<'_>) -> Result<()> {
    let (request, _) = read_request(device)?;
    equal("the operation", request.msg.hdr.operation, op::THAW)?;
    let answer = answer_v2(request.frame.id, op::THAW, status::OK);
    Ok(device.write(answer.as_bytes()).map(drop)?)
}

/// Sends one request and has the daemon answer it with `status`; its id, and what the host was told.
fn serve(
    guest: &Guest,
    device: Device<'_>,
    operation: Op,
    code: u8,
    status: u32,
) -> Result<(u64, Tx, Reply)> {
    let vss = guest.vss();
    let tx = vss.send(operation, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    let id = request.frame.id;
    device.write(answer_v2(id, code, status).as_bytes())?;
    Ok((id, tx, vss.wait(tx, STEP)?))
}

fn early_thaw(guest: &Guest) -> Result<()> {
    load_and_negotiate(guest, &[])?;
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let notice = |id, reason| device.write(thawed_v2(id, reason).as_bytes());
    refused(
        "a notice without a freeze",
        notice(1, thawed::DEADLINE),
        "ESTALE",
    )?;
    // One that nobody knows counts as well.
    for reason in (thawed::DEADLINE..=thawed::GONE).chain([0, 99]) {
        let (id, _, frozen) = serve(guest, device, Op::FREEZE, op::FREEZE, status::OK)?;
        answered("FREEZE", &frozen, status::OK)?;
        refused(
            "a notice of another freeze",
            notice(id + 1, reason),
            "ESTALE",
        )?;
        equal("bytes taken of the notice", notice(id, reason)?, 32)?;
        refused("the notice again", notice(id, reason), "ESTALE")?;
        // The daemon sees nothing wrong with the THAW; the module does.
        let (_, _, thaw) = serve(guest, device, Op::THAW, op::THAW, status::OK)?;
        answered("THAW after the notice", &thaw, status::FAIL)?;
        let (_, _, frozen) = serve(guest, device, Op::FREEZE, op::FREEZE, status::OK)?;
        answered("the next FREEZE", &frozen, status::OK)?;
        let (_, _, thaw) = serve(guest, device, Op::THAW, op::THAW, status::OK)?;
        answered("its THAW", &thaw, status::OK)?;
    }
    Ok(())
}

fn debugfs(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    let look = |what: &str, name: &str, words: &[&str]| -> Result<()> {
        let state = ModuleState::of(guest)?;
        equal(
            &format!("{name} {what}"),
            state.words(name)?,
            words.to_vec(),
        )
    };
    // Enough for the looks at a request that is read.
    let timeout = guest.host().patience(Duration::from_secs(3));
    guest.load(
        Module::Ours,
        &["grace_ms=20000", &limit("timeout", timeout)],
    )?;
    vss.wait_open(STEP)?;
    let parameters = guest.read("/sys/kernel/debug/hv_vss/parameters")?;
    let timeout_line = format!("timeout_ms {}", timeout.as_millis());
    for line in ["grace_ms 20000", &timeout_line, "hold_ms 3600000"] {
        ensure!(
            parameters.lines().any(|it| it == line),
            "the parameters should have {line:?}: {parameters}"
        );
    }
    let node = guest.sh("stat -c '%a %u:%g' /sys/kernel/debug/hv_vss/state")?;
    equal("the file's mode", node.trim(), "400 0:0")?;
    look("before a negotiation", "framework", &["0.0"])?;
    vss.agree(STEP)?;
    look("after it", "framework", &["3.0"])?;
    look("after it", "vss", &["5.0"])?;
    look("after one", "negotiations", &["1"])?;

    // A request in every stage.
    look("without a request", "request", &["idle", "0", "0"])?;
    let tx = vss.send(Op::FREEZE, &SHORT_BODY)?;
    vss.get_dm_info(STEP)?;
    look("without a daemon", "request", &["held", "1", "5"])?;
    look("without a daemon", "daemon_abi", &["0"])?;
    let device = guest.open_device(Blocking::Yes)?;
    device.write(register_v2().as_bytes())?;
    look("after the registration", "daemon_abi", &["2"])?;
    look("after the registration", "registrations", &["1"])?;
    look("after the registration", "request", &["offered", "1", "5"])?;
    look("after the registration", "open_requests", &["1"])?;
    device.read(MAX_FRAME)?;
    let (request, _) = read_request(device)?;
    look("after the read", "request", &["read", "1", "5"])?;
    look("before the answer", "freeze_state", &["none"])?;
    // The daemon takes its time, so that the latency is one.
    std::thread::sleep(Duration::from_millis(250));
    device.write(answer_v2(request.frame.id, op::FREEZE, status::OK).as_bytes())?;
    let slow = vss.wait(tx, STEP)?;
    look("after the answer", "request", &["idle", "0", "0"])?;
    look("after the answer", "freeze_state", &["held"])?;
    device.write(thawed_v2(1, thawed::OPERATOR).as_bytes())?;
    look("after the notice", "freeze_state", &["broken"])?;
    look("after the notice", "broken_freezes", &["1"])?;
    serve(guest, device, Op::FREEZE, op::FREEZE, status::OK)?;
    serve(guest, device, Op::FREEZE, op::FREEZE, status::FAIL)?;

    // Requests, failures, time-outs, last and longest latency.
    let state = ModuleState::of(guest)?;
    let [requests, failures, timeouts, last, longest] = state.numbers("freeze")?[..] else {
        anyhow::bail!("freeze should have five numbers");
    };
    equal("FREEZE", (requests, failures, timeouts), (3, 1, 0))?;
    ensure!(
        longest >= 250_000 && Duration::from_micros(longest) <= slow.latency && last < longest,
        "the longest FREEZE took the host {:?}, the module says {longest} us; the last took {last} us",
        slow.latency
    );
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    read_request(device)?;
    answered("THAW without an answer", &vss.wait(tx, STEP)?, status::FAIL)?;
    serve_thaw(device)?;
    let thaw = ModuleState::of(guest)?.numbers("thaw")?;
    equal("THAW", thaw[..3].to_vec(), vec![1, 1, 1])?;
    equal(
        "GET_DM_INFO",
        ModuleState::of(guest)?.numbers("get_dm_info")?[0],
        1,
    )?;
    vss.op(Op::AUTO_RECOVER, &SHORT_BODY, STEP)?;
    equal(
        "AUTO_RECOVER",
        ModuleState::of(guest)?.numbers("other")?[0],
        1,
    )?;

    // What was refused, each for its reason.
    let tx = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    let id = request.frame.id;
    let untimely = register_v2();
    let (other_id, other_operation) = (
        answer_v2(id + 1, op::HOT_BACKUP, 0),
        answer_v2(id, op::THAW, 0),
    );
    let writes: [(&[u8], &str, &str); 4] = [
        (&[0; 7], "EINVAL", "malformed_frames"),
        (untimely.as_bytes(), "EPROTO", "frames_out_of_turn"),
        (other_id.as_bytes(), "ESTALE", "stale_frames"),
        (
            other_operation.as_bytes(),
            "EBADMSG",
            "frames_for_another_operation",
        ),
    ];
    for (bytes, errno, counter) in writes {
        look("before", counter, &["0"])?;
        refused(counter, device.write(bytes), errno)?;
        look("after", counter, &["1"])?;
    }
    device.write(answer_v2(id, op::HOT_BACKUP, status::OK).as_bytes())?;
    vss.wait(tx, STEP)?;
    vss.send_raw(&[0xff; 16])?;
    vss.get_dm_info(STEP)?;
    look("after one", "bad_packets", &["1"])?;
    let many: Vec<_> = (0..6)
        .map(|_| vss.send(Op::HOT_BACKUP, &SHORT_BODY))
        .collect::<Result<_, _>>()?;
    // There is no room for the last ones.
    for tx in &many[4..] {
        answered("one too many", &vss.wait(*tx, STEP)?, status::FAIL)?;
    }
    look("after six at once", "overruns", &["2"])?;
    for tx in &many[..4] {
        let (request, _) = read_request(device)?;
        device.write(answer_v2(request.frame.id, op::HOT_BACKUP, status::OK).as_bytes())?;
        vss.wait(*tx, STEP)?;
    }
    device.close()?;
    look("after the close", "daemon_abi", &["0"])?;

    // What is held is the module's, whether there is a device or not.
    let name = vss.instance().to_string();
    equal("what is held", guest.held()?, Vec::new())?;
    guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &name)?;
    vss.wait_closed(STEP)?;
    let held = guest.held().context("without a device")?;
    equal("what is held without a device", held, Vec::new())?;
    let left = guest.try_sh("test -e /sys/kernel/debug/hv_vss/state")?;
    ensure!(
        left.status == Some(1),
        "the state should go with the device"
    );
    guest.unload(Module::Ours)?;
    let left = guest.try_sh("test -e /sys/kernel/debug/hv_vss")?;
    ensure!(left.status == Some(1), "nothing should be left in debugfs");
    Ok(())
}

fn tracepoints(guest: &Guest) -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    let vss = guest.vss();
    guest.load(Module::Ours, &["timeout_ms=300", "grace_ms=200"])?;
    vss.wait_open(STEP)?;
    guest.sh(&format!(
        "grep -q tracefs /proc/mounts || mount -t tracefs tracefs {TRACING}
         echo > {TRACING}/trace; echo 1 > {TRACING}/events/hv_vss/enable
         mkdir -p /mnt/held && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/held"
    ))?;
    let held_device = guest.read("/sys/block/ram1/dev")?;
    let held_device = held_device.trim();
    vss.agree(STEP)?;
    let waited = vss.send(Op::HOT_BACKUP, &SHORT_BODY)?;
    answered("HOT_BACKUP", &vss.wait(waited, STEP)?, status::FAIL)?;
    let info = vss.send(Op::GET_DM_INFO, &SHORT_BODY)?;
    answered("GET_DM_INFO", &vss.wait(info, STEP)?, status::OK)?;
    let device = guest.open_device(Blocking::Yes)?;
    register(device)?;
    let freeze = vss.send(Op::FREEZE, &SHORT_BODY)?;
    let freeze_id = read_request(device)?.0.frame.id;
    hold(device, freeze_id, "/mnt/held")?;
    device.write(answer_v2(freeze_id, op::FREEZE, status::OK).as_bytes())?;
    answered("FREEZE", &vss.wait(freeze, STEP)?, status::OK)?;
    device.write(thawed_v2(freeze_id, thawed::FOREIGN).as_bytes())?;
    // The daemon says that nothing is frozen, so the module lets go.
    guest.wait_until("nothing is held", STEP, || Ok(guest.held()?.is_empty()))?;
    let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
    let (request, _) = read_request(device)?;
    let thaw_id = request.frame.id;
    answered("THAW", &vss.wait(thaw, STEP)?, status::FAIL)?;
    refused("a short write", device.write(&[0; 3]), "EINVAL")?;
    vss.send_raw(&[0xff; 16])?;
    vss.get_dm_info(STEP)?;
    device.close()?;
    guest.sh(&format!("echo 0 > {TRACING}/events/hv_vss/enable"))?;
    let trace = guest.read(&format!("{TRACING}/trace"))?;
    guest.sh(&format!("umount {TRACING}"))?;

    // In this order, with other events in between.
    let (waited, info, freeze, thaw) = (waited.0, info.0, freeze.0, thaw.0);
    let steps = [
        "hv_vss_negotiated: framework=3.0 vss=5.0".to_owned(),
        format!("hv_vss_request: id=1 operation=HOT_BACKUP stage=received transaction={waited}"),
        format!("hv_vss_request: id=1 operation=HOT_BACKUP stage=held transaction={waited}"),
        format!("hv_vss_request: id=1 operation=HOT_BACKUP stage=timed-out transaction={waited}"),
        "hv_vss_answer: id=1 operation=HOT_BACKUP status=0x80004005 latency_us=".to_owned(),
        "hv_vss_answer: id=0 operation=GET_DM_INFO status=0x00000000 latency_us=0".to_owned(),
        format!("transaction={info}"),
        "hv_vss_daemon: abi=2".to_owned(),
        format!(
            "hv_vss_request: id={freeze_id} operation=FREEZE stage=received transaction={freeze}"
        ),
        format!(
            "hv_vss_request: id={freeze_id} operation=FREEZE stage=offered transaction={freeze}"
        ),
        format!("hv_vss_request: id={freeze_id} operation=FREEZE stage=read transaction={freeze}"),
        format!("hv_vss_freeze: id={freeze_id} device={held_device} error=0 us="),
        format!("hv_vss_answer: id={freeze_id} operation=FREEZE status=0x00000000"),
        format!("transaction={freeze}"),
        format!("hv_vss_broken: id={freeze_id} reason=4"),
        format!("hv_vss_thaw: id={freeze_id} device={held_device} error=0 us="),
        format!("hv_vss_request: id={thaw_id} operation=THAW stage=timed-out transaction={thaw}"),
        format!("hv_vss_answer: id={thaw_id} operation=THAW status=0x80004005"),
        "hv_vss_bad_frame: error=-22".to_owned(),
        "hv_vss_bad_packet: len=16".to_owned(),
        "hv_vss_daemon: abi=0".to_owned(),
    ];
    let mut rest = trace.as_str();
    for step in &steps {
        let (_, behind) = rest
            .split_once(step.as_str())
            .with_context(|| format!("no {step:?} in its place in\n{trace}"))?;
        rest = behind;
    }
    Ok(())
}

fn example(guest: &Guest, module: Module, program: &str) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    for path in ["/mnt/a/w", "/writer"] {
        guest.writer_start(path)?;
    }
    load(guest, module, &[])?;
    // Its log is on what it freezes.
    let script = format!("exec /payload/{program} /mnt/a >/mnt/a/log 2>&1");
    let daemon = guest.spawn(&["sh", "-c", &script])?;
    wait_for_daemon(guest)?;
    let said = match module {
        Module::Ours => {
            // It freezes what it was given, and no more.
            let expected = Seen {
                moving: vec!["/writer".into()],
                ..good(&["/mnt/a/w"])
            };
            equal("a backup", observe(guest)?, expected)?;
            [
                "holds 1 file systems from FREEZE to THAW",
                ": operation 5, ",
                ": operation 6, ",
            ]
        }
        Module::Stock => {
            let freeze = guest.vss().freeze(&[], STEP)?;
            answered("FREEZE without a hold", &freeze, status::FAIL)?;
            equal("writers that stand still", stuck_writers(guest)?, vec![])?;
            ["ABI v1", "does not hold freezes", "every FREEZE is failed"]
        }
    };
    // It is printed when the host has its answer.
    guest.wait_until(&format!("{module:?}: {said:?} in the log"), STEP, || {
        let output = guest.sh("cat /mnt/a/log")?;
        Ok(said.iter().all(|it| output.contains(it)))
    })?;
    stop(guest, module, &daemon)?;
    guest.writers_stop()?;
    guest.sh("umount /mnt/a").map(drop)
}

fn modinfo(guest: &Guest) -> Result<()> {
    let text = guest.sh("modinfo /payload/hv_vss.ko")?;
    // Class 35fa2e29-ea23-4236-96ae-3a6ebacba440 as on the wire: udev loads the module for it.
    let wanted = [
        ("license", "GPL v2"),
        ("alias", "vmbus:292efa3523ea364296ae3a6ebacba440"),
        ("description", "Hyper-V volume shadow copy requests"),
        (
            "parm",
            "freeze_timeout_ms:Time the daemon has for FREEZE, in milliseconds",
        ),
        (
            "parm",
            "timeout_ms:Time the daemon has for other requests, in milliseconds",
        ),
        (
            "parm",
            "grace_ms:How long a request waits for a daemon, in milliseconds",
        ),
        (
            "parm",
            "hold_ms:How long anything is held frozen at the most, in milliseconds",
        ),
    ];
    for (field, value) in wanted {
        let line = |line: &str| line.starts_with(field) && line.contains(value);
        ensure!(
            text.lines().any(line),
            "modinfo should name {field}: {value}; it says\n{text}"
        );
    }
    Ok(())
}
