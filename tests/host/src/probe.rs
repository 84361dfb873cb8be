// SPDX-License-Identifier: GPL-2.0-only

//! Can this machine's `/dev/kvm` play Hyper-V? If not, what is missing?

use crate::bus::chain;
use crate::kvm;
use kvm_bindings::{
    KVM_CAP_HYPERV, KVM_CAP_HYPERV_CPUID, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_TIME,
    KVM_CAP_HYPERV_VP_INDEX,
};
use kvm_ioctls::Kvm;

/// What KVM must be able to do, and its number.
const NEEDED: [(&str, u32); 5] = [
    ("hypercalls (KVM_CAP_HYPERV)", KVM_CAP_HYPERV),
    (
        "the reference clock (KVM_CAP_HYPERV_TIME)",
        KVM_CAP_HYPERV_TIME,
    ),
    ("SynICs (KVM_CAP_HYPERV_SYNIC2)", KVM_CAP_HYPERV_SYNIC2),
    (
        "VP indices (KVM_CAP_HYPERV_VP_INDEX)",
        KVM_CAP_HYPERV_VP_INDEX,
    ),
    (
        "Hyper-V CPUID leaves (KVM_CAP_HYPERV_CPUID)",
        KVM_CAP_HYPERV_CPUID,
    ),
];

/// What of KVM's Hyper-V interface is missing here, in words; empty when nothing is.
pub fn missing() -> Vec<String> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return vec![format!("/dev/kvm cannot be opened: {}", chain(&error))],
    };
    let mut missing: Vec<String> = NEEDED
        .iter()
        .filter(|(_, number)| kvm.check_extension_raw((*number).into()) <= 0)
        .map(|(name, _)| format!("KVM lacks {name}"))
        .collect();
    if missing.is_empty() {
        if let Err(error) = kvm::supported_hyperv_cpuid(&kvm) {
            missing.push(format!(
                "KVM cannot list its Hyper-V CPUID leaves: {}",
                chain(&error)
            ));
        }
    }
    missing
}
