// SPDX-License-Identifier: GPL-2.0-only

//! The plan on whole tables, in the shape that real machines have, and its one law on random ones:
//! nothing is frozen after what it stands on.
//!
//! The tables in `tests/tables` have the form of `/proc/self/mountinfo`; what the devices stand on
//! is written down beside each test. No machine is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hv_vss_daemon::mounts::{parse, DevId, Mount};
use hv_vss_daemon::plan::{plan, FileSystem, Plan};
use hv_vss_daemon::topology::{Backing, Device, Topology};
use proptest::prelude::*;

fn dev(text: &str) -> DevId {
    text.parse().unwrap()
}

fn table(name: &str, namespace: usize) -> Vec<Mount> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tables")
        .join(name);
    parse(&std::fs::read(path).unwrap(), namespace).unwrap()
}

fn on(below: &[&str]) -> Device {
    Device {
        below: below.iter().map(|d| dev(d)).collect(),
        ..Device::default()
    }
}

fn on_file(path: &str, of: Option<&str>) -> Device {
    Device {
        backing: Some(Backing {
            dev: of.map(dev),
            path: path.into(),
        }),
        ..Device::default()
    }
}

fn devices(list: Vec<(&str, Device)>) -> Topology {
    Topology {
        devices: list
            .into_iter()
            .map(|(d, device)| (dev(d), device))
            .collect(),
        ..Topology::default()
    }
}

/// The device numbers of each wave, sorted.
fn waves(plan: &Plan) -> Vec<Vec<String>> {
    let sorted = |wave: &Vec<FileSystem>| {
        let set: BTreeSet<DevId> = wave.iter().map(|f| f.dev).collect();
        set.iter().map(ToString::to_string).collect()
    };
    plan.waves.iter().map(sorted).collect()
}

#[test]
fn container_host_with_a_volume_that_only_a_container_has() {
    let mut mounts = table("container-host.mountinfo", 0);
    mounts.extend(
        table("container.mountinfo", 1)
            .into_iter()
            .filter(|m| m.dev.major != 0),
    );
    let topology = devices(vec![(
        "7:0",
        on_file("/var/lib/docker/registry.img", Some("8:16")),
    )]);
    let plan = plan(&mounts, &topology, &|_| None);
    // vfat, the loop device and the container's own disk first; then docker's; root last.
    assert_eq!(
        waves(&plan),
        [vec!["7:0", "8:15", "8:32"], vec!["8:16"], vec!["8:1"]]
    );
    let docker = &plan.waves[1][0];
    assert_eq!(
        docker.places.len(),
        5,
        "two binds here, two in the container"
    );
    assert_eq!(docker.places[0].namespace, 0);
    let wal = plan.waves[0].iter().find(|f| f.dev == dev("8:32")).unwrap();
    assert!(
        wal.to_string().contains("in another mount namespace"),
        "{wal}"
    );
    let left_out: BTreeSet<&str> = plan
        .left_out
        .iter()
        .map(|l| l.file_system.fs_type.as_str())
        .collect();
    for fs_type in ["squashfs", "nfs4", "overlay", "autofs", "tmpfs", "nsfs"] {
        assert!(left_out.contains(fs_type), "{fs_type}");
    }
}

#[test]
fn k3s_node_with_hundreds_of_mounts_freezes_each_volume_once() {
    let mounts = table("k3s-node.mountinfo", 0);
    assert!(mounts.len() > 450);
    let mut topology = Topology::default();
    // Longhorn's volumes are iSCSI disks that a pod on this node serves.
    for mount in mounts
        .iter()
        .filter(|m| m.dev.major == 8 && m.dev.minor >= 32)
    {
        let served = Device {
            user_space: true,
            ..Device::default()
        };
        topology.devices.insert(mount.dev, served);
    }
    let plan = plan(&mounts, &topology, &|_| None);
    let found = waves(&plan);
    assert_eq!(found.len(), 3);
    assert_eq!(found[0].len(), 20, "all volumes, before what serves them");
    assert_eq!(found[1], ["8:16"]);
    assert_eq!(found[2], ["253:0"]);
    assert!(plan.waves[0].iter().all(|f| f.places.len() == 2));
}

#[test]
fn lvm_on_raid_on_luks_with_a_guest_image_on_top() {
    let mounts = table("lvm-raid-luks.mountinfo", 0);
    let mut list = vec![
        // dm-0 and dm-1 are LUKS on partitions, md1 a mirror of both, the volumes are on md1.
        ("252:0", on(&["8:2"])),
        ("252:1", on(&["8:18"])),
        ("9:1", on(&["252:0", "252:1"])),
        ("8:2", on(&["8:0"])),
        ("8:18", on(&["8:16"])),
        ("9:0", on(&["8:1", "8:17"])),
        // A volume group inside the partition of an image file.
        ("252:9", on(&["259:1"])),
        ("259:1", on(&["7:0"])),
        ("7:0", on_file("/var/lib/libvirt/inner.img", Some("252:5"))),
    ];
    for volume in ["252:3", "252:4", "252:5", "252:6"] {
        list.push((volume, on(&["9:1"])));
    }
    let plan = plan(&mounts, &devices(list), &|_| None);
    assert_eq!(
        waves(&plan),
        [vec!["9:0", "252:4", "252:9"], vec!["252:5"], vec!["252:3"]]
    );
    assert_eq!(
        plan.left_out
            .iter()
            .filter(|l| l.file_system.dev == dev("252:6"))
            .count(),
        1
    );
}

#[test]
fn btrfs_with_snapshots_is_one_file_system_however_many_subvolumes_it_shows() {
    let mounts = table("btrfs-snapshots.mountinfo", 0);
    // The image is in a subvolume of /data that is not mounted by itself, so its st_dev (0:52) is
    // in no table.
    let mut topology = devices(vec![("7:3", on_file("/data/vm/scratch.img", Some("0:52")))]);
    topology.members.insert(dev("0:24"), vec![dev("259:2")]);
    topology
        .members
        .insert(dev("0:47"), vec![dev("8:0"), dev("8:16")]);
    let plan = plan(&mounts, &topology, &|_| None);
    assert_eq!(
        waves(&plan),
        [vec!["7:3", "259:1"], vec!["0:47"], vec!["0:24"]]
    );
    let root = &plan.waves[2][0];
    assert_eq!(
        root.places.len(),
        4,
        "a read-only snapshot does not make it read-only"
    );
}

/// A random machine: file systems 0.., each on a disk of its own, on a file in one with a smaller
/// number, or on the device of such a file through dm; number 0 is root.
#[derive(Clone, Debug)]
struct Machine {
    /// For each file system: what holds its file, whether dm is in between, whether a program
    /// serves its disk.
    parts: Vec<(Option<usize>, bool, bool)>,
    /// A shuffle of the table.
    order: Vec<usize>,
}

fn machine() -> impl Strategy<Value = Machine> {
    (1usize..12)
        .prop_flat_map(|count| {
            let part = (proptest::option::of(0..count), any::<bool>(), any::<bool>());
            let order = Just((0..count).collect::<Vec<_>>()).prop_shuffle();
            (proptest::collection::vec(part, count), order)
        })
        .prop_map(|(mut parts, order)| {
            for (i, part) in parts.iter_mut().enumerate() {
                part.0 = part.0.filter(|&holder| holder < i);
            }
            Machine { parts, order }
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
        for (i, &(holder, through_dm, served)) in self.parts.iter().enumerate() {
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
        let plan = plan(&machine.mounts(), &machine.topology(), &|_| None);
        let mut wave_of = BTreeMap::new();
        for (number, wave) in plan.waves.iter().enumerate() {
            prop_assert!(!wave.is_empty());
            for file_system in wave {
                prop_assert_eq!(wave_of.insert(file_system.dev, number), None, "planned twice");
            }
        }
        prop_assert_eq!(wave_of.len(), machine.parts.len());
        let wave = |i: usize| wave_of[&Machine::dev(i)];
        // What a program serves, and all that stands on such.
        let mut served: Vec<bool> = Vec::new();
        for (i, &(holder, _, by_program)) in machine.parts.iter().enumerate() {
            served.push(by_program || holder.is_some_and(|h| served[h]));
            if let Some(holder) = holder {
                prop_assert!(wave(i) < wave(holder), "{i} stands on {holder}");
            }
            // Root has the smallest number here, so it stands on nothing.
            prop_assert!(i == 0 || wave(i) < wave(0), "root is not last");
        }
        for i in (1..served.len()).filter(|&i| served[i]) {
            for j in (1..served.len()).filter(|&j| !served[j]) {
                prop_assert!(wave(i) < wave(j), "{i} is served by a program, {j} is not");
            }
        }
    }
}
