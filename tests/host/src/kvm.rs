// SPDX-License-Identifier: GPL-2.0-only

//! The unsafe edge towards KVM: guest memory, the ioctl that kvm-ioctls lacks, and the payload of a
//! Hyper-V exit. Each door is safe; nothing else in this crate is unsafe.

use crate::synic::Registers;
use kvm_bindings::{
    kvm_cpuid2, kvm_userspace_memory_region, CpuId, KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL,
    KVM_EXIT_HYPERV_SYNIC, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use vmm_sys_util::ioctl_iowr_nr;

/// The `KVMIO` magic of `linux/kvm.h`.
const KVMIO: u32 = 0xAE;

ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);

/// Makes `memory` the guest's memory and keeps it so: the caller holds a clone of `memory` for as
/// long as `vm` exists.
pub(crate) fn set_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> errno::Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let host_address = memory
            .get_host_address(region.start_addr())
            .map_err(|_| errno::Error::new(libc::EFAULT))?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host_address as u64,
        };
        // SAFETY: the range is one mapping of `memory`, which the caller keeps; the regions of
        // a GuestMemoryMmap do not overlap, and neither do the slots.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

/// What the guest reads as its reference time now (`HV_X64_MSR_TIME_REF_COUNT`, and the page with the same
/// scale), in units of 100 ns: KVM makes both of its clock (`get_time_ref_counter` and
/// `compute_tsc_page_parameters` in `arch/x86/kvm/hyperv.c`).
pub(crate) fn reference_time(vm: &VmFd) -> errno::Result<u64> {
    Ok(vm.get_clock()?.clock / 100)
}

/// The Hyper-V CPUID leaves that this KVM can serve (`KVM_GET_SUPPORTED_HV_CPUID`).
pub(crate) fn supported_hyperv_cpuid(kvm: &Kvm) -> errno::Result<CpuId> {
    let mut cpuid =
        CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| errno::Error::new(libc::ENOMEM))?;
    // SAFETY: the pointer leads to a kvm_cpuid2 with room for as many entries as its `nent` says,
    // and the kernel writes no more than that.
    let result = unsafe {
        ioctl_with_mut_ptr(
            kvm,
            KVM_GET_SUPPORTED_HV_CPUID(),
            cpuid.as_mut_fam_struct_ptr(),
        )
    };
    if result < 0 {
        return errno::errno_result();
    }
    Ok(cpuid)
}

/// What a Hyper-V exit is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HypervExit {
    /// The guest wrote a SynIC register; these are all of them now.
    Synic(Registers),
    /// A hypercall that KVM leaves to us; it wants a result.
    Hypercall { input: u64, params: [u64; 2] },
    /// Something that was never asked for.
    Other(u32),
}

/// The payload of the Hyper-V exit that `run` has just returned with; `None` when it was another.
pub(crate) fn hyperv_exit(vcpu: &mut VcpuFd) -> Option<HypervExit> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_HYPERV {
        return None;
    }
    // SAFETY: the exit reason says that the kernel filled in this member, and all bit patterns of it
    // are valid.
    let exit = unsafe { run.__bindgen_anon_1.hyperv };
    Some(match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: as above, by the exit's own type.
            let synic = unsafe { exit.u.synic };
            HypervExit::Synic(Registers {
                control: synic.control,
                message_page: synic.msg_page,
                event_page: synic.evt_page,
            })
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above, by the exit's own type.
            let call = unsafe { exit.u.hcall };
            HypervExit::Hypercall {
                input: call.input,
                params: call.params,
            }
        }
        other => HypervExit::Other(other),
    })
}

/// Sets the result of the hypercall that the last exit was about, for the next `run` to pick up.
pub(crate) fn set_hypercall_result(vcpu: &mut VcpuFd, result: u64) {
    let run = vcpu.get_kvm_run();
    // Writing a Copy field of a union is safe; the kernel reads it for a hypercall exit only.
    run.__bindgen_anon_1.hyperv.u.hcall.result = result;
}
