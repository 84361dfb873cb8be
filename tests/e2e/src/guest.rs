// SPDX-License-Identifier: GPL-2.0-only

//! One running guest, with the verbs that cases are written in.
//!
//! Every verb does one visible thing (load this module, run this line, start that daemon) and
//! reports an error that says what was seen; none of them checks what a case is about. What a
//! guest must look like between two cases stands in [`Guest::tidy`].

use crate::agent::{Agent, CallError, Pending};
use crate::known;
use anyhow::{bail, ensure, Context, Result};
use hyperv_sim::ic::vss::Vss;
use hyperv_sim::storage::{Controller, Disk, Image};
use hyperv_sim::{Guid, Host, Profile, Vm, VmConfig, VmbusVersion};
use lab_agent::{
    to_hex, Command, Ended, Frozen, Log, Neighbour, Piece, Put, Record, Share, Stalls, Storm,
    Writer,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For one step that takes milliseconds on real hardware: emulation is slow and uneven.
pub const STEP: Duration = Duration::from_secs(30);

/// How long a guest may take to boot at most.
const BOOT: Duration = Duration::from_secs(300);

/// Where the device of both modules is.
pub const DEVICE: &str = "/dev/vmbus/hv_vss";

/// What brings a guest back to how it was, in its shell.
const TIDY: &str = include_str!("tidy.sh");

/// What runs in a guest above the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Userland {
    /// The lab's own process 1, with nothing beside the agent.
    Lab,
    /// The same with the servers of MariaDB and PostgreSQL, and a fresh data folder of each in `/srv`.
    Databases,
    /// The same with the tools of LVM, md and LUKS, and fio.
    Volumes,
    /// Debian's systemd, journald, udev and rsyslog, with what `make install` puts in place.
    Systemd,
    /// The same Debian with nothing of ours; the packages lie in `/payload/packages`.
    Debian,
    /// The same beside whose packages there is the disk of a server of MariaDB, for the host to attach: `mariadb.ext4` in the
    /// payload.
    DebianAndServer,
    /// The Debian with all packages installed before it boots.
    Packages,
}

/// The disk of a server, in the payload.
const SERVER: &str = "mariadb.ext4";

impl Userland {
    /// The archives that make it up, in the payload. Those of our own programs are made there.
    fn archives(self) -> &'static [&'static str] {
        match self {
            Userland::Lab => &["guest.cpio", "payload.cpio"],
            Userland::Databases => &["guest.cpio", "databases.cpio", "payload.cpio"],
            Userland::Volumes => &["guest.cpio", "volumes.cpio", "payload.cpio"],
            Userland::Systemd => &["systemd.cpio", "payload.cpio"],
            Userland::Debian | Userland::DebianAndServer | Userland::Packages => {
                &["systemd.cpio", "payload.cpio", "packages.cpio"]
            }
        }
    }

    /// Whether the packages lie in it.
    fn brings_packages(self) -> bool {
        self.archives().contains(&"packages.cpio")
    }

    /// What else of the payload it is for.
    fn images(self) -> &'static [&'static str] {
        match self {
            Userland::DebianAndServer => &[SERVER],
            _ => &[],
        }
    }
}

/// Where a guest has its root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Root {
    /// On a ram disk.
    Ram,
    /// On the first disk of the first SCSI controller: [`Guest::root_disk`].
    Scsi,
}

/// Which modules a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Modules {
    /// Any.
    Any,
    /// Those that are signed with a key that it knows, as its command line has it.
    Signed,
    /// The same, since the firmware enforces Secure Boot; the kernel is locked down, too.
    SecureBoot,
    /// The same, and the owner of the machine has enrolled DKMS's key.
    SecureBootWithKey,
}

/// What a guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Machine {
    /// Virtual CPUs: two, but for an exception.
    pub cpus: u8,
    /// Why it is one, if it is made for one: `e2e list` says so.
    pub one_cpu: Option<&'static str>,
    /// Memory in MiB. Ram disks take from it what is written to them, the root included.
    pub memory_mib: u32,
    /// Size of each ram disk of [`Userland::Lab`] in MiB, and of a root on a SCSI disk.
    pub disk_mib: u32,
    /// SCSI controllers, without disks until a case attaches some and loads the driver.
    pub scsi_controllers: u8,
    /// Whether the host has dynamic memory for it.
    pub balloon: bool,
    /// Where its root is.
    pub root: Root,
    /// What is booted.
    pub userland: Userland,
    /// Which modules its kernel takes.
    pub modules: Modules,
    /// Whether that is the one of the series before, from which a machine comes to the kernel under test.
    pub older_kernel: bool,
    /// What kind of host there is.
    pub host: Profile,
}

impl Machine {
    /// What nearly every case wants: as every guest of Hyper-V that anybody backs up it has more than one
    /// CPU.
    pub const TWO_CPUS: Machine = Machine {
        cpus: 2,
        one_cpu: None,
        memory_mib: 1280,
        // xfs wants 300 MiB at least.
        disk_mib: 320,
        scsi_controllers: 0,
        balloon: false,
        root: Root::Ram,
        userland: Userland::Lab,
        modules: Modules::Any,
        older_kernel: false,
        host: Profile::CURRENT,
    };
    /// The same with memory that the host can take.
    pub const BALLOON: Machine = Machine {
        balloon: true,
        ..Machine::TWO_CPUS
    };
    /// The same as the first with two SCSI controllers.
    pub const SCSI: Machine = Machine {
        scsi_controllers: 2,
        ..Machine::TWO_CPUS
    };
    /// The same with its root on a SCSI disk.
    pub const SCSI_ROOT: Machine = Machine {
        root: Root::Scsi,
        ..Machine::SCSI
    };
    /// Two SCSI controllers, with databases.
    pub const DATABASES: Machine = Machine {
        userland: Userland::Databases,
        memory_mib: 2048,
        ..Machine::SCSI
    };
    /// The same with the tools for volumes.
    pub const VOLUMES: Machine = Machine {
        userland: Userland::Volumes,
        ..Machine::DATABASES
    };
    /// A stock Debian, with its root on a SCSI disk.
    pub const SYSTEMD: Machine = Machine {
        userland: Userland::Systemd,
        scsi_controllers: 1,
        root: Root::Scsi,
        ..Machine::TWO_CPUS
    };
    /// The same without anything of ours, on a disk that outlives it.
    pub const DEBIAN: Machine = Machine {
        userland: Userland::Debian,
        ..Machine::SYSTEMD
    }
    .on_one_cpu(INSTALLS);
    /// The same beside a server whose disk the host has.
    pub const DEBIAN_AND_SERVER: Machine = Machine {
        userland: Userland::DebianAndServer,
        ..Machine::DEBIAN
    };
    /// The one before its kernel is upgraded.
    pub const OLDER_DEBIAN: Machine = Machine {
        older_kernel: true,
        ..Machine::DEBIAN
    };
    /// A stock Debian with our packages.
    pub const PACKAGES: Machine = Machine {
        userland: Userland::Packages,
        scsi_controllers: 0,
        root: Root::Ram,
        ..Machine::DEBIAN
    };
    /// The same with a kernel that takes signed modules only.
    pub const SIGNED_PACKAGES: Machine = Machine {
        modules: Modules::Signed,
        ..Machine::PACKAGES
    };
    /// A stock Debian whose firmware enforces Secure Boot.
    pub const SECURE_BOOT: Machine = Machine {
        modules: Modules::SecureBoot,
        ..Machine::DEBIAN
    };
    /// The same, with DKMS's key enrolled.
    pub const SECURE_BOOT_WITH_KEY: Machine = Machine {
        modules: Modules::SecureBootWithKey,
        ..Machine::DEBIAN
    };
}

/// Why whatever installs packages has one CPU.
const INSTALLS: &str =
    "dpkg, DKMS and a compiler of one emulated processor gain nothing from a second";

impl Machine {
    /// The same with one CPU, and why.
    pub const fn on_one_cpu(self, why: &'static str) -> Machine {
        Machine {
            cpus: 1,
            one_cpu: Some(why),
            ..self
        }
    }

    /// The archives that it boots from, in the payload.
    pub fn archives(&self) -> impl Iterator<Item = &'static str> {
        let older = self.older_kernel.then_some("older.cpio");
        let archives = self.userland.archives().iter().copied();
        archives.chain(older)
    }

    /// Whatever has to be made for it: those, and images of disks.
    pub fn parts(&self) -> impl Iterator<Item = &'static str> {
        self.archives()
            .chain(self.userland.images().iter().copied())
    }

    /// Its kernel, likewise.
    fn kernel(&self) -> &'static str {
        match self.older_kernel {
            true => "vmlinuz.older",
            false => "vmlinuz",
        }
    }

    /// How long it takes to boot at most under emulation on a processor that has nothing else to do. All
    /// limits are made for that, and grow with what a boot takes.
    fn usual_boot(&self) -> Duration {
        Duration::from_secs(match self.userland {
            Userland::Lab => 25,
            Userland::Databases | Userland::Volumes => 40,
            Userland::Systemd
            | Userland::Debian
            | Userland::DebianAndServer
            | Userland::Packages => 60,
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.cpus == 1 { "" } else { "s" };
        write!(f, "{} CPU{plural}, {} MiB", self.cpus, self.memory_mib)?;
        if self.scsi_controllers > 0 {
            write!(f, ", {} SCSI controllers", self.scsi_controllers)?;
        }
        if self.root == Root::Scsi {
            f.write_str(", root on the first")?;
        }
        if self.balloon {
            f.write_str(", dynamic memory")?;
        }
        match self.userland {
            Userland::Lab => {}
            Userland::Databases => write!(f, ", databases")?,
            Userland::Volumes => write!(f, ", tools for volumes")?,
            Userland::Systemd => write!(f, ", systemd")?,
            Userland::Debian => write!(f, ", Debian")?,
            Userland::DebianAndServer => write!(f, ", Debian beside a server's disk")?,
            Userland::Packages => write!(f, ", Debian with our packages")?,
        }
        match self.modules {
            Modules::Any => {}
            Modules::Signed => f.write_str(", signed modules only")?,
            Modules::SecureBoot => f.write_str(", Secure Boot")?,
            Modules::SecureBootWithKey => f.write_str(", Secure Boot with DKMS's key")?,
        }
        if self.older_kernel {
            f.write_str(", the kernel before")?;
        }
        if self.host != Profile::CURRENT {
            write!(
                f,
                ", host {} with VMBus {}",
                self.host.name, self.host.vmbus
            )?;
        }
        Ok(())
    }
}

/// Which kernel module serves VSS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Module {
    /// `hv_vss.ko` of this project.
    Ours,
    /// `hv_utils` as Debian ships it.
    Stock,
}

/// Which daemon freezes the file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// `hv_vss_daemon` of this project.
    Ours,
    /// Debian's, of the package `hyperv-daemons`.
    Debian,
}

impl Daemon {
    /// The command that keeps it in the foreground.
    pub fn argv(self) -> [&'static str; 2] {
        match self {
            Daemon::Ours => ["/payload/hv_vss_daemon", "-n"],
            Daemon::Debian => ["/usr/sbin/hv_vss_daemon", "-n"],
        }
    }
}

/// A program that was started in the guest.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: i32,
    /// The file with its output.
    pub log: String,
}

/// What is needed to start guests: everything lies in the current directory, the payload.
#[derive(Clone)]
pub struct Images {
    payload: PathBuf,
    results: PathBuf,
    patience: f64,
    /// Whether our module is there: not every kernel takes it.
    has_module: bool,
}

impl Images {
    /// The images in `payload`, with an archive of our own programs made beside them.
    pub fn prepare(payload: &Path) -> Result<Images> {
        let results = payload.join("results");
        std::fs::create_dir_all(&results)
            .with_context(|| format!("cannot make {}", results.display()))?;
        let extra = payload.join("payload.cpio");
        let file = std::fs::File::create(&extra)
            .with_context(|| format!("cannot write {}", extra.display()))?;
        let mut archive = crate::cpio::Archive::new(std::io::BufWriter::new(file));
        archive.directory("payload")?;
        let has_module = payload.join("hv_vss.ko").exists();
        let module = has_module.then_some("hv_vss.ko");
        let programs = [
            "lab-agent",
            "hv_vss_daemon",
            "hv_vss_example",
            "hv_vss_example_32",
        ];
        for name in programs.into_iter().chain(module) {
            let path = payload.join(name);
            let bytes = std::fs::read(&path).with_context(|| {
                format!(
                    "cannot read {}; the payload is put together by tests/lab/run.sh",
                    path.display()
                )
            })?;
            archive.file(&format!("payload/{name}"), &bytes)?;
        }
        archive.file("payload/tidy", TIDY.as_bytes())?;
        let install = payload.join("install");
        if install.exists() {
            archive
                .tree("payload/install", &install)
                .with_context(|| format!("cannot read {}", install.display()))?;
        }
        archive.finish()?;
        let packages = payload.join("packages");
        if packages.exists() {
            let extra = payload.join("packages.cpio");
            let file = std::fs::File::create(&extra)
                .with_context(|| format!("cannot write {}", extra.display()))?;
            let mut archive = crate::cpio::Archive::new(std::io::BufWriter::new(file));
            archive.directory("payload")?;
            archive
                .tree("payload/packages", &packages)
                .with_context(|| format!("cannot read {}", packages.display()))?;
            archive.finish()?;
        }
        Ok(Images {
            payload: payload.to_owned(),
            results,
            patience: 1.0,
            has_module,
        })
    }

    /// The same with a kernel that is so many times slower than a stock one.
    pub fn with_patience(self, patience: u32) -> Images {
        let patience = f64::from(patience);
        Images { patience, ..self }
    }

    /// What makes up the initial RAM file system, one archive after the other.
    fn initrd(&self, machine: Machine) -> Vec<PathBuf> {
        let archives = machine.archives();
        archives.map(|it| self.payload.join(it)).collect()
    }

    /// What it boots.
    fn kernel(&self, machine: Machine) -> PathBuf {
        self.payload.join(machine.kernel())
    }

    /// Whether our module is there.
    pub fn has_module(&self) -> bool {
        self.has_module
    }

    /// Where files for people go.
    pub fn results(&self) -> &Path {
        &self.results
    }
}

/// The kernel of a guest.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Kernel {
    /// As `uname -r` has it.
    pub release: String,
    /// Whether our module was there for it.
    pub takes_our_module: bool,
}

/// A guest in which no program answers, though it has not ended.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no program in the guest answers; its kernel {}\n{seen}", if *kernel_answers { "does" } else { "does not either" })]
pub struct Standstill {
    /// Whether its kernel does: then it is no dead machine.
    pub kernel_answers: bool,
    /// What is to be seen from outside.
    pub seen: String,
}

/// How long between two looks at a guest that stands still.
const APART: Duration = Duration::from_secs(1);

/// How long a guest that was told to may take to print where it is.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How much of that is shown.
const MOST_SAID: usize = 16 << 10;

impl Standstill {
    /// Looks at one. It ends by that, with the call trace of a processor on its console if that listens.
    fn of(vm: &Vm) -> Standstill {
        let heartbeat = vm.host().heartbeat();
        // Whatever is loaded: the kernel gives back a device that is taken away.
        heartbeat.rescind();
        let kernel_answers = heartbeat.wait_released(STEP / 6).is_ok();
        let mut seen = vm.look_inside();
        std::thread::sleep(APART);
        let before = vm.console();
        seen.push_str("a moment later:\n");
        seen.push_str(&vm.interrupt());
        // It is over either way.
        let _ = vm.wait_exit(LAST_WORDS);
        let after = vm.console();
        let said = after.strip_prefix(before.as_str()).unwrap_or_default();
        seen.push_str("what its console said to that:\n");
        seen.extend(said.chars().take(MOST_SAID));
        Standstill {
            kernel_answers,
            seen,
        }
    }
}

/// Whether anybody has looked at what a machine and its host have said, by the time it is let go of. Of the
/// machine that a case is given the runner does so, of each that it starts the case itself.
struct Judgement {
    is_there: AtomicBool,
    /// How many went without, of those that the case has started.
    missing: Arc<AtomicUsize>,
}

impl Judgement {
    fn of_runner() -> Judgement {
        Judgement {
            is_there: AtomicBool::new(true),
            missing: Arc::default(),
        }
    }

    fn of_case(&self) -> Judgement {
        Judgement {
            is_there: AtomicBool::new(false),
            missing: self.missing.clone(),
        }
    }
}

impl Drop for Judgement {
    fn drop(&mut self) {
        if !self.is_there.load(SeqCst) {
            self.missing.fetch_add(1, SeqCst);
        }
    }
}

/// A running guest.
pub struct Guest {
    vm: Arc<Vm>,
    agent: Agent,
    images: Images,
    machine: Machine,
    module: Module,
    kernel: Kernel,
    root_disk: Option<Disk>,
    /// How many times as long as usual it took to boot.
    slowness: f64,
    /// What [`Guest::work`] took then.
    pace: Duration,
    detectors: Detectors,
    /// The kernel's log is looked at from this record on.
    log_mark: AtomicU64,
    /// Its console from this byte on, once it has ended.
    console_mark: AtomicUsize,
    /// Whether the case has said that it ends it.
    is_to_end: AtomicBool,
    judgement: Judgement,
    /// The host's log is looked at from this moment of its clock on.
    host_mark: Mutex<Duration>,
    logs: AtomicU64,
    /// What is known of the files that programs write to.
    outputs: Mutex<BTreeMap<String, Piece>>,
    comparisons: Mutex<Vec<Comparison>>,
    cells: Mutex<Vec<Cell>>,
    /// See [`Guest::expect_in_log`].
    expected: Mutex<Vec<&'static str>>,
}

/// What ours and the peer did in the same situation: a row of the table `comparison`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Comparison {
    /// The situation.
    pub what: String,
    /// What our module and daemon did.
    pub ours: String,
    /// What the stock `hv_utils` and Debian's daemon did.
    pub peer: String,
}

/// What came of one fault at one stage of a backup: a cell of the table `matrix`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cell {
    /// What went wrong.
    pub fault: String,
    /// How far the backup had come.
    pub stage: String,
    /// Whose module and daemon.
    pub stack: String,
    /// What the host was told, when writers went on, how the next backup was.
    pub seen: String,
    /// How long after the fault the last writer went on that stood still.
    pub on_ms: Option<u64>,
}

impl Guest {
    /// Boots a guest and waits until its agent answers. `number` names its console log.
    pub fn start(images: &Images, machine: Machine, number: u32) -> Result<Guest> {
        Guest::boot(images, machine, &number.to_string(), Image::default())
    }

    /// Puts a file for people among the results.
    pub fn keep(&self, name: &str, text: &str) -> Result<()> {
        let path = self.images.results.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What this guest is started from: its kernel, and its initramfs.
    pub fn boot_files(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let read = |path: &Path| {
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
        };
        let mut initrd = Vec::new();
        for archive in self.images.initrd(self.machine) {
            initrd.extend(read(&archive)?);
            // Each begins at a multiple of four.
            initrd.resize(initrd.len().next_multiple_of(4), 0);
        }
        Ok((read(&self.images.kernel(self.machine))?, initrd))
    }

    /// Loads another kernel from files in the guest, with the command line that this one has.
    pub fn kexec_load(&self, kernel: &str, initrd: &str) -> Result<()> {
        let command = Command::KexecLoad {
            kernel: kernel.into(),
            initrd: initrd.into(),
            cmdline: self.read("/proc/cmdline")?.trim().into(),
        };
        Ok(self.agent.call(command, STEP * 4)?)
    }

    /// Starts that kernel as it is, and waits until its agent is there. Nothing is known of the guest any more.
    pub fn kexec(&self) -> Result<()> {
        self.check_log()?;
        self.agent.start(Command::Kexec)?;
        self.agent.wait_next(BOOT)?;
        Ok(self.mark_log()?)
    }

    /// Boots another guest of the kind that this one is, with this content on its root's disk.
    pub fn start_from(&self, root: Image) -> Result<Guest> {
        self.start_named("restored", root)
    }

    /// The same, of another kind.
    pub fn start_as(&self, machine: Machine, root: Image) -> Result<Guest> {
        self.start_other(machine, "restored", root)
    }

    /// The same, with a name of its own for its console's log.
    pub fn start_named(&self, name: &str, root: Image) -> Result<Guest> {
        self.start_other(self.machine, name, root)
    }

    fn start_other(&self, machine: Machine, name: &str, root: Image) -> Result<Guest> {
        let mut guest = Guest::boot(&self.images, machine, name, root)?;
        guest.expected().clone_from(&self.expected());
        guest.judgement = self.judgement.of_case();
        Ok(guest)
    }

    fn boot(images: &Images, machine: Machine, name: &str, root: Image) -> Result<Guest> {
        let mut config = VmConfig::new(images.kernel(machine));
        config.initrd = images.initrd(machine);
        config.cpus = machine.cpus;
        config.memory_mib = machine.memory_mib;
        config.host.patience = images.patience;
        config.host.scsi_controllers = machine.scsi_controllers;
        config.host.balloon = machine.balloon;
        // Its daemon, where that is installed, stays beside ours.
        config.host.kvp = machine.userland.brings_packages();
        config.host.profile = machine.host;
        // An oops ends the guest at once, so that it is reported where it happened.
        config.cmdline.push_str(" oops=panic");
        // One that stands still says where, when it is asked, and who waits there: see [`Standstill`].
        config
            .cmdline
            .push_str(" unknown_nmi_panic panic_sys_info=all_bt,blocked_tasks");
        // A processor that the machine under it has no time for has not stalled, nor is it locked up: a minute.
        config
            .cmdline
            .push_str(" rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30");
        // No record of the kernel's log is overwritten before it is looked at.
        config.cmdline.push_str(" log_buf_len=4M");
        // An image that is restored at once need not be small.
        config.cmdline.push_str(" hibernate=nocompress");
        // The kernel does not know these and gives them to init, as variables.
        match machine.userland {
            Userland::Lab | Userland::Databases | Userland::Volumes | Userland::Systemd => {}
            Userland::Debian | Userland::DebianAndServer => {
                config.cmdline.push_str(" userland=debian")
            }
            Userland::Packages => config.cmdline.push_str(" userland=packages"),
        }
        match machine.modules {
            Modules::Any => {}
            Modules::Signed => config.cmdline.push_str(" module.sig_enforce=1"),
            Modules::SecureBoot => config.secure_boot = Some(Vec::new()),
            Modules::SecureBootWithKey => {
                config.secure_boot = Some(vec![images.payload.join("packages/mok.pub")]);
            }
        }
        let disk_kib = machine.disk_mib * 1024;
        config.cmdline.push_str(&format!(" disk_kib={disk_kib}"));
        config.console_log = Some(images.results.join(format!("console-{name}.log")));
        if machine.root == Root::Scsi {
            config.cmdline.push_str(" lab_root=scsi");
        }
        let start = Instant::now();
        let vm = Arc::new(Vm::start(config).context("the guest cannot be started")?);
        let mut root_disk = None;
        if machine.root == Root::Scsi {
            // The guest has yet to load its kernel.
            let id = Guid::new(0x726f_6f74, 0, 0, [0; 8]);
            let len = u64::from(machine.disk_mib) << 20;
            let disk = Disk::in_memory(id, len, root).context("cannot make the root's disk")?;
            let controller = vm.host().scsi(0).context("the root needs a controller")?;
            controller.attach(0, &disk);
            root_disk = Some(disk);
        }
        let agent = Agent::connect(vm.clone(), BOOT).map_err(|error| {
            let still = matches!(error, CallError::Timeout { .. }) && vm.exit().is_none();
            let still = still.then(|| Standstill::of(&vm));
            let tail = vm.console_tail();
            vm.kill();
            let error = anyhow::Error::new(error).context(format!(
                "the guest's agent did not come up; the console ends:\n{tail}"
            ));
            match still {
                Some(still) => error.context(still),
                None => error,
            }
        })?;
        // Where that took long everything does, and nothing is wrong.
        let slowness = start.elapsed().as_secs_f64() / machine.usual_boot().as_secs_f64();
        vm.host().set_patience(slowness.max(images.patience));
        let mut guest = Guest {
            vm,
            agent,
            images: images.clone(),
            machine,
            module: if images.has_module {
                Module::Ours
            } else {
                Module::Stock
            },
            kernel: Kernel {
                release: String::new(),
                takes_our_module: images.has_module,
            },
            root_disk,
            slowness,
            pace: Duration::MAX,
            detectors: Detectors::default(),
            log_mark: AtomicU64::new(0),
            console_mark: AtomicUsize::new(0),
            is_to_end: AtomicBool::new(false),
            judgement: Judgement::of_runner(),
            host_mark: Mutex::default(),
            logs: AtomicU64::new(0),
            outputs: Mutex::default(),
            comparisons: Mutex::default(),
            cells: Mutex::default(),
            expected: Mutex::new(known::of("")),
        };
        guest.pace = guest.work()?;
        guest.detectors = Detectors::of(&guest)?;
        // The stock kernel speaks the newest that the host has and it knows: 6.0 is not in 6.12 and before.
        let agreed = guest.host().wait_connected(STEP)?;
        let release = guest.read("/proc/sys/kernel/osrelease")?;
        guest.kernel.release = release.trim().to_owned();
        let known = match release.starts_with("6.") {
            true => VmbusVersion::V5_3,
            false => VmbusVersion::V6_0,
        };
        let expected = machine.host.vmbus.min(known);
        ensure!(
            agreed == expected,
            "the guest should have agreed on VMBus {expected}, it did on {agreed}"
        );
        // A detector that has spoken while the guest booted may have turned itself off.
        if let Err(error) = guest.check_log() {
            guest.vm.kill();
            return Err(error.context("while it booted"));
        }
        Ok(guest)
    }

    /// What it was started as.
    pub fn machine(&self) -> Machine {
        self.machine
    }

    /// What it runs.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Which module serves our daemon here: ours, or on a kernel without it the kernel's own.
    pub fn module(&self) -> Module {
        self.module
    }

    /// All that can: a kernel without ours has its own only.
    pub fn modules(&self) -> &'static [Module] {
        match self.module {
            Module::Ours => &[Module::Ours, Module::Stock],
            Module::Stock => &[Module::Stock],
        }
    }

    /// How often its agent had to be told again that it is called.
    pub fn raised_again(&self) -> u64 {
        self.vm.raised_again()
    }

    /// The machine itself.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The host's side of its VMBus.
    pub fn host(&self) -> &Host {
        self.vm.host()
    }

    /// The host's side of VSS.
    pub fn vss(&self) -> Vss {
        self.vm.host().vss()
    }

    /// What is on the disk of the server that a machine has beside it, before anybody has used it.
    pub fn server_disk(&self) -> Result<Vec<u8>> {
        let path = self.images.payload.join(SERVER);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The disk with its root, for a machine with [`Root::Scsi`].
    pub fn root_disk(&self) -> Option<&Disk> {
        self.root_disk.as_ref()
    }

    /// The host's side of its SCSI controllers.
    pub fn scsi_controllers(&self) -> impl Iterator<Item = Controller> + use<'_> {
        (0..).map_while(|index| self.host().scsi(index))
    }

    /// A limit for the agent, in milliseconds.
    fn patience(&self, limit: Duration) -> u64 {
        self.host().patience(limit).as_millis() as u64
    }

    // --- Commands and files ---

    /// Runs a line of shell to its end and returns how that was.
    pub fn try_sh(&self, script: &str) -> Result<Ended, CallError> {
        let limit = STEP * 2;
        self.agent.call(
            Command::Run {
                argv: vec!["sh".into(), "-c".into(), script.into()],
                timeout_ms: self.patience(limit),
            },
            limit + Duration::from_secs(5),
        )
    }

    /// Runs a line of shell that must succeed and returns its output.
    pub fn sh(&self, script: &str) -> Result<String> {
        let ended = self.try_sh(script)?;
        if ended.status != Some(0) {
            bail!(
                "in the guest, this failed ({}): {script}\n{}{}",
                how_it_ended(&ended),
                ended.out,
                ended.err
            );
        }
        Ok(ended.out)
    }

    /// Starts a program whose output goes to a file of its own.
    pub fn spawn(&self, argv: &[&str]) -> Result<Process> {
        self.spawn_with(argv, None)
    }

    /// Starts a process that has a copy of this descriptor, by fork, and does nothing with it.
    pub fn share(&self, device: Device<'_>) -> Result<Process> {
        self.spawn_with(&["sleep", "1000"], Some(device.handle))
    }

    fn spawn_with(&self, argv: &[&str], device: Option<u64>) -> Result<Process> {
        let number = self.logs.fetch_add(1, SeqCst);
        let name = argv.first().and_then(|it| it.rsplit('/').next());
        let log = format!("/run/{}-{number}.log", name.unwrap_or("program"));
        let pid = self.agent.call(
            Command::Spawn {
                argv: argv.iter().map(|it| it.to_string()).collect(),
                log: log.clone(),
                device,
            },
            STEP,
        )?;
        Ok(Process { pid, log })
    }

    /// Sends a signal by number: 9 kills, 15 asks to end, 19 stops, 18 continues. One that is as a crash, such as 6,
    /// is held against nobody when it was sent here.
    pub fn signal(&self, process: &Process, signal: i32) -> Result<(), CallError> {
        self.signal_pid(process.pid, signal)
    }

    /// The same for a process that another one has started.
    pub fn signal_pid(&self, pid: i32, signal: i32) -> Result<(), CallError> {
        self.signal_all(&[pid], signal).map(drop)
    }

    /// The same for several in one go; returns when, as [`Guest::clock`] has it.
    pub fn signal_all(&self, pids: &[i32], signal: i32) -> Result<u64, CallError> {
        let pids = pids.to_vec();
        self.agent.call(Command::Signal { pids, signal }, STEP)
    }

    /// The clock in the guest that stalls are measured by, in microseconds.
    pub fn clock(&self) -> Result<u64, CallError> {
        self.agent.call(Command::Clock, STEP)
    }

    /// Waits until a program has ended.
    pub fn wait(&self, process: &Process, limit: Duration) -> Result<Ended, CallError> {
        self.agent.call(
            Command::Wait {
                pid: process.pid,
                timeout_ms: self.patience(limit),
            },
            limit + Duration::from_secs(5),
        )
    }

    /// Whether no program in it answers any more, though it has not ended, and what is to be seen of it
    /// then. Afterwards it is of no use.
    pub fn standstill(&self) -> Option<Standstill> {
        // One that was found silent a moment ago is not waited for once more.
        let limit = match self.agent.is_silent() {
            true => STEP / 6,
            false => STEP,
        };
        if self.agent.answers(limit) || self.vm.exit().is_some() {
            return None;
        }
        Some(Standstill::of(&self.vm))
    }

    /// Whether a program has ended.
    pub fn has_ended(&self, process: &Process) -> Result<bool, CallError> {
        Ok(!self.running()?.contains(&process.pid))
    }

    /// The programs that were started and have not ended.
    fn running(&self) -> Result<Vec<i32>, CallError> {
        self.agent.call(Command::Spawned, STEP)
    }

    /// What a program has written so far. What was read before is not read again: it is looked at again
    /// and again, and the line to the guest is slow.
    pub fn output(&self, process: &Process) -> Result<String, CallError> {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        let known = outputs.entry(process.log.clone()).or_default();
        let read = Command::ReadOn {
            path: process.log.clone(),
            from: known.next,
        };
        let more: Piece = self.agent.call(read, STEP)?;
        known.text.push_str(&more.text);
        known.next = more.next;
        Ok(known.text.clone())
    }

    /// The text of a file.
    pub fn read(&self, path: &str) -> Result<String, CallError> {
        self.agent.call(Command::Read { path: path.into() }, STEP)
    }

    /// How much waits in memory to be written back and is not under way, in KiB.
    pub fn dirty_kib(&self) -> Result<u64> {
        dirty_kib_in(&self.read("/proc/meminfo")?)
    }

    /// Writes text to a file of sysfs or the like.
    pub fn write(&self, path: &str, text: &str) -> Result<(), CallError> {
        let (path, text) = (path.into(), text.into());
        self.agent.call(Command::Write { path, text }, STEP)
    }

    /// Looks again and again until `look` says true.
    pub fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let limit = self.host().patience(limit);
        let until = Instant::now() + limit;
        while !look()? {
            ensure!(
                Instant::now() < until,
                "this should have come true within {limit:?}: {what}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    // --- Modules and daemons ---

    /// Loads a module, ours with these parameters.
    pub fn load(&self, module: Module, parameters: &[&str]) -> Result<()> {
        let line = match module {
            Module::Ours => format!("insmod /payload/hv_vss.ko {}", parameters.join(" ")),
            Module::Stock => format!("modprobe hv_utils {}", parameters.join(" ")),
        };
        self.sh(&line).map(drop)
    }

    /// Unloads a module. What a process had that has just ended, be it the device or what the module thaws for it, may
    /// hold it for a moment longer.
    pub fn unload(&self, module: Module) -> Result<()> {
        let line = match module {
            Module::Ours => "rmmod hv_vss",
            Module::Stock => "rmmod hv_utils",
        };
        let mut why = String::new();
        let unloaded = self.wait_until("the module can be unloaded", STEP, || {
            let done = self.try_sh(line)?;
            why = done.err;
            Ok(done.status == Some(0))
        });
        unloaded.context(why)
    }

    /// Starts a daemon in the foreground. It has not registered yet when this returns.
    pub fn start_daemon(&self, daemon: Daemon) -> Result<Process> {
        self.spawn(&daemon.argv())
    }

    /// Starts our daemon in the foreground with a configuration of its own.
    pub fn start_daemon_with(&self, config: &str) -> Result<Process> {
        let number = self.logs.fetch_add(1, SeqCst);
        let path = format!("/run/config-{number}.toml");
        self.sh(&format!("cat > {path} <<'END'\n{config}\nEND"))?;
        self.spawn(&["/payload/hv_vss_daemon", "-n", "-c", &path])
    }

    /// The same with one setting: the seconds within which something good has to happen. A machine that is slow is
    /// given as many more as with every limit; returns how long it is.
    pub fn start_daemon_within(
        &self,
        setting: &str,
        limit: Duration,
    ) -> Result<(Process, Duration)> {
        let seconds = whole_seconds(self.host().patience(limit).max(limit));
        let daemon = self.start_daemon_with(&format!("{setting} = {}", seconds.as_secs()))?;
        Ok((daemon, seconds))
    }

    // --- File systems and writers ---

    /// Freezes the file system at `path` as an administrator would.
    pub fn freeze(&self, path: &str) -> Result<(), CallError> {
        self.agent.call(Command::Freeze { path: path.into() }, STEP)
    }

    /// Thaws the file system at `path`; errno `EINVAL` when it was not frozen.
    pub fn thaw(&self, path: &str) -> Result<(), CallError> {
        self.agent.call(Command::Thaw { path: path.into() }, STEP)
    }

    /// Nothing at these mount points is frozen, whoever could have: FITHAW has nothing to thaw, who
    /// writes need not wait, and our module names no such file system in debugfs. FITHAW alone says the
    /// same of what our module holds.
    pub fn not_frozen(&self, when: &str, paths: &[impl AsRef<str>]) -> Result<()> {
        let asked = vec![read_command(HELD), read_command(MOUNTS)];
        let mut done = self.agent.call_each(asked, STEP)?;
        let (held, mounts) = (
            held_of(done.take())?,
            mount_table_of(&done.take::<String>()?)?,
        );
        self.none_frozen(when, paths, &held, &mounts)
    }

    /// The same where it is known what our module names, and what is mounted.
    fn none_frozen(
        &self,
        when: &str,
        paths: &[impl AsRef<str>],
        held: &[(String, String)],
        mounts: &[Mount],
    ) -> Result<()> {
        // Each may be waited for.
        const AT_ONCE: usize = 8;
        let mut outcomes = Vec::new();
        for some in paths.chunks(AT_ONCE) {
            let ask = |path: &_| self.ask_frozen_command(AsRef::<str>::as_ref(path));
            let asked = some.iter().map(ask).collect();
            let mut done = self.agent.call_each(asked, STEP)?;
            for _ in some {
                outcomes.push(done.take::<Frozen>());
            }
        }
        for (path, was) in paths.iter().zip(outcomes) {
            let (path, was) = (path.as_ref(), was?);
            ensure!(was == Frozen::No, "{path} was frozen {when}: {was:?}");
            let mount = mounts.iter().rev().find(|it| it.path == path);
            let mount = mount.with_context(|| format!("nothing is mounted on {path}"))?;
            if held.iter().any(|(device, _)| *device == mount.device) {
                // It says so a moment after the last of them could write.
                let what = format!("{path} takes writes {when}, and the module says nothing of it");
                self.wait_until(&what, STEP, || {
                    let held = self.held()?;
                    Ok(held.iter().all(|(device, _)| *device != mount.device))
                })?;
            }
        }
        Ok(())
    }

    /// Whether the file system at `path` is frozen; thaws it if an administrator can.
    pub fn ask_frozen(&self, path: &str) -> Result<Frozen, CallError> {
        self.agent.call(self.ask_frozen_command(path), STEP)
    }

    fn ask_frozen_command(&self, path: &str) -> Command {
        Command::AskFrozen {
            path: path.into(),
            timeout_ms: self.patience(Duration::from_secs(2)),
        }
    }

    /// What our module says that it holds, or is freezing or thawing: device and state of each.
    pub fn held(&self) -> Result<Vec<(String, String)>> {
        held(&self.read(HELD)?)
    }

    /// For how many milliseconds each of them has been in that state, as it says.
    pub fn held_for_ms(&self) -> Result<Vec<u64>> {
        self.held_numbers(3)
    }

    /// For which request each of them is, 0 for none.
    pub fn held_for(&self) -> Result<Vec<u64>> {
        self.held_numbers(4)
    }

    fn held_numbers(&self, column: usize) -> Result<Vec<u64>> {
        let text = self.read(HELD)?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let number = |line: &str| {
            let word = line.split(' ').nth(column).and_then(|it| it.parse().ok());
            word.with_context(|| format!("in debugfs: {line}"))
        };
        lines.map(number).collect()
    }

    /// FIFREEZE and FITHAW of the file system that `path` is on, and how long both took.
    pub fn freeze_and_thaw(&self, path: &str) -> Result<Duration, CallError> {
        let command = Command::FreezeAndThaw { path: path.into() };
        self.agent
            .call(command, STEP * 2)
            .map(Duration::from_micros)
    }

    /// From now on each open on the mount at `path` waits, as behind a security agent: until that
    /// has written a line to `log`, or without a log until [`Guest::release_opens`].
    pub fn watch_opens(&self, path: &str, log: Option<&str>) -> Result<(), CallError> {
        let (path, log) = (path.into(), log.map(str::to_owned));
        self.agent.call(Command::WatchOpens { path, log }, STEP)
    }

    /// Lets everybody pass who waits with an open.
    pub fn release_opens(&self) -> Result<(), CallError> {
        self.agent.call(Command::ReleaseOpens, STEP)
    }

    /// Starts a thread that rewrites the first 512 bytes of `path` about every millisecond.
    pub fn writer_start(&self, path: &str) -> Result<(), CallError> {
        self.writer_start_every(path, 1000)
    }

    /// The same with another time between two writes, in microseconds.
    pub fn writer_start_every(&self, path: &str, every_us: u64) -> Result<(), CallError> {
        self.start_writer(path, every_us, false)
    }

    /// The same with an fsync after each write.
    pub fn syncing_writer_start(&self, path: &str, every_us: u64) -> Result<(), CallError> {
        self.start_writer(path, every_us, true)
    }

    fn start_writer(&self, path: &str, every_us: u64, fsync: bool) -> Result<(), CallError> {
        let command = Command::WriterStart {
            path: path.into(),
            every_us,
            fsync,
        };
        self.agent.call(command, STEP)
    }

    /// Starts a writer of records on `path`, which keeps notes in block `slot` of `notes`, a block
    /// device: see [`lab_agent::Note`].
    pub fn recorder_start(
        &self,
        path: &str,
        notes: &str,
        slot: u64,
        every_us: u64,
    ) -> Result<(), CallError> {
        let command = Command::RecorderStart {
            path: path.into(),
            notes: notes.into(),
            slot,
            every_us,
        };
        self.agent.call(command, STEP)
    }

    /// Starts a session with a database that commits rows and keeps notes in the same way: see
    /// [`Command::CommitterStart`].
    pub fn committer_start(
        &self,
        argv: &[&str],
        statement: &str,
        notes: &str,
        slot: u64,
        every_us: u64,
    ) -> Result<(), CallError> {
        let command = Command::CommitterStart {
            argv: argv.iter().map(|it| it.to_string()).collect(),
            statement: statement.into(),
            notes: notes.into(),
            slot,
            every_us,
        };
        self.agent.call(command, STEP)
    }

    /// How the writers fare, in the order of their start.
    pub fn writers(&self) -> Result<Vec<Writer>, CallError> {
        self.agent.call(Command::Writers, STEP)
    }

    /// The long writes that had not ended at `since_us` of the guest's clock.
    pub fn stalls(&self, since_us: u64) -> Result<Stalls, CallError> {
        self.agent.call(Command::Stalls { since_us }, STEP)
    }

    /// What of each writer's writes fell between these two moments of the guest's clock.
    pub fn writes_within(&self, from_us: u64, to_us: u64) -> Result<Vec<Share>, CallError> {
        let command = Command::WritesWithin { from_us, to_us };
        self.agent.call(command, STEP)
    }

    /// Lets all writers rest between two writes, or go on.
    pub fn writers_rest(&self, rest: bool) -> Result<(), CallError> {
        self.agent.call(Command::WritersRest { rest }, STEP)
    }

    /// Forgets how long the writes of every writer took.
    pub fn writers_reset(&self) -> Result<(), CallError> {
        self.agent.call(Command::WritersReset, STEP)
    }

    /// Ends all writers.
    pub fn writers_stop(&self) -> Result<(), CallError> {
        self.agent.call(self.writers_stop_command(), STEP)
    }

    fn writers_stop_command(&self) -> Command {
        let timeout_ms = self.patience(Duration::from_secs(5));
        Command::WritersStop { timeout_ms }
    }

    // --- The kernel's log ---

    /// From here on [`Guest::log`] starts.
    pub fn mark_log(&self) -> Result<(), CallError> {
        // What is lost of the time before does not matter any more.
        let log: Log = self.kmsg(0, 0)?;
        self.log_mark.store(log.next, SeqCst);
        self.console_mark.store(self.vm.console().len(), SeqCst);
        *self.host_mark() = self.host().now();
        Ok(())
    }

    /// The kernel's log since the case began: records of at most this level (4: warnings and
    /// worse; 6: information). What the kernel reports of itself alone is left out.
    pub fn log(&self, max_level: u8) -> Result<Vec<Record>> {
        Ok(self.log_to(max_level)?.0)
    }

    /// The same, and where it ends.
    fn log_to(&self, max_level: u8) -> Result<(Vec<Record>, u64)> {
        let log = self.kmsg(self.log_mark.load(SeqCst), max_level)?;
        ensure!(
            log.lost == 0,
            "{} records of the kernel's log were overwritten before they could be read",
            log.lost
        );
        Ok((without_foreign_reports(log.records), log.next))
    }

    /// All of it, piece by piece: after hours it would take longer than any answer may.
    fn kmsg(&self, since: u64, max_level: u8) -> Result<Log, CallError> {
        let mut all = Log {
            next: since,
            more: true,
            ..Log::default()
        };
        while all.more {
            let since = all.next;
            let piece: Log = self.agent.call(Command::Kmsg { since, max_level }, STEP)?;
            all.records.extend(piece.records);
            all.lost += piece.lost;
            (all.next, all.more) = (piece.next, piece.more);
        }
        Ok(all)
    }

    // --- The device ---

    /// Opens the device of whichever module is loaded.
    pub fn open_device(&self, mode: Blocking) -> Result<Device<'_>, CallError> {
        self.open_device_in(None, mode)
    }

    /// The same in a process that can be killed, from [`Guest::fork`].
    pub fn open_device_in(
        &self,
        pid: Option<i32>,
        mode: Blocking,
    ) -> Result<Device<'_>, CallError> {
        let open = Command::DevOpen {
            path: DEVICE.into(),
            nonblock: mode == Blocking::No,
        };
        let mut device = Device {
            agent: &self.agent,
            pid,
            handle: 0,
        };
        device.handle = self.agent.call(device.asks(open), STEP)?;
        Ok(device)
    }

    /// Starts another agent, which dies with all that it holds when it is killed; its pid.
    pub fn fork(&self) -> Result<i32, CallError> {
        self.agent.call(Command::Fork, STEP)
    }

    // --- Neighbours ---

    /// Starts a neighbour who freezes and thaws the file system at `path` without end.
    pub fn neighbour_start(&self, path: &str) -> Result<(), CallError> {
        let path = path.into();
        self.agent.call(Command::NeighbourStart { path }, STEP)
    }

    /// Ends all neighbours; what each of them has done, in the order of their start.
    pub fn neighbours_stop(&self) -> Result<Vec<Neighbour>, CallError> {
        self.agent.call(Command::NeighboursStop, STEP)
    }

    // --- For the comparison with the peer ---

    /// Notes what ours and the peer were seen to do.
    pub fn compare(&self, what: &str, ours: &str, peer: &str) {
        let row = Comparison {
            what: what.into(),
            ours: ours.into(),
            peer: peer.into(),
        };
        let mut rows = self
            .comparisons
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        rows.push(row);
    }

    /// Takes what was noted since the last call.
    pub fn take_comparisons(&self) -> Vec<Comparison> {
        let mut rows = self
            .comparisons
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut rows)
    }

    /// Notes what came of a fault at a stage.
    pub fn note_cell(&self, cell: Cell) {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        cells.push(cell);
    }

    /// Takes what was noted since the last call.
    pub fn take_cells(&self) -> Vec<Cell> {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut cells)
    }

    // --- Between two cases ---

    /// Brings the guest back to how it was before the case and makes sure that it is so: nothing
    /// frozen, no request without an answer, no process, mount or module left, no complaint in the kernel's log.
    pub fn tidy(&self) -> Result<()> {
        self.owes_nothing()?;
        let mut done = self.agent.call_each(
            vec![
                Command::ReleaseOpens,
                Command::NeighboursStop,
                read_command(HELD),
                read_command(MOUNTS),
            ],
            STEP,
        )?;
        let _: () = done.take()?;
        let _: Vec<Neighbour> = done.take()?;
        let (held, mounts) = (
            held_of(done.take())?,
            mount_table_of(&done.take::<String>()?)?,
        );
        self.none_frozen("when the case was over", &on_disks(&mounts), &held, &mounts)?;
        let mut done = self.agent.call_each(
            vec![
                read_command(HELD),
                self.writers_stop_command(),
                Command::DevCloseAll,
                Command::ForksEnd,
                Command::Spawned,
            ],
            STEP,
        )?;
        // Of what is mounted where the agent does not see it, too. The end of the daemon would thaw it.
        let held = held_of(done.take())?;
        ensure!(
            held.is_empty(),
            "the module still held something when the case was over: {held:?}"
        );
        for _ in 0..3 {
            let _: () = done.take()?;
        }
        for pid in done.take::<Vec<i32>>()? {
            // ESRCH: it has ended by itself.
            if let Err(error) = self.signal_pid(pid, 9) {
                ensure!(error.errno() == Some("ESRCH"), "{error}");
            }
            let timeout_ms = self.patience(Duration::from_secs(10));
            let _: Ended = self.agent.call(Command::Wait { pid, timeout_ms }, STEP)?;
        }
        // The other userlands have the agent alone.
        self.sh(match self.machine.userland {
            Userland::Lab | Userland::Databases | Userland::Volumes => ". /payload/tidy",
            Userland::Systemd
            | Userland::Debian
            | Userland::DebianAndServer
            | Userland::Packages => TIDY,
        })?;
        let root = self.root_disk.as_ref().map(|_| (0, 0));
        for (number, controller) in self.scsi_controllers().enumerate() {
            for lun in controller.disks().into_keys() {
                if root != Some((number, lun)) {
                    controller.detach(lun);
                }
            }
        }
        self.check_log()?;
        *self.expected() = known::of("");
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        outputs.clear();
        Ok(())
    }

    /// Whatever the host has asked and not [forgotten](hyperv_sim::IcChannel::forget) is answered, or the channel
    /// is closed.
    fn owes_nothing(&self) -> Result<()> {
        let mut owed = Vec::new();
        let answered = self.wait_until("all that the host asked is answered", STEP, || {
            owed = self.host().unanswered();
            Ok(owed.is_empty())
        });
        answered.with_context(|| format!("without an answer: {}", owed.join(", ")))
    }

    /// Neither the kernel nor the host has complained since the case began, or since the last call, and no program
    /// that was [spawned](Guest::spawn) has crashed.
    pub fn check_log(&self) -> Result<()> {
        // What the detectors find they may log as well.
        let mut found = self.detectors.complaints(self)?;
        for crash in self.agent.call::<Vec<String>>(Command::Crashed, STEP)? {
            found.push_str(&format!("a crash: {crash}\n"));
        }
        self.check_logged(found)
    }

    /// The same of what was logged, beside what was `found` otherwise. The next look begins where this one has
    /// ended: what is logged meanwhile is not lost between the two.
    fn check_logged(&self, found: String) -> Result<()> {
        let (console, now) = (self.vm.console().len(), self.host().now());
        let (log, next) = self.log_to(6)?;
        let mut text = complaints(&log, &self.expected());
        text.push_str(&found);
        text.push_str(&self.violations());
        ensure!(
            text.is_empty(),
            "the kernel or the host complained:\n{text}"
        );
        self.log_mark.store(next, SeqCst);
        self.console_mark.store(console, SeqCst);
        *self.host_mark() = now;
        Ok(())
    }

    /// The case is about to end this machine. What its kernel logs from now on is looked for on its console,
    /// warnings as well: [`Guest::check_end`].
    pub fn ends(&self) -> Result<()> {
        self.check_log()?;
        self.is_to_end.store(true, SeqCst);
        Ok(self.write("/proc/sys/kernel/printk", "5")?)
    }

    /// Whether the case has said that it ends this machine.
    pub fn is_to_end(&self) -> bool {
        self.is_to_end.load(SeqCst)
    }

    /// Neither has complained until it ended. Its log is gone then: what of it counts, from errors on, was on
    /// the console.
    pub fn check_end(&self) -> Result<()> {
        let console = self.vm.console();
        let end = console.get(self.console_mark.load(SeqCst)..);
        let mut text = complaints(&on_console(end.unwrap_or(&console)), &self.expected());
        text.push_str(&self.violations());
        ensure!(
            text.is_empty(),
            "the kernel or the host complained before it ended:\n{text}"
        );
        Ok(())
    }

    /// The last look at a machine that the case has started, which ends by that.
    pub fn close(&self) -> Result<()> {
        match self.is_to_end() {
            true => self.check_end()?,
            false => self.check_log()?,
        }
        self.set_judged();
        self.vm.kill();
        Ok(())
    }

    /// Such a machine was looked at otherwise.
    pub fn set_judged(&self) {
        self.judgement.is_there.store(true, SeqCst);
    }

    /// None of them was let go of without a look.
    pub fn all_judged(&self) -> Result<()> {
        let missing = self.judgement.missing.swap(0, SeqCst);
        ensure!(
            missing == 0,
            "the case has not looked at what {missing} of its own machines have said"
        );
        Ok(())
    }

    /// One mount point of every file system on a block device.
    pub fn mounts(&self) -> Result<Vec<String>> {
        Ok(on_disks(&mount_table_of(&self.read(MOUNTS)?)?))
    }

    /// The case with this name begins, in which the kernel may log [what is known](crate::known). Limits grow
    /// with what this machine takes for the same work now: others may have come to it since the guest booted.
    pub fn begin(&self, case: &str) -> Result<()> {
        *self.expected() = known::of(case);
        let patience = patience(self.slowness, self.pace, self.work()?);
        self.host().set_patience(patience.max(self.images.patience));
        Ok(())
    }

    /// A little work that is always the same, and how long it takes.
    fn work(&self) -> Result<Duration> {
        let start = Instant::now();
        self.sh("i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done")?;
        Ok(start.elapsed())
    }

    /// From here until the end of the case reports of the kernel or the host in which one of these texts stands are
    /// what the case is about, and not held against it. Those from before are.
    pub fn expect_in_log(&self, texts: &[&'static str]) -> Result<()> {
        self.check_logged(String::new())?;
        self.expected().extend_from_slice(texts);
        Ok(())
    }

    fn host_mark(&self) -> std::sync::MutexGuard<'_, Duration> {
        self.host_mark
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn expected(&self) -> std::sync::MutexGuard<'_, Vec<&'static str>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its kernel looks for leaks by itself.
    pub fn looks_for_leaks(&self) -> bool {
        self.detectors.kmemleak
    }

    /// What the host holds against the kernel.
    fn violations(&self) -> String {
        let events = self.host().violations(*self.host_mark());
        let lines = events.iter().map(|event| format!("{event}\n"));
        let expected = self.expected();
        lines
            .filter(|line| !expected.iter().any(|it| line.contains(it)))
            .collect()
    }

    /// What is worth seeing of a guest in which a case failed. Never fails itself.
    pub fn post_mortem(&self) -> String {
        let mut text = String::new();
        let events = self.vss().events();
        let last = events.len().saturating_sub(15);
        text.push_str("the host's last events on the VSS channel:\n");
        for event in events.iter().skip(last) {
            text.push_str(&format!(
                "  {:10.3} s  {:?}\n",
                event.at.as_secs_f64(),
                event.kind
            ));
        }
        let log = match self.agent.is_silent() {
            true => Err(anyhow::anyhow!("it was asked before")),
            false => self.log(6),
        };
        match log {
            Ok(records) => {
                text.push_str("the guest's kernel log since the case began, its end:\n");
                for record in records.iter().skip(records.len().saturating_sub(25)) {
                    text.push_str(&format!(
                        "  {:10.3} s  <{}> {}\n",
                        record.at_us as f64 / 1e6,
                        record.level,
                        record.text
                    ));
                }
                let logs =
                    "for f in $(ls -t /run/*.log | head -n 6); do echo \"== $f\"; tail -n 15 $f; done";
                if let Ok(ended) = self.try_sh(logs) {
                    text.push_str(&format!("what programs wrote:\n{}\n", ended.out));
                }
                let ours = "for pid in $(pidof hv_vss_daemon hv_vss_guard); do
                                echo \"== $pid\"; cut -d ' ' -f 2-6 /proc/$pid/stat; grep ^Sig /proc/$pid/status
                                for t in /proc/$pid/task/*/stack; do head -n 4 $t; echo; done
                            done";
                if let Ok(ended) = self.try_sh(ours) {
                    text.push_str(&format!("where ours are:\n{}\n", ended.out));
                }
            }
            Err(error) => text.push_str(&format!("the guest does not answer: {error}\n")),
        }
        text.push_str("the console ends:\n");
        text.push_str(&self.vm.console_tail());
        text
    }
}

fn dirty_kib_in(meminfo: &str) -> Result<u64> {
    let line = meminfo.lines().find_map(|it| it.strip_prefix("Dirty:"));
    line.and_then(|it| it.trim().strip_suffix("kB"))
        .and_then(|it| it.trim().parse().ok())
        .with_context(|| format!("/proc/meminfo has no Dirty: {meminfo}"))
}

/// The file of our module with what it holds.
const HELD: &str = "/sys/kernel/debug/hv_vss/held";

/// Device and state of each line of that file.
fn held(text: &str) -> Result<Vec<(String, String)>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let entry = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let (device, _type, state) = (words.next(), words.next(), words.next());
        device
            .zip(state)
            .with_context(|| format!("in debugfs: {line}"))
    };
    lines.map(entry).collect()
}

/// The same of what came of reading it: nothing is held where our module is not loaded.
fn held_of(text: Result<String, CallError>) -> Result<Vec<(String, String)>> {
    match text {
        Err(error) if error.errno() == Some("ENOENT") => Ok(Vec::new()),
        text => held(&text?),
    }
}

/// What has the agent read a file.
fn read_command(path: &str) -> Command {
    Command::Read { path: path.into() }
}

/// The mount table of the agent.
const MOUNTS: &str = "/proc/self/mountinfo";

/// What is in it.
fn mount_table_of(text: &str) -> Result<Vec<Mount>> {
    // Fields of Documentation/filesystems/proc.rst: id, parent, device, root, mount point.
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        Some(Mount {
            device: fields.get(2)?.to_string(),
            path: unescape(fields.get(4)?),
            source: fields.iter().rev().nth(1)?.to_string(),
        })
    };
    let short = |line| format!("a line of mountinfo is too short: {line}");
    let lines = text.lines();
    lines
        .map(|line| mount(line).with_context(|| short(line)))
        .collect()
}

/// One mount point of every file system of these that is on a block device.
fn on_disks(mounts: &[Mount]) -> Vec<String> {
    let mut seen = Vec::new();
    let mut paths = Vec::new();
    for mount in mounts {
        if mount.source.starts_with("/dev/") && !seen.contains(&&mount.device) {
            seen.push(&mount.device);
            paths.push(mount.path.clone());
        }
    }
    paths
}

/// A line of the mount table.
struct Mount {
    /// The file system's number, as debugfs has it too.
    device: String,
    path: String,
    source: String,
}

/// Which of the kernel's own detectors have to be asked, besides the log: those of a debug kernel.
#[derive(Clone, Copy, Debug, Default)]
struct Detectors {
    lockdep: bool,
    kmemleak: bool,
}

const LOCKDEP: &str = "/proc/lockdep_stats";
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

impl Detectors {
    /// Those of the kernel that `guest` runs.
    fn of(guest: &Guest) -> Result<Detectors> {
        let is_there = |path| match guest.read(path) {
            Ok(_) => Ok(true),
            Err(error) if error.errno() == Some("ENOENT") => Ok(false),
            Err(error) => Err(error),
        };
        let detectors = Detectors {
            lockdep: is_there(LOCKDEP)?,
            kmemleak: is_there(KMEMLEAK)?,
        };
        Ok(detectors)
    }

    /// What they have found.
    fn complaints(self, guest: &Guest) -> Result<String> {
        let mut text = String::new();
        if self.lockdep {
            let stats = guest.read(LOCKDEP)?;
            let line = stats.lines().find(|it| it.contains("debug_locks:"));
            let on = line.and_then(|it| it.split_whitespace().last());
            if on != Some("1") {
                text.push_str(&format!("lockdep is off, {LOCKDEP} says {on:?}\n"));
            }
        }
        if self.kmemleak {
            // What is younger than 5 s is not reported, and only the second scan believes the first
            // (Documentation/dev-tools/kmemleak.rst).
            std::thread::sleep(Duration::from_secs(5));
            guest.write(KMEMLEAK, "scan")?;
            guest.write(KMEMLEAK, "scan")?;
            text.push_str(&guest.read(KMEMLEAK)?);
        }
        Ok(text)
    }
}

/// A time as a configuration can have it: no shorter.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_nanos().div_ceil(1_000_000_000) as u64)
}

/// How many times as long as usual things may take where a boot took `slowness` times as long, and the same
/// work took `then` after it and takes `now`. No less than after the boot.
fn patience(slowness: f64, then: Duration, now: Duration) -> f64 {
    slowness * (now.as_secs_f64() / then.as_secs_f64()).max(1.0)
}

/// From this level on (0 is the worst) whatever the kernel logs is wrong, unless it is expected.
const WARNING: u8 = 4;

/// What there is to read where a program has crashed: the last words of a panic, of ours to the kernel's log; the
/// kernel's own of a signal that a program did not survive. All of them are information by their level.
const CRASHES: [&str; 3] = ["panicked at", "segfault at", "traps: "];

fn is_crash(text: &str) -> bool {
    CRASHES.iter().any(|it| text.contains(it))
}

/// The reports in a log that speak of something that is wrong, but for those in which an `expected` text
/// stands: all that are a warning or worse, whatever they say, and what speaks of trouble or of a crash at a lower
/// level.
fn complaints(log: &[Record], expected: &[&str]) -> String {
    const WORDS: [&str; 6] = [
        "refcount_t",
        "leak detector disabled",
        "page allocation failure",
        "I/O error",
        "error (device",
        "INFO: task",
    ];
    let is_wrong = |it: &Record| {
        it.level <= WARNING || is_crash(&it.text) || WORDS.iter().any(|word| it.text.contains(word))
    };
    let is_expected = |it: &Record| expected.iter().any(|text| it.text.contains(text));
    let mut text = String::new();
    let mut rest = log;
    while !rest.is_empty() {
        // A warning is of use with its call trace only, and expected as a whole.
        let (report, next) = rest.split_at(report_len(rest));
        if report.iter().any(is_wrong) && !report.iter().any(is_expected) {
            for record in report {
                text.push_str(&record.text);
                text.push('\n');
            }
        }
        rest = next;
    }
    text
}

/// What the kernel has printed on its console, which shows nothing below its own limit: errors, and after
/// [`Guest::ends`] warnings. A line of a program has no time in front, but for what our daemon says through the
/// kernel's log: that is no complaint unless it speaks of a crash.
fn on_console(text: &str) -> Vec<Record> {
    let record = |line: &str| {
        let (time, text) = line.strip_prefix('[')?.split_once("] ")?;
        let (seconds, micros) = time.trim().split_once('.')?;
        let seconds: u64 = seconds.parse().ok()?;
        (!text.starts_with("hv_vss_daemon: ") || is_crash(text)).then_some(())?;
        Some(Record {
            level: WARNING,
            at_us: seconds * 1_000_000 + micros.parse::<u64>().ok()?,
            text: text.to_owned(),
        })
    };
    text.lines().filter_map(record).collect()
}

/// The log without the reports of the kernel that [are of itself alone](is_foreign).
fn without_foreign_reports(records: Vec<Record>) -> Vec<Record> {
    let mut kept = Vec::new();
    let mut rest = records.as_slice();
    while !rest.is_empty() {
        let (report, next) = rest.split_at(report_len(rest));
        if !is_foreign(report) {
            kept.extend_from_slice(report);
        }
        rest = next;
    }
    kept
}

/// How many records at the start of `log` belong together: those of a report that has its end, else
/// one. A report of KCSAN is between two lines, a warning with its call trace from "cut here" to
/// "end trace"; that of the OOM killer ends with whom it took.
fn report_len(log: &[Record]) -> usize {
    let is_line: fn(&Record) -> bool = |it| it.text.starts_with("=====");
    let is_kill: fn(&Record) -> bool =
        |it| it.text.contains("Killed process") || it.text.contains("no killable processes");
    let is_end: fn(&Record) -> bool = match log {
        [first, second, ..] if is_line(first) && second.text.starts_with("BUG: KCSAN:") => is_line,
        [first, ..] if first.text.contains("cut here") => |it| it.text.contains("end trace"),
        [first, ..] if first.text.contains("invoked oom-killer") => is_kill,
        _ => return 1,
    };
    let end = log.iter().skip(1).position(is_end);
    end.map_or(1, |end| end + 2)
}

/// Whether a report is of the kernel's own doing, with no function of our module in it:
///
/// - a data race, such as that of `do_nanosleep` with its timer;
/// - lockdep's warning that `hv_suspend` and `hv_resume`, the kernel's own part in the hibernation of
///   a guest, patch a static call while interrupts are off. Both are called by the kernel's core, and
///   whichever drivers are loaded (seen with 7.3.4).
fn is_foreign(report: &[Record]) -> bool {
    let is = |what: &str| report.get(1).is_some_and(|it| it.text.starts_with(what));
    let has = |part: &str| report.iter().any(|it| it.text.contains(part));
    let at_sleep = has(" hv_suspend+") || has(" hv_resume+");
    !has("[hv_vss]") && (is("BUG: KCSAN:") || is("WARNING: kernel/smp.c:") && at_sleep)
}

/// A path of the mount table with its octal escapes undone.
fn unescape(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|it| u8::from_str_radix(it, 8).ok());
        match code {
            Some(code) => {
                text.push(char::from(code));
                text.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

/// How a program ended, in words.
pub fn how_it_ended(ended: &Ended) -> String {
    match (ended.timed_out, ended.status, ended.signal) {
        (true, ..) => "it did not end in time and was killed".into(),
        (_, Some(status), _) => format!("exit status {status}"),
        (_, _, Some(signal)) => format!("signal {signal}"),
        _ => "no exit status".into(),
    }
}

/// Whether reads of the device wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// They wait.
    Yes,
    /// They do not (`O_NONBLOCK`).
    No,
}

/// An `ioctl(2)` as the agent is asked to make it.
#[derive(Clone, Debug)]
pub struct Ioctl {
    /// Its number.
    pub request: u32,
    /// What its argument points to.
    pub argument: Vec<u8>,
    /// The descriptor that goes into that.
    pub put: Option<Put>,
    /// Whether the call is made without CAP_SYS_ADMIN.
    pub unprivileged: bool,
}

/// The guest's `/dev/vmbus/hv_vss`, held open by the agent: the case is the daemon.
///
/// Every method is one system call. It is not closed when dropped but at the end of the case.
#[derive(Clone, Copy)]
pub struct Device<'a> {
    agent: &'a Agent,
    /// Which agent has it open, if it is another than this.
    pid: Option<i32>,
    handle: u64,
}

impl std::fmt::Debug for Device<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an open device")
    }
}

impl Device<'_> {
    /// The command for the agent that has the device open.
    fn asks(&self, command: Command) -> Command {
        match self.pid {
            Some(pid) => Command::In {
                pid,
                does: Box::new(command),
            },
            None => command,
        }
    }

    /// `write(2)`: how many bytes were taken.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, CallError> {
        let (handle, hex) = (self.handle, to_hex(bytes));
        let write = Command::DevWrite { handle, hex };
        self.agent.call(self.asks(write), STEP)
    }

    /// `read(2)` into a buffer of `len` bytes.
    pub fn read(&self, len: usize) -> Result<Vec<u8>, CallError> {
        let pending = self.start_read(len)?;
        self.finish_read(pending, STEP)
    }

    /// Starts a `read(2)` and does not wait for its return.
    pub fn start_read(&self, len: usize) -> Result<Pending, CallError> {
        self.start_reading(len, false)
    }

    /// `preadv2(2)` with `RWF_NOWAIT` into a buffer of `len` bytes.
    pub fn read_now(&self, len: usize) -> Result<Vec<u8>, CallError> {
        let pending = self.start_reading(len, true)?;
        self.finish_read(pending, STEP)
    }

    fn start_reading(&self, len: usize, nowait: bool) -> Result<Pending, CallError> {
        let handle = self.handle;
        let read = Command::DevRead {
            handle,
            len,
            nowait,
        };
        self.agent.start(self.asks(read))
    }

    /// Waits for the return of a `read(2)`.
    pub fn finish_read(&self, pending: Pending, limit: Duration) -> Result<Vec<u8>, CallError> {
        let hex: String = self.agent.finish(pending, limit)?;
        lab_agent::from_hex(&hex).ok_or_else(|| CallError::Shape {
            command: "read".into(),
            text: hex,
        })
    }

    /// `poll(2)` for these events: what was reported within the time.
    pub fn poll(&self, events: &[&str], limit: Duration) -> Result<Vec<String>, CallError> {
        let pending = self.start_poll(events, limit)?;
        self.finish_poll(pending, limit + STEP)
    }

    /// Starts a `poll(2)` for these events and does not wait for its return.
    pub fn start_poll(&self, events: &[&str], limit: Duration) -> Result<Pending, CallError> {
        self.agent.start(self.asks(Command::DevPoll {
            handle: self.handle,
            timeout_ms: limit.as_millis().try_into().unwrap_or(u16::MAX),
            events: events.iter().map(|it| it.to_string()).collect(),
        }))
    }

    /// Waits for the return of a `poll(2)`.
    pub fn finish_poll(&self, pending: Pending, limit: Duration) -> Result<Vec<String>, CallError> {
        self.agent.finish(pending, limit)
    }

    /// Starts `writes` random writes from `threads` threads; some of them are `templates` with a
    /// change.
    pub fn start_storm(
        &self,
        threads: u32,
        writes: u64,
        seed: u64,
        templates: &[&[u8]],
    ) -> Result<Pending, CallError> {
        self.agent.start(self.asks(Command::DevStorm {
            handle: self.handle,
            threads,
            writes,
            seed,
            templates: templates.iter().map(|it| to_hex(it)).collect(),
        }))
    }

    /// Waits for the end of the writes.
    pub fn finish_storm(&self, pending: Pending, limit: Duration) -> Result<Storm, CallError> {
        self.agent.finish(pending, limit)
    }

    /// `ioctl(2)` with this argument, into which the descriptor goes that is to be put there.
    pub fn ioctl(&self, call: &Ioctl) -> Result<(), CallError> {
        let pending = self.start_ioctl(call)?;
        self.finish_ioctl(pending, STEP)
    }

    /// Starts an `ioctl(2)` and does not wait for its return.
    pub fn start_ioctl(&self, call: &Ioctl) -> Result<Pending, CallError> {
        self.agent.start(self.asks(Command::DevIoctl {
            handle: self.handle,
            request: call.request,
            hex: to_hex(&call.argument),
            put: call.put.clone(),
            unprivileged: call.unprivileged,
        }))
    }

    /// Waits for the return of an `ioctl(2)`.
    pub fn finish_ioctl(&self, pending: Pending, limit: Duration) -> Result<(), CallError> {
        self.agent.finish(pending, limit)
    }

    /// `close(2)`.
    pub fn close(self) -> Result<(), CallError> {
        let handle = self.handle;
        self.agent
            .call(self.asks(Command::DevClose { handle }), STEP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_reports_of_itself_is_left_out() {
        let log = |lines: &[&str]| -> Vec<Record> {
            let record = |text: &&str| Record {
                level: 3,
                at_us: 0,
                text: (*text).into(),
            };
            lines.iter().map(record).collect()
        };
        let text = |records: Vec<Record>| -> Vec<String> {
            without_foreign_reports(records)
                .into_iter()
                .map(|it| it.text)
                .collect()
        };
        let theirs = [
            "=====",
            "BUG: KCSAN: data-race in a / b",
            " a+0x1/0x2",
            "=====",
        ];
        let ours = [
            "=====",
            "BUG: KCSAN: data-race in a / c",
            " c+0x1/0x2 [hv_vss]",
            "=====",
        ];
        let other = ["=====", "BUG: KASAN: slab-use-after-free in d", "====="];
        let warning =
            |place, function| ["--- cut here ---", place, function, "--- end trace 0 ---"];
        let known = warning("WARNING: kernel/smp.c:917 at e", " hv_suspend+0x1/0x2");
        let place = warning("WARNING: mm/slub.c:1 at e", " hv_suspend+0x1/0x2");
        let function = warning("WARNING: kernel/smp.c:917 at e", " vmbus_open+0x1/0x2");
        let through_us = [&known[..3], &[" f+0x1/0x2 [hv_vss]"], &known[3..]].concat();
        let kept = [
            &ours[..],
            &other,
            &place,
            &["between"],
            &function,
            &through_us,
        ]
        .concat();
        let all = [&theirs[..], &ours, &theirs, &other, &known, &kept[7..]].concat();
        assert_eq!(text(log(&all)), kept);
        // One that is cut off may be ours.
        let cut = ["=====", "BUG: KCSAN: data-race in a / b", " a+0x1/0x2"];
        assert_eq!(text(log(&cut)), cut);
        assert_eq!(text(log(&known[..3])), known[..3]);
    }

    #[test]
    fn a_machine_that_a_case_has_started_and_nobody_has_looked_at_is_missed() {
        let given = Judgement::of_runner();
        let missing = given.missing.clone();
        let first = given.of_case();
        let second = first.of_case();
        second.is_there.store(true, SeqCst);
        drop((second, given));
        assert_eq!(missing.load(SeqCst), 0);
        drop(first);
        assert_eq!(missing.load(SeqCst), 1);
    }

    #[test]
    fn limits_grow_with_what_has_come_since_the_boot() {
        let work = Duration::from_millis(50);
        assert_eq!(patience(0.5, work, work), 0.5);
        assert_eq!(patience(0.5, work, work * 8), 4.0);
        assert_eq!(patience(2.0, work, work / 2), 2.0);
    }

    #[test]
    fn a_setting_has_whole_seconds_and_no_fewer() {
        let of = |millis| whole_seconds(Duration::from_millis(millis)).as_secs();
        assert_eq!([2000, 2001, 2999, 3000].map(of), [2, 3, 3, 3]);
    }

    #[test]
    fn whatever_is_a_warning_is_a_complaint() {
        let record = |level, text: &str| Record {
            level,
            at_us: 0,
            text: text.into(),
        };
        let log = [
            record(6, "all is well"),
            record(4, "a driver that nobody knows is not content"),
            record(5, "something of note"),
        ];
        assert_eq!(complaints(&log, &[]), format!("{}\n", log[1].text));
        assert_eq!(complaints(&log, &["is not content"]), "");
    }

    #[test]
    fn a_machine_that_has_ended_is_judged_by_its_console() {
        let console = "lab: down\n[   12.345678] a driver is not content\n[no time] neither\n";
        let records = on_console(console);
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].at_us, 12_345_678);
        assert_eq!(complaints(&records, &[]), "a driver is not content\n");
    }

    #[test]
    fn what_the_oom_killer_says_is_one_report() {
        let record = |text: &&str| Record {
            level: 4,
            at_us: 0,
            text: (*text).into(),
        };
        let lines = [
            "sh invoked oom-killer: order=0",
            " dump_stack+0x1",
            "Memory cgroup out of memory: Killed process 7 (daemon)",
            "another warning",
        ];
        let log: Vec<Record> = lines.iter().map(record).collect();
        assert_eq!(
            complaints(&log, &["invoked oom-killer"]),
            "another warning\n"
        );
    }

    #[test]
    fn errors_of_disks_and_file_systems_are_complaints() {
        let record = |level, text: &str| Record {
            level,
            at_us: 0,
            text: text.into(),
        };
        let log = [
            record(6, "EXT4-fs (ram1): mounted filesystem r/w"),
            record(2, "EXT4-fs error (device ram1): ext4_find_entry:1"),
            record(1, "XFS (ram2): Filesystem has been shut down"),
            record(5, "XFS (ram2): Mounting V5 Filesystem"),
            record(3, "BTRFS: error (device ram3) in write_all_supers:4"),
            record(
                3,
                "Buffer I/O error on dev dm-0, logical block 1, lost sync page write",
            ),
            record(6, "all is well"),
        ];
        let found = complaints(&log, &[]);
        let found: Vec<&str> = found.lines().collect();
        let wrong = [&log[1], &log[2], &log[4], &log[5]].map(|it| it.text.as_str());
        assert_eq!(found, wrong);
        let found = complaints(&log, &["(ram2)", "I/O error", "device ram"]);
        assert_eq!(found, "");
    }

    #[test]
    fn the_crash_of_a_program_is_a_complaint() {
        let record = |text: &str| Record {
            level: 6,
            at_us: 0,
            text: text.into(),
        };
        // The kernel's own records inform only, and what a program has written is taken for that.
        let log = [
            record("hv_vss_daemon: panicked at daemon/src/backup.rs:7:3:"),
            record(
                "hv_vss_guard[7]: segfault at 8 ip 55e0 sp 7ffc error 4 in hv_vss_daemon[55e0+1]",
            ),
            record("traps: hv_vss_daemon[8] trap invalid opcode ip:55e0 sp:7ffc error:0"),
            record("traps: hv_vss_daemon[9] general protection fault ip:55e0 sp:7ffc error:0"),
            record("hv_vss_daemon: all is thawed"),
        ];
        let found = complaints(&log, &[]);
        let crashes: Vec<&str> = log[..4].iter().map(|it| it.text.as_str()).collect();
        assert_eq!(found.lines().collect::<Vec<_>>(), crashes);
        assert_eq!(complaints(&log[..1], &["panicked at"]), "");
        // On a console, too, where what the daemon says is no complaint otherwise.
        let console: Vec<String> = log
            .iter()
            .map(|it| format!("[    1.000002] {}\n", it.text))
            .collect();
        let found = complaints(&on_console(&console.concat()), &[]);
        assert_eq!(found.lines().collect::<Vec<_>>(), crashes);
    }

    #[test]
    fn only_the_expected_report_is_left_out() {
        let lines = |lines: &[&str]| -> Vec<Record> {
            let record = |text: &&str| Record {
                level: 4,
                at_us: 0,
                text: (*text).into(),
            };
            lines.iter().map(record).collect()
        };
        let first = [
            "--- cut here ---",
            "WARNING: a",
            " expected+0x1",
            "--- end trace ---",
        ];
        let second = [
            "--- cut here ---",
            "WARNING: b",
            " other+0x1",
            "--- end trace ---",
        ];
        let log = lines(&[first, second].concat());
        let found = complaints(&log, &["expected+"]);
        assert_eq!(found.lines().collect::<Vec<_>>(), second);
    }

    #[test]
    fn dirty_memory_is_found_in_meminfo() {
        let text = "MemFree:  1 kB\nDirty:            262160 kB\nWriteback:   0 kB\n";
        assert_eq!(dirty_kib_in(text).expect("it is there"), 262_160);
        assert!(dirty_kib_in("MemFree: 1 kB\n").is_err());
    }

    #[test]
    fn a_path_of_the_mount_table_is_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b"), "/mnt/a b");
        assert_eq!(unescape(r"/mnt/c\012d\134040"), "/mnt/c\nd\\040");
        assert_eq!(unescape("/plain"), "/plain");
    }
}
