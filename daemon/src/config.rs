// SPDX-License-Identifier: GPL-2.0-only

//! The configuration, `/etc/hv_vss/daemon.toml`: what to leave out, how long to wait, how strict to be.
//! Without one, everything has the default that [`Config::default`] shows. What the files in
//! `daemon.toml.d` beside it say, in the order of their names, takes the place of what was said before,
//! key by key.
//!
//! ```toml
//! strict = false          # a file system that cannot freeze fails the backup
//! listed_disks_only = false # freeze only what is on the disks that the host backs up
//! prepare = 300           # seconds that looking up what is mounted may take
//! deadline = 60           # seconds from the first freeze to the thaw, at the latest
//! give_up = 10            # seconds that one file system may take to freeze
//! parallel = 32           # file systems that are worked on at a time
//! write_back = 5          # the same for writing back before the freeze: 4 and the number of
//!                         # processors
//!
//! [exclude]               # never frozen; patterns with *, ? and [...]
//! paths = ["/srv/scratch*"] # where whole file systems or subvolumes are mounted
//! types = ["vfat"]
//! devices = ["/dev/sdb*", "8:32"]
//!
//! [include]               # if anything is listed here, nothing else is frozen
//! paths = ["/srv/*"]
//!
//! [hooks]                 # programs in /etc/hv_vss/hooks.d, and by choice
//! qemu = false            # those of the QEMU guest agent
//! open_vm_tools = false   # those of open-vm-tools
//! limit = 30              # seconds that each call may take
//! optional = []           # patterns of names: those that may fail
//! ```
//!
//! It knows file systems by what an operator sees of them and nothing of freezing.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use glob::{MatchOptions, Pattern};
use serde::{
    de::{Error as _, IgnoredAny},
    Deserialize, Deserializer,
};
use serde_json::{json, Value};

use crate::apart::Questions;
use crate::hooks::Hook;
use crate::plan::{FileSystem, Place, Plan};
use crate::record::RUN_DIR;

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/hv_vss/daemon.toml";

/// How long reading it may take: it may be a link into a network mount that is dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is read again while that hangs: what it hangs in may be in the way no longer.
const MOST_HANGING: usize = 4;
/// Bytes that one file may have.
const MOST_BYTES: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no text.
    #[error(
        "the configuration {path} is not valid: line {line}, column {column}: this is not UTF-8"
    )]
    NotText {
        /// Which file.
        path: PathBuf,
        /// Where, counted from 1.
        line: usize,
        /// There, in characters.
        column: usize,
    },
    /// It is not what it should be; the cause has line and column.
    #[error("the configuration {path} is not valid")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        source: toml::de::Error,
    },
}

/// What an operator can choose.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether a file system that cannot freeze, or that is out of order, fails the backup.
    pub strict: bool,
    /// Whether only that is frozen which has a part of the disks that the host backs up.
    pub listed_disks_only: bool,
    /// Seconds that looking up what is mounted may take, 1 to 3600.
    pub prepare: Duration,
    /// Seconds from the first freeze to the thaw at the latest, 1 to 3600.
    pub deadline: Duration,
    /// Seconds that one file system may take to freeze, 1 to 3600; or may hang in being written back; then it is given up.
    pub give_up: Duration,
    /// How many file systems are worked on at a time, 1 to 256.
    pub parallel: usize,
    /// How many file systems are written back at a time before the freeze, 1 to 256, if that is said: see
    /// [`Config::write_back`].
    pub write_back: Option<usize>,
    /// Where the history is kept.
    pub state_dir: PathBuf,
    /// What is never frozen.
    pub exclude: Rules,
    /// If anything is named here, only that is frozen.
    pub include: Rules,
    /// Which programs take part.
    pub hooks: HookRules,
    /// Whether it has a `run_dir`, which was a setting once.
    has_run_dir: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            strict: false,
            listed_disks_only: false,
            prepare: Duration::from_secs(300),
            deadline: Duration::from_secs(60),
            give_up: Duration::from_secs(10),
            parallel: 32,
            write_back: None,
            state_dir: "/var/lib/hv_vss".into(),
            exclude: Rules::default(),
            include: Rules::default(),
            hooks: HookRules::default(),
            has_run_dir: false,
        }
    }
}

/// Which hooks are called, and how.
#[derive(Clone, Debug)]
pub struct HookRules {
    /// Whether those of the QEMU guest agent are; `None` where nothing is said, and they are not.
    pub qemu: Option<bool>,
    /// The same of those of open-vm-tools.
    pub open_vm_tools: Option<bool>,
    /// Seconds that each call may take, 1 to 3600.
    pub limit: Duration,
    /// The names of those that may fail.
    optional: Vec<Rule>,
}

impl Default for HookRules {
    fn default() -> Self {
        HookRules {
            qemu: None,
            open_vm_tools: None,
            limit: Duration::from_secs(30),
            optional: Vec::new(),
        }
    }
}

impl HookRules {
    /// Whether there is a backup without it.
    pub fn is_optional(&self, hook: &Hook) -> bool {
        let name = hook.path.file_name().unwrap_or_default().to_string_lossy();
        self.optional.iter().any(|rule| rule.matches(&name))
    }

    /// The rules that match none of these, in words.
    pub fn idle(&self, hooks: &[Hook]) -> Vec<String> {
        let matches = |rule: &Rule| {
            let mut names = hooks.iter().filter_map(|it| it.path.file_name());
            names.any(|name| rule.matches(&name.to_string_lossy()))
        };
        let idle = self.optional.iter().filter(|rule| !matches(rule));
        idle.map(|rule| format!("hooks.optional {}", rule.0))
            .collect()
    }
}

/// What one file says.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Layer {
    strict: Option<bool>,
    listed_disks_only: Option<bool>,
    #[serde(deserialize_with = "seconds")]
    prepare: Option<Duration>,
    #[serde(deserialize_with = "seconds")]
    deadline: Option<Duration>,
    #[serde(deserialize_with = "seconds")]
    give_up: Option<Duration>,
    #[serde(deserialize_with = "threads")]
    parallel: Option<usize>,
    #[serde(deserialize_with = "threads")]
    write_back: Option<usize>,
    run_dir: Option<IgnoredAny>,
    #[serde(deserialize_with = "absolute")]
    state_dir: Option<PathBuf>,
    exclude: RulesLayer,
    include: RulesLayer,
    hooks: HooksLayer,
}

/// What it says of file systems.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RulesLayer {
    paths: Option<Vec<Rule>>,
    types: Option<Vec<Rule>>,
    devices: Option<Vec<Rule>>,
}

/// What it says of hooks.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HooksLayer {
    qemu: Option<bool>,
    open_vm_tools: Option<bool>,
    #[serde(deserialize_with = "seconds")]
    limit: Option<Duration>,
    optional: Option<Vec<Rule>>,
}

impl Layer {
    /// Puts what it says in the place of what was said before.
    fn apply(self, config: &mut Config) {
        put(&mut config.strict, self.strict);
        put(&mut config.listed_disks_only, self.listed_disks_only);
        put(&mut config.prepare, self.prepare);
        put(&mut config.deadline, self.deadline);
        put(&mut config.give_up, self.give_up);
        put(&mut config.parallel, self.parallel);
        config.write_back = self.write_back.or(config.write_back);
        config.has_run_dir |= self.run_dir.is_some();
        put(&mut config.state_dir, self.state_dir);
        for (rules, layer) in [
            (&mut config.exclude, self.exclude),
            (&mut config.include, self.include),
        ] {
            put(&mut rules.paths, layer.paths);
            put(&mut rules.types, layer.types);
            put(&mut rules.devices, layer.devices);
        }
        let hooks = &mut config.hooks;
        hooks.qemu = self.hooks.qemu.or(hooks.qemu);
        hooks.open_vm_tools = self.hooks.open_vm_tools.or(hooks.open_vm_tools);
        put(&mut hooks.limit, self.hooks.limit);
        put(&mut hooks.optional, self.hooks.optional);
    }
}

fn put<T>(place: &mut T, said: Option<T>) {
    if let Some(value) = said {
        *place = value;
    }
}

fn seconds<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    match u64::deserialize(d)? {
        s @ 1..=3600 => Ok(Some(Duration::from_secs(s))),
        other => Err(D::Error::custom(format!(
            "{other} is not between 1 and 3600 seconds"
        ))),
    }
}

fn threads<'de, D: Deserializer<'de>>(d: D) -> Result<Option<usize>, D::Error> {
    match usize::deserialize(d)? {
        n @ 1..=256 => Ok(Some(n)),
        other => Err(D::Error::custom(format!(
            "{other} is not between 1 and 256"
        ))),
    }
}

/// The daemon, its guard and whoever asks them need not be at the same place.
fn absolute<'de, D: Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(d)?;
    match path.is_absolute() {
        true => Ok(Some(path)),
        false => Err(D::Error::custom(format!(
            "{} is not an absolute path",
            path.display()
        ))),
    }
}

/// A set of file systems, by any of three properties.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Any path at which it is mounted as a whole, or a whole subvolume of it: not a folder of it that
    /// is shown elsewhere. Of other mount namespaces only if it is not mounted in the daemon's. Of what is
    /// mounted no longer and held, any at which it was. Subvolumes freeze together, so to exclude takes a path
    /// of each that is mounted.
    paths: Vec<Rule>,
    /// Its type.
    types: Vec<Rule>,
    /// Its source as the mount table names it, or its number as `major:minor`.
    devices: Vec<Rule>,
}

/// What a rule speaks of.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Path,
    Type,
    Device,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Path => "path",
            Kind::Type => "type",
            Kind::Device => "device",
        })
    }
}

/// A rule that leaves nothing out, or takes nothing in, though it should.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdleRule {
    /// The rule, in words.
    pub rule: String,
    /// The file system of which it speaks in part only. If there is none it matches nothing: mistyped, or of
    /// another machine.
    pub part_of: Option<String>,
}

impl fmt::Display for IdleRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, part_of } = self;
        match part_of {
            None => write!(f, "the rule to {rule} matches no file system"),
            Some(it) => write!(
                f,
                "the rule to {rule} speaks of a part of {it} only, which freezes as a whole or not at all: it is \
                 not left out"
            ),
        }
    }
}

/// A shell pattern. A `/` is matched like any other character.
#[derive(Clone, Debug)]
struct Rule(Pattern);

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Pattern::new(&text)
            .map(Rule)
            .map_err(|e| D::Error::custom(format!("{text:?} is not a pattern: {e}")))
    }
}

impl Rule {
    fn matches(&self, text: &str) -> bool {
        let options = MatchOptions {
            require_literal_leading_dot: false,
            require_literal_separator: false,
            case_sensitive: true,
        };
        self.0.matches_with(text, options)
    }

    fn matches_path(&self, place: &Place) -> bool {
        self.matches(&place.known_path().to_string_lossy())
    }

    /// Whether it fits, as a rule of this kind.
    fn fits(&self, kind: Kind, file_system: &FileSystem) -> bool {
        match kind {
            Kind::Path => places_of(file_system).any(|it| self.matches_path(it)),
            Kind::Type => self.matches(&file_system.fs_type),
            Kind::Device => {
                let source = file_system.source.as_deref().unwrap_or_default();
                self.matches(&source.to_string_lossy())
                    || self.matches(&file_system.dev.to_string())
            }
        }
    }
}

impl Rules {
    fn is_empty(&self) -> bool {
        self.paths.is_empty() && self.types.is_empty() && self.devices.is_empty()
    }

    /// All of them, each with what it speaks of.
    fn each(&self) -> impl Iterator<Item = (Kind, &Rule)> {
        let paths = self.paths.iter().map(|rule| (Kind::Path, rule));
        let types = self.types.iter().map(|rule| (Kind::Type, rule));
        let devices = self.devices.iter().map(|rule| (Kind::Device, rule));
        paths.chain(types).chain(devices)
    }

    /// The first rule that fits, with what it speaks of; if it is to be of `all` of it, none for a part.
    fn find(&self, file_system: &FileSystem, all: bool) -> Option<(Kind, &Rule)> {
        let mut each = self.each();
        each.find(|(kind, rule)| {
            let is_for_a_part =
                || all && matches!(kind, Kind::Path) && self.is_for_a_part(file_system);
            rule.fits(*kind, file_system) && !is_for_a_part()
        })
    }

    /// Where one is mounted that a rule names by its path, and a path as well that none names: it freezes as a whole
    /// or not at all.
    fn also_at(&self, file_system: &FileSystem, rule: &Rule) -> Option<(String, String)> {
        let shown = |it: &Place| it.known_path().to_string_lossy().escape_debug().to_string();
        let is_named = |it: &&Place| self.paths.iter().any(|rule| rule.matches_path(it));
        let named = places_of(file_system).find(|it| rule.matches_path(it))?;
        let other = places_of(file_system).find(|it| !is_named(it))?;
        Some((shown(named), shown(other)))
    }

    /// Whether its subvolumes, which freeze together, are not all among what the paths together name. Whoever
    /// shows one elsewhere writes to it as well.
    fn is_for_a_part(&self, file_system: &FileSystem) -> bool {
        let is_named = |it: &&Place| self.paths.iter().any(|rule| rule.matches_path(it));
        let named = places_of(file_system).filter(is_named);
        let named: BTreeSet<_> = named.map(|it| &it.subvolume).collect();
        let mut mounted = file_system.places.iter().map(|it| &it.subvolume);
        !named.contains(&None) && !mounted.all(|it| named.contains(it))
    }

    /// Those that choose nothing of a plan, and where they are to be of `all` of a file system, those that
    /// are of a part only. `verb` is what they are to do.
    fn idle(&self, verb: &str, all: bool, plan: &Plan) -> BTreeSet<IdleRule> {
        let mut idle = BTreeSet::new();
        for (kind, rule) in self.each() {
            let fits = plan.file_systems().filter(|it| rule.fits(kind, it));
            let fits: Vec<_> = fits.collect();
            let says = |part_of| IdleRule {
                rule: format!("{verb} {kind} {}", rule.0),
                part_of,
            };
            let in_part = fits.iter().filter(|it| self.find(it, all).is_none());
            idle.extend(in_part.map(|it| says(Some(it.to_string()))));
            idle.extend(fits.is_empty().then(|| says(None)));
        }
        idle
    }
}

/// The places whose paths a rule may speak of.
fn places_of(file_system: &FileSystem) -> impl Iterator<Item = &Place> {
    let is_here = file_system.places.iter().any(|place| place.namespace == 0);
    let places = file_system.places.iter();
    places.filter(move |place| place.whole && (place.namespace == 0 || !is_here))
}

impl Config {
    /// Reads the configuration at `path`; without a path the default one, which need not exist. Whoever does has the
    /// descriptors of all, so it is read [apart](Questions): what does not answer in time cannot be read.
    pub fn load_in_time(path: Option<&Path>) -> Result<Self, ConfigError> {
        static ASKED: Questions<PathBuf> = Questions::up_to(MOST_HANGING);
        let file = path.unwrap_or(Path::new(DEFAULT_PATH)).to_owned();
        let (its, must_exist) = (file.clone(), path.is_some());
        let read = move |_| read(&its, must_exist);
        let read = ASKED.ask(file.clone(), &[], PATIENCE, read);
        Self::of(read.map_err(cannot_read(&file))??)
    }

    /// What these files say, one after the other.
    fn of(files: Vec<(PathBuf, Vec<u8>)>) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for (file, bytes) in files {
            parse(text_in(&bytes, &file)?, &file)?.apply(&mut config);
        }
        Ok(config)
    }

    /// All that it says, for whoever wants to judge by what a daemon goes by: the files may have changed.
    pub fn to_value(&self) -> Value {
        let texts = |rules: &[Rule]| -> Vec<String> {
            let texts = rules.iter().map(|it| it.0.as_str().to_owned());
            texts.collect()
        };
        let rules = |it: &Rules| {
            json!({
                "paths": texts(&it.paths),
                "types": texts(&it.types),
                "devices": texts(&it.devices),
            })
        };
        let mut all = json!({
            "strict": self.strict,
            "listed_disks_only": self.listed_disks_only,
            "prepare": self.prepare.as_secs(),
            "deadline": self.deadline.as_secs(),
            "give_up": self.give_up.as_secs(),
            "parallel": self.parallel,
            "state_dir": self.state_dir,
            "exclude": rules(&self.exclude),
            "include": rules(&self.include),
            "hooks": {
                "qemu": self.hooks.qemu,
                "open_vm_tools": self.hooks.open_vm_tools,
                "limit": self.hooks.limit.as_secs(),
                "optional": texts(&self.hooks.optional),
            },
        });
        if let Some(most) = self.write_back {
            all["write_back"] = most.into();
        }
        if self.has_run_dir {
            all["run_dir"] = RUN_DIR.into();
        }
        all
    }

    /// The same again; `None` if it is of a daemon that says something else.
    pub fn of_value(value: &Value) -> Option<Self> {
        let mut config = Self::default();
        Layer::deserialize(value).ok()?.apply(&mut config);
        Some(config)
    }

    /// How many file systems are written back at a time before the freeze. Where nothing is said it goes by the
    /// processors of whoever does that, which need not be those of whoever only reads.
    pub fn write_back(&self) -> usize {
        let by_processors =
            || std::thread::available_parallelism().map_or(5, |n| (4 + n.get()).min(256));
        self.write_back.unwrap_or_else(by_processors)
    }

    /// What it says in vain, in words.
    pub fn in_vain(&self) -> Option<String> {
        self.has_run_dir.then(|| {
            format!("run_dir is not a setting any more: lock and record are in {RUN_DIR}, whatever it says")
        })
    }

    /// The rule by which `file_system` is not to be frozen, if there is one.
    pub fn excludes(&self, file_system: &FileSystem) -> Option<String> {
        if let Some((kind, rule)) = self.exclude.find(file_system, true) {
            let is_path = matches!(kind, Kind::Path);
            let also_at = is_path.then(|| self.exclude.also_at(file_system, rule));
            let text = format!("exclude {kind} {}", rule.0);
            return Some(match also_at.flatten() {
                Some((named, other)) => {
                    format!(
                        "{text}, being mounted at {named}, though it is also mounted at {other}"
                    )
                }
                None => text,
            });
        }
        // What is mounted nowhere may have been where an operator wants it from, and by the name that it was
        // mounted by, which nobody tells any more.
        let Rules { paths, devices, .. } = &self.include;
        let are_lost = !(paths.is_empty() && devices.is_empty());
        let may_be_meant = file_system.places.is_empty() && are_lost;
        let wanted = self.include.is_empty()
            || may_be_meant
            || self.include.find(file_system, false).is_some();
        (!wanted).then(|| "include, which names others".to_owned())
    }

    /// The rules that do nothing about what was found, or not all that they seem to.
    pub fn idle_rules(&self, plan: &Plan) -> BTreeSet<IdleRule> {
        let mut idle = self.exclude.idle("exclude", true, plan);
        idle.append(&mut self.include.idle("include", false, plan));
        idle
    }
}

fn parse(text: &str, file: &Path) -> Result<Layer, ConfigError> {
    toml::from_str(text).map_err(|source| ConfigError::Parse {
        path: file.to_owned(),
        source,
    })
}

fn cannot_read(path: &Path) -> impl FnOnce(io::Error) -> ConfigError + '_ {
    move |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    }
}

/// The files in the order in which they count, with what they hold.
fn read(file: &Path, must_exist: bool) -> Result<Vec<(PathBuf, Vec<u8>)>, ConfigError> {
    let mut all = Vec::new();
    match bytes_of(file) {
        Ok(bytes) => all.push((file.to_owned(), bytes)),
        Err(e) if !must_exist && e.kind() == io::ErrorKind::NotFound && !leads_nowhere(file) => {}
        Err(source) => return Err(cannot_read(file)(source)),
    }
    for drop_in in drop_ins(file)? {
        let bytes = bytes_of(&drop_in).map_err(cannot_read(&drop_in))?;
        all.push((drop_in, bytes));
    }
    Ok(all)
}

/// What a file holds. Of anything else nobody knows when it ends.
fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    let mut file = File::open(path)?.take(MOST_BYTES + 1);
    if file.read_to_end(&mut bytes)? as u64 > MOST_BYTES {
        return Err(io::Error::other(format!(
            "it is larger than {MOST_BYTES} bytes"
        )));
    }
    Ok(bytes)
}

/// Whether what is not found at `path` is so because it, or what is on the way there, is a link that leads nowhere.
/// What that was to lead to nobody knows: it is not the same as if there were nothing.
pub fn leads_nowhere(path: &Path) -> bool {
    let is_there = |it: &&Path| {
        let found = it.symlink_metadata();
        found.map_or_else(|e| e.kind() != io::ErrorKind::NotFound, |_| true)
    };
    let nearest = path.ancestors().find(is_there);
    nearest.is_some_and(|it| it.metadata().is_err())
}

fn text_in<'a>(bytes: &'a [u8], file: &Path) -> Result<&'a str, ConfigError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let (good, _) = bytes.split_at(error.valid_up_to());
        let lines = String::from_utf8_lossy(good);
        let last = lines.rsplit('\n').next().unwrap_or_default();
        ConfigError::NotText {
            path: file.to_owned(),
            line: lines.matches('\n').count() + 1,
            column: last.chars().count() + 1,
        }
    })
}

/// The files `*.toml` in the folder `<file>.d` that are not hidden, in the order of their names.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut folder = file.as_os_str().to_owned();
    folder.push(".d");
    let folder = Path::new(&folder);
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && !leads_nowhere(folder) => {
            return Ok(Vec::new())
        }
        other => other.map_err(cannot_read(folder))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(cannot_read(folder))?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        // What an editor has open, or an archive of another system has brought, is hidden.
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn parse(text: &str) -> Result<Config, String> {
        let layer = super::parse(text, Path::new("test.toml"));
        let mut config = Config::default();
        layer
            .map_err(|e| crate::logbook::words(&e))?
            .apply(&mut config);
        Ok(config)
    }

    #[test]
    fn what_it_says_is_told_in_full() {
        let text =
            "strict = true\nlisted_disks_only = true\nprepare = 1\ndeadline = 2\ngive_up = 3\n\
                    parallel = 4\nwrite_back = 5\nrun_dir = 'x'\nstate_dir = '/s'\n\
                    exclude = { paths = ['/a*'], types = ['b'], devices = ['c'] }\n\
                    include = { paths = ['/d'], types = ['e'], devices = ['f?'] }\n\
                    hooks = { qemu = true, open_vm_tools = true, limit = 6, optional = ['9*'] }\n";
        let files = vec![(PathBuf::from("a"), text.as_bytes().to_vec())];
        for config in [Config::of(files).unwrap(), Config::default()] {
            let again = Config::of_value(&config.to_value()).unwrap();
            assert_eq!(format!("{again:?}"), format!("{config:?}"));
        }
        assert!(Config::of_value(&json!({ "strict": "perhaps" })).is_none());
        assert!(Config::of_value(&Value::Null).is_none());
    }

    #[test]
    fn the_file_that_is_installed_has_each_key_with_its_default_and_so_has_its_page() {
        // A comment has a blank after its sign, a key has none.
        let is_key = |it: &str| it.starts_with(|c: char| c.is_ascii_lowercase() || c == '[');
        let lines = include_str!("../hv_vss_daemon.toml").lines();
        let lines = lines.map(|line| match line.strip_prefix('#') {
            Some(key) if is_key(key) => key,
            _ => line,
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        assert!(parse(&text).is_ok());
        let said: Value = toml::from_str(&text).unwrap();
        let mut default = Config::default().to_value();
        // It goes by the processors: this is that of a machine with one.
        default["write_back"] = 5.into();
        // It tells these from what was said, and goes by them all the same.
        for contract in ["qemu", "open_vm_tools"] {
            assert_eq!(default["hooks"][contract].take(), Value::Null);
            default["hooks"][contract] = false.into();
        }
        assert_eq!(said, default);

        let page = include_str!("../hv_vss.toml.5");
        let tells = |line: String| {
            let is_told = page.lines().any(|it| it == line);
            assert!(is_told, "hv_vss.toml(5) lacks {line}");
        };
        let tells_of = |key: &str, value: &Value| {
            let default = match value {
                _ if key == "write_back" => "4 and the number of processors".to_owned(),
                Value::String(text) => format!("\\(dq{text}\\(dq"),
                other => other.to_string(),
            };
            tells(format!(".BR {key} \" ({default})\""));
        };
        for (key, value) in default.as_object().unwrap() {
            let Some(table) = value.as_object() else {
                tells_of(key, value);
                continue;
            };
            tells(format!(".B [{key}]"));
            for (key, value) in table {
                match value {
                    // Without a default: a list of rules is empty.
                    Value::Array(_) if key != "optional" => tells(format!(".B {key}")),
                    _ => tells_of(key, value),
                }
            }
        }
    }

    /// They may have other processors, as in a container or by a drop-in of the unit.
    #[test]
    fn a_default_that_is_not_the_same_everywhere_is_not_taken_for_a_change() {
        let config = parse("").unwrap();
        assert!(config.to_value()["write_back"].is_null());
        assert!((5..=256).contains(&config.write_back()));
        let config = parse("write_back = 3").unwrap();
        assert_eq!(config.to_value()["write_back"], 3);
        assert_eq!(config.write_back(), 3);
    }

    #[test]
    fn what_a_later_file_says_takes_the_place_of_what_was_said_before_key_by_key() {
        let dir = std::env::temp_dir().join(format!("hv-vss-config-{}", std::process::id()));
        let file = dir.join("daemon.toml");
        let drop_ins = dir.join("daemon.toml.d");
        std::fs::create_dir_all(&drop_ins).unwrap();
        let put = |path: &Path, text: &str| std::fs::write(path, text).unwrap();
        put(
            &file,
            "strict = true\ndeadline = 7\nexclude = { types = ['vfat'], paths = ['/a'] }",
        );
        put(&drop_ins.join("20.toml"), "deadline = 9\nhooks.limit = 5");
        put(
            &drop_ins.join("10.toml"),
            "deadline = 8\nexclude.paths = []",
        );
        put(&drop_ins.join("30.toml.bak"), "nonsense");
        put(&drop_ins.join(".40.toml"), "nonsense");
        let config = Config::load_in_time(Some(&file)).unwrap();
        assert!(config.strict);
        assert_eq!(config.deadline, Duration::from_secs(9));
        assert_eq!(config.hooks.limit, Duration::from_secs(5));
        let fs_type = |it| file_system(&["/a"], it, "/dev/sda1", "8:1");
        assert_eq!(config.excludes(&fs_type("ext4")), None);
        assert!(config.excludes(&fs_type("vfat")).is_some());
        put(&drop_ins.join("40.toml"), "strict = true\n\ndeadlin = 1\n");
        let error = Config::load_in_time(Some(&file)).unwrap_err();
        let error = crate::logbook::words(&error);
        assert!(error.contains("40.toml"), "{error}");
        assert!(error.contains("line 3, column 1"), "{error}");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_no_file_or_no_text_or_behind_a_link_that_leads_nowhere_is_said_to_be_so() {
        use std::os::unix::fs::symlink;
        let dir = std::env::temp_dir().join(format!("hv-vss-no-file-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("daemon.toml.d")).unwrap();
        let file = dir.join("daemon.toml");
        let drop_in = dir.join("daemon.toml.d/10.toml");
        assert_eq!(read(&file, false).unwrap(), []);
        assert!(read(&file, true).is_err());
        let why = |at: &Path| match Config::load_in_time(Some(at)) {
            Err(error) => crate::logbook::words(&error),
            Ok(_) => String::new(),
        };
        std::fs::write(&file, "strict = true\n").unwrap();
        assert_eq!(why(&file), "");
        assert!(Config::load_in_time(Some(&file)).unwrap().strict);
        nix::unistd::mkfifo(&drop_in, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let said = why(&file);
        assert!(
            said.contains("10.toml") && said.contains("not a regular file"),
            "{said}"
        );
        std::fs::remove_file(&drop_in).unwrap();
        std::fs::write(&drop_in, b"strict = true\n# \xc3\xa9t\xe9\n").unwrap();
        let said = why(&file);
        assert!(
            said.contains("10.toml") && said.contains("line 2, column 5"),
            "{said}"
        );
        let large = File::create(&drop_in).unwrap();
        large.set_len(MOST_BYTES + 1).unwrap();
        assert!(why(&file).contains("larger"));
        std::fs::remove_dir_all(dir.join("daemon.toml.d")).unwrap();
        symlink("nowhere", dir.join("daemon.toml.d")).unwrap();
        assert!(why(&file).contains("daemon.toml.d"));
        std::fs::remove_file(&file).unwrap();
        std::fs::remove_file(dir.join("daemon.toml.d")).unwrap();
        symlink("nowhere", &file).unwrap();
        assert!(read(&file, false).is_err());
        symlink("nowhere", dir.join("etc")).unwrap();
        assert!(read(&dir.join("etc/daemon.toml"), false).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    fn file_system(paths: &[&str], fs_type: &str, source: &str, dev: &str) -> FileSystem {
        FileSystem {
            dev: dev.parse().unwrap(),
            fs_type: fs_type.into(),
            source: Some(source.into()),
            devices: Vec::new(),
            listed: None,
            disks: Vec::new(),
            below: None,
            stands_on: None,
            perhaps_on: Vec::new(),
            places: paths.iter().map(|path| place(0, path, true)).collect(),
        }
    }

    fn place(namespace: usize, path: &str, whole: bool) -> Place {
        Place {
            namespace,
            id: 1,
            path: path.into(),
            whole,
            subvolume: None,
            walkable: true,
            layers: None,
            hidden: false,
            was_at: None,
        }
    }

    #[test]
    fn a_path_speaks_of_whole_file_systems_and_of_other_namespaces_last() {
        let config = parse("exclude.paths = ['/srv/*']").unwrap();
        let with = |places: Vec<Place>| FileSystem {
            places,
            ..file_system(&[], "ext4", "/dev/sda1", "8:1")
        };
        let here = |path, whole| place(0, path, whole);
        let there = |path, whole| place(3, path, whole);
        let lost = |path: &str| Place {
            was_at: Some(path.into()),
            ..place(0, "/srv/in/the/way/of/proc", true)
        };
        for (places, excluded) in [
            (vec![here("/", true), here("/srv/a", true)], true),
            // A folder of the root, here and elsewhere.
            (vec![here("/", true), here("/srv/a", false)], false),
            (vec![here("/", true), there("/srv/a", true)], false),
            (vec![there("/srv/a", true), there("/data", true)], true),
            (vec![there("/srv/a", false)], false),
            (vec![lost("/srv/a")], true),
            (vec![lost("/data")], false),
            (vec![], false),
        ] {
            let found = config.excludes(&with(places.clone()));
            assert_eq!(found.is_some(), excluded, "{places:?}");
        }
    }

    #[test]
    fn what_a_rule_leaves_out_that_is_also_mounted_elsewhere_is_named_with_both_paths() {
        let excludes = |rules: &str, places: &[(usize, &str)]| {
            let each = places.iter();
            let places = each.map(|(namespace, path)| place(*namespace, path, true));
            let it = FileSystem {
                places: places.collect(),
                ..file_system(&[], "ext4", "/dev/sda1", "8:1")
            };
            let config = parse(&format!("exclude.paths = [{rules}]")).unwrap();
            config.excludes(&it).unwrap()
        };
        let both = [(0, "/data"), (0, "/srv/a"), (0, "/srv/b")];
        assert_eq!(
            excludes("'/srv/*'", &both),
            "exclude path /srv/*, being mounted at /srv/a, though it is also mounted at /data"
        );
        assert_eq!(excludes("'/srv/*', '/data'", &both), "exclude path /srv/*");
        // Others may have it where they like.
        let there = [(0, "/srv/a"), (1, "/data")];
        assert_eq!(excludes("'/srv/*'", &there), "exclude path /srv/*");
    }

    #[test]
    fn subvolumes_freeze_together_so_a_rule_to_exclude_names_all_that_are_mounted() {
        let at = |namespace, path, subvolume: Option<&str>| Place {
            subvolume: subvolume.map(PathBuf::from),
            ..place(namespace, path, true)
        };
        let root = || at(0, "/", Some("/@"));
        let scratch = || at(0, "/srv/scratch", Some("/@scratch"));
        let folder = |it: Place| Place { whole: false, ..it };
        let part = ["exclude path /srv/scratch*"];
        for (paths, places, excluded, partial) in [
            ("'/srv/scratch*'", vec![root(), scratch()], false, &part[..]),
            ("'/srv/scratch*'", vec![scratch()], true, &[]),
            ("'/srv/scratch*', '/'", vec![root(), scratch()], true, &[]),
            ("'*'", vec![root(), scratch()], true, &[]),
            // The top holds them all, whether or not they are mounted as well.
            (
                "'/srv/top'",
                vec![root(), at(0, "/srv/top", None)],
                true,
                &[],
            ),
            // A folder of the same subvolume is no other, and of another it is written to.
            (
                "'/srv/scratch*'",
                vec![scratch(), folder(at(0, "/tmp", Some("/@scratch")))],
                true,
                &[],
            ),
            (
                "'/srv/scratch*'",
                vec![scratch(), folder(at(0, "/tmp", Some("/@")))],
                false,
                &part,
            ),
            // Elsewhere there may be more, and what is there too is no more.
            (
                "'/srv/scratch*'",
                vec![scratch(), at(2, "/", Some("/@"))],
                false,
                &part,
            ),
            (
                "'/srv/scratch*'",
                vec![scratch(), at(2, "/s", Some("/@scratch"))],
                true,
                &[],
            ),
        ] {
            let btrfs = FileSystem {
                places,
                ..file_system(&[], "btrfs", "/dev/sda1", "0:40")
            };
            let config = parse(&format!("exclude.paths = [{paths}]")).unwrap();
            assert_eq!(
                config.excludes(&btrfs).is_some(),
                excluded,
                "{paths} {btrfs:?}"
            );
            let taking = parse(&format!("include.paths = [{paths}]")).unwrap();
            assert_eq!(taking.excludes(&btrfs), None, "{paths} {btrfs:?}");
            let plan = Plan {
                waves: vec![vec![btrfs]],
                ..Plan::default()
            };
            let idle: Vec<_> = config.idle_rules(&plan).into_iter().collect();
            assert!(idle.iter().all(|it| it.part_of.is_some()), "{idle:?}");
            let idle: Vec<_> = idle.iter().map(|it| it.rule.as_str()).collect();
            assert_eq!(idle, partial, "{paths}");
            assert!(taking.idle_rules(&plan).is_empty());
        }
    }

    #[test]
    fn rules_that_match_nothing_are_named() {
        let config = parse(
            "exclude = { paths = ['/srv', '/srb'], types = ['zfs'] }\ninclude.devices = ['8:1', '8:2']",
        )
        .unwrap();
        let plan = Plan {
            waves: vec![vec![file_system(&["/srv"], "ext4", "/dev/sda1", "8:1")]],
            ..Plan::default()
        };
        let idle = config.idle_rules(&plan).into_iter();
        let idle: Vec<String> = idle.map(|it| it.rule).collect();
        let expected = [
            "exclude path /srb",
            "exclude type zfs",
            "include device 8:2",
        ];
        assert_eq!(idle, expected);
    }

    #[test]
    fn rules_that_match_no_hook_are_named() {
        let config = parse("hooks.optional = ['10-*', '20-b']").unwrap();
        let hook = Hook {
            path: "/etc/hv_vss/hooks.d/10-a".into(),
            contract: crate::hooks::Contract::Qemu,
        };
        assert_eq!(config.hooks.idle(&[hook]), ["hooks.optional 20-b"]);
    }

    #[test]
    fn what_was_a_setting_once_is_named_and_does_nothing() {
        assert_eq!(parse("").unwrap().in_vain(), None);
        let config = parse("run_dir = '/run/other'").unwrap();
        assert!(config.in_vain().unwrap().contains("run_dir"));
    }

    #[test]
    fn an_empty_file_is_the_default_and_excludes_nothing() {
        let config = parse("").unwrap();
        assert_eq!(config.deadline, Duration::from_secs(60));
        let root = file_system(&["/"], "ext4", "/dev/sda1", "8:1");
        assert_eq!(config.excludes(&root), None);
    }

    #[test]
    fn a_file_system_is_excluded_by_any_of_its_paths_its_type_or_its_device() {
        let config = parse(
            "exclude = { paths = ['/srv/*'], types = ['vfa?'], devices = ['/dev/sdb*', '8:32'] }",
        )
        .unwrap();
        for (paths, fs_type, source, dev, rule) in [
            (
                &["/data", "/srv/a/b"][..],
                "ext4",
                "/dev/sda1",
                "8:1",
                "exclude path /srv/*, being mounted at /srv/a/b, though it is also mounted at /data",
            ),
            (&["/efi"], "vfat", "/dev/sda1", "8:1", "exclude type vfa?"),
            (
                &["/b"],
                "ext4",
                "/dev/sdb7",
                "8:23",
                "exclude device /dev/sdb*",
            ),
            (&["/c"], "ext4", "/dev/sdc", "8:32", "exclude device 8:32"),
        ] {
            let found = config.excludes(&file_system(paths, fs_type, source, dev));
            assert_eq!(found.as_deref(), Some(rule));
        }
        let other = file_system(&["/srv"], "ext4", "/dev/sda1", "8:1");
        assert_eq!(config.excludes(&other), None);
    }

    #[test]
    fn with_an_include_list_nothing_else_is_frozen_and_exclude_still_wins() {
        let config = parse("include.types = ['xfs']\nexclude.paths = ['/tmp']").unwrap();
        let xfs = |path| file_system(&[path], "xfs", "/dev/sda1", "8:1");
        assert_eq!(config.excludes(&xfs("/a")), None);
        assert!(config.excludes(&xfs("/tmp")).is_some());
        let other = file_system(&["/b"], "ext4", "/dev/sda2", "8:2");
        assert_eq!(
            config.excludes(&other).as_deref(),
            Some("include, which names others")
        );
    }

    #[test]
    fn what_is_mounted_nowhere_is_frozen_where_a_path_or_a_device_may_mean_it() {
        let nowhere = file_system(&[], "xfs", "dm-3", "253:3");
        for (text, excluded) in [
            ("include.paths = ['/data']", false),
            ("include = { paths = ['/data'], types = ['ext4'] }", false),
            ("include.devices = ['/dev/mapper/data']", false),
            ("include.types = ['ext4']", true),
            ("include.paths = ['/data']\nexclude.types = ['xfs']", true),
            ("exclude.paths = ['/data']", false),
        ] {
            let found = parse(text).unwrap().excludes(&nowhere);
            assert_eq!(found.is_some(), excluded, "{text}");
        }
    }

    #[test]
    fn errors_name_file_line_and_column() {
        for (text, line, column, word) in [
            (
                "strict = true\ndeadlin = 5\n",
                2,
                1,
                "unknown field `deadlin`",
            ),
            ("deadline = 0\n", 1, 12, "not between 1 and 3600"),
            ("state_dir = 'here'\n", 1, 13, "not an absolute path"),
            ("\n\nparallel = 'x'\n", 3, 12, "invalid type"),
            ("[exclude]\npaths = ['/a[']\n", 2, 9, "not a pattern"),
            ("strict = \n", 1, 10, ""),
        ] {
            let error = parse(text).unwrap_err();
            let place = format!("line {line}, column {column}");
            assert!(error.contains("test.toml"), "{error}");
            assert!(error.contains(&place), "{text:?}: {error}");
            assert!(error.contains(word), "{error}");
        }
    }
}
