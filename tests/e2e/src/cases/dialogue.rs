// SPDX-License-Identifier: GPL-2.0-only

//! What our module tells the host, and when, while the daemon is late, busy, silent, gone or back.
//!
//! The case plays both: the host, and the daemon, in either ABI. Limits are the module's own, set short
//! by its parameters, and times are those of the host.

use super::abi::{answer_v2, read_request, register, thawed_v2, REGISTER1};
use super::{case, limit, load, stop, stuck_writers, wait_for_daemon, Case, ModuleState};
use anyhow::{ensure, Context, Result};
use e2e::agent::CallError;
use e2e::check::{answered, equal, refused, status_name};
use e2e::guest::{Blocking, Daemon, Device, Guest, Machine, Module, STEP};
use hv_vss_uapi::{op, thawed, VssMsg, MAX_FRAME};
use hyperv_sim::ic::vss::{message, vss_flags, Op, HBU_NO_AUTO_RECOVERY, SHORT_BODY};
use hyperv_sim::ic::{message_type, negotiate_body, parse_negotiated, status};
use hyperv_sim::ic::{Envelope, Version};
use hyperv_sim::{Carriage, EventKind, Field, HostError, Profile, Reply, Side, Tx};
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

pub const CASES: &[Case] = &[
    case(
        "dialogue/grace-counts",
        "the time that a request waits for a daemon is part of the daemon's time",
        grace_counts,
    ),
    case(
        "dialogue/queueing-counts",
        "so is the time behind another request",
        queueing_counts,
    ),
    case(
        "dialogue/thaw-behind-freeze",
        "a THAW behind an unanswered FREEZE fails that at once, and reaches the daemon",
        thaw_behind_freeze,
    ),
    case(
        "dialogue/answer-not-sent",
        "a success that the host cannot be told breaks the freeze, and the daemon thaws",
        answer_not_sent,
    ),
    case(
        "dialogue/broken-once",
        "a broken freeze is told once, not again to the THAW after the next failed FREEZE",
        broken_once,
    ),
    case(
        "dialogue/closed-before-read",
        "what a daemon has not read when it closes waits for the next one",
        closed_before_read,
    ),
    case(
        "dialogue/thaw-unread",
        "a THAW whose time ran out unread still reaches the daemon",
        thaw_unread,
    ),
    case(
        "dialogue/stopped-at-thaw",
        "so a daemon that was stopped thaws when it goes on: ours, Debian's, and the peer",
        stopped_at_thaw,
    )
    .comparing()
    .long(),
    case(
        "dialogue/silent-daemon",
        "a daemon that let one request run out is not waited for again until it reads",
        silent_daemon,
    )
    .long(),
    case(
        "dialogue/at-open",
        "what the host sends before the probe has ended is served",
        at_open,
    ),
    Case {
        machine: Machine {
            host: Profile::OPENVMM,
            ..Machine::TWO_CPUS
        },
        ..case(
            "dialogue/on-a-pipe",
            "a host that carries its messages by a pipe: what it sends first is served, and a backup is good",
            on_a_pipe,
        )
    },
    case(
        "dialogue/to-the-end",
        "a backup from HOT_BACKUP to BU_COMPLETE, auto-recovery if it is wanted, and the next",
        to_the_end,
    )
    .comparing(),
    on_one_cpu("dialogue/one-cpu-vmbus-4.0", Profile::SERVER_2012_R2),
    on_one_cpu("dialogue/one-cpu-vmbus-4.1", Profile::WINDOWS_10_RS3),
    on_one_cpu("dialogue/one-cpu-vmbus-5.0", Profile::WINDOWS_10_V5),
    on_one_cpu("dialogue/one-cpu-vmbus-5.2", Profile::SERVER_2019),
    on_one_cpu("dialogue/one-cpu-vmbus-5.3", Profile::SERVER_2022),
    on_one_cpu("dialogue/one-cpu-vmbus-6.0", Profile::CURRENT),
    on_all("dialogue/server-2012-r2", Profile::SERVER_2012_R2),
    on_all("dialogue/server-2016", Profile::SERVER_2016),
    on_all("dialogue/windows-10-rs3", Profile::WINDOWS_10_RS3),
    on_all("dialogue/windows-10-v5", Profile::WINDOWS_10_V5),
    on_all("dialogue/server-2019", Profile::SERVER_2019),
    on_all("dialogue/server-2022", Profile::SERVER_2022),
    on_all("dialogue/current", Profile::CURRENT),
    on_all("dialogue/openvmm", Profile::OPENVMM),
];

/// A case on one CPU, with a host of this kind.
const fn on_one_cpu(name: &'static str, host: Profile) -> Case {
    Case {
        machine: Machine {
            host,
            ..Machine::TWO_CPUS.on_one_cpu("the bus calls the module on the CPU that it answers on")
        },
        ..case(
            name,
            "at-open and thaw-behind-freeze on one virtual CPU, with a host of this version of the VMBus",
            |guest| {
                at_open(guest)?;
                thaw_behind_freeze(guest)
            },
        )
    }
}

/// A case on two CPUs, with a host of this kind.
const fn on_all(name: &'static str, host: Profile) -> Case {
    Case {
        machine: Machine {
            host,
            ..Machine::TWO_CPUS
        },
        // As many as there are in `run_all`; the rounds of others do not matter here.
        per_round: Duration::from_secs(20),
        ..case(
            name,
            "all of these but those of the peer, and its other components, on two virtual CPUs, with such a host",
            run_all,
        )
    }
    .long()
}

fn run_all(guest: &Guest) -> Result<()> {
    type Named = (&'static str, fn(&Guest) -> Result<()>);
    let all: [Named; 11] = [
        ("grace-counts", grace_counts),
        ("queueing-counts", queueing_counts),
        ("thaw-behind-freeze", thaw_behind_freeze),
        ("answer-not-sent", answer_not_sent),
        ("broken-once", broken_once),
        ("closed-before-read", closed_before_read),
        ("thaw-unread", thaw_unread),
        ("silent-daemon", silent_daemon),
        ("at-open", at_open),
        ("to-the-end", |guest| {
            let seen = whole_backup(guest, Module::Ours, Daemon::Ours)?;
            equal("a whole backup", seen.as_str(), TO_THE_END)
        }),
        ("other-components", |guest| {
            load(guest, Module::Ours, &[])?;
            let daemon = Scripted::start(guest, Abi::V2)?;
            // Of the devices it has all but VSS.
            guest.load(Module::Stock, &[])?;
            super::judges::components(guest)?;
            daemon.good_backup(guest)
        }),
    ];
    for (name, run) in all {
        let name = format!("dialogue/{name}");
        // Each is one of its own: the end of the last has taken with it what its kernel may log.
        guest
            .begin(&name)
            .and_then(|()| run(guest))
            .and_then(|()| guest.tidy())
            .context(name)?;
    }
    Ok(())
}

/// What is told "at once" is told within this time, for the sake of the emulation.
const AT_ONCE: Duration = Duration::from_millis(1500);

/// The host must have been told `status` after at least `least`, and not much later.
fn told_after(
    guest: &Guest,
    what: &str,
    reply: &Reply,
    status: u32,
    least: Duration,
) -> Result<()> {
    answered(what, reply, status)?;
    let most = least + guest.host().patience(AT_ONCE);
    ensure!(
        (least..most).contains(&reply.latency),
        "{what} should be answered after {least:?} and before {most:?}, it was after {:?}",
        reply.latency
    );
    Ok(())
}

/// An ABI version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    V1,
    V2,
}

impl Abi {
    pub(super) const BOTH: [Abi; 2] = [Abi::V1, Abi::V2];
}

/// A daemon whose every step the case says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scripted<'a> {
    pub(super) device: Device<'a>,
    abi: Abi,
}

/// What it has read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// 0 in v1, which has none.
    pub(super) id: u64,
    pub(super) operation: u8,
    /// 0 in v1, which does not say.
    time_left_ms: u32,
}

impl<'a> Scripted<'a> {
    /// Opens the device and registers.
    pub(super) fn start(guest: &'a Guest, abi: Abi) -> Result<Self> {
        Self::start_in(guest, None, abi)
    }

    /// The same in a process from [`Guest::fork`].
    pub(super) fn start_in(guest: &'a Guest, pid: Option<i32>, abi: Abi) -> Result<Self> {
        let device = guest.open_device_in(pid, Blocking::Yes)?;
        match abi {
            Abi::V1 => {
                device.write(REGISTER1.as_bytes())?;
                device.read(MAX_FRAME)?;
            }
            Abi::V2 => register(device)?,
        }
        Ok(Scripted { device, abi })
    }

    /// Reads the next request, which must be for this operation.
    pub(super) fn take(&self, operation: u8) -> Result<Asked> {
        let asked = match self.abi {
            Abi::V1 => {
                let bytes = self.device.read(MAX_FRAME)?;
                let message = VssMsg::read_from_bytes(&bytes);
                let message = message.map_err(|_| anyhow::anyhow!("{} bytes", bytes.len()))?;
                Asked {
                    id: 0,
                    operation: message.hdr.operation,
                    time_left_ms: 0,
                }
            }
            Abi::V2 => {
                let (request, _) = read_request(self.device)?;
                Asked {
                    id: request.frame.id,
                    operation: request.msg.hdr.operation,
                    time_left_ms: request.time_left_ms,
                }
            }
        };
        equal("the operation that is read", asked.operation, operation)?;
        Ok(asked)
    }

    /// Answers it.
    pub(super) fn answer(&self, asked: &Asked, status: u32) -> Result<usize, CallError> {
        match self.abi {
            Abi::V1 => self.device.write(VssMsg::answer_v1(status).as_bytes()),
            Abi::V2 => {
                let answer = answer_v2(asked.id, asked.operation, status);
                self.device.write(answer.as_bytes())
            }
        }
    }

    /// Reads a request of this operation and answers it.
    pub(super) fn serve(&self, operation: u8, status: u32) -> Result<Asked> {
        let asked = self.take(operation)?;
        self.answer(&asked, status)?;
        Ok(asked)
    }

    /// There is something to read.
    pub(super) fn is_offered(&self) -> Result<()> {
        let reported = self.device.poll(&["POLLIN"], STEP)?;
        equal("what poll reports", reported, vec!["POLLIN".to_owned()])
    }

    /// There is nothing to read.
    pub(super) fn has_nothing(&self) -> Result<()> {
        let reported = self.device.poll(&["POLLIN"], Duration::ZERO)?;
        equal("what poll reports", reported, Vec::new())
    }

    /// A FREEZE of the host, answered like this.
    pub(super) fn freeze(&self, guest: &Guest, status: u32) -> Result<Asked> {
        let tx = guest.vss().send_freeze(&[])?;
        let asked = self.serve(op::FREEZE, status)?;
        answered("FREEZE", &guest.vss().wait(tx, STEP)?, status)?;
        Ok(asked)
    }

    /// A THAW of the host that this daemon sees nothing wrong with, and what the host is told.
    pub(super) fn thaw(&self, guest: &Guest, told: u32) -> Result<()> {
        let tx = send_thaw(guest)?;
        self.serve(op::THAW, status::OK)?;
        answered("THAW", &guest.vss().wait(tx, STEP)?, told)
    }

    /// A backup in which all goes well.
    pub(super) fn good_backup(&self, guest: &Guest) -> Result<()> {
        self.freeze(guest, status::OK)?;
        self.thaw(guest, status::OK)
    }
}

pub(super) fn send_thaw(guest: &Guest) -> Result<Tx> {
    Ok(guest.vss().send(Op::THAW, &SHORT_BODY)?)
}

fn send_hot_backup(guest: &Guest) -> Result<Tx> {
    Ok(guest.vss().send(Op::HOT_BACKUP, &SHORT_BODY)?)
}

fn grace_counts(guest: &Guest) -> Result<()> {
    let second = guest.host().patience(Duration::from_secs(1));
    let (grace, timeout) = (limit("grace", second * 4), limit("timeout", second * 5));
    load(guest, Module::Ours, &[&grace, &timeout])?;
    let tx = send_hot_backup(guest)?;
    // The daemon comes so late, and then does not answer.
    std::thread::sleep(second * 2);
    let daemon = Scripted::start(guest, Abi::V2)?;
    let asked = daemon.take(op::HOT_BACKUP)?;
    ensure!(
        u128::from(asked.time_left_ms) <= (second * 3).as_millis(),
        "of 5 times {second:?}, 2 were over: {} ms should not be left",
        asked.time_left_ms
    );
    let reply = guest.vss().wait(tx, STEP)?;
    told_after(guest, "HOT_BACKUP", &reply, status::FAIL, second * 5)?;
    refused("its answer", daemon.answer(&asked, status::OK), "ESTALE")?;
    daemon.good_backup(guest)
}

fn queueing_counts(guest: &Guest) -> Result<()> {
    let second = guest.host().patience(Duration::from_secs(1));
    load(guest, Module::Ours, &[&limit("timeout", second * 5)])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    let (first, next) = (send_hot_backup(guest)?, send_hot_backup(guest)?);
    let asked = daemon.take(op::HOT_BACKUP)?;
    daemon.has_nothing()?;
    std::thread::sleep(second * 3);
    daemon.answer(&asked, status::OK)?;
    answered("the first", &guest.vss().wait(first, STEP)?, status::OK)?;
    let asked = daemon.take(op::HOT_BACKUP)?;
    ensure!(
        u128::from(asked.time_left_ms) <= (second * 2).as_millis(),
        "of 5 times {second:?}, 3 were over: {} ms should not be left",
        asked.time_left_ms
    );
    let reply = guest.vss().wait(next, STEP)?;
    told_after(guest, "the next", &reply, status::FAIL, second * 5)?;
    daemon.good_backup(guest)
}

fn thaw_behind_freeze(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    for (abi, is_read) in [Abi::V1, Abi::V2]
        .map(|abi| [(abi, true), (abi, false)])
        .concat()
    {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let freeze = guest.vss().send_freeze(&[])?;
            let freezing = match is_read {
                true => Some(daemon.take(op::FREEZE)?),
                false => daemon.is_offered().map(|()| None)?,
            };
            // The host gives up on it.
            let thaw = send_thaw(guest)?;
            let reply = guest.vss().wait(freeze, AT_ONCE * 4)?;
            answered("FREEZE", &reply, status::FAIL)?;
            if let Some(freezing) = freezing {
                // What the daemon then says of it is of no use.
                let late = daemon.answer(&freezing, status::OK);
                refused("the late answer to FREEZE", late, "ESTALE")?;
            }
            daemon.serve(op::THAW, status::OK)?;
            answered("THAW", &guest.vss().wait(thaw, STEP)?, status::OK)?;
            daemon.has_nothing()?;
            daemon.good_backup(guest)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}, FREEZE was read: {is_read}"))?;
    }
    Ok(())
}

/// Bytes of data in the ring that the guest writes.
fn ring_len(guest: &Guest) -> Result<u32> {
    let events = guest.vss().events();
    let opened = events.iter().rev().find_map(|event| match event.kind {
        EventKind::Opened { ring } => u32::try_from(ring).ok(),
        _ => None,
    });
    opened.context("the channel was never opened")
}

fn answer_not_sent(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    let vss = guest.vss();
    let ring = ring_len(guest)?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let unsent = ModuleState::of(guest)?.number("unsent")?;
            let freeze = vss.send_freeze(&[])?;
            let freezing = daemon.take(op::FREEZE)?;
            // As if the host had read nothing since the guest's write index was 8 bytes further: the ring
            // is full. The host has read all, so that both indices are the same.
            let index = vss.poke(Side::FromGuest, Field::ReadIndex, 0)?;
            vss.poke(Side::FromGuest, Field::ReadIndex, (index + 8) % ring)?;
            daemon.answer(&freezing, status::OK)?;
            let state = ModuleState::of(guest)?;
            equal(
                "answers that were not sent",
                state.number("unsent")?,
                unsent + 1,
            )?;
            equal("the freeze", state.words("freeze_state")?, vec!["broken"])?;
            // Nobody will thaw what the host does not know of.
            daemon.serve(op::THAW, status::OK)?;
            daemon.has_nothing()?;
            vss.poke(Side::FromGuest, Field::ReadIndex, index)?;
            ensure!(vss.try_reply(freeze).is_none(), "FREEZE was answered");
            vss.forget();
            daemon.thaw(guest, status::FAIL)?;
            daemon.good_backup(guest)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

fn broken_once(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let mut daemon = Scripted::start(guest, abi)?;
            let frozen = daemon.freeze(guest, status::OK)?;
            // It ends before its THAW.
            match abi {
                Abi::V1 => {
                    daemon.device.close()?;
                    daemon = Scripted::start(guest, abi)?;
                    // So that nothing stays frozen, whatever the host does.
                    daemon.serve(op::THAW, status::OK)?;
                    daemon.has_nothing()?;
                }
                Abi::V2 => {
                    let notice = thawed_v2(frozen.id, thawed::DEADLINE);
                    daemon.device.write(notice.as_bytes())?;
                }
            }
            daemon.thaw(guest, status::FAIL)?;
            // The host knows. However often it asks, that backup was not good.
            daemon.thaw(guest, status::FAIL)?;
            // The next one is another.
            daemon.freeze(guest, status::FAIL)?;
            daemon.thaw(guest, status::OK)?;
            daemon.good_backup(guest)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

fn closed_before_read(guest: &Guest) -> Result<()> {
    let grace = guest.host().patience(Duration::from_secs(4));
    load(guest, Module::Ours, &[&limit("grace", grace)])?;
    let vss = guest.vss();
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            // A daemon is there again within the grace time.
            for (operation, code) in [(Op::HOT_BACKUP, op::HOT_BACKUP), (Op::FREEZE, op::FREEZE)] {
                let daemon = Scripted::start(guest, abi)?;
                let tx = vss.send(operation, &SHORT_BODY)?;
                daemon.is_offered()?;
                daemon.device.close()?;
                let next = Scripted::start(guest, abi)?;
                next.serve(code, status::OK)?;
                let what = format!("{operation} that was not read");
                answered(&what, &vss.wait(tx, STEP)?, status::OK)?;
                if operation == Op::FREEZE {
                    next.thaw(guest, status::OK)?;
                }
                next.device.close()?;
            }
            // A THAW, too, so that the next one can thaw; but nobody has watched over the freeze.
            let daemon = Scripted::start(guest, abi)?;
            daemon.freeze(guest, status::OK)?;
            let tx = send_thaw(guest)?;
            daemon.is_offered()?;
            daemon.device.close()?;
            let next = Scripted::start(guest, abi)?;
            next.serve(op::THAW, status::OK)?;
            let reply = vss.wait(tx, STEP)?;
            answered("THAW that was not read", &reply, status::FAIL)?;
            // There is none.
            let tx = send_hot_backup(guest)?;
            next.is_offered()?;
            next.device.close()?;
            let reply = vss.wait(tx, STEP)?;
            told_after(guest, "HOT_BACKUP", &reply, status::FAIL, grace)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

fn thaw_unread(guest: &Guest) -> Result<()> {
    let timeout = guest.host().patience(Duration::from_secs(2));
    load(guest, Module::Ours, &[&limit("timeout", timeout)])?;
    let vss = guest.vss();
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            daemon.freeze(guest, status::OK)?;
            let tx = send_thaw(guest)?;
            told_after(guest, "THAW", &vss.wait(tx, STEP)?, status::FAIL, timeout)?;
            // It goes on, and thaws.
            daemon.serve(op::THAW, status::OK)?;
            daemon.has_nothing()?;
            daemon.thaw(guest, status::FAIL)?;
            daemon.good_backup(guest)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

/// A daemon that is stopped when the host sends THAW, and goes on after that has failed. In words:
/// what the host was told, and whether the writers went on then.
fn stopped_while_thawing(guest: &Guest, module: Module, daemon: Daemon) -> Result<String> {
    let parameters: &[&str] = match module {
        Module::Ours => &["timeout_ms=2000"],
        // 30 s, fixed.
        Module::Stock => &[],
    };
    load(guest, module, parameters)?;
    let process = guest.start_daemon(daemon)?;
    wait_for_daemon(guest)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&process, 19)?;
    let thaw = vss.thaw(STEP * 2)?.status();
    guest.signal(&process, 18)?;
    let stuck = stuck_writers(guest)?;
    for path in &stuck {
        // So that the daemon, which may log there, can be ended.
        guest.thaw(path.trim_end_matches("/w"))?;
    }
    stop(guest, module, &process)?;
    Ok(match stuck.is_empty() {
        true => format!("THAW {}, thawed", status_name(thaw)),
        false => format!("THAW {}, {stuck:?} left frozen", status_name(thaw)),
    })
}

fn stopped_at_thaw(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    let right = format!("THAW {}, thawed", status_name(status::FAIL));
    let ours = stopped_while_thawing(guest, Module::Ours, Daemon::Ours)?;
    equal("ours", &ours, &right)?;
    let debian = stopped_while_thawing(guest, Module::Ours, Daemon::Debian)?;
    equal("Debian's daemon on our module", &debian, &right)?;
    let peer = stopped_while_thawing(guest, Module::Stock, Daemon::Debian)?;
    guest.compare(
        "the daemon is stopped at THAW, and goes on when that has failed",
        &ours,
        &peer,
    );
    Ok(())
}

fn silent_daemon(guest: &Guest) -> Result<()> {
    let grace = guest.host().patience(Duration::from_secs(1));
    let timeout = grace * 5;
    let parameters = [limit("timeout", timeout), limit("grace", grace)];
    load(guest, Module::Ours, &[&parameters[0], &parameters[1]])?;
    let vss = guest.vss();
    for (abi, is_read, polls) in [
        (Abi::V1, true, false),
        (Abi::V1, false, true),
        (Abi::V2, true, true),
        (Abi::V2, false, false),
    ] {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let tx = send_hot_backup(guest)?;
            if is_read {
                daemon.take(op::HOT_BACKUP)?;
            }
            let reply = vss.wait(tx, STEP)?;
            told_after(guest, "the first", &reply, status::FAIL, timeout)?;
            // Nobody waits for that daemon again, whatever is asked, also when a part of it still polls.
            for operation in [Op::HOT_BACKUP, Op::FREEZE, Op::THAW] {
                if polls {
                    daemon.has_nothing()?;
                }
                let tx = vss.send(operation, &SHORT_BODY)?;
                if polls {
                    daemon.is_offered()?;
                }
                let reply = vss.wait(tx, STEP)?;
                answered(&operation.to_string(), &reply, status::FAIL)?;
                ensure!(
                    reply.latency < grace + guest.host().patience(AT_ONCE),
                    "{operation} after the first: failed after {:?}",
                    reply.latency
                );
            }
            // When it reads again it is served as ever. It may have been told to thaw in the meantime.
            let mut readable = daemon.device.poll(&["POLLIN"], Duration::ZERO)?;
            while !readable.is_empty() {
                daemon.serve(op::THAW, status::OK)?;
                readable = daemon.device.poll(&["POLLIN"], Duration::ZERO)?;
            }
            let read = daemon.device.start_read(MAX_FRAME)?;
            guest.wait_until("it waits in a read", STEP, || {
                let stacks = guest.try_sh("cat /proc/$(pidof lab-agent)/task/*/stack")?;
                Ok(stacks.out.contains("hv_vss"))
            })?;
            let tx = send_hot_backup(guest)?;
            let bytes = daemon.device.finish_read(read, STEP)?;
            let id = match abi {
                Abi::V1 => 0,
                Abi::V2 => u64::read_from_bytes(bytes.get(16..24).context("no frame")?)
                    .map_err(|_| anyhow::anyhow!("no id"))?,
            };
            let asked = Asked {
                id,
                operation: op::HOT_BACKUP,
                time_left_ms: 0,
            };
            // It has its whole time again: more than the grace.
            std::thread::sleep(grace * 2);
            daemon.answer(&asked, status::OK)?;
            answered("HOT_BACKUP", &vss.wait(tx, STEP)?, status::OK)?;
            daemon.good_backup(guest)?;
            Ok(daemon.device.close()?)
        };
        let what = format!("{abi:?}, the request was read: {is_read}, it polls: {polls}");
        one().context(what)?;
    }
    Ok(())
}

/// The answer to the packet that was in the ring as number `number` when the guest opened the channel.
fn greeting_reply(guest: &Guest, number: usize) -> Result<Reply> {
    let events = guest.vss().events();
    let opened = events
        .iter()
        .rposition(|it| matches!(it.kind, EventKind::Opened { .. }));
    let since = events.get(opened.context("not opened")?..).unwrap_or(&[]);
    let mut greetings = since.iter().filter_map(|it| match &it.kind {
        EventKind::Sent { tx, name, .. } if name == "greeting" => Some(*tx),
        _ => None,
    });
    let tx = greetings.nth(number).context("no such greeting was sent")?;
    Ok(guest.vss().wait(tx, STEP)?)
}

fn at_open(guest: &Guest) -> Result<()> {
    let vss = guest.vss();
    let host = guest.host().profile();
    let envelope = |message_type| Envelope {
        framework: Version::new(3, 0),
        message_type,
        message: Version::new(5, 0),
        transaction: match host.carriage {
            Carriage::Packets => 7,
            Carriage::Pipe => 0,
        },
    };
    let request = |op| envelope(message_type::VSS).request(&message(op, &SHORT_BODY));
    let negotiation = negotiate_body(host.frameworks, host.vss);
    vss.greet(&[
        envelope(message_type::NEGOTIATE).request(&negotiation),
        request(Op::GET_DM_INFO),
        request(Op::HOT_BACKUP),
    ]);
    for round in 0..3 {
        let one = || -> Result<()> {
            guest.load(Module::Ours, &["grace_ms=20000"])?;
            let reply = greeting_reply(guest, 0)?;
            let agreed = parse_negotiated(reply.body());
            let agreed = agreed.map_err(|what| anyhow::anyhow!(what))?;
            // All kinds of hosts offer these, whatever else.
            let expected = Some((Version::new(3, 0), Version::new(5, 0)));
            equal("the versions agreed on", agreed, expected)?;
            answered("GET_DM_INFO", &greeting_reply(guest, 1)?, status::OK)?;
            let daemon = Scripted::start(guest, Abi::V2)?;
            daemon.serve(op::HOT_BACKUP, status::OK)?;
            answered("HOT_BACKUP", &greeting_reply(guest, 2)?, status::OK)?;
            daemon.good_backup(guest)?;
            daemon.device.close()?;
            guest.unload(Module::Ours)?;
            Ok(vss.wait_closed(STEP)?)
        };
        one().with_context(|| format!("load number {round}"))?;
    }
    vss.greet(&[]);
    Ok(())
}

/// The host of these speaks first, and no number tells its messages apart.
fn on_a_pipe(guest: &Guest) -> Result<()> {
    at_open(guest)?;
    let daemon = super::start(guest, Module::Ours, Daemon::Ours)?;
    super::backup(guest)?;
    stop(guest, Module::Ours, &daemon)
}

/// Bytes of AUTO_RECOVER after its header: type, flags, and two lists of 260 disks with a count each
/// (openvmm: 12,500 bytes with the header).
const AUTO_RECOVER_BODY: usize = 12_492;

/// What a whole backup should be like.
const TO_THE_END: &str =
    "FREEZE and THAW 0, no auto-recovery wanted, BU_COMPLETE 0 (success); the next backup is good";

/// A backup in the order in which a host goes through it (the states of Windows' own client: freeze,
/// thaw, auto-recovery, complete), in words. The host carries out an auto-recovery if HOT_BACKUP's flags
/// do not say that none is wanted.
fn whole_backup(guest: &Guest, module: Module, daemon: Daemon) -> Result<String> {
    let process = super::start(guest, module, daemon)?;
    let vss = guest.vss();
    // What is not answered by then will not be.
    let soon = Duration::from_secs(5);
    let ready = vss.hot_backup(STEP)?;
    answered("HOT_BACKUP", &ready, status::OK)?;
    answered("GET_DM_INFO", &vss.get_dm_info(STEP)?, status::OK)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let mut words = "FREEZE and THAW 0, ".to_owned();
    if vss_flags(&ready) == Some(HBU_NO_AUTO_RECOVERY) {
        words += "no auto-recovery wanted, ";
    } else {
        words += &match vss.op(Op::AUTO_RECOVER, &[0; AUTO_RECOVER_BODY], soon) {
            Ok(reply) => format!(
                "auto-recovery wanted and AUTO_RECOVER {}, ",
                status_name(reply.status())
            ),
            Err(HostError::TooLarge { .. }) => {
                "auto-recovery wanted, but AUTO_RECOVER does not fit into its ring, ".into()
            }
            Err(HostError::Timeout { .. }) => {
                "auto-recovery wanted, AUTO_RECOVER not answered, ".into()
            }
            Err(error) => return Err(error.into()),
        };
    }
    words += &match super::reply_within(guest, vss.send(Op::BU_COMPLETE, &SHORT_BODY)?, soon)? {
        Some(reply) => format!("BU_COMPLETE {}; ", status_name(reply.status())),
        None => "BU_COMPLETE not answered; ".into(),
    };
    let freeze = vss.send_freeze(&[])?;
    words += match super::reply_within(guest, freeze, soon)? {
        None => "the next FREEZE is not answered",
        Some(reply) => {
            let good = reply.status() == status::OK && vss.thaw(STEP)?.status() == status::OK;
            if good {
                "the next backup is good"
            } else {
                "the next backup is not good"
            }
        }
    };
    stop(guest, module, &process)?;
    Ok(words)
}

fn to_the_end(guest: &Guest) -> Result<()> {
    let ours = whole_backup(guest, Module::Ours, Daemon::Ours)?;
    equal("ours", ours.as_str(), TO_THE_END)?;
    let debian = whole_backup(guest, Module::Ours, Daemon::Debian)?;
    equal(
        "our module with Debian's daemon",
        debian.as_str(),
        TO_THE_END,
    )?;
    let peer = whole_backup(guest, Module::Stock, Daemon::Debian)?;
    guest.compare(
        "a host that carries out the auto-recovery that HOT_BACKUP's flags ask for, and backs up again",
        &ours,
        &peer,
    );
    Ok(())
}
