// SPDX-License-Identifier: GPL-2.0-only

//! What the kernel of a guest may log at the level of a warning or worse, in which cases, and why. All else
//! fails the case: see [`crate::guest::Guest::check_log`]. What only one part of a case brings about is
//! expected there, with [`crate::guest::Guest::expect_in_log`].

/// A text that a report may have.
struct Known {
    text: &'static str,
    /// In these cases: a name, or all that begin with what stands before a `*`.
    cases: &'static [&'static str],
    /// Why it is nothing that is wrong.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is for people"))]
    why: &'static str,
}

/// What each guest says.
const EVERYWHERE: &[&str] = &["*"];

/// Where a machine is sent to sleep without a place for its image.
const SLEEPS: &[&str] = &[
    "matrix/hibernated*",
    "owned/hibernated",
    "sleep/*",
    "suspend/*",
];

/// Where a request runs out before its daemon has answered it.
const RUNS_OUT: &[&str] = &[
    "abi/*",
    "deadman/*",
    "dialogue/*",
    "foreign/*",
    "hostile/*",
    "lifecycle/*",
    "matrix/*",
    "owned/*",
    "sleep/*",
    "slow/*",
    "suspend/*",
];

const KNOWN: &[Known] = &[
    Known {
        text: "rtc_cmos rtc_cmos: only 24-hr supported",
        cases: EVERYWHERE,
        why: "the simulated host has no clock on the old ports, which all read 0",
    },
    Known {
        text: "amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled",
        cases: EVERYWHERE,
        why: "the guest's processor is one of AMD's that has none, and 6.12 takes every such for broken",
    },
    Known {
        text: "device-mapper: core: CONFIG_IMA_DISABLE_HTABLE is disabled",
        cases: EVERYWHERE,
        why: "so says 6.12's when it is loaded, once in a boot",
    },
    Known {
        text: "EXPERIMENTAL Large extent counts feature in use",
        cases: EVERYWHERE,
        why: "what mkfs.xfs makes today was new in 6.1",
    },
    Known {
        text: "hrtimer: interrupt took ",
        cases: EVERYWHERE,
        why: "so it does under emulation when the machine is busy elsewhere, and once in a boot the kernel says so",
    },
    Known {
        text: "hv_vss: loading out-of-tree module taints kernel",
        cases: EVERYWHERE,
        why: "so it is, once in a boot",
    },
    Known {
        text: "hv_vss: module verification failed: signature and/or required key missing",
        cases: EVERYWHERE,
        why: "it is not Debian's own, once in a boot",
    },
    Known {
        text: "reboot: Power down",
        cases: EVERYWHERE,
        why: "the last word of a kernel that does as it is told, which it says to everybody",
    },
    Known {
        text: "Failed to send WATCHDOG=1 notification message: Connection refused",
        cases: &["packages/*", "systemd/*"],
        why: "journald still runs when systemd has gone to turn off the machine, for long on a slow one",
    },
    Known {
        text: "reboot: Restarting system",
        cases: &["tp-qemu/*"],
        why: "the same of one that is to begin anew",
    },
    Known {
        text: "cmd 0x35 status: scsi 0x0 srb 0x20",
        cases: EVERYWHERE,
        why: "the driver flushes a disk once more that the host has taken off, as it does behind each case",
    },
    Known {
        text: "hv_vss_may_warn: ",
        cases: &["abi/*", "hostile/*"],
        why: "how many lines of the module's were left out by its own limit, where it is flooded",
    },
    Known {
        text: "storvsc_on_io_completion: ",
        cases: EVERYWHERE,
        why: "how many lines of the same it has left out",
    },
    Known {
        text: "): time is over",
        cases: RUNS_OUT,
        why: "nobody answers a request there, which the module fails when its time is over",
    },
    Known {
        text: ") at once: ",
        cases: &[
            "abi/debugfs",
            "hostile/*",
            "sleep/*",
            "suspend/request-open",
        ],
        why: "the host asks there before a sleep, before a daemon has given up its last FREEZE, or for too much",
    },
    Known {
        text: "THAW fails, its freeze would be from before the module was loaded",
        cases: EVERYWHERE,
        why: "many a case begins with a THAW, to see that nothing is frozen",
    },
    Known {
        text: "did not last (reason",
        cases: &[
            "abi/*",
            "commands/*",
            "control/*",
            "databases/*",
            "deadman/*",
            "dialogue/*",
            "foreign/*",
            "freeze/*",
            "hooks/*",
            "hostile/*",
            "judges/*",
            "lifecycle/*",
            "lis/*",
            "matrix/*",
            "owned/*",
            "packages/*",
            "restore/lost-thaw",
            "scope/*",
            "sleep/*",
            "suspend/*",
            "systemd/*",
            "tp-qemu/*",
        ],
        why: "a freeze ends before its THAW there, by a death, a deadline or a sleep",
    },
    Known {
        text: "hv_vss: refused a write of the daemon: no such request is open",
        cases: RUNS_OUT,
        why: "an answer comes when the request is over",
    },
    Known {
        text: "hv_vss: refused a write of the daemon",
        cases: &["abi/*", "hostile/*"],
        why: "the case is the daemon, and writes what is wrong",
    },
    Known {
        text: "that is no VSS message",
        cases: &["abi/*", "hostile/*"],
        why: "the host sends packets that are none",
    },
    Known {
        text: "hv_vss: the host offers no version that this module speaks",
        cases: &["abi/host-offers-*", "hostile/*"],
        why: "it does not",
    },
    Known {
        text: "hv_vss: an answer could not be sent to the host",
        cases: &[
            "dialogue/answer-not-sent",
            "lifecycle/daemon-comes-back",
            "lifecycle/ends",
            "lifecycle/rescind*",
            "lifecycle/second-device",
            "matrix/rescinded*",
            "owned/device-gone-in-a-hung-freeze",
        ],
        why: "the host leaves no room for it in the ring, or takes that back while a request is open, or as soon as it \
              has read the answer, while hv_ringbuffer_write() is still at it",
    },
    Known {
        text: "ring indices out of range",
        cases: &["hostile/ring-header"],
        why:
            "the host writes such into the ring's header, and the kernel's own driver says so, too",
    },
    Known {
        text: "hv_vmbus: probe failed for device",
        cases: &[
            "lifecycle/open-refused",
            "lifecycle/other-class",
            "lifecycle/second-device",
        ],
        why: "our module refuses the device, or the host the channel",
    },
    Known {
        text: "probe with driver hv_vss failed with error",
        cases: &["lifecycle/open-refused", "lifecycle/second-device"],
        why: "the same, as the kernel's core says it",
    },
    Known {
        text: "PM: Cannot find swap device, try swapon -a",
        cases: SLEEPS,
        why: "there is none, so that the machine leaves the bus and comes back at once",
    },
    Known {
        text: "PM: Cannot get swap writer",
        cases: SLEEPS,
        why: "the same",
    },
    Known {
        text: "Aborting journal on device",
        cases: &["broken/disk-gone", "broken/read-only-since-an-error", "broken/shut-down"],
        why: "what an ext4 does after an error, which is what the case is about",
    },
    Known {
        text: "Trying to write to read-only block-device",
        cases: &["broken/write-protected"],
        why: "its disk becomes write-protected under it",
    },
    Known {
        text: "invoked oom-killer",
        cases: &["deadman/daemon-out-of-memory*", "matrix/out-of-memory*", "systemd/hook-out-of-memory"],
        why: "the daemon is left no memory, or a hook's process is to be taken",
    },
    Known {
        text: "Out of memory and no killable processes",
        cases: &["deadman/daemon-out-of-memory*", "matrix/out-of-memory*"],
        why: "the last of them is on its way out",
    },
    Known {
        text: "Emergency Thaw",
        cases: &["owned/*"],
        why: "SysRq-j is pressed",
    },
    Known {
        text: "raid: raid456 discard support disabled",
        cases: &["broken/raid-journal"],
        why: "a RAID with parity is made on ram disks",
    },
    Known {
        text: "raid: Set dm-raid.devices_handle_discard_safely",
        cases: &["broken/raid-journal"],
        why: "the same in its next line",
    },
    Known {
        text: "md: async del_gendisk mode will be removed in future",
        cases: &["broken/*", "deadman/hung-below-md", "order/*", "scope/*", "volumes/*"],
        why: "md says so of any program that is not its newest, busybox's among them",
    },
    Known {
        text: "shutting down sockets",
        cases: &["order/nbd*", "scope/raw-writer"],
        why: "the program that serves the device ends",
    },
    Known {
        text: "bitmap file is out of date",
        cases: &["volumes/*"],
        why: "for a moment md's count of events is ahead of its bitmap's, and a copy may be of that moment",
    },
    Known {
        text: "scsi_debug: trim poll_queues to 0",
        cases: &["broken/disk-gone", "scope/not-known-to-be-hardware"],
        why: "the kernel's simulated disk has no more queues than processors",
    },
    Known {
        text: "Power-on or device reset occurred",
        cases: &["broken/disk-gone", "scope/not-known-to-be-hardware"],
        why: "it says so when it is added",
    },
    Known {
        text: "Using fanotify permission checks may lead to deadlock; tainting kernel",
        cases: &["control/*", "deadman/*", "foreign/*", "freeze/*", "hooks/*"],
        why: "a security agent is among the programs of the guest",
    },
];

/// Whether `pattern` means this case.
fn matches(pattern: &str, case: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => case.starts_with(start),
        None => case == pattern,
    }
}

/// The names of cases of which something is known, and that none of these has.
pub fn of_none<'a>(cases: impl Iterator<Item = &'a str> + Clone) -> Vec<&'static str> {
    let patterns = KNOWN.iter().flat_map(|it| it.cases).copied();
    let is_of_none = |it: &&str| !cases.clone().any(|case| matches(it, case));
    patterns.filter(is_of_none).collect()
}

/// The texts that are known of a case.
pub fn of(case: &str) -> Vec<&'static str> {
    let is_of = |it: &&Known| it.cases.iter().any(|pattern| matches(pattern, case));
    KNOWN.iter().filter(is_of).map(|it| it.text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_case_is_known_of_no_other() {
        let text = "Emergency Thaw";
        assert!(of("owned/our-daemon").contains(&text));
        assert!(!of("pairing/ours-ours").contains(&text));
        assert!(of("pairing/ours-ours").contains(&KNOWN[0].text));
        assert_eq!(of(""), of("pairing/ours-ours"));
        let oom = "invoked oom-killer";
        assert!(of("matrix/out-of-memory-peer").contains(&oom));
        assert!(!of("matrix/panic").contains(&oom));
        // A FREEZE of a backup that is to be good is not refused.
        let refused = ") at once: ";
        assert!(of("sleep/snapshot-device").contains(&refused));
        assert!(!of("freeze/mixed").contains(&refused));
    }

    #[test]
    fn each_says_why() {
        assert!(KNOWN
            .iter()
            .all(|it| !it.why.is_empty() && !it.cases.is_empty()));
    }
}
