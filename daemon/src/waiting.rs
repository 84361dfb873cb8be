// SPDX-License-Identifier: GPL-2.0-only

//! Replies to whoever asks while a daemon that starts waits for a device that somebody else has.
//!
//! That may be for as long as the other one likes, and the service manager counts the daemon among those that
//! run: so `status` says what it is at, and a reload is no failure. Nothing is frozen, and no disk is needed.

use std::io;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use serde_json::json;

use crate::control::{who_serves, Client, Control, ControlError, Method, Status};
use crate::record::RunDir;

/// What is asked while the device is waited for.
#[derive(Debug)]
pub struct Waiting {
    poll: Poll,
    events: Events,
    control: Control,
    /// For what, in words.
    doing: String,
}

impl Waiting {
    /// Listens in `run`, which is made by then; `None` where a daemon listens already that serves the device: it is
    /// that one who is asked. A dead one has its socket open as long as it is inside the kernel, and is in nobody's
    /// way.
    pub fn listen(run: &RunDir, doing: String) -> io::Result<Option<Self>> {
        if !matches!(who_serves(run), Err(ControlError::Nobody)) {
            return Ok(None);
        }
        let poll = Poll::new()?;
        let control = Control::listen(run, poll.registry(), Token(0))?;
        Ok(Some(Waiting {
            poll,
            events: Events::with_capacity(8),
            control,
            doing,
        }))
    }

    /// Replies for so long; whether anybody has asked for the configuration to be read again.
    pub fn reply_for(&mut self, pause: Duration) -> io::Result<bool> {
        let until = Instant::now() + pause;
        let mut to_reload = false;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.poll.poll(&mut self.events, Some(left)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            for event in &self.events {
                self.control.ready(self.poll.registry(), event.token());
            }
            while let Some((client, method)) = self.control.next_call() {
                to_reload |= method == Method::Reload;
                self.reply(client, method);
            }
            if left.is_zero() {
                return Ok(to_reload);
            }
        }
    }

    fn reply(&mut self, client: Client, method: Method) {
        let reply = match method {
            Method::Status => {
                let status = Status {
                    doing: Some(self.doing.clone()),
                    ..Status::at_rest()
                };
                return self.control.reply_status(client, &status);
            }
            // What a dead one has left frozen, whoever asks for the thaw thaws himself.
            Method::Thaw => json!({ "thawed": false }),
            Method::Reload => json!({ "reloaded": false, "later": true }),
            // Whoever asks does it himself, and there are disks that hang.
            Method::History | Method::Check | Method::Rehearse(_) => {
                return self.control.reply_with(client, Err(self.doing.clone()));
            }
        };
        self.control.reply(client, reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::ask;
    use std::thread::{spawn, JoinHandle};

    /// A run directory that goes with it.
    struct Scene(std::path::PathBuf);

    impl Scene {
        fn new(name: &str) -> Self {
            let name = format!("hv-vss-waiting-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            Scene(dir)
        }

        fn run(&self) -> RunDir {
            RunDir::new(&self.0)
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Replies until `asking` has ended, and returns what that returns, and whether it is to reload.
    fn reply_to<T>(waiting: &mut Waiting, asking: JoinHandle<T>) -> (T, bool) {
        let mut to_reload = false;
        while !asking.is_finished() {
            to_reload |= waiting.reply_for(Duration::from_millis(20)).unwrap();
        }
        (asking.join().unwrap(), to_reload)
    }

    #[test]
    fn who_asks_hears_what_is_waited_for_and_a_reload_comes_later() {
        let scene = Scene::new("asked");
        let waiting = Waiting::listen(&scene.run(), "somebody has it".into());
        let mut waiting = waiting.unwrap().expect("nobody serves");
        let run = scene.run();
        let asking = spawn(move || {
            [Method::Status, Method::Thaw, Method::Check].map(|method| ask(&run, method))
        });
        let ([status, thaw, check], to_reload) = reply_to(&mut waiting, asking);
        let status = status.unwrap();
        assert_eq!(status["doing"], "somebody has it");
        assert!(status["door"].is_null() && status["phase"] == "idle");
        assert_eq!(thaw.unwrap()["thawed"], false);
        let refused = check.unwrap_err();
        assert!(refused.to_string().contains("somebody has it") && !refused.is_busy());
        assert!(!to_reload);
        let run = scene.run();
        let asking = spawn(move || ask(&run, Method::Reload).unwrap());
        let (reload, to_reload) = reply_to(&mut waiting, asking);
        assert!(reload["later"] == true && to_reload);
    }

    #[test]
    fn one_that_serves_is_asked_all_the_same() {
        let scene = Scene::new("other");
        let listen = |who: &str| Waiting::listen(&scene.run(), who.into()).unwrap();
        let first = listen("the first").expect("nobody serves");
        assert!(listen("the second").is_none());
        drop(first);
        // What is left of one that has ended is in nobody's way.
        assert!(listen("the third").is_some());
    }
}
