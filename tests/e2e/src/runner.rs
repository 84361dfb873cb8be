// SPDX-License-Identifier: GPL-2.0-only

//! Runs cases one after the other, each with a time limit, and hands guests on between them.
//!
//! A guest in which a case passed, and which could be brought back to where it started, serves the
//! next case that wants the same kind. Any other is ended and reported. Knows nothing of what a
//! case is about.

use crate::cases::Case;
use crate::emulation::impossible_interrupt;
use crate::origin::{Commit, Origin};
use anyhow::{anyhow, Context, Result};
use e2e::guest::{Cell, Comparison, Guest, Images, Kernel, Standstill};
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
    /// Why there was nothing to be seen: [`Skipped`].
    #[serde(default)]
    skipped: Option<String>,
    /// What the guest ran, if there was one and it began on the kernel under test.
    #[serde(default)]
    pub kernel: Option<Kernel>,
    /// Of which tree it was run, if that is known.
    #[serde(default)]
    pub commit: Option<Commit>,
    /// What became of the first machine when the case was begun again on another: see [`Failed::Machine`].
    #[serde(default)]
    again: Option<Again>,
    /// What ours and the peer were seen to do; of a case that passed.
    #[serde(default)]
    pub comparisons: Vec<Comparison>,
    /// Of the matrix, of whatever case.
    #[serde(default)]
    pub cells: Vec<Cell>,
}

/// What a case ends with that finds nothing to look at on this kernel: it has neither passed nor failed.
#[derive(Debug, thiserror::Error)]
#[error("nothing to be seen: {0}")]
pub struct Skipped(pub &'static str);

/// A machine on which a case could not be judged.
#[derive(Debug, Serialize, Deserialize)]
struct Again {
    /// What was seen there.
    error: String,
    /// Whether its kernel went on.
    kernel_answered: bool,
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
            skipped: None,
            kernel: None,
            commit: None,
            again: None,
            comparisons: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// Whether there is anything to say of the case.
    pub fn was_run(&self) -> bool {
        self.error.as_deref() != Some(MISSING)
    }

    /// Where all that it says was seen.
    pub fn origin(&self) -> Origin {
        Origin {
            commit: self.commit.clone(),
            release: self.kernel.as_ref().map(|it| it.release.clone()),
        }
    }

    /// Whether there is nothing wrong with it.
    pub fn has_passed(&self) -> bool {
        self.passed
    }

    /// Whether there was nothing to be seen.
    pub fn was_skipped(&self) -> bool {
        self.skipped.is_some()
    }

    /// Of a case that did not pass.
    #[cfg(test)]
    pub fn failed(name: &str) -> Verdict {
        Verdict {
            error: Some("it was wrong".into()),
            ..Verdict::missing(name)
        }
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
#[derive(Debug)]
enum Failed {
    /// It was not as it should be.
    Case(anyhow::Error),
    /// Its machine has stood still: no program in it answers anything, or its processor did what none
    /// does. The emulation has been seen to do that once in some hundred cases. Nothing is known of the
    /// case then; it is begun once more, elsewhere, and the last lines say so.
    Machine {
        error: anyhow::Error,
        /// Whether its kernel went on: then it may be the case's doing after all.
        kernel_answers: bool,
    },
}

/// Runs `cases`, which are of the tree at `commit`, but for those that have a verdict already, and returns how
/// each went. What is known is given to `keep` after each, before anybody is told.
pub fn run_all(
    images: &Images,
    cases: &[Case],
    commit: Option<&Commit>,
    before: Vec<Verdict>,
    keep: impl Fn(&[Verdict]) -> Result<()>,
) -> Result<Vec<Verdict>> {
    let mut verdicts = before;
    let mut idle: Option<Guest> = None;
    let mut booted = 0;
    let mut start_one = |case: &Case| {
        booted += 1;
        let start = Instant::now();
        let guest = Guest::start(images, case.machine, booted).map_err(not_started)?;
        let took = start.elapsed().as_secs_f64();
        println!(
            "     guest {booted} ({}) is up after {took:.1} s",
            case.machine
        );
        Ok(guest)
    };
    for case in cases {
        if verdicts.iter().any(|it| it.name == case.name) {
            continue;
        }
        let guest = match idle.take().filter(|guest| guest.machine() == case.machine) {
            Some(guest) => Ok(guest),
            None => start_one(case),
        };
        let start = Instant::now();
        let under_test = guest.as_ref().ok().filter(|it| !it.machine().older_kernel);
        let kernel = under_test.map(|it| it.kernel().clone());
        let mut cells = Vec::new();
        let mut outcome = guest.and_then(|guest| run_one(case, guest, &mut cells));
        let taken = verdicts
            .iter()
            .filter(|it: &&Verdict| it.again.is_some())
            .count();
        let again = match &outcome {
            Err(Failed::Machine {
                error,
                kernel_answers,
            }) if taken < MOST_AGAIN => {
                println!("     the machine of {} stands still: {error:#}", case.name);
                println!("     {} again on another", case.name);
                Some(Again {
                    error: format!("{error:#}"),
                    kernel_answered: *kernel_answers,
                })
            }
            _ => None,
        };
        if again.is_some() {
            outcome = start_one(case).and_then(|guest| run_one(case, guest, &mut cells));
        }
        let seconds = start.elapsed().as_secs_f64();
        let (mut comparisons, mut skipped) = (Vec::new(), None);
        let error = match outcome {
            Ok(passed) => {
                idle = passed.guest;
                skipped = passed.skipped;
                comparisons = passed.comparisons;
                let is_unsaid = !comparisons.is_empty() && !case.compares;
                is_unsaid.then(|| "it compares, and is not one of the cases that do".to_owned())
            }
            Err(Failed::Case(error) | Failed::Machine { error, .. }) => Some(format!("{error:#}")),
        };
        verdicts.push(Verdict {
            name: case.name.to_string(),
            passed: error.is_none() && skipped.is_none(),
            seconds,
            error: error.clone(),
            skipped: skipped.clone(),
            kernel,
            commit: commit.cloned(),
            again,
            comparisons,
            cells,
        });
        keep(&verdicts)?;
        match (error, skipped) {
            (None, None) => println!("ok   {} ({seconds:.1} s)", case.name),
            (None, Some(why)) => println!("skip {} ({seconds:.1} s): {why}", case.name),
            (Some(error), _) => {
                println!("FAIL {} ({seconds:.1} s)", case.name);
                for line in error.lines() {
                    println!("     {line}");
                }
            }
        }
    }
    Ok(verdicts)
}

/// Why a guest is not there: it may have stood still as well as any that runs a case.
fn not_started(error: anyhow::Error) -> Failed {
    let text = format!("{error:#}");
    if let Some(line) = impossible_interrupt(&text) {
        return Failed::Machine {
            error: anyhow!("an interrupt with interrupts off ({line}): {text}"),
            kernel_answers: false,
        };
    }
    match error.downcast_ref::<Standstill>() {
        Some(still) => Failed::Machine {
            kernel_answers: still.kernel_answers,
            error,
        },
        None => Failed::Case(error),
    }
}

/// What a case that passed leaves.
struct Passed {
    /// `None` when the case has ended its guest on purpose.
    guest: Option<Guest>,
    comparisons: Vec<Comparison>,
    /// Why there was nothing to be seen.
    skipped: Option<String>,
}

/// Runs one case. On failure the guest is ended and what it left behind is in the error. The cells of the
/// matrix that were seen are seen either way.
fn run_one(case: &Case, guest: Guest, cells: &mut Vec<Cell>) -> Result<Passed, Failed> {
    if let Err(error) = guest.begin(case.name) {
        let still = guest.standstill();
        let report = guest.post_mortem();
        guest.vm().kill();
        return Err(failed(error, still, &report));
    }
    let limit = CASE_LIMIT + case.per_round * crate::cases::rounds();
    let limit = guest.host().patience(limit);
    let raised = guest.raised_again();
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
            let still = guest.standstill();
            let report = guest.post_mortem();
            guest.vm().kill();
            // With the guest gone every wait of the case ends in an error, which says where it was.
            let place = match told.recv_timeout(LAST_WORDS) {
                Ok(Err(error)) => format!("it was here: {error:#}"),
                _ => "it did not even stop when its guest was ended".to_string(),
            };
            *cells = guest.take_cells();
            let error = anyhow!("the case did not end within {limit:?}; {place}");
            return Err(failed(error, still, &report));
        }
    };
    let _ = worker.join();
    *cells = guest.take_cells();
    let raised = guest.raised_again() - raised;
    if raised > 0 {
        println!("     the agent had to be called again {raised} times: an interrupt was lost, or the guest slow");
    }
    let (skipped, result) = match result {
        Err(error) if error.is::<Skipped>() => (Some(error.to_string()), Ok(())),
        result => (None, result),
    };
    let result = result.and_then(|()| match guest.vm().exit() {
        None => guest.tidy().context("afterwards the guest was not clean"),
        // Else nothing of its last warnings was on the console, and a reset is what comes of a fault that no
        // handler was left for.
        Some(Exit::PowerOff | Exit::Reset) if guest.is_to_end() => guest.check_end(),
        Some(exit) => Err(anyhow!("the guest ended by itself: {exit:?}")),
    });
    let result = result.and_then(|()| guest.all_judged());
    match result {
        Ok(()) => Ok(Passed {
            comparisons: guest.take_comparisons(),
            skipped,
            guest: Arc::into_inner(guest).filter(|guest| guest.vm().exit().is_none()),
        }),
        Err(error) => {
            let still = guest.standstill();
            let report = guest.post_mortem();
            guest.vm().kill();
            let console = guest.vm().console();
            Err(match impossible_interrupt(&console) {
                Some(line) => Failed::Machine {
                    error: anyhow!(
                        "an interrupt with interrupts off ({line}): {error:#}\n{report}"
                    ),
                    kernel_answers: false,
                },
                None => failed(error, still, &report),
            })
        }
    }
}

/// Whether what a guest that stands still has said of its stacks names a function of our module, or one of
/// our programs as what a processor runs or what waits: then it is no accident of the emulation. That the
/// module is loaded is in the head of every stack, and says nothing.
fn is_ours(seen: &str) -> bool {
    const OURS: [&str; 3] = ["[hv_vss]", "Comm: hv_vss_", "task:hv_vss_"];
    let mut lines = seen.lines();
    lines.any(|line| OURS.iter().any(|it| line.contains(it)))
}

/// How it failed, with what was seen of its guest.
fn failed(error: anyhow::Error, still: Option<Standstill>, report: &str) -> Failed {
    match still {
        Some(still) if is_ours(&still.seen) => Failed::Case(anyhow!(
            "{error:#}\nits guest stands still with our module or daemon in it\n{still}\n{report}"
        )),
        Some(still) => Failed::Machine {
            error: anyhow!("{error:#}\n{still}\n{report}"),
            kernel_answers: still.kernel_answers,
        },
        None => Failed::Case(anyhow!("{error:#}\n{report}")),
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
    let passed = verdicts.iter().filter(|it| it.passed).count();
    let skipped = verdicts.iter().filter(|it| it.was_skipped()).count();
    let failed = verdicts.len() - passed - skipped;
    for verdict in verdicts {
        if let Some(why) = &verdict.skipped {
            println!("skipped: {}: {why}", verdict.name);
        }
        if let Some(error) = &verdict.error {
            let first = error.lines().next().unwrap_or_default();
            println!("failed: {}: {first}", verdict.name);
        }
    }
    let mut answered: Vec<&str> = Vec::new();
    for verdict in verdicts {
        let (name, Some(again)) = (&verdict.name, &verdict.again) else {
            continue;
        };
        let kernel = match again.kernel_answered {
            true => "but for its kernel",
            false => "and its kernel with it",
        };
        println!(
            "begun again, since its first machine stood still, {kernel}: {name} (console-*.log)"
        );
        if again.kernel_answered {
            answered.push(area(name));
        }
    }
    let again = verdicts.iter().filter(|it| it.again.is_some()).count();
    let mut accident = true;
    if again > MOST_AGAIN {
        accident = false;
        println!("failed: {again} machines stood still in one run, more than {MOST_AGAIN} are no accident");
    }
    answered.sort_unstable();
    for same in answered.chunk_by(|a, b| a == b).filter(|it| it.len() > 1) {
        accident = false;
        println!(
            "failed: in {}/* no program answered {} times where the kernel did: that is no accident",
            same[0],
            same.len()
        );
    }
    let skipped = match skipped {
        0 => String::new(),
        n => format!(", {n} skipped"),
    };
    println!("{passed} passed, {failed} failed{skipped}");
    failed == 0 && accident
}

/// The area of a case.
fn area(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}

/// The verdicts in such a list.
pub fn read_json(path: &Path) -> Result<Vec<Verdict>> {
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
}

/// Writes the verdicts as a JSON list.
pub fn write_json(path: &Path, verdicts: &[Verdict]) -> Result<()> {
    let text = serde_json::to_string_pretty(verdicts)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(name: &str, kernel_answered: bool) -> Verdict {
        let error = String::new();
        Verdict {
            again: Some(Again {
                error,
                kernel_answered,
            }),
            ..Verdict::passed(name)
        }
    }

    #[test]
    fn machines_that_stand_still_are_an_accident_up_to_twice_in_all() {
        let passed = || Verdict::passed("c/d");
        assert!(close(&[passed(), again("a/b", false), again("a/c", false)]));
        let three = [("a/b", false), ("b/c", false), ("c/e", false)];
        assert!(!close(&three.map(|(name, kernel)| again(name, kernel))));
    }

    #[test]
    fn where_the_kernel_goes_on_twice_in_an_area_is_none() {
        assert!(close(&[again("a/b", true), again("b/c", true)]));
        assert!(close(&[again("a/b", true), again("a/c", false)]));
        assert!(!close(&[again("a/b", true), again("a/c", true)]));
    }

    #[test]
    fn a_machine_that_stands_still_in_our_code_is_a_case_that_failed() {
        let fails = |seen: &str| {
            let still = Standstill {
                kernel_answers: true,
                seen: seen.into(),
            };
            matches!(
                failed(anyhow!("no answer"), Some(still), ""),
                Failed::Case(_)
            )
        };
        let loaded = "Modules linked in: hv_vss(O) [last unloaded: hv_utils(E)]\nComm: swapper/0";
        assert!(!fails(loaded));
        assert!(fails("[  9.1]  hold_work+0x4a/0x90 [hv_vss]"));
        assert!(fails(
            "[  9.1] CPU: 0 UID: 0 PID: 71 Comm: hv_vss_daemon Tainted: G O"
        ));
        assert!(fails("[  9.1] task:hv_vss_guard    state:D stack:0 pid:72"));
    }

    #[test]
    fn a_machine_that_stands_still_while_it_boots_is_told_from_one_that_fails() {
        let kernel_answers = true;
        let seen = String::new();
        let still = anyhow!("no greeting").context(Standstill {
            kernel_answers,
            seen,
        });
        let still = not_started(still.context("guest 3"));
        let Failed::Machine { kernel_answers, .. } = still else {
            panic!("it stood still");
        };
        assert!(kernel_answers);
        assert!(matches!(not_started(anyhow!("a panic")), Failed::Case(_)));
    }
}
