// SPDX-License-Identifier: GPL-2.0-only

//! The measurements: what one turn of one stack yields.
//!
//! Latencies are the host's, from the moment when the request was in the guest's ring to the
//! arrival of the answer. Stalls are the guest's, as its writers saw them. Nothing is judged here.

use crate::load::{every, Disks, Writers};
use crate::phases::{Phases, Watched, WHOLE};
use crate::stack::{Rig, Stack};
use crate::stats::p99;
use anyhow::{ensure, Context, Result};
use e2e::check::answered;
use e2e::guest::{Daemon, Guest, STEP};
use hyperv_sim::ic::status;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// For one request: the slowest peer takes seconds, on a busy machine many.
const LIMIT: Duration = Duration::from_secs(180);

/// HOT_BACKUP requests in one turn: enough that their CPU time is well above the 10 ms in which
/// the guest counts it.
const REQUESTS: u32 = 300;

/// How long an idle daemon is watched.
const WATCH: Duration = Duration::from_secs(60);

/// What a turn gave: seconds by metric, and what stands behind them.
#[derive(Debug, Default, Serialize)]
pub struct Sample {
    /// The figures that are compared, in seconds.
    pub seconds: BTreeMap<&'static str, f64>,
    /// How long each phase took, in seconds, where writes are told apart by it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<&'static str, f64>,
    /// What each write took of each phase, in seconds.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fsyncs: BTreeMap<&'static str, Vec<f64>>,
    /// The longest write of each small writer, in seconds, by its file.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stalls: BTreeMap<String, f64>,
    /// How much of the guest's memory was dirty when the writers started, in KiB.
    pub dirty_kib: u64,
}

/// One FREEZE, and THAW as soon as it is answered, with a writer on every file system.
pub fn freeze(rig: &Rig, stack: Stack, disks: &Disks) -> Result<Sample> {
    let (guest, vss) = (rig.guest(), rig.guest().vss());
    // Once for nothing: the first freeze of a daemon that has just started is slower with both. There is time
    // in it to see that all is frozen that will be measured.
    disks.start_small_writers(guest)?;
    wait_for_writers(guest)?;
    answered("the first FREEZE", &vss.freeze(&[], LIMIT)?, status::OK)?;
    all_stand_still(guest)?;
    answered("the first THAW", &vss.thaw(LIMIT)?, status::OK)?;
    guest.writers_stop()?;

    let dirty_kib = disks.prepare(guest)?;
    let dirtier = disks.start_writers(guest)?;
    wait_for_writers(guest)?;
    guest.writers_reset()?;
    let watched = match disks.writers {
        Writers::Fsync => Some(Watched::begin(guest)?),
        Writers::Small | Writers::Dirtier => None,
    };

    let freeze = vss.freeze(&[], LIMIT)?;
    let thaw = vss.thaw(LIMIT)?;
    answered("FREEZE", &freeze, status::OK)?;
    answered("THAW", &thaw, status::OK)?;
    let stalls = stalls(guest)?;
    let phases = watched.map(Watched::end).transpose()?;
    let whole = phases.map(|it| whole(guest, it)).transpose()?;
    let mut fsyncs = phases.map_or_else(|| Ok(BTreeMap::new()), |it| fsyncs(guest, it))?;
    if let Some((begun, ended)) = whole {
        fsyncs.insert(WHOLE.0, parts(guest, begun, ended)?);
    }
    disks.stop_writers(guest, dirtier)?;
    if stack.daemon() == Daemon::Ours {
        // The first one and this one. It writes that down when it has answered THAW.
        let mut told = Vec::new();
        guest.wait_until("our daemon tells of both backups", STEP, || {
            told = told_of_freezes(&rig.daemon_log()?);
            Ok(told.len() >= 2)
        })?;
        all_frozen(&told, disks.count + 1)?;
    }

    let worst = stalls.values().copied().fold(0.0, f64::max);
    let mut seconds = BTreeMap::from([
        ("stall", worst),
        ("freeze", freeze.latency.as_secs_f64()),
        ("thaw", thaw.latency.as_secs_f64()),
    ]);
    let mut lengths = BTreeMap::new();
    if let (Some(phases), Some((begun, ended))) = (phases, whole) {
        seconds.insert(WHOLE.1, p99(fsyncs.get(WHOLE.0).map_or(&[], Vec::as_slice)));
        lengths.insert(WHOLE.0, seconds_between(begun, ended));
        for (phase, from, to) in phases.spans() {
            lengths.insert(phase.name, seconds_between(from, to));
            let parts = fsyncs.get(phase.name).map_or(&[][..], Vec::as_slice);
            seconds.insert(phase.p99, p99(parts));
            seconds.insert(phase.longest, parts.iter().copied().fold(0.0, f64::max));
        }
    }
    Ok(Sample {
        seconds,
        fsyncs,
        phases: lengths,
        stalls,
        dirty_kib,
    })
}

/// Waits until each writer is on its way.
fn wait_for_writers(guest: &Guest) -> Result<()> {
    guest.wait_until("every writer writes", STEP * 2, || {
        Ok(guest.writers()?.iter().all(|it| it.count > 10))
    })
}

/// Each writer stands still for as long as it would take to write several times: a backup that leaves a file
/// system out is quick, and worth nothing.
fn all_stand_still(guest: &Guest) -> Result<()> {
    let look = || -> Result<Vec<(String, u64)>> {
        let writers = guest.writers()?.into_iter();
        Ok(writers.map(|it| (it.path, it.count)).collect())
    };
    let first = look()?;
    let long = SNAPSHOT.max(every(first.len()) * 8);
    let over = guest.clock()? + long.as_micros() as u64;
    guest.wait_until("the snapshot is taken", STEP, || Ok(guest.clock()? > over))?;
    let last = look()?;
    let moving = moving(&first, &last);
    ensure!(
        moving.is_empty(),
        "FREEZE was answered 0, and these are written to: {moving:?}"
    );
    Ok(())
}

/// How long a host takes at least for its snapshot in the backup that is not measured.
const SNAPSHOT: Duration = Duration::from_millis(200);

/// The files that were written to between two looks, each by how often it had been by then. One write may
/// have returned just before the freeze and been counted after the first.
fn moving<'a>(first: &[(String, u64)], last: &'a [(String, u64)]) -> Vec<&'a str> {
    let pairs = first.iter().zip(last);
    pairs
        .filter(|(first, last)| last.1 > first.1 + 1)
        .map(|(_, last)| last.0.as_str())
        .collect()
}

/// The least that any stack can do in this guest, in seconds: of all file systems the longest that one
/// takes to be frozen and thawed when it is clean and alone.
pub fn limit(guest: &Guest, disks: &Disks) -> Result<f64> {
    guest.sh("sync")?;
    let mut longest = Duration::ZERO;
    for folder in disks.folders() {
        longest = longest.max(guest.freeze_and_thaw(&folder)?);
    }
    Ok(longest.as_secs_f64())
}

/// What our daemon has said of each FREEZE that it answered 0, the oldest first.
fn told_of_freezes(log: &str) -> Vec<String> {
    let lines = log.lines();
    let told = lines.filter_map(|it| Some(it.split_once("FREEZE answered: ")?.1.to_owned()));
    told.collect()
}

/// Each of these must be that so many file systems were frozen, all that there are: one that is left out, or
/// only synced, takes no time. The peer does not say; it fails with what it cannot freeze.
fn all_frozen(told: &[String], count: u32) -> Result<()> {
    let right = format!("{count} frozen, 0 frozen by others, 0 only synced, 0 left out");
    ensure!(
        told.iter().all(|it| *it == right),
        "FREEZE was answered 0, and the daemon says: {told:?}, not {right:?}"
    );
    Ok(())
}

fn seconds_between(from_us: u64, to_us: u64) -> f64 {
    (to_us - from_us) as f64 / 1e6
}

/// From when to when the whole turn was, of the guest's clock: what is written while it is asked is none of it.
fn whole(guest: &Guest, phases: Phases) -> Result<(u64, u64)> {
    let long = guest.stalls(phases.end())?.stalls;
    let ended = long.iter();
    Ok(phases.whole(ended.filter_map(|it| Some((it.began_us, it.ended_us?)))))
}

/// What each write took of each phase, in seconds.
fn fsyncs(guest: &Guest, phases: Phases) -> Result<BTreeMap<&'static str, Vec<f64>>> {
    let mut fsyncs = BTreeMap::new();
    for (phase, from, to) in phases.spans() {
        fsyncs.insert(phase.name, parts(guest, from, to)?);
    }
    Ok(fsyncs)
}

/// What each write took of this span of the guest's clock, in seconds.
fn parts(guest: &Guest, from: u64, to: u64) -> Result<Vec<f64>> {
    let shares = guest.writes_within(from, to)?;
    let parts = shares.iter().flat_map(|it| &it.parts_us);
    Ok(parts.map(|it| *it as f64 / 1e6).collect())
}

/// The longest write of each writer, taken once the write that it stood still in has ended.
fn stalls(guest: &Guest) -> Result<BTreeMap<String, f64>> {
    let counts: Vec<u64> = guest.writers()?.iter().map(|it| it.count).collect();
    let mut stalls = BTreeMap::new();
    guest.wait_until("every writer goes on", STEP * 2, || {
        for (writer, then) in guest.writers()?.into_iter().zip(&counts) {
            ensure!(writer.errors == 0, "writes have failed: {writer:?}");
            if writer.count > *then && !stalls.contains_key(&writer.path) {
                stalls.insert(writer.path, writer.longest_us as f64 / 1e6);
            }
        }
        Ok(stalls.len() == counts.len())
    })?;
    Ok(stalls)
}

/// Many HOT_BACKUP requests, one after the other.
pub fn hot_backup(rig: &Rig) -> Result<Sample> {
    let (guest, vss) = (rig.guest(), rig.guest().vss());
    // What it costs to look at the clock.
    let (first, begin) = (busy(guest)?, busy(guest)?);
    let mut latencies = Vec::new();
    for _ in 0..REQUESTS {
        let reply = vss.hot_backup(LIMIT)?;
        answered("HOT_BACKUP", &reply, status::OK)?;
        latencies.push(reply.latency.as_secs_f64());
    }
    let used = (busy(guest)? - begin) - (begin - first);
    Ok(Sample {
        seconds: BTreeMap::from([
            ("roundtrip", crate::stats::median(&latencies)),
            ("cpu", used / f64::from(REQUESTS)),
        ]),
        ..Sample::default()
    })
}

/// For how long the guest's CPU has not been idle, in seconds: interrupts are in it.
fn busy(guest: &Guest) -> Result<f64> {
    let (up, idle) = parse_uptime(&guest.read("/proc/uptime")?)?;
    Ok(up - idle)
}

/// Seconds since boot, and how many of them the CPU was idle.
fn parse_uptime(text: &str) -> Result<(f64, f64)> {
    let mut fields = text.split_whitespace().map(str::parse::<f64>);
    match (fields.next(), fields.next()) {
        (Some(Ok(up)), Some(Ok(idle))) => Ok((up, idle)),
        _ => anyhow::bail!("this should be /proc/uptime: {text:?}"),
    }
}

/// The two clocks, read at the same moment: latencies are taken with one, stalls with the other.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    host: Instant,
    guest: f64,
}

impl Clocks {
    /// Reads both.
    pub fn read(guest: &Guest) -> Result<Self> {
        let (up, _) = parse_uptime(&guest.read("/proc/uptime")?)?;
        Ok(Clocks {
            host: Instant::now(),
            guest: up,
        })
    }

    /// What they say has gone by since, for people.
    pub fn compare(self, guest: &Guest) -> Result<String> {
        let now = Clocks::read(guest)?;
        let (host, guest) = (now.host - self.host, now.guest - self.guest);
        let host = host.as_secs_f64();
        Ok(format!(
            "{host:.1} s by the host's clock, {guest:.1} s by the guest's"
        ))
    }
}

/// What a daemon costs while it waits.
#[derive(Debug, Serialize)]
pub struct Idle {
    /// Processes, helpers included.
    pub processes: usize,
    /// Their resident memory together, in KiB: what they share counts for each.
    pub resident_kib: u64,
    /// The same with what is shared counted once, in parts.
    pub proportional_kib: u64,
    /// System calls that returned in [`WATCH`], as strace saw them.
    pub wake_ups: usize,
}

/// Watches a daemon that has served one backup and now waits.
pub fn idle(rig: &Rig) -> Result<Idle> {
    let (guest, vss) = (rig.guest(), rig.guest().vss());
    answered("FREEZE", &vss.freeze(&[], LIMIT)?, status::OK)?;
    answered("THAW", &vss.thaw(LIMIT)?, status::OK)?;

    let pids = rig.daemon_pids()?;
    let (mut resident_kib, mut proportional_kib) = (0, 0);
    for pid in &pids {
        let rollup = guest.read(&format!("/proc/{pid}/smaps_rollup"))?;
        resident_kib += kib(&rollup, "Rss:")?;
        proportional_kib += kib(&rollup, "Pss:")?;
    }

    let mut argv = vec!["strace".to_string(), "-f".into()];
    argv.extend(["-o".into(), "/run/idle.strace".into()]);
    for pid in &pids {
        argv.extend(["-p".into(), pid.to_string()]);
    }
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let strace = guest.spawn(&argv)?;
    guest.wait_until("strace has attached to every process", STEP, || {
        let seen = guest.output(&strace)?;
        Ok(seen.matches("attached").count() >= pids.len())
    })?;
    std::thread::sleep(WATCH);
    guest.signal(&strace, 2)?;
    guest.wait(&strace, STEP)?;
    let wake_ups = wake_ups(&guest.read("/run/idle.strace")?);
    Ok(Idle {
        processes: pids.len(),
        resident_kib,
        proportional_kib,
        wake_ups,
    })
}

fn kib(rollup: &str, name: &str) -> Result<u64> {
    let line = rollup.lines().find_map(|it| it.strip_prefix(name));
    line.and_then(|it| it.trim().strip_suffix("kB"))
        .and_then(|it| it.trim().parse().ok())
        .with_context(|| format!("smaps_rollup has no {name} {rollup}"))
}

/// System calls that have returned. One in which a process waited all the time has no result, and
/// strace ends its line with `<detached ...>` or `<unfinished ...>`.
fn wake_ups(strace: &str) -> usize {
    strace.lines().filter(|line| line.contains(") = ")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_writes_twice_does_not_stand_still() {
        let look = |counts: [u64; 3]| {
            ["/a", "/b", "/c"]
                .map(str::to_owned)
                .into_iter()
                .zip(counts)
        };
        let look = |counts| look(counts).collect::<Vec<_>>();
        assert_eq!(moving(&look([20, 20, 20]), &look([20, 21, 22])), ["/c"]);
    }

    #[test]
    fn a_backup_that_leaves_one_out_is_none() {
        let log = |last: &str| {
            format!(
                "hv_vss_daemon: HOT_BACKUP from the host, acknowledged\n\
                 hv_vss_daemon: backup 1 +0.1s: FREEZE answered: 2 frozen, 0 frozen by others, 0 only synced, 0 left out\n\
                 hv_vss_daemon: backup 1 +0.2s: THAW answered: all that was frozen is thawed, the backup is good\n\
                 hv_vss_daemon: backup 2 +0.1s: FREEZE answered: {last}\n"
            )
        };
        let verdict = |last: &str, count| {
            let told = told_of_freezes(&log(last));
            assert_eq!(told.len(), 2);
            all_frozen(&told, count)
        };
        let whole = "2 frozen, 0 frozen by others, 0 only synced, 0 left out";
        assert!(verdict(whole, 2).is_ok());
        assert!(verdict(whole, 3).is_err());
        for last in [
            "1 frozen, 0 frozen by others, 0 only synced, 1 left out",
            "1 frozen, 1 frozen by others, 0 only synced, 0 left out",
            "1 frozen, 0 frozen by others, 1 only synced, 0 left out",
        ] {
            assert!(verdict(last, 2).is_err(), "{last}");
        }
    }

    #[test]
    fn busy_time_is_uptime_without_idle_time() {
        let (up, idle) = parse_uptime("100.50 98.25\n").expect("well formed");
        assert!((up - idle - 2.25).abs() < 1e-9);
        assert!(parse_uptime("100.50").is_err());
    }

    #[test]
    fn only_system_calls_that_returned_are_wake_ups() {
        let text = "71 restart_syscall(<... resuming interrupted ppoll ...> <unfinished ...>\n\
                    70 read(3, \"x\", 8) = 1\n\
                    70 ppoll([{fd=3}], 1, NULL, NULL, 8 <unfinished ...>\n\
                    71 <... restart_syscall resumed>) = 0\n\
                    70 <... ppoll resumed> <detached ...>\n";
        assert_eq!(wake_ups(text), 2);
    }
}
