// SPDX-License-Identifier: GPL-2.0-only

//! The host's SCSI disks, as the stock `hv_storvsc` and `sd` drivers find them: they are the judges
//! of the host. Nothing here is about backups.

use super::{Case, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{equal, refused};
use e2e::guest::{Guest, Machine, STEP};
use hyperv_sim::ic::vss::Lun;
use hyperv_sim::storage::{Change, Controller, Disk, Fault, Image, Kind};
use hyperv_sim::Guid;
use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::time::Duration;

pub const CASES: &[Case] = &[
    case(
        "disks/one-disk",
        "mkfs.ext4, mount, fsync: what was written is on the host's disk, and no driver minds",
        one_disk,
    ),
    case(
        "disks/several",
        "four disks on two controllers, in memory and in a file: each has its own data and size",
        several,
    )
    .long(),
    case(
        "disks/hot-plug",
        "a disk that is attached is found, one that is detached is gone, also below its driver",
        hot_plug,
    )
    .long(),
    case(
        "disks/errors",
        "what a disk cannot read, write or flush fails with its sense data, all else goes on",
        errors,
    ),
    case(
        "disks/hang",
        "nothing ends on a disk that hangs, its neighbours go on, and then it ends well",
        hang,
    ),
    case(
        "disks/slow",
        "a delay and a limited bandwidth take their time",
        slow,
    ),
];

/// A case for a guest with SCSI controllers.
pub(super) const fn case(
    name: &'static str,
    about: &'static str,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        name,
        about,
        machine: Machine::SCSI,
        per_round: Duration::ZERO,
        when: When::Always,
        asks_our_module: false,
        compares: false,
        run,
    }
}

/// A disk on one of the guest's controllers.
pub(super) struct Attached {
    pub(super) disk: Disk,
    controller: Controller,
    lun: u8,
}

impl Attached {
    /// Makes a disk of `mib` MiB with this content in memory and attaches it.
    pub(super) fn new(
        guest: &Guest,
        controller: u8,
        lun: u8,
        mib: u64,
        content: Image,
    ) -> Result<Self> {
        Attached::with(guest, controller, lun, |id| {
            Disk::in_memory(id, mib << 20, content)
        })
    }

    /// Attaches the disk that `make` makes.
    fn with(
        guest: &Guest,
        controller: u8,
        lun: u8,
        make: impl FnOnce(Guid) -> std::io::Result<Disk>,
    ) -> Result<Self> {
        let id = Guid::new(0x6469_736b, 0, 0, [0, 0, 0, 0, 0, 0, controller + 1, lun]);
        let controller = guest
            .host()
            .scsi(controller)
            .context("no such controller")?;
        let disk = make(id).context("cannot make a disk")?;
        controller.attach(lun, &disk);
        Ok(Attached {
            disk,
            controller,
            lun,
        })
    }

    /// The disk on which the guest's root is.
    pub(super) fn root(guest: &Guest) -> Result<Self> {
        Ok(Attached {
            disk: guest.root_disk().context("the root is elsewhere")?.clone(),
            controller: guest.host().scsi(0).context("no such controller")?,
            lun: 0,
        })
    }

    /// How a FREEZE names it.
    pub(super) fn in_backup(&self) -> Lun {
        self.controller.lun(self.lun)
    }

    /// Takes it off its controller and waits until the guest has done the same.
    pub(super) fn detach(self, guest: &Guest) -> Result<()> {
        Attached::detach_all(guest, [self])
    }

    /// The same with several, for which the guest then looks once and not for each.
    pub(super) fn detach_all(guest: &Guest, all: impl IntoIterator<Item = Self>) -> Result<()> {
        let all: Vec<_> = all.into_iter().collect();
        for it in &all {
            it.controller.detach(it.lun);
        }
        for it in &all {
            guest.wait_until("the guest has no such disk any more", STEP * 2, || {
                Ok(it.find(guest)?.is_none())
            })?;
        }
        Ok(())
    }

    /// Its node in the guest, once the guest has found it.
    pub(super) fn node(&self, guest: &Guest) -> Result<String> {
        let mut found = None;
        guest.wait_until("the guest has found the disk", STEP * 2, || {
            found = self.find(guest)?;
            Ok(found.is_some())
        })?;
        found.context("the node is gone")
    }

    fn find(&self, guest: &Guest) -> Result<Option<String>> {
        // As the guest names what VPD page 0x83 says.
        let wwid: String = self.disk.id().0[4..]
            .iter()
            .map(|it| format!("{it:02x}"))
            .collect();
        let search = format!("grep -ls naa.60022480{wwid} /sys/block/sd*/device/wwid");
        let out = guest.try_sh(&search)?.out;
        let name = out.trim().split('/').nth(3);
        Ok(name.map(|name| format!("/dev/{name}")))
    }
}

/// Loads the drivers of controllers and disks. Elsewhere udev loads the second.
pub(super) fn load_driver(guest: &Guest) -> Result<()> {
    guest.sh("modprobe sd_mod && modprobe hv_storvsc").map(drop)
}

fn one_disk(guest: &Guest) -> Result<()> {
    let attached = Attached::new(guest, 0, 0, 64, Image::default())?;
    load_driver(guest)?;
    let node = attached.node(guest)?;
    let name = node.trim_start_matches("/dev/");
    let attribute = |path: &str| -> Result<String> {
        let text = guest.read(&format!("/sys/block/{name}/{path}"))?;
        Ok(text.trim().to_owned())
    };
    equal("its size", attribute("size")?, (64 << 11).to_string())?;
    equal("its maker", attribute("device/vendor")?, "Msft".into())?;
    equal(
        "its name",
        attribute("device/model")?,
        "Virtual Disk".into(),
    )?;
    equal(
        "its cache",
        attribute("queue/write_cache")?,
        "write back".into(),
    )?;
    equal("whether FUA is used", attribute("queue/fua")?, "1".into())?;
    equal(
        "its physical blocks",
        attribute("queue/physical_block_size")?,
        "4096".into(),
    )?;
    ensure!(
        attribute("queue/discard_max_bytes")? != "0",
        "it should take discards"
    );

    guest.sh(&format!(
        "mkdir -p /mnt/a && mkfs.ext4 -q {node} && mount {node} /mnt/a"
    ))?;
    attached.disk.start_log().context("cannot start the log")?;
    const RECORD: &str = "a record that is looked for from outside";
    guest.sh(&format!(
        "echo '{RECORD}' > /mnt/a/record && sync /mnt/a/record"
    ))?;
    // All of it was on the medium when fsync returned: the data, and a flush or FUA after it.
    let log = attached.disk.log();
    let has = |data: &[u8]| data.windows(RECORD.len()).any(|it| it == RECORD.as_bytes());
    let at = log.iter().position(|entry| match &entry.change {
        Change::Write { data, .. } => has(data),
        _ => false,
    });
    let after = at.and_then(|at| log.get(at..)).unwrap_or_default();
    ensure!(
        after.iter().any(|entry| entry.ended.is_some()
            && matches!(
                entry.change,
                Change::Flush | Change::Write { fua: true, .. }
            )),
        "the record should be in the write log, and be flushed: {at:?} of {} entries",
        log.len()
    );
    let mut content = vec![0; 64 << 20];
    let snapshot = attached.disk.snapshot().context("cannot copy the disk")?;
    snapshot.read(0, &mut content);
    ensure!(has(&content), "the record should be on the disk");

    guest.sh("umount /mnt/a")?;
    // On another controller as another disk.
    let copy = Attached::new(guest, 1, 3, 64, snapshot)?;
    let node = copy.node(guest)?;
    let out = guest.sh(&format!("mount {node} /mnt/a && cat /mnt/a/record"))?;
    equal("the record on the copy", out.trim(), RECORD)?;
    guest.sh("umount /mnt/a")?;
    Ok(())
}

/// A file that nobody else can see, of so many bytes.
fn nameless_file(len: u64) -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!("disks-several-{}", std::process::id()));
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create_new(true);
    let file = options.open(&path)?;
    std::fs::remove_file(path)?;
    file.set_len(len)?;
    Ok(file)
}

fn several(guest: &Guest) -> Result<()> {
    const END: &str = "END OF THIS DISK";
    let start = |byte: u8| {
        let mut image = Image::default();
        image.write(0, &[byte; 4096]);
        image
    };
    let disks = [
        (Attached::new(guest, 0, 0, 8, start(b'A'))?, 8, b'A'),
        (Attached::new(guest, 0, 1, 16, start(b'B'))?, 16, b'B'),
        (Attached::new(guest, 1, 7, 24, start(b'C'))?, 24, b'C'),
        (
            Attached::with(guest, 1, 8, |id| {
                let file = nameless_file(32 << 20)?;
                file.write_all_at(&[b'D'; 4096], 0)?;
                Disk::in_file(id, file)
            })?,
            32,
            b'D',
        ),
    ];
    load_driver(guest)?;
    for (attached, mib, byte) in &disks {
        let node = attached.node(guest)?;
        let name = node.trim_start_matches("/dev/");
        let size = guest.read(&format!("/sys/block/{name}/size"))?;
        equal("its size", size.trim(), (mib << 11).to_string().as_str())?;
        let head = guest.sh(&format!(
            "head -c 4096 {node} | tr -d '{}'",
            char::from(*byte)
        ))?;
        equal("what is there besides its letter", head.as_str(), "")?;
        // One MiB from the second on, and the last block.
        guest.sh(&format!(
            "dd if=/dev/urandom of=/run/data bs=64k count=16 2>/dev/null
             dd if=/run/data of={node} bs=64k seek=16 oflag=direct conv=fsync 2>/dev/null
             echo 3 > /proc/sys/vm/drop_caches
             dd if={node} bs=64k skip=16 count=16 2>/dev/null | cmp - /run/data
             printf '%-512s' '{END} {node}' |
                 dd of={node} bs=512 seek=$(({mib} * 2048 - 1)) conv=fsync 2>/dev/null"
        ))?;
    }
    for (attached, mib, byte) in &disks {
        let node = attached.node(guest)?;
        let image = attached.disk.snapshot()?;
        let mut head = vec![0; 4096];
        image.read(0, &mut head);
        ensure!(head == vec![*byte; 4096], "{node}: the start has changed");
        let expected = format!("{END} {node}");
        let mut end = vec![0; expected.len()];
        image.read((mib << 20) - 512, &mut end);
        equal("its end", String::from_utf8_lossy(&end).as_ref(), &expected)?;
        guest.sh(&format!("blkdiscard {node}"))?;
        equal(
            "bytes after a discard",
            attached.disk.snapshot()?.allocated(),
            0,
        )?;
    }
    Ok(())
}

fn hot_plug(guest: &Guest) -> Result<()> {
    load_driver(guest)?;
    let controller = guest.host().scsi(1).context("no controller")?;
    guest.wait_until("the driver is ready", STEP, || Ok(controller.is_ready()))?;
    for _ in 0..2 {
        let first = Attached::new(guest, 1, 0, 8, Image::default())?;
        let second = Attached::new(guest, 1, 9, 8, Image::default())?;
        let nodes = [first.node(guest)?, second.node(guest)?];
        ensure!(
            nodes[0] != nodes[1],
            "two disks should have two nodes: {nodes:?}"
        );
        first.detach(guest)?;
        // What stays works on.
        guest.sh(&format!(
            "dd if=/dev/zero of={} bs=4k count=16 oflag=direct",
            nodes[1]
        ))?;
        second.detach(guest)?;
    }
    Ok(())
}

fn errors(guest: &Guest) -> Result<()> {
    let attached = Attached::new(guest, 0, 0, 8, Image::default())?;
    load_driver(guest)?;
    let node = attached.node(guest)?;
    guest.expect_in_log(&[
        "critical medium error",
        "critical target error",
        "I/O error",
        // Of the driver, for each command that the disk fails with sense.
        "status: scsi 0x2 srb 0x84",
    ])?;
    let fault = |kind| Fault {
        offset: 1 << 20,
        len: 4096,
        ..Fault::all(kind)
    };
    let read = |at| format!("dd if={node} of=/dev/null bs=4k skip={at} count=1 iflag=direct");
    let write = |at| format!("dd if=/dev/zero of={node} bs=4k seek={at} count=1 oflag=direct");
    let flush = format!("dd if=/dev/zero of={node} bs=4k count=1 conv=fsync");
    let expect = |what: &str, script: &str, good: bool| -> Result<()> {
        let ended = guest.try_sh(script)?;
        ensure!(
            (ended.status == Some(0)) == good,
            "{what} should {}: {}",
            if good { "end well" } else { "fail" },
            ended.err
        );
        Ok(())
    };
    let told = |sense: &str| -> Result<()> {
        let log = guest.log(6)?;
        ensure!(
            log.iter().any(|it| it.text.contains(sense)),
            "the kernel should have been told {sense:?}: {log:#?}"
        );
        Ok(())
    };
    attached.disk.set_faults(&[fault(Kind::Read)]);
    expect("a read of the block before", &read(255), true)?;
    expect("a read of the bad block", &read(256), false)?;
    expect("a read of the block after", &read(257), true)?;
    told("Unrecovered read error")?;
    attached.disk.set_faults(&[fault(Kind::Write)]);
    expect("a write to the block before", &write(255), true)?;
    expect("a write to the bad block", &write(256), false)?;
    expect("a write to the block after", &write(257), true)?;
    told("Write error")?;
    attached.disk.set_faults(&[Fault::all(Kind::Flush)]);
    expect("a flush", &flush, false)?;
    told("Internal target failure")?;
    attached.disk.set_faults(&[]);
    expect("a flush without the fault", &flush, true)?;
    expect("the block that was bad", &read(256), true)
}

fn hang(guest: &Guest) -> Result<()> {
    let hung = Attached::new(guest, 0, 0, 8, Image::default())?;
    let neighbour = Attached::new(guest, 0, 1, 8, Image::default())?;
    load_driver(guest)?;
    let (node, other) = (hung.node(guest)?, neighbour.node(guest)?);
    hung.disk.set_hung(true);
    let write = format!("echo 'late but there' | dd of={node} conv=fsync");
    let writer = guest.spawn(&["sh", "-c", &write])?;
    guest.wait_until("the write waits for the disk", STEP, || {
        Ok(hung.disk.waiting() > 0)
    })?;
    guest.sh(&format!(
        "dd if=/dev/zero of={other} bs=4k count=16 conv=fsync"
    ))?;
    refused(
        "the end of the write",
        guest.wait(&writer, Duration::from_millis(500)),
        "EAGAIN",
    )?;
    hung.disk.set_hung(false);
    let ended = guest.wait(&writer, STEP)?;
    equal("how the write ended", ended.status, Some(0))?;
    let mut seen = [0; 14];
    hung.disk.snapshot()?.read(0, &mut seen);
    equal("what is on the disk", &seen, b"late but there")?;
    Ok(())
}

fn slow(guest: &Guest) -> Result<()> {
    let attached = Attached::new(guest, 0, 0, 8, Image::default())?;
    load_driver(guest)?;
    let node = attached.node(guest)?;
    let took = |script: String| -> Result<Duration> {
        let start = guest.clock()?;
        guest.sh(&script)?;
        Ok(Duration::from_micros(guest.clock()? - start))
    };
    let delay = Duration::from_millis(100);
    attached.disk.set_delay(delay);
    let ten = took(format!(
        "dd if=/dev/zero of={node} bs=4k count=10 oflag=direct"
    ))?;
    ensure!(
        ten >= delay * 10,
        "ten writes one after the other took {ten:?}"
    );
    attached.disk.set_delay(Duration::ZERO);
    attached.disk.set_bandwidth(NonZeroU64::new(1 << 20));
    let two = took(format!(
        "dd if=/dev/zero of={node} bs=64k count=32 oflag=direct"
    ))?;
    ensure!(
        two >= Duration::from_secs(2),
        "2 MiB at 1 MiB a second took {two:?}"
    );
    Ok(())
}
