// SPDX-License-Identifier: GPL-2.0-only

//! The plan on whole tables, recorded from running machines, and its one law on random ones:
//! nothing is frozen after what it stands on.
//!
//! The tables in `tests/tables` are what `hv_vss_daemon list --table` said on machines that
//! `tests/lab/tables.sh` had set up, and, retyped with invented names, what people posted of theirs;
//! each says in its first lines what it is of. No machine is looked at here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hv_vss_daemon::disks::HostDisk;
use hv_vss_daemon::machine::Table;
use hv_vss_daemon::mounts::{parse, DevId, Mount};
use hv_vss_daemon::plan::{plan, FileSystem, Plan, Reason, Scope};
use hv_vss_daemon::superblocks::Entry;
use hv_vss_daemon::topology::{Backing, Device, Topology};
use proptest::prelude::*;

fn recorded(name: &str) -> Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tables")
        .join(name)
        .with_extension("json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn plan_of(table: &Table) -> Plan {
    plan(&table.mounts().unwrap(), &table.topology, &|_| None)
}

/// The members of each wave by the path that an operator is shown, sorted.
fn waves(plan: &Plan) -> Vec<Vec<String>> {
    let sorted = |wave: &Vec<FileSystem>| {
        let path = |f: &FileSystem| f.places[0].path.display().to_string();
        let set: BTreeSet<String> = wave.iter().map(path).collect();
        assert_eq!(set.len(), wave.len(), "one path names two file systems");
        set.into_iter().collect()
    };
    plan.waves.iter().map(sorted).collect()
}

/// The file system that is shown by this path.
fn named<'a>(plan: &'a Plan, path: &str) -> &'a FileSystem {
    let mut all = plan.waves.iter().flatten();
    all.find(|f| f.places[0].path == Path::new(path)).unwrap()
}

fn types_without_device(plan: &Plan) -> BTreeSet<&str> {
    let without = |l: &&hv_vss_daemon::plan::LeftOut| l.reason == Reason::NoBlockDevice;
    let left_out = plan.left_out.iter().filter(without);
    left_out.map(|l| l.file_system.fs_type.as_str()).collect()
}

#[test]
fn container_host_with_a_disk_that_only_a_container_has_and_images_and_nbd() {
    let plan = plan_of(&recorded("container-host"));
    assert_eq!(
        waves(&plan),
        [
            // What nbd-server serves, before the file system that holds its export.
            vec!["/srv/remote"],
            vec!["/boot/efi", "/srv/layer", "/wal"],
            vec!["/srv/registry"],
            // podman's storage, by where it is whole and not by a folder of it.
            vec!["/var/lib/containers"],
            vec!["/"],
        ]
    );
    let wal = named(&plan, "/wal").to_string();
    assert!(wal.contains("in another mount namespace"), "{wal}");
    assert!(named(&plan, "/var/lib/containers").places.len() > 5);
    let spaced = |p: &hv_vss_daemon::plan::Place| p.path == Path::new("/var/lib/pg");
    assert!(named(&plan, "/").places.iter().any(spaced));
    let left_out = types_without_device(&plan);
    for fs_type in ["overlay", "tmpfs", "autofs", "proc", "cgroup2"] {
        assert!(left_out.contains(fs_type), "{fs_type}");
    }
}

#[test]
fn pods_in_namespaces_of_their_own_freeze_each_volume_once_and_before_what_serves_it() {
    let table = recorded("kubelet-like");
    let lines: usize = table.namespaces.iter().map(Vec::len).sum();
    assert!(table.namespaces.len() > 40 && lines > 450, "{lines} lines");
    let plan = plan_of(&table);
    let found = waves(&plan);
    assert_eq!(found.len(), 10, "{found:?}");
    // The volumes on iSCSI disks, each for itself: seen at the global mount, in the pod's folder, and
    // inside the pod's own namespace.
    let inside = |f: &FileSystem| f.places.iter().any(|p| p.path == Path::new("/data"));
    for wave in &plan.waves[..8] {
        assert_eq!(wave.len(), 1);
        assert!(wave.iter().all(|f| f.places.len() > 2 && inside(f)));
    }
    assert_eq!(found[8], ["/var/lib/longhorn"]);
    assert_eq!(found[9], ["/"]);
}

#[test]
fn lvm_on_raid_on_luks_with_a_guest_image_on_top() {
    let plan = plan_of(&recorded("lvm-raid-luks"));
    assert_eq!(
        waves(&plan),
        [
            // A volume in the partition of an image comes before the file system of the image.
            vec!["/boot", "/srv/home", "/srv/inner", "/srv/var"],
            vec!["/srv/images"],
            vec!["/"],
        ]
    );
    let left_out = plan.left_out.iter().map(|l| (&l.file_system, &l.reason));
    let read_only: Vec<_> = left_out.filter(|l| *l.1 == Reason::ReadOnly).collect();
    assert_eq!(read_only.len(), 1);
    assert_eq!(read_only[0].0.places[0].path, Path::new("/srv/archive"));
}

#[test]
fn btrfs_with_snapshots_is_one_file_system_however_many_subvolumes_it_shows() {
    let table = recorded("btrfs-snapshots");
    let plan = plan_of(&table);
    // The image is in a subvolume that is not mounted by itself, so no table lists its number.
    assert_eq!(
        waves(&plan),
        [vec!["/data", "/pool/scratch"], vec!["/pool"], vec!["/"]]
    );
    let data = named(&plan, "/data");
    let here = data.places.iter().filter(|p| p.namespace == 0);
    assert_eq!(
        here.count(),
        5,
        "a read-only snapshot does not make it read-only"
    );
    let pool = &table.topology.members[&named(&plan, "/pool").dev];
    assert_eq!(pool.len(), 2, "both disks of the pool");
}

#[test]
fn a_root_that_is_never_written_to_hides_no_error() {
    let mut table = recorded("microos-read-only-root");
    for line in table.namespaces.iter_mut().flatten() {
        *line = line.replace(" - btrfs /dev/sda3 rw", " - btrfs /dev/sda3 ro");
    }
    let plan = plan_of(&table);
    let lost: Vec<_> = plan
        .losses()
        .map(|it| (it.file_system.dev, &it.reason))
        .collect();
    let root = "0:31".parse().unwrap();
    assert_eq!(lost, [(root, &Reason::TurnedReadOnly)]);
}

/// The waves of a table, by path, with a mark on what only another namespace has mounted.
fn waves_of(name: &str) -> Vec<Vec<String>> {
    let marked = |f: &FileSystem| {
        let place = &f.places[0];
        let mark = match place.namespace {
            0 => String::new(),
            n => format!("@ns{n}"),
        };
        format!("{}{mark}", place.path.display())
    };
    let sorted = |wave: &Vec<FileSystem>| {
        let set: BTreeSet<String> = wave.iter().map(marked).collect();
        set.into_iter().collect()
    };
    plan_of(&recorded(name)).waves.iter().map(sorted).collect()
}

#[test]
fn machines_that_people_posted_are_frozen_in_the_right_order() {
    let cases: [(&str, &[&[&str]]); 10] = [
        (
            "image-in-a-container",
            &[&["/data@ns1"], &["/var/lib/docker"], &["/"]],
        ),
        (
            "loop-over-a-block-device",
            &[&["/srv/inner"], &["/data"], &["/"]],
        ),
        // Its zd0 is said to be served by this machine, as a volume of a pool is: not known to be hardware. With
        // that, which whoever posted the table could not say, it comes before what is on a disk.
        ("zfs-root", &[&["/srv/db"], &["/boot/efi"]]),
        ("overlayroot", &[&["/data"], &["/media/root-rw"]]),
        ("ostree-composefs", &[&["/boot/efi", "/sysroot"]]),
        (
            "cpanel-virtfs",
            &[&["/boot", "/boot/efi", "/home", "/tmp"], &["/usr"], &["/"]],
        ),
        (
            "lvm-on-multipath",
            &[
                &[
                    "/boot",
                    "/boot/efi",
                    "/u01",
                    "/var",
                    "/var/log",
                    "/var/log/audit",
                ],
                &["/"],
            ],
        ),
        (
            "ubuntu-snaps-lxd",
            &[
                &[
                    "/boot/efi",
                    "/var/snap/lxd/common/lxd/storage-pools/default@ns1",
                ],
                &["/var"],
                &["/"],
            ],
        ),
        ("microos-read-only-root", &[&["/boot/efi", "/var"], &["/"]]),
        ("nas-md-lvm-cache", &[&["/volume1", "/volume2"], &["/"]]),
    ];
    for (name, expected) in cases {
        assert_eq!(waves_of(name), expected, "{name}");
    }
}

#[test]
fn zfs_is_on_disks_and_cannot_be_held() {
    let plan = plan_of(&recorded("zfs-root"));
    let synced: Vec<String> = plan.synced.iter().map(ToString::to_string).collect();
    assert_eq!(
        synced,
        [
            "/ (zfs, 0:27)",
            "/home (zfs, 0:44)",
            "/var/log (zfs, 0:45)",
            "/boot (zfs, 0:30)"
        ]
    );
    assert!(!types_without_device(&plan).contains("zfs"));
}

#[test]
fn where_nobody_knows_the_disks_of_what_goes_on_none_of_them_is_at_rest() {
    let mut table = recorded("zfs-root");
    let disk = HostDisk {
        name: "sdz".into(),
        address: "host:sdz".into(),
    };
    let number = "65:144".parse().unwrap();
    table.topology.disks.insert(number, disk);
    let at_rest = |table: &Table| {
        let at_rest = plan_of(table).at_rest(&Scope::default());
        (at_rest.watched.len(), at_rest.perhaps.is_some())
    };
    assert_eq!(at_rest(&table), (0, true), "the pool may be on that disk");
    for lines in &mut table.namespaces {
        lines.retain(|line| !line.contains(" - zfs "));
    }
    assert_eq!(at_rest(&table), (1, false));
}

#[test]
fn a_dozen_images_without_a_writer_are_left_out() {
    let plan = plan_of(&recorded("ubuntu-snaps-lxd"));
    let read_only = plan
        .left_out
        .iter()
        .filter(|l| l.reason == Reason::ReadOnly);
    assert_eq!(read_only.count(), 12);
}

/// A random machine: file systems 0.., each on a disk of its own, on a file in one with a smaller
/// number, or on the device of such a file through dm; number 0 is root.
#[derive(Clone, Debug)]
struct Machine {
    /// For each file system: what holds its file, whether dm is in between, whether a program
    /// serves its disk, whether a rule leaves it out.
    parts: Vec<(Option<usize>, bool, bool, bool)>,
    /// A shuffle of the table.
    order: Vec<usize>,
    /// In which order they came to be, where sysfs tells.
    born: Option<Vec<usize>>,
}

fn machine() -> impl Strategy<Value = Machine> {
    (1usize..12)
        .prop_flat_map(|count| {
            let rule = proptest::bool::weighted(0.2);
            let holder = proptest::option::of(0..count);
            let part = (holder, any::<bool>(), any::<bool>(), rule);
            let order = || Just((0..count).collect::<Vec<_>>()).prop_shuffle();
            let born = proptest::option::of(order());
            (proptest::collection::vec(part, count), order(), born)
        })
        .prop_map(|(mut parts, order, born)| {
            for (i, part) in parts.iter_mut().enumerate() {
                part.0 = part.0.filter(|&holder| holder < i);
            }
            Machine { parts, order, born }
        })
}

impl Machine {
    fn dev(i: usize) -> DevId {
        DevId {
            major: 100,
            minor: i as u32,
        }
    }

    fn path(i: usize) -> String {
        match i {
            0 => "/".into(),
            _ => format!("/m{i}"),
        }
    }

    fn mounts(&self) -> Vec<Mount> {
        let line = |&i: &usize| {
            let (dev, path) = (Self::dev(i), Self::path(i));
            format!("{} 1 {dev} / {path} rw - ext4 /dev/x{i} rw\n", i + 10)
        };
        let text: String = self.order.iter().map(line).collect();
        parse(text.as_bytes(), 0).unwrap()
    }

    fn topology(&self) -> Topology {
        let mut topology = Topology::default();
        let born = self.born.iter().flatten().enumerate();
        let listed = |(at, &i): (usize, &usize)| {
            let inode = at as u64;
            let it = Entry {
                inode,
                ..Entry::default()
            };
            (Self::dev(i), it)
        };
        topology.listed = born.map(listed).collect();
        for (i, &(holder, through_dm, served, _)) in self.parts.iter().enumerate() {
            let mut device = Device {
                user_space: served,
                ..Device::default()
            };
            if let Some(holder) = holder {
                let backing = Backing {
                    dev: Some(Self::dev(holder)),
                    path: format!("{}/{i}.img", Self::path(holder)).into(),
                };
                if through_dm {
                    let lower = DevId {
                        major: 200,
                        minor: i as u32,
                    };
                    device.below.push(lower);
                    let lower_device = Device {
                        backing: Some(backing),
                        ..Device::default()
                    };
                    topology.devices.insert(lower, lower_device);
                } else {
                    device.backing = Some(backing);
                }
            }
            topology.devices.insert(Self::dev(i), device);
        }
        topology
    }
}

proptest! {
    #[test]
    fn nothing_is_frozen_after_what_it_stands_on(machine in machine()) {
        let is_out = |i: usize| machine.parts[i].3;
        let rule = |it: &FileSystem| is_out(it.dev.minor as usize).then(|| "a rule".to_owned());
        let plan = plan(&machine.mounts(), &machine.topology(), &rule);
        let mut wave_of = BTreeMap::new();
        for (number, wave) in plan.waves.iter().enumerate() {
            prop_assert!(!wave.is_empty());
            for file_system in wave {
                prop_assert_eq!(wave_of.insert(file_system.dev, number), None, "planned twice");
            }
        }
        let count = machine.parts.len();
        let chosen: Vec<usize> = (0..count).filter(|&i| !is_out(i)).collect();
        prop_assert_eq!(wave_of.len(), chosen.len());
        let wave = |i: usize| wave_of[&Machine::dev(i)];
        // What a program serves, and all that stands on such; and what each stands on, to any depth.
        let mut served: Vec<bool> = Vec::new();
        let mut below: Vec<Vec<usize>> = Vec::new();
        for &(holder, _, by_program, _) in &machine.parts {
            served.push(by_program || holder.is_some_and(|h| served[h]));
            let deeper = holder.iter().flat_map(|&h| below[h].clone());
            below.push(holder.into_iter().chain(deeper).collect());
        }
        for &i in &chosen {
            for &holder in below[i].iter().filter(|&&it| !is_out(it)) {
                prop_assert!(wave(i) < wave(holder), "{i} stands on {holder}");
            }
            // Root has the smallest number here, so it stands on nothing.
            prop_assert!(i == 0 || is_out(0) || wave(i) < wave(0), "root is not last");
        }
        let but_root = || chosen.iter().copied().filter(|&i| i > 0);
        for i in but_root().filter(|&i| served[i]) {
            for j in but_root().filter(|&j| !served[j]) {
                prop_assert!(wave(i) < wave(j), "{i} is served by a program, {j} is not");
            }
        }
        // Among those, each for itself and the youngest first, save for what has to wait until the
        // one before it is frozen.
        let order = machine.born.as_ref().unwrap_or(&machine.order);
        let age = |i: usize| order.iter().position(|&it| it == i);
        let mut by_wave: Vec<usize> = but_root().filter(|&i| served[i]).collect();
        by_wave.sort_by_key(|&i| wave(i));
        for pair in by_wave.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            prop_assert!(wave(a) < wave(b), "{a} and {b} share a wave");
            let waits = below[a].contains(&b);
            prop_assert!(age(a) > age(b) || waits, "{a} is older than {b}");
        }
    }
}
