// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `hv_vss_daemon`. All work is done by the library.

use std::error::Error;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{value_parser, Arg, ArgAction, ArgMatches, Command};
use hv_vss_daemon::commands::{self, Stop};
use hv_vss_daemon::config::{Config, ConfigError};
use hv_vss_daemon::logbook::{stderr_is_journal, words, Logbook, Sink};
use hv_vss_daemon::record::RunDir;
use hv_vss_daemon::service::{self, Service};
use hv_vss_daemon::{guard, job, process, recovery, sys};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Failure = Box<dyn Error>;

fn command() -> Command {
    let device = Arg::new("device")
        .long("device")
        .value_name("PATH")
        .help("The device to serve")
        .value_parser(value_parser!(PathBuf))
        .default_value("/dev/vmbus/hv_vss");
    let no_daemon = Arg::new("no-daemon")
        .short('n')
        .long("no-daemon")
        .help("Stay in the foreground and log to standard error")
        .action(ArgAction::SetTrue);
    let config = Arg::new("config")
        .short('c')
        .long("config")
        .value_name("FILE")
        .help("The configuration [default: /etc/hv_vss_daemon.toml, if it exists]")
        .value_parser(value_parser!(PathBuf))
        .global(true);
    let json = Arg::new("json")
        .long("json")
        .help("Print JSON")
        .action(ArgAction::SetTrue);
    let table = Arg::new("table")
        .long("table")
        .help("Print, as JSON, the mount tables and block devices that the plan is made from")
        .action(ArgAction::SetTrue)
        .conflicts_with("json");
    let run_dir = Arg::new("run-dir")
        .long("run-dir")
        .value_name("PATH")
        .help("The run_dir of whoever froze [default: wherever a daemon may have kept its record]")
        .value_parser(value_parser!(PathBuf));
    let time = Arg::new("for")
        .long("for")
        .value_name("TIME")
        .help("How long to stay frozen, such as 5s or 500ms")
        .value_parser(humantime::parse_duration)
        .required(true);
    Command::new("hv_vss_daemon")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Freezes the file systems of this guest while its Hyper-V host takes a backup")
        .args([no_daemon.clone(), device.clone(), config])
        .subcommands([
            Command::new("run")
                .about("Serve the host's requests (the default)")
                .args([no_daemon, device]),
            Command::new("list")
                .about("Show what would be frozen, in which order, and what would not and why")
                .args([json, table]),
            Command::new("freeze")
                .about("Rehearse: freeze as for a backup, wait, thaw")
                .arg(time),
            Command::new("thaw")
                .about("Thaw what an unfinished freeze left frozen")
                .arg(run_dir),
        ])
}

fn main() -> ExitCode {
    sys::use_one_heap();
    process::abort_on_panic();
    // Not for people, and started with as little memory as can be, so before all else.
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|a| a == guard::SUBCOMMAND) {
        let run_dir = args.next().unwrap_or_default();
        return exit_with(guard::main(Path::new(&run_dir)).map_err(Failure::from));
    }
    exit_with(dispatch())
}

fn exit_with(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "hv_vss_daemon: {}",
                words(error.as_ref())
            );
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<(), Failure> {
    let matches = command().get_matches();
    let config = Config::load(matches.get_one::<PathBuf>("config").map(PathBuf::as_path));
    match matches.subcommand() {
        Some(("list", list)) => {
            let text = match list.get_flag("table") {
                true => commands::table()?,
                false => commands::list(&config?, list.get_flag("json"))?,
            };
            Ok(std::io::stdout().write_all(text.as_bytes())?)
        }
        Some(("freeze", freeze)) => {
            let time = freeze.get_one("for").copied().unwrap_or_default();
            rehearse(config?, time)
        }
        Some(("thaw", thaw)) => {
            need_root()?;
            let log = Logbook::new(foreground_sink());
            if let Err(error) = &config {
                log.warning(format!("{}; going on without", words(error)));
            }
            let asked_for = thaw.get_one("run-dir").cloned();
            let places = recovery::places(asked_for, config.as_ref());
            Ok(commands::thaw(&places, &log)?)
        }
        Some((_, run)) => serve(
            run,
            config,
            run.get_flag("no-daemon") || matches.get_flag("no-daemon"),
        ),
        None => serve(&matches, config, matches.get_flag("no-daemon")),
    }
}

fn foreground_sink() -> Sink {
    match stderr_is_journal() {
        true => Sink::Journal,
        false => Sink::Stderr,
    }
}

fn serve(
    matches: &ArgMatches,
    config: Result<Config, ConfigError>,
    foreground: bool,
) -> Result<(), Failure> {
    let path = matches
        .get_one::<PathBuf>("device")
        .cloned()
        .unwrap_or_default();
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            // Whatever is wrong with it, nothing stays frozen for that.
            let log = Logbook::new(foreground_sink());
            for run in recovery::places(None, Err(&error)) {
                if let Err(error) = recovery::thaw(&run, &log, recovery::By::Start) {
                    log.error(words(&error));
                }
            }
            return Err(error.into());
        }
    };
    // Before going to the background, so that whoever starts it sees why it cannot run.
    let log = Logbook::new(foreground_sink());
    let run = RunDir::new(&config.run_dir);
    let device = service::open_device(&path, &run, &log)?;
    let log = match foreground {
        true => log,
        false => {
            nix::unistd::daemon(false, false)?;
            Logbook::new(Sink::Syslog)
        }
    };
    let service = harden(&log).and_then(|()| {
        let service = Service::new(device, &path, config, log.clone())?;
        Ok(service.run()?)
    });
    service.inspect_err(|error| log.error(words(error.as_ref())))
}

fn need_root() -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err("only root may freeze and thaw file systems".into())
}

/// Must succeed before anything may be frozen, save for what only makes things easier.
fn harden(log: &Logbook) -> Result<(), Failure> {
    need_root()?;
    if let Err(error) = process::raise_descriptor_limit() {
        log.warning(format!("cannot raise the limit of open files: {error}"));
    }
    if let Err(error) = process::go_first() {
        log.warning(format!("cannot go before others on the processor: {error}"));
    }
    process::leave_no_dump().map_err(|e| format!("cannot forgo a dump of core: {e}"))?;
    process::lock_memory().map_err(|e| format!("cannot lock the memory: {e}"))?;
    job::warm_up()?;
    Ok(())
}

fn rehearse(config: Config, time: Duration) -> Result<(), Failure> {
    let log = Logbook::new(foreground_sink());
    harden(&log)?;
    let stop = Stop::default();
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let on_signal = stop.clone();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            on_signal.stop();
        }
    });
    Ok(commands::freeze_for(config, &log, time, &stop)?)
}
