// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent nbd PORT FILE`: a program that serves a file as a network block device, to one client
//! (`doc/proto.md` of the NBD project, the old handshake, which busybox's client speaks).
//!
//! A process of its own with nothing locked or special, as such servers are.

use crate::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Flags of the handshake: there are flags, and FLUSH is understood.
const FLAGS: u32 = 1 | 4;
/// The largest request of the kernel's client is half of that.
const MAX_LENGTH: usize = 64 << 20;

/// Serves `file` to the first who connects, until that one disconnects.
pub fn serve(port: u16, file: &str) -> Result<(), Error> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let (mut client, _) = listener.accept()?;
    client.set_nodelay(true)?;
    greet(&mut client, file.metadata()?.len())?;
    loop {
        let mut request = [0; 28];
        match client.read_exact(&mut request) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let odd = || Error::Call(format!("not a request: {request:x?}"));
        let (magic, rest) = request.split_first_chunk::<4>().ok_or_else(odd)?;
        let (kind, rest) = rest.split_first_chunk::<4>().ok_or_else(odd)?;
        let (handle, rest) = rest.split_first_chunk::<8>().ok_or_else(odd)?;
        let (offset, rest) = rest.split_first_chunk::<8>().ok_or_else(odd)?;
        let length = rest.first_chunk::<4>().ok_or_else(odd)?;
        let offset = u64::from_be_bytes(*offset);
        let length = u32::from_be_bytes(*length) as usize;
        if u32::from_be_bytes(*magic) != REQUEST_MAGIC || length > MAX_LENGTH {
            return Err(odd());
        }
        // The upper half are flags of the request, of which none was offered.
        let data = match u32::from_be_bytes(*kind) & 0xffff {
            0 => read(&file, offset, length),
            1 => {
                let mut data = vec![0; length];
                client.read_exact(&mut data)?;
                file.write_all_at(&data, offset).map(|()| Vec::new())
            }
            2 => return Ok(()),
            3 => file.sync_data().map(|()| Vec::new()),
            _ => return Err(odd()),
        };
        let error = data.as_ref().err().and_then(|it| it.raw_os_error());
        let mut reply = Vec::from(REPLY_MAGIC.to_be_bytes());
        reply.extend(error.unwrap_or(0).to_be_bytes());
        reply.extend(handle);
        reply.extend(data.unwrap_or_default());
        client.write_all(&reply)?;
    }
}

fn greet(client: &mut TcpStream, size: u64) -> Result<(), Error> {
    let mut greeting = Vec::from(*b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53");
    greeting.extend(size.to_be_bytes());
    greeting.extend(FLAGS.to_be_bytes());
    greeting.extend([0; 124]);
    Ok(client.write_all(&greeting)?)
}

fn read(file: &File, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut data = vec![0; length];
    file.read_exact_at(&mut data, offset)?;
    Ok(data)
}
