//! Merging the adapter into packed weights.

use nf4_kernels::{BlockSize, packed_len};

use super::QLoRALayer;
use super::merge::Merger;
use crate::buffer::zeros;
use crate::error::{Error, check_finite};
use crate::weight::absmax::AbsmaxBuf;
use crate::weight::quantized::Quantized4Bit;

/// How far quantization moved a merged weight, as measured by [`QLoRALayer::merge_requantized`].
///
/// The errors are over the whole matrix, in f64, and 0 if it has no weights.
///
/// An adapter survives if [`Self::rms_error`] is well below [`Self::rms_change`]. If it is about as large, the adapter is
/// lost in rounding, and the merged weight is better kept in f16 or bf16 ([`QLoRALayer::merge_rows_into`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RequantizationStats {
    /// Largest `|quantized - merged|`, where `merged` is [`QLoRALayer::merge_to_f32`].
    pub max_abs_error: f64,
    /// Root mean square of `quantized - merged`.
    pub rms_error: f64,
    /// Root mean square of `merged`.
    pub rms_merged: f64,
    /// Root mean square of `merged - base`: what the adapter adds.
    pub rms_change: f64,
}

impl RequantizationStats {
    /// `rms_error / rms_merged`; NaN if the merged weight is zero.
    #[must_use]
    pub fn relative(&self) -> f64 {
        self.rms_error / self.rms_merged
    }
}

/// Merge and requantization.
impl QLoRALayer {
    /// Merges the adapter, quantizes the result, and measures the error of the quantization. The bias is left out.
    ///
    /// The bits are those of [`Quantized4Bit::quantize`] on [`Self::merge_to_f32`], but the merged weight is never held in
    /// memory: beside the result, this takes one row and one block of f32, and then two rows for the measurement, for
    /// which all rows are merged a second time.
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the flat index of the first merged weight that is NaN or infinite, or if weights are so
    /// large that their double-quantized scales are not finite; and [those of all layers](crate#errors).
    pub fn merge_requantized(
        &self,
        block_size: BlockSize,
        double_quant: bool,
    ) -> Result<(Quantized4Bit, RequantizationStats), Error> {
        let merge = self.merger()?;
        let (d_out, d_in, block) = (self.d_out(), self.d_in(), block_size.get());
        let mut packed = zeros(1, packed_len(self.linear.weight.len()))?;
        let mut absmax = zeros(1, block_size.blocks(self.linear.weight.len()))?;

        // Rows are merged into `pending`, and its whole blocks are quantized; the rest of a block waits for the next row.
        let (mut pending, mut waiting) = (zeros(1, d_in.saturating_add(block))?, 0);
        let (mut packed_rest, mut absmax_rest) = (&mut *packed, &mut *absmax);
        for row in 0..d_out {
            let merged = &mut pending[waiting..waiting + d_in];
            merge.row(row, merged)?;
            check_row(row, merged)?;
            let len = waiting + d_in;
            let ready = if row + 1 == d_out { len } else { len - len % block };
            let (packed, absmax);
            (packed, packed_rest) = packed_rest.split_at_mut(packed_len(ready));
            (absmax, absmax_rest) = absmax_rest.split_at_mut(block_size.blocks(ready));
            self.kernels().quantize(&pending[..ready], block_size, packed, absmax)?;
            pending.copy_within(ready..len, 0);
            waiting = len - ready;
        }
        drop(pending);
        let absmax = if double_quant { AbsmaxBuf::double_quantize(&absmax)? } else { AbsmaxBuf::plain(absmax) };
        let quantized = Quantized4Bit::from_parts(packed, absmax, d_out, d_in, block_size)?;
        let stats = self.measure(&quantized, &merge)?;
        Ok((quantized, stats))
    }

    /// Measures how far `quantized` is from the merged weight.
    fn measure(&self, quantized: &Quantized4Bit, merge: &Merger<'_>) -> Result<RequantizationStats, Error> {
        let (mut merged, mut other) = (zeros(1, self.d_in())?, zeros::<f32>(1, self.d_in())?);
        let (mut max_abs_error, [mut error, mut weight, mut change]) = (0.0_f64, [0.0_f64; 3]);
        for row in 0..self.d_out() {
            merge.row(row, &mut merged)?;
            quantized.dequantize_rows(row..row + 1, &mut other)?;
            for (m, q) in merged.iter().zip(&other) {
                let off = f64::from(*q) - f64::from(*m);
                max_abs_error = max_abs_error.max(off.abs());
                error += off * off;
                weight += f64::from(*m) * f64::from(*m);
            }
            self.linear.weight.dequantize_rows(row..row + 1, &mut other)?;
            for (m, w) in merged.iter().zip(&other) {
                let added = f64::from(*m) - f64::from(*w);
                change += added * added;
            }
        }
        let rms = |sum: f64| libm::sqrt(sum / quantized.len().max(1) as f64);
        Ok(RequantizationStats {
            max_abs_error,
            rms_error: rms(error),
            rms_merged: rms(weight),
            rms_change: rms(change),
        })
    }
}

/// `Ok` if a merged row is finite.
fn check_row(row: usize, merged: &[f32]) -> Result<(), Error> {
    check_finite("merged weight", merged).map_err(|error| match error {
        Error::NotFinite { what, index, value } => Error::NotFinite { what, index: row * merged.len() + index, value },
        other => other,
    })
}
