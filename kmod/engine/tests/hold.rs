// SPDX-License-Identifier: GPL-2.0-only

//! Visits every state that what is held can reach with two callers, two file systems and workers that take as long as
//! they like, and checks on the way:
//!
//! - what is frozen is held, with a deadline, or has a work that thaws it, and again until that succeeds;
//! - a slot has one work at a time, and a file system one that freezes it;
//! - who is told that it is not held does not find it held later, and who is told that it is held finds it so then;
//! - nothing that was let go is held, or begun for who asked before that;
//! - what is held on one behalf is not thawed on another's, nor is what waits for that called off;
//! - who waits and can go on has been woken;
//! - a series ends when nothing of it is left, and what hangs of it takes neither place nor deadline of the next one;
//! - a file system whose thaw fails says so to who wants it next, and the other one can be held.
//!
//! What was called off, which series an entry is of and what is forgotten the walk records itself, from the events
//! alone, so that a machine that is wrong about it does not agree with itself.

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
struct Works {
    of_slot: BTreeMap<usize, Work>,
    /// Whose waiters were woken since this was cleared.
    woken: BTreeSet<usize>,
}

impl HoldEffects<Model> for Works {
    fn queue_freeze(&mut self, slot: &usize) {
        let before = self.of_slot.insert(*slot, Work::FreezeQueued);
        assert!(before.is_none(), "two works on one slot");
    }
    fn queue_thaw(&mut self, slot: &usize, _ms: u32) {
        let before = self.of_slot.insert(*slot, Work::ThawQueued);
        assert!(before.is_none(), "two works on one slot");
    }
    fn wake(&mut self, slot: &usize) {
        self.woken.insert(*slot);
    }
}

/// A freeze that was asked for, and what the walk knows of it.
struct Asked {
    request: Box<Request<Model>>,
    /// All was let go since.
    is_off: bool,
    /// Entries that were on their way to be thawed when their thaw was asked for since, on the same behalf: who waits for
    /// one of them is called off with it.
    thaws: BTreeSet<u64>,
}

impl Asked {
    /// Whether it is called off while it waits for the entry with this number.
    fn is_off(&self, number: u64) -> bool {
        self.is_off || self.thaws.contains(&number)
    }
}

/// What is to be thawed before a thaw of all is over.
struct All {
    let_go: LetGo,
    /// The entries of that series on that behalf, but for what was forgotten by then.
    its: Vec<u64>,
    /// Those that were held.
    held: Vec<u64>,
    /// A thaw has failed.
    has_failed: bool,
}

/// What a caller does.
enum Caller {
    Idle,
    /// It has asked for a freeze, which is to be begun.
    Asks(Asked),
    /// It would be the first: it sets memory aside.
    SetsAside(Asked),
    /// It waits until its freeze is done.
    Freezes(Ticket<Model>),
    /// It waits for the thaw of the same file system.
    Waits(Asked, Ticket<Model>),
    /// It waits for a thaw.
    Thaws(Ticket<Model>),
    /// It waits until all is thawed.
    ThawsAll(All, Ticket<Model>),
}

impl Caller {
    /// The freeze that it has asked for and that is not begun.
    fn asked(&self) -> Option<&Asked> {
        match self {
            Caller::Asks(asked) | Caller::SetsAside(asked) | Caller::Waits(asked, _) => Some(asked),
            Caller::Idle | Caller::Freezes(_) | Caller::Thaws(_) | Caller::ThawsAll(..) => None,
        }
    }

    fn asked_mut(&mut self) -> Option<&mut Asked> {
        match self {
            Caller::Asks(asked) | Caller::SetsAside(asked) | Caller::Waits(asked, _) => Some(asked),
            Caller::Idle | Caller::Freezes(_) | Caller::Thaws(_) | Caller::ThawsAll(..) => None,
        }
    }

    fn ticket(&self) -> Option<&Ticket<Model>> {
        match self {
            Caller::Freezes(ticket)
            | Caller::Waits(_, ticket)
            | Caller::Thaws(ticket)
            | Caller::ThawsAll(_, ticket) => Some(ticket),
            Caller::Idle | Caller::Asks(_) | Caller::SetsAside(_) => None,
        }
    }
}

/// Which of two: callers, and file systems.
const TWO: [u8; 2] = [0, 1];
/// On whose behalf something is held, if not on nobody's; and that of the request before, for which nothing is.
const SERVED: u64 = 7;
const BEFORE: u64 = 6;
/// How many a series has, and how many there may be in all.
const COUNT: usize = 2;
const MAX: usize = 3;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// This caller asks for a freeze of this file system, on this behalf.
    Ask(u8, u8, u64),
    /// ... begins it.
    Begin(u8),
    /// ... has set memory aside for it, as the first one.
    SetAside(u8),
    /// ... looks whether it has waited for long enough.
    Look(u8),
    /// ... is killed, or its time is over.
    GiveUp(u8),
    /// ... has this file system thawed.
    Thaw(u8, u8, u64),
    /// ... all of them.
    ThawAll(u8, u64),
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

/// All that can happen where these file systems are frozen on these behalves. What is thawed may also be so for the
/// request before.
fn events(asks: &[(u8, u64)]) -> Vec<Event> {
    let mut all = vec![Event::LetGo, Event::Forget];
    let which: BTreeSet<u8> = asks.iter().map(|ask| ask.0).collect();
    let mut behalves: BTreeSet<u64> = asks.iter().map(|ask| ask.1).collect();
    behalves.insert(BEFORE);
    for caller in TWO {
        all.extend([
            Event::Begin(caller),
            Event::SetAside(caller),
            Event::Look(caller),
            Event::GiveUp(caller),
        ]);
        all.extend(asks.iter().map(|(it, id)| Event::Ask(caller, *it, *id)));
        for id in &behalves {
            all.push(Event::ThawAll(caller, *id));
            all.extend(which.iter().map(|it| Event::Thaw(caller, *it, *id)));
        }
    }
    // One that is done is there as long as it is watched.
    for at in 0..MAX.min(which.len() + 1) {
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
    /// On whose behalf each is held.
    behalf: BTreeMap<u64, u64>,
    /// Which series each is of, counted from 1, and the last one.
    series: BTreeMap<u64, u64>,
    last_series: u64,
    /// Entries that were there when those before were forgotten.
    forgotten: BTreeSet<u64>,
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
            behalf: BTreeMap::new(),
            series: BTreeMap::new(),
            last_series: 0,
            forgotten: BTreeSet::new(),
            refused: BTreeSet::new(),
            failed: BTreeMap::new(),
            next_slot: 0,
            next_deadline: 1,
        }
    }

    fn request(&self, which: u8, id: u64) -> Asked {
        let request = Box::new(Request {
            id,
            module: (),
            file_system: Some(Mounted(which)),
            identity: which,
            count: COUNT,
            since: self.held.asked(),
            spare: List::default(),
            entries: List::default(),
            over: None,
        });
        Asked {
            request,
            is_off: false,
            thaws: BTreeSet::new(),
        }
    }

    fn set_aside(&mut self, caller: u8) -> bool {
        let caller = usize::from(caller);
        let mut asked = match std::mem::replace(&mut self.callers[caller], Caller::Idle) {
            Caller::SetsAside(asked) => asked,
            other => {
                self.callers[caller] = other;
                return false;
            }
        };
        let slots = self.next_slot..self.next_slot + COUNT;
        self.next_slot += COUNT;
        asked.request.spare = List(slots.collect(), COUNT);
        asked.request.entries = List(Vec::new(), self.held.len() + COUNT);
        self.callers[caller] = Caller::Asks(asked);
        true
    }

    /// The number and the slot of the entry at this place.
    fn at(&self, at: usize) -> Option<(u64, usize)> {
        let number = self.held.entries().nth(at)?.number;
        Some((number, self.slots[&number]))
    }

    fn stages(&self) -> Vec<Stage<u8>> {
        self.held.entries().map(|it| it.stage).collect()
    }

    /// How far this file system is, if it is anywhere, and on whose behalf.
    fn stage_of(&self, which: u8) -> Option<(Stage<u8>, u64)> {
        let mut entries = self.held.entries();
        let entry = entries.find(|it| it.identity == which && !it.stage.is_done());
        entry.map(|it| (it.stage, self.behalf[&it.number]))
    }

    /// How many are held, or going to be, on this behalf, or on any.
    fn active(&self, id: Option<u64>) -> usize {
        let is_its = |number| id.is_none_or(|id| self.behalf[&number] == id);
        let entries = self.held.entries().filter(|it| is_its(it.number));
        let active = entries.filter(|it| matches!(it.stage, Stage::Freezing | Stage::Held));
        active.count()
    }

    /// Which entry each caller waits for, and whether it can go on.
    fn waits(&self) -> [Option<(u64, bool)>; 2] {
        self.callers.each_ref().map(|caller| {
            let number = caller.ticket()?.number;
            let stage = self.held.stage(number);
            let can_go_on = match caller {
                Caller::Freezes(_) => stage != Stage::Freezing,
                Caller::Waits(asked, _) => stage.has_come_back() || asked.is_off(number),
                _ => stage.has_come_back(),
            };
            Some((number, can_go_on))
        })
    }

    fn unwatch(&mut self, number: u64) {
        self.held.unwatch(number);
    }

    /// Returns whether there was a place for it; if not, nothing has changed.
    fn happen(&mut self, event: Event) -> bool {
        let before = self.waits();
        self.works.woken.clear();
        let happens = self.take_place(event);
        if happens {
            self.check();
            self.check_wakes(before);
        }
        happens
    }

    /// As [`Self::happen`], without a look at what has become of it.
    fn take_place(&mut self, event: Event) -> bool {
        match event {
            Event::Ask(caller, ..) | Event::Thaw(caller, ..) | Event::ThawAll(caller, _)
                if !matches!(self.callers[usize::from(caller)], Caller::Idle) =>
            {
                false
            }
            Event::Ask(caller, which, id) => {
                self.callers[usize::from(caller)] = Caller::Asks(self.request(which, id));
                true
            }
            Event::Begin(caller) => self.begin(caller),
            Event::SetAside(caller) => self.set_aside(caller),
            Event::Look(caller) => self.look(caller, false),
            Event::GiveUp(caller) => self.look(caller, true),
            Event::Thaw(caller, which, id) => {
                let (was, behalf) = self.stage_of(which).unzip();
                if let Some(Stage::CalledOff | Stage::Thawing(_)) = was {
                    self.call_off(which, id);
                }
                let thaw = self.held.begin_thaw(which, id, (), &mut self.works);
                match (was, thaw) {
                    (Some(Stage::Held | Stage::Freezing), thaw) if behalf != Some(id) => {
                        assert!(matches!(thaw, Err(Trouble::Stale)), "another's");
                        assert_eq!(self.stage_of(which).unzip(), (was, behalf));
                    }
                    (Some(Stage::Held), Ok(Some(ticket))) => {
                        self.callers[usize::from(caller)] = Caller::Thaws(ticket);
                    }
                    (Some(Stage::Freezing), Ok(None)) => {}
                    (Some(Stage::CalledOff | Stage::Thawing(None)), Err(Trouble::Busy)) => {}
                    (Some(Stage::Thawing(Some(STUCK))), Err(Trouble::Said(STUCK))) => {}
                    (None, Err(Trouble::NotHeld)) => {}
                    (was, thaw) => panic!("{was:?}: {:?}", thaw.map(|it| it.is_some())),
                }
                true
            }
            Event::ThawAll(caller, id) => {
                let of_id = self
                    .held
                    .entries()
                    .filter(|it| self.behalf[&it.number] == id);
                let held = of_id.filter(|it| it.stage == Stage::Held);
                let held = held.map(|it| it.number).collect();
                let its = self.held.entries().map(|it| it.number);
                let its = its.filter(|it| self.behalf[it] == id);
                let its = its.filter(|it| self.series[it] == self.last_series);
                let its = its.filter(|it| !self.forgotten.contains(it)).collect();
                let let_go = self.let_go(Some(id));
                let all = All {
                    let_go,
                    its,
                    held,
                    has_failed: false,
                };
                self.wait_for_next(caller, let_go.before, all);
                true
            }
            Event::LetGo => {
                self.let_go(None);
                true
            }
            Event::Forget => {
                self.let_go(None);
                self.held.forget();
                let numbers = self.held.entries().map(|it| it.number);
                self.forgotten.extend(numbers);
                true
            }
            Event::Take(at) => self.take(at),
            Event::Done(at) => self.done(at, Ok(())),
            Event::Fails(at) => self.done(at, Err(true)),
            Event::IsForeign(at) => self.done(at, Err(false)),
        }
    }

    /// The thaw of a file system is asked for, on this behalf, that is on its way to that.
    fn call_off(&mut self, which: u8, id: u64) {
        let mut entries = self.held.entries();
        let entry = entries.find(|it| it.identity == which && !it.stage.is_done());
        let number = entry.map(|it| it.number);
        drop(entries);
        for asked in self.callers.iter_mut().filter_map(Caller::asked_mut) {
            if asked.request.identity == which && asked.request.id == id {
                asked.thaws.extend(number);
            }
        }
    }

    fn begin(&mut self, caller: u8) -> bool {
        let caller = usize::from(caller);
        let mut asked = match std::mem::replace(&mut self.callers[caller], Caller::Idle) {
            Caller::Asks(asked) => asked,
            other => {
                self.callers[caller] = other;
                return false;
            }
        };
        let active = self.held.deadline().filter(|_| self.active(None) > 0);
        let request = &mut *asked.request;
        let same = self.stage_of(request.identity).map(|it| it.0);
        let behalf = request.id;
        let wanted = self.held.len() + COUNT;
        let has_memory = !request.spare.0.is_empty() && request.entries.1 >= wanted;
        let deadline = self.next_deadline;
        let begun = self.held.begin(request, MAX, deadline, (), &mut self.works);
        let is_stale = matches!(begun, Err(Trouble::Stale));
        assert_eq!(asked.is_off, is_stale, "what was called off");
        self.callers[caller] = match begun {
            Ok(Begun::Queued(ticket)) => {
                assert!(same.is_none(), "two freezes of one");
                let expected = active.unwrap_or(deadline);
                assert_eq!(self.held.deadline(), Some(expected), "whose deadline it is");
                self.next_deadline += 1;
                self.last_series += u64::from(active.is_none());
                self.series.insert(ticket.number, self.last_series);
                self.slots.insert(ticket.number, ticket.slot);
                self.behalf.insert(ticket.number, behalf);
                Caller::Freezes(ticket)
            }
            Ok(Begun::First) => {
                assert!(active.is_none(), "it is not the first");
                assert!(!has_memory, "there was memory for it");
                Caller::SetsAside(asked)
            }
            Ok(Begun::After(ticket)) => {
                let is_going = matches!(same, Some(Stage::CalledOff | Stage::Thawing(_)));
                assert!(is_going, "waits for {same:?}");
                Caller::Waits(asked, ticket)
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
                    None => wanted > MAX,
                };
                assert!(full, "there is room");
                Caller::Idle
            }
            Err(Trouble::Stale) => Caller::Idle,
            Err(other) => panic!("{other:?}"),
        };
        true
    }

    /// A caller looks at what it waits for, for the last time if it gives up.
    fn look(&mut self, caller: u8, gives_up: bool) -> bool {
        let at = usize::from(caller);
        self.callers[at] = match std::mem::replace(&mut self.callers[at], Caller::Idle) {
            Caller::Freezes(ticket) => {
                let number = ticket.number;
                if self.held.stage(number) == Stage::Freezing && !gives_up {
                    self.callers[at] = Caller::Freezes(ticket);
                    return false;
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
            Caller::Waits(asked, ticket) => {
                let (number, stage) = (ticket.number, self.held.stage(ticket.number));
                let is_off = asked.is_off(number);
                if !stage.has_come_back() && !is_off && !gives_up {
                    self.callers[at] = Caller::Waits(asked, ticket);
                    return false;
                }
                self.unwatch(number);
                match stage {
                    Stage::Failed(_) | Stage::Thawed(Ok(())) if !is_off => Caller::Asks(asked),
                    // What the kernel says then, it says to whoever asked.
                    _ => Caller::Idle,
                }
            }
            Caller::Thaws(ticket) => {
                let stage = self.held.stage(ticket.number);
                if !stage.has_come_back() && !gives_up {
                    self.callers[at] = Caller::Thaws(ticket);
                    return false;
                }
                self.unwatch(ticket.number);
                Caller::Idle
            }
            Caller::ThawsAll(mut all, ticket) => {
                let stage = self.held.stage(ticket.number);
                if !stage.has_come_back() && !gives_up {
                    self.callers[at] = Caller::ThawsAll(all, ticket);
                    return false;
                }
                self.unwatch(ticket.number);
                if !gives_up {
                    all.has_failed |= !matches!(stage, Stage::Failed(_) | Stage::Thawed(Ok(())));
                    self.wait_for_next(caller, ticket.number, all);
                    return true;
                }
                Caller::Idle
            }
            other => {
                self.callers[at] = other;
                return false;
            }
        };
        true
    }

    fn wait_for_next(&mut self, caller: u8, before: u64, all: All) {
        // The last of them that was frozen, or may be.
        let entries = self.held.entries().filter(|it| it.number < before);
        let entries = entries.filter(|it| it.stage != Stage::CalledOff);
        let numbers = entries.map(|it| it.number);
        let expected = numbers.filter(|it| all.its.contains(it)).max();
        let next = self.held.unthawed(all.let_go, before);
        let ticket = next.as_ref().map(|it| (it.number, it.slot));
        let expected = expected.map(|number| (number, self.slots[&number]));
        assert_eq!(ticket, expected, "what it waits for");
        if next.is_none() && !all.has_failed {
            let left = self.held.entries();
            let left = left.filter(|it| all.held.contains(&it.number) && !it.stage.is_done());
            assert_eq!(left.count(), 0, "it has not waited for all");
        }
        self.callers[usize::from(caller)] = match next {
            Some(ticket) => Caller::ThawsAll(all, ticket),
            None => Caller::Idle,
        };
    }

    fn let_go(&mut self, id: Option<u64>) -> LetGo {
        let is_its = |behalf: u64| id.is_none_or(|id| id == behalf);
        let its = self
            .held
            .entries()
            .filter(|it| is_its(self.behalf[&it.number]));
        let stages: Vec<_> = its.map(|it| it.stage).collect();
        let others = self.active(None) - self.active(id);
        let is_late = id.is_some() && self.active(id) == 0;
        let had_deadline = self.held.deadline().is_some();
        for asked in self.callers.iter_mut().filter_map(Caller::asked_mut) {
            asked.is_off |= is_its(asked.request.id);
        }
        let (let_go, _) = self.held.let_go(id, (), &mut self.works);
        assert_eq!(let_go.held, stages.contains(&Stage::Held));
        assert_eq!(let_go.freezing, stages.contains(&Stage::Freezing));
        assert_eq!(self.active(id), 0, "held after it was let go");
        assert_eq!(self.active(None), others, "another's was let go");
        assert_eq!(self.held.holds(), others > 0);
        let has_deadline = if is_late { had_deadline } else { others > 0 };
        assert_eq!(self.held.deadline().is_some(), has_deadline);
        let_go
    }

    fn take(&mut self, at: usize) -> bool {
        let Some((number, slot)) = self.at(at) else {
            return false;
        };
        let freezes = match self.works.of_slot.get(&slot) {
            Some(Work::FreezeQueued) => true,
            Some(Work::ThawQueued) => false,
            Some(Work::Freezes(_) | Work::Thaws(_)) | None => return false,
        };
        self.works.of_slot.remove(&slot);
        let task = self.held.take(&slot).expect("a work for what is not there");
        if !freezes {
            self.works
                .of_slot
                .insert(slot, Work::Thaws(task.file_system));
        } else if task.stage == Stage::CalledOff {
            let end = Stage::Failed(None);
            self.held.finished(&slot, end, (), &mut self.works);
            self.refused.insert(number);
        } else {
            assert_eq!(task.stage, Stage::Freezing);
            self.works
                .of_slot
                .insert(slot, Work::Freezes(task.file_system));
        }
        true
    }

    /// A worker has done its work, or it has failed, or (false) found that it is not frozen for us.
    fn done(&mut self, at: usize, result: Result<(), bool>) -> bool {
        let Some((number, slot)) = self.at(at) else {
            return false;
        };
        if let Some(Work::FreezeQueued | Work::ThawQueued) = self.works.of_slot.get(&slot) {
            return false;
        }
        match (self.works.of_slot.remove(&slot), result) {
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
            (Some(Work::FreezeQueued | Work::ThawQueued) | None, _) => return false,
        }
        true
    }

    /// Who could not go on sleeps, and only a wake ends that.
    fn check_wakes(&self, before: [Option<(u64, bool)>; 2]) {
        for (before, after) in before.into_iter().zip(self.waits()) {
            if let (Some((number, false)), Some((same, true))) = (before, after) {
                let is_woken = self.works.woken.contains(&self.slots[&number]);
                assert!(number != same || is_woken, "nobody has woken it");
            }
        }
    }

    fn check(&self) {
        self.held.check().expect("an invariant");
        for caller in &self.callers {
            // Who waits looks at this, and who begins is asked.
            if let Caller::Waits(asked, ticket) = caller {
                let Request { id, since, .. } = *asked.request;
                let says = self.held.asked_of(ticket.number, id) > since;
                assert_eq!(says, asked.is_off(ticket.number), "what was called off");
            }
        }
        let mut watches = BTreeMap::new();
        for ticket in self.callers.iter().filter_map(Caller::ticket) {
            assert_eq!(
                ticket.slot, self.slots[&ticket.number],
                "another one's ticket"
            );
            *watches.entry(ticket.number).or_insert(0) += 1;
        }
        for it in self.held.entries() {
            let (number, identity, stage, watched) = (it.number, it.identity, it.stage, it.watches);
            let slot = self.slots[&number];
            let watchers = watches.remove(&number).unwrap_or(0);
            assert_eq!(watched, watchers, "who watches it");
            let series = self.last_series - self.series[&number];
            assert_eq!(it.series, series, "which series it is of");
            let is_forgotten = self.forgotten.contains(&number);
            assert_eq!(it.is_forgotten, is_forgotten, "what is forgotten");
            let is_held = self.frozen.get(&identity) == Some(&slot);
            let work = self.works.of_slot.get(&slot);
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
    fn state(&self) -> impl std::hash::Hash + Eq {
        let numbers: Vec<_> = self.held.entries().map(|it| it.number).collect();
        let places = |wanted: &dyn Fn(u64) -> bool| -> Vec<usize> {
            (0..numbers.len())
                .filter(|at| wanted(numbers[*at]))
                .collect()
        };
        let place = |ticket: &Ticket<Model>| numbers.iter().position(|it| *it == ticket.number);
        // By whether it is on nobody's behalf.
        let asked_of = |number: u64| [0, SERVED].map(|id| self.held.asked_of(number, id));
        let for_all = asked_of(u64::MAX);
        let entries = self.held.entries();
        let asked_of = entries.map(|it| (it.identity, asked_of(it.number)));
        let asked_of: Vec<_> = asked_of.collect();
        // What the machine says of a freeze that was asked for, and what the walk does; where both call it off nothing
        // else counts.
        let off = |caller: &Caller| {
            let asked = caller.asked()?;
            let request = &asked.request;
            let behalf = usize::from(request.id != 0);
            let says = for_all[behalf] > request.since;
            if says && asked.is_off {
                return Some(None);
            }
            let its = asked_of.iter().map(|(identity, asked)| {
                *identity == request.identity && asked[behalf] > request.since
            });
            let its: Vec<bool> = its.collect();
            let thaws = places(&|it| asked.thaws.contains(&it));
            let memory = (request.spare.0.is_empty(), request.entries.1.min(MAX));
            Some(Some((says, asked.is_off, its, thaws, memory)))
        };
        let is_done = |number: u64| self.held.stage(number).is_done();
        let waits_for = |caller: &Caller| match caller {
            Caller::ThawsAll(all, ticket) => {
                let its = places(&|it| all.its.contains(&it) && it < ticket.number);
                let held = places(&|it| all.held.contains(&it) && !is_done(it));
                Some((its, (!all.has_failed).then_some(held)))
            }
            _ => None,
        };
        let all_waits = self
            .callers
            .iter()
            .any(|it| matches!(it, Caller::ThawsAll(..)));
        let work = |slot: usize| match self.works.of_slot.get(&slot) {
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
                        self.behalf[&it.number],
                        all_waits && it.is_forgotten,
                    )
                })
                .collect();
            let mut callers: Vec<_> = self
                .callers
                .iter()
                .map(|it| {
                    let (kind, which) = match it {
                        Caller::Idle => (0, 0),
                        Caller::Asks(it) => (1, it.request.identity ^ swaps),
                        Caller::SetsAside(it) => (2, it.request.identity ^ swaps),
                        Caller::Freezes(_) => (3, 0),
                        Caller::Waits(it, _) => (4, it.request.identity ^ swaps),
                        Caller::Thaws(_) => (5, 0),
                        Caller::ThawsAll(..) => (6, 0),
                    };
                    (
                        kind,
                        which,
                        it.asked().map(|it| it.request.id),
                        it.ticket().and_then(place),
                        off(it),
                        waits_for(it),
                    )
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
            let mut goes_on = true;
            while goes_on {
                goes_on = false;
                for at in (0..MAX).rev() {
                    goes_on |= self.happen(Event::Take(at));
                    goes_on |= self.happen(Event::Done(at));
                }
                for caller in TWO {
                    goes_on |= self.happen(Event::Look(caller));
                }
            }
            let left = self.stages();
            assert!(left.iter().all(|it| *it == Stage::Held), "{left:?} is left");
        }
        assert!(self.held.is_idle() && self.frozen.is_empty());
        assert!(self.works.of_slot.is_empty() && self.held.is_empty());
        // And another one can be held.
        self.callers = [Caller::Idle, Caller::Idle];
        self.happen(Event::Ask(0, 0, SERVED));
        self.happen(Event::Begin(0));
        self.happen(Event::SetAside(0));
        self.happen(Event::Begin(0));
        assert_eq!(self.stages(), [Stage::Freezing]);
    }
}

fn replay(path: &[Event]) -> World {
    let mut world = World::new();
    for event in path {
        world.take_place(*event);
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

/// Visits every state where these file systems are frozen on these behalves.
fn walk(asks: &[(u8, u64)]) {
    let mut seen = HashSet::new();
    let mut paths = vec![Vec::new()];
    seen.insert(World::new().state());
    let (mut depth, all) = (0, events(asks));
    let mut changing = vec![false; all.len()];
    while let Some(next) = (!paths.is_empty()).then(|| std::mem::take(&mut paths)) {
        for path in next {
            depth = depth.max(path.len());
            let way = Way(&path, None);
            replay(&path).drain();
            drop(way);
            let mut world = replay(&path);
            let before = world.state();
            for (event, changes) in all.iter().zip(&mut changing) {
                let way = Way(&path, Some(*event));
                let happens = world.happen(*event);
                drop(way);
                if !happens {
                    continue;
                }
                let after = world.state();
                *changes |= after != before;
                if seen.insert(after) {
                    paths.push([&path[..], &[*event]].concat());
                }
                world = replay(&path);
            }
        }
    }
    println!("{} states, the farthest {depth} events away", seen.len());
    for (event, changes) in all.iter().zip(changing) {
        let is_late = match *event {
            Event::Thaw(_, which, id) => !asks.contains(&(which, id)),
            Event::ThawAll(_, id) => !asks.iter().any(|ask| ask.1 == id),
            _ => false,
        };
        assert_eq!(
            changes, !is_late,
            "{event:?}: the walk has lost it, or it came too late"
        );
    }
}

#[test]
fn every_state_keeps_the_promises() {
    walk(&[(0, SERVED), (1, SERVED)]);
}

#[test]
fn what_is_held_on_another_behalf_beside_it_keeps_them() {
    walk(&[(0, 0), (1, SERVED)]);
}

#[test]
fn what_is_asked_for_on_two_behalves_keeps_them() {
    walk(&[(0, 0), (0, SERVED)]);
}
