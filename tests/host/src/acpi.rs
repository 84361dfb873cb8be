// SPDX-License-Identifier: GPL-2.0-only

//! The ACPI tables: the least with which a stock kernel finds its interrupt controllers, its power
//! button and its VMBus.

use zerocopy::{Immutable, IntoBytes};

const OEM: [u8; 6] = *b"HVSIM ";
const OEM_TABLE: [u8; 8] = *b"HYPERVSM";
const OEM_REVISION: u32 = 1;

/// Interrupt of ACPI events; none is ever raised.
const SCI: u16 = 9;
/// Port of the PM1 event registers: status, then enable, two bytes each.
pub(crate) const PM1_EVENT: u16 = 0x600;
/// Port of the PM1 control register, two bytes.
pub(crate) const PM1_CONTROL: u16 = 0x604;
/// Sleep type of S5 (soft off), in the control register's bits 10 to 12.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Whoever has written a table says so in its header.
const CREATOR: [u8; 4] = *b"HVSM";
const CREATOR_REVISION: u32 = 1;

/// What is at the start of each table but the RSDP (ACPI 6.5, 5.2.6).
#[repr(C, packed)]
#[derive(IntoBytes, Immutable)]
struct Header {
    signature: [u8; 4],
    len: u32,
    revision: u8,
    checksum: u8,
    oem: [u8; 6],
    oem_table: [u8; 8],
    oem_revision: u32,
    creator: [u8; 4],
    creator_revision: u32,
}

/// ACPI 6.5, 5.2.5.3.
#[repr(C, packed)]
#[derive(IntoBytes, Immutable)]
struct Rsdp {
    signature: [u8; 8],
    /// Of the first 20 bytes, which are all that there was of it at first.
    checksum: u8,
    oem: [u8; 6],
    revision: u8,
    rsdt: u32,
    len: u32,
    xsdt: u64,
    extended_checksum: u8,
    reserved: [u8; 3],
}

const RSDP_LEN: usize = size_of::<Rsdp>();
const FIRST_RSDP_LEN: usize = 20;

/// The tables for `cpus` processors, placed one after the other from `start` on: their bytes, with the
/// RSDP at the very start.
pub(crate) fn tables(start: u64, cpus: u8) -> Vec<u8> {
    let dsdt = dsdt();
    let madt = madt(cpus);
    // The RSDP leads to the XSDT, and the XSDT to FADT and MADT, so addresses come from the back.
    let dsdt_at = start + align(RSDP_LEN) as u64;
    let madt_at = dsdt_at + align(dsdt.len()) as u64;
    let fadt = fadt(dsdt_at);
    let fadt_at = madt_at + align(madt.len()) as u64;
    let xsdt_at = fadt_at + align(fadt.len()) as u64;
    let xsdt = table(*b"XSDT", 1, [fadt_at, madt_at].as_bytes());

    let mut all = Vec::new();
    for table in [rsdp(xsdt_at), dsdt, madt, fadt, xsdt] {
        all.extend_from_slice(&table);
        all.resize(align(all.len()), 0);
    }
    all
}

fn align(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    sum.wrapping_neg()
}

/// A table with its header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let header = |checksum| Header {
        signature,
        len: (size_of::<Header>() + body.len()) as u32,
        revision,
        checksum,
        oem: OEM,
        oem_table: OEM_TABLE,
        oem_revision: OEM_REVISION,
        creator: CREATOR,
        creator_revision: CREATOR_REVISION,
    };
    let bytes = |checksum| [header(checksum).as_bytes(), body].concat();
    bytes(checksum(&bytes(0)))
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut rsdp = Rsdp {
        signature: *b"RSD PTR ",
        checksum: 0,
        oem: OEM,
        revision: 2,
        rsdt: 0,
        len: RSDP_LEN as u32,
        xsdt,
        extended_checksum: 0,
        reserved: [0; 3],
    };
    rsdp.checksum = checksum(rsdp.as_bytes().get(..FIRST_RSDP_LEN).unwrap_or_default());
    rsdp.extended_checksum = checksum(rsdp.as_bytes());
    rsdp.as_bytes().to_vec()
}

/// \_S5, and the device that makes the kernel's VMBus driver bind. It needs no resources, but has to
/// say so: without _CRS the driver's probe fails, and only the bus's suspend and resume show it.
fn dsdt() -> Vec<u8> {
    /// The opcodes of AML that are needed (ACPI 6.5, 20.3).
    const NAME: u8 = 0x08;
    const BYTE: u8 = 0x0a;
    const STRING: u8 = 0x0d;
    const BUFFER: u8 = 0x11;
    const PACKAGE: u8 = 0x12;
    const TWO_NAMES: u8 = 0x2e;
    const DEVICE: [u8; 2] = [0x5b, 0x82];
    /// The end of a list of resources, without a checksum (6.4.2.9).
    const END: [u8; 2] = [0x79, 0];
    /// What has its own length in front of it, that byte included: up to 63 it takes one.
    fn with_len(body: &[u8]) -> Vec<u8> {
        [&[body.len() as u8 + 1], body].concat()
    }
    fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
        [&[NAME], &name[..], value].concat()
    }

    // Four numbers, of which 0 has an opcode of its own.
    let sleep_types = with_len(&[4, BYTE, SLEEP_TYPE_S5, 0, 0, 0]);
    let soft_off = name(b"_S5_", &[&[PACKAGE], &sleep_types[..]].concat());
    let hid = name(b"_HID", &[&[STRING], &b"VMBUS\0"[..]].concat());
    let uid = name(b"_UID", &[0]);
    let resources = with_len(&[&[BYTE, END.len() as u8], &END[..]].concat());
    let crs = name(b"_CRS", &[&[BUFFER], &resources[..]].concat());
    let device = [&[TWO_NAMES], &b"_SB_VMB0"[..], &hid, &uid, &crs].concat();
    let body = [&soft_off, &DEVICE[..], &with_len(&device)].concat();
    table(*b"DSDT", 6, &body)
}

/// The interrupt controllers (ACPI 6.5, 5.2.12): one for each processor, and the one for devices.
fn madt(cpus: u8) -> Vec<u8> {
    /// Types and lengths of the structures.
    const PROCESSOR: [u8; 2] = [0, 8];
    const IO: [u8; 2] = [1, 12];
    const ENABLED: u32 = 1;
    let mut body = [LOCAL_APIC, 0].as_bytes().to_vec();
    for id in 0..cpus {
        body.extend(PROCESSOR);
        body.extend([id, id]);
        body.extend(ENABLED.to_le_bytes());
    }
    body.extend(IO);
    body.extend([cpus, 0]);
    body.extend([IO_APIC, 0].as_bytes());
    table(*b"APIC", 1, &body)
}

/// No SMI command: the machine is in ACPI mode from the start. All other registers are 0, and that is not
/// there (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64) -> Vec<u8> {
    const LEN: usize = 276;
    let mut body = vec![0; LEN - size_of::<Header>()];
    // Each at its offset in the table.
    let mut put = |offset: usize, bytes: &[u8]| {
        let at = offset - size_of::<Header>();
        body[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(46, &SCI.to_le_bytes());
    put(56, &u32::from(PM1_EVENT).to_le_bytes());
    put(64, &u32::from(PM1_CONTROL).to_le_bytes());
    // The lengths of the two.
    put(88, &[4, 2]);
    // The minor version.
    put(131, &[5]);
    put(140, &dsdt.to_le_bytes());
    table(*b"FACP", 6, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_tables_lead_to_each_other_and_add_up() {
        let start = 0xe0000;
        let all = tables(start, 2);
        let table = |address: u64| {
            let at = (address - start) as usize;
            let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
            let table = &all[at..at + len];
            let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
            table
        };
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((checksum(&all[..20]), checksum(&all[..36])), (0, 0));
        let xsdt = table(u64_at(&all, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(u64_at(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(u64_at(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 2 * 8 + 12);
        let dsdt = table(u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(dsdt.windows(5).any(|bytes| bytes == b"VMBUS"));
    }
}
