// SPDX-License-Identifier: GPL-2.0-only

//! The disks that the host gives this machine, and how a FREEZE names them.
//!
//! A host speaks of a disk by its place: the controller (a GUID), port, target and unit. sysfs has the
//! same: the folder of a VMBus device is called by that GUID, and the SCSI addresses are below it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use hv_vss_uapi::Lun;
use serde::{Deserialize, Serialize};

use crate::mounts::DevId;
use crate::superblocks::dev_in;

/// A disk that the host gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDisk {
    /// The kernel's name, such as `sda`.
    pub name: String,
    /// Where it is: `GUID:port:target:unit`.
    pub address: String,
}

/// All of them, by number. What is not found at the moment is missing, as in [`crate::topology::read`].
pub fn of_host() -> BTreeMap<DevId, HostDisk> {
    const ALL: &str = "/sys/block";
    let entries = fs::read_dir(ALL).into_iter().flatten().flatten();
    let disk = |entry: fs::DirEntry| {
        let place = fs::read_link(entry.path()).ok()?;
        let disk = HostDisk {
            name: entry.file_name().into_string().ok()?,
            address: address_of_place(&place)?,
        };
        Some((dev_in(&entry.path())?, disk))
    };
    entries.filter_map(disk).collect()
}

/// The address of the disk whose place in the device tree this is:
/// `.../GUID/hostH/targetH:C:T/H:C:T:L/block/NAME`.
fn address_of_place(place: &Path) -> Option<String> {
    let mut names = place.iter().rev().skip(1).map(OsStr::to_str);
    let (block, unit, target, host) = (
        names.next()??,
        names.next()??,
        names.next()??,
        names.next()??,
    );
    let controller = names.next()??;
    let (number, unit) = unit.split_once(':')?;
    let is_scsi = block == "block"
        && target.strip_prefix("target")?.starts_with(number)
        && host.strip_prefix("host")? == number;
    let is_guid =
        controller.len() == 36 && controller.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
    (is_scsi && is_guid).then(|| format!("{controller}:{unit}"))
}

/// Where the host says that a disk is, in the same words.
pub fn address_of(lun: &Lun) -> String {
    let controller = guid(&lun.controller);
    format!("{controller}:{}:{}:{}", lun.port, lun.target, lun.lun)
}

/// A GUID as sysfs writes it; its first three fields are little-endian.
fn guid(bytes: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
    let (node, clock) = (rest.get(4..), rest.get(..4));
    format!(
        "{d:02x}{c:02x}{b:02x}{a:02x}-{f:02x}{e:02x}-{h:02x}{g:02x}-{}-{}",
        clock.unwrap_or_default(),
        node.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUS: &str = "../devices/LNXSYSTM:00/LNXSYBUS:00/ACPI0004:00/MSFT1000:00";

    #[test]
    fn host_and_machine_name_a_disk_alike() {
        let lun = Lun {
            bus_type: 1,
            controller: [
                0x29, 0x2e, 0xfa, 0x35, 0x23, 0xea, 0x36, 0x42, 0x96, 0xae, 0x3a, 0x6e, 0xba, 0xcb,
                0xa4, 0x40,
            ],
            target: 1,
            lun: 17,
            ..Lun::default()
        };
        let address = "35fa2e29-ea23-4236-96ae-3a6ebacba440:0:1:17";
        assert_eq!(address_of(&lun), address);
        let controller = "35fa2e29-ea23-4236-96ae-3a6ebacba440";
        let place = format!("{BUS}/{controller}/host12/target12:0:1/12:0:1:17/block/sdaa");
        assert_eq!(
            address_of_place(Path::new(&place)).as_deref(),
            Some(address)
        );
    }

    #[test]
    fn what_is_not_on_a_controller_of_the_host_has_no_address() {
        let controller = "35fa2e29-ea23-4236-96ae-3a6ebacba440";
        for place in [
            "../devices/virtual/block/dm-0".to_owned(),
            "sda".to_owned(),
            format!("{BUS}/{controller}/pci0000:00/0000:00:02.0/nvme/nvme0/nvme0n1"),
            "../devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sdb".to_owned(),
            "../devices/pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda"
                .to_owned(),
        ] {
            assert_eq!(address_of_place(Path::new(&place)), None, "{place}");
        }
    }
}
