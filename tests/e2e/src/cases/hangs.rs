// SPDX-License-Identifier: GPL-2.0-only

//! Nothing stays frozen when it is not a process that ends but something in the kernel that does
//! not: a disk, a freeze, an open.

use super::broken::{no_raid, raid};
use super::control::asked;
use super::deadman::{
    all_of_ours, hang_writes, held_up, make_dirty, make_hung, make_hung_disk, released,
    remove_hung, rounds_of, Tally, FEW, HANG, RELEASED, UNHANG,
};
use super::disks::{self, load_driver, Attached};
use super::hooks::{self, hook, noted};
use super::scope::tells_superblocks;
use super::{
    all_frozen, case, good_backup, load, logged_all, reply_within, rounds_or, seed, start, stop,
    stuck_writers, wait_for_daemon, wait_out, who_stands_still, Case,
};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal, status_name};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hv_vss_uapi::IOC_FREEZE;
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{Op, SHORT_BODY};
use hyperv_sim::storage::Image;
use hyperv_sim::Tx;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "deadman/hung-device",
        "a disk that hangs is left out after give_up, and at once the next time; strict fails by name",
        hung_device,
    )
    .comparing()
    .long(),
    case(
        "deadman/hung-freeze",
        "a freeze that hangs fails at the deadline, and the others hardly stand still for it",
        |guest| hung_freeze(guest, Module::Ours),
    )
    .asking_our_module(),
    case(
        "deadman/hung-freeze-stock-module",
        "the same with the stock hv_utils and FIFREEZE",
        |guest| hung_freeze(guest, Module::Stock),
    ),
    case(
        "deadman/dead-before-freeze",
        "stock: a disk that is dead though nothing on it is dirty costs no backup but its own, the first after \
         give_up, the next at once; strict fails by name",
        dead_before_freeze,
    ),
    case(
        "deadman/hung-thaw",
        "a thaw that hangs on its disk holds up no image on another one, which comes after it, and no hook",
        |guest| hung_thaw(guest, Module::Ours),
    )
    .asking_our_module(),
    case(
        "deadman/hung-thaw-stock-module",
        "the same with the stock hv_utils and FITHAW",
        |guest| hung_thaw(guest, Module::Stock),
    ),
    disks::case(
        "deadman/killed-behind-a-hung-look",
        "stock: the daemon dies after THAW, while a look of its own and a thaw hang on a disk: that is thawed, \
         too, when it comes back",
        killed_behind_a_hung_look,
    ),
    case(
        "deadman/guard-killed-while-it-hangs",
        "a guard that is killed while one of its thaws hangs is replaced: the next daemon that dies is minded",
        guard_killed_while_it_hangs,
    ),
    case(
        "deadman/newcomer-beside-a-hung-freeze",
        "what is mounted while one freeze hangs is frozen, too, and all the others are",
        newcomer_beside_a_hung_freeze,
    )
    .asking_our_module(),
    case(
        "deadman/dead-while-frozen",
        "a disk that dies while it is frozen costs no backup but its own, neither this one nor the next, also \
         of the next daemon",
        |guest| dead_while_frozen(guest, Module::Ours),
    )
    .asking_our_module(),
    case(
        "deadman/dead-while-frozen-stock-module",
        "the same with the stock hv_utils and FITHAW",
        |guest| dead_while_frozen(guest, Module::Stock),
    )
    .comparing(),
    rounds_of(
        6,
        "deadman/daemon-killed-in-a-hung-freeze",
        "SIGKILL at random moments while one disk hangs in its freeze: FREEZE fails, the rest goes on at once, \
         and that one when it comes back",
        daemon_killed_in_a_hung_freeze,
    )
    .asking_our_module(),
    case(
        "deadman/both-killed-in-a-hung-freeze",
        "daemon and guard killed inside a FIFREEZE that hangs: all is thawed and let go, the rest at once",
        |guest| both_killed_in_a_hung_freeze(guest, false),
    ),
    case(
        "deadman/both-killed-in-a-freeze-that-hangs-for-long",
        "the same with a disk that comes back when nobody waits for its thaw any more",
        |guest| both_killed_in_a_hung_freeze(guest, true),
    )
    .long(),
    case(
        "deadman/killed-beside-a-hung-sync",
        "a daemon killed while its sync of a vfat hangs: the rest goes on, the next daemon serves",
        killed_beside_a_hung_sync,
    ),
    case(
        "deadman/hung-sync",
        "a sync of an ext4 that hangs: without that disk the next backup is good, and so is that of the \
         next daemon",
        hung_sync,
    ),
    disks::case(
        "deadman/hung-below-md",
        "one of two disks that hangs below an md, which itself may have nothing in hand, costs no backup but its own",
        hung_below_md,
    ),
    case(
        "deadman/rehearsal-stopped-beside-a-hang",
        "SIGTERM ends a rehearsal whose write-back or freeze hangs: at once for all but that one",
        rehearsal_stopped_beside_a_hang,
    ),
    case(
        "deadman/rehearsal-let-go-beside-a-hang",
        "whoever has asked the daemon for a rehearsal is killed while a freeze hangs: all but that one goes on at once; \
         with ours the next FREEZE is good without it, and once its disk is back all is good",
        rehearsal_let_go_beside_a_hang,
    ),
    case(
        "deadman/hung-below-fuse",
        "a disk that hangs in a sync, mounted where root may not walk, costs no backup but its own",
        hung_below_fuse,
    ),
    case(
        "deadman/image-on-dead-fuse",
        "an image whose file is on FUSE costs no backup but its own when the server is stopped",
        |guest| image_on_dead_fuse(guest, Module::Ours),
    ),
    case(
        "deadman/image-on-dead-fuse-stock-module",
        "the same with the stock hv_utils; and daemon and guard die while all is frozen: the rest is thawed at once",
        |guest| image_on_dead_fuse(guest, Module::Stock),
    ),
    case(
        "deadman/below-dead-layers",
        "what only an overlay leads to is backed up, though the server of one of its layers is stopped",
        below_dead_layers,
    ),
    case(
        "deadman/hung-look-stock-module",
        "a look after what is frozen that hangs behind another's thaw holds up no thaw but its own",
        hung_look,
    ),
    case(
        "deadman/unmounted-on-a-hung-disk",
        "what was unmounted while frozen, and hangs when it is closed, holds up no answer",
        unmounted_on_a_hung_disk,
    ),
    case(
        "deadman/unmount-that-hangs",
        "a vfat whose unmount hangs on its disk is left out by name, and holds up no backup for long",
        unmount_that_hangs,
    )
    .long(),
    case(
        "deadman/unmounts-that-hang",
        "four ext4 whose unmounts hang on one disk are waited for together: one give_up, and then none",
        unmounts_that_hang,
    ),
    case(
        "deadman/killed-beside-an-unmount-that-hangs",
        "the daemon is killed with all frozen while an ext4 is being unmounted whose disk hangs: thawed at once, \
         and the next daemon serves",
        killed_beside_an_unmount_that_hangs,
    )
    .asking_our_module(),
    Case {
        per_round: Duration::from_secs(6),
        ..case(
            "deadman/hung-folder",
            "a btrfs or xfs whose folder cannot even be opened, as its disk hangs, is left out after give_up, and at \
             once the next time; strict fails by name",
            hung_folder,
        )
    }
    .long(),
    case(
        "deadman/hung-open",
        "what cannot be opened because a security agent holds that up costs no backup but its own",
        hung_open,
    ),
    case(
        "deadman/open-behind-the-freeze",
        "a security agent that logs to a frozen disk cannot hold up the thaw",
        open_behind_the_freeze,
    )
    .comparing(),
];

/// One file system on a disk that always works and one on a disk that can hang, with a writer on
/// the first.
fn make_two(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    make_hung(guest)?;
    Ok(guest.writer_start("/mnt/a/w")?)
}

/// FIFREEZE of `<linux/fs.h>`.
const FIFREEZE: u32 = 0xc004_5877;
/// FITHAW of the same.
const FITHAW: u32 = 0xc004_5878;

/// How many threads of `process` are inside a freeze, by whichever ioctl. A thread that sleeps in the
/// kernel shows its system call there: number and arguments (proc(5)); 16 is ioctl(2).
pub(super) fn in_freeze(guest: &Guest, process: &Process) -> Result<usize> {
    let calls = guest.try_sh(&format!("cat /proc/{}/task/*/syscall", process.pid))?;
    let numbers = [FIFREEZE, IOC_FREEZE].map(|it| format!("{it:#x}"));
    let freezes = calls.out.lines().filter(|line| {
        let mut words = line.split(' ');
        let number = words.next() == Some("16");
        number
            && words
                .nth(1)
                .is_some_and(|it| numbers.iter().any(|known| known == it))
    });
    Ok(freezes.count())
}

/// Sends FREEZE while the disk hangs, and waits until it hangs in its freeze. The other file system,
/// which may have been frozen before, goes on then.
fn freeze_that_hangs(guest: &Guest, daemon: &Process) -> Result<Tx> {
    guest.sh(&format!("sync && {}", hang_writes("hung")))?;
    let tx = guest.vss().send_freeze(&[])?;
    guest.wait_until("one hangs, and the other goes on", STEP, || {
        Ok(stuck_writers(guest)?.is_empty() && in_freeze(guest, daemon)? == 1)
    })?;
    Ok(tx)
}

/// [`RELEASED`] from now on the file system at `path` must not be frozen.
fn thawed_in_time(guest: &Guest, path: &str) -> Result<()> {
    wait_out(guest, guest.host().patience(RELEASED))?;
    guest.not_frozen("when all should be thawed", &[path])
}

/// The next backup is good, once the daemon has said that the last one is over. Whether that called
/// the freeze off, or heard from the freeze itself that the module had, is a race.
fn good_backup_after(guest: &Guest, daemon: &Process) -> Result<()> {
    guest.wait_until("the failed freeze is over", STEP, || {
        Ok(guest.output(daemon)?.contains("nothing is left frozen"))
    })?;
    good_backup(guest).context("the next backup").map(drop)
}

/// How many threads of `process` are inside a sync, syncfs(2), which is 306.
fn in_sync(guest: &Guest, process: &Process) -> Result<usize> {
    let calls = guest.try_sh(&format!("cat /proc/{}/task/*/syscall", process.pid))?;
    let syncs = calls.out.lines().filter(|it| it.starts_with("306 "));
    Ok(syncs.count())
}

/// What `give_up = 2` takes.
const GIVE_UP: Duration = Duration::from_secs(2);

/// Whether this is how long [`GIVE_UP`] takes, and no longer than `limit` beside it: the clocks of host and
/// guest may differ a little.
fn is_given_up(waited: Duration, limit: Duration) -> bool {
    (GIVE_UP - Duration::from_millis(100)..GIVE_UP + limit).contains(&waited)
}

fn hung_device(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let hang = || -> Result<()> {
        make_dirty(guest, "/mnt/hung")?;
        guest.sh(HANG).map(drop)
    };
    let vss = guest.vss();
    let limit = guest.host().patience(Duration::from_secs(1));
    // A freeze that waits for the other would hold it up for as long as that is waited for.
    let short = held_up(guest, GIVE_UP / 2);
    let (mut ours, mut given_up) = (Duration::ZERO, Duration::ZERO);
    for (config, expected) in [
        ("give_up = 2", status::OK),
        ("give_up = 2\nstrict = true", status::FAIL),
    ] {
        for &module in guest.modules() {
            load(guest, module, &[])?;
            let daemon = guest.start_daemon_with(config)?;
            wait_for_daemon(guest)?;
            hang()?;
            // It is found out once, and then it is known.
            for known in [false, true] {
                let sent = guest.clock()?;
                let reply = vss.freeze(&[], STEP)?;
                let stood = longest_stall(guest, sent)?;
                answered("FREEZE with a hung disk", &reply, expected)?;
                ensure!(
                    stood < short,
                    "the other file system was held up for {stood:?}"
                );
                ours = ours.max(stood);
                let waited = reply.latency;
                let is_right = match known {
                    true => waited < limit,
                    false => is_given_up(waited, limit),
                };
                ensure!(
                    is_right,
                    "FREEZE took {waited:?} with a disk that is known to hang: {known}"
                );
                given_up = given_up.max(waited);
                if expected == status::OK {
                    answered("THAW", &vss.thaw(STEP)?, expected)?;
                }
                released(guest, "after it", guest.clock()?, RELEASED)?;
                guest.wait_until("it is named", STEP, || {
                    let said = guest.output(&daemon)?;
                    Ok(said.contains("/mnt/hung") && said.contains(" hangs: "))
                })?;
            }
            guest.sh(UNHANG)?;
            guest.wait_until("its sync is over", STEP, || {
                Ok(in_sync(guest, &daemon)? == 0)
            })?;
            good_backup(guest).context("with the disk back")?;
            guest.wait_until("all three are frozen again", STEP, || {
                Ok(guest.output(&daemon)?.contains("3 frozen"))
            })?;
            stop(guest, module, &daemon)?;
        }
    }

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    hang()?;
    let sent = guest.clock()?;
    let tx = vss.send_freeze(&[])?;
    let early = reply_within(guest, tx, Duration::from_secs(6))?;
    let peer = longest_stall(guest, sent)?;
    let words = match &early {
        Some(reply) => format!("FREEZE {}", status_name(reply.status())),
        None => "FREEZE not answered after 6 s".to_owned(),
    };
    guest.sh(UNHANG)?;
    let reply = early.map_or_else(|| vss.wait(tx, STEP), Ok)?;
    answered(
        "FREEZE with the peer after the disk came back",
        &reply,
        status::OK,
    )?;
    answered("THAW with the peer", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, Module::Stock, &daemon)?;
    let seconds = |stall: Duration| format!("stands still for {:.1} s", stall.as_secs_f64());
    guest.compare(
        "one disk hangs for 6 s (give_up set to 2 s for ours), a writer on another disk",
        &format!(
            "FREEZE {} after {:.1} s without that disk, which is named; {}",
            status_name(status::OK),
            given_up.as_secs_f64(),
            seconds(ours)
        ),
        &format!("{words}, {}", seconds(peer)),
    );
    Ok(())
}

/// The longest time that a writer stood still since then, or has until now.
pub(super) fn longest_stall(guest: &Guest, since: u64) -> Result<Duration> {
    let seen = guest.stalls(since)?;
    let stood = seen.stalls.iter();
    let stood = stood.map(|it| it.ended_us.unwrap_or(seen.now_us) - it.began_us);
    Ok(Duration::from_micros(stood.max().unwrap_or(0)))
}

fn hung_freeze(guest: &Guest, module: Module) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    load(guest, module, &[])?;
    let (daemon, _) = guest.start_daemon_within("deadline", Duration::from_secs(3))?;
    wait_for_daemon(guest)?;
    let sent = guest.clock()?;
    let tx = freeze_that_hangs(guest, &daemon)?;
    answered("FREEZE at the deadline", &vss.wait(tx, STEP)?, status::FAIL)?;
    released(guest, "at the deadline", guest.clock()?, RELEASED)?;
    for stall in &guest.stalls(sent)?.stalls {
        let stood = stall.ended_us.map(|ended| ended - stall.began_us);
        let limit = guest.host().patience(RELEASED).as_micros() as u64;
        ensure!(
            stood.is_some_and(|stood| stood < limit),
            "{} stood still for {stood:?} us because of another",
            stall.path
        );
    }
    // It hangs still: in our module's hands, or in those of the daemon.
    match module {
        Module::Ours => {
            let states: Vec<_> = guest.held()?.into_iter().map(|it| it.1).collect();
            equal("what is held", states, vec!["called-off".to_owned()])?;
        }
        Module::Stock => {
            equal("threads in a freeze", in_freeze(guest, &daemon)?, 1)?;
            answered("FREEZE meanwhile", &vss.freeze(&[], STEP)?, status::FAIL)?;
            says_that_it_hangs(guest)?;
            frozen_by_another_stays_frozen(guest)?;
        }
    }

    // The hung freeze takes effect when its disk is back, and nobody wants it any more.
    guest.sh(UNHANG)?;
    thawed_in_time(guest, "/mnt/hung")?;
    good_backup_after(guest, &daemon)
}

/// While one hangs in its freeze, somebody else freezes another: whoever minds ours must not thaw that.
fn frozen_by_another_stays_frozen(guest: &Guest) -> Result<()> {
    guest.sh("fsfreeze -f /mnt/a")?;
    wait_out(guest, guest.host().patience(RELEASED))?;
    let writers = guest.writers()?;
    let theirs = writers.iter().find(|it| it.path.starts_with("/mnt/a/"));
    let stands = theirs.context("there is a writer")?.in_write_us;
    guest.sh("fsfreeze -u /mnt/a")?;
    ensure!(
        stands > RELEASED.as_micros() as u64 / 2,
        "what another had frozen goes on: its writer has been in its write for {stands} us"
    );
    Ok(())
}

fn rehearsal_stopped_beside_a_hang(guest: &Guest) -> Result<()> {
    const CONFIG: &str = "/run/rehearsal.toml";
    make_two(guest)?;
    // Nothing but the signal ends what hangs, however slow the guest is.
    guest.sh(&format!("echo 'give_up = 600' >{CONFIG}"))?;
    let rehearse = [
        "/payload/hv_vss_daemon",
        "-c",
        CONFIG,
        "freeze",
        "--for",
        "50s",
    ];
    let limit = guest.host().patience(RELEASED);
    // Before anything is frozen, and when the other one may be.
    for is_synced in [true, false] {
        match is_synced {
            true => make_dirty(guest, "/mnt/hung")?,
            false => guest.sh("sync").map(drop)?,
        }
        guest.sh(&hang_writes("hung"))?;
        let rehearsal = guest.spawn(&rehearse)?;
        let is_at = if is_synced { in_sync } else { in_freeze };
        guest.wait_until("it hangs", STEP, || Ok(is_at(guest, &rehearsal)? == 1))?;
        let at = guest.signal_all(&[rehearsal.pid], 15)?;
        if is_synced {
            guest.wait_until("it is called off", STEP, || {
                Ok(guest.output(&rehearsal)?.contains("called off"))
            })?;
            let took = Duration::from_micros(guest.clock()? - at);
            ensure!(took < limit, "it was called off {took:?} after the signal");
        } else {
            released(guest, "the signal", at, RELEASED)?;
        }
        thawed_in_time(guest, "/mnt/a")?;
        guest.sh(UNHANG)?;
        let ended = guest.wait(&rehearsal, STEP)?;
        let said = guest.output(&rehearsal)?;
        ensure!(
            ended.status == Some(4) && said.contains("the freeze was called off"),
            "it should end called off, synced {is_synced}, it ended with {ended:?}:\n{said}"
        );
        if is_synced {
            let stood = longest_stall(guest, at)?;
            ensure!(
                stood < held_up(guest, RELEASED),
                "nothing was to be frozen any more, and a writer stood still for {stood:?}"
            );
        }
        thawed_in_time(guest, "/mnt/hung")?;
    }
    Ok(())
}

fn rehearsal_let_go_beside_a_hang(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    for &module in guest.modules() {
        load(guest, module, &[])?;
        // Nothing but the end of whoever asked ends what hangs, however slow the guest is.
        let daemon = guest.start_daemon_with("give_up = 600")?;
        wait_for_daemon(guest)?;
        guest.sh("sync")?;
        guest.sh(&hang_writes("hung"))?;
        let rehearsal = guest.spawn(&["/payload/hv_vss_daemon", "freeze", "--for", "50s"])?;
        guest.wait_until("it hangs", STEP, || Ok(in_freeze(guest, &daemon)? == 1))?;
        let at = guest.signal_all(&[rehearsal.pid], 9)?;
        released(guest, "whoever asked is killed", at, RELEASED)?;
        guest.wait(&rehearsal, STEP)?;
        thawed_in_time(guest, "/mnt/a")?;
        // Nobody can call off the stock one's.
        let expected = match module {
            Module::Ours => status::OK,
            Module::Stock => status::FAIL,
        };
        answered("FREEZE beside it", &vss.freeze(&[], STEP)?, expected)?;
        if module == Module::Ours {
            answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        }
        guest.sh(UNHANG)?;
        thawed_in_time(guest, "/mnt/hung")?;
        good_backup_after(guest, &daemon)?;
        stop(guest, module, &daemon)?;
    }
    remove_hung(guest)
}

fn hung_thaw(guest: &Guest, module: Module) -> Result<()> {
    make_two(guest)?;
    // It is frozen before what it lies on, and so thawed after all of that wave.
    guest.sh(
        "modprobe loop; mkdir -p /mnt/inner && truncate -s 40M /mnt/a/image &&
              mkfs.ext4 -q -F /mnt/a/image && mount -o loop /mnt/a/image /mnt/inner",
    )?;
    guest.writer_start("/mnt/inner/w")?;
    hook(guest, "10-a", "")?;
    let vss = guest.vss();
    let daemon = start(guest, module, Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    // To thaw ext4 writes its superblock.
    guest.sh(HANG)?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    released(guest, "one hangs in its thaw", guest.clock()?, RELEASED * 2)?;
    // Nobody can tell yet whether that will be a good backup.
    let expected = ["10-a freeze ", "10-a thaw unknown"];
    noted(guest, "a hook beside what hangs", &expected)?;
    ensure!(
        vss.try_reply(tx).is_none(),
        "THAW should wait for the one that hangs"
    );
    guest.sh(UNHANG)?;
    answered("THAW", &vss.wait(tx, STEP)?, status::OK)?;
    good_backup(guest)?;
    let expected = ["10-a freeze ", "10-a thaw good"];
    noted(guest, "a hook of the next backup", &expected)?;
    stop(guest, module, &daemon)?;
    hooks::end(guest)
}

/// Its freeze would hang, and nobody could call that off.
fn dead_before_freeze(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    let limit = guest.host().patience(RELEASED);
    for (config, expected) in [
        ("give_up = 2", status::OK),
        ("give_up = 2\nstrict = true", status::FAIL),
    ] {
        load(guest, Module::Stock, &[])?;
        let daemon = guest.start_daemon_with(config)?;
        wait_for_daemon(guest)?;
        good_backup(guest).context("before its disk is dead")?;
        guest.sh(&format!("sync && {HANG}"))?;
        // It is found out once, and then it is known.
        for known in [false, true] {
            let sent = guest.clock()?;
            let freeze = vss.freeze(&[], STEP)?;
            answered("FREEZE with a dead disk", &freeze, expected)?;
            let stood = longest_stall(guest, sent)?;
            let short = held_up(guest, GIVE_UP / 2);
            ensure!(stood < short, "a neighbour was held up for {stood:?}");
            let waited = freeze.latency;
            let is_right = match known {
                true => waited < limit,
                false => is_given_up(waited, limit),
            };
            ensure!(
                is_right,
                "FREEZE took {waited:?} with a disk that is known to be dead: {known}"
            );
            if expected == status::OK {
                answered("THAW", &vss.thaw(STEP)?, expected)?;
            }
            equal("threads in a freeze", in_freeze(guest, &daemon)?, 0)?;
        }
        guest.wait_until("it is named each time", STEP, || {
            let said = guest.output(&daemon)?;
            let words = "/mnt/hung (ext4, 254:0) hangs: 254:0 does not answer";
            Ok(said.matches(words).count() >= 2)
        })?;
        guest.sh(UNHANG)?;
        guest.wait_until("it is frozen again", STEP, || {
            good_backup(guest).context("with its disk back")?;
            let said = guest.output(&daemon)?;
            let frozen = said.matches("/mnt/hung (ext4, 254:0) frozen").count();
            Ok(frozen > 1)
        })?;
        stop(guest, Module::Stock, &daemon)?;
    }
    Ok(())
}

fn dead_while_frozen(guest: &Guest, module: Module) -> Result<()> {
    make_two(guest)?;
    guest.sh("mkdir -p /mnt/b && mkfs.ext4 -q -F /dev/ram6 && mount /dev/ram6 /mnt/b")?;
    let vss = guest.vss();
    load(guest, module, &[])?;
    let config = "give_up = 2";
    let mut daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(HANG)?;
    let sent = guest.clock()?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    released(guest, "beside one that has died", sent, RELEASED)?;
    // All of it stood still until then, which the daemon takes from what its disks count, unless the module knows.
    // Not of every kernel can be told that a mapped device counts, when that one is suspended.
    let counts = guest.read("/sys/class/block/dm-0/queue/iostats")?;
    let expected = match module == Module::Ours || counts.trim() != "0" {
        true => status::OK,
        false => status::FAIL,
    };
    let thaw = vss.wait(tx, STEP)?;
    answered("THAW without it", &thaw, expected)?;
    let given_up = thaw.latency;
    let limit = guest.host().patience(RELEASED);
    ensure!(
        is_given_up(given_up, limit),
        "THAW took {given_up:?} beside one that has died"
    );
    guest.wait_until("it is named", STEP, || {
        Ok(guest.output(&daemon)?.contains("/mnt/hung") && said_thaw_hangs(guest, &daemon)?)
    })?;
    guest.wait_until("nobody keeps another one open for it", STEP, || {
        Ok(guest.try_sh("umount /mnt/b")?.status == Some(0))
    })?;
    equal("what is given up", without(guest)?.len(), 1)?;
    for next in [false, true] {
        if next {
            // Of what another daemon cannot know only the module can tell.
            if module == Module::Stock {
                break;
            }
            guest.signal(&daemon, 15)?;
            guest.wait(&daemon, STEP)?;
            daemon = guest.start_daemon_with(config)?;
            wait_for_daemon(guest)?;
        }
        for _ in 0..2 {
            let sent = guest.clock()?;
            good_backup(guest)
                .with_context(|| format!("without it, of the next daemon: {next}"))?;
            released(guest, "without it", sent, RELEASED)?;
        }
        guest.wait_until("it is left out by name", STEP, || {
            let said = guest.output(&daemon)?;
            Ok(said.contains(" hangs: an earlier freeze or thaw of it has not come back"))
        })?;
        guest.wait_until("status says why", STEP, || {
            let status = guest.try_sh("/payload/hv_vss_daemon status")?.out;
            let mut lines = status.lines().filter(|it| it.starts_with("left out"));
            Ok(lines.any(|it| it.contains("/mnt/hung (ext4, ") && it.contains(HANGS)))
        })?;
        let named = without(guest)?;
        let is_named = |it: &String| it.contains("/mnt/hung (ext4, ");
        ensure!(
            named.len() == 1 && named.iter().all(is_named),
            "status should name what is given up, and nothing else: {named:?}"
        );
        let check = asked(guest, "check", 7)?;
        let mut lines = check.lines().filter(|it| it.starts_with("warning"));
        ensure!(
            lines.any(|it| it.contains("/mnt/hung (ext4, ") && it.contains("backups are without")),
            "check should warn of it:\n{check}"
        );
    }
    guest.sh(UNHANG)?;
    guest.not_frozen("with its disk back", &["/mnt/hung"])?;
    guest.wait_until("it is frozen again", STEP, || {
        good_backup(guest).context("with its disk back")?;
        Ok(guest.output(&daemon)?.contains("2 frozen"))
    })?;
    equal("what is given up", without(guest)?.len(), 0)?;
    stop(guest, module, &daemon)?;
    if module == Module::Ours {
        return Ok(());
    }

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(HANG)?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    let thaw = match reply_within(guest, tx, Duration::from_secs(6))? {
        Some(reply) => format!("THAW {}", status_name(reply.status())),
        None => "THAW not answered after 6 s".to_owned(),
    };
    guest.sh(UNHANG)?;
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "a disk dies while it is frozen (give_up set to 2 s for ours)",
        &format!(
            "THAW {} after {:.1} s, the disk is named, and the next backups are good without it",
            status_name(expected),
            given_up.as_secs_f64()
        ),
        &thaw,
    );
    Ok(())
}

/// What `status` says that backups are without, a line each.
fn without(guest: &Guest) -> Result<Vec<String>> {
    let status = guest.try_sh("/payload/hv_vss_daemon status")?.out;
    let lines = status.lines().filter(|it| it.starts_with("given up"));
    Ok(lines.map(str::to_owned).collect())
}

/// Why a backup is without one that hangs in its thaw.
const HANGS: &str = "): hangs: an earlier freeze or thaw of it has not come back";

/// Somebody syncs the disk that has died while it was frozen, so that the next look whether it still is hangs;
/// THAW is answered, and then the daemon dies.
fn killed_behind_a_hung_look(guest: &Guest) -> Result<()> {
    // Only a disk with a cache is told to write that.
    load_driver(guest)?;
    let disk = Attached::new(guest, 0, 0, 64, Image::default())?;
    make_hung_disk(guest, &disk.node(guest)?, 64)?;
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.ext4 -q -F /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung && sync",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(HANG)?;
    let sync = guest.spawn(&["sync"])?;
    guest.wait_until("the look hangs", STEP, || {
        Ok(in_freeze(guest, &daemon)? == 1)
    })?;
    let sent = guest.clock()?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    released(guest, "beside one that has died", sent, RELEASED)?;
    answered("THAW without it", &vss.wait(tx, STEP)?, status::OK)?;
    guest.wait_until("it is over", STEP, || said_thaw_hangs(guest, &daemon))?;
    guest.signal_all(&all_of_ours(guest, &daemon)?, 9)?;
    guest.sh(UNHANG)?;
    guest.wait(&sync, STEP)?;
    guest.wait(&daemon, STEP)?;
    guest.not_frozen("with its disk back", &["/mnt/hung", "/mnt/a"])?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    good_backup(guest).context("the next backup")?;
    stop(guest, Module::Stock, &daemon)?;
    remove_hung(guest)?;
    disk.detach(guest)
}

/// Killed as it is, its end of the socket stays open as long as its thaw hangs.
fn guard_killed_while_it_hangs(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    let daemon = guest.start_daemon_with("give_up = 2\ndeadline = 15")?;
    wait_for_daemon(guest)?;
    let guard = super::deadman::guard_of(guest, &daemon)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(HANG)?;
    guest.wait_until("the guard thaws, and hangs", STEP, || {
        let thaw = format!("grep -qs ' {FITHAW:#x} ' /proc/{guard}/task/*/syscall");
        Ok(guest.try_sh(&thaw)?.status == Some(0))
    })?;
    thawed_in_time(guest, "/mnt/a")?;
    answered("THAW, too late", &vss.thaw(STEP)?, status::FAIL)?;
    guest.wait_until("it is over", STEP, || said_thaw_hangs(guest, &daemon))?;
    guest.signal_all(&[guard], 9)?;
    guest.wait_until("it is killed", STEP, || {
        Ok(guest.read(&format!("/proc/{guard}/stat"))?.contains(") Z "))
    })?;
    let freeze = vss.freeze(&[], STEP)?;
    answered("FREEZE without it", &freeze, status::OK)?;
    let sent = guest.clock()?;
    guest.signal(&daemon, 9)?;
    released(guest, "by the guard that took its place", sent, RELEASED)?;
    guest.sh(UNHANG)?;
    guest.wait(&daemon, STEP)?;
    guest.not_frozen("with its disk back", &["/mnt/hung", "/mnt/a"])?;
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    answered("THAW, later", &vss.thaw(STEP)?, status::FAIL)?;
    good_backup(guest).context("the next backup")?;
    stop(guest, Module::Stock, &daemon)
}

/// It is begun anew for the newcomer, while what the module has of the first attempt still hangs.
fn newcomer_beside_a_hung_freeze(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    guest.sh("mkdir -p /mnt/new && mkfs.ext4 -q -F /dev/ram6")?;
    load(guest, Module::Ours, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    let freeze = freeze_that_hangs(guest, &daemon)?;
    guest.sh("mount /dev/ram6 /mnt/new")?;
    let reply = guest.vss().wait(freeze, STEP * 2)?;
    answered("FREEZE without the one that hangs", &reply, status::OK)?;
    let held = guest.held()?;
    for device in ["1:0", "1:1", "1:6"] {
        let is_held = |(it, state): &(String, String)| it == device && state == "held";
        ensure!(held.iter().any(is_held), "{device} is not held: {held:?}");
    }
    answered("THAW", &guest.vss().thaw(STEP * 2)?, status::OK)?;
    guest.sh(UNHANG)?;
    guest.wait_until("it comes back", STEP, || Ok(guest.held()?.is_empty()))?;
    good_backup(guest).context("with all of them").map(drop)
}

/// Whether it has said that a thaw hangs.
fn said_thaw_hangs(guest: &Guest, daemon: &Process) -> Result<bool> {
    Ok(guest.output(daemon)?.contains(" hangs in its thaw"))
}

fn daemon_killed_in_a_hung_freeze(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    load(guest, Module::Ours, &["grace_ms=300"])?;
    let mut daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let span = good_backup(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut tally = Tally::default();
    for round in 1..=rounds_or(FEW) {
        // From before the request is read to long after the others have been thawed for the one that hangs.
        let delay = span.mul_f64(random.f64() * 4.0);
        let what = format!("round {round}, killed {delay:?} after FREEZE was sent");
        guest.sh(&format!("sync && {HANG}"))?;
        let tx = guest.vss().send_freeze(&[])?;
        std::thread::sleep(delay);
        let at = guest.signal_all(&all_of_ours(guest, &daemon)?, 9)?;
        let took = released(guest, &what, at, RELEASED)?;
        answered(&what, &guest.vss().wait(tx, STEP)?, status::FAIL)?;
        guest.wait(&daemon, STEP)?;
        guest.sh(UNHANG)?;
        guest.wait_until("it comes back", STEP, || Ok(guest.held()?.is_empty()))?;
        guest.not_frozen(&what, &["/mnt/hung"])?;
        daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        good_backup(guest).with_context(|| format!("{what}: the next backup"))?;
        tally.freeze_failed(took);
    }
    tally.print("the death");
    Ok(())
}

fn killed_beside_a_hung_sync(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 64)?;
    guest.sh(
        "modprobe -a vfat nls_cp437 nls_ascii; mkdir -p /mnt/a
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.vfat /dev/mapper/hung >/dev/null && mount -t vfat /dev/mapper/hung /mnt/hung && sync",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    load(guest, guest.module(), &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(1))?;
    wait_for_daemon(guest)?;
    // From then on it knows that this one cannot freeze.
    good_backup(guest)?;
    guest.sh(&format!(
        "dd if=/dev/zero of=/mnt/hung/dirty bs=64k count=4 2>/dev/null; {HANG}"
    ))?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.signal(&daemon, 9)?;
    released(guest, "a sync hangs", guest.clock()?, RELEASED)?;
    // What is left of it has nothing open.
    let next = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    ensure!(
        !guest.has_ended(&daemon)?,
        "the sync should hang until its disk is back"
    );
    guest.sh(UNHANG)?;
    guest.wait(&daemon, STEP)?;
    if guest.module() == Module::Stock {
        // It looks after the other now and then, and freezes nothing before.
        guest.wait_until("the next daemon has seen the end of it", STEP, || {
            let said = guest.output(&next)?;
            Ok(said.contains("the freeze of another process is undone"))
        })?;
    }
    good_backup(guest)?;
    stop(guest, guest.module(), &next)
}

fn hung_sync(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 64)?;
    guest.sh("mkdir -p /etc/hv_vss /mnt/a
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.ext4 -q -F /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung && sync")?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    let module = guest.module();
    let parameters: &[&str] = match module {
        Module::Ours => &["freeze_timeout_ms=5000"],
        Module::Stock => &[],
    };
    load(guest, module, parameters)?;
    let daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    make_dirty(guest, "/mnt/hung")?;
    guest.sh(HANG)?;
    let tx = vss.send_freeze(&[])?;
    // The stock one's time is over after minutes.
    let words = if module == Module::Stock {
        guest.wait_until("it hangs in the sync", STEP, || {
            Ok(in_sync(guest, &daemon)? == 1)
        })?;
        guest.sh("/payload/hv_vss_daemon thaw")?;
        "it is called off: "
    } else {
        "called off: writing back"
    };
    answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
    guest.wait_until("the log says that it is called off", STEP, || {
        Ok(guest.output(&daemon)?.contains(words))
    })?;
    guest.sh(
        "echo 'exclude.paths = [\"/mnt/hung\"]' >/etc/hv_vss/daemon.toml
         /payload/hv_vss_daemon reload",
    )?;
    good_backup(guest).context("without the disk that hangs")?;
    guest.signal(&daemon, 9)?;
    // What is left of it has nothing open.
    let next = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    ensure!(
        !guest.has_ended(&daemon)?,
        "the sync should hang until its disk is back"
    );
    good_backup(guest).context("of the next daemon")?;
    guest.sh(UNHANG)?;
    guest.wait(&daemon, STEP)?;
    stop(guest, module, &next)
}

/// What a sync of a clean ext4 waits for there is a flush of both halves of a mirror.
fn hung_below_md(guest: &Guest) -> Result<()> {
    let attached = |lun| Attached::new(guest, 0, lun, 80, Image::default());
    let disks = [attached(0)?, attached(1)?];
    load_driver(guest)?;
    let nodes = [disks[0].node(guest)?, disks[1].node(guest)?];
    let [first, second] = &nodes;
    let names = [first, second].map(|it| it.trim_start_matches("/dev/"));
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    let array = raid(guest, names)?;
    // Nor does it write by itself, which would be in hand.
    guest.sh("mount -o remount,noinit_itable /mnt/bad && sync")?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("give_up = 2")?;
    wait_for_daemon(guest)?;
    good_backup(guest).context("before its disk hangs")?;
    disks[0].disk.set_hung(true);
    let limit = guest.host().patience(Duration::from_secs(1));
    for is_known in [false, true] {
        // Another is worth a sync.
        make_dirty(guest, "/mnt/a")?;
        let reply = vss.freeze(&[], STEP)?;
        answered("FREEZE with a hung disk", &reply, status::OK)?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        let waited = reply.latency;
        // Three times as long where nothing shows that anything is in hand.
        let is_right = match is_known {
            true => waited < limit,
            false => waited < Duration::from_secs(2) * 3 + limit,
        };
        ensure!(
            is_right,
            "FREEZE took {waited:?} with a disk that is known to hang: {is_known}"
        );
    }
    let log = logged_all(guest, &daemon, 3)?;
    let named = log
        .lines()
        .filter(|it| it.contains("/mnt/bad (ext4") && it.contains(" hangs: "));
    equal("how often it is named", named.count(), 2)?;
    disks[0].disk.set_hung(false);
    guest.wait_until("its sync is over", STEP, || {
        Ok(in_sync(guest, &daemon)? == 0)
    })?;
    good_backup(guest).context("with the disk back")?;
    stop(guest, guest.module(), &daemon)?;
    no_raid(guest, &array)?;
    Attached::detach_all(guest, disks)
}

/// Nobody is let to its superblock while a sync of it hangs, and no path leads there.
fn hung_below_fuse(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 64)?;
    guest.sh(
        "mkdir -p /mnt/a /mnt/fuse && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.ext4 -q -F /dev/mapper/hung",
    )?;
    let serve = ["fuse", "/mnt/fuse", "1000", "/dev/mapper/hung"];
    let server = guest.spawn(&[&["/payload/lab-agent"], &serve[..]].concat())?;
    guest.wait_until("a disk is mounted below FUSE", STEP, || {
        Ok(guest.output(&server)?.contains("mounted"))
    })?;
    guest.writer_start("/mnt/a/w")?;
    let module = guest.module();
    load(guest, module, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(1))?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    let there = format!("/proc/{}/cwd", server.pid);
    guest.sh(&format!(
        "dd if=/dev/zero of={there}/dirty bs=64k count=4 2>/dev/null; {HANG}"
    ))?;
    let back_up = || -> Result<()> {
        for number in 1..=3 {
            good_backup(guest).with_context(|| format!("backup {number} beside it"))?;
        }
        Ok(())
    };
    let seen = back_up();
    guest.sh(UNHANG)?;
    seen?;
    guest.wait_until("each backup names it", STEP, || {
        let log = guest.output(&daemon)?;
        let named = log
            .lines()
            .filter(|it| it.contains("/disk") && it.contains("left out"));
        Ok(named.count() >= 3)
    })?;
    guest.wait_until("nothing waits for its disk", STEP, || {
        Ok(in_sync(guest, &daemon)? == 0)
    })?;
    good_backup(guest)?;
    stop(guest, module, &daemon)?;
    guest.signal(&server, 9)?;
    guest.wait(&server, STEP)?;
    guest
        .sh("umount -l /mnt/fuse && dmsetup remove --retry hung")
        .map(drop)
}

/// A FUSE file system that everybody may look into, with a file in it.
fn serve_image(guest: &Guest) -> Result<Process> {
    guest.sh("mkdir -p /mnt/fuse && truncate -s 32M /tmp/image && mkfs.ext4 -q -F /tmp/image")?;
    let server = guest.spawn(&["/payload/lab-agent", "fuse-file", "/mnt/fuse", "/tmp/image"])?;
    guest.wait_until("the image is served", STEP, || {
        Ok(guest.output(&server)?.contains("mounted"))
    })?;
    Ok(server)
}

const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

/// What the kernel says of a loop device it asks the file system that holds its file.
fn image_on_dead_fuse(guest: &Guest, module: Module) -> Result<()> {
    guest.sh(
        "modprobe loop; mkdir -p /mnt/a /mnt/loop && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a",
    )?;
    let server = serve_image(guest)?;
    let dirty = "dd if=/dev/zero of=/mnt/loop/w bs=64k count=4 conv=notrunc 2>/dev/null";
    guest.sh(&format!(
        "losetup /dev/loop0 /mnt/fuse/image && mount /dev/loop0 /mnt/loop && {dirty} && sync"
    ))?;
    guest.writer_start("/mnt/a/w")?;
    load(guest, module, &[])?;
    let (daemon, _) = guest.start_daemon_within("give_up", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    let frozen = || -> Result<usize> {
        let log = guest.output(&daemon)?;
        Ok(log.matches("/mnt/loop (ext4, 7:0) frozen").count())
    };
    guest.wait_until("the image is frozen, too", STEP, || Ok(frozen()? == 1))?;
    guest.signal(&server, SIGSTOP)?;
    // A sync of it hangs then: what hangs in its freeze only fails the first backup.
    guest.sh(dirty)?;
    let back_up = || -> Result<()> {
        for number in 1..=3 {
            good_backup(guest).with_context(|| format!("backup {number} beside it"))?;
        }
        Ok(())
    };
    let seen = back_up();
    guest.signal(&server, SIGCONT)?;
    seen?;
    let log = guest.output(&daemon)?;
    ensure!(
        log.contains("/mnt/loop (ext4, 7:0"),
        "it should be named:\n{log}"
    );
    guest.not_frozen("with the server back", &["/mnt/loop"])?;
    guest.wait_until("it is frozen again", STEP, || {
        good_backup(guest).context("with the server back")?;
        Ok(frozen()? > 1)
    })?;
    let daemon = match module {
        Module::Ours => daemon,
        Module::Stock => {
            let guard = super::deadman::guard_of(guest, &daemon)?;
            answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
            guest.signal(&server, SIGSTOP)?;
            guest.signal_all(&[daemon.pid, guard], 9)?;
            let thaw = guest.spawn(&["/payload/hv_vss_daemon", "thaw"])?;
            // It asks the dead server for a second first.
            let seen = released(guest, "both killed", guest.clock()?, RELEASED * 4);
            guest.signal(&server, SIGCONT)?;
            seen?;
            guest.wait(&thaw, STEP)?;
            guest.wait(&daemon, STEP)?;
            guest.not_frozen("with the server back", &["/mnt/a", "/mnt/loop"])?;
            let daemon = guest.start_daemon(Daemon::Ours)?;
            wait_for_daemon(guest)?;
            answered("THAW, later", &guest.vss().thaw(STEP)?, status::FAIL)?;
            good_backup(guest)?;
            daemon
        }
    };
    stop(guest, module, &daemon)?;
    guest.sh("umount /mnt/loop && losetup -d /dev/loop0")?;
    guest.signal(&server, 9)?;
    guest.wait(&server, STEP)?;
    guest.sh("umount -l /mnt/fuse").map(drop)
}

fn below_dead_layers(guest: &Guest) -> Result<()> {
    let server = serve_image(guest)?;
    guest.sh("modprobe overlay; mkdir -p /mnt/a /mnt/lower /mnt/merged
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mount -t overlay -o lowerdir=/mnt/fuse:/mnt/lower over /mnt/merged
         mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/merged/disk")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/merged/disk/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    good_backup(guest)?;
    guest.signal(&server, SIGSTOP)?;
    let back_up = || -> Result<()> {
        for number in 1..=2 {
            good_backup(guest).with_context(|| format!("backup {number} below it"))?;
        }
        Ok(())
    };
    let seen = back_up();
    guest.signal(&server, SIGCONT)?;
    seen?;
    good_backup(guest)?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount -l /mnt/merged/disk && umount -l /mnt/merged")?;
    guest.signal(&server, 9)?;
    guest.wait(&server, STEP)?;
    guest.sh("umount -l /mnt/fuse").map(drop)
}

fn hung_look(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    // Longer than a slow machine takes until the disk comes back: by then nobody asks any more what it was.
    let daemon = guest.start_daemon_with("give_up = 25")?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(HANG)?;
    // It writes to its disk, and whoever asks about that file system waits for it.
    let thaw = guest.spawn(&["fsfreeze", "-u", "/mnt/hung"])?;
    guest.wait_until("a look hangs", STEP, || {
        let mut hangs = true;
        for _ in 0..5 {
            hangs &= in_freeze(guest, &daemon)? == 1;
        }
        Ok(hangs)
    })?;
    let tx = vss.send(Op::THAW, &SHORT_BODY)?;
    released(guest, "a look hangs", guest.clock()?, RELEASED * 2)?;
    ensure!(
        vss.try_reply(tx).is_none(),
        "THAW should wait for the one that hangs"
    );
    guest.sh(UNHANG)?;
    // It was not frozen all the time.
    answered("THAW", &vss.wait(tx, STEP)?, status::FAIL)?;
    guest.wait(&thaw, STEP)?;
    thawed_in_time(guest, "/mnt/hung")?;
    good_backup(guest)?;
    stop(guest, Module::Stock, &daemon)
}

fn unmounted_on_a_hung_disk(guest: &Guest) -> Result<()> {
    // Its thaw writes nothing, and to unmount it does. The other one comes after it.
    make_hung_disk(guest, "/dev/ram4", 320)?;
    guest.sh("modprobe xfs; mkdir -p /mnt/a /mnt/other
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.xfs -q -f /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung
         mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/other && sync")?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh(&format!("umount -l /mnt/hung && {HANG}"))?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    answered("HOT_BACKUP", &vss.hot_backup(STEP)?, status::OK)?;
    let said = guest.try_sh("/payload/hv_vss_daemon status")?.out;
    ensure!(said.contains("idle"), "it should be at rest:\n{said}");
    // What hangs keeps no other one open.
    let other = guest.wait_until("another can be unmounted", STEP, || {
        Ok(guest.try_sh("umount /mnt/other")?.status == Some(0))
    });
    guest.sh(UNHANG)?;
    other?;
    guest.wait_until("it is unmounted", STEP, || {
        Ok(guest.try_sh("[ ! -e /sys/fs/xfs/dm-* ]")?.status == Some(0))
    })?;
    good_backup(guest)?;
    stop(guest, guest.module(), &daemon)
}

/// sysfs does not list it, and the kernel says nothing of it before that has ended.
fn unmount_that_hangs(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 320)?;
    guest.sh("modprobe -a vfat nls_cp437 nls_ascii; mkdir -p /mnt/a
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkfs.vfat /dev/mapper/hung >/dev/null && mount -t vfat /dev/mapper/hung /mnt/hung")?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    // Whoever has it last unmounts it.
    let script = "cd /mnt/hung && touch /run/done && exec sleep 1000";
    let holder = guest.spawn(&["sh", "-c", script])?;
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh(&format!(
        "echo 1 >/mnt/hung/f && umount -l /mnt/hung && {HANG}"
    ))?;
    guest.signal(&holder, 9)?;
    let vss = guest.vss();
    let back_up = || -> Result<()> {
        for _ in 0..2 {
            answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
            answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        }
        Ok(())
    };
    let seen = back_up();
    guest.sh(UNHANG)?;
    guest.wait(&holder, STEP)?;
    seen?;
    let log = logged_all(guest, &daemon, 2)?;
    let named = log.matches("the kernel has it locked").count();
    ensure!(
        named == 2 || !tells_superblocks(guest)?,
        "each backup should name it:\n{log}"
    );
    good_backup(guest)?;
    let list = guest.sh("/payload/hv_vss_daemon list")?;
    ensure!(!list.contains("dm-0 ("), "it is gone:\n{list}");
    stop(guest, guest.module(), &daemon)
}

fn unmounts_that_hang(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 320)?;
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a || exit 1
         for i in 1 2 3 4; do
             dmsetup create on$i --noudevsync --table \"0 65536 linear /dev/mapper/hung $((i * 65536))\" || exit 1
         done
         dmsetup mknodes
         for i in 1 2 3 4; do
             mkdir -p /mnt/on$i && mkfs.ext4 -q -F /dev/mapper/on$i || exit 1
             mount -o barrier=0 /dev/mapper/on$i /mnt/on$i || exit 1
         done",
    )?;
    guest.writer_start("/mnt/a/w")?;
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("give_up = 2")?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    // Each is unmounted by whoever has it last.
    let mut holders = Vec::new();
    for i in 1..=4 {
        let script = format!("cd /mnt/on{i} && touch /run/done && exec sleep 1000");
        holders.push(guest.spawn(&["sh", "-c", &script])?);
        guest.wait_until("it is in there", STEP, || {
            Ok(guest.try_sh("rm /run/done")?.status == Some(0))
        })?;
    }
    guest.sh(&format!(
        "for i in 1 2 3 4; do echo 1 >/mnt/on$i/f && umount -l /mnt/on$i || exit 1; done; {HANG}"
    ))?;
    for holder in &holders {
        guest.signal(holder, 9)?;
        guest.wait_until("it hangs", STEP, || {
            let said = guest.try_sh(&format!("cat /proc/{}/status", holder.pid))?;
            Ok(said.out.contains("State:\tD"))
        })?;
    }
    let vss = guest.vss();
    let limit = guest.host().patience(Duration::from_secs(1));
    let back_up = |known: bool| -> Result<()> {
        let reply = vss.freeze(&[], STEP)?;
        answered("FREEZE with four that hang", &reply, status::OK)?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        let waited = reply.latency;
        let is_right = match known {
            true => waited < limit,
            false => is_given_up(waited, limit),
        };
        ensure!(is_right, "FREEZE took {waited:?}, known to hang: {known}");
        Ok(())
    };
    let seen = back_up(false).and_then(|()| back_up(true));
    guest.sh(UNHANG)?;
    for holder in &holders {
        guest.wait(holder, STEP)?;
    }
    seen?;
    let log = logged_all(guest, &daemon, 3)?;
    let named = log.matches("the kernel has it locked").count();
    equal("how often one is named", named, 8)?;
    good_backup(guest)?;
    stop(guest, guest.module(), &daemon)
}

/// Whoever looks at the one that is being unmounted hangs with it, and must keep nothing else.
fn killed_beside_an_unmount_that_hangs(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    let vss = guest.vss();
    load(guest, Module::Ours, &[])?;
    let mut daemon = guest.start_daemon_with("give_up = 2")?;
    wait_for_daemon(guest)?;
    let script = "cd /mnt/hung && touch /run/done && exec sleep 1000";
    let holder = guest.spawn(&["sh", "-c", script])?;
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh(&format!(
        "echo 1 >/mnt/hung/f && umount -l /mnt/hung && {HANG}"
    ))?;
    guest.signal(&holder, 9)?;
    let mut dead = None;
    let mut check = || -> Result<()> {
        answered("FREEZE", &vss.freeze(&[], STEP * 2)?, status::OK)?;
        let at = guest.signal_all(&all_of_ours(guest, &daemon)?, 9)?;
        released(guest, "the death", at, RELEASED)?;
        // What hangs is all that is left of it.
        dead = Some(std::mem::replace(
            &mut daemon,
            guest.start_daemon_with("give_up = 2")?,
        ));
        wait_for_daemon(guest)?;
        answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
        good_backup(guest).context("of the next daemon")?;
        guest.wait_until("the one that hangs is named", STEP, || {
            Ok(guest.output(&daemon)?.contains("the kernel has it locked"))
        })?;
        Ok(())
    };
    let seen = check();
    guest.sh(UNHANG)?;
    guest.wait(&holder, STEP)?;
    seen?;
    if let Some(it) = &dead {
        guest.wait(it, STEP)?;
    }
    stop(guest, Module::Ours, &daemon)
}

/// The log is held as long as something may be frozen; an operator learns of it all the same.
fn says_that_it_hangs(guest: &Guest) -> Result<()> {
    for expected in [
        "hv_vss_daemon: called off, still inside the freeze of /mnt/hung",
        "hv_vss_daemon: a backup was refused: the last one has not ended in time",
    ] {
        // The host has its answer before.
        let mut log = Vec::new();
        let said = guest.wait_until("the kernel's log says so", STEP, || {
            log = guest.log(6)?;
            Ok(log.iter().any(|it| it.text.contains(expected)))
        });
        said.with_context(|| format!("it should say {expected:?}, it was: {log:?}"))?;
    }
    for (command, expected) in [
        ("status", "called off, still inside the freeze of /mnt/hung"),
        ("history", "refused: the last one has not ended in time"),
    ] {
        guest.wait_until(&format!("{command} says so"), STEP, || {
            let said = guest.try_sh(&format!("/payload/hv_vss_daemon {command}"))?;
            Ok(said.out.contains(expected))
        })?;
    }
    Ok(())
}

fn both_killed_in_a_hung_freeze(guest: &Guest, for_long: bool) -> Result<()> {
    make_two(guest)?;
    hook(guest, "10-a", "")?;
    let vss = guest.vss();
    load(guest, Module::Stock, &[])?;
    for remedy in ["the stop step", "the next start"] {
        let daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        let guard = super::deadman::guard_of(guest, &daemon)?;
        let tx = freeze_that_hangs(guest, &daemon)?;
        guest.signal_all(&[daemon.pid, guard], 9)?;
        // The freeze that hangs cannot be thawed yet, and holds up nobody else. The one who hangs in
        // it keeps the device, so that the next daemon has to wait.
        let next = match remedy {
            "the stop step" => guest.spawn(&["/payload/hv_vss_daemon", "thaw"])?,
            _ => guest.start_daemon(Daemon::Ours)?,
        };
        released(guest, remedy, guest.clock()?, RELEASED * 2)?;
        let expected = ["10-a freeze ", "10-a thaw unknown"];
        noted(guest, remedy, &expected)?;
        if for_long {
            guest.wait_until("its thaw is left behind", STEP, || {
                Ok(guest
                    .output(&next)?
                    .contains("/mnt/hung (ext4, 254:0) hangs in the kernel"))
            })?;
        }
        // When it is over, it has frozen on behalf of a process that is dead.
        equal("threads in a freeze", in_freeze(guest, &daemon)?, 1)?;
        guest.sh(UNHANG)?;
        guest.wait(&daemon, STEP)?;
        answered("FREEZE", &vss.wait(tx, STEP)?, status::FAIL)?;
        thawed_in_time(guest, "/mnt/hung")?;
        let next = if remedy == "the stop step" {
            guest.wait(&next, STEP)?;
            guest.start_daemon(Daemon::Ours)?
        } else {
            next
        };
        wait_for_daemon(guest)?;
        answered("THAW, later", &vss.thaw(STEP)?, status::FAIL)?;
        good_backup(guest)?;
        guest.signal(&next, 15)?;
        guest.wait(&next, STEP)?;
        let expected = ["10-a freeze ", "10-a thaw good"];
        noted(guest, "a hook of the next backup", &expected)?;
    }
    hooks::end(guest)
}

/// Types that open a folder under a lock, what makes one, and what has somebody who creates a file keep that lock while
/// a disk hangs: btrfs reads what it knows of a name if that is more than fits into memory for good, and xfs reads
/// where there is room once it has looked into the folder, which is best small.
const LOCKING: [(&str, &str, &str); 2] = [
    ("btrfs", "mkfs.btrfs -q -f", "seq 3000 | xargs touch"),
    ("xfs", "mkfs.xfs -q -f", "true"),
];

/// Has the disk of `/mnt/hung` hang, and somebody create a file there who needs it: that one keeps the lock of the
/// folder.
fn hang_in_a_folder(guest: &Guest) -> Result<Vec<Process>> {
    // What xfs has read goes from memory only after it was passed over a few times.
    guest.sh(&format!(
        "sync; for n in 1 2 3 4 5; do echo 3 >/proc/sys/vm/drop_caches; done; {HANG}"
    ))?;
    let create = guest.spawn(&["sh", "-c", "echo x >/mnt/hung/new"])?;
    let list = guest.spawn(&["ls", "/mnt/hung"])?;
    guest.wait_until("nobody can open the folder", STEP, || {
        // openat(2) of x86.
        let call = guest.try_sh(&format!("cat /proc/{}/syscall", list.pid))?;
        Ok(call.out.starts_with("257 "))
    })?;
    Ok(vec![create, list])
}

fn hung_folder(guest: &Guest) -> Result<()> {
    make_hung_disk(guest, "/dev/ram4", 320)?;
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    for (fs_type, make, fill) in LOCKING {
        guest.sh(&format!(
            "modprobe {fs_type}; {make} /dev/mapper/hung && mount /dev/mapper/hung /mnt/hung && cd /mnt/hung && {fill}"
        ))?;
        for &module in guest.modules() {
            for (config, expected) in [
                ("prepare = 20\ngive_up = 2", status::OK),
                ("prepare = 20\ngive_up = 2\nstrict = true", status::FAIL),
            ] {
                folder_hangs(guest, module, config, expected)
                    .with_context(|| format!("{fs_type}, {module:?}, {}", status_name(expected)))?;
            }
        }
        guest.sh("umount /mnt/hung")?;
    }
    guest.sh("dmsetup remove hung").map(drop)
}

fn folder_hangs(guest: &Guest, module: Module, config: &str, expected: u32) -> Result<()> {
    let vss = guest.vss();
    load(guest, module, &[])?;
    let daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    good_backup(guest)?;
    let hanging = hang_in_a_folder(guest)?;
    let limit = guest.host().patience(Duration::from_secs(1));
    for known in [false, true] {
        let reply = vss.freeze(&[], STEP)?;
        answered("FREEZE with a folder that hangs", &reply, expected)?;
        let waited = reply.latency;
        let is_right = match known {
            true => waited < limit,
            false => is_given_up(waited, limit),
        };
        ensure!(
            is_right,
            "FREEZE took {waited:?} with a folder that is known to hang: {known}"
        );
        if expected == status::OK {
            answered("THAW", &vss.thaw(STEP)?, expected)?;
        }
        released(guest, "after it", guest.clock()?, RELEASED)?;
        guest.wait_until("it is named", STEP, || {
            let said = guest.output(&daemon)?;
            Ok(said.contains("/mnt/hung") && said.contains(" does not come back"))
        })?;
    }
    guest.sh(UNHANG)?;
    for process in &hanging {
        guest.wait(process, STEP)?;
    }
    guest.sh("rm /mnt/hung/new")?;
    good_backup(guest).context("with the disk back")?;
    guest.wait_until("all three are frozen again", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(said.matches("FREEZE answered: 3 frozen").count() == 2)
    })?;
    stop(guest, module, &daemon)
}

fn hung_open(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b",
    )?;
    for path in ["/writer", "/mnt/a/w", "/mnt/b/w"] {
        guest.writer_start(path)?;
    }
    let vss = guest.vss();
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("give_up = 2")?;
    wait_for_daemon(guest)?;
    guest.watch_opens("/mnt/b", None)?;
    let limit = guest.host().patience(Duration::from_secs(1));
    for known in [false, true] {
        let reply = vss.freeze(&[], STEP)?;
        answered("FREEZE behind an open", &reply, status::OK)?;
        let waited = reply.latency;
        let is_right = match known {
            true => waited < limit,
            false => is_given_up(waited, limit),
        };
        ensure!(
            is_right,
            "FREEZE took {waited:?} with an open that is known to hang: {known}"
        );
        let (_, moving) = who_stands_still(guest)?;
        equal("who goes on", moving, vec!["/mnt/b/w".to_owned()])?;
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        released(guest, "after it", guest.clock()?, RELEASED)?;
    }
    // So does the log, whose writer is not the one who hangs.
    guest.wait_until("the log says what hangs", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(said.contains("opening /mnt/b does not come back"))
    })?;
    guest.release_opens()?;
    good_backup(guest)?;
    stop(guest, guest.module(), &daemon)
}

fn open_behind_the_freeze(guest: &Guest) -> Result<()> {
    // The agent watches the first in the table and logs to the second.
    guest.sh(
        "mkdir -p /mnt/watched /mnt/log && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/watched && mount /dev/ram2 /mnt/log",
    )?;
    guest.writer_start("/mnt/watched/w")?;
    guest.writer_start("/mnt/log/w")?;
    let vss = guest.vss();
    guest.watch_opens("/mnt/watched", Some("/mnt/log/opens"))?;

    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    good_backup(guest)?;
    let frozen = vss.freeze(&[], STEP)?.status();
    let ours = format!(
        "FREEZE {}, THAW {}",
        status_name(frozen),
        status_name(vss.thaw(STEP)?.status())
    );
    equal(
        "ours",
        ours.as_str(),
        "FREEZE 0 (success), THAW 0 (success)",
    )?;
    let opens = guest.read("/mnt/log/opens")?;
    ensure!(
        opens.contains(&format!("opened by {}", daemon.pid)),
        "the agent should have judged the daemon's opens, it saw: {opens}"
    );
    stop(guest, guest.module(), &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("both stand still", STEP, || all_frozen(guest))?;
    let thaw = vss.send(Op::THAW, &SHORT_BODY)?;
    let limit = guest.host().patience(Duration::from_secs(3));
    let early = reply_within(guest, thaw, limit)?;
    // How long all have been standing still by now.
    let still = guest.writers()?.iter().map(|it| it.in_write_us).min();
    let still = Duration::from_micros(still.unwrap_or_default());
    let stuck = early.is_none() && still > limit;
    if stuck {
        // Only somebody who needs no open there can resolve that.
        guest.thaw("/mnt/log")?;
    }
    let peer = early.map_or_else(|| vss.wait(thaw, STEP), Ok)?.status();
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "a security agent (fanotify) that logs to a frozen disk judges every open",
        &ours,
        &if stuck {
            format!(
                "THAW hangs behind its own freeze, all is still frozen after {:.0} s",
                still.as_secs_f64()
            )
        } else {
            format!("THAW {}", status_name(peer))
        },
    );
    Ok(())
}
