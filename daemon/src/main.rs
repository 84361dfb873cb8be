// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `hv_vss_daemon`. All work is done by the library.

use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, ArgAction, Command};
use hv_vss_daemon::device::Device;
use hv_vss_daemon::job::Settings;
use hv_vss_daemon::logbook::{words, Logbook, Sink};
use hv_vss_daemon::service::Service;

fn command() -> Command {
    Command::new("hv_vss_daemon")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Freezes the file systems of this guest while its Hyper-V host takes a backup")
        .arg(
            Arg::new("no-daemon")
                .short('n')
                .long("no-daemon")
                .help("Stay in the foreground and log to standard error")
                .action(ArgAction::SetTrue),
        )
        .arg(
            Arg::new("device")
                .long("device")
                .value_name("PATH")
                .help("The device to serve")
                .default_value("/dev/vmbus/hv_vss"),
        )
}

fn main() -> ExitCode {
    let matches = command().get_matches();
    let foreground = matches.get_flag("no-daemon");
    let device = matches
        .get_one::<String>("device")
        .cloned()
        .unwrap_or_default();
    match run(Path::new(&device), foreground) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hv_vss_daemon: {}", words(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(path: &Path, foreground: bool) -> Result<(), Box<dyn std::error::Error>> {
    // Before going to the background, so that whoever starts it sees why it cannot run.
    let device = Device::open(path)?;
    if !foreground {
        nix::unistd::daemon(false, false)?;
    }
    let sink = if foreground {
        Sink::Stderr
    } else {
        Sink::Syslog
    };
    let log = Logbook::new(sink);
    let service = Service::new(device, path, Settings::default(), log.clone());
    service
        .and_then(Service::run)
        .inspect_err(|error| log.error(words(error)))?;
    Ok(())
}
