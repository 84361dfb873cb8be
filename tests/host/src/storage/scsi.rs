// SPDX-License-Identifier: GPL-2.0-only

//! A SCSI disk as a function: a command goes in, what is to be done or the sense data come out.
//!
//! Knows no memory, no store and no transport. Numbers are those of SPC-4 and SBC-3, under the names
//! that `include/scsi/scsi_proto.h` gives them; all integers are big-endian.

use crate::vmbus::protocol::Guid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Bytes of a logical block.
pub const BLOCK: usize = 512;

/// Logical blocks of a physical one, as a power of two: 4096 bytes, as with a VHDX.
const PHYSICAL_EXPONENT: u8 = 3;

/// The most that one command may move, in logical blocks: 1 MiB.
const MAX_TRANSFER: u32 = 2048;

/// The most that one WRITE SAME may write, in logical blocks.
const MAX_WRITE_SAME: u64 = 0xffff;

/// The most extents of one UNMAP.
const MAX_UNMAP_EXTENTS: u32 = 256;

/// Operation codes.
mod opcode {
    pub(super) const TEST_UNIT_READY: u8 = 0x00;
    pub(super) const REQUEST_SENSE: u8 = 0x03;
    pub(super) const READ_6: u8 = 0x08;
    pub(super) const WRITE_6: u8 = 0x0a;
    pub(super) const INQUIRY: u8 = 0x12;
    pub(super) const MODE_SENSE: u8 = 0x1a;
    pub(super) const START_STOP: u8 = 0x1b;
    pub(super) const READ_CAPACITY: u8 = 0x25;
    pub(super) const READ_10: u8 = 0x28;
    pub(super) const WRITE_10: u8 = 0x2a;
    pub(super) const SYNCHRONIZE_CACHE: u8 = 0x35;
    pub(super) const WRITE_SAME: u8 = 0x41;
    pub(super) const UNMAP: u8 = 0x42;
    pub(super) const MODE_SENSE_10: u8 = 0x5a;
    pub(super) const READ_16: u8 = 0x88;
    pub(super) const WRITE_16: u8 = 0x8a;
    pub(super) const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub(super) const WRITE_SAME_16: u8 = 0x93;
    pub(super) const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub(super) const REPORT_LUNS: u8 = 0xa0;
}

/// The service action of READ CAPACITY (16).
const READ_CAPACITY_16: u8 = 0x10;

/// Why a command was refused or failed: sense key, additional sense code and its qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Qualifier of that.
    pub ascq: u8,
}

/// Bytes of sense data in the fixed format.
pub const SENSE_LEN: usize = 18;

impl Sense {
    /// Nothing to tell.
    pub const NONE: Sense = Sense::new(0, 0, 0);
    /// The disk could not read what it has (MEDIUM ERROR, unrecovered read error).
    pub const READ_ERROR: Sense = Sense::new(3, 0x11, 0);
    /// The disk could not write (MEDIUM ERROR, write error).
    pub const WRITE_ERROR: Sense = Sense::new(3, 0x0c, 0);
    /// The disk itself is broken (HARDWARE ERROR, internal target failure).
    pub const INTERNAL_ERROR: Sense = Sense::new(4, 0x44, 0);
    /// ILLEGAL REQUEST: parameter list length error.
    pub const LIST_LENGTH: Sense = Sense::new(5, 0x1a, 0);
    /// ILLEGAL REQUEST: invalid command operation code.
    pub const INVALID_OPCODE: Sense = Sense::new(5, 0x20, 0);
    /// ILLEGAL REQUEST: logical block address out of range.
    pub const OUT_OF_RANGE: Sense = Sense::new(5, 0x21, 0);
    /// ILLEGAL REQUEST: invalid field in CDB.
    pub const INVALID_FIELD: Sense = Sense::new(5, 0x24, 0);
    /// ILLEGAL REQUEST: invalid field in parameter list.
    pub const INVALID_PARAMETER: Sense = Sense::new(5, 0x26, 0);
    /// ILLEGAL REQUEST: saving parameters not supported.
    pub const NOT_SAVED: Sense = Sense::new(5, 0x39, 0);

    /// Sense data from its three parts.
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Sense { key, asc, ascq }
    }

    /// In the fixed format, of a current error.
    pub fn bytes(self) -> [u8; SENSE_LEN] {
        let mut bytes = [0; SENSE_LEN];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = (SENSE_LEN - 8) as u8;
        bytes[12] = self.asc;
        bytes[13] = self.ascq;
        bytes
    }
}

/// A run of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first.
    pub lba: u64,
    /// How many.
    pub blocks: u64,
}

impl Extent {
    /// Where it begins, in bytes.
    pub fn offset(self) -> u64 {
        self.lba * BLOCK as u64
    }

    /// How long it is, in bytes.
    pub fn len(self) -> u64 {
        self.blocks * BLOCK as u64
    }

    /// Whether there is nothing in it.
    pub fn is_empty(self) -> bool {
        self.blocks == 0
    }
}

/// What a good command wants. Every extent lies on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Return these bytes.
    Answer(Vec<u8>),
    /// Return what is there.
    Read(Extent),
    /// Write what came with the command, which is as long.
    Write {
        /// Where.
        extent: Extent,
        /// Whether it must be on the medium when the command ends.
        fua: bool,
    },
    /// Write this one block everywhere.
    Fill {
        /// Where.
        extent: Extent,
        /// What: as long as a block.
        block: Vec<u8>,
    },
    /// Bring all that was written to the medium.
    Flush,
    /// Forget what is there: it reads as zeros.
    Discard(Vec<Extent>),
}

/// READ (10), WRITE (10), SYNCHRONIZE CACHE (10), WRITE SAME (10).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb10 {
    opcode: u8,
    flags: u8,
    lba: U32,
    group: u8,
    blocks: U16,
    control: u8,
}

const _: () = assert!(size_of::<Cdb10>() == 10);

/// The same with 16 bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb16 {
    opcode: u8,
    flags: u8,
    lba: U64,
    blocks: U32,
    group: u8,
    control: u8,
}

const _: () = assert!(size_of::<Cdb16>() == 16);

/// One of the extents in the parameter list of UNMAP.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct UnmapBlock {
    lba: U64,
    blocks: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<UnmapBlock>() == 16);

/// Force unit access, in READ and WRITE.
const FUA: u8 = 0x08;
/// RDPROTECT or WRPROTECT: what to do with protection information, of which this disk has none.
const PROTECT: u8 = 0xe0;
/// In UNMAP: anchor the blocks, which this disk does not do.
const UNMAP_ANCHOR: u8 = 0x01;
/// The same in WRITE SAME.
const WS_ANCHOR: u8 = 0x10;
/// In WRITE SAME: unmap if that gives the same.
const WS_UNMAP: u8 = 0x08;
/// In WRITE SAME (16): no block comes with the command, it is one of zeros.
const WS_NDOB: u8 = 0x01;
/// DPO and FUA are honoured, in the header of MODE SENSE's answer.
const DPOFUA: u8 = 0x10;
/// Write cache enabled, in the caching page.
const WCE: u8 = 0x04;

/// A disk as its commands see it.
#[derive(Clone, Debug)]
pub struct Unit {
    blocks: u64,
    id: Guid,
}

impl Unit {
    /// A disk of so many blocks that is told from others by `id`.
    pub fn new(blocks: u64, id: Guid) -> Self {
        Unit { blocks, id }
    }

    /// What it is told from others by.
    pub fn id(&self) -> Guid {
        self.id
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What `cdb` asks for; `data` is what came with it: nothing with a command that brings none.
    pub fn command(&self, cdb: &[u8], data: &[u8]) -> Result<Action, Sense> {
        let byte = |at: usize| cdb.get(at).copied().ok_or(Sense::INVALID_FIELD);
        let code = cdb.first().copied().ok_or(Sense::INVALID_OPCODE)?;
        match code {
            opcode::TEST_UNIT_READY | opcode::START_STOP => Ok(Action::Answer(Vec::new())),
            opcode::REQUEST_SENSE => answer(Sense::NONE.bytes().to_vec(), byte(4)?),
            opcode::INQUIRY => {
                let allocation = u16::from_be_bytes([byte(3)?, byte(4)?]);
                answer(self.inquiry(byte(1)?, byte(2)?)?, allocation)
            }
            opcode::MODE_SENSE => {
                let pages = mode_pages(byte(2)?, byte(3)?)?;
                let mut bytes = vec![(3 + pages.len()) as u8, 0, DPOFUA, 0];
                bytes.extend(pages);
                answer(bytes, byte(4)?)
            }
            opcode::MODE_SENSE_10 => {
                let pages = mode_pages(byte(2)?, byte(3)?)?;
                let mut bytes = vec![0, (6 + pages.len()) as u8, 0, DPOFUA, 0, 0, 0, 0];
                bytes.extend(pages);
                answer(bytes, u16::from_be_bytes([byte(7)?, byte(8)?]))
            }
            opcode::READ_CAPACITY => {
                let last = u32::try_from(self.blocks - 1).unwrap_or(u32::MAX);
                let mut bytes = last.to_be_bytes().to_vec();
                bytes.extend((BLOCK as u32).to_be_bytes());
                answer(bytes, u8::MAX)
            }
            opcode::SERVICE_ACTION_IN_16 if byte(1)? & 0x1f == READ_CAPACITY_16 => {
                let allocation = [byte(10)?, byte(11)?, byte(12)?, byte(13)?];
                answer(self.capacity_16(), u32::from_be_bytes(allocation))
            }
            opcode::SERVICE_ACTION_IN_16 => Err(Sense::INVALID_FIELD),
            opcode::READ_6 | opcode::WRITE_6 => {
                let lba = u32::from_be_bytes([0, byte(1)? & 0x1f, byte(2)?, byte(3)?]);
                let blocks = match byte(4)? {
                    0 => 256,
                    blocks => u32::from(blocks),
                };
                self.transfer(code == opcode::READ_6, lba.into(), blocks, false, data)
            }
            opcode::READ_10 | opcode::WRITE_10 => {
                let cdb = parse::<Cdb10>(cdb)?;
                let fua = unprotected(cdb.flags)? & FUA != 0;
                let (lba, blocks) = (cdb.lba.get().into(), cdb.blocks.get().into());
                self.transfer(code == opcode::READ_10, lba, blocks, fua, data)
            }
            opcode::READ_16 | opcode::WRITE_16 => {
                let cdb = parse::<Cdb16>(cdb)?;
                let fua = unprotected(cdb.flags)? & FUA != 0;
                let (lba, blocks) = (cdb.lba.get(), cdb.blocks.get());
                self.transfer(code == opcode::READ_16, lba, blocks, fua, data)
            }
            opcode::SYNCHRONIZE_CACHE => {
                let cdb = parse::<Cdb10>(cdb)?;
                self.extent(cdb.lba.get().into(), cdb.blocks.get().into())?;
                Ok(Action::Flush)
            }
            opcode::SYNCHRONIZE_CACHE_16 => {
                let cdb = parse::<Cdb16>(cdb)?;
                self.extent(cdb.lba.get(), cdb.blocks.get().into())?;
                Ok(Action::Flush)
            }
            opcode::WRITE_SAME => {
                let cdb = parse::<Cdb10>(cdb)?;
                let (lba, blocks) = (cdb.lba.get().into(), cdb.blocks.get().into());
                self.write_same(lba, blocks, cdb.flags & !WS_NDOB, data)
            }
            opcode::WRITE_SAME_16 => {
                let cdb = parse::<Cdb16>(cdb)?;
                self.write_same(cdb.lba.get(), cdb.blocks.get().into(), cdb.flags, data)
            }
            opcode::UNMAP => {
                if byte(1)? & UNMAP_ANCHOR != 0 {
                    return Err(Sense::INVALID_FIELD);
                }
                let list_len = u16::from_be_bytes([byte(7)?, byte(8)?]);
                self.unmap(list_len, data)
            }
            _ => Err(Sense::INVALID_OPCODE),
        }
    }

    /// A run of blocks, all of which exist.
    fn extent(&self, lba: u64, blocks: u64) -> Result<Extent, Sense> {
        match lba.checked_add(blocks) {
            Some(end) if end <= self.blocks => Ok(Extent { lba, blocks }),
            _ => Err(Sense::OUT_OF_RANGE),
        }
    }

    fn transfer(
        &self,
        is_read: bool,
        lba: u64,
        blocks: u32,
        fua: bool,
        data: &[u8],
    ) -> Result<Action, Sense> {
        let extent = self.extent(lba, blocks.into())?;
        if blocks > MAX_TRANSFER {
            return Err(Sense::INVALID_FIELD);
        }
        if is_read {
            return Ok(Action::Read(extent));
        }
        // What the transport brought must be what the command speaks of.
        if data.len() as u64 != extent.len() {
            return Err(Sense::INVALID_FIELD);
        }
        Ok(Action::Write { extent, fua })
    }

    fn write_same(&self, lba: u64, blocks: u64, flags: u8, data: &[u8]) -> Result<Action, Sense> {
        let extent = self.extent(lba, blocks)?;
        // A count of zero would mean "to the end"; the block limits page says that it is refused.
        if extent.is_empty() || blocks > MAX_WRITE_SAME || unprotected(flags)? & WS_ANCHOR != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        let zeros = [0; BLOCK];
        let block = match flags & WS_NDOB {
            0 => data.get(..BLOCK).ok_or(Sense::INVALID_FIELD)?,
            _ => &zeros,
        };
        if flags & WS_UNMAP != 0 && block == zeros {
            return Ok(Action::Discard(vec![extent]));
        }
        let block = block.to_vec();
        Ok(Action::Fill { extent, block })
    }

    fn unmap(&self, list_len: u16, data: &[u8]) -> Result<Action, Sense> {
        if list_len == 0 {
            return Ok(Action::Discard(Vec::new()));
        }
        let list = data.get(..list_len.into()).ok_or(Sense::LIST_LENGTH)?;
        let (&[_, descriptors], rest) =
            <[U16; 2]>::ref_from_prefix(list).map_err(|_| Sense::LIST_LENGTH)?;
        let rest = rest.get(4..).ok_or(Sense::LIST_LENGTH)?;
        let count = usize::from(descriptors.get()) / size_of::<UnmapBlock>();
        if count > MAX_UNMAP_EXTENTS as usize {
            return Err(Sense::INVALID_PARAMETER);
        }
        let (blocks, _) = <[UnmapBlock]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| Sense::INVALID_PARAMETER)?;
        let extents: Result<_, _> = blocks
            .iter()
            .map(|block| self.extent(block.lba.get(), block.blocks.get().into()))
            .collect();
        Ok(Action::Discard(extents?))
    }

    fn inquiry(&self, flags: u8, page: u8) -> Result<Vec<u8>, Sense> {
        match (flags & 1 != 0, page) {
            (false, 0) => Ok(standard_inquiry(0)),
            (false, _) => Err(Sense::INVALID_FIELD),
            (true, page) => {
                let body = self.vital_page(page)?;
                let mut bytes = vec![0, page];
                bytes.extend((body.len() as u16).to_be_bytes());
                bytes.extend(body);
                Ok(bytes)
            }
        }
    }

    /// A page of vital product data, without its header.
    fn vital_page(&self, page: u8) -> Result<Vec<u8>, Sense> {
        Ok(match page {
            0x00 => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
            // Unit serial number.
            0x80 => self.id.to_string().into_bytes(),
            // Device identification: binary, of the logical unit, NAA; an IEEE Registered Extended
            // name with Microsoft's company id, as the virtual disks of a real host have.
            0x83 => {
                let mut name = [0; 16];
                name[..4].copy_from_slice(&[0x60, 0x02, 0x24, 0x80]);
                name[4..].copy_from_slice(&self.id.0[4..]);
                let mut body = vec![0x01, 0x03, 0x00, name.len() as u8];
                body.extend(name);
                body
            }
            // Block limits.
            0xb0 => {
                let mut body = vec![0; 0x3c];
                // WSNZ: WRITE SAME wants a count.
                body[0] = 1;
                body[4..8].copy_from_slice(&MAX_TRANSFER.to_be_bytes());
                // Most blocks and most extents of an UNMAP, and what they are best multiples of.
                body[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
                body[20..24].copy_from_slice(&MAX_UNMAP_EXTENTS.to_be_bytes());
                body[24..28].copy_from_slice(&(1u32 << PHYSICAL_EXPONENT).to_be_bytes());
                // Most blocks of a WRITE SAME.
                body[32..40].copy_from_slice(&MAX_WRITE_SAME.to_be_bytes());
                body
            }
            // Block device characteristics: it does not rotate.
            0xb1 => {
                let mut body = vec![0; 0x3c];
                body[1] = 1;
                body
            }
            // Logical block provisioning: thin; UNMAP and both WRITE SAME do it, and it reads as zeros.
            0xb2 => vec![0, 0x80 | 0x40 | 0x20 | 0x04, 2, 0],
            _ => return Err(Sense::INVALID_FIELD),
        })
    }

    fn capacity_16(&self) -> Vec<u8> {
        let mut bytes = (self.blocks - 1).to_be_bytes().to_vec();
        bytes.extend((BLOCK as u32).to_be_bytes());
        // No protection; the physical block; provisioned thinly, and unmapped reads as zeros.
        bytes.extend([0, PHYSICAL_EXPONENT, 0x80 | 0x40, 0]);
        bytes.resize(32, 0);
        bytes
    }
}

/// The list of logical units that REPORT LUNS asks for; `None` for another command.
pub fn report_luns(
    cdb: &[u8],
    luns: impl IntoIterator<Item = u8>,
) -> Option<Result<Action, Sense>> {
    if cdb.first() != Some(&opcode::REPORT_LUNS) {
        return None;
    }
    let mut list = Vec::new();
    for lun in luns {
        // Peripheral device addressing.
        list.extend([0, lun, 0, 0, 0, 0, 0, 0]);
    }
    let mut bytes = (list.len() as u32).to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(list);
    let allocation = cdb.get(6..10).and_then(|it| it.try_into().ok());
    Some(match allocation.map(u32::from_be_bytes) {
        // Room for one unit at least (SPC-4).
        Some(allocation) if allocation >= 16 => answer(bytes, allocation),
        _ => Err(Sense::INVALID_FIELD),
    })
}

/// What INQUIRY is told where there is no disk but others beside it; `None` for another command.
pub fn absent_inquiry(cdb: &[u8]) -> Option<Result<Action, Sense>> {
    match cdb {
        [opcode::INQUIRY, flags, _, high, low, ..] => Some(match flags & 1 {
            0 => answer(standard_inquiry(0x7f), u16::from_be_bytes([*high, *low])),
            _ => Err(Sense::INVALID_FIELD),
        }),
        _ => None,
    }
}

/// The standard data of INQUIRY for a device of this type.
fn standard_inquiry(peripheral: u8) -> Vec<u8> {
    // SPC-3, response format 2, command queueing.
    let mut bytes = vec![peripheral, 0, 5, 2, 31, 0, 0, 2];
    bytes.extend(b"Msft    Virtual Disk    1.0 ");
    bytes
}

/// The mode pages that are asked for by the third and fourth byte of MODE SENSE.
fn mode_pages(page: u8, subpage: u8) -> Result<Vec<u8>, Sense> {
    const CACHING: u8 = 0x08;
    const CONTROL: u8 = 0x0a;
    const EXCEPTIONS: u8 = 0x1c;
    const ALL: u8 = 0x3f;
    const CHANGEABLE: u8 = 1;
    const SAVED: u8 = 3;
    if subpage != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    let (control, page) = (page >> 6, page & 0x3f);
    if control == SAVED {
        return Err(Sense::NOT_SAVED);
    }
    let mut pages = Vec::new();
    for (code, len, flags) in [(CACHING, 18, WCE), (CONTROL, 10, 0), (EXCEPTIONS, 10, 0)] {
        if page == code || page == ALL {
            // Nothing can be changed.
            let flags = if control == CHANGEABLE { 0 } else { flags };
            pages.extend([code, len, flags]);
            pages.resize(pages.len() + usize::from(len) - 1, 0);
        }
    }
    match pages.is_empty() {
        true => Err(Sense::INVALID_FIELD),
        false => Ok(pages),
    }
}

fn parse<T: FromBytes + KnownLayout + Immutable + Unaligned>(cdb: &[u8]) -> Result<&T, Sense> {
    let (parsed, _) = T::ref_from_prefix(cdb).map_err(|_| Sense::INVALID_FIELD)?;
    Ok(parsed)
}

/// The flags of a command that says nothing of protection information.
fn unprotected(flags: u8) -> Result<u8, Sense> {
    match flags & PROTECT {
        0 => Ok(flags),
        _ => Err(Sense::INVALID_FIELD),
    }
}

/// An answer, cut to what the initiator has room for.
fn answer(mut bytes: Vec<u8>, allocation: impl Into<u32>) -> Result<Action, Sense> {
    bytes.truncate(allocation.into() as usize);
    Ok(Action::Answer(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1000;

    fn unit() -> Unit {
        Unit::new(BLOCKS, Guid([7; 16]))
    }

    fn ask(cdb: &[u8]) -> Vec<u8> {
        match unit().command(cdb, &[]) {
            Ok(Action::Answer(bytes)) => bytes,
            other => panic!("{cdb:02x?} should have an answer, it gave {other:?}"),
        }
    }

    fn refused(cdb: &[u8], data: &[u8]) -> Sense {
        match unit().command(cdb, data) {
            Err(sense) => sense,
            Ok(action) => panic!("{cdb:02x?} should be refused, it gave {action:?}"),
        }
    }

    #[test]
    fn inquiry_names_the_disk_and_is_cut_to_the_allocation() {
        let data = ask(&[0x12, 0, 0, 0, 96, 0]);
        assert_eq!(data.len(), 36);
        assert_eq!(data[..8], [0, 0, 5, 2, 31, 0, 0, 2]);
        assert_eq!(&data[8..16], b"Msft    ");
        assert_eq!(ask(&[0x12, 0, 0, 0, 5, 0]).len(), 5);
        assert_eq!(
            refused(&[0x12, 0, 0x83, 0, 96, 0], &[]),
            Sense::INVALID_FIELD
        );
        assert_eq!(refused(&[0x12, 0, 0], &[]), Sense::INVALID_FIELD);
    }

    #[test]
    fn every_vital_page_that_is_listed_is_there_and_no_other() {
        let listed = ask(&[0x12, 1, 0, 0, 255, 0]);
        assert_eq!(listed[..4], [0, 0, 0, 6]);
        for page in 0..=255 {
            let cdb = [0x12, 1, page, 0, 255, 0];
            if listed[4..].contains(&page) {
                let data = ask(&cdb);
                assert_eq!(data[..2], [0, page]);
                assert_eq!(usize::from(data[3]), data.len() - 4, "page {page:#x}");
            } else {
                assert_eq!(refused(&cdb, &[]), Sense::INVALID_FIELD);
            }
        }
        let name = ask(&[0x12, 1, 0x83, 0, 255, 0]);
        assert_eq!(name[4..12], [1, 3, 0, 16, 0x60, 0x02, 0x24, 0x80]);
    }

    #[test]
    fn capacity_is_the_last_block_and_the_size_of_one() {
        let mut cdb = [0; 10];
        cdb[0] = 0x25;
        assert_eq!(ask(&cdb), [0, 0, 3, 0xe7, 0, 0, 2, 0]);
        let mut cdb = [0; 16];
        cdb[..2].copy_from_slice(&[0x9e, 0x10]);
        cdb[13] = 32;
        let data = ask(&cdb);
        assert_eq!(data[..12], [0, 0, 0, 0, 0, 0, 3, 0xe7, 0, 0, 2, 0]);
        assert_eq!(data[12..16], [0, 3, 0xc0, 0]);
        let huge = Unit::new(1 << 33, Guid([7; 16]));
        let Ok(Action::Answer(data)) = huge.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]) else {
            panic!("capacity");
        };
        assert_eq!(data[..4], [0xff; 4]);
    }

    #[test]
    fn reads_and_writes_of_all_lengths_mean_the_same() {
        let extent = Extent { lba: 5, blocks: 2 };
        let data = [0; 2 * BLOCK];
        let six = [0x08, 0, 0, 5, 2, 0];
        let ten = [0x28, 0, 0, 0, 0, 5, 0, 0, 2, 0];
        let mut sixteen = [0; 16];
        (sixteen[0], sixteen[9], sixteen[13]) = (0x88, 5, 2);
        for cdb in [&six[..], &ten, &sixteen] {
            assert_eq!(unit().command(cdb, &[]), Ok(Action::Read(extent)));
            let mut write = cdb.to_vec();
            write[0] += 2;
            let fua = false;
            assert_eq!(
                unit().command(&write, &data),
                Ok(Action::Write { extent, fua })
            );
            assert_eq!(refused(&write, &data[1..]), Sense::INVALID_FIELD);
            if cdb.len() > 6 {
                write[1] = FUA;
                let fua = true;
                assert_eq!(
                    unit().command(&write, &data),
                    Ok(Action::Write { extent, fua })
                );
            }
        }
        // No count means 256 in the short form only.
        let all = Extent {
            lba: 0,
            blocks: 256,
        };
        assert_eq!(
            unit().command(&[0x08, 0, 0, 0, 0, 0], &[]),
            Ok(Action::Read(all))
        );
        let none = Extent { lba: 0, blocks: 0 };
        assert_eq!(
            unit().command(&[0x28, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]),
            Ok(Action::Read(none))
        );
    }

    #[test]
    fn what_is_not_on_the_disk_is_out_of_range() {
        let end = Extent {
            lba: 999,
            blocks: 1,
        };
        assert_eq!(
            unit().command(&[0x28, 0, 0, 0, 3, 0xe7, 0, 0, 1, 0], &[]),
            Ok(Action::Read(end))
        );
        for cdb in [
            &[0x28, 0, 0, 0, 3, 0xe7, 0, 0, 2, 0][..],
            &[0x2a, 0, 0, 0, 3, 0xe8, 0, 0, 1, 0],
            &[0x35, 0, 0, 0, 3, 0xe8, 0, 0, 1, 0],
            &[0x41, 0, 0, 0, 3, 0xe8, 0, 0, 1, 0],
            &[
                0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0,
            ],
        ] {
            assert_eq!(refused(cdb, &[0; BLOCK]), Sense::OUT_OF_RANGE, "{cdb:02x?}");
        }
    }

    #[test]
    fn a_flush_is_one_whatever_its_range() {
        for cdb in [
            &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &[0x35, 0, 0, 0, 0, 9, 0, 0, 1, 0],
        ] {
            assert_eq!(unit().command(cdb, &[]), Ok(Action::Flush));
        }
        let mut cdb = [0; 16];
        cdb[0] = 0x91;
        assert_eq!(unit().command(&cdb, &[]), Ok(Action::Flush));
    }

    #[test]
    fn unmap_names_its_extents() {
        let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
        for (lba, blocks) in [(8u64, 16u32), (100, 1)] {
            list.extend(lba.to_be_bytes());
            list.extend(blocks.to_be_bytes());
            list.extend([0; 4]);
        }
        let cdb = |len: u8| [0x42, 0, 0, 0, 0, 0, 0, 0, len, 0];
        let extents = vec![
            Extent { lba: 8, blocks: 16 },
            Extent {
                lba: 100,
                blocks: 1,
            },
        ];
        assert_eq!(
            unit().command(&cdb(40), &list),
            Ok(Action::Discard(extents))
        );
        assert_eq!(
            unit().command(&cdb(0), &[]),
            Ok(Action::Discard(Vec::new()))
        );
        assert_eq!(refused(&cdb(40), &list[..39]), Sense::LIST_LENGTH);
        assert_eq!(refused(&cdb(6), &list), Sense::LIST_LENGTH);
        assert_eq!(refused(&cdb(30), &list), Sense::INVALID_PARAMETER);
        list[14] = 4;
        assert_eq!(refused(&cdb(40), &list), Sense::OUT_OF_RANGE);
    }

    #[test]
    fn what_the_block_limits_page_does_not_promise_is_refused() {
        // As many extents as it says, all of them empty, and one more.
        let list = |extents: u16| {
            let len = extents * 16;
            let mut list = (len + 6).to_be_bytes().to_vec();
            list.extend(len.to_be_bytes());
            list.resize(usize::from(len) + 8, 0);
            list
        };
        let unmap = |flags, list: &[u8]| {
            let len = (list.len() as u16).to_be_bytes();
            let cdb = [0x42, flags, 0, 0, 0, 0, 0, len[0], len[1], 0];
            unit().command(&cdb, list)
        };
        assert!(matches!(unmap(0, &list(256)), Ok(Action::Discard(all)) if all.len() == 256));
        assert_eq!(unmap(0, &list(257)), Err(Sense::INVALID_PARAMETER));
        assert_eq!(unmap(UNMAP_ANCHOR, &list(1)), Err(Sense::INVALID_FIELD));
        let large = Unit::new(1 << 20, Guid([7; 16]));
        let write_same = |flags, blocks: u32| {
            let mut cdb = [0; 16];
            (cdb[0], cdb[1]) = (0x93, WS_NDOB | flags);
            cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
            large.command(&cdb, &[])
        };
        assert!(write_same(WS_UNMAP, 0xffff).is_ok());
        assert_eq!(write_same(WS_UNMAP, 0x1_0000), Err(Sense::INVALID_FIELD));
        assert_eq!(
            write_same(WS_UNMAP | WS_ANCHOR, 8),
            Err(Sense::INVALID_FIELD)
        );
        // Nor has it protection information.
        for cdb in [
            [0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0],
            [0x2a, 0x20, 0, 0, 0, 0, 0, 0, 1, 0],
            [0x41, 0x20, 0, 0, 0, 0, 0, 0, 1, 0],
        ] {
            assert_eq!(refused(&cdb, &[0; BLOCK]), Sense::INVALID_FIELD);
        }
        for opcode in [0x88, 0x8a, 0x93] {
            let mut cdb = [0; 16];
            (cdb[0], cdb[1], cdb[13]) = (opcode, 0x20, 1);
            assert_eq!(refused(&cdb, &[0; BLOCK]), Sense::INVALID_FIELD);
        }
    }

    #[test]
    fn write_same_fills_or_unmaps() {
        let extent = Extent { lba: 0, blocks: 8 };
        let block = vec![0xab; BLOCK];
        let ten = [0x41, 0, 0, 0, 0, 0, 0, 0, 8, 0];
        let fill = unit().command(&ten, &block);
        let block = &block;
        assert_eq!(
            fill,
            Ok(Action::Fill {
                extent,
                block: block.clone()
            })
        );
        let discard = Action::Discard(vec![extent]);
        let unmap = [0x41, WS_UNMAP, 0, 0, 0, 0, 0, 0, 8, 0];
        assert_eq!(unit().command(&unmap, &[0; BLOCK]), Ok(discard.clone()));
        let mut sixteen = [0; 16];
        (sixteen[0], sixteen[1], sixteen[13]) = (0x93, WS_UNMAP | WS_NDOB, 8);
        assert_eq!(unit().command(&sixteen, &[]), Ok(discard));
        assert_eq!(refused(&ten, &block[1..]), Sense::INVALID_FIELD);
        assert_eq!(
            refused(&[0x41, 0, 0, 0, 0, 0, 0, 0, 0, 0], block),
            Sense::INVALID_FIELD
        );
    }

    #[test]
    fn mode_sense_says_that_there_is_a_write_cache_and_fua() {
        let six = ask(&[0x1a, 8, 0x08, 0, 255, 0]);
        assert_eq!(six.len(), 4 + 20);
        assert_eq!(six[..7], [23, 0, DPOFUA, 0, 0x08, 18, WCE]);
        let ten = ask(&[0x5a, 8, 0x3f, 0, 0, 0, 0, 0, 255, 0]);
        assert_eq!(ten.len(), 8 + 20 + 12 + 12);
        assert_eq!(usize::from(ten[1]), ten.len() - 2);
        assert_eq!(ten[8..11], [0x08, 18, WCE]);
        assert_eq!(ask(&[0x1a, 8, 0x48, 0, 255, 0])[6], 0);
        assert_eq!(refused(&[0x1a, 8, 0xc8, 0, 255, 0], &[]), Sense::NOT_SAVED);
        assert_eq!(
            refused(&[0x1a, 8, 0x05, 0, 255, 0], &[]),
            Sense::INVALID_FIELD
        );
        assert_eq!(
            refused(&[0x1a, 8, 0x08, 1, 255, 0], &[]),
            Sense::INVALID_FIELD
        );
    }

    #[test]
    fn units_are_reported_and_an_absent_one_says_so() {
        let cdb = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0];
        let Some(Ok(Action::Answer(list))) = report_luns(&cdb, [0, 3]) else {
            panic!("a list");
        };
        assert_eq!(list[..8], [0, 0, 0, 16, 0, 0, 0, 0]);
        assert_eq!(list[8..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
        assert!(report_luns(&[0x12, 0, 0, 0, 36, 0], [0]).is_none());
        let mut short = cdb;
        short[9] = 15;
        for refused in [&cdb[..6], &short] {
            assert!(matches!(
                report_luns(refused, [0]),
                Some(Err(Sense::INVALID_FIELD))
            ));
        }
        let absent = absent_inquiry(&[0x12, 0, 0, 0, 36, 0]);
        assert!(matches!(absent, Some(Ok(Action::Answer(data))) if data[0] == 0x7f));
        assert!(absent_inquiry(&[0, 0, 0, 0, 0, 0]).is_none());
    }

    #[test]
    fn an_unknown_command_and_any_bytes_are_refused_without_harm() {
        assert_eq!(refused(&[0xff; 16], &[]), Sense::INVALID_OPCODE);
        assert_eq!(refused(&[], &[]), Sense::INVALID_OPCODE);
        assert_eq!(Sense::OUT_OF_RANGE.bytes()[..3], [0x70, 0, 5]);
        assert_eq!(Sense::OUT_OF_RANGE.bytes()[12..14], [0x21, 0]);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        for _ in 0..100_000 {
            let cdb: Vec<u8> = (0..random() % 17).map(|_| random()).collect();
            let data: Vec<u8> = (0..random() % 64).map(|_| random()).collect();
            let on_disk = |it: &Extent| it.lba + it.blocks <= BLOCKS;
            match unit().command(&cdb, &data) {
                Ok(
                    Action::Read(extent)
                    | Action::Write { extent, .. }
                    | Action::Fill { extent, .. },
                ) => {
                    assert!(on_disk(&extent), "{cdb:02x?}");
                }
                Ok(Action::Discard(extents)) => assert!(extents.iter().all(on_disk)),
                Ok(Action::Answer(_) | Action::Flush) | Err(_) => {}
            }
        }
    }
}
