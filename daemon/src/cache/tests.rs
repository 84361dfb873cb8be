// SPDX-License-Identifier: GPL-2.0-only

use super::*;
use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use proptest::prelude::*;

use crate::apart::Patience;
use crate::machine::Machine;
use crate::mounts::parse;
use crate::plan::Place;
use crate::topology::{Backing, Device, Topology, Unmounted};

/// File systems are on disks 100:0 and up. Those below 3 are of a type that lists in sysfs what is
/// alive.
const DISKS: u32 = 6;
const LISTED: std::ops::Range<u32> = 0..3;

fn disk(minor: u32) -> DevId {
    DevId { major: 100, minor }
}

/// A loop device on a file in the file system with that number.
fn image_in(minor: u32) -> DevId {
    DevId { major: 200, minor }
}

/// A superblock, from its first mount to its last use.
#[derive(Clone)]
struct Alive {
    generation: u64,
    read_only: bool,
    /// Whether it is in use without a mount that a table shows.
    held: bool,
}

/// A mount namespace: its number, and its mounts by number, with disk and path.
#[derive(Clone, Default)]
struct Space {
    id: u64,
    mounts: BTreeMap<u64, (u32, String)>,
}

/// A machine as the kernel tells of it; what it does not tell is not told here either.
#[derive(Default)]
struct Model {
    /// The own namespace first.
    spaces: Vec<Space>,
    alive: BTreeMap<u32, Alive>,
    /// The disks that are mapped to an image.
    mapped: BTreeMap<u32, u32>,
    /// The disks whose file system was extended to an image.
    grown: BTreeMap<u32, u32>,
    /// How many mounts were made.
    made: u64,
    /// The last number given to anything.
    last: u64,
    own_table_has_changed: bool,
    uevents: u64,
    /// What happens as soon as the tables have been read.
    meanwhile: Option<Step>,
    /// A disk whose file system has shut down.
    shut_down: Option<u32>,
    /// Whether somebody who is asked about the devices does not answer.
    is_silent: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Mount {
        space: usize,
        disk: u32,
        read_only: bool,
    },
    MountNowhere {
        disk: u32,
    },
    Unmount {
        space: usize,
        nth: usize,
        lazily: bool,
    },
    Release {
        disk: u32,
    },
    Remount {
        space: usize,
        nth: usize,
        read_only: bool,
    },
    /// Between reading the tables and looking at what they show.
    RemountMeanwhile {
        space: usize,
        nth: usize,
        read_only: bool,
    },
    /// An error makes it read-only, and nobody tells.
    Fail {
        disk: u32,
    },
    Move {
        space: usize,
        nth: usize,
    },
    NewSpace,
    EndSpace {
        space: usize,
    },
    /// dm tells of it, md does not.
    Map {
        disk: u32,
        image: Option<u32>,
        tells: bool,
    },
    Grow {
        disk: u32,
        image: u32,
    },
    OtherDevice,
    Prepare,
    Backup,
}

impl Model {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn raise(&mut self, disk: u32, read_only: bool, held: bool) {
        let generation = self.number();
        let new = Alive {
            generation,
            read_only,
            held: false,
        };
        self.alive.entry(disk).or_insert(new).held |= held;
    }

    /// Superblocks that nothing uses any more are gone.
    fn bury(&mut self) {
        let mounts = self.spaces.iter().flat_map(|it| it.mounts.values());
        let used: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
        self.alive.retain(|disk, it| it.held || used.contains(disk));
    }

    /// The number of the nth mount in a namespace.
    fn nth(&self, space: usize, nth: usize) -> Option<u64> {
        let ids: Vec<u64> = self.spaces.get(space)?.mounts.keys().copied().collect();
        ids.get(nth % ids.len().max(1)).copied()
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Mount {
                space,
                disk,
                read_only,
            } => {
                self.raise(disk, read_only, false);
                self.made += 1;
                let id = self.number();
                if let Some(it) = self.spaces.get_mut(space) {
                    it.mounts.insert(id, (disk, format!("/m{id}")));
                    self.own_table_has_changed |= space == 0;
                }
                self.bury();
            }
            Step::MountNowhere { disk } => {
                self.raise(disk, false, true);
                self.made += 1;
            }
            Step::Unmount { space, nth, lazily } => {
                let Some(id) = self.nth(space, nth) else {
                    return;
                };
                let gone = self.spaces[space].mounts.remove(&id);
                if let Some(it) = gone.and_then(|(disk, _)| self.alive.get_mut(&disk)) {
                    it.held |= lazily;
                }
                self.own_table_has_changed |= space == 0;
                self.bury();
            }
            Step::Release { disk } => {
                if let Some(it) = self.alive.get_mut(&disk) {
                    it.held = false;
                }
                self.bury();
            }
            Step::Remount {
                space,
                nth,
                read_only,
            } => {
                let Some(id) = self.nth(space, nth) else {
                    return;
                };
                let disk = self.spaces[space].mounts[&id].0;
                if let Some(it) = self.alive.get_mut(&disk) {
                    it.read_only = read_only;
                }
                self.own_table_has_changed |= space == 0;
            }
            Step::RemountMeanwhile {
                space,
                nth,
                read_only,
            } => {
                self.meanwhile = Some(Step::Remount {
                    space,
                    nth,
                    read_only,
                });
            }
            Step::Fail { disk } => {
                if let Some(it) = self.alive.get_mut(&disk) {
                    it.read_only = true;
                }
            }
            Step::Move { space, nth } => {
                let Some(id) = self.nth(space, nth) else {
                    return;
                };
                let new = self.number();
                if let Some(mount) = self.spaces[space].mounts.get_mut(&id) {
                    mount.1 = format!("/moved{new}");
                }
                self.own_table_has_changed |= space == 0;
            }
            Step::NewSpace => {
                let mut copy = Space {
                    id: self.number(),
                    ..Space::default()
                };
                for mount in self.spaces[0].mounts.clone().into_values() {
                    copy.mounts.insert(self.number(), mount);
                }
                self.spaces.push(copy);
            }
            Step::EndSpace { space } => {
                if space > 0 && space < self.spaces.len() {
                    self.spaces.remove(space);
                    self.bury();
                }
            }
            Step::Map { disk, image, tells } => {
                // An image in a file system that was made later would be a circle here.
                let image = image.filter(|it| *it < disk);
                // What is not mapped does not become so without a word.
                if tells || (self.mapped.contains_key(&disk) && image.is_some()) {
                    self.uevents += u64::from(tells);
                    match image {
                        Some(image) => self.mapped.insert(disk, image),
                        None => self.mapped.remove(&disk),
                    };
                }
            }
            // An image in a file system that was made later would be a circle here.
            Step::Grow { disk, image } if image < disk => drop(self.grown.insert(disk, image)),
            Step::Grow { .. } => {}
            Step::OtherDevice => self.uevents += 1,
            Step::Prepare | Step::Backup => {}
        }
    }

    fn tables(&self) -> Vec<String> {
        let line = |id: &u64, (disk, path): &(u32, String)| {
            let way = if self.alive[disk].read_only {
                "ro"
            } else {
                "rw"
            };
            let state = match self.shut_down {
                Some(it) if it == *disk => ",shutdown",
                _ => "",
            };
            format!("{id} 1 100:{disk} / {path} {way} - ext4 /dev/d{disk} {way}{state}\n")
        };
        let table = |it: &Space| it.mounts.iter().map(|(id, m)| line(id, m)).collect();
        self.spaces.iter().map(table).collect()
    }

    fn topology(&self) -> Topology {
        let mut topology = Topology {
            unanswered: self.is_silent,
            ..Topology::default()
        };
        for (&from, &to) in &self.mapped {
            let below = vec![image_in(to)];
            topology.devices.insert(
                disk(from),
                Device {
                    below,
                    ..Device::default()
                },
            );
            let backing = Some(Backing {
                dev: Some(disk(to)),
                path: "/image".into(),
            });
            topology.devices.insert(
                image_in(to),
                Device {
                    backing,
                    ..Device::default()
                },
            );
        }
        for (&from, &to) in &self.grown {
            let backing = Some(Backing {
                dev: Some(disk(to)),
                path: "/image".into(),
            });
            topology.devices.insert(
                image_in(to),
                Device {
                    backing,
                    ..Device::default()
                },
            );
            let members = vec![disk(from), image_in(to)];
            topology.members.insert(disk(from), members);
        }
        let mounts = self.spaces.iter().flat_map(|it| it.mounts.values());
        let shown: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
        // Those that are not listed are found by their devices.
        topology.unmounted = (self.alive.keys())
            .filter(|disk| !shown.contains(disk))
            .map(|&minor| Unmounted {
                fs_type: "ext4".into(),
                name: format!("d{minor}"),
                devices: [disk(minor)]
                    .into_iter()
                    .chain(self.grown.get(&minor).map(|to| image_in(*to)))
                    .collect(),
                listed: None,
                unreachable: None,
            })
            .collect();
        topology
    }
}

#[derive(Clone)]
struct Shared(Rc<RefCell<Model>>);

impl Signals for Shared {
    type Ways = Vec<(u64, usize, Option<u64>)>;
    type States = Self::Ways;
    type Alive = (BTreeMap<u32, u64>, BTreeMap<u32, u32>, u64);
    type At = (u64, u64);

    fn look(&mut self) -> Result<Machine<Self::Ways>, LookError> {
        let ways = self.ways().map_err(LookError::Namespaces)?;
        let model = self.0.borrow();
        let mut mounts = Vec::new();
        for (number, table) in model.tables().iter().enumerate() {
            mounts.extend(parse(table.as_bytes(), number)?);
        }
        let topology = model.topology();
        drop(model);
        let meanwhile = self.0.borrow_mut().meanwhile.take();
        if let Some(step) = meanwhile {
            self.0.borrow_mut().apply(&step);
        }
        Ok(Machine {
            ways,
            mounts,
            topology,
            unseen: Vec::new(),
        })
    }

    fn table_has_changed(&mut self) -> io::Result<bool> {
        Ok(std::mem::take(
            &mut self.0.borrow_mut().own_table_has_changed,
        ))
    }

    fn uevents(&mut self) -> io::Result<u64> {
        Ok(self.0.borrow().uevents)
    }

    fn shows_at_a_glance(_alive: &Self::Alive) -> bool {
        true
    }

    fn alive(&mut self, _at_a_glance: bool) -> io::Result<Self::Alive> {
        let model = self.0.borrow();
        let listed = model.alive.iter().filter(|(disk, _)| LISTED.contains(disk));
        let listed = listed.map(|(disk, it)| (*disk, it.generation)).collect();
        Ok((listed, model.grown.clone(), model.made))
    }

    fn slaves(&mut self, dev: DevId) -> Vec<DevId> {
        let model = self.0.borrow();
        let image = model.mapped.get(&dev.minor).filter(|_| dev.major == 100);
        image.map(|it| image_in(*it)).into_iter().collect()
    }

    fn ways(&mut self) -> io::Result<Self::Ways> {
        let model = self.0.borrow();
        let state = |it: &Space| (it.id, it.mounts.len(), it.mounts.keys().last().copied());
        Ok(model.spaces.iter().skip(1).map(state).collect())
    }

    fn states(ways: &Self::Ways) -> Option<Self::States> {
        Some(ways.clone())
    }

    fn find(
        &mut self,
        ways: &Self::Ways,
        place: &Place,
        _: DevId,
        _: &Patience,
    ) -> Option<(u64, u64)> {
        let space = match place.namespace {
            0 => 0,
            n => ways.get(n - 1)?.0,
        };
        Some((space, place.id))
    }

    fn is_read_only(&mut self, (space, mount): &(u64, u64)) -> Option<bool> {
        let model = self.0.borrow();
        let space = model.spaces.iter().find(|it| it.id == *space)?;
        let (disk, _) = space.mounts.get(mount)?;
        Some(model.alive[disk].read_only)
    }
}

fn step() -> impl Strategy<Value = Step> {
    let (space, nth, disk) = (0..4usize, 0..8usize, 0..DISKS);
    let image = proptest::option::of(0..DISKS);
    prop_oneof![
        4 => (space.clone(), disk.clone(), any::<bool>())
            .prop_map(|(space, disk, read_only)| Step::Mount { space, disk, read_only }),
        1 => disk.clone().prop_map(|disk| Step::MountNowhere { disk }),
        3 => (space.clone(), nth.clone(), any::<bool>())
            .prop_map(|(space, nth, lazily)| Step::Unmount { space, nth, lazily }),
        1 => disk.clone().prop_map(|disk| Step::Release { disk }),
        3 => (space.clone(), nth.clone(), any::<bool>())
            .prop_map(|(space, nth, read_only)| Step::Remount { space, nth, read_only }),
        2 => (space.clone(), nth.clone(), any::<bool>())
            .prop_map(|(space, nth, read_only)| Step::RemountMeanwhile { space, nth, read_only }),
        1 => disk.clone().prop_map(|disk| Step::Fail { disk }),
        1 => (space.clone(), nth).prop_map(|(space, nth)| Step::Move { space, nth }),
        1 => Just(Step::NewSpace),
        1 => space.prop_map(|space| Step::EndSpace { space }),
        4 => (disk, image, any::<bool>())
            .prop_map(|(disk, image, tells)| Step::Map { disk, image, tells }),
        1 => (0..DISKS, 0..DISKS).prop_map(|(disk, image)| Step::Grow { disk, image }),
        1 => Just(Step::OtherDevice),
        3 => Just(Step::Prepare),
        4 => Just(Step::Backup),
    ]
}

/// What is frozen, and in which wave.
fn wave_of(plan: &Plan) -> BTreeMap<u32, usize> {
    let waves = plan.waves.iter().enumerate();
    let members = waves.flat_map(|(n, wave)| wave.iter().map(move |it| (it.dev.minor, n)));
    members.collect()
}

/// What a plan made anew would freeze is frozen, and in an order that is right now. What has become read-only
/// since is not among it, as far as a mount shows that: it may have met an error.
fn check(
    model: &Model,
    kept: &BTreeMap<u32, usize>,
    anew: &BTreeMap<u32, usize>,
) -> Result<(), TestCaseError> {
    // One that is gone is found to be when it is opened.
    let writable = |disk: &&u32| model.alive.get(disk).is_some_and(|it| !it.read_only);
    let kept_writable: Vec<&u32> = kept.keys().filter(writable).collect();
    let anew_writable: Vec<&u32> = anew.keys().filter(writable).collect();
    prop_assert_eq!(kept_writable, anew_writable);
    let mounts = model.spaces.iter().flat_map(|it| it.mounts.values());
    let shown: BTreeSet<u32> = mounts.map(|(disk, _)| *disk).collect();
    for disk in kept.keys().filter(|it| shown.contains(it)) {
        let is_writable = model.alive.get(disk).is_none_or(|it| !it.read_only);
        prop_assert!(is_writable, "{} is read-only", disk);
    }
    for disk in anew.keys() {
        prop_assert!(kept.contains_key(disk), "{} is missing", disk);
    }
    for (from, to) in model.mapped.iter().chain(&model.grown) {
        if let (Some(inner), Some(outer)) = (kept.get(from), kept.get(to)) {
            prop_assert!(inner < outer, "{} is on a file in {}", from, to);
        }
    }
    Ok(())
}

/// Takes these steps, and checks at each backup.
fn walk(steps: &[Step]) -> Result<(), TestCaseError> {
    let model = Shared(Rc::new(RefCell::new(Model {
        spaces: vec![Space::default()],
        ..Model::default()
    })));
    let config = Config::default();
    let mut cache = Cache::with(model.clone());
    for step in steps {
        model.0.borrow_mut().apply(step);
        match step {
            Step::Prepare => drop(cache.prepare(&config).unwrap()),
            Step::Backup => {
                if !cache.is_credible() || !cache.holds() {
                    cache.plan(&config).unwrap();
                }
                // It is begun anew for those.
                let is_as_planned = |cache: &mut Cache<Shared>| {
                    let Cache {
                        read_only, signals, ..
                    } = cache;
                    read_only.writable_now(signals).is_empty()
                        && read_only.turned(signals).is_empty()
                };
                while !is_as_planned(&mut cache) {
                    cache.plan(&config).unwrap();
                }
                // Had nobody to look before, it is not to happen under this look.
                model.0.borrow_mut().meanwhile = None;
                let machine = model.clone().look().unwrap();
                let anew = plan(&machine.mounts, &machine.topology, &|_| None);
                check(&model.0.borrow(), &wave_of(&cache.plan), &wave_of(&anew))?;
            }
            _ => {}
        }
    }
    model.0.borrow_mut().meanwhile = None;
    // And a plan that still holds is used, or the whole room would be for nothing.
    cache.plan(&config).unwrap();
    let marks = cache.marks.take().unwrap();
    prop_assert!(marks
        .unchanged(&mut cache.signals, &cache.read_only, false)
        .is_some());
    Ok(())
}

#[test]
fn a_strict_backup_fails_for_what_never_freezes_and_for_what_is_out_of_order() {
    let table = "\
1 0 100:1 / / rw - ext4 /dev/d1 rw
2 1 0:50 / /pool rw - zfs tank rw
3 1 100:2 / /down rw - ext4 /dev/d2 rw,shutdown
4 1 100:3 / /unwanted rw - ext4 /dev/d3 rw,shutdown
5 1 100:4 / /media ro - iso9660 /dev/d4 ro
6 1 100:5 / /turned rw - vfat /dev/d5 ro
";
    let unwanted = |it: &FileSystem| (it.dev == disk(3)).then(|| "a rule".to_owned());
    let mounts = parse(table.as_bytes(), 0).unwrap();
    let plan = plan(&mounts, &Topology::default(), &unwanted);
    let said: Vec<String> = strict_about(&plan).iter().map(Missing::to_string).collect();
    assert_eq!(
            said,
            [
                "/down (ext4, 100:2) is left out: out of order: shut down after an error",
                "/turned (vfat, 100:5) is left out: read-only though mounted for writing, perhaps since an error",
                "/pool (zfs, 0:50) is left out: it has no means to freeze",
            ]
        );
}

#[test]
fn what_has_turned_read_only_is_no_loss_only_if_it_says_so_itself() {
    let is_a_loss = |said| why_turned(said).is_a_loss();
    let lost = [Some(true), Some(false), None].map(is_a_loss);
    assert_eq!(lost, [true, false, true]);
}

#[test]
fn a_plan_is_believed_that_held_and_leads_where_nobody_has_to_mount_anything() {
    let model = Shared(Rc::new(RefCell::new(Model {
        spaces: vec![Space::default()],
        ..Model::default()
    })));
    let config = Config::default();
    let mut cache = Cache::with(model.clone());
    let apply = |step: &Step| model.0.borrow_mut().apply(step);
    let prepare = |cache: &mut Cache<Shared>| drop(cache.prepare(&config).unwrap());
    apply(&mount(4));
    (0..2).for_each(|_| prepare(&mut cache));
    assert!(cache.is_credible());
    cache.doubt();
    assert!(!cache.is_credible(), "it may have changed");
    prepare(&mut cache);
    assert!(cache.is_credible(), "it was looked at");
    apply(&Step::MountNowhere { disk: 5 });
    (0..2).for_each(|_| prepare(&mut cache));
    assert!(!cache.is_credible(), "no path leads to one of them");
}

fn mount(disk: u32) -> Step {
    Step::Mount {
        space: 0,
        disk,
        read_only: false,
    }
}

#[test]
fn a_mount_after_the_plan_is_in_the_first_backup_and_in_the_second() {
    let steps = [
        mount(4),
        Step::Prepare,
        mount(5),
        Step::Backup,
        Step::Backup,
    ];
    walk(&steps).unwrap();
}

#[test]
fn what_becomes_writable_while_the_machine_is_looked_at_is_in_the_backup() {
    let read_only = Step::Mount {
        space: 0,
        disk: 5,
        read_only: true,
    };
    let meanwhile = Step::RemountMeanwhile {
        space: 0,
        nth: 1,
        read_only: false,
    };
    walk(&[mount(4), read_only, meanwhile, Step::Backup]).unwrap();
}

#[test]
fn what_becomes_writable_is_named_though_another_is_out_of_order_and_an_unmount_is_not() {
    let model = Shared(Rc::new(RefCell::new(Model {
        spaces: vec![Space::default()],
        shut_down: Some(4),
        ..Model::default()
    })));
    let mut cache = Cache::with(model.clone());
    let read_only = |disk| Step::Mount {
        space: 0,
        disk,
        read_only: true,
    };
    let apply = |step: &Step| model.0.borrow_mut().apply(step);
    [mount(4), read_only(5), read_only(3)]
        .iter()
        .for_each(apply);
    cache.prepare(&Config::default()).unwrap();
    assert!(cache.marks.is_none(), "nothing tells when it is repaired");
    let writable = |cache: &mut Cache<Shared>| cache.read_only.writable_now(&mut cache.signals);
    assert!(writable(&mut cache).is_empty());
    apply(&Step::Remount {
        space: 0,
        nth: 1,
        read_only: false,
    });
    assert_eq!(writable(&mut cache), ["/m4 (ext4, 100:5)"]);
    apply(&Step::Unmount {
        space: 0,
        nth: 1,
        lazily: false,
    });
    assert!(writable(&mut cache).is_empty());
}

#[test]
fn a_plan_for_want_of_an_answer_is_not_kept() {
    let model = Shared(Rc::new(RefCell::new(Model {
        spaces: vec![Space::default()],
        is_silent: true,
        ..Model::default()
    })));
    let mut cache = Cache::with(model.clone());
    model.0.borrow_mut().apply(&mount(4));
    for is_kept in [false, true] {
        cache.prepare(&Config::default()).unwrap();
        assert_eq!(cache.marks.is_some(), is_kept);
        model.0.borrow_mut().is_silent = false;
    }
}

#[test]
fn what_an_error_makes_read_only_without_a_word_is_in_no_backup_after_that() {
    let fail = Step::Fail { disk: 4 };
    let steps = [
        mount(3),
        mount(4),
        Step::Prepare,
        fail,
        Step::Backup,
        Step::Backup,
    ];
    walk(&steps).unwrap();
}

#[test]
fn a_disk_that_is_mapped_anew_without_a_word_is_in_its_new_place() {
    let map = |image, tells| Step::Map {
        disk: 5,
        image: Some(image),
        tells,
    };
    let mounts = [mount(3), mount(4), mount(5)];
    let steps = [
        &mounts[..],
        &[map(3, true), Step::Backup, map(4, false), Step::Backup],
    ];
    walk(&steps.concat()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn whatever_happens_a_backup_has_the_plan_that_would_be_made_anew(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        walk(&steps)?;
    }
}

/// What is opened for one is never taken for another's, should two have one number.
#[test]
fn each_is_opened_as_itself_also_behind_two_of_one_number() {
    let dev_of = |path: &str| {
        use std::os::unix::fs::MetadataExt as _;
        DevId::from_raw(std::fs::metadata(path).unwrap().dev())
    };
    let file_system = |path: &str| FileSystem {
        dev: dev_of(path),
        fs_type: "ext4".into(),
        source: None,
        devices: vec![dev_of(path)],
        listed: None,
        disks: Vec::new(),
        below: None,
        stands_on: None,
        perhaps_on: Vec::new(),
        places: vec![Place {
            namespace: 0,
            id: 0,
            path: path.into(),
            whole: true,
            subvolume: None,
            walkable: true,
            layers: None,
            hidden: false,
            was_at: None,
        }],
    };
    let mut planned = Plan {
        waves: vec![
            vec![file_system("/proc"), file_system("/proc")],
            vec![file_system("/")],
        ],
        ..Plan::default()
    };
    leave_out_namesakes(&mut planned);
    let ways = Kernel::default().own_way().unwrap();
    let mut open = BTreeMap::new();
    // A second attempt finds them open.
    for _ in 0..2 {
        let opened = open_all(Duration::from_secs(60), &ways, planned.clone(), &mut open);
        let (plan, ..) = opened.unwrap();
        for (dev, fd) in &open {
            assert_eq!(*dev, crate::sys::identify(fd.as_fd()).unwrap().dev());
        }
        assert_eq!(open.len(), 2);
        let frozen: Vec<usize> = plan.waves.iter().map(Vec::len).collect();
        assert_eq!((frozen, plan.left_out.len()), (vec![1, 1], 1));
    }
}
