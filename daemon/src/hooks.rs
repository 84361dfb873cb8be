// SPDX-License-Identifier: GPL-2.0-only

//! Hooks: programs of an administrator that make applications ready for a freeze, and what makes one
//! fit to be run by root.
//!
//! Three contracts that people have, each called with one argument: that of the QEMU guest agent,
//! `freeze` and `thaw`; the same for our own folder; and that of open-vm-tools, which has `freezeFail`
//! instead of `thaw` where the freeze did not come about. It finds them and runs none.
//!
//! A hook may be a link to anywhere, also into a dead network mount. So a link is looked up
//! [apart](Questions), and what does not answer in time is a hook that is not fit.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{access, AccessFlags};
use serde::{Deserialize, Serialize};

use crate::apart::Questions;
use crate::backup::Verdict;
use crate::config::{leads_nowhere, HookRules};

/// Our own folder.
pub const FOLDER: &str = "/etc/hv_vss/hooks.d";
/// The dispatcher of the QEMU guest agent, as Debian and as Fedora have it. Beside it, with [`DISPATCHED`] at the end of
/// its name, is the folder of what it runs.
const QEMU_HOOKS: [&str; 2] = ["/etc/qemu/fsfreeze-hook", "/etc/qemu-ga/fsfreeze-hook"];
const DISPATCHED: &str = ".d";
/// Where open-vm-tools has its.
const OPEN_VM_TOOLS_FOLDER: &str = "/etc/vmware-tools/backupScripts.d";

/// How many links a path may lead over (`MAXSYMLINKS` of the kernel).
const MOST_LINKS: usize = 40;

/// Bytes of a program that the kernel looks at before it runs it (`BINPRM_BUF_SIZE`).
const MOST_BEGIN: u64 = 256;
/// How many interpreters it goes on to, each the program of the one before (`exec_binprm`).
const MOST_INTERPRETERS: usize = 5;

/// How long one look-up may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why it is not known which hooks there are.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {folder}, which may have hooks")]
pub struct HookError {
    folder: PathBuf,
    source: io::Error,
}

/// What a hook is called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contract {
    /// `freeze`, `thaw`.
    Qemu,
    /// `freeze`, `thaw` or `freezeFail`.
    OpenVmTools,
}

/// The argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verb {
    /// Be ready.
    #[serde(rename = "freeze")]
    Freeze,
    /// It is over.
    #[serde(rename = "thaw")]
    Thaw,
    /// It has not come about.
    #[serde(rename = "freezeFail")]
    FreezeFail,
}

impl Verb {
    /// As the program sees it.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Freeze => "freeze",
            Verb::Thaw => "thaw",
            Verb::FreezeFail => "freezeFail",
        }
    }
}

/// A program that is to be called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Where it is.
    pub path: PathBuf,
    /// What it is called with.
    pub contract: Contract,
}

impl Hook {
    /// What it is called in the log.
    pub fn name(&self) -> String {
        // Escaped, so that a newline in a name cannot forge a log line.
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        name.to_string_lossy().escape_debug().to_string()
    }

    /// What lets it go after a backup that went so; `None` when nobody can tell.
    pub fn release(&self, verdict: Option<Verdict>) -> Verb {
        match (self.contract, verdict) {
            (Contract::OpenVmTools, Some(Verdict::Failed)) => Verb::FreezeFail,
            _ => Verb::Thaw,
        }
    }

    /// Why root must not run it, if so: it, or a folder on the way to it, is somebody else's, or others
    /// may write to it. What does not let itself be looked up is an error; that nothing is there is none.
    pub fn look_up(&self) -> io::Result<Option<String>> {
        let hook = self.clone();
        let looked = ask(&self.path, move || hook.fault());
        let looked = looked.and_then(|it| it);
        looked.map_err(|error| io::Error::new(error.kind(), self.silent(&error)))
    }

    /// Why the kernel would not run it, if so, as far as that can be told without. It is looked at by `check`; a
    /// backup hears of it when it calls.
    pub fn cannot_be_run(&self) -> Option<String> {
        let path = self.path.clone();
        let looked = ask_apart(&self.path, move || why_not_run(&path));
        looked.unwrap_or_else(|error| Some(self.silent(&error)))
    }

    fn silent(&self, error: &io::Error) -> String {
        format!("{} cannot be looked up: {error}", self.path.display())
    }

    fn fault(&self) -> io::Result<Option<String>> {
        // What is called has to be put on record, as JSON.
        if self.path.to_str().is_none() {
            let fault = format!("{}: its name is not UTF-8", self.path.display());
            return Ok(Some(fault));
        }
        fault_on_the_way_to(&self.path)
    }
}

/// Goes the way that the kernel goes, over each link, and looks at every folder and every link that it comes to:
/// whoever may write to one of them decides what is run.
fn fault_on_the_way_to(path: &Path) -> io::Result<Option<String>> {
    // The next is the last.
    let steps = |path: &Path| -> Vec<OsString> {
        let all = path.components().map(|it| it.as_os_str().to_owned());
        all.rev().collect()
    };
    let mut left = steps(path);
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(step) = left.pop() {
        if step == ".." {
            // There is no link in it any more.
            at.pop();
            continue;
        }
        at.push(step);
        let fault = |what: String| Ok(Some(format!("{}: {what}", at.display())));
        let is_lasting = |error: &io::Error| {
            use io::ErrorKind::{NotADirectory, NotFound};
            matches!(error.kind(), NotFound | NotADirectory)
        };
        let found = match std::fs::symlink_metadata(&at) {
            Ok(found) => found,
            Err(error) if is_lasting(&error) => return fault(error.to_string()),
            Err(error) => return Err(error),
        };
        if let Some(what) = fault_of_owner_and_mode(found.uid(), found.mode()) {
            return fault(what);
        }
        if found.is_symlink() {
            links += 1;
            if links > MOST_LINKS {
                let fault = format!("{} leads over too many links", path.display());
                return Ok(Some(fault));
            }
            left.extend(steps(&std::fs::read_link(&at)?));
            at.pop();
        }
    }
    Ok(None)
}

fn fault_of_owner_and_mode(owner: u32, mode: u32) -> Option<String> {
    if owner != 0 {
        return Some(format!("it belongs to user {owner} and not to root"));
    }
    // A link has no permissions of its own; whoever could replace it needs those of its folder.
    let is_link = mode & libc::S_IFMT == libc::S_IFLNK;
    let others = libc::S_IWGRP | libc::S_IWOTH;
    (!is_link && mode & others != 0).then(|| "others than root may write to it".to_owned())
}

/// Goes from a script to its interpreter, as the kernel does.
fn why_not_run(path: &Path) -> Option<String> {
    let mut at = path.to_owned();
    for number in 0..=MOST_INTERPRETERS {
        let fault = |what: &str| {
            Some(match number {
                0 => format!("{}: {what}", at.display()),
                // Escaped, for a carriage return at the end of the line is not seen else.
                _ => format!(
                    "its interpreter \"{}\": {what}",
                    at.display().to_string().escape_debug()
                ),
            })
        };
        // This knows of a mount that runs nothing (noexec), too.
        if let Err(error) = access(&at, AccessFlags::X_OK) {
            return fault(error.desc());
        }
        if !at.is_file() {
            return fault("it is not a regular file");
        }
        let begin = match begin_of(&at) {
            Ok(begin) => begin,
            Err(error) => return fault(&error.to_string()),
        };
        match interpreter_of(&begin) {
            // A hook is called from there.
            Some(name) => at = Path::new("/").join(name),
            None if is_foreign(&begin) => return fault("it is for another processor"),
            None => return None,
        }
    }
    Some(format!("{}: too many interpreters", path.display()))
}

fn begin_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut begin = Vec::new();
    File::open(path)?.take(MOST_BEGIN).read_to_end(&mut begin)?;
    Ok(begin)
}

/// The interpreter that a script names in its first line, cut as the kernel does (`fs/binfmt_script.c`). Where it
/// finds none, the shell runs it: so does whoever calls a hook.
fn interpreter_of(begin: &[u8]) -> Option<&OsStr> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let rest = begin.strip_prefix(b"#!")?;
    let line = rest.split(|it| *it == b'\n').next()?;
    let name = line.get(line.iter().position(|it| !is_blank(it))?..)?;
    let end = name.iter().position(|it| is_blank(it) || *it == 0);
    // What may go on after that is not a name.
    let is_cut = end.is_none() && line.len() == rest.len() && begin.len() as u64 == MOST_BEGIN;
    let name = name.get(..end.unwrap_or(name.len()))?;
    (!is_cut && !name.is_empty()).then(|| OsStr::from_bytes(name))
}

/// Whether it is a program for a kind of processor whose programs this machine does not run.
fn is_foreign(begin: &[u8]) -> bool {
    // EM_386, which an x86-64 kernel may run.
    const ALIKE: &[u8] = &[3, 0];
    let machine = |begin: &[u8]| {
        let machine = begin.get(18..20).map(<[u8]>::to_vec);
        machine.filter(|_| begin.starts_with(b"\x7fELF"))
    };
    let own = begin_of(Path::new("/proc/self/exe")).unwrap_or_default();
    let differs = match (machine(begin), machine(&own)) {
        (Some(its), Some(own)) => its != own && its != ALIKE,
        _ => false,
    };
    // Others may have an interpreter there (binfmt_misc), beside the two files of its own.
    let runs_others = || {
        let all = std::fs::read_dir("/proc/sys/fs/binfmt_misc");
        all.is_ok_and(|it| it.count() > 2)
    };
    differs && !runs_others()
}

/// One that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub hook: Hook,
    /// Whether there is no backup without it.
    pub required: bool,
    /// Why it must not be run, if so.
    pub fault: Option<String>,
}

/// What rules ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The hooks to be called, in their order: that of their names, folder after folder.
    pub hooks: Vec<Found>,
    /// What of it is not called, in words: nothing is there, or it is not fit to be one.
    pub not_called: Vec<String>,
}

/// What these rules ask for.
///
/// What cannot be looked at, such as a link that leads nowhere, is a hook to be called: its fault says what is wrong.
pub fn find(rules: &HookRules) -> Result<Asked, HookError> {
    find_below(Path::new("/"), rules)
}

/// The same where `root` is the root folder.
fn find_below(root: &Path, rules: &HookRules) -> Result<Asked, HookError> {
    let mut seen = in_folder(&below(root, FOLDER), Contract::Qemu)?;
    if rules.qemu == Some(true) {
        seen.append(of_qemu(root)?);
    }
    if rules.open_vm_tools == Some(true) {
        let folder = below(root, OPEN_VM_TOOLS_FOLDER);
        let mut theirs = in_folder(&folder, Contract::OpenVmTools)?;
        if theirs.is_nothing() {
            theirs.not_called.push(format!(
                "hooks.open_vm_tools is set, and there is no hook in {}",
                folder.display()
            ));
        }
        seen.append(theirs);
    }
    let found = seen.hooks.into_iter().map(|(hook, fault)| Found {
        required: !rules.is_optional(&hook),
        fault,
        hook,
    });
    Ok(Asked {
        hooks: found.collect(),
        not_called: seen.not_called,
    })
}

/// An absolute path where `root` is the root folder.
fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// The dispatchers of the QEMU guest agent, and the folder of each.
fn qemu_places(root: &Path) -> impl Iterator<Item = (PathBuf, PathBuf)> + '_ {
    let place = |hook: &str| {
        (
            below(root, hook),
            below(root, &format!("{hook}{DISPATCHED}")),
        )
    };
    QEMU_HOOKS.into_iter().map(place)
}

/// The hooks of the QEMU guest agent.
fn of_qemu(root: &Path) -> Result<Seen, HookError> {
    let mut all = Seen::default();
    let mut has_some = false;
    for (hook, folder) in qemu_places(root) {
        let mut theirs = in_folder(&folder, Contract::Qemu)?;
        has_some |= !theirs.is_nothing();
        if theirs.hooks.is_empty() {
            let itself = judge(hook.clone(), Contract::Qemu);
            has_some |= !itself.is_nothing() && !is_dispatcher_in_time(&hook);
            theirs.append(itself);
        } else if is_no_dispatcher(&hook) {
            theirs.not_called.push(format!(
                "{} is passed over: those in its folder are called instead",
                hook.display()
            ));
        }
        // One place may be a link to the other, or what is in it.
        theirs.hooks.retain(|(its, _)| {
            let is_same = |other: &Judged| is_one_file(&other.0.path, &its.path);
            !all.hooks.iter().any(is_same)
        });
        all.append(theirs);
    }
    // A dispatcher with nothing to call is called, and calls nothing.
    if !has_some {
        let places = qemu_places(root).map(|(hook, folder)| {
            format!("in {}, nor is {} one", folder.display(), hook.display())
        });
        let places: Vec<String> = places.collect();
        let text = format!(
            "hooks.qemu is set, and there is no hook {}",
            places.join(", nor ")
        );
        all.not_called.push(text);
    }
    Ok(all)
}

/// What lies ready for the other contracts where these rules do not say whether it is called, in words: somebody may
/// take it to be.
pub fn ready(rules: &HookRules) -> Vec<String> {
    ready_below(Path::new("/"), rules)
}

fn ready_below(root: &Path, rules: &HookRules) -> Vec<String> {
    let mut places = qemu_places(root);
    let of_qemu = places.find_map(|(hook, folder)| ready_for_qemu(&folder, &hook));
    let of_qemu = of_qemu.filter(|_| rules.qemu.is_none());
    let of_vmware = ready_in(&below(root, OPEN_VM_TOOLS_FOLDER));
    let of_vmware = of_vmware.filter(|_| rules.open_vm_tools.is_none());
    let words = |(what, option)| Some(format!("{} not called: {option} is not set", what?));
    let both = [(of_qemu, "hooks.qemu"), (of_vmware, "hooks.open_vm_tools")];
    both.into_iter().filter_map(words).collect()
}

fn ready_for_qemu(folder: &Path, hook: &Path) -> Option<String> {
    let itself = || is_no_dispatcher(hook).then(|| format!("{} is", hook.display()));
    ready_in(folder).or_else(itself)
}

fn ready_in(folder: &Path) -> Option<String> {
    // Both contracts have the same programs.
    let has_some = in_folder(folder, Contract::Qemu).is_ok_and(|it| !it.hooks.is_empty());
    has_some.then(|| format!("the hooks in {} are", folder.display()))
}

/// Whether it is a program, and not one that calls what is in a folder.
fn is_no_dispatcher(path: &Path) -> bool {
    let at = path.to_owned();
    let look = move || is_program(&at) && !is_dispatcher(&at);
    ask(path, look).unwrap_or(false)
}

fn is_dispatcher_in_time(path: &Path) -> bool {
    let at = path.to_owned();
    ask(path, move || is_dispatcher(&at)).unwrap_or(false)
}

/// Whether it calls what is in a folder, as that of the QEMU guest agent does.
fn is_dispatcher(path: &Path) -> bool {
    let text = std::fs::read(path).unwrap_or_default();
    let folder = b"fsfreeze-hook.d";
    text.windows(folder.len()).any(|part| part == folder)
}

/// Whether both paths lead to one file; not if that cannot be told.
fn is_one_file(one: &Path, other: &Path) -> bool {
    let file_at = |path: &Path| {
        let at = path.to_owned();
        let looked = ask(path, move || std::fs::metadata(at)).and_then(|it| it);
        looked.map(|it| (it.dev(), it.ino())).ok()
    };
    let both = file_at(one).zip(file_at(other));
    both.is_some_and(|(one, other)| one == other)
}

/// A hook and why it must not be run, if so.
type Judged = (Hook, Option<String>);

/// What was seen in a place of hooks.
#[derive(Debug, Default)]
struct Seen {
    hooks: Vec<Judged>,
    not_called: Vec<String>,
}

impl Seen {
    fn is_nothing(&self) -> bool {
        self.hooks.is_empty() && self.not_called.is_empty()
    }

    fn append(&mut self, mut other: Seen) {
        self.hooks.append(&mut other.hooks);
        self.not_called.append(&mut other.not_called);
    }
}

fn in_folder(folder: &Path, contract: Contract) -> Result<Seen, HookError> {
    let mut all = Seen::default();
    for path in candidates(folder)? {
        all.append(judge(path, contract));
    }
    Ok(all)
}

/// What is at `path`: a hook, nothing that anybody means to be one, or a file that is not executable, and whoever put it
/// there may have meant it to be called.
fn judge(path: PathBuf, contract: Contract) -> Seen {
    let hook = Hook { path, contract };
    let its = hook.clone();
    let look = move || -> io::Result<Option<Option<String>>> {
        match is_program(&its.path) {
            true => Ok(Some(its.fault()?)),
            false => Ok(None),
        }
    };
    let is_file = |path: &Path| std::fs::metadata(path).is_ok_and(|it| it.is_file());
    let mut seen = Seen::default();
    match ask(&hook.path, look).and_then(|it| it) {
        Ok(Some(fault)) => seen.hooks.push((hook, fault)),
        Ok(None) => {
            let at = hook.path.clone();
            if ask(&hook.path, move || is_file(&at)).unwrap_or(false) {
                let path = hook.path.display();
                let text = format!("{path} is not called: it is not executable");
                seen.not_called.push(text);
            }
        }
        Err(error) => {
            let fault = hook.silent(&error);
            seen.hooks.push((hook, Some(fault)));
        }
    }
    seen
}

/// What `look` finds at `path`, in time. What is no link lies beside the configuration, and nobody is woken
/// for that: a host waits.
fn ask<T: Send + 'static>(path: &Path, look: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    match path.is_symlink() {
        true => ask_apart(path, look),
        false => Ok(look()),
    }
}

/// The same wherever `path` is: what else it leads to may be anywhere.
fn ask_apart<T: Send + 'static>(
    path: &Path,
    look: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    static ASKED: Questions<PathBuf> = Questions::new();
    ASKED.ask(path.to_owned(), &[], PATIENCE, |_| look())
}

/// What is in a folder of hooks, in the order of the names.
fn candidates(folder: &Path) -> Result<Vec<PathBuf>, HookError> {
    let at = folder.to_owned();
    let paths = ask(folder, move || paths_in(&at));
    paths.and_then(|it| it).map_err(|source| HookError {
        folder: folder.to_owned(),
        source,
    })
}

fn paths_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && !leads_nowhere(folder) => {
            return Ok(Vec::new())
        }
        other => other?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if !is_left_behind(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Whether it is to be called. A file that is there and cannot be looked at was meant to be.
fn is_program(path: &Path) -> bool {
    match std::fs::metadata(path) {
        Ok(found) => found.is_file() && found.mode() & 0o111 != 0,
        Err(_) => match std::fs::symlink_metadata(path) {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        },
    }
}

/// What editors and packages leave beside a file: the names that the dispatcher of the QEMU guest agent
/// passes over, and hidden ones.
fn is_left_behind(path: &Path) -> bool {
    const ENDS: [&str; 15] = [
        "~",
        ".bk",
        ".bak",
        ".orig",
        ".rpmnew",
        ".rpmorig",
        ".rpmsave",
        ".sample",
        ".dpkg-old",
        ".dpkg-new",
        ".dpkg-tmp",
        ".dpkg-dist",
        ".dpkg-bak",
        ".dpkg-backup",
        ".dpkg-remove",
    ];
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') || ENDS.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;
    use std::os::unix::fs::{symlink, PermissionsExt as _};

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("hv-vss-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Scratch(dir)
        }

        fn file(&self, name: &str, mode: u32) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn found_in(folder: &Path) -> Result<Vec<Judged>, HookError> {
        Ok(in_folder(folder, Contract::Qemu)?.hooks)
    }

    #[test]
    fn what_the_kernel_would_not_run_is_told_from_what_it_would() {
        let scratch = Scratch::new("hooks-not-run");
        let why = |name: &str, bytes: &[u8]| {
            let path = scratch.file(name, 0o755);
            std::fs::write(&path, bytes).unwrap();
            let contract = Contract::Qemu;
            Hook { path, contract }.cannot_be_run()
        };
        for (number, good) in [
            &b"#!/bin/sh\n"[..],
            b"#! \t /bin/sh -e\t\n",
            b"#!bin/sh",
            // These the shell runs.
            b"echo\n",
            b"",
            b"#!\n",
        ]
        .into_iter()
        .enumerate()
        {
            let why = why(&format!("good-{number}"), good);
            assert_eq!(why, None, "{:?}", good.escape_ascii().to_string());
        }
        let own = std::fs::read("/proc/self/exe").unwrap();
        let mut header = own[..64].to_vec();
        assert_eq!(why("own", &header), None);
        header[18..20].copy_from_slice(&[0x16, 0]);
        let foreign = why("foreign", &header).unwrap_or_default();
        assert!(foreign.contains("another processor"), "{foreign}");
        let crlf = why("crlf", b"#!/bin/sh\r\nexit 0\r\n").unwrap();
        assert!(
            crlf.contains("interpreter \"/bin/sh\\r\": No such file"),
            "{crlf}"
        );
        let none = why("none", b"#!/no/such/shell\n").unwrap();
        assert!(none.contains("\"/no/such/shell\": No such file"), "{none}");
        let folder = why("folder", b"#!/etc\n").unwrap();
        assert!(folder.contains("not a regular file"), "{folder}");
        let itself = format!("#!{}\n", scratch.0.join("itself").display());
        let itself = why("itself", itself.as_bytes()).unwrap();
        assert!(itself.contains("too many"), "{itself}");
        // A name that does not end where the kernel looks is none.
        let long = [b"#!".to_vec(), vec![b'x'; 300]].concat();
        assert_eq!(interpreter_of(&long[..256]), None);
        assert_eq!(interpreter_of(&long[..255]).map(OsStr::len), Some(253));
    }

    #[test]
    fn what_is_asked_for_and_not_called_is_named_and_each_of_the_agents_places_is_one() {
        let scratch = Scratch::new("hooks-asked");
        for folder in ["hv_vss/hooks.d", "qemu/fsfreeze-hook.d", "qemu-ga"] {
            std::fs::create_dir_all(scratch.0.join("etc").join(folder)).unwrap();
        }
        let asked = |qemu, open_vm_tools| {
            let mut rules = HookRules::default();
            (rules.qemu, rules.open_vm_tools) = (Some(qemu), Some(open_vm_tools));
            let Asked { hooks, not_called } = find_below(&scratch.0, &rules).unwrap();
            let etc = scratch.0.join("etc");
            let name = |it: Found| {
                let path = it.hook.path.strip_prefix(&etc).map(Path::to_owned);
                path.unwrap().display().to_string()
            };
            let names: Vec<String> = hooks.into_iter().map(name).collect();
            (names.join(" "), not_called)
        };
        let of_agent = |not_called: &str| {
            let (names, all) = asked(true, false);
            let says = |it: &String| it.contains(not_called);
            let one = all.len() == 1 && all.iter().all(says);
            let none = all.is_empty() && not_called.is_empty();
            assert!(one || none, "{not_called:?}: {all:?}");
            names
        };
        let executable = |name: &str, mode| {
            scratch.file(&format!("etc/{name}"), mode);
        };
        assert_eq!(asked(false, false), (String::new(), Vec::new()));
        let (names, not_called) = asked(true, true);
        assert_eq!((names.as_str(), not_called.len()), ("", 2));
        assert_eq!(of_agent("hooks.qemu is set"), "");
        // A dispatcher alone is called, and calls nothing.
        executable("qemu/fsfreeze-hook", 0o755);
        let hook = scratch.0.join("etc/qemu/fsfreeze-hook");
        assert_eq!(of_agent(""), "qemu/fsfreeze-hook");
        let text = "#!/bin/sh\nFSFREEZE_D=$(dirname -- \"$0\")/fsfreeze-hook.d\n";
        std::fs::write(&hook, text).unwrap();
        assert_eq!(of_agent("hooks.qemu is set"), "qemu/fsfreeze-hook");
        executable("qemu/fsfreeze-hook.d/10-a", 0o644);
        let names = of_agent("10-a is not called: it is not executable");
        assert_eq!(names, "qemu/fsfreeze-hook");
        executable("qemu/fsfreeze-hook.d/10-a", 0o755);
        assert_eq!(of_agent(""), "qemu/fsfreeze-hook.d/10-a");
        std::fs::write(&hook, "#!/bin/sh\n").unwrap();
        assert_eq!(of_agent("is passed over"), "qemu/fsfreeze-hook.d/10-a");
        std::fs::remove_file(&hook).unwrap();
        // Either place has hooks, and what is in both by a link is called once.
        symlink(
            "../qemu/fsfreeze-hook.d",
            scratch.0.join("etc/qemu-ga/fsfreeze-hook.d"),
        )
        .unwrap();
        assert_eq!(of_agent(""), "qemu/fsfreeze-hook.d/10-a");
        std::fs::remove_dir_all(scratch.0.join("etc/qemu")).unwrap();
        std::fs::remove_file(scratch.0.join("etc/qemu-ga/fsfreeze-hook.d")).unwrap();
        executable("qemu-ga/fsfreeze-hook", 0o755);
        assert_eq!(of_agent(""), "qemu-ga/fsfreeze-hook");
        std::fs::create_dir(scratch.0.join("etc/qemu-ga/fsfreeze-hook.d")).unwrap();
        executable("qemu-ga/fsfreeze-hook.d/10-a", 0o755);
        let names = of_agent("is passed over");
        assert_eq!(names, "qemu-ga/fsfreeze-hook.d/10-a");
        // Our own folder needs no rule, and nobody has asked for one to be there.
        executable("hv_vss/hooks.d/20-b", 0o644);
        let (names, not_called) = asked(false, false);
        let says = not_called
            .iter()
            .all(|it| it.contains("20-b is not called"));
        assert!(
            names.is_empty() && not_called.len() == 1 && says,
            "{not_called:?}"
        );
    }

    #[test]
    fn what_lies_ready_is_named_and_a_dispatcher_alone_is_not() {
        let scratch = Scratch::new("hooks-ready");
        let folder = scratch.0.join("fsfreeze-hook.d");
        let hook = scratch.0.join("fsfreeze-hook");
        let look = || ready_for_qemu(&folder, &hook);
        assert_eq!(look(), None);
        std::fs::create_dir(&folder).unwrap();
        scratch.file("fsfreeze-hook", 0o755);
        std::fs::write(&hook, "#!/bin/sh\nrun-parts fsfreeze-hook.d\n").unwrap();
        scratch.file("fsfreeze-hook.d/mysql.sample", 0o755);
        scratch.file("fsfreeze-hook.d/10-a", 0o644);
        assert_eq!(look(), None);
        scratch.file("fsfreeze-hook", 0o755);
        assert_eq!(look(), Some(format!("{} is", hook.display())));
        scratch.file("fsfreeze-hook.d/20-b", 0o755);
        let expected = format!("the hooks in {} are", folder.display());
        assert_eq!(look(), Some(expected));
        // Whoever has said no has heard of them.
        let mut rules = HookRules::default();
        (rules.qemu, rules.open_vm_tools) = (Some(false), Some(true));
        assert_eq!(ready(&rules), Vec::<String>::new());
        let rules = HookRules::default();
        let root = scratch.0.join("root");
        std::fs::create_dir_all(root.join("etc/qemu-ga/fsfreeze-hook.d")).unwrap();
        scratch.file("root/etc/qemu-ga/fsfreeze-hook.d/10-a", 0o755);
        assert_eq!(ready_below(&root, &rules).len(), 1);
    }

    #[test]
    fn programs_are_found_in_the_order_of_their_names_and_leftovers_are_not() {
        let scratch = Scratch::new("hooks-found");
        for name in ["20-b", "10-a", "30-c"] {
            scratch.file(name, 0o755);
        }
        scratch.file("40-not-executable", 0o644);
        for name in [".hidden", "10-a~", "10-a.dpkg-old", "10-a.sample"] {
            scratch.file(name, 0o755);
        }
        std::fs::create_dir(scratch.0.join("50-folder")).unwrap();
        let found = found_in(&scratch.0).unwrap();
        let names: Vec<String> = found.iter().map(|(hook, _)| hook.name()).collect();
        assert_eq!(names, ["10-a", "20-b", "30-c"]);
        let none = found_in(&scratch.0.join("nothing")).unwrap();
        assert_eq!(none, []);
        assert!(found_in(&scratch.0.join("10-a")).is_err());
        symlink("gone", scratch.0.join("60-nowhere")).unwrap();
        assert!(found_in(&scratch.0.join("60-nowhere")).is_err());
        assert!(found_in(&scratch.0.join("60-nowhere/hooks.d")).is_err());
    }

    #[test]
    fn a_name_that_cannot_be_put_on_record_is_a_fault() {
        let scratch = Scratch::new("hooks-name");
        let name = OsString::from_vec(b"10-\xe9".to_vec());
        let path = scratch.0.join(name);
        std::fs::copy(scratch.file("20-b", 0o755), &path).unwrap();
        let found = found_in(&scratch.0).unwrap();
        let [(hook, Some(fault)), _] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(hook.path, path);
        assert!(fault.contains("not UTF-8"), "{fault}");
    }

    #[test]
    fn a_link_that_leads_nowhere_is_a_hook_with_a_fault() {
        let scratch = Scratch::new("hooks-nowhere");
        scratch.file("10-a", 0o755);
        symlink("gone", scratch.0.join("20-nowhere")).unwrap();
        symlink("30-itself", scratch.0.join("30-itself")).unwrap();
        symlink("10-a/in a file", scratch.0.join("40-no-folder")).unwrap();
        let found = found_in(&scratch.0).unwrap();
        let names: Vec<String> = found.iter().map(|(hook, _)| hook.name()).collect();
        assert_eq!(names, ["10-a", "20-nowhere", "30-itself", "40-no-folder"]);
        assert!(found[1..].iter().all(|(_, fault)| fault.is_some()));
        assert!(!is_program(&scratch.0.join("50-nothing")));
    }

    #[test]
    fn only_what_nobody_but_root_may_write_is_fit() {
        for (owner, mode, word) in [
            (0, 0o100755, None),
            (0, 0o040755, None),
            (0, 0o120777, None),
            (0, 0o100775, Some("others than root")),
            (0, 0o100757, Some("others than root")),
            // A sticky folder, too: whoever is first makes the file.
            (0, 0o041777, Some("others than root")),
            (1000, 0o100755, Some("user 1000")),
            (1000, 0o120777, Some("user 1000")),
        ] {
            let fault = fault_of_owner_and_mode(owner, mode);
            match word {
                None => assert_eq!(fault, None, "{owner} {mode:o}"),
                Some(word) => assert!(fault.unwrap().contains(word), "{owner} {mode:o}"),
            }
        }
    }

    #[test]
    fn the_whole_way_to_a_hook_is_looked_at() {
        // Whatever is below is in a folder where everybody may write.
        let scratch = Scratch::new("hooks-way");
        let target = scratch.file("10-a", 0o755);
        let hook = |path: PathBuf| Hook {
            path,
            contract: Contract::Qemu,
        };
        let fault = hook(target.clone()).fault().unwrap().unwrap();
        let way = std::env::temp_dir();
        assert!(fault.starts_with(&format!("{}", way.display())), "{fault}");
        let link = scratch.0.join("link");
        symlink("/bin/sh", &link).unwrap();
        let fault = hook(link).fault();
        assert!(
            matches!(fault, Ok(Some(_))),
            "the link itself can be replaced"
        );
        // What root alone has, links in between or not.
        if nix::unistd::geteuid().is_root() {
            assert!(matches!(hook("/bin/sh".into()).fault(), Ok(None)));
        }
        let gone = hook("/bin/no such hook".into()).fault();
        let gone = gone.unwrap().unwrap();
        assert!(gone.contains("No such file"), "{gone}");
    }

    #[test]
    fn each_contract_has_its_word_for_the_end() {
        let hook = |contract| Hook {
            path: "/x/10-a".into(),
            contract,
        };
        for (contract, verdict, verb) in [
            (Contract::Qemu, Some(Verdict::Good), "thaw"),
            (Contract::Qemu, Some(Verdict::Failed), "thaw"),
            (Contract::OpenVmTools, Some(Verdict::Good), "thaw"),
            (Contract::OpenVmTools, Some(Verdict::Broken), "thaw"),
            (Contract::OpenVmTools, Some(Verdict::Failed), "freezeFail"),
            (Contract::OpenVmTools, None, "thaw"),
        ] {
            assert_eq!(hook(contract).release(verdict).as_str(), verb);
        }
    }
}
