// SPDX-License-Identifier: GPL-2.0-only

//! What a backup is at, and when: told apart by when the guest's kernel froze and thawed, which is the
//! same for every stack.
//!
//! Whoever freezes a file system gets to `freeze_super`, and to `thaw_super` when he thaws it. A probe at
//! each end of both costs some microseconds a file system. Knows nothing of what is done meanwhile.

use anyhow::{ensure, Context, Result};
use e2e::guest::Guest;

const TRACING: &str = "/sys/kernel/tracing";

/// A phase, and what the results call the writes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// What 99 of a hundred writes did not take longer of it, of all rounds together: in one round there are
    /// not so many.
    pub p99: &'static str,
    /// What one write took of it at most.
    pub longest: &'static str,
}

/// The phases, in their order.
pub const ALL: [Phase; 4] = [
    Phase {
        name: "sync",
        p99: "sync-p99",
        longest: "sync-longest",
    },
    Phase {
        name: "freeze",
        p99: "freeze-p99",
        longest: "freeze-longest",
    },
    Phase {
        name: "hold",
        p99: "hold-p99",
        longest: "hold-longest",
    },
    Phase {
        name: "thaw",
        p99: "thaw-p99",
        longest: "thaw-longest",
    },
];

/// The same of a whole turn, from just before FREEZE until every writer goes on: what the results call its writes,
/// and what 99 of a hundred of them did not take longer, of all rounds together as well.
pub const WHOLE: (&str, &str) = ("turn", "fsync-p99");

/// What the results call the writes whose 99th of a hundred this metric is, if it is one.
pub fn pooled(metric: &str) -> Option<&'static str> {
    let phases = ALL.iter().map(|it| (it.name, it.p99));
    let mut all = phases.chain([WHOLE]);
    all.find(|(_, p99)| *p99 == metric).map(|it| it.0)
}

/// Whether this metric is what one write took of a phase at most.
pub fn is_longest(metric: &str) -> bool {
    ALL.iter().any(|it| it.longest == metric)
}

/// When each phase of one backup begins, and when the last one ends, in microseconds of the guest's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phases {
    /// FREEZE goes off, and whatever is done before anything is frozen begins: ours writes back.
    sync: u64,
    /// The first freeze begins.
    freeze: u64,
    /// The last freeze has ended. The host hears of it and says THAW.
    hold: u64,
    /// The first thaw begins.
    thaw: u64,
    /// The last thaw has ended.
    end: u64,
}

impl Phases {
    /// Each phase, from when to when.
    pub fn spans(self) -> [(Phase, u64, u64); 4] {
        let Phases {
            sync,
            freeze,
            hold,
            thaw,
            end,
        } = self;
        let [a, b, c, d] = ALL;
        [
            (a, sync, freeze),
            (b, freeze, hold),
            (c, hold, thaw),
            (d, thaw, end),
        ]
    }

    /// When the last thaw has ended.
    pub fn end(self) -> u64 {
        self.end
    }

    /// From when to when the whole turn is: until the last of these writes has ended, each from when to when,
    /// that was under way when all was thawed.
    pub fn whole(self, writes: impl IntoIterator<Item = (u64, u64)>) -> (u64, u64) {
        let held = writes.into_iter().filter(|(began, _)| *began < self.end);
        (self.sync, held.map(|it| it.1).fold(self.end, u64::max))
    }

    /// Those of the backup that is in the trace, whose FREEZE went off at `sync`.
    fn parse(sync: u64, trace: &str) -> Result<Self> {
        let at = |event: &str| {
            let times = trace.lines().filter_map(|line| parse_line(line, event));
            times.collect::<Vec<u64>>()
        };
        let last = |event: &str| at(event).into_iter().max();
        let freeze = at("freeze").into_iter().min();
        let hold = last("frozen").context("nothing has been frozen")?;
        // What was frozen may have been thawed in between, and frozen once more.
        let thaw = at("thaw").into_iter().filter(|it| *it >= hold).min();
        let phases = Phases {
            sync,
            freeze: freeze.context("nothing was to be frozen")?,
            hold,
            thaw: thaw.context("nothing was to be thawed")?,
            end: last("thawed").context("nothing has been thawed")?,
        };
        let all = phases.spans();
        ensure!(
            all.iter().all(|(_, from, to)| from <= to),
            "these phases overlap: {phases:?} in {trace}"
        );
        Ok(phases)
    }
}

/// When it was, if a line of the trace says `event`.
fn parse_line(line: &str, event: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let mut before = words.next()?;
    for word in words {
        if word.strip_suffix(':') == Some(event) {
            let (seconds, micros) = before.strip_suffix(':')?.split_once('.')?;
            let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
            return Some(seconds * 1_000_000 + micros);
        }
        before = word;
    }
    None
}

/// Has the guest's kernel note when it freezes and thaws, from now on.
pub fn watch(guest: &Guest) -> Result<()> {
    guest.sh(&format!(
        "grep -q tracefs /proc/mounts || mount -t tracefs tracefs {TRACING}
         cd {TRACING} && echo mono >trace_clock && {{
         echo 'p:backup/freeze freeze_super' && echo 'r:backup/frozen freeze_super' &&
         echo 'p:backup/thaw thaw_super' && echo 'r:backup/thawed thaw_super'
         }} >kprobe_events && echo 1 >events/backup/enable"
    ))?;
    Ok(())
}

/// One backup whose phases are of interest.
pub struct Watched<'a> {
    guest: &'a Guest,
    sync: u64,
}

impl<'a> Watched<'a> {
    /// Just before FREEZE goes off.
    pub fn begin(guest: &'a Guest) -> Result<Self> {
        guest.sh(&format!("echo >{TRACING}/trace"))?;
        Ok(Watched {
            guest,
            sync: guest.clock()?,
        })
    }

    /// Its phases, once THAW is answered.
    pub fn end(self) -> Result<Phases> {
        let trace = self.guest.read(&format!("{TRACING}/trace"))?;
        Phases::parse(self.sync, &trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel writes it; the second file system is frozen while the first still is at it.
    const TRACE: &str = "# tracer: nop\n#\n\
        #           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n\
        \x20 hv_vss freeze:-205   [000] .....    51.200000: freeze: (freeze_super+0x0/0x2f0)\n\
        \x20 kworker/u4:1-31      [000] .....    51.250000: freeze: (freeze_super+0x0/0x2f0)\n\
        \x20 kworker/u4:1-31      [000] .....    51.300000: frozen: (hv_vss_freeze_super+0x20/0x30 <- freeze_super)\n\
        \x20 hv_vss freeze:-205   [000] .....    51.400010: frozen: (hv_vss_freeze_super+0x20/0x30 <- freeze_super)\n\
        \x20 hv_vss-198           [000] .....    51.450000: thaw: (thaw_super+0x0/0x20)\n\
        \x20 hv_vss-198           [000] .....    51.460000: thawed: (fs_ioctl+0x20/0x30 <- thaw_super)\n\
        \x20 hv_vss-198           [000] .....    51.460500: thaw: (thaw_super+0x0/0x20)\n\
        \x20 hv_vss-198           [000] .....    52.000001: thawed: (fs_ioctl+0x20/0x30 <- thaw_super)\n";

    #[test]
    fn a_phase_goes_on_until_the_next_one_begins() {
        let phases = Phases::parse(50_000_000, TRACE).expect("a whole backup");
        assert_eq!(
            phases
                .spans()
                .map(|(phase, from, to)| (phase.name, from, to)),
            [
                ("sync", 50_000_000, 51_200_000),
                ("freeze", 51_200_000, 51_400_010),
                ("hold", 51_400_010, 51_450_000),
                ("thaw", 51_450_000, 52_000_001),
            ]
        );
    }

    #[test]
    fn one_that_begins_anew_holds_once() {
        let again = "x-1 [000] ..... 51.100000: freeze: (a)\n\
                     x-1 [000] ..... 51.110000: frozen: (a)\n\
                     x-1 [000] ..... 51.120000: thaw: (a)\n\
                     x-1 [000] ..... 51.130000: thawed: (a)\n";
        let phases = Phases::parse(50_000_000, &format!("{again}{TRACE}")).expect("a whole backup");
        let [_, (_, freeze, frozen), (_, hold, thaw), _] = phases.spans();
        assert_eq!((freeze, frozen), (51_100_000, 51_400_010));
        assert_eq!((hold, thaw), (51_400_010, 51_450_000));
    }

    #[test]
    fn half_a_backup_has_no_phases() {
        assert!(Phases::parse(0, "").is_err());
        let half: String = TRACE.lines().take(7).map(|it| format!("{it}\n")).collect();
        assert!(Phases::parse(0, &half).is_err());
    }

    #[test]
    fn a_turn_is_over_when_the_last_write_that_it_held_is() {
        let phases = Phases::parse(50_000_000, TRACE).expect("a whole backup");
        let end = phases.end();
        let begun = 50_000_000;
        assert_eq!(phases.whole([]), (begun, end));
        // One that went on at once, two that were held to the end, and one that is long and none of this.
        let writes = [
            (begun + 1, end - 7),
            (end - 9, end + 3),
            (end - 8, end + 5),
            (end + 1, end + 90_000),
        ];
        assert_eq!(phases.whole(writes), (begun, end + 5));
    }
}
