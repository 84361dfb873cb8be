// SPDX-License-Identifier: GPL-2.0-only

//! `hyperv-sim`: the simulated Hyper-V host for people.
//!
//! `probe` says whether this machine can run it; `run` boots a guest, shows its console, and backs
//! it up or does what is typed.

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use hyperv_sim::ic::vss::{message, vss_flags, Op, Vss, SHORT_BODY};
use hyperv_sim::ic::{message_type, status, Envelope, Version, FRAMEWORKS};
use hyperv_sim::storage::Disk;
use hyperv_sim::{probe, Exit, Guid, HostError, Profile, Reply, Vm, VmConfig, VmError};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

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
    /// A file that is a disk of the guest, on one SCSI controller in the order in which they are given.
    /// The guest writes to it.
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// The kind of host to be.
    #[arg(long, value_name = "KIND", default_value = Profile::CURRENT.name,
          value_parser = PossibleValuesParser::new(Profile::ALL.map(|it| it.name)))]
    host: String,
    /// VSS versions to offer instead of those of that kind of host.
    #[arg(long, value_delimiter = ',', value_parser = version)]
    versions: Vec<Version>,
    /// Backs the guest up once (HOT_BACKUP until the guest is ready, FREEZE, THAW), powers it off and
    /// leaves. The exit status says whether the guest agreed to all of it. Without this, commands
    /// are read from the standard input.
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
    #[error("cannot use {} as a disk", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("cannot read the standard input")]
    Input(#[source] io::Error),
    #[error("cannot write to the guest's ttyS1")]
    Agent(#[source] io::Error),
    #[error("{0:?} is no number of the kind that is wanted here")]
    Number(String),
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
        config.host.scsi_controllers = u8::from(!self.disk.is_empty());
        let known = Profile::ALL.into_iter().find(|it| it.name == self.host);
        config.host.profile = known.unwrap_or_default();
        let vm = Vm::start(config)?;
        self.attach_disks(&vm)?;
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

    /// The guest has yet to load its kernel, so it finds them all.
    fn attach_disks(&self, vm: &Vm) -> Result<(), Error> {
        let Some(controller) = vm.host().scsi(0) else {
            return Ok(());
        };
        for (path, lun) in self.disk.iter().zip(0..=u8::MAX) {
            let failed = |source| Error::Disk {
                path: path.clone(),
                source,
            };
            let file = File::options().read(true).write(true).open(path);
            let id = Guid::new(0x6469_736b, 0, 0, [0, 0, 0, 0, 0, 0, 0, lun]);
            let disk = Disk::in_file(id, file.map_err(failed)?).map_err(failed)?;
            controller.attach(lun, &disk);
        }
        Ok(())
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    fn negotiate(&self, vss: &Vss) -> Result<(), HostError> {
        vss.wait_open(self.timeout())?;
        let chosen = match self.versions.as_slice() {
            [] => vss.agree(self.timeout())?,
            versions => vss.negotiate(&FRAMEWORKS, versions, self.timeout())?,
        };
        println!(
            "host: the guest speaks framework {} and VSS {}",
            chosen.framework, chosen.message
        );
        Ok(())
    }

    fn backup(&self, vm: &Vm) -> Result<(), Error> {
        let vss = vm.host().vss();
        self.negotiate(&vss)?;
        // The guest's daemon may still be on its way: a host asks again.
        let start = Instant::now();
        loop {
            let ready = vss.hot_backup(self.timeout())?;
            if ready.status() == status::OK || start.elapsed() > self.timeout() {
                agreed(Op::HOT_BACKUP, &ready)?;
                break;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let frozen = vss.freeze(&[], self.timeout())?;
        show(Op::FREEZE, &frozen);
        // Also after a failed FREEZE: nothing must stay frozen.
        let thawed = vss.thaw(self.timeout())?;
        agreed(Op::THAW, &thawed)?;
        if frozen.status() != status::OK {
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

    /// Does what the standard input says until that or the guest ends.
    fn interact(&self, vm: &Vm) -> Result<(), Error> {
        let lines_from_guest = vm.agent_port()?;
        std::thread::spawn(move || {
            for line in BufReader::new(lines_from_guest)
                .lines()
                .map_while(Result::ok)
            {
                println!("ttyS1: {line}");
            }
        });
        println!("{HELP}");
        for line in io::stdin().lock().lines() {
            let line = line.map_err(Error::Input)?;
            if let Some(exit) = vm.exit() {
                return Err(Error::Ended(exit));
            }
            println!("host> {line}");
            match self.command(vm, line.trim()) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => println!("host: {error}"),
            }
        }
        Ok(())
    }

    /// Does one line of input; false ends the session.
    fn command(&self, vm: &Vm, line: &str) -> Result<bool, Error> {
        let host = vm.host();
        let vss = host.vss();
        let timeout = self.timeout();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "" => {}
            "open" => vss.wait_open(timeout)?,
            "closed" => vss.wait_closed(timeout)?,
            "released" => vss.wait_released(timeout)?,
            "negotiate" => self.negotiate(&vss)?,
            "freeze" => show(Op::FREEZE, &vss.freeze(&[], timeout)?),
            "thaw" => show(Op::THAW, &vss.thaw(timeout)?),
            "pair" => {
                let freeze = vss.send_freeze(&[])?;
                let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
                show(Op::FREEZE, &vss.wait(freeze, timeout)?);
                show(Op::THAW, &vss.wait(thaw, timeout)?);
            }
            "hot-backup" => show(Op::HOT_BACKUP, &vss.hot_backup(timeout)?),
            "dm-info" => show(Op::GET_DM_INFO, &vss.get_dm_info(timeout)?),
            "op" => {
                let mut words = rest.split_whitespace();
                let op = Op(number(words.next())?);
                let size: usize = words.next().map_or(Ok(32), |word| number(Some(word)))?;
                let body = vec![0; size.saturating_sub(8)];
                show(op, &vss.op(op, &body, timeout)?);
            }
            "cut" => {
                let mut bytes = thaw_packet();
                bytes.resize(number(Some(rest))?, 0);
                let tx = vss.send_raw(&bytes)?;
                show(Op::THAW, &vss.wait(tx, Duration::from_secs(5))?);
            }
            "heartbeat" => {
                let (number, latency) = host.heartbeat().beat(1, timeout)?;
                println!("host: the guest answered {number} after {latency:?}");
            }
            "rescind" => vss.rescind(),
            "cycle" => {
                let openings = vss.openings();
                vss.rescind();
                vss.wait_released(timeout)?;
                vss.offer();
                vss.wait_openings(openings + 1, timeout)?;
            }
            "offer" => vss.offer(),
            "events" => host.events().iter().for_each(|event| println!("{event}")),
            "guest" => {
                let mut port: UnixStream = vm.agent_port()?;
                writeln!(port, "{rest}").map_err(Error::Agent)?;
            }
            "sleep" => std::thread::sleep(Duration::from_secs(number(Some(rest))?)),
            "repeat" => {
                let (count, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                for _ in 0..number(Some(count))? {
                    self.command(vm, rest)?;
                }
            }
            "power-off" => {
                host.shutdown().power_off(timeout)?;
                println!("host: the guest ended: {:?}", vm.wait_exit(timeout)?);
                return Ok(false);
            }
            "wait" => {
                println!("host: the guest ended: {:?}", vm.wait_exit(timeout)?);
                return Ok(false);
            }
            "quit" => return Ok(false),
            _ => println!("{HELP}"),
        }
        Ok(true)
    }
}

const HELP: &str = "\
VSS:   negotiate, hot-backup, freeze, thaw, pair (FREEZE and THAW back to back), dm-info,
       op NUMBER [BYTES of message], cut BYTES (a THAW packet of that size)
bus:   open, closed, released (wait for it), rescind, offer, cycle (rescind, offer, wait until open),
       heartbeat, events
guest: guest LINE (to its ttyS1), power-off, wait (for its end), quit (kills it)
also:  sleep SECONDS, repeat TIMES COMMAND";

fn number<T: std::str::FromStr>(word: Option<&str>) -> Result<T, Error> {
    let word = word.unwrap_or_default().trim();
    word.parse().map_err(|_| Error::Number(word.to_string()))
}

/// A whole THAW request as it would be on the wire.
fn thaw_packet() -> Vec<u8> {
    let envelope = Envelope {
        framework: Version::new(3, 0),
        message_type: message_type::VSS,
        message: Version::new(5, 0),
        transaction: 0,
    };
    envelope.request(&message(Op::THAW, &SHORT_BODY))
}

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
        status::OK => Ok(()),
        status => Err(Error::Status { what: op, status }),
    }
}
