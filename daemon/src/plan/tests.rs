// SPDX-License-Identifier: GPL-2.0-only

use super::*;
use crate::mounts::parse;
use crate::topology::{Backing, Device};

fn dev(text: &str) -> DevId {
    text.parse().unwrap()
}

fn disk(below: &[&str]) -> Device {
    Device {
        below: below.iter().map(|d| dev(d)).collect(),
        ..Device::default()
    }
}

fn loop_on(path: &str, of: Option<&str>) -> Device {
    Device {
        backing: Some(Backing {
            dev: of.map(dev),
            path: path.into(),
        }),
        ..Device::default()
    }
}

fn served() -> Device {
    Device {
        user_space: true,
        ..Device::default()
    }
}

fn topology(devices: Vec<(&str, Device)>) -> Topology {
    Topology {
        devices: devices.into_iter().map(|(d, dd)| (dev(d), dd)).collect(),
        ..Topology::default()
    }
}

/// The waves by path, each sorted.
fn waves(table: &str, topology: &Topology) -> Vec<Vec<String>> {
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let path = |f: &FileSystem| f.places[0].path.display().to_string();
    let mut waves: Vec<Vec<String>> = plan(&mounts, topology, &|_| None)
        .waves
        .iter()
        .map(|wave| wave.iter().map(path).collect())
        .collect();
    waves.iter_mut().for_each(|w| w.sort());
    waves
}

#[test]
fn what_a_program_serves_from_a_device_here_is_synced_and_not_passed_over() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:31 / /served rw - fuse.fuse2fs /dev/sdb1 rw,user_id=0
3 1 0:32 / /elsewhere rw - fuse.tool /dev/none rw,user_id=0
4 1 0:33 / /far rw - fuse.sshfs host:/home rw
";
    let mut topology = Topology::default();
    topology.members.insert(dev("0:31"), vec![dev("8:17")]);
    topology.members.insert(dev("0:32"), Vec::new());
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let plan = plan(&mounts, &topology, &|_| None);
    let synced: Vec<_> = plan.synced.iter().map(ToString::to_string).collect();
    assert_eq!(synced, ["/served (fuse.fuse2fs, 0:31)"]);
    assert_eq!(plan.synced[0].devices, [dev("8:17")]);
    let left_out: Vec<_> = plan.left_out.iter().map(|it| it.reason.clone()).collect();
    assert_eq!(left_out, [Reason::NoBlockDevice, Reason::NoBlockDevice]);
    // Nobody walks through it to what is mounted below.
    let below = "5 2 8:2 / /served/in rw - ext4 /dev/sda2 rw\n";
    let mounts = parse([table, below].concat().as_bytes(), 0).unwrap();
    assert!(!mounts[4].walkable);
}

#[test]
fn one_that_the_kernel_has_locked_is_named_and_not_tried() {
    let topology = Topology {
        unmounted: vec![Unmounted {
            fs_type: "?".into(),
            name: "sdc1".into(),
            devices: vec![dev("8:33")],
            listed: None,
            unreachable: Some("it is locked".into()),
        }],
        ..Topology::default()
    };
    let plan = plan(&[], &topology, &|_| None);
    assert!(plan.waves.is_empty());
    assert!(plan.left_out[0].reason.is_a_loss());
}

#[test]
fn each_superblock_once_and_root_last() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /data rw - xfs /dev/sda2 rw
3 1 8:2 /sub /bind ro - xfs /dev/sda2 rw
4 1 0:40 /@ /btr rw - btrfs /dev/sdb rw
5 1 0:40 /@home /btr/home rw - btrfs /dev/sdb rw
6 1 7:0 / /iso ro - iso9660 /dev/loop0 ro
7 1 0:5 / /nfs rw - nfs4 server:/x rw
8 1 0:6 / /auto rw - autofs systemd-1 rw
";
    let mut topology = Topology::default();
    topology.members.insert(dev("0:40"), vec![dev("8:16")]);
    assert_eq!(waves(table, &topology), [vec!["/btr", "/data"], vec!["/"]]);
    // It may be on any of them, where its devices are not known.
    assert_eq!(
        waves(table, &Topology::default()),
        [["/btr"], ["/data"], ["/"]]
    );
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let plan = plan(&mounts, &Topology::default(), &|_| None);
    let reasons: Vec<String> = plan.left_out.iter().map(|l| l.reason.to_string()).collect();
    assert_eq!(
        reasons,
        [
            "read-only",
            "not on a block device",
            "not on a block device"
        ]
    );
    assert_eq!(plan.waves[0][0].places.len(), 2);
}

#[test]
fn what_is_covered_is_reached_another_way_if_there_is_one() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /m rw - ext4 /dev/sda2 rw
3 2 8:3 / /m rw - ext4 /dev/sda3 rw
4 1 8:2 / /other/way rw - ext4 /dev/sda2 rw
";
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let plan = plan(&mounts, &Topology::default(), &|_| None);
    let lower = &plan.waves[0][0];
    assert_eq!(lower.dev, dev("8:2"));
    assert_eq!(lower.places[0].path, Path::new("/other/way"));
    assert!(lower.places[1].hidden);
}

#[test]
fn what_sits_on_a_file_comes_before_the_file_to_any_depth() {
    // A partition of a loop device under dm, whose file is on a file system that is itself on
    // a loop device.
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 7:1 / /one rw - xfs /dev/loop1 rw
3 1 253:0 / /two rw - ext4 /dev/mapper/two rw
4 1 8:2 / /data rw - ext4 /dev/sda2 rw
";
    let topology = topology(vec![
        ("7:1", loop_on("/data/one.img", Some("8:2"))),
        ("253:0", disk(&["259:7"])),
        ("259:7", disk(&["7:2"])),
        ("7:2", loop_on("/one/two.img", Some("7:1"))),
    ]);
    assert_eq!(
        waves(table, &topology),
        [vec!["/two"], vec!["/one"], vec!["/data"], vec!["/"]]
    );
}

#[test]
fn a_loop_device_that_cannot_be_asked_comes_before_all_that_may_hold_its_file() {
    // Its path would lead to /srv, or to memory, if it were of this namespace.
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /srv rw - ext4 /dev/sda2 rw
3 1 7:0 / /l rw - ext4 /dev/loop0 rw
4 1 0:30 / /tmp rw - tmpfs tmpfs rw
5 1 7:1 / /m rw - ext4 /dev/loop1 rw
6 1 7:2 / /in-memory rw - ext4 /dev/loop2 rw
";
    let topology = topology(vec![
        ("7:0", loop_on("/srv/images/a.img", None)),
        ("7:1", loop_on("/tmp/b.img", Some("0:99"))),
        ("7:2", loop_on("/tmp/c.img", Some("0:30"))),
    ]);
    assert_eq!(
        waves(table, &topology),
        [
            vec!["/m"],
            vec!["/l"],
            vec!["/in-memory", "/srv"],
            vec!["/"]
        ]
    );
}

#[test]
fn what_programs_serve_is_frozen_one_by_one_the_last_mounted_first() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 43:0 / /first rw - ext4 /dev/nbd0 rw
3 1 8:2 / /plain rw - ext4 /dev/sda2 rw
4 1 43:1 / /second rw - ext4 /dev/nbd1 rw
5 1 7:0 / /image rw - ext4 /dev/loop0 rw
";
    // The image was mounted last, and yet the second is served from it.
    let topology = topology(vec![
        ("43:0", served()),
        ("43:1", served()),
        ("7:0", loop_on("/second/img", Some("43:1"))),
    ]);
    assert_eq!(
        waves(table, &topology),
        [
            vec!["/image"],
            vec!["/second"],
            vec!["/first"],
            vec!["/plain"],
            vec!["/"]
        ]
    );
}

#[test]
fn what_programs_serve_is_frozen_by_the_age_of_the_superblock_where_sysfs_tells_it() {
    // One that only a container has mounted, one that was mounted once more, and two of a type that sysfs
    // does not list, with no path and with one.
    let here = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 43:0 / /nbd0 rw - ext4 /dev/nbd0 rw
3 1 43:1 / /nbd1 rw - vfat /dev/nbd1 rw
4 1 43:2 / /again rw - ext4 /dev/nbd2 rw
";
    let there = "5 0 43:3 / /inside rw - xfs /dev/nbd3 rw\n";
    let mut mounts = parse(here.as_bytes(), 0).unwrap();
    mounts.extend(parse(there.as_bytes(), 1).unwrap());
    let nbds = ["43:0", "43:1", "43:2", "43:3", "43:4"];
    let mut topology = topology(nbds.map(|it| (it, served())).to_vec());
    topology.unmounted.push(Unmounted {
        fs_type: "ext4".into(),
        name: "nbd4".into(),
        devices: vec![dev("43:4")],
        listed: None,
        unreachable: None,
    });
    let order = |topology: &Topology| -> Vec<String> {
        let plan = plan(&mounts, topology, &|_| None);
        let all = plan.waves.iter().flatten();
        all.map(|it| it.dev.to_string()).collect()
    };
    let by_table = ["43:4", "43:3", "43:2", "43:1", "43:0", "8:1"];
    assert_eq!(order(&topology), by_table);
    let born_at = |inode| Entry {
        inode,
        ..Entry::default()
    };
    topology.unmounted[0].listed = Some(born_at(2));
    let born = [("43:3", 5), ("43:2", 7), ("43:0", 9)];
    topology.listed = born.map(|(it, at)| (dev(it), born_at(at))).into();
    // That of which nothing is known keeps its place.
    let by_age = ["43:0", "43:2", "43:3", "43:1", "43:4", "8:1"];
    assert_eq!(order(&topology), by_age);
}

#[test]
fn what_is_excluded_may_stand_between_two_that_are_frozen() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /disk rw - ext4 /dev/sda2 rw
3 1 7:0 / /image rw - ext4 /dev/loop0 rw
4 1 7:1 / /inner rw - ext4 /dev/loop1 rw
";
    let mut topology = topology(vec![
        ("7:0", loop_on("/disk/image", Some("8:2"))),
        ("7:1", loop_on("/image/image", Some("7:0"))),
    ]);
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let without = |excluded: &str, topology: &Topology| {
        let is_it = |it: &FileSystem| it.places[0].path == Path::new(excluded);
        let plan = plan(&mounts, topology, &|it| is_it(it).then(|| "a rule".into()));
        let waves = plan.waves.into_iter();
        let found = waves.map(|wave| {
            let members = wave.into_iter();
            let words = members.map(|it| (it.dev.to_string(), it.stands_on));
            words.collect::<Vec<_>>()
        });
        found.collect::<Vec<_>>()
    };
    let on = |devs: &[&str]| Some(devs.iter().map(|it| dev(it)).collect::<BTreeSet<_>>());
    let alone = |it: &str, on| vec![(it.to_owned(), on)];
    let expected = [
        alone("7:1", on(&["8:2"])),
        alone("8:2", on(&[])),
        alone("8:1", on(&[])),
    ];
    assert_eq!(without("/image", &topology), expected);
    // The same if it is that which a program serves, or what is below the root.
    topology.devices.insert(dev("7:0"), served());
    let expected = [
        alone("7:1", None),
        alone("8:2", on(&[])),
        alone("8:1", on(&[])),
    ];
    assert_eq!(without("/image", &topology), expected);
    let root = loop_on("/image/root", Some("7:0"));
    topology.devices.insert(dev("8:1"), root);
    topology.devices.remove(&dev("7:0"));
    let found = without("/", &topology);
    let devs = found.iter().map(|wave| wave.iter().map(|it| it.0.as_str()));
    let devs: Vec<Vec<&str>> = devs.map(Iterator::collect).collect();
    assert_eq!(devs, [vec!["8:2", "7:1"], vec!["7:0"]]);
}

#[test]
fn an_image_in_what_a_program_serves_is_frozen_before_all_that_the_program_may_use() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /var rw - ext4 /dev/sda2 rw
3 1 8:3 / /ntfs rw - fuseblk /dev/sda3 rw
4 1 0:50 / /far rw - fuse.sshfs far: rw
5 1 7:0 / /image rw - ext4 /dev/loop0 rw
6 1 7:1 / /other rw - ext4 /dev/loop1 rw
";
    let topology = topology(vec![
        ("7:0", loop_on("/ntfs/image", Some("8:3"))),
        ("7:1", loop_on("/far/image", Some("0:50"))),
    ]);
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let plan = plan(&mounts, &topology, &|_| None);
    let of = |wave: &Vec<FileSystem>| wave.iter().map(|it| it.dev.to_string()).collect();
    let waves: Vec<Vec<String>> = plan.waves.iter().map(of).collect();
    assert_eq!(waves, [["7:1"], ["7:0"], ["8:3"], ["8:2"], ["8:1"]]);
}

#[test]
fn a_journal_on_another_device_counts_as_below() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /srv rw - ext4 /dev/sda2 rw
3 1 8:3 / /data rw - ext4 /dev/sda3 rw
";
    let mut topology = topology(vec![("7:0", loop_on("/srv/journal", Some("8:2")))]);
    topology.logs.insert(dev("8:3"), vec![dev("7:0")]);
    assert_eq!(
        waves(table, &topology),
        [vec!["/data"], vec!["/srv"], vec!["/"]]
    );
}

#[test]
fn the_disks_are_the_lowest_devices() {
    let part = Device {
        below: vec![dev("8:0")],
        ..Device::default()
    };
    let topology = topology(vec![
        ("8:0", Device::default()),
        ("8:1", part.clone()),
        ("8:2", part),
    ]);
    let table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     2 1 8:2 / /srv rw - xfs /dev/sda2 rw\n";
    let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
    let disks: Vec<_> = plan.file_systems().map(|it| it.disks.clone()).collect();
    assert_eq!(disks, [vec![dev("8:0")], vec![dev("8:0")]]);
}

/// A disk of the host and one more, partitions and a mapped device on the first, an image on that, one
/// of unknown place and one in memory; a log on the first, of what is on the second.
fn two_disks_and_images() -> Plan {
    let mut topology = topology(vec![
        ("8:0", disk(&[])),
        ("8:1", disk(&["8:0"])),
        ("253:0", disk(&["8:1"])),
        ("8:16", disk(&[])),
        ("8:32", disk(&[])),
        ("8:33", disk(&["8:0"])),
        ("7:0", loop_on("/srv/img", Some("253:0"))),
        ("7:1", loop_on("/away/img", None)),
        ("7:2", loop_on("/run/img", Some("0:9"))),
    ]);
    for (number, name) in [("8:0", "sda"), ("8:16", "sdb"), ("8:48", "sdd")] {
        let found = crate::disks::HostDisk {
            name: name.into(),
            address: format!("host:{number}"),
        };
        topology.disks.insert(dev(number), found);
    }
    topology.logs.insert(dev("8:32"), vec![dev("8:33")]);
    let table = "\
1 0 8:16 / / rw - ext4 /dev/sdb rw
2 1 253:0 / /srv rw - xfs /dev/dm-0 rw
3 1 7:0 / /image rw - ext4 /dev/loop0 rw
4 1 7:1 / /unknown rw - ext4 /dev/loop1 rw
5 1 0:9 / /run rw - tmpfs tmpfs rw
6 1 7:2 / /in-memory rw - ext4 /dev/loop2 rw
7 1 8:32 / /log-elsewhere rw - xfs /dev/sdc rw
";
    plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None)
}

#[test]
fn what_is_on_a_disk_is_also_what_is_on_files_there() {
    let plan = two_disks_and_images();
    let on = |number| -> Vec<String> {
        let found = plan.on_disk(dev(number));
        found
            .map(|it| it.places[0].path.display().to_string())
            .collect()
    };
    let mut on_first = on("8:0");
    on_first.sort();
    assert_eq!(on_first, ["/image", "/log-elsewhere", "/srv"]);
    let with_a_log = plan.waves.iter().flatten();
    let mut with_a_log = with_a_log.filter(|it| it.devices.len() > 1);
    let devices = with_a_log.next().map(|it| it.devices.as_slice());
    assert_eq!(devices, Some(&[dev("8:32"), dev("8:33")][..]));
    assert_eq!(on("8:16"), ["/"]);
    assert!(on("8:48").is_empty());
    let scope = plan.find(&["host:8:48".into(), "host:9".into(), "host:8:0".into()]);
    assert_eq!(scope.disks, BTreeSet::from([dev("8:0"), dev("8:48")]));
    assert_eq!(scope.strange, ["host:9"]);
}

#[test]
fn what_is_on_other_disks_as_well_is_torn_and_what_is_on_these_or_those_only_is_not() {
    let plan = two_disks_and_images();
    let torn = |disks: &[&str]| {
        let disks: BTreeSet<DevId> = disks.iter().map(|it| dev(it)).collect();
        let torn = plan.torn_by(&disks);
        let names = torn.map(|(it, others)| (it.places[0].path.display().to_string(), others));
        names.collect::<Vec<_>>()
    };
    let log = |others: &[&str]| {
        let others = others.iter().map(|it| it.to_string()).collect();
        vec![("/log-elsewhere".to_owned(), others)]
    };
    assert_eq!(torn(&["8:0"]), log(&["/dev/"]));
    assert_eq!(torn(&["8:16"]), []);
}

#[test]
fn of_some_disks_only_what_has_no_part_of_them_is_left_out() {
    let mut plan = two_disks_and_images();
    plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
    let mut frozen: Vec<String> = plan
        .waves
        .iter()
        .flatten()
        .map(|it| it.places[0].path.display().to_string())
        .collect();
    frozen.sort();
    assert_eq!(frozen, ["/image", "/log-elsewhere", "/srv", "/unknown"]);
    let elsewhere = plan.left_out.iter();
    let elsewhere = elsewhere.filter(|it| it.reason == Reason::Elsewhere);
    let mut names: Vec<String> = elsewhere.map(|it| it.file_system.to_string()).collect();
    names.sort();
    assert_eq!(names, ["/ (ext4, 8:16)", "/in-memory (ext4, 7:2)"]);
}

#[test]
fn what_is_lost_on_other_disks_is_no_loss_for_some() {
    let mut plan = two_disks_and_images();
    // The root is elsewhere, the image is not, of the next nobody knows, and the disk of the last is gone.
    let broken = ["8:16", "7:0", "7:1", "8:32"].map(dev);
    let down = |it: &FileSystem| {
        let is_broken = broken.contains(&it.dev);
        is_broken.then(|| Reason::Broken("down".into()))
    };
    plan.leave_out(down);
    let gone = plan.left_out.iter_mut().map(|it| &mut it.file_system);
    for it in gone.filter(|it| it.dev == dev("8:32")) {
        it.disks.clear();
        it.below = Some(BTreeSet::from([it.dev]));
    }
    plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
    let lost = plan.left_out.iter().filter(|it| it.reason.is_a_loss());
    let lost: BTreeSet<String> = lost.map(|it| it.file_system.dev.to_string()).collect();
    let expected = ["7:0", "7:1", "8:32"].map(str::to_owned);
    assert_eq!(lost, BTreeSet::from(expected));

    // These have turned read-only, and nobody has asked yet whether an error has made them so.
    let mut plan = two_disks_and_images();
    let turned = ["8:16", "253:0"].map(dev);
    plan.leave_out(|it| turned.contains(&it.dev).then_some(Reason::TurnedReadOnly));
    plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
    let left = plan.left_out.iter();
    let to_ask = left.filter(|it| it.reason == Reason::TurnedReadOnly);
    let to_ask: Vec<DevId> = to_ask.map(|it| it.file_system.dev).collect();
    assert_eq!(to_ask, [dev("253:0")]);
}

#[test]
fn a_disk_is_at_rest_if_all_on_it_is_frozen_and_nothing_in_between_writes_by_itself() {
    let named = |name: &str, below: &[&str]| Device {
        name: name.into(),
        mapper_uuid: name.starts_with("dm-").then(|| "LVM-0".into()),
        ..disk(below)
    };
    let mut topology = topology(vec![
        ("8:0", named("sda", &[])),
        ("8:1", named("sda1", &["8:0"])),
        ("253:0", named("dm-0", &["8:1"])),
        ("8:16", named("sdb", &[])),
        ("9:0", named("md0", &["8:16"])),
        ("8:32", named("sdc", &[])),
        ("8:64", named("sde", &[])),
        ("253:1", named("dm-1", &["8:64"])),
        ("253:2", named("dm-2", &["253:1"])),
        ("8:80", named("sdf", &[])),
        (
            "253:3",
            Device {
                mapper_uuid: Some("CRYPT-INTEGRITY-x".into()),
                ..named("dm-3", &["8:80"])
            },
        ),
    ]);
    for (number, name) in [
        ("8:0", "sda"),
        ("8:16", "sdb"),
        ("8:32", "sdc"),
        ("8:48", "sdd"),
        ("8:64", "sde"),
        ("8:80", "sdf"),
    ] {
        let found = crate::disks::HostDisk {
            name: name.into(),
            address: format!("host:{number}"),
        };
        topology.disks.insert(dev(number), found);
    }
    let table = "\
1 0 253:0 / / rw - ext4 /dev/dm-0 rw
2 1 9:0 / /md rw - ext4 /dev/md0 rw
3 1 8:32 / /excluded rw - ext4 /dev/sdc rw
4 1 253:2 / /thin rw - ext4 /dev/dm-2 rw
5 1 253:3 / /integrity rw - ext4 /dev/dm-3 rw
";
    let rule = |it: &FileSystem| (it.dev == dev("8:32")).then(|| "a rule".to_owned());
    let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &rule);
    let nodes = |scope: &Scope| -> Vec<String> {
        let at_rest = plan.at_rest(scope).watched.into_keys();
        at_rest.map(|it| it.to_string()).collect()
    };
    assert_eq!(nodes(&Scope::default()), ["/dev/sda", "/dev/sdd"]);
    let scope = plan.find(&["host:8:48".into(), "host:8:64".into()]);
    assert_eq!(nodes(&scope), ["/dev/sdd"]);
}

#[test]
fn of_a_disk_below_layers_that_write_by_themselves_the_topmost_devices_are_at_rest() {
    let named = |name: &str, below: &[&str]| Device {
        name: name.into(),
        ..disk(below)
    };
    let mut topology = topology(vec![
        ("8:0", named("sda", &[])),
        ("8:1", named("sda1", &["8:0"])),
        ("253:0", named("dm-0", &["8:1"])),
        ("253:1", named("dm-1", &["253:0"])),
    ]);
    let host_disk = crate::disks::HostDisk {
        name: "sda".into(),
        address: "host:sda".into(),
    };
    topology.disks.insert(dev("8:0"), host_disk);
    for (number, name, partitions, holders) in [
        ("8:0", "sda", &["8:1"][..], &[][..]),
        ("8:1", "sda1", &[], &["253:0"]),
        ("253:0", "dm-0", &[], &["253:1", "253:2", "253:3"]),
        ("253:1", "dm-1", &[], &[]),
        ("253:2", "dm-2", &[], &[]),
        ("253:3", "dm-3", &[], &[]),
    ] {
        let numbers = |all: &[&str]| all.iter().map(|it| dev(it)).collect();
        let above = crate::topology::Above {
            name: name.into(),
            partitions: numbers(partitions),
            holders: numbers(holders),
        };
        topology.above.insert(dev(number), above);
    }
    let mounts = parse(b"1 0 253:1 / / rw - ext4 /dev/dm-1 rw\n", 0).unwrap();
    let at_rest = |topology: &Topology, rule: &dyn Fn(&FileSystem) -> Option<String>| {
        let at_rest = plan(&mounts, topology, rule).at_rest(&Scope::default());
        at_rest.watched.into_keys().collect::<Vec<_>>()
    };
    let words = |all: &[Watched]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    let all = at_rest(&topology, &|_| None);
    let outside = "/dev/sda outside of its partitions";
    assert_eq!(
        words(&all),
        [outside, "/dev/dm-1", "/dev/dm-2", "/dev/dm-3"]
    );
    // What is known to be written to.
    let swap = ["253:2", "253:0", "8:1", "8:0"].map(dev).into();
    let mut but_swap = all;
    but_swap.retain(|it| !it.counts(&swap));
    assert_eq!(words(&but_swap), [outside, "/dev/dm-1", "/dev/dm-3"]);
    let excluded = at_rest(&topology, &|_| Some("a rule".into()));
    assert_eq!(words(&excluded), [outside, "/dev/dm-2", "/dev/dm-3"]);
    // What holds the whole disk writes past its partitions.
    let whole = topology.above.get_mut(&dev("8:0")).unwrap();
    whole.holders.push(dev("253:3"));
    let multipath = at_rest(&topology, &|_| None);
    assert_eq!(words(&multipath), ["/dev/dm-1", "/dev/dm-2", "/dev/dm-3"]);
}

#[test]
fn what_may_have_a_part_of_any_disk_is_never_left_out_for_others() {
    let table = "\
1 0 8:0 / / rw - ext4 /dev/sda rw
2 1 8:16 / /several rw - f2fs /dev/sdb rw
3 1 8:32 / /one rw - ext4 /dev/sdc rw
";
    let mut topology = topology(vec![
        ("8:0", disk(&[])),
        ("8:16", disk(&[])),
        ("8:32", disk(&[])),
    ]);
    topology.unclear.insert(dev("8:16"));
    let mut plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
    plan.leave_out_all_but(&BTreeSet::from([dev("8:0")]));
    let left_out: Vec<String> = plan
        .left_out
        .iter()
        .map(|it| it.file_system.to_string())
        .collect();
    assert_eq!(left_out, ["/one (ext4, 8:32)"]);
}

#[test]
fn what_is_mounted_nowhere_is_planned_and_named_by_its_device() {
    let table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
    let mut topology = topology(vec![("7:0", loop_on("/img", Some("8:1")))]);
    topology.unmounted.push(Unmounted {
        fs_type: "xfs".into(),
        name: "loop0".into(),
        devices: vec![dev("7:0")],
        listed: None,
        unreachable: None,
    });
    let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
    let names: Vec<String> = plan.waves.iter().flatten().map(|f| f.to_string()).collect();
    assert_eq!(
        names,
        [
            "loop0 (xfs, 7:0, in use but mounted nowhere)",
            "/ (ext4, 8:1)"
        ]
    );
}

#[test]
fn whether_there_was_an_error_is_asked_where_mounts_do_not_tell() {
    let here = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /turned rw - ext4 /dev/sda2 ro
3 1 8:2 /a /bind ro - ext4 /dev/sda2 ro
4 1 8:3 / /made-read-only ro - ext4 /dev/sda3 ro
5 1 8:3 /a /made rw - ext4 /dev/sda3 ro
6 1 8:4 / /only-the-superblock rw - ext4 /dev/sda4 ro
7 1 8:5 / /fsck-was-never-run ro - ext4 /dev/sda5 ro
8 1 8:8 / /unknown rw - ext4 /dev/sda8 ro
9 1 8:8 /a /unknown-bind ro - ext4 /dev/sda8 ro
";
    let there = "\
11 0 8:6 / /in-a-container rw - xfs /dev/sda6 rw
12 11 8:7 / /turned-there rw - btrfs /dev/sda7 ro
13 11 8:9 / /read-only-there ro - ext4 /dev/sda9 ro
";
    let mut mounts = parse(here.as_bytes(), 0).unwrap();
    mounts.extend(parse(there.as_bytes(), 1).unwrap());
    let mut topology = Topology::default();
    for (number, count) in [("8:2", 1), ("8:3", 0), ("8:4", 0), ("8:5", 7)] {
        topology.errors.insert(dev(number), count);
    }
    let plan = plan(&mounts, &topology, &|_| None);
    let not_only_read_only = plan.left_out.iter();
    let not_only_read_only = not_only_read_only.filter(|it| it.reason != Reason::ReadOnly);
    let said: Vec<_> = not_only_read_only
        .map(|it| {
            (
                it.file_system.places[0].path.to_str(),
                it.reason.is_a_loss(),
            )
        })
        .collect();
    // The second has not been asked yet.
    let expected = [(Some("/turned"), true), (Some("/turned-there"), true)];
    assert_eq!(said, expected);
    assert_eq!(plan.left_out.len(), 7);
}

#[test]
fn what_may_be_mounted_nowhere_is_a_loss() {
    let table = "1 0 0:40 / / rw - btrfs /dev/root rw\n";
    let mut topology = Topology::default();
    topology.members.insert(dev("0:40"), Vec::new());
    topology.unclear_unmounted = ["8:1", "8:2"]
        .map(|number| Unmounted {
            fs_type: "btrfs".into(),
            name: number.into(),
            devices: vec![dev(number)],
            listed: None,
            unreachable: None,
        })
        .into();
    let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
    let chosen = plan.waves.concat();
    // It may be on anything.
    assert!(chosen.len() == 1 && chosen[0].stands_on.is_none());
    assert_eq!(plan.left_out.len(), 2);
    assert!(plan.left_out.iter().all(|it| it.reason.is_a_loss()));
}

#[test]
fn one_whose_devices_are_not_known_may_be_on_all_that_it_may_be() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /images rw - ext4 /dev/sda2 rw
3 1 0:40 / /a rw - btrfs /run/a rw
4 1 0:41 / /b rw - btrfs /run/b rw
";
    let mut topology = topology(vec![
        ("7:1", loop_on("/images/a", Some("8:2"))),
        ("9:0", disk(&["8:16", "8:32"])),
        ("8:16", disk(&[])),
        ("8:32", disk(&[])),
        ("8:1", disk(&[])),
        ("8:2", disk(&[])),
    ]);
    let perhaps = vec![dev("7:1"), dev("9:0")];
    for it in ["0:40", "0:41"] {
        topology.members.insert(dev(it), Vec::new());
        topology.perhaps.insert(dev(it), perhaps.clone());
    }
    let plan = plan(&parse(table.as_bytes(), 0).unwrap(), &topology, &|_| None);
    let waves = plan.waves.iter().map(|wave| {
        let devs = wave.iter().map(|it| it.dev.to_string());
        devs.collect::<Vec<_>>().join(" ")
    });
    assert!(waves.eq(["0:41", "0:40", "8:2", "8:1"]));
    for it in plan.waves[..2].concat() {
        assert_eq!((it.stands_on.as_ref(), it.below.as_ref()), (None, None));
        assert_eq!(it.disks, ["8:2", "8:16", "8:32"].map(dev));
        assert_eq!(it.may_be_on().copied().collect::<Vec<_>>(), perhaps);
    }
}

#[test]
fn what_is_out_of_order_is_left_out_by_name_unless_a_rule_did_so_before() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /errors rw - ext4 /dev/sda2 rw,errors=remount-ro,emergency_ro
3 1 8:3 / /down rw - ext4 /dev/sda3 rw,shutdown
4 1 8:4 / /gone rw - xfs /dev/sda4 rw
5 1 8:5 / /turned rw - ext4 /dev/sda5 ro
6 1 8:6 / /on-purpose ro - ext4 /dev/sda6 ro
7 1 8:7 / /image rw - squashfs /dev/sda7 ro
8 1 8:8 / /unwanted rw - ext4 /dev/sda8 rw,shutdown
9 1 8:10 / /turned-and-unwanted rw - ext4 /dev/sda10 ro
10 1 0:40 / /made-read-only ro - btrfs /dev/sda9 ro
11 1 0:40 / /bind rw - btrfs /dev/sda9 ro
12 1 8:11 / /cluster rw - ocfs2 /dev/sda11 ro
14 1 8:13 / /own-mount-was ro - vfat /dev/sda13 ro
15 1 8:13 / /as-it-was rw - vfat /dev/sda13 ro
16 1 11:0 / /media rw - iso9660 /dev/sr0 ro
17 1 0:50 / /home/.zfs/snapshot/old rw - zfs tank/home@old ro
18 1 8:12 / /made-so rw - xfs /dev/sda12 ro
";
    let mut topology = Topology::default();
    topology.gone.insert(dev("8:4"));
    topology.turned.insert(dev("8:13"));
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let unwanted = |f: &FileSystem| {
        [dev("8:8"), dev("8:10")]
            .contains(&f.dev)
            .then(|| "a rule".to_owned())
    };
    let plan = plan(&mounts, &topology, &unwanted);
    let left_out: Vec<String> = plan
        .left_out
        .iter()
        .map(|l| format!("{}: {}", l.file_system.places[0].path.display(), l.reason))
        .collect();
    assert_eq!(
        left_out,
        [
            "/errors: out of order: read-only since an error",
            "/down: out of order: shut down after an error",
            "/gone: out of order: its disk is gone",
            "/turned: read-only though mounted for writing, perhaps since an error",
            "/on-purpose: read-only",
            "/image: read-only",
            "/unwanted: excluded by a rule",
            "/turned-and-unwanted: excluded by a rule",
            "/bind: read-only though mounted for writing, perhaps since an error",
            "/cluster: read-only though mounted for writing, perhaps since an error",
            "/as-it-was: read-only though mounted for writing, perhaps since an error",
            "/media: read-only",
            "/home/.zfs/snapshot/old: read-only",
            "/made-so: read-only though mounted for writing, and not since an error",
        ]
    );
    // Nobody can be asked what has made it so.
    let lost = plan.losses().flat_map(|it| &it.file_system.places);
    let lost: Vec<String> = lost.map(|it| it.path.display().to_string()).collect();
    let own = [
        "/bind",
        "/made-read-only",
        "/cluster",
        "/as-it-was",
        "/own-mount-was",
    ];
    assert_eq!(
        lost,
        [&["/errors", "/down", "/gone", "/turned"][..], &own].concat()
    );
    assert_eq!(plan.waves.concat().len(), 1);
}

#[test]
fn what_a_program_serves_and_what_stands_on_it_come_first() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 8:2 / /plain rw - ext4 /dev/sda2 rw
3 1 43:0 / /nbd rw - ext4 /dev/nbd0 rw
4 1 7:0 / /on-nbd rw - ext4 /dev/loop0 rw
";
    let topology = topology(vec![
        ("43:0", served()),
        ("7:0", loop_on("/nbd/img", Some("43:0"))),
    ]);
    assert_eq!(
        waves(table, &topology),
        [vec!["/on-nbd"], vec!["/nbd"], vec!["/plain"], vec!["/"]]
    );
}

#[test]
fn root_comes_before_what_root_itself_stands_on() {
    let table = "\
1 0 7:0 / / rw - ext4 /dev/loop0 rw
2 1 8:1 / /run/live/medium rw - ext4 /dev/sda1 rw
3 1 8:2 / /home rw - ext4 /dev/sda2 rw
";
    let topology = topology(vec![("7:0", loop_on("/live/root.img", Some("8:1")))]);
    assert_eq!(
        waves(table, &topology),
        [vec!["/home"], vec!["/"], vec!["/run/live/medium"]]
    );
}

#[test]
fn a_table_that_contradicts_itself_still_gives_a_plan() {
    let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 7:0 / /a rw - ext4 /dev/loop0 rw
3 1 7:1 / /b rw - ext4 /dev/loop1 rw
";
    let topology = topology(vec![
        ("7:0", loop_on("/b/img", Some("7:1"))),
        ("7:1", loop_on("/a/img", Some("7:0"))),
    ]);
    let planned: usize = waves(table, &topology).iter().map(Vec::len).sum();
    assert_eq!(planned, 3);
}
