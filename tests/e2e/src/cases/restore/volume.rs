// SPDX-License-Identifier: GPL-2.0-only

//! What is backed up: a file system, and what it stands on.

use anyhow::{ensure, Result};
use e2e::guest::Guest;
use hyperv_sim::storage::{Change, Entry, Image};

/// What a file system is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Ext4,
    Xfs,
    Btrfs,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Format::Ext4 => "ext4",
            Format::Xfs => "xfs",
            Format::Btrfs => "btrfs",
        }
    }

    /// MiB of its disk.
    pub(super) fn size(self) -> u64 {
        match self {
            Format::Ext4 => 64,
            // The least that mkfs.xfs takes is 300.
            Format::Xfs => 320,
            Format::Btrfs => 160,
        }
    }

    pub(super) fn make(self) -> &'static str {
        match self {
            Format::Ext4 => "mkfs.ext4 -q -F",
            Format::Xfs => "mkfs.xfs -q -f",
            Format::Btrfs => "mkfs.btrfs -q -f",
        }
    }

    /// Whether this is a discard of the kind that comes while it is frozen, too: of the space that its last commit
    /// has freed. btrfs does so by a queue that no freeze stops (fs/btrfs/discard.c). Nothing refers to that space,
    /// in no copy.
    pub(super) fn discards_at_will(self, entry: &Entry) -> bool {
        self == Format::Btrfs && matches!(entry.change, Change::Discard { .. })
    }

    /// Options with which a mount reads what is there, and replays nothing.
    pub(super) fn read_only(self) -> &'static str {
        match self {
            Format::Ext4 => "ro,noload",
            Format::Xfs => "ro,norecovery,nouuid",
            Format::Btrfs => "ro,rescue=nologreplay",
        }
    }

    /// Prints what of the journal on `$n` had to be replayed: nothing if it is empty. A tool that has not read
    /// it is told from one that found nothing by what it says of any.
    pub(super) fn journal(self) -> String {
        let (tool, always, filter) = match self {
            Format::Ext4 => (
                "dumpe2fs -h $n",
                "^Filesystem features:",
                "grep -o needs_recovery",
            ),
            // What a frozen xfs leaves in its log are superblocks, which cover it.
            Format::Xfs => (
                "xfs_logprint -t $n",
                "data device:",
                "grep -E '^[A-Z]+:|Buffer:|BUF DATA|ERROR|failed' |
                     grep -vE '^(TRANS|BUF):|SUPER Block Buffer:' | head -n 3",
            ),
            Format::Btrfs => (
                "btrfs inspect-internal dump-super $n",
                "^log_root[[:space:]]",
                "grep -E '^log_root\\s' | grep -v '\\s0$'",
            ),
        };
        let name = tool.split(' ').next().unwrap_or(tool);
        format!(
            "said=$({tool} 2>&1); status=$?
             [ $status = 0 ] && echo \"$said\" | grep -q '{always}' || {{
                 echo '{name} has not read it, status' $status; echo \"$said\" | head -n 3; exit
             }}
             echo \"$said\" | {filter}"
        )
    }

    /// The same disk with metadata that is nothing but zeros, of the kind that a checker alone reads.
    pub(super) fn damaged(self, disk: &Image) -> Result<Image> {
        let bytes = |offset: u64| {
            let mut bytes = [0; 4];
            disk.read(offset, &mut bytes);
            bytes
        };
        let le = |offset| u64::from(u32::from_le_bytes(bytes(offset)));
        let be = |offset| u64::from(u32::from_be_bytes(bytes(offset)));
        let (places, len) = match self {
            // The block bitmap of the first group (struct ext4_super_block: s_first_data_block,
            // s_log_block_size; struct ext4_group_desc: bg_block_bitmap_lo).
            Format::Ext4 => {
                let block = 1024 << le(1024 + 24);
                (vec![le((le(1024 + 20) + 1) * block) * block], block)
            }
            // The root of the free extents of the first group (struct xfs_dsb: sb_blocksize, sb_sectsize;
            // struct xfs_agf: agf_bno_root).
            Format::Xfs => {
                let sector = be(102) >> 16;
                (vec![be(sector + 16) * be(4)], be(4))
            }
            // Every node of the tree of files, of whatever age (struct btrfs_header: fsid, owner).
            Format::Btrfs => {
                const NODE: u64 = 16 << 10;
                const FS_TREE: u64 = 5;
                let id = |offset| [0, 4, 8, 12].map(|at| bytes(offset + at));
                let of_whole = id((64 << 10) + 32);
                let is_one = |at: &u64| {
                    id(at + 32) == of_whole && le(at + 88) == FS_TREE && le(at + 92) == 0
                };
                let all = (0..self.size() << 20).step_by(NODE as usize);
                (all.filter(is_one).collect(), NODE)
            }
        };
        ensure!(!places.is_empty(), "no such metadata was found");
        let mut damaged = disk.clone();
        for place in places {
            damaged.write(place, &vec![0; len as usize]);
        }
        Ok(damaged)
    }

    /// Checks what is on `$n`.
    pub(super) fn check(self) -> &'static str {
        match self {
            Format::Ext4 => "e2fsck -f -n $n",
            // A log with nothing in it but superblocks is no empty one to xfs_repair, and the sums in the
            // superblock on the disk are set right by the next mount. All else has to be clean before a mount
            // could mend it, and all of it afterwards.
            Format::Xfs => {
                "said=$(xfs_repair -n $n 2>&1)
                 echo \"$said\" | grep -q '^Phase 7' || { echo \"$said\" | tail -n 5; exit 1; }
                 echo \"$said\" | grep -vE '^(Phase|No modify|ALERT|ignored|which may be)|^        - ' |
                     grep -vE '^sb_(icount|ifree|fdblocks) ' && exit 1
                 mount -t xfs -o nouuid $n /mnt/copy && umount /mnt/copy && xfs_repair -n $n"
            }
            Format::Btrfs => "btrfs check --readonly $n",
        }
    }
}

/// What a file system stands on, made with the tools that administrators have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stack {
    /// A disk.
    Disk,
    /// A logical volume over two disks.
    Lvm,
    /// A mirror of two disks.
    Md,
    /// A disk with everything on it encrypted.
    Luks,
}

/// Nobody in the guest would answer if they told udev.
const NO_UDEV: &str = "export DM_DISABLE_UDEV=1 MDADM_NO_UDEV=1";

impl Stack {
    /// In words, for the comparison.
    pub(super) fn words(self) -> &'static str {
        match self {
            Stack::Disk => "a disk",
            Stack::Lvm => "a logical volume over two disks",
            Stack::Md => "a mirror of two disks",
            Stack::Luks => "an encrypted disk",
        }
    }

    pub(super) fn disks(self) -> usize {
        match self {
            Stack::Disk | Stack::Luks => 1,
            Stack::Lvm | Stack::Md => 2,
        }
    }

    /// Makes it of these disks; the node of the whole.
    pub(super) fn make(self, guest: &Guest, name: &str, nodes: &[String]) -> Result<String> {
        let all = nodes.join(" ");
        match self {
            Stack::Disk => Ok(String::new()),
            Stack::Lvm => guest.sh(&format!(
                "set -e; {NO_UDEV}
                 modprobe dm-mod
                 mkdir -p /run/lock/lvm
                 printf '%s\\n' 'devices {{ use_devicesfile=0 obtain_device_list_from_udev=0' \
                     'global_filter=[ \"a|^/dev/sd|\", \"r|.*|\" ] }}' \
                     'activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}' >/etc/lvm/lvmlocal.conf
                 lvm pvcreate -q -y {all}
                 lvm vgcreate -q {name} {all}
                 lvm lvcreate -q -y -l 100%FREE -n data {name}"
            )),
            Stack::Md => guest.sh(&format!(
                "{NO_UDEV}
                 mdadm --create /dev/md/{name} --quiet --run --level=1 --raid-devices=2 --metadata=1.2 \
                     --bitmap=internal --assume-clean {all}"
            )),
            Stack::Luks => guest.sh(&format!(
                "set -e; {NO_UDEV}
                 modprobe dm-crypt
                 printf {PASSPHRASE} | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 \
                     --pbkdf-force-iterations 1000 {all} -
                 {}",
                self.open_encrypted(name, &all)
            )),
        }?;
        Ok(self.node(name, nodes))
    }

    /// Puts it together from copies of its disks, beside the original; the node of the whole.
    pub(super) fn open_copy(self, guest: &Guest, name: &str, nodes: &[String]) -> Result<String> {
        let all = nodes.join(" ");
        match self {
            Stack::Disk => Ok(String::new()),
            Stack::Lvm => {
                guest.sh(&format!("{NO_UDEV}; lvm vgimportclone -q -n {name} {all}"))?;
                guest.sh(&format!("{NO_UDEV}; lvm vgchange -q -ay {name}"))
            }
            Stack::Md => guest.sh(&format!(
                "{NO_UDEV}
                 mdadm --assemble /dev/md/{name} --quiet --run --update=uuid {all}"
            )),
            Stack::Luks => guest.sh(&format!("{NO_UDEV}; {}", self.open_encrypted(name, &all))),
        }?;
        Ok(self.node(name, nodes))
    }

    /// How many bytes at the front of a disk are not the file system's and may change while it is frozen: md
    /// notes there a while later that nothing is being written any more.
    pub(super) fn metadata(self, disk: &Image) -> u64 {
        // Of the superblock of version 1.2 (linux/raid/md_p.h, mdp_superblock_1): in sectors.
        const DATA_OFFSET: u64 = 4096 + 128;
        let mut sectors = [0; 8];
        if self == Stack::Md {
            disk.read(DATA_OFFSET, &mut sectors);
        }
        u64::from_le_bytes(sectors) << 9
    }

    /// Takes it apart again.
    pub(super) fn close(self, guest: &Guest, name: &str) -> Result<()> {
        let command = match self {
            Stack::Disk => return Ok(()),
            Stack::Lvm => format!("lvm vgchange -q -an {name}"),
            Stack::Md => format!("mdadm --stop --quiet /dev/md/{name}"),
            Stack::Luks => format!("cryptsetup close {name}"),
        };
        guest.sh(&format!("{NO_UDEV}; {command}")).map(drop)
    }

    fn open_encrypted(self, name: &str, node: &str) -> String {
        format!("printf {PASSPHRASE} | cryptsetup open --key-file - {node} {name}")
    }

    fn node(self, name: &str, nodes: &[String]) -> String {
        match self {
            Stack::Disk => nodes.concat(),
            Stack::Lvm => format!("/dev/{name}/data"),
            Stack::Md => format!("/dev/md/{name}"),
            Stack::Luks => format!("/dev/mapper/{name}"),
        }
    }
}

const PASSPHRASE: &str = "sesame";
