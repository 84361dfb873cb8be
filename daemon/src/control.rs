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

/// The daemon's end.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    clients: BTreeMap<Client, (UnixStream, Vec<u8>)>,
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
            let token = Token(self.next);
            let registered = registry.register(&mut stream, token, Interest::READABLE);
            if is_root && self.clients.len() < MOST_CLIENTS && registered.is_ok() {
                self.next += 1;
                self.clients.insert(Client(token.0), (stream, Vec::new()));
            }
        }
    }

    fn hear(&mut self, client: Client) -> Vec<(Client, Method)> {
        let Some((stream, text)) = self.clients.get_mut(&client) else {
            return Vec::new();
        };
        let mut part = [0; 512];
        let open = loop {
            match stream.read(&mut part) {
                Ok(0) => break false,
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
        if !open {
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
        let Some((stream, _)) = self.clients.get_mut(&client) else {
            return;
        };
        let text = message(value);
        // One that does not read its replies gets none.
        if !matches!(stream.write(&text), Ok(n) if n == text.len()) {
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
        let (known, unknown) = asking.join().unwrap();
        assert_eq!(known.unwrap()["phase"], "idle");
        assert!(unknown.contains("MethodNotFound"), "{unknown}");
        assert!(unknown.contains("org.hv_vss.Daemon.Dance"), "{unknown}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
