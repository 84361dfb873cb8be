// SPDX-License-Identifier: GPL-2.0

//! `hv_vss.ko`: takes a Hyper-V host's requests to freeze and thaw the guest from the VMBus and
//! hands them to a daemon that has `/dev/vmbus/hv_vss` open.
//!
//! This file is wiring: parameters, one lock around the [`engine`], and who calls it when. What is
//! decided is decided in there; layouts are in [`uapi`]. The order of the lock: [`Service::state`]
//! is taken in process context, in the channel's tasklet and in the timer's softirq, hence with
//! interrupts off; nothing in it sleeps.

mod bindings;
mod chardev;
mod compat;
#[path = "engine/lib.rs"]
pub mod engine;
mod report;
mod sleep;
mod timer;
#[path = "../uapi/hv_vss.rs"]
pub mod uapi;
mod vmbus;

use crate::chardev::Readiness;
use crate::compat::new_spinlock_irq;
use crate::compat::SpinLockIrq;
use crate::engine::Config;
use crate::engine::Effects;
use crate::engine::Engine;
use crate::engine::Note;
use crate::timer::impl_has_timer;
use crate::timer::Expire;
use crate::timer::Timer;
use crate::vmbus::Channel;
use kernel::debugfs;
use kernel::device::Core;
use kernel::fmt;
use kernel::iov::IovIterDest;
use kernel::iov::IovIterSource;
use kernel::new_mutex;
use kernel::new_poll_condvar;
use kernel::prelude::*;
use kernel::sync::atomic::Acquire;
use kernel::sync::atomic::AtomicFlag;
use kernel::sync::atomic::Release;
use kernel::sync::poll::PollCondVar;
use kernel::sync::Arc;
use kernel::sync::CondVarTimeoutResult;
use kernel::sync::Mutex;
use kernel::time::msecs_to_jiffies;
use kernel::time::Instant;
use kernel::time::Monotonic;

module! {
    type: HvVssModule,
    name: "hv_vss",
    authors: ["The hv_vss authors"],
    description: "Hyper-V volume shadow copy requests for a user-space daemon",
    license: "GPL v2",
    params: {
        freeze_timeout_ms: u32 {
            default: 900_000,
            description: "Time the daemon has for FREEZE, in milliseconds",
        },
        timeout_ms: u32 {
            default: 30_000,
            description: "Time the daemon has for other requests, in milliseconds",
        },
        grace_ms: u32 {
            default: 5_000,
            description: "How long a request waits for a daemon, in milliseconds; 0 fails it at once",
        },
    },
}

/// Class of the VSS device, 35fa2e29-ea23-4236-96ae-3a6ebacba440 (`HV_VSS_GUID`), as on the wire.
const VSS_CLASS: [u8; 16] = [
    0x29, 0x2e, 0xfa, 0x35, 0x23, 0xea, 0x36, 0x42, 0x96, 0xae, 0x3a, 0x6e, 0xba, 0xcb, 0xa4, 0x40,
];

/// Bytes of packets that a ring holds: two requests of the greatest length that hosts send (an IC
/// message of 13,312 bytes), and with its header page as much as the allocator gives in one piece.
const RING: usize = 7 * 4096;

/// Packets taken in one run of the tasklet; the rest waits for the next, so that a flood leaves
/// time for others.
const BATCH: usize = 16;

/// How long the machine's sleep waits for the daemon to thaw, in milliseconds.
const THAW_MS: u32 = 5_000;

/// Longest write that is looked at: more than any message or frame has.
const MAX_WRITE: usize = 64;

#[pin_data]
struct HvVssModule {
    #[pin]
    _driver: kernel::driver::Registration<vmbus::Adapter<Driver>>,
}

impl kernel::InPlaceModule for HvVssModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
        })
    }
}

struct Driver;

compat::device_table!(
    "vmbus",
    vmbus::DeviceId,
    ID_TABLE,
    [vmbus::DeviceId::new(VSS_CLASS)]
);

/// What a bound device has. Fields are dropped in this order: first nothing more happens, then what
/// can be seen of it goes.
#[pin_data]
struct Data {
    running: Running,
    #[pin]
    _sleep: sleep::Registration<Service>,
    #[pin]
    _state: debugfs::File<Arc<Service>>,
    _folder: debugfs::Dir,
    #[pin]
    _node: chardev::Registration<Service>,
    _only: Only,
}

/// Whether a device is bound.
static BOUND: AtomicFlag = AtomicFlag::new(false);

/// The right to be the bound device. A guest has one VSS device, and its node one name: another
/// that the host may offer is refused before it gets in the way.
struct Only(());

impl Only {
    fn claim() -> Result<Self> {
        if BOUND.xchg(true, Acquire) {
            return Err(EBUSY);
        }
        Ok(Only(()))
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        BOUND.store(false, Release);
    }
}

/// Stops the service when it is dropped.
struct Running(Arc<Service>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl vmbus::Driver for Driver {
    type Data<'bound> = Data;
    const ID_TABLE: vmbus::IdTable = &ID_TABLE;

    fn probe<'bound>(
        dev: &'bound vmbus::Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            // `new_id` and `driver_override` can give us any device.
            if dev.class() != VSS_CLASS {
                return Err(ENODEV);
            }
            let only = Only::claim()?;
            let service = Service::new()?;
            let folder = debugfs::Dir::new(c"hv_vss");
            Ok(try_pin_init!(Data {
                // Comes first: what is made first goes last when the rest fails.
                _only: only,
                running: Running(service.clone()),
                _sleep <- sleep::Registration::new(service.clone()),
                _state <- folder.read_callback_file(c"state", service.clone(), &Service::show),
                _folder: folder,
                _node <- chardev::Registration::new(c"vmbus/hv_vss", 0o600, service),
                _: { running.0.start(dev)? },
            }))
        })
    }

    fn unbind<'bound>(_dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) {
        this.running.0.stop();
    }

    fn suspend<'bound>(_dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) -> Result {
        this.running.0.suspend();
        Ok(())
    }

    fn resume<'bound>(dev: &'bound vmbus::Device<Core<'_>>, this: Pin<&'bound Data>) -> Result {
        this.running.0.resume(dev)
    }
}

/// The service between the channel and the device node; shared by the bound device, its channel
/// and open descriptors.
#[pin_data(PinnedDrop)]
struct Service {
    #[pin]
    timer: Timer<Service>,
    #[pin]
    state: SpinLockIrq<State>,
    /// Notified when a read or poll may see something new.
    #[pin]
    changes: PollCondVar,
    /// Where a frame lies between the engine and the reader; also makes readers take turns.
    #[pin]
    outgoing: Mutex<KVec<u8>>,
    /// The engine's clock starts here.
    born: Instant<Monotonic>,
}

/// What the lock protects.
struct State {
    engine: Engine<KVVec<u8>>,
    /// `None` before start, while suspended and after stop.
    channel: Option<Channel<Service>>,
    /// Private copy of the packet in hand.
    incoming: KVVec<u8>,
    /// The device is gone; descriptors that are still open only see errors.
    gone: bool,
}

impl_has_timer!(Service.timer);

impl Expire for Service {
    fn expired(&self) {
        self.with_engine(|engine, now, out| engine.timer(now, out));
    }
}

impl Service {
    fn new() -> Result<Arc<Self>> {
        let config = Config {
            freeze_ms: compat::value(&module_parameters::freeze_timeout_ms),
            other_ms: compat::value(&module_parameters::timeout_ms),
            grace_ms: compat::value(&module_parameters::grace_ms),
            max_held: 0,
        };
        let store = KVVec::from_elem(0, engine::QUEUE * engine::PACKET_MAX, GFP_KERNEL)?;
        let state = State {
            engine: Engine::new(config, store),
            channel: None,
            incoming: KVVec::from_elem(0, RING, GFP_KERNEL)?,
            gone: false,
        };
        let outgoing = KVec::from_elem(0, uapi::MAX_FRAME, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                timer <- Timer::new(),
                state <- new_spinlock_irq!(state, "hv_vss::state"),
                changes <- new_poll_condvar!("hv_vss::changes"),
                outgoing <- new_mutex!(outgoing, "hv_vss::outgoing"),
                born: Instant::now(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens the channel of `dev`. Sleeps.
    fn start(self: &Arc<Self>, dev: &vmbus::Device<Core<'_>>) -> Result {
        // CAST: 28 KiB.
        let channel = Channel::open(dev, RING as u32, self.clone())?;
        // What the host sent before this line is still in the ring, see `on_packets`.
        self.state.lock().channel = Some(channel);
        Ok(())
    }

    /// Ends the service for good: open requests fail, readers and polls see an error, the channel
    /// is closed, no timer runs. Waits for callbacks, never for the daemon. Sleeps; may be called again.
    fn stop(&self) {
        let channel = {
            let mut state = self.state.lock();
            let State {
                engine,
                channel,
                gone,
                ..
            } = &mut *state;
            let mut outlet = Outlet {
                channel: channel.as_ref(),
            };
            engine.close(self.now(), uapi::thawed::GONE, &mut outlet);
            *gone = true;
            channel.take()
        };
        self.changes.notify_all();
        Timer::shut_down(self);
        // Closing sleeps, so it happens here and not under the lock.
        drop(channel);
    }

    /// Before the machine sleeps: what is open is failed and the channel is closed. Sleeps.
    fn suspend(&self) {
        let channel = {
            let mut state = self.state.lock();
            if state.gone {
                return;
            }
            let State {
                engine, channel, ..
            } = &mut *state;
            let now = self.now();
            let mut outlet = Outlet {
                channel: channel.as_ref(),
            };
            engine.close(now, uapi::thawed::SLEEP, &mut outlet);
            self.follow_up(engine, now);
            channel.take()
        };
        drop(channel);
    }

    /// After the machine has slept. A device that the host does not give back is gone: readers see
    /// an error instead of waiting for ever. Sleeps.
    fn resume(self: &Arc<Self>, dev: &vmbus::Device<Core<'_>>) -> Result {
        if self.state.lock().gone {
            return Err(ENODEV);
        }
        self.start(dev).inspect_err(|_| self.stop())
    }

    /// Microseconds since the service was made.
    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_nanos() / 1000).unwrap_or(0)
    }

    /// Lets the engine handle one event and does what follows from it; `None` when the device is
    /// gone. Any context.
    fn with_engine<R>(
        &self,
        event: impl FnOnce(&mut Engine<KVVec<u8>>, u64, &mut Outlet<'_>) -> R,
    ) -> Option<R> {
        let mut state = self.state.lock();
        if state.gone {
            return None;
        }
        let State {
            engine, channel, ..
        } = &mut *state;
        let now = self.now();
        let mut outlet = Outlet {
            channel: channel.as_ref(),
        };
        let result = event(engine, now, &mut outlet);
        self.follow_up(engine, now);
        Some(result)
    }

    /// Sets the timer and wakes readers, as the engine's new state demands. Under the lock.
    fn follow_up(&self, engine: &Engine<KVVec<u8>>, now: u64) {
        match engine.deadline() {
            Some(deadline) => Timer::arm(self, deadline.saturating_sub(now)),
            None => Timer::stop(self),
        }
        if engine.readable() || engine.thawed_for_sleep() {
            self.changes.notify_all();
        }
    }

    /// Takes one packet from the ring; false when there is none to be had now.
    fn take_packet(&self) -> bool {
        let mut state = self.state.lock();
        let State {
            engine,
            channel,
            incoming,
            ..
        } = &mut *state;
        let Some(open) = channel.as_mut() else {
            return false;
        };
        // No packet is longer than `incoming`: nothing longer fits the ring.
        let Ok(Some((len, request_id))) = open.receive(incoming) else {
            return false;
        };
        let Some(packet) = incoming.get_mut(..len) else {
            return false;
        };
        let now = self.now();
        let mut outlet = Outlet {
            channel: channel.as_ref(),
        };
        engine.packet(now, packet, request_id, &mut outlet);
        self.follow_up(engine, now);
        true
    }

    /// The text of the `state` file in debugfs: a name and its values on each line.
    fn show(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stats, versions, abi, freeze, stage, request, queued) = {
            let state = self.state.lock();
            let engine = &state.engine;
            (
                *engine.stats(),
                engine.versions(),
                engine.abi(),
                engine.freeze_state(),
                engine.stage_name(),
                engine.open_request(),
                engine.queued(),
            )
        };
        let (framework, vss) = versions.unwrap_or_default();
        writeln!(out, "framework {}.{}", framework.major, framework.minor)?;
        writeln!(out, "vss {}.{}", vss.major, vss.minor)?;
        writeln!(out, "daemon_abi {abi}")?;
        writeln!(out, "freeze_state {freeze}")?;
        let (id, operation) = request.unwrap_or_default();
        writeln!(out, "request {stage} {id} {operation}")?;
        writeln!(out, "open_requests {queued}")?;
        writeln!(out, "negotiations {}", stats.negotiations)?;
        writeln!(out, "registrations {}", stats.registrations)?;
        writeln!(out, "bad_packets {}", stats.bad_packets)?;
        let engine::BadFrames {
            malformed,
            out_of_turn,
            stale,
            wrong_operation,
        } = stats.bad_frames;
        writeln!(out, "malformed_frames {malformed}")?;
        writeln!(out, "frames_out_of_turn {out_of_turn}")?;
        writeln!(out, "stale_frames {stale}")?;
        writeln!(out, "frames_for_another_operation {wrong_operation}")?;
        writeln!(out, "overruns {}", stats.overruns)?;
        writeln!(out, "unsent {}", stats.unsent)?;
        writeln!(out, "broken_freezes {}", stats.broken)?;
        writeln!(out, "# operation requests failures timeouts last_us max_us")?;
        for (name, op) in engine::OPS.iter().zip(stats.ops) {
            writeln!(
                out,
                "{name} {} {} {} {} {}",
                op.requests, op.failures, op.timeouts, op.last_us, op.max_us
            )?;
        }
        Ok(())
    }

    /// Waits until a read would find something.
    fn wait_readable(&self, nonblocking: bool) -> Result {
        let mut state = self.state.lock();
        loop {
            if state.gone {
                return Err(ENODEV);
            }
            if state.engine.readable() {
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
}

impl sleep::Sleeper for Service {
    fn before_sleep(&self) {
        let mut state = self.state.lock();
        if state.gone {
            return;
        }
        // A daemon that thaws only after the sleep would keep writers waiting in the meantime, some
        // of them so that they cannot be put to sleep.
        let State {
            engine, channel, ..
        } = &mut *state;
        let now = self.now();
        let mut outlet = Outlet {
            channel: channel.as_ref(),
        };
        engine.prepare_sleep(now, &mut outlet);
        self.follow_up(engine, now);
        let mut left = msecs_to_jiffies(THAW_MS);
        while !state.gone && !state.engine.thawed_for_sleep() {
            match self.changes.wait_interruptible_timeout(&mut state, left) {
                CondVarTimeoutResult::Woken { jiffies } => left = jiffies,
                CondVarTimeoutResult::Timeout | CondVarTimeoutResult::Signal { .. } => break,
            }
        }
    }

    fn after_sleep(&self) {
        self.with_engine(|engine, _, _| engine.resume());
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
        self.with_engine(|engine, now, out| engine.release(now, out));
    }

    fn read(&self, nonblocking: bool, out: &mut IovIterDest<'_>) -> Result<usize> {
        loop {
            self.wait_readable(nonblocking)?;
            let mut outgoing = self.outgoing.lock();
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
        self.with_engine(|engine, now, out| engine.write(now, bytes, out))
            .ok_or(ENODEV)?
            .map_err(report::errno)?;
        Ok(whole)
    }

    fn readiness(&self) -> Readiness {
        let state = self.state.lock();
        if state.gone {
            Readiness::Gone
        } else if state.engine.readable() {
            Readiness::Readable
        } else {
            Readiness::Idle
        }
    }

    fn changes(&self) -> &PollCondVar {
        &self.changes
    }
}

/// Where the engine's effects go.
struct Outlet<'a> {
    channel: Option<&'a Channel<Service>>,
}

impl Effects for Outlet<'_> {
    fn send(&mut self, packet: &[u8], request_id: u64) -> bool {
        self.channel
            .is_some_and(|channel| channel.send(packet, request_id).is_ok())
    }

    /// Nothing is held: `max_held` is 0.
    fn let_go(&mut self, _reason: u32) {}

    fn note(&mut self, note: Note) {
        report::note(note);
    }
}
