// SPDX-License-Identifier: GPL-2.0-only

//! What is written on a block device of the guest stands still, wherever it is mounted and however it
//! is reached, or it is named.
//!
//! Where the peer does otherwise, the same is done with the stock module and Debian's daemon.

use super::disks::{self, Attached};
use super::hooks;
use super::order::{end_nbd, frozen_in_order, inner_before_outer, make_nbd};
use super::{
    case, describe, good, is_frozen, load, logged, logged_all, observe, observe_backup_of,
};
use super::{rounds_or, seed, start, stop, wait_for_daemon, Case, Seen};
use crate::runner::Skipped;
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::ic::vss::{FreezeBody, Lun, Op};
use hyperv_sim::storage::Image;
use hyperv_sim::Guid;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

pub const CASES: &[Case] = &[
    case(
        "scope/rule-and-bind-mount",
        "a rule that matches a bind mount of a folder elsewhere leaves nothing out, and says so",
        rule_and_bind_mount,
    ),
    case(
        "scope/stack-of-mounts",
        "thousands of mounts one over the other, as anybody may have them, cost no backup its time",
        stack_of_mounts,
    ),
    case(
        "scope/left-out-by-rule",
        "what a rule leaves out is said in each backup's log",
        left_out_by_rule,
    ),
    case(
        "scope/rule-for-a-subvolume",
        "a rule for one subvolume leaves out nothing of a btrfs of which another is mounted, and says so",
        rule_for_a_subvolume,
    ),
    case(
        "scope/rules-that-match-nothing",
        "are named at the start and by list, and so is that nothing is frozen",
        rules_that_match_nothing,
    ),
    case(
        "scope/mounted-after-hot-backup",
        "a mount after the last HOT_BACKUP stands still in the first backup and in the second",
        mounted_after_hot_backup,
    ),
    case(
        "scope/lazily-unmounted",
        "ext4, xfs and btrfs that were unmounted lazily while in use stand still",
        lazily_unmounted,
    )
    .comparing(),
    case(
        "scope/lazily-unmounted-beside-a-lost-node",
        "so does a btrfs beside another that is mounted by a node that is no more",
        lazily_unmounted_beside_a_lost_node,
    ),
    case(
        "scope/lazily-unmounted-read-only",
        "a read-only btrfs that was unmounted lazily stays read-only, whoever looks at it",
        lazily_unmounted_read_only,
    ),
    case(
        "scope/read-only-though-mounted-for-writing",
        "a btrfs that was made read-only by another mount is named, fails no strict backup, and stands still \
         once it is writable",
        read_only_though_mounted_for_writing,
    ),
    case(
        "scope/below-an-overlay-only",
        "so does what only an overlay still holds, which no process has open",
        below_an_overlay_only,
    )
    .comparing(),
    case(
        "scope/unreachable",
        "what is in use and cannot be reached is named, and fails a strict backup",
        unreachable,
    ),
    case(
        "scope/below-fuse",
        "a disk below a FUSE mount of somebody else stands still, its server stopped or not",
        below_fuse,
    )
    .comparing(),
    case(
        "scope/covered-by-fuse",
        "so does a btrfs that a FUSE mount lies over whose server does not answer",
        covered_by_fuse,
    ),
    case(
        "scope/lazily-unmounted-and-listed-by-nobody",
        "a vfat and an exfat in use by a working directory alone since before the daemon are named, and so is what a \
         program serves",
        lazily_unmounted_and_listed_by_nobody,
    ),
    case(
        "scope/in-no-namespace-and-listed-by-nobody",
        "the same with one that came between two backups and was never in a namespace that lasts",
        in_no_namespace_and_listed_by_nobody,
    ),
    case(
        "scope/btrfs-seed",
        "a btrfs that has sprouted from a seed stands still, also unmounted lazily; two, where the kernel gives the seed to \
         both",
        btrfs_seed,
    ),
    case(
        "scope/served-from-a-disk",
        "what a program serves from a disk here by FUSE is named, not passed over",
        served_from_a_disk,
    ),
    case(
        "scope/silent-server",
        "a disk served by a program that does not answer is left out by name, and costs nobody else",
        silent_server,
    ),
    case(
        "scope/image-in-a-container",
        "an image in a container's overlay is frozen before what holds the upper layer",
        image_in_a_container,
    ),
    case(
        "scope/image-in-a-subvolume",
        "an image in a btrfs subvolume is frozen before the btrfs",
        image_in_a_subvolume,
    ),
    case(
        "scope/path-of-another-namespace",
        "an image is frozen before what holds it, though its path leads elsewhere here",
        path_of_another_namespace,
    ),
    case(
        "scope/loop-over-a-block-device",
        "a loop device over a loop device is frozen before the first one's file system",
        loop_over_a_block_device,
    ),
    case(
        "scope/journal-elsewhere",
        "ext4 and xfs are frozen before what holds their journal's device",
        journal_elsewhere,
    ),
    case(
        "scope/not-known-to-be-hardware",
        "disks that are not known to be hardware are frozen first, the youngest file system first, though an \
         older one is mounted once more",
        not_known_to_be_hardware,
    ),
    Case {
        // Disks come and go, with both modules.
        per_round: Duration::from_secs(8),
        ..disks::case(
            "scope/which-disks",
            "log, list and status say which disks the host backs up, and what is on them",
            which_disks,
        )
    }
    .asking_our_module(),
    Case {
        per_round: Duration::from_secs(8),
        ..disks::case(
            "scope/listed-disks-only",
            "as an option only what is on those disks stands still; all does where that is not certain",
            listed_disks_only,
        )
    }
    .asking_our_module(),
    disks::case(
        "scope/torn",
        "a volume with a part on a disk that is not in the backup is named, and fails a strict one",
        torn,
    )
    .asking_our_module(),
    Case {
        per_round: Duration::from_secs(8),
        ..disks::case(
            "scope/raw-writer",
            "what a program writes to a disk of the backup itself is named, and fails a strict backup",
            raw_writer,
        )
    }
    .asking_our_module(),
    disks::case(
        "scope/raw-writer-beside-swap",
        "and so is one on a disk where swap, or a partition that is excluded, goes on",
        raw_writer_beside_swap,
    )
    .asking_our_module(),
    Case {
        per_round: Duration::from_secs(8),
        ..disks::case(
            "scope/raw-writer-on-layers",
            "the same on a volume of layers; what RAID copies by itself is not taken for it",
            raw_writer_on_layers,
        )
    }
    .asking_our_module(),
    Case {
        per_round: Duration::from_secs(4),
        ..case(
            "scope/comes-and-goes",
            "with mounts and namespaces that come and go all the time each backup is good",
            comes_and_goes,
        )
    }.long(),
    Case {
        per_round: Duration::from_secs(4),
        ..case(
            "scope/any-change",
            "whatever is mounted, unmounted or remounted in between, each backup freezes what is there",
            any_change,
        )
    }.long(),
];

const OURS: &str = "/payload/hv_vss_daemon";

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

/// Starts ours with a configuration.
fn start_with(guest: &Guest, config: &str) -> Result<Process> {
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with(config)?;
    wait_for_daemon(guest)?;
    Ok(daemon)
}

/// Waits until the daemon's log has a line with all of these words.
fn says(guest: &Guest, daemon: &Process, words: &[&str]) -> Result<()> {
    let has_all = |line: &str| words.iter().all(|word| line.contains(word));
    let mut log = String::new();
    let said = guest.wait_until("the daemon says so", STEP, || {
        log = guest.output(daemon)?;
        Ok(log.lines().any(has_all))
    });
    said.with_context(|| format!("no line with {words:?} in the daemon's log:\n{log}"))
}

/// A strict backup fails and names why; a backup of ours after that is good again.
fn strict_names(guest: &Guest, words: &[&str]) -> Result<()> {
    let daemon = start_with(guest, "strict = true")?;
    let freeze = guest.vss().freeze(&[], STEP)?;
    answered("FREEZE with strict = true", &freeze, status::FAIL)?;
    says(guest, &daemon, &[&["strict"], words].concat())?;
    stop(guest, guest.module(), &daemon)
}

/// Makes what is private to a namespace of its own, and waits until that has happened.
pub(super) fn in_a_namespace(guest: &Guest, script: &str) -> Result<Process> {
    let holder = guest.spawn(&[
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &format!("{script} && touch /run/done && exec sleep 1000"),
    ])?;
    guest.wait_until("it is done over there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    Ok(holder)
}

fn rule_and_bind_mount(guest: &Guest) -> Result<()> {
    guest.sh(
        "mkdir -p /mnt/a /mnt/scratch && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              mkdir /mnt/a/folder",
    )?;
    in_a_namespace(guest, "mount --bind /mnt/a/folder /mnt/scratch")?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start_with(guest, "[exclude]\npaths = ['/mnt/scratch*']")?;
    equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    says(
        guest,
        &daemon,
        &["exclude path /mnt/scratch*", "no file system"],
    )?;
    stop(guest, guest.module(), &daemon)?;

    // A file system that is mounted twice freezes as a whole or not at all.
    guest.sh("mkdir -p /mnt/twice && mount /dev/ram1 /mnt/twice")?;
    let daemon = start_with(guest, "[exclude]\npaths = ['/mnt/tw*']")?;
    equal("what stood still", observe(guest)?.still.len(), 0)?;
    let words =
        "exclude path /mnt/tw*, being mounted at /mnt/twice, though it is also mounted at /mnt/a";
    says(guest, &daemon, &["/mnt/a (ext4, 1:1) is left out", words])?;
    stop(guest, guest.module(), &daemon)?;
    guest.sh("umount /mnt/twice")?;

    // Of what is mounted nowhere else, a path over there is as good as any.
    guest.sh("mkdir -p /mnt/b && mkfs.ext4 -q -F /dev/ram2")?;
    let there = in_a_namespace(guest, "mount /dev/ram2 /mnt/b")?;
    guest.writer_start(&format!("/proc/{}/root/mnt/b/w", there.pid))?;
    let daemon = start_with(guest, "[exclude]\npaths = ['/mnt/b']")?;
    equal("what stood still", observe(guest)?.still.len(), 1)?;
    says(
        guest,
        &daemon,
        &["/mnt/b (ext4, 1:2", "left out", "exclude path /mnt/b"],
    )
}

/// Of each mount the kernel goes down all the way to say where it is: what is left of the time is that.
fn stack_of_mounts(guest: &Guest) -> Result<()> {
    const COUNT: usize = 5000;
    const MOST: Duration = Duration::from_secs(20);
    guest.sh(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
         mkdir /mnt/a/user && chown 1000:1000 /mnt/a/user",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let timed = || -> Result<Duration> {
        // It is planned anew.
        guest.sh("mount -t tmpfs none /mnt && umount /mnt")?;
        let begin = Instant::now();
        answered("FREEZE", &guest.vss().freeze(&[], STEP)?, status::OK)?;
        let took = begin.elapsed();
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
        Ok(took)
    };
    let without = timed()?;
    let count = COUNT.to_string();
    let somebody = ["unshare", "--setuid", "1000", "--setgid", "1000"];
    let stack = ["/payload/lab-agent", "stack", &count, "/mnt/a/user"];
    let begin = Instant::now();
    let holder = guest.spawn(&[&somebody[..], &stack].concat())?;
    guest.wait_until("they are mounted", STEP * 2, || {
        Ok(guest.output(&holder)?.contains("are mounted"))
    })?;
    println!("     {COUNT} mounts were made in {:?}", begin.elapsed());
    let with = timed()?;
    println!("     FREEZE took {without:?} without them, {with:?} with them");
    ensure!(
        with < without + MOST,
        "FREEZE took {with:?}, {without:?} without"
    );
    equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    let list = guest.sh(&format!("{OURS} list"))?;
    ensure!(list.contains("/mnt/a (ext4, 1:1)"), "{list}");
    let log = logged(guest, &daemon)?;
    ensure!(
        !format!("{list}{log}").contains("mount namespace"),
        "nothing is missing:\n{list}{log}"
    );
    stop(guest, guest.module(), &daemon)?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    Ok(())
}

fn left_out_by_rule(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a")?;
    let daemon = start_with(guest, "[exclude]\ndevices = ['/dev/ram1']")?;
    for backup in 1..3 {
        super::backup(guest)?;
        let words = "left out: excluded by exclude device /dev/ram1";
        guest.wait_until("it is said once more", STEP, || {
            Ok(guest.output(&daemon)?.matches(words).count() == backup)
        })?;
    }
    Ok(())
}

fn rule_for_a_subvolume(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe btrfs; mkdir -p /mnt/a /mnt/b && mkfs.btrfs -q -f /dev/ram1 &&
              mount /dev/ram1 /mnt/a && btrfs -q subvolume create /mnt/a/@ &&
              btrfs -q subvolume create /mnt/a/@scratch && umount /mnt/a &&
              mount -o subvol=@ /dev/ram1 /mnt/a && mount -o subvol=@scratch /dev/ram1 /mnt/b",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let config = "strict = true\n[exclude]\npaths = ['/mnt/b*']";
    let daemon = start_with(guest, config)?;
    let words = &["exclude path /mnt/b*", "speaks of a part of", "(btrfs"];
    says(guest, &daemon, words)?;
    equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    // Where nothing else is mounted it is all there is.
    guest.sh("umount /mnt/a")?;
    guest.writer_start("/mnt/b/w")?;
    guest.writer_start("/writer")?;
    let daemon = start_with(guest, config)?;
    let expected = Seen {
        moving: vec!["/mnt/b/w".into()],
        ..good(&["/writer"])
    };
    equal("without all there is", &observe(guest)?, &expected)?;
    says(guest, &daemon, &["left out", "exclude path /mnt/b*"])
}

fn rules_that_match_nothing(guest: &Guest) -> Result<()> {
    let config = "[include]\npaths = ['/srb/*']\n[exclude]\ntypes = ['ext5', 'ext4']";
    guest.sh(&format!("cat >/run/typo.toml <<'END'\n{config}\nEND"))?;
    let list = format!("{OURS} -c /run/typo.toml list");
    let text = guest.sh(&list)?;
    ensure!(
        text.contains("nothing to freeze"),
        "list should say so:\n{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&guest.sh(&format!("{list} --json"))?)?;
    let idle = serde_json::json!(["exclude type ext5", "include path /srb/*"]);
    equal("rules that match nothing", &json["idle_rules"], &idle)?;
    let daemon = start_with(guest, config)?;
    says(
        guest,
        &daemon,
        &["include path /srb/*", "matches no file system"],
    )?;
    says(
        guest,
        &daemon,
        &["exclude type ext5", "matches no file system"],
    )
}

fn mounted_after_hot_backup(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a && mkfs.ext4 -q -F /dev/ram1")?;
    start(guest, guest.module(), Daemon::Ours)?;
    for _ in 0..2 {
        answered("HOT_BACKUP", &guest.vss().hot_backup(STEP)?, status::OK)?;
    }
    guest.sh("mount /dev/ram1 /mnt/a")?;
    guest.writer_start("/mnt/a/w")?;
    for backup in ["the first backup", "the second", "the third"] {
        equal(backup, &observe(guest)?, &good(&["/mnt/a/w"]))?;
    }
    Ok(())
}

fn lazily_unmounted(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe -a xfs btrfs; mkdir -p /mnt/ext4 /mnt/xfs /mnt/btrfs /mnt/cwd
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/ext4
              mkfs.xfs -q -f /dev/ram2 && mount /dev/ram2 /mnt/xfs
              mkfs.btrfs -q -f /dev/ram3 && mount /dev/ram3 /mnt/btrfs
              mkfs.ext4 -q -F /dev/ram4 && mount /dev/ram4 /mnt/cwd",
    )?;
    let mut files = vec!["/mnt/ext4/w", "/mnt/xfs/w", "/mnt/btrfs/w"];
    for file in &files {
        guest.writer_start(file)?;
    }
    // Of the last one nothing is open but a working directory.
    let holder = guest.spawn(&[
        "sh",
        "-c",
        "cd /mnt/cwd && touch /run/done && exec sleep 1000",
    ])?;
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh(
        "umount -l /mnt/ext4 && umount -l /mnt/xfs && umount -l /mnt/btrfs && umount -l /mnt/cwd",
    )?;
    let in_cwd = format!("/proc/{}/cwd/w", holder.pid);
    guest.writer_start(&in_cwd)?;
    files.push(&in_cwd);
    let list = guest.sh(&format!("{OURS} list"))?;
    for name in [
        "ram1 (ext4, 1:1",
        "ram2 (xfs, 1:2",
        "(btrfs, 1:3",
        "ram4 (ext4, 1:4",
    ] {
        ensure!(list.contains(name), "list should name {name:?}:\n{list}");
    }
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&files))?;
    let peer = peer(guest)?;
    let tell = |seen: &Seen| describe(seen).replace(&in_cwd, "/mnt/cwd/w");
    guest.compare(
        "unmounted lazily while in use: ext4, xfs, btrfs, a working directory",
        &tell(&ours),
        &tell(&peer),
    );
    guest.writers_stop()?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    // Nothing of ours keeps them.
    guest.wait_until("they are gone", STEP, || {
        let look = "ls /sys/fs/ext4/ram1 /sys/fs/xfs/ram2 /sys/fs/ext4/ram4 2>/dev/null";
        Ok(guest.try_sh(look)?.out.trim().is_empty())
    })
}

fn lazily_unmounted_beside_a_lost_node(guest: &Guest) -> Result<()> {
    // The kernel must not know a better name for it than the one that is no more.
    guest.sh("modprobe btrfs; mkdir -p /mnt/a /mnt/b
         mkfs.btrfs -q -f /dev/ram1 && mkfs.btrfs -q -f /dev/ram2 && btrfs device scan --forget &&
         mknod /dev/lost b 1 1 && mount /dev/lost /mnt/a && rm /dev/lost &&
         mount /dev/ram2 /mnt/b && grep -q ' - btrfs /dev/lost ' /proc/self/mountinfo")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/b/w")?;
    guest.sh("umount -l /mnt/b")?;
    let daemon = start_with(guest, "strict = true")?;
    equal(
        "the backup",
        &observe(guest)?,
        &good(&["/mnt/a/w", "/mnt/b/w"]),
    )?;
    stop(guest, guest.module(), &daemon)
}

/// Whether the kernel knows quotas.
pub(super) fn tells_superblocks(guest: &Guest) -> Result<bool> {
    let found = guest.try_sh("grep -qw dquot_init /proc/kallsyms")?;
    Ok(found.status == Some(0))
}

/// sysfs has no list of these, and nobody remembers that they were mounted.
fn lazily_unmounted_and_listed_by_nobody(guest: &Guest) -> Result<()> {
    if !tells_superblocks(guest)? {
        return Err(Skipped("this kernel knows no quotas, by which it would tell").into());
    }
    guest.sh(
        "modprobe -a vfat nls_cp437 nls_ascii exfat; mkdir -p /mnt/vfat /mnt/exfat /mnt/b
              mkfs.vfat /dev/ram1 >/dev/null && mount /dev/ram1 /mnt/vfat
              mkfs.exfat /dev/ram2 >/dev/null && mount -t exfat /dev/ram2 /mnt/exfat
              mkfs.ext4 -q -F /dev/ram3 && mount /dev/ram3 /mnt/b",
    )?;
    guest.writer_start("/mnt/b/w")?;
    let mut holders = Vec::new();
    for path in ["/mnt/vfat", "/mnt/exfat"] {
        let script = format!("cd {path} && touch /run/done && exec sleep 1000");
        holders.push(guest.spawn(&["sh", "-c", &script])?);
        guest.wait_until("it is in there", STEP, || {
            Ok(guest.try_sh("rm /run/done")?.status == Some(0))
        })?;
        guest.sh(&format!("umount -l {path}"))?;
    }
    guest.sh("modprobe fuse; mkdir -p /mnt/served")?;
    let server = silent_fuse(guest, "-t fuseblk /dev/ram4 /mnt/served")?;
    // Whoever goes there waits for the server, and holds it meanwhile.
    let holder = guest.spawn(&["sh", "-c", "cd /mnt/served"])?;
    guest.wait_until("it waits there", STEP, || {
        let waits = format!("grep -q fuse /proc/{}/stack", holder.pid);
        Ok(guest.try_sh(&waits)?.status == Some(0))
    })?;
    guest.sh("umount -l /mnt/served")?;
    holders.extend([holder, server]);
    // Of an xfs that is mounted nowhere nobody tells whether it has a log elsewhere.
    guest.sh("modprobe xfs; mkdir -p /mnt/xfs /sys/fs/fuse/connections
              mountpoint -q /sys/fs/fuse/connections ||
                  mount -t fusectl fusectl /sys/fs/fuse/connections
              mkfs.xfs -q -f /dev/ram5 && mount /dev/ram5 /mnt/xfs")?;
    let script = "cd /mnt/xfs && touch /run/done && exec sleep 1000";
    holders.push(guest.spawn(&["sh", "-c", script])?);
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh("umount -l /mnt/xfs")?;
    let names = [
        "ram1 (vfat, 1:1, in use but mounted nowhere)",
        "ram2 (exfat, 1:2, in use but mounted nowhere)",
        "ram4 (?, 1:4, in use but mounted nowhere)",
    ];
    let list = guest.sh(&format!("{OURS} list"))?;
    for name in names {
        ensure!(list.contains(name), "list should name {name:?}:\n{list}");
    }
    equal("the backup", &ours(guest)?, &good(&["/mnt/b/w"]))?;
    let strict = strict_names(
        guest,
        &["ram4 (?, 1:4, in use but mounted nowhere) is left out"],
    );
    for holder in &holders {
        guest.signal(holder, 9)?;
        guest.wait(holder, STEP)?;
    }
    strict?;
    // Nothing of ours keeps them: whoever formats a disk has it for itself.
    let daemon = start_with(guest, "strict = true")?;
    equal("when they are gone", &observe(guest)?, &good(&["/mnt/b/w"]))?;
    guest.sh("mkfs.vfat /dev/ram1 >/dev/null && mkfs.exfat /dev/ram2 >/dev/null")?;
    stop(guest, guest.module(), &daemon)
}

/// Nothing that is looked at when a plan is kept has changed then, but for the number of mounts.
fn in_no_namespace_and_listed_by_nobody(guest: &Guest) -> Result<()> {
    if !tells_superblocks(guest)? {
        return Err(Skipped("this kernel knows no quotas, by which it would tell").into());
    }
    guest.sh(
        "modprobe -a vfat nls_cp437 nls_ascii; mkdir -p /mnt/a /mnt/vfat
         mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a && mkfs.vfat /dev/ram2 >/dev/null",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    for _ in 0..2 {
        equal("without it", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    }
    // Whoever has the file open is elsewhere when the namespace ends.
    let script = "mount -t vfat /dev/ram2 /mnt/vfat && exec 9>/mnt/vfat/f && touch /run/done &&
                  exec nsenter -t 1 -m sleep 1000";
    let holder = guest.spawn(&["unshare", "-m", "sh", "-c", script])?;
    guest.wait_until("the namespace has gone", STEP, || {
        let here = "test -e /run/done && [ /proc/PID/ns/mnt -ef /proc/1/ns/mnt ]";
        let here = here.replace("PID", &holder.pid.to_string());
        Ok(guest.try_sh(&here)?.status == Some(0))
    })?;
    equal("beside it", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    let name = "ram2 (vfat, 1:2, in use but mounted nowhere)";
    let said = logged_all(guest, &daemon, 3);
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    guest.sh("rm /run/done")?;
    let said = said?;
    ensure!(said.contains(name), "it should be named:\n{said}");
    stop(guest, guest.module(), &daemon)
}

fn served_from_a_disk(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe fuse; mkdir -p /mnt/a /mnt/served && mkfs.ext4 -q -F /dev/ram1 &&
              mount /dev/ram1 /mnt/a",
    )?;
    guest.writer_start("/mnt/a/w")?;
    // As udev names the disks here.
    let node = "/dev/acpi-VMBUS:00-vmbus-lun-2";
    guest.sh(&format!("ln -sf ram2 {node}"))?;
    let server = silent_fuse(guest, &format!("-t fuse {node} /mnt/served"))?;
    let words = ["/mnt/served (fuse, 0:", "its server does not answer"];
    let check = || -> Result<()> {
        let daemon = start_with(guest, "give_up = 1")?;
        equal("the backup", &observe(guest)?, &good(&["/mnt/a/w"]))?;
        says(guest, &daemon, &words)?;
        stop(guest, guest.module(), &daemon)
    };
    let seen = check();
    end(guest, &server, "/mnt/served")?;
    guest.sh(&format!("rm {node}"))?;
    seen
}

fn lazily_unmounted_read_only(guest: &Guest) -> Result<()> {
    guest.sh("modprobe btrfs; mkdir -p /mnt/btrfs /mnt/again
              mkfs.btrfs -q -f /dev/ram1 && mount -o ro /dev/ram1 /mnt/btrfs")?;
    let holder = guest.spawn(&[
        "sh",
        "-c",
        "cd /mnt/btrfs && touch /run/done && exec sleep 1000",
    ])?;
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh("umount -l /mnt/btrfs")?;
    let list = guest.sh(&format!("{OURS} list"))?;
    let line = list.lines().find(|it| it.contains("(btrfs, 1:1"));
    ensure!(
        line.is_some_and(|it| it.contains("read-only")),
        "list should say what it is:\n{list}"
    );
    let seen = ours(guest)?;
    equal("the backup", &seen, &good(&[]))?;
    guest.sh("mount -o ro /dev/ram1 /mnt/again")?;
    let line = guest.sh("grep ' /mnt/again ' /proc/self/mountinfo")?;
    ensure!(
        line.contains(" /dev/ram1 ro"),
        "the superblock should be read-only as before: {line}"
    );
    guest.sh("umount /mnt/again")?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;

    // One that has met an error is a loss: no mount is left that tells who made it read-only.
    guest.expect_in_log(&["(device ram2)", "EXT4-fs (ram2)"])?;
    guest.sh("mkdir -p /mnt/bad && mkfs.ext4 -q -F /dev/ram2 && mount -o errors=continue /dev/ram2 /mnt/bad
              echo x >/sys/fs/ext4/ram2/trigger_fs_error; mount -o remount,ro /mnt/bad")?;
    let holder = guest.spawn(&[
        "sh",
        "-c",
        "cd /mnt/bad && touch /run/done && exec sleep 1000",
    ])?;
    guest.wait_until("it is in there", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    guest.sh("umount -l /mnt/bad")?;
    let list = guest.sh(&format!("{OURS} list"))?;
    let line = list.lines().find(|it| it.contains("(ext4, 1:2"));
    let said = "read-only since an error";
    ensure!(
        line.is_some_and(|it| it.contains(said)),
        "list should say what is wrong with it:\n{list}"
    );
    let daemon = start_with(guest, "strict = true")?;
    equal("a strict backup", &observe(guest)?.freeze, &status::FAIL)?;
    stop(guest, guest.module(), &daemon)?;
    guest.signal(&holder, 9)?;
    guest.wait(&holder, STEP)?;
    Ok(())
}

fn read_only_though_mounted_for_writing(guest: &Guest) -> Result<()> {
    guest.sh("modprobe btrfs; mkdir -p /mnt/a /mnt/b
              mkfs.btrfs -q -f /dev/ram1 && mount /dev/ram1 /mnt/a && mount --bind /mnt/a /mnt/b &&
              mount -o remount,ro /mnt/a && umount /mnt/a")?;
    let daemon = start_with(guest, "strict = true")?;
    for backup in ["the first backup", "the second"] {
        equal(backup, &observe(guest)?, &good(&[]))?;
    }
    let words = "left out: read-only though mounted for writing, and not since an error";
    says(guest, &daemon, &["/mnt/b (btrfs, ", words])?;
    guest.sh("mount -o remount,rw /mnt/b")?;
    guest.writer_start("/mnt/b/w")?;
    equal("once writable", &observe(guest)?, &good(&["/mnt/b/w"]))?;
    stop(guest, guest.module(), &daemon)
}

fn btrfs_seed(guest: &Guest) -> Result<()> {
    guest.sh("modprobe btrfs; mkdir -p /mnt/a /mnt/b
              mkfs.btrfs -q -f /dev/ram1 && btrfstune -S 1 /dev/ram1")?;
    guest.expect_in_log(&["failed to open device for path /dev/ram1"])?;
    let mut files = Vec::new();
    for (at, disk) in [("/mnt/a", "ram2"), ("/mnt/b", "ram3")] {
        let mounted = guest.try_sh(&format!("mount /dev/ram1 {at} 2>&1"))?;
        if !files.is_empty() && mounted.out.contains("busy") {
            // A kernel may let no second superblock have the device (7.3 does not), a seed, too.
            continue;
        }
        ensure!(mounted.status == Some(0), "mount: {mounted:?}");
        guest.sh(&format!(
            "btrfs -q device add -f /dev/{disk} {at} && mount -o remount,rw {at}"
        ))?;
        files.push(format!("{at}/w"));
    }
    for file in &files {
        guest.writer_start(file)?;
    }
    let all: Vec<&str> = files.iter().map(String::as_str).collect();
    equal("the backup", &ours(guest)?, &good(&all))?;
    // Whoever goes by devices takes it for the other one, or for none.
    let last = all.last().and_then(|it| it.strip_suffix("/w"));
    guest.sh(&format!("umount -l {}", last.unwrap_or_default()))?;
    equal("the last one in no table", &ours(guest)?, &good(&all))
}

fn below_an_overlay_only(guest: &Guest) -> Result<()> {
    guest.sh("modprobe overlay; mkdir -p /mnt/a /mnt/over /mnt/lower
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a && mkdir /mnt/a/upper /mnt/a/work
              mount -t overlay -o lowerdir=/mnt/lower,upperdir=/mnt/a/upper,workdir=/mnt/a/work \\
                  over /mnt/over
              umount -l /mnt/a")?;
    guest.writer_start("/mnt/over/w")?;
    let ours = ours(guest)?;
    equal("the backup", &ours, &good(&["/mnt/over/w"]))?;
    let peer = peer(guest)?;
    guest.compare(
        "the upper layer of an overlay, itself unmounted lazily",
        &describe(&ours),
        &describe(&peer),
    );
    Ok(())
}

fn unreachable(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/a /mnt/b
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/b")?;
    guest.writer_start("/mnt/a/w")?;
    guest.writer_start("/mnt/b/w")?;
    // Neither a path nor a device node leads there.
    guest.sh("umount -l /mnt/a && rm /dev/ram1")?;
    let name = "ram1 (ext4, 1:1";
    let list = guest.sh(&format!("{OURS} list"));
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe(guest)?;
    says(guest, &daemon, &[name, "left out", "cannot be reached"])?;
    stop(guest, guest.module(), &daemon)?;
    let strict = strict_names(guest, &[name]);
    guest.sh("mknod /dev/ram1 b 1 1")?;
    strict?;
    let expected = Seen {
        moving: vec!["/mnt/a/w".into()],
        ..good(&["/mnt/b/w"])
    };
    equal("the backup", &seen, &expected)?;
    let list = list?;
    ensure!(
        list.lines()
            .any(|line| line.contains(name) && line.contains("cannot be reached")),
        "list should name it:\n{list}"
    );
    Ok(())
}

fn below_fuse(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/fuse && mkfs.ext4 -q -F /dev/ram1")?;
    let server = guest.spawn(&[
        "/payload/lab-agent",
        "fuse",
        "/mnt/fuse",
        "1000",
        "/dev/ram1",
    ])?;
    guest.wait_until("a disk is mounted below FUSE", STEP, || {
        Ok(guest.output(&server)?.contains("mounted"))
    })?;
    let refused = guest.try_sh("ls /mnt/fuse/disk")?;
    ensure!(
        refused.err.contains("Permission denied"),
        "root should not find its way there, it saw: {refused:?}"
    );
    let file = format!("/proc/{}/cwd/w", server.pid);
    guest.writer_start(&file)?;
    let check = |what: &str| -> Result<Seen> {
        let ours = ours(guest)?;
        equal(what, &ours, &good(&[&file]))?;
        Ok(ours)
    };
    let ours = check("the backup")?;
    let peer = peer(guest)?;
    guest.signal(&server, 19)?;
    check("the backup with the server stopped")?;
    guest.signal(&server, 18)?;
    guest.writers_stop()?;
    guest.signal(&server, 9)?;
    guest.wait(&server, STEP)?;
    guest.sh("umount -l /mnt/fuse")?;
    let tell = |seen: &Seen| describe(seen).replace(&file, "the disk");
    guest.compare(
        "a disk mounted below a FUSE mount that root may not enter",
        &tell(&ours),
        &tell(&peer),
    );
    Ok(())
}

/// Mounts FUSE with these arguments of mount(8); whoever serves it answers nothing. On some kernels the mount(8)
/// of util-linux asks for attributes of what it has mounted; that of busybox does not on any.
pub(super) fn silent_fuse(guest: &Guest, arguments: &str) -> Result<Process> {
    let script = format!(
        "exec 4<>/dev/fuse && busybox mount -n -i -o fd=4,rootmode=40000,user_id=0,group_id=0 {arguments} &&
             touch /run/done && exec sleep 1000"
    );
    let server = guest.spawn(&["sh", "-c", &script])?;
    guest.wait_until("it is mounted", STEP, || {
        Ok(guest.try_sh("rm /run/done")?.status == Some(0))
    })?;
    Ok(server)
}

/// Ends it, so that whoever waits for it waits no longer.
pub(super) fn end(guest: &Guest, server: &Process, path: &str) -> Result<()> {
    guest.signal(server, 9)?;
    guest.wait(server, STEP)?;
    guest.sh(&format!("umount -l {path}")).map(drop)
}

fn covered_by_fuse(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe -a btrfs fuse; mkdir -p /mnt/a && mkfs.btrfs -q -f /dev/ram1 &&
              mount /dev/ram1 /mnt/a && btrfs -q subvolume create /mnt/a/sub && umount /mnt/a &&
              mount -o subvol=sub /dev/ram1 /mnt/a",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let server = silent_fuse(guest, "-t fuse far:/home /mnt/a")?;
    let seen = ours(guest);
    end(guest, &server, "/mnt/a")?;
    equal("the backup", &seen?, &good(&["/mnt/a/w"]))
}

fn silent_server(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe fuse; mkdir -p /mnt/a /mnt/served /mnt/there && mkfs.ext4 -q -F /dev/ram1 &&
              mount /dev/ram1 /mnt/a && mkfs.ext4 -q -F /dev/ram3",
    )?;
    guest.writer_start("/mnt/a/w")?;
    let server = silent_fuse(guest, "-t fuseblk /dev/ram2 /mnt/served")?;
    let there = in_a_namespace(guest, "mount /dev/ram3 /mnt/there")?;
    let daemon = start_with(guest, "give_up = 1")?;
    let words = ["/mnt/served (fuseblk, 1:2)", "its server does not answer"];
    let seen: Result<Vec<Seen>> = (0..2).map(|_| observe(guest)).collect();
    let said = says(guest, &daemon, &words);
    // The thread that hangs holds no namespace, and nothing that is mounted there.
    guest.signal(&there, 9)?;
    guest.wait(&there, STEP)?;
    let gone = guest.wait_until("what only a container had mounted is gone", STEP, || {
        Ok(guest.try_sh("[ -e /sys/fs/ext4/ram3 ]")?.status == Some(1))
    });
    end(guest, &server, "/mnt/served")?;
    gone?;
    for backup in seen? {
        equal("each backup", &backup, &good(&["/mnt/a/w"]))?;
    }
    said?;
    stop(guest, guest.module(), &daemon)
}

fn image_in_a_container(guest: &Guest) -> Result<()> {
    guest.sh("modprobe -a overlay loop; mkdir -p /mnt/a /mnt/merged
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/a && mkdir /mnt/a/upper /mnt/a/work
              mount -t overlay -o lowerdir=/,upperdir=/mnt/a/upper,workdir=/mnt/a/work \
                  over /mnt/merged")?;
    // The container's root is the overlay, so the image's path is /tmp/disk.img. The guest's own /tmp
    // is memory.
    let inside = in_a_namespace(
        guest,
        "cd /mnt/merged && mount -t devtmpfs dev dev && mount -t proc proc proc &&
             mount --bind /run run &&
             mkdir -p old data && pivot_root . old && umount -l /old &&
             truncate -s 64M /tmp/disk.img && mkfs.ext4 -q -F /tmp/disk.img &&
             losetup /dev/loop0 /tmp/disk.img && mount /dev/loop0 /data",
    )?;
    let file = format!("/proc/{}/root/data/w", inside.pid);
    guest.writer_start(&file)?;
    guest.writer_start("/mnt/a/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    equal("the backup", &observe(guest)?, &good(&[&file, "/mnt/a/w"]))?;
    let log = logged(guest, &daemon)?;
    frozen_in_order(&log, &["/data", "/mnt/a", "/"])
}

fn image_in_a_subvolume(guest: &Guest) -> Result<()> {
    guest.sh("modprobe -a btrfs loop; mkdir -p /mnt/pool /mnt/inner
              mkfs.btrfs -q -f /dev/ram1 && mount /dev/ram1 /mnt/pool
              btrfs -q subvolume create /mnt/pool/sub
              truncate -s 48M /mnt/pool/sub/image && mkfs.ext4 -q -F /mnt/pool/sub/image
              mount -o loop /mnt/pool/sub/image /mnt/inner")?;
    inner_before_outer(guest, "/mnt/inner", "/mnt/pool").map(drop)
}

fn path_of_another_namespace(guest: &Guest) -> Result<()> {
    // /mnt/x/image over there is on ram1; here /mnt/x is on ram2, which holds another of that name.
    guest.sh("modprobe loop; mkdir -p /mnt/x /mnt/real /mnt/inner
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/real
              mkfs.ext4 -q -F /dev/ram2 && mount /dev/ram2 /mnt/x && touch /mnt/x/image
              truncate -s 48M /mnt/real/image && mkfs.ext4 -q -F /mnt/real/image")?;
    in_a_namespace(
        guest,
        "mount --bind /mnt/real /mnt/x && losetup /dev/loop0 /mnt/x/image",
    )?;
    guest.sh("mount /dev/loop0 /mnt/inner")?;
    inner_before_outer(guest, "/mnt/inner", "/mnt/real").map(drop)
}

fn loop_over_a_block_device(guest: &Guest) -> Result<()> {
    guest.sh("modprobe loop; mkdir -p /mnt/disk /mnt/inner
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 64M /mnt/disk/image && losetup /dev/loop0 /mnt/disk/image
              losetup --sector-size 4096 /dev/loop1 /dev/loop0
              mkfs.ext4 -q -F -b 4096 /dev/loop1 && mount /dev/loop1 /mnt/inner")?;
    inner_before_outer(guest, "/mnt/inner", "/mnt/disk").map(drop)
}

fn journal_elsewhere(guest: &Guest) -> Result<()> {
    guest.sh(
        "modprobe -a loop xfs; mkdir -p /mnt/disk /mnt/inner /mnt/xfs
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/disk
              truncate -s 64M /mnt/disk/journal && losetup /dev/loop0 /mnt/disk/journal
              truncate -s 96M /mnt/disk/log && losetup /dev/loop1 /mnt/disk/log
              mke2fs -q -F -O journal_dev -b 4096 /dev/loop0
              mkfs.ext4 -q -F -b 4096 -J device=/dev/loop0 /dev/ram2 && mount /dev/ram2 /mnt/inner
              mkfs.xfs -q -f -l logdev=/dev/loop1,size=64m /dev/ram3
              mount -o logdev=/dev/loop1 /dev/ram3 /mnt/xfs",
    )?;
    guest.writer_start("/mnt/xfs/w")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    for path in ["/mnt/disk/w", "/mnt/inner/w"] {
        guest.writer_start(path)?;
    }
    let seen = observe(guest)?;
    let expected = good(&["/mnt/xfs/w", "/mnt/disk/w", "/mnt/inner/w"]);
    equal("the backup", &seen, &expected)?;
    let log = logged(guest, &daemon)?;
    frozen_in_order(&log, &["/mnt/inner", "/mnt/disk"])?;
    frozen_in_order(&log, &["/mnt/xfs", "/mnt/disk"])?;
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    // The loop devices are let go of first, or the one who tidies up cannot unmount the disk.
    guest
        .sh("umount /mnt/inner /mnt/xfs && losetup -D")
        .map(drop)
}

fn not_known_to_be_hardware(guest: &Guest) -> Result<()> {
    guest.sh("mkdir -p /mnt/first /mnt/plain /mnt/second
              modprobe sd_mod && modprobe scsi_debug dev_size_mb=48 num_tgts=2")?;
    guest.wait_until("both disks are there", STEP, || {
        Ok(guest.try_sh("[ -b /dev/sda ] && [ -b /dev/sdb ]")?.status == Some(0))
    })?;
    guest.sh("mkfs.ext4 -q -F /dev/sda && mount /dev/sda /mnt/first
              mkfs.ext4 -q -F /dev/ram1 && mount /dev/ram1 /mnt/plain
              mkfs.ext4 -q -F /dev/sdb && mount /dev/sdb /mnt/second
              mkdir /mnt/kept && mount --bind /mnt/first /mnt/kept && umount /mnt/first
              mount /dev/sda /mnt/first && umount /mnt/kept")?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    super::backup(guest)?;
    let log = logged(guest, &daemon)?;
    frozen_in_order(&log, &["/mnt/second", "/mnt/first", "/mnt/plain", "/"])?;
    stop(guest, guest.module(), &daemon)?;
    guest
        .sh("umount /mnt/first /mnt/second && rmmod scsi_debug")
        .map(drop)
}

fn comes_and_goes(guest: &Guest) -> Result<()> {
    guest.sh("for n in 1 2 3 4 5; do
                  mkfs.ext4 -q -F /dev/ram$n && mkdir -p /mnt/$n || exit 1
              done
              mount /dev/ram5 /mnt/5")?;
    guest.writer_start("/mnt/5/w")?;
    start(guest, guest.module(), Daemon::Ours)?;
    let mut loops = Vec::new();
    for n in 1..5 {
        // What is frozen cannot be unmounted; it is tried again.
        let mounts = format!(
            "until [ -e /run/enough ]; do mount /dev/ram{n} /mnt/{n}
                 until umount /mnt/{n} 2>/dev/null; do :; done; done"
        );
        let namespaces = "until [ -e /run/enough ]; do unshare --mount true; done";
        for script in [&mounts, namespaces] {
            loops.push(guest.spawn(&["sh", "-c", script])?);
        }
    }
    let backups = rounds_or(10);
    for backup in 0..backups {
        if backup % 2 == 0 {
            answered("HOT_BACKUP", &guest.vss().hot_backup(STEP)?, status::OK)?;
        }
        let freeze = guest.vss().freeze(&[], STEP)?;
        answered(&format!("FREEZE {backup}"), &freeze, status::OK)?;
        guest.wait_until("the one that stays stands still", STEP, || {
            Ok(guest.writers()?.iter().all(|it| it.in_write_us > 200_000))
        })?;
        answered(
            &format!("THAW {backup}"),
            &guest.vss().thaw(STEP)?,
            status::OK,
        )?;
    }
    println!("     {backups} of {backups} backups are good");
    guest.sh("touch /run/enough")?;
    for it in &loops {
        guest.wait(it, STEP)?;
    }
    guest.sh("rm /run/enough").map(drop)
}

/// A number that looks random, the same for the same seed.
struct Dice(u64);

impl Dice {
    /// From 0 to `sides`, without that.
    fn roll(&mut self, sides: u64) -> u64 {
        // xorshift64 of G. Marsaglia.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// The file systems that are alive, by minor number of their RAM disk, with whether they are writable.
fn alive(guest: &Guest, holders: &[Process]) -> Result<BTreeMap<u32, bool>> {
    let mut tables = vec!["/proc/self/mountinfo".to_owned()];
    tables.extend(
        holders
            .iter()
            .map(|it| format!("/proc/{}/mountinfo", it.pid)),
    );
    let mut alive = BTreeMap::new();
    for table in tables {
        for line in guest.read(&table)?.lines() {
            let (mount, superblock) = line.split_once(" - ").context("no options")?;
            let device = mount.split(' ').nth(2).and_then(|it| it.strip_prefix("1:"));
            if let Some(minor) = device {
                let options = superblock.split(' ').nth(2).unwrap_or_default();
                alive.insert(minor.parse()?, options.starts_with("rw"));
            }
        }
    }
    Ok(alive)
}

/// Those that the daemon's log says were frozen in the last backup.
fn frozen(log: &str) -> BTreeSet<u32> {
    let last = log
        .rsplit("FREEZE from the host")
        .next()
        .unwrap_or_default();
    let lines = last.lines().filter(|line| line.contains(" frozen, took "));
    let minor = |line: &str| {
        let numbers = line.split("(ext4, 1:").nth(1)?;
        numbers.split([')', ',']).next()?.parse().ok()
    };
    lines.filter_map(minor).collect()
}

fn any_change(guest: &Guest) -> Result<()> {
    guest.sh(
        "for n in 1 2 3 4; do mkfs.ext4 -q -F /dev/ram$n && mkdir -p /mnt/$n || exit 1; done",
    )?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let mut holders: Vec<Process> = Vec::new();
    let mut dice = Dice(seed().wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut done = Vec::new();
    for backup in 0..rounds_or(20) {
        for _ in 0..dice.roll(4) {
            let n = dice.roll(4) + 1;
            let here = dice.roll(2) == 0 || holders.is_empty();
            let place = match holders.get(dice.roll(holders.len().max(1) as u64) as usize) {
                Some(holder) if !here => format!("nsenter --mount=/proc/{}/ns/mnt ", holder.pid),
                _ => String::new(),
            };
            let script = match dice.roll(10) {
                0 | 1 => format!("{place}mount /dev/ram{n} /mnt/{n}"),
                2 => format!("{place}mount -o ro /dev/ram{n} /mnt/{n}"),
                3 | 4 => format!("{place}umount /mnt/{n}"),
                5 => format!("{place}umount -l /mnt/{n}"),
                6 => format!("{place}mount -o remount,rw /mnt/{n}"),
                7 => format!("{place}mount -o remount,ro /mnt/{n}"),
                8 if holders.len() < 3 => {
                    holders.push(in_a_namespace(guest, "true")?);
                    "a new namespace".to_owned()
                }
                9 if !holders.is_empty() => {
                    let holder = holders.remove(0);
                    guest.signal(&holder, 9)?;
                    guest.wait(&holder, STEP)?;
                    "an end of a namespace".to_owned()
                }
                _ => {
                    answered("HOT_BACKUP", &guest.vss().hot_backup(STEP)?, status::OK)?;
                    "HOT_BACKUP".to_owned()
                }
            };
            if script.contains("mount") {
                // Not everything is possible at any time, which is as good.
                guest.try_sh(&script)?;
            }
            done.push(script);
        }
        let alive = alive(guest, &holders)?;
        let writable = alive.iter().filter(|(_, writable)| **writable);
        let expected: BTreeSet<u32> = writable.map(|(minor, _)| *minor).collect();
        super::backup(guest)?;
        let mut seen = BTreeSet::new();
        let logged = guest.wait_until("all of them are in the log", STEP, || {
            let log = guest.output(&daemon)?;
            seen = frozen(&log);
            Ok(seen.is_superset(&expected))
        });
        logged.with_context(|| {
            format!("backup {backup} froze {seen:?} of {expected:?}, after {done:#?}")
        })?;
        // One that was made read-only since has nothing to hold back.
        ensure!(
            seen.iter().all(|minor| alive.contains_key(minor)),
            "backup {backup} froze {seen:?}, alive are {alive:?}, after {done:#?}"
        );
    }
    Ok(())
}

/// Two disks of the host: an ext4 on the first; on the second a volume of the device mapper with an xfs,
/// and in that an image with an ext4.
struct TwoDisks {
    disks: [Attached; 2],
    nodes: [String; 2],
}

/// Writers on the root, which is on no disk of the host, on the first disk, and twice on the second.
const ON_ROOT: &str = "/w";
const ON_FIRST: &str = "/mnt/a/w";
const ON_SECOND: [&str; 2] = ["/mnt/lv/w", "/mnt/image/w"];

impl TwoDisks {
    fn new(guest: &Guest) -> Result<Self> {
        let disks = [
            Attached::new(guest, 0, 0, 64, Image::default())?,
            Attached::new(guest, 1, 3, 512, Image::default())?,
        ];
        disks::load_driver(guest)?;
        let nodes = [disks[0].node(guest)?, disks[1].node(guest)?];
        let [first, second] = &nodes;
        guest.sh(&format!(
            "modprobe -a xfs loop dm_mod; mkdir -p /mnt/a /mnt/lv /mnt/image
             mkfs.ext4 -q -F {first} && mount {first} /mnt/a &&
             dmsetup create lv --noudevsync \
                 --table \"0 $(blockdev --getsz {second}) linear {second} 0\" &&
             {{ [ -e /dev/mapper/lv ] || dmsetup mknodes; }} &&
             mkfs.xfs -q -f /dev/mapper/lv && mount /dev/mapper/lv /mnt/lv &&
             truncate -s 64M /mnt/lv/image && mkfs.ext4 -q -F /mnt/lv/image &&
             mount -o loop /mnt/lv/image /mnt/image"
        ))?;
        for file in [ON_ROOT, ON_FIRST].iter().chain(&ON_SECOND) {
            guest.writer_start(file)?;
        }
        Ok(TwoDisks { disks, nodes })
    }

    /// How a FREEZE names the second one.
    fn second(&self) -> Lun {
        self.disks[1].in_backup()
    }
}

/// A disk that no guest has.
fn strange() -> Lun {
    Lun::scsi(Guid::new(0x7374_7261, 0, 0, [0; 8]), 0, 0, 9)
}

/// All of these writers stood still, the others went on.
fn still_are(seen: &Seen, files: &[&str]) -> Result<()> {
    let mut still: Vec<&str> = seen.still.iter().map(String::as_str).collect();
    let mut files = files.to_vec();
    still.sort_unstable();
    files.sort_unstable();
    equal("who stood still", still, files)?;
    let told = (seen.freeze, seen.thaw, seen.stuck.len());
    equal(
        "the answers, and who is stuck",
        told,
        (status::OK, Some(status::OK), 0),
    )
}

fn all_files() -> Vec<&'static str> {
    [&[ON_ROOT, ON_FIRST], &ON_SECOND[..]].concat()
}

fn which_disks(guest: &Guest) -> Result<()> {
    let two = TwoDisks::new(guest)?;
    let [first, second] = &two.nodes;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    // By default all stands still, whichever disks it is.
    let seen = observe_backup_of(guest, &[two.second(), strange()])?;
    still_are(&seen, &all_files())?;
    let on_second = format!("in the backup: {second} with ");
    says(guest, &daemon, &["a backup of 2 disks"])?;
    says(
        guest,
        &daemon,
        &[&on_second, "/mnt/lv (xfs", "/mnt/image (ext4"],
    )?;
    says(
        guest,
        &daemon,
        &["in the backup: ", ":0:0:9", "no disk that is known"],
    )?;
    let log = logged(guest, &daemon)?;
    let on_first = format!("in the backup: {first}");
    ensure!(!log.contains(&on_first), "{first} is in no backup:\n{log}");

    let list = guest.sh(&format!("{OURS} list --json"))?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    for (node, on, in_last) in [(first, 1, false), (second, 2, true)] {
        let rows = list["disks"].as_array().context("no disks")?;
        let name = node.trim_start_matches("/dev/");
        let row = rows
            .iter()
            .find(|it| it["name"] == name)
            .context("no row")?;
        equal(node, &row["in_last_backup"], &serde_json::json!(in_last))?;
        let found = row["file_systems"].as_array().map(Vec::len);
        equal("file systems there", found, Some(on))?;
    }
    let text = guest.sh(&format!("{OURS} list"))?;
    let line = text.lines().find(|it| it.contains("in the last backup"));
    let line = line.context("list should say which disk was in the last backup")?;
    ensure!(line.contains("/mnt/lv (xfs"), "and what is on it: {line}");
    let place = ":0:0:3";
    ensure!(line.contains(place), "and where the host has it: {line}");
    let status = guest.sh(&format!("{OURS} status"))?;
    ensure!(
        status.contains(place),
        "status should name the disks:\n{status}"
    );

    // Type and flags as a host sends them.
    let about =
        "[ $1 != freeze ] || printf '%s|%s' \"$HV_VSS_BACKUP_TYPE\" \"$HV_VSS_DISKS\" >/run/about";
    hooks::hook(guest, "10-about", about)?;
    for (backup_type, flags, told, words) in [
        (1, 0, "full", "a full backup of 1 disk, to be"),
        (
            2,
            1,
            "copy",
            "a copy backup of 1 disk, with auto-recovery, to be",
        ),
        (
            7,
            0x12,
            "7",
            "a backup of type 7 of 1 disk, shared disks among them, flags 0x10, to be",
        ),
    ] {
        let body = FreezeBody::new(backup_type, flags, &[two.second()]).context("one fits")?;
        let freeze = guest.vss().op(Op::FREEZE, body.as_bytes(), STEP)?;
        answered("FREEZE", &freeze, status::OK)?;
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
        says(guest, &daemon, &[words])?;
        equal(
            "what a hook is told",
            guest.read("/run/about")?,
            format!("{told}|{second}"),
        )?;
    }
    guest.wait_until("the hook is let go", STEP, || {
        Ok(guest.try_sh(&format!("test ! -e {}", hooks::OWED))?.status == Some(0))
    })?;
    guest.sh("rm /run/about")?;
    hooks::end(guest)
}

fn torn(guest: &Guest) -> Result<()> {
    let disks = [
        Attached::new(guest, 0, 0, 64, Image::default())?,
        Attached::new(guest, 1, 3, 64, Image::default())?,
    ];
    disks::load_driver(guest)?;
    let [first, second] = [disks[0].node(guest)?, disks[1].node(guest)?];
    guest.sh(&format!(
        "modprobe dm_mod; mkdir -p /mnt/lv; half=$(blockdev --getsz {first})
         printf '0 %s linear {first} 0\\n%s %s linear {second} 0\\n' $half $half $half |
             dmsetup create lv --noudevsync &&
         {{ [ -e /dev/mapper/lv ] || dmsetup mknodes; }} &&
         mkfs.ext4 -q -F /dev/mapper/lv && mount /dev/mapper/lv /mnt/lv"
    ))?;
    guest.writer_start("/mnt/lv/w")?;
    let [one, other] = disks.each_ref().map(Attached::in_backup);
    let told = format!("is on {second} as well, which the host does not back up");
    for (configuration, expected) in [("", status::OK), ("strict = true", status::FAIL)] {
        let daemon = start_with(guest, configuration)?;
        let seen = observe_backup_of(guest, &[one])?;
        equal("half of it", seen.freeze, expected)?;
        says(guest, &daemon, &["/mnt/lv (ext4", &told])?;
        let before = logged(guest, &daemon)?.matches(&told).count();
        for all in [vec![one, other], vec![]] {
            let seen = observe_backup_of(guest, &all)?;
            let good = (seen.freeze, seen.thaw, seen.still.len());
            equal("all of it", good, (status::OK, Some(status::OK), 1))?;
        }
        let after = logged(guest, &daemon)?.matches(&told).count();
        equal("how often it is named", after, before)?;
        stop(guest, guest.module(), &daemon)?;
    }
    Ok(())
}

fn listed_disks_only(guest: &Guest) -> Result<()> {
    let two = TwoDisks::new(guest)?;
    let daemon = start_with(guest, "listed_disks_only = true\nstrict = true")?;
    let seen = observe_backup_of(guest, &[two.second()])?;
    still_are(&seen, &ON_SECOND)?;
    let elsewhere = "left out: on no disk of this backup";
    says(guest, &daemon, &["/mnt/a (ext4", elsewhere])?;
    says(guest, &daemon, &["/ (ext4", elsewhere])?;
    let seen = observe_backup_of(guest, &[two.disks[0].in_backup()])?;
    still_are(&seen, &[ON_FIRST])?;
    // Another backup, though the host has said no THAW of the last: what is frozen is not what it asks for.
    let vss = guest.vss();
    let [first, _] = two.disks.each_ref().map(Attached::in_backup);
    for disk in [two.second(), first] {
        answered("FREEZE", &vss.freeze(&[disk], STEP)?, status::OK)?;
    }
    guest.wait_until("the first disk alone stands still", STEP, || {
        let writers = guest.writers()?;
        let mut writers = writers.iter();
        Ok(writers.all(|it| (it.path == ON_FIRST) == is_frozen(guest, it)))
    })?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let both = two.disks.each_ref().map(Attached::in_backup);
    let seen = observe_backup_of(guest, &both)?;
    still_are(&seen, &[&[ON_FIRST], &ON_SECOND[..]].concat())?;
    // What might be in the backup is never left out.
    let seen = observe_backup_of(guest, &[two.second(), strange()])?;
    still_are(&seen, &all_files())?;
    says(
        guest,
        &daemon,
        &["no disk that is known here: the backup is for all"],
    )?;
    let seen = observe_backup_of(guest, &[])?;
    still_are(&seen, &all_files())?;
    says(guest, &daemon, &["nobody says which disks", "for all"])?;
    stop(guest, guest.module(), &daemon)?;

    // The stock module passes no list on.
    load(guest, Module::Stock, &[])?;
    let daemon = guest.start_daemon_with("listed_disks_only = true")?;
    wait_for_daemon(guest)?;
    let seen = observe_backup_of(guest, &[two.second()])?;
    still_are(&seen, &all_files())?;
    says(guest, &daemon, &["nobody says which disks", "for all"])?;
    stop(guest, Module::Stock, &daemon)
}

fn raw_writer(guest: &Guest) -> Result<()> {
    let disks = [
        Attached::new(guest, 0, 0, 64, Image::default())?,
        // The writer is not at its end before the case is.
        Attached::new(guest, 1, 0, 1024, Image::default())?,
    ];
    disks::load_driver(guest)?;
    let [first, second] = [disks[0].node(guest)?, disks[1].node(guest)?];
    guest.sh(&format!(
        "mkdir -p /mnt/a && mkfs.ext4 -q -F {first} && mount {first} /mnt/a"
    ))?;
    guest.writer_start("/mnt/a/w")?;
    let of = format!("of={second}");
    let write = ["dd", "if=/dev/zero", &of, "bs=4k", "oflag=direct"];
    let writer = guest.spawn(&write)?;
    let [on_first, on_second] = disks.each_ref().map(Attached::in_backup);
    let says_written =
        |log: &str, node: &str| log.contains(&format!("was written to {node} while"));

    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe_backup_of(guest, &[on_first])?;
    equal("a backup of the other disk", &seen, &good(&["/mnt/a/w"]))?;
    let log = logged(guest, &daemon)?;
    ensure!(!log.contains("was written to"), "nothing was:\n{log}");
    let check = guest.try_sh(&format!("{OURS} check"))?;
    let words = format!("dd (process {}) has {second} open for writing", writer.pid);
    ensure!(
        check.status == Some(7) && check.out.contains(&words),
        "check should say so beforehand: {check:?}"
    );
    // By a node that takes SCSI commands, which nobody counts.
    let name = second.trim_start_matches("/dev/");
    let place = guest.sh(&format!("ls /sys/block/{name}/device/bsg"))?;
    let node = format!("/dev/bsg/{}", place.trim());
    let commander = guest.spawn(&["sh", "-c", &format!("exec sleep 1000 3<>{node}")])?;
    let words = format!(
        "sleep (process {}) has {node} open for writing",
        commander.pid
    );
    guest.wait_until("check says so of that, too", STEP, || {
        let check = guest.try_sh(&format!("{OURS} check"))?;
        Ok(check.out.contains(&words))
    })?;
    guest.signal(&commander, 9)?;
    guest.wait(&commander, STEP)?;
    let seen = observe_backup_of(guest, &[on_first, on_second])?;
    equal("a backup of both disks", &seen, &good(&["/mnt/a/w"]))?;
    let log = logged_all(guest, &daemon, 2)?;
    ensure!(says_written(&log, &second), "to {second}:\n{log}");
    ensure!(!says_written(&log, &first), "not to {first}:\n{log}");
    stop(guest, guest.module(), &daemon)?;

    let daemon = start_with(guest, "strict = true")?;
    let seen = observe_backup_of(guest, &[on_first, on_second])?;
    let told = (seen.freeze, seen.thaw);
    equal(
        "FREEZE and THAW, strict",
        told,
        (status::OK, Some(status::FAIL)),
    )?;
    guest.signal(&writer, 9)?;
    guest.wait(&writer, STEP)?;
    let seen = observe_backup_of(guest, &[on_first, on_second])?;
    equal("strict, without a writer", &seen, &good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)?;

    // What goes on and may be anywhere is no reason not to look.
    let server = make_nbd(guest, "rw")?;
    let daemon = start_with(guest, "strict = true\nexclude.paths = [\"/mnt/nbd\"]")?;
    let seen = observe_backup_of(guest, &[on_first, on_second])?;
    equal("beside what may be anywhere", &seen, &good(&["/mnt/a/w"]))?;
    let writer = guest.spawn(&write)?;
    let seen = observe_backup_of(guest, &[on_first, on_second])?;
    equal(
        "a writer beside what may be anywhere",
        (seen.freeze, seen.thaw),
        (status::OK, Some(status::FAIL)),
    )?;
    guest.signal(&writer, 9)?;
    guest.wait(&writer, STEP)?;
    let log = logged_all(guest, &daemon, 2)?;
    let may_be_its = "or perhaps by /mnt/nbd (ext4, ";
    ensure!(
        says_written(&log, &second) && log.contains(may_be_its),
        "it should say whose that may be:\n{log}"
    );
    stop(guest, guest.module(), &daemon)?;
    end_nbd(guest, &server)?;

    // The stock module does not say which disks: all of the host's are looked at.
    load(guest, Module::Stock, &[])?;
    let daemon = guest.start_daemon_with("strict = true")?;
    wait_for_daemon(guest)?;
    equal("the stock module", &observe(guest)?, &good(&["/mnt/a/w"]))?;
    let writer = guest.spawn(&write)?;
    let seen = observe(guest)?;
    let told = (seen.freeze, seen.thaw);
    equal(
        "with a writer again",
        told,
        (status::OK, Some(status::FAIL)),
    )?;
    // What stands still whatever is written is no sign that nothing was.
    let iostats = format!(
        "/sys/block/{}/queue/iostats",
        second.trim_start_matches("/dev/")
    );
    guest.sh(&format!("echo 0 >{iostats}"))?;
    observe(guest)?;
    let check = guest.try_sh(&format!("{OURS} check"))?.out;
    guest.sh(&format!("echo 1 >{iostats}"))?;
    let untold = format!("{second} (its counters are off: ");
    says(guest, &daemon, &["not seen", &untold])?;
    let untold = format!("{second}: its counters are off");
    ensure!(check.contains(&untold), "check should say so:\n{check}");
    guest.signal(&writer, 9)?;
    guest.wait(&writer, STEP)?;
    stop(guest, Module::Stock, &daemon)
}

/// The disk has two partitions, one to swap to.
fn raw_writer_beside_swap(guest: &Guest) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let disks = [
        Attached::new(guest, 0, 0, 64, Image::default())?,
        Attached::new(guest, 1, 0, 1024, Image::default())?,
    ];
    disks::load_driver(guest)?;
    let [first, second] = [disks[0].node(guest)?, disks[1].node(guest)?];
    // A table of DOS: kind, first sector, sectors.
    let entry = |kind: u8, at: u64, len: u64| {
        let numbers = [(at / 512) as u32, (len / 512) as u32];
        let tail = numbers.iter().flat_map(|it| it.to_le_bytes());
        let bytes = [0, 0, 0, 0, kind, 0, 0, 0].into_iter().chain(tail);
        bytes.map(|it| format!("\\{it:03o}")).collect::<String>()
    };
    let table = [entry(0x82, MIB, 63 * MIB), entry(0x83, 64 * MIB, 960 * MIB)];
    guest.sh(&format!(
        "{{ printf '{}{}'; head -c 32 /dev/zero; printf '\\125\\252'; }} |
             dd of={second} bs=1 seek=446 2>/dev/null && blockdev --rereadpt {second}
         for part in 1 2; do [ -b {second}$part ] || exit 1; done
         mkswap {second}1 >/dev/null && swapon {second}1
         mkdir -p /mnt/a && mkfs.ext4 -q -F {first} && mount {first} /mnt/a",
        table[0], table[1]
    ))?;
    guest.writer_start("/mnt/a/w")?;
    let on_both = disks.each_ref().map(Attached::in_backup);
    let check = |what: &str, config: &str, node: &str| -> Result<()> {
        let daemon = start_with(guest, &format!("strict = true\n{config}"))?;
        let seen = observe_backup_of(guest, &on_both)?;
        equal(what, &seen, &good(&["/mnt/a/w"]))?;
        let of = format!("of={node}");
        let writer = guest.spawn(&["dd", "if=/dev/zero", &of, "bs=4k", "oflag=direct"])?;
        let seen = observe_backup_of(guest, &on_both)?;
        let told = (seen.freeze, seen.thaw);
        let what = format!("{what}, with a writer");
        equal(&what, told, (status::OK, Some(status::FAIL)))?;
        guest.signal(&writer, 9)?;
        guest.wait(&writer, STEP)?;
        stop(guest, guest.module(), &daemon)
    };
    let seen = check("swap on a partition", "", &format!("{second}2"));
    guest.sh(&format!("swapoff {second}1"))?;
    seen?;
    // It is excluded, and is written to at any time.
    guest.sh(&format!(
        "modprobe vfat; mkdir -p /mnt/esp && mkfs.vfat {second}1 >/dev/null && mount {second}1 /mnt/esp"
    ))?;
    let rule = "exclude.types = [\"vfat\"]";
    let busy = "while dd if=/dev/zero of=/mnt/esp/busy bs=4M count=8 oflag=direct conv=notrunc 2>/dev/null; do :; done";
    let while_busy = |what: &str, node: &str| -> Result<()> {
        let writer = guest.spawn(&["sh", "-c", busy])?;
        let seen = check(what, rule, node);
        guest.signal(&writer, 9)?;
        guest.wait(&writer, STEP)?;
        // The one that it has begun.
        guest.sh("while ! umount /mnt/esp; do sleep 0.1; done")?;
        seen
    };
    while_busy("an excluded partition", &format!("{second}2"))?;
    // A volume on the disk itself: of what is written there the disk has counted a part at any time.
    guest.sh(&format!(
        "modprobe dm_mod && dmsetup create whole --noudevsync -u LVM-whole --table \"0 129024 linear {second} 2048\"
         [ -e /dev/mapper/whole ] || dmsetup mknodes
         mount -t vfat /dev/mapper/whole /mnt/esp"
    ))?;
    while_busy("an excluded volume", &format!("{second}2"))?;
    guest.sh("dmsetup remove whole")?;
    // Its volumes count what is written to each.
    guest.sh(&format!(
        "modprobe dm_mod
         make() {{ dmsetup create $1 --noudevsync -u LVM-$1 --table \"0 $2 linear {second}2 $3\"
             [ -e /dev/mapper/$1 ] || dmsetup mknodes; }}
         make pages 131072 0 && make spare $(($(blockdev --getsz {second}2) - 131072)) 131072 &&
         mkswap /dev/mapper/pages >/dev/null && swapon /dev/mapper/pages"
    ))?;
    let seen = check("swap on a volume", "", "/dev/mapper/spare");
    guest.sh("swapoff /dev/mapper/pages && dmsetup remove pages && dmsetup remove spare")?;
    seen
}

fn raw_writer_on_layers(guest: &Guest) -> Result<()> {
    let attached = |lun, mib| Attached::new(guest, lun / 2, lun, mib, Image::default());
    // The writer is not at its end before the case is.
    let disks = [attached(0, 1024)?, attached(1, 80)?, attached(2, 80)?];
    disks::load_driver(guest)?;
    let nodes = [
        disks[0].node(guest)?,
        disks[1].node(guest)?,
        disks[2].node(guest)?,
    ];
    let [layered, first, second] = &nodes;
    guest.sh(&format!(
        "modprobe dm_mod; mkdir -p /mnt/a
         make() {{ dmsetup create $1 --noudevsync --table \"0 $2 linear $3 $4\"
             [ -e /dev/mapper/$1 ] || dmsetup mknodes; }}
         make under $(blockdev --getsz {layered}) {layered} 0 &&
         make used 131072 /dev/mapper/under 0 &&
         make spare $(($(blockdev --getsz {layered}) - 131072)) /dev/mapper/under 131072 &&
         mkfs.ext4 -q -F /dev/mapper/used && mount /dev/mapper/used /mnt/a"
    ))?;
    guest.writer_start("/mnt/a/w")?;
    let all = [disks[0].in_backup()];
    let write = [
        "dd",
        "if=/dev/zero",
        "of=/dev/mapper/spare",
        "bs=4k",
        "oflag=direct",
    ];
    let spare = guest.sh("dmsetup info -c --noheadings -o blkdevname spare")?;
    let writer = guest.spawn(&write)?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let seen = observe_backup_of(guest, &all)?;
    equal("the backup", &seen, &good(&["/mnt/a/w"]))?;
    let words = format!("was written to /dev/{} while", spare.trim());
    let log = logged(guest, &daemon)?;
    ensure!(log.contains(&words), "no {words:?}:\n{log}");
    equal(
        "what was written to",
        log.matches("was written to").count(),
        1,
    )?;
    stop(guest, guest.module(), &daemon)?;

    let daemon = start_with(guest, "strict = true")?;
    let seen = observe_backup_of(guest, &all)?;
    let told = (seen.freeze, seen.thaw);
    equal("strict", told, (status::OK, Some(status::FAIL)))?;
    guest.signal(&writer, 9)?;
    guest.wait(&writer, STEP)?;
    let seen = observe_backup_of(guest, &all)?;
    equal("strict, without a writer", &seen, &good(&["/mnt/a/w"]))?;
    stop(guest, guest.module(), &daemon)?;

    // A RAID whose halves differ where there are no files, and are made alike in the window.
    let halves = [first, second].map(|it| it.trim_start_matches("/dev/"));
    let array = super::broken::raid(guest, halves)?;
    guest.sh(&format!(
        "dd if=/dev/urandom of={second} bs=1M seek=60 count=2 oflag=direct 2>/dev/null"
    ))?;
    let daemon = start(guest, guest.module(), Daemon::Ours)?;
    let both = [disks[1].in_backup(), disks[2].in_backup()];
    let written = || {
        guest.sh(&format!(
            "awk '{{ print $7 }}' /sys/block/{}/stat",
            halves[1]
        ))
    };
    answered("FREEZE", &guest.vss().freeze(&both, STEP)?, status::OK)?;
    let before = written()?;
    guest.sh(&format!(
        "cd /sys/block/{array}/md && echo 200000 >sync_speed_max && echo repair >sync_action"
    ))?;
    guest.wait_until("md has written to the second half", STEP, || {
        Ok(written()? != before)
    })?;
    answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;
    let log = logged(guest, &daemon)?;
    ensure!(!log.contains("was written to"), "nobody else did:\n{log}");
    stop(guest, guest.module(), &daemon)?;
    guest.writers_stop()?;
    guest.sh(&format!("echo idle >/sys/block/{array}/md/sync_action"))?;
    super::broken::no_raid(guest, &array)?;
    guest
        .sh("umount /mnt/a && dmsetup remove spare && dmsetup remove used && dmsetup remove under")
        .map(drop)
}
