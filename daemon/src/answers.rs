// SPDX-License-Identifier: GPL-2.0-only

//! Which disks answer: each is asked for its first block, past all caches of this machine.
//!
//! A freeze writes to its disk also when nothing is dirty, and hangs where that does. Who cannot call it off asks
//! before. It knows devices, and nothing of what is on them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use crate::apart::Questions;
use crate::mounts::DevId;
use crate::open;
use crate::sys;

/// Of so many the answers are under way before anybody waits for one of them. Each has a thread, which is used again.
const AT_ONCE: usize = 16;
/// How long they may then take before one more is asked beside them.
const MOMENT: Duration = Duration::from_millis(1);
/// How often it is looked whether one has come. Whoever asks may go before those who answer.
const TURN: Duration = Duration::from_micros(100);
/// How often it is looked whether it is off.
const TICK: Duration = Duration::from_millis(20);

/// Those of `devices` that do not answer within `limit`, all asked together; one whose last answer is still to come is
/// silent at once. An error is an answer, and what has no node is not asked. Ends with none when `is_off`.
pub fn silent(
    devices: &BTreeSet<DevId>,
    limit: Duration,
    is_off: &dyn Fn() -> bool,
) -> BTreeSet<DevId> {
    static ASKED: Questions<DevId> = Questions::new();
    silent_to(&ASKED, read_first_block, devices, limit, is_off)
}

fn silent_to(
    asked: &'static Questions<DevId>,
    question: fn(DevId),
    devices: &BTreeSet<DevId>,
    limit: Duration,
    is_off: &dyn Fn() -> bool,
) -> BTreeSet<DevId> {
    let mut silent = BTreeSet::new();
    let mut waited_for: BTreeMap<DevId, Receiver<()>> = BTreeMap::new();
    let until = Instant::now() + limit;
    for device in devices.iter().copied() {
        match asked.put(device, &[], move |_| question(device)) {
            Ok(told) => {
                waited_for.insert(device, told);
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                silent.insert(device);
            }
            // Without a thread for it nobody knows, and it is frozen as it always was.
            Err(_) => {}
        }
        let moment = Instant::now() + MOMENT;
        while waited_for.len() >= AT_ONCE && Instant::now() < moment {
            thread::sleep(TURN);
            waited_for.retain(|_, told| told.try_recv() == Err(TryRecvError::Empty));
        }
    }
    for (device, told) in waited_for {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match told.recv_timeout(left.min(TICK)) {
                Err(RecvTimeoutError::Timeout) if is_off() => return BTreeSet::new(),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    silent.insert(device);
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }
    silent
}

/// Reads the first block of a device, whatever comes of that. To open one may hang as well.
fn read_first_block(device: DevId) {
    let Some(node) = open::node_of(device) else {
        return;
    };
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags(libc::O_DIRECT | libc::O_NONBLOCK);
    let Ok(mut file) = options.open(node) else {
        return;
    };
    let Ok(size) = sys::logical_block(file.as_fd()) else {
        return;
    };
    // Without the cache, a block goes to where one may begin.
    let mut buffer = vec![0_u8; size * 2];
    let begin = buffer.as_ptr().align_offset(size);
    let rest = buffer.get_mut(begin..);
    if let Some(block) = rest.and_then(|it| it.get_mut(..size)) {
        // An error is an answer.
        let _ = file.read(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);

    fn devices(minors: std::ops::Range<u32>) -> BTreeSet<DevId> {
        minors.map(|minor| DevId { major: 8, minor }).collect()
    }

    #[test]
    fn those_that_do_not_answer_are_waited_for_together_and_once() {
        static ASKED: Questions<DevId> = Questions::new();
        static HANG: Mutex<()> = Mutex::new(());
        // Enough for the others, however busy the machine is.
        const LIMIT: Duration = Duration::from_secs(2);
        let question = |it: DevId| {
            if it.minor < 40 {
                drop(HANG.lock());
            }
        };
        let hold = HANG.lock().unwrap();
        let (all, dead) = (devices(0..60), devices(0..40));
        let begin = Instant::now();
        assert_eq!(silent_to(&ASKED, question, &all, LIMIT, &|| false), dead);
        // One after the other they would be waited for forty times as long.
        assert!(begin.elapsed() < LIMIT * 20, "{:?}", begin.elapsed());
        assert_eq!(silent_to(&ASKED, question, &all, LONG, &|| false), dead);
        drop(hold);
        let since = Instant::now();
        while !silent_to(&ASKED, question, &all, LONG, &|| false).is_empty() {
            assert!(since.elapsed() < LONG);
        }
    }

    #[test]
    fn nobody_waits_for_one_when_it_is_off_and_one_that_is_slow_has_its_time() {
        static ASKED: Questions<DevId> = Questions::new();
        let slow = |_: DevId| thread::sleep(SHORT);
        let one = devices(0..1);
        assert_eq!(
            silent_to(&ASKED, slow, &one, LONG, &|| false),
            devices(0..0)
        );
        let begin = Instant::now();
        assert_eq!(
            silent_to(&ASKED, |_| thread::sleep(SHORT * 20), &one, LONG, &|| true),
            devices(0..0)
        );
        assert!(begin.elapsed() < SHORT * 10);
    }

    #[test]
    fn what_has_no_node_is_not_asked() {
        let nowhere = BTreeSet::from([DevId::default()]);
        assert!(silent(&nowhere, LONG, &|| false).is_empty());
    }
}
