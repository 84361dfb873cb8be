// SPDX-License-Identifier: GPL-2.0-only

//! A disk with much to write on a machine whose other disks have nothing to do: what it has to write is
//! written before anything is frozen, so its neighbours hardly notice.
//!
//! The disks are the host's, and it says how many bytes a second they take. How long that holds up a
//! writer elsewhere is compared with how long FREEZE takes, which is mostly that.

use super::disks::{self, load_driver, Attached};
use super::hangs::longest_stall;
use super::{
    good_backup, hooks, load, logged, logged_all, observe, start, stop, wait_for_daemon, Case,
};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use std::num::NonZeroU64;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "slow/much-to-write",
        "a slow ext4 with 24 MiB in memory: its quick neighbours do not wait until that is written",
        much_to_write,
    )
    .comparing()
    .long(),
    case(
        "slow/new-files",
        "the same with hundreds of new files on an xfs",
        new_files,
    )
    .long(),
    case(
        "slow/cannot-freeze",
        "a slow vfat with much in memory is synced before anything is frozen",
        cannot_freeze,
    ),
    case(
        "slow/with-a-hook",
        "what a hook makes ready waits for what has become dirty since, and not until all is written back",
        with_a_hook,
    )
    .long(),
    case(
        "slow/longer-than-prepare",
        "what takes longer to write than `prepare` is waited for: the host's time is the limit",
        longer_than_prepare,
    )
    .long(),
    case(
        "slow/image-on-a-slow-one",
        "an image in what is slow to freeze stays frozen meanwhile, all others go on; on both modules",
        image_on_a_slow_one,
    )
    .long(),
];

/// A case that waits for a slow disk, twice where the peer does as well.
const fn case(name: &'static str, about: &'static str, run: fn(&Guest) -> Result<()>) -> Case {
    Case {
        per_round: Duration::from_secs(10),
        ..disks::case(name, about, run)
    }
}

/// What a slow disk takes in a second.
const SLOW: u64 = 4 << 20;

/// The neighbours of the slow one.
const QUICK: [&str; 3] = ["/mnt/a/w", "/mnt/b/w", "/mnt/c/w"];

/// A disk of `mib` MiB that becomes slow when it is told to, with a file system of this kind on
/// `/mnt/slow`, beside three quick ext4 with writers.
fn make(guest: &Guest, mib: u64, make: &str) -> Result<Attached> {
    let disk = Attached::new(guest, 0, 0, mib, Image::default())?;
    load_driver(guest)?;
    let node = disk.node(guest)?;
    guest.sh(&format!(
        "modprobe -a xfs vfat nls_cp437 nls_ascii; mkdir -p /mnt/slow
         {make} {node} && mount {node} /mnt/slow
         for n in 1=a 2=b 3=c; do
             mkdir -p /mnt/${{n#*=}} && mkfs.ext4 -q -F /dev/ram${{n%=*}} &&
                 mount /dev/ram${{n%=*}} /mnt/${{n#*=}} || exit 1
         done
         sync"
    ))?;
    for path in QUICK {
        guest.writer_start(path)?;
    }
    Ok(disk)
}

/// What came of a backup, in the guest's time.
struct Course {
    /// From the request to the answer.
    freeze: Duration,
    /// The longest that a quick neighbour's writer stood still until that answer.
    stall: Duration,
}

/// What a case leaves to be written to the slow one.
struct Dirt<'a> {
    script: &'a str,
    /// How much of it is in memory afterwards, at least.
    mib: u64,
}

impl Dirt<'_> {
    /// Leaves it, and sees to it that it is there: what is written before the request makes that one look quick.
    fn leave(&self, guest: &Guest) -> Result<()> {
        guest.sh("echo 3000 > /proc/sys/vm/dirty_writeback_centisecs")?;
        guest.sh(self.script)?;
        // The kernel adds up each processor's pages when those have become some.
        let (dirty, wanted) = (guest.dirty_kib()?, self.mib * 1024 - 1024);
        ensure!(
            dirty >= wanted,
            "{wanted} KiB should be dirty in the guest, {dirty} KiB are: some was written early"
        );
        Ok(())
    }
}

/// A file of its own: one that is overwritten ext4 begins to write at its close.
const MUCH: Dirt = Dirt {
    script: "rm -f /mnt/slow/file && dd if=/dev/zero of=/mnt/slow/file bs=24M count=1 2>/dev/null",
    mib: 24,
};

/// Dirties the slow one, backs up, and sees to it that the answer is good.
fn back_up(guest: &Guest, disk: &Attached, dirty: &Dirt) -> Result<Course> {
    dirty.leave(guest)?;
    disk.disk.set_bandwidth(NonZeroU64::new(SLOW));
    let sent = guest.clock()?;
    let tx = guest.vss().send_freeze(&[])?;
    let reply = guest.vss().wait(tx, STEP * 2)?;
    let stall = longest_stall(guest, sent)?;
    answered("FREEZE", &reply, status::OK)?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    disk.disk.set_bandwidth(None);
    Ok(Course {
        freeze: reply.latency,
        stall,
    })
}

/// A backup with ours: the neighbours stood still for a small part of the time.
fn hardly_noticed(guest: &Guest, disk: &Attached, dirty: &Dirt) -> Result<Course> {
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let course = back_up(guest, disk, dirty)?;
    let Course { freeze, stall } = course;
    println!("     FREEZE took {freeze:.1?}, a neighbour stood still for {stall:.1?} at most");
    // Or the disk was not slow, and there was nothing to notice.
    ensure!(
        freeze > Duration::from_secs(2),
        "FREEZE took {freeze:?} only"
    );
    ensure!(
        stall < freeze / 3,
        "a neighbour stood still for {stall:?} of the {freeze:?} that FREEZE took"
    );
    stop(guest, Module::Ours, &daemon)?;
    Ok(course)
}

/// The same with ours and the peer.
fn compared(guest: &Guest, disk: &Attached, what: &str, dirty: &Dirt) -> Result<()> {
    let ours = hardly_noticed(guest, disk, dirty)?;
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let peer = back_up(guest, disk, dirty)?;
    stop(guest, Module::Stock, &daemon)?;
    let words = |course: &Course| {
        format!(
            "a writer elsewhere stands still for {:.0} % of the {:.1} s that FREEZE takes",
            100.0 * course.stall.as_secs_f64() / course.freeze.as_secs_f64(),
            course.freeze.as_secs_f64()
        )
    };
    guest.compare(what, &words(&ours), &words(&peer));
    Ok(())
}

fn much_to_write(guest: &Guest) -> Result<()> {
    let disk = make(guest, 128, "mkfs.ext4 -q -F")?;
    compared(
        guest,
        &disk,
        "a slow disk (4 MiB/s) has 24 MiB to write back, three others have nothing",
        &MUCH,
    )
}

fn new_files(guest: &Guest) -> Result<()> {
    let disk = make(guest, 320, "mkfs.xfs -q -f")?;
    let files = Dirt {
        script: "mkdir -p /mnt/slow/d && cd /mnt/slow/d && n=0
                 while [ $n -lt 500 ]; do echo $n > $n; n=$((n + 1)); done
                 dd if=/dev/zero of=all bs=8M count=1 2>/dev/null",
        mib: 8,
    };
    hardly_noticed(guest, &disk, &files).map(drop)
}

fn cannot_freeze(guest: &Guest) -> Result<()> {
    let disk = make(guest, 64, "mkfs.vfat")?;
    let file = Dirt {
        script: "dd if=/dev/zero of=/mnt/slow/file bs=16M count=1 2>/dev/null",
        mib: 16,
    };
    hardly_noticed(guest, &disk, &file).map(drop)
}

fn with_a_hook(guest: &Guest) -> Result<()> {
    let disk = make(guest, 128, "mkfs.ext4 -q -F")?;
    // As a database does, it leaves something to be written.
    let note = "cut -d ' ' -f 1 /proc/uptime >>/run/times";
    hooks::hook(
        guest,
        "10-holds",
        &format!("{note}; echo $1 >>/mnt/slow/hook"),
    )?;
    let module = guest.module();
    let daemon = start(guest, module, Daemon::Ours)?;
    // The first one is that of the request.
    let script = format!("rm -f /run/times; {} && {note}", MUCH.script);
    let dirty = Dirt {
        script: &script,
        ..MUCH
    };
    let Course { freeze, .. } = back_up(guest, &disk, &dirty)?;
    hooks::stop_at_rest(guest, module, &daemon)?;
    let times = guest.sh("cat /run/times")?;
    let times: Vec<f64> = times.lines().map(str::parse).collect::<Result<_, _>>()?;
    let [sent, called, let_go] = times[..] else {
        bail!("the hook was called at {times:?}");
    };
    let (waited, held) = (called - sent, let_go - called);
    println!("     FREEZE took {freeze:.1?}, the hook was called after {waited:.1} s and held for {held:.1} s");
    // Most of what there was is written by then: that takes six seconds.
    ensure!(
        waited > 4.0,
        "the hook was called {waited:.1} s after the request, of the {freeze:?} that FREEZE took"
    );
    hooks::end(guest)
}

fn longer_than_prepare(guest: &Guest) -> Result<()> {
    let disk = make(guest, 128, "mkfs.ext4 -q -F")?;
    load(guest, Module::Ours, &[])?;
    let daemon = guest.start_daemon_with("prepare = 1")?;
    wait_for_daemon(guest)?;
    let course = back_up(guest, &disk, &MUCH)?;
    ensure!(
        course.freeze > Duration::from_secs(2),
        "FREEZE took {:?} only, `prepare` is 1 s",
        course.freeze
    );
    let log = logged(guest, &daemon)?;
    let frozen = log.lines().find(|it| it.contains("FREEZE answered"));
    let all = frozen.map(|it| it.contains("5 frozen"));
    equal("whether all five are frozen", all, Some(true))?;
    stop(guest, Module::Ours, &daemon)?;

    // Longer than the module waits: it is said what it is at meanwhile, and in the end which limit that was.
    load(guest, Module::Ours, &["freeze_timeout_ms=15000"])?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    MUCH.leave(guest)?;
    disk.disk.set_bandwidth(NonZeroU64::new(SLOW / 8));
    answered("FREEZE", &guest.vss().freeze(&[], STEP * 2)?, status::FAIL)?;
    let mut log = String::new();
    let said = guest.wait_until("the log says so", STEP, || {
        log = guest.output(&daemon)?;
        let its = |it: &&str| {
            it.contains("writing back for ") && it.contains("still at /mnt/slow (ext4, 8:0)")
        };
        let (last, meanwhile): (Vec<_>, Vec<_>) = log
            .lines()
            .filter(its)
            .partition(|it| it.contains("warning: ") && it.contains(": called off: "));
        let names_limit = |it: &&str| it.ends_with("(freeze_timeout_ms)");
        Ok(!meanwhile.is_empty() && last.iter().any(names_limit))
    });
    said.with_context(|| format!("it is not said:\n{log}"))?;
    disk.disk.set_bandwidth(None);
    good_backup(guest).context("with the disk as it was")?;
    stop(guest, Module::Ours, &daemon)
}

/// The thaw of the image writes to the file system below it, which is being frozen: it would wait for that
/// to be thawed, and whoever waits for the thaw does not come to that.
fn image_on_a_slow_one(guest: &Guest) -> Result<()> {
    let disk = make(guest, 128, "mkfs.ext4 -q -F")?;
    // Without barriers the image is quick itself: it has its writes in memory, as a page of the other.
    guest.sh(
        "modprobe loop && mkdir -p /mnt/image && truncate -s 32M /mnt/slow/image &&
         mkfs.ext4 -q -F /mnt/slow/image &&
         mount -o loop,barrier=0 /mnt/slow/image /mnt/image && sync",
    )?;
    for file in ["/mnt/slow/w", "/mnt/image/w"] {
        guest.writer_start(file)?;
    }
    let mut logs = String::new();
    for module in [Module::Ours, Module::Stock] {
        let daemon = start(guest, module, Daemon::Ours)?;
        disk.disk.set_delay(Duration::from_millis(150));
        for _ in 0..2 {
            let seen = observe(guest)?;
            let told = (seen.freeze, seen.thaw, seen.moving.len(), seen.stuck.len());
            let expected = (status::OK, Some(status::OK), 0, 0);
            equal("the answers, who went on, who is stuck", told, expected)?;
        }
        disk.disk.set_delay(Duration::ZERO);
        logs.push_str(&logged_all(guest, &daemon, 2)?);
        stop(guest, module, &daemon)?;
    }
    // Or nobody was to be let go. Each time is too much to ask: others may have been slower.
    let let_go = "/mnt/slow (ext4, 8:0) takes long to freeze";
    ensure!(logs.contains(let_go), "it should be slow:\n{logs}");
    Ok(())
}
