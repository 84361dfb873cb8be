// SPDX-License-Identifier: GPL-2.0-only

//! The line to the kernel: `/dev/vmbus/hv_vss`, in ABI v2 or v1.
//!
//! v2 (`uapi/hv_vss.rs`) is asked for first. A kernel that knows only v1, as the stock `hv_utils`
//! does, answers that with `EINVAL`, and v1 is used. The v1 device ignores `O_NONBLOCK`, so nothing
//! is ever read before `poll(2)` has said that something is there. What the requests mean is not
//! known here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hv_vss_uapi::{
    feature, frame, op, Answer, FrameHdr, FreezeInfo, Lun, Register, Registered,
    Request as RequestFrame, Thawed, VssMsg, ABI_V2, MAX_FRAME,
};
use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::{fstat, Mode};
use zerocopy::{FromBytes, IntoBytes};

/// How long the kernel may take to confirm a registration; it does so at once.
const REGISTER_TIMEOUT_MS: u16 = 10_000;
/// How long the stock driver has to come to itself. Its device is there before it knows its own end of it (`hvt` in
/// `drivers/hv/hv_snapshot.c`), and a registration in between is an oops; whoever waits for the device is as early
/// as can be. Nothing shows when it is over.
const SETTLE: Duration = Duration::from_millis(100);
/// What a v1 kernel allows for FREEZE (`VSS_FREEZE_TIMEOUT` in `drivers/hv/hv_snapshot.c`).
const V1_FREEZE_TIME: Duration = Duration::from_secs(15 * 60);
/// What it allows for all else (`VSS_USERSPACE_TIMEOUT`).
const V1_TIME: Duration = Duration::from_secs(30);
/// Frames above this are refused at registration: far more than any LUN list needs.
const MAX_READ: usize = 1 << 16;

/// Why the device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// Which path.
        path: PathBuf,
        /// What the kernel said: `ENOENT` without the module, `EBUSY` with another daemon.
        source: io::Error,
    },
    /// The registration was refused.
    #[error("{path} refuses the registration")]
    Register {
        /// Which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else, or the answer to the registration is not what the ABI says.
    #[error("{path} is not the device of hv_vss: {what}")]
    NotHvVss {
        /// Which path.
        path: PathBuf,
        /// What it is, or what it answered.
        what: String,
    },
    /// The device hung up: module unbound, or suspended.
    #[error("the device hung up")]
    HungUp,
    /// A read failed.
    #[error("cannot read from the device")]
    Read(#[source] io::Error),
    /// A write failed.
    #[error("cannot write to the device")]
    Write(#[source] io::Error),
    /// The kernel has answered the request itself, and has another one.
    #[error("the request has ended without it")]
    Withdrawn,
}

impl DeviceError {
    /// Whether another process has the device open.
    pub fn is_busy(&self) -> bool {
        let busy = Some(Errno::EBUSY as i32);
        matches!(self, DeviceError::Open { source, .. } if source.raw_os_error() == busy)
    }
}

/// Which ABI is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// Mainline's 12-byte messages.
    V1,
    /// The frames of `uapi/hv_vss.rs`.
    V2,
}

/// What the host asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The kernel's id for it; 0 in v1, which has none.
    pub id: u64,
    /// One of `hv_vss_uapi::op`.
    pub operation: u8,
    /// How long the kernel waits for the answer, counted from the read.
    pub time_left: Duration,
    /// What the host says of the backup, if it does.
    pub about: Option<About>,
}

/// What a host says of a backup, in its own numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// How many disks it will snapshot; [`Device::disks`] has them.
    pub luns: u32,
    /// What kind of backup it will be.
    pub backup_type: u32,
    /// What is to be minded.
    pub flags: u32,
}

/// What a read brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A request to answer.
    Request(Request),
    /// The kernel has thawed what it held for the FREEZE with this id; one of `hv_vss_uapi::thawed`.
    Thawed(u64, u32),
    /// Something that the ABI does not allow or that this version does not know; in words.
    Odd(String),
}

/// A kernel that freezes for whoever has the device open, and thaws when nobody has.
#[derive(Clone, Debug)]
pub struct Hold {
    /// The device. What is held is so until the last copy of this is gone.
    pub device: Arc<OwnedFd>,
    /// How many file systems it can hold at a time.
    pub most: u32,
    /// Whether it takes descriptors that are paths only.
    pub takes_paths: bool,
}

/// The open, registered device.
#[derive(Debug)]
pub struct Device {
    fd: Arc<OwnedFd>,
    abi: Abi,
    hold: Option<Hold>,
    buffer: Vec<u8>,
    /// Of the last request that had such a list.
    disks: Vec<Lun>,
}

impl Device {
    /// Opens the device at `path` and registers with it.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(|e| DeviceError::Open {
            path: path.to_owned(),
            source: e.into(),
        })?;
        // Whatever else it is, nothing must be written to it.
        let is_device = |mode| mode & libc::S_IFMT == libc::S_IFCHR;
        if !fstat(&fd).is_ok_and(|stat| is_device(stat.st_mode)) {
            return Err(DeviceError::NotHvVss {
                path: path.to_owned(),
                what: "it is not a character device".into(),
            });
        }
        Self::register(fd, path)
    }

    /// Registers on a descriptor that is open already, and does not block; `path` is for messages.
    pub fn register(fd: OwnedFd, path: &Path) -> Result<Self, DeviceError> {
        let mut device = Device {
            fd: Arc::new(fd),
            abi: Abi::V2,
            hold: None,
            buffer: vec![0; MAX_FRAME],
            disks: Vec::new(),
        };
        let refused = |e: Errno| DeviceError::Register {
            path: path.to_owned(),
            source: e.into(),
        };
        let register = Register {
            frame: header(frame::REGISTER, size_of::<Register>(), 0),
            max_version: ABI_V2,
            features: 0,
        };
        match nix::unistd::write(&device.fd, register.as_bytes()) {
            Ok(_) => {}
            Err(Errno::EINVAL) => {
                device.abi = Abi::V1;
                thread::sleep(SETTLE);
                let hello = VssMsg::new(op::REGISTER1);
                nix::unistd::write(&device.fd, hello.as_bytes()).map_err(refused)?;
            }
            Err(e) => return Err(refused(e)),
        }
        device.confirm(path)?;
        Ok(device)
    }

    /// Reads the reply to the registration.
    fn confirm(&mut self, path: &Path) -> Result<(), DeviceError> {
        let strange = |what: String| DeviceError::NotHvVss {
            path: path.to_owned(),
            what,
        };
        if !self.is_readable(REGISTER_TIMEOUT_MS.into())? {
            return Err(strange("it does not answer a registration".into()));
        }
        let length = nix::unistd::read(&self.fd, &mut self.buffer)
            .map_err(|e| DeviceError::Read(e.into()))?;
        let reply = self.buffer.get(..length).unwrap_or_default();
        match self.abi {
            // The version of the kernel's side, which nothing depends on.
            Abi::V1 if length == size_of::<u32>() => Ok(()),
            Abi::V1 => Err(strange(format!(
                "it answers with {length} bytes instead of 4"
            ))),
            Abi::V2 => {
                // A newer kernel may have more to say.
                let (reply, _) = Registered::read_from_prefix(reply).map_err(|_| {
                    strange(format!("it answers with {length} bytes instead of 40"))
                })?;
                let max_frame = reply.max_frame as usize;
                if reply.frame.kind != frame::REGISTERED
                    || reply.abi_version != ABI_V2
                    || max_frame > MAX_READ
                {
                    return Err(strange(format!("{reply:?}")));
                }
                self.buffer.resize(max_frame.max(MAX_FRAME), 0);
                self.hold = (reply.features & feature::HOLD != 0).then(|| Hold {
                    device: Arc::clone(&self.fd),
                    most: reply.max_held,
                    takes_paths: reply.features & feature::PATHS != 0,
                });
                Ok(())
            }
        }
    }

    /// Which ABI the kernel took.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// What the kernel offers to hold, if it does.
    pub fn hold(&self) -> Option<&Hold> {
        self.hold.as_ref()
    }

    /// The next request, or `None` when there is none at the moment.
    pub fn read(&mut self) -> Result<Option<Incoming>, DeviceError> {
        // The read of hv_utils waits whatever the descriptor says.
        if self.abi == Abi::V1 && !self.is_readable(PollTimeout::ZERO)? {
            return Ok(None);
        }
        let length = match nix::unistd::read(&self.fd, &mut self.buffer) {
            Ok(0) => return Err(DeviceError::HungUp),
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(None),
            // The loop hears of a request once, so none may be left behind.
            Err(Errno::EINTR) => return self.read(),
            Err(e) => return Err(DeviceError::Read(e.into())),
        };
        let bytes = self.buffer.get(..length).unwrap_or_default();
        Ok(Some(match self.abi {
            Abi::V1 => decode_v1(bytes),
            Abi::V2 => {
                let (incoming, info) = decode_v2(bytes);
                if let Some(info) = info {
                    let luns = info.luns.iter().take(info.lun_count as usize);
                    self.disks = luns.copied().collect();
                }
                incoming
            }
        }))
    }

    /// The disks that the last FREEZE was for, as far as the host has said.
    pub fn disks(&self) -> &[Lun] {
        &self.disks
    }

    fn is_readable(&self, timeout: PollTimeout) -> Result<bool, DeviceError> {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(false),
            Ok(_) => {}
            Err(e) => return Err(DeviceError::Read(e.into())),
        }
        let events = fds[0].revents().unwrap_or(PollFlags::POLLERR);
        if events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            return Err(DeviceError::HungUp);
        }
        Ok(events.contains(PollFlags::POLLIN))
    }

    /// Tells the kernel, and so the host, how `request` ended: one of `hv_vss_uapi::status`.
    pub fn answer(&self, request: &Request, status: u32) -> Result<(), DeviceError> {
        match self.abi {
            // hv_utils shows one request at a time and takes any answer for one to that.
            Abi::V1 if self.is_readable(PollTimeout::ZERO)? => Err(DeviceError::Withdrawn),
            Abi::V1 => self.write(VssMsg::answer_v1(status).as_bytes()),
            Abi::V2 => {
                let answer = Answer {
                    frame: header(frame::ANSWER, size_of::<Answer>(), request.id),
                    status,
                    operation: request.operation.into(),
                };
                self.write(answer.as_bytes())
            }
        }
    }

    /// Tells the kernel, unasked, that the freeze of request `id` has ended, and why: one of
    /// `hv_vss_uapi::thawed`. v1 has no words for it; there the answer to THAW must say it.
    pub fn thawed_early(&self, id: u64, reason: u32) -> Result<(), DeviceError> {
        if self.abi == Abi::V1 {
            return Ok(());
        }
        let notice = Thawed {
            frame: header(frame::THAWED, size_of::<Thawed>(), id),
            reason,
            reserved: 0,
        };
        self.write(notice.as_bytes())
    }

    fn write(&self, bytes: &[u8]) -> Result<(), DeviceError> {
        loop {
            match nix::unistd::write(&self.fd, bytes) {
                // Both ABIs take a message whole or not at all.
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(DeviceError::Write(e.into())),
            }
        }
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn header(kind: u32, size: usize, id: u64) -> FrameHdr {
    FrameHdr {
        version: ABI_V2,
        // All frames that are sent are fixed structures of 32 bytes.
        size: size as u32,
        kind,
        reserved: 0,
        id,
    }
}

fn decode_v1(bytes: &[u8]) -> Incoming {
    let Ok(msg) = VssMsg::read_from_bytes(bytes) else {
        let length = bytes.len();
        return Incoming::Odd(format!("a v1 message of {length} bytes instead of 12"));
    };
    let operation = msg.hdr.operation;
    Incoming::Request(Request {
        id: 0,
        operation,
        time_left: if operation == op::FREEZE {
            V1_FREEZE_TIME
        } else {
            V1_TIME
        },
        about: None,
    })
}

/// A frame, and what the host said with it of the backup, if it did.
fn decode_v2(bytes: &[u8]) -> (Incoming, Option<FreezeInfo>) {
    match request_v2(bytes) {
        Ok((request, info)) => (Incoming::Request(request), info),
        Err(other) => (other, None),
    }
}

fn request_v2(bytes: &[u8]) -> Result<(Request, Option<FreezeInfo>), Incoming> {
    let odd = |what: String| Err(Incoming::Odd(what));
    let length = bytes.len();
    let Ok((frame_header, _)) = FrameHdr::read_from_prefix(bytes) else {
        return odd(format!(
            "a frame of {length} bytes, too short for its header"
        ));
    };
    let FrameHdr { size, kind, .. } = frame_header;
    if size as usize != length {
        return odd(format!("a frame of {length} bytes that claims {size}"));
    }
    if kind == frame::THAWED {
        return match Thawed::read_from_prefix(bytes) {
            Ok((notice, _)) => Err(Incoming::Thawed(notice.frame.id, notice.reason)),
            Err(_) => odd(format!("a notice of {length} bytes, too short")),
        };
    }
    if kind != frame::REQUEST {
        return odd(format!("a frame of unknown kind {kind}"));
    }
    let Ok((request, _)) = RequestFrame::read_from_prefix(bytes) else {
        return odd(format!("a request of {length} bytes, too short"));
    };
    let begin = request.fixed_size as usize;
    let payload = begin
        .checked_add(request.payload_size as usize)
        .filter(|_| begin >= size_of::<RequestFrame>())
        .and_then(|end| bytes.get(begin..end));
    let Some(payload) = payload else {
        return odd(format!(
            "a request whose payload of {} bytes is missing",
            request.payload_size
        ));
    };
    let info = FreezeInfo::read_from_prefix(payload).ok();
    let info = info.map(|(info, _)| info);
    let request = Request {
        id: request.frame.id,
        operation: request.msg.hdr.operation,
        time_left: Duration::from_millis(request.time_left_ms.into()),
        about: info.map(|it| About {
            luns: it.lun_count,
            backup_type: it.backup_type,
            flags: it.flags,
        }),
    };
    Ok((request, info))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_vss_uapi::status;
    use nix::fcntl::{fcntl, FcntlArg};
    use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
    use zerocopy::FromZeros;

    /// A device and the kernel's end of it. Packets keep their bounds, as with the real device.
    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = SockType::SeqPacket;
        let ends = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        fcntl(&ends.0, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        ends
    }

    fn receive(kernel: &OwnedFd) -> Vec<u8> {
        let mut buffer = vec![0; MAX_FRAME];
        let length = nix::unistd::read(kernel, &mut buffer).unwrap();
        buffer.truncate(length);
        buffer
    }

    /// A device registered in v2 and the kernel's end of it, which offers `features`.
    fn registered_with(features: u32) -> (Device, OwnedFd) {
        let (daemon, kernel) = pair();
        let peer = thread::spawn(move || {
            let hello = Register::read_from_bytes(&receive(&kernel)).unwrap();
            assert_eq!(hello.max_version, ABI_V2);
            let reply = Registered {
                frame: header(frame::REGISTERED, size_of::<Registered>(), 0),
                abi_version: ABI_V2,
                max_frame: MAX_FRAME as u32,
                features,
                max_held: 9,
            };
            nix::unistd::write(&kernel, reply.as_bytes()).unwrap();
            kernel
        });
        let device = Device::register(daemon, Path::new("test")).unwrap();
        (device, peer.join().unwrap())
    }

    fn registered() -> (Device, OwnedFd) {
        registered_with(0)
    }

    #[test]
    fn a_kernel_that_holds_says_how_much_and_what_it_lets_go_of() {
        assert!(registered().0.hold().is_none());
        // A newer kernel may offer more.
        let (mut device, kernel) = registered_with(feature::HOLD | 1 << 20);
        assert_eq!(device.hold().unwrap().most, 9);
        let notice = Thawed {
            frame: header(frame::THAWED, size_of::<Thawed>(), 6),
            reason: 77,
            reserved: 0,
        };
        nix::unistd::write(&kernel, notice.as_bytes()).unwrap();
        assert_eq!(device.read().unwrap(), Some(Incoming::Thawed(6, 77)));
    }

    #[test]
    fn v2_request_is_read_and_answered_with_its_id() {
        let (mut device, kernel) = registered();
        assert_eq!(device.abi(), Abi::V2);
        assert_eq!(device.read().unwrap(), None);
        let mut info = FreezeInfo::new_zeroed();
        info.lun_count = 3;
        info.backup_type = 2;
        info.flags = 1;
        info.luns[2].lun = 9;
        let request = RequestFrame {
            frame: header(frame::REQUEST, MAX_FRAME, 77),
            time_left_ms: 1500,
            payload_size: size_of::<FreezeInfo>() as u32,
            msg: VssMsg::new(op::FREEZE),
            fixed_size: size_of::<RequestFrame>() as u32,
        };
        let bytes = [request.as_bytes(), info.as_bytes()].concat();
        nix::unistd::write(&kernel, &bytes).unwrap();
        let Some(Incoming::Request(request)) = device.read().unwrap() else {
            panic!("no request");
        };
        assert_eq!(request.id, 77);
        assert_eq!(request.operation, op::FREEZE);
        assert_eq!(request.time_left, Duration::from_millis(1500));
        let about = About {
            luns: 3,
            backup_type: 2,
            flags: 1,
        };
        assert_eq!(request.about, Some(about));
        let luns: Vec<u8> = device.disks().iter().map(|it| it.lun).collect();
        assert_eq!(luns, [0, 0, 9]);

        device.answer(&request, status::FAIL).unwrap();
        let answer = Answer::read_from_bytes(&receive(&kernel)).unwrap();
        assert_eq!(answer.frame.id, 77);
        assert_eq!(answer.status, status::FAIL);
        assert_eq!(answer.operation, u32::from(op::FREEZE));
    }

    #[test]
    fn odd_frames_are_described_and_do_no_harm() {
        let (mut device, kernel) = registered();
        let request = RequestFrame {
            frame: header(frame::REQUEST, size_of::<RequestFrame>(), 5),
            payload_size: 8,
            fixed_size: size_of::<RequestFrame>() as u32,
            ..RequestFrame::new_zeroed()
        };
        let unknown = header(99, size_of::<FrameHdr>(), 0);
        let long = header(frame::REQUEST, 4000, 1);
        let short_notice = header(frame::THAWED, size_of::<FrameHdr>(), 1);
        for (bytes, word) in [
            (&request.as_bytes()[..7], "too short for its header"),
            (request.as_bytes(), "payload of 8 bytes is missing"),
            (unknown.as_bytes(), "unknown kind 99"),
            (long.as_bytes(), "claims 4000"),
            (short_notice.as_bytes(), "a notice of 24 bytes"),
        ] {
            nix::unistd::write(&kernel, bytes).unwrap();
            let Some(Incoming::Odd(text)) = device.read().unwrap() else {
                panic!("{word}: taken for a request");
            };
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn a_device_that_is_something_else_is_refused() {
        let (daemon, kernel) = pair();
        nix::unistd::write(&kernel, &[1; 5]).unwrap();
        let error = Device::register(daemon, Path::new("/dev/other")).unwrap_err();
        assert!(error.to_string().contains("/dev/other"), "{error}");
    }

    #[test]
    fn the_end_of_the_kernels_side_is_a_hang_up() {
        let (mut device, kernel) = registered();
        drop(kernel);
        assert!(matches!(device.read(), Err(DeviceError::HungUp)));
    }

    #[test]
    fn a_v1_answer_never_goes_to_the_next_request() {
        let (daemon, kernel) = pair();
        let mut device = Device {
            fd: Arc::new(daemon),
            abi: Abi::V1,
            hold: None,
            buffer: vec![0; MAX_FRAME],
            disks: Vec::new(),
        };
        let ask = |operation| {
            nix::unistd::write(&kernel, VssMsg::new(operation).as_bytes()).unwrap();
        };
        ask(op::HOT_BACKUP);
        let Ok(Some(Incoming::Request(first))) = device.read() else {
            panic!("no request");
        };
        // The kernel has answered that one itself meanwhile.
        ask(op::FREEZE);
        let late = device.answer(&first, status::OK);
        assert!(matches!(late, Err(DeviceError::Withdrawn)), "{late:?}");
        let mut buffer = [0; MAX_FRAME];
        fcntl(&kernel, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let written = nix::unistd::read(&kernel, &mut buffer);
        assert_eq!(written, Err(Errno::EAGAIN), "FREEZE has an answer");
        let Ok(Some(Incoming::Request(freeze))) = device.read() else {
            panic!("no request");
        };
        assert_eq!(freeze.operation, op::FREEZE);
        device.answer(&freeze, status::OK).unwrap();
        assert_eq!(receive(&kernel), VssMsg::answer_v1(status::OK).as_bytes());
    }

    #[test]
    fn v1_messages_have_twelve_bytes_and_default_times() {
        let Incoming::Request(freeze) = decode_v1(VssMsg::new(op::FREEZE).as_bytes()) else {
            panic!("no request");
        };
        assert_eq!(freeze.time_left, Duration::from_secs(900));
        let Incoming::Request(thaw) = decode_v1(VssMsg::new(op::THAW).as_bytes()) else {
            panic!("no request");
        };
        assert_eq!(thaw.time_left, Duration::from_secs(30));
        assert!(matches!(decode_v1(&[0; 11]), Incoming::Odd(_)));
    }

    proptest::proptest! {
        #[test]
        fn no_frame_panics(bytes in proptest::collection::vec(0u8.., 0..100)) {
            decode_v1(&bytes);
            decode_v2(&bytes);
        }
    }
}
