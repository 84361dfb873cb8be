// SPDX-License-Identifier: GPL-2.0-only

//! The control socket in the run directory: how a program asks the daemon that serves.
//!
//! Varlink's framing: a JSON object and a NUL each way, one reply for each call. The methods are those
//! of the interface `org.hv_vss.Daemon`. Only root may ask. It carries calls and replies; what they do
//! is decided by [`crate::service`].

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::{json, Value};

use crate::record::RunDir;

const INTERFACE: &str = "org.hv_vss.Daemon";
/// Programs that may ask at a time.
const MOST_CLIENTS: usize = 8;
/// Bytes of the longest call.
const LONGEST_CALL: usize = 4096;
/// How long the daemon may take for a reply.
const PATIENCE: Duration = Duration::from_secs(5);

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
}

impl Method {
    const ALL: [Method; 3] = [Method::Thaw, Method::Reload, Method::Status];

    fn name(self) -> String {
        let method = match self {
            Method::Thaw => "Thaw",
            Method::Reload => "Reload",
            Method::Status => "Status",
        };
        format!("{INTERFACE}.{method}")
    }
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
    /// What it replies is not understood.
    #[error("the daemon that serves replies {0}")]
    Refused(String),
}

fn path(run: &RunDir) -> PathBuf {
    run.path().join("control")
}

/// Asks the daemon whose run directory this is.
pub fn ask(run: &RunDir, method: Method) -> Result<Value, ControlError> {
    let connected = std::os::unix::net::UnixStream::connect(path(run));
    let Ok(mut stream) = connected else {
        return Err(ControlError::Nobody);
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&message(&json!({ "method": method.name() })))?;
    let mut text = Vec::new();
    let mut part = [0; 512];
    while !text.contains(&0) {
        match stream.read(&mut part)? {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            n => text.extend(part.iter().take(n)),
        }
    }
    text.pop();
    let reply: Value = serde_json::from_slice(&text).map_err(io::Error::from)?;
    match reply.get("parameters") {
        Some(parameters) if reply.get("error").is_none() => Ok(parameters.clone()),
        _ => Err(ControlError::Refused(reply.to_string())),
    }
}

/// What the daemon replies that serves, whichever of these is its run directory.
pub fn ask_first(places: &[RunDir], method: Method) -> Result<Value, ControlError> {
    let asked = places.iter().map(|run| ask(run, method));
    let mut heard = asked.filter(|it| !matches!(it, Err(ControlError::Nobody)));
    heard.next().unwrap_or(Err(ControlError::Nobody))
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
    /// What has come of a call.
    text: Vec<u8>,
    /// Calls that wait for their reply.
    pending: usize,
    /// No more calls will come.
    is_ended: bool,
}

impl Line {
    fn is_over(&self) -> bool {
        self.is_ended && self.pending == 0
    }
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

    /// Takes up what has come; returns what is asked and by whom.
    pub fn ready(&mut self, registry: &Registry, token: Token) -> Vec<(Client, Method)> {
        match token.0 {
            it if it == self.token => self.accept(registry),
            it => return self.hear(Client(it)),
        }
        Vec::new()
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
            let registered = registry.register(&mut stream, token, Interest::READABLE);
            if registered.is_ok() {
                self.next += 1;
                let line = Line {
                    stream,
                    text: Vec::new(),
                    pending: 0,
                    is_ended: false,
                };
                self.clients.insert(Client(token.0), line);
            }
        }
    }

    /// Whoever only stays must not keep others out: of those that wait for nothing the oldest has to go. Else
    /// of those that say no more, which may be gone: what they wait for may take as long as a disk hangs.
    fn make_room(&mut self) -> bool {
        if self.clients.len() < MOST_CLIENTS {
            return true;
        }
        let oldest = |may_go: fn(&Line) -> bool| {
            let mut clients = self.clients.iter();
            let found = clients.find(|(_, line)| may_go(line));
            found.map(|(client, _)| *client)
        };
        let oldest = oldest(|line| line.pending == 0).or_else(|| oldest(|line| line.is_ended));
        oldest.and_then(|it| self.clients.remove(&it)).is_some()
    }

    fn hear(&mut self, client: Client) -> Vec<(Client, Method)> {
        let Some(line) = self.clients.get_mut(&client) else {
            return Vec::new();
        };
        let Line { stream, text, .. } = line;
        let mut part = [0; 512];
        let can_be_heard = loop {
            match stream.read(&mut part) {
                // It may still wait for replies.
                Ok(0) => {
                    line.is_ended = true;
                    break true;
                }
                Ok(n) => text.extend(part.iter().take(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break false,
            }
            if text.len() > LONGEST_CALL {
                break false;
            }
        };
        let mut calls = Vec::new();
        while let Some(end) = text.iter().position(|&byte| byte == 0) {
            let call: Vec<u8> = text.drain(..=end).take(end).collect();
            calls.push(call);
        }
        line.pending += calls.len();
        if !can_be_heard || line.is_over() {
            self.clients.remove(&client);
            return Vec::new();
        }
        let mut asked = Vec::new();
        for call in calls {
            match understood(&call) {
                Ok(method) => asked.push((client, method)),
                Err(error) => self.send(client, &error),
            }
        }
        asked
    }

    /// Replies to a call.
    pub fn reply(&mut self, client: Client, parameters: Value) {
        self.send(client, &json!({ "parameters": parameters }));
    }

    fn send(&mut self, client: Client, value: &Value) {
        let Some(line) = self.clients.get_mut(&client) else {
            return;
        };
        line.pending = line.pending.saturating_sub(1);
        let text = message(value);
        let is_sent = matches!(line.stream.write(&text), Ok(n) if n == text.len());
        // One that does not read its replies gets none.
        if !is_sent || line.is_over() {
            self.clients.remove(&client);
        }
    }
}

/// The method that is called, or the error to reply.
fn understood(call: &[u8]) -> Result<Method, Value> {
    let call: Value = serde_json::from_slice(call).unwrap_or_default();
    let name = call.get("method").and_then(Value::as_str);
    let mut methods = Method::ALL.into_iter();
    methods.find(|it| name == Some(&it.name())).ok_or_else(|| {
        json!({
            "error": "org.varlink.service.MethodNotFound",
            "parameters": { "method": name },
        })
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

    /// Replies to whoever asks, until `asking` has ended, and returns what that returns.
    fn serve<T>(control: &mut Control, poll: &mut Poll, asking: std::thread::JoinHandle<T>) -> T {
        let mut events = Events::with_capacity(8);
        while !asking.is_finished() {
            let tick = Some(Duration::from_millis(20));
            poll.poll(&mut events, tick).unwrap();
            for event in &events {
                for (client, method) in control.ready(poll.registry(), event.token()) {
                    assert_eq!(method, Method::Status);
                    control.reply(client, json!({ "phase": "idle" }));
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
                asked.extend(control.ready(poll.registry(), event.token()));
            }
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
                .write_all(b"{\"method\":\"org.hv_vss.Daemon.Dance\"}\0")
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
        assert!(unknown.contains("org.hv_vss.Daemon.Dance"), "{unknown}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
