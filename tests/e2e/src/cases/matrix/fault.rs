// SPDX-License-Identifier: GPL-2.0-only

//! What goes wrong at a stage: how it begins, how it ends again as it would anywhere (a service manager
//! starts the daemon, the disk comes back), and until when writers may stand still because of it.

use super::dialogue::{Dialogue, Message};
use super::stage::{Hold, Stage};
use super::{start_writers, Lab, Stack, FILES};
use crate::cases::deadman::{all_of_ours, guard_of, strike, Death, GROUP, HANG, RELEASED, UNHANG};
use crate::cases::disks::{load_driver, Attached};
use anyhow::{ensure, Context, Result};
use e2e::guest::{Guest, Module, Process, STEP};
use hyperv_sim::storage::Image;
use std::time::Duration;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    DaemonKilled,
    GuardKilled,
    BothKilled,
    Terminated,
    Stopped,
    OutOfMemory,
    Unbound,
    Rescinded,
    Hibernated,
    DiskHung,
    DiskGone,
    DiskAdded,
    ThawLost,
    ThawLate,
    ThawTwice,
    FreezeTwice,
    ShutDown,
    Panic,
}

/// What is under way because of it, until [`Fault::end`].
#[derive(Default)]
pub struct UnderWay {
    /// A program in the guest that does it.
    process: Option<Process>,
    disk: Option<Attached>,
    released: bool,
}

/// From the first freeze to the thaw at the latest, where nobody says THAW.
pub const DEADLINE: Duration = Duration::from_secs(4);

impl Fault {
    /// As the table has them.
    pub const ALL: [Fault; 18] = [
        Fault::DaemonKilled,
        Fault::Terminated,
        Fault::Stopped,
        Fault::OutOfMemory,
        Fault::Unbound,
        Fault::Rescinded,
        Fault::Hibernated,
        Fault::DiskHung,
        Fault::DiskGone,
        Fault::DiskAdded,
        Fault::ThawLost,
        Fault::ThawLate,
        Fault::ThawTwice,
        Fault::FreezeTwice,
        Fault::ShutDown,
        Fault::Panic,
        Fault::GuardKilled,
        Fault::BothKilled,
    ];

    /// In words, for the table.
    pub fn words(self) -> &'static str {
        match self {
            Fault::DaemonKilled => "daemon killed",
            Fault::GuardKilled => "guard killed",
            Fault::BothKilled => "daemon and guard killed",
            Fault::Terminated => "daemon asked to end (SIGTERM)",
            Fault::Stopped => "daemon stopped (SIGSTOP)",
            Fault::OutOfMemory => "out of memory",
            Fault::Unbound => "device unbound",
            Fault::Rescinded => "device rescinded",
            Fault::Hibernated => "hibernation",
            Fault::DiskHung => "one disk hangs",
            Fault::DiskGone => "one disk is gone",
            Fault::DiskAdded => "second LUN added",
            Fault::ThawLost => "THAW lost",
            Fault::ThawLate => "THAW late",
            Fault::ThawTwice => "THAW twice",
            Fault::FreezeTwice => "FREEZE twice",
            Fault::ShutDown => "shutdown, asked for by the host",
            Fault::Panic => "panic",
        }
    }

    /// Whether there is such a fault at that stage: a THAW that was said cannot get lost.
    pub fn is_of(self, stage: Stage) -> bool {
        let lost = matches!(self, Fault::ThawLost | Fault::ThawLate);
        !(lost && stage.is_thaw())
    }

    /// The only one that has what this is about: our module needs no guard, the peer has none.
    pub fn only_of(self) -> Option<Stack> {
        let guard = matches!(self, Fault::GuardKilled | Fault::BothKilled);
        guard.then_some(Stack::OursOnStock)
    }

    /// How long after it writers may stand still at most, if there is no THAW.
    pub fn way_out(self) -> Duration {
        match self {
            Fault::DaemonKilled
            | Fault::Terminated
            | Fault::Unbound
            | Fault::Rescinded
            | Fault::GuardKilled => RELEASED,
            // The kernel tries to do without a death first.
            Fault::OutOfMemory => RELEASED * 2,
            // By the next start, which takes a while.
            Fault::BothKilled => STEP,
            Fault::Stopped
            | Fault::ThawLost
            | Fault::ThawLate
            | Fault::FreezeTwice
            | Fault::ThawTwice => DEADLINE + RELEASED * 2,
            // Until the guest has found it, the daemon is held where it was.
            Fault::DiskAdded => STEP,
            Fault::Hibernated | Fault::DiskHung | Fault::DiskGone => STEP,
            Fault::ShutDown | Fault::Panic => STEP,
        }
    }

    /// Whether the machine does not outlive it.
    pub fn ends_machine(self) -> bool {
        matches!(self, Fault::ShutDown | Fault::Panic)
    }

    /// Whether it is of one disk alone, and costs nobody a backup.
    pub fn is_one_disk(self) -> bool {
        matches!(self, Fault::DiskHung | Fault::DiskGone | Fault::DiskAdded)
    }

    /// Whether the host says THAW at all.
    pub fn host_says_thaw(self) -> bool {
        self != Fault::ThawLost
    }

    /// Lets it happen to a daemon that is held, and lets that go on.
    pub fn begin(
        self,
        lab: &Lab<'_>,
        dialogue: &mut Dialogue<'_>,
        hold: &Hold,
    ) -> Result<UnderWay> {
        let (guest, daemon) = (lab.guest, &lab.daemon);
        let mut under_way = UnderWay::default();
        match self {
            Fault::DaemonKilled if lab.stack == Stack::Ours => {
                strike(guest, &all_of_ours(guest, daemon)?, Death::All)?;
            }
            Fault::DaemonKilled => {
                strike(guest, &[daemon.pid], Death::Daemon)?;
            }
            Fault::GuardKilled => {
                strike(guest, &[guard_of(guest, daemon)?], Death::Guard)?;
            }
            Fault::BothKilled => {
                let victims = [guard_of(guest, daemon)?, daemon.pid];
                strike(guest, &victims, Death::Both)?;
            }
            Fault::OutOfMemory => {
                under_way.process = Some(use_up_memory(guest)?);
            }
            Fault::Terminated => guest.signal(daemon, 15)?,
            Fault::Stopped => guest.signal(daemon, 19)?,
            Fault::Unbound => {
                let line = format!("echo {} >{}/unbind", guest.vss().instance(), lab.driver());
                let process = guest.spawn(&["sh", "-c", &line])?;
                if lab.stack == Stack::Ours {
                    // Whatever the daemon is at.
                    guest.vss().wait_closed(STEP)?;
                }
                under_way.process = Some(process);
            }
            Fault::Rescinded => {
                guest.vss().rescind();
                if lab.stack == Stack::Ours {
                    guest.vss().wait_released(STEP)?;
                }
            }
            Fault::Hibernated => {
                // There is no swap: it leaves the bus, finds no place for its image, and comes back.
                let line = "echo shutdown >/sys/power/disk; echo disk >/sys/power/state";
                let unloads = crate::cases::suspend::unloads(guest);
                let process = guest.spawn(&["sh", "-c", line])?;
                if matches!(hold, Hold::Disk) {
                    // It syncs first, and waits for that disk.
                    hold.release(guest)?;
                    under_way.released = true;
                }
                guest.wait(&process, STEP * 2)?;
                let left = crate::cases::suspend::unloads(guest) - unloads;
                ensure!(left <= 1, "it left the bus {left} times");
                if left == 1 {
                    guest.vss().wait_open(STEP)?;
                    guest.vss().agree(STEP)?;
                }
            }
            Fault::DiskHung => {
                if !matches!(hold, Hold::Disk) {
                    guest.sh(HANG)?;
                }
            }
            Fault::DiskGone => {
                let load = "dmsetup load hung --table '0 131072 error'";
                match hold {
                    Hold::Disk => guest.sh(load)?,
                    _ => guest.sh(&format!("{HANG} && {load} && {UNHANG}"))?,
                };
            }
            Fault::DiskAdded => {
                let disk = Attached::new(guest, 0, 1, 8, Image::default())?;
                disk.node(guest)?;
                under_way.disk = Some(disk);
            }
            Fault::ThawLost | Fault::ThawLate => {}
            Fault::ThawTwice => {
                dialogue.ask(Message::Thaw)?;
            }
            Fault::FreezeTwice => {
                dialogue.ask(Message::Freeze)?;
            }
            Fault::ShutDown => guest.host().shutdown().power_off(STEP)?,
            Fault::Panic => {
                // The agent hardly comes to say that it has begun.
                let line = "echo c >/proc/sysrq-trigger";
                let begun = guest.spawn(&["sh", "-c", line]);
                ensure!(
                    begun.is_ok() || guest.vm().exit().is_some(),
                    "the guest does not panic: {begun:?}"
                );
            }
        }
        // A daemon that is stopped stays where it is, a disk that hangs does so, a machine ends as it is.
        let stays = match self {
            Fault::Stopped | Fault::ShutDown | Fault::Panic => true,
            Fault::DiskHung => matches!(hold, Hold::Disk),
            _ => under_way.released,
        };
        if !stays {
            hold.release(guest)?;
            under_way.released = true;
        }
        if let Some(process) = under_way.process.take() {
            // The stock module waits with the end of an unbind for whoever has the device open.
            guest.wait(&process, STEP)?;
        }
        Ok(under_way)
    }

    /// Ends what still goes on of it, as it ends anywhere: afterwards a daemon serves the device, on the
    /// disks that there are.
    pub fn end(self, lab: &mut Lab<'_>, hold: &Hold, under_way: UnderWay) -> Result<()> {
        let guest = lab.guest;
        if self == Fault::DiskHung && !matches!(hold, Hold::Disk) {
            guest.sh(UNHANG)?;
        }
        if !under_way.released {
            hold.release(guest)?;
        }
        match self {
            Fault::DaemonKilled | Fault::BothKilled | Fault::OutOfMemory | Fault::Terminated => {
                guest.wait(&lab.daemon, STEP)?;
                lab.start_daemon()?;
            }
            Fault::Stopped => guest.signal(&lab.daemon, 18)?,
            Fault::Unbound => {
                let line = format!("echo {} >{}/bind", guest.vss().instance(), lab.driver());
                guest.sh(&line)?;
                lab.come_back()?;
            }
            Fault::Rescinded => {
                guest.vss().wait_released(STEP)?;
                guest.vss().offer();
                lab.come_back()?;
            }
            Fault::DiskAdded => {
                let disk = under_way.disk.context("no disk was added")?;
                disk.detach(guest)?;
            }
            Fault::DiskGone => {
                // Nothing more is to be seen of the writer there.
                guest.writers_stop()?;
                let others = FILES.into_iter().filter(|it| !self.blocks(it));
                start_writers(guest, others)?;
                lab.restart_if_dead()?;
            }
            Fault::GuardKilled
            | Fault::Hibernated
            | Fault::DiskHung
            | Fault::ThawLost
            | Fault::ThawLate
            | Fault::ThawTwice
            | Fault::FreezeTwice => lab.restart_if_dead()?,
            // Nobody is left.
            Fault::ShutDown | Fault::Panic => {}
        }
        Ok(())
    }

    /// Takes away what [`prepare`] has put.
    pub fn clean_up(self, guest: &Guest) -> Result<()> {
        if self == Fault::OutOfMemory {
            guest.wait_until("the group is empty", STEP, || {
                Ok(guest.try_sh(&format!("rmdir {GROUP}"))?.status == Some(0))
            })?;
            guest.sh("umount /sys/fs/cgroup; cat /run/printk >/proc/sys/kernel/printk")?;
        }
        Ok(())
    }

    /// Whether the writer on this file is held up by something else than a freeze.
    pub fn blocks(self, path: &str) -> bool {
        matches!(self, Fault::DiskHung | Fault::DiskGone) && path.starts_with("/mnt/hung/")
    }
}

/// Leaves the daemon no memory, and returns once the OOM killer has taken it. Whoever does that waits until
/// the dead have gone, and a tracer keeps them until it ends.
fn use_up_memory(guest: &Guest) -> Result<Process> {
    let kills = || -> Result<u64> {
        let events = guest.read(&format!("{GROUP}/memory.events"))?;
        let mut lines = events.lines();
        let kills = lines.find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("no oom_kill")?.parse()?)
    };
    let before = kills()?;
    let line = format!("echo 0 >{GROUP}/memory.max");
    let process = guest.spawn(&["sh", "-c", &line])?;
    guest.wait_until("the OOM killer has taken one", STEP, || {
        Ok(kills()? > before)
    })?;
    Ok(process)
}

/// Puts what has to be there for this fault.
pub fn prepare(guest: &Guest, fault: Fault, module: Module) -> Result<()> {
    match fault {
        Fault::OutOfMemory => {
            // Whoever writes its long report to the console takes the processor from all others.
            guest.sh(&format!(
                "mount -t cgroup2 none /sys/fs/cgroup
                 echo +memory >/sys/fs/cgroup/cgroup.subtree_control && mkdir {GROUP}
                 cat /proc/sys/kernel/printk >/run/printk && echo 1 >/proc/sys/kernel/printk"
            ))?;
        }
        Fault::DiskAdded => {
            load_driver(guest)?;
        }
        Fault::DiskGone => {
            guest.expect_in_log(&["dm-0", "(dm-", "for dm-", "device dm-"])?;
        }
        Fault::Hibernated if module == Module::Stock => {
            guest.expect_in_log(&crate::cases::suspend::SLEPT_FROZEN)?;
        }
        _ => {}
    }
    Ok(())
}
