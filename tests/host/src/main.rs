// SPDX-License-Identifier: GPL-2.0-only

//! `hyperv-sim`: the simulated Hyper-V host for people.
//!
//! `probe` says whether this machine can run it; `run` boots a guest, shows its console, and backs
//! it up or does what is typed.

use clap::{Parser, Subcommand};
use hyperv_sim::ic::vss::{vss_flags, Op, Vss, SHORT_BODY, VERSIONS};
use hyperv_sim::ic::{Version, FRAMEWORKS};
use hyperv_sim::{probe, Exit, HostError, Reply, Vm, VmConfig, VmError};
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A simulated Hyper-V host: boots a stock Linux kernel and is the other end of its VMBus.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Says what this machine's /dev/kvm lacks to play Hyper-V, if anything; exit status 0 if nothing.
    Probe,
    /// Boots a guest and shows its console.
    Run(Run),
}

#[derive(clap::Args)]
struct Run {
    /// The kernel, a bzImage.
    #[arg(long)]
    kernel: PathBuf,
    /// An archive of the initial RAM file system; several are concatenated.
    #[arg(long)]
    initrd: Vec<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u32,
    /// VSS versions to offer.
    #[arg(long, value_delimiter = ',', value_parser = version, default_values_t = VERSIONS)]
    versions: Vec<Version>,
    /// Backs the guest up once (HOT_BACKUP, FREEZE, THAW), powers it off and leaves. The exit
    /// status says whether the guest agreed to all of it.
    #[arg(long)]
    backup: bool,
    /// Prints the events at the end, one JSON object a line.
    #[arg(long)]
    json: bool,
    /// Seconds that the guest gets for each step, the boot included.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
}

fn version(text: &str) -> Result<Version, String> {
    let parts = text.split_once('.').ok_or("as in 5.0")?;
    let number = |part: &str| part.parse::<u16>().map_err(|error| error.to_string());
    Ok(Version::new(number(parts.0)?, number(parts.1)?))
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("cannot read the standard input")]
    Input(#[source] io::Error),
    #[error("cannot write the events")]
    Json(#[from] serde_json::Error),
    #[error("{what}: the guest answered {status:#x}")]
    Status { what: Op, status: u32 },
    #[error("the guest ended by itself: {0:?}")]
    Ended(Exit),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Probe => return probe_kvm(),
        Command::Run(run) => run.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("hyperv-sim: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprint!(": {cause}");
                source = cause.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn probe_kvm() -> ExitCode {
    let missing = probe::missing();
    if missing.is_empty() {
        println!("/dev/kvm can play Hyper-V");
        return ExitCode::SUCCESS;
    }
    for what in missing {
        println!("{what}");
    }
    ExitCode::FAILURE
}

impl Run {
    fn run(self) -> Result<(), Error> {
        let mut config = VmConfig::new(&self.kernel);
        config.initrd.clone_from(&self.initrd);
        config.cmdline.clone_from(&self.cmdline);
        config.cpus = self.cpus;
        config.memory_mib = self.memory;
        config.console_to_stdout = true;
        let vm = Vm::start(config)?;
        let result = if self.backup {
            self.backup(&vm)
        } else {
            self.interact(&vm)
        };
        if self.json {
            for event in vm.host().events() {
                println!("{}", serde_json::to_string(&event)?);
            }
        }
        result
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    fn negotiate(&self, vss: &Vss) -> Result<(), HostError> {
        vss.wait_open(self.timeout())?;
        let chosen = vss.negotiate(&FRAMEWORKS, &self.versions, self.timeout())?;
        println!(
            "host: the guest speaks framework {} and VSS {}",
            chosen.framework, chosen.message
        );
        Ok(())
    }

    fn backup(&self, vm: &Vm) -> Result<(), Error> {
        let vss = vm.host().vss();
        self.negotiate(&vss)?;
        agreed(Op::HOT_BACKUP, &vss.hot_backup(self.timeout())?)?;
        let frozen = vss.freeze(&[], self.timeout())?;
        show(Op::FREEZE, &frozen);
        // Also after a failed FREEZE: nothing must stay frozen.
        let thawed = vss.thaw(self.timeout())?;
        agreed(Op::THAW, &thawed)?;
        if frozen.status() != 0 {
            let what = Op::FREEZE;
            let status = frozen.status();
            return Err(Error::Status { what, status });
        }
        vm.host().shutdown().power_off(self.timeout())?;
        match vm.wait_exit(self.timeout())? {
            Exit::PowerOff => Ok(()),
            other => Err(Error::Ended(other)),
        }
    }

    fn interact(&self, vm: &Vm) -> Result<(), Error> {
        println!("host: {HELP}");
        for line in io::stdin().lock().lines() {
            let line = line.map_err(Error::Input)?;
            if let Some(exit) = vm.exit() {
                return Err(Error::Ended(exit));
            }
            match self.command(vm, line.trim()) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => println!("host: {error}"),
            }
            let _ = io::stdout().flush();
        }
        Ok(())
    }

    /// Does one line of input; false ends the session.
    fn command(&self, vm: &Vm, line: &str) -> Result<bool, Error> {
        let host = vm.host();
        let vss = host.vss();
        let timeout = self.timeout();
        match line {
            "" => {}
            "negotiate" => self.negotiate(&vss)?,
            "freeze" => show(Op::FREEZE, &vss.freeze(&[], timeout)?),
            "thaw" => show(Op::THAW, &vss.thaw(timeout)?),
            "hot-backup" => show(Op::HOT_BACKUP, &vss.hot_backup(timeout)?),
            "dm-info" => show(Op::GET_DM_INFO, &vss.get_dm_info(timeout)?),
            "heartbeat" => {
                let (number, latency) = host.heartbeat().beat(1, timeout)?;
                println!("host: the guest answered {number} after {latency:?}");
            }
            "rescind" => vss.rescind(),
            "offer" => vss.offer(),
            "events" => host.events().iter().for_each(|event| println!("{event}")),
            "power-off" => {
                host.shutdown().power_off(timeout)?;
                println!("host: the guest ended: {:?}", vm.wait_exit(timeout)?);
                return Ok(false);
            }
            "quit" => return Ok(false),
            other => match other.strip_prefix("op ").map(str::parse) {
                Some(Ok(number)) => {
                    let op = Op(number);
                    show(op, &vss.op(op, &SHORT_BODY, timeout)?);
                }
                _ => println!("host: {HELP}"),
            },
        }
        Ok(true)
    }
}

const HELP: &str = "commands: negotiate, freeze, thaw, hot-backup, dm-info, op NUMBER, heartbeat, \
                    rescind, offer, events, power-off, quit";

fn show(op: Op, reply: &Reply) {
    let flags = vss_flags(reply).unwrap_or_default();
    println!(
        "host: {op}: status {:#x}, flags {flags} after {:?}",
        reply.status(),
        reply.latency
    );
}

/// Shows an answer; one that is not a success is an error.
fn agreed(op: Op, reply: &Reply) -> Result<(), Error> {
    show(op, reply);
    match reply.status() {
        0 => Ok(()),
        status => Err(Error::Status { what: op, status }),
    }
}
