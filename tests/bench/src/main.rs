// SPDX-License-Identifier: GPL-2.0-only

//! Measures a backup: this project's module and daemon beside the stock module and Debian's daemon.
//!
//! Runs where the end-to-end cases run, on the same payload. Under each load both stacks take turns
//! in one boot of one guest, in changing order, so that what drifts hits both. Absolute times are
//! those of the machine (emulated twice, perhaps); what counts are the ratios. No figure makes it
//! fail: it fails when a backup fails.

mod load;
mod measure;
mod phases;
mod plot;
mod report;
mod stack;
mod stats;

use anyhow::{ensure, Context, Result};
use clap::{value_parser, Parser};
use e2e::guest::{Guest, Images, Machine};
use load::{Load, Work, Writers, LOADS};
use measure::Sample;
use report::{ms, Results};
use stack::{Rig, Stack};
use stats::Turn;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Parser)]
#[command(
    name = "bench",
    about = "Compares a backup with the peer's",
    after_help = report::WORDS
)]
struct Arguments {
    /// Only loads whose name matches, such as '*-dirty'
    #[arg(long, value_name = "GLOB", default_value = "*")]
    load: String,
    /// Rounds under each load, one turn for each stack; three times as many for 1-clean
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    rounds: u32,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let pattern = glob::Pattern::new(&arguments.load)
        .with_context(|| format!("{:?} is no pattern", arguments.load))?;
    let names = LOADS.map(|load| load.name).join(", ");
    let chosen: Vec<Load> = LOADS
        .into_iter()
        .filter(|load| pattern.matches(load.name))
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no load is called {:?}; there are {names}",
        arguments.load
    );

    let images = Images::prepare(Path::new("."))?;
    let mut results = Results::default();
    for (number, load) in chosen.iter().enumerate() {
        println!("bench: {}: {}", load.name, load.about);
        let start = Instant::now();
        let machine = Machine {
            memory_mib: load.memory_mib,
            scsi_controllers: load.scsi_controllers(),
            ..Machine::TWO_CPUS.on_one_cpu("the emulator has one processor for both")
        };
        let guest = Guest::start(&images, machine, number as u32 + 1)?;
        println!("bench: {}: a guest is up ({machine})", load.name);
        let clocks = measure::Clocks::read(&guest)?;
        let outcome = run_load(load, arguments.rounds, &guest, &mut results)
            .with_context(|| format!("load {}", load.name));
        if outcome.is_err() {
            println!("{}", guest.post_mortem());
            guest.vm().kill();
        }
        // What was measured before a failure is worth keeping.
        results.write(images.results())?;
        outcome?;
        println!("bench: {}: {}", load.name, clocks.compare(&guest)?);
        guest.vm().kill();
        let took = start.elapsed().as_secs();
        println!("bench: {}: done after {took} s", load.name);
    }
    println!("\n{}", results.table());
    Ok(())
}

fn run_load(load: &Load, rounds: u32, guest: &Guest, results: &mut Results) -> Result<()> {
    if let Work::Freeze(disks) = load.work {
        let start = Instant::now();
        disks.set_up(guest)?;
        if disks.writers == Writers::Fsync {
            phases::watch(guest)?;
        }
        let took = start.elapsed().as_secs_f64();
        println!("bench: {}: set up in {took:.0} s", load.name);
    }
    let mut rig = Rig::new(guest)?;
    if load.work == Work::Idle {
        for &stack in load.stacks {
            rig.switch(stack)?;
            let idle = measure::idle(&rig)?;
            println!("bench: {}: {stack} {idle:?}", load.name);
            results.idle.insert(stack, idle);
        }
        return Ok(());
    }
    let rounds = rounds.saturating_mul(load.repeat);
    for round in 1..=rounds {
        for stack in order(load.stacks, round as usize) {
            rig.switch(stack)?;
            let sample = match load.work {
                Work::Freeze(disks) => measure::freeze(&rig, stack, &disks),
                Work::HotBackup | Work::Idle => measure::hot_backup(&rig),
            };
            let sample = sample.with_context(|| format!("round {round}, {stack}"))?;
            println!(
                "bench: {} {round}/{rounds} {stack:7}{}",
                load.name,
                in_words(&sample)
            );
            let log = rig.daemon_log()?;
            results
                .logs
                .push_str(&format!("{} round {round}, {stack}:\n{log}\n", load.name));
            results.turns.push(Turn {
                load: load.name,
                round,
                stack,
                sample,
            });
        }
        if let Work::Freeze(disks) = load.work {
            let limit = measure::limit(guest, &disks)?;
            results.limits.entry(load.name).or_default().push(limit);
        }
    }
    Ok(())
}

/// In which order the stacks have their turns in this round: each follows on each of the others as often as before it,
/// in as many rounds as three have orders.
fn order(stacks: &[Stack], round: usize) -> Vec<Stack> {
    let mut order = stacks.to_vec();
    order.rotate_left(round % stacks.len());
    // Of two there are no more.
    if stacks.len() > 2 && (round / stacks.len()) % 2 == 1 {
        order.reverse();
    }
    order
}

fn in_words(sample: &Sample) -> String {
    let figures = sample.seconds.iter();
    figures
        .map(|(metric, seconds)| format!("  {metric} {}", ms(*seconds)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn three_stacks_take_turns_in_each_order_there_is() {
        let stacks = [Stack::Ours, Stack::Guarded, Stack::Peer];
        let orders: BTreeSet<Vec<Stack>> = (1..=6).map(|it| order(&stacks, it)).collect();
        assert_eq!(orders.len(), 6);
        assert!(orders.iter().all(|it| it.len() == 3));
        let [first, second] = [1, 2].map(|it| order(&[Stack::Ours, Stack::Peer], it));
        assert_ne!(first, second);
    }

    #[test]
    fn no_rounds_are_no_benchmark() {
        let parses = |rounds| Arguments::try_parse_from(["bench", "--rounds", rounds]).is_ok();
        assert!(parses("1") && !parses("0"));
    }
}
