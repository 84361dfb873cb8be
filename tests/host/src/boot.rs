// SPDX-License-Identifier: GPL-2.0-only

//! What must lie in the guest's memory before its first instruction: kernel, initial RAM file system,
//! command line, boot parameters, page tables, ACPI tables.
//!
//! The 64-bit boot protocol of `Documentation/arch/x86/boot.rst`, without firmware, or with what one with Secure Boot
//! leaves behind.

use crate::acpi;
use crate::firmware;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{load_cmdline, BzImage, Cmdline, KernelLoader};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, ReadVolatile,
};

pub(crate) const BOOT_GDT: GuestAddress = GuestAddress(0x500);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
pub(crate) const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
/// Four page directories, one for each GiB.
const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
const CMDLINE_MAX: usize = 0x1_0000;
const SETUP_DATA: GuestAddress = GuestAddress(0x3_0000);
/// The end of the memory below 640 KiB that the kernel may use.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Where memory above the legacy hole starts, and the kernel lies.
const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// The 64-bit entry point's distance from the start of the kernel.
const ENTRY_64: u64 = 0x200;

/// Types of memory in the map (`E820_TYPE_*`).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A seed for the guest's random number generator, in the list of setup data (`SETUP_RNG_SEED`).
const SETUP_RNG_SEED: u32 = 9;
const RNG_SEED_BYTES: usize = 32;

/// Why the guest's memory could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel is no bzImage, or does not fit.
    #[error("cannot load the kernel {}", path.display())]
    Kernel {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The kernel or the command line do not suit.
    #[error("{0}")]
    Unsuitable(String),
    /// The command line is refused.
    #[error("the kernel's command line does not do")]
    Cmdline(#[source] linux_loader::cmdline::Error),
    /// The boot parameters could not be written.
    #[error("cannot write the boot parameters")]
    Parameters(#[source] linux_loader::configurator::Error),
    /// Not enough memory for all that.
    #[error("the guest's memory is too small for the {what}")]
    NoRoom {
        /// What did not fit.
        what: &'static str,
    },
    /// More keys than the firmware has room for.
    #[error("the firmware has no room for so many keys")]
    Keys,
    /// Guest memory could not be written.
    #[error("cannot write the {what} to the guest's memory")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Where the first processor starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub rip: u64,
    pub boot_params: u64,
}

/// Puts everything into `memory`, which starts at 0 and is one piece.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrd: &[PathBuf],
    cmdline: &str,
    cpus: u8,
    secure_boot: Option<&[PathBuf]>,
) -> Result<Entry, BootError> {
    let file_error = |path: &Path| {
        let path = path.to_path_buf();
        move |source| BootError::File { path, source }
    };
    let mut image = File::open(kernel).map_err(file_error(kernel))?;
    let loaded = BzImage::load(memory, Some(HIGH_MEMORY), &mut image, None).map_err(|source| {
        BootError::Kernel {
            path: kernel.to_path_buf(),
            source,
        }
    })?;
    let Some(mut header) = loaded.setup_header else {
        return Err(BootError::Unsuitable(format!(
            "{} has no setup header",
            kernel.display()
        )));
    };
    if header.xloadflags & 1 == 0 {
        return Err(BootError::Unsuitable(format!(
            "{} has no 64-bit entry point",
            kernel.display()
        )));
    }

    let mut line = Cmdline::new(CMDLINE_MAX).map_err(BootError::Cmdline)?;
    line.insert_str(cmdline).map_err(BootError::Cmdline)?;
    let longest = header.cmdline_size;
    if cmdline.len() > longest as usize {
        return Err(BootError::Unsuitable(format!(
            "the kernel takes a command line of {longest} bytes, not {}",
            cmdline.len()
        )));
    }
    load_cmdline(memory, CMDLINE, &line).map_err(|source| BootError::Kernel {
        path: kernel.to_path_buf(),
        source,
    })?;
    header.cmd_line_ptr = CMDLINE.0 as u32;
    // "Undefined" boot loader.
    header.type_of_loader = 0xff;

    // The kernel unpacks itself into this much memory from its preferred address on.
    let kernel_end = header
        .pref_address
        .max(HIGH_MEMORY.0)
        .saturating_add(header.init_size.into());
    write_random_seed(memory)?;
    header.setup_data = SETUP_DATA.0;
    let (start, size) = load_initrd(memory, initrd, kernel_end, header.initrd_addr_max)?;
    header.ramdisk_image = start;
    header.ramdisk_size = size;

    let tables = acpi::tables(ACPI_TABLES.0, cpus);
    memory
        .write_slice(&tables, ACPI_TABLES)
        .map_err(|source| BootError::Memory {
            what: "ACPI tables",
            source,
        })?;

    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI_TABLES.0,
        ..Default::default()
    };
    let end = memory.last_addr().0 + 1;
    let map = [
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY.0, E820_RESERVED),
        (HIGH_MEMORY.0, end, E820_RAM),
    ];
    for (slot, (start, end, kind)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: start,
            size: end - start,
            type_: kind,
        };
    }
    params.e820_entries = map.len() as u8;
    if let Some(keys) = secure_boot {
        let keys = keys
            .iter()
            .map(|path| fs::read(path).map_err(file_error(path)));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        leave_firmware(memory, &mut params, end, &keys)?;
    }
    let params = BootParams::new(&params, ZERO_PAGE);
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(BootError::Parameters)?;

    write_page_tables(memory)?;
    Ok(Entry {
        rip: loaded.kernel_load.0 + ENTRY_64,
        boot_params: ZERO_PAGE.0,
    })
}

/// Leaves what firmware with Secure Boot does, and these certificates as those that the owner has enrolled.
fn leave_firmware(
    memory: &GuestMemoryMmap,
    params: &mut boot_params,
    end: u64,
    certificates: &[Vec<u8>],
) -> Result<(), BootError> {
    use firmware::{Kind, Region};
    let regions = [
        // whole pages of it
        (0, LOW_MEMORY_END & !0xfff, Kind::Ram),
        (ACPI_TABLES.0, firmware::START, Kind::AcpiTables),
        (HIGH_MEMORY.0, end, Kind::Ram),
    ]
    .map(|(start, end, kind)| Region { start, end, kind });
    let (bytes, info) =
        firmware::remains(ACPI_TABLES.0, &regions, certificates).ok_or(BootError::Keys)?;
    params.efi_info = info;
    params.secure_boot = firmware::SECURE_BOOT_ENABLED;
    memory
        .write_slice(&bytes, GuestAddress(firmware::START))
        .map_err(|source| BootError::Memory {
            what: "firmware",
            source,
        })
}

/// Leaves a random seed. Without it, and without a processor that makes random numbers, the guest's
/// generator is not ready for a long time, and programs such as mkfs wait for it.
fn write_random_seed(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let source = Path::new("/dev/urandom");
    let mut seed = [0; RNG_SEED_BYTES];
    File::open(source)
        .and_then(|mut file| file.read_exact(&mut seed))
        .map_err(|error| BootError::File {
            path: source.to_path_buf(),
            source: error,
        })?;
    // struct setup_data: the next one (none), type, length.
    let mut bytes = 0u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    bytes.extend_from_slice(&(RNG_SEED_BYTES as u32).to_le_bytes());
    bytes.extend_from_slice(&seed);
    memory
        .write_slice(&bytes, SETUP_DATA)
        .map_err(|source| BootError::Memory {
            what: "random seed",
            source,
        })
}

/// Reads the archives one after the other to the top of memory; returns start and size.
fn load_initrd(
    memory: &GuestMemoryMmap,
    archives: &[PathBuf],
    kernel_end: u64,
    highest: u32,
) -> Result<(u32, u32), BootError> {
    let too_large = || BootError::NoRoom {
        what: "kernel and its initial RAM file system",
    };
    let mut files = Vec::with_capacity(archives.len());
    let mut total = 0usize;
    for path in archives {
        let error = |source| BootError::File {
            path: path.clone(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        let len = file.metadata().map_err(error)?.len() as usize;
        files.push((path, file, len, total));
        // Archives are padded to four bytes, as the kernel wants between two of them.
        total += len.next_multiple_of(4);
    }
    let top = (memory.last_addr().0 + 1).min(u64::from(highest) + 1);
    let start = top
        .checked_sub(total as u64)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel_end)
        .ok_or_else(too_large)?;
    for (path, mut file, len, offset) in files {
        let at = GuestAddress(start + offset as u64);
        let slice = memory
            .get_slice(at, len)
            .map_err(|source| BootError::Memory {
                what: "initial RAM file system",
                source,
            })?;
        let mut slice = slice;
        file.read_exact_volatile(&mut slice)
            .map_err(|source| BootError::File {
                path: path.clone(),
                source: io::Error::other(source),
            })?;
    }
    let start = u32::try_from(start).map_err(|_| too_large())?;
    let size = u32::try_from(total).map_err(|_| too_large())?;
    Ok((start, size))
}

/// The first 4 GiB at their own addresses in 2 MiB pages, and flat segments.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let write = |values: &[u64], at: GuestAddress| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        memory
            .write_slice(&bytes, at)
            .map_err(|source| BootError::Memory {
                what: "page tables",
                source,
            })
    };
    write(&[PDPT.0 | PRESENT_WRITABLE], PML4)?;
    let directories: Vec<u64> = (0..4)
        .map(|gib| (PAGE_DIRECTORIES.0 + gib * 0x1000) | PRESENT_WRITABLE)
        .collect();
    write(&directories, PDPT)?;
    let pages: Vec<u64> = (0..4 * 512)
        .map(|page: u64| page << 21 | PRESENT_WRITABLE | LARGE)
        .collect();
    write(&pages, PAGE_DIRECTORIES)?;
    // Nothing, nothing, 64-bit code, data: the selectors that the boot protocol asks for.
    write(
        &[0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff],
        BOOT_GDT,
    )
}
