// SPDX-License-Identifier: GPL-2.0-only

//! Draws one backup of the history as a timeline, in SVG: a row for each hook and each file system. It
//! knows times and names.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::backup::Verdict;
use crate::freeze::How;
use crate::history::{Entry, FileSystem, HookCall};

/// Pixels: the whole, the names at its left, what is above and below the rows, a row.
const WIDTH: i32 = 900;
const NAMES: i32 = 260;
const RIGHT: i32 = 30;
const HEAD: i32 = 64;
const FOOT: i32 = 44;
const ROW: i32 = 24;
const TEXT: i32 = 13;

const HOOK: RGBColor = RGBColor(0, 158, 115);
const FREEZING: RGBColor = RGBColor(230, 159, 0);
const FROZEN: RGBColor = RGBColor(0, 114, 178);
const BAD: RGBColor = RGBColor(213, 94, 0);
const GRID: RGBColor = RGBColor(200, 200, 200);

/// Why it cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the timeline: {0}")]
pub struct TimelineError(String);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The timeline as a text that is a file.
pub fn draw(entry: &Entry) -> Result<String, TimelineError> {
    let mut text = String::new();
    let rows = rows(entry);
    let height = HEAD + FOOT + ROW * rows.len() as i32;
    let size = (WIDTH as u32, height as u32);
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    let painted = paint(&area, entry, &rows, height);
    painted.map_err(|error| TimelineError(error.to_string()))?;
    drop(area);
    Ok(text)
}

/// One row: its name and its bars, in microseconds.
struct Row {
    name: String,
    bars: Vec<(u64, u64, RGBColor)>,
}

fn rows(entry: &Entry) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for call in &entry.hooks {
        let HookCall {
            name,
            since_us,
            took_us,
            fault,
            ..
        } = call;
        let colour = match fault {
            None => HOOK,
            Some(_) => BAD,
        };
        let bar = (*since_us, since_us.saturating_add(*took_us), colour);
        let name = format!("hook {name}");
        match rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.bars.push(bar),
            None => rows.push(Row {
                name,
                bars: vec![bar],
            }),
        }
    }
    rows.extend(entry.file_systems.iter().map(row_of));
    rows
}

fn row_of(file_system: &FileSystem) -> Row {
    let FileSystem {
        name,
        how,
        since_us,
        took_us,
        until_us,
        ..
    } = file_system;
    let mut bars = Vec::new();
    if let (Some(since), Some(took)) = (since_us, took_us) {
        let frozen = since.saturating_add(*took);
        bars.push((*since, frozen, FREEZING));
        bars.push((frozen, until_us.unwrap_or(frozen), FROZEN));
    }
    let word = match how {
        How::Frozen => "",
        How::Foreign => ", frozen by others",
        How::Synced => ", only synced",
        How::LeftOut => ", left out",
    };
    Row {
        name: format!("{name}{word}"),
        bars,
    }
}

fn paint(
    area: &Area<'_>,
    entry: &Entry,
    rows: &[Row],
    height: i32,
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let ends = rows.iter().flat_map(|row| row.bars.iter().map(|bar| bar.1));
    let last = ends.chain([entry.ended_us]).max().unwrap_or(0).max(1);
    let wide = f64::from(WIDTH - NAMES - RIGHT);
    let x = |us: u64| NAMES + (us as f64 / last as f64 * wide) as i32;
    let style = ("sans-serif", TEXT).into_font();
    let text = |at: (i32, i32), words: String| Text::new(words, at, style.clone());
    let result = match entry.result {
        Verdict::Good => "good",
        Verdict::Broken => "broken",
        Verdict::Failed => "failed",
    };
    let why = entry.why.as_ref().map(|it| format!(": {it}"));
    let why = why.unwrap_or_default();
    area.draw(&text(
        (10, 10),
        format!("Backup of {}, {result}{why}", entry.at),
    ))?;
    let legend = [
        (HOOK, "hook"),
        (FREEZING, "freezing"),
        (FROZEN, "frozen"),
        (BAD, "failed"),
    ];
    for (i, (colour, words)) in (0..).zip(legend) {
        let left = NAMES + i * 110;
        area.draw(&Rectangle::new(
            [(left, 34), (left + 12, 46)],
            colour.filled(),
        ))?;
        area.draw(&text((left + 18, 34), words.into()))?;
    }
    let bottom = height - FOOT;
    let step = step_of(last);
    for tick in (0..).map(|n| n * step).take_while(|at| *at <= last) {
        area.draw(&PathElement::new(
            [(x(tick), HEAD), (x(tick), bottom)],
            GRID,
        ))?;
        area.draw(&text((x(tick), bottom + 4), words_of(tick)))?;
    }
    if let Some(answered) = entry.answered_us {
        area.draw(&PathElement::new(
            [(x(answered), HEAD - 6), (x(answered), bottom)],
            BLACK,
        ))?;
        area.draw(&text((x(answered), bottom + 20), "FREEZE answered".into()))?;
    }
    for (row, top) in rows.iter().zip((0..).map(|n| HEAD + n * ROW)) {
        area.draw(&text((10, top + 5), row.name.clone()))?;
        for (since, until, colour) in &row.bars {
            // What is too short to be seen is a line.
            let right = x(*until).max(x(*since) + 1);
            let corners = [(x(*since), top + 4), (right, top + ROW - 4)];
            area.draw(&Rectangle::new(corners, colour.filled()))?;
        }
    }
    Ok(area.present()?)
}

/// From one tick to the next: a round number, so that there are some five.
fn step_of(last: u64) -> u64 {
    let mut step = 1;
    while last / step > 6 {
        let next = [step.saturating_mul(2), step.saturating_mul(5)];
        if let Some(fits) = next.into_iter().find(|it| last / it <= 6) {
            return fits;
        }
        step = step.saturating_mul(10);
    }
    step
}

fn words_of(us: u64) -> String {
    match us {
        0 => "0".into(),
        us if us % 1_000_000 == 0 => format!("{} s", us / 1_000_000),
        us if us % 1_000 == 0 => format!("{} ms", us / 1_000),
        us => format!("{us} µs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::example;

    #[test]
    fn each_hook_and_file_system_has_a_row_with_its_bars_in_order() {
        let entry = Entry {
            ended_us: 210_000,
            ..example()
        };
        let rows = rows(&entry);
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(
            names,
            ["hook 10-a", "/srv (ext4, 8:1)", "/bad (xfs, 8:2), left out"]
        );
        let expected = [(10_000, 40_000, HOOK), (300_000, 330_000, BAD)];
        assert_eq!(rows[0].bars, expected);
        let expected = [(100_000, 102_000, FREEZING), (102_000, 200_000, FROZEN)];
        assert_eq!(rows[1].bars, expected);
        let svg = draw(&entry).unwrap();
        assert!(
            svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"),
            "{svg}"
        );
        for word in [
            "hook 10-a",
            "/srv (ext4, 8:1)",
            "FREEZE answered",
            "the deadline passed",
            "100 ms",
        ] {
            assert!(svg.contains(word), "{word}: {svg}");
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        for (last, step) in [
            (1, 1),
            (6, 1),
            (7, 2),
            (330_000, 50_000),
            (61_000_000, 10_000_000),
        ] {
            assert_eq!(step_of(last), step, "{last}");
        }
        assert!(u64::MAX / step_of(u64::MAX) <= 6);
    }
}
