// SPDX-License-Identifier: GPL-2.0

//! The service between the host and the daemon: one lock around the [`engine`](crate::engine), and
//! who calls it when.
//!
//! What is decided is decided in there. [`Service::state`] is taken in process context, in the
//! channel's tasklet and in the timer's softirq, hence with interrupts off; nothing in it sleeps,
//! and nothing is printed: what there is to say is kept until it is released. Below it is taken the
//! lock of what is held, never the other way round.

use crate::chardev;
use crate::chardev::Readiness;
use crate::compat::new_spinlock_irq;
use crate::compat::SpinLockIrq;
use crate::engine;
use crate::engine::Effects;
use crate::engine::Note;
use crate::file_system::FileSystem;
use crate::hold;
use crate::hold::Begun;
use crate::hold::Hold;
use crate::pm_notifier;
use crate::pm_notifier::Sleep;
use crate::pm_notifier::Turn;
use crate::report;
use crate::report::Log;
use crate::timer::impl_has_timer;
use crate::timer::Timer;
use crate::timer::TimerCallback;
use crate::uapi;
use crate::uapi::thawed;
use crate::vmbus;
use crate::vmbus::Channel;
use crate::wait::new_wait_queue;
use crate::wait::WaitQueue;
use crate::Parameters;
use kernel::device::Core;
use kernel::fmt;
use kernel::iov::IovIterDest;
use kernel::iov::IovIterSource;
use kernel::new_mutex;
use kernel::new_poll_condvar;
use kernel::prelude::*;
use kernel::sync::atomic::AtomicFlag;
use kernel::sync::atomic::Relaxed;
use kernel::sync::poll::PollCondVar;
use kernel::sync::Arc;
use kernel::sync::Mutex;
use kernel::time::Instant;
use kernel::time::Monotonic;
use kernel::uaccess::UserSliceReader;

/// Bytes of packets that a ring holds: two requests of the greatest length that hosts send (an IC
/// message of 13,312 bytes), and with its header page as much as the allocator gives in one piece.
const RING: u32 = 7 * 4096;

/// Packets taken in one run of the tasklet; the rest waits for the next, so that a flood leaves
/// time for others.
const BATCH: usize = 16;

/// How long the machine's sleep waits for a thaw, in milliseconds; for that of a daemon as long as for one that
/// is to come, if that is longer.
const THAW_MS: u32 = 5_000;

/// How long a freeze waits, before it asks anew, for the thaw of the same file system, in
/// milliseconds.
const AGAIN_MS: u32 = 500;

/// Longest write that is looked at: more than any message or frame has.
const MAX_WRITE: usize = 64;

/// What the device that is gone has left undone, should it come back: the fields of [`engine::Left`]. There is one
/// device at a time, and whoever binds it finds what the one before has left. Unloading the module forgets it, so
/// the first one of all knows that it knows nothing.
static UNTOLD: AtomicFlag = AtomicFlag::new(false);
static UNSEEN: AtomicFlag = AtomicFlag::new(true);
static OWES_THAW: AtomicFlag = AtomicFlag::new(false);

/// Whether the machine prepares to be suspended, or is; and to hibernate: while user space makes an image through
/// `/dev/snapshot` it may be suspended as well. A device that is bound by then has heard of it, one that comes later has
/// not.
static SUSPENDS: AtomicFlag = AtomicFlag::new(false);
static HIBERNATES: AtomicFlag = AtomicFlag::new(false);

fn sleeps() -> bool {
    SUSPENDS.load(Relaxed) || HIBERNATES.load(Relaxed)
}

fn flag_of(sleep: Sleep) -> &'static AtomicFlag {
    match sleep {
        Sleep::Suspension => &SUSPENDS,
        Sleep::Hibernation => &HIBERNATES,
    }
}

/// Keeps what [`sleeps`] says, as long as the module is loaded. It is told before any device is, so that a device that was not
/// there to hear of the sleep finds it, and one that finds it hears of its end.
pub(crate) struct SleepWatch;

impl pm_notifier::Callbacks for SleepWatch {
    const TURN: Turn = Turn::First;

    fn prepare(&self, sleep: Sleep) {
        flag_of(sleep).store(true, Relaxed);
    }

    fn restore(&self) {}

    fn post(&self, sleep: Sleep) {
        flag_of(sleep).store(false, Relaxed);
    }
}

/// Keeps the machine awake while something is frozen here, or being so, after all devices were told to let go of it; also
/// when none is there any more.
pub(crate) struct ThawWatch(Arc<Hold>);

impl ThawWatch {
    /// # Errors
    ///
    /// As [`Hold::get`].
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(ThawWatch(Hold::get()?), GFP_KERNEL)?)
    }
}

impl pm_notifier::Callbacks for ThawWatch {
    const TURN: Turn = Turn::Last;

    fn prepare(&self, _sleep: Sleep) {
        self.0.wait_idle(THAW_MS);
    }

    fn restore(&self) {
        self.0.wait_idle(THAW_MS);
    }

    fn post(&self, _sleep: Sleep) {}
}

/// What all who have the engine share: its packets wait in memory that is allocated in one piece.
type Engine = engine::Engine<KVVec<u8>>;

/// Shared by the bound device, its channel and open descriptors.
#[pin_data(PinnedDrop)]
pub(crate) struct Service {
    #[pin]
    timer: Timer<Service>,
    #[pin]
    state: SpinLockIrq<State>,
    /// Notified when a read or poll may see something new.
    #[pin]
    changes: PollCondVar,
    /// Woken when the machine's sleep may have nothing more to wait for.
    #[pin]
    thawed: WaitQueue,
    /// Where a frame lies between the engine and the reader; also makes readers take turns.
    #[pin]
    outgoing: Mutex<KVec<u8>>,
    /// What the module has frozen for the daemon. It is the module's: once the device is gone it serves the next one,
    /// and is not touched any more.
    hold: Arc<Hold>,
    parameters: Parameters,
    /// The engine's clock starts here.
    born: Instant<Monotonic>,
}

/// What the lock protects.
struct State {
    device: Device,
    /// Private copy of the packet in hand.
    incoming: KVVec<u8>,
}

/// The device, as far as there is one.
struct Device {
    engine: Engine,
    /// `None` before start, while suspended and after stop.
    channel: Option<Channel<Service>>,
    /// It is gone; descriptors that are still open only see errors.
    gone: bool,
}

impl Device {
    /// It is gone from here on, with its engine closed.
    fn leave(&mut self, hold: &Hold) {
        self.gone = true;
        hold.forget();
        let left = self.engine.left();
        UNTOLD.store(left.untold, Relaxed);
        UNSEEN.store(left.unseen, Relaxed);
        OWES_THAW.store(left.owes_thaw, Relaxed);
    }
}

/// Where the engine's effects go.
struct Outlet<'a> {
    channel: Option<&'a Channel<Service>>,
    hold: &'a Hold,
    log: &'a mut Log,
}

impl Effects for Outlet<'_> {
    fn send(&mut self, packet: &[u8], request_id: u64) -> bool {
        self.channel
            .is_some_and(|channel| channel.send(packet, request_id).is_ok())
    }

    fn let_go(&mut self, _reason: u32) -> bool {
        self.hold.let_go(None).any()
    }

    fn note(&mut self, note: Note) {
        report::trace(note);
        self.log.keep(note);
    }
}

impl_has_timer!(Service.timer);

impl TimerCallback for Service {
    fn run(&self) {
        self.with_engine(|engine, now, out| {
            let over = out.hold.deadline().is_some_and(|deadline| now >= deadline);
            if over && out.hold.let_go(None).any() {
                engine.lost(now, thawed::DEADLINE, out);
            }
            engine.timer(now, out);
        });
    }
}

impl Service {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let parameters = Parameters::get();
        let config = engine::Config {
            freeze_ms: parameters.freeze_timeout_ms,
            other_ms: parameters.timeout_ms,
            grace_ms: parameters.grace_ms,
            // CAST: 2048.
            max_held: hold::MAX_HELD as u32,
        };
        let left = engine::Left {
            untold: UNTOLD.load(Relaxed),
            unseen: UNSEEN.load(Relaxed),
            owes_thaw: OWES_THAW.load(Relaxed),
        };
        let store = KVVec::from_elem(0, engine::QUEUE * engine::PACKET_MAX, GFP_KERNEL)?;
        let state = State {
            device: Device {
                engine: Engine::new(config, store, left),
                channel: None,
                gone: false,
            },
            incoming: KVVec::new(),
        };
        let outgoing = KVec::from_elem(0, uapi::MAX_FRAME, GFP_KERNEL)?;
        let hold = Hold::get()?;
        Arc::pin_init(
            pin_init!(Self {
                timer <- Timer::new(),
                state <- new_spinlock_irq!(state, "hv_vss::state"),
                changes <- new_poll_condvar!("hv_vss::changes"),
                thawed <- new_wait_queue!("hv_vss::thawed_for_sleep"),
                outgoing <- new_mutex!(outgoing, "hv_vss::outgoing"),
                hold,
                parameters,
                born: Instant::now(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens the channel of `dev`. Sleeps.
    ///
    /// # Safety
    ///
    /// It must be the same device each time, on which nobody else opens or closes the channel. It must be locked,
    /// as it is here, also when [`Self::suspend`] and [`Self::stop`] are called, and the latter must be called
    /// before its driver is unbound.
    pub(crate) unsafe fn start(self: &Arc<Self>, dev: &vmbus::Device<Core<'_>>) -> Result {
        // SAFETY: The channel is dropped by this function, by `suspend` or by `stop`: the rest is guaranteed by the
        // caller.
        let channel = unsafe { Channel::open(dev, RING, self.clone()) }?;
        let mut incoming = KVVec::from_elem(0, channel.longest_packet(), GFP_KERNEL)?;
        {
            let mut state = self.state.lock();
            core::mem::swap(&mut state.incoming, &mut incoming);
            state.device.channel = Some(channel);
        }
        self.with_engine(|engine, now, out| {
            // Under the lock: the end of that sleep is told to the engine after this, if at all.
            if sleeps() {
                engine.prepare_sleep(now, out);
            }
        });
        // What the host has sent by now is still in the ring: the bus calls for it as long as it is.
        Ok(())
    }

    /// Ends the service for good: open requests fail, readers and polls see an error, what is held
    /// is thawed, the channel is closed, no timer runs. Waits for callbacks, never for the daemon
    /// nor for a disk. Sleeps; may be called again.
    pub(crate) fn stop(&self) {
        let channel = self.end_channel(thawed::GONE, true);
        self.tell_gone();
        Timer::shut_down(self);
        // Closing sleeps, so it happens here and not under the lock.
        drop(channel);
    }

    /// Lets all who wait see that the device is gone. Any context.
    fn tell_gone(&self) {
        self.changes.notify_all();
        self.thawed.wake_all();
    }

    /// Before the machine sleeps: what is open is failed and the channel is closed. Sleeps.
    pub(crate) fn suspend(&self) {
        drop(self.end_channel(thawed::SLEEP, false));
    }

    /// After the machine has slept. A device that the host does not give back is gone: readers see
    /// an error instead of waiting for ever. Sleeps.
    ///
    /// # Safety
    ///
    /// As for [`Self::start`].
    pub(crate) unsafe fn resume(self: &Arc<Self>, dev: &vmbus::Device<Core<'_>>) -> Result {
        if self.state.lock().device.gone {
            return Err(ENODEV);
        }
        // SAFETY: Guaranteed by the caller.
        unsafe { self.start(dev) }.inspect_err(|_| self.stop())
    }

    /// Has the engine fail what is open, as long as the host can hear it, and takes the channel
    /// away.
    fn end_channel(&self, reason: u32, for_good: bool) -> Option<Channel<Self>> {
        let mut log = Log::new();
        let channel = {
            let mut state = self.state.lock();
            let device = &mut state.device;
            if !device.gone {
                self.event(device, &mut log, |engine, now, out| {
                    engine.close(now, reason, out)
                });
                if for_good {
                    device.leave(&self.hold);
                } else {
                    self.hold.let_go(None);
                }
            }
            device.channel.take()
        };
        log.print();
        channel
    }

    /// Microseconds since the service was made.
    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_nanos() / 1000).unwrap_or(0)
    }

    /// Lets the engine handle one event and does what follows from it; `None` when the device is
    /// gone. Any context.
    fn with_engine<R>(
        &self,
        event: impl FnOnce(&mut Engine, u64, &mut Outlet<'_>) -> R,
    ) -> Option<R> {
        let mut log = Log::new();
        let result = {
            let mut state = self.state.lock();
            if state.device.gone {
                return None;
            }
            self.event(&mut state.device, &mut log, event)
        };
        log.print();
        Some(result)
    }

    /// As [`Self::with_engine`], for who has the lock.
    fn event<R>(
        &self,
        device: &mut Device,
        log: &mut Log,
        event: impl FnOnce(&mut Engine, u64, &mut Outlet<'_>) -> R,
    ) -> R {
        let now = self.now();
        let mut outlet = Outlet {
            channel: device.channel.as_ref(),
            hold: &self.hold,
            log,
        };
        let engine = &mut device.engine;
        let was_readable = engine.readable();
        let result = event(engine, now, &mut outlet);
        let held_until = self.hold.deadline();
        let next = match (engine.deadline(), held_until) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        match next {
            Some(deadline) => Timer::arm(self, deadline.saturating_sub(now)),
            None => Timer::stop(self),
        }
        // Whoever waits has looked before: only what is new is to be told.
        if engine.readable() && !was_readable {
            self.changes.notify_all();
        }
        if engine.thawed_for_sleep() {
            self.thawed.wake_all();
        }
        result
    }

    /// Takes one packet from the ring; false when there is none to be had now.
    fn take_packet(&self) -> bool {
        let mut log = Log::new();
        let more = {
            let mut state = self.state.lock();
            let State { device, incoming } = &mut *state;
            let Some(channel) = device.channel.as_mut().filter(|_| !device.gone) else {
                return false;
            };
            let received = channel.receive(incoming);
            if received.is_err() {
                // Nothing comes out of this ring any more, and the bus would call again and again.
                channel.mute();
            }
            match received {
                Ok(Some((packet, request_id))) => {
                    self.event(device, &mut log, |engine, now, out| {
                        engine.packet(now, packet, request_id, out);
                    });
                    true
                }
                Ok(None) => false,
                Err(error) => {
                    self.event(device, &mut log, |engine, now, out| {
                        engine.close(now, thawed::GONE, out);
                    });
                    device.leave(&self.hold);
                    self.tell_gone();
                    log.ring_failed(error);
                    false
                }
            }
        };
        log.print();
        more
    }

    /// The text of the `state` file in debugfs.
    pub(crate) fn show_state(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snapshot = report::Snapshot::of(&self.state.lock().device.engine);
        snapshot.write(out)
    }

    /// The text of the `parameters` file in debugfs.
    pub(crate) fn show_parameters(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        report::parameters(&self.parameters, out)
    }

    /// Waits until a read would find something.
    fn wait_readable(&self, nonblocking: bool) -> Result {
        let mut state = self.state.lock();
        // No event. The timer may go off too early for it, and finds nothing to do then.
        state.device.engine.alive();
        loop {
            if state.device.gone {
                return Err(ENODEV);
            }
            if state.device.engine.readable() {
                return Ok(());
            }
            if nonblocking {
                return Err(EAGAIN);
            }
            if self.changes.wait_interruptible(&mut state) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// Freezes a file system for the daemon and holds it.
    fn freeze(&self, asked: &uapi::IocFreeze) -> Result {
        let count = usize::try_from(asked.count).map_err(|_| EINVAL)?;
        if asked.flags != 0 || asked.reserved != 0 || !(1..=hold::MAX_HELD).contains(&count) {
            return Err(EINVAL);
        }
        let file_system = FileSystem::of(asked.fd)?;
        file_system.may_freeze()?;
        let limit_ms = match asked.deadline_ms {
            0 => self.parameters.hold_ms,
            ms => ms.min(self.parameters.hold_ms),
        };
        let until = self.now().saturating_add(u64::from(limit_ms) * 1000);
        let mut request = self.hold.request(asked.id, file_system, count)?;
        let mut turn = None;
        let result = loop {
            // Allowed and begun under one lock, so that whoever ends what this is for finds it.
            let begun = self
                .with_engine(|engine, now, _| -> Result<_> {
                    engine.may_hold(asked.id).map_err(report::errno)?;
                    let deadline = now.saturating_add(u64::from(limit_ms) * 1000);
                    let begun = self.hold.begin(&mut request, deadline)?;
                    if matches!(begun, Begun::Queued(_)) {
                        engine.holds(asked.id);
                    }
                    Ok(begun)
                })
                .ok_or(ENODEV)??;
            match (begun, turn.take()) {
                (Begun::First, Some(its)) => {
                    self.hold.set_aside(&its, &mut request)?;
                    turn = Some(its);
                }
                // Whoever had it before may have begun.
                (Begun::First, None) => turn = Some(self.hold.turn()?),
                (Begun::Queued(watch), its) => {
                    drop(its);
                    break self.hold.wait_frozen(watch);
                }
                (Begun::After(watch), its) => {
                    drop(its);
                    match self.hold.wait_turn(&request, watch, AGAIN_MS) {
                        Ok(()) => {}
                        // Perhaps nobody wants it any more: that is asked anew.
                        Err(error) if error == EBUSY && self.now() < until => {}
                        Err(error) => break Err(error),
                    }
                }
            }
        };
        match self.state.lock().device.gone {
            true => Err(ENODEV),
            false => result,
        }
    }

    /// Thaws what is held for the daemon with that id.
    fn thaw(&self, asked: &uapi::IocThaw) -> Result {
        let file_system = match (asked.flags, asked.fd) {
            (0, -1) => None,
            (0, fd) => Some(FileSystem::of(fd)?),
            _ => return Err(EINVAL),
        };
        // Allowed and begun under one lock, so that nothing else comes between what is known of it.
        let Some(file_system) = file_system else {
            let let_go = self
                .with_engine(|engine, _, _| -> Result<_> {
                    engine.may_thaw().map_err(report::errno)?;
                    let let_go = self.hold.let_go(Some(asked.id));
                    if let_go.held {
                        engine.thaws(asked.id, !self.hold.holds());
                    }
                    Ok(let_go)
                })
                .ok_or(ENODEV)??;
            return self.hold.wait_all_thawed(let_go);
        };
        let watch = self
            .with_engine(|engine, _, _| -> Result<_> {
                engine.may_thaw().map_err(report::errno)?;
                let watch = self.hold.begin_thaw(asked.id, &file_system)?;
                if watch.is_some() {
                    engine.thaws(asked.id, !self.hold.holds());
                }
                Ok(watch)
            })
            .ok_or(ENODEV)??;
        watch.map_or(Ok(()), |watch| self.hold.wait_thawed(watch))
    }
}

impl pm_notifier::Callbacks for Service {
    const TURN: Turn = Turn::Between;

    fn prepare(&self, _sleep: Sleep) {
        self.with_engine(|engine, now, out| {
            engine.prepare_sleep(now, out);
            out.hold.let_go(None);
        });
        // What a daemon has frozen by other means only it can thaw, or the one that comes after it. If
        // it did after the sleep, writers would wait in the meantime, some of them so that they cannot
        // be put to sleep. A signal to who has asked for the sleep ends no wait, since it does not end the sleep.
        let limit_ms = THAW_MS.max(self.parameters.grace_ms);
        self.thawed.wait_undisturbed(limit_ms, || {
            let state = self.state.lock();
            state.device.gone || state.device.engine.thawed_for_sleep()
        });
    }

    /// What is frozen is thawed, as before a sleep. What comes after that is not refused: this machine ends with the
    /// restoration, or else goes on, and is not told when.
    fn restore(&self) {
        self.prepare(Sleep::Hibernation);
        self.post(Sleep::Hibernation);
    }

    fn post(&self, _sleep: Sleep) {
        self.with_engine(|engine, _, _| {
            if !sleeps() {
                engine.resume();
            }
        });
    }
}

impl vmbus::Listener for Service {
    fn on_packets(&self) {
        // Before `start` has stored the channel, and after `stop` has taken it, packets stay in
        // the ring; the bus calls again while there are any.
        for _ in 0..BATCH {
            if !self.take_packet() {
                break;
            }
        }
    }
}

impl chardev::Handler for Service {
    fn open(&self) -> Result {
        match self.with_engine(|engine, _, _| engine.open()) {
            Some(true) => Ok(()),
            Some(false) => Err(EBUSY),
            None => Err(ENODEV),
        }
    }

    fn release(&self) {
        // All of it before the next one can open.
        self.with_engine(|engine, now, out| {
            engine.release(now, out);
            out.hold.forget();
        });
    }

    fn read(&self, nonblocking: bool, out: &mut IovIterDest<'_>) -> Result<usize> {
        loop {
            self.wait_readable(nonblocking)?;
            let mut outgoing = if nonblocking {
                self.outgoing.try_lock().ok_or(EAGAIN)?
            } else {
                self.outgoing.lock()
            };
            // Another reader may have been faster, or the request has ended.
            let Some((len, token)) = self
                .with_engine(|engine, now, _| engine.peek(now, &mut outgoing))
                .ok_or(ENODEV)?
            else {
                continue;
            };
            let frame = outgoing.get(..len).ok_or(EINVAL)?;
            if out.len() < len {
                return Err(EINVAL);
            }
            if out.copy_to_iter(frame) != len {
                return Err(EFAULT);
            }
            // Only now is it the reader's: a read that fails loses nothing.
            self.with_engine(|engine, now, out| engine.taken(now, token, out));
            return Ok(len);
        }
    }

    fn write(&self, from: &mut IovIterSource<'_>) -> Result<usize> {
        // Of a write that is too long only so much is looked at that the engine refuses it.
        let whole = from.len();
        let mut buffer = [0u8; MAX_WRITE];
        let bytes = buffer.get_mut(..whole.min(MAX_WRITE)).ok_or(EINVAL)?;
        if from.copy_from_iter(bytes) != bytes.len() {
            return Err(EFAULT);
        }
        self.with_engine(|engine, now, out| engine.write(now, bytes, whole, out))
            .ok_or(ENODEV)?
            .map_err(report::errno)?;
        Ok(whole)
    }

    fn ioctl(&self, command: u32, argument: &mut UserSliceReader) -> Result {
        match command {
            uapi::IOC_FREEZE => self.freeze(&read(argument)?),
            uapi::IOC_THAW => self.thaw(&read(argument)?),
            _ => Err(ENOTTY),
        }
    }

    fn readiness(&self) -> Readiness {
        let state = self.state.lock();
        if state.device.gone {
            Readiness::Gone
        } else if state.device.engine.readable() {
            Readiness::Readable
        } else {
            Readiness::Idle
        }
    }

    fn changes(&self) -> &PollCondVar {
        &self.changes
    }
}

/// Reads the argument of an ioctl.
fn read<T: FromBytes + IntoBytes>(argument: &mut UserSliceReader) -> Result<T> {
    let mut value = T::new_zeroed();
    argument.read_slice(value.as_mut_bytes())?;
    Ok(value)
}
