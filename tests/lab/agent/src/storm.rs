// SPDX-License-Identifier: GPL-2.0-only

//! Random system calls on one device from several threads, to see whether it bears them.
//!
//! What the messages mean is not known here: they are bytes, and some of them are good ones that are
//! spoilt in one place.

use crate::error::Error;
use crate::STACK;
use lab_agent::{from_hex, Storm};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread;

/// Longest write, and longest read.
const LONGEST: usize = 8192;

/// What is to be done.
pub struct Plan {
    threads: u32,
    writes: u64,
    seed: u64,
    templates: Vec<Vec<u8>>,
}

impl Plan {
    /// Takes apart what the test asks for.
    pub fn new(threads: u32, writes: u64, seed: u64, templates: &[String]) -> Result<Self, Error> {
        let good: Option<Vec<_>> = templates.iter().map(|text| from_hex(text)).collect();
        let templates = good.ok_or_else(|| Error::Call("not hexadecimal".into()))?;
        if threads == 0 || templates.iter().any(|it| it.len() > LONGEST) {
            return Err(Error::Call("no threads, or a template too long".into()));
        }
        Ok(Plan {
            threads,
            writes,
            seed,
            templates,
        })
    }
}

/// Does it, and adds up what came of it.
pub fn run(device: &File, plan: &Plan) -> Result<Storm, Error> {
    let mut sum = Storm::default();
    let parts = thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in 0..u64::from(plan.threads) {
            // The first threads do what does not divide evenly.
            let writes = plan.writes / u64::from(plan.threads)
                + u64::from(number < plan.writes % u64::from(plan.threads));
            let small = thread::Builder::new().stack_size(STACK);
            threads.push(small.spawn_scoped(scope, move || part(device, plan, number, writes))?);
        }
        let join = |it: thread::ScopedJoinHandle<'_, _>| it.join();
        Ok::<Vec<_>, Error>(threads.into_iter().map(join).collect())
    });
    for part in parts? {
        let part = part.map_err(|_| Error::Call("a thread panicked".into()))??;
        sum.taken += part.taken;
        sum.read += part.read;
        for (errno, count) in part.refused {
            *sum.refused.entry(errno).or_default() += count;
        }
    }
    Ok(sum)
}

fn part(mut device: &File, plan: &Plan, number: u64, writes: u64) -> Result<Storm, Error> {
    let mut random = Random::new(plan.seed.wrapping_add(number));
    let mut storm = Storm::default();
    let mut buffer = vec![0; LONGEST];
    for _ in 0..writes {
        if random.below(8) == 0 {
            let len = random.below(LONGEST + 1);
            // What a read says does not matter, only that the device bears it.
            let got = device.read(buffer.get_mut(..len).unwrap_or_default());
            storm.read += u64::from(got.is_ok_and(|len| len > 0));
        }
        if random.below(32) == 0 {
            let wanted = PollFlags::POLLIN | PollFlags::POLLOUT;
            poll(
                &mut [PollFd::new(device.as_fd(), wanted)],
                PollTimeout::ZERO,
            )?;
        }
        let len = random.message(&plan.templates, &mut buffer);
        match device.write(buffer.get(..len).unwrap_or_default()) {
            Ok(taken) if taken == len => storm.taken += 1,
            Ok(_) => *storm.refused.entry("in part".into()).or_default() += 1,
            Err(error) => {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                *storm.refused.entry(format!("{errno:?}")).or_default() += 1;
            }
        }
    }
    Ok(storm)
}

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds must not begin alike, and the state is never 0.
        Random(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`.
    fn below(&mut self, limit: usize) -> usize {
        // The high bits of the product are the better ones.
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }

    /// Puts a message into `buffer` and returns its length.
    fn message(&mut self, templates: &[Vec<u8>], buffer: &mut [u8]) -> usize {
        let short = [
            0, 1, 4, 11, 12, 13, 24, 31, 32, 33, 48, 64, 65, 128, LONGEST,
        ];
        let template = match self.below(4) {
            0 => None,
            _ => templates.get(self.below(templates.len().max(1))),
        };
        let Some(template) = template else {
            let len = short.get(self.below(short.len())).copied().unwrap_or(0);
            for byte in buffer.iter_mut().take(len) {
                *byte = self.next() as u8;
            }
            return len;
        };
        let mut len = template.len();
        for (to, from) in buffer.iter_mut().zip(template) {
            *to = *from;
        }
        // One template in four goes out as it is.
        for _ in 0..self.below(4) {
            let at = self.below(len.max(1));
            match self.below(5) {
                0 => len = self.below(LONGEST.min(len * 2) + 1),
                1 => set(buffer, at & !3, &(self.next() as u32).to_ne_bytes()),
                2 => set(buffer, at & !3, &(self.below(8) as u32).to_ne_bytes()),
                3 => set(buffer, at & !7, &(self.below(4096) as u64).to_ne_bytes()),
                _ => set(buffer, at, &[1 << self.below(8)]),
            }
        }
        len
    }
}

fn set(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in buffer.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_seed_has_messages_of_its_own_and_the_same_ones_again() {
        let template = vec![7; 32];
        let messages = |seed| {
            let mut random = Random::new(seed);
            let mut buffer = vec![0; LONGEST];
            let mut all = Vec::new();
            for _ in 0..100 {
                let len = random.message(std::slice::from_ref(&template), &mut buffer);
                all.push(buffer[..len].to_vec());
            }
            all
        };
        assert_eq!(messages(1), messages(1));
        assert_ne!(messages(1), messages(2));
        assert!(messages(3).contains(&template), "some are good");
        assert!(messages(3).iter().any(Vec::is_empty), "some are empty");
    }

    #[test]
    fn a_storm_does_all_of_its_writes() {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let plan = Plan::new(3, 1000, 5, &["00ff".into()]).unwrap();
        let storm = run(&device, &plan).unwrap();
        assert_eq!(storm.taken, 1000);
        assert!(storm.refused.is_empty() && storm.read == 0);
        assert!(Plan::new(0, 1, 1, &[]).is_err());
        assert!(Plan::new(1, 1, 1, &["x".into()]).is_err());
    }
}
