// SPDX-License-Identifier: GPL-2.0

//! Freezes that belong to somebody: what is held here nobody else can thaw, and it ends with its
//! holder.
//!
//! A freeze waits for writers and for the disk, and nothing can end that wait. So kernel workers do
//! it, and whoever asked for it waits so that it can be killed. Until it is done it can be called off:
//! then it is undone the moment it comes back. Thaws have a queue of their own, that no hanging freeze
//! can keep busy, and a worker each, so that one that hangs holds up no other.
//!
//! While anything is frozen memory may not be had, since what would have to be written for it stands
//! still: all that a freeze and its thaw need is set aside before the first one begins.
//!
//! Knows nothing of VMBus, of VSS, nor of who asks. What is frozen is a file system, by the VFS's
//! exclusive freeze (`FREEZE_EXCL`), which has an owner: the address of its [`Slot`].
//!
//! C headers: [`include/linux/fs/super.h`](srctree/include/linux/fs/super.h),
//! [`include/linux/mount.h`](srctree/include/linux/mount.h)

use crate::bindings;
use crate::compat::error;
use crate::compat::new_spinlock_irq;
use crate::compat::this_module;
use crate::compat::SpinLockIrq;
use crate::report;
use crate::wait::new_wait_queue;
use crate::wait::WaitQueue;
use crate::wait::Waited;
use core::mem;
use core::ptr::NonNull;
use kernel::bindings as raw;
use kernel::error::to_result;
use kernel::fs::LocalFile;
use kernel::prelude::*;
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
use kernel::workqueue::Queue;
use kernel::workqueue::Work;
use kernel::workqueue::WorkItem;

/// File systems that can be held at a time, and freezes that may hang beside them. As many workers
/// run in parallel: a queue without a CPU of its own allows for four times as many, which it
/// distributes over the memory nodes.
pub(crate) const MAX_HELD: usize = 512;

/// How soon a thaw that has failed is tried again, in milliseconds.
const RETRY_MS: u32 = 1_000;

/// Which of a slot's two works is meant.
const FREEZE: u64 = 0;
const THAW: u64 = 1;

/// A file system that is kept mounted: an unmount gets `EBUSY`, a lazy one is completed when this is
/// dropped, which may sleep.
///
/// # Invariants
///
/// `mount` is a valid mount, and a reference to it is owned.
pub(crate) struct FileSystem {
    mount: NonNull<raw::vfsmount>,
}

// SAFETY: A reference to a mount may be used and dropped by any thread.
unsafe impl Send for FileSystem {}

impl FileSystem {
    /// The file system of the caller's open descriptor `fd`.
    ///
    /// # Errors
    ///
    /// `EBADF` when it is not open, or only a path (`O_PATH`).
    pub(crate) fn of(fd: i32) -> Result<Self> {
        let file = LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?;
        // The mount, not the file: a descriptor can be sent through itself, and would never be closed.
        //
        // SAFETY: The file is open, so it has a mount, which it keeps.
        let mount = unsafe { raw::mntget(bindings::hv_vss_file_mount(file.as_ptr())) };
        // INVARIANT: `mntget` has taken a reference.
        Ok(FileSystem {
            mount: NonNull::new(mount).ok_or(EBADF)?,
        })
    }

    /// Whether the caller may freeze it, and whether it can be frozen, as FIFREEZE has it.
    ///
    /// # Errors
    ///
    /// `EPERM` or `EOPNOTSUPP`.
    pub(crate) fn may_freeze(&self) -> Result {
        // SAFETY: By the type invariant the superblock is alive, and so is its user namespace.
        if !unsafe { raw::ns_capable((*self.superblock()).s_user_ns, raw::CAP_SYS_ADMIN as c_int) } {
            return Err(EPERM);
        }
        let operations = self.operations();
        if operations.freeze_fs.is_none() && operations.freeze_super.is_none() {
            return Err(error(raw::EOPNOTSUPP));
        }
        Ok(())
    }

    /// Freezes it for `owner`. Process context; waits for writers and for the disk.
    fn freeze(&self, owner: *const Slot) -> Result {
        let freeze = self.operations().freeze_super.unwrap_or(raw::freeze_super);
        // SAFETY: By the type invariant the superblock is alive and active. The owner is not null.
        to_result(unsafe { freeze(self.superblock(), HOLDER, owner.cast()) })
    }

    /// Undoes a freeze for `owner`. Process context; may wait for the disk.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not frozen for this owner, else what the file system says; it is still
    /// frozen then.
    fn thaw(&self, owner: *const Slot) -> Result {
        let thaw = self.operations().thaw_super.unwrap_or(raw::thaw_super);
        // SAFETY: As for `freeze`.
        to_result(unsafe { thaw(self.superblock(), HOLDER, owner.cast()) })
    }

    fn superblock(&self) -> *mut raw::super_block {
        // SAFETY: By the type invariant the mount is valid; its superblock does not change.
        unsafe { (*self.mount.as_ptr()).mnt_sb }
    }

    fn operations(&self) -> &raw::super_operations {
        // SAFETY: By the type invariant the superblock is alive; its operations are never null, and
        // constant.
        unsafe { &*(*self.superblock()).s_op }
    }

    fn identity(&self) -> Identity {
        let superblock = self.superblock();
        let mut kind = [0; KIND];
        // SAFETY: By the type invariant the superblock is alive, and with it its type, whose name is a
        // string.
        let (device, name) = unsafe {
            let name = CStr::from_char_ptr((*(*superblock).s_type).name);
            ((*superblock).s_dev, name)
        };
        for (to, from) in kind.iter_mut().zip(name.to_bytes()) {
            *to = *from;
        }
        Identity {
            superblock: superblock.addr(),
            device,
            kind,
        }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference, which ends here.
        unsafe { raw::mntput(self.mount.as_ptr()) };
    }
}

/// Our kind of freeze: only who is named as the owner can undo it, and it nests with those of others.
const HOLDER: raw::freeze_holder =
    raw::freeze_holder_FREEZE_HOLDER_KERNEL | raw::freeze_holder_FREEZE_EXCL;

/// Bytes of a file system type's name that are kept.
const KIND: usize = 16;

/// Which file system it is, for comparing and for printing.
#[derive(Clone, Copy)]
struct Identity {
    /// Address of the superblock.
    superblock: usize,
    device: raw::dev_t,
    /// The name of its type, filled up with zeros.
    kind: [u8; KIND],
}

global_lock! {
    // SAFETY: Initialised in `Workers::new`, which comes before all else.
    unsafe(uninit) static QUEUES: Mutex<Option<Arc<Queues>>> = None;
}

/// The module's workqueues. Their work progresses even if there is no memory for another worker.
struct Queues {
    freezes: OwnedQueue,
    thaws: OwnedQueue,
}

/// There are workqueues as long as this lives. They are the module's, not a device's: a device can go
/// while a freeze hangs, the module cannot (see [`ModuleReference`]).
pub(crate) struct Workers(());

impl Workers {
    /// Makes the workqueues.
    ///
    /// # Safety
    ///
    /// May be called once, before anything else of this file. What it returns must be dropped last.
    pub(crate) unsafe fn new() -> Result<Self> {
        // SAFETY: Guaranteed by the caller.
        unsafe { QUEUES.init() };
        let queues = Queues {
            freezes: OwnedQueue::new(c"hv_vss_freeze")?,
            thaws: OwnedQueue::new(c"hv_vss_thaw")?,
        };
        *QUEUES.lock() = Some(Arc::new(queues, GFP_KERNEL)?);
        Ok(Workers(()))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // No other reference is left: no device is bound, no descriptor open, and what a work had it gave
        // back before its reference to the module.
        let queues = QUEUES.lock().take();
        drop(queues);
    }
}

/// A workqueue that is destroyed on drop, which waits for what runs in it.
///
/// # Invariants
///
/// It is a valid workqueue.
struct OwnedQueue(NonNull<raw::workqueue_struct>);

// SAFETY: Workqueues may be used from any thread.
unsafe impl Send for OwnedQueue {}
// SAFETY: Likewise.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    fn new(name: &'static CStr) -> Result<Self> {
        let flags = raw::wq_flags_WQ_UNBOUND | raw::wq_flags_WQ_MEM_RECLAIM;
        // SAFETY: The name is a format without arguments.
        let queue = unsafe {
            raw::alloc_workqueue_noprof(
                name.as_char_ptr(),
                flags,
                // CAST: 2048.
                raw::wq_consts_WQ_MAX_ACTIVE as c_int,
            )
        };
        // INVARIANT: It is one if it is not null.
        NonNull::new(queue).map(OwnedQueue).ok_or(ENOMEM)
    }

    fn get(&self) -> &Queue {
        // SAFETY: By the type invariant it is valid for as long as `self` is.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is valid; it is not used any more.
        unsafe { raw::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// Keeps the module from being unloaded. A work has one from when it is queued until all that is left
/// of it is to return; for that much the end of [`Workers`] waits.
struct ModuleReference(());

impl ModuleReference {
    /// A work is queued: takes its reference.
    fn give() {
        // SAFETY: The module is in use: either a descriptor of its device is open, or a work has its
        // reference still, or it is not being unloaded as the device is only now unbound.
        unsafe { raw::__module_get(this_module()) };
    }

    /// The work runs: the reference is its own.
    fn take() -> Self {
        ModuleReference(())
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: `give` was called for this work.
        unsafe { raw::module_put(this_module()) };
    }
}

/// While there is one, RCU's grace periods are expedited, as the kernel itself does around suspend.
///
/// `freeze_super` waits for three of them, one for each kind of writer that it shuts out: nearly all
/// of the time that a file system takes that has nothing to write. A caller that waits has one, not the
/// worker, so that a freeze that hangs does not go on with it when its caller is gone.
struct Expedited(());

impl Expedited {
    fn new() -> Self {
        // SAFETY: There are no requirements; they nest.
        unsafe { bindings::hv_vss_rcu_expedite() };
        Expedited(())
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        // SAFETY: `new` has been called.
        unsafe { bindings::hv_vss_rcu_unexpedite() };
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
    queues: Arc<Queues>,
}

struct State {
    /// The freezes that end together.
    series: Option<Series>,
    /// Number of the last series.
    last_series: u64,
    /// Series up to this one were somebody else's.
    forgotten: u64,
    /// In the order in which they were begun; room for [`MAX_HELD`] is there.
    entries: KVec<Entry>,
    /// Number of the last entry.
    last_entry: u64,
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
    stage: Stage,
    /// When this stage began.
    since: Instant<Monotonic>,
    /// How many [`Watch`]es there are.
    watches: usize,
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
    /// It is not frozen: how the freeze failed, or how the thaw ended. Removed when nobody watches.
    Done(Result),
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Freezing => "freezing",
            Stage::CalledOff => "called-off",
            Stage::Held => "held",
            Stage::Thawing(None) => "thawing",
            Stage::Thawing(Some(_)) => "stuck",
            Stage::Done(_) => "done",
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

/// Somebody who waits for an entry. A freeze that nobody waits for any more is called off.
pub(crate) struct Watch {
    slot: Arc<Slot>,
    number: u64,
}

/// What is needed to begin a freeze; made before any lock is taken.
pub(crate) struct Request {
    /// For whom, in the trace.
    pub(crate) id: u64,
    file_system: Option<FileSystem>,
    count: usize,
    spare: KVec<Arc<Slot>>,
}

impl Request {
    /// A request to freeze `file_system`, which, should it be the first of a series, has `count`.
    pub(crate) fn new(id: u64, file_system: FileSystem, count: usize) -> Self {
        Request {
            id,
            file_system: Some(file_system),
            count,
            spare: KVec::new(),
        }
    }
}

/// What came of a request to begin.
pub(crate) enum Begun {
    /// A worker will do it.
    Queued(Watch),
    /// It would be the first: call [`Hold::set_aside`] and try again.
    First,
    /// The same file system is still being thawed: wait for that and try again.
    After(Watch),
}

/// What there is to say of an entry.
pub(crate) struct Line {
    /// What to ask for the next one with.
    pub(crate) number: u64,
    /// Device numbers.
    pub(crate) device: (u32, u32),
    kind: [u8; KIND],
    /// What is being done with it.
    pub(crate) stage: &'static str,
    /// What the last thaw said.
    pub(crate) error: c_int,
    /// For whom.
    pub(crate) id: u64,
    /// For how long it has been so, in milliseconds.
    pub(crate) for_ms: i64,
}

impl Line {
    /// The file system's type.
    pub(crate) fn kind(&self) -> &str {
        let end = self.kind.iter().position(|b| *b == 0).unwrap_or(KIND);
        let name = self.kind.get(..end).unwrap_or_default();
        core::str::from_utf8(name).unwrap_or("?")
    }
}

impl Hold {
    /// Nothing is held.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let queues = QUEUES.lock().clone().ok_or(ENODEV)?;
        let state = State {
            series: None,
            last_series: 0,
            forgotten: 0,
            entries: KVec::with_capacity(MAX_HELD, GFP_KERNEL)?,
            last_entry: 0,
        };
        Arc::pin_init(
            pin_init!(Self {
                state <- new_spinlock_irq!(state, "hv_vss::hold"),
                thawed <- new_wait_queue!("hv_vss::thawed"),
                queues,
            }),
            GFP_KERNEL,
        )
    }

    /// Sets memory aside for a series that `request` may begin. Sleeps.
    pub(crate) fn set_aside(self: &Arc<Self>, request: &mut Request) -> Result {
        let mut spare = KVec::with_capacity(request.count, GFP_KERNEL)?;
        for _ in 0..request.count {
            let slot = Arc::pin_init(
                pin_init!(Slot {
                    hold: self.clone(),
                    freeze <- new_work!("hv_vss::freeze"),
                    thaw <- new_delayed_work!("hv_vss::thaw"),
                    changes <- new_wait_queue!("hv_vss::changes"),
                }),
                GFP_KERNEL,
            )?;
            spare.push(slot, GFP_KERNEL)?;
        }
        request.spare = spare;
        Ok(())
    }

    /// Begins a freeze. The first of a series says with `deadline` when all is let go. Any context, so
    /// that it can be decided and begun under one lock.
    ///
    /// # Errors
    ///
    /// `EBUSY` when this file system is held already, `ENOSPC` when there is no room for another.
    pub(crate) fn begin(&self, request: &mut Request, deadline: u64) -> Result<Begun> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let identity = match &request.file_system {
            Some(file_system) => file_system.identity(),
            None => return Err(EINVAL),
        };
        let same = |entry: &&mut Entry| entry.identity.superblock == identity.superblock;
        for entry in state.entries.iter_mut().filter(same) {
            match entry.stage {
                Stage::Freezing | Stage::CalledOff | Stage::Held => return Err(EBUSY),
                Stage::Thawing(_) => return Ok(Begun::After(entry.watch())),
                Stage::Done(_) => {}
            }
        }
        if state.entries.len() >= MAX_HELD {
            return Err(ENOSPC);
        }
        if state.series.is_none() {
            if request.spare.is_empty() {
                return Ok(Begun::First);
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
            stage: Stage::Freezing,
            since: Instant::now(),
            watches: 0,
        };
        state.entries.push_within_capacity(entry).map_err(|_| ENOSPC)?;
        let entry = state.entries.last_mut().ok_or(ENOSPC)?;
        entry.file_system = request.file_system.take();
        self.queue_freeze(&entry.slot);
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
        match watch.stage() {
            Stage::Held => Ok(()),
            Stage::Freezing => Err(EINTR),
            Stage::Done(Err(error)) => Err(error),
            Stage::CalledOff | Stage::Thawing(_) | Stage::Done(Ok(())) => Err(error(raw::ESTALE)),
        }
    }

    /// Waits until an entry is thawed, for at most `timeout_ms`. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed, `EBUSY` when the time is over, and what the file system says.
    pub(crate) fn wait_thawed(&self, watch: Watch, timeout_ms: Option<u32>) -> Result {
        let waited = watch.wait(timeout_ms, |stage| {
            matches!(stage, Stage::Done(_) | Stage::Thawing(Some(_)))
        });
        match (watch.stage(), waited) {
            (Stage::Done(result), _) => result,
            (Stage::Thawing(Some(error)), _) => Err(error),
            (_, Waited::TimedOut) => Err(EBUSY),
            (_, Waited::Done | Waited::Killed) => Err(EINTR),
        }
    }

    /// Thaws one file system and waits for it. Process context.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not held, `EINTR` when the caller is killed, and what the file system says.
    pub(crate) fn thaw(&self, file_system: &FileSystem) -> Result {
        let wanted = file_system.superblock().addr();
        let watch = {
            let mut state = self.state.lock();
            let entry = state
                .entries
                .iter_mut()
                .find(|entry| entry.identity.superblock == wanted && !entry.is_done())
                .ok_or(EINVAL)?;
            match entry.stage {
                Stage::Held => self.queue_thaw(entry),
                Stage::Thawing(Some(error)) => return Err(error),
                _ => return Err(EINVAL),
            }
            entry.watch()
        };
        self.wait_thawed(watch, None)
    }

    /// Lets all go and waits until it is thawed. Process context.
    ///
    /// # Errors
    ///
    /// `EINTR` when the caller is killed, and what the first file system says that cannot be thawed.
    pub(crate) fn thaw_all(&self) -> Result {
        self.let_go();
        let mut result = Ok(());
        let mut before = u64::MAX;
        loop {
            let watch = {
                let mut state = self.state.lock();
                let forgotten = state.forgotten;
                let open = |entry: &&mut Entry| entry.series > forgotten && entry.number < before;
                match state.entries.iter_mut().rev().find(open) {
                    Some(entry) => entry.watch(),
                    None => return result,
                }
            };
            before = watch.number;
            match self.wait_thawed(watch, None) {
                Err(error) if error == EINTR => return Err(error),
                Err(error) if result.is_ok() => result = Err(error),
                _ => {}
            }
        }
    }

    /// Lets all go: what is held is thawed, the last one first, and what is being frozen as soon as that
    /// is over. Waits for nothing; any context.
    pub(crate) fn let_go(&self) {
        let _spare = {
            let mut state = self.state.lock();
            for entry in state.entries.iter_mut().rev() {
                match entry.stage {
                    Stage::Held => self.queue_thaw(entry),
                    Stage::Freezing => entry.enter(Stage::CalledOff),
                    Stage::CalledOff | Stage::Thawing(_) | Stage::Done(_) => {}
                }
            }
            state.series.take()
        };
    }

    /// The one who held is gone: lets all go, and what still hangs is no concern of the next one.
    pub(crate) fn forget(&self) {
        self.let_go();
        let mut state = self.state.lock();
        state.forgotten = state.last_series;
    }

    /// When all is to be let go, if anything is held.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.state.lock().series.as_ref().map(|series| series.deadline)
    }

    /// Waits for at most `timeout_ms` until nothing is frozen, or being frozen, here. Process context.
    pub(crate) fn wait_idle(&self, timeout_ms: u32) {
        let _ = self.thawed.wait(Some(timeout_ms), || {
            let state = self.state.lock();
            state.entries.iter().all(Entry::is_done)
        });
    }

    /// The entry that was begun next after the one with this number.
    pub(crate) fn line_after(&self, number: u64) -> Option<Line> {
        let state = self.state.lock();
        let entry = state.entries.iter().find(|entry| entry.number > number)?;
        Some(Line {
            number: entry.number,
            device: split(entry.identity.device),
            kind: entry.identity.kind,
            stage: entry.stage.name(),
            error: match entry.stage {
                Stage::Thawing(Some(error)) | Stage::Done(Err(error)) => error.to_errno(),
                _ => 0,
            },
            id: entry.id,
            for_ms: entry.since.elapsed().as_millis(),
        })
    }

    fn queue_freeze(&self, slot: &Arc<Slot>) {
        ModuleReference::give();
        if self.queues.freezes.get().enqueue::<_, FREEZE>(slot.clone()).is_err() {
            // It is queued already, with a reference of its own.
            drop(ModuleReference::take());
        }
    }

    /// Has a held entry thawed. Under the lock.
    fn queue_thaw(&self, entry: &mut Entry) {
        entry.enter(Stage::Thawing(None));
        self.queue_thaw_after(&entry.slot, 0);
    }

    fn queue_thaw_after(&self, slot: &Arc<Slot>, ms: u32) {
        let queue = self.queues.thaws.get();
        let delay = msecs_to_jiffies(ms);
        ModuleReference::give();
        if queue.enqueue_delayed::<_, THAW>(slot.clone(), delay).is_err() {
            // As above.
            drop(ModuleReference::take());
        }
    }
}

impl State {
    fn of_slot(&mut self, slot: &Arc<Slot>) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| Arc::ptr_eq(&entry.slot, slot))
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.number == number)
    }

    /// Removes an entry that is done and that nobody watches. With the last one the series ends; what
    /// is returned is to be dropped without the lock.
    fn sweep(&mut self, number: u64) -> Option<Series> {
        let over = |entry: &Entry| entry.number == number && entry.watches == 0 && entry.is_done();
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
    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done(_))
    }

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
            None => Stage::Done(Ok(())),
        }
    }

    fn wait(&self, timeout_ms: Option<u32>, enough: impl Fn(Stage) -> bool) -> Waited {
        self.slot.changes.wait(timeout_ms, || enough(self.stage()))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _series = {
            let mut state = self.slot.hold.state.lock();
            if let Some(entry) = state.numbered(self.number) {
                entry.watches = entry.watches.saturating_sub(1);
                if entry.watches == 0 && matches!(entry.stage, Stage::Freezing) {
                    entry.enter(Stage::CalledOff);
                }
            }
            state.sweep(self.number)
        };
    }
}

impl WorkItem<FREEZE> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let module = ModuleReference::take();
        Slot::do_freeze(&this);
        // The slot can be the last that knows the queues, and with this work's reference the module may
        // go: in this order.
        drop(this);
        drop(module);
    }
}

impl WorkItem<THAW> for Slot {
    type Pointer = Arc<Slot>;

    fn run(this: Arc<Slot>) {
        let module = ModuleReference::take();
        Slot::do_thaw(&this);
        drop(this);
        drop(module);
    }
}

impl Slot {
    /// What a worker does for an entry that is being frozen.
    fn do_freeze(this: &Arc<Self>) {
        let Some((file_system, id, device, wanted)) = this.take() else {
            return;
        };
        let result = if wanted {
            let begun = Instant::<Monotonic>::now();
            let result = file_system.freeze(Arc::as_ptr(this));
            report::froze(id, device, result, begun.elapsed().as_micros_ceil());
            result
        } else {
            Err(error(raw::ESTALE))
        };
        match result {
            Ok(()) => this.put_back(file_system, |hold, entry| match entry.stage {
                Stage::CalledOff => hold.queue_thaw(entry),
                _ => entry.enter(Stage::Held),
            }),
            Err(_) => this.finish(file_system, result),
        }
    }

    /// What a worker does for an entry that is being thawed.
    fn do_thaw(this: &Arc<Self>) {
        let Some((file_system, id, device, _)) = this.take() else {
            return;
        };
        let begun = Instant::<Monotonic>::now();
        let result = file_system.thaw(Arc::as_ptr(this));
        report::thawed(id, device, result, begun.elapsed().as_micros_ceil());
        match result {
            // `EINVAL` says that it is not frozen for us, which trying again does not change.
            Err(error) if error != EINVAL => this.put_back(file_system, |hold, entry| {
                entry.enter(Stage::Thawing(Some(error)));
                hold.queue_thaw_after(this, RETRY_MS);
            }),
            _ => this.finish(file_system, result),
        }
    }

    /// Takes the file system in hand: with it, the id, the device numbers, and whether it is to be frozen.
    fn take(self: &Arc<Self>) -> Option<(FileSystem, u64, (u32, u32), bool)> {
        let mut state = self.hold.state.lock();
        let entry = state.of_slot(self)?;
        let file_system = entry.file_system.take()?;
        let wanted = matches!(entry.stage, Stage::Freezing);
        Some((file_system, entry.id, split(entry.identity.device), wanted))
    }

    /// Gives the file system back to its entry, which goes on.
    fn put_back(
        self: &Arc<Self>,
        file_system: FileSystem,
        go_on: impl FnOnce(&Hold, &mut Entry),
    ) {
        let mut state = self.hold.state.lock();
        if let Some(entry) = state.of_slot(self) {
            entry.file_system = Some(file_system);
            go_on(&self.hold, entry);
        }
    }

    /// The file system is not frozen. It is free to be unmounted when those who wait hear of it.
    fn finish(self: &Arc<Self>, file_system: FileSystem, result: Result) {
        drop(file_system);
        let _series = {
            let mut state = self.hold.state.lock();
            let number = match state.of_slot(self) {
                Some(entry) => {
                    entry.enter(Stage::Done(result));
                    entry.number
                }
                None => return,
            };
            state.sweep(number)
        };
        self.hold.thawed.wake_all();
    }
}

/// The major and minor number of a device.
fn split(device: raw::dev_t) -> (u32, u32) {
    (device >> raw::MINORBITS, device & ((1 << raw::MINORBITS) - 1))
}
