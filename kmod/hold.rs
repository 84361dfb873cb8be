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
//! What is decided is decided in [`engine::hold`](crate::engine::hold); here are the lock around it, the workers, and who
//! waits for them. There is one [`Hold`], the module's: a device can go while a freeze hangs, and the one that comes after it has to
//! know of that. Knows nothing of VMBus, of VSS, nor of who asks.

use crate::compat::error;
use crate::compat::new_spinlock_irq;
use crate::compat::SpinLockIrq;
use crate::engine::hold as engine;
use crate::engine::hold::Held;
use crate::engine::hold::HoldEffects;
use crate::engine::hold::LetGo;
use crate::engine::hold::Matter;
use crate::engine::hold::Room;
use crate::engine::hold::Ticket;
use crate::engine::hold::Trouble;
use crate::file_system::Expedited;
use crate::file_system::FileSystem;
use crate::file_system::Identity;
use crate::report;
use crate::wait::new_wait_queue;
use crate::wait::WaitQueue;
use crate::wait::Waited;
use crate::workers::ModuleReference;
use crate::workers::Queues;
use kernel::alloc::Allocator;
use kernel::alloc::Vec;
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
    state: SpinLockIrq<Held<Kernel>>,
    /// Woken when a file system has been thawed.
    #[pin]
    thawed: WaitQueue,
    /// Somebody begins a series.
    begins: AtomicFlag,
    /// Woken when that is over.
    #[pin]
    begun: WaitQueue,
    queues: Queues,
}

/// What the machine handles here.
pub(crate) struct Kernel;

impl Matter for Kernel {
    type FileSystem = FileSystem;
    type Identity = Identity;
    type Module = ModuleReference;
    type Slot = Place;
    type Error = Error;
    type Time = Instant<Monotonic>;
    type Entries = KVVec<engine::Entry<Self>>;
    type Slots = KVec<Place>;
}

impl<T, A: Allocator> Room<T> for Vec<T, A> {
    fn capacity(&self) -> usize {
        self.capacity()
    }

    fn all(&self) -> &[T] {
        self
    }

    fn all_mut(&mut self) -> &mut [T] {
        self
    }

    fn push(&mut self, one: T) -> Result<(), T> {
        self.push_within_capacity(one).map_err(|error| error.0)
    }

    fn pop(&mut self) -> Option<T> {
        self.pop()
    }

    fn remove(&mut self, at: usize) -> Option<T> {
        self.remove(at).ok()
    }
}

/// A [`Slot`], for the machine.
#[derive(Clone)]
pub(crate) struct Place(Arc<Slot>);

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl HoldEffects<Kernel> for &Queues {
    fn queue_freeze(&mut self, slot: &Place) {
        // It is queued: its slot was not in use.
        let _ = self.freezes().enqueue::<_, FREEZE>(slot.0.clone());
    }

    fn queue_thaw(&mut self, slot: &Place, ms: u32) {
        let delay = msecs_to_jiffies(ms);
        // As above: only a worker that has the entry in hand, or will, could have queued it.
        let _ = self
            .thaws()
            .enqueue_delayed::<_, THAW>(slot.0.clone(), delay);
    }

    fn wake(&mut self, slot: &Place) {
        slot.0.changes.wake_all();
    }
}

/// As the ioctls say it.
fn errno(trouble: Trouble<Error>) -> Error {
    match trouble {
        Trouble::Busy => EBUSY,
        Trouble::NoRoom => ENOSPC,
        Trouble::Stale => error(ESTALE),
        Trouble::NotHeld => EINVAL,
        Trouble::Said(error) => error,
    }
}

type Stage = engine::Stage<Error>;

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
pub(crate) struct Watch(Ticket<Kernel>);

/// What is needed to begin a freeze; made before any lock is taken.
pub(crate) type Request = engine::Request<Kernel>;

/// What came of a request to begin.
pub(crate) enum Begun {
    /// A worker will do it.
    Queued(Watch),
    /// It would be the first: take a [`Turn`] and try again, and with that call [`Hold::set_aside`].
    First,
    /// The same file system has been let go, and is not thawed yet: [`Hold::wait_turn`] and try again.
    After(Watch),
}

/// What there is to say of an entry.
pub(crate) type Line = engine::Line<Kernel>;

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
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_spinlock_irq!(Held::new(KVVec::new()), "hv_vss::hold"),
                thawed <- new_wait_queue!("hv_vss::thawed"),
                begins: AtomicFlag::new(false),
                begun <- new_wait_queue!("hv_vss::begun"),
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
        let since = self.state.lock().asked();
        Ok(Request {
            id,
            module: ModuleReference::new()?,
            identity: file_system.identity(),
            file_system: Some(file_system),
            count,
            since,
            spare: KVec::new(),
            entries: KVVec::new(),
            over: None,
        })
    }

    /// Waits for the turn to begin a series, so that of many who come at once one sets memory aside. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed.
    pub(crate) fn turn(&self) -> Result<Turn<'_>> {
        match self.begun.wait(None, || !self.begins.xchg(true, Acquire)) {
            Waited::Done => Ok(Turn(self)),
            Waited::TimedOut | Waited::Killed => Err(EINTR),
        }
    }

    /// Sets memory aside for a series that `request` may begin. Sleeps.
    ///
    /// # Errors
    ///
    /// `ENOMEM` without it.
    pub(crate) fn set_aside(self: &Arc<Self>, _: &Turn<'_>, request: &mut Request) -> Result {
        let left = self.state.lock().len();
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
            spare.push(Place(slot), GFP_KERNEL)?;
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
        let begun = state.begin(
            request,
            MAX_HELD,
            deadline,
            Instant::now(),
            &mut &self.queues,
        );
        Ok(match begun.map_err(errno)? {
            engine::Begun::Queued(ticket) => Begun::Queued(Watch(ticket)),
            engine::Begun::First => Begun::First,
            engine::Begun::After(ticket) => Begun::After(Watch(ticket)),
        })
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
            Stage::Failed(Some(error)) => Err(error),
            Stage::Failed(None) | Stage::CalledOff | Stage::Thawing(_) | Stage::Thawed(_) => {
                Err(error(ESTALE))
            }
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
        let is_off = || watch.asked(request.id) > request.since;
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
        let waited = watch.wait(None, |stage| stage.has_come_back());
        watch.thawed(waited)
    }

    /// Begins the thaw of one file system, if it is held for the request `id` (0 for nobody). One that is being frozen
    /// is called off: whoever waits for its freeze hears of it, and nothing is returned to wait for. Any context.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not held, `ESTALE` when it is on another's behalf, `EBUSY` when it is called off or being
    /// thawed already and that is not over, and what the file system said to the last attempt. A freeze that waits for
    /// the end of that, on the same behalf, is called off as well.
    pub(crate) fn begin_thaw(&self, id: u64, file_system: &FileSystem) -> Result<Option<Watch>> {
        let wanted = file_system.identity();
        let mut state = self.state.lock();
        let ticket = state.begin_thaw(wanted, id, Instant::now(), &mut &self.queues);
        Ok(ticket.map_err(errno)?.map(Watch))
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
            let Some(ticket) = self.state.lock().unthawed(let_go, before) else {
                return result;
            };
            before = ticket.number;
            let watch = Watch(ticket);
            match self.wait_thawed(watch) {
                Err(error) if error == EINTR => return Err(error),
                Err(error) if result.is_ok() => result = Err(error),
                _ => {}
            }
        }
    }

    /// Lets all go, or with an `id` all that is held on that behalf: what is held is queued to be thawed, the last one
    /// first, what is being frozen is thawed as soon as that is over, and what waits to be frozen is not. Waits for
    /// nothing; any context.
    pub(crate) fn let_go(&self, id: Option<u64>) -> LetGo {
        let mut state = self.state.lock();
        let (let_go, series) = state.let_go(id, Instant::now(), &mut &self.queues);
        drop(state);
        drop(series);
        let_go
    }

    /// The one who held is gone: lets all go, and what still hangs is no concern of the next one.
    pub(crate) fn forget(&self) {
        self.let_go(None);
        self.state.lock().forget();
    }

    /// Whether anything is held, or going to be.
    pub(crate) fn holds(&self) -> bool {
        self.state.lock().holds()
    }

    /// When all is to be let go, if anything is held.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.state.lock().deadline()
    }

    /// Waits for at most `timeout_ms` until nothing is frozen, or being frozen, here, whatever signals
    /// come. Process context.
    pub(crate) fn wait_idle(&self, timeout_ms: u32) {
        self.thawed
            .wait_undisturbed(timeout_ms, || self.state.lock().is_idle());
    }

    /// The entry that was begun next after the one with this number.
    pub(crate) fn line_after(&self, number: u64) -> Option<Line> {
        self.state.lock().line_after(number)
    }
}

/// The turn to begin a series; others wait until it is dropped.
pub(crate) struct Turn<'a>(&'a Hold);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.begins.store(false, Release);
        self.0.begun.wake_all();
    }
}

impl Watch {
    fn hold(&self) -> &Hold {
        &self.0.slot.0.hold
    }

    /// Where the entry stands; it is not removed as long as it is watched.
    fn stage(&self) -> Stage {
        self.hold().state.lock().stage(self.0.number)
    }

    /// As [`Self::stage`], for the last time: a freeze that is not done then is called off under the same lock, so
    /// that nobody who is told that it is not held finds it held after all.
    fn give_up(&self) -> Stage {
        let hold = self.hold();
        let mut state = hold.state.lock();
        state.give_up(self.0.number, Instant::now(), &mut &hold.queues)
    }

    /// Which was the last thaw that was asked for on behalf of `id`: of the entry when it was on its way to that
    /// already, or of all.
    fn asked(&self, id: u64) -> u64 {
        self.hold().state.lock().asked_of(self.0.number, id)
    }

    fn wait(&self, timeout_ms: Option<u32>, enough: impl Fn(Stage) -> bool) -> Waited {
        self.0
            .slot
            .0
            .changes
            .wait(timeout_ms, || enough(self.stage()))
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
        let series = self.hold().state.lock().unwatch(self.0.number);
        drop(series);
    }
}

impl WorkItem<FREEZE> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let place = Place(this);
        let module = place.do_freeze();
        // In this order: when the last work has given back its reference, the module may go.
        drop(place);
        drop(module);
    }
}

impl WorkItem<THAW> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let place = Place(this);
        let module = place.do_thaw();
        drop(place);
        drop(module);
    }
}

impl Place {
    /// What a worker does for an entry that is being frozen.
    fn do_freeze(&self) -> Option<ModuleReference> {
        let hold = &self.0.hold;
        let task = hold.state.lock().take(self)?;
        if matches!(task.stage, Stage::CalledOff) {
            self.finish(task.file_system, Stage::Failed(None));
            return Some(task.module);
        }
        let begun = Instant::<Monotonic>::now();
        let result = task.file_system.freeze(&*self.0);
        let us = begun.elapsed().as_micros_ceil();
        report::froze(task.id, task.identity.device, result, us);
        match result {
            Ok(()) => {
                let mut state = hold.state.lock();
                state.frozen(self, task.file_system, Instant::now(), &mut &hold.queues);
            }
            Err(error) => self.finish(task.file_system, Stage::Failed(Some(error))),
        }
        Some(task.module)
    }

    /// What a worker does for an entry that is being thawed.
    fn do_thaw(&self) -> Option<ModuleReference> {
        let hold = &self.0.hold;
        let task = hold.state.lock().take(self)?;
        let begun = Instant::<Monotonic>::now();
        let result = task.file_system.thaw(&*self.0);
        let us = begun.elapsed().as_micros_ceil();
        // What is tried again and again is said once.
        let first = matches!(task.stage, Stage::Thawing(None));
        report::thawed(task.id, task.identity.device, result, us, first);
        match result {
            // `EINVAL` says that it is not frozen for us, which trying again does not change.
            Err(error) if error != EINVAL => {
                let mut state = hold.state.lock();
                state.stuck(
                    self,
                    task.file_system,
                    error,
                    Instant::now(),
                    &mut &hold.queues,
                );
            }
            // Nobody can bring that about. It is told apart from what was let go, which the holder hears of elsewhere.
            _ => self.finish(task.file_system, Stage::Thawed(result.map_err(|_| EIO))),
        }
        Some(task.module)
    }

    /// The file system is not frozen. It is free to be unmounted when those who wait hear of it.
    fn finish(&self, file_system: FileSystem, end: Stage) {
        drop(file_system);
        let hold = &self.0.hold;
        let mut state = hold.state.lock();
        let series = state.finished(self, end, Instant::now(), &mut &hold.queues);
        drop(state);
        drop(series);
        hold.thawed.wake_all();
    }
}
