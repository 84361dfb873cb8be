// SPDX-License-Identifier: GPL-2.0-only

//! The window before the machine sleeps: from the moment when it says that it will (`PM_*_PREPARE`) a
//! FREEZE would have file systems stand still in a machine that has no clock running.
//!
//! The way there leads through a sync. A disk that hangs keeps the machine in it for as long as the
//! case wants, with all of user space still running. There is no swap, so that the machine leaves the
//! bus, finds no place for its image, and comes back.

use super::deadman::{
    backup_in_trouble, make_hung, make_hung_disk, make_writers, remove_hung, HANG, UNHANG,
};
use super::dialogue::{Abi, Scripted};
use super::suspend::{self, unloads};
use super::{
    is_frozen, limit, load, owned, rounds_or, seed, start, stuck_writers, wait_for_daemon,
    wait_out, Case, ModuleState,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, refused};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hv_vss_uapi::{op, thawed};
use hyperv_sim::ic::status;
use std::time::Duration;

pub const CASES: &[Case] = &[
    suspend::case(
        "sleep/freeze-in-the-window",
        "a FREEZE that comes while the machine goes to sleep is failed at once",
        freeze_in_the_window,
    ),
    suspend::case(
        "sleep/freeze-that-ran-out",
        "a daemon that still works on a FREEZE whose time ran out is told to thaw before the sleep",
        freeze_that_ran_out,
    ),
    suspend::case(
        "sleep/freeze-open",
        "so is one that works on a FREEZE; the sleep waits for it, the host does not",
        freeze_open,
    ),
    suspend::case(
        "sleep/daemon-opens-anew",
        "one that has closed the device is waited for: the one that opens it next is told to thaw",
        |guest| {
            // One that has next to no time for it is waited for, too.
            [5_000, 0].into_iter().try_for_each(|grace_ms| daemon_opens_anew(guest, grace_ms, 0))
        },
    ),
    suspend::case(
        "sleep/daemon-opens-late",
        "it is waited for as long as the grace time says, though that is longer than what a thaw is given",
        |guest| {
            let grace_ms = guest.host().patience(Duration::from_secs(10)).as_millis() as u64;
            daemon_opens_anew(guest, grace_ms, grace_ms * 7 / 10)
        },
    ),
    suspend::case(
        "sleep/signal-in-the-wait",
        "a signal to who sends the machine to sleep does not end the wait for a thaw",
        signal_in_the_wait,
    ),
    suspend::case(
        "sleep/device-bound-anew",
        "what a daemon has left frozen is thawed before the sleep, though the device was bound anew since",
        device_bound_anew,
    ),
    suspend::case(
        "sleep/daemon-of-mainline",
        "mainline's daemon, which closes before it thaws, is waited for until it has",
        daemon_of_mainline,
    ),
    suspend::case(
        "sleep/snapshot-device",
        "so it is for whoever has the snapshot device open, to write an image or to become one",
        snapshot_device,
    ),
    suspend::case(
        "sleep/thaw-that-hangs",
        "a thaw of the module's own that hangs is waited for, also when its device is gone, but not for ever",
        thaw_that_hangs,
    ),
    suspend::case(
        "sleep/backups-all-the-time",
        "backups one after the other while the machine sleeps: none is called good that was not",
        backups_all_the_time,
    )
    .long(),
];

/// In which the host is told what it is told at once.
const AT_ONCE: Duration = Duration::from_millis(1500);

/// A machine that is on its way to sleep.
struct Window {
    process: Process,
    unloads: usize,
    openings: u64,
}

impl Window {
    /// Sends the machine to sleep.
    fn begin(guest: &Guest) -> Result<Window> {
        Self::prepare(guest)?;
        Self::send(guest)
    }

    /// Makes the disk in whose sync it stays.
    fn prepare(guest: &Guest) -> Result<()> {
        make_hung_disk(guest, "/dev/ram6", 32)?;
        guest
            .sh(&format!(
                "mkfs.ext4 -q -F /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung && sync
                 dd if=/dev/zero of=/mnt/hung/dirty bs=64k count=1 2>/dev/null
                 {HANG}
                 echo shutdown > /sys/power/disk"
            ))
            .map(drop)
    }

    /// Sends it to sleep then, by a process that lives through SIGUSR1.
    fn send(guest: &Guest) -> Result<Window> {
        let (unloads, openings) = (unloads(guest), guest.vss().openings());
        let sleep = "trap : USR1; echo disk > /sys/power/state";
        let process = guest.spawn(&["sh", "-c", sleep])?;
        Ok(Window {
            process,
            unloads,
            openings,
        })
    }

    /// Waits until all who want to be told were told of it.
    fn wait(&self, guest: &Guest) -> Result<()> {
        guest.wait_until("the machine syncs before it sleeps", STEP, || {
            let stack = self.stack(guest)?;
            Ok(stack.contains("pm_sleep_fs_sync") || stack.contains("ksys_sync"))
        })
    }

    /// It tells those who want to be told, and goes on doing so.
    fn is_told(&self, guest: &Guest) -> Result<()> {
        guest.wait_until("the machine waits for a thaw", STEP, || {
            Ok(self.stack(guest)?.contains("notifier_call_chain"))
        })?;
        Ok(())
    }

    /// It is still telling them.
    fn is_still_told(&self, guest: &Guest) -> Result<()> {
        let stack = self.stack(guest)?;
        ensure!(
            stack.contains("notifier_call_chain"),
            "the machine has gone on before the thaw:\n{stack}"
        );
        Ok(())
    }

    /// Where in the kernel it is on the way to sleep.
    fn stack(&self, guest: &Guest) -> Result<String> {
        Ok(guest.read(&format!("/proc/{}/stack", self.process.pid))?)
    }

    /// Lets the machine sleep, and waits until it is back.
    fn end(self, guest: &Guest) -> Result<()> {
        guest.sh(UNHANG)?;
        guest.wait(&self.process, STEP * 2)?;
        equal(
            "how often it has left the bus",
            unloads(guest),
            self.unloads + 1,
        )?;
        guest.vss().wait_openings(self.openings + 1, STEP)?;
        guest.vss().agree(STEP)?;
        remove_hung(guest)
    }
}

/// User space makes its own image through `/dev/snapshot`: who opens it to read is about to hibernate, who
/// opens it to write is about to become the machine of an image. All of user space runs meanwhile. Both end what is
/// frozen; only the former has a sure end, until which nothing more is.
fn snapshot_device(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    let vss = guest.vss();
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    guest.writer_start("/writer")?;
    for (way, held_too) in [("<", false), (">", false), ("<", true), (">", true)] {
        let one = || -> Result<()> {
            if held_too {
                answered("FREEZE before it", &vss.freeze(&[], STEP)?, status::OK)?;
            }
            let script = format!("exec 3{way}/dev/snapshot && echo held && exec sleep 1000");
            let holder = guest.spawn(&["sh", "-c", &script])?;
            guest.wait_until("the snapshot device is held", STEP, || {
                ensure!(!guest.has_ended(&holder)?, "it cannot be opened");
                Ok(guest.output(&holder)?.contains("held"))
            })?;
            if held_too {
                let thaw = vss.thaw(STEP)?;
                answered("THAW of what was frozen before it", &thaw, status::FAIL)?;
            }
            if way == ">" {
                super::backup(guest)?;
            } else {
                let freeze = vss.freeze(&[], STEP)?;
                answered("FREEZE with it open", &freeze, status::FAIL)?;
                is_said(guest)?;
            }
            if way == "<" && !held_too {
                idles(guest, &daemon, STEP)?;
                // One that comes only now has not heard of it.
                super::lifecycle::unbind_rebind(guest)?;
                wait_for_daemon(guest)?;
                let freeze = vss.freeze(&[], STEP)?;
                answered(
                    "FREEZE of a device that was bound anew",
                    &freeze,
                    status::FAIL,
                )?;
                // The end of another sleep is not that of the one that is prepared.
                suspend_in_vain(guest)?;
                let freeze = vss.freeze(&[], STEP)?;
                answered("FREEZE after a suspend meanwhile", &freeze, status::FAIL)?;
            }
            guest.signal(&holder, 9)?;
            guest.wait(&holder, STEP)?;
            super::backup(guest)
        };
        one().with_context(|| format!("exec 3{way}/dev/snapshot, frozen before it: {held_too}"))?;
    }
    Ok(())
}

/// Why a FREEZE was refused is in the log, and in debugfs for how long.
fn is_said(guest: &Guest) -> Result<()> {
    let log = guest.log(4)?;
    let why = "failed a request (operation 5) at once: the machine is about to sleep";
    ensure!(
        log.iter().any(|line| line.text.contains(why)),
        "the log does not say why"
    );
    let state = ModuleState::of(guest)?;
    equal(
        "what debugfs says",
        state.words("next_freeze")?,
        vec!["sleep"],
    )
}

/// A suspend that is given up, since a process cannot be put to sleep: it reads from a disk that hangs.
fn suspend_in_vain(guest: &Guest) -> Result<()> {
    guest.expect_in_log(&["Freezing user space processes failed"])?;
    make_hung_disk(guest, "/dev/ram6", 32)?;
    guest.sh(&format!("{HANG}; echo 500 > /sys/power/pm_freeze_timeout"))?;
    let reader = guest.spawn(&["dd", "if=/dev/mapper/hung", "of=/dev/null", "count=1"])?;
    guest.wait_until("it waits for the disk", STEP, || {
        let status = guest.read(&format!("/proc/{}/status", reader.pid))?;
        Ok(status.contains("State:\tD"))
    })?;
    let suspend = guest.try_sh("echo freeze > /sys/power/state")?;
    ensure!(suspend.status == Some(1), "it should fail: {suspend:?}");
    guest.sh(UNHANG)?;
    guest.wait(&reader, STEP)?;
    guest.sh("dmsetup remove hung").map(drop)
}

/// The daemon has nothing to do, and does nothing, by then at the latest.
pub(super) fn idles(guest: &Guest, daemon: &Process, by: Duration) -> Result<()> {
    // Fields of Documentation/filesystems/proc.rst, of which the second one ends with the last bracket: utime
    // and stime are the 14th and the 15th, in hundredths of a second.
    let used = || -> Result<u64> {
        let stat = guest.read(&format!("/proc/{}/stat", daemon.pid))?;
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let times = fields.split_whitespace().skip(11).take(2);
        let times: Vec<u64> = times.map(str::parse).collect::<Result<_, _>>()?;
        Ok(times.iter().sum())
    };
    // What it has to do for a backup that may come it does after the first request.
    guest.wait_until("the daemon idles for a second", by, || {
        let (before, until) = (used()?, guest.clock()? + 1_000_000);
        guest.wait_until("a second has passed", STEP, || Ok(guest.clock()? > until))?;
        Ok(used()? - before < 20)
    })
}

/// FREEZE is failed at once, and the daemon hears nothing of it.
fn freeze_fails(guest: &Guest, daemon: Scripted<'_>) -> Result<()> {
    let tx = guest.vss().send_freeze(&[])?;
    let reply = guest.vss().wait(tx, AT_ONCE * 2)?;
    answered("FREEZE in the window", &reply, status::FAIL)?;
    ensure!(
        reply.latency < guest.host().patience(AT_ONCE),
        "FREEZE in the window was failed after {:?}",
        reply.latency
    );
    daemon.has_nothing()
}

fn freeze_in_the_window(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            daemon.good_backup(guest)?;
            // Nothing is frozen, and nothing is asked.
            let window = Window::begin(guest)?;
            window.wait(guest)?;
            for _ in 0..2 {
                freeze_fails(guest, daemon)?;
            }
            window.end(guest)?;
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

/// Nothing is left to do after the sleep, and all is as before.
fn after_the_sleep(guest: &Guest, daemon: Scripted<'_>) -> Result<()> {
    daemon.has_nothing()?;
    daemon.good_backup(guest)
}

fn freeze_that_ran_out(guest: &Guest) -> Result<()> {
    // Enough for the backups that are to be good.
    let timeout = guest.host().patience(Duration::from_secs(4));
    load(guest, Module::Ours, &[&limit("freeze_timeout", timeout)])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let tx = guest.vss().send_freeze(&[])?;
            let freezing = daemon.take(op::FREEZE)?;
            answered("FREEZE", &guest.vss().wait(tx, STEP)?, status::FAIL)?;
            // For all that is known the daemon freezes one file system after the other.
            let window = Window::begin(guest)?;
            daemon.serve(op::THAW, status::OK)?;
            window.wait(guest)?;
            let late = daemon.answer(&freezing, status::OK);
            refused("the late answer to FREEZE", late, "ESTALE")?;
            freeze_fails(guest, daemon)?;
            window.end(guest)?;
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

fn freeze_open(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let tx = guest.vss().send_freeze(&[])?;
            let freezing = daemon.take(op::FREEZE)?;
            let window = Window::begin(guest)?;
            let reply = guest.vss().wait(tx, STEP)?;
            answered("the FREEZE that was open", &reply, status::FAIL)?;
            let late = daemon.answer(&freezing, status::OK);
            refused("the late answer to FREEZE", late, "ESTALE")?;
            // The machine waits for the daemon; another FREEZE does not.
            let thawing = daemon.take(op::THAW)?;
            freeze_fails(guest, daemon)?;
            daemon.answer(&thawing, status::OK)?;
            window.wait(guest)?;
            freeze_fails(guest, daemon)?;
            window.end(guest)?;
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

/// With a daemon that opens the device `pause_ms` after it has closed it.
fn daemon_opens_anew(guest: &Guest, grace_ms: u64, pause_ms: u64) -> Result<()> {
    load(guest, Module::Ours, &[&format!("grace_ms={grace_ms}")])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let tx = guest.vss().send_freeze(&[])?;
            let freezing = daemon.take(op::FREEZE)?;
            let window = Window::begin(guest)?;
            let reply = guest.vss().wait(tx, STEP)?;
            answered("the FREEZE that was open", &reply, status::FAIL)?;
            let late = daemon.answer(&freezing, status::OK);
            refused("the late answer to FREEZE", late, "ESTALE")?;
            daemon.device.close()?;
            if pause_ms > 0 {
                wait_out(guest, Duration::from_millis(pause_ms))?;
            }
            let daemon = Scripted::start(guest, abi)?;
            let thawing = daemon.take(op::THAW)?;
            window.is_still_told(guest)?;
            daemon.answer(&thawing, status::OK)?;
            window.wait(guest)?;
            freeze_fails(guest, daemon)?;
            window.end(guest)?;
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}, a grace time of {grace_ms} ms"))?;
    }
    guest.unload(Module::Ours)?;
    guest.vss().wait_closed(STEP)?;
    Ok(())
}

fn signal_in_the_wait(guest: &Guest) -> Result<()> {
    const SIGUSR1: i32 = 10;
    // So that time does not end it.
    load(guest, Module::Ours, &["grace_ms=60000"])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            let tx = guest.vss().send_freeze(&[])?;
            daemon.take(op::FREEZE)?;
            let window = Window::begin(guest)?;
            let reply = guest.vss().wait(tx, STEP)?;
            answered("the FREEZE that was open", &reply, status::FAIL)?;
            let thawing = daemon.take(op::THAW)?;
            window.is_told(guest)?;
            guest.signal(&window.process, SIGUSR1)?;
            wait_out(guest, Duration::from_secs(1))?;
            window.is_still_told(guest)?;
            daemon.answer(&thawing, status::OK)?;
            window.wait(guest)?;
            window.end(guest)?;
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

fn device_bound_anew(guest: &Guest) -> Result<()> {
    load(guest, Module::Ours, &[])?;
    for abi in Abi::BOTH {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, abi)?;
            daemon.freeze(guest, status::OK)?;
            daemon.device.close()?;
            super::lifecycle::unbind_rebind(guest)?;
            let next = Scripted::start(guest, abi)?;
            let window = Window::begin(guest)?;
            let thawing = next.take(op::THAW)?;
            window.is_told(guest)?;
            next.answer(&thawing, status::OK)?;
            window.wait(guest)?;
            window.end(guest)?;
            // The host does not know yet.
            next.thaw(guest, status::FAIL)?;
            after_the_sleep(guest, next)?;
            Ok(next.device.close()?)
        };
        one().with_context(|| format!("{abi:?}"))?;
    }
    Ok(())
}

/// ext4 writes its superblock in a thaw, and its disk hangs by then.
fn thaw_that_hangs(guest: &Guest) -> Result<()> {
    // `THAW_MS` of the module, in microseconds.
    const LIMIT: u64 = 5_000_000;
    load(guest, Module::Ours, &[])?;
    guest.sh("modprobe dm-mod; mkdir -p /mnt/a
         dmsetup create volume --noudevsync --table '0 131072 linear /dev/ram1 0'
         [ -e /dev/mapper/volume ] || dmsetup mknodes
         mkfs.ext4 -q -F /dev/mapper/volume && mount /dev/mapper/volume /mnt/a")?;
    let vss = guest.vss();
    let name = vss.instance().to_string();
    let states =
        || -> Result<Vec<String>> { Ok(guest.held()?.into_iter().map(|it| it.1).collect()) };
    for (device_stays, comes_back) in [(true, true), (false, true), (true, false)] {
        let one = || -> Result<()> {
            let daemon = Scripted::start(guest, Abi::V2)?;
            Window::prepare(guest)?;
            owned::hold(daemon.device, 0, "/mnt/a")?;
            guest.sh("dmsetup suspend --noflush --nolockfs volume")?;
            if !device_stays {
                guest.write("/sys/bus/vmbus/drivers/hv_vss/unbind", &name)?;
                vss.wait_closed(STEP)?;
                daemon.device.close()?;
            }
            let sent = guest.clock()?;
            let mut window = Window::send(guest)?;
            window.is_told(guest)?;
            if comes_back {
                wait_out(guest, Duration::from_millis(500))?;
                window.is_still_told(guest)?;
                guest.sh("dmsetup resume volume")?;
            }
            window.wait(guest)?;
            let waited = guest.clock()? - sent;
            ensure!(
                comes_back || waited >= LIMIT,
                "the machine has waited for {} ms",
                waited / 1000
            );
            if !device_stays {
                guest.write("/sys/bus/vmbus/drivers/hv_vss/bind", &name)?;
                vss.wait_open(STEP)?;
                vss.agree(STEP)?;
                window.openings += 1;
            }
            let left = if comes_back {
                None
            } else {
                Some("thawing".to_owned())
            };
            equal(
                "what is held when it syncs",
                states()?,
                Vec::from_iter(left),
            )?;
            if !comes_back {
                guest.sh("dmsetup resume volume")?;
                guest.wait_until("nothing is held", STEP, || Ok(states()?.is_empty()))?;
            }
            window.end(guest)?;
            guest.not_frozen("after the sleep", &["/mnt/a"])?;
            let daemon = match device_stays {
                true => {
                    owned::is_told(daemon, 0, thawed::SLEEP)?;
                    daemon
                }
                false => Scripted::start(guest, Abi::V2)?,
            };
            after_the_sleep(guest, daemon)?;
            Ok(daemon.device.close()?)
        };
        one().with_context(|| {
            format!("its device stays: {device_stays}, its disk comes back: {comes_back}")
        })?;
    }
    Ok(())
}

/// A disk that hangs keeps the daemon in the middle of its FREEZE until the machine is about to sleep. When that
/// has told all who want to be told it syncs and freezes the processes, the daemon among them.
fn daemon_of_mainline(guest: &Guest) -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    make_writers(guest)?;
    make_hung(guest)?;
    start(guest, Module::Ours, Daemon::Debian)?;
    super::backup(guest)?;
    guest.sh(&format!(
        "grep -q tracefs /proc/mounts || mount -t tracefs tracefs {TRACING}
         echo > {TRACING}/trace; echo 1 > {TRACING}/events/hv_vss/enable
         for sync in pm_sleep_fs_sync ksys_sync_helper; do
             echo p:sleep/syncs $sync > {TRACING}/kprobe_events 2>/dev/null && break
         done
         echo 1 > {TRACING}/events/sleep/enable || exit 1
         echo shutdown > /sys/power/disk
         {HANG}"
    ))?;
    let vss = guest.vss();
    let (unloads_before, openings) = (unloads(guest), vss.openings());
    let tx = vss.send_freeze(&[])?;
    guest.wait_until("the first file systems are frozen", STEP, || {
        let writers = guest.writers()?;
        Ok(writers.iter().any(|it| is_frozen(guest, it)))
    })?;
    let process = guest.spawn(&["sh", "-c", "echo disk > /sys/power/state"])?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    guest.sh(UNHANG)?;
    guest.wait(&process, STEP * 2)?;
    equal(
        "how often it has left the bus",
        unloads(guest),
        unloads_before + 1,
    )?;
    vss.wait_openings(openings + 1, STEP)?;
    let trace = guest.read(&format!("{TRACING}/trace"))?;
    guest.sh(&format!(
        "echo 0 > {TRACING}/events/enable; echo > {TRACING}/kprobe_events; umount {TRACING}"
    ))?;
    let first = |words: &[&str]| {
        let of_it = |line: &str| words.iter().all(|word| line.contains(word));
        let place = trace.lines().position(of_it);
        place.with_context(|| format!("no {words:?} in:\n{trace}"))
    };
    ensure!(
        first(&["hv_vss_answer", "operation=THAW"])? < first(&["syncs"])?,
        "the machine went on before the daemon had thawed:\n{trace}"
    );
    vss.agree(STEP)?;
    equal("stuck after it", stuck_writers(guest)?, Vec::new())?;
    wait_for_daemon(guest)?;
    super::backup(guest)?;
    guest.writers_stop()?;
    remove_hung(guest)
}

fn backups_all_the_time(guest: &Guest) -> Result<()> {
    make_writers(guest)?;
    start(guest, Module::Ours, Daemon::Ours)?;
    let vss = guest.vss();
    let mut random = fastrand::Rng::with_seed(seed());
    let (mut good, mut refused, mut broken) = (0, 0, 0);
    for round in 1..=rounds_or(3) {
        let (unloads_before, openings) = (unloads(guest), vss.openings());
        // At a random moment of a series of backups the machine goes to sleep: in the same series, however long
        // one takes there.
        let span = guest.host().patience(Duration::from_millis(1500));
        let delay = span.mul_f64(random.f64());
        let sleeper = || -> Result<Process> {
            std::thread::sleep(delay);
            let sleep = "echo shutdown > /sys/power/disk; echo disk > /sys/power/state";
            guest.spawn(&["sh", "-c", sleep])
        };
        let mut backups = || -> Result<()> {
            // Until it has left the bus: what is asked later waits until it is back.
            while unloads(guest) == unloads_before && vss.is_open() {
                let told = match backup_in_trouble(guest, || {
                    std::thread::sleep(Duration::from_millis(50));
                }) {
                    Ok(told) => told,
                    // The channel has gone in the middle; nothing was called good.
                    Err(error) if closed_in_between(&error) => break,
                    Err(error) => return Err(error),
                };
                match told {
                    told if told.is_good() => good += 1,
                    told if told.was_frozen() => broken += 1,
                    _ => {
                        refused += 1;
                        // A guest that is asked without a pause does not get to sleep.
                        std::thread::sleep(Duration::from_millis(200));
                    }
                }
            }
            Ok(())
        };
        let what = format!("sleep number {round}");
        let process = std::thread::scope(|scope| {
            let sleeper = scope.spawn(sleeper);
            let result = backups();
            let process = sleeper.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
            result.and(process)
        });
        let process = process.with_context(|| what.clone())?;
        guest.wait(&process, STEP * 4)?;
        vss.wait_openings(openings + 1, STEP)?;
        vss.agree(STEP)?;
        equal(&what, stuck_writers(guest)?, Vec::new())?;
        wait_for_daemon(guest)?;
        super::backup(guest).with_context(|| what)?;
    }
    println!(
        "     good {good}, FREEZE failed {refused}, THAW failed {broken}, seed {}",
        seed()
    );
    ensure!(good > 0, "no backup was good before the machine slept");
    Ok(())
}

/// Whether a backup could not be carried out since the channel was closed meanwhile.
fn closed_in_between(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<hyperv_sim::HostError>();
    matches!(cause, Some(hyperv_sim::HostError::NotOpen { .. }))
}
