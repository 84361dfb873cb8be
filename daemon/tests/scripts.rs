// SPDX-License-Identifier: GPL-2.0-only

//! Parts of the packages' scripts that are worth a look of their own, as the shell runs them.

use std::path::Path;
use std::process::Command;

/// What the shell makes of `line` after the function `name` of the script that configures the daemon.
fn with_function(name: &str, line: &str, argument: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.debian/hv-vss-daemon.postinst");
    let script = std::fs::read_to_string(script).unwrap();
    let mut lines = script.lines();
    let function = lines.find(|it| it.starts_with(&format!("{name}() {{")));
    let text = format!("{}\n{line}", function.unwrap());
    let mut shell = Command::new("sh");
    let ended = shell.args(["-c", &text, "sh", argument]).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    String::from_utf8(ended.stdout).unwrap()
}

#[test]
fn a_path_of_the_mount_table_is_read_as_the_kernel_wrote_it() {
    for (escaped, path) in [
        ("/mnt/a", "/mnt/a"),
        ("/mnt/disk\\0401", "/mnt/disk 1"),
        ("/mnt/disk\\0437\\0400", "/mnt/disk#7 0"),
        ("/mnt/\\0112\\0123", "/mnt/\t2\n3"),
        ("/mnt/back\\1340slash", "/mnt/back\\0slash"),
        ("/mnt/%s\\040%b", "/mnt/%s %b"),
    ] {
        let found = with_function("unescaped", "unescaped \"$1\"", escaped);
        assert_eq!(found, path, "{escaped}");
    }
}
