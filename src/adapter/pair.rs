//! Rows of the adapted weight, from tensors whose lengths were checked.

use core::borrow::Borrow;

use crate::parallel::cost;
use crate::round::to_f32;

/// The tensors of an adapter, which have the lengths that its shape and rank need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair<'a> {
    /// `[rank, d_in]`.
    pub(crate) a: &'a [f32],
    /// `[d_out, rank]`.
    pub(crate) b: &'a [f32],
    /// `[d_out]`.
    pub(crate) magnitude: Option<&'a [f32]>,
    pub(crate) d_in: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Pair<'_> {
    /// Replaces a row of the base by the row of the adapted weight, `w + scale * b A`; with a magnitude `m`, that is
    /// multiplied by `m` and divided by its norm. `weights` has `d_in` values.
    ///
    /// Everything is computed in f64, with sums in the order of the rank, and each weight is rounded once to f32. So the
    /// bits are the same everywhere, and rounding adds half an ulp of the result. Every NaN is [`f32::NAN`].
    pub(crate) fn merge_row(&self, row: usize, weights: &mut [f32]) {
        let gain = self.magnitude.map_or(1.0, |m| gain(m[row], to_f32(self.norm(row, weights))));
        self.adapted(row, weights, |weight, sum| *weight = to_f32(gain * sum));
    }

    /// The work of adapting so many weights; see [`cost`].
    pub(crate) fn work(&self, weights: usize) -> usize {
        weights.saturating_mul(cost::PRODUCT_F32.saturating_mul(self.rank).saturating_add(cost::DEQUANTIZE))
    }

    /// The norm of a row of the adapted weight, `|w + scale * b A|`, all f64.
    pub(crate) fn norm(&self, row: usize, weights: &[f32]) -> f64 {
        let mut sum = 0.0;
        self.adapted(row, weights, |_, w| sum += w * w);
        libm::sqrt(sum)
    }

    /// Calls `f` with each weight of a row of the base, in order, and its `w + scale * b A`.
    fn adapted<W: Borrow<f32>>(&self, row: usize, weights: impl IntoIterator<Item = W>, f: impl FnMut(W, f64)) {
        adapted_row(&self.b[row * self.rank..][..self.rank], self.a, self.d_in, self.scale.into(), weights, f);
    }
}

/// Calls `f` with each of the `cols` weights of a row, in order, and its `w + scale * left right`: all of it f64, sums in
/// the order of the rank. `left` is `[rank]`, `right` `[rank, cols]` row-major.
pub(crate) fn adapted_row<W: Borrow<f32>>(
    left: &[f32],
    right: &[f32],
    cols: usize,
    scale: f64,
    weights: impl IntoIterator<Item = W>,
    mut f: impl FnMut(W, f64),
) {
    /// Columns whose sums are held at a time, on the stack.
    const SPAN: usize = 64;
    let mut weights = weights.into_iter();
    for start in (0..cols).step_by(SPAN) {
        let count = SPAN.min(cols - start);
        let mut sums = [0.0_f64; SPAN];
        for (left, right) in left.iter().zip(right.chunks_exact(cols)) {
            for (sum, right) in sums.iter_mut().zip(&right[start..][..count]) {
                *sum += f64::from(*left) * f64::from(*right);
            }
        }
        for (sum, weight) in sums.into_iter().take(count).zip(&mut weights) {
            let w = f64::from(*weight.borrow());
            f(weight, w + scale * sum);
        }
    }
}

/// `m / norm`, and 0 for a row of zeros, whose product is 0 whatever the gain. The norm is rounded to f32 like the
/// magnitude, so the gains of a fresh adapter are 1, also after it was saved and loaded.
pub(crate) fn gain(magnitude: f32, norm: f32) -> f64 {
    if norm == 0.0 { 0.0 } else { f64::from(magnitude) / f64::from(norm) }
}
