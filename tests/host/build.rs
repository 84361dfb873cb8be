// SPDX-License-Identifier: GPL-2.0-only

//! Tells the crate whether the kernel's bindings of the wire are there: `HV_WIRE_BINDINGS` is where
//! `tests/lab/wire.sh` has put them. Without them there is nothing to compare with in `tests/wire.rs`.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(wire_bindings)");
    println!("cargo::rerun-if-env-changed=HV_WIRE_BINDINGS");
    if std::env::var_os("HV_WIRE_BINDINGS").is_some() {
        println!("cargo::rustc-cfg=wire_bindings");
    }
}
