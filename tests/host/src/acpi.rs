// SPDX-License-Identifier: GPL-2.0-only

//! The ACPI tables: the least with which a stock kernel finds its interrupt controllers, its power
//! button and its VMBus.

use acpi_tables::aml::{Device, Name, Package, Path, ResourceTemplate};
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, ProcessorLocalApic, MADT,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::Aml;

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

/// The tables for `cpus` processors, placed one after the other from `start` on: their bytes, with the
/// RSDP at the very start.
pub(crate) fn tables(start: u64, cpus: u8) -> Vec<u8> {
    let dsdt = dsdt();
    let madt = madt(cpus);
    // The RSDP leads to the XSDT, and the XSDT to FADT and MADT, so addresses come from the back.
    let rsdp_len = align(Rsdp::len());
    let dsdt_at = start + rsdp_len as u64;
    let madt_at = dsdt_at + align(dsdt.len()) as u64;
    let fadt = fadt(dsdt_at);
    let fadt_at = madt_at + align(madt.len()) as u64;
    let xsdt_at = fadt_at + align(fadt.len()) as u64;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);

    let mut all = Vec::new();
    for table in [
        bytes(&Rsdp::new(OEM, xsdt_at)),
        dsdt,
        madt,
        fadt,
        bytes(&xsdt),
    ] {
        all.extend_from_slice(&table);
        all.resize(align(all.len()), 0);
    }
    all
}

fn align(len: usize) -> usize {
    len.next_multiple_of(16)
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// \_S5, and the device that makes the kernel's VMBus driver bind. It needs no resources, but has to
/// say so: without _CRS the driver's probe fails, and only the bus's suspend and resume show it.
fn dsdt() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    let zero = 0u8;
    let soft_off = Package::new(vec![&SLEEP_TYPE_S5, &zero, &zero, &zero]);
    Name::new(Path::new("_S5_"), &soft_off).to_aml_bytes(&mut dsdt);
    let hid = Name::new(Path::new("_HID"), &"VMBUS");
    let uid = Name::new(Path::new("_UID"), &zero);
    let resources = ResourceTemplate::new(Vec::new());
    let crs = Name::new(Path::new("_CRS"), &resources);
    Device::new(Path::new("_SB_.VMB0"), vec![&hid, &uid, &crs]).to_aml_bytes(&mut dsdt);
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

fn madt(cpus: u8) -> Vec<u8> {
    let controller = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, IO_APIC, 0));
    bytes(&madt)
}

/// No SMI command: the machine is in ACPI mode from the start.
fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION).dsdt_64(dsdt);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    bytes(&fadt.finalize())
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
