// SPDX-License-Identifier: GPL-2.0-only

//! Visits every state that what is held can reach with two callers, two file systems and workers that take as long as
//! they like, and checks on the way:
//!
//! - what is frozen is held, with a deadline, or has a work that thaws it, and again until that succeeds;
//! - a slot has one work at a time, and a file system one that freezes it;
//! - who is told that it is not held does not find it held later, and who is told that it is held finds it so then;
//! - nothing that was let go is held, or begun for who asked before that;
//! - a series ends when nothing of it is left, and what hangs of it takes neither place nor deadline of the next one;
//! - a file system whose thaw fails says so to who wants it next, and the other one can be held.

use hv_vss_engine::hold::{
    Begun, Entry, Held, HoldEffects, LetGo, Matter, Request, Room, Stage, Ticket, Trouble,
};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A list with room for so many.
struct List<T>(Vec<T>, usize);

impl<T> Default for List<T> {
    fn default() -> Self {
        List(Vec::new(), 0)
    }
}

impl<T> Room<T> for List<T> {
    fn capacity(&self) -> usize {
        self.1
    }
    fn all(&self) -> &[T] {
        &self.0
    }
    fn all_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
    fn push(&mut self, one: T) -> Result<(), T> {
        if self.0.len() == self.1 {
            return Err(one);
        }
        self.0.push(one);
        Ok(())
    }
    fn pop(&mut self) -> Option<T> {
        self.0.pop()
    }
    fn remove(&mut self, at: usize) -> Option<T> {
        (at < self.0.len()).then(|| self.0.remove(at))
    }
}

struct Model;

/// A file system that is kept mounted; by one at a time.
struct Mounted(u8);

impl Matter for Model {
    type FileSystem = Mounted;
    type Identity = u8;
    type Module = ();
    type Slot = usize;
    type Error = u8;
    type Time = ();
    type Entries = List<Entry<Self>>;
    type Slots = List<usize>;
}

/// A file system that cannot be frozen, and one that cannot be thawed, say so.
const BAD: u8 = 1;
const STUCK: u8 = 2;

/// A work: queued, or what a worker has in hand.
enum Work {
    FreezeQueued,
    Freezes(Mounted),
    ThawQueued,
    Thaws(Mounted),
}

/// The works of all slots.
#[derive(Default)]
struct Works(BTreeMap<usize, Work>);

impl HoldEffects<Model> for Works {
    fn queue_freeze(&mut self, slot: &usize) {
        let before = self.0.insert(*slot, Work::FreezeQueued);
        assert!(before.is_none(), "two works on one slot");
    }
    fn queue_thaw(&mut self, slot: &usize, _ms: u32) {
        let before = self.0.insert(*slot, Work::ThawQueued);
        assert!(before.is_none(), "two works on one slot");
    }
    fn wake(&mut self, _slot: &usize) {}
}

/// What a caller does.
enum Caller {
    Idle,
    /// It has asked for a freeze, which is to be begun.
    Asks(Box<Request<Model>>),
    /// It waits until its freeze is done.
    Freezes(Ticket<Model>),
    /// It waits for the thaw of the same file system.
    Waits(Box<Request<Model>>, Ticket<Model>),
    /// It waits for a thaw.
    Thaws(Ticket<Model>),
    /// It waits until all is thawed; what that was, and whether a thaw has failed.
    ThawsAll(LetGo, Vec<u64>, Ticket<Model>, bool),
}

/// Which of two: callers, and file systems.
const TWO: [u8; 2] = [0, 1];
/// How many a series has, and how many there may be in all.
const COUNT: usize = 2;
const MAX: usize = 3;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// This caller asks for a freeze of this file system.
    Ask(u8, u8),
    /// ... begins it, with memory set aside for it where it is the first.
    Begin(u8),
    /// ... looks whether it has waited for long enough.
    Look(u8),
    /// ... is killed, or its time is over.
    GiveUp(u8),
    /// ... has this file system thawed.
    Thaw(u8, u8),
    /// ... all of them.
    ThawAll(u8),
    /// All is let go, as at the deadline.
    LetGo,
    /// ... for the one who held is gone.
    Forget,
    /// A worker takes the work of the entry at this place.
    Take(usize),
    /// It has done it.
    Done(usize),
    /// It has failed.
    Fails(usize),
    /// It finds that it is not frozen for us.
    IsForeign(usize),
}

fn events() -> Vec<Event> {
    let mut all = vec![Event::LetGo, Event::Forget];
    for caller in TWO {
        all.extend([
            Event::Begin(caller),
            Event::Look(caller),
            Event::GiveUp(caller),
            Event::ThawAll(caller),
        ]);
        for which in TWO {
            all.extend([Event::Ask(caller, which), Event::Thaw(caller, which)]);
        }
    }
    for at in 0..MAX {
        all.extend([
            Event::Take(at),
            Event::Done(at),
            Event::Fails(at),
            Event::IsForeign(at),
        ]);
    }
    all
}

struct World {
    held: Held<Model>,
    works: Works,
    callers: [Caller; 2],
    /// Which file system is frozen, and for which slot.
    frozen: BTreeMap<u8, usize>,
    /// The slot of each entry by its number.
    slots: BTreeMap<u64, usize>,
    /// Entries of which somebody was told that they are not held.
    refused: BTreeSet<u64>,
    /// How the freeze of an entry has failed.
    failed: BTreeMap<u64, u8>,
    next_slot: usize,
    next_deadline: u64,
}

impl World {
    fn new() -> Self {
        World {
            held: Held::new(List::default()),
            works: Works::default(),
            callers: [Caller::Idle, Caller::Idle],
            frozen: BTreeMap::new(),
            slots: BTreeMap::new(),
            refused: BTreeSet::new(),
            failed: BTreeMap::new(),
            next_slot: 0,
            next_deadline: 1,
        }
    }

    fn request(&self, which: u8) -> Box<Request<Model>> {
        Box::new(Request {
            id: 7,
            module: (),
            file_system: Some(Mounted(which)),
            identity: which,
            count: COUNT,
            since: self.held.asked(),
            spare: List::default(),
            entries: List::default(),
            over: None,
        })
    }

    fn set_aside(&mut self, request: &mut Request<Model>) {
        let slots = self.next_slot..self.next_slot + COUNT;
        self.next_slot += COUNT;
        request.spare = List(slots.collect(), COUNT);
        request.entries = List(Vec::new(), self.held.len() + COUNT);
    }

    /// The number and the slot of the entry at this place.
    fn at(&self, at: usize) -> Option<(u64, usize)> {
        let number = self.held.entries().nth(at)?.number;
        Some((number, self.slots[&number]))
    }

    fn stages(&self) -> Vec<Stage<u8>> {
        self.held.entries().map(|it| it.stage).collect()
    }

    /// How far this file system is, if it is anywhere.
    fn stage_of(&self, which: u8) -> Option<Stage<u8>> {
        let mut entries = self.held.entries();
        let entry = entries.find(|it| it.identity == which && !it.stage.is_done());
        entry.map(|it| it.stage)
    }

    fn unwatch(&mut self, number: u64) {
        self.held.unwatch(number);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Ask(caller, which) => {
                if let Caller::Idle = self.callers[usize::from(caller)] {
                    self.callers[usize::from(caller)] = Caller::Asks(self.request(which));
                }
            }
            Event::Begin(caller) => self.begin(caller),
            Event::Look(caller) => self.look(caller, false),
            Event::GiveUp(caller) => self.look(caller, true),
            Event::Thaw(caller, which) => {
                let Caller::Idle = self.callers[usize::from(caller)] else {
                    return;
                };
                let was = self.stage_of(which);
                let thaw = self.held.begin_thaw(which, (), &mut self.works);
                match (was, thaw) {
                    (Some(Stage::Held), Ok(Some(ticket))) => {
                        self.callers[usize::from(caller)] = Caller::Thaws(ticket);
                    }
                    (Some(Stage::Freezing), Ok(None)) => {}
                    (Some(Stage::CalledOff | Stage::Thawing(None)), Err(Trouble::Busy)) => {}
                    (Some(Stage::Thawing(Some(STUCK))), Err(Trouble::Said(STUCK))) => {}
                    (None, Err(Trouble::NotHeld)) => {}
                    (was, thaw) => panic!("{was:?}: {:?}", thaw.map(|it| it.is_some())),
                }
            }
            Event::ThawAll(caller) => {
                if let Caller::Idle = self.callers[usize::from(caller)] {
                    let held = self.held.entries().filter(|it| it.stage == Stage::Held);
                    let held = held.map(|it| it.number).collect();
                    let let_go = self.let_go();
                    self.wait_for_next(caller, let_go, let_go.before, held, false);
                }
            }
            Event::LetGo => {
                self.let_go();
            }
            Event::Forget => {
                self.let_go();
                self.held.forget();
            }
            Event::Take(at) => self.take(at),
            Event::Done(at) => self.done(at, Ok(())),
            Event::Fails(at) => self.done(at, Err(true)),
            Event::IsForeign(at) => self.done(at, Err(false)),
        }
        self.check();
    }

    fn begin(&mut self, caller: u8) {
        let caller = usize::from(caller);
        let mut request = match std::mem::replace(&mut self.callers[caller], Caller::Idle) {
            Caller::Asks(request) => request,
            other => {
                self.callers[caller] = other;
                return;
            }
        };
        let is_off = self.held.asked_of(u64::MAX) > request.since;
        let stages = self.stages();
        let is_active = stages
            .iter()
            .any(|it| matches!(it, Stage::Freezing | Stage::Held));
        let active = self.held.deadline().filter(|_| is_active);
        let same = self.stage_of(request.identity);
        let deadline = self.next_deadline;
        let mut begun = self
            .held
            .begin(&mut request, MAX, deadline, (), &mut self.works);
        if let Ok(Begun::First) = begun {
            self.set_aside(&mut request);
            begun = self
                .held
                .begin(&mut request, MAX, deadline, (), &mut self.works);
        }
        assert_eq!(
            is_off,
            matches!(begun, Err(Trouble::Stale)),
            "what was called off"
        );
        self.callers[caller] = match begun {
            Ok(Begun::Queued(ticket)) => {
                assert!(same.is_none(), "two freezes of one");
                let expected = active.unwrap_or(deadline);
                assert_eq!(self.held.deadline(), Some(expected), "whose deadline it is");
                self.next_deadline += 1;
                self.slots.insert(ticket.number, ticket.slot);
                Caller::Freezes(ticket)
            }
            Ok(Begun::First) => panic!("there was memory for it"),
            Ok(Begun::After(ticket)) => {
                let is_going = matches!(same, Some(Stage::CalledOff | Stage::Thawing(_)));
                assert!(is_going, "waits for {same:?}");
                Caller::Waits(request, ticket)
            }
            Err(Trouble::Busy) => {
                assert!(matches!(same, Some(Stage::Freezing | Stage::Held)));
                Caller::Idle
            }
            Err(Trouble::NoRoom) => {
                // Those of this series, or all with what hangs.
                let used = self.held.entries().filter(|it| it.series == 0).count();
                let full = match active {
                    Some(_) => used == COUNT,
                    None => self.held.len() + COUNT > MAX,
                };
                assert!(full, "there is room");
                Caller::Idle
            }
            Err(Trouble::Stale) => Caller::Idle,
            Err(other) => panic!("{other:?}"),
        };
    }

    /// A caller looks at what it waits for, for the last time if it gives up.
    fn look(&mut self, caller: u8, gives_up: bool) {
        let at = usize::from(caller);
        self.callers[at] = match std::mem::replace(&mut self.callers[at], Caller::Idle) {
            Caller::Freezes(ticket) => {
                let number = ticket.number;
                if self.held.stage(number) == Stage::Freezing && !gives_up {
                    self.callers[at] = Caller::Freezes(ticket);
                    return;
                }
                match self.held.give_up(number, (), &mut self.works) {
                    Stage::Held => {}
                    Stage::Failed(Some(error)) => {
                        assert_eq!(self.failed.get(&number), Some(&error));
                        self.refused.insert(number);
                    }
                    Stage::Freezing
                    | Stage::CalledOff
                    | Stage::Thawing(_)
                    | Stage::Thawed(_)
                    | Stage::Failed(None) => {
                        assert!(!self.failed.contains_key(&number), "its error is lost");
                        self.refused.insert(number);
                    }
                }
                self.unwatch(number);
                Caller::Idle
            }
            Caller::Waits(request, ticket) => {
                let (number, stage) = (ticket.number, self.held.stage(ticket.number));
                let is_off = self.held.asked_of(number) > request.since;
                if !stage.has_come_back() && !is_off && !gives_up {
                    self.callers[at] = Caller::Waits(request, ticket);
                    return;
                }
                self.unwatch(number);
                match stage {
                    Stage::Failed(_) | Stage::Thawed(Ok(())) if !is_off => Caller::Asks(request),
                    // What the kernel says then, it says to whoever asked.
                    _ => Caller::Idle,
                }
            }
            Caller::Thaws(ticket) => {
                let stage = self.held.stage(ticket.number);
                if !stage.has_come_back() && !gives_up {
                    self.callers[at] = Caller::Thaws(ticket);
                    return;
                }
                self.unwatch(ticket.number);
                Caller::Idle
            }
            Caller::ThawsAll(let_go, held, ticket, has_failed) => {
                let stage = self.held.stage(ticket.number);
                if !stage.has_come_back() && !gives_up {
                    self.callers[at] = Caller::ThawsAll(let_go, held, ticket, has_failed);
                    return;
                }
                self.unwatch(ticket.number);
                if !gives_up {
                    let failed = !matches!(stage, Stage::Failed(_) | Stage::Thawed(Ok(())));
                    let before = ticket.number;
                    self.wait_for_next(caller, let_go, before, held, has_failed || failed);
                    return;
                }
                Caller::Idle
            }
            other => other,
        };
    }

    fn wait_for_next(
        &mut self,
        caller: u8,
        let_go: LetGo,
        before: u64,
        held: Vec<u64>,
        has_failed: bool,
    ) {
        let next = self.held.unthawed(let_go, before);
        if next.is_none() && !has_failed {
            let left = self.held.entries();
            let left = left.filter(|it| held.contains(&it.number) && !it.stage.is_done());
            assert_eq!(left.count(), 0, "it has not waited for all");
        }
        self.callers[usize::from(caller)] = match next {
            Some(ticket) => Caller::ThawsAll(let_go, held, ticket, has_failed),
            None => Caller::Idle,
        };
    }

    fn let_go(&mut self) -> LetGo {
        let stages = self.stages();
        let (let_go, _) = self.held.let_go((), &mut self.works);
        assert_eq!(let_go.held, stages.contains(&Stage::Held));
        assert_eq!(let_go.freezing, stages.contains(&Stage::Freezing));
        let left = self.stages();
        let is_left = |it: &Stage<u8>| matches!(it, Stage::Held | Stage::Freezing);
        assert!(!left.iter().any(is_left), "held after it was let go");
        assert_eq!(self.held.deadline(), None);
        let_go
    }

    fn take(&mut self, at: usize) {
        let Some((number, slot)) = self.at(at) else {
            return;
        };
        let freezes = match self.works.0.get(&slot) {
            Some(Work::FreezeQueued) => true,
            Some(Work::ThawQueued) => false,
            Some(Work::Freezes(_) | Work::Thaws(_)) | None => return,
        };
        self.works.0.remove(&slot);
        let task = self.held.take(&slot).expect("a work for what is not there");
        if !freezes {
            self.works.0.insert(slot, Work::Thaws(task.file_system));
        } else if task.stage == Stage::CalledOff {
            let end = Stage::Failed(None);
            self.held.finished(&slot, end, (), &mut self.works);
            self.refused.insert(number);
        } else {
            assert_eq!(task.stage, Stage::Freezing);
            self.works.0.insert(slot, Work::Freezes(task.file_system));
        }
    }

    /// A worker has done its work, or it has failed, or (false) found that it is not frozen for us.
    fn done(&mut self, at: usize, result: Result<(), bool>) {
        let Some((number, slot)) = self.at(at) else {
            return;
        };
        if let Some(Work::FreezeQueued | Work::ThawQueued) = self.works.0.get(&slot) {
            return;
        }
        match (self.works.0.remove(&slot), result) {
            (Some(Work::Freezes(mounted)), Ok(())) => {
                let before = self.frozen.insert(mounted.0, slot);
                assert!(before.is_none(), "frozen twice");
                self.held.frozen(&slot, mounted, (), &mut self.works);
            }
            (Some(Work::Freezes(_)), Err(_)) => {
                self.failed.insert(number, BAD);
                let end = Stage::Failed(Some(BAD));
                self.held.finished(&slot, end, (), &mut self.works);
            }
            (Some(Work::Thaws(mounted)), Err(true)) => {
                self.held.stuck(&slot, mounted, STUCK, (), &mut self.works);
            }
            (Some(Work::Thaws(mounted)), result) => {
                self.frozen.remove(&mounted.0);
                let end = Stage::Thawed(result.map_err(|_| STUCK));
                self.held.finished(&slot, end, (), &mut self.works);
            }
            (Some(Work::FreezeQueued | Work::ThawQueued) | None, _) => {}
        }
    }

    fn check(&self) {
        self.held.check().expect("an invariant");
        let mut watches = BTreeMap::new();
        for caller in &self.callers {
            let ticket = match caller {
                Caller::Freezes(ticket)
                | Caller::Waits(_, ticket)
                | Caller::Thaws(ticket)
                | Caller::ThawsAll(_, _, ticket, _) => ticket,
                Caller::Idle | Caller::Asks(_) => continue,
            };
            *watches.entry(ticket.number).or_insert(0) += 1;
        }
        for it in self.held.entries() {
            let (number, identity, stage, watched) = (it.number, it.identity, it.stage, it.watches);
            let slot = self.slots[&number];
            let watchers = watches.remove(&number).unwrap_or(0);
            assert_eq!(watched, watchers, "who watches it");
            let is_held = self.frozen.get(&identity) == Some(&slot);
            let work = self.works.0.get(&slot);
            match stage {
                Stage::Freezing => {
                    assert!(matches!(work, Some(Work::FreezeQueued | Work::Freezes(_))))
                }
                Stage::CalledOff => {
                    assert!(matches!(work, Some(Work::FreezeQueued | Work::Freezes(_))))
                }
                Stage::Held => {
                    assert!(is_held && work.is_none(), "held, and not frozen");
                    assert!(!self.refused.contains(&number), "held after all");
                }
                Stage::Thawing(_) => {
                    assert!(is_held, "a thaw of what is not frozen");
                    let thaws = matches!(work, Some(Work::ThawQueued | Work::Thaws(_)));
                    assert!(thaws, "frozen, and nobody thaws it");
                }
                Stage::Failed(_) | Stage::Thawed(_) => {
                    assert!(!is_held && work.is_none(), "done, and frozen");
                }
            }
        }
        assert!(watches.is_empty(), "watched, and gone");
        for slot in self.frozen.values() {
            let mut numbers = self.held.entries().map(|it| it.number);
            let is_there = numbers.any(|number| self.slots[&number] == *slot);
            assert!(is_there, "frozen, and forgotten");
        }
    }

    /// What tells two of them apart, without numbers, and whichever caller and file system is the first.
    fn state(&mut self) -> impl std::hash::Hash + Eq {
        let asked_of: Vec<_> = self
            .callers
            .iter()
            .map(|it| match it {
                Caller::Asks(it) => Some((it.since, u64::MAX)),
                Caller::Waits(it, ticket) => Some((it.since, ticket.number)),
                Caller::Idle | Caller::Freezes(_) | Caller::Thaws(_) | Caller::ThawsAll(..) => None,
            })
            .collect();
        let is_off: Vec<_> = asked_of
            .into_iter()
            .map(|it| it.map(|(since, number)| self.held.asked_of(number) > since))
            .collect();
        let all_waits = self
            .callers
            .iter()
            .any(|it| matches!(it, Caller::ThawsAll(..)));
        let numbers: Vec<_> = self.held.entries().map(|it| it.number).collect();
        let place = |ticket: &Ticket<Model>| numbers.iter().position(|it| *it == ticket.number);
        let work = |slot: usize| match self.works.0.get(&slot) {
            None => 0,
            Some(Work::FreezeQueued) => 1,
            Some(Work::Freezes(_)) => 2,
            Some(Work::ThawQueued) => 3,
            Some(Work::Thaws(_)) => 4,
        };
        let seen_as = |swaps: u8| {
            let entries: Vec<_> = self
                .held
                .entries()
                .map(|it| {
                    (
                        it.identity ^ swaps,
                        it.stage,
                        work(self.slots[&it.number]),
                        it.series.min(1),
                        all_waits && it.is_forgotten,
                    )
                })
                .collect();
            let mut callers: Vec<_> = self
                .callers
                .iter()
                .zip(&is_off)
                .map(|(it, off)| match it {
                    Caller::Idle => (0, 0, None, *off),
                    Caller::Asks(it) => (1, it.identity ^ swaps, None, *off),
                    Caller::Freezes(ticket) => (2, 0, place(ticket), *off),
                    Caller::Waits(it, ticket) => (3, it.identity ^ swaps, place(ticket), *off),
                    Caller::Thaws(ticket) => (4, 0, place(ticket), *off),
                    Caller::ThawsAll(_, _, ticket, _) => (5, 0, place(ticket), *off),
                })
                .collect();
            callers.sort();
            (entries, callers)
        };
        (std::cmp::min(seen_as(0), seen_as(1)), self.held.spare())
    }

    /// Workers do all that there is to do, and callers see it: what is held then is let go, and nothing is left.
    fn drain(&mut self) {
        for let_go in [false, true] {
            if let_go {
                self.happen(Event::LetGo);
            }
            for _ in 0..6 {
                for at in (0..MAX).rev() {
                    self.happen(Event::Take(at));
                    self.happen(Event::Done(at));
                }
                for caller in TWO {
                    self.happen(Event::Look(caller));
                }
            }
            let left = self.stages();
            assert!(left.iter().all(|it| *it == Stage::Held), "{left:?} is left");
        }
        assert!(self.held.is_idle() && self.frozen.is_empty());
        assert!(self.works.0.is_empty() && self.held.is_empty());
        // And another one can be held.
        self.callers = [Caller::Idle, Caller::Idle];
        self.happen(Event::Ask(0, 0));
        self.happen(Event::Begin(0));
        self.happen(Event::Begin(0));
        assert_eq!(self.stages(), [Stage::Freezing]);
    }
}

fn replay(path: &[Event]) -> World {
    let mut world = World::new();
    for event in path {
        world.happen(*event);
    }
    world
}

/// Says which way has led to a promise that was broken.
struct Way<'a>(&'a [Event], Option<Event>);

impl Drop for Way<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {:?}: {:?}", self.0, self.1);
        }
    }
}

#[test]
fn every_state_keeps_the_promises() {
    let mut seen = HashSet::new();
    let mut paths = vec![Vec::new()];
    seen.insert(World::new().state());
    let (mut depth, all) = (0, events());
    let mut changing = vec![false; all.len()];
    while let Some(next) = (!paths.is_empty()).then(|| std::mem::take(&mut paths)) {
        for path in next {
            depth = depth.max(path.len());
            let way = Way(&path, None);
            replay(&path).drain();
            drop(way);
            for (event, changes) in all.iter().zip(&mut changing) {
                let mut world = replay(&path);
                let before = world.state();
                let way = Way(&path, Some(*event));
                world.happen(*event);
                drop(way);
                let after = world.state();
                *changes |= after != before;
                if seen.insert(after) {
                    paths.push([&path[..], &[*event]].concat());
                }
            }
        }
    }
    println!("{} states, the farthest {depth} events away", seen.len());
    let idle: Vec<_> = all.iter().zip(&changing).filter(|it| !it.1).collect();
    assert!(idle.is_empty(), "the walk has lost {idle:?}");
}
