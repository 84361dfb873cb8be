// SPDX-License-Identifier: GPL-2.0-only

//! What a backup needs, looked at for real short of freezing: `check`, and what is to be done when the
//! device is not there.
//!
//! Each look is one function that returns findings in words for an operator. None of it changes anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::statfs::statfs;
use nix::unistd::pipe2;
use serde::Serialize;
use serde_json::Value;

use crate::cache::survey;
use crate::calls::PATH;
use crate::children;
use crate::config::Config;
use crate::control::{ask, reply_of, turned_in, ControlError, Method};
use crate::freeze::is_of_anything;
use crate::ground::{self, AtRest};
use crate::history::History;
use crate::hooks::{self, Asked};
use crate::logbook::words;
use crate::mounts::DevId;
use crate::moving::Layers;
use crate::plan::{FileSystem, Plan, Reason, Scope};
use crate::process;
use crate::record::{Record, RunDir};
use crate::superblocks::dev_in;
use crate::topology;
use crate::writes;

/// Asks whether the device is there, on the command line of `hv_vss_daemon`; for its unit.
pub const SUBCOMMAND: &str = "has-device";

/// Asks whether the configuration is one that a daemon of this version starts with; for an upgrade.
pub const CAN_START: &str = "can-start";

/// How long the process may take to start that looks for a daemon.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long the VSS device may be without a driver that shows it, and how often that is looked at.
const HAND_OVER: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(100);

/// `HV_VSS_GUID` of the kernel's `include/linux/hyperv.h`, as sysfs writes it.
const VSS_CLASS: &str = "{35fa2e29-ea23-4236-96ae-3a6ebacba440}";
const VMBUS: &str = "/sys/bus/vmbus/devices";
/// Where DKMS has the sources of modules, ours among them if its package is installed, and where the modules of each
/// kernel are.
const SOURCES: &str = "/usr/src";
const MODULES: &str = "/lib/modules";
/// Where modules of its are that did not come with the kernel and that DKMS did not build.
const ADDED: [&str; 2] = ["updates", "extra"];

/// The daemon's unit, where an administrator's units are, and in which folder there it is linked while it is enabled: by
/// that very path the distributions' own daemons know that they are to stay away (`give-way.conf`).
const UNIT: &str = "hv_vss.service";
const UNITS: &str = "/etc/systemd/system";
const WANTED: &str = "dev-vmbus-hv_vss.device.wants";

/// What findings of the plan are of.
const FILE_SYSTEMS: &str = "file systems";

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// A backup can be taken; an operator should know of this.
    Warning,
    /// No backup can be taken, or it would fail.
    Problem,
}

/// What was seen of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which thing.
    pub what: &'static str,
    /// How grave it is.
    pub grade: Grade,
    /// In words.
    pub text: String,
}

fn finding(what: &'static str, grade: Grade, text: impl Into<String>) -> Finding {
    let text = text.into();
    Finding { what, grade, text }
}

/// Everything that a backup needs, of the daemon whose run directory this is: by the configuration at `path`, or
/// else by that which it goes by.
pub fn check(device: &Path, run: &RunDir, path: Option<&Path>) -> Vec<Finding> {
    let status = ask(run, Method::Status);
    let door = status.as_ref().ok();
    let its = door.map(|it| &it["configuration"]);
    let (config, found) = configuration(path, its.filter(|it| it.is_object()));
    let config = &config;
    let mut all = vec![daemon(device, &status), found];
    let is_held = door.is_some_and(|it| it["door"] == "held");
    let has_hooks = hooks::find(&config.hooks).is_ok_and(|it| !it.hooks.is_empty());
    all.extend(run_dir(
        run,
        Room::left_at(run.path()),
        !is_held || has_hooks,
    ));
    all.extend(door.map(privileges).unwrap_or_default());
    all.extend(door.and_then(next_boot));
    all.extend(history(config));
    all.extend(module_missed(door, Path::new("/"), Path::new(VMBUS)));
    all.extend(listed_disks(config, door));
    all.extend(file_systems(config, door));
    all.extend(hooks_found(config));
    all.extend(hung_task(config));
    all.extend(fanotify());
    all
}

/// The configuration to judge by, and what is to be said of it: that at `path`, or else what the daemon that serves
/// goes by, which says so in `its`. Between two loads the files may be anything.
fn configuration(path: Option<&Path>, its: Option<&Value>) -> (Config, Finding) {
    let its_path = its.and_then(|it| it["path"].as_str()).map(Path::new);
    let read = Config::load_in_time(path.or(its_path));
    let in_force = its.filter(|_| path.is_none());
    let in_force = in_force.and_then(|it| Config::of_value(&it["in_force"]));
    let has_read = |it: &Config| its.is_none_or(|its| its["in_force"] == it.to_value());
    let (grade, text) = match (&read, path) {
        (Err(error), _) if in_force.is_some() => {
            let error = words(error);
            let text = format!(
                "{error}: the next start fails; until then the daemon goes by what it has read before"
            );
            (Grade::Warning, text)
        }
        (Err(error), _) => (Grade::Problem, words(error)),
        (Ok(it), None) if !has_read(it) => {
            let text = "changed since it was read, and not in force: systemctl reload hv_vss";
            (Grade::Warning, text.into())
        }
        (Ok(it), Some(path)) if !has_read(it) => {
            let path = path.display();
            let text = format!("{path} is not what the daemon that serves goes by");
            (Grade::Warning, text)
        }
        (Ok(it), _) => match it.in_vain() {
            None => (Grade::Ok, "valid".into()),
            Some(text) => (Grade::Warning, text),
        },
    };
    let config = in_force.or(read.ok()).unwrap_or_default();
    (config, finding("configuration", grade, text))
}

/// The same by a process of its own, as the reply to a call: of the daemon that serves `device`.
pub fn by_another(device: &Path) -> Result<Vec<u8>, String> {
    let mut command = children::becoming("/proc/self/exe");
    command
        .arg("--device")
        .arg(device)
        .args(["check", "--json"]);
    let run = || -> io::Result<(Vec<u8>, ExitStatus)> {
        let (waits, word) = pipe2(OFlag::O_CLOEXEC)?;
        let (said, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        let starting = children::start("check", command, &[waits.as_fd(), theirs.as_fd()])?;
        let mut child = starting.in_time(START_LIMIT)?;
        drop((waits, theirs));
        // It fails when the process has ended, and that is seen.
        let _ = fs::File::from(word).write_all(&[0]);
        let mut text = Vec::new();
        let read = fs::File::from(said).read_to_end(&mut text);
        let ended = child.wait()?;
        read.map(|_| (text, ended))
    };
    let (text, ended) = run().map_err(|error| format!("it cannot be started: {error}"))?;
    let findings: Vec<Value> =
        serde_json::from_slice(&text).map_err(|_| format!("it has {ended}"))?;
    reply_of(&BTreeMap::from([("findings", findings)])).map_err(|error| error.to_string())
}

fn daemon(device: &Path, status: &Result<Value, ControlError>) -> Finding {
    let found = |grade, text: String| finding("daemon", grade, text);
    match status {
        Ok(status) if status["door"].is_null() => {
            let why = why_no_device(device).unwrap_or_else(|| {
                let doing = status["doing"].as_str().unwrap_or("the device went away");
                match who_has(device) {
                    Some(who) => format!("{doing}; {who} has {}", device.display()),
                    None => doing.into(),
                }
            });
            found(Grade::Problem, format!("it runs and waits: {why}"))
        }
        Ok(status) if status["refuses"].is_string() => {
            let why = status["refuses"].as_str().unwrap_or_default();
            let device = device.display();
            found(
                Grade::Problem,
                format!("serves {device} and refuses each FREEZE: {why}"),
            )
        }
        Ok(status) => {
            let holds = match status["door"] == "held" {
                true => "the module holds what is frozen",
                false => "freezes through FIFREEZE, with a guard",
            };
            found(Grade::Ok, format!("serves {}; {holds}", device.display()))
        }
        Err(ControlError::Nobody) => {
            let why = why_no_device(device);
            let why = why.unwrap_or_else(|| match who_has(device) {
                Some(who) => format!(
                    "no daemon of ours serves: {who} has {}; after systemctl start hv_vss ours takes it once that \
                     has ended",
                    device.display()
                ),
                None => "no daemon serves: systemctl start hv_vss".into(),
            });
            found(Grade::Problem, why)
        }
        Err(error) => found(Grade::Problem, words(error)),
    }
}

/// What keeps the daemon from serving after the next boot, where it is the unit's. One that was started in another way
/// may be so then as well.
fn next_boot(daemon: &Value) -> Option<Finding> {
    let pid = daemon["pid"].as_u64()?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mut names = groups.lines().filter_map(|it| it.rsplit('/').next());
    names
        .any(|it| it == UNIT)
        .then(|| not_at_boot(Path::new(UNITS)))?
}

/// The same, by the folder of an administrator's units.
fn not_at_boot(units: &Path) -> Option<Finding> {
    let is_masked = fs::read_link(units.join(UNIT)).is_ok_and(|it| it == Path::new("/dev/null"));
    let is_enabled = units.join(WANTED).join(UNIT).exists();
    let (what, verb) = match (is_masked, is_enabled) {
        (true, _) => ("masked", "unmask"),
        (false, false) => ("not enabled", "enable"),
        (false, true) => return None,
    };
    let text = format!(
        "{UNIT} is {what}: from the next boot on it does not serve, but the distribution's own daemon, or none; systemctl \
         {verb} hv_vss"
    );
    Some(finding("daemon", Grade::Warning, text))
}

/// What keeps backups from being remembered.
fn history(config: &Config) -> Option<Finding> {
    let error = History::new(&config.state_dir).has_room_in_time().err()?;
    let text = format!(
        "{}: no backup is remembered once the daemon has ended",
        words(&error)
    );
    Some(finding("history", Grade::Warning, text))
}

/// What the daemon lacks: by a drop-in of its unit, or in a container.
fn privileges(daemon: &Value) -> Vec<Finding> {
    let Some(pid) = daemon["pid"].as_u64() else {
        return Vec::new();
    };
    let status = |pid| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let namespace = |pid| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut all = lacking(&status(pid), &status(1));
    let both = namespace(pid).zip(namespace(1));
    if both.is_some_and(|(its, first)| its != first) {
        let text =
            "the daemon has a mount namespace of its own (ProtectSystem=, PrivateTmp= and their \
                    like): it may not see what is mounted later";
        all.push(finding("privileges", Grade::Warning, text));
    }
    all
}

/// The same by `/proc/<pid>/status` of the daemon and of the first process.
fn lacking(status: &str, first: &str) -> Vec<Finding> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let field = |text: &str, name: &str, radix| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(value.trim(), radix).ok()
    };
    let capabilities = |text| field(text, "CapEff:", 16);
    let found = |grade, text: String| finding("privileges", grade, text);
    let mut all = Vec::new();
    if let Some((its, most)) = capabilities(status).zip(capabilities(first)) {
        if its & CAP_SYS_ADMIN == 0 {
            let text =
                "the daemon lacks CAP_SYS_ADMIN, without which nothing can be frozen: look for \
                        CapabilityBoundingSet= in systemctl cat hv_vss";
            all.push(found(Grade::Problem, text.into()));
        } else if most & !its != 0 {
            let text = format!(
                "the daemon lacks capabilities, and so do hooks: what is mounted elsewhere may not be \
                 reached (capsh --decode={:016x} has their names)",
                most & !its
            );
            all.push(found(Grade::Warning, text));
        }
    }
    if field(status, "Seccomp:", 10).is_some_and(|mode| mode != 0) {
        let text = "what the daemon may ask of the kernel is filtered (seccomp: SystemCallFilter= and its \
                    like, or a container), and so it is for hooks";
        all.push(found(Grade::Warning, text.into()));
    }
    all
}

/// Whether anybody says which disks those are, if that matters.
fn listed_disks(config: &Config, status: Option<&Value>) -> Option<Finding> {
    let is_stock = status.is_some_and(|it| it["door"] == "fifreeze");
    (config.listed_disks_only && is_stock).then(|| {
        let text = "listed_disks_only does nothing: hv_utils passes no list on, and all is frozen";
        finding("configuration", Grade::Warning, text)
    })
}

/// Why the stock driver serves where our module was asked for: DKMS has its source, or it is there for this kernel or
/// for another, where `root` is the root folder.
fn module_missed(status: Option<&Value>, root: &Path, vmbus: &Path) -> Option<Finding> {
    // Without a daemon somebody else's serves, or none.
    if status.is_some_and(|it| it["door"] != "fifreeze") {
        return None;
    }
    // Why there is no device is said of the daemon.
    let driver = driver_of(&vss_device(vmbus)?)?;
    if driver != "hv_utils" {
        return None;
    }
    let build = newest_build(&below(root, SOURCES));
    if build.is_none() && !is_added(&below(root, MODULES)) {
        return None;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let build = build.as_deref();
    let loading = || Loading::look(build, release.trim());
    let text = why_missed(build, release.trim(), has_module, loading);
    Some(finding("module", Grade::Warning, text))
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Whether the module was put there for any kernel, and not by DKMS.
fn is_added(modules: &Path) -> bool {
    let kernels = fs::read_dir(modules).into_iter().flatten().flatten();
    let folders = kernels.flat_map(|kernel| ADDED.map(|it| kernel.path().join(it)));
    let mut files = folders.filter_map(|it| fs::read_dir(it).ok()).flatten();
    // It may be compressed.
    files.any(|it| it.is_ok_and(|it| it.file_name().to_string_lossy().starts_with("hv_vss.ko")))
}

/// What this program says; an error if it cannot be started. Found where whatever we start is: an operator's shell may
/// look for it elsewhere.
fn said(program: &str, args: &[&str]) -> Result<Output, String> {
    let mut command = Command::new(program);
    let command = command.args(args).env("PATH", PATH).stdin(Stdio::null());
    let ended = command.output();
    ended.map_err(|error| format!("{program} cannot be started: {error}"))
}

/// Whether the module is there for the kernel that runs.
fn has_module() -> Result<bool, String> {
    Ok(said("modinfo", &["hv_vss"])?.status.success())
}

/// What the newest of the packages builds the module with.
fn newest_build(sources: &Path) -> Option<PathBuf> {
    let version = |it: &fs::DirEntry| -> Option<Vec<u64>> {
        let name = it.file_name();
        let version = name.to_str()?.strip_prefix("hv_vss-")?;
        let numbers = version.split(|it: char| !it.is_ascii_digit());
        Some(numbers.filter_map(|it| it.parse().ok()).collect())
    };
    let folders = fs::read_dir(sources).ok()?.flatten();
    let builds = folders.filter_map(|it| Some((version(&it)?, it.path().join("kmod/dkms/build"))));
    let (_, newest) = builds.filter(|(_, it)| it.exists()).max()?;
    Some(newest)
}

/// In one line, as the hand-over has it in the log.
fn why_missed(
    build: Option<&Path>,
    release: &str,
    has_module: impl FnOnce() -> Result<bool, String>,
    loading: impl FnOnce() -> Loading,
) -> String {
    match has_module() {
        Ok(true) => {
            let why = loading().why_not();
            return format!("hv_vss is built and hv_utils serves: {why}");
        }
        Ok(false) => {}
        Err(error) => {
            return format!("hv_utils serves, and whether hv_vss is there is not known: {error}")
        }
    }
    let Some(build) = build else {
        return format!(
            "hv_vss is not built for kernel {release}, and is there for another: build and install it for this one \
             (make && make install)"
        );
    };
    let mut asked = Command::new(build);
    let asked = asked.arg("--why-not").arg(release).env("PATH", PATH);
    let said = asked.stdin(Stdio::null()).output();
    let said = said.map(|it| it.stdout).unwrap_or_default();
    match String::from_utf8_lossy(&said).lines().last() {
        None => format!("hv_vss is not built for kernel {release}; see 'dkms status hv_vss'"),
        Some(why) => why.chars().filter(|it| !it.is_control()).collect(),
    }
}

/// What may stand against the loading of a module that is built.
#[derive(Clone, Debug, Default)]
struct Loading {
    /// What modprobe goes by (`modprobe --showconfig`).
    configuration: String,
    /// What the kernel was started with.
    command_line: String,
    /// Whether it loads no more modules until the next boot.
    is_closed: bool,
    /// Whether it loads only those whose key it knows.
    is_strict: bool,
    /// Who has signed it; empty when nobody has.
    signer: String,
    /// The keys that the kernel has (`/proc/keys`).
    keys: String,
    /// What DKMS calls it, for this kernel, as two arguments of `dkms`, if it has its source.
    of_dkms: Option<String>,
    /// Why not all of this is known, if so.
    unknown: Option<String>,
}

impl Loading {
    /// `build` is what the newest package builds the module with, for the kernel `release` that runs.
    fn look(build: Option<&Path>, release: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut unknown = None;
        let mut said = |program: &str, args: &[&str]| match said(program, args) {
            Ok(said) => String::from_utf8_lossy(&said.stdout).trim().to_owned(),
            Err(error) => {
                unknown = Some(error);
                String::new()
            }
        };
        let lockdown = read("/sys/kernel/security/lockdown");
        Loading {
            configuration: said("modprobe", &["--showconfig"]),
            signer: said("modinfo", &["-F", "signer", "hv_vss"]),
            command_line: read("/proc/cmdline"),
            is_closed: read("/proc/sys/kernel/modules_disabled").trim() == "1",
            is_strict: read("/sys/module/module/parameters/sig_enforce").trim() == "Y"
                || ["[integrity]", "[confidentiality]"]
                    .iter()
                    .any(|it| lockdown.contains(it)),
            keys: read("/proc/keys"),
            of_dkms: build.map(|it| of_dkms(it, release)),
            unknown,
        }
    }

    fn why_not(&self) -> String {
        let is_ours = |name: &str| name.replace('-', "_") == "hv_vss";
        let mut lines = self.configuration.lines().map(str::split_whitespace);
        let is_barred = lines.any(|mut words| {
            let verb = words.next();
            let is_it = words.next().is_some_and(is_ours);
            is_it && matches!(verb, Some("blacklist" | "install"))
        });
        let mut words = self.command_line.split_whitespace();
        let is_barred_at_boot = words.any(|it| {
            let names = it.strip_prefix("module_blacklist=");
            let names = names.or(it.strip_prefix("modprobe.blacklist="));
            names.is_some_and(|it| it.split(',').any(is_ours))
        });
        if is_barred_at_boot {
            return "it is blacklisted on the kernel's command line".into();
        }
        if is_barred {
            return "it is blacklisted, see modprobe --showconfig".into();
        }
        if self.is_closed {
            return "kernel.modules_disabled is set, so no module is loaded until the next boot"
                .into();
        }
        if let Some(why) = &self.unknown {
            return format!("why is not known: {why}");
        }
        let is_known = !self.signer.is_empty() && self.keys.contains(&self.signer);
        let signer = self.signer.escape_debug();
        match (self.is_strict && !is_known, self.signer.as_str(), &self.of_dkms) {
            // Where the package came as a file, apt could not install it again.
            (true, "", Some(of_dkms)) => format!(
                "it is not signed, and the kernel takes no such module (Secure Boot): install openssl, with which \
                 DKMS signs, and have it built again (dkms build --force {of_dkms} && dkms install --force {of_dkms})"
            ),
            (true, "", None) => "it is not signed, and the kernel takes no such module (Secure Boot): sign it with a key \
                                 that the kernel knows"
                .into(),
            (true, _, Some(_)) => format!(
                "the kernel does not know the key that it is signed with (Secure Boot), that of {signer}: \
                 mokutil --import /var/lib/dkms/mok.pub, and reboot"
            ),
            (true, _, None) => format!(
                "the kernel does not know the key that it is signed with (Secure Boot), that of {signer}: \
                 mokutil --import with its certificate, and reboot"
            ),
            (false, ..) => "the device was not handed over, or the kernel refused it; \
                            /usr/libexec/hv_vss_hand_over take says which"
                .into(),
        }
    }
}

/// What DKMS calls the module that `build` is a part of, for this kernel.
fn of_dkms(build: &Path, release: &str) -> String {
    // Below it there is kmod/dkms/build.
    let folder = build.ancestors().nth(3).and_then(Path::file_name);
    let version = folder.and_then(|it| it.to_str()?.strip_prefix("hv_vss-"));
    format!("hv_vss/{} -k {release}", version.unwrap_or("VERSION"))
}

/// Why the device is not there, and what to do about it; `None` when it is.
pub fn why_no_device(device: &Path) -> Option<String> {
    why_not_on(Path::new(VMBUS), device)
}

/// The same for the unit. A device that the host offers may be on its way from one driver to the other, as at boot: a
/// start that is given up just then is not begun anew when the device comes, since it is still under way for systemd.
pub fn why_no_device_in_time(device: &Path) -> Option<String> {
    let until = Instant::now() + HAND_OVER;
    loop {
        let why = why_no_device(device)?;
        if vss_device(Path::new(VMBUS)).is_none() || Instant::now() >= until {
            return Some(why);
        }
        thread::sleep(LOOK);
    }
}

/// The same, with the devices of the bus in this folder.
fn why_not_on(vmbus: &Path, device: &Path) -> Option<String> {
    if device.exists() {
        return None;
    }
    let name = device.display();
    let because = |why: &str| Some(format!("no {name}: {why}"));
    if !vmbus.exists() {
        return because("this is not a guest of Hyper-V, or the kernel has no VMBus");
    }
    let Some(vss) = vss_device(vmbus) else {
        return because(
            "the host does not offer it: switch on \"Backup (volume shadow copy)\" in the \
             integration services of this machine",
        );
    };
    match driver_of(&vss) {
        Some(driver) => because(&format!(
            "the driver {driver} has it and shows no device, see dmesg"
        )),
        None => because("no driver is loaded: modprobe hv_vss, or modprobe hv_utils"),
    }
}

/// The VSS device of the VMBus, if the host offers it.
fn vss_device(vmbus: &Path) -> Option<PathBuf> {
    let is_vss = |path: &PathBuf| {
        fs::read_to_string(path.join("class_id")).is_ok_and(|it| it.trim() == VSS_CLASS)
    };
    let devices = fs::read_dir(vmbus).ok()?.flatten();
    devices.map(|it| it.path()).find(is_vss)
}

/// The driver that has a device of the VMBus.
fn driver_of(device: &Path) -> Option<String> {
    let driver = fs::read_link(device.join("driver")).ok()?;
    let name = driver.file_name().unwrap_or_default();
    Some(name.to_string_lossy().into_owned())
}

/// The program that has the device open, if one has. Only links are read, for what they lead to may hang.
fn who_has(device: &Path) -> Option<String> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        // There is /proc/self, too.
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let path = process.path();
        let mut opened = fs::read_dir(path.join("fd")).ok()?.flatten();
        opened.find(|it| fs::read_link(it.path()).is_ok_and(|at| at == device))?;
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        // Daemons of several distributions have one name.
        let program = fs::read_link(path.join("exe")).ok();
        let program = program.map(|it| format!(", {}", it.display().to_string().escape_debug()));
        Some(format!(
            "{} (process {pid}{})",
            name.trim().escape_debug(),
            program.unwrap_or_default()
        ))
    })
}

/// What a file system has left; `None` where it knows of no end, or does not say.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    bytes: Option<u64>,
    files: Option<u64>,
}

impl Room {
    fn left_at(path: &Path) -> Self {
        let Ok(found) = statfs(path) else {
            return Room::default();
        };
        let block = u64::try_from(found.block_size()).unwrap_or(1);
        let bytes = found.blocks_available().saturating_mul(block);
        // A tmpfs that may take all memory counts none.
        Room {
            bytes: (found.blocks() != 0).then_some(bytes),
            files: (found.files() != 0).then_some(found.files_free()),
        }
    }

    /// Whether that is too little for the records of a backup, each of which is replaced by another.
    fn is_short(self) -> bool {
        const BYTES: u64 = 64 << 10;
        const FILES: u64 = 8;
        self.bytes.is_some_and(|it| it < BYTES) || self.files.is_some_and(|it| it < FILES)
    }
}

/// `is_needed` says whether a backup writes a record there before it freezes: with FIFREEZE, or for hooks.
fn run_dir(run: &RunDir, left: Room, is_needed: bool) -> Vec<Finding> {
    // A daemon that starts makes it.
    if !run.path().exists() {
        return Vec::new();
    }
    let aside = run.hooks_aside();
    let aside = aside.exists().then(|| {
        let text = format!(
            "{}: a daemon of another version has left it, and hooks that it names may not be let go; remove it once \
             they are",
            aside.display()
        );
        finding("record", Grade::Warning, text)
    });
    let error = run.check().err();
    let error = error.map(|it| finding("record", Grade::Problem, words(&it)));
    let path = run.path().display();
    let full = left.is_short().then(|| match is_needed {
        true => {
            let text = format!(
                "{path} has no room for what is written there before anything is frozen, and each FREEZE fails: \
                 see df and df -i"
            );
            finding("record", Grade::Problem, text)
        }
        false => {
            let text = format!(
                "{path} has no room: with a hook, or with hv_utils, each FREEZE would fail; see df and df -i"
            );
            finding("record", Grade::Warning, text)
        }
    });
    let mut all: Vec<Finding> = error.into_iter().chain(full).chain(aside).collect();
    all.extend(left_behind(run));
    all
}

/// What is on record there and has nobody any more who would undo it, or was not undone so far.
fn left_behind(run: &RunDir) -> Vec<Finding> {
    let frozen = run.read().ok().flatten().map(Record::as_one);
    let frozen = frozen.filter(|it| process::is_dead(it.pid));
    let frozen = frozen.map(|it| it.frozen).unwrap_or_default();
    let frozen = frozen.iter().map(|it| format!("{} may be frozen", it.name));
    let hooks = run.read_hooks().ok().flatten().unwrap_or_default();
    let is_dead = process::is_dead(hooks.pid);
    let owed = hooks.owed.iter();
    // As long as it was not tried to let them go, whoever has called them does so.
    let owed = owed.filter_map(|it| match it.in_words() {
        None if is_dead => Some(format!("hook {} is not let go", it.hook.name())),
        tried => tried,
    });
    let owed: Vec<String> = owed.collect();
    let (left, tried) = match is_dead {
        true => (owed, Vec::new()),
        false => (Vec::new(), owed),
    };
    let left = frozen.chain(left).map(|what| {
        let text = format!("{what}, and whoever was to see to that has died: hv_vss thaw");
        finding("record", Grade::Problem, text)
    });
    let tried = tried.into_iter().map(|what| {
        let text = format!(
            "{what}; the daemon tries it again twice a minute, and gives up on it after a day: put the hook back for that \
             time"
        );
        finding("record", Grade::Problem, text)
    });
    left.chain(tried).collect()
}

fn file_systems(config: &Config, status: Option<&Value>) -> Vec<Finding> {
    let turned = status.map(turned_in).unwrap_or_default();
    let plan = match survey(config, turned) {
        Ok(plan) => plan,
        Err(error) => return vec![finding(FILE_SYSTEMS, Grade::Problem, words(&error))],
    };
    let most = status.and_then(|it| it["most"].as_u64());
    let mut all = vec![how_many(&plan, most, config.strict)];
    let loss = match config.strict {
        true => Grade::Problem,
        false => Grade::Warning,
    };
    for left in &plan.left_out {
        let grade = match left.reason {
            Reason::Excluded(_) | Reason::Elsewhere => Grade::Ok,
            Reason::Broken(_)
            | Reason::Unreachable(_)
            | Reason::Busy(_)
            | Reason::Stalled(_)
            | Reason::TurnedReadOnly => loss,
            Reason::MadeReadOnly => Grade::Warning,
            Reason::ReadOnly | Reason::NoBlockDevice => continue,
        };
        let text = format!("{} is left out: {}", left.file_system, left.reason);
        all.push(finding(FILE_SYSTEMS, grade, text));
    }
    for unseen in &plan.unseen {
        all.push(finding(FILE_SYSTEMS, loss, unseen.to_string()));
    }
    let given_up = status.map(|it| given_up(it, &plan)).unwrap_or_default();
    for text in given_up {
        all.push(finding(FILE_SYSTEMS, loss, text));
    }
    for synced in plan.only_synced() {
        let grade = match loss {
            Grade::Warning if is_of_the_firmware(synced) => Grade::Ok,
            loss => loss,
        };
        let text = format!("{synced} has no means to freeze and is synced");
        all.push(finding(FILE_SYSTEMS, grade, text));
    }
    let devices = plan.waves.iter().flatten().flat_map(FileSystem::may_be_on);
    let devices = devices.copied().collect();
    for layer in Layers::of(&topology::all_below(&devices), &devices).at_work() {
        let text = format!("{layer}, which no freeze holds back");
        all.push(finding(FILE_SYSTEMS, loss, text));
    }
    all.extend(not_counting(&plan, &writes::not_counting));
    all.extend(raw_writers(&plan));
    all.extend(elsewhere(&plan));
    for rule in config.idle_rules(&plan) {
        all.push(finding(FILE_SYSTEMS, Grade::Warning, rule.to_string()));
    }
    all
}

/// What the daemon knows to hang, but for what the plan has left out already.
fn given_up(status: &Value, plan: &Plan) -> Vec<String> {
    let names = plan.left_out.iter().map(|it| it.file_system.to_string());
    let names: Vec<String> = names.collect();
    let all = status["given_up"].as_array().into_iter().flatten();
    let all = all.filter_map(Value::as_str);
    let all = all.filter(|it| !names.iter().any(|name| it.starts_with(name)));
    all.map(|it| format!("{it}; backups are without it"))
        .collect()
}

/// How many file systems are to be frozen or synced, of which the module is handed no more than `most`.
fn how_many(plan: &Plan, most: Option<u64>, is_strict: bool) -> Finding {
    let count = plan.waves.iter().flatten().chain(&plan.synced).count();
    let members = plan.waves.iter().flatten();
    let frozen = members.filter(|it| it.has_means_to_freeze()).count();
    let losses = plan.losses().count() + plan.unseen.len();
    let is_of_anything = is_of_anything(frozen, losses, is_strict);
    let (grade, text) = match is_of_anything {
        _ if most.is_some_and(|most| count as u64 > most) => (
            Grade::Problem,
            format!(
                "{count} are to be frozen, and the module holds no more than {}: leave some out, or use \
                 the stock hv_utils",
                most.unwrap_or_default()
            ),
        ),
        Err(error) => (Grade::Problem, words(&error)),
        Ok(false) => (Grade::Warning, "there is nothing to freeze".into()),
        Ok(true) => {
            let waves = plan.waves.len();
            (
                Grade::Ok,
                format!("{count} are to be frozen, or synced if one cannot, in {waves} waves"),
            )
        }
    };
    finding(FILE_SYSTEMS, grade, text)
}

/// File systems that are frozen here and are in no snapshot of the host: their disks are on the network, or a
/// program serves them.
fn elsewhere(plan: &Plan) -> Vec<Finding> {
    let all = plan.waves.iter().flatten();
    let found = all.filter_map(|it| {
        let disks = it.disks.iter().filter_map(|dev| plan.disks.get(dev));
        let names: Vec<&str> = disks
            .filter(|disk| disk.served)
            .map(|disk| disk.name.as_str())
            .collect();
        (!names.is_empty()).then(|| {
            let text = format!(
                "{it} is on {}, which the host does not give (nbd, iSCSI, NVMe over fabrics, rbd, drbd and \
                 their like): it is frozen, and in no snapshot of the host",
                names.join(", ")
            );
            finding("disks", Grade::Warning, text)
        })
    });
    found.collect()
}

/// Whether it is what UEFI starts the machine from. Each such machine has one, and it is written when a boot
/// loader is put there: nothing to warn of at each check.
fn is_of_the_firmware(file_system: &FileSystem) -> bool {
    const PLACES: [&str; 3] = ["/boot/efi", "/efi", "/boot"];
    let mut places = file_system.places.iter();
    let is_there = places.any(|it| PLACES.iter().any(|place| it.path == Path::new(place)));
    file_system.fs_type == "vfat" && is_there
}

/// Devices of the host whose counters do not tell what is written there.
fn not_counting(plan: &Plan, of: &dyn Fn(BTreeSet<DevId>) -> BTreeSet<DevId>) -> Option<Finding> {
    let at_rest = plan.at_rest(&Scope::default());
    let off = of(at_rest.counted());
    let watched = AtRest {
        unwatched: BTreeMap::new(),
        ..at_rest
    };
    let off = watched.but(&off).unwatched.into_keys();
    let names: Vec<String> = off.map(|it| it.to_string()).collect();
    (!names.is_empty()).then(|| {
        let text = format!(
            "{}: {}; what is written there in a backup, past file systems or by whoever thaws one for a moment, is not \
             seen",
            names.join(", "),
            ground::NOT_COUNTED
        );
        finding("disks", Grade::Warning, text)
    })
}

/// What there is to say of whoever has a disk open to write there: by its own node, or by one that takes SCSI commands,
/// which the block layer does not count.
const IS_SEEN: &str = "no freeze holds that back, and if anything is written in a backup it is named, and fails it if \
                       strict";
const IS_NOT_SEEN: &str =
    "no freeze holds that back, and what is written in a backup by SCSI commands is not seen";

/// Programs that may write to a disk past its file systems, where a backup would name that, or cannot.
fn raw_writers(plan: &Plan) -> Vec<Finding> {
    let at_rest = plan.at_rest(&Scope::default());
    let mut devices: BTreeSet<DevId> = at_rest
        .watched
        .keys()
        .flat_map(|it| match it.without.is_empty() {
            true => topology::all_above(it.dev),
            false => BTreeSet::from([it.dev]),
        })
        .collect();
    devices.retain(|dev| !at_rest.watched.values().any(|it| it.contains(dev)));
    // A program may serve these, and they are named already.
    for synced in plan.only_synced() {
        devices.retain(|dev| !synced.devices.contains(dev));
    }
    let is_of_host =
        |dev: &DevId| matches!(plan.disks.get(dev), Some(disk) if disk.address.is_some());
    let what = |node: &Path| {
        if let Some(dev) = topology::device_at(node.as_os_str()) {
            return devices.contains(&dev).then_some(IS_SEEN);
        }
        let meta = fs::metadata(node).ok()?;
        let is_character_device = meta.file_type().is_char_device();
        let dev = is_character_device.then(|| DevId::from_raw(meta.rdev()))?;
        let disk = disk_of(Path::new(CHARACTER_DEVICES), dev);
        disk.filter(is_of_host).map(|_| IS_NOT_SEEN)
    };
    let words = |found: String| finding("disks", Grade::Warning, found);
    open_for_writing(what).into_iter().map(words).collect()
}

/// The folders of character devices in sysfs.
const CHARACTER_DEVICES: &str = "/sys/dev/char";

/// The disk that takes the SCSI commands which are written to this character device (`sg`, `bsg`).
fn disk_of(character_devices: &Path, dev: DevId) -> Option<DevId> {
    let device = character_devices.join(dev.to_string());
    let disks = fs::read_dir(device.join("device/block")).ok()?;
    disks.flatten().find_map(|it| dev_in(&it.path()))
}

/// Who has which node open to write there, in words, of those of which there is something to say: that is put behind.
/// Only links are read, and what they name is looked up in `/dev` only.
fn open_for_writing(what: impl Fn(&Path) -> Option<&'static str>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|it| it.parse::<u32>().ok()) else {
            continue;
        };
        let path = process.path();
        let opened = fs::read_dir(path.join("fd")).into_iter().flatten();
        for fd in opened.flatten() {
            let Ok(node) = fs::read_link(fd.path()) else {
                continue;
            };
            let what = node.starts_with("/dev").then(|| what(&node));
            let Some(what) = what.flatten() else {
                continue;
            };
            let info = path.join("fdinfo").join(fd.file_name());
            if fs::read_to_string(info).is_ok_and(|text| is_for_writing(&text)) {
                let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
                let (name, node) = (name.trim().escape_debug(), node.display());
                found.insert(format!(
                    "{name} (process {pid}) has {node} open for writing: {what}"
                ));
            }
        }
    }
    found
}

/// Whether what `/proc/<pid>/fdinfo/<fd>` says is of what was opened for writing.
fn is_for_writing(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|it| it.strip_prefix("flags:"));
    let flags = flags.and_then(|it| i32::from_str_radix(it.trim(), 8).ok());
    flags.is_some_and(|it| it & libc::O_ACCMODE != libc::O_RDONLY)
}

fn hooks_found(config: &Config) -> Vec<Finding> {
    let Asked {
        hooks: found,
        not_called,
    } = match hooks::find(&config.hooks) {
        Ok(asked) => asked,
        Err(error) => return vec![finding("hooks", Grade::Problem, words(&error))],
    };
    let look = |it: hooks::Found| {
        let path = it.hook.path.display();
        let fault = it.fault.map(|fault| format!("is not run: {fault}"));
        let fault = fault.or_else(|| Some(format!("cannot be run: {}", it.hook.cannot_be_run()?)));
        match (fault, it.required) {
            (None, true) => finding("hooks", Grade::Ok, format!("{path}, required")),
            (None, false) => finding("hooks", Grade::Ok, format!("{path}, optional")),
            (Some(fault), required) => {
                let grade = match required {
                    true => Grade::Problem,
                    false => Grade::Warning,
                };
                finding("hooks", grade, format!("{path} {fault}"))
            }
        }
    };
    let called = found.iter().map(|it| &it.hook);
    let there = called.chain(not_called.iter().filter_map(|it| it.hook.as_ref()));
    let there: Vec<hooks::Hook> = there.cloned().collect();
    let mut warnings = hooks::ready(&config.hooks);
    let idle = config.hooks.idle(&there).into_iter();
    warnings.extend(idle.map(|rule| format!("the rule {rule} matches no hook")));
    let not_called = not_called.into_iter().map(|it| {
        let grade = match config.strict && it.required {
            true => Grade::Problem,
            false => Grade::Warning,
        };
        finding("hooks", grade, it.text)
    });
    let mut all: Vec<Finding> = found.into_iter().map(look).collect();
    all.extend(not_called);
    let warning = |text| finding("hooks", Grade::Warning, text);
    all.extend(warnings.into_iter().map(warning));
    all
}

/// A kernel that panics when a writer waits for long.
pub fn hung_task(config: &Config) -> Option<Finding> {
    let number = |name: &str| {
        let text = fs::read_to_string(Path::new("/proc/sys/kernel").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let (panics, after) = (
        number("hung_task_panic")?,
        number("hung_task_timeout_secs")?,
    );
    let deadline = config.deadline.as_secs();
    (panics != 0 && after != 0 && after <= deadline).then(|| {
        let text = format!(
            "kernel.hung_task_panic is set and who writes may wait for {deadline} s (deadline): the \
             machine panics after {after} s (kernel.hung_task_timeout_secs)"
        );
        finding("kernel", Grade::Warning, text)
    })
}

/// Programs that are asked about each open, and may write before they answer.
fn fanotify() -> Option<Finding> {
    let mut names = BTreeSet::new();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let path = process.path();
        let Ok(infos) = fs::read_dir(path.join("fdinfo")) else {
            continue;
        };
        let asks = |it: fs::DirEntry| {
            fs::read_to_string(it.path()).is_ok_and(|text| asks_for_permission(&text))
        };
        if infos.flatten().any(asks) {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            names.insert(name.trim().escape_debug().to_string());
        }
    }
    let names: Vec<String> = names.into_iter().collect();
    (!names.is_empty()).then(|| {
        let text = format!(
            "{} is asked about every open (fanotify): if it writes to a frozen disk before it answers, \
             all who open files wait",
            names.join(", ")
        );
        finding("fanotify", Grade::Warning, text)
    })
}

/// Whether what `/proc/<pid>/fdinfo/<fd>` says is of a group that is asked for permission: a mark has one
/// of `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS` of `linux/fanotify.h`.
fn asks_for_permission(fdinfo: &str) -> bool {
    const PERMISSION: u64 = 0x1_0000 | 0x2_0000 | 0x4_0000 | 0x10_0000;
    let marks = fdinfo.lines().filter(|it| it.starts_with("fanotify "));
    let masks = marks.filter_map(|line| {
        let mask = line.split(' ').find_map(|it| it.strip_prefix("mask:"))?;
        u64::from_str_radix(mask, 16).ok()
    });
    masks.into_iter().any(|mask| mask & PERMISSION != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::{HookRecord, Lack, Owed};
    use crate::plan::{LeftOut, Place};
    use crate::record::Entry;

    #[test]
    fn a_group_that_is_asked_for_permission_is_told_from_one_that_only_hears() {
        let group = "pos:\t0\nflags:\t02\nfanotify flags:10 event-flags:8000\n";
        let hears = "fanotify ino:2 sdev:800001 mflags:0 mask:8 ignored_mask:0 fhandle-bytes:8\n";
        let asks = "fanotify mnt_id:1d mflags:0 mask:10001 ignored_mask:40000000\n";
        assert!(!asks_for_permission(group));
        assert!(!asks_for_permission(&format!("{group}{hears}")));
        assert!(asks_for_permission(&format!("{group}{hears}{asks}")));
        let early = "fanotify mnt_id:1d mflags:0 mask:100000 ignored_mask:0\n";
        assert!(asks_for_permission(early));
        let ignored = "fanotify mnt_id:1d mflags:0 mask:8 ignored_mask:10000\n";
        assert!(!asks_for_permission(ignored));
    }

    #[test]
    fn whoever_has_a_node_open_for_writing_is_named() {
        // Nobody else in here has it open.
        let node = Path::new("/dev/full");
        let who = || {
            let pid = std::process::id();
            let own = format!("(process {pid}) has /dev/full open for writing: it is");
            let found = open_for_writing(|it| (it == node).then_some("it is"));
            found.iter().any(|it| it.ends_with(&own))
        };
        let reads = fs::File::open(node).unwrap();
        assert!(!who());
        let writes = fs::OpenOptions::new().write(true).open(node).unwrap();
        assert!(who());
        drop((reads, writes));
        assert!(!who());
        assert!(is_for_writing("pos:\t0\nflags:\t0100002\nmnt_id:\t15\n"));
        // Only its path (O_PATH) is open.
        assert!(!is_for_writing("pos:\t0\nflags:\t012100000\n"));
    }

    #[test]
    fn a_node_that_takes_scsi_commands_is_of_a_disk() {
        let dir = std::env::temp_dir().join(format!("hv-vss-char-{}", std::process::id()));
        let disk = dir.join("21:1/device/block/sdb");
        fs::create_dir_all(&disk).unwrap();
        fs::write(disk.join("dev"), "8:16\n").unwrap();
        // A tape.
        fs::create_dir_all(dir.join("21:2/device/scsi_tape")).unwrap();
        let disk_at = |text: &str| disk_of(&dir, text.parse().unwrap());
        assert_eq!(disk_at("21:1"), "8:16".parse().ok());
        assert_eq!(disk_at("21:2"), None);
        assert_eq!(disk_at("1:3"), None);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_device_that_is_there_is_no_trouble_and_one_that_is_not_is_explained() {
        assert_eq!(why_no_device(Path::new("/dev/null")), None);
        let why = why_no_device(Path::new("/dev/vmbus/none at all")).unwrap();
        assert!(why.starts_with("no /dev/vmbus/none at all: "), "{why}");

        let bus = std::env::temp_dir().join(format!("hv-vss-bus-{}", std::process::id()));
        let says = |part: &str| {
            let why = why_not_on(&bus, Path::new("/dev/vmbus/none at all")).unwrap();
            assert!(why.contains(part), "{why}");
        };
        says("this is not a guest of Hyper-V");
        let device = |name: &str, class: &str| {
            fs::create_dir_all(bus.join(name)).unwrap();
            fs::write(bus.join(name).join("class_id"), class).unwrap();
        };
        device("heartbeat", "{57164f39-9115-4e78-ab55-382f3bd5422d}\n");
        says("the host does not offer it: switch on");
        device("vss", &format!("{VSS_CLASS}\n"));
        says("no driver is loaded: modprobe");
        std::os::unix::fs::symlink("/bus/drivers/other", bus.join("vss/driver")).unwrap();
        says("the driver other has it");
        fs::remove_dir_all(&bus).unwrap();
    }

    #[test]
    fn a_module_that_was_asked_for_and_is_not_there_is_explained_by_the_newest_package() {
        let dir = std::env::temp_dir().join(format!("hv-vss-sources-{}", std::process::id()));
        assert_eq!(newest_build(&dir), None);
        for version in ["0.9.0", "0.10.0", "0.2.0"] {
            let folder = dir.join(format!("hv_vss-{version}")).join("kmod/dkms");
            fs::create_dir_all(&folder).unwrap();
            let says = format!("#!/bin/sh\necho \"{version} $*: 'its' headers are missing\"\n");
            fs::write(folder.join("build"), says).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(folder.join("build"), mode).unwrap();
        }
        // Of which nothing but a part is left.
        fs::create_dir_all(dir.join("hv_vss-1.0.0")).unwrap();
        let build = newest_build(&dir).unwrap();
        assert_eq!(
            why_missed(Some(&build), "7.3.4", || Ok(false), Loading::default),
            "0.10.0 --why-not 7.3.4: 'its' headers are missing"
        );
        let built = why_missed(Some(&build), "7.3.4", || Ok(true), Loading::default);
        assert!(built.contains("hv_vss_hand_over take"), "{built}");
        let unknown = || Err("modinfo cannot be started".into());
        let unknown = why_missed(Some(&build), "7.3.4", unknown, Loading::default);
        assert!(unknown.contains("is not known: modinfo"), "{unknown}");
        fs::write(&build, "#!/bin/sh\n").unwrap();
        let nothing = why_missed(Some(&build), "7.3.4", || Ok(false), Loading::default);
        assert!(nothing.contains("not built for kernel 7.3.4"), "{nothing}");
        let added = why_missed(None, "7.3.4", || Ok(false), Loading::default);
        assert!(
            added.contains("make install") && !added.contains("dkms"),
            "{added}"
        );
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_module_is_missed_where_the_stock_driver_has_the_device() {
        let dir = std::env::temp_dir().join(format!("hv-vss-missed-{}", std::process::id()));
        let (root, bus) = (dir.join("root"), dir.join("bus"));
        let package = root.join("usr/src/hv_vss-0.1/kmod/dkms");
        fs::create_dir_all(&package).unwrap();
        fs::write(package.join("build"), "").unwrap();
        let fifreeze = serde_json::json!({ "door": "fifreeze" });
        let is_missed = |status| module_missed(status, &root, &bus).is_some();
        fs::create_dir_all(bus.join("vss")).unwrap();
        assert!(!is_missed(None), "the host offers no device");
        fs::write(bus.join("vss/class_id"), VSS_CLASS).unwrap();
        assert!(!is_missed(None), "no driver is bound");
        for (driver, missed) in [("other", false), ("hv_vss", false), ("hv_utils", true)] {
            let link = bus.join("vss/driver");
            std::os::unix::fs::symlink(Path::new("/bus/drivers").join(driver), &link).unwrap();
            assert_eq!(is_missed(None), missed, "{driver}");
            assert_eq!(is_missed(Some(&fifreeze)), missed, "{driver}");
            fs::remove_file(link).unwrap();
        }
        // By `make install`, for another kernel perhaps.
        std::os::unix::fs::symlink("/bus/drivers/hv_utils", bus.join("vss/driver")).unwrap();
        fs::remove_dir_all(root.join("usr")).unwrap();
        let kernel = root.join("lib/modules/7.3.0-old");
        fs::create_dir_all(kernel.join("updates")).unwrap();
        assert!(!is_missed(None), "nobody has asked for it");
        fs::write(kernel.join("updates/hv_vss.ko"), "").unwrap();
        assert!(is_missed(None), "it is there for another kernel");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_stands_against_loading_is_told_apart() {
        let none = Loading {
            configuration: "blacklist hv_vss2\noptions hv_vss grace_ms=0\n".into(),
            command_line: "quiet modprobe.blacklist=floppy".into(),
            signer: "DKMS module signing key".into(),
            keys: "0c2 I------ 1 perm 1f030000 0 0 asymmetri Other: 0a: X509.rsa 0a []\n".into(),
            ..Loading::default()
        };
        let strict = Loading {
            is_strict: true,
            ..none.clone()
        };
        let known =
            "0c2 I------ 1 perm 1f030000 0 0 asymmetri DKMS module signing key: 1f: X509.rsa [] ";
        for (loading, word) in [
            (none.clone(), "hv_vss_hand_over take"),
            (strict.clone(), "that of DKMS module signing key: mokutil --import with"),
            (
                Loading {
                    of_dkms: Some(String::new()),
                    ..strict.clone()
                },
                "that of DKMS module signing key: mokutil --import /var/lib/dkms/mok.pub",
            ),
            (
                Loading {
                    signer: String::new(),
                    ..strict.clone()
                },
                "sign it with a key that the kernel knows",
            ),
            (
                Loading {
                    unknown: Some("modprobe cannot be started".into()),
                    ..strict.clone()
                },
                "why is not known: modprobe",
            ),
            (
                Loading {
                    keys: known.into(),
                    ..strict.clone()
                },
                "hv_vss_hand_over take",
            ),
            (
                Loading {
                    signer: String::new(),
                    of_dkms: Some(of_dkms(
                        Path::new("/usr/src/hv_vss-0.1.0/kmod/dkms/build"),
                        "7.3",
                    )),
                    ..strict.clone()
                },
                "(dkms build --force hv_vss/0.1.0 -k 7.3 && dkms install --force hv_vss/0.1.0 -k 7.3)",
            ),
            (
                Loading {
                    configuration: "alias a b\nblacklist hv-vss\n".into(),
                    ..strict
                },
                "modprobe --showconfig",
            ),
            (
                Loading {
                    command_line: "ro module_blacklist=floppy,hv_vss".into(),
                    ..none.clone()
                },
                "command line",
            ),
            (
                Loading {
                    is_closed: true,
                    ..none
                },
                "modules_disabled",
            ),
        ] {
            let why = loading.why_not();
            assert!(why.contains(word), "{why}: {loading:?}");
        }
    }

    #[test]
    fn what_keeps_the_unit_from_serving_after_the_next_boot_is_named() {
        use std::os::unix::fs::symlink;
        let dir = std::env::temp_dir().join(format!("hv-vss-boot-{}", std::process::id()));
        let wanted = dir.join(WANTED);
        fs::create_dir_all(&wanted).unwrap();
        let says = |words: &str| {
            let found = not_at_boot(&dir).unwrap();
            assert_eq!(found.grade, Grade::Warning);
            assert!(found.text.contains(words), "{}", found.text);
        };
        says("is not enabled");
        let unit = dir.join("unit");
        // A link that leads nowhere is none for systemd's condition either.
        symlink(&unit, wanted.join(UNIT)).unwrap();
        says("systemctl enable hv_vss");
        fs::write(unit, "").unwrap();
        assert_eq!(not_at_boot(&dir), None);
        symlink("/dev/null", dir.join(UNIT)).unwrap();
        says("systemctl unmask hv_vss");
        fs::remove_dir_all(&dir).unwrap();
        // It is how a daemon was started that tells whose that is.
        let own = serde_json::json!({ "pid": std::process::id() });
        assert_eq!(next_boot(&own), None);
        // What is judged by is what theirs are told to stay away by.
        let gives_way = include_str!("../give-way.conf");
        let condition = format!("\nConditionPathExists=|!{UNITS}/{WANTED}/{UNIT}\n");
        assert!(gives_way.contains(&condition));
        assert!(gives_way.contains(&format!("=|{UNITS}/{UNIT}\n")));
    }

    #[test]
    fn what_a_daemon_lacks_is_named() {
        let status = |capabilities: &str, seccomp: u8| {
            format!("Name:\tx\nCapEff:\t{capabilities}\nNoNewPrivs:\t0\nSeccomp:\t{seccomp}\n")
        };
        let all = "000001ffffffffff";
        let grades = |its: String| {
            let found = lacking(&its, &status(all, 0));
            found.iter().map(|it| it.grade).collect::<Vec<_>>()
        };
        assert_eq!(grades(status(all, 0)), []);
        let without = "000001ffffdfffff";
        assert_eq!(grades(status(without, 0)), [Grade::Problem]);
        let without = "000001fffffffffd";
        let (less, both) = (status(without, 0), status(without, 2));
        assert_eq!(grades(less.clone()), [Grade::Warning]);
        let text = &lacking(&less, &status(all, 0))[0].text;
        assert!(text.contains("--decode=0000000000000002"), "{text}");
        assert_eq!(grades(both), [Grade::Warning, Grade::Warning]);
        // In a container nobody has more.
        assert_eq!(lacking(&less, &less), []);
    }

    fn dev(minor: u32) -> DevId {
        DevId { major: 43, minor }
    }

    fn on(place: &str, disks: &[u32]) -> FileSystem {
        FileSystem {
            dev: dev(7),
            fs_type: "ext4".into(),
            source: None,
            devices: Vec::new(),
            listed: None,
            disks: disks.iter().map(|it| dev(*it)).collect(),
            below: None,
            stands_on: None,
            perhaps_on: Vec::new(),
            places: vec![Place {
                namespace: 0,
                id: 1,
                path: place.into(),
                whole: true,
                subvolume: None,
                walkable: true,
                layers: None,
                hidden: false,
                was_at: None,
            }],
        }
    }

    #[test]
    fn more_file_systems_than_the_module_holds_are_a_problem() {
        let plan = Plan {
            waves: vec![vec![on("/a", &[0]), on("/b", &[0])], vec![on("/", &[0])]],
            ..Plan::default()
        };
        let grade = |plan: &Plan, most, is_strict| how_many(plan, most, is_strict).grade;
        for is_strict in [false, true] {
            let found = how_many(&plan, Some(2), is_strict);
            assert_eq!(found.grade, Grade::Problem);
            let words = "3 are to be frozen, and the module holds no more than 2";
            assert!(found.text.contains(words), "{}", found.text);
            assert_eq!(grade(&plan, Some(3), is_strict), Grade::Ok);
            // It is not the module that freezes.
            assert_eq!(grade(&plan, None, is_strict), Grade::Ok);
        }
        // What is only synced is handed to it as well.
        let synced = Plan {
            synced: vec![on("/net", &[])],
            ..plan
        };
        assert_eq!(grade(&synced, Some(3), false), Grade::Problem);
        let none = Plan::default();
        assert_eq!(grade(&none, Some(2), false), Grade::Warning);
        assert_eq!(grade(&none, Some(2), true), Grade::Problem);
    }

    #[test]
    fn where_something_is_wrong_with_all_that_can_freeze_each_freeze_fails() {
        let lost = |reason| LeftOut {
            file_system: on("/", &[0]),
            reason,
        };
        let efi = || FileSystem {
            fs_type: "vfat".into(),
            ..on("/boot/efi", &[0])
        };
        let grade = |waves: Vec<FileSystem>, left_out: Vec<LeftOut>, is_strict| {
            let plan = Plan {
                waves: vec![waves],
                left_out,
                ..Plan::default()
            };
            how_many(&plan, None, is_strict).grade
        };
        let broken = || vec![lost(Reason::Broken("it has shut down".into()))];
        assert_eq!(grade(vec![efi()], broken(), false), Grade::Problem);
        assert_eq!(grade(vec![], broken(), false), Grade::Problem);
        assert_eq!(grade(vec![on("/", &[0])], broken(), false), Grade::Ok);
        // By a rule, or read-only as it was meant to be: then that is all there is.
        let excluded = || vec![lost(Reason::Excluded("a rule".into()))];
        assert_eq!(grade(vec![efi()], excluded(), false), Grade::Warning);
        assert_eq!(grade(vec![efi()], excluded(), true), Grade::Problem);
    }

    #[test]
    fn a_disk_whose_counters_are_off_is_named() {
        let watched = |minor, name: &str| ground::Watched {
            dev: dev(minor),
            name: name.into(),
            without: Vec::new(),
            instead: Vec::new(),
        };
        let disk = |minor, name: &str| ground::Disk {
            name: name.into(),
            address: Some(name.into()),
            served: false,
            watched: vec![watched(minor, name)],
        };
        let plan = Plan {
            disks: BTreeMap::from([(dev(0), disk(0, "sda")), (dev(16), disk(16, "sdb"))]),
            ..Plan::default()
        };
        assert_eq!(not_counting(&plan, &|_| BTreeSet::new()), None);
        let found = not_counting(&plan, &|_| BTreeSet::from([dev(16)])).unwrap();
        assert_eq!(found.grade, Grade::Warning);
        let words = "/dev/sdb: its counters are off";
        assert!(found.text.starts_with(words), "{}", found.text);
    }

    #[test]
    fn what_the_daemon_knows_to_hang_is_named_once() {
        let plan = Plan {
            left_out: vec![LeftOut {
                file_system: on("/known", &[0]),
                reason: Reason::TurnedReadOnly,
            }],
            ..Plan::default()
        };
        let known = format!("{}: it hangs", plan.left_out[0].file_system);
        let status = serde_json::json!({ "given_up": [known, "/other (ext4, 8:9): it hangs"] });
        let named = given_up(&status, &plan);
        assert_eq!(
            named,
            ["/other (ext4, 8:9): it hangs; backups are without it"]
        );
        // One of another version may not say so.
        assert!(given_up(&serde_json::json!({}), &plan).is_empty());
    }

    #[test]
    fn what_is_on_a_disk_from_elsewhere_is_named_with_it() {
        let disk = |name: &str, served| crate::ground::Disk {
            name: name.into(),
            address: None,
            served,
            watched: Vec::new(),
        };
        let plan = Plan {
            waves: vec![vec![on("/far", &[0, 1]), on("/near", &[1])]],
            disks: [(dev(0), disk("nbd0", true)), (dev(1), disk("ram1", false))].into(),
            ..Plan::default()
        };
        let [found] = &elsewhere(&plan)[..] else {
            panic!("{:?}", elsewhere(&plan));
        };
        let words =
            found.text.starts_with("/far (ext4") && found.text.contains("is on nbd0, which");
        assert!(words, "{}", found.text);
    }

    #[test]
    fn whoever_has_the_device_is_named() {
        let dir = std::env::temp_dir().join(format!("hv-vss-device-{}", std::process::id()));
        assert_eq!(who_has(&dir), None);
        let file = fs::File::create(&dir).unwrap();
        let who = who_has(&dir).unwrap();
        let program = std::env::current_exe().unwrap();
        let (pid, program) = (std::process::id(), program.display());
        assert!(
            who.ends_with(&format!(" (process {pid}, {program})")),
            "{who}"
        );
        drop(file);
        fs::remove_file(&dir).unwrap();
    }

    #[test]
    fn who_has_the_device_that_a_daemon_waits_for_is_named() {
        let path = std::env::temp_dir().join(format!("hv-vss-waits-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        let waits = serde_json::json!({ "door": null, "doing": "another program serves it" });
        let own = format!("(process {}, ", std::process::id());
        let nobody = Err(ControlError::Nobody);
        let says = |status, all: &[&str]| {
            let found = daemon(&path, &status);
            let has_all = all.iter().all(|it| found.text.contains(it));
            assert!(has_all && found.grade == Grade::Problem, "{}", found.text);
        };
        says(Ok(waits.clone()), &["waits: another program", &own]);
        says(
            nobody,
            &["no daemon of ours serves", &own, "systemctl start"],
        );
        drop(file);
        assert!(!daemon(&path, &Ok(waits)).text.contains(&own));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_daemon_that_refuses_each_freeze_is_a_problem() {
        let device = Path::new("/dev/null");
        let mut reply =
            serde_json::json!({ "phase": "ending", "door": "fifreeze", "refuses": null });
        assert_eq!(daemon(device, &Ok(reply.clone())).grade, Grade::Ok);
        reply["refuses"] = "called off, still inside the freeze of /srv".into();
        let found = daemon(device, &Ok(reply));
        assert_eq!(found.grade, Grade::Problem);
        assert!(found.text.ends_with("the freeze of /srv"), "{}", found.text);
    }

    #[test]
    fn a_record_of_hooks_that_was_put_aside_is_named() {
        let dir = std::env::temp_dir().join(format!("hv-vss-aside-{}", std::process::id()));
        let run = RunDir::new(&dir);
        assert_eq!(run_dir(&run, Room::default(), true), []);
        fs::create_dir_all(&dir).unwrap();
        fs::write(run.hooks_aside(), "{").unwrap();
        let found = run_dir(&run, Room::default(), true);
        let is_it = |it: &Finding| it.grade == Grade::Warning && it.text.contains("hooks.json.bad");
        assert!(found.iter().any(is_it), "{found:?}");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_a_dead_process_has_left_is_named_and_what_a_living_one_has_is_not() {
        let dir = std::env::temp_dir().join(format!("hv-vss-dead-{}", std::process::id()));
        let run = RunDir::new(&dir);
        let mut dead = Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let lock = run.lock().unwrap();
        let own = std::process::id();
        let lack = Lack {
            since_s: 7,
            why: "it is away".into(),
        };
        for (pid, lacks, found) in [
            (dead.id(), None, 2),
            (dead.id(), Some(lack.clone()), 2),
            (own, None, 0),
            (own, Some(lack), 1),
        ] {
            let is_tried = lacks.is_some();
            let entry = Entry {
                dev: dev(1),
                devices: Vec::new(),
                name: "/srv (ext4, 43:1)".into(),
            };
            let record = Record {
                pid,
                frozen: vec![entry],
                ..Record::default()
            };
            run.write(&record, &lock).unwrap();
            let hooks = HookRecord {
                pid,
                owed: vec![Owed {
                    hook: hooks::Hook {
                        path: "/etc/hv_vss/hooks.d/10-a".into(),
                        contract: hooks::Contract::Qemu,
                    },
                    process: None,
                    thaws_since_s: None,
                    lacks,
                }],
                ..HookRecord::default()
            };
            run.write_hooks(&hooks).unwrap();
            let all = left_behind(&run);
            assert_eq!(all.len(), found, "{all:?}");
            let says = |words: &str| all.iter().any(|it| it.text.starts_with(words));
            assert_eq!(
                says("/srv (ext4, 43:1) may be frozen"),
                found > 1,
                "{all:?}"
            );
            assert_eq!(says("hook 10-a is not"), found > 0, "{all:?}");
            let why = says("hook 10-a is not let go yet: it is away");
            assert_eq!(why, is_tried, "{all:?}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn where_no_room_is_left_for_a_record_each_freeze_fails() {
        let dir = std::env::temp_dir().join(format!("hv-vss-room-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let grade = |bytes, files, is_needed| {
            let found = run_dir(&run, Room { bytes, files }, is_needed);
            let found = found.iter().find(|it| it.text.contains("no room"));
            found.map(|it| it.grade)
        };
        assert_eq!(grade(None, None, true), None);
        assert_eq!(grade(Some(1 << 20), Some(100), true), None);
        assert_eq!(grade(Some(4096), Some(100), true), Some(Grade::Problem));
        assert_eq!(grade(Some(1 << 20), Some(1), true), Some(Grade::Problem));
        assert_eq!(grade(None, Some(0), true), Some(Grade::Problem));
        assert_eq!(grade(Some(0), None, false), Some(Grade::Warning));
        fs::remove_dir_all(&dir).unwrap();
        // As a tmpfs without a limit.
        let endless = Room::left_at(Path::new("/proc"));
        assert!(endless.bytes.is_none() && !endless.is_short());
    }

    #[test]
    fn what_the_daemon_goes_by_is_judged_and_a_file_that_has_changed_is_named() {
        let dir = std::env::temp_dir().join(format!("hv-vss-in-force-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("other.toml");
        fs::write(&file, "strict = true").unwrap();
        let read = Config::load_in_time(Some(&file)).unwrap();
        let its = serde_json::json!({
            "path": file,
            "in_force": read.to_value(),
        });
        let judged = |path: Option<&Path>| {
            let (config, found) = configuration(path, Some(&its));
            (config.strict, found.grade, found.text)
        };
        assert_eq!(judged(None), (true, Grade::Ok, "valid".into()));
        assert_eq!(judged(Some(&file)).1, Grade::Ok);
        fs::write(&file, "strict = false").unwrap();
        let (strict, grade, text) = judged(None);
        assert!(strict && grade == Grade::Warning, "{text}");
        assert!(text.contains("systemctl reload hv_vss"), "{text}");
        // Who asks for that file hears of that file.
        let (strict, grade, text) = judged(Some(&file));
        assert!(!strict && grade == Grade::Warning, "{text}");
        fs::write(&file, "strict = x").unwrap();
        let (strict, grade, text) = judged(None);
        assert!(strict && grade == Grade::Warning, "{text}");
        let says = text.contains("line 1, column 10") && text.contains("the next start fails");
        assert!(says, "{text}");
        assert_eq!(judged(Some(&file)).1, Grade::Problem);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn an_invalid_configuration_is_a_problem_and_the_rest_is_looked_at_all_the_same() {
        let run = RunDir::new("/dev/null/run");
        let path = Path::new("/dev/null/no.toml");
        let all = check(Path::new("/dev/null/none"), &run, Some(path));
        let grade = |what| all.iter().find(|it| it.what == what).map(|it| it.grade);
        assert_eq!(grade("configuration"), Some(Grade::Problem));
        assert_eq!(grade("daemon"), Some(Grade::Problem));
        assert!(grade("file systems").is_some());
    }
}
