// SPDX-License-Identifier: GPL-2.0

//! The character device: raw file operations turned into safe calls of a [`Handler`].
//!
//! `kernel::miscdevice` has no poll and no file mode, so the operations table and the registration
//! are built here, in its shape. All of it runs in process context and may sleep. Knows nothing of
//! VMBus or VSS, nor of what is read and written.
//!
//! C header: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h)

use crate::bindings as c;
use core::marker::PhantomData;
use kernel::bindings;
use kernel::error::to_result;
use kernel::fs::file::flags::O_NONBLOCK;
use kernel::fs::File;
use kernel::fs::Kiocb;
use kernel::ioctl::_IOC_SIZE;
use kernel::iov::IovIterDest;
use kernel::iov::IovIterSource;
use kernel::prelude::*;
use kernel::sync::poll::PollCondVar;
use kernel::sync::poll::PollTable;
use kernel::sync::Arc;
use kernel::sync::ArcBorrow;
use kernel::types::ForeignOwnable;
use kernel::types::Opaque;
use kernel::uaccess::UserPtr;
use kernel::uaccess::UserSlice;
use kernel::uaccess::UserSliceReader;

/// What a poll reports.
#[derive(Clone, Copy)]
pub(crate) enum Readiness {
    /// A read would wait.
    Idle,
    /// A read would return something.
    Readable,
    /// The device is gone for good.
    Gone,
}

/// Whoever is behind the device. Open descriptors keep it alive beyond the [`Registration`].
pub(crate) trait Handler: Send + Sync + 'static {
    /// Somebody opens the device.
    fn open(&self) -> Result;

    /// The last copy of the descriptor that [`Handler::open`] allowed is closed.
    fn release(&self);

    /// Reads one message into `out`; waits for one unless `nonblocking`. `out` stays as it is on
    /// error.
    fn read(&self, nonblocking: bool, out: &mut IovIterDest<'_>) -> Result<usize>;

    /// Takes one message, all of `from`, and waits for nothing. `from` is as long as the write was.
    fn write(&self, from: &mut IovIterSource<'_>) -> Result<usize>;

    /// Carries out a command; `argument` is as long as its number says. May take any time as long
    /// as the caller can be killed.
    ///
    /// # Errors
    ///
    /// `ENOTTY` when there is no such command.
    fn ioctl(&self, command: u32, argument: &mut UserSliceReader) -> Result;

    /// What a poll reports now.
    fn readiness(&self) -> Readiness;

    /// Notified whenever [`Handler::readiness`] has changed.
    fn changes(&self) -> &PollCondVar;
}

/// The registration of the device; dropping it removes the device node.
///
/// # Invariants
///
/// `inner` is a registered `struct miscdevice` whose file operations are those of `H`.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<H: Handler> {
    #[pin]
    inner: Opaque<bindings::miscdevice>,
    handler: Arc<H>,
}

// SAFETY: `misc_deregister` may be called on another thread than `misc_register`.
unsafe impl<H: Handler> Send for Registration<H> {}
// SAFETY: There are no methods that take `&self`.
unsafe impl<H: Handler> Sync for Registration<H> {}

impl<H: Handler> Registration<H> {
    /// Registers `/dev/<name>` with the permissions `mode`.
    pub(crate) fn new(
        name: &'static CStr,
        mode: u16,
        handler: Arc<H>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Comes first: an open may find it as soon as the device is registered.
            handler,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut misc: bindings::miscdevice = pin_init::zeroed();
                misc.minor = bindings::MISC_DYNAMIC_MINOR as c_int;
                misc.name = name.as_char_ptr();
                misc.mode = mode;
                misc.fops = &FileOperations::<H>::TABLE;
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(misc) };
                // SAFETY: `slot` was just written, is pinned, and is deregistered in `drop`.
                to_result(unsafe { bindings::misc_register(slot) })
            }),
        })
    }
}

#[pinned_drop]
impl<H: Handler> PinnedDrop for Registration<H> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The device is registered by the type invariants.
        unsafe { bindings::misc_deregister(self.inner.get()) };
    }
}

/// The operations of the files of a [`Registration<H>`]. The private data of an open file is an
/// `Arc<H>`.
struct FileOperations<H: Handler>(PhantomData<H>);

impl<H: Handler> FileOperations<H> {
    const TABLE: bindings::file_operations = bindings::file_operations {
        owner: crate::compat::this_module(),
        open: Some(Self::open),
        release: Some(Self::release),
        read_iter: Some(Self::read_iter),
        write_iter: Some(Self::write_iter),
        poll: Some(Self::poll),
        unlocked_ioctl: Some(Self::ioctl),
        // Arguments are pointers to structures without padding or pointers.
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: bindings::compat_ptr_ioctl,
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `file` and `inode` must be those of a file of a [`Registration<H>`] that is being opened.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `misc_open` has set the private data to the `miscdevice`.
        let misc = unsafe { (*file).private_data }.cast::<Opaque<bindings::miscdevice>>();
        // SAFETY: The `miscdevice` is the field `inner` of a `Registration<H>`, since only that
        // installs this table. `misc_open` holds `misc_mtx`, so it cannot be deregistered, let
        // alone be dropped, before this function returns.
        let registration = unsafe { &*kernel::container_of!(misc, Registration<H>, inner) };
        let handler = registration.handler.clone();

        if let Err(error) = handler.open() {
            return error.to_errno();
        }

        // A stream has no position, so a blocked read does not hold a lock that a write needs.
        //
        // SAFETY: The pointers are valid and for a file being opened. This cannot fail.
        unsafe { bindings::stream_open(inode, file) };
        // Who asks for it with a single call (`RWF_NOWAIT`, io_uring) is not made to wait.
        //
        // SAFETY: As above; nobody else has the file yet.
        unsafe { (*file).f_mode |= c::HV_VSS_FMODE_NOWAIT };

        // SAFETY: The open call of a file can access the private data.
        unsafe { (*file).private_data = handler.into_foreign() };
        0
    }

    /// # Safety
    ///
    /// `file` must be a file that [`Self::open`] has prepared, and is being released.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The release call of a file owns the private data, which `open` set.
        let handler = unsafe { Arc::<H>::from_foreign((*file).private_data) };
        handler.release();
        0
    }

    /// # Safety
    ///
    /// `kiocb` must be of a file that [`Self::open`] has prepared, `iter` a valid `struct iov_iter`
    /// for a read.
    unsafe extern "C" fn read_iter(
        kiocb: *mut bindings::kiocb,
        iter: *mut bindings::iov_iter,
    ) -> isize {
        // SAFETY: The caller provides a valid `struct kiocb` of a file that `open` has prepared.
        let kiocb = unsafe { Kiocb::<Arc<H>>::from_raw(kiocb) };
        // SAFETY: The caller provides a valid `struct iov_iter` for a read.
        let out = unsafe { IovIterDest::from_raw(iter) };
        let handler: ArcBorrow<'_, H> = kiocb.file();
        result_of(handler.read(nonblocking(&kiocb), out))
    }

    /// # Safety
    ///
    /// `kiocb` must be of a file that [`Self::open`] has prepared, `iter` a valid `struct iov_iter`
    /// for a write.
    unsafe extern "C" fn write_iter(
        kiocb: *mut bindings::kiocb,
        iter: *mut bindings::iov_iter,
    ) -> isize {
        // SAFETY: The caller provides a valid `struct kiocb` of a file that `open` has prepared.
        let kiocb = unsafe { Kiocb::<Arc<H>>::from_raw(kiocb) };
        // SAFETY: The caller provides a valid `struct iov_iter` for a write.
        let from = unsafe { IovIterSource::from_raw(iter) };
        result_of(kiocb.file().write(from))
    }

    /// # Safety
    ///
    /// `file` must be a file that [`Self::open`] has prepared.
    unsafe extern "C" fn ioctl(
        file: *mut bindings::file,
        command: c_uint,
        argument: c_ulong,
    ) -> c_long {
        // SAFETY: `open` set the private data; `release` is not called before this returns.
        let handler = unsafe { <Arc<H> as ForeignOwnable>::borrow((*file).private_data) };
        let argument = UserPtr::from_addr(argument);
        let mut argument = UserSlice::new(argument, _IOC_SIZE(command)).reader();
        match handler.ioctl(command, &mut argument) {
            Ok(()) => 0,
            // CAST: an errno fits.
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// `file` must be a file that [`Self::open`] has prepared, `table` null or a valid
    /// `poll_table`.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table,
    ) -> bindings::__poll_t {
        // SAFETY: `open` set the private data; `release` is not called before this returns.
        let handler = unsafe { <Arc<H> as ForeignOwnable>::borrow((*file).private_data) };
        // SAFETY: The file is valid for the duration of this call, and there is no active
        // `fdget_pos` region: streams have none.
        let file = unsafe { File::from_raw_file(file) };
        // SAFETY: The caller provides a valid or null `poll_table`.
        let table = unsafe { PollTable::from_raw(table) };

        // Waiting first, looking second: a change in between is not lost.
        table.register_wait(file, handler.changes());
        let writable = bindings::POLLOUT | bindings::POLLWRNORM;
        match handler.readiness() {
            Readiness::Idle => writable,
            Readiness::Readable => writable | bindings::POLLIN | bindings::POLLRDNORM,
            Readiness::Gone => bindings::POLLERR | bindings::POLLHUP,
        }
    }
}

/// Whether this read must not wait. `O_NONBLOCK` is looked at for each call, since `fcntl` can
/// change it.
fn nonblocking<T: ForeignOwnable>(kiocb: &Kiocb<'_, T>) -> bool {
    // SAFETY: A `Kiocb` wraps a valid `struct kiocb`, whose file is open during the call; there is
    // no active `fdget_pos` region: streams have none.
    let (flags, file) = unsafe {
        let kiocb = kiocb.as_raw();
        ((*kiocb).ki_flags, File::from_raw_file((*kiocb).ki_filp))
    };
    flags & c::HV_VSS_IOCB_NOWAIT != 0 || file.flags() & O_NONBLOCK != 0
}

fn result_of(result: Result<usize>) -> isize {
    match result {
        // CAST: a read or write is at most `MAX_RW_COUNT` bytes.
        Ok(count) => count as isize,
        Err(error) => error.to_errno() as isize,
    }
}
