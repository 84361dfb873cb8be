// SPDX-License-Identifier: GPL-2.0-only

//! What only a machine that emulates its processor wrongly can do, read off a guest's console.

/// The trace of a guest that took an interrupt of a device or timer while it had interrupts off, if there
/// is one: its line. No processor does that. QEMU's emulation of nested virtualisation does, once in
/// many hours, and delivers the same interrupt twice: the guest then runs in its kernel with the base
/// register of user space, and ends.
///
/// As its source reads (not proven): `helper_vmrun` leaves the vector that it has injected as the pending
/// exception, and when another thread kicks the processor's before anything else clears that, as the one
/// that frees what is read under RCU does, it is delivered again, this time as an exception, which also
/// sets RF in the flags of the second frame.
pub fn impossible_interrupt(console: &str) -> Option<&str> {
    let mut lines = console.lines();
    while let Some(line) = lines.next() {
        // Of a frame that the unwinder is sure of; a maskable interrupt's entry is called so.
        if !line.contains(" asm_sysvec_") || line.contains(" ? ") || line.contains("RIP:") {
            continue;
        }
        // What it interrupted follows: RIP, the code there, RSP and the flags.
        let flags = lines.clone().take(3).find_map(|it| {
            let (_, flags) = it.split_once("EFLAGS: ")?;
            u64::from_str_radix(flags.trim(), 16).ok()
        });
        if flags.is_some_and(|it| it & INTERRUPTS_ON == 0) {
            return Some(line.trim());
        }
    }
    None
}

/// RFLAGS.IF
const INTERRUPTS_ON: u64 = 1 << 9;

#[cfg(test)]
mod tests {
    use super::*;

    const TWICE: &str = "\
[   70.714417]  ? early_xen_iret_patch+0x5/0x5
[   70.718065]  sysvec_hyperv_stimer0+0xe/0x90
[   70.721646]  asm_sysvec_hyperv_stimer0+0x1a/0x20
[   70.725638] RIP: 0010:asm_sysvec_hyperv_stimer0+0x0/0x20
[   70.730595] Code: a6 1b 15 01 e9 51 05
[   70.745478] RSP: 0000:fffffe4dd41fffd8 EFLAGS: 00010046
[   70.780273] RIP: 0033:0x5638f3e19bfd
";

    #[test]
    fn an_interrupt_where_there_can_be_none_is_told_from_any_other() {
        assert!(impossible_interrupt(TWICE).is_some_and(|it| it.contains("0x1a/0x20")));
        let on = TWICE.replace("00010046", "00010246");
        assert_eq!(impossible_interrupt(&on), None);
        // An exception may come at any time.
        let exception = TWICE.replace("asm_sysvec_hyperv_stimer0+0x1a", "asm_exc_page_fault+0x26");
        assert_eq!(impossible_interrupt(&exception), None);
        assert_eq!(impossible_interrupt(""), None);
    }
}
