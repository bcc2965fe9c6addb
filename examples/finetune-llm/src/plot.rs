//! The losses of a run as a picture.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::checkpoint::History;

/// Steps that the smooth line is a mean of, half of them on each side.
const WINDOW: usize = 20;

/// An SVG of the losses over the steps: of each step, smoothed, and of the evaluations.
pub(crate) fn svg(history: &History) -> Result<String> {
    let mut picture = String::new();
    draw(history, &mut picture).map_err(|error| anyhow!("losses.svg: {error}"))?;
    Ok(picture)
}

fn draw(history: &History, picture: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let losses = history.training.iter().copied().chain(history.evaluation.iter().map(|(_, loss)| *loss));
    let (low, high) = losses.fold((f64::MAX, f64::MIN), |(low, high), loss| (low.min(loss), high.max(loss)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = ((high - low) * 0.05).max(1e-3);

    let root = SVGBackend::with_string(picture, (800, 450)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("cross entropy per token", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..history.training.len().max(1) as f64, low - margin..high + margin)?;
    chart.configure_mesh().light_line_style(WHITE).x_desc("step").draw()?;
    let steps = |losses: &[f64]| losses.iter().enumerate().map(|(i, loss)| ((i + 1) as f64, *loss)).collect::<Vec<_>>();
    chart.draw_series(LineSeries::new(steps(&history.training), BLUE.mix(0.25)))?;
    let smooth = smoothed(&history.training);
    let legend =
        |color: RGBColor| move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2));
    chart
        .draw_series(LineSeries::new(steps(&smooth), BLUE.stroke_width(2)))?
        .label("training, smoothed")
        .legend(legend(BLUE));
    let evaluations = || history.evaluation.iter().map(|(step, loss)| (*step as f64, *loss));
    chart.draw_series(LineSeries::new(evaluations(), RED.stroke_width(2)))?.label("evaluation").legend(legend(RED));
    chart.draw_series(evaluations().map(|at| Circle::new(at, 3, RED.filled())))?;
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    drop(chart);
    Ok(())
}

fn smoothed(losses: &[f64]) -> Vec<f64> {
    let mean = |step: usize| {
        let near = &losses[step.saturating_sub(WINDOW / 2)..(step + WINDOW / 2).min(losses.len())];
        near.iter().sum::<f64>() / near.len() as f64
    };
    (0..losses.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

    use super::*;

    #[test]
    fn pictures_show_every_loss() {
        for count in [0, 1, 2, 100] {
            let training: Vec<f64> = (0..count).map(|i| 3.0 / f64::from(i + 1)).collect();
            let picture = svg(&History { training, evaluation: vec![(0, 3.0), (1, 2.0)] }).unwrap();
            assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
            assert_eq!(picture.matches("<circle").count(), 2);
            assert!(!picture.contains("NaN"));
        }
    }
}
