// SPDX-License-Identifier: GPL-2.0-only

//! What is compared, and how a running guest changes from one to the next.
//!
//! Both modules stay loaded; the VSS device is moved between their drivers through sysfs, so that
//! nothing else in the guest changes from one turn to the next. Does not know what is measured.

use anyhow::{ensure, Context, Result};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use serde::Serialize;

/// A kernel module with its daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stack {
    /// `hv_vss.ko` and `hv_vss_daemon` of this project.
    Ours,
    /// The stock `hv_utils` and our daemon, which has a guard there.
    Guarded,
    /// The stock `hv_utils` and Debian's `hv_vss_daemon`.
    Peer,
}

impl Stack {
    /// The name of the VMBus driver in sysfs.
    fn driver(self) -> &'static str {
        match self {
            Stack::Ours => "hv_vss",
            Stack::Guarded | Stack::Peer => "hv_utils",
        }
    }

    /// Whose daemon it is.
    pub fn daemon(self) -> Daemon {
        match self {
            Stack::Ours | Stack::Guarded => Daemon::Ours,
            Stack::Peer => Daemon::Debian,
        }
    }
}

impl std::fmt::Display for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Stack::Ours => "ours",
            Stack::Guarded => "guarded",
            Stack::Peer => "peer",
        })
    }
}

/// A guest with both modules loaded, one of which has the device.
pub struct Rig<'a> {
    guest: &'a Guest,
    /// Whose driver has the device.
    bound: Stack,
    daemon: Option<Process>,
}

impl<'a> Rig<'a> {
    /// Loads both modules. The stock one comes first and takes the device.
    pub fn new(guest: &'a Guest) -> Result<Self> {
        guest.load(Module::Stock, &[])?;
        guest.vss().wait_open(STEP)?;
        guest.load(Module::Ours, &[])?;
        Ok(Rig {
            guest,
            bound: Stack::Peer,
            daemon: None,
        })
    }

    /// The guest.
    pub fn guest(&self) -> &'a Guest {
        self.guest
    }

    /// Gives the device to `stack`, and starts its daemon. When this returns a request was served.
    pub fn switch(&mut self, stack: Stack) -> Result<()> {
        self.stop_daemon()?;
        if stack.driver() != self.bound.driver() {
            self.bind(stack)?;
        }
        let vss = self.guest.vss();
        vss.agree_once(STEP)?;
        self.daemon = Some(self.guest.start_daemon(stack.daemon())?);
        self.guest.wait_until(
            "HOT_BACKUP is answered 0: the daemon is there",
            STEP,
            || Ok(vss.hot_backup(STEP)?.status() == status::OK),
        )
    }

    fn bind(&mut self, stack: Stack) -> Result<()> {
        let vss = self.guest.vss();
        let device = vss.instance().to_string();
        let bus = "/sys/bus/vmbus";
        let from = self.bound.driver();
        self.guest.write(
            &format!("{bus}/devices/{device}/driver_override"),
            stack.driver(),
        )?;
        self.guest
            .write(&format!("{bus}/drivers/{from}/unbind"), &device)?;
        vss.wait_closed(STEP)?;
        self.guest.write(&format!("{bus}/drivers_probe"), &device)?;
        vss.wait_open(STEP)?;
        let link = format!("{bus}/devices/{device}/driver");
        let driver = self.guest.sh(&format!("basename $(readlink {link})"))?;
        ensure!(
            driver.trim() == stack.driver(),
            "the device should have gone to {}, it is with {driver}",
            stack.driver()
        );
        self.bound = stack;
        Ok(())
    }

    fn stop_daemon(&mut self) -> Result<()> {
        let Some(daemon) = self.daemon.take() else {
            return Ok(());
        };
        self.guest.signal(&daemon, 15)?;
        self.guest.wait(&daemon, STEP)?;
        // Ours has a guard, which ends a moment later.
        self.guest
            .wait_until("no process of a daemon is left", STEP, || {
                Ok(self.daemon_pids()?.is_empty())
            })
    }

    /// What the daemon that runs has written so far.
    pub fn daemon_log(&self) -> Result<String> {
        match &self.daemon {
            Some(daemon) => Ok(self.guest.output(daemon)?),
            None => Ok(String::new()),
        }
    }

    /// The processes of the daemon that runs, its helpers included.
    pub fn daemon_pids(&self) -> Result<Vec<i32>> {
        // pidof ends with 1 when there is none.
        let pids = self.guest.try_sh("pidof hv_vss_daemon")?.out;
        pids.split_whitespace()
            .map(|pid| pid.parse().with_context(|| format!("{pid:?} is no pid")))
            .collect()
    }
}
