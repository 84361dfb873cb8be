// SPDX-License-Identifier: GPL-2.0-only

//! Which file systems our daemon freezes, and whose freeze it is. Where the peer does otherwise, the
//! same is done with the stock module and Debian's daemon, and both are noted.

use super::{
    all_frozen, case, describe, good, is_frozen, load, logged, observe, reply_within, start, stop,
};
use super::{wait_for_daemon, Case, Seen};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{answered, equal, refused, status_name};
use e2e::guest::{Daemon, Guest, Module, STEP};
use hyperv_sim::ic::status;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "freeze/over-mounted",
        "two file systems on one directory: both stand still",
        over_mounted,
    )
    .comparing(),
    case(
        "freeze/other-namespace",
        "a file system mounted in another mount namespace only stands still",
        other_namespace,
    )
    .comparing(),
    case(
        "freeze/namespace-without-process",
        "so does one in a mount namespace that no process is in",
        namespace_without_process,
    ),
    case(
        "freeze/device-node-elsewhere",
        "a file system whose device node is outside /dev stands still",
        device_node_elsewhere,
    )
    .comparing(),
    case(
        "freeze/read-only-bind",
        "seen through a read-only bind mount only, a writable file system stands still",
        read_only_bind,
    )
    .comparing(),
    case(
        "freeze/odd-paths",
        "spaces, newlines, tabs and backslashes in mount points",
        odd_paths,
    ),
    case(
        "freeze/mounted-on-a-file",
        "a file system whose only mount points are a file and a FIFO stands still",
        mounted_on_a_file,
    ),
    case(
        "freeze/hidden-below-a-mount",
        "a file system whose mount point lies below another mount stands still",
        hidden_below_a_mount,
    )
    .comparing(),
    case(
        "freeze/never-touched",
        "autofs, FUSE, overlay and tmpfs: not so much as looked at, and in nobody's way",
        never_touched,
    )
    .comparing(),
    case(
        "freeze/vanished-mount",
        "unmounted while what is on the list is opened: its parent is not frozen instead",
        vanished_mount,
    ),
    case(
        "freeze/bind-mounts",
        "many mounts and subvolumes of one file system are one freeze",
        bind_mounts,
    ),
    case(
        "freeze/cannot-freeze",
        "exfat is synced and does not fail the backup, unless strict",
        cannot_freeze,
    )
    .comparing(),
    case(
        "freeze/read-only",
        "a read-only superblock is left alone",
        read_only,
    ),
    case(
        "freeze/frozen-by-somebody-else",
        "what an administrator had frozen stays frozen after our thaw",
        frozen_by_somebody_else,
    )
    .comparing(),
    case(
        "freeze/thawed-by-somebody-else",
        "an early thaw by somebody else is named and fails the host's THAW",
        thawed_by_somebody_else,
    )
    .comparing(),
    case(
        "freeze/covered-while-frozen",
        "a mount point that is covered or detached while frozen is thawed all the same",
        covered_while_frozen,
    )
    .comparing(),
    case(
        "freeze/renamed-while-frozen",
        "a mount point that is moved or whose folder is renamed while frozen is thawed all the same",
        renamed_while_frozen,
    ),
    Case {
        // Every call is stopped twice for strace, in all threads.
        per_round: Duration::from_secs(15),
        ..case(
            "freeze/nothing-but-descriptors",
            "no look-up, log line, file or program between first freeze and last thaw (strace)",
            nothing_but_descriptors,
        )
    },
    case(
        "freeze/log-on-the-frozen-root",
        "log and binary on the frozen root do not block the daemon",
        log_on_the_frozen_root,
    ),
    case(
        "freeze/excluded",
        "the configuration leaves file systems out, by path and by device",
        excluded,
    ),
    case(
        "freeze/twice",
        "a second FREEZE while frozen succeeds, and one THAW releases",
        twice,
    ),
];

/// Runs the same backup with the peer's module and daemon.
fn peer(guest: &Guest) -> Result<Seen> {
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let seen = observe(guest)?;
    stop(guest, Module::Stock, &daemon)?;
    Ok(seen)
}

/// Runs it with ours, and leaves nothing loaded.
fn ours(guest: &Guest) -> Result<Seen> {
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    stop(guest, guest.module(), &daemon)?;
    Ok(seen)
}

fn over_mounted(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/lower")?;
    guest.sh("mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/a")?;
    guest.writer_start("/mnt/a/upper")?;
    let ours = ours(guest)?;
    equal(
        "the backup",
        &ours,
        &good(&["/mnt/a/lower", "/mnt/a/upper"]),
    )?;
    let peer = peer(guest)?;
    guest.compare(
        "two file systems mounted on one directory",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn other_namespace(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1")?;
    let holder = guest.spawn(&[
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        "mount /dev/ram1 /mnt/a && touch /run/mounted && exec sleep 1000",
    ])?;
    guest.wait_until("it is mounted over there", STEP, || {
        Ok(guest.try_sh("rm /run/mounted")?.status == Some(0))
    })?;
    let file = format!("/proc/{}/root/mnt/a/w", holder.pid);
    guest.writer_start(&file)?;
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&[&file]))?;
    let peer = peer(guest)?;
    let tell = |seen: &Seen| describe(seen).replace(&file, "the file system there");
    guest.compare(
        "mounted in another mount namespace only",
        &tell(&ours),
        &tell(&peer),
    );
    Ok(())
}

fn namespace_without_process(guest: &Guest) -> Result<()> {
    // What keeps it is a mount of its own file, as with `ip netns` or a paused container.
    guest.sh("mkdir -p /mnt/a /mnt/ns && mkfs.ext4 -q -F /dev/ram1
              mount -t tmpfs ns /mnt/ns && mount --make-private /mnt/ns && touch /mnt/ns/kept")?;
    let holder = guest.spawn(&[
        "unshare",
        "--mount=/mnt/ns/kept",
        "--propagation",
        "private",
        "sh",
        "-c",
        "mount /dev/ram1 /mnt/a && touch /run/mounted && exec sleep 1000",
    ])?;
    guest.wait_until("it is mounted over there", STEP, || {
        Ok(guest.try_sh("rm /run/mounted")?.status == Some(0))
    })?;
    let file = format!("/proc/{}/root/mnt/a/w", holder.pid);
    guest.writer_start(&file)?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    let seen = ours(guest)?;
    guest.sh("umount /mnt/ns/kept")?;
    equal("the backup", &seen, &good(&[&file]))
}

fn device_node_elsewhere(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1
              rm -f /run/node; mknod /run/node b 1 1 && mount -t ext4 /run/node /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&["/mnt/a/w"]))?;
    let peer = peer(guest)?;
    guest.compare(
        "mounted from a device node outside /dev",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn read_only_bind(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    // The writer holds the file; the mount it was opened through is in no table any more.
    guest
        .sh("mount --bind /mnt/a /mnt/b && mount -o remount,bind,ro /mnt/b && umount -l /mnt/a")?;
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&["/mnt/a/w"]))?;
    let peer = peer(guest)?;
    guest.compare(
        "writable file system of which only a read-only bind mount is visible",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn odd_paths(guest: &Guest) -> Result<()> {
    let paths = ["/mnt/a b", "/mnt/c\nd", "/mnt/e\tf", "/mnt/g\\040h"];
    for (number, path) in paths.iter().enumerate() {
        let device = format!("/dev/ram{}", number + 1);
        guest.sh(&format!(
            "mkfs.ext4 -q -F {device} && mkdir -p '{path}' && mount {device} '{path}'"
        ))?;
        guest.writer_start(&format!("{path}/w"))?;
    }
    let files: Vec<String> = paths.iter().map(|path| format!("{path}/w")).collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    equal("the backup", &ours(guest)?, &good(&files))
}

fn mounted_on_a_file(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              mkfifo /mnt/a/fifo && touch /mnt/a/file /mnt/on-fifo /mnt/on-file",
    )?;
    guest.writer_start("/mnt/a/w")?;
    guest.sh(
        "mount --bind /mnt/a/fifo /mnt/on-fifo && mount --bind /mnt/a/file /mnt/on-file &&
              umount -l /mnt/a",
    )?;
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&["/mnt/a/w"]))
}

fn hidden_below_a_mount(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/dir/a /mnt/dir/b
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/dir/a
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/dir/b")?;
    guest.writer_start("/mnt/dir/a/w")?;
    guest.writer_start("/mnt/dir/b/w")?;
    // Of the one the path leads nowhere now, of the other to a folder in memory.
    guest.sh("mount -t tmpfs cover /mnt/dir && mkdir /mnt/dir/b")?;
    let ours = ours(guest)?;
    let peer = peer(guest)?;
    guest.sh("umount /mnt/dir")?;
    equal(
        "the backup",
        &ours,
        &good(&["/mnt/dir/a/w", "/mnt/dir/b/w"]),
    )?;
    guest.compare(
        "a mount on the folder above hides two mount points",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn never_touched(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe -a autofs4 overlay && mkdir -p /mnt/a /mnt/over /mnt/tmp /mnt/auto /mnt/fuse
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              mkdir /mnt/a/lower /mnt/a/upper /mnt/a/work
              mount -t overlay -o lowerdir=/mnt/a/lower,upperdir=/mnt/a/upper,workdir=/mnt/a/work \
                  over /mnt/over
              mount -t tmpfs tmp /mnt/tmp && mkfifo /run/auto",
    )?;
    // A direct mount of an automounter that has not got round to it yet: each look-up is a request
    // in its pipe, and waits. And a FUSE mount, named as libfuse does, whose server answers nothing.
    let automounter = guest.spawn(&[
        "sh",
        "-c",
        "exec 3<>/run/auto && busybox mount -n -i -t autofs -o fd=3,pgrp=$$,minproto=5,maxproto=5,direct \
             auto /mnt/auto && touch /run/mounted-1 && exec cat <&3 >/run/requests",
    ])?;
    let server = guest.spawn(&[
        "sh",
        "-c",
        "exec 4<>/dev/fuse && busybox mount -n -i -t fuse -o fd=4,rootmode=40000,user_id=0,group_id=0 \
             /dev/fuse /mnt/fuse && touch /run/mounted-2 && exec sleep 1000",
    ])?;
    guest.wait_until("both are mounted", STEP, || {
        let both = "cd /run && test -e mounted-1 -a -e mounted-2 && rm mounted-1 mounted-2";
        Ok(guest.try_sh(both)?.status == Some(0))
    })?;
    for path in ["/mnt/a/w", "/mnt/over/w", "/mnt/tmp/w"] {
        guest.writer_start(path)?;
    }
    let ours = ours(guest)?;
    // What lies in the overlay is in ext4, really.
    let expected = Seen {
        moving: vec!["/mnt/tmp/w".into()],
        ..good(&["/mnt/a/w", "/mnt/over/w"])
    };
    equal("the backup", &ours, &expected)?;
    let requests = "wc -c </run/requests";
    equal(
        "bytes of requests to automount",
        guest.sh(requests)?.trim(),
        "0",
    )?;

    let vss = guest.vss();
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    let tx = vss.send_freeze(&[])?;
    let limit = guest.host().patience(Duration::from_secs(3));
    let early = reply_within(guest, tx, limit)?;
    // What waits for the server is in a function of FUSE.
    let look_up = format!("grep -q ' fuse_' /proc/{}/task/*/stack", daemon.pid);
    let is_in_there = guest.try_sh(&look_up)?.status == Some(0);
    // Only now: a look-up is noticed, and waits.
    for path in ["/mnt/auto", "/mnt/fuse"] {
        let look = guest.try_sh(&format!("timeout -s KILL 1 ls {path}"))?;
        ensure!(
            look.status != Some(0),
            "a look-up of {path} should wait, it gave {look:?}"
        );
    }
    ensure!(
        guest.sh(requests)?.trim() != "0",
        "a look-up of the automount should be a request"
    );
    // Without them nobody waits any more.
    for process in [&automounter, &server] {
        guest.signal(process, 9)?;
        guest.wait(process, STEP)?;
    }
    let seen = match &early {
        Some(reply) => format!("FREEZE {}", status_name(reply.status())),
        None if is_in_there => "FREEZE hangs behind the dead server".to_owned(),
        None => format!("FREEZE not answered after {:.0} s", limit.as_secs_f64()),
    };
    if early.is_none() {
        vss.wait(tx, STEP)?;
    }
    for path in ["/mnt/a", "/"] {
        // What the peer may have frozen before it came to that one.
        let _ = guest.thaw(path);
    }
    stop(guest, Module::Stock, &daemon)?;
    guest.sh("umount /mnt/auto /mnt/fuse")?;
    guest.compare(
        "a FUSE file system (source /dev/fuse) whose server does not answer, an automount point",
        &describe(&ours),
        &seen,
    );
    Ok(())
}

fn vanished_mount(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/p
              for n in 1 2 3; do mkfs.ext4 -q -F /dev/ram$n || exit 1; done
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/p
              mkdir /mnt/p/gone && mount /dev/ram3 /mnt/p/gone")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/p/w")?;
    load(guest, guest.module(), &[])?;
    // The parent is not to be frozen, so that it shows when it is.
    let daemon = guest.start_daemon_with("[exclude]\npaths = [\"/mnt/p\"]")?;
    wait_for_daemon(guest)?;
    // One that hangs holds up the others for a moment only: by the time that it is seen to, they are open. This one
    // is in no table then, and in use.
    guest.watch_opens("/mnt/a", None)?;
    let vss = guest.vss();
    let tx = vss.send_freeze(&[])?;
    let held_up = format!("grep -q fanotify /proc/{}/task/*/stack", daemon.pid);
    guest.wait_until("the daemon is held up in an open", STEP, || {
        Ok(guest.try_sh(&held_up)?.status == Some(0))
    })?;
    guest.sh("umount -l /mnt/p/gone")?;
    guest.release_opens()?;
    answered("FREEZE", &vss.wait(tx, STEP)?, status::OK)?;
    guest.wait_until("/mnt/a stands still", STEP, || {
        Ok(guest.writers()?.iter().any(|it| is_frozen(guest, it)))
    })?;
    for writer in guest.writers()? {
        let frozen = is_frozen(guest, &writer);
        equal(&writer.path, frozen, writer.path == "/mnt/a/w")?;
    }
    answered("THAW", &vss.thaw(STEP)?, status::OK)
}

fn bind_mounts(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b /mnt/c /mnt/d && modprobe btrfs
              mkfs.btrfs -q -f /dev/ram3 && mount -t btrfs /dev/ram3 /mnt/a
              btrfs -q subvolume create /mnt/a/sub && mount -o subvol=sub /dev/ram3 /mnt/b
              mount --bind /mnt/a /mnt/c && mount --bind /mnt/b /mnt/d")?;
    for path in ["/mnt/a/w", "/mnt/b/w", "/mnt/c/w2", "/mnt/d/w2"] {
        guest.writer_start(path)?;
    }
    let list = guest.sh("/payload/hv_vss_daemon list --json")?;
    equal(
        "mentions of btrfs among what is frozen",
        list.matches("\"btrfs\"").count(),
        1,
    )?;
    let all = ["/mnt/a/w", "/mnt/b/w", "/mnt/c/w2", "/mnt/d/w2"];
    equal("the backup", &ours(guest)?, &good(&all))
}

fn cannot_freeze(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/exfat && modprobe exfat
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              mkfs.exfat /dev/ram2 >/dev/null && mount -t exfat /dev/ram2 /mnt/exfat")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/exfat/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let ours = observe(guest)?;
    let expected = Seen {
        moving: vec!["/mnt/exfat/w".into()],
        ..good(&["/mnt/a/w"])
    };
    equal("the backup", &ours, &expected)?;
    let log = logged(guest, &daemon)?;
    ensure!(
        log.contains("/mnt/exfat") && log.contains("synced instead"),
        "the daemon should say that exfat was only synced; it said:\n{log}"
    );
    stop(guest, guest.module(), &daemon)?;

    // The operator can insist.
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    let strict = observe(guest)?;
    equal("FREEZE with strict = true", strict.freeze, status::FAIL)?;
    equal("writers that stand still after it", strict.still.len(), 0)?;
    stop(guest, guest.module(), &daemon)?;

    let peer = peer(guest)?;
    guest.compare("exfat beside ext4", &describe(&ours), &describe(&peer));
    Ok(())
}

fn read_only(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a && mount -o ro /dev/ram2 /mnt/b",
    )?;
    guest.writer_start("/mnt/a/w")?;
    start(guest, guest.module(), Daemon::Ours)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    refused(
        "FITHAW of the read-only one while frozen",
        guest.thaw("/mnt/b"),
        "EINVAL",
    )?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)
}

fn frozen_by_somebody_else(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b",
    )?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/b/w")?;
    guest.freeze("/mnt/a")?;
    let ours = ours(guest)?;
    let expected = Seen {
        stuck: vec!["/mnt/a/w".into()],
        ..good(&["/mnt/a/w", "/mnt/b/w"])
    };
    equal("the backup", &ours, &expected)?;
    // It is still the administrator's, who can thaw it now.
    guest.thaw("/mnt/a")?;

    guest.freeze("/mnt/a")?;
    let peer = peer(guest)?;
    let left = super::deadman::was_left_frozen(guest, "/mnt/a")?;
    guest.compare(
        "frozen by an administrator beforehand",
        &describe(&ours),
        &format!(
            "{}, {}",
            describe(&peer),
            if left {
                "still frozen"
            } else {
                "the administrator's freeze has gone, too"
            }
        ),
    );
    equal("FREEZE with the peer", peer.freeze, status::OK)
}

fn thawed_by_somebody_else(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    let vss = guest.vss();
    // With our module nobody else can.
    let mut ours = None;
    if guest.module() == Module::Ours {
        let daemon = start(guest, Module::Ours, Daemon::Ours)?;
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        refused("FITHAW of what is held", guest.thaw("/mnt/a"), "EINVAL")?;
        let told = vss.thaw(STEP)?.status();
        equal("THAW", told, status::OK)?;
        stop(guest, Module::Ours, &daemon)?;
        ours = Some(format!("he cannot; THAW {}", status_name(told)));
    }

    // With the stock one the daemon notices.
    let daemon = start(guest, Module::Stock, Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.thaw("/mnt/a")?;
    let told = vss.thaw(STEP)?.status();
    equal("THAW after an early thaw", told, status::FAIL)?;
    let noticed = || format!("he can; THAW {}, he is named", status_name(told));
    guest.wait_until("the daemon has named it in its log", STEP, || {
        Ok(guest
            .output(&daemon)?
            .lines()
            .any(|line| line.contains("/mnt/a") && line.contains("somebody else")))
    })?;
    // The next backup is a new one.
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    stop(guest, Module::Stock, &daemon)?;

    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.thaw("/mnt/a")?;
    let peer = vss.thaw(STEP)?.status();
    stop(guest, Module::Stock, &daemon)?;
    guest.compare(
        "somebody else thaws one file system during the backup",
        &ours.unwrap_or_else(noticed),
        &format!("he can; THAW {}", status_name(peer)),
    );
    Ok(())
}

fn covered_while_frozen(guest: &Guest) -> Result<()> {
    // One mount point is covered by another file system while frozen, one is detached.
    let prepare = "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
                   mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b";
    let disturb = "mount -t tmpfs cover /mnt/a && umount -l /mnt/b";
    let vss = guest.vss();
    guest.sh(prepare)?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/b/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
    guest.sh(disturb)?;
    let told = vss.thaw(STEP)?.status();
    equal("THAW", told, status::OK)?;
    let stuck = super::stuck_writers(guest)?;
    equal("writers that do not go on", &stuck, &Vec::new())?;
    let ours = format!("THAW {}, thawed", status_name(told));
    guest.writers_stop()?;
    stop(guest, guest.module(), &daemon)?;

    // The peer looks its mount points up again. A handle from before rescues what it leaves.
    guest.sh("umount /mnt/a /mnt/a")?;
    guest.sh("mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, Module::Stock, Daemon::Debian)?;
    answered("FREEZE with the peer", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("the writer stands still", STEP, || all_frozen(guest))?;
    guest.sh("mount -t tmpfs cover /mnt/a")?;
    let thaw = vss.thaw(STEP)?.status();
    guest.sh("umount /mnt/a")?;
    let left = super::deadman::was_left_frozen(guest, "/mnt/a")?;
    guest.compare(
        "a mount point is covered while frozen",
        &ours,
        &format!(
            "THAW {}, {}",
            status_name(thaw),
            if left { "left frozen" } else { "thawed" }
        ),
    );
    stop(guest, Module::Stock, &daemon)
}

fn renamed_while_frozen(guest: &Guest) -> Result<()> {
    // The folders are in memory, since those on the root cannot be renamed while it is frozen.
    guest.sh(
        "mkdir -p /mnt/t && mount -t tmpfs t /mnt/t && mount --make-private /mnt/t
              mkdir -p /mnt/t/dir/a /mnt/t/b /mnt/t/moved
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/t/dir/a
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/t/b",
    )?;
    guest.writer_start("/mnt/t/dir/a/w")?;
    guest.writer_start("/mnt/t/b/w")?;
    let vss = guest.vss();
    start(guest, guest.module(), Daemon::Ours)?;
    for (before, after) in [("dir", "other"), ("other", "dir")] {
        answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
        guest.wait_until("both writers stand still", STEP, || all_frozen(guest))?;
        // What was opened as one name has another now, and the old one leads elsewhere. (Not with
        // mkdir -p, which would try to make /mnt, too, and wait for the thaw.)
        let rename = format!("cd /mnt/t && mv {before} {after} && mkdir {before} {before}/a");
        guest.sh(&rename)?;
        if before == "dir" {
            guest.sh("mount --move /mnt/t/b /mnt/t/moved")?;
        } else {
            guest.sh("mount --move /mnt/t/moved /mnt/t/b")?;
        }
        answered("THAW", &vss.thaw(STEP)?, status::OK)?;
        equal("who is stuck", super::stuck_writers(guest)?, Vec::new())?;
        guest.sh(&format!("rm -r /mnt/t/{before}"))?;
    }
    Ok(())
}

/// What daemon and guard may do while the disks are frozen, by system call: wait, ask what is open or mounted, and
/// freeze and thaw. Not look up a path, not make a file or a process, not ask for memory.
const ALLOWED: [&str; 17] = [
    "clock_nanosleep",
    "close",
    "epoll_wait",
    "futex",
    "ioctl",
    "listmount",
    "lseek",
    "poll",
    "pread64",
    "pwrite64",
    "read",
    "recvmsg",
    "sched_yield",
    "sendmsg",
    "statmount",
    "write",
    // The end of one of these.
    "<...",
];

fn nothing_but_descriptors(guest: &Guest) -> Result<()> {
    make_two(guest)?;
    guest.writer_start("/writer")?;
    // As strace writes them: HV_VSS_IOC_FREEZE and HV_VSS_IOC_THAW have no name there.
    let held = ["0xb9, 0x56, ", "0xb9, 0x57, "];
    for (module, [freeze, thaw]) in [
        (Module::Ours, held),
        (Module::Stock, ["FIFREEZE", "FITHAW"]),
    ] {
        if !guest.modules().contains(&module) {
            continue;
        }
        load(guest, module, &[])?;
        let trace = traced_backup(guest, freeze)?;
        only_descriptors(&trace, freeze, thaw).with_context(|| format!("{module:?}: {trace}"))?;
        guest.unload(module)?;
    }
    Ok(())
}

/// One backup with a daemon under strace, and what that wrote from the first `freeze` of a disk on: all of
/// it takes too long on the line.
fn traced_backup(guest: &Guest, freeze: &str) -> Result<String> {
    let [program, foreground] = Daemon::Ours.argv();
    let strace = ["strace", "-f", "-y", "-qq", "-o", "/run/trace"];
    let strace = guest.spawn(&[&strace[..], &[program, foreground]].concat())?;
    wait_for_daemon(guest)?;
    let seen = observe(guest)?;
    equal("the backup", &seen, &good(&["/writer"]))?;
    guest.sh("kill $(pidof hv_vss_daemon)")?;
    guest.wait(&strace, STEP)?;
    guest.sh(&format!(
        "awk '/{freeze}/ && !/<.proc/ {{ on = 1 }} on' /run/trace"
    ))
}

/// Between the first call that freezes and the last one that thaws nothing was done but what is allowed, and nothing
/// written but to the device, to the daemon itself, and to what is in memory and open.
fn only_descriptors(trace: &str, freeze: &str, thaw: &str) -> Result<()> {
    let lines: Vec<&str> = trace.lines().collect();
    // Not those on procfs, by which daemon and guard make sure at their start that all is in memory.
    let on_disk = |line: &&str, call| line.contains(call) && !line.contains("</proc/");
    let first = lines.iter().position(|line| on_disk(line, freeze));
    let last = lines.iter().rposition(|line| on_disk(line, thaw));
    let (Some(first), Some(last)) = (first, last) else {
        bail!("there is no freeze or no thaw");
    };
    let mut calls = 0;
    for line in lines.get(first..last).unwrap_or_default() {
        // Process, call and arguments, or `<... call resumed>`.
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        let name = call.split('(').next().unwrap_or_default();
        // With an empty path it is about the descriptor; folders are read of the kernel's own only.
        let is_open = match name {
            "open_tree" | "statx" => line.contains("AT_EMPTY_PATH"),
            "getdents64" => line.contains("</proc") || line.contains("</sys/fs/"),
            _ => ALLOWED.contains(&name),
        };
        ensure!(is_open, "while frozen, the daemon did this: {line}");
        ensure!(
            may_touch(line, name, freeze, thaw),
            "while frozen, the daemon touched this: {line}"
        );
        calls += 1;
    }
    // Three freezes, three thaws, two answers at least.
    ensure!(calls > 8, "there are too few calls to be true");
    Ok(())
}

/// Whether such a call may be of what it is of: the first argument is the descriptor, with its path. What reads or
/// writes has to do with no disk: the device, the daemon itself, files of the kernel, and its own in `/run`, which is
/// in memory. The folders of the disks are there to be frozen and thawed.
fn may_touch(line: &str, name: &str, freeze: &str, thaw: &str) -> bool {
    const DEVICE: &str = "</dev/vmbus/hv_vss>";
    const ITSELF: &str = "<anon_inode:[eventfd]>";
    let arguments = line.split_once('(').map_or("", |(_, it)| it);
    let of = arguments.split(", ").next().unwrap_or_default();
    let is_of = |all: &[&str]| all.iter().any(|it| of.contains(it));
    match name {
        "read" => is_of(&[DEVICE, ITSELF]),
        "pread64" => is_of(&["</proc/", "</sys/"]),
        "write" | "pwrite64" => is_of(&[DEVICE, ITSELF, "</run/hv_vss/backup.json>"]),
        "recvmsg" | "sendmsg" => is_of(&["<socket:["]),
        "ioctl" => {
            let does = |it: &str| arguments.contains(it);
            is_of(&[DEVICE]) || does(freeze) || does(thaw) || does("NS_MNT_GET_")
        }
        _ => true,
    }
}

fn make_two(guest: &Guest) -> Result<()> {
    guest
        .sh(
            "mkdir -p /mnt/a /mnt/b && mkfs.ext4 -q -F /dev/ram1 && mkfs.ext4 -q -F /dev/ram2
             mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b",
        )
        .map(drop)
}

fn log_on_the_frozen_root(guest: &Guest) -> Result<()> {
    // In the background, with a system log that writes to the root, as on a real machine.
    guest.writer_start("/writer")?;
    let syslogd = guest.spawn(&["syslogd", "-n", "-O", "/messages"])?;
    guest.wait_until("the system log is there", STEP, || {
        Ok(guest.try_sh("test -S /dev/log")?.status == Some(0))
    })?;
    load(guest, guest.module(), &[])?;
    guest.sh("cp /payload/hv_vss_daemon /hv_vss_daemon && /hv_vss_daemon")?;
    wait_for_daemon(guest)?;
    for _ in 0..3 {
        equal("the backup", &observe(guest)?, &good(&["/writer"]))?;
    }
    guest.wait_until("the log has come to the disk", STEP, || {
        Ok(guest
            .read("/messages")?
            .matches("the backup is good")
            .count()
            == 3)
    })?;
    guest.sh("kill $(pidof hv_vss_daemon)")?;
    guest.wait_until("the daemon has ended", STEP, || {
        Ok(guest.try_sh("pidof hv_vss_daemon")?.status == Some(1))
    })?;
    guest.signal(&syslogd, 9)?;
    guest.sh("rm /hv_vss_daemon /messages").map(drop)
}

fn excluded(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b /mnt/c
              for n in 1 2 3; do mkfs.ext4 -q -F /dev/ram$n || exit 1; done
              mount /dev/ram1 /mnt/a && mount /dev/ram2 /mnt/b && mount /dev/ram3 /mnt/c")?;
    for path in ["/mnt/a/w", "/mnt/b/w", "/mnt/c/w"] {
        guest.writer_start(path)?;
    }
    load(guest, guest.module(), &[])?;
    guest.start_daemon_with("[exclude]\npaths = [\"/mnt/a*\"]\ndevices = [\"/dev/ram2\"]")?;
    wait_for_daemon(guest)?;
    let expected = Seen {
        moving: vec!["/mnt/a/w".into(), "/mnt/b/w".into()],
        ..good(&["/mnt/c/w"])
    };
    equal("the backup", &observe(guest)?, &expected)
}

fn twice(guest: &Guest) -> Result<()> {
    guest.writer_start("/writer")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("FREEZE again", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("the writer stands still", STEP, || all_frozen(guest))?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    guest.not_frozen("after the one THAW", &["/"])?;
    stop(guest, guest.module(), &daemon)?;

    // Nor does it last longer for that, and nobody calls it good.
    load(guest, guest.module(), &[])?;
    let (daemon, _) = guest.start_daemon_within("deadline", Duration::from_secs(2))?;
    wait_for_daemon(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    answered("FREEZE again", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("the deadline has passed", STEP, || {
        Ok(guest
            .output(&daemon)?
            .contains("thawing before the host said so"))
    })?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    let said = guest.output(&daemon)?;
    ensure!(!said.contains("the backup is good"), "it says: {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As strace wrote them of a backup, between a freeze and a thaw.
    const SEEN: [&str; 12] = [
        r#"read(4</dev/vmbus/hv_vss>, <unfinished ...>"#,
        r#"<... read resumed>"\6\0\0\0", 6300) = 12"#,
        r#"read(8<anon_inode:[eventfd]>, "\1\0\0\0\0\0\0\0", 8) = 8"#,
        r#"pread64(3</proc/249/stat>, "249 (hv_vss_daemon) S 245 245 0 "..., 512, 0) = 320"#,
        r#"pread64(21</sys/devices/virtual/block/ram1/stat>, <unfinished ...>"#,
        r#"pwrite64(19</run/hv_vss/backup.json>, "22685822", 8, 149) = 8"#,
        r#"write(4</dev/vmbus/hv_vss>, "\0\0\0\0", 4) = 4"#,
        r#"recvmsg(0<socket:[360]>, <unfinished ...>"#,
        r#"sendmsg(11<socket:[359]>, {msg_name=NULL, msg_namelen=0, msg_iov=[{iov_base="\4"#,
        r#"ioctl(12<mnt:[4026531832]>, NS_MNT_GET_NEXT <unfinished ...>"#,
        r#"ioctl(26</mnt/b>, FIFREEZE <unfinished ...>"#,
        r#"getdents64(17</sys/fs/ext4>, 0x7ff4531fb608 /* 6 entries */, 4096) = 152"#,
    ];

    #[test]
    fn a_file_on_a_disk_is_not_touched_while_it_is_frozen() {
        let checked = |more: &[&str]| {
            let begin = "ioctl(25</mnt/a>, FIFREEZE <unfinished ...>";
            let calls = [
                &[begin],
                &SEEN[..],
                more,
                &["ioctl(25</mnt/a>, FITHAW) = 0"],
            ]
            .concat();
            let lines = calls.iter().map(|it| format!("249   {it}\n"));
            only_descriptors(&lines.collect::<String>(), "FIFREEZE", "FITHAW")
        };
        checked(&[]).unwrap();
        for wrong in [
            r#"read(9</etc/hv_vss/daemon.toml>, "", 4096) = 0"#,
            r#"pread64(9</mnt/a/file>, <unfinished ...>"#,
            r#"read(9</>, "/proc/x /sys/x", 4096) = 14"#,
            r#"ioctl(25</mnt/a>, FS_IOC_GETFLAGS, [0]) = 0"#,
            r#"sendmsg(9</mnt/a/file>, {msg_name=NULL}"#,
            r#"write(9</var/log/x>, "</dev/vmbus/hv_vss>", 19) = 19"#,
            r#"openat(AT_FDCWD, "/mnt/a", O_RDONLY) = 9"#,
        ] {
            assert!(checked(&[wrong]).is_err(), "{wrong}");
        }
    }
}
