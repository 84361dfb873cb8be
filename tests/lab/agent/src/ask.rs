// SPDX-License-Identifier: GPL-2.0-only

//! `lab-agent ask`: a call of a varlink service, whose reply is printed.

use crate::error::Error;
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// Calls this method, which takes no parameters, of the service at `socket`.
pub fn ask(socket: &str, method: &str) -> Result<(), Error> {
    let mut line = UnixStream::connect(socket)?;
    line.write_all(format!("{}\0", json!({ "method": method })).as_bytes())?;
    let mut reply = Vec::new();
    BufReader::new(line).read_until(0, &mut reply)?;
    println!("{}", String::from_utf8_lossy(&reply).trim_end_matches('\0'));
    Ok(())
}
