// SPDX-License-Identifier: GPL-2.0-only

//! Runs cases one after the other, each with a time limit, and hands guests on between them.
//!
//! A guest in which a case passed, and which could be brought back to where it started, serves the
//! next case that wants the same kind. Any other is ended and reported. Knows nothing of what a
//! case is about.

use crate::cases::Case;
use crate::emulation::impossible_interrupt;
use anyhow::{anyhow, Context, Result};
use e2e::guest::{Cell, Comparison, Guest, Images};
use hyperv_sim::Exit;
use serde::{Deserialize, Serialize};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most that one case may take, without its rounds and the boot of its guest.
const CASE_LIMIT: Duration = Duration::from_secs(90);

/// How long a case may go on once its guest is dead, before it is left behind.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How one case went.
#[derive(Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// The case's.
    pub name: String,
    passed: bool,
    seconds: f64,
    error: Option<String>,
    /// Whether it was begun again on another machine: see [`Failed::Machine`].
    #[serde(default)]
    again: bool,
    comparisons: Vec<Comparison>,
    /// Of the matrix.
    #[serde(default)]
    pub cells: Vec<Cell>,
}

/// What the verdict on a case says that has none.
const MISSING: &str = "it was not run, or its run did not end";

impl Verdict {
    /// Of a case that was to be run, and of which no run has left a word.
    pub fn missing(name: &str) -> Verdict {
        Verdict {
            name: name.to_string(),
            passed: false,
            seconds: 0.0,
            error: Some(MISSING.into()),
            again: false,
            comparisons: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// Whether there is anything to say of the case.
    pub fn was_run(&self) -> bool {
        self.error.as_deref() != Some(MISSING)
    }

    /// Of a case that passed at once.
    #[cfg(test)]
    pub fn passed(name: &str) -> Verdict {
        Verdict {
            passed: true,
            error: None,
            ..Verdict::missing(name)
        }
    }
}

/// How often in one run a case is begun again: machines that stand still more often are no accident.
const MOST_AGAIN: usize = 2;

/// Why a case has not passed.
enum Failed {
    /// It was not as it should be.
    Case(anyhow::Error),
    /// Its machine has stood still: no program in it answers anything, or its processor did what none
    /// does. The emulation has been seen to do that once in some hundred cases. Nothing is known of the
    /// case then; it is begun once more, elsewhere, and the last lines say so.
    Machine(anyhow::Error),
}

/// Runs `cases` and returns how each went.
pub fn run_all(images: &Images, cases: &[Case]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let mut idle: Option<Guest> = None;
    let mut booted = 0;
    for case in cases {
        let guest = match idle.take().filter(|guest| guest.machine() == case.machine) {
            Some(guest) => Ok(guest),
            None => {
                booted += 1;
                let start = Instant::now();
                let guest = Guest::start(images, case.machine, booted);
                if guest.is_ok() {
                    let took = start.elapsed().as_secs_f64();
                    println!(
                        "     guest {booted} ({}) is up after {took:.1} s",
                        case.machine
                    );
                }
                guest
            }
        };
        let start = Instant::now();
        let mut outcome = guest
            .map_err(Failed::Case)
            .and_then(|guest| run_one(case, guest));
        let taken = verdicts.iter().filter(|it: &&Verdict| it.again).count();
        let again = match &outcome {
            Err(Failed::Machine(error)) if taken < MOST_AGAIN => {
                println!("     the machine of {} stands still: {error:#}", case.name);
                booted += 1;
                println!("     again on guest {booted}");
                true
            }
            _ => false,
        };
        if again {
            outcome = Guest::start(images, case.machine, booted)
                .map_err(Failed::Case)
                .and_then(|guest| run_one(case, guest));
        }
        let seconds = start.elapsed().as_secs_f64();
        let (mut comparisons, mut cells) = (Vec::new(), Vec::new());
        let error = match outcome {
            Ok(passed) => {
                idle = passed.guest;
                comparisons = passed.comparisons;
                cells = passed.cells;
                println!("ok   {} ({seconds:.1} s)", case.name);
                None
            }
            Err(Failed::Case(error) | Failed::Machine(error)) => {
                let error = format!("{error:#}");
                println!("FAIL {} ({seconds:.1} s)", case.name);
                for line in error.lines() {
                    println!("     {line}");
                }
                Some(error)
            }
        };
        verdicts.push(Verdict {
            name: case.name.to_string(),
            passed: error.is_none(),
            seconds,
            error,
            again,
            comparisons,
            cells,
        });
    }
    verdicts
}

/// What a case that passed leaves.
struct Passed {
    /// `None` when the case has ended its guest on purpose.
    guest: Option<Guest>,
    comparisons: Vec<Comparison>,
    cells: Vec<Cell>,
}

/// Runs one case. On failure the guest is ended and what it left behind is in the error.
fn run_one(case: &Case, guest: Guest) -> Result<Passed, Failed> {
    let limit = CASE_LIMIT + case.per_round * crate::cases::rounds();
    let limit = guest.host().patience(limit);
    let guest = Arc::new(guest);
    let (tell, told) = channel();
    let run = case.run;
    let shared = guest.clone();
    let worker = std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| run(&shared)));
        // The guest goes first, so that the receiver holds the only handle.
        drop(shared);
        let _ = tell.send(result.unwrap_or_else(|panic| Err(anyhow!(panic_text(&*panic)))));
    });
    let result = match told.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(anyhow!("the case ended without a word")),
        Err(RecvTimeoutError::Timeout) => {
            let still = guest.stands_still();
            let report = guest.post_mortem();
            guest.vm().kill();
            // With the guest gone every wait of the case ends in an error, which says where it was.
            let place = match told.recv_timeout(LAST_WORDS) {
                Ok(Err(error)) => format!("it was here: {error:#}"),
                _ => "it did not even stop when its guest was ended".to_string(),
            };
            let error = anyhow!("the case did not end within {limit:?}; {place}\n{report}");
            return Err(match still {
                true => Failed::Machine(error),
                false => Failed::Case(error),
            });
        }
    };
    let _ = worker.join();
    let result = result.and_then(|()| match guest.vm().exit() {
        None => guest.tidy().context("afterwards the guest was not clean"),
        Some(Exit::PowerOff) => Ok(()),
        Some(exit) => Err(anyhow!("the guest ended by itself: {exit:?}")),
    });
    match result {
        Ok(()) => Ok(Passed {
            comparisons: guest.take_comparisons(),
            cells: guest.take_cells(),
            guest: Arc::into_inner(guest).filter(|guest| guest.vm().exit().is_none()),
        }),
        Err(error) => {
            let still = guest.stands_still();
            let report = guest.post_mortem();
            guest.vm().kill();
            let console = guest.vm().console();
            Err(match impossible_interrupt(&console) {
                Some(line) => Failed::Machine(anyhow!(
                    "an interrupt with interrupts off ({line}): {error:#}\n{report}"
                )),
                None if still => Failed::Machine(anyhow!("{error:#}\n{report}")),
                None => Failed::Case(anyhow!("{error:#}\n{report}")),
            })
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the case panicked: {}", text.unwrap_or("no message"))
}

/// How many of the slowest cases are named.
const SLOWEST: usize = 10;

/// Names the cases that took longest.
pub fn print_slowest(verdicts: &[Verdict]) {
    let mut slowest: Vec<&Verdict> = verdicts.iter().collect();
    slowest.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    println!("the slowest cases:");
    for verdict in slowest.iter().take(SLOWEST) {
        println!("{:7.1} s  {}", verdict.seconds, verdict.name);
    }
}

/// Prints the closing lines and says whether everything passed. Of a case that failed they have what
/// it said first, for whoever sees no more than the end.
pub fn close(verdicts: &[Verdict]) -> bool {
    let failed = verdicts.iter().filter(|it| !it.passed).count();
    for verdict in verdicts {
        if let Some(error) = &verdict.error {
            let first = error.lines().next().unwrap_or_default();
            println!("failed: {}: {first}", verdict.name);
        }
    }
    for verdict in verdicts.iter().filter(|it| it.again) {
        let name = &verdict.name;
        println!("begun again, since its first machine stood still: {name} (console-*.log)");
    }
    println!("{} passed, {failed} failed", verdicts.len() - failed);
    failed == 0
}

/// Writes what ours and the peer were seen to do as a table in Markdown.
pub fn write_comparison(path: &Path, verdicts: &[Verdict]) -> Result<()> {
    let mut text = String::from(
        "| situation | ours | stock hv_utils, Debian's daemon |\n| --- | --- | --- |\n",
    );
    for row in verdicts.iter().flat_map(|it| &it.comparisons) {
        text.push_str(&format!("| {} | {} | {} |\n", row.what, row.ours, row.peer));
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the verdicts as a JSON list.
pub fn write_json(path: &Path, verdicts: &[Verdict]) -> Result<()> {
    let text = serde_json::to_string_pretty(verdicts)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
