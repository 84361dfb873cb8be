// SPDX-License-Identifier: GPL-2.0-only

//! `hyperv-sim`: the simulated host for people.

fn main() -> std::process::ExitCode {
    for what in hyperv_sim::probe::missing() {
        eprintln!("{what}");
    }
    std::process::ExitCode::SUCCESS
}
