// SPDX-License-Identifier: GPL-2.0-only

//! Compares the C header with its Rust mirror: every structure, field, size, offset and constant.
//!
//! The Rust side writes down what it believes as C assertions, and the C compiler judges them: as
//! C99, as C++ and for 32-bit. Names that one side has and the other lacks are found by reading the
//! header's text. Needs a C and a C++ compiler that can do `-m32`.

use hv_vss_uapi as uapi;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A field: its C name, offset and size in bytes.
type Field = (&'static str, usize, usize);

/// A structure of the mirror under its C name.
struct Layout {
    name: &'static str,
    size: usize,
    fields: Vec<Field>,
}

/// Size of the field that `_get` picks.
fn size_of_field<T, F>(_get: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// `layout!("c_name", RustName { field, rust_field as "c_field" })`
macro_rules! layout {
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $c:literal) => { $c };
    ($name:literal, $type:ident { $($field:ident $(as $c:literal)?),* $(,)? }) => {{
        // Fails to compile when the list is not the whole structure.
        #[allow(dead_code)]
        fn whole(value: uapi::$type) { let uapi::$type { $($field: _),* } = value; }
        Layout {
            name: $name,
            size: size_of::<uapi::$type>(),
            fields: vec![$((
                layout!(@name $field $($c)?),
                std::mem::offset_of!(uapi::$type, $field),
                size_of_field(|value: &uapi::$type| &value.$field),
            )),*],
        }
    }};
}

fn layouts() -> Vec<Layout> {
    vec![
        layout!(
            "hv_vss_hdr",
            VssHdr {
                operation,
                reserved
            }
        ),
        layout!("hv_vss_msg", VssMsg { hdr as "vss_hdr", flags as "vss_cf" }),
        layout!(
            "hv_vss_frame",
            FrameHdr {
                version,
                size,
                kind,
                reserved,
                id
            }
        ),
        layout!(
            "hv_vss_register",
            Register {
                frame,
                max_version,
                features
            }
        ),
        layout!(
            "hv_vss_registered",
            Registered {
                frame,
                abi_version,
                max_frame,
                features,
                max_held
            }
        ),
        layout!(
            "hv_vss_request",
            Request {
                frame,
                time_left_ms,
                payload_size,
                msg,
                fixed_size
            }
        ),
        layout!(
            "hv_vss_answer",
            Answer {
                frame,
                status,
                operation
            }
        ),
        layout!(
            "hv_vss_thawed",
            Thawed {
                frame,
                reason,
                reserved
            }
        ),
        layout!(
            "hv_vss_ioc_freeze",
            IocFreeze {
                id,
                fd,
                flags,
                deadline_ms,
                count,
                reserved
            }
        ),
        layout!("hv_vss_ioc_thaw", IocThaw { id, fd, flags }),
        layout!(
            "hv_vss_lun",
            Lun {
                bus_type,
                reserved,
                controller,
                port,
                target,
                lun,
                reserved2
            }
        ),
        layout!(
            "hv_vss_freeze_info",
            FreezeInfo {
                backup_type,
                flags,
                lun_count,
                luns
            }
        ),
    ]
}

/// Constants of the mirror under their C names.
fn constants() -> Vec<(&'static str, u64)> {
    vec![
        ("VSS_OP_CREATE", uapi::op::CREATE.into()),
        ("VSS_OP_DELETE", uapi::op::DELETE.into()),
        ("VSS_OP_HOT_BACKUP", uapi::op::HOT_BACKUP.into()),
        ("VSS_OP_GET_DM_INFO", uapi::op::GET_DM_INFO.into()),
        ("VSS_OP_BU_COMPLETE", uapi::op::BU_COMPLETE.into()),
        ("VSS_OP_FREEZE", uapi::op::FREEZE.into()),
        ("VSS_OP_THAW", uapi::op::THAW.into()),
        ("VSS_OP_AUTO_RECOVER", uapi::op::AUTO_RECOVER.into()),
        ("VSS_OP_REGISTER", uapi::op::REGISTER.into()),
        ("VSS_OP_REGISTER1", uapi::op::REGISTER1.into()),
        (
            "VSS_HBU_NO_AUTO_RECOVERY",
            uapi::HBU_NO_AUTO_RECOVERY.into(),
        ),
        ("HV_S_OK", uapi::status::OK.into()),
        ("HV_E_FAIL", uapi::status::FAIL.into()),
        ("HV_ERROR_NOT_SUPPORTED", uapi::status::NOT_SUPPORTED.into()),
        ("HV_VSS_ABI_V2", uapi::ABI_V2.into()),
        ("HV_VSS_FRAME_REGISTER", uapi::frame::REGISTER.into()),
        ("HV_VSS_FRAME_REGISTERED", uapi::frame::REGISTERED.into()),
        ("HV_VSS_FRAME_REQUEST", uapi::frame::REQUEST.into()),
        ("HV_VSS_FRAME_ANSWER", uapi::frame::ANSWER.into()),
        ("HV_VSS_FRAME_THAWED", uapi::frame::THAWED.into()),
        ("HV_VSS_THAWED_DEADLINE", uapi::thawed::DEADLINE.into()),
        ("HV_VSS_THAWED_OPERATOR", uapi::thawed::OPERATOR.into()),
        ("HV_VSS_THAWED_CRASH", uapi::thawed::CRASH.into()),
        ("HV_VSS_THAWED_FOREIGN", uapi::thawed::FOREIGN.into()),
        ("HV_VSS_THAWED_SLEEP", uapi::thawed::SLEEP.into()),
        ("HV_VSS_THAWED_CALLED_OFF", uapi::thawed::CALLED_OFF.into()),
        ("HV_VSS_THAWED_GONE", uapi::thawed::GONE.into()),
        ("HV_VSS_FEATURE_HOLD", uapi::feature::HOLD.into()),
        ("HV_VSS_FEATURE_PATHS", uapi::feature::PATHS.into()),
        ("HV_VSS_IOC_FREEZE", uapi::IOC_FREEZE.into()),
        ("HV_VSS_IOC_THAW", uapi::IOC_THAW.into()),
        ("HV_VSS_MAX_LUNS", uapi::MAX_LUNS as u64),
        ("HV_VSS_MAX_FRAME", uapi::MAX_FRAME as u64),
    ]
}

fn room() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    let path = room().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What the Rust side believes, as C that compiles only if it is true.
fn assertions() -> String {
    let mut c = String::from(
        "#include <stddef.h>\n#include \"hv_vss.h\"\n\
         #define CLAIM(name, truth) typedef char name[(truth) ? 1 : -1]\n\
         #define FIELD(type, field) sizeof(((struct type *)0)->field)\n",
    );
    for Layout { name, size, fields } in layouts() {
        writeln!(c, "CLAIM(size_{name}, sizeof(struct {name}) == {size});").unwrap();
        for (field, offset, size) in fields {
            writeln!(
                c,
                "CLAIM(at_{name}_{field}, offsetof(struct {name}, {field}) == {offset});\n\
                 CLAIM(long_{name}_{field}, FIELD({name}, {field}) == {size});"
            )
            .unwrap();
        }
    }
    for (name, value) in constants() {
        writeln!(c, "CLAIM(is_{name}, {name} == {value}UL);").unwrap();
    }
    c
}

/// The three ways in which the header must compile: a name, the compiler, its arguments.
const WAYS: [(&str, &str, &[&str]); 3] = [
    ("c99", "cc", &["-x", "c", "-std=c99"]),
    ("c++", "c++", &["-x", "c++"]),
    ("c99 for 32-bit", "cc", &["-x", "c", "-std=c99", "-m32"]),
];

/// Compiles `source` in one of the [`WAYS`]; `Err` holds what the compiler said.
fn compile(way: usize, source: &Path) -> Result<(), String> {
    let (_, compiler, arguments) = WAYS[way];
    let output = Command::new(compiler)
        .args([
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-I",
        ])
        .arg(room())
        .args(arguments)
        .arg(source)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {compiler}: {e}"));
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn scratch(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path
}

#[test]
fn header_agrees_with_the_mirror() {
    let source = scratch("layout.c", &assertions());
    for (way, (name, ..)) in WAYS.iter().enumerate() {
        compile(way, &source).unwrap_or_else(|said| panic!("as {name}:\n{said}"));
    }
}

/// The comparison is worth something only if it can fail.
#[test]
fn a_wrong_claim_is_found() {
    for (at, wrong) in [
        "sizeof(struct hv_vss_answer) == 33",
        "HV_VSS_FRAME_THAWED == 6",
    ]
    .iter()
    .enumerate()
    {
        let text = assertions() + &format!("CLAIM(wrong, {wrong});\n");
        let source = scratch(&format!("wrong{at}.c"), &text);
        for (way, (name, ..)) in WAYS.iter().enumerate() {
            assert!(compile(way, &source).is_err(), "'{wrong}' passed as {name}");
        }
    }
}

#[test]
fn example_compiles_everywhere() {
    let source = room().join("examples/hv_vss_example.c");
    for (way, (name, ..)) in WAYS.iter().enumerate() {
        compile(way, &source).unwrap_or_else(|said| panic!("as {name}:\n{said}"));
    }
}

#[test]
fn header_has_nothing_that_the_mirror_lacks() {
    let text = without_comments(&read("hv_vss.h"));

    let defined: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("#define "))
        .map(|rest| rest.split_whitespace().next().unwrap())
        .filter(|name| *name != "HV_VSS_H")
        .collect();
    let known: BTreeSet<_> = constants()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("HV_VSS_"))
        .collect();
    assert_eq!(defined, known, "constants of the header and of the mirror");

    // `struct name { type field; ... };` with one field a line.
    let mut declared = BTreeSet::new();
    for part in text.split("\nstruct ").skip(1) {
        let (name, rest) = part.split_once(" {").expect("a structure has a body");
        let (body, _) = rest.split_once("\n};").expect("a body ends");
        for line in body.lines().filter(|line| line.contains(';')) {
            let field = line.trim().trim_end_matches(';');
            let field = field.rsplit(' ').next().unwrap();
            let field = field.split('[').next().unwrap();
            declared.insert(format!("{name}.{field}"));
        }
    }
    let mirrored: BTreeSet<_> = layouts()
        .into_iter()
        .filter(|layout| !matches!(layout.name, "hv_vss_hdr" | "hv_vss_msg"))
        .flat_map(|l| {
            l.fields
                .into_iter()
                .map(move |f| format!("{}.{}", l.name, f.0))
        })
        .collect();
    assert_eq!(declared, mirrored, "fields of the header and of the mirror");
}

#[test]
fn mirror_has_nothing_that_this_test_lacks() {
    let text = read("hv_vss.rs");
    let public = |word: &str| {
        text.lines()
            .filter(|line| line.trim_start().starts_with(word))
            .count()
    };
    // Except `DEVICE_NAME`, which C spells as a string where it opens the device, and `IOC_TYPE`, which
    // is part of the ioctls' numbers.
    assert_eq!(
        public("pub const "),
        constants().len() + 2 + PUBLIC_CONST_FNS
    );
    assert_eq!(public("pub struct "), layouts().len());
}

/// `pub const fn` of `VssMsg`.
const PUBLIC_CONST_FNS: usize = 3;

/// C without its comments, tabs as blanks.
fn without_comments(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("/*") {
        plain.push_str(before);
        rest = after.split_once("*/").expect("a comment ends").1;
    }
    plain.push_str(rest);
    plain.replace('\t', " ")
}

/// The names with `HV_VSS_` in a text.
fn names_in(text: &str) -> BTreeSet<&str> {
    let is_of_a_name = |it: char| it.is_ascii_uppercase() || it.is_ascii_digit() || it == '_';
    text.split(|it| !is_of_a_name(it))
        .filter(|it| it.starts_with("HV_VSS_"))
        .collect()
}

#[test]
fn the_page_tells_of_each_frame_and_command_and_of_no_other() {
    let page = read("hv_vss.4");
    let told = names_in(&page);
    let constants = constants();
    let known: BTreeSet<_> = constants.iter().map(|(name, _)| *name).collect();
    for kind in ["HV_VSS_FRAME_", "HV_VSS_FEATURE_", "HV_VSS_IOC_"] {
        for name in known.iter().filter(|it| it.starts_with(kind)) {
            assert!(told.contains(name), "hv_vss(4) lacks {name}");
        }
    }
    // What ends so stands for all that begin so.
    let told = told.iter().filter(|it| !it.ends_with('_'));
    let unknown: Vec<_> = told.filter(|it| !known.contains(*it)).collect();
    assert!(unknown.is_empty(), "hv_vss(4) tells of {unknown:?}");
}

#[test]
fn the_page_tells_of_each_parameter_of_the_module_with_its_default() {
    // `name: u32 {` and, below it, `default: 1_000,`.
    let module = read("../kmod/hv_vss.rs");
    let mut parameters = BTreeSet::new();
    for (before, after) in module.match_indices(": u32 {").map(|(at, it)| {
        let after = &module[at + it.len()..];
        (&module[..at], after)
    }) {
        let name = before.split_whitespace().next_back().unwrap();
        let default = after.split_once("default: ").unwrap().1;
        let default = default.split_once(',').unwrap().0.replace('_', "");
        parameters.insert((name.to_owned(), default));
    }
    assert!(!parameters.is_empty(), "the module has parameters");
    let page = read("hv_vss.4");
    let section = page.split_once("\n.SH PARAMETERS\n").unwrap().1;
    let section = section.split_once("\n.SH ").unwrap().0;
    let told: BTreeSet<_> = section
        .lines()
        .filter_map(|line| line.strip_prefix(".BR ")?.split_once(" \" ("))
        .map(|(name, default)| {
            let default = default.trim_end_matches(")\"");
            (name.to_owned(), default.to_owned())
        })
        .collect();
    assert_eq!(
        told, parameters,
        "parameters of hv_vss(4) and of the module"
    );
}
