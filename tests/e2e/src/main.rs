// SPDX-License-Identifier: GPL-2.0-only

//! End-to-end cases: the simulated host backs up a stock Debian guest.
//!
//! Runs where the virtual machine monitor runs, with the payload that `tests/lab/run.sh` puts
//! together as its working directory: `vmlinuz`, `guest.cpio`, `hv_vss.ko`, `hv_vss_daemon`,
//! `lab-agent`. What is for people or for the build goes to `results/` there.

mod cases;
mod demo;
mod emulation;
mod kept;
mod origin;
mod runner;
mod seen;
mod shard;
mod table;

use anyhow::{ensure, Context, Result};
use cases::When;
use clap::builder::PossibleValuesParser;
use clap::{value_parser, Parser, Subcommand};
use e2e::guest;
use hyperv_sim::Profile;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "e2e", about = "End-to-end cases for hv_vss")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Name the cases, with one line on each
    List {
        /// Only cases whose name matches one of these, such as 'pairing/*'
        #[arg(default_value = "*")]
        globs: Vec<String>,
    },
    /// Run the cases and count them
    Run {
        /// Only cases whose name matches one of these, such as 'pairing/*'
        #[arg(default_value = "*")]
        globs: Vec<String>,
        /// Also write the verdicts to this file, as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// How often cases that kill at random moments do so [default: 8, or fewer where that does]
        #[arg(long, value_parser = value_parser!(u32).range(1..))]
        rounds: Option<u32>,
        /// The seed of those moments
        #[arg(long, default_value_t = cases::DEFAULT_SEED)]
        seed: u64,
        /// How many times longer than usual everything may take: for a slow kernel
        #[arg(long, value_name = "TIMES", default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
        patience: u32,
        /// Virtual CPUs of every guest [default: what each case is made for]
        #[arg(long, value_parser = value_parser!(u8).range(1..))]
        cpus: Option<u8>,
        /// The kind of every host [default: as with --cpus]
        #[arg(long, value_name = "KIND",
              value_parser = PossibleValuesParser::new(Profile::ALL.map(|it| it.name)))]
        host: Option<String>,
        /// Also the long ones, which otherwise run when named in full
        #[arg(long)]
        all: bool,
        /// Run only this part of them, such as 1/2
        #[arg(long, value_name = "PART")]
        shard: Option<shard::Shard>,
        /// Run nothing, and name the archives and images that the guests are made of
        #[arg(long)]
        archives: bool,
    },
    /// Add up what the parts of a run have left, and count it; no case may be missing
    Sum {
        /// The cases that the run was of, as they were named to it
        #[arg(default_value = "*")]
        globs: Vec<String>,
        /// The verdicts of a part, one for each
        #[arg(long = "part", value_name = "FILE", required = true)]
        parts: Vec<PathBuf>,
        /// Where to write them together
        #[arg(long, value_name = "FOLDER")]
        results: PathBuf,
        /// Also the long ones, as it was told
        #[arg(long)]
        all: bool,
        /// Its kernel does not take our module
        #[arg(long)]
        stock: bool,
    },
    /// Merge runs into what was seen before, and make the tables of tests/RESULTS.md from it
    Tables {
        /// What was seen before
        #[arg(long, value_name = "FILE")]
        seen: PathBuf,
        /// The verdicts of runs on the usual kernel; what the last of them saw counts
        #[arg(long, value_name = "FILE", num_args = 1..)]
        run: Vec<PathBuf>,
        /// Where each other kernel has a folder of its name, and in that the verdicts of its run
        #[arg(long, value_name = "FOLDER")]
        kernels: PathBuf,
        /// Where to write comparison.md, matrix.md and kernels.md
        #[arg(long, value_name = "FOLDER")]
        results: PathBuf,
    },
    /// Back up a guest once, slowly enough to read along
    Demo,
}

/// The cases whose name matches one of the patterns, in their usual order.
fn select(globs: &[String]) -> Result<Vec<cases::Case>> {
    let mut patterns = Vec::new();
    for glob in globs {
        patterns.push(glob::Pattern::new(glob).with_context(|| format!("{glob:?} is no pattern"))?);
    }
    let all = cases::all();
    // A case that is not run is not seen to be missing.
    let is_of_none = |it: &&glob::Pattern| !all.iter().any(|case| it.matches(case.name));
    let of_none: Vec<&str> = patterns
        .iter()
        .filter(is_of_none)
        .map(|it| it.as_str())
        .collect();
    ensure!(
        of_none.is_empty(),
        "no case is called {}; see 'e2e list'",
        of_none.join(" or ")
    );
    let is_chosen = |case: &cases::Case| patterns.iter().any(|it| it.matches(case.name));
    Ok(all.into_iter().filter(is_chosen).collect())
}

/// The cases of a run: those of [`select`] that are in each run, with `all` also the long ones, and
/// those that are named in full. Without our module there are none that ask it, and it says so.
fn choose(globs: &[String], all: bool, has_module: bool) -> Result<Vec<cases::Case>> {
    let mut chosen = select(globs)?;
    chosen.retain(|case| {
        let wanted = case.when == When::Always || (all && case.when == When::All);
        wanted || globs.iter().any(|glob| glob == case.name)
    });
    if !has_module {
        chosen.retain(|case| {
            if case.asks_our_module {
                println!("left out, for want of our module: {}", case.name);
            }
            !case.asks_our_module
        });
    }
    Ok(chosen)
}

/// What the guests of these cases are made of.
fn parts_of(cases: &[cases::Case]) -> BTreeSet<&'static str> {
    cases.iter().flat_map(|it| it.machine.parts()).collect()
}

/// Says how a run went, and whether everything passed.
fn report(verdicts: &[runner::Verdict]) -> bool {
    runner::print_slowest(verdicts);
    runner::close(verdicts)
}

/// Merges what runs there were into what was seen before, and makes the tables of that. The comparison and the
/// matrix are of the usual kernel alone.
fn make_tables(kept: &Path, runs: &[PathBuf], kernels: &Path, results: &Path) -> Result<()> {
    let mut seen = seen::Seen::read(kept)?;
    let mut by_age = Vec::new();
    for run in runs {
        let modified = std::fs::metadata(run).and_then(|it| it.modified());
        by_age.push((modified.with_context(|| run.display().to_string())?, run));
    }
    by_age.sort();
    for (_, run) in by_age {
        let verdicts = runner::read_json(run)?;
        seen.merge(&verdicts);
        seen.merge_kernel("default", &verdicts);
    }
    // None was run where there is no folder.
    for folder in std::fs::read_dir(kernels).into_iter().flatten() {
        let folder = folder?;
        let run = folder.path().join("results/e2e.json");
        if run.exists() {
            let name = folder.file_name();
            seen.merge_kernel(&name.to_string_lossy(), &runner::read_json(&run)?);
        }
    }
    seen.write(kept)?;
    std::fs::create_dir_all(results)
        .with_context(|| format!("cannot make {}", results.display()))?;
    for (name, text) in tables_of(&seen) {
        let path = results.join(format!("{name}.md"));
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The tables of tests/RESULTS.md, by what it calls them, each with where what it says was seen.
fn tables_of(seen: &seen::Seen) -> [(&'static str, String); 3] {
    let cases = cases::all();
    let places = cases::matrix_of(|fault, stage, stack| seen.cell(fault, stage, stack));
    let stacks = cases::Stack::ALL.map(cases::Stack::words);
    let shown = places
        .iter()
        .flat_map(|it| stacks.map(|stack| (it.fault, it.stage, stack)));
    [
        (
            "comparison",
            seen.comparison(&cases),
            seen.origin_of_comparison(&cases),
        ),
        (
            "matrix",
            table::matrix(&places, &stacks),
            seen.origin_of_cells(shown),
        ),
        (
            "kernels",
            seen.kernels(&cases),
            seen.origin_of_kernels(&cases),
        ),
    ]
    .map(|(name, table, origin)| (name, format!("{table}\n{origin}")))
}

fn perform(action: Action) -> Result<bool> {
    match action {
        Action::List { globs } => {
            for case in select(&globs)? {
                let why = case.machine.one_cpu.map(|why| format!(" [one CPU: {why}]"));
                println!("{:38} {}{}", case.name, case.about, why.unwrap_or_default());
            }
            Ok(true)
        }
        Action::Run {
            globs,
            json,
            rounds,
            seed,
            patience,
            cpus,
            host,
            all,
            shard,
            archives,
        } => {
            if archives {
                for name in parts_of(&choose(&globs, all, true)?) {
                    println!("{name}");
                }
                return Ok(true);
            }
            cases::set_schedule(rounds, seed);
            let images = guest::Images::prepare(Path::new("."))?.with_patience(patience);
            let mut chosen = choose(&globs, all, images.has_module())?;
            let host = Profile::ALL
                .into_iter()
                .find(|it| host.as_deref() == Some(it.name));
            for case in &mut chosen {
                if let Some(cpus) = cpus {
                    case.machine.cpus = cpus;
                    case.machine.one_cpu = None;
                }
                case.machine.host = host.unwrap_or(case.machine.host);
            }
            // Cases that want the same machine stand together; their order is kept otherwise.
            chosen.sort_by_key(|case| case.machine);
            if let Some(shard) = shard {
                chosen = shard.of(chosen);
            }
            let json = json.unwrap_or_else(|| images.results().join("e2e.json"));
            let kept = kept::Kept::named()?;
            let before = kept.as_ref().map_or_else(Vec::new, kept::Kept::read);
            if !before.is_empty() {
                println!("an attempt before this one has run {} cases", before.len());
            }
            // Whatever becomes of the next case.
            let keep = |verdicts: &[runner::Verdict]| -> Result<()> {
                runner::write_json(&json, verdicts)?;
                kept.as_ref().map_or(Ok(()), |kept| kept.write(verdicts))
            };
            let commit = origin::Commit::read(Path::new("commit"))?;
            let verdicts = runner::run_all(&images, &chosen, commit.as_ref(), before, keep)?;
            Ok(report(&verdicts))
        }
        Action::Sum {
            globs,
            parts,
            results,
            all,
            stock,
        } => {
            let expected = choose(&globs, all, !stock)?;
            let verdicts = shard::collect(&parts, &expected)?;
            runner::write_json(&results.join("e2e.json"), &verdicts)?;
            Ok(report(&verdicts))
        }
        Action::Tables {
            seen,
            run,
            kernels,
            results,
        } => {
            make_tables(&seen, &run, &kernels, &results)?;
            Ok(true)
        }
        Action::Demo => {
            let images = guest::Images::prepare(Path::new("."))?;
            demo::run(&images)?;
            Ok(true)
        }
    }
}

fn main() -> ExitCode {
    match perform(Arguments::parse().action) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_asked_for_no_times() {
        let parses =
            |option, count| Arguments::try_parse_from(["e2e", "run", option, count]).is_ok();
        for option in ["--rounds", "--patience", "--cpus"] {
            assert!(parses(option, "1") && !parses(option, "0"), "{option}");
        }
    }

    /// Of the kernels' table the sums change with each new case, and a comparison may wait for its case to be run.
    #[test]
    fn the_results_have_the_tables_of_what_was_seen_and_no_cell_is_unknown() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let results = std::fs::read_to_string(root.join("tests/RESULTS.md")).unwrap();
        let seen = seen::Seen::read(&root.join("tests/e2e/seen.json")).unwrap();
        for (name, text) in tables_of(&seen) {
            assert!(
                name == "comparison" || !text.contains(table::NOT_RUN),
                "{name}"
            );
            let begin = format!("<!-- {name}: ");
            let end = format!("<!-- end of {name} -->");
            let (_, begun) = results.split_once(&begin).unwrap();
            let (_, lines) = begun.split_once('\n').unwrap();
            let (table, _) = lines.split_once(&end).unwrap();
            assert!(
                name == "kernels" || table == text,
                "'make {name}' changes tests/RESULTS.md"
            );
        }
    }

    #[test]
    fn what_is_large_is_asked_for_by_those_who_need_it() {
        let archives = |globs: &[&str], all| {
            let globs: Vec<String> = globs.iter().map(|it| it.to_string()).collect();
            parts_of(&choose(&globs, all, true).unwrap())
        };
        let ours = ["guest.cpio", "payload.cpio"];
        assert_eq!(archives(&["pairing/*"], false), ours.into());
        assert!(archives(&["systemd/*"], true).contains("systemd.cpio"));
        assert!(archives(&["databases/mariadb"], false).contains("databases.cpio"));
        assert!(archives(&["packages/boot"], false).contains("packages.cpio"));
        let upgrade = archives(&["packages/kernel-upgrade"], false);
        assert!(upgrade.contains("older.cpio") && upgrade.contains("packages.cpio"));
        assert!(!archives(&["*"], true).contains("older.cpio"));
        assert!(archives(&["packages/page"], false).contains("mariadb.ext4"));
    }
}
