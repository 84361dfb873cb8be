// SPDX-License-Identifier: GPL-2.0-only

//! The mount table: what is mounted where, from `mountinfo` in procfs.
//!
//! Lines are taken apart by `procfs-core`; what it leaves as it stands in the file (octal escapes,
//! the difference between a mount's and a superblock's options) is put right here. It looks at no
//! path and opens nothing but the table itself.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use nix::fcntl::{openat, OFlag};
use nix::sys::stat::Mode;
use procfs_core::process::MountInfo;
use procfs_core::ProcError;
use serde::{de::Error as _, Deserialize, Deserializer, Serialize, Serializer};

/// Why the mount table could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The table could not be read.
    #[error("cannot read the mount table of namespace {namespace}")]
    Read {
        /// Which namespace, as in [`Mount::namespace`].
        namespace: usize,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A line is not in the form that proc(5) describes.
    #[error("line {number} of the mount table is malformed: {line}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// The line, with bytes outside ASCII escaped.
        line: String,
        /// What the parser said.
        source: ProcError,
    },
    /// The third column is not `major:minor`.
    #[error("line {number} of the mount table has a malformed device number: {value}")]
    Device {
        /// Counted from 1.
        number: usize,
        /// The column as it stands.
        value: String,
    },
}

/// The number of a device, or of a superblock that is on none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevId {
    /// Major number; 0 for superblocks without a block device of their own.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DevId {
    /// From a `dev_t` as `stat(2)` has it.
    pub fn from_raw(dev: u64) -> Self {
        DevId {
            major: libc::major(dev),
            minor: libc::minor(dev),
        }
    }
}

impl fmt::Display for DevId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DevId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(DevId {
            major: major.parse().map_err(drop)?,
            minor: minor.parse().map_err(drop)?,
        })
    }
}

impl Serialize for DevId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DevId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map_err(|()| D::Error::custom(format!("no device number: {text}")))
    }
}

/// One line of a mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Which mount namespace shows it: 0 is the daemon's own, others count from 1.
    pub namespace: usize,
    /// The mount's id, unique among those that exist.
    pub id: u64,
    /// The id of the mount it is attached to.
    pub parent: u64,
    /// The superblock's device number, the same for each mount of the same superblock.
    pub dev: DevId,
    /// Which directory (or file) of the file system is mounted.
    pub root: PathBuf,
    /// Where, as seen from the namespace's root.
    pub path: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
    /// What the mounter named as the source: a device node or any other text.
    pub source: Option<OsString>,
    /// Whether the *superblock* is writable, whatever this mount's own options are.
    pub writable: bool,
}

/// Where the kernel shows a thread the table of the namespace that it is in.
pub const OWN_TABLE: &str = "thread-self/mountinfo";

/// Reads the table of the namespace that the calling thread is in, as that of number `namespace`.
/// `proc` is the root directory of a procfs, open, since a namespace need not have one.
pub fn read(proc: BorrowedFd<'_>, namespace: usize) -> Result<Vec<Mount>, MountsError> {
    parse(&read_text(proc, namespace)?, namespace)
}

/// The same table as the kernel writes it.
pub fn read_text(proc: BorrowedFd<'_>, namespace: usize) -> Result<Vec<u8>, MountsError> {
    let failed = |source| MountsError::Read { namespace, source };
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let fd = openat(proc, OWN_TABLE, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    // Large reads: the fewer there are, the less can change in between.
    let mut text = vec![0; 1 << 16];
    let mut length = 0;
    loop {
        if length == text.len() {
            text.resize(length * 2, 0);
        }
        let room = text.get_mut(length..).unwrap_or_default();
        match nix::unistd::read(&fd, room).map_err(|e| failed(e.into()))? {
            0 => break,
            count => length += count,
        }
    }
    text.truncate(length);
    Ok(text)
}

/// Takes a whole table apart.
pub fn parse(text: &[u8], namespace: usize) -> Result<Vec<Mount>, MountsError> {
    text.split(|&b| b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| parse_line(line, index + 1, namespace))
        .collect()
}

fn parse_line(line: &[u8], number: usize, namespace: usize) -> Result<Mount, MountsError> {
    let line = escape(line);
    let info = MountInfo::from_line(&line).map_err(|source| MountsError::Line {
        number,
        line: line.clone(),
        source,
    })?;
    let dev = info.majmin.parse().map_err(|()| MountsError::Device {
        number,
        value: info.majmin.clone(),
    })?;
    Ok(Mount {
        namespace,
        id: info.mnt_id.unsigned_abs().into(),
        parent: info.pid.unsigned_abs().into(),
        dev,
        root: unescape(info.root.as_bytes()).into(),
        path: unescape(info.mount_point.as_os_str().as_bytes()).into(),
        fs_type: info.fs_type,
        source: info.mount_source.map(|s| unescape(s.as_bytes())),
        writable: info.super_options.contains_key("rw"),
    })
}

/// Turns bytes outside ASCII into the octal escapes that the kernel uses for blanks, so that names
/// in any encoding pass through the parser, which wants UTF-8.
pub fn escape(line: &[u8]) -> String {
    let mut out = String::with_capacity(line.len());
    for &b in line {
        if b.is_ascii() {
            out.push(b.into());
        } else {
            out.push_str(&format!("\\{b:03o}"));
        }
    }
    out
}

/// Undoes octal escapes (`\040` for a blank); a backslash before anything else stands for itself.
fn unescape(mut text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        text = rest;
        if first == b'\\' {
            if let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] = rest {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                text = tail;
                continue;
            }
        }
        out.push(first);
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const TABLE: &[u8] = b"\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro\n\
40 22 8:17 / /mnt/a\\040b\\012c\\134d rw shared:9 master:2 - xfs /dev/sdb1 rw,attr2\n\
41 22 8:17 /sub /ro ro,relatime - xfs /dev/sdb1 rw,attr2\n\
42 22 0:50 / /tmp/l\xe9 rw - tmpfs none rw\n";

    #[test]
    fn escapes_and_other_encodings_become_the_real_path() {
        let mounts = parse(TABLE, 0).unwrap();
        assert_eq!(mounts[1].path, Path::new("/mnt/a b\nc\\d"));
        assert_eq!(mounts[3].path.as_os_str().as_bytes(), b"/tmp/l\xe9");
        assert_eq!(mounts[3].source, None);
    }

    #[test]
    fn a_read_only_bind_mount_of_a_writable_superblock_is_writable() {
        let mounts = parse(TABLE, 3).unwrap();
        assert_eq!(mounts[2].path, Path::new("/ro"));
        assert!(mounts[2].writable);
        assert_eq!(mounts[2].namespace, 3);
        assert_eq!(mounts[2].dev.to_string(), "8:17");
    }

    #[test]
    fn a_malformed_line_is_an_error_that_names_it() {
        let error = parse(b"22 1 259:2 / / rw\n", 0).unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
        let error = parse(b"22 1 x / / rw - ext4 /dev/a rw\n", 0).unwrap_err();
        assert!(error.to_string().contains("device number: x"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(text in proptest::collection::vec(0u8.., 0..200)) {
            let _ = parse(&text, 0);
        }

        #[test]
        fn unescape_undoes_what_the_kernel_does(name in proptest::collection::vec(0u8.., 0..40)) {
            let mangled: Vec<u8> = name.iter().flat_map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}").into_bytes(),
                _ => vec![*b],
            }).collect();
            let found = unescape(escape(&mangled).as_bytes());
            proptest::prop_assert_eq!(found.as_bytes(), &name);
        }
    }
}
