// SPDX-License-Identifier: GPL-2.0-only

//! The plot: every turn as a point, a band for each load and metric, ours above the peer.

use crate::report::ms;
use crate::stack::Stack;
use crate::stats::{values, Comparison, Turn};
use anyhow::{anyhow, Result};
use plotters::prelude::*;
use std::path::Path;

const OURS: RGBColor = RGBColor(0, 114, 178);
const PEER: RGBColor = RGBColor(213, 94, 0);

/// Width of the whole plot and of the names at its left, and the height of a band, in pixels.
const WIDTH: u32 = 900;
const NAMES: u32 = 190;
const BAND: u32 = 34;

/// Draws the turns, one band for each of `rows`, as SVG.
pub fn draw(path: &Path, turns: &[Turn], rows: &[Comparison]) -> Result<()> {
    paint(path, turns, rows).map_err(|error| anyhow!("{error}"))
}

fn colour(stack: Stack) -> RGBColor {
    match stack {
        Stack::Ours | Stack::Guarded => OURS,
        Stack::Peer => PEER,
    }
}

fn paint(
    path: &Path,
    turns: &[Turn],
    rows: &[Comparison],
) -> Result<(), Box<dyn std::error::Error>> {
    let seconds = turns.iter().flat_map(|it| it.sample.seconds.values());
    // Nothing takes less than a microsecond, and a logarithm wants something above zero.
    let seconds: Vec<f64> = seconds.map(|it| it.max(1e-6)).collect();
    let low = seconds.iter().copied().fold(f64::INFINITY, f64::min) / 1.5;
    let high = seconds.iter().copied().fold(0.0, f64::max) * 1.5;
    let bands = rows.len() as f64;

    let root = SVGBackend::new(path, (WIDTH, 110 + BAND * rows.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = "One backup of a guest: ours (blue, upper) and the peer (orange, lower)";
    let area = root.titled(title, ("sans-serif", 18))?;
    let mut chart = ChartBuilder::on(&area)
        .margin(10)
        .margin_right(70)
        .x_label_area_size(36)
        .y_label_area_size(NAMES)
        .build_cartesian_2d((low..high).log_scale(), 0.0..bands)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_desc("time, logarithmic; the upright strokes are medians")
        .x_label_formatter(&|seconds| ms(*seconds))
        .draw()?;

    for (index, row) in rows.iter().enumerate() {
        let middle = bands - index as f64 - 0.5;
        let (_, y) = chart.backend_coord(&(low, middle));
        let name = format!("{}: {}", row.load, row.metric);
        root.draw_text(
            &name,
            &("sans-serif", 14).into_text_style(&root),
            (16, y - 7),
        )?;
        let ratio = format!("x {:.2}", row.ratio);
        root.draw_text(
            &ratio,
            &("sans-serif", 13).into_text_style(&root),
            (WIDTH as i32 - 66, y - 7),
        )?;
        let edge = bands - index as f64 - 1.0;
        chart.draw_series([PathElement::new(
            [(low, edge), (high, edge)],
            BLACK.mix(0.15),
        )])?;
        for (stack, median, height) in [
            (Stack::Ours, row.ours, middle + 0.2),
            (Stack::Peer, row.peer, middle - 0.2),
        ] {
            chart.draw_series(points(
                &values(turns, row.load, stack, row.metric),
                height,
                stack,
            ))?;
            chart.draw_series([PathElement::new(
                [
                    (median.max(1e-6), height - 0.17),
                    (median.max(1e-6), height + 0.17),
                ],
                colour(stack).stroke_width(3),
            )])?;
        }
    }
    root.present()?;
    Ok(())
}

type Point = Circle<(f64, f64), i32>;

fn points(values: &[f64], height: f64, stack: Stack) -> Vec<Point> {
    let style = colour(stack).mix(0.5).filled();
    values
        .iter()
        .map(|seconds| Circle::new((seconds.max(1e-6), height), 3, style))
        .collect()
}
