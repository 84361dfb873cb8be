// SPDX-License-Identifier: GPL-2.0-only

//! End-to-end cases: the simulated host backs up a stock Debian guest.
//!
//! Runs where the virtual machine monitor runs, with the payload that `tests/lab/run.sh` puts
//! together as its working directory: `vmlinuz`, `guest.cpio`, `hv_vss.ko`, `hv_vss_daemon`,
//! `lab-agent`. What is for people or for the build goes to `results/` there.

mod cases;
mod demo;
mod runner;

use anyhow::{ensure, Context, Result};
use clap::{Parser, Subcommand};
use e2e::guest;
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
        /// Only cases whose name matches, such as 'pairing/*'
        #[arg(default_value = "*")]
        glob: String,
    },
    /// Run the cases and count them
    Run {
        /// Only cases whose name matches, such as 'pairing/*'
        #[arg(default_value = "*")]
        glob: String,
        /// Also write the verdicts to this file, as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// How often cases that kill at random moments do so [default: 8, or fewer where that does]
        #[arg(long)]
        rounds: Option<u32>,
        /// The seed of those moments
        #[arg(long, default_value_t = cases::DEFAULT_SEED)]
        seed: u64,
    },
    /// Back up a guest once, slowly enough to read along
    Demo,
}

/// The cases whose name matches.
fn select(glob: &str) -> Result<Vec<cases::Case>> {
    let pattern = glob::Pattern::new(glob).with_context(|| format!("{glob:?} is no pattern"))?;
    let chosen: Vec<_> = cases::all()
        .into_iter()
        .filter(|case| pattern.matches(case.name))
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no case is called {glob:?}; see 'e2e list'"
    );
    Ok(chosen)
}

fn perform(action: Action) -> Result<bool> {
    match action {
        Action::List { glob } => {
            for case in select(&glob)? {
                println!("{:38} {}", case.name, case.about);
            }
            Ok(true)
        }
        Action::Run {
            glob,
            json,
            rounds,
            seed,
        } => {
            cases::set_schedule(rounds, seed);
            let mut chosen = select(&glob)?;
            chosen.retain(|case| !case.on_request || case.name == glob);
            // Cases that want the same machine stand together; their order is kept otherwise.
            chosen.sort_by_key(|case| case.machine);
            let images = guest::Images::prepare(Path::new("."))?;
            let verdicts = runner::run_all(&images, &chosen);
            let json = json.unwrap_or_else(|| images.results().join("e2e.json"));
            runner::write_json(&json, &verdicts)?;
            let comparison = images.results().join("comparison.md");
            runner::write_comparison(&comparison, &verdicts)?;
            Ok(runner::close(&verdicts))
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
