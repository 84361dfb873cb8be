// SPDX-License-Identifier: GPL-2.0-only

//! A disk with a thread of its own, and with all that can be wrong with one: it is slow, it fails,
//! it hangs. It can keep a log of what is written to it, and be copied at any moment.
//!
//! Commands are carried out in the order in which they came. Knows no VMBus: a command brings the
//! memory that it is about and whom to tell.

use super::image::{Image, Store};
use super::lent::{Lent, LentError};
use super::log::{Change, Entry};
use super::scsi::{Action, Extent, Sense, Unit, BLOCK};
use crate::bus::lock;
use crate::vmbus::protocol::Guid;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Well; so many bytes were moved.
    Good { moved: u32 },
    /// The disk refused it, or failed.
    Check(Sense),
    /// The guest's memory could not be used, or is not for what the command does.
    BadMemory,
    /// The command moves more than there is room for; nothing was moved.
    Overrun,
    /// It was taken off the queue before its turn.
    Aborted,
}

/// A command for the disk.
pub(crate) struct Command {
    pub cdb: Vec<u8>,
    /// Where its data is, or goes.
    pub data: Lent,
    /// Which way it goes.
    pub way: Way,
    pub arrived: Instant,
    /// Which controller it came from.
    pub from: u32,
    /// Told how it ended, but for one whose channel was closed in the meantime.
    pub done: Box<dyn FnOnce(Outcome) + Send>,
}

impl Command {
    /// The data that comes with it.
    fn brings(&self) -> Result<Vec<u8>, LentError> {
        match self.way {
            Way::Out => self.data.read(),
            Way::In | Way::None => Ok(Vec::new()),
        }
    }
}

/// Which way the data of a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It comes with the command.
    Out,
    /// It goes to the guest.
    In,
    /// There is none.
    None,
}

/// A class of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What reads.
    Read,
    /// What writes or discards.
    Write,
    /// What flushes.
    Flush,
}

/// Commands that fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which class.
    pub kind: Kind,
    /// Only those that touch one of these bytes. For a flush it means nothing.
    pub offset: u64,
    /// How many bytes from there on.
    pub len: u64,
    /// What the guest is told.
    pub sense: Sense,
}

impl Fault {
    /// All of one class, wherever they go.
    pub fn all(kind: Kind) -> Self {
        let sense = match kind {
            Kind::Read => Sense::READ_ERROR,
            Kind::Write => Sense::WRITE_ERROR,
            Kind::Flush => Sense::INTERNAL_ERROR,
        };
        Fault {
            kind,
            offset: 0,
            len: u64::MAX,
            sense,
        }
    }

    fn hits(&self, kind: Kind, extent: Extent) -> bool {
        let end = self.offset.saturating_add(self.len);
        let meets = extent.offset() < end && extent.offset() + extent.len() > self.offset;
        self.kind == kind && (kind == Kind::Flush || meets)
    }
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    /// From the arrival of a command to its turn, at least.
    delay: Duration,
    bytes_per_second: Option<NonZeroU64>,
    hung: bool,
    /// So many of the first commands end though it hangs.
    let_go: usize,
    stop: bool,
}

struct Content {
    store: Store,
    faults: Vec<Fault>,
    log: Option<Vec<Entry>>,
}

struct Shared {
    unit: Unit,
    queue: Mutex<Queue>,
    changed: Condvar,
    content: Mutex<Content>,
}

/// A disk. Clones are handles to the same; its thread ends with the last of them.
#[derive(Clone)]
pub struct Disk(Arc<Owner>);

struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        lock(&self.0.queue).stop = true;
        self.0.changed.notify_all();
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a disk of {} bytes", self.len())
    }
}

impl Disk {
    /// A disk of `len` bytes, which is cut to whole blocks, with its content in memory. It is told
    /// from others by `id`.
    pub fn in_memory(id: Guid, len: u64, content: Image) -> io::Result<Disk> {
        Disk::start(id, len, Store::Memory(content))
    }

    /// The same with its content in a file, whose length is the disk's.
    pub fn in_file(id: Guid, file: File) -> io::Result<Disk> {
        let len = file.metadata()?.len();
        Disk::start(id, len, Store::File(file))
    }

    fn start(id: Guid, len: u64, store: Store) -> io::Result<Disk> {
        let blocks = len / BLOCK as u64;
        if blocks == 0 {
            let what = "a disk has at least one block";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let shared = Arc::new(Shared {
            unit: Unit::new(blocks, id),
            queue: Mutex::default(),
            changed: Condvar::new(),
            content: Mutex::new(Content {
                store,
                faults: Vec::new(),
                log: None,
            }),
        });
        let worker = shared.clone();
        std::thread::Builder::new()
            .name("disk".to_string())
            .spawn(move || worker.run())?;
        Ok(Disk(Arc::new(Owner(shared))))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.0 .0.queue)
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        lock(&self.0 .0.content)
    }

    fn change_queue(&self, f: impl FnOnce(&mut Queue)) {
        f(&mut self.queue());
        self.0 .0.changed.notify_all();
    }

    /// What it is told from others by.
    pub fn id(&self) -> Guid {
        self.0 .0.unit.id()
    }

    /// Bytes on it.
    pub fn len(&self) -> u64 {
        self.0 .0.unit.blocks() * BLOCK as u64
    }

    /// Never: a disk has a block at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// From now on no command ends earlier than so long after it came; many wait at a time.
    pub fn set_delay(&self, delay: Duration) {
        self.change_queue(|queue| queue.delay = delay);
    }

    /// From now on so many bytes a second go to and from it, `None` for as fast as it can.
    pub fn set_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.change_queue(|queue| queue.bytes_per_second = bytes_per_second);
    }

    /// From now on, or from now on no more, nothing ends.
    pub fn set_hung(&self, hung: bool) {
        self.change_queue(|queue| queue.hung = hung);
    }

    /// What waits ends, and what comes later goes on to hang.
    pub fn end_waiting(&self) {
        self.change_queue(|queue| queue.let_go = queue.commands.len());
    }

    /// Commands that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.queue().commands.len()
    }

    /// From now on these commands fail, and no others.
    pub fn set_faults(&self, faults: &[Fault]) {
        self.content().faults = faults.to_vec();
    }

    /// The content as it is now, between two commands.
    pub fn snapshot(&self) -> io::Result<Image> {
        self.content().store.snapshot()
    }

    /// Starts a log with nothing in it, and returns the content that it begins with.
    pub fn start_log(&self) -> io::Result<Image> {
        let mut content = self.content();
        let image = content.store.snapshot()?;
        content.log = Some(Vec::new());
        Ok(image)
    }

    /// The log so far, and behind it the writes that wait for their turn, as they would be now.
    pub fn log(&self) -> Vec<Entry> {
        let queue = self.queue();
        let Some(mut log) = self.content().log.clone() else {
            return Vec::new();
        };
        for command in &queue.commands {
            log.extend(self.0 .0.writes(command).into_iter().map(|change| Entry {
                arrived: command.arrived,
                ended: None,
                change,
            }));
        }
        log
    }

    /// Ends the log and gives its memory back.
    pub fn stop_log(&self) {
        self.content().log = None;
    }

    pub(crate) fn submit(&self, command: Command) {
        self.change_queue(|queue| queue.commands.push_back(command));
    }

    /// Ends the commands of one controller that still wait for their turn.
    pub(crate) fn abort(&self, from: u32) {
        let aborted: VecDeque<Command>;
        {
            let mut queue = self.queue();
            let all = std::mem::take(&mut queue.commands).into_iter();
            (aborted, queue.commands) = all.partition(|command| command.from == from);
            queue.let_go = queue.let_go.min(queue.commands.len());
        }
        for command in aborted {
            (command.done)(Outcome::Aborted);
        }
    }
}

impl Shared {
    fn run(&self) {
        // When the medium is done with what it was given last.
        let mut free = Instant::now();
        while let Some(command) = self.next(&mut free) {
            let outcome = self.carry_out(&command);
            if let Some(outcome) = outcome {
                (command.done)(outcome);
            }
        }
    }

    /// Waits for the turn of the next command; `None` at the disk's end.
    fn next(&self, free: &mut Instant) -> Option<Command> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stop {
                return None;
            }
            let due = queue.commands.front().map(|command| {
                let bytes = command.data.len() as u64;
                let moving = queue.bytes_per_second.map_or(Duration::ZERO, |rate| {
                    Duration::from_secs_f64(bytes as f64 / rate.get() as f64)
                });
                let moved = command.arrived.max(*free) + moving;
                moved.max(command.arrived + queue.delay)
            });
            let now = Instant::now();
            let hangs = queue.hung && queue.let_go == 0;
            queue = match due {
                Some(due) if due <= now && !hangs => {
                    *free = due;
                    queue.let_go = queue.let_go.saturating_sub(1);
                    return queue.commands.pop_front();
                }
                Some(due) if !hangs => {
                    let wait = self.changed.wait_timeout(queue, due - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                _ => {
                    let wait = self.changed.wait(queue);
                    wait.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// Carries a command out; `None` when nobody waits for it any more.
    fn carry_out(&self, command: &Command) -> Option<Outcome> {
        let result = command.brings().and_then(|data| {
            let action = match self.unit.command(&command.cdb, &data) {
                Ok(action) => action,
                Err(sense) => return Ok(Outcome::Check(sense)),
            };
            // An answer is cut to the room that there is; what is read from the medium has its length.
            match &action {
                Action::Answer(bytes) if bytes.is_empty() => {}
                Action::Read(extent) if extent.is_empty() => {}
                Action::Answer(_) | Action::Read(_) if command.way != Way::In => {
                    return Ok(Outcome::BadMemory);
                }
                Action::Read(extent) if extent.len() > command.data.len() as u64 => {
                    return Ok(Outcome::Overrun);
                }
                _ => {}
            }
            match self.act(action, data, command.arrived) {
                Ok(Done::In(bytes)) => {
                    let moved = command.data.write(&bytes)? as u32;
                    Ok(Outcome::Good { moved })
                }
                Ok(Done::Out(moved)) => Ok(Outcome::Good { moved }),
                Err(sense) => Ok(Outcome::Check(sense)),
            }
        });
        match result {
            Ok(outcome) => Some(outcome),
            Err(LentError::Closed) => None,
            Err(LentError::List | LentError::Memory) => Some(Outcome::BadMemory),
        }
    }

    /// What a command that waits for its turn is to change: nothing if it would be refused.
    fn writes(&self, command: &Command) -> Vec<Change> {
        let data = command.brings().unwrap_or_default();
        let write = |extent: Extent, data: Vec<u8>, fua| Change::Write {
            offset: extent.offset(),
            data: data.into(),
            fua,
        };
        let discard = |extent: Extent| Change::Discard {
            offset: extent.offset(),
            len: extent.len(),
        };
        match self.unit.command(&command.cdb, &data) {
            Ok(Action::Write { extent, fua }) => vec![write(extent, data, fua)],
            Ok(Action::Fill { extent, block }) => {
                vec![write(extent, block.repeat(extent.blocks as usize), false)]
            }
            Ok(Action::Discard(extents)) => extents.into_iter().map(discard).collect(),
            Ok(Action::Answer(_) | Action::Read(_) | Action::Flush) | Err(_) => Vec::new(),
        }
    }

    fn act(&self, action: Action, data: Vec<u8>, arrived: Instant) -> Result<Done, Sense> {
        let mut content = lock(&self.content);
        let moved = data.len() as u32;
        match action {
            Action::Answer(bytes) => return Ok(Done::In(bytes)),
            Action::Read(extent) => {
                content.check(Kind::Read, extent)?;
                let mut bytes = vec![0; extent.len() as usize];
                let result = content.store.read(extent.offset(), &mut bytes);
                result.map_err(|_| Sense::READ_ERROR)?;
                return Ok(Done::In(bytes));
            }
            Action::Write { extent, fua } => content.write(extent, data, fua, arrived)?,
            Action::Fill { extent, block } => {
                let bytes = block.repeat(extent.blocks as usize);
                content.write(extent, bytes, false, arrived)?;
            }
            Action::Flush => {
                content.check(Kind::Flush, Extent { lba: 0, blocks: 0 })?;
                content.store.flush().map_err(|_| Sense::WRITE_ERROR)?;
                content.note(arrived, || Change::Flush);
            }
            Action::Discard(extents) => {
                for extent in extents {
                    content.check(Kind::Write, extent)?;
                    let (offset, len) = (extent.offset(), extent.len());
                    let result = content.store.discard(offset, len);
                    result.map_err(|_| Sense::WRITE_ERROR)?;
                    content.note(arrived, || Change::Discard { offset, len });
                }
            }
        }
        Ok(Done::Out(moved))
    }
}

/// What a command has left to do.
enum Done {
    /// These bytes go to the guest.
    In(Vec<u8>),
    /// So many came from it.
    Out(u32),
}

impl Content {
    /// Whether a fault hits.
    fn check(&self, kind: Kind, extent: Extent) -> Result<(), Sense> {
        match self.faults.iter().find(|fault| fault.hits(kind, extent)) {
            Some(fault) => Err(fault.sense),
            None => Ok(()),
        }
    }

    fn write(
        &mut self,
        extent: Extent,
        data: Vec<u8>,
        fua: bool,
        arrived: Instant,
    ) -> Result<(), Sense> {
        self.check(Kind::Write, extent)?;
        let offset = extent.offset();
        let result = self.store.write(offset, &data);
        result.map_err(|_| Sense::WRITE_ERROR)?;
        let flushed = match fua {
            true => self.store.flush(),
            false => Ok(()),
        };
        // Written it is either way.
        self.note(arrived, || Change::Write {
            offset,
            data: data.into(),
            fua: fua && flushed.is_ok(),
        });
        flushed.map_err(|_| Sense::WRITE_ERROR)
    }

    fn note(&mut self, arrived: Instant, change: impl FnOnce() -> Change) {
        if let Some(log) = &mut self.log {
            let change = change();
            log.push(Entry {
                arrived,
                ended: Some(Instant::now()),
                change,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lent::Lease;
    use super::*;
    use crate::vmbus::protocol::PAGE_SIZE;
    use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const SOON: Duration = Duration::from_secs(20);
    const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0];
    const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 8, 0, 0, 8, 0];
    const WRITE_FUA: [u8; 10] = [0x2a, 8, 0, 0, 0, 8, 0, 0, 8, 0];
    const FLUSH: [u8; 10] = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const UNMAP: [u8; 10] = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];

    /// A disk of 1 MiB and the page that is moved to and from it.
    struct Rig {
        disk: Disk,
        memory: GuestMemoryMmap,
        lease: Lease,
    }

    impl Rig {
        fn new() -> Self {
            Rig {
                disk: Disk::in_memory(Guid([1; 16]), 1 << 20, Image::default()).unwrap(),
                memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap(),
                lease: Lease::new(),
            }
        }

        fn start(&self, cdb: &[u8]) -> Receiver<Outcome> {
            let way = match cdb[0] {
                0x2a | 0x42 => Way::Out,
                0x28 => Way::In,
                _ => Way::None,
            };
            self.start_with(cdb, way)
        }

        fn start_with(&self, cdb: &[u8], way: Way) -> Receiver<Outcome> {
            let mut list = Vec::new();
            if way != Way::None {
                for word in [0, 1, PAGE_SIZE as u32, 0, 3, 0] {
                    list.extend(word.to_le_bytes());
                }
            }
            let data = Lent::parse(self.memory.clone(), self.lease.clone(), &list).unwrap();
            let (tell, told) = channel();
            self.disk.submit(Command {
                cdb: cdb.to_vec(),
                data,
                way,
                arrived: Instant::now(),
                from: 5,
                done: Box::new(move |outcome| {
                    let _ = tell.send(outcome);
                }),
            });
            told
        }

        fn run(&self, cdb: &[u8]) -> Outcome {
            self.start(cdb).recv_timeout(SOON).expect("it ends")
        }

        fn page(&self, byte: u8) {
            let page = GuestAddress(3 * PAGE_SIZE as u64);
            self.memory.write_slice(&[byte; PAGE_SIZE], page).unwrap();
        }
    }

    const WHOLE: Outcome = Outcome::Good { moved: 4096 };

    #[test]
    fn what_is_written_is_read_and_logged_in_order_with_its_flushes() {
        let rig = Rig::new();
        let before = rig.disk.start_log().unwrap();
        rig.page(1);
        assert_eq!(rig.run(&WRITE), WHOLE);
        assert_eq!(rig.run(&FLUSH), Outcome::Good { moved: 0 });
        rig.page(2);
        assert_eq!(rig.run(&WRITE_FUA), WHOLE);
        rig.page(0);
        assert_eq!(rig.run(&READ), WHOLE);
        let mut seen = [0; 1];
        let page = GuestAddress(3 * PAGE_SIZE as u64);
        rig.memory.read_slice(&mut seen, page).unwrap();
        assert_eq!(seen, [2]);
        let log = rig.disk.log();
        let changes: Vec<_> = log.iter().map(|entry| &entry.change).collect();
        let write = |byte, fua| Change::Write {
            offset: 4096,
            data: [byte; 4096].into(),
            fua,
        };
        assert_eq!(changes, [&write(1, false), &Change::Flush, &write(2, true)]);
        assert!(log.iter().all(|entry| Some(entry.arrived) <= entry.ended));
        let mut seen = [9; 1];
        before.read(4096, &mut seen);
        assert_eq!(seen, [0]);
        rig.disk.snapshot().unwrap().read(4096, &mut seen);
        assert_eq!(seen, [2]);
        rig.disk.stop_log();
        assert_eq!(rig.run(&WRITE), WHOLE);
        assert!(rig.disk.log().is_empty());
    }

    #[test]
    fn a_write_that_waits_is_in_the_log_and_within_any_time_since_it_came() {
        let rig = Rig::new();
        rig.disk.start_log().unwrap();
        rig.disk.set_hung(true);
        let start = Instant::now();
        rig.page(1);
        let told = rig.start(&WRITE);
        let (_read, _flush) = (rig.start(&READ), rig.start(&FLUSH));
        let within = |it: &Entry| it.is_within(|at| at, start, Instant::now());
        let log = rig.disk.log();
        assert!(log.len() == 1 && log.iter().all(within), "{log:?}");
        assert_eq!(log[0].ended, None);
        rig.disk.set_hung(false);
        assert_eq!(told.recv_timeout(SOON), Ok(WHOLE));
        let ended = &rig.disk.log()[0];
        assert!(ended.ended.is_some() && ended.change == log[0].change);
        // One that is given back has changed nothing.
        rig.disk.set_hung(true);
        let _told = rig.start(&WRITE);
        rig.disk.abort(5);
        assert!(rig.disk.log().iter().all(|it| it.ended.is_some()));
    }

    #[test]
    fn what_was_written_and_could_not_be_flushed_is_in_the_log() {
        // It takes whatever is written, and cannot be synced.
        let null = File::options().write(true).open("/dev/null").unwrap();
        let mut content = Content {
            store: Store::File(null),
            faults: Vec::new(),
            log: Some(Vec::new()),
        };
        let block = Extent { lba: 1, blocks: 1 };
        let told = content.write(block, vec![1; BLOCK], true, Instant::now());
        assert_eq!(told, Err(Sense::WRITE_ERROR));
        let log = content.log.unwrap();
        let written = Change::Write {
            offset: BLOCK as u64,
            data: [1; BLOCK].into(),
            fua: false,
        };
        assert_eq!(log.first().map(|it| &it.change), Some(&written));
    }

    #[test]
    fn what_is_read_has_room_and_goes_to_the_guest() {
        let rig = Rig::new();
        let nine = [0x28, 0, 0, 0, 0, 8, 0, 0, 9, 0];
        assert_eq!(rig.run(&nine), Outcome::Overrun);
        for way in [Way::Out, Way::None] {
            let told = rig.start_with(&READ, way);
            assert_eq!(told.recv_timeout(SOON), Ok(Outcome::BadMemory), "{way:?}");
        }
        let told = rig.start_with(&WRITE, Way::In);
        let refused = Outcome::Check(Sense::INVALID_FIELD);
        assert_eq!(told.recv_timeout(SOON), Ok(refused));
    }

    #[test]
    fn an_unmap_is_logged_and_reads_as_zeros() {
        let rig = Rig::new();
        rig.page(1);
        rig.run(&WRITE);
        rig.disk.start_log().unwrap();
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
        list.extend(8u64.to_be_bytes());
        list.extend(4u32.to_be_bytes());
        list.extend([0; 4]);
        let page = GuestAddress(3 * PAGE_SIZE as u64);
        rig.memory.write_slice(&list, page).unwrap();
        assert_eq!(rig.run(&UNMAP), WHOLE);
        let mut seen = [9; 4096];
        rig.disk.snapshot().unwrap().read(4096, &mut seen);
        assert_eq!((seen[2047], seen[2048]), (0, 1));
        let discard = Change::Discard {
            offset: 4096,
            len: 2048,
        };
        assert_eq!(rig.disk.log()[0].change, discard);
    }

    #[test]
    fn a_slow_disk_takes_its_time_and_others_wait_beside_each_other() {
        let rig = Rig::new();
        let delay = Duration::from_millis(200);
        rig.disk.set_delay(delay);
        let start = Instant::now();
        let all: Vec<_> = (0..10).map(|_| rig.start(&READ)).collect();
        for told in all {
            assert_eq!(told.recv_timeout(SOON), Ok(WHOLE));
        }
        let took = start.elapsed();
        assert!(took >= delay && took < delay * 8, "{took:?}");
        rig.disk.set_delay(Duration::ZERO);
        rig.disk.set_bandwidth(NonZeroU64::new(40_960));
        let start = Instant::now();
        let all: Vec<_> = (0..4).map(|_| rig.start(&READ)).collect();
        for told in all {
            assert_eq!(told.recv_timeout(SOON), Ok(WHOLE));
        }
        // Four times a tenth of a second.
        assert!(start.elapsed() >= Duration::from_millis(400));
    }

    #[test]
    fn faults_hit_what_they_name_and_nothing_is_changed_by_what_fails() {
        let rig = Rig::new();
        let fault = |kind, offset| Fault {
            offset,
            len: 512,
            ..Fault::all(kind)
        };
        rig.disk.set_faults(&[fault(Kind::Write, 4096 + 3584)]);
        rig.disk.start_log().unwrap();
        rig.page(1);
        assert_eq!(rig.run(&WRITE), Outcome::Check(Sense::WRITE_ERROR));
        assert!(rig.disk.log().is_empty());
        assert_eq!(rig.run(&READ), WHOLE);
        rig.disk
            .set_faults(&[fault(Kind::Write, 8192), fault(Kind::Read, 4095)]);
        assert_eq!(rig.run(&WRITE), WHOLE);
        assert_eq!(rig.run(&READ), Outcome::Check(Sense::READ_ERROR));
        rig.disk.set_faults(&[Fault::all(Kind::Flush)]);
        assert_eq!(rig.run(&FLUSH), Outcome::Check(Sense::INTERNAL_ERROR));
        assert_eq!(rig.run(&READ), WHOLE);
        let beyond = [0x28, 0, 0, 0, 8, 0, 0, 0, 1, 0];
        assert_eq!(rig.run(&beyond), Outcome::Check(Sense::OUT_OF_RANGE));
    }

    #[test]
    fn a_hung_disk_ends_nothing_until_it_goes_on_or_is_told_to_give_up() {
        let rig = Rig::new();
        rig.disk.set_hung(true);
        let (first, second) = (rig.start(&READ), rig.start(&READ));
        let short = Duration::from_millis(50);
        assert_eq!(first.recv_timeout(short), Err(RecvTimeoutError::Timeout));
        assert_eq!(rig.disk.waiting(), 2);
        rig.disk.abort(4);
        assert_eq!(rig.disk.waiting(), 2);
        rig.disk.set_hung(false);
        assert_eq!(first.recv_timeout(SOON), Ok(WHOLE));
        assert_eq!(second.recv_timeout(SOON), Ok(WHOLE));
        rig.disk.set_hung(true);
        let third = rig.start(&READ);
        rig.disk.abort(5);
        assert_eq!(third.recv_timeout(SOON), Ok(Outcome::Aborted));
        assert_eq!(rig.disk.waiting(), 0);
    }

    #[test]
    fn what_a_hung_disk_is_let_end_is_what_waits_and_nothing_that_comes_later() {
        let rig = Rig::new();
        // Nothing waits: that is no word for what comes.
        rig.disk.end_waiting();
        rig.disk.set_hung(true);
        let (first, second) = (rig.start(&READ), rig.start(&READ));
        rig.disk.end_waiting();
        let third = rig.start(&READ);
        assert_eq!(first.recv_timeout(SOON), Ok(WHOLE));
        assert_eq!(second.recv_timeout(SOON), Ok(WHOLE));
        let short = Duration::from_millis(50);
        assert_eq!(third.recv_timeout(short), Err(RecvTimeoutError::Timeout));
        assert_eq!(rig.disk.waiting(), 1);
        rig.disk.end_waiting();
        assert_eq!(third.recv_timeout(SOON), Ok(WHOLE));
    }

    #[test]
    fn a_command_whose_channel_was_closed_has_no_end() {
        let rig = Rig::new();
        rig.disk.set_hung(true);
        let told = rig.start(&READ);
        rig.lease.end();
        rig.disk.set_hung(false);
        // The next one is carried out after it.
        let rig = Rig {
            lease: Lease::new(),
            ..rig
        };
        assert_eq!(rig.run(&READ), WHOLE);
        assert_eq!(told.try_recv().ok(), None);
    }
}
