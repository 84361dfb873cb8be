// SPDX-License-Identifier: GPL-2.0-only

//! The loads: which file systems the guest has, and what is dirty in them when a backup begins.
//!
//! Setting a load up is all done by visible commands in the guest. Does not know what is measured.

use crate::stack::Stack;
use anyhow::{ensure, Context, Result};
use e2e::guest::{Guest, Process, STEP};
use hyperv_sim::storage::{Disk, Image};
use hyperv_sim::Guid;
use std::num::NonZeroU64;
use std::time::Duration;

/// What a load has the host ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// FREEZE, and THAW as soon as it is answered.
    Freeze(Disks),
    /// HOT_BACKUP, which freezes nothing: the way from host to daemon and back.
    HotBackup,
    /// Nothing: what the daemon costs while it waits.
    Idle,
}

/// The file systems beside the root, which is a clean ext4 on a RAM disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disks {
    /// How many: ext4, xfs and btrfs in turn.
    pub count: u32,
    /// What each write to their devices takes, in milliseconds.
    pub write_delay_ms: u32,
    /// What is dirty in each of them when FREEZE is sent, in MiB.
    pub dirty_mib: u32,
    /// Bind mounts, spread over them.
    pub binds: u32,
    /// What they are on.
    pub on: On,
    /// What writes to them all the time.
    pub writers: Writers,
}

/// What the file systems are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum On {
    /// Each on a RAM disk of its own: ext4, xfs and btrfs in turn.
    #[default]
    RamDisks,
    /// The same, all of them ext4.
    RamDisksExt4,
    /// All on one SCSI disk of the host, which takes so many bytes a second.
    OneDisk(u64),
}

/// What writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writers {
    /// A small writer on each.
    #[default]
    Small,
    /// The same, with an fsync after each write.
    Fsync,
    /// Small ones, and on the first file system one that dirties as much as it can.
    Dirtier,
}

/// What most loads have of each.
const NONE: Disks = Disks {
    count: 0,
    write_delay_ms: 0,
    dirty_mib: 0,
    binds: 0,
    on: On::RamDisks,
    writers: Writers::Small,
};

/// One load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// As `--load` and the results name it.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    /// What is done.
    pub work: Work,
    /// The guest's memory in MiB. RAM disks take what is written to them.
    pub memory_mib: u32,
    /// Rounds for each one that is asked for: what takes some milliseconds differs much from one to the
    /// next (the medians of ten gave ratios from 0.93 to 1.16).
    pub repeat: u32,
    /// Who takes turns.
    pub stacks: &'static [Stack],
}

impl Load {
    /// SCSI controllers that the guest needs.
    pub fn scsi_controllers(&self) -> u8 {
        match self.work {
            Work::Freeze(disks) => u8::from(matches!(disks.on, On::OneDisk(_))),
            Work::HotBackup | Work::Idle => 0,
        }
    }
}

const BOTH: &[Stack] = &[Stack::Ours, Stack::Peer];
/// Where nothing is dirty, steps count, and the guard has some.
const ALL: &[Stack] = &[Stack::Ours, Stack::Guarded, Stack::Peer];

/// All loads, in the order in which they are run.
pub const LOADS: [Load; 10] = [
    Load {
        name: "1-clean",
        about: "one clean ext4 file system, the root",
        work: Work::Freeze(NONE),
        memory_mib: 1280,
        repeat: 3,
        stacks: ALL,
    },
    Load {
        name: "8-dirty",
        about: "8 file systems, 20 ms per write, 32 MiB dirty in each",
        work: Work::Freeze(Disks {
            count: 8,
            write_delay_ms: 20,
            dirty_mib: 32,
            ..NONE
        }),
        memory_mib: 3072,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "32-dirty",
        about: "32 file systems, 20 ms per write, 32 MiB dirty in each",
        work: Work::Freeze(Disks {
            count: 32,
            write_delay_ms: 20,
            dirty_mib: 32,
            ..NONE
        }),
        memory_mib: 3072,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "256-clean",
        about: "256 clean ext4 file systems",
        work: Work::Freeze(Disks {
            count: 256,
            on: On::RamDisksExt4,
            ..NONE
        }),
        memory_mib: 3072,
        repeat: 1,
        stacks: ALL,
    },
    Load {
        name: "2000-binds",
        about: "16 clean file systems and 2000 bind mounts",
        work: Work::Freeze(Disks {
            count: 16,
            binds: 2000,
            ..NONE
        }),
        memory_mib: 3072,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "shared-disk",
        about: "4 file systems on one disk that takes 8 MiB/s, 6 MiB dirty in each",
        work: Work::Freeze(Disks {
            count: 4,
            dirty_mib: 6,
            on: On::OneDisk(8 << 20),
            ..NONE
        }),
        memory_mib: 1280,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "fsync",
        about: "4 file systems, 5 ms per write, 16 MiB dirty in each, writers that fsync",
        work: Work::Freeze(Disks {
            count: 4,
            write_delay_ms: 5,
            dirty_mib: 16,
            writers: Writers::Fsync,
            ..NONE
        }),
        memory_mib: 1280,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "dirtier",
        about: "4 file systems, 5 ms per write, 16 MiB dirty in each, one dirtied all the time",
        work: Work::Freeze(Disks {
            count: 4,
            write_delay_ms: 5,
            dirty_mib: 16,
            writers: Writers::Dirtier,
            ..NONE
        }),
        memory_mib: 1280,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "hot-backup",
        about: "HOT_BACKUP, which freezes nothing",
        work: Work::HotBackup,
        memory_mib: 1280,
        repeat: 1,
        stacks: BOTH,
    },
    Load {
        name: "idle",
        about: "a daemon that waits: its memory, and its system calls in a minute",
        work: Work::Idle,
        memory_mib: 1280,
        repeat: 1,
        stacks: ALL,
    },
];

/// The one disk is this large, and each file system on it has an equal part: xfs wants 300 MiB.
const PART_MIB: u32 = 320;

impl Disks {
    /// The type of file system number `n`.
    fn kind(&self, n: u32) -> &'static str {
        match self.on {
            On::RamDisksExt4 => "ext4",
            On::RamDisks | On::OneDisk(_) => ["btrfs", "ext4", "xfs"][n as usize % 3],
        }
    }

    /// Commands that set `device` to what file system `n` is on.
    fn device(&self, n: u32) -> String {
        match self.on {
            On::RamDisks | On::RamDisksExt4 => format!(
                "[ -b /dev/ram{n} ] || mknod /dev/ram{n} b 1 {n}
                 device=/dev/ram{n}\n"
            ),
            On::OneDisk(_) => {
                let (from, len) = ((n - 1) * PART_MIB * 2048, PART_MIB * 2048);
                format!(
                    "dmsetup --noudevsync --noudevrules create part{n} \\
                         --table '0 {len} linear /dev/sda {from}' || exit 1
                     device=/dev/dm-$(dmsetup info --columns --noheadings -o minor part{n})\n"
                )
            }
        }
    }

    /// The disk that all are on, without its limit.
    fn attach(&self, guest: &Guest) -> Result<Option<Disk>> {
        let On::OneDisk(_) = self.on else {
            return Ok(None);
        };
        let len = u64::from(PART_MIB * self.count) << 20;
        let id = Guid::new(0x6265_6e63, 0, 0, [0; 8]);
        let disk = Disk::in_memory(id, len, Image::default())?;
        let controller = guest.scsi_controllers().next();
        controller
            .context("the guest has no SCSI controller")?
            .attach(0, &disk);
        guest.sh("modprobe sd_mod && modprobe hv_storvsc")?;
        guest.wait_until("the guest has found the disk", STEP * 2, || {
            Ok(guest.try_sh("[ -b /dev/sda ]")?.status == Some(0))
        })?;
        Ok(Some(disk))
    }
}

/// Makes the file system whose files a round rewrites, mounted on `/mnt/<n>`.
///
/// It is made and filled on the bare RAM disk, which is fast, and then mounted through the delay.
/// Reads are delayed by 50 ms, and there are none but one for each btrfs when it is thawed: with no
/// delay of 50 ms or more dm-delay has a thread for each device that looks at its queue every
/// millisecond as long as a write waits (`delay_ctr`, `flush_worker_fn`), and several of those take a
/// quarter of an emulated processor. No disk does that. The guest has no udev, for which dmsetup would
/// wait, and which would name the device.
fn make(n: u32, disks: &Disks) -> String {
    let Disks {
        write_delay_ms,
        dirty_mib,
        ..
    } = disks;
    let kind = disks.kind(n);
    let mkfs = match kind {
        // Blocks as on a disk of real size: for one this small mkfs would choose 1 KiB.
        "ext4" => "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=1,lazy_journal_init=1",
        // A log of the usual 64 MiB is written in full, and 32 of them would not leave enough memory.
        "xfs" => "mkfs.xfs -q -f --unsupported -l size=16m",
        _ => "mkfs.btrfs -q -f",
    };
    // Files are overwritten in place, as on the others: a new place for each write would take ever
    // more memory, and the usual checksum, for which processors have an instruction, takes an
    // emulated one 0.3 s for 32 MiB. Tables of inodes that are zeroed in the background would be written while
    // it is measured, and on RAM disks take the memory of 256 of them.
    let options = match kind {
        "btrfs" => "-o nodatacow",
        "ext4" => "-o noinit_itable",
        _ => "",
    };
    let mut script = disks.device(n);
    script.push_str(&format!("mkdir -p /mnt/{n} && {mkfs} $device || exit 1\n"));
    if *dirty_mib > 0 {
        script.push_str(&format!(
            "mount -t {kind} {options} $device /mnt/{n} && {} && umount /mnt/{n} || exit 1\n",
            rewrite(n, *dirty_mib)
        ));
    }
    if *write_delay_ms > 0 {
        script.push_str(&format!(
            "size=$(cat /sys/class/block/${{device#/dev/}}/size)
             dmsetup --noudevsync --noudevrules create slow{n} --table \"0 $size delay $device 0 50 \\
                 $device 0 {write_delay_ms}\" || exit 1
             device=/dev/dm-$(dmsetup info --columns --noheadings -o minor slow{n})\n"
        ));
    }
    script.push_str(&format!("mount -t {kind} {options} $device /mnt/{n}"));
    script
}

/// The command that makes `mib` dirty on file system `n`.
fn rewrite(n: u32, mib: u32) -> String {
    format!("dd if=/dev/zero of=/mnt/{n}/data bs=1M count={mib} conv=notrunc 2>/dev/null")
}

/// How often small writers write, all taken together: once in so many microseconds on average. With
/// one writer for each of 33 file systems that write every millisecond, an emulated processor would
/// do little else.
const WRITE_EVERY: Duration = Duration::from_millis(1);

/// How often each of so many small writers writes.
pub fn every(writers: usize) -> Duration {
    WRITE_EVERY * writers as u32
}

impl Disks {
    /// Starts a small writer on each file system, whatever the load has.
    pub fn start_small_writers(&self, guest: &Guest) -> Result<()> {
        let writers = Writers::Small;
        Disks { writers, ..*self }.start_writers(guest).map(drop)
    }

    /// Starts the writers. Each writes the less often the more there are. What they are is to be given
    /// to [`Disks::stop_writers`].
    pub fn start_writers(&self, guest: &Guest) -> Result<Option<Process>> {
        let folders = self.folders();
        let every_us = every(folders.len()).as_micros() as u64;
        for folder in folders {
            let file = format!("{}/writer", folder.trim_end_matches('/'));
            match self.writers {
                Writers::Fsync => guest.syncing_writer_start(&file, every_us)?,
                Writers::Small | Writers::Dirtier => guest.writer_start_every(&file, every_us)?,
            }
        }
        if self.writers != Writers::Dirtier {
            return Ok(None);
        }
        let line = format!("while :; do {}; done", rewrite(1, self.dirty_mib));
        Ok(Some(guest.spawn(&["sh", "-c", &line])?))
    }

    /// Ends them.
    pub fn stop_writers(&self, guest: &Guest, dirtier: Option<Process>) -> Result<()> {
        guest.writers_stop()?;
        if let Some(dirtier) = dirtier {
            guest.signal(&dirtier, 9)?;
            guest.wait(&dirtier, STEP * 2)?;
        }
        Ok(())
    }

    /// Where each file system is mounted, the root as well.
    pub fn folders(&self) -> Vec<String> {
        let others = (1..=self.count).map(|n| format!("/mnt/{n}"));
        std::iter::once("/".to_string()).chain(others).collect()
    }

    /// Makes and mounts everything.
    pub fn set_up(&self, guest: &Guest) -> Result<()> {
        if self.count > 0 {
            // Into the kernel before the first mkfs, so that its time is seen to be theirs.
            guest.sh("modprobe xfs && modprobe btrfs")?;
        }
        let disk = self.attach(guest)?;
        for n in 1..=self.count {
            guest.sh(&make(n, self))?;
            println!(
                "bench: file system {n} of {} ({}) is there",
                self.count,
                self.kind(n)
            );
        }
        if let (Some(disk), On::OneDisk(bandwidth)) = (disk, self.on) {
            disk.set_bandwidth(NonZeroU64::new(bandwidth));
        }
        if self.dirty_mib > 0 {
            // What is dirty stays so until somebody asks for it to be written.
            guest.sh("cd /proc/sys/vm && echo 0 >dirty_writeback_centisecs &&
                      echo 360000 >dirty_expire_centisecs &&
                      echo 6442450944 >dirty_bytes && echo 4294967296 >dirty_background_bytes")?;
        }
        for n in 1..=self.count {
            // Each file system gets its share, the last one the rest.
            let from = self.binds * (n - 1) / self.count + 1;
            let to = self.binds * n / self.count;
            if from <= to {
                guest.sh(&format!(
                    "mkdir -p /binds && cd /binds && mkdir $(seq {from} {to}) &&
                     for i in $(seq {from} {to}); do
                         busybox mount -o bind /mnt/{n} /binds/$i || exit 1
                     done"
                ))?;
            }
        }
        Ok(())
    }

    /// Brings the load to where a round starts: nothing dirty but what shall be. Returns how much of
    /// the guest's memory is dirty, in KiB.
    pub fn prepare(&self, guest: &Guest) -> Result<u64> {
        guest.sh("sync")?;
        if self.dirty_mib > 0 {
            for n in 1..=self.count {
                guest.sh(&rewrite(n, self.dirty_mib))?;
            }
        }
        let dirty = guest.dirty_kib()?;
        let wanted = u64::from(self.count) * u64::from(self.dirty_mib) * 1024;
        ensure!(
            dirty >= wanted,
            "{wanted} KiB should be dirty in the guest, {dirty} KiB are: some was written early"
        );
        Ok(dirty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_system_has_a_folder_and_so_has_the_root() {
        let disks = Disks {
            count: 2,
            ..Disks::default()
        };
        assert_eq!(disks.folders(), ["/", "/mnt/1", "/mnt/2"]);
    }
}
