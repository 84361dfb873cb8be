// SPDX-License-Identifier: GPL-2.0-only

//! The control socket in the run directory: how a program asks the daemon that serves.
//!
//! It is a Varlink service: a JSON object and a NUL each way, one reply for each call, in their order. The
//! methods are those of the interface `org.hv-vss.Daemon`, which it describes itself. Only root may ask. It
//! carries calls and replies; what they do is decided by [`crate::service`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::Serialize;
use serde_json::{json, Value};

use crate::backup::Rehearsal;
use crate::history::Entry;
use crate::mounts::DevId;
use crate::process;
use crate::record::RunDir;

const INTERFACE: &str = "org.hv-vss.Daemon";
const DESCRIPTION: &str = include_str!("org.hv-vss.Daemon.varlink");
/// What every service has (varlink.org/Service).
const SERVICE: &str = "org.varlink.service";
const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");
/// Programs that may ask at a time.
const MOST_CLIENTS: usize = 8;
/// Bytes of the calls of one program that wait for their turn.
const LONGEST_CALL: usize = 4096;
/// What the last backup is as long as there was none.
pub const NO_BACKUP: &str = "no backup yet";
/// How long the daemon may take for a reply, beside what it has to wait for itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// After which time a daemon that is waited for is asked what it is at.
const LOOK: Duration = Duration::from_secs(2);

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// End the freeze that is under way or in force; the reply comes when all is thawed.
    Thaw,
    /// Read the configuration again; the reply comes when it is in force, or is none, or at once during
    /// a backup.
    Reload,
    /// What is the daemon at?
    Status,
    /// Which backups are remembered?
    History,
    /// What would a backup lack?
    Check,
    /// Rehearse a backup; the reply comes when it has ended, and it ends with the line of whoever has asked.
    Rehearse(Rehearsal),
}

impl Method {
    /// Each once, with nothing said of how.
    const ALL: [Method; 6] = [
        Method::Thaw,
        Method::Reload,
        Method::Status,
        Method::History,
        Method::Check,
        Method::Rehearse(Rehearsal {
            time: Duration::ZERO,
            with_hooks: true,
        }),
    ];

    fn name(self) -> String {
        let method = match self {
            Method::Thaw => "Thaw",
            Method::Reload => "Reload",
            Method::Status => "Status",
            Method::History => "History",
            Method::Check => "Check",
            Method::Rehearse(_) => "Rehearse",
        };
        format!("{INTERFACE}.{method}")
    }

    fn call(self) -> Value {
        let mut call = json!({ "method": self.name() });
        if let Method::Rehearse(Rehearsal { time, with_hooks }) = self {
            let for_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            call["parameters"] = json!({ "for_ms": for_ms, "hooks": with_hooks });
        }
        call
    }

    /// As this call has it; an error names the parameter that is not understood.
    fn said_in(self, call: &Value) -> Result<Self, &'static str> {
        let Method::Rehearse(_) = self else {
            return Ok(self);
        };
        let parameter = |name| call.pointer("/parameters").and_then(|it| it.get(name));
        let for_ms = parameter("for_ms").and_then(Value::as_u64);
        let hooks = parameter("hooks").and_then(Value::as_bool);
        Ok(Method::Rehearse(Rehearsal {
            time: Duration::from_millis(for_ms.ok_or("for_ms")?),
            with_hooks: hooks.ok_or("hooks")?,
        }))
    }
}

/// What the daemon replies to [`Method::Status`]: the interface describes each field.
#[derive(Debug, Serialize)]
pub struct Status<'a> {
    /// The process.
    pub pid: u32,
    /// As [`Backup::phase`](crate::backup::Backup::phase).
    pub phase: &'static str,
    /// What it is at, in words.
    pub doing: Option<String>,
    /// Why a FREEZE would be refused.
    pub refuses: Option<String>,
    /// By what it freezes; `None` without a device.
    pub door: Option<&'static str>,
    /// How many file systems the module holds at most.
    pub most: Option<u32>,
    /// What is frozen, by name.
    pub frozen: &'a [String],
    /// What hangs, by name, and why backups are without it.
    pub given_up: Vec<String>,
    /// The numbers of what has turned read-only, perhaps since an error, and backups are without.
    pub turned: Vec<String>,
    /// Which hooks are not let go yet, and why.
    pub owed: &'a [String],
    /// How many there were since it was started.
    pub backups: u64,
    /// How the last one went, in words.
    pub last: &'a str,
    /// And as the history has it, in short.
    pub last_backup: Option<&'a Entry>,
    /// By which it goes.
    pub configuration: Option<InForce<'a>>,
}

/// The configuration of the daemon that replies.
#[derive(Debug, Serialize)]
pub struct InForce<'a> {
    /// From where it is read, if that was said.
    pub path: Option<Cow<'a, str>>,
    /// What is in force.
    pub in_force: Value,
}

impl Status<'_> {
    /// Of a daemon that is at nothing, and has no device.
    pub fn at_rest() -> Self {
        Status {
            pid: std::process::id(),
            phase: "idle",
            doing: None,
            refuses: None,
            door: None,
            most: None,
            frozen: &[],
            given_up: Vec::new(),
            turned: Vec::new(),
            owed: &[],
            backups: 0,
            last: NO_BACKUP,
            last_backup: None,
            configuration: None,
        }
    }
}

/// What has turned read-only, by this reply to [`Method::Status`].
pub fn turned_in(status: &Value) -> BTreeSet<DevId> {
    let all = status["turned"].as_array().into_iter().flatten();
    let all = all.filter_map(|it| it.as_str()?.parse().ok());
    all.collect()
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No daemon listens.
    #[error("no daemon serves")]
    Nobody,
    /// One does and does not reply.
    #[error("the daemon that serves does not reply")]
    Io(#[from] io::Error),
    /// It refuses, or what it replies is not understood.
    #[error("the daemon that serves replies: {why}")]
    Refused {
        /// The name of the error, as the interface has it; empty when it is none.
        error: String,
        /// In words, or the reply itself.
        why: String,
    },
}

impl ControlError {
    /// Whether something is under way beside which it cannot be.
    pub fn is_busy(&self) -> bool {
        let name = match self {
            ControlError::Refused { error, .. } => error.strip_prefix(INTERFACE),
            ControlError::Nobody | ControlError::Io(_) => None,
        };
        name == Some(".Busy")
    }
}

fn path(run: &RunDir) -> PathBuf {
    run.path().join("control")
}

/// Who listens in this run directory, and a line to it. One that has ended and is still inside the kernel has its
/// socket open, and will never reply: that is nobody.
fn connect(run: &RunDir) -> Result<(std::os::unix::net::UnixStream, u32), ControlError> {
    // One that takes nobody up any more, and has no room for more to wait, would be waited for without end.
    let stream = match UnixStream::connect(path(run)) {
        Ok(stream) => std::os::unix::net::UnixStream::from(stream),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(e.into()),
        Err(_) => return Err(ControlError::Nobody),
    };
    stream.set_nonblocking(false)?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?;
    // 0 is one of a container, whose number is not known here.
    let pid = u32::try_from(peer.pid()).unwrap_or_default();
    match pid != 0 && process::is_dead(pid) {
        true => Err(ControlError::Nobody),
        false => Ok((stream, pid)),
    }
}

/// The process that listens in this run directory, be it one that does not reply.
pub fn who_serves(run: &RunDir) -> Result<u32, ControlError> {
    connect(run).map(|(_, pid)| pid)
}

/// Asks the daemon whose run directory this is.
pub fn ask(run: &RunDir, method: Method) -> Result<Value, ControlError> {
    ask_for(run, method, PATIENCE, |silent| Err(silent.into()))
}

/// The same for what may take as long as a disk hangs: as long as the daemon replies to others it is waited for, and
/// `meanwhile` hears what it is at. It is the daemon that is silent only if it is so to all.
pub fn ask_patiently(
    run: &RunDir,
    method: Method,
    meanwhile: impl FnMut(&Value),
) -> Result<Value, ControlError> {
    look_in(run, method, LOOK, meanwhile)
}

fn look_in(
    run: &RunDir,
    method: Method,
    pause: Duration,
    mut meanwhile: impl FnMut(&Value),
) -> Result<Value, ControlError> {
    ask_for(run, method, pause, |_| {
        ask(run, Method::Status).map(|status| meanwhile(&status))
    })
}

/// Asks; `silent` is called whenever nothing has come for that long, and may end it.
fn ask_for(
    run: &RunDir,
    method: Method,
    pause: Duration,
    mut silent: impl FnMut(io::Error) -> Result<(), ControlError>,
) -> Result<Value, ControlError> {
    let (mut stream, _) = connect(run)?;
    stream.set_read_timeout(Some(pause))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&message(&method.call()))?;
    let mut text = Vec::new();
    let mut part = [0; 512];
    while !text.contains(&0) {
        match stream.read(&mut part) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => text.extend(part.iter().take(n)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => silent(e)?,
            Err(e) => return Err(e.into()),
        }
    }
    text.pop();
    parameters_of(&text)
}

/// What a reply has to tell.
fn parameters_of(reply: &[u8]) -> Result<Value, ControlError> {
    let reply: Value = serde_json::from_slice(reply).map_err(io::Error::from)?;
    match reply.get("parameters") {
        Some(parameters) if reply.get("error").is_none() => Ok(parameters.clone()),
        parameters => {
            let why = parameters.and_then(|it| it["why"].as_str());
            let why = why.map_or_else(|| reply.to_string(), str::to_owned);
            let error = reply["error"].as_str().unwrap_or_default().to_owned();
            Err(ControlError::Refused { error, why })
        }
    }
}

fn message(value: &Value) -> Vec<u8> {
    let mut text = value.to_string().into_bytes();
    text.push(0);
    text
}

/// Who asked. Not used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Client(usize);

/// What there is of one of them.
#[derive(Debug)]
struct Line {
    stream: UnixStream,
    /// What has come and is not taken up yet: a call waits for the reply to the one before.
    text: Vec<u8>,
    /// The call that waits for its reply.
    pending: Option<Call>,
    /// What has yet to go out of the last reply.
    reply: Vec<u8>,
    /// No more calls will come.
    is_ended: bool,
}

impl Line {
    /// Whether nobody waits for anything.
    fn rests(&self) -> bool {
        self.pending.is_none() && self.reply.is_empty() && !self.text.contains(&0)
    }

    fn is_over(&self) -> bool {
        self.is_ended && self.rests()
    }

    /// Whether nobody hears either: who has said all that there is to say may still wait for replies.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let closed = PollFlags::POLLHUP | PollFlags::POLLERR;
        let is_closed = |it: &PollFd| it.revents().is_some_and(|it| it.intersects(closed));
        poll(&mut fds, PollTimeout::ZERO).is_ok() && fds.iter().any(is_closed)
    }

    /// Takes what has come; false when there is nobody any more.
    fn hear(&mut self) -> bool {
        let mut part = [0; 512];
        loop {
            match self.stream.read(&mut part) {
                // It may still wait for replies.
                Ok(0) => {
                    self.is_ended = true;
                    return true;
                }
                Ok(n) => self.text.extend(part.iter().take(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if self.text.len() > LONGEST_CALL {
                return false;
            }
        }
    }

    /// Sends what the socket takes; the rest goes when it takes more. False when there is nobody any more.
    fn send(&mut self) -> bool {
        while !self.reply.is_empty() {
            match self.stream.write(&self.reply) {
                Ok(n) => drop(self.reply.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        self.reply = Vec::new();
        true
    }

    /// The next call, if it is its turn.
    fn next(&mut self) -> Option<Vec<u8>> {
        if self.pending.is_some() || !self.reply.is_empty() {
            return None;
        }
        let end = self.text.iter().position(|&byte| byte == 0)?;
        Some(self.text.drain(..=end).take(end).collect())
    }
}

/// What is to be remembered of a call under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    /// Whoever called wants no reply.
    oneway: bool,
}

/// The daemon's end.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    /// The one that came first is the first.
    clients: BTreeMap<Client, Line>,
    /// The listener's; those of the clients follow.
    token: usize,
    next: usize,
}

impl Control {
    /// Listens in `run`. `token` and all above it are for its use.
    pub fn listen(run: &RunDir, registry: &Registry, token: Token) -> io::Result<Self> {
        let path = path(run);
        // What is there was left by a daemon that has ended: only one can serve the device.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        registry.register(&mut listener, token, Interest::READABLE)?;
        Ok(Control {
            listener,
            clients: BTreeMap::new(),
            token: token.0,
            next: token.0 + 1,
        })
    }

    /// Takes up what has come, and sends what can go.
    pub fn ready(&mut self, registry: &Registry, token: Token) {
        if token.0 == self.token {
            return self.accept(registry);
        }
        let client = Client(token.0);
        let Some(line) = self.clients.get_mut(&client) else {
            return;
        };
        if !line.send() || !line.hear() || line.is_over() {
            self.clients.remove(&client);
        }
    }

    /// The next call that is to be replied to, and whose it is. What needs nobody else is replied to on the way.
    pub fn next_call(&mut self) -> Option<(Client, Method)> {
        loop {
            let mut clients = self.clients.iter_mut();
            let (client, text) = clients.find_map(|(it, line)| Some((*it, line.next()?)))?;
            let call: Value = serde_json::from_slice(&text).unwrap_or_default();
            if let Some(line) = self.clients.get_mut(&client) {
                let oneway = call.get("oneway").and_then(Value::as_bool);
                line.pending = Some(Call {
                    oneway: oneway.unwrap_or(false),
                });
            }
            match understood(&call) {
                Understood::Method(method) => return Some((client, method)),
                Understood::Reply(reply) => self.send(client, message(&reply)),
            }
        }
    }

    /// Whether there is anybody to reply to. That may change when the loop has woken, and then alone.
    pub fn is_there(&self, client: Client) -> bool {
        let line = self.clients.get(&client);
        line.is_some_and(|it| !it.is_closed())
    }

    fn accept(&mut self, registry: &Registry) {
        // An error means that whoever came is gone again, or that there is nobody more.
        while let Ok((mut stream, _)) = self.listener.accept() {
            let peer = getsockopt(&stream, PeerCredentials);
            let is_root = peer.is_ok_and(|peer| peer.uid() == 0);
            if !is_root || !self.make_room() {
                continue;
            }
            let token = Token(self.next);
            let both = Interest::READABLE | Interest::WRITABLE;
            let registered = registry.register(&mut stream, token, both);
            if registered.is_ok() {
                self.next += 1;
                let line = Line {
                    stream,
                    text: Vec::new(),
                    pending: None,
                    reply: Vec::new(),
                    is_ended: false,
                };
                self.clients.insert(Client(token.0), line);
            }
        }
    }

    /// Whoever only stays must not keep others out: of those that wait for nothing the oldest has to go. Else
    /// of those that say no more, or do not read their reply, which may be gone: what they wait for may take as
    /// long as a disk hangs.
    fn make_room(&mut self) -> bool {
        if self.clients.len() < MOST_CLIENTS {
            return true;
        }
        // Whose call has come and is not taken up yet waits as well.
        self.clients
            .retain(|_, line| line.hear() && !line.is_over());
        if self.clients.len() < MOST_CLIENTS {
            return true;
        }
        let oldest = |may_go: fn(&Line) -> bool| {
            let mut clients = self.clients.iter();
            let found = clients.find(|(_, line)| may_go(line));
            found.map(|(client, _)| *client)
        };
        let oldest = oldest(Line::rests)
            .or_else(|| oldest(|line| line.is_ended))
            .or_else(|| oldest(|line| !line.reply.is_empty()));
        oldest.and_then(|it| self.clients.remove(&it)).is_some()
    }

    /// Replies to a call.
    pub fn reply(&mut self, client: Client, parameters: Value) {
        self.send(client, message(&json!({ "parameters": parameters })));
    }

    /// Replies to [`Method::Status`].
    pub fn reply_status(&mut self, client: Client, status: &Status<'_>) {
        let reply = reply_of(status).map_err(|error| error.to_string());
        self.reply_with(client, reply);
    }

    /// Replies to a call with what [`reply_of`] has made, or with why there is none.
    pub fn reply_with(&mut self, client: Client, reply: Result<Vec<u8>, String>) {
        let reply = reply.unwrap_or_else(|why| refusal("Failed", &why));
        self.send(client, reply);
    }

    /// Replies to a call that what was asked for cannot be now.
    pub fn say_busy(&mut self, client: Client, why: &str) {
        self.send(client, refusal("Busy", why));
    }

    fn send(&mut self, client: Client, reply: Vec<u8>) {
        let Some(line) = self.clients.get_mut(&client) else {
            return;
        };
        // To one that wants none it is as if it had been read.
        if line.pending.take().is_some_and(|call| !call.oneway) {
            line.reply = reply;
        }
        if !line.send() || line.is_over() {
            self.clients.remove(&client);
        }
    }
}

fn refusal(error: &str, why: &str) -> Vec<u8> {
    let error = format!("{INTERFACE}.{error}");
    message(&json!({ "error": error, "parameters": { "why": why } }))
}

/// A reply that may be long, for [`Control::reply_with`].
pub fn reply_of(parameters: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Reply<'a, T> {
        parameters: &'a T,
    }
    let mut reply = serde_json::to_vec(&Reply { parameters })?;
    reply.push(0);
    Ok(reply)
}

/// What becomes of a call.
enum Understood {
    Method(Method),
    Reply(Value),
}

fn understood(call: &Value) -> Understood {
    let name = call.get("method").and_then(Value::as_str);
    let error = |error: &str, key: &str, value: Option<&str>| json!({ "error": format!("{SERVICE}.{error}"), "parameters": { key: value } });
    let mut methods = Method::ALL.into_iter();
    if let Some(method) = methods.find(|it| name == Some(&it.name())) {
        return match method.said_in(call) {
            Ok(method) => Understood::Method(method),
            Err(it) => Understood::Reply(error("InvalidParameter", "parameter", Some(it))),
        };
    }
    let (interface, method) = name.and_then(|it| it.rsplit_once('.')).unwrap_or_default();
    Understood::Reply(match (interface, method) {
        (SERVICE, "GetInfo") => json!({ "parameters": {
            "vendor": "hv_vss",
            "product": "hv_vss_daemon",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "man:hv_vss_daemon(8)",
            "interfaces": [SERVICE, INTERFACE],
        } }),
        (SERVICE, "GetInterfaceDescription") => {
            let of = call
                .pointer("/parameters/interface")
                .and_then(Value::as_str);
            match of {
                Some(INTERFACE) => json!({ "parameters": { "description": DESCRIPTION } }),
                Some(SERVICE) => json!({ "parameters": { "description": SERVICE_DESCRIPTION } }),
                Some(_) => error("InterfaceNotFound", "interface", of),
                None => error("InvalidParameter", "parameter", Some("interface")),
            }
        }
        (SERVICE | INTERFACE, _) => error("MethodNotFound", "method", name),
        (interface, _) => error("InterfaceNotFound", "interface", Some(interface)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Events, Poll};
    use std::net::Shutdown;

    fn connect(run: &RunDir) -> std::os::unix::net::UnixStream {
        std::os::unix::net::UnixStream::connect(path(run)).unwrap()
    }

    /// More than a socket takes at a time.
    fn long_reply() -> Vec<u8> {
        reply_of(&json!({ "backups": ["x".repeat(3_000_000)] })).unwrap()
    }

    /// Replies to whoever asks, until `asking` has ended, and returns what that returns.
    fn serve<T>(control: &mut Control, poll: &mut Poll, asking: std::thread::JoinHandle<T>) -> T {
        let mut events = Events::with_capacity(8);
        while !asking.is_finished() {
            let tick = Some(Duration::from_millis(20));
            poll.poll(&mut events, tick).unwrap();
            for event in &events {
                control.ready(poll.registry(), event.token());
            }
            while let Some((client, method)) = control.next_call() {
                match method {
                    Method::Status => control.reply(client, json!({ "phase": "idle" })),
                    Method::History => control.reply_with(client, Ok(long_reply())),
                    other => control.reply_with(client, Err(format!("no {other:?}"))),
                }
            }
        }
        asking.join().unwrap()
    }

    #[test]
    fn who_says_no_more_is_replied_to_and_who_only_stays_keeps_nobody_out() {
        let dir = std::env::temp_dir().join(format!("hv-vss-clients-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let theirs = run.clone();
        let asking = std::thread::spawn(move || {
            let call = message(&json!({ "method": Method::Status.name() }));
            let mut stream = connect(&theirs);
            // Two calls, and a part of one.
            let calls = [&call[..], &call, b"{"].concat();
            stream.write_all(&calls).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut replies = String::new();
            stream.read_to_string(&mut replies).unwrap();
            let idle: Vec<_> = (0..MOST_CLIENTS).map(|_| connect(&theirs)).collect();
            let asked = (0..MOST_CLIENTS).map(|_| ask(&theirs, Method::Status).is_ok());
            let asked: Vec<bool> = asked.collect();
            drop(idle);
            (replies, asked)
        });
        let (replies, asked) = serve(&mut control, &mut poll, asking);
        assert_eq!(replies.matches("idle").count(), 2, "{replies}");
        assert!(asked.iter().all(|it| *it), "{asked:?}");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn who_has_said_all_is_still_there_and_who_has_gone_is_not() {
        let dir = std::env::temp_dir().join(format!("hv-vss-there-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let rehearsal = Rehearsal {
            time: Duration::from_millis(1500),
            with_hooks: false,
        };
        let mut stream = connect(&run);
        let call = Method::Rehearse(rehearsal).call();
        stream.write_all(&message(&call)).unwrap();
        let mut events = Events::with_capacity(8);
        // The loop wakes at each change.
        let mut look = |control: &mut Control| {
            poll.poll(&mut events, Some(Duration::from_secs(60)))
                .unwrap();
            assert!(!events.is_empty());
            for event in &events {
                control.ready(poll.registry(), event.token());
            }
        };
        let (client, method) = loop {
            look(&mut control);
            if let Some(call) = control.next_call() {
                break call;
            }
        };
        assert_eq!(method, Method::Rehearse(rehearsal));
        assert!(control.is_there(client));
        stream.shutdown(Shutdown::Write).unwrap();
        look(&mut control);
        assert!(control.is_there(client));
        drop(stream);
        look(&mut control);
        assert!(!control.is_there(client));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_to_be_rehearsed_has_to_be_said() {
        let name = Method::ALL.map(Method::name);
        let name = name.iter().find(|it| it.ends_with("Rehearse")).unwrap();
        for (parameters, lacks) in [
            (Value::Null, "for_ms"),
            (json!({ "for_ms": -1, "hooks": true }), "for_ms"),
            (json!({ "for_ms": 5 }), "hooks"),
        ] {
            let call = json!({ "method": name, "parameters": parameters });
            let Understood::Reply(reply) = understood(&call) else {
                panic!("{call} is understood");
            };
            assert_eq!(reply["error"], "org.varlink.service.InvalidParameter");
            assert_eq!(reply["parameters"]["parameter"], lacks);
        }
    }

    #[test]
    fn who_waits_for_a_reply_is_not_sent_away() {
        let dir = std::env::temp_dir().join(format!("hv-vss-waits-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let mut events = Events::with_capacity(64);
        let mut asked = Vec::new();
        let mut streams = Vec::new();
        for _ in 0..MOST_CLIENTS {
            let mut stream = connect(&run);
            let call = message(&json!({ "method": Method::Thaw.name() }));
            stream.write_all(&call).unwrap();
            streams.push(stream);
        }
        while asked.len() < MOST_CLIENTS {
            poll.poll(&mut events, None).unwrap();
            for event in &events {
                control.ready(poll.registry(), event.token());
            }
            asked.extend(std::iter::from_fn(|| control.next_call()));
        }
        let mut late = connect(&run);
        control.accept(poll.registry());
        assert_eq!(late.read(&mut [0; 8]).unwrap(), 0, "there is no room");
        // But for one that has given up there is.
        drop(streams.remove(3));
        let (gone, _) = asked.remove(3);
        control.ready(poll.registry(), Token(gone.0));
        let _late = connect(&run);
        control.accept(poll.registry());
        assert!(!control.clients.contains_key(&gone));
        assert_eq!(control.clients.len(), MOST_CLIENTS);
        for (client, _) in asked {
            control.reply(client, json!({ "thawed": true }));
        }
        for stream in &mut streams {
            assert!(stream.read(&mut [0; 8]).unwrap() > 0);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn whose_call_has_come_already_is_not_sent_away() {
        let dir = std::env::temp_dir().join(format!("hv-vss-called-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let call = message(&json!({ "method": Method::Thaw.name() }));
        // One more than there is room for, and all of them while nobody listens.
        let ask = |_| {
            let mut stream = connect(&run);
            stream.write_all(&call).unwrap();
            let limit = Some(Duration::from_millis(50));
            stream.set_read_timeout(limit).unwrap();
            stream
        };
        let mut streams: Vec<_> = (0..=MOST_CLIENTS).map(ask).collect();
        control.accept(poll.registry());
        let asked: Vec<_> = std::iter::from_fn(|| control.next_call()).collect();
        for (client, _) in &asked {
            control.reply(*client, json!({ "thawed": true }));
        }
        let replied = streams
            .iter_mut()
            .map(|it| it.read(&mut [0; 8]).is_ok_and(|n| n > 0));
        let replied: Vec<bool> = replied.collect();
        let expected: Vec<bool> = (0..=MOST_CLIENTS).map(|it| it < MOST_CLIENTS).collect();
        assert_eq!(replied, expected);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_service_describes_itself_and_replies_in_order_in_full_and_only_to_who_wants_it() {
        let dir = std::env::temp_dir().join(format!("hv-vss-varlink-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let theirs = run.clone();
        let asking = std::thread::spawn(move || {
            let mut stream = connect(&theirs);
            let describe = |interface: Value| {
                json!({
                    "method": "org.varlink.service.GetInterfaceDescription",
                    "parameters": { "interface": interface },
                })
            };
            let calls = [
                json!({ "method": "org.varlink.service.GetInfo" }),
                describe(INTERFACE.into()),
                describe("org.example.Other".into()),
                describe(Value::Null),
                json!({ "method": Method::Status.name(), "oneway": true }),
                json!({ "method": Method::History.name() }),
                json!({ "method": Method::Check.name(), "parameters": {} }),
                json!({ "method": "org.example.Other.Do" }),
            ];
            for call in &calls {
                stream.write_all(&message(call)).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
            // Until they have all come, and the socket is full.
            std::thread::sleep(Duration::from_millis(100));
            let mut replies = Vec::new();
            stream.read_to_end(&mut replies).unwrap();
            let replies = replies.split(|&byte| byte == 0).filter(|it| !it.is_empty());
            let replies = replies.map(|it| serde_json::from_slice(it).unwrap());
            replies.collect::<Vec<Value>>()
        });
        let replies = serve(&mut control, &mut poll, asking);
        let [info, description, other, none, history, check, last] = &replies[..] else {
            panic!("{} replies: {replies:?}", replies.len());
        };
        let interfaces = &info["parameters"]["interfaces"];
        assert_eq!(interfaces, &json!([SERVICE, INTERFACE]));
        let description = &description["parameters"]["description"];
        assert_eq!(description.as_str(), Some(DESCRIPTION));
        assert_eq!(other["error"], "org.varlink.service.InterfaceNotFound");
        assert_eq!(none["error"], "org.varlink.service.InvalidParameter");
        let length = history["parameters"]["backups"][0].as_str().map(str::len);
        assert_eq!(length, Some(3_000_000));
        assert_eq!(check["error"], "org.hv-vss.Daemon.Failed");
        assert_eq!(check["parameters"]["why"], "no Check");
        assert_eq!(last["error"], "org.varlink.service.InterfaceNotFound");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_daemon_that_takes_its_time_is_waited_for_as_long_as_it_says_what_it_is_at() {
        const PAUSE: Duration = Duration::from_millis(50);
        let dir = std::env::temp_dir().join(format!("hv-vss-patience-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let theirs = run.clone();
        let asking = std::thread::spawn(move || {
            let mut told = Vec::new();
            let meanwhile = |status: &Value| told.push(status["phase"].clone());
            let reply = look_in(&theirs, Method::Thaw, PAUSE, meanwhile);
            (reply, told)
        });
        let mut events = Events::with_capacity(8);
        let mut waits = None;
        let mut looks = 0;
        while !asking.is_finished() {
            poll.poll(&mut events, Some(PAUSE / 2)).unwrap();
            for event in &events {
                control.ready(poll.registry(), event.token());
            }
            while let Some((client, method)) = control.next_call() {
                match method {
                    Method::Thaw => waits = Some(client),
                    _ => {
                        looks += 1;
                        control.reply(client, json!({ "phase": "thawing" }));
                    }
                }
            }
            if let Some(client) = waits.take_if(|_| looks == 3) {
                control.reply(client, json!({ "thawed": true }));
            }
        }
        let (reply, told) = asking.join().unwrap();
        assert_eq!(reply.unwrap()["thawed"], true);
        assert!(told.len() == 3 && told.iter().all(|it| it == "thawing"));
        // One that replies to nobody is silent.
        let silent = |_| Err(ControlError::Nobody);
        let reply = ask_for(&run, Method::Thaw, PAUSE, silent);
        assert!(matches!(reply, Err(ControlError::Nobody)));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_daemon_that_takes_nobody_up_any_more_does_not_reply() {
        use nix::sys::socket::{
            bind, listen, socket, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
        };
        let dir = std::env::temp_dir().join(format!("hv-vss-full-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        let (family, none) = (AddressFamily::Unix, SockFlag::empty());
        let listener = socket(family, SockType::Stream, none, None).unwrap();
        let address = UnixAddr::new(&path(&run)).unwrap();
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &address).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        // There is room for one.
        let _first = connect(&run);
        let (tell, told) = std::sync::mpsc::channel();
        let theirs = run.clone();
        std::thread::spawn(move || {
            let _ = tell.send((ask(&theirs, Method::Status), who_serves(&theirs)));
        });
        let (asked, who) = told.recv_timeout(PATIENCE).expect("it hangs");
        assert!(matches!(asked, Err(ControlError::Io(_))), "{asked:?}");
        assert!(matches!(who, Err(ControlError::Io(_))), "{who:?}");
        drop(listener);
        assert!(matches!(who_serves(&run), Err(ControlError::Nobody)));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn who_is_refused_knows_whether_something_is_under_way() {
        for (error, is_busy) in [("Busy", true), ("Failed", false)] {
            let declared = format!("\nerror {error} (");
            assert!(DESCRIPTION.contains(&declared));
            let mut reply = refusal(error, "it is so");
            reply.pop();
            let refused = parameters_of(&reply).unwrap_err();
            assert_eq!(refused.is_busy(), is_busy);
            assert!(refused.to_string().ends_with(": it is so"), "{refused}");
        }
        let odd = parameters_of(b"{\"phase\": 1}").unwrap_err();
        assert!(!odd.is_busy() && odd.to_string().contains("phase"));
    }

    #[test]
    fn each_method_is_described() {
        for method in Method::ALL {
            let name = method.name();
            let name = name.strip_prefix(INTERFACE).unwrap();
            let line = format!("\nmethod {}(", name.trim_start_matches('.'));
            assert!(DESCRIPTION.contains(&line), "{line}");
        }
        let methods = DESCRIPTION.matches("\nmethod ").count();
        assert_eq!(methods, Method::ALL.len());
        assert!(DESCRIPTION.contains(&format!("\ninterface {INTERFACE}\n")));
    }

    /// The names of the fields in this part of a description, but for those of fields of theirs.
    fn described(part: &str) -> BTreeSet<&str> {
        let mut depth = 0;
        let fields = part.split(|it| {
            depth += i32::from(it == '(') - i32::from(it == ')');
            it == ',' && depth == 0
        });
        let names = fields.filter_map(|it| it.split_once(':'));
        names.map(|(name, _)| name.trim()).collect()
    }

    #[test]
    fn a_status_has_the_fields_that_are_described() {
        let status = Status {
            configuration: Some(InForce {
                path: None,
                in_force: Value::Null,
            }),
            ..Status::at_rest()
        };
        let status = serde_json::to_value(status).unwrap();
        let part = |from: &str, to: &str| {
            let (_, rest) = DESCRIPTION.split_once(from).unwrap();
            rest.split_once(to).unwrap().0
        };
        for (value, part) in [
            (&status, part("\nmethod Status() -> (", "\n)")),
            (&status["configuration"], part("configuration: ?(", ")")),
        ] {
            let fields = value.as_object().into_iter().flat_map(|it| it.keys());
            let fields: BTreeSet<&str> = fields.map(String::as_str).collect();
            assert_eq!(fields, described(part));
        }
    }

    #[test]
    fn what_has_turned_is_told_by_its_number() {
        let all = [(8, 2), (0, 45)].map(|(major, minor)| DevId { major, minor });
        let status = Status {
            turned: all.map(|it| it.to_string()).into(),
            ..Status::at_rest()
        };
        let mut status = serde_json::to_value(status).unwrap();
        assert_eq!(turned_in(&status), BTreeSet::from(all));
        // A daemon of another version says none, or what is not understood.
        status["turned"] = json!(["8:2", 7, "sda2"]);
        assert_eq!(turned_in(&status).len(), 1);
        assert_eq!(turned_in(&json!({})), BTreeSet::new());
    }

    #[test]
    fn a_call_is_replied_to_and_an_unknown_one_refused() {
        let dir = std::env::temp_dir().join(format!("hv-vss-control-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let run = RunDir::new(&dir);
        assert!(matches!(ask(&run, Method::Thaw), Err(ControlError::Nobody)));
        let mut poll = Poll::new().unwrap();
        let mut control = Control::listen(&run, poll.registry(), Token(7)).unwrap();
        let theirs = run.clone();
        let asking = std::thread::spawn(move || {
            let known = ask(&theirs, Method::Status);
            let stream = std::os::unix::net::UnixStream::connect(path(&theirs));
            let mut stream = stream.unwrap();
            stream
                .write_all(b"{\"method\":\"org.hv-vss.Daemon.Dance\"}\0")
                .unwrap();
            let mut reply = [0; 512];
            let length = stream.read(&mut reply).unwrap();
            (
                known,
                String::from_utf8_lossy(&reply[..length]).into_owned(),
            )
        });
        let (known, unknown) = serve(&mut control, &mut poll, asking);
        assert_eq!(known.unwrap()["phase"], "idle");
        assert!(unknown.contains("MethodNotFound"), "{unknown}");
        assert!(unknown.contains("org.hv-vss.Daemon.Dance"), "{unknown}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
