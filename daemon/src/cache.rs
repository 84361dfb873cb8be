// SPDX-License-Identifier: GPL-2.0-only

//! The plan for the next backup, kept as long as it holds, and the way from it to descriptors.
//!
//! The one room that owns "has anything changed": what the [`Watch`] says, and what an open shows
//! that the watch did not. Whoever asks gets everything that is to be frozen, open, with the name and
//! the reason of whatever is not. It freezes nothing.

use std::fmt;
use std::os::fd::OwnedFd;

use crate::config::Config;
use crate::machine::{LookError, Machine, Ways};
use crate::mounts::DevId;
use crate::open::{open_file_system, OpenError};
use crate::plan::{plan, FileSystem, Plan};
use crate::watch::Watch;

/// How often the machine is looked at anew when it changed between reading and opening.
const ATTEMPTS: usize = 5;

/// Why what is to be frozen cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// What is mounted could not be found out.
    #[error(transparent)]
    Look(#[from] LookError),
    /// A file system could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A file system that is to be frozen, open.
#[derive(Debug)]
pub struct Opened {
    /// Its superblock.
    pub dev: DevId,
    /// For people.
    pub name: String,
    /// Its wave in the plan, from 0.
    pub wave: usize,
    /// Anything on it.
    pub fd: OwnedFd,
}

/// One that an operator should know is not frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is left out: {}", self.name, self.reason)
    }
}

/// Everything that a backup needs to have open.
#[derive(Debug, Default)]
pub struct Gathered {
    /// What is to be frozen, by wave.
    pub targets: Vec<Opened>,
    /// What is on a disk here and is not frozen all the same, for the log.
    pub missing: Vec<Missing>,
}

/// Makes the plan for the machine as it is.
pub fn make_plan(config: &Config) -> Result<(Machine, Plan), LookError> {
    let machine = Machine::look()?;
    let plan = plan_of(&machine, config);
    Ok((machine, plan))
}

fn plan_of(machine: &Machine, config: &Config) -> Plan {
    plan(&machine.mounts, &machine.topology, &|f| config.excludes(f))
}

/// A plan, and what would show that it no longer holds.
#[derive(Debug, Default)]
pub struct Cache {
    plan: Option<(Vec<Vec<FileSystem>>, Watch)>,
}

impl Cache {
    /// Makes a plan, unless the one that is there still holds. Nothing comes of it where a later
    /// change would go unnoticed; then each [`Cache::gather`] makes its own.
    pub fn prepare(&mut self, config: &Config) {
        if self.ways().is_some() {
            return;
        }
        self.plan = Watch::look().and_then(|(mut watch, machine)| {
            let Plan { waves, left_out } = plan_of(&machine, config);
            watch
                .mind(&machine.ways, &left_out)
                .then_some((waves, watch))
        });
    }

    /// Opens everything that is to be frozen, as planned before or anew.
    pub fn gather(&mut self, config: &Config) -> Result<Gathered, GatherError> {
        if let Some((waves, ways)) = self.ways() {
            // A mount that was moved is in its table as before, but not where it was.
            if let Ok(gathered) = open_all(&ways, waves, config.strict) {
                return Ok(gathered);
            }
        }
        let mut attempt = 1;
        loop {
            let (machine, plan) = make_plan(config)?;
            match open_all(&machine.ways, &plan.waves, config.strict) {
                Ok(gathered) => return Ok(gathered),
                // Something was unmounted meanwhile, most likely.
                Err(_) if attempt < ATTEMPTS => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The way to what is planned, if the plan still holds.
    fn ways(&self) -> Option<(&[Vec<FileSystem>], Ways)> {
        let (waves, watch) = self.plan.as_ref()?;
        Some((waves, watch.unchanged()?))
    }
}

fn open_all(ways: &Ways, waves: &[Vec<FileSystem>], strict: bool) -> Result<Gathered, OpenError> {
    let mut gathered = Gathered::default();
    for (wave, members) in waves.iter().enumerate() {
        for file_system in members {
            let name = file_system.to_string();
            match open_file_system(ways, file_system) {
                Ok(fd) => gathered.targets.push(Opened {
                    dev: file_system.dev,
                    name,
                    wave,
                    fd,
                }),
                Err(error) if error.is_broken() && !strict => gathered.missing.push(Missing {
                    reason: format!("out of order: {error}"),
                    name,
                }),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(gathered)
}
