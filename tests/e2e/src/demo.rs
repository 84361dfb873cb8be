// SPDX-License-Identifier: GPL-2.0-only

//! One backup for people to read along: what the host said and was told, what the daemon did, and
//! for how long a writer on each file system stood still.

use crate::cases::{make_file_systems, stuck_writers};
use anyhow::{Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Images, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Lun, CLASS};
use hyperv_sim::{Event, EventKind, Tx};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// For how long the demonstration's host keeps the guest frozen, at least.
const SNAPSHOT: Duration = Duration::from_millis(500);

/// Boots a guest, backs it up and prints the timeline; leaves `timeline.txt`, `timeline.svg` as the
/// daemon's history draws it, and `strace.txt`, a second backup under strace, in the results.
pub fn run(images: &Images) -> Result<()> {
    println!("demo: booting a stock Debian guest on the simulated host");
    let guest = Guest::start(images, Machine::TWO_CPUS, 1)?;
    let outcome = back_up(&guest, images);
    if outcome.is_err() {
        println!("{}", guest.post_mortem());
    }
    guest.vm().kill();
    outcome
}

fn back_up(guest: &Guest, images: &Images) -> Result<()> {
    println!("demo: ext4, xfs and btrfs beside the root (ext4), a writer on each");
    make_file_systems(guest)?;
    for path in ["/writer", "/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"] {
        guest.writer_start(path)?;
    }
    println!("demo: loading hv_vss.ko, starting hv_vss_daemon");
    guest.load(Module::Ours, &[])?;
    let vss = guest.vss();
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;

    println!("demo: the host asks for a backup");
    let disks = [Lun::scsi(CLASS, 0, 0, 0)];
    let frozen = vss.freeze(&disks, STEP)?;
    answered("FREEZE", &frozen, status::OK)?;
    guest.wait_until("every writer stands still", STEP, || {
        let snapshot = SNAPSHOT.as_micros() as u64;
        Ok(guest.writers()?.iter().all(|it| it.in_write_us > snapshot))
    })?;
    let thawed = vss.thaw(STEP)?;
    answered("THAW", &thawed, status::OK)?;
    equal("who is stuck", stuck_writers(guest)?, Vec::new())?;
    // The daemon writes its log after the thaw.
    guest.wait_until("the daemon has written its log", STEP, || {
        Ok(guest.output(&daemon)?.contains("THAW answered"))
    })?;

    let mut text = timeline(&vss.events(), &guest.output(&daemon)?)?;
    text.push_str("\nHow long a writer stood still, from its point of view:\n");
    for writer in guest.writers()? {
        let seconds = writer.longest_us as f64 / 1e6;
        let _ = writeln!(text, "  {seconds:9.3} s  {}", writer.path);
    }
    let path = images.results().join("timeline.txt");
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{text}");
    let draw = "/payload/hv_vss_daemon history --svg /run/timeline.svg";
    guest.wait_until("the backup is remembered and drawn", STEP, || {
        Ok(guest.try_sh(draw)?.status == Some(0))
    })?;
    let path = images.results().join("timeline.svg");
    std::fs::write(&path, guest.read("/run/timeline.svg")?)
        .with_context(|| format!("cannot write {}", path.display()))?;

    record_closely(guest, images, &daemon)
}

/// Host and daemon in one list, in seconds since the host sent FREEZE.
///
/// The daemon's clock starts when FREEZE reached it. That moment is placed as early as can be: at
/// the sending of FREEZE, or later if its THAW would otherwise arrive before it was sent.
fn timeline(events: &[Event], log: &str) -> Result<String> {
    let start = events
        .iter()
        .find(|it| matches!(&it.kind, EventKind::Sent { name, .. } if name == "FREEZE"))
        .map(|it| it.at)
        .context("the host's log has no FREEZE")?;
    let mut host: Vec<(f64, String)> = Vec::new();
    let mut sent_thaw = 0.0;
    for event in events.iter().filter(|it| it.at >= start) {
        let at = (event.at - start).as_secs_f64();
        match &event.kind {
            EventKind::Sent { name, bytes, .. } => {
                host.push((at, format!("host    sends {name} ({bytes} bytes)")));
                if name == "THAW" {
                    sent_thaw = at;
                }
            }
            EventKind::Reply {
                name,
                status,
                latency,
                ..
            } => {
                let verdict = status_name(*status);
                let ms = latency.as_secs_f64() * 1000.0;
                host.push((
                    at,
                    format!("host    is told {verdict} for {name}, after {ms:.1} ms"),
                ));
            }
            _ => {}
        }
    }
    let mut daemon: Vec<(f64, String)> = Vec::new();
    let mut shift: f64 = 0.0;
    for line in log.lines() {
        // "hv_vss_daemon: backup 1 +0.012345s: words"
        let Some((_, rest)) = line.split_once(" +") else {
            continue;
        };
        let Some((seconds, words)) = rest.split_once("s: ") else {
            continue;
        };
        let at: f64 = seconds
            .parse()
            .with_context(|| format!("no time in the daemon's line {line:?}"))?;
        if words.starts_with("THAW from the host") {
            shift = shift.max(sent_thaw - at);
        }
        daemon.push((at, format!("daemon  {words}")));
    }
    let mut lines = host;
    lines.extend(daemon.into_iter().map(|(at, words)| (at + shift, words)));
    // Stable, so that lines of the same moment stay in the order in which they were said.
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut text = String::from("One backup, in seconds since the host sent FREEZE:\n");
    for (at, words) in lines {
        let _ = writeln!(text, "  {at:9.6} s  {words}");
    }
    Ok(text)
}

/// A backup with strace on daemon and guard, and with the module's tracepoints. Three files: every
/// system call, only those which the README explains (what goes through the device, and what is done
/// to file systems), and one request as each of the four sides saw it.
fn record_closely(guest: &Guest, images: &Images, daemon: &Process) -> Result<()> {
    const TRACING: &str = "/sys/kernel/tracing";
    let vss = guest.vss();
    let pids = guest.sh("pidof hv_vss_daemon")?;
    let mut argv = vec!["strace", "-f", "-r", "-y", "-o", "/run/strace.txt"];
    for pid in pids.split_whitespace() {
        argv.extend(["-p", pid]);
    }
    let strace = guest.spawn(&argv)?;
    for pid in pids.split_whitespace() {
        guest.wait_until("strace has attached", STEP, || {
            Ok(guest.output(&strace)?.contains(&format!("{pid} attached")))
        })?;
    }
    guest.sh(&format!(
        "grep -q tracefs /proc/mounts || mount -t tracefs tracefs {TRACING}
         echo 1 > {TRACING}/events/hv_vss/enable"
    ))?;
    let said_before = guest.output(daemon)?.len();
    let freeze = vss.send_freeze(&[])?;
    answered("FREEZE", &vss.wait(freeze, STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    guest.wait_until("the daemon has written its log", STEP, || {
        let said = guest.output(daemon)?;
        Ok(said
            .get(said_before..)
            .unwrap_or_default()
            .contains("THAW answered"))
    })?;
    guest.signal(&strace, 2)?;
    guest.wait(&strace, STEP)?;

    let all = guest.read("/run/strace.txt")?;
    let telling: String = whole_calls(&all)
        .iter()
        .filter(|line| {
            ["/dev/vmbus/hv_vss>", "syncfs(", "FIFREEZE", "FITHAW"]
                .iter()
                .any(|word| line.contains(word))
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let trace = guest.read(&format!("{TRACING}/trace"))?;
    let said = guest.output(daemon)?;
    let said = said.get(said_before..).unwrap_or_default();
    let request = four_sides(freeze, &vss.events(), &trace, &telling, said)?;
    for (name, text) in [
        ("strace.txt", &telling),
        ("strace-full.txt", &all),
        ("request.txt", &request),
    ] {
        let path = images.results().join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("demo: the system calls of one more backup are in results/strace.txt, and in");
    println!(
        "      results/request.txt its FREEZE as host, kernel trace, strace and daemon saw it"
    );
    Ok(())
}

/// One FREEZE as host, kernel trace, strace and daemon saw it. What ties them together is the host's
/// transaction and the id that the module gives the request.
fn four_sides(tx: Tx, events: &[Event], trace: &str, strace: &str, said: &str) -> Result<String> {
    let mut text = String::new();
    for event in events {
        let at = event.at.as_secs_f64();
        let _ = match &event.kind {
            EventKind::Sent {
                tx: sent,
                name,
                bytes,
            } if *sent == tx => {
                writeln!(
                    text,
                    "host    {at:.6}: {name} sent, {bytes} bytes, transaction {}",
                    tx.0
                )
            }
            EventKind::Reply { tx: of, status, .. } if *of == tx => {
                writeln!(
                    text,
                    "host    {at:.6}: transaction {} answered, status {status:#x}",
                    tx.0
                )
            }
            _ => Ok(()),
        };
    }
    let steps = |words: &str| -> Vec<String> {
        let lines = trace.lines().filter(|line| line.contains(words));
        // "task-pid [cpu] flags time: event: fields"; of what is before the event, only the time is
        // of interest.
        lines
            .filter_map(|line| {
                let (before, event) = line.split_once(": hv_vss_")?;
                Some(format!("{}: hv_vss_{event}", before.rsplit(' ').next()?))
            })
            .collect()
    };
    let received = format!("transaction={}", tx.0);
    let first = steps(&received);
    let id = first
        .first()
        .and_then(|line| {
            line.split_once("id=")?
                .1
                .split(' ')
                .next()?
                .parse::<u64>()
                .ok()
        })
        .with_context(|| format!("no {received} in the trace:\n{trace}"))?;
    for line in steps(&format!(": id={id} ")) {
        let _ = writeln!(text, "trace   {line}");
    }
    // Kind, a reserved word and the id, as strace writes small numbers.
    for kind in [3, 4] {
        let frame = format!("\\{kind}\\0\\0\\0\\0\\0\\0\\0\\{id:o}\\0\\0\\0\\0\\0\\0\\0");
        for line in strace.lines().filter(|line| line.contains(&frame)) {
            let _ = writeln!(text, "strace  {line}");
        }
    }
    let until = |line: &&str| !line.contains("THAW from the host");
    for line in said.lines().take_while(until) {
        let _ = writeln!(
            text,
            "daemon  {}",
            line.trim_start_matches("hv_vss_daemon: ")
        );
    }
    Ok(text)
}

/// strace shows a call that another thread interrupts in two lines; here each is one again, where
/// the call began.
fn whole_calls(text: &str) -> Vec<String> {
    const BEGUN: &str = " <unfinished ...>";
    let mut lines: Vec<String> = Vec::new();
    let mut begun: BTreeMap<&str, usize> = BTreeMap::new();
    for line in text.lines() {
        let pid = line.split(' ').next().unwrap_or_default();
        let end = line.split_once(" resumed>").map(|(_, end)| end);
        match (begun.get(pid), end) {
            (Some(at), Some(end)) => {
                if let Some(start) = lines.get_mut(*at) {
                    start.push_str(end);
                }
                begun.remove(pid);
            }
            _ => {
                if line.ends_with(BEGUN) {
                    begun.insert(pid, lines.len());
                }
                lines.push(line.trim_end_matches(BEGUN).to_owned());
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_call_becomes_one_line() {
        let text = "1 0.1 ioctl(3, FIFREEZE <unfinished ...>\n\
                    2 0.2 close(4) = 0\n\
                    1 0.3 <... ioctl resumed>) = 0\n";
        assert_eq!(
            whole_calls(text),
            ["1 0.1 ioctl(3, FIFREEZE) = 0", "2 0.2 close(4) = 0"]
        );
    }

    #[test]
    fn a_request_is_found_by_transaction_and_id() {
        let trace = "\
 <idle>-0 [000] ..s1. 9.123456: hv_vss_request: id=4 operation=FREEZE stage=received transaction=17
 daemon-7 [000] d..1. 9.200000: hv_vss_answer: id=4 operation=FREEZE status=0x0 latency_us=1 transaction=17
 <idle>-0 [000] ..s1. 9.300000: hv_vss_request: id=5 operation=THAW stage=received transaction=18
";
        let strace = "\
7 0.1 read(3, \"\\2\\0\\0\\0\\234\\30\\0\\0\\3\\0\\0\\0\\0\\0\\0\\0\\4\\0\\0\\0\\0\\0\\0\\0\", 99) = 99
7 0.2 write(3, \"\\2\\0\\0\\0 \\0\\0\\0\\4\\0\\0\\0\\0\\0\\0\\0\\5\\0\\0\\0\\0\\0\\0\\0\", 32) = 32
";
        let said =
            "hv_vss_daemon: backup 1 +0.1s: FREEZE answered\nhv_vss_daemon: THAW from the host\n";
        let text = four_sides(Tx(17), &[], trace, strace, said).unwrap();
        let sides: Vec<&str> = text.lines().map(|line| &line[..6]).collect();
        assert_eq!(sides, ["trace ", "trace ", "strace", "daemon"]);
        assert!(
            text.starts_with("trace   9.123456: hv_vss_request: id=4"),
            "{text}"
        );
        assert!(!text.contains("id=5") && !text.contains("THAW"), "{text}");
    }
}
