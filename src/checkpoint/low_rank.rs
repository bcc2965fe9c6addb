//! What an adapter adds to the rows of a matrix.

use alloc::borrow::{Cow, ToOwned};
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use super::error::CheckpointError;
use super::peft::PeftAdapter;
use super::plan::Pair;
use super::read::with_room;
use crate::LoRAAdapter;
use crate::adapter::pair::{adapted_row, gain};
use crate::round::to_f32;

/// A product of low rank that is added to some rows: `scale * left right`, `left` `[rows, rank]` and `right`
/// `[rank, cols]`.
pub(super) struct LowRank<'a> {
    rows: Range<usize>,
    rank: usize,
    left: Cow<'a, [f32]>,
    right: Cow<'a, [f32]>,
    scale: f64,
    magnitude: Magnitude<'a>,
}

/// How `DoRA` scales the sum.
enum Magnitude<'a> {
    None,
    /// Each row gets this norm.
    Rows(&'a [f32]),
    /// Each column gets this norm: the weight is transposed.
    Columns {
        norms: &'a [f32],
        gains: Vec<f64>,
    },
}

/// A value that is finite in f64 and not in f32, and its column.
pub(super) struct Overflow {
    pub(super) column: usize,
    pub(super) value: f64,
}

impl<'a> LowRank<'a> {
    pub(super) fn new(adapter: &'a PeftAdapter, pair: &Pair, rows: Range<usize>) -> Result<Self, CheckpointError> {
        let missing = |module: &String| CheckpointError::Missing { tensor: module.clone() };
        match pair {
            Pair::Module { module, transposed } => {
                let found = adapter.module(module).ok_or_else(|| missing(module))?.adapter();
                Self::of_module(found, module, *transposed, rows)
            }
            Pair::Bias { module } => {
                let found = adapter.module(module).ok_or_else(|| missing(module))?;
                let left = Cow::Borrowed(found.lora_bias().unwrap_or_default());
                let (right, scale) = (Cow::Borrowed(&[1.0][..]), found.adapter().scale().into());
                Ok(Self { rows, rank: 1, left, right, scale, magnitude: Magnitude::None })
            }
            Pair::Expert { module, depth, expert, experts, rank, alpha, first, transposed } => {
                let found = adapter.factors(module).get(*depth).ok_or_else(|| missing(module))?;
                // A is [experts, rank, in], B [out, rank, experts].
                let (d_in, d_out) = (found.a_shape[1], found.b_shape[0]);
                let a = |k: usize, i: usize| found.a[(expert * rank + k) * d_in + i];
                let b = |o: usize, k: usize| found.b[(o * rank + k) * experts + expert];
                let (left, right) = if *transposed {
                    (
                        matrix(module, rows.len(), *rank, |r, k| a(k, r + first))?,
                        matrix(module, *rank, d_out, |k, o| b(o, k))?,
                    )
                } else {
                    (matrix(module, rows.len(), *rank, |r, k| b(r + first, k))?, matrix(module, *rank, d_in, a)?)
                };
                let scale = adapter.config().scaling().compute(*alpha, *rank).into();
                let (left, right) = (Cow::Owned(left), Cow::Owned(right));
                Ok(Self { rows, rank: *rank, left, right, scale, magnitude: Magnitude::None })
            }
        }
    }

    fn of_module(
        found: &'a LoRAAdapter,
        module: &str,
        transposed: bool,
        rows: Range<usize>,
    ) -> Result<Self, CheckpointError> {
        let pair = found.pair().map_err(|error| CheckpointError::Layer { layer: module.to_owned(), error })?;
        let (rank, scale, norms) = (pair.rank, pair.scale.into(), pair.magnitude);
        let (d_out, d_in, a, b) = (found.d_out(), found.d_in(), pair.a, pair.b);
        if found.is_dora() && norms.is_none() {
            return Err(CheckpointError::Missing { tensor: alloc::format!("{module}.lora_magnitude_vector") });
        }
        Ok(if transposed {
            let left = Cow::Owned(matrix(module, d_in, rank, |i, k| a[k * d_in + i])?);
            let right = Cow::Owned(matrix(module, rank, d_out, |k, o| b[o * rank + k])?);
            let magnitude = norms.map_or(Magnitude::None, |norms| Magnitude::Columns { norms, gains: Vec::new() });
            Self { rows, rank, left, right, scale, magnitude }
        } else {
            let magnitude = norms.map_or(Magnitude::None, Magnitude::Rows);
            Self { rows, rank, left: Cow::Borrowed(b), right: Cow::Borrowed(a), scale, magnitude }
        })
    }

    /// The rows.
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Whether [`Self::set_gains`] has to see all rows first.
    pub(super) fn needs_norms(&self) -> bool {
        matches!(self.magnitude, Magnitude::Columns { .. })
    }

    /// Adds the squares of a row of the adapted weight to those of its columns.
    pub(super) fn add_squares(&self, row: usize, weights: &[f32], squares: &mut [f64]) {
        let mut squares = squares.iter_mut();
        adapted_row(self.left(row), &self.right, weights.len(), self.scale, weights, |_, w| {
            if let Some(sum) = squares.next() {
                *sum += w * w;
            }
        });
    }

    /// Sets what columns are scaled by, from the sums of their squares.
    pub(super) fn set_gains(&mut self, squares: &[f64]) {
        if let Magnitude::Columns { norms, gains } = &mut self.magnitude {
            let gain = |(magnitude, sum): (&f32, &f64)| gain(*magnitude, to_f32(libm::sqrt(*sum)));
            *gains = norms.iter().zip(squares).map(gain).collect();
        }
    }

    /// The adapted row in place of that of the base: sums in f64, rounded once to f32. The first value that is finite
    /// and too large for that is returned.
    pub(super) fn apply(&self, row: usize, weights: &mut [f32]) -> Option<Overflow> {
        let left = self.left(row);
        let row_gain = match &self.magnitude {
            Magnitude::Rows(norms) => {
                let mut sum = 0.0;
                adapted_row(left, &self.right, weights.len(), self.scale, &*weights, |_: &f32, w| sum += w * w);
                gain(norms[row - self.rows.start], to_f32(libm::sqrt(sum)))
            }
            _ => 1.0,
        };
        let gains: &[f64] = match &self.magnitude {
            Magnitude::Columns { gains, .. } => gains,
            _ => &[],
        };
        let (mut column, mut overflow) = (0, None);
        adapted_row(left, &self.right, weights.len(), self.scale, &mut *weights, |weight: &mut f32, sum| {
            let value = gains.get(column).copied().unwrap_or(row_gain) * sum;
            *weight = to_f32(value);
            if value.is_finite() && weight.is_infinite() && overflow.is_none() {
                overflow = Some(Overflow { column, value });
            }
            column += 1;
        });
        overflow
    }

    fn left(&self, row: usize) -> &[f32] {
        &self.left[(row - self.rows.start) * self.rank..][..self.rank]
    }
}

/// A matrix of these values, row-major.
fn matrix(
    module: &str,
    rows: usize,
    cols: usize,
    value: impl Fn(usize, usize) -> f32,
) -> Result<Vec<f32>, CheckpointError> {
    let mut values = with_room(module, rows.saturating_mul(cols))?;
    values.extend((0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))).map(|(r, c)| value(r, c)));
    Ok(values)
}
