// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `hv_vss_daemon`. All work is done by the library.

#![forbid(unsafe_code)]

use std::error::Error;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{value_parser, Arg, ArgAction, ArgMatches, Command};
use hv_vss_daemon::backup::Rehearsal;
use hv_vss_daemon::commands::{self, CommandError, Stop};
use hv_vss_daemon::config::{Config, ConfigError};
use hv_vss_daemon::device::Device;
use hv_vss_daemon::logbook::{stderr_is_journal, words, Logbook, Sink};
use hv_vss_daemon::record::{RunDir, RUN_DIR};
use hv_vss_daemon::report::Outcome;
use hv_vss_daemon::service::{self, Service};
use hv_vss_daemon::{check, children, guard, job, process, recovery, sys};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;

type Failure = Box<dyn Error>;

/// What takes root, in words.
const FREEZE: &str = "freeze and thaw file systems";
const ASK: &str = "ask the daemon";

/// The device of the module, whichever it is.
const DEVICE: &str = "/dev/vmbus/hv_vss";

/// How a start ends whose configuration is not valid: sysexits' EX_CONFIG. The unit begins none anew after it
/// (`RestartPreventExitStatus=`), since nothing but an administrator changes that.
const NOT_CONFIGURED: u8 = 78;

/// How long the end waits for the log.
const LAST_LINES: Duration = Duration::from_secs(2);

fn command() -> Command {
    let device = Arg::new("device")
        .long("device")
        .value_name("PATH")
        .help("The device to serve")
        .value_parser(value_parser!(PathBuf))
        .default_value(DEVICE);
    let no_daemon = Arg::new("no-daemon")
        .short('n')
        .long("no-daemon")
        .help("Stay in the foreground and log to standard error")
        .action(ArgAction::SetTrue);
    let config = Arg::new("config")
        .short('c')
        .long("config")
        .value_name("FILE")
        .help("The configuration [default: /etc/hv_vss/daemon.toml, if it exists]")
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
    let svg = Arg::new("svg")
        .long("svg")
        .value_name("FILE")
        .help("Draw one backup as a timeline into FILE instead")
        .value_parser(value_parser!(PathBuf))
        .conflicts_with("json");
    let number = Arg::new("number")
        .long("number")
        .value_name("N")
        .help("Which, counted from the last [default: 1]")
        .value_parser(value_parser!(u64).range(1..))
        .requires("svg");
    let run_dir = Arg::new("run-dir")
        .long("run-dir")
        .value_name("PATH")
        .help("The folder with the record of whoever froze")
        .value_parser(value_parser!(PathBuf))
        .default_value(RUN_DIR);
    let time = Arg::new("for")
        .long("for")
        .value_name("TIME")
        .help("How long to stay frozen, such as 5s or 500ms")
        .value_parser(humantime::parse_duration)
        .required(true);
    let no_hooks = Arg::new("no-hooks")
        .long("no-hooks")
        .help("Call no hooks")
        .action(ArgAction::SetTrue);
    Command::new("hv_vss_daemon")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Freezes the file systems of this guest while its Hyper-V host takes a backup")
        .args([no_daemon.clone(), device.clone(), config])
        .subcommands([
            Command::new("run")
                .about("Serve the host's requests (the default)")
                .args([no_daemon, device]),
            Command::new("status")
                .about("Show what the daemon is at and how the last backup went")
                .arg(json.clone()),
            Command::new("history")
                .about("Show the last backups: when, of what type, how they went, and why")
                .args([json.clone(), svg, number]),
            Command::new("check")
                .about("Look at everything that a backup needs, short of freezing")
                .args([json.clone()]),
            Command::new("list")
                .about("Show what would be frozen, in which order, and what would not and why")
                .args([json.clone(), table]),
            Command::new("freeze")
                .about("Rehearse: call hooks, freeze as for a backup, wait, thaw")
                .args([time, no_hooks, json]),
            Command::new("reload")
                .about("Have the daemon that serves read its configuration again"),
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
    match args.next().as_deref().and_then(OsStr::to_str) {
        Some(guard::SUBCOMMAND) => {
            let run_dir = args.next().unwrap_or_default();
            exit_with(done(
                guard::main(Path::new(&run_dir)).map_err(Failure::from),
            ))
        }
        Some(children::SUBCOMMAND) => children::become_other(args).into(),
        Some(check::SUBCOMMAND) => exit_with(done(has_device())),
        Some(check::CAN_START) => exit_with(can_start()),
        _ => exit_with(dispatch()),
    }
}

fn exit_with(result: Result<ExitCode, Failure>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            let outcome = error.downcast_ref().and_then(CommandError::outcome);
            outcome.map_or(ExitCode::FAILURE, |it| ExitCode::from(it as u8))
        }
    }
}

fn complain(error: &Failure) {
    let _ = writeln!(io::stderr(), "hv_vss_daemon: {}", words(error.as_ref()));
}

/// Whether the configuration was read and says what it must not.
fn is_of_configuration(error: &Failure) -> bool {
    let error = error.downcast_ref::<ConfigError>();
    // One that cannot be read now may be readable soon.
    error.is_some_and(|it| !matches!(it, ConfigError::Read { .. }))
}

/// What is asked for when the daemon is asked goes by whatever there is, and says so.
fn or_default(config: Result<Config, ConfigError>) -> Config {
    config.unwrap_or_else(|error| {
        let log = Logbook::new(foreground_sink());
        log.warning(format!("{}; going on without", words(&error)));
        Config::default()
    })
}

fn path_of(matches: &ArgMatches, name: &str) -> PathBuf {
    matches
        .get_one::<PathBuf>(name)
        .cloned()
        .unwrap_or_default()
}

/// The device that is named on the command line, before `run` or after it, or else the default.
fn device_of(matches: &ArgMatches) -> PathBuf {
    let is_said = |it: &&ArgMatches| it.value_source("device") == Some(ValueSource::CommandLine);
    let run = matches.subcommand_matches("run").filter(is_said);
    path_of(run.unwrap_or(matches), "device")
}

/// Prints what was asked for; the exit status says the same to a script.
fn print((text, outcome): (String, Outcome)) -> Result<ExitCode, Failure> {
    say(&mut io::stdout(), &text)?;
    Ok(ExitCode::from(outcome as u8))
}

/// Whoever reads may have read enough (`head`), and then all that was wanted is said.
fn say(out: &mut impl Write, text: &str) -> io::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn dispatch() -> Result<ExitCode, Failure> {
    let matches = command().get_matches();
    // It is read again from wherever the daemon is then.
    let config_path = matches.get_one::<PathBuf>("config");
    let config_path = config_path.map(std::path::absolute).transpose()?;
    let config = || commands::config(config_path.as_deref(), &RunDir::default());
    match matches.subcommand() {
        Some(("list", list)) => {
            let text = match list.get_flag("table") {
                true => commands::table()?,
                false => {
                    let run = RunDir::default();
                    commands::list(&config()?, &run, list.get_flag("json"))?
                }
            };
            print((text, Outcome::Well))
        }
        Some(("freeze", freeze)) => {
            need_root(FREEZE)?;
            let rehearsal = Rehearsal {
                time: freeze.get_one("for").copied().unwrap_or_default(),
                with_hooks: !freeze.get_flag("no-hooks"),
            };
            let (run, path) = (RunDir::default(), config_path.as_deref());
            let json = freeze.get_flag("json");
            match commands::rehearse_there(&run, path, rehearsal, json)? {
                Some(told) => print(told),
                None => done(rehearse(config()?, rehearsal)),
            }
        }
        Some(("thaw", thaw)) => {
            need_root(FREEZE)?;
            // Whatever the configuration says, or whoever reads it waits for.
            let run = RunDir::new(path_of(thaw, "run-dir"));
            let log = Logbook::new(foreground_sink());
            done(behind(&log, || Ok(commands::thaw(&run, &log)?)))
        }
        Some(("status", status)) => {
            need_root(ASK)?;
            print(commands::status(
                &RunDir::default(),
                || or_default(config()),
                status.get_flag("json"),
                &Logbook::new(foreground_sink()),
            )?)
        }
        Some(("history", history)) => {
            need_root("read the history of backups")?;
            let config = or_default(config());
            match history.get_one::<PathBuf>("svg") {
                Some(file) => {
                    let number = history.get_one("number").copied().unwrap_or(1_u64);
                    let number = usize::try_from(number)?;
                    Ok(commands::draw(&config, number, file).map(|()| ExitCode::SUCCESS)?)
                }
                None => print(commands::history(&config, history.get_flag("json"))?),
            }
        }
        Some(("check", check)) => {
            need_root("look at all that a backup needs")?;
            let device = device_of(&matches);
            let json = check.get_flag("json");
            let run = RunDir::default();
            let path = config_path.as_deref();
            print(commands::check(&device, &run, path, json)?)
        }
        Some(("reload", _)) => {
            need_root(ASK)?;
            let log = Logbook::new(foreground_sink());
            done(commands::reload(&RunDir::default(), config, &log).map_err(Failure::from))
        }
        run => {
            let foreground = |it: &ArgMatches| it.get_flag("no-daemon");
            let foreground = foreground(&matches) || run.is_some_and(|(_, it)| foreground(it));
            match serve(device_of(&matches), config_path, foreground) {
                Err(error) if is_of_configuration(&error) => {
                    complain(&error);
                    Ok(ExitCode::from(NOT_CONFIGURED))
                }
                served => done(served),
            }
        }
    }
}

fn done(result: Result<(), Failure>) -> Result<ExitCode, Failure> {
    result.map(|()| ExitCode::SUCCESS)
}

fn foreground_sink() -> Sink {
    match stderr_is_journal() {
        true => Sink::Journal,
        false => Sink::Stderr,
    }
}

/// Has `step` done, which freezes or thaws, while another thread writes the log: what is frozen waits for nobody who
/// has stopped reading that.
fn behind<T>(log: &Logbook, step: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    if let Err(error) = log.write_behind() {
        log.warning(format!("who reads the log may hold up all: {error}"));
    }
    let done = step();
    log.drain(LAST_LINES);
    done
}

fn serve(device: PathBuf, config_path: Option<PathBuf>, foreground: bool) -> Result<(), Failure> {
    // In the background it is elsewhere.
    let path = std::path::absolute(device)?;
    // Before going to the background, so that whoever starts it sees why it cannot run.
    let log = Logbook::new(foreground_sink());
    if foreground {
        return behind(&log, || {
            let (device, config) = begin(&path, config_path.as_deref(), &log)?;
            carry_on(device, &path, config, config_path, &log)
        });
    }
    // A thread that writes would be left behind, maybe amid a line.
    let (device, config) = begin(&path, config_path.as_deref(), &log)?;
    nix::unistd::daemon(false, false)?;
    let log = Logbook::new(Sink::Syslog);
    behind(&log, || carry_on(device, &path, config, config_path, &log))
}

/// The device and the configuration of a daemon that starts.
fn begin(
    path: &Path,
    config_path: Option<&Path>,
    log: &Logbook,
) -> Result<(Device, Config), Failure> {
    let run = RunDir::default();
    let config = match Config::load_in_time(config_path) {
        Ok(config) => config,
        Err(error) => {
            // Whatever is wrong with it, nothing stays frozen for that.
            let thaw = || Ok(recovery::thaw(&run, log, recovery::By::Start)?);
            if let Err(error) = behind(log, thaw) {
                log.error(words(error.as_ref()));
            }
            return Err(error.into());
        }
    };
    // Another program may have the device for as long as it likes.
    let asked_to_reload = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGHUP, Arc::clone(&asked_to_reload))?;
    let device = service::open_device(path, &run, log, &asked_to_reload).map_err(|error| {
        match check::why_no_device(path) {
            Some(why) => Failure::from(why),
            None => error.into(),
        }
    })?;
    let config = match asked_to_reload.load(Ordering::SeqCst) {
        true => read_again(config, config_path, log),
        false => config,
    };
    Ok((device, config))
}

fn carry_on(
    device: Device,
    path: &Path,
    config: Config,
    config_path: Option<PathBuf>,
    log: &Logbook,
) -> Result<(), Failure> {
    let service = harden(log).and_then(|()| {
        let run = RunDir::default();
        let service = Service::new(device, path, run, config, config_path, log.clone())?;
        Ok(service.run()?)
    });
    service.inspect_err(|error| log.error(words(error.as_ref())))
}

/// The configuration as it is now, or the one that there was when it is none.
fn read_again(old: Config, path: Option<&Path>, log: &Logbook) -> Config {
    match Config::load_in_time(path) {
        Ok(config) => {
            log.info("the configuration is read again");
            config
        }
        Err(error) => {
            let error = words(&error);
            log.error(format!("{error}; the configuration stays as it was"));
            old
        }
    }
}

/// For the unit: whether there is anything to serve, and what to do if there is not.
fn has_device() -> Result<(), Failure> {
    let why = check::why_no_device_in_time(Path::new(DEVICE));
    why.map_or(Ok(()), |why| Err(why.into()))
}

/// For an upgrade: whether this program would start in the place of the one that serves, with the configuration of that,
/// or else what is wrong.
fn can_start() -> Result<ExitCode, Failure> {
    match commands::config(None, &RunDir::default()) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            complain(&error.into());
            Ok(ExitCode::from(NOT_CONFIGURED))
        }
    }
}

/// `what` is what takes root, in words.
fn need_root(what: &str) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(format!("only root may {what}").into())
}

/// Must succeed before anything may be frozen, save for what only makes things easier.
fn harden(log: &Logbook) -> Result<(), Failure> {
    need_root(FREEZE)?;
    if let Err(error) = process::raise_descriptor_limit() {
        log.warning(format!("cannot raise the limit of open files: {error}"));
    }
    if let Err(error) = process::go_ahead() {
        log.warning(format!("cannot go before others on the processor: {error}"));
    }
    process::leave_no_dump().map_err(|e| format!("cannot forgo a dump of core: {e}"))?;
    process::lock_memory().map_err(|e| format!("cannot lock the memory: {e}"))?;
    job::warm_up()?;
    Ok(())
}

fn rehearse(config: Config, rehearsal: Rehearsal) -> Result<(), Failure> {
    // Whoever stops who writes to a terminal, or reads it, in the background stops nothing that has frozen.
    let stopping = SigSet::from_iter([Signal::SIGTTOU, Signal::SIGTTIN]);
    stopping.thread_block()?;
    let log = Logbook::new(foreground_sink());
    behind(&log, || {
        harden(&log)?;
        let stop = Stop::default();
        // Whoever was started so that it is not ended by one (nohup) goes on. None may stop it: it would thaw at the
        // deadline only, and let no hook go.
        let ends = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP];
        let ends = ends.into_iter().filter(|it| !process::ignores(*it));
        let mut signals = Signals::new(ends)?;
        let on_signal = stop.clone();
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                on_signal.stop();
            }
        });
        Ok(commands::freeze_for(config, &log, rehearsal, &stop)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap_complete::Shell;

    #[test]
    fn the_device_is_the_one_that_was_named_wherever_that_was() {
        for (line, device) in [
            (&[][..], DEVICE),
            (&["run"], DEVICE),
            (&["--device", "/a"], "/a"),
            (&["--device", "/a", "run"], "/a"),
            (&["run", "--device", "/b"], "/b"),
            (&["--device", "/a", "run", "--device", "/b"], "/b"),
            (&["--device", "/a", "check"], "/a"),
        ] {
            let line = ["hv_vss"].iter().chain(line);
            let matches = command().try_get_matches_from(line.clone()).unwrap();
            assert_eq!(device_of(&matches), Path::new(device), "{line:?}");
        }
    }

    #[test]
    fn backups_are_numbered_from_one() {
        for (number, is_one) in [("1", true), ("7", true), ("0", false), ("-1", false)] {
            let line = ["hv_vss", "history", "--svg", "a.svg", "--number", number];
            let matches = command().try_get_matches_from(line);
            assert_eq!(matches.is_ok(), is_one, "{number}");
        }
    }

    #[test]
    fn who_has_read_enough_has_missed_nothing() {
        let (mut writer, reader) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(reader);
        say(&mut writer, "a line\n").unwrap();
        let mut full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        say(&mut full, "a line\n").unwrap_err();
    }

    /// As it is written in a page of the manual.
    fn escaped(option: &str) -> String {
        format!("--{option}").replace('-', "\\-")
    }

    /// It is written by hand. clap_mangen (0.3) makes a page of each command and of this one a list of those; its SYNOPSIS
    /// has no values of options (`[--svg]`) and nothing of what a command takes, and what it says of a command is the
    /// line that `--help` has, where the page has paragraphs.
    #[test]
    fn the_manual_has_each_command_and_each_option_that_it_takes() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("hv_vss_daemon.8");
        let page = std::fs::read_to_string(page).unwrap();
        let between = |from: &str, to: &str| {
            let begin = page
                .find(from)
                .unwrap_or_else(|| panic!("there is no {from}"));
            let rest = &page[begin + from.len()..];
            rest.split(to).next().unwrap_or_default()
        };
        let synopsis = between(".SH SYNOPSIS\n", ".SH ");
        let commands = between(".SH COMMANDS\n", ".SH ");
        let options = between(".SH OPTIONS\n", ".SH ");
        for command in command().get_subcommands() {
            let name = command.get_name();
            let mut entries = commands.split(".TP\n").map(str::trim);
            let is_its = |it: &&str| {
                let words = it.trim_start_matches(".BI \"").trim_start_matches(".B ");
                words.split([' ', '\n']).next() == Some(name)
            };
            let entry = entries.find(is_its);
            let entry = entry.unwrap_or_else(|| panic!("COMMANDS has no {name}"));
            let explained = entry.split_once('\n').map_or("", |(_, text)| text.trim());
            assert!(!explained.is_empty(), "of {name} nothing is said");
            let mut lines = synopsis.split(".br\n");
            let line = match name {
                "run" => lines.next(),
                _ => lines.find(|it| it.starts_with(&format!(".B hv_vss {name}"))),
            };
            let line = line.unwrap_or_else(|| panic!("SYNOPSIS has no {name}"));
            for option in command.get_arguments() {
                let Some(long) = option.get_long() else {
                    continue;
                };
                let escaped = escaped(long);
                let short = option.get_short().map(|it| format!("\\-{it}"));
                let is_shown =
                    line.contains(&escaped) || short.is_some_and(|short| line.contains(&short));
                assert!(is_shown, "SYNOPSIS has no --{long} of {name}");
                let is_explained = entry.contains(&escaped) || options.contains(&escaped);
                assert!(is_explained, "of --{long} of {name} nothing is said");
                assert!(
                    option.get_help().is_some(),
                    "--help says nothing of --{long}"
                );
            }
        }
        for option in command().get_arguments().filter_map(Arg::get_long) {
            assert!(
                options.contains(&escaped(option)),
                "OPTIONS has no --{option}"
            );
        }
    }

    /// Where a distribution has its own, `hv_vss_daemon thaw` would start that one, and thaw nothing.
    #[test]
    fn nobody_is_told_to_call_the_program_by_a_name_that_may_be_anothers() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for file in [
            "README.md",
            "daemon/hv_vss_daemon.8",
            "daemon/hv_vss.toml.5",
            "daemon/hv_vss_daemon.toml",
            "daemon/src/org.hv-vss.Daemon.varlink",
            "daemon/src/check.rs",
            "daemon/src/commands.rs",
            "daemon/src/service.rs",
            "uapi/hv_vss.4",
        ] {
            let text = std::fs::read_to_string(root.join(file)).unwrap();
            for command in command().get_subcommands() {
                let called = format!("hv_vss_daemon {}", command.get_name());
                assert!(!text.contains(&called), "{file} has {called}");
            }
        }
        let page = std::fs::read_to_string(root.join("daemon/hv_vss_daemon.8")).unwrap();
        let files = page.split(".SH FILES\n").nth(1).unwrap_or_default();
        for file in ["/usr/sbin/hv_vss", "/usr/libexec/hv_vss_daemon"] {
            assert!(files.contains(&format!(".I {file}\n")), "{file}");
        }
    }

    /// Those that are installed were made so, and are made again with `HV_VSS_WRITE_COMPLETIONS` set.
    #[test]
    fn the_shells_complete_what_the_command_line_has() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("completions");
        for (shell, name) in [
            (Shell::Bash, "hv_vss.bash"),
            (Shell::Zsh, "_hv_vss"),
            (Shell::Fish, "hv_vss.fish"),
        ] {
            let mut made = Vec::new();
            // By the name that it has in PATH.
            clap_complete::generate(shell, &mut command(), "hv_vss", &mut made);
            let file = folder.join(name);
            if std::env::var_os("HV_VSS_WRITE_COMPLETIONS").is_some() {
                std::fs::write(&file, &made).unwrap();
            }
            let installed = std::fs::read(&file).unwrap();
            assert!(installed == made, "{} is not up to date", file.display());
        }
    }
}
