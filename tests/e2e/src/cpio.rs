// SPDX-License-Identifier: GPL-2.0-only

//! Writes a cpio archive in the kernel's "newc" form
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Just enough for an archive that follows the guest's own in the initial RAM file system:
//! directories and files, all owned by root.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An archive in the making.
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Archive { out, inode: 0 }
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, 0o040755, &[])
    }

    /// Adds an executable file.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.entry(name, 0o100755, bytes)
    }

    /// Adds the directory `from` as `name`, with all that is in it and with the permissions there.
    pub fn tree(&mut self, name: &str, from: &Path) -> io::Result<()> {
        self.directory(name)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            let name = format!("{name}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                self.tree(&name, &entry.path())?;
            } else {
                let mode = 0o100000 | entry.metadata()?.mode() & 0o777;
                self.entry(&name, mode, &std::fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    /// Ends the archive and returns what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        self.inode += 1;
        write!(self.out, "070701")?;
        // Inode, mode, owner, group, links, time, size, two device numbers twice, length of the
        // name with its zero, and a checksum that this form does not use.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        // Header (110 bytes) with name, and the data, are each padded to four bytes.
        self.out.write_all(name.as_bytes())?;
        self.pad_after(110 + name.len(), 1)?;
        self.out.write_all(bytes)?;
        self.pad_after(bytes.len(), 0)
    }

    fn pad_after(&mut self, written: usize, at_least: usize) -> io::Result<()> {
        let padding = (written + at_least).next_multiple_of(4) - written;
        self.out.write_all(&[0; 4][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("a").expect("memory");
        archive.file("a/b", b"hello").expect("memory");
        let bytes = archive.finish().expect("memory");
        assert!(bytes.starts_with(b"07070100000001000041ed"));
        // The directory: 110 bytes, "a" and its zero, no data.
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..126], b"07070100000002");
        // The file: its size, its name padded to 116 bytes, its data padded to 8.
        assert_eq!(&bytes[112 + 54..112 + 62], b"00000005");
        assert_eq!(&bytes[112 + 110..112 + 116], b"a/b\0\0\0");
        assert_eq!(&bytes[228..236], b"hello\0\0\0");
        assert_eq!(&bytes[236 + 110..], b"TRAILER!!!\0\0\0\0");
    }
}
