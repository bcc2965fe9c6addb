//! The operations of `Kernels` for which several threads pay, and what they cost.

use core::ops::Range;

use nf4_kernels::{Activations, Activations8x8, BlockSize, Float, Gradients, Nf4Matrix, ShapeError, spec::ROW_CHUNK};

use super::executor::Executor;
use crate::buffer::zeros;
use crate::error::Error;

/// The cost of operations per weight, or per weight and vector, by the same measurement.
pub(crate) mod cost {
    pub(crate) const PRODUCT_16X4: usize = 1;
    /// With AVX2 8x8 takes 0.95 of the time of 16x4 for one vector and 0.77 for a batch of 128, with AVX-512 0.7 and 0.53.
    /// The threshold does not know the CPU, and counts in whole numbers.
    pub(crate) const PRODUCT_8X8: usize = 1;
    pub(crate) const PRODUCT_F32: usize = 2;
    pub(crate) const TRANSPOSED: usize = 3;
    /// Transposed products of a batch, with packed and with dense weights.
    pub(crate) const TRANSPOSED_BATCH: usize = 1;
    pub(crate) const DEQUANTIZE: usize = 3;
    pub(crate) const QUANTIZE: usize = 11;
    pub(crate) const DENSE: usize = 2;
    /// To finish an output of a batch, without the products of adapters. On one thread this and an adapter of rank 16 take a
    /// fifth of a forward of 128 vectors (2048 x 2048); splitting them makes two threads 1.03 to 1.27 times as fast.
    pub(crate) const OUTPUT: usize = 64;
}

impl Executor {
    /// `Kernels::gemm`.
    pub(crate) fn gemm<X: Float>(
        &self,
        m: &Nf4Matrix<'_>,
        x: &Activations<'_, X>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [f32]| self.kernels.gemm(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, x.batch(), cost::PRODUCT_16X4), 0..m.rows(), x.batch(), out, &run)
    }

    /// `Kernels::gemm_8x8`.
    pub(crate) fn gemm_8x8<X: Float>(
        &self,
        m: &Nf4Matrix<'_>,
        x: &Activations8x8<'_, X>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [f32]| self.kernels.gemm_8x8(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, x.batch(), cost::PRODUCT_8X8), 0..m.rows(), x.batch(), out, &run)
    }

    /// `Kernels::gemm_f32`.
    pub(crate) fn gemm_f32(&self, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        let batch = x.len().checked_div(m.cols()).unwrap_or(0);
        let run = |rows, out: &mut [f32]| self.kernels.gemm_f32(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, batch, cost::PRODUCT_F32), 0..m.rows(), batch, out, &run)
    }

    /// `Kernels::gemm_dense`, `x` `[batch, cols]`.
    pub(crate) fn gemm_dense(
        &self,
        a: &[f32],
        x: &[f32],
        [batch, cols]: [usize; 2],
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows: Range<usize>, out: &mut [f32]| {
            self.kernels.gemm_dense(&a[rows.start * cols..rows.end * cols], x, batch, out)
        };
        let rows = out.len().checked_div(batch).unwrap_or(0);
        let work = a.len().saturating_mul(batch).saturating_mul(cost::DENSE);
        self.by_rows(work, 0..rows, batch, out, &run)
    }

    /// `Kernels::gemm_transposed_f32` of vectors and outputs that are not empty. Threads take vectors, each of them
    /// whole: what they decode twice is little beside the products of a batch. A single vector is
    /// [`Self::gemv_transposed_f32`].
    ///
    /// # Errors
    /// [`Error::Shape`] as in `Kernels::gemm_transposed_f32`; [`Error::OutOfMemory`] for a single vector.
    pub(crate) fn gemm_transposed_f32(&self, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), Error> {
        let (rows, cols) = (m.rows(), m.cols());
        let batch = x.len() / rows.max(1);
        if batch == 1 {
            return self.gemv_transposed_f32(m, x, out);
        }
        let work = work(m, batch, cost::TRANSPOSED_BATCH);
        Ok(self.by_rows(work, 0..batch, cols, out, &|vectors: Range<usize>, out: &mut [f32]| {
            self.kernels.gemm_transposed_f32(m, &x[vectors.start * rows..vectors.end * rows], out)
        })?)
    }

    /// `Kernels::gemm_transposed` of vectors and outputs that are not empty, which are quantized in buffers of the lengths
    /// that [`Gradients`] says. Threads share the work as in [`Self::gemm_transposed_f32`].
    ///
    /// # Errors
    /// [`Error::Shape`] as in `Kernels::quantize_gradients` and `Kernels::gemm_transposed`; [`Error::OutOfMemory`] for a
    /// single vector.
    pub(crate) fn gemm_transposed(
        &self,
        m: &Nf4Matrix<'_>,
        x: &[f32],
        (values, scales): (&mut [i16], &mut [f32]),
        out: &mut [f32],
    ) -> Result<(), Error> {
        let kernels = self.kernels;
        if x.len() == m.rows() && self.splits_one(m, x, out) {
            return self.by_chunks(m, x, out, &|m, x, out| {
                let (mut values, mut scales) = ([0; ROW_CHUNK], [0.0; Gradients::scales_len(ROW_CHUNK)]);
                let (values, scales) =
                    (&mut values[..Gradients::values_len(x.len())], &mut scales[..Gradients::scales_len(x.len())]);
                kernels.gemm_transposed(m, &kernels.quantize_gradients(x, m.rows(), values, scales)?, out)
            });
        }
        let gradients = kernels.quantize_gradients(x, m.rows(), values, scales)?;
        let work = work(m, gradients.batch(), cost::TRANSPOSED_BATCH);
        Ok(self.by_rows(work, 0..gradients.batch(), m.cols(), out, &|vectors: Range<usize>, out: &mut [f32]| {
            kernels.gemm_transposed(m, &gradients.range(vectors), out)
        })?)
    }

    /// `Kernels::gemm_dense_add`, `x` `[cols, batch]`.
    pub(crate) fn gemm_dense_add(
        &self,
        a: &[f32],
        x: &[f32],
        [batch, cols]: [usize; 2],
        factor: f32,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows: Range<usize>, out: &mut [f32]| {
            self.kernels.gemm_dense_add(&a[rows.start * cols..rows.end * cols], x, batch, factor, out)
        };
        let rows = out.len().checked_div(batch).unwrap_or(0);
        let work = a.len().saturating_mul(batch).saturating_mul(cost::DENSE);
        self.by_rows(work, 0..rows, batch, out, &run)
    }

    /// `Kernels::gemm_transposed_dense_add`. Threads take vectors.
    pub(crate) fn gemm_transposed_dense_add(
        &self,
        a: &[f32],
        x: &[f32],
        batch: usize,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let (rows, cols) = (x.len() / batch.max(1), out.len() / batch.max(1));
        let work = a.len().saturating_mul(batch).saturating_mul(cost::TRANSPOSED_BATCH);
        if self.parts(work) == 1 || x.len() != rows * batch || out.len() != cols * batch {
            return self.kernels.gemm_transposed_dense_add(a, x, batch, out);
        }
        self.by_rows(work, 0..batch, cols, out, &|vectors: Range<usize>, out: &mut [f32]| {
            let x = &x[vectors.start * rows..vectors.end * rows];
            self.kernels.gemm_transposed_dense_add(a, x, vectors.len(), out)
        })
    }

    /// `Kernels::dequantize`.
    pub(crate) fn dequantize<T: Float>(&self, m: &Nf4Matrix<'_>, out: &mut [T]) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [T]| self.kernels.dequantize(&m.row_range(rows)?, out);
        self.by_rows(work(m, 1, cost::DEQUANTIZE), 0..m.rows(), m.cols(), out, &run)
    }

    /// `Kernels::gemv_transposed_f32`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `rows` values or `out` not `cols`; [`Error::OutOfMemory`] for the sums of
    /// several threads.
    pub(crate) fn gemv_transposed_f32(&self, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), Error> {
        if self.splits_one(m, x, out) {
            self.by_chunks(m, x, out, &|m, x, out| self.kernels.gemv_transposed_f32(m, x, out))
        } else {
            Ok(self.kernels.gemv_transposed_f32(m, x, out)?)
        }
    }

    /// Whether several threads pay for the transposed product of one vector, whose lengths fit.
    fn splits_one(&self, m: &Nf4Matrix<'_>, x: &[f32], out: &[f32]) -> bool {
        let fits = x.len() == m.rows() && out.len() == m.cols();
        fits && m.rows() > ROW_CHUNK && self.parts(work(m, 1, cost::TRANSPOSED)) > 1
    }

    /// A transposed product of one vector, from the products of row chunks, whose sums are added in order. Threads take chunks,
    /// and need a vector of outputs for each.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for the sums.
    fn by_chunks(
        &self,
        m: &Nf4Matrix<'_>,
        x: &[f32],
        out: &mut [f32],
        product: &(impl Fn(&Nf4Matrix<'_>, &[f32], &mut [f32]) -> Result<(), ShapeError> + Sync),
    ) -> Result<(), Error> {
        let (chunks, cols) = (m.rows().div_ceil(ROW_CHUNK), m.cols());
        let work = work(m, 1, cost::TRANSPOSED);
        let mut sums = zeros(chunks, cols)?;
        self.by_rows(work, 0..chunks, cols, &mut sums, &|chunks: Range<usize>, sums: &mut [f32]| {
            chunks.zip(sums.chunks_mut(cols)).try_for_each(|(chunk, sums)| {
                let start = chunk * ROW_CHUNK;
                let rows = start..m.rows().min(start.saturating_add(ROW_CHUNK));
                product(&m.row_range(rows.clone())?, &x[rows], sums)
            })
        })?;
        out.fill(0.0);
        for sums in sums.chunks(cols) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = f32::from_f32(*out + sum));
        }
        Ok(())
    }

    /// `Kernels::quantize`, split between blocks.
    pub(crate) fn quantize<T: Float>(
        &self,
        weights: &[T],
        block_size: BlockSize,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), ShapeError> {
        let parts = self.parts(weights.len().saturating_mul(cost::QUANTIZE));
        self.split_blocks(parts, weights, block_size, packed, absmax)
    }

    fn split_blocks<T: Float>(
        &self,
        parts: usize,
        weights: &[T],
        block_size: BlockSize,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), ShapeError> {
        let blocks = block_size.blocks(weights.len()) / parts.max(1) * (parts / 2);
        let elements = blocks * block_size.get();
        // The operation itself reports a wrong length.
        if parts <= 1 || blocks == 0 || packed.len() < elements / 2 || absmax.len() < blocks {
            return self.kernels.quantize(weights, block_size, packed, absmax);
        }
        let ((w, weights), (p, packed)) = (weights.split_at(elements), packed.split_at_mut(elements / 2));
        let (a, absmax) = absmax.split_at_mut(blocks);
        let (first, second) = self.join(
            || self.split_blocks(parts / 2, w, block_size, p, a),
            || self.split_blocks(parts - parts / 2, weights, block_size, packed, absmax),
        );
        first.and(second)
    }
}

/// The work of an operation on all weights of a matrix, for a number of vectors.
fn work(m: &Nf4Matrix<'_>, vectors: usize, cost: usize) -> usize {
    m.rows().saturating_mul(m.cols()).saturating_mul(vectors).saturating_mul(cost)
}
