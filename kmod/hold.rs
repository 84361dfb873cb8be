// SPDX-License-Identifier: GPL-2.0

//! Freezes that belong to somebody: what is held here nobody else can thaw, and it ends with its
//! holder.
//!
//! A freeze waits for writers and for the disk, and nothing can end that wait. So kernel workers do
//! it, and whoever asked for it waits so that it can be killed. Until it is done it can be called
//! off: then it is undone the moment it comes back. Each freeze and each thaw has a worker of its
//! own, so that one that hangs holds up no other, as long as the kernel can make workers. While it cannot, each of the
//! two queues has the one that was set aside for that, and what hangs in it holds up the rest.
//!
//! While anything is frozen memory may not be had, since what would have to be written for it
//! stands still: all that a freeze and its thaw need is set aside before the first one begins.
//!
//! There is one [`Hold`], the module's: a device can go while a freeze hangs, and the one that comes after it has to
//! know of that. Knows nothing of VMBus, of VSS, nor of who asks.

use crate::compat::error;
use crate::compat::new_spinlock_irq;
use crate::compat::SpinLockIrq;
use crate::file_system::Expedited;
use crate::file_system::FileSystem;
use crate::file_system::Identity;
use crate::report;
use crate::wait::new_wait_queue;
use crate::wait::WaitQueue;
use crate::wait::Waited;
use crate::workers::ModuleReference;
use crate::workers::Queues;
use core::mem;
use kernel::bindings::ESTALE;
use kernel::prelude::*;
use kernel::sync::atomic::Acquire;
use kernel::sync::atomic::AtomicFlag;
use kernel::sync::atomic::Release;
use kernel::sync::global_lock;
use kernel::sync::Arc;
use kernel::time::msecs_to_jiffies;
use kernel::time::Instant;
use kernel::time::Monotonic;
use kernel::workqueue::impl_has_delayed_work;
use kernel::workqueue::impl_has_work;
use kernel::workqueue::new_delayed_work;
use kernel::workqueue::new_work;
use kernel::workqueue::DelayedWork;
use kernel::workqueue::Work;
use kernel::workqueue::WorkItem;

/// File systems that can be held at a time, freezes and thaws included that hang since somebody
/// else held: as many as a queue has in hand at a time (`WQ_MAX_ACTIVE`). It distributes those over
/// the memory nodes, so one waits for another only when all of a node's share hang.
pub(crate) const MAX_HELD: usize = 2048;

/// How soon a thaw that has failed is tried again, in milliseconds.
const RETRY_MS: u32 = 1_000;

/// Which of a slot's two works is meant.
const FREEZE: u64 = 0;
const THAW: u64 = 1;

/// [`HOLD`] is initialised.
static INITIALISED: AtomicFlag = AtomicFlag::new(false);

global_lock! {
    // SAFETY: Locked only where it is initialised: in `Holding::new` after that, in the drop of what this
    // returns, and where `INITIALISED` says so.
    unsafe(uninit) static HOLD: Mutex<Option<Arc<Hold>>> = None;
}

/// There is a [`Hold`] as long as this lives.
pub(crate) struct Holding(());

impl Holding {
    /// Makes it, with nothing held. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM` without memory.
    ///
    /// # Safety
    ///
    /// May be called once.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: Guaranteed by the caller.
        unsafe { HOLD.init() };
        INITIALISED.store(true, Release);
        *HOLD.lock() = Some(Hold::new()?);
        Ok(Holding(()))
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        // The last reference: no device is bound, no descriptor is open, and a work gives back its
        // own before its `ModuleReference`. Waits for works to return that have done so.
        let hold = HOLD.lock().take();
        drop(hold);
    }
}

/// All that is held, being frozen or being thawed. Its lock is taken in any context, also below the
/// lock of whoever uses this.
#[pin_data]
pub(crate) struct Hold {
    #[pin]
    state: SpinLockIrq<State>,
    /// Woken when a file system has been thawed.
    #[pin]
    thawed: WaitQueue,
    queues: Queues,
}

struct State {
    /// The freezes that end together.
    series: Option<Series>,
    /// Number of the last series.
    last_series: u64,
    /// Series up to this one were somebody else's.
    forgotten: u64,
    /// In the order in which they were begun. There is room for all of the series.
    entries: KVVec<Entry>,
    /// Number of the last entry.
    last_entry: u64,
    /// How often somebody has asked to have one or all of it thawed.
    asked: u64,
    /// Which of these was the last one for all.
    asked_for_all: u64,
}

/// From the first freeze until nothing is held any more, or all of it is let go.
struct Series {
    /// When it is to be let go at the latest, on the clock of who began it.
    deadline: u64,
    /// How many there may be at a time.
    count: usize,
    /// Those that are not in use.
    spare: KVec<Arc<Slot>>,
}

/// One file system.
struct Entry {
    /// Unlike those of all others, before and after.
    number: u64,
    series: u64,
    /// For whom, in the trace.
    id: u64,
    slot: Arc<Slot>,
    identity: Identity,
    /// Away while a worker has it in hand, and gone when it is done.
    file_system: Option<FileSystem>,
    /// The module does not go before its work has come.
    module: ModuleReference,
    stage: Stage,
    /// When this stage began.
    since: Instant<Monotonic>,
    /// How many [`Watch`]es there are.
    watches: usize,
    /// Which thaw was the last one that was asked for it when it was on its way to that already, as
    /// [`State::asked`] counts.
    asked: u64,
}

/// How far an entry has come.
#[derive(Clone, Copy)]
enum Stage {
    /// A worker has it, or will.
    Freezing,
    /// As above, but it is to be thawed at once.
    CalledOff,
    /// It is frozen.
    Held,
    /// A worker thaws it, or will; the last attempt has failed with this.
    Thawing(Option<Error>),
    /// It was never frozen. This and the next one are removed when nobody watches.
    Failed(Error),
    /// It is not frozen any more; that it ended before has failed the thaw.
    Thawed(Result),
}

impl Stage {
    fn is_done(self) -> bool {
        matches!(self, Stage::Failed(_) | Stage::Thawed(_))
    }

    /// Whether its thaw has ended, well or not.
    fn has_come_back(self) -> bool {
        self.is_done() || matches!(self, Stage::Thawing(Some(_)))
    }

    fn name(self) -> &'static str {
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

/// What one freeze and its thaw need.
#[pin_data]
pub(crate) struct Slot {
    hold: Arc<Hold>,
    #[pin]
    freeze: Work<Slot, FREEZE>,
    #[pin]
    thaw: DelayedWork<Slot, THAW>,
    /// Woken when its entry's stage has changed.
    #[pin]
    changes: WaitQueue,
}

impl_has_work! {
    impl HasWork<Self, 0> for Slot { self.freeze }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, 1> for Slot { self.thaw }
}

/// Somebody who waits for an entry.
pub(crate) struct Watch {
    slot: Arc<Slot>,
    number: u64,
}

/// What is needed to begin a freeze; made before any lock is taken.
pub(crate) struct Request {
    /// For whom, in the trace.
    id: u64,
    /// For its entry.
    module: ModuleReference,
    file_system: Option<FileSystem>,
    count: usize,
    /// What of [`State::asked`] came before it.
    since: u64,
    spare: KVec<Arc<Slot>>,
    entries: KVVec<Entry>,
    /// The series before, which has ended; it goes when no lock is held.
    over: Option<Series>,
}

/// What came of a request to begin.
pub(crate) enum Begun {
    /// A worker will do it.
    Queued(Watch),
    /// It would be the first: call [`Hold::set_aside`] and try again.
    First,
    /// The same file system has been let go, and is not thawed yet: [`Hold::wait_turn`] and try again.
    After(Watch),
}

/// What there was to let go.
#[derive(Clone, Copy)]
pub(crate) struct LetGo {
    /// Something was frozen.
    pub(crate) held: bool,
    /// Something was being frozen.
    pub(crate) freezing: bool,
    /// What is begun from here on was no part of it.
    before: u64,
    /// Nor what hangs since an earlier series.
    series: u64,
}

impl LetGo {
    /// Whether there was anything.
    pub(crate) fn any(self) -> bool {
        self.held || self.freezing
    }
}

/// What there is to say of an entry.
pub(crate) struct Line {
    /// What to ask for the next one with.
    pub(crate) number: u64,
    /// Which file system.
    pub(crate) identity: Identity,
    /// What is being done with it.
    pub(crate) stage: &'static str,
    /// What the last thaw said.
    pub(crate) error: c_int,
    /// For whom.
    pub(crate) id: u64,
    /// For how long it has been so, in milliseconds.
    pub(crate) for_ms: i64,
}

impl Hold {
    /// The module's, as long as there is a [`Holding`].
    ///
    /// # Errors
    ///
    /// `ENODEV` when there is none.
    pub(crate) fn get() -> Result<Arc<Self>> {
        if !INITIALISED.load(Acquire) {
            return Err(ENODEV);
        }
        HOLD.lock().clone().ok_or(ENODEV)
    }

    /// Nothing is held.
    fn new() -> Result<Arc<Self>> {
        let state = State {
            series: None,
            last_series: 0,
            forgotten: 0,
            entries: KVVec::new(),
            last_entry: 0,
            asked: 0,
            asked_for_all: 0,
        };
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_spinlock_irq!(state, "hv_vss::hold"),
                thawed <- new_wait_queue!("hv_vss::thawed"),
                queues: Queues::new()?,
            }),
            GFP_KERNEL,
        )
    }

    /// A request to freeze `file_system`, which, should it be the first of a series, has `count`. A thaw of
    /// it that is asked for from here on calls it off.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is going.
    pub(crate) fn request(
        &self,
        id: u64,
        file_system: FileSystem,
        count: usize,
    ) -> Result<Request> {
        let since = self.state.lock().asked;
        Ok(Request {
            id,
            module: ModuleReference::new()?,
            file_system: Some(file_system),
            count,
            since,
            spare: KVec::new(),
            entries: KVVec::new(),
            over: None,
        })
    }

    /// Sets memory aside for a series that `request` may begin. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM` without it.
    pub(crate) fn set_aside(self: &Arc<Self>, request: &mut Request) -> Result {
        let left = self.state.lock().entries.len();
        request.entries = KVVec::with_capacity(left + request.count, GFP_KERNEL)?;
        let mut spare = KVec::with_capacity(request.count, GFP_KERNEL)?;
        for _ in 0..request.count {
            let slot = Arc::pin_init(
                pin_init!(Slot {
                    hold: self.clone(),
                    freeze <- new_work!("hv_vss::freeze"),
                    thaw <- new_delayed_work!("hv_vss::thaw"),
                    changes <- new_wait_queue!("hv_vss::slot"),
                }),
                GFP_KERNEL,
            )?;
            spare.push(slot, GFP_KERNEL)?;
        }
        request.spare = spare;
        Ok(())
    }

    /// Begins a freeze. The first of a series says with `deadline` when all is let go. Any context,
    /// so that it can be decided and begun under one lock.
    ///
    /// # Errors
    ///
    /// `EBUSY` when this file system is held already, `ENOSPC` when there is no room for another, `ESTALE`
    /// when all was let go since the request was made.
    pub(crate) fn begin(&self, request: &mut Request, deadline: u64) -> Result<Begun> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let identity = match &request.file_system {
            Some(file_system) => file_system.identity(),
            None => return Err(EINVAL),
        };
        if state.asked_for_all > request.since {
            return Err(error(ESTALE));
        }
        let same = |entry: &&mut Entry| entry.identity == identity;
        for entry in state.entries.iter_mut().filter(same) {
            match entry.stage {
                Stage::Freezing | Stage::Held => return Err(EBUSY),
                Stage::CalledOff | Stage::Thawing(_) => return Ok(Begun::After(entry.watch())),
                Stage::Failed(_) | Stage::Thawed(_) => {}
            }
        }
        if state.is_over() {
            request.over = state.series.take();
        }
        if state.series.is_none() {
            // What is left over from series before stays on the list.
            let wanted = state.entries.len() + request.count;
            if wanted > MAX_HELD {
                return Err(ENOSPC);
            }
            if request.spare.is_empty() || request.entries.capacity() < wanted {
                return Ok(Begun::First);
            }
            mem::swap(&mut state.entries, &mut request.entries);
            for entry in request.entries.drain_all() {
                // There is room for them.
                let _ = state.entries.push_within_capacity(entry);
            }
            state.last_series += 1;
            state.series = Some(Series {
                deadline,
                count: request.count,
                spare: mem::take(&mut request.spare),
            });
        }
        let slot = match &mut state.series {
            Some(series) => series.spare.pop().ok_or(ENOSPC)?,
            None => return Err(ENOSPC),
        };
        state.last_entry += 1;
        let entry = Entry {
            number: state.last_entry,
            series: state.last_series,
            id: request.id,
            slot,
            identity,
            file_system: None,
            module: request.module.clone(),
            stage: Stage::Freezing,
            since: Instant::now(),
            watches: 0,
            asked: 0,
        };
        state
            .entries
            .push_within_capacity(entry)
            .map_err(|_| ENOSPC)?;
        let entry = state.entries.last_mut().ok_or(ENOSPC)?;
        entry.file_system = request.file_system.take();
        self.queue_freeze(entry);
        Ok(Begun::Queued(entry.watch()))
    }

    /// Waits until the freeze that was begun is done, or called off. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed, `ESTALE` when it was called off, and what the file system
    /// says. It is not held then.
    pub(crate) fn wait_frozen(&self, watch: Watch) -> Result {
        let _expedited = Expedited::new();
        let _ = watch.wait(None, |stage| !matches!(stage, Stage::Freezing));
        match watch.give_up() {
            Stage::Held => Ok(()),
            Stage::Freezing => Err(EINTR),
            Stage::Failed(error) => Err(error),
            Stage::CalledOff | Stage::Thawing(_) | Stage::Thawed(_) => Err(error(ESTALE)),
        }
    }

    /// Waits, for at most `timeout_ms`, until a request may be tried again that was to come after this.
    /// Process context.
    ///
    /// # Errors
    ///
    /// `ESTALE` when it was called off meanwhile, `EINTR` when the caller is killed, `EBUSY` when the time is
    /// over, and what the file system says to its thaw.
    pub(crate) fn wait_turn(&self, request: &Request, watch: Watch, timeout_ms: u32) -> Result {
        let is_off = || watch.asked() > request.since;
        let waited = watch.wait(Some(timeout_ms), |stage| stage.has_come_back() || is_off());
        match is_off() {
            true => Err(error(ESTALE)),
            false => watch.thawed(waited),
        }
    }

    /// Waits until an entry is thawed. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed, and what the file system says.
    pub(crate) fn wait_thawed(&self, watch: Watch) -> Result {
        let waited = watch.wait(None, Stage::has_come_back);
        watch.thawed(waited)
    }

    /// Begins the thaw of one file system, if it is held. One that is being frozen is called off: whoever
    /// waits for its freeze hears of it, and nothing is returned to wait for. Any context.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not held, `EBUSY` when it is called off or being thawed already and that is
    /// not over, and what the file system said to the last attempt. A freeze that waits for the end of that
    /// is called off as well.
    pub(crate) fn begin_thaw(&self, file_system: &FileSystem) -> Result<Option<Watch>> {
        let wanted = file_system.identity();
        let mut state = self.state.lock();
        let asked = state.ask();
        let entry = state
            .entries
            .iter_mut()
            .find(|entry| entry.identity == wanted && !entry.stage.is_done())
            .ok_or(EINVAL)?;
        let error = match entry.stage {
            Stage::Held => {
                self.queue_thaw(entry);
                return Ok(Some(entry.watch()));
            }
            Stage::Freezing => {
                entry.enter(Stage::CalledOff);
                return Ok(None);
            }
            Stage::CalledOff | Stage::Thawing(None) => EBUSY,
            Stage::Thawing(Some(error)) => error,
            Stage::Failed(_) | Stage::Thawed(_) => EINVAL,
        };
        entry.asked = asked;
        entry.slot.changes.wake_all();
        Err(error)
    }

    /// Waits until all is thawed that was let go. What was still being frozen may hang, and is not
    /// waited for, nor is what hangs since an earlier series. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed, and what the first file system says that cannot be
    /// thawed.
    pub(crate) fn wait_all_thawed(&self, let_go: LetGo) -> Result {
        let mut before = let_go.before;
        let mut result = Ok(());
        loop {
            let watch = {
                let mut state = self.state.lock();
                let forgotten = state.forgotten;
                let held = |entry: &&mut Entry| {
                    let ours = entry.series == let_go.series && entry.series > forgotten;
                    ours && entry.number < before && !matches!(entry.stage, Stage::CalledOff)
                };
                match state.entries.iter_mut().rev().find(held) {
                    Some(entry) => entry.watch(),
                    None => return result,
                }
            };
            before = watch.number;
            match self.wait_thawed(watch) {
                Err(error) if error == EINTR => return Err(error),
                Err(error) if result.is_ok() => result = Err(error),
                _ => {}
            }
        }
    }

    /// Lets all go: what is held is queued to be thawed, the last one first, what is being frozen is
    /// thawed as soon as that is over, and what waits to be frozen is not. Waits for nothing; any context.
    pub(crate) fn let_go(&self) -> LetGo {
        let mut state = self.state.lock();
        let mut let_go = LetGo {
            held: false,
            freezing: false,
            before: state.last_entry + 1,
            series: state.last_series,
        };
        state.asked_for_all = state.ask();
        for entry in state.entries.iter_mut().rev() {
            match entry.stage {
                Stage::Held => {
                    let_go.held = true;
                    self.queue_thaw(entry);
                }
                Stage::Freezing => {
                    let_go.freezing = true;
                    entry.enter(Stage::CalledOff);
                }
                Stage::CalledOff | Stage::Thawing(_) => entry.slot.changes.wake_all(),
                Stage::Failed(_) | Stage::Thawed(_) => {}
            }
        }
        let spare = state.series.take();
        drop(state);
        drop(spare);
        let_go
    }

    /// The one who held is gone: lets all go, and what still hangs is no concern of the next one.
    pub(crate) fn forget(&self) {
        self.let_go();
        let mut state = self.state.lock();
        state.forgotten = state.last_series;
    }

    /// When all is to be let go, if anything is held.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.state
            .lock()
            .series
            .as_ref()
            .map(|series| series.deadline)
    }

    /// Waits for at most `timeout_ms` until nothing is frozen, or being frozen, here, whatever signals
    /// come. Process context.
    pub(crate) fn wait_idle(&self, timeout_ms: u32) {
        self.thawed.wait_undisturbed(timeout_ms, || {
            let state = self.state.lock();
            state.entries.iter().all(|entry| entry.stage.is_done())
        });
    }

    /// The entry that was begun next after the one with this number.
    pub(crate) fn line_after(&self, number: u64) -> Option<Line> {
        let state = self.state.lock();
        let next = |entry: &&Entry| entry.number > number && !entry.stage.is_done();
        let entry = state.entries.iter().find(next)?;
        Some(Line {
            number: entry.number,
            identity: entry.identity,
            stage: entry.stage.name(),
            error: match entry.stage {
                Stage::Thawing(Some(error)) => error.to_errno(),
                _ => 0,
            },
            id: entry.id,
            for_ms: entry.since.elapsed().as_millis(),
        })
    }

    /// Has an entry frozen. Under the lock.
    fn queue_freeze(&self, entry: &mut Entry) {
        // It is queued: its slot was not in use.
        let _ = self
            .queues
            .freezes()
            .enqueue::<_, FREEZE>(entry.slot.clone());
    }

    /// Has an entry thawed that is frozen. Under the lock.
    fn queue_thaw(&self, entry: &mut Entry) {
        entry.enter(Stage::Thawing(None));
        self.queue_thaw_in(entry, 0);
    }

    fn queue_thaw_in(&self, entry: &mut Entry, ms: u32) {
        let delay = msecs_to_jiffies(ms);
        // As above: only a worker that has the entry in hand, or will, could have queued it.
        let _ = self
            .queues
            .thaws()
            .enqueue_delayed::<_, THAW>(entry.slot.clone(), delay);
    }
}

impl State {
    /// Whether there is a series of which nothing is frozen, or going to be: what of it is still there hangs,
    /// and is to end without it. The next one has its own deadline, and room for all.
    fn is_over(&self) -> bool {
        let counts = |entry: &Entry| matches!(entry.stage, Stage::Freezing | Stage::Held);
        let mut its = self.entries.iter().filter(|it| it.series == self.last_series);
        self.series.is_some() && !its.any(counts)
    }

    /// Somebody asks for a thaw. Returns which one it is.
    fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.asked
    }

    fn of_slot(&mut self, slot: &Arc<Slot>) -> Option<&mut Entry> {
        self.entries
            .iter_mut()
            .find(|entry| Arc::ptr_eq(&entry.slot, slot))
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.number == number)
    }

    /// Removes an entry that is done and that nobody watches. With the last one the series ends;
    /// what is returned is to be dropped without the lock.
    fn sweep(&mut self, number: u64) -> Option<Series> {
        let over =
            |entry: &Entry| entry.number == number && entry.watches == 0 && entry.stage.is_done();
        let at = self.entries.iter().position(over)?;
        let entry = self.entries.remove(at).ok()?;
        let series = self.series.as_mut()?;
        if entry.series != self.last_series {
            return None;
        }
        // There is room for as many as were there at first.
        let _ = series.spare.push_within_capacity(entry.slot);
        if series.spare.len() < series.count {
            return None;
        }
        self.series.take()
    }
}

impl Entry {
    /// Enters another stage. Under the lock.
    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.since = Instant::now();
        self.slot.changes.wake_all();
    }

    fn watch(&mut self) -> Watch {
        self.watches += 1;
        Watch {
            slot: self.slot.clone(),
            number: self.number,
        }
    }
}

impl Watch {
    /// Where the entry stands; it is not removed as long as it is watched.
    fn stage(&self) -> Stage {
        let mut state = self.slot.hold.state.lock();
        match state.numbered(self.number) {
            Some(entry) => entry.stage,
            None => Stage::Thawed(Ok(())),
        }
    }

    /// As [`Self::stage`], for the last time: a freeze that is not done then is called off under the same lock, so
    /// that nobody who is told that it is not held finds it held after all.
    fn give_up(&self) -> Stage {
        let mut state = self.slot.hold.state.lock();
        match state.numbered(self.number) {
            Some(entry) => {
                let stage = entry.stage;
                if matches!(stage, Stage::Freezing) {
                    entry.enter(Stage::CalledOff);
                }
                stage
            }
            None => Stage::Thawed(Ok(())),
        }
    }

    /// Which was the last thaw that was asked for the entry when it was on its way to that already, or for all.
    fn asked(&self) -> u64 {
        let mut state = self.slot.hold.state.lock();
        let for_all = state.asked_for_all;
        let its = state.numbered(self.number).map_or(0, |entry| entry.asked);
        its.max(for_all)
    }

    fn wait(&self, timeout_ms: Option<u32>, enough: impl Fn(Stage) -> bool) -> Waited {
        self.slot.changes.wait(timeout_ms, || enough(self.stage()))
    }

    /// What there is to say of the thaw after a wait for it.
    fn thawed(&self, waited: Waited) -> Result {
        match (self.stage(), waited) {
            (Stage::Failed(_), _) => Ok(()),
            (Stage::Thawed(result), _) => result,
            (Stage::Thawing(Some(error)), _) => Err(error),
            (_, Waited::TimedOut) => Err(EBUSY),
            (_, Waited::Done | Waited::Killed) => Err(EINTR),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _series = {
            let mut state = self.slot.hold.state.lock();
            if let Some(entry) = state.numbered(self.number) {
                entry.watches = entry.watches.saturating_sub(1);
            }
            state.sweep(self.number)
        };
    }
}

impl WorkItem<FREEZE> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let module = this.do_freeze();
        // In this order: when the last work has given back its reference, the module may go.
        drop(this);
        drop(module);
    }
}

impl WorkItem<THAW> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let module = this.do_thaw();
        drop(this);
        drop(module);
    }
}

/// What a worker has in hand.
struct Task {
    file_system: FileSystem,
    /// Given back last of all: then the module may go.
    module: ModuleReference,
    id: u64,
    identity: Identity,
    /// Where the entry stood.
    stage: Stage,
}

impl Slot {
    /// What a worker does for an entry that is being frozen.
    fn do_freeze(self: &Arc<Self>) -> Option<ModuleReference> {
        let task = self.take()?;
        if matches!(task.stage, Stage::CalledOff) {
            self.finish(task.file_system, Stage::Failed(error(ESTALE)));
            return Some(task.module);
        }
        let begun = Instant::<Monotonic>::now();
        let result = task.file_system.freeze(&**self);
        let us = begun.elapsed().as_micros_ceil();
        report::froze(task.id, task.identity.device, result, us);
        match result {
            Ok(()) => self.put_back(task.file_system, |hold, entry| match entry.stage {
                Stage::CalledOff => hold.queue_thaw(entry),
                _ => entry.enter(Stage::Held),
            }),
            Err(error) => self.finish(task.file_system, Stage::Failed(error)),
        }
        Some(task.module)
    }

    /// What a worker does for an entry that is being thawed.
    fn do_thaw(self: &Arc<Self>) -> Option<ModuleReference> {
        let task = self.take()?;
        let begun = Instant::<Monotonic>::now();
        let result = task.file_system.thaw(&**self);
        let us = begun.elapsed().as_micros_ceil();
        // What is tried again and again is said once.
        let first = matches!(task.stage, Stage::Thawing(None));
        report::thawed(task.id, task.identity.device, result, us, first);
        match result {
            // `EINVAL` says that it is not frozen for us, which trying again does not change.
            Err(error) if error != EINVAL => self.put_back(task.file_system, |hold, entry| {
                entry.enter(Stage::Thawing(Some(error)));
                hold.queue_thaw_in(entry, RETRY_MS);
            }),
            // Nobody can bring that about. It is told apart from what was let go, which the holder hears of elsewhere.
            _ => self.finish(task.file_system, Stage::Thawed(result.map_err(|_| EIO))),
        }
        Some(task.module)
    }

    /// Takes the entry's file system in hand.
    fn take(self: &Arc<Self>) -> Option<Task> {
        let mut state = self.hold.state.lock();
        let entry = state.of_slot(self)?;
        Some(Task {
            file_system: entry.file_system.take()?,
            module: entry.module.clone(),
            id: entry.id,
            identity: entry.identity,
            stage: entry.stage,
        })
    }

    /// Gives the file system back to its entry, which goes on.
    fn put_back(self: &Arc<Self>, file_system: FileSystem, go_on: impl FnOnce(&Hold, &mut Entry)) {
        let mut state = self.hold.state.lock();
        if let Some(entry) = state.of_slot(self) {
            entry.file_system = Some(file_system);
            go_on(&self.hold, entry);
        }
    }

    /// The file system is not frozen. It is free to be unmounted when those who wait hear of it.
    fn finish(self: &Arc<Self>, file_system: FileSystem, end: Stage) {
        drop(file_system);
        let _series = {
            let mut state = self.hold.state.lock();
            let number = match state.of_slot(self) {
                Some(entry) => {
                    entry.enter(end);
                    entry.number
                }
                None => return,
            };
            state.sweep(number)
        };
        self.hold.thawed.wake_all();
    }
}
