// SPDX-License-Identifier: GPL-2.0-only

//! A freeze that the module holds for the daemon's descriptor: what others do with the file system does
//! not end it, and whatever ends the daemon, the device or the time ends it, at once and for all.
//!
//! Each case is one thing that happens between a host's FREEZE and its THAW: what the writers see of
//! it, and what the host is told. The case is the daemon, so that every ioctl is its own.

use super::abi::Received;
use super::deadman::{make_hung, make_hung_disk, released, HANG, RELEASED, UNHANG};
use super::dialogue::{send_thaw, Abi, Asked, Scripted};
use super::suspend::{self, hibernate};
use super::{
    case, frozen_us, is_frozen, limit, load, rounds_or, start, stop, stuck_writers, wait_for_daemon,
};
use super::{who_stands_still, Case};
use anyhow::{ensure, Context, Result};
use e2e::agent::CallError;
use e2e::check::{answered, equal, refused, status_name};
use e2e::guest::{Blocking, Daemon, Device, Guest, Ioctl, Module, STEP};
use hv_vss_uapi::{op, thawed, IocFreeze, IocThaw, IOC_FREEZE, IOC_THAW};
use hyperv_sim::ic::status;
use lab_agent::{Descriptor, Frozen, Put};
use std::collections::BTreeMap;
use std::mem::offset_of;
use std::time::Duration;
use zerocopy::IntoBytes;

pub const CASES: &[Case] = &[
    case(
        "owned/thaw-by-others",
        "fsfreeze -u gets EINVAL, and nothing goes on before the host's THAW",
        thaw_by_others,
    ),
    case(
        "owned/sysrq-j",
        "the emergency thaw leaves it frozen",
        sysrq_j,
    )
    .comparing().long(),
    Case {
        // Its own number is six times that of others.
        per_round: Duration::from_secs(6 * 30),
        ..case(
            "owned/rude-neighbour",
            "backups beside somebody who freezes and thaws all file systems without end",
            rude_neighbour,
        )
    }
    .comparing().long(),
    case(
        "owned/administrator",
        "an administrator's freeze that begins before, during, and ends in the window or after it",
        administrator,
    )
    .comparing().long(),
    case(
        "owned/dm-suspend",
        "a device-mapper suspend and resume (an LVM snapshot) before, in and after the window",
        dm_suspend,
    ).long(),
    case(
        "owned/xfs-repair",
        "the kernel's own freeze of an xfs, for a repair of its counters, ends in ours, which stays",
        xfs_repair,
    ),
    case(
        "owned/our-daemon",
        "our daemon holds all that it freezes so: nothing that others do ends the backup",
        our_daemon,
    ),
    case(
        "owned/lazy-unmount",
        "unmounted lazily while held: thawed with the rest, and can be mounted again",
        lazy_unmount,
    ),
    case(
        "owned/closed",
        "the last close of the device thaws all, of whoever has a copy, and the host's THAW is failed",
        closed,
    ),
    case(
        "owned/killed",
        "so does kill -9",
        killed,
    ),
    case(
        "owned/in-reverse",
        "ext4 on a loop device on an xfs: killed, both go on, and the thaw of the xfs was begun first",
        in_reverse,
    ),
    case(
        "owned/killed-in-a-hung-freeze",
        "killed inside a freeze that hangs: gone at once, all else thawed, the hung one when it comes back",
        killed_in_a_hung_freeze,
    ),
    case(
        "owned/device-gone",
        "unbound or rescinded while held: thawed before the device is gone",
        device_gone,
    ),
    case(
        "owned/device-gone-in-a-hung-freeze",
        "unbound or rescinded while a freeze hangs: its caller hears of it at once, and it is undone when it comes back",
        device_gone_in_a_hung_freeze,
    ),
    suspend::case(
        "owned/hibernated",
        "hibernation while held: thawed before, without the daemon's help",
        hibernated,
    ),
    case(
        "owned/deadline",
        "thawed at the daemon's deadline, and at the module's; the host's THAW is failed",
        deadline,
    ).long(),
    case(
        "owned/deadline-after-thaw",
        "a deadline that passes when the host has sent its THAW, read or not, breaks nothing",
        deadline_after_thaw,
    ),
    case(
        "owned/stopped-at-thaw",
        "our daemon stopped over its deadline: good when the host's THAW came before that, failed when it came after",
        stopped_at_thaw,
    ),
    case(
        "owned/called-off",
        "a FREEZE that fails, for whatever reason, lets go what was held for it",
        called_off,
    ).long(),
    case(
        "owned/thaw-not-answered",
        "a THAW that its daemon does not read, fails or does not answer lets go all the same",
        thaw_not_answered,
    ).long(),
    case(
        "owned/one-by-one",
        "each can be thawed alone, and another one frozen in its place; in the window that fails the THAW",
        one_by_one,
    ).long(),
    case(
        "owned/late-thaw",
        "a thaw for a rehearsal or a FREEZE that is over ends no other freeze; one of all before the answer fails the THAW",
        late_thaw,
    ),
    case(
        "owned/all-called-off",
        "a FREEZE of which one is thawed and the last called off before its answer fails the THAW",
        all_called_off,
    ),
    case(
        "owned/refused",
        "a freeze that is refused takes over no hold, and a thaw that is breaks no freeze",
        refused_changes_nothing,
    ),
    case(
        "owned/waits-its-turn",
        "a freeze that waits for a thaw that hangs is called off by the next one, of it or of all",
        waits_its_turn,
    ),
    case(
        "owned/errors",
        "both ioctls refuse what FIFREEZE would, and what is out of turn",
        errors,
    ),
];

/// A freeze of the file system at `path` for the request with this id.
fn freezing(id: u64, path: &str) -> (IocFreeze, Option<Put>) {
    let argument = IocFreeze {
        id,
        count: PATHS.len() as u32,
        ..IocFreeze::default()
    };
    let put = Put {
        at: offset_of!(IocFreeze, fd),
        what: Descriptor::Path(path.into()),
    };
    (argument, Some(put))
}

fn freeze_ioctl((argument, put): (IocFreeze, Option<Put>)) -> Ioctl {
    Ioctl {
        request: IOC_FREEZE,
        argument: argument.as_bytes().to_vec(),
        put,
        unprivileged: false,
    }
}

/// A thaw of the file system at `path`, or of all, that is held with this id.
fn thaw_ioctl(id: u64, path: Option<&str>) -> Ioctl {
    let argument = IocThaw {
        id,
        fd: -1,
        flags: 0,
    };
    Ioctl {
        request: IOC_THAW,
        argument: argument.as_bytes().to_vec(),
        put: path.map(|path| Put {
            at: offset_of!(IocThaw, fd),
            what: Descriptor::Path(path.into()),
        }),
        unprivileged: false,
    }
}

/// Has the module freeze and hold the file system at `path`.
pub(super) fn hold(device: Device<'_>, id: u64, path: &str) -> Result<(), CallError> {
    device.ioctl(&freeze_ioctl(freezing(id, path)))
}

/// An ext4 on device-mapper, an xfs and a btrfs.
const PATHS: [&str; 3] = ["/mnt/a", "/mnt/b", "/mnt/c"];

/// How often each is written to: often enough to see that a writer does not stand still.
const EVERY_US: u64 = 10_000;

/// Makes and mounts them, with a writer on each, and loads our module.
fn make(guest: &Guest, parameters: &[&str]) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b /mnt/c
         modprobe dm-mod; modprobe xfs; modprobe btrfs
         dmsetup create volume --noudevsync --table '0 131072 linear /dev/ram1 0'
         [ -e /dev/mapper/volume ] || dmsetup mknodes
         mkfs.ext4 -q -F /dev/mapper/volume && mount /dev/mapper/volume /mnt/a &&
         mkfs.xfs -q -f /dev/ram2 && mount /dev/ram2 /mnt/b &&
         mkfs.btrfs -q -f /dev/ram3 && mount /dev/ram3 /mnt/c")?;
    for path in PATHS {
        guest.writer_start_every(&format!("{path}/w"), EVERY_US)?;
    }
    load(guest, Module::Ours, parameters)
}

/// A host's FREEZE for which all of [`PATHS`] are held, answered with success; what was asked.
fn freeze(guest: &Guest, daemon: Scripted<'_>) -> Result<Asked> {
    let tx = guest.vss().send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    for path in PATHS {
        hold(daemon.device, asked.id, path).with_context(|| format!("to hold {path}"))?;
    }
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    Ok(asked)
}

/// A host's THAW: all is let go, and what the host is told then.
fn thaw(guest: &Guest, daemon: Scripted<'_>, told: u32) -> Result<()> {
    thaw_but(guest, daemon, told, Vec::new())
}

/// The same while these are held, in these states, for another one that is gone.
fn thaw_but(
    guest: &Guest,
    daemon: Scripted<'_>,
    told: u32,
    still_held: Vec<(String, String)>,
) -> Result<()> {
    let tx = send_thaw(guest)?;
    let asked = daemon.take(op::THAW)?;
    let id = guest.held_for()?.last().copied().unwrap_or_default();
    daemon.device.ioctl(&thaw_ioctl(id, None))?;
    daemon.answer(&asked, status::OK)?;
    answered("THAW", &guest.vss().wait(tx, STEP)?, told)?;
    equal("what is held after THAW", guest.held()?, still_held)
}

/// Writers that stand still, and how often they have written until then.
struct Still(Vec<(String, u64)>);

impl Still {
    /// Waits until all writers but `without` stand still.
    fn wait(guest: &Guest, without: &[&str]) -> Result<Still> {
        let mut still = Vec::new();
        guest.wait_until("every writer stands still", STEP, || {
            let writers = guest.writers()?;
            let mut frozen = writers.iter().filter(|it| !without.contains(&&*it.path));
            let all = frozen.clone().all(|it| is_frozen(guest, it));
            still = frozen
                .by_ref()
                .map(|it| (it.path.clone(), it.count))
                .collect();
            Ok(all)
        })?;
        Ok(Still(still))
    }

    /// None of them has written since, nor does within some time from now.
    fn holds(&self, guest: &Guest, what: &str) -> Result<()> {
        let until = guest.clock()? + frozen_us(guest);
        guest.wait_until("some time has passed", STEP, || Ok(guest.clock()? > until))?;
        let writers = guest.writers()?;
        for (path, count) in &self.0 {
            let now = writers
                .iter()
                .find(|it| it.path == *path)
                .context("no writer")?;
            ensure!(
                now.count == *count && is_frozen(guest, now),
                "{what}: {path} should stand still, it was written {} times more",
                now.count - count
            );
        }
        Ok(())
    }
}

/// All writers go on.
fn all_go_on(guest: &Guest, what: &str) -> Result<()> {
    equal(what, stuck_writers(guest)?, Vec::new())
}

/// The next backup is good: all stand still for all of it.
fn good_backup(guest: &Guest, daemon: Scripted<'_>) -> Result<()> {
    freeze(guest, daemon)?;
    Still::wait(guest, &[])?.holds(guest, "in the next backup")?;
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after the next backup")
}

/// The daemon is told that what the module held for it is thawed.
pub(super) fn is_told(daemon: Scripted<'_>, id: u64, reason: u32) -> Result<()> {
    match Received::read(daemon.device)? {
        Received::Thawed(notice) => {
            equal("the notice", (notice.frame.id, notice.reason), (id, reason))
        }
        Received::Request(request, _) => anyhow::bail!("a notice was due, it is {request:?}"),
    }
}

fn thaw_by_others(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    let asked = guest.clock()?;
    freeze(guest, daemon)?;
    let frozen = guest.clock()?;
    let still = Still::wait(guest, &[])?;
    for path in PATHS {
        refused(&format!("FITHAW of {path}"), guest.thaw(path), "EINVAL")?;
        let tool = guest.try_sh(&format!("fsfreeze -u {path}"))?;
        ensure!(
            tool.status == Some(1) && tool.err.contains("Invalid argument"),
            "fsfreeze -u {path} should be refused, it was: {tool:?}"
        );
        // What every case is ended with would see it, by itself and by what the module says.
        let frozen = guest.ask_frozen(path)?;
        equal("whether it is frozen", frozen, Frozen::ForItsOwner)?;
    }
    equal("what is held", guest.held()?.len(), PATHS.len())?;
    still.holds(guest, "after fsfreeze -u")?;
    // Each is that for as long as it has been frozen, whatever others have tried.
    let earliest = (guest.clock()? - frozen) / 1000;
    let held_for = guest.held_for_ms()?;
    let latest = (guest.clock()? - asked) / 1000;
    ensure!(
        held_for.len() == PATHS.len() && held_for.iter().all(|it| (earliest..=latest).contains(it)),
        "each should be held for {earliest} to {latest} ms, debugfs says {held_for:?}"
    );
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;
    good_backup(guest, daemon)
}

/// SysRq-j, to its end.
fn emergency_thaw(guest: &Guest) -> Result<()> {
    let complete = || -> Result<usize> {
        let log = guest.log(6)?;
        let lines = log
            .iter()
            .filter(|it| it.text.contains("Emergency Thaw complete"));
        Ok(lines.count())
    };
    let before = complete()?;
    guest.write("/proc/sysrq-trigger", "j")?;
    guest.wait_until("the emergency thaw is complete", STEP, || {
        Ok(complete()? > before)
    })
}

fn sysrq_j(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    emergency_thaw(guest)?;
    still.holds(guest, "after SysRq-j")?;
    let ours = still.0.len();
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;
    good_backup(guest, daemon)?;
    daemon.device.close()?;
    guest.unload(Module::Ours)?;

    let peer = start(guest, Module::Stock, Daemon::Debian)?;
    answered(
        "FREEZE with the peer",
        &guest.vss().freeze(&[], STEP)?,
        status::OK,
    )?;
    Still::wait(guest, &[])?;
    emergency_thaw(guest)?;
    let stuck = stuck_writers(guest)?.len();
    let thaw = guest.vss().thaw(STEP)?.status();
    stop(guest, Module::Stock, &peer)?;
    let words = |stuck: usize, thaw: u32| {
        format!(
            "{} of {} file systems go on, THAW {}",
            PATHS.len() - stuck,
            PATHS.len(),
            status_name(thaw)
        )
    };
    guest.compare(
        "SysRq-j (emergency thaw) while frozen",
        &words(ours, status::OK),
        &words(stuck, thaw),
    );
    Ok(())
}

fn rude_neighbour(guest: &Guest) -> Result<()> {
    // Each takes seconds: the neighbours take all of the processor.
    let rounds = rounds_or(50);
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    for path in PATHS {
        guest.neighbour_start(path)?;
    }
    for round in 1..=rounds {
        let one = || -> Result<()> {
            freeze(guest, daemon)?;
            // However little of the processor the neighbours leave the writers.
            let (_, moving) = who_stands_still(guest)?;
            equal("who goes on while frozen", moving, Vec::new())?;
            thaw(guest, daemon, status::OK)
        };
        one().with_context(|| format!("backup {round}"))?;
    }
    for (path, done) in PATHS.iter().zip(guest.neighbours_stop()?) {
        ensure!(
            done.freezes > 0 && done.thaws == done.freezes,
            "the neighbour of {path} should have frozen and thawed: {done:?}"
        );
        println!("     {path}: {done:?}");
    }
    all_go_on(guest, "at the end")?;
    daemon.device.close()?;
    guest.unload(Module::Ours)?;

    // FIFREEZE beside FIFREEZE.
    let peer = start(guest, Module::Stock, Daemon::Debian)?;
    for path in PATHS {
        guest.neighbour_start(path)?;
    }
    let (mut good, mut wrong) = (0, 0);
    for _ in 0..rounds {
        if guest.vss().freeze(&[], STEP)?.status() == status::OK {
            let (_, moving) = who_stands_still(guest)?;
            let thaw = guest.vss().thaw(STEP)?.status();
            good += u32::from(thaw == status::OK);
            wrong += u32::from(thaw == status::OK && !moving.is_empty());
        }
    }
    guest.neighbours_stop()?;
    // Who was frozen by whom is anybody's guess.
    for path in PATHS {
        guest.thaw(path).or_else(|error| match error.errno() {
            Some("EINVAL") => Ok(()),
            _ => Err(error),
        })?;
    }
    stop(guest, Module::Stock, &peer)?;
    guest.compare(
        &format!("a neighbour freezes and thaws all file systems without end, {rounds} backups"),
        &format!("{rounds} called good, a writer went on in 0 of them"),
        &format!("{good} called good, a writer went on in {wrong} of them"),
    );
    Ok(())
}

fn administrator(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;

    // From before the window until after it.
    guest.freeze("/mnt/a")?;
    freeze(guest, daemon)?;
    Still::wait(guest, &[])?.holds(guest, "frozen before")?;
    thaw(guest, daemon, status::OK)?;
    equal(
        "still frozen",
        stuck_writers(guest)?,
        vec!["/mnt/a/w".into()],
    )?;
    guest.thaw("/mnt/a")?;
    all_go_on(guest, "after the administrator's thaw")?;

    // From before the window until in it.
    guest.freeze("/mnt/a")?;
    freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    guest.thaw("/mnt/a")?;
    still.holds(guest, "frozen before, and thawed in the window")?;
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;

    // All in the window.
    freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    guest.freeze("/mnt/a")?;
    guest.thaw("/mnt/a")?;
    still.holds(guest, "frozen and thawed in the window")?;
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;

    // From in the window until after it.
    freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    guest.freeze("/mnt/a")?;
    still.holds(guest, "frozen in the window")?;
    thaw(guest, daemon, status::OK)?;
    equal(
        "still frozen",
        stuck_writers(guest)?,
        vec!["/mnt/a/w".into()],
    )?;
    guest.thaw("/mnt/a")?;
    all_go_on(guest, "after the administrator's thaw")?;
    daemon.device.close()?;

    // The same with ours, which counts what the kernel says of each thaw.
    let ours = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
    guest.freeze("/mnt/a")?;
    let thaw = guest.vss().thaw(STEP)?;
    answered("THAW beside an administrator's freeze", &thaw, status::OK)?;
    guest.thaw("/mnt/a")?;
    all_go_on(guest, "after the administrator's thaw")?;
    guest.signal(&ours, 15)?;
    guest.wait(&ours, STEP)?;
    guest.unload(Module::Ours)?;

    let peer = start(guest, Module::Stock, Daemon::Debian)?;
    guest.freeze("/mnt/a")?;
    let frozen = guest.vss().freeze(&[], STEP)?.status();
    let mut text = format!("FREEZE {}", status_name(frozen));
    if frozen == status::OK {
        Still::wait(guest, &[])?;
        guest.thaw("/mnt/a")?;
        let goes_on = !stuck_writers(guest)?.contains(&"/mnt/a/w".to_owned());
        let words = if goes_on {
            "goes on in the backup"
        } else {
            "stays frozen"
        };
        let thaw = guest.vss().thaw(STEP)?.status();
        text.push_str(&format!(", {words}, THAW {}", status_name(thaw)));
    } else {
        guest.thaw("/mnt/a")?;
    }
    stop(guest, Module::Stock, &peer)?;
    guest.compare(
        "frozen by an administrator beforehand, who thaws it during the backup",
        "FREEZE 0 (success), stays frozen, THAW 0 (success)",
        &text,
    );
    Ok(())
}

const SUSPEND: &str = "dmsetup suspend volume";
const RESUME: &str = "dmsetup resume volume";

fn dm_suspend(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    // When the device is suspended and when it is resumed: before FREEZE, in the window, after THAW.
    for (suspended, resumed) in [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)] {
        let at = |moment: u32| -> Result<()> {
            if suspended == moment {
                guest.sh(SUSPEND)?;
            }
            if resumed == moment {
                guest.sh(RESUME)?;
            }
            Ok(())
        };
        let one = || -> Result<()> {
            at(0)?;
            freeze(guest, daemon)?;
            let still = Still::wait(guest, &[])?;
            at(1)?;
            still.holds(guest, "in the window")?;
            thaw(guest, daemon, status::OK)?;
            if resumed == 2 {
                equal(
                    "with the device suspended",
                    stuck_writers(guest)?,
                    vec!["/mnt/a/w".into()],
                )?;
            }
            at(2)?;
            all_go_on(guest, "after all")
        };
        one().with_context(|| format!("suspended at {suspended}, resumed at {resumed}"))?;
    }
    good_backup(guest, daemon)
}

/// The kernel freezes an xfs by itself while it makes its summary counters anew, and thaws it then. That freeze has no
/// owner, and its end is not that of ours.
fn xfs_repair(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    // The least that mkfs.xfs takes.
    make_hung_disk(guest, "/dev/ram4", 300)?;
    guest.sh(
        "modprobe xfs; mkfs.xfs -q -f /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung &&
         echo x >/mnt/hung/file",
    )?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    guest.sh(HANG)?;
    let repair = guest.spawn(&["xfs_io", "-x", "-c", "repair fscounters", "/mnt/hung"])?;
    guest.wait_until("it hangs in the kernel's own freeze", STEP, || {
        let stack = guest.read(&format!("/proc/{}/stack", repair.pid))?;
        Ok(stack.contains("freeze_super"))
    })?;
    let tx = guest.vss().send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    let freeze = freeze_ioctl(freezing(asked.id, "/mnt/hung"));
    let freeze = daemon.device.start_ioctl(&freeze)?;
    guest.sh(UNHANG)?;
    daemon.device.finish_ioctl(freeze, STEP)?;
    let ended = guest.wait(&repair, STEP)?;
    let said = guest.output(&repair)?;
    ensure!(
        ended.status == Some(0) && said.contains("did not need repair"),
        "the repair should come to its end: {ended:?}, {said}"
    );
    let frozen = guest.ask_frozen("/mnt/hung")?;
    equal("whether it is frozen", frozen, Frozen::ForItsOwner)?;
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    thaw(guest, daemon, status::OK)?;
    guest.not_frozen("after THAW", &["/mnt/hung"])
}

fn our_daemon(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    guest.start_daemon(Daemon::Ours)?;
    super::wait_for_daemon(guest)?;
    let vss = guest.vss();
    type Event = (&'static str, fn(&Guest) -> Result<()>);
    let events: [Event; 5] = [
        ("fsfreeze -u of each", |guest| {
            let mut paths = PATHS.into_iter();
            paths.try_for_each(|path| refused("FITHAW", guest.thaw(path), "EINVAL"))
        }),
        ("SysRq-j", emergency_thaw),
        ("an administrator's freeze and thaw", |guest| {
            guest.freeze("/mnt/b")?;
            Ok(guest.thaw("/mnt/b")?)
        }),
        ("dmsetup suspend and resume", |guest| {
            guest.sh(&format!("{SUSPEND} && {RESUME}")).map(drop)
        }),
        ("umount -l", |guest| guest.sh("umount -l /mnt/c").map(drop)),
    ];
    for (what, happens) in events {
        let one = || -> Result<()> {
            answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
            let still = Still::wait(guest, &[])?;
            // The root, too.
            equal("how many are held", guest.held()?.len(), PATHS.len() + 1)?;
            happens(guest)?;
            still.holds(guest, what)?;
            answered("THAW", &vss.thaw(STEP)?, status::OK)?;
            all_go_on(guest, "after THAW")?;
            equal("what is held", guest.held()?, Vec::new())
        };
        one().with_context(|| what.to_owned())?;
    }
    Ok(())
}

fn lazy_unmount(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    for path in PATHS {
        guest.sh(&format!("umount -l {path}"))?;
    }
    still.holds(guest, "after umount -l")?;
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;
    // With the last writer the file systems end, and can come back.
    guest.writers_stop()?;
    guest.sh(
        "mount /dev/mapper/volume /mnt/a && mount /dev/ram2 /mnt/b && mount /dev/ram3 /mnt/c",
    )?;
    for path in PATHS {
        guest.writer_start_every(&format!("{path}/w"), EVERY_US)?;
    }
    good_backup(guest, daemon)?;

    // Nobody is inside but what is held: it keeps the file system.
    guest.writers_stop()?;
    hold(daemon.device, 0, "/mnt/a")?;
    let unmount = guest.try_sh("umount /mnt/a")?;
    ensure!(
        unmount.err.contains("busy"),
        "an unmount should find it busy: {unmount:?}"
    );
    daemon.device.ioctl(&thaw_ioctl(0, Some("/mnt/a")))?;
    guest.sh("umount /mnt/a").map(drop)
}

/// After `at` on the guest's clock all went on within [`RELEASED`], and the host's THAW is failed,
/// once nobody is left and by the next daemon; whose next backup is good.
fn ended_by_itself(guest: &Guest, what: &str, at: u64) -> Result<()> {
    released(guest, what, at, RELEASED)?;
    equal("what is held", guest.held()?, Vec::new())?;
    answered(
        "THAW without a daemon",
        &guest.vss().thaw(STEP)?,
        status::FAIL,
    )?;
    let next = Scripted::start(guest, Abi::V2)?;
    // The THAW that nobody has done.
    next.serve(op::THAW, status::OK)?;
    thaw(guest, next, status::FAIL)?;
    good_backup(guest, next)?;
    Ok(next.device.close()?)
}

fn closed(guest: &Guest) -> Result<()> {
    make(guest, &["grace_ms=300"])?;
    for opener_is_last in [true, false] {
        let daemon = Scripted::start(guest, Abi::V2)?;
        let copy = guest.share(daemon.device)?;
        freeze(guest, daemon)?;
        let still = Still::wait(guest, &[])?;
        let end = |opener: bool| -> Result<u64> {
            let at = guest.clock()?;
            if opener {
                daemon.device.close()?;
            } else {
                guest.signal(&copy, 9)?;
                guest.wait(&copy, STEP)?;
            }
            Ok(at)
        };
        end(!opener_is_last)?;
        still.holds(guest, "with one of two copies closed")?;
        equal("what is held", guest.held()?.len(), PATHS.len())?;
        let at = end(opener_is_last)?;
        ended_by_itself(guest, "the last close", at)
            .with_context(|| format!("its opener was the last: {opener_is_last}"))?;
    }
    Ok(())
}

fn killed(guest: &Guest) -> Result<()> {
    make(guest, &["grace_ms=300"])?;
    let pid = guest.fork()?;
    let daemon = Scripted::start_in(guest, Some(pid), Abi::V2)?;
    freeze(guest, daemon)?;
    Still::wait(guest, &[])?;
    let at = guest.signal_all(&[pid], 9)?;
    ended_by_itself(guest, "kill -9", at)
}

fn in_reverse(guest: &Guest) -> Result<()> {
    const EVENTS: &str = "/sys/kernel/tracing/events";
    load(guest, Module::Ours, &[])?;
    let over = guest.sh(
        "mkdir -p /mnt/under /mnt/over; modprobe xfs
         mkfs.xfs -q -f /dev/ram2 && mount /dev/ram2 /mnt/under &&
         truncate -s 32M /mnt/under/image && device=$(losetup --find --show /mnt/under/image) &&
         mkfs.ext4 -q -F $device && mount $device /mnt/over && cat /sys/block/${device#/dev/}/dev",
    )?;
    let under = guest.read("/sys/block/ram2/dev")?;
    let order = ["/mnt/over", "/mnt/under"];
    for path in order {
        guest.writer_start_every(&format!("{path}/w"), EVERY_US)?;
    }
    guest.sh(&format!(
        "grep -q tracefs /proc/mounts || mount -t tracefs tracefs /sys/kernel/tracing
         echo > /sys/kernel/tracing/trace; cd {EVENTS}
         echo 'workqueue == \"hv_vss_thaw\"' >workqueue/workqueue_queue_work/filter &&
         echo 1 >workqueue/workqueue_queue_work/enable &&
         echo 1 >workqueue/workqueue_execute_start/enable && echo 1 >hv_vss/hv_vss_thaw/enable"
    ))?;

    let pid = guest.fork()?;
    let daemon = Scripted::start_in(guest, Some(pid), Abi::V2)?;
    let tx = guest.vss().send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    for path in order {
        hold(daemon.device, asked.id, path)?;
    }
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    Still::wait(guest, &[])?;
    let at = guest.signal_all(&[pid], 9)?;
    released(guest, "kill -9", at, RELEASED)?;
    equal("what is held", guest.held()?, Vec::new())?;

    let trace = guest.read("/sys/kernel/tracing/trace")?;
    guest.sh(&format!(
        "cd {EVENTS}; echo 0 >workqueue/enable; echo 0 >hv_vss/enable
         echo 0 >workqueue/workqueue_queue_work/filter; cd /; umount /sys/kernel/tracing"
    ))?;
    equal(
        "the devices in the order in which their thaws were queued",
        thaws_as_queued(&trace),
        vec![under.trim().to_owned(), over.trim().to_owned()],
    )
}

/// Which devices were thawed, in the order in which their thaws were queued. The order of the events says
/// nothing of that: each thaw has a worker of its own, and one may take longer.
fn thaws_as_queued(trace: &str) -> Vec<String> {
    /// The word behind this one in the line.
    fn behind<'a>(line: &'a str, what: &str) -> Option<&'a str> {
        let (_, rest) = line.split_once(what)?;
        Some(rest.split(' ').next()?.trim_end_matches(':'))
    }
    let mut queued = Vec::new();
    // The work that each thread has in hand, and the device that each work has thawed.
    let (mut in_hand, mut thawed) = (BTreeMap::new(), BTreeMap::new());
    for line in trace.lines() {
        let thread = line.split_whitespace().next();
        if let Some(work) = behind(line, "workqueue_queue_work: work struct=") {
            queued.push(work);
        } else if let Some(work) = behind(line, "workqueue_execute_start: work struct ") {
            in_hand.insert(thread, work);
        } else if let Some(device) = behind(line, " device=") {
            if let Some(work) = in_hand.get(&thread) {
                thawed.insert(*work, device.to_owned());
            }
        }
    }
    let device = |work: &&str| thawed.get(work).cloned();
    queued.iter().filter_map(device).collect()
}

/// The device number of what is mounted on `/mnt/hung`.
fn device_of_hung(guest: &Guest) -> Result<String> {
    // Fields of Documentation/filesystems/proc.rst: id, parent, device, root, mount point.
    let mounts = guest.read("/proc/self/mountinfo")?;
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.get(4) == Some(&"/mnt/hung"));
    let hung = line.and_then(|fields| fields.get(2).map(|it| it.to_string()));
    hung.context("/mnt/hung is not mounted")
}

/// What the module says of the one with this device number, if it has it.
fn state_of(guest: &Guest, device: &str) -> Result<Option<String>> {
    let held = guest.held()?;
    Ok(held.into_iter().find(|it| it.0 == device).map(|it| it.1))
}

fn killed_in_a_hung_freeze(guest: &Guest) -> Result<()> {
    make(guest, &["grace_ms=300"])?;
    make_hung(guest)?;
    let hung = device_of_hung(guest)?;
    let state_of_hung = || state_of(guest, &hung);
    let pid = guest.fork()?;
    let daemon = Scripted::start_in(guest, Some(pid), Abi::V2)?;
    guest.sh(HANG)?;
    let tx = guest.vss().send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    for path in ["/mnt/a", "/mnt/b", "/mnt/hung"] {
        let mut call = freezing(asked.id, path);
        call.0.count = 4;
        let pending = daemon.device.start_ioctl(&freeze_ioctl(call))?;
        if path != "/mnt/hung" {
            daemon.device.finish_ioctl(pending, STEP)?;
        }
    }
    guest.wait_until("the third one hangs", STEP, || {
        Ok(state_of_hung()?.as_deref() == Some("freezing"))
    })?;
    // One that comes after it is not held up.
    let mut fourth = freezing(asked.id, "/mnt/c");
    fourth.0.count = 4;
    daemon.device.ioctl(&freeze_ioctl(fourth))?;
    Still::wait(guest, &[])?;

    let at = guest.signal_all(&[pid], 9)?;
    released(guest, "kill -9 in a hung freeze", at, RELEASED)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::FAIL)?;
    let left = guest.try_sh(&format!("test -e /proc/{pid}"))?;
    ensure!(left.status == Some(1), "the killed process should be gone");
    let called_off = vec![(hung.clone(), "called-off".to_owned())];
    equal("what is held", guest.held()?, called_off.clone())?;

    // The next one serves while it hangs, and can have all but that.
    let next = Scripted::start(guest, Abi::V2)?;
    next.serve(op::THAW, status::OK)?;
    freeze(guest, next)?;
    Still::wait(guest, &[])?.holds(guest, "in the next backup")?;
    thaw_but(guest, next, status::OK, called_off.clone())?;
    all_go_on(guest, "after the next backup")?;
    // For that it waits, until its own deadline.
    let mut again = freezing(0, "/mnt/hung");
    again.0.deadline_ms = 1000;
    let again = next.device.ioctl(&freeze_ioctl(again));
    refused("a freeze of the one that hangs", again, "EBUSY")?;
    next.device.close()?;

    // So can the one after it, on a device that has gone and come back.
    let vss = guest.vss();
    for by_host in [false, true] {
        if by_host {
            vss.rescind();
            vss.wait_released(STEP)?;
            let held = guest.held()?;
            equal("what is held without a device", held, called_off.clone())?;
            vss.offer();
        } else {
            super::lifecycle::unbind_rebind(guest)?;
        }
        vss.wait_open(STEP)?;
        vss.agree(STEP)?;
        let held = guest.held()?;
        equal("what is held on a new device", held, called_off.clone())
            .with_context(|| format!("taken back by the host: {by_host}"))?;
    }
    let pid = guest.fork()?;
    let next = Scripted::start_in(guest, Some(pid), Abi::V2)?;
    let freeze = next
        .device
        .start_ioctl(&freeze_ioctl(freezing(0, "/mnt/hung")))?;
    waits_for_its_turn(guest, pid)?;

    // It comes back, is thawed then, and is the next one's.
    guest.sh(UNHANG)?;
    next.device.finish_ioctl(freeze, STEP)?;
    let held = vec![(hung.clone(), "held".to_owned())];
    equal("what is held of it", guest.held()?, held)?;
    next.device.ioctl(&thaw_ioctl(0, None))?;
    equal("what is held at the end", guest.held()?, Vec::new())?;
    guest.not_frozen("when the disk was back", &["/mnt/hung"])?;
    good_backup(guest, next)?;
    guest.sh("touch /mnt/hung/file && sync")?;
    hold(next.device, 0, "/mnt/hung")?;
    next.device.ioctl(&thaw_ioctl(0, None))?;
    Ok(())
}

fn device_gone(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let vss = guest.vss();
    let name = vss.instance().to_string();
    for by_host in [false, true] {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, Abi::V2)?;
            freeze(guest, daemon)?;
            Still::wait(guest, &[])?;
            let at = guest.clock()?;
            if by_host {
                vss.rescind();
                vss.wait_released(STEP)?;
            } else {
                guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &name)?;
                vss.wait_closed(STEP)?;
            }
            // The descriptor is still open.
            released(guest, "the end of the device", at, RELEASED)?;
            refused("a read", daemon.device.read(64), "ENODEV")?;
            refused("a freeze", hold(daemon.device, 0, "/mnt/a"), "ENODEV")?;
            refused(
                "a thaw",
                daemon.device.ioctl(&thaw_ioctl(0, None)),
                "ENODEV",
            )?;
            daemon.device.close()?;
            if by_host {
                vss.offer();
            } else {
                guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &name)?;
            }
            vss.wait_open(STEP)?;
            vss.agree(STEP)?;
            let next = Scripted::start(guest, Abi::V2)?;
            // The host does not know that its freeze has ended, and is told once.
            thaw(guest, next, status::FAIL)?;
            good_backup(guest, next)?;
            Ok(next.device.close()?)
        };
        one().with_context(|| format!("taken back by the host: {by_host}"))?;
    }
    Ok(())
}

fn device_gone_in_a_hung_freeze(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    make_hung(guest)?;
    let hung = device_of_hung(guest)?;
    let called_off = vec![(hung.clone(), "called-off".to_owned())];
    let vss = guest.vss();
    let name = vss.instance().to_string();
    for by_host in [false, true] {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, Abi::V2)?;
            guest.sh(HANG)?;
            vss.send_freeze(&[])?;
            let asked = daemon.take(op::FREEZE)?;
            hold(daemon.device, asked.id, "/mnt/a")?;
            let freeze = freeze_ioctl(freezing(asked.id, "/mnt/hung"));
            let freeze = daemon.device.start_ioctl(&freeze)?;
            guest.wait_until("it hangs", STEP, || {
                Ok(state_of(guest, &hung)?.as_deref() == Some("freezing"))
            })?;
            let at = guest.clock()?;
            match by_host {
                true => vss.rescind(),
                false => guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &name)?,
            }
            let ended = daemon.device.finish_ioctl(freeze, RELEASED);
            refused("the freeze that hangs", ended, "ENODEV")?;
            released(guest, "the end of the device", at, RELEASED)?;
            equal("what is held", guest.held()?, called_off.clone())?;
            vss.wait_released(STEP)?;
            daemon.device.close()?;

            guest.sh(UNHANG)?;
            guest.wait_until("it is undone", STEP, || Ok(guest.held()?.is_empty()))?;
            guest.not_frozen("with its disk back", &["/mnt/hung", "/mnt/a"])?;
            match by_host {
                true => vss.offer(),
                false => guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &name)?,
            }
            vss.wait_open(STEP)?;
            vss.agree(STEP)?;
            let next = Scripted::start(guest, Abi::V2)?;
            next.serve(op::THAW, status::OK)?;
            good_backup(guest, next)?;
            Ok(next.device.close()?)
        };
        one().with_context(|| format!("taken back by the host: {by_host}"))?;
    }
    Ok(())
}

fn hibernated(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let vss = guest.vss();
    let daemon = Scripted::start(guest, Abi::V2)?;
    let asked = freeze(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    hibernate(guest)?;
    all_go_on(guest, "after the sleep")?;
    drop(still);
    equal("what is held", guest.held()?, Vec::new())?;
    is_told(daemon, asked.id, thawed::SLEEP)?;
    vss.agree(STEP)?;
    thaw(guest, daemon, status::FAIL)?;
    good_backup(guest, daemon)
}

fn deadline(guest: &Guest) -> Result<()> {
    let patience = |time| guest.host().patience(time);
    let [daemons, modules] = [1500, 2500].map(Duration::from_millis);
    make(guest, &[&limit("hold", patience(modules))])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    // That of the daemon, then that of the module, which is the limit for the daemon's, too.
    for (given, limit) in [
        (daemons, daemons),
        (Duration::ZERO, modules),
        (modules * 20, modules),
    ] {
        let (given, stretched) = (patience(given), patience(limit));
        let one = || -> Result<()> {
            let tx = guest.vss().send_freeze(&[])?;
            let asked = daemon.take(op::FREEZE)?;
            let began = guest.clock()?;
            for path in PATHS {
                let mut call = freezing(asked.id, path);
                call.0.deadline_ms = given.as_millis() as u32;
                daemon.device.ioctl(&freeze_ioctl(call))?;
            }
            daemon.answer(&asked, status::OK)?;
            answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
            // Which stretches it itself.
            released(guest, "the deadline", began, limit + RELEASED)?;
            let stalls = guest.stalls(began)?.stalls;
            // A write that is merely slow has not waited for a thaw.
            let frozen = |ended: &u64, began: u64| *ended > began + 250_000;
            let ended = stalls
                .iter()
                .filter_map(|it| it.ended_us.filter(|ended| frozen(ended, it.began_us)));
            let first = ended.min().context("nothing was frozen")?;
            ensure!(
                first >= began + stretched.as_millis() as u64 * 1000,
                "the first went on after {} ms, {stretched:?} were given",
                (first - began) / 1000
            );
            is_told(daemon, asked.id, thawed::DEADLINE)?;
            thaw(guest, daemon, status::FAIL)
        };
        one().with_context(|| format!("deadline {given:?}, hold_ms for {modules:?}"))?;
    }
    good_backup(guest, daemon)
}

fn deadline_after_thaw(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    let limit = guest.host().patience(Duration::from_secs(4));
    for read in [true, false] {
        let one = || -> Result<()> {
            let tx = guest.vss().send_freeze(&[])?;
            let frozen = daemon.take(op::FREEZE)?;
            for path in PATHS {
                let mut call = freezing(frozen.id, path);
                call.0.deadline_ms = limit.as_millis() as u32;
                daemon.device.ioctl(&freeze_ioctl(call))?;
            }
            daemon.answer(&frozen, status::OK)?;
            answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
            Still::wait(guest, &[])?;

            let tx = send_thaw(guest)?;
            let mut in_hand = None;
            if read {
                let asked = daemon.take(op::THAW)?;
                // ext4 writes its superblock in a thaw, which hangs, and the others are behind it.
                guest.sh("dmsetup suspend --noflush --nolockfs volume")?;
                let thaw = daemon
                    .device
                    .start_ioctl(&thaw_ioctl(frozen.id, Some(PATHS[0])))?;
                guest.wait_until("its thaw hangs", STEP, || {
                    let held = guest.held()?;
                    Ok(held.iter().any(|(_, state)| state == "thawing"))
                })?;
                in_hand = Some((asked, thaw));
            }
            let held = guest.held()?;
            let are_held = held.iter().filter(|(_, state)| state == "held").count();
            equal(
                "how many are held when the THAW was sent",
                are_held,
                PATHS.len() - usize::from(read),
            )?;
            guest.wait_until("the deadline has passed", STEP, || {
                let held = guest.held()?;
                Ok(!held.iter().any(|(_, state)| state == "held"))
            })?;
            let asked = match in_hand {
                Some((asked, thaw)) => {
                    guest.sh("dmsetup resume volume")?;
                    daemon.device.finish_ioctl(thaw, STEP)?;
                    asked
                }
                // What came first is read first.
                None => daemon.take(op::THAW)?,
            };
            is_told(daemon, frozen.id, thawed::DEADLINE)?;
            daemon.device.ioctl(&thaw_ioctl(frozen.id, None))?;
            daemon.answer(&asked, status::OK)?;
            answered("THAW", &guest.vss().wait(tx, STEP)?, status::OK)?;
            equal("what is held after THAW", guest.held()?, Vec::new())?;
            all_go_on(guest, "after THAW")
        };
        one().with_context(|| format!("the THAW was read: {read}"))?;
    }
    good_backup(guest, daemon)
}

fn stopped_at_thaw(guest: &Guest) -> Result<()> {
    const SIGSTOP: i32 = 19;
    const SIGCONT: i32 = 18;
    make(guest, &[])?;
    let limit = guest.host().patience(Duration::from_secs(3)).as_secs();
    let daemon = guest.start_daemon_with(&format!("deadline = {limit}"))?;
    super::wait_for_daemon(guest)?;
    let vss = guest.vss();
    for (when, in_time, told) in [
        ("before the deadline", true, status::OK),
        ("after the deadline", false, status::FAIL),
    ] {
        let one = || -> Result<()> {
            answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
            guest.signal(&daemon, SIGSTOP)?;
            let until_let_go =
                || guest.wait_until("all is let go", STEP, || Ok(guest.held()?.is_empty()));
            if !in_time {
                until_let_go()?;
            }
            let tx = send_thaw(guest)?;
            if in_time {
                equal("how many are held", guest.held()?.len(), PATHS.len() + 1)?;
                until_let_go()?;
            }
            guest.signal(&daemon, SIGCONT)?;
            answered("THAW", &vss.wait(tx, STEP)?, told)?;
            all_go_on(guest, "after THAW")
        };
        one().with_context(|| format!("THAW {when}"))?;
    }
    let said = super::logged_all(guest, &daemon, 2)?;
    equal(
        "how many backups the daemon calls good",
        said.matches("the backup is good").count(),
        1,
    )
    .with_context(|| said.clone())?;
    super::good_backup(guest)?;
    stop(guest, Module::Ours, &daemon)
}

/// A host's FREEZE that is read and for which all is held, but which is not answered.
fn freeze_unanswered(guest: &Guest, daemon: Scripted<'_>) -> Result<(hyperv_sim::Tx, Asked)> {
    let tx = guest.vss().send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    for path in PATHS {
        hold(daemon.device, asked.id, path)?;
    }
    Still::wait(guest, &[])?;
    Ok((tx, asked))
}

fn called_off(guest: &Guest) -> Result<()> {
    let timeout = guest.host().patience(Duration::from_secs(8));
    make(guest, &[&limit("freeze_timeout", timeout)])?;
    let vss = guest.vss();
    let daemon = Scripted::start(guest, Abi::V2)?;

    // Its time is over.
    let (tx, asked) = freeze_unanswered(guest, daemon)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    released(guest, "the end of its time", guest.clock()?, RELEASED)?;
    is_told(daemon, asked.id, thawed::CALLED_OFF)?;
    refused(
        "more for it",
        hold(daemon.device, asked.id, "/mnt/a"),
        "ESTALE",
    )?;
    daemon.serve(op::THAW, status::OK)?;
    good_backup(guest, daemon)?;

    // The host gives up on it.
    let (tx, asked) = freeze_unanswered(guest, daemon)?;
    let thaw_tx = send_thaw(guest)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    released(guest, "a THAW behind it", guest.clock()?, RELEASED)?;
    refused(
        "more for it",
        hold(daemon.device, asked.id, "/mnt/a"),
        "ESTALE",
    )?;
    is_told(daemon, asked.id, thawed::CALLED_OFF)?;
    daemon.serve(op::THAW, status::OK)?;
    answered("THAW", &vss.wait(thaw_tx, STEP)?, status::OK)?;
    good_backup(guest, daemon)?;

    // The daemon fails it.
    let (tx, asked) = freeze_unanswered(guest, daemon)?;
    daemon.answer(&asked, status::FAIL)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    released(guest, "its failure", guest.clock()?, RELEASED)?;
    daemon.has_nothing()?;
    thaw(guest, daemon, status::OK)?;
    good_backup(guest, daemon)
}

fn thaw_not_answered(guest: &Guest) -> Result<()> {
    let timeout = guest.host().patience(Duration::from_millis(2500));
    make(guest, &[&limit("timeout", timeout)])?;
    let vss = guest.vss();
    let daemon = Scripted::start(guest, Abi::V2)?;
    for what in ["not read", "read and not answered", "failed"] {
        let one = || -> Result<()> {
            let frozen = freeze(guest, daemon)?;
            Still::wait(guest, &[])?;
            let tx = send_thaw(guest)?;
            if what != "not read" {
                let asked = daemon.take(op::THAW)?;
                if what == "failed" {
                    daemon.answer(&asked, status::FAIL)?;
                }
            }
            answered("THAW", &vss.wait(tx, STEP)?, status::FAIL)?;
            released(guest, what, guest.clock()?, RELEASED)?;
            equal("what is held", guest.held()?, Vec::new())?;
            if what != "failed" {
                is_told(daemon, frozen.id, thawed::CALLED_OFF)?;
                // For a daemon that freezes by other means.
                daemon.serve(op::THAW, status::OK)?;
            }
            daemon.has_nothing()?;
            good_backup(guest, daemon)
        };
        one().with_context(|| what.to_owned())?;
    }
    Ok(())
}

fn one_by_one(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    // A rehearsal: for no request.
    for path in PATHS {
        hold(daemon.device, 0, path)?;
    }
    let still = Still::wait(guest, &[])?;
    let states: Vec<_> = guest.held()?.into_iter().map(|it| it.1).collect();
    equal(
        "the states in debugfs",
        states,
        vec!["held".to_owned(); PATHS.len()],
    )?;
    still.holds(guest, "in a rehearsal")?;
    for (number, path) in PATHS.iter().enumerate() {
        daemon.device.ioctl(&thaw_ioctl(0, Some(path)))?;
        let stuck = stuck_writers(guest)?;
        equal("frozen still", stuck.len(), PATHS.len() - number - 1)?;
        let again = daemon.device.ioctl(&thaw_ioctl(0, Some(path)));
        refused("a thaw of what is not held", again, "EINVAL")?;
        if number == 0 {
            // Its place is free again.
            hold(daemon.device, 0, path)?;
            Still::wait(guest, &[])?;
            daemon.device.ioctl(&thaw_ioctl(0, Some(path)))?;
        }
    }
    equal("what is held", guest.held()?, Vec::new())?;
    daemon
        .device
        .ioctl(&thaw_ioctl(0, None))
        .context("a thaw of nothing")?;

    // Between FREEZE and THAW: the rest stands still, and the host is told.
    let asked = freeze(guest, daemon)?;
    let mut rest = Still::wait(guest, &[])?;
    daemon.device.ioctl(&thaw_ioctl(asked.id, Some(PATHS[0])))?;
    rest.0.retain(|(path, _)| !path.starts_with(PATHS[0]));
    equal("how many are held", guest.held()?.len(), rest.0.len())?;
    rest.holds(guest, "with one of them thawed")?;
    thaw(guest, daemon, status::FAIL)?;
    all_go_on(guest, "after THAW")?;
    good_backup(guest, daemon)
}

fn late_thaw(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    let daemon = Scripted::start(guest, Abi::V2)?;
    let device = daemon.device;
    let before = freeze(guest, daemon)?;
    thaw(guest, daemon, status::OK)?;
    hold(device, 0, PATHS[0])?;
    device.ioctl(&thaw_ioctl(0, None))?;

    let (tx, asked) = freeze_unanswered(guest, daemon)?;
    let still = Still::wait(guest, &[])?;
    let come_too_late = |when: &str| -> Result<()> {
        for id in [0, before.id] {
            let of_all = device.ioctl(&thaw_ioctl(id, None));
            of_all.with_context(|| format!("{when}: a late thaw of all"))?;
            let of_one = device.ioctl(&thaw_ioctl(id, Some(PATHS[0])));
            refused(&format!("{when}: a late thaw"), of_one, "ESTALE")?;
        }
        equal(when, guest.held_for()?, vec![asked.id; PATHS.len()])?;
        still.holds(guest, when)
    };
    come_too_late("before the answer")?;
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    come_too_late("in the window")?;
    thaw(guest, daemon, status::OK)?;
    all_go_on(guest, "after THAW")?;

    // With its own id, and all of it.
    let (tx, asked) = freeze_unanswered(guest, daemon)?;
    device.ioctl(&thaw_ioctl(asked.id, None))?;
    all_go_on(guest, "before the answer")?;
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    thaw(guest, daemon, status::FAIL)?;
    good_backup(guest, daemon)
}

fn all_called_off(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    make_hung(guest)?;
    let vss = guest.vss();
    let daemon = Scripted::start(guest, Abi::V2)?;
    let device = daemon.device;
    for last in [Some("/mnt/hung"), None] {
        let one = || -> Result<()> {
            guest.sh(HANG)?;
            let tx = vss.send_freeze(&[])?;
            let asked = daemon.take(op::FREEZE)?;
            hold(device, asked.id, "/mnt/a")?;
            let freeze = device.start_ioctl(&freeze_ioctl(freezing(asked.id, "/mnt/hung")))?;
            guest.wait_until("it hangs in its freeze", STEP, || {
                Ok(guest.held()?.iter().any(|(_, state)| state == "freezing"))
            })?;
            device.ioctl(&thaw_ioctl(asked.id, Some("/mnt/a")))?;
            device.ioctl(&thaw_ioctl(asked.id, last))?;
            let freeze = device.finish_ioctl(freeze, STEP);
            refused("the freeze that is called off", freeze, "ESTALE")?;
            daemon.answer(&asked, status::OK)?;
            answered("FREEZE", &vss.wait(tx, STEP)?, status::OK)?;
            guest.sh(UNHANG)?;
            guest.wait_until("it is undone", STEP, || Ok(guest.held()?.is_empty()))?;
            thaw(guest, daemon, status::FAIL)
        };
        one().with_context(|| format!("the last thaw of {last:?}"))?;
    }
    good_backup(guest, daemon)
}

/// A freeze of `/mnt/hung` that is called off and hangs.
fn make_called_off(guest: &Guest, device: Device<'_>) -> Result<()> {
    guest.sh(HANG)?;
    // There is room for this one. What comes after it is not of its series, nor has its deadline.
    let mut call = freezing(0, "/mnt/hung");
    call.0.count = 1;
    let freeze = device.start_ioctl(&freeze_ioctl(call))?;
    guest.wait_until("it hangs in its freeze", STEP, || {
        Ok(guest.held()?.iter().any(|(_, state)| state == "freezing"))
    })?;
    device.ioctl(&thaw_ioctl(0, Some("/mnt/hung")))?;
    let freeze = device.finish_ioctl(freeze, STEP);
    refused("a freeze that is called off", freeze, "ESTALE")
}

fn refused_changes_nothing(guest: &Guest) -> Result<()> {
    make(guest, &[])?;
    make_hung(guest)?;
    let vss = guest.vss();
    let daemon = Scripted::start(guest, Abi::V2)?;
    let device = daemon.device;

    // What is held for nobody stays so.
    hold(device, 0, "/mnt/a")?;
    let tx = vss.send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    let second = hold(device, asked.id, "/mnt/a");
    refused("a second freeze", second, "EBUSY")?;
    let thaw_tx = send_thaw(guest)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    is_told(daemon, 0, thawed::CALLED_OFF)?;
    daemon.serve(op::THAW, status::OK)?;
    answered("THAW", &vss.wait(thaw_tx, STEP)?, status::OK)?;

    // The host's freeze is whole as long as nothing of it is thawed.
    make_called_off(guest, device)?;
    let tx = vss.send_freeze(&[])?;
    let asked = daemon.take(op::FREEZE)?;
    hold(device, asked.id, "/mnt/a")?;
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::OK)?;
    for (path, errno) in [("/mnt/b", "EINVAL"), ("/mnt/hung", "EBUSY")] {
        let thaw = device.ioctl(&thaw_ioctl(asked.id, Some(path)));
        refused(&format!("a thaw of {path}"), thaw, errno)?;
    }
    guest.sh(UNHANG)?;
    guest.wait_until("the one that hung is thawed", STEP, || {
        Ok(guest.held()?.len() == 1)
    })?;
    thaw(guest, daemon, status::OK)
}

/// A freeze that this process has asked for waits for the thaw of the same file system.
fn waits_for_its_turn(guest: &Guest, pid: i32) -> Result<()> {
    guest.wait_until("another freeze of it waits", STEP, || {
        let stacks = guest.sh(&format!("cat /proc/{pid}/task/*/stack"))?;
        Ok(stacks.contains("hv_vss_wait_killable"))
    })
}

fn waits_its_turn(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    make_hung(guest)?;
    let pid = guest.fork()?;
    let device = Scripted::start_in(guest, Some(pid), Abi::V2)?.device;
    make_called_off(guest, device)?;
    for path in [Some("/mnt/hung"), None] {
        let freeze = device.start_ioctl(&freeze_ioctl(freezing(0, "/mnt/hung")))?;
        waits_for_its_turn(guest, pid)?;
        let thaw = device.ioctl(&thaw_ioctl(0, path));
        match path {
            Some(_) => refused("a thaw of it", thaw, "EBUSY")?,
            None => thaw.context("a thaw of all")?,
        }
        let freeze = device.finish_ioctl(freeze, STEP);
        refused("the freeze that waited", freeze, "ESTALE")?;
    }
    guest.sh(UNHANG)?;
    guest.wait_until("nothing is held", STEP, || Ok(guest.held()?.is_empty()))?;
    guest.not_frozen("when the disk was back", &["/mnt/hung"])?;
    hold(device, 0, "/mnt/hung")?;
    Ok(device.ioctl(&thaw_ioctl(0, None))?)
}

/// Has the call go by a descriptor that is open as a path only.
fn by_path_only(call: &mut Ioctl) {
    if let Some(put) = &mut call.put {
        if let Descriptor::Path(path) = &put.what {
            put.what = Descriptor::PathOnly(path.clone());
        }
    }
}

fn errors(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&[
        "(device ram5)",
        "EXT4-fs (ram5)",
        "Aborting journal on device ram5-8",
    ])?;
    make(guest, &[])?;
    guest.writers_stop()?;
    guest.sh(
        "mkdir -p /mnt/ro /mnt/bad /mnt/bind /mnt/tmp && mount -t tmpfs t /mnt/tmp
         mkfs.ext4 -q -F /dev/ram4 && mount -o ro /dev/ram4 /mnt/ro
         mkfs.ext4 -q -F /dev/ram5 && mount -o errors=remount-ro /dev/ram5 /mnt/bad &&
             echo x >/sys/fs/ext4/ram5/trigger_fs_error
         mount --bind /mnt/a /mnt/bind",
    )?;

    // Who has not registered as v2 cannot hold anything.
    let device = guest.open_device(Blocking::Yes)?;
    refused(
        "a freeze before the registration",
        hold(device, 0, "/mnt/a"),
        "EPROTO",
    )?;
    refused(
        "a thaw before it",
        device.ioctl(&thaw_ioctl(0, None)),
        "EPROTO",
    )?;
    device.close()?;
    let v1 = Scripted::start(guest, Abi::V1)?;
    refused("a freeze as v1", hold(v1.device, 0, "/mnt/a"), "EPROTO")?;
    v1.device.close()?;

    let daemon = Scripted::start(guest, Abi::V2)?;
    let device = daemon.device;
    let change = |errno: &str, what: &str, spoil: fn(&mut Ioctl)| -> Result<()> {
        let mut call = freeze_ioctl(freezing(0, "/mnt/a"));
        spoil(&mut call);
        refused(what, device.ioctl(&call), errno)?;
        equal("what is held after it", guest.held()?, Vec::new())
    };
    change("EBADF", "a freeze of descriptor -1", |it| {
        let argument = IocFreeze {
            fd: -1,
            count: 3,
            ..IocFreeze::default()
        };
        *it = freeze_ioctl((argument, None));
    })?;
    change("EBADF", "a freeze of a descriptor that is not open", |it| {
        let argument = IocFreeze {
            fd: 900,
            count: 3,
            ..IocFreeze::default()
        };
        *it = freeze_ioctl((argument, None));
    })?;
    change("EOPNOTSUPP", "a freeze of tmpfs", |it| {
        if let Some(put) = &mut it.put {
            put.what = Descriptor::Path("/mnt/tmp".into());
        }
    })?;
    change("EROFS", "a freeze that its file system refuses", |it| {
        if let Some(put) = &mut it.put {
            put.what = Descriptor::Path("/mnt/bad".into());
        }
    })?;
    change("EPERM", "a freeze without CAP_SYS_ADMIN", |it| {
        it.unprivileged = true
    })?;
    change("EPERM", "a freeze by O_PATH without CAP_SYS_ADMIN", |it| {
        by_path_only(it);
        it.unprivileged = true;
    })?;
    change("ENOTTY", "another ioctl", |it| it.request += 7)?;
    type Spoilt = (&'static str, fn(&mut IocFreeze));
    let invalid: [Spoilt; 4] = [
        ("with flags", |it| it.flags = 1),
        ("with the reserved field set", |it| it.reserved = 1),
        ("for a count of 0", |it| it.count = 0),
        ("for a count beyond max_held", |it| it.count = 1 << 20),
    ];
    for (what, spoil) in invalid {
        let (mut argument, put) = freezing(0, "/mnt/a");
        spoil(&mut argument);
        let result = device.ioctl(&freeze_ioctl((argument, put)));
        refused(&format!("a freeze {what}"), result, "EINVAL")?;
    }
    change("ESTALE", "a freeze for a request that never was", |it| {
        *it = freeze_ioctl(freezing(1 << 40, "/mnt/a"));
    })?;

    // A path will do, though nothing can be read from it or written to it.
    let mut freeze = freeze_ioctl(freezing(0, "/mnt/a"));
    by_path_only(&mut freeze);
    device.ioctl(&freeze).context("a freeze by O_PATH")?;
    equal("how many are held", guest.held()?.len(), 1)?;
    let mut thaw_it = thaw_ioctl(0, Some("/mnt/a"));
    by_path_only(&mut thaw_it);
    device.ioctl(&thaw_it).context("a thaw by O_PATH")?;
    equal("what is held after that", guest.held()?, Vec::new())?;

    // What is read-only can be frozen; what is frozen cannot be again, by whichever mount.
    hold(device, 0, "/mnt/ro")?;
    hold(device, 0, "/mnt/a")?;
    refused("a second freeze", hold(device, 0, "/mnt/a"), "EBUSY")?;
    refused(
        "a freeze by another mount",
        hold(device, 0, "/mnt/bind"),
        "EBUSY",
    )?;
    hold(device, 0, "/mnt/b")?;
    refused("more than were named", hold(device, 0, "/mnt/c"), "ENOSPC")?;
    let mut flags = thaw_ioctl(0, Some("/mnt/a"));
    let argument = IocThaw {
        flags: 1,
        ..IocThaw::default()
    };
    flags.argument = argument.as_bytes().to_vec();
    refused("a thaw with flags", device.ioctl(&flags), "EINVAL")?;
    refused(
        "a thaw of another",
        device.ioctl(&thaw_ioctl(0, Some("/mnt/c"))),
        "EINVAL",
    )?;
    device.ioctl(&thaw_ioctl(0, Some("/mnt/bind")))?;
    device.ioctl(&thaw_ioctl(0, None))?;
    equal("what is held after all", guest.held()?, Vec::new())?;

    // A request that was not read, one that was, and one that has ended.
    let tx = guest.vss().send_freeze(&[])?;
    daemon.is_offered()?;
    let asked = daemon.take(op::FREEZE)?;
    refused(
        "for the next one",
        hold(device, asked.id + 1, "/mnt/a"),
        "ESTALE",
    )?;
    hold(device, asked.id, "/mnt/a")?;
    daemon.answer(&asked, status::OK)?;
    answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::OK)?;
    refused(
        "after its answer",
        hold(device, asked.id, "/mnt/b"),
        "ESTALE",
    )?;
    thaw(guest, daemon, status::OK)
}
