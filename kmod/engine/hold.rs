// SPDX-License-Identifier: GPL-2.0

//! What is held frozen, as a state machine without I/O: which file system is how far, what a worker is to do next,
//! who may begin what, and when a series of freezes is over.
//!
//! Knows neither what a file system, a worker or a clock is: they are the surroundings' (see [`Matter`]). What is to
//! be done comes out through [`HoldEffects`]. Each entry has a slot, which is what its works are queued by; a slot
//! has one work at a time, queued or in a worker's hands.

/// How soon a thaw that has failed is tried again, in milliseconds.
pub const RETRY_MS: u32 = 1_000;

/// What the machine handles and does not look into.
pub trait Matter: Sized {
    /// A file system that is kept mounted.
    type FileSystem;
    /// Which one it is.
    type Identity: Copy + PartialEq;
    /// What an entry has until its works are over.
    type Module: Clone;
    /// What its works are queued by.
    type Slot: Clone + PartialEq;
    /// An error of a file system.
    type Error: Copy;
    /// A moment.
    type Time: Copy;
    /// Room for entries.
    type Entries: Room<Entry<Self>>;
    /// Room for slots.
    type Slots: Room<Self::Slot> + Default;
}

/// A list that does not grow by itself.
pub trait Room<T> {
    /// How many it can have.
    fn capacity(&self) -> usize;
    /// What is in it, in order.
    fn all(&self) -> &[T];
    /// As above.
    fn all_mut(&mut self) -> &mut [T];
    /// Adds one at the end; gives it back when there is no room.
    ///
    /// # Errors
    ///
    /// What did not fit.
    fn push(&mut self, one: T) -> Result<(), T>;
    /// Takes the last one.
    fn pop(&mut self) -> Option<T>;
    /// Takes the one at `at`; what is behind it moves up.
    fn remove(&mut self, at: usize) -> Option<T>;
}

/// What the machine asks its surroundings to do. Called in the middle of an event, so none of them may call back.
pub trait HoldEffects<M: Matter> {
    /// Has a worker freeze the entry of this slot.
    fn queue_freeze(&mut self, slot: &M::Slot);
    /// Has a worker thaw it, in so many milliseconds.
    fn queue_thaw(&mut self, slot: &M::Slot, ms: u32);
    /// Lets those look again who wait for it.
    fn wake(&mut self, slot: &M::Slot);
}

/// Why something is not, or will not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble<E> {
    /// It is held already, or on its way.
    Busy,
    /// There is no room for another one.
    NoRoom,
    /// It was called off.
    Stale,
    /// It is not held.
    NotHeld,
    /// What the file system says.
    Said(E),
}

/// How far an entry has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage<E> {
    /// A worker has it, or will.
    Freezing,
    /// As above, but it is to be thawed at once.
    CalledOff,
    /// It is frozen.
    Held,
    /// A worker thaws it, or will; the last attempt has failed with this.
    Thawing(Option<E>),
    /// It was never frozen: with this, or because it was called off. This and the next one are removed when nobody
    /// watches.
    Failed(Option<E>),
    /// It is not frozen any more; that it ended before has failed the thaw.
    Thawed(Result<(), E>),
}

impl<E> Stage<E> {
    /// Nothing is left to do for it.
    pub fn is_done(&self) -> bool {
        matches!(self, Stage::Failed(_) | Stage::Thawed(_))
    }

    /// Whether its thaw has ended, well or not.
    pub fn has_come_back(&self) -> bool {
        self.is_done() || matches!(self, Stage::Thawing(Some(_)))
    }

    /// In one word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Stage::Freezing => "freezing",
            Stage::CalledOff => "called-off",
            Stage::Held => "held",
            Stage::Thawing(None) => "thawing",
            Stage::Thawing(Some(_)) => "stuck",
            Stage::Failed(_) | Stage::Thawed(_) => "done",
        }
    }
}

/// All that is held, being frozen or being thawed.
pub struct Held<M: Matter> {
    /// The freezes that end together.
    series: Option<Series<M>>,
    /// Number of the last series.
    last_series: u64,
    /// Series up to this one were somebody else's.
    forgotten: u64,
    /// In the order in which they were begun. There is room for all of the series.
    entries: M::Entries,
    /// Number of the last entry.
    last_entry: u64,
    /// How often somebody has asked to have one or all of it thawed.
    asked: u64,
    /// Which of these was the last one for all that is held on a behalf.
    asked_for_all: Asked,
    /// Which of these let all go, on whatever behalf.
    let_go: u64,
}

/// Which thaw was the last one that was asked for, as [`Held::asked`] counts: for nobody, and for the latest request
/// that one was asked for. What is asked for an earlier one calls nothing off: nothing waits to be frozen for that any
/// more.
#[derive(Clone, Copy, Default)]
struct Asked {
    for_nobody: u64,
    request: u64,
    for_request: u64,
}

impl Asked {
    /// One was asked for on behalf of `id`, as this number.
    fn put(&mut self, id: u64, asked: u64) {
        if id == 0 {
            self.for_nobody = asked;
        } else if id >= self.request {
            (self.request, self.for_request) = (id, asked);
        }
    }

    /// The last one on behalf of `id`, or 0.
    fn of(&self, id: u64) -> u64 {
        match id {
            0 => self.for_nobody,
            id if id == self.request => self.for_request,
            _ => 0,
        }
    }
}

/// From the first freeze until nothing is held any more, or all of it is let go.
pub struct Series<M: Matter> {
    /// When it is to be let go at the latest, on the clock of who began it.
    deadline: u64,
    /// How many there may be at a time.
    count: usize,
    /// Those that are not in use.
    spare: M::Slots,
}

/// One file system.
pub struct Entry<M: Matter> {
    /// Unlike those of all others, before and after.
    number: u64,
    series: u64,
    /// For which request, or 0 for nobody: only a thaw on the same behalf ends it.
    id: u64,
    slot: M::Slot,
    identity: M::Identity,
    /// Away while a worker has it in hand, and gone when it is done.
    file_system: Option<M::FileSystem>,
    /// The module does not go before its work has come.
    module: M::Module,
    stage: Stage<M::Error>,
    /// When this stage began.
    since: M::Time,
    /// How many [`Ticket`]s there are.
    watches: usize,
    /// Which thaw was the last one that was asked for it when it was on its way to that already.
    asked: Asked,
}

/// What is needed to begin a freeze; made before any lock is taken.
pub struct Request<M: Matter> {
    /// For which request of the host, or 0 for nobody.
    pub id: u64,
    /// For its entry.
    pub module: M::Module,
    /// Gone when it is begun.
    pub file_system: Option<M::FileSystem>,
    /// Which one that is.
    pub identity: M::Identity,
    /// How many the series is to have, should it begin one.
    pub count: usize,
    /// What of [`Held::asked`] came before it.
    pub since: u64,
    /// As many slots, for that.
    pub spare: M::Slots,
    /// Room for them, and for what is left over.
    pub entries: M::Entries,
    /// The series before, which has ended; it goes when no lock is held.
    pub over: Option<Series<M>>,
}

/// What came of a request to begin.
pub enum Begun<M: Matter> {
    /// A worker will do it.
    Queued(Ticket<M>),
    /// It would be the first: memory is to be set aside in the request.
    First,
    /// The same file system has been let go, and is not thawed yet: to be tried again when that is over.
    After(Ticket<M>),
}

/// Somebody watches an entry, which is not removed until this is [given back](Held::unwatch).
pub struct Ticket<M: Matter> {
    /// That of the entry.
    pub slot: M::Slot,
    /// Its number.
    pub number: u64,
}

/// What a worker has in hand.
pub struct Task<M: Matter> {
    /// To be frozen or thawed.
    pub file_system: M::FileSystem,
    /// Given back last of all: then the module may go.
    pub module: M::Module,
    /// For which request, or 0.
    pub id: u64,
    /// Which file system.
    pub identity: M::Identity,
    /// Where the entry stood.
    pub stage: Stage<M::Error>,
}

/// What there was to let go.
#[derive(Clone, Copy, Debug)]
pub struct LetGo {
    /// Something was frozen.
    pub held: bool,
    /// Something was being frozen.
    pub freezing: bool,
    /// What is begun from here on was no part of it.
    pub before: u64,
    /// Nor what is held on another's behalf, if it was not for all.
    id: Option<u64>,
    /// Nor what hangs since an earlier series.
    series: u64,
    /// Nor what somebody else had let go before.
    forgotten: u64,
}

impl LetGo {
    /// Whether there was anything.
    pub fn any(self) -> bool {
        self.held || self.freezing
    }
}

/// What there is to say of an entry.
pub struct Line<M: Matter> {
    /// What to ask for the next one with.
    pub number: u64,
    /// Which file system.
    pub identity: M::Identity,
    /// What is being done with it.
    pub stage: Stage<M::Error>,
    /// For which request, or 0.
    pub id: u64,
    /// Since when it is so.
    pub since: M::Time,
}

/// How an entry stands, for tests.
#[cfg(not(hv_vss_kernel))]
pub struct Standing<M: Matter> {
    /// Its number.
    pub number: u64,
    /// Which file system.
    pub identity: M::Identity,
    /// How many series have begun since its own.
    pub series: u64,
    /// Its series was somebody else's.
    pub is_forgotten: bool,
    /// How far it is.
    pub stage: Stage<M::Error>,
    /// How many watch it.
    pub watches: usize,
}

impl<M: Matter> Held<M> {
    /// Nothing is held, in no room.
    pub fn new(entries: M::Entries) -> Self {
        Held {
            series: None,
            last_series: 0,
            forgotten: 0,
            entries,
            last_entry: 0,
            asked: 0,
            asked_for_all: Asked::default(),
            let_go: 0,
        }
    }

    /// How often a thaw was asked for.
    pub fn asked(&self) -> u64 {
        self.asked
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.all().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether anything is held, or going to be.
    pub fn holds(&self) -> bool {
        self.entries.all().iter().any(Entry::is_active)
    }

    /// Begins a freeze. The first of a series says with `deadline` when all is let go. At most `max` entries are
    /// there at a time, those included that hang since somebody else held.
    ///
    /// # Errors
    ///
    /// [`Trouble::Busy`] when this file system is held already, [`Trouble::NoRoom`] when there is no room for
    /// another, [`Trouble::Stale`] when all was let go since the request was made.
    pub fn begin(
        &mut self,
        request: &mut Request<M>,
        max: usize,
        deadline: u64,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) -> Result<Begun<M>, Trouble<M::Error>> {
        if self.asked_for_all(request.id) > request.since {
            return Err(Trouble::Stale);
        }
        let same = |entry: &&mut Entry<M>| entry.identity == request.identity;
        for entry in self.entries.all_mut().iter_mut().filter(same) {
            match entry.stage {
                Stage::Freezing | Stage::Held => return Err(Trouble::Busy),
                Stage::CalledOff | Stage::Thawing(_) => return Ok(Begun::After(entry.watch())),
                Stage::Failed(_) | Stage::Thawed(_) => {}
            }
        }
        if self.is_over() {
            request.over = self.series.take();
        }
        if self.series.is_none() {
            // What is left over from series before stays on the list.
            let wanted = self.len() + request.count;
            if wanted > max {
                return Err(Trouble::NoRoom);
            }
            if request.spare.all().is_empty() || request.entries.capacity() < wanted {
                return Ok(Begun::First);
            }
            core::mem::swap(&mut self.entries, &mut request.entries);
            while let Some(entry) = request.entries.pop() {
                // There is room for them.
                let _ = self.entries.push(entry);
            }
            self.entries.all_mut().reverse();
            self.last_series += 1;
            self.series = Some(Series {
                deadline,
                count: request.count,
                spare: core::mem::take(&mut request.spare),
            });
        }
        let Some(series) = &mut self.series else {
            return Err(Trouble::NoRoom);
        };
        let slot = series.spare.pop().ok_or(Trouble::NoRoom)?;
        self.last_entry += 1;
        let mut entry = Entry {
            number: self.last_entry,
            series: self.last_series,
            id: request.id,
            slot,
            identity: request.identity,
            file_system: request.file_system.take(),
            module: request.module.clone(),
            stage: Stage::Freezing,
            since: now,
            watches: 0,
            asked: Asked::default(),
        };
        effects.queue_freeze(&entry.slot);
        let ticket = entry.watch();
        // There is room for all of the series.
        let _ = self.entries.push(entry);
        Ok(Begun::Queued(ticket))
    }

    /// Begins the thaw of one file system, if it is held for the request `id` (0 for nobody). One that is being
    /// frozen is called off: whoever waits for its freeze hears of it, and nothing is returned to wait for.
    ///
    /// # Errors
    ///
    /// [`Trouble::NotHeld`] when it is not held, [`Trouble::Stale`] when it is on another's behalf: then nothing
    /// changes. [`Trouble::Busy`] when it is called off or being thawed already and that is not over, and what the file
    /// system said to the last attempt; a freeze that waits for the end of that, on the same behalf, is called off as
    /// well.
    pub fn begin_thaw(
        &mut self,
        wanted: M::Identity,
        id: u64,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) -> Result<Option<Ticket<M>>, Trouble<M::Error>> {
        self.asked += 1;
        let is_it = |entry: &&mut Entry<M>| entry.identity == wanted && !entry.stage.is_done();
        let entry = self.entries.all_mut().iter_mut().find(is_it);
        let entry = entry.ok_or(Trouble::NotHeld)?;
        let trouble = match entry.stage {
            Stage::Held | Stage::Freezing if entry.id != id => return Err(Trouble::Stale),
            Stage::Held => {
                entry.thaw(now, effects);
                return Ok(Some(entry.watch()));
            }
            Stage::Freezing => {
                entry.enter(Stage::CalledOff, now, effects);
                return Ok(None);
            }
            Stage::CalledOff | Stage::Thawing(None) => Trouble::Busy,
            Stage::Thawing(Some(error)) => Trouble::Said(error),
            Stage::Failed(_) | Stage::Thawed(_) => Trouble::NotHeld,
        };
        entry.asked.put(id, self.asked);
        effects.wake(&entry.slot);
        Err(trouble)
    }

    /// Lets all go, or with an `id` all that is held on that behalf (0 is nobody's): what is held is queued to be
    /// thawed, the last one first, what is being frozen is thawed as soon as that is over, and what waits to be frozen is
    /// not. A series that has ended goes when no lock is held.
    pub fn let_go(
        &mut self,
        id: Option<u64>,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) -> (LetGo, Option<Series<M>>) {
        let mut let_go = LetGo {
            held: false,
            freezing: false,
            before: self.last_entry + 1,
            id,
            series: self.last_series,
            forgotten: self.forgotten,
        };
        self.asked += 1;
        match id {
            Some(id) => self.asked_for_all.put(id, self.asked),
            None => self.let_go = self.asked,
        }
        for entry in self.entries.all_mut().iter_mut().rev() {
            match entry.stage {
                Stage::Held | Stage::Freezing if !entry.is_for(id) => {}
                Stage::Held => {
                    let_go.held = true;
                    entry.thaw(now, effects);
                }
                Stage::Freezing => {
                    let_go.freezing = true;
                    entry.enter(Stage::CalledOff, now, effects);
                }
                Stage::CalledOff | Stage::Thawing(_) => effects.wake(&entry.slot),
                Stage::Failed(_) | Stage::Thawed(_) => {}
            }
        }
        let is_late = id.is_some() && !let_go.any();
        if is_late || self.holds() {
            return (let_go, None);
        }
        (let_go, self.series.take())
    }

    /// What hangs by now is no concern of who holds next. After [`Self::let_go`].
    pub fn forget(&mut self) {
        self.forgotten = self.last_series;
    }

    /// The last one before number `before` of what was let go, if it was frozen and may not be thawed yet. Whoever waits
    /// waits for it, also when others forget it meanwhile.
    pub fn unthawed(&mut self, let_go: LetGo, before: u64) -> Option<Ticket<M>> {
        let counts = |entry: &&mut Entry<M>| {
            let ours = entry.series == let_go.series && entry.series > let_go.forgotten;
            ours && entry.is_for(let_go.id)
                && entry.number < before
                && !matches!(entry.stage, Stage::CalledOff)
        };
        let mut entries = self.entries.all_mut().iter_mut().rev();
        entries.find(counts).map(Entry::watch)
    }

    /// When all is to be let go, if anything is held.
    pub fn deadline(&self) -> Option<u64> {
        self.series.as_ref().map(|series| series.deadline)
    }

    /// Whether nothing is frozen, or being frozen.
    pub fn is_idle(&self) -> bool {
        self.entries.all().iter().all(|entry| entry.stage.is_done())
    }

    /// The entry that was begun next after the one with this number.
    pub fn line_after(&self, number: u64) -> Option<Line<M>> {
        let next = |entry: &&Entry<M>| entry.number > number && !entry.stage.is_done();
        let entry = self.entries.all().iter().find(next)?;
        Some(Line {
            number: entry.number,
            identity: entry.identity,
            stage: entry.stage,
            id: entry.id,
            since: entry.since,
        })
    }

    // --- Who watches ---

    /// Where a watched entry stands.
    pub fn stage(&self, number: u64) -> Stage<M::Error> {
        let mut entries = self.entries.all().iter();
        let entry = entries.find(|entry| entry.number == number);
        entry.map_or(Stage::Thawed(Ok(())), |entry| entry.stage)
    }

    /// As [`Self::stage`], for the last time: a freeze that is not done then is called off, so that nobody who is told
    /// that it is not held finds it held after all.
    pub fn give_up(
        &mut self,
        number: u64,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) -> Stage<M::Error> {
        let stage = self.stage(number);
        if let (Stage::Freezing, Some(entry)) = (stage, self.numbered(number)) {
            entry.enter(Stage::CalledOff, now, effects);
        }
        stage
    }

    /// Which was the last thaw that was asked for on behalf of `id`: of the entry when it was on its way to that
    /// already, or of all.
    pub fn asked_of(&self, number: u64, id: u64) -> u64 {
        let mut entries = self.entries.all().iter();
        let entry = entries.find(|entry| entry.number == number);
        let its = entry.map_or(0, |entry| entry.asked.of(id));
        its.max(self.asked_for_all(id))
    }

    /// Nobody uses this ticket any more. A series that has ended goes when no lock is held.
    pub fn unwatch(&mut self, number: u64) -> Option<Series<M>> {
        if let Some(entry) = self.numbered(number) {
            entry.watches = entry.watches.saturating_sub(1);
        }
        self.sweep(number)
    }

    // --- What workers do ---

    /// A worker takes the entry of this slot in hand.
    pub fn take(&mut self, slot: &M::Slot) -> Option<Task<M>> {
        let entry = self.of_slot(slot)?;
        Some(Task {
            file_system: entry.file_system.take()?,
            module: entry.module.clone(),
            id: entry.id,
            identity: entry.identity,
            stage: entry.stage,
        })
    }

    /// It is frozen.
    pub fn frozen(
        &mut self,
        slot: &M::Slot,
        file_system: M::FileSystem,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) {
        let Some(entry) = self.of_slot(slot) else {
            return;
        };
        entry.file_system = Some(file_system);
        match entry.stage {
            Stage::CalledOff => entry.thaw(now, effects),
            _ => entry.enter(Stage::Held, now, effects),
        }
    }

    /// Its thaw has failed: it is frozen still, and tried again.
    pub fn stuck(
        &mut self,
        slot: &M::Slot,
        file_system: M::FileSystem,
        error: M::Error,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) {
        let Some(entry) = self.of_slot(slot) else {
            return;
        };
        entry.file_system = Some(file_system);
        entry.enter(Stage::Thawing(Some(error)), now, effects);
        effects.queue_thaw(&entry.slot, RETRY_MS);
    }

    /// It is not frozen, or not any more: `end` is [`Stage::Failed`] or [`Stage::Thawed`]. A series that has ended goes
    /// when no lock is held.
    pub fn finished(
        &mut self,
        slot: &M::Slot,
        end: Stage<M::Error>,
        now: M::Time,
        effects: &mut impl HoldEffects<M>,
    ) -> Option<Series<M>> {
        let entry = self.of_slot(slot)?;
        entry.enter(end, now, effects);
        let number = entry.number;
        self.sweep(number)
    }

    // --- For tests ---

    /// How each entry stands.
    #[cfg(not(hv_vss_kernel))]
    pub fn entries(&self) -> impl Iterator<Item = Standing<M>> + '_ {
        self.entries.all().iter().map(|it| Standing {
            number: it.number,
            identity: it.identity,
            series: self.last_series - it.series,
            is_forgotten: it.series <= self.forgotten,
            stage: it.stage,
            watches: it.watches,
        })
    }

    /// Slots of the series that are not in use.
    #[cfg(not(hv_vss_kernel))]
    pub fn spare(&self) -> Option<usize> {
        let series = self.series.as_ref()?;
        Some(series.spare.all().len())
    }

    /// Checks what always holds.
    ///
    /// # Errors
    ///
    /// Names what does not.
    #[cfg(not(hv_vss_kernel))]
    pub fn check(&self) -> Result<(), &'static str> {
        let must = |holds: bool, or: &'static str| if holds { Ok(()) } else { Err(or) };
        let entries = self.entries.all();
        let ours = |it: &&Entry<M>| it.series == self.last_series;
        let rises = entries.is_sorted_by(|one, next| one.number < next.number);
        must(rises, "entries out of order")?;
        let unwatched = |it: &Entry<M>| it.watches == 0 && it.stage.is_done();
        must(!entries.iter().any(unwatched), "an entry of no use")?;
        let used = entries.iter().filter(ours).count();
        match &self.series {
            Some(series) => {
                must(used > 0, "a series of nothing")?;
                let all = series.spare.all().len() + used;
                must(all == series.count, "a slot is lost, or used twice")?;
                let room = self.entries.capacity() - entries.len();
                must(room >= series.count - used, "no room for the series")?;
                let others = entries.iter().filter(|it| !ours(it));
                must(
                    others.filter(|it| it.is_active()).count() == 0,
                    "held without a deadline",
                )
            }
            None => must(!self.holds(), "held without a deadline"),
        }
    }

    // --- Inside ---

    /// Whether there is a series of which nothing is frozen, or going to be: what of it is still there hangs,
    /// and is to end without it. The next one has its own deadline, and room for all.
    fn is_over(&self) -> bool {
        self.series.is_some() && !self.holds()
    }

    /// Which was the last thaw that was asked for of all that is held on behalf of `id`.
    fn asked_for_all(&self, id: u64) -> u64 {
        self.asked_for_all.of(id).max(self.let_go)
    }

    fn of_slot(&mut self, slot: &M::Slot) -> Option<&mut Entry<M>> {
        let mut entries = self.entries.all_mut().iter_mut();
        entries.find(|entry| entry.slot == *slot)
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Entry<M>> {
        let mut entries = self.entries.all_mut().iter_mut();
        entries.find(|entry| entry.number == number)
    }

    /// Removes an entry that is done and that nobody watches. With the last one the series ends.
    fn sweep(&mut self, number: u64) -> Option<Series<M>> {
        let over = |entry: &Entry<M>| {
            entry.number == number && entry.watches == 0 && entry.stage.is_done()
        };
        let at = self.entries.all().iter().position(over)?;
        let entry = self.entries.remove(at)?;
        let series = self.series.as_mut()?;
        if entry.series != self.last_series {
            return None;
        }
        // There is room for as many as were there at first.
        let _ = series.spare.push(entry.slot);
        if series.spare.all().len() < series.count {
            return None;
        }
        self.series.take()
    }
}

impl<M: Matter> Entry<M> {
    /// Whether it is held, or going to be.
    fn is_active(&self) -> bool {
        matches!(self.stage, Stage::Freezing | Stage::Held)
    }

    /// Whether it is on that behalf, or any will do.
    fn is_for(&self, id: Option<u64>) -> bool {
        id.is_none_or(|id| id == self.id)
    }

    /// Enters another stage.
    fn enter(&mut self, stage: Stage<M::Error>, now: M::Time, effects: &mut impl HoldEffects<M>) {
        self.stage = stage;
        self.since = now;
        effects.wake(&self.slot);
    }

    /// Has it thawed; it is frozen.
    fn thaw(&mut self, now: M::Time, effects: &mut impl HoldEffects<M>) {
        self.enter(Stage::Thawing(None), now, effects);
        effects.queue_thaw(&self.slot, 0);
    }

    fn watch(&mut self) -> Ticket<M> {
        self.watches += 1;
        Ticket {
            slot: self.slot.clone(),
            number: self.number,
        }
    }
}
