// SPDX-License-Identifier: GPL-2.0-only

//! What the UEFI firmware of a generation 2 machine and the boot loader after it leave to a kernel that has been booted
//! with Secure Boot: the system table with its configuration tables, the memory map, and runtime services that know no
//! variable and do nothing else either.
//!
//! Layouts and numbers are those of the UEFI specification 2.10 (chapters 4.3, 4.5, 4.6, 7.2, 8 and 32.4). Keys
//! that the owner of a machine has enrolled are in a table of the boot loader shim (`EFI_MOK_VARIABLE_TABLE`), which
//! is where Linux looks for them first (`drivers/firmware/efi/mokvar-table.c`).

use linux_loader::loader::bootparam::efi_info;
use zerocopy::{Immutable, IntoBytes};

/// Where all of it lies: below 1 MiB, where no kernel takes memory, one page of code and the rest data.
pub(crate) const START: u64 = 0xf_0000;
const CODE_BYTES: u64 = PAGE;
pub(crate) const END: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;

/// `boot_params.secure_boot`: the boot loader has found it to be enforced (`efi_secureboot_mode_enabled`).
pub(crate) const SECURE_BOOT_ENABLED: u8 = 3;

/// "EL64": the firmware is one of 64 bits.
const LOADER_SIGNATURE: u32 = u32::from_le_bytes(*b"EL64");
const REVISION: u32 = 2 << 16 | 100;
const VENDOR: &str = "hyperv-sim";

/// Types and attributes of memory (7.2.3).
const RUNTIME_SERVICES_CODE: u32 = 5;
const RUNTIME_SERVICES_DATA: u32 = 6;
const CONVENTIONAL_MEMORY: u32 = 7;
const ACPI_RECLAIM_MEMORY: u32 = 9;
const WRITE_BACK: u64 = 1 << 3;
const RUNTIME: u64 = 1 << 63;
const DESCRIPTOR_VERSION: u32 = 1;

/// Status codes (appendix D).
const SUCCESS: u64 = 0;
const UNSUPPORTED: u64 = 1 << 63 | 3;
const NOT_FOUND: u64 = 1 << 63 | 14;

type Guid = [u8; 16];
/// 8868e871-e4f1-11d3-bc22-0080c73c8881
const ACPI_20: Guid = [
    0x71, 0xe8, 0x68, 0x88, 0xf1, 0xe4, 0xd3, 0x11, 0xbc, 0x22, 0x00, 0x80, 0xc7, 0x3c, 0x88, 0x81,
];
/// c451ed2b-9694-45d3-baba-ed9f8988a389
const MOK_VARIABLES: Guid = [
    0x2b, 0xed, 0x51, 0xc4, 0x94, 0x96, 0xd3, 0x45, 0xba, 0xba, 0xed, 0x9f, 0x89, 0x88, 0xa3, 0x89,
];
/// a5c059a1-94e4-4aa7-87b5-ab155c2bf072
const X509: Guid = [
    0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72,
];
/// Whose the keys are, which shim gives as its own: 605dab50-e046-4300-abb6-3dd810dd8b23
const SHIM: Guid = [
    0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23,
];

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Header {
    signature: u64,
    revision: u32,
    len: u32,
    /// Not computed: no kernel looks at it.
    crc: u32,
    reserved: u32,
}

/// The system table (4.3). What ends with the boot services is gone.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct SystemTable {
    header: Header,
    vendor: u64,
    vendor_revision: u32,
    padding: u32,
    /// Console in, out and error: a handle and an interface each.
    consoles: [u64; 6],
    runtime_services: u64,
    boot_services: u64,
    tables: u64,
    table: u64,
}

/// The runtime services (4.5) by the address of each.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct RuntimeServices {
    header: Header,
    services: [u64; 14],
}

const SET_VIRTUAL_ADDRESS_MAP: usize = 4;
const GET_VARIABLE: usize = 6;
const GET_NEXT_VARIABLE_NAME: usize = 7;

/// An entry of the configuration table (4.6).
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct ConfigurationTable {
    guid: Guid,
    at: u64,
}

/// Of the memory map (7.2.3).
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct MemoryDescriptor {
    kind: u32,
    padding: u32,
    physical: u64,
    virtual_start: u64,
    pages: u64,
    attributes: u64,
}

/// What one service does: it returns this, in `rax`.
fn service(status: u64) -> Vec<u8> {
    const MOV_RAX: [u8; 2] = [0x48, 0xb8];
    const RET: u8 = 0xc3;
    let mut code = MOV_RAX.to_vec();
    code.extend_from_slice(&status.to_le_bytes());
    code.push(RET);
    code
}

/// A variable of the boot loader's table: a name in 256 bytes, the length, the value.
fn mok_variable(name: &str, value: &[u8]) -> Vec<u8> {
    let mut entry = name.as_bytes().to_vec();
    entry.resize(256, 0);
    entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    entry.extend_from_slice(value);
    entry
}

/// A list of one certificate (`EFI_SIGNATURE_LIST`, 32.4.1).
fn signature_list(certificate: &[u8]) -> Vec<u8> {
    const LIST_HEADER: usize = 16 + 3 * 4;
    let each = SHIM.len() + certificate.len();
    let mut list = X509.to_vec();
    for len in [LIST_HEADER + each, 0, each] {
        list.extend_from_slice(&(len as u32).to_le_bytes());
    }
    list.extend_from_slice(&SHIM);
    list.extend_from_slice(certificate);
    list
}

/// The table of the boot loader: the certificates that the owner has enrolled, and that the kernel may trust them as its
/// own (shim sets that unless told otherwise); an entry without a name is its end.
fn mok_variables(certificates: &[Vec<u8>]) -> Vec<u8> {
    let lists: Vec<u8> = certificates
        .iter()
        .flat_map(|it| signature_list(it))
        .collect();
    let mut table = Vec::new();
    if !lists.is_empty() {
        table.extend(mok_variable("MokListRT", &lists));
        table.extend(mok_variable("MokListTrustedRT", &[1]));
    }
    table.extend(mok_variable("", &[]));
    table
}

/// Bytes that are laid one after the other, from an address on.
struct Layout {
    start: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Adds these at a multiple of 16, and says where they are.
    fn add(&mut self, bytes: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        at
    }
}

/// A stretch of memory that ends on a page's end: what the firmware calls it.
pub(crate) struct Region {
    pub start: u64,
    pub end: u64,
    pub kind: Kind,
}

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Ram,
    AcpiTables,
}

/// The firmware as it lies in memory from [`START`] on, and what the kernel is told of it; `None` when the certificates do
/// not fit.
pub(crate) fn remains(
    rsdp: u64,
    memory: &[Region],
    certificates: &[Vec<u8>],
) -> Option<(Vec<u8>, efi_info)> {
    let header = |signature: &[u8; 8], len: usize| Header {
        signature: u64::from_le_bytes(*signature),
        revision: REVISION,
        len: len as u32,
        crc: 0,
        reserved: 0,
    };
    let mut code = Layout {
        start: START,
        bytes: Vec::new(),
    };
    let mut services = [code.add(&service(UNSUPPORTED)); 14];
    let not_found = code.add(&service(NOT_FOUND));
    // Pointers stay as they are: Linux maps these regions at their own addresses, too.
    let success = code.add(&service(SUCCESS));
    for (which, at) in [
        (SET_VIRTUAL_ADDRESS_MAP, success),
        (GET_VARIABLE, not_found),
        (GET_NEXT_VARIABLE_NAME, not_found),
    ] {
        if let Some(entry) = services.get_mut(which) {
            *entry = at;
        }
    }

    let mut data = Layout {
        start: START + CODE_BYTES,
        bytes: Vec::new(),
    };
    let vendor: Vec<u8> = VENDOR
        .encode_utf16()
        .chain([0])
        .flat_map(u16::to_le_bytes)
        .collect();
    let vendor = data.add(&vendor);
    let runtime = RuntimeServices {
        header: header(b"RUNTSERV", size_of::<RuntimeServices>()),
        services,
    };
    let runtime_services = data.add(runtime.as_bytes());
    let mok = data.add(&mok_variables(certificates));
    let tables = [(ACPI_20, rsdp), (MOK_VARIABLES, mok)];
    let tables = tables.map(|(guid, at)| ConfigurationTable { guid, at });
    let table = data.add(tables.as_bytes());
    let system = SystemTable {
        header: header(b"IBI SYST", size_of::<SystemTable>()),
        vendor,
        vendor_revision: 1,
        padding: 0,
        consoles: [0; 6],
        runtime_services,
        boot_services: 0,
        tables: tables.len() as u64,
        table,
    };
    let system = data.add(system.as_bytes());

    let descriptor = |start: u64, end: u64, kind, attributes| MemoryDescriptor {
        kind,
        padding: 0,
        physical: start,
        virtual_start: 0,
        pages: (end - start) / PAGE,
        attributes: WRITE_BACK | attributes,
    };
    let mut map: Vec<MemoryDescriptor> = memory
        .iter()
        .map(|it| {
            let kind = match it.kind {
                Kind::Ram => CONVENTIONAL_MEMORY,
                Kind::AcpiTables => ACPI_RECLAIM_MEMORY,
            };
            descriptor(it.start, it.end, kind, 0)
        })
        .collect();
    map.push(descriptor(
        START,
        data.start,
        RUNTIME_SERVICES_CODE,
        RUNTIME,
    ));
    map.push(descriptor(data.start, END, RUNTIME_SERVICES_DATA, RUNTIME));
    let len = map.as_bytes().len();
    let map = data.add(map.as_bytes());
    if data.start + data.bytes.len() as u64 > END {
        return None;
    }

    let mut all = code.bytes;
    all.resize(CODE_BYTES as usize, 0);
    all.extend_from_slice(&data.bytes);
    let info = efi_info {
        efi_loader_signature: LOADER_SIGNATURE,
        efi_systab: system as u32,
        efi_memdesc_size: size_of::<MemoryDescriptor>() as u32,
        efi_memdesc_version: DESCRIPTOR_VERSION,
        efi_memmap: map as u32,
        efi_memmap_size: len as u32,
        efi_systab_hi: 0,
        efi_memmap_hi: 0,
    };
    Some((all, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_specification() {
        assert_eq!(size_of::<SystemTable>(), 120);
        assert_eq!(size_of::<RuntimeServices>(), 24 + 14 * 8);
        assert_eq!(size_of::<MemoryDescriptor>(), 40);
        assert_eq!(signature_list(&[7; 100]).len(), 28 + 16 + 100);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(remains(0, &[], &[vec![0; 1000]]).is_some());
        assert!(remains(0, &[], &[vec![0; 0xf000]]).is_none());
    }
}
