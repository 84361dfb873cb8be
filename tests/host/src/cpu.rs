// SPDX-License-Identifier: GPL-2.0-only

//! What the guest's processors say they are (CPUID, MSRs) and how they start.
//!
//! The Hyper-V leaves are what makes Linux see Hyper-V; which bits, and why, is explained at
//! the function `cpuid`. Names and numbers are those of `include/hyperv/hvgdk_mini.h`.

use crate::boot::{Entry, BOOT_GDT, PML4};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_enable_cap, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, CpuId, Msrs,
    KVM_CAP_HYPERV_SYNIC2, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE,
};
use kvm_ioctls::VcpuFd;
use libc::c_char;
use vmm_sys_util::{errno, fam};

/// Why a virtual CPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A list for KVM could not be made.
    #[error("cannot build the {what}")]
    List {
        /// Which list.
        what: &'static str,
        /// Why.
        #[source]
        source: fam::Error,
    },
    /// KVM refused.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What it was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: errno::Error,
    },
}

fn kvm(what: &'static str) -> impl FnOnce(errno::Error) -> CpuError {
    move |source| CpuError::Kvm { what, source }
}

fn list(what: &'static str) -> impl FnOnce(fam::Error) -> CpuError {
    move |source| CpuError::List { what, source }
}

/// All hypervisor leaves, KVM's own and Hyper-V's.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;
/// The first and the last leaf that are offered.
const HV_VENDOR_LEAF: u32 = 0x4000_0000;
const HV_LAST_LEAF: u32 = 0x4000_0005;
const HV_FEATURES_LEAF: u32 = 0x4000_0003;
const HV_HINTS_LEAF: u32 = 0x4000_0004;
/// "Microsoft Hv" in EBX, ECX, EDX: with KVM's own "Linux KVM Hv" the guest does not see Hyper-V.
const HV_VENDOR: [u32; 3] = [0x7263_694d, 0x666f_736f, 0x7648_2074];

/// Leaf 3 EAX: VP run time, reference counter, SynIC, synthetic timers, APIC MSRs, hypercalls, VP
/// index, reset, reference TSC page, frequency MSRs. Without the last a machine that has no PIT hangs
/// while it calibrates its clock.
const FEATURES_EAX: u32 = 0xaff;
/// Leaf 3 EBX: the guest may post messages and signal events.
const FEATURES_EBX: u32 = 0x30;
/// Leaf 3 EDX: among others frequency MSRs (bit 8), crash MSRs (bit 10) and direct-mode timers (bit 19),
/// so that timer interrupts need neither the local APIC's timer nor a message slot.
const FEATURES_EDX: u32 = 0x8_4510;
/// Leaf 4 EAX: among others "no AutoEOI" (bit 9), so that the end of an interrupt is seen.
const HINTS_EAX: u32 = 0x4_0e2c;

/// The CPUID leaves of virtual processor `index` of `count`.
///
/// `supported` is what KVM and the processor can do, `hyperv` what KVM can serve of Hyper-V. Bits that
/// KVM does not know are not offered.
pub(crate) fn cpuid(
    supported: &CpuId,
    hyperv: &CpuId,
    index: u8,
    count: u8,
) -> Result<CpuId, CpuError> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !HYPERVISOR_LEAVES.contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx |= 1 << 31;
                entry.ebx &= 0x0000_ffff;
                entry.ebx |= u32::from(index) << 24 | u32::from(count) << 16;
            }
            0xb | 0x1f => entry.edx = index.into(),
            0x8000_001e => entry.eax = index.into(),
            _ => {}
        }
    }
    let offered = hyperv
        .as_slice()
        .iter()
        .filter(|entry| (HV_VENDOR_LEAF..=HV_LAST_LEAF).contains(&entry.function));
    for entry in offered {
        let mut entry = *entry;
        match entry.function {
            HV_VENDOR_LEAF => {
                entry.eax = HV_LAST_LEAF;
                [entry.ebx, entry.ecx, entry.edx] = HV_VENDOR;
            }
            HV_FEATURES_LEAF => {
                entry.eax &= FEATURES_EAX;
                entry.ebx &= FEATURES_EBX;
                entry.edx &= FEATURES_EDX;
            }
            HV_HINTS_LEAF => entry.eax &= HINTS_EAX,
            _ => {}
        }
        entries.push(entry);
    }
    CpuId::from_entries(&entries).map_err(list("CPUID list"))
}

/// Makes a fresh virtual CPU a Hyper-V one; the first (index 0) also starts the kernel at `entry`, the
/// others wait to be started by it.
pub(crate) fn set_up(
    vcpu: &VcpuFd,
    index: u8,
    cpuid: &CpuId,
    entry: &Entry,
) -> Result<(), CpuError> {
    let synic = kvm_enable_cap {
        cap: KVM_CAP_HYPERV_SYNIC2,
        ..Default::default()
    };
    vcpu.enable_cap(&synic).map_err(kvm("enable the SynIC"))?;
    vcpu.set_cpuid2(cpuid)
        .map_err(kvm("set the CPUID leaves"))?;
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu)?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("set the FPU state"))?;
    if index == 0 {
        set_registers(vcpu, entry)?;
    }
    Ok(())
}

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

fn set_msrs(vcpu: &VcpuFd) -> Result<(), CpuError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        // Fast string operations.
        entry(MSR_IA32_MISC_ENABLE, 1),
        // MTRRs on, everything write-back.
        entry(MSR_MTRR_DEF_TYPE, 1 << 11 | 6),
    ])
    .map_err(list("MSR list"))?;
    // The count that KVM accepted does not matter: it stops at one that this processor lacks, and a
    // guest starts without any of them.
    vcpu.set_msrs(&msrs).map_err(kvm("set MSRs"))?;
    Ok(())
}

/// LINT0 takes interrupts from the PIC, LINT1 NMIs, as firmware leaves them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), CpuError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 0x4 << 8;
    const MODE_EXTINT: u32 = 0x7 << 8;
    let mut lapic = vcpu.get_lapic().map_err(kvm("read the local APIC"))?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        let bytes = mode.to_le_bytes();
        let registers = lapic.regs.iter_mut().skip(register);
        for (to, from) in registers.zip(bytes) {
            *to = from as i8;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("set the local APIC"))
}

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// 64-bit mode on the boot page tables, at the kernel's 64-bit entry point (Documentation/arch/x86/boot.rst).
fn set_registers(vcpu: &VcpuFd, entry: &Entry) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("read system registers"))?;
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let code = segment(0x10, 0xb, 1, 0);
    let data = segment(0x18, 0x3, 0, 1);
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = BOOT_GDT.0;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PML4.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(kvm("set system registers"))?;
    let regs = kvm_regs {
        rip: entry.rip,
        rsi: entry.boot_params,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set registers"))
}

/// The values of the crash MSRs (`HV_X64_MSR_CRASH_P0` and the next four), zero when unreadable.
pub(crate) fn crash_parameters(vcpu: &VcpuFd) -> [u64; 5] {
    const CRASH_P0: u32 = 0x4000_0100;
    msrs(vcpu, CRASH_P0)
}

/// What is to be seen of a virtual CPU from outside, in words: where it is, whether it takes interrupts and
/// which wait or are being served, and whether its timer has been due.
pub(crate) fn describe(vcpu: &VcpuFd) -> String {
    // TIME_REF_COUNT, and STIMER0_CONFIG with STIMER0_COUNT.
    const REFERENCE: u32 = 0x4000_0020;
    const STIMER0: u32 = 0x4000_00b0;
    const ISR: usize = 0x100;
    const IRR: usize = 0x200;
    let regs = vcpu.get_regs().unwrap_or_default();
    let mut text = format!("at {:#x}, flags {:#x}", regs.rip, regs.rflags);
    if let Ok(state) = vcpu.get_mp_state() {
        text.push_str(match state.mp_state {
            KVM_MP_STATE_RUNNABLE => ", runnable",
            KVM_MP_STATE_HALTED => ", halted",
            _ => ", neither runnable nor halted",
        });
    }
    if let Ok(events) = vcpu.get_vcpu_events() {
        text.push_str(&format!(
            ", injected: exception {} ({}), interrupt {} ({}), NMI {}/{}",
            events.exception.nr,
            events.exception.injected,
            events.interrupt.nr,
            events.interrupt.injected,
            events.nmi.injected,
            events.nmi.pending
        ));
    }
    if let Ok(apic) = vcpu.get_lapic() {
        for (what, at) in [("waiting", IRR), ("being served", ISR)] {
            text.push_str(&format!(", {what}: {:x?}", vectors(&apic.regs, at)));
        }
    }
    let [now] = msrs(vcpu, REFERENCE);
    let [config, due] = msrs(vcpu, STIMER0);
    text.push_str(&format!(
        ", timer {config:#x} due in {} us",
        (due.wrapping_sub(now) as i64) / 10
    ));
    text
}

/// The vectors whose bits are set in the register of a local APIC that begins at `at`: 32 of its 256 bits
/// in every 16 bytes.
fn vectors(regs: &[c_char], at: usize) -> Vec<usize> {
    let is_set = |vector: &usize| {
        let byte = at + vector / 32 * 16 + vector % 32 / 8;
        let byte = regs.get(byte).copied().unwrap_or_default() as u8;
        byte & 1 << (vector % 8) != 0
    };
    (0..256).filter(is_set).collect()
}

/// The values of the MSRs from `first` on, zero when unreadable.
fn msrs<const COUNT: usize>(vcpu: &VcpuFd, first: u32) -> [u64; COUNT] {
    let mut values = [0; COUNT];
    let entries: Vec<kvm_msr_entry> = (first..)
        .take(values.len())
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    if let Ok(mut msrs) = Msrs::from_entries(&entries) {
        if vcpu.get_msrs(&mut msrs).is_ok() {
            for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
                *value = entry.data;
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    #[test]
    fn vectors_of_a_local_apic() {
        let mut regs = [0; 1024];
        for (byte, bit) in [(0x200, 0), (0x211, 3), (0x273, 7)] {
            regs[byte] = (1u8 << bit) as c_char;
        }
        assert_eq!(vectors(&regs, 0x200), [0, 32 + 8 + 3, 255]);
        assert!(vectors(&regs, 0x100).is_empty());
    }

    #[test]
    fn the_guest_sees_hyper_v_and_no_kvm() {
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0x4000_0000, 7)]).unwrap();
        let hyperv: Vec<_> = (0x4000_0000..=0x4000_000a)
            .map(|f| leaf(f, u32::MAX))
            .collect();
        let hyperv = CpuId::from_entries(&hyperv).unwrap();
        let cpuid = cpuid(&supported, &hyperv, 1, 2).unwrap();
        let find = |function| {
            let mut found = cpuid.as_slice().iter().filter(|e| e.function == function);
            (found.next().copied(), found.count())
        };
        let (Some(vendor), 0) = find(0x4000_0000) else {
            panic!("one vendor leaf");
        };
        let text: Vec<u8> = [vendor.ebx, vendor.ecx, vendor.edx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        assert_eq!(text, b"Microsoft Hv");
        assert_eq!(vendor.eax, 0x4000_0005);
        assert!(find(0x4000_000a).0.is_none());
        let (Some(first), 0) = find(1) else {
            panic!("one leaf 1");
        };
        assert_eq!((first.ebx, first.ecx), (1 << 24 | 2 << 16, 1 << 31));
        let (Some(features), 0) = find(0x4000_0003) else {
            panic!("one feature leaf");
        };
        assert_eq!(
            (features.eax, features.ebx, features.edx),
            (0xaff, 0x30, 0x84510)
        );
    }
}
