//! Operations on several threads, split by rows.
//!
//! Large operations are split by rows into one part per thread; small ones run on the calling thread. No bit depends on
//! that, because operations return the same bits for every split, and sums over rows (in the transposed product) are split
//! at fixed places.

#[cfg(target_has_atomic = "ptr")]
use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use nf4_kernels::{
    Activations, Activations8x8, BlockSize, Float, Gradients, Kernels, Nf4Matrix, ShapeError, spec::ROW_CHUNK,
};

use crate::buffer::zeros;
use crate::error::Error;

/// A thread pool on which layers run large operations.
///
/// Without one, operations run on the calling thread or, with the feature `rayon`, on the current `rayon` pool.
///
/// ```
/// use std::sync::Arc;
/// use nf4::{QLoRALayer, Tensor, Threads};
///
/// /// A new thread for every split: simple, and slower than a pool.
/// struct Spawn(usize);
///
/// impl Threads for Spawn {
///     fn count(&self) -> usize {
///         self.0
///     }
///     fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
///         std::thread::scope(|scope| {
///             scope.spawn(b);
///             a();
///         });
///     }
/// }
///
/// let layer = QLoRALayer::new(Tensor::zeros(64 * 64, false), 64, 64, 4, 8.0).with_threads(Arc::new(Spawn(2)));
/// # assert_eq!(layer.forward(&Tensor::zeros(64, false)).len(), 64);
/// ```
pub trait Threads: Send + Sync {
    /// The number of threads: an operation is split into at most this many parts.
    fn count(&self) -> usize;

    /// Calls both functions once, in parallel if a thread is free, and returns when both have returned. Calls are nested:
    /// `a` and `b` may call this again to split their work further.
    ///
    /// No pool can change a result: a function that is called twice does nothing the second time, and one that was not
    /// called is called afterwards.
    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send));

    /// The least work per part, in multiply-adds of the 16x4 product: operations with less than twice this run on one
    /// thread. The default is for threads that sleep while there is no work; less pays if they are awake.
    fn least_work(&self) -> usize {
        LEAST
    }
}

/// The current `rayon` pool: the one in which the caller runs (see `rayon::ThreadPool::install`), or the global one.
#[cfg(feature = "rayon")]
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

#[cfg(feature = "rayon")]
impl Threads for Rayon {
    fn count(&self) -> usize {
        rayon::current_num_threads()
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        rayon::join(a, b);
    }
}

/// The calling thread.
#[cfg(not(feature = "rayon"))]
struct ThisThread;

#[cfg(not(feature = "rayon"))]
impl Threads for ThisThread {
    fn count(&self) -> usize {
        1
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        a();
        b();
    }
}

/// [`Threads::least_work`] of threads that sleep; on a core with AVX2 this takes 70 microseconds. Called
/// from outside of the pool, two sleeping threads did work of 70 microseconds at 0.75 times the speed of one thread, of
/// 140 microseconds at 0.9 to 1.3 times, and of 220 microseconds at 1.1 to 1.7 times. Measured with
/// `cargo bench --features rayon --bench kernels -- --ratios` on two cores of a virtual machine.
const LEAST: usize = 1 << 21;

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

/// The kernels and the threads that operations run on.
#[derive(Clone)]
pub(crate) struct Executor {
    pub(crate) kernels: Kernels,
    /// `None` for the default of [`Executor::threads`].
    #[cfg(target_has_atomic = "ptr")]
    threads: Option<Arc<dyn Threads>>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor").field("kernels", &self.kernels).field("threads", &self.threads().count()).finish()
    }
}

impl Executor {
    /// The fastest kernels of this CPU, on the default threads.
    pub(crate) fn detect() -> Self {
        Self {
            kernels: Kernels::detect(),
            #[cfg(target_has_atomic = "ptr")]
            threads: None,
        }
    }

    #[cfg(target_has_atomic = "ptr")]
    pub(crate) fn set_threads(&mut self, threads: Arc<dyn Threads>) {
        self.threads = Some(threads);
    }

    fn threads(&self) -> &dyn Threads {
        #[cfg(feature = "rayon")]
        let default = &Rayon;
        #[cfg(not(feature = "rayon"))]
        let default = &ThisThread;
        #[cfg(target_has_atomic = "ptr")]
        if let Some(threads) = &self.threads {
            return &**threads;
        }
        default
    }

    /// The number of parts into which an operation with this work is split.
    fn parts(&self, work: usize) -> usize {
        let threads = self.threads();
        match work / threads.least_work().max(1) {
            0 | 1 => 1,
            parts => parts.min(threads.count()).max(1),
        }
    }

    /// Runs `a` and `b`, on two threads if two are free.
    fn join<A: Send, B: Send>(&self, a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
        let (mut a, mut b) = (Task::new(a), Task::new(b));
        self.threads().join(&mut || a.run(), &mut || b.run());
        (a.result(), b.result())
    }

    /// Calls `run` for ranges that make up `rows`, each with its part of `out`, which has `per_row` elements per row. `work`
    /// is the work of all rows; see [`cost`].
    ///
    /// # Errors
    /// The first error of `run`, in the order of the rows.
    pub(crate) fn by_rows<T: Send, E: Send>(
        &self,
        work: usize,
        rows: Range<usize>,
        per_row: usize,
        out: &mut [T],
        run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        // `run` reports a wrong length.
        let fits = rows.len().checked_mul(per_row) == Some(out.len());
        self.split_rows(if fits { self.parts(work) } else { 1 }, rows, per_row, out, run)
    }

    fn split_rows<T: Send, E: Send>(
        &self,
        parts: usize,
        rows: Range<usize>,
        per_row: usize,
        out: &mut [T],
        run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        if parts <= 1 || rows.len() <= 1 {
            return run(rows, out);
        }
        let count = rows.len() / parts * (parts / 2) + rows.len() % parts * (parts / 2) / parts;
        let middle = rows.start + count;
        let (top, bottom) = out.split_at_mut(count * per_row);
        let (top, bottom) = self.join(
            || self.split_rows(parts / 2, rows.start..middle, per_row, top, run),
            || self.split_rows(parts - parts / 2, middle..rows.end, per_row, bottom, run),
        );
        top.and(bottom)
    }
}

/// A function that some thread calls once, and its result.
struct Task<F, R> {
    run: Option<F>,
    result: Option<R>,
}

impl<R, F: FnOnce() -> R> Task<F, R> {
    fn new(run: F) -> Self {
        Self { run: Some(run), result: None }
    }

    /// Calls the function unless it was called before.
    fn run(&mut self) {
        if let Some(run) = self.run.take() {
            self.result = Some(run());
        }
    }

    /// The result of the function, which is called here if the pool did not call it.
    fn result(mut self) -> R {
        self.run();
        self.result.expect("the function returned, or its panic came this far")
    }
}

/// The operations of [`Kernels`] for which several threads pay.
impl Executor {
    /// [`Kernels::gemm`].
    pub(crate) fn gemm<X: Float>(
        &self,
        m: &Nf4Matrix<'_>,
        x: &Activations<'_, X>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [f32]| self.kernels.gemm(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, x.batch(), cost::PRODUCT_16X4), 0..m.rows(), x.batch(), out, &run)
    }

    /// [`Kernels::gemm_8x8`].
    pub(crate) fn gemm_8x8<X: Float>(
        &self,
        m: &Nf4Matrix<'_>,
        x: &Activations8x8<'_, X>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [f32]| self.kernels.gemm_8x8(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, x.batch(), cost::PRODUCT_8X8), 0..m.rows(), x.batch(), out, &run)
    }

    /// [`Kernels::gemm_f32`].
    pub(crate) fn gemm_f32(&self, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        let batch = x.len().checked_div(m.cols()).unwrap_or(0);
        let run = |rows, out: &mut [f32]| self.kernels.gemm_f32(&m.row_range(rows)?, x, out);
        self.by_rows(work(m, batch, cost::PRODUCT_F32), 0..m.rows(), batch, out, &run)
    }

    /// [`Kernels::gemm_dense`], `x` `[batch, cols]`.
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

    /// [`Kernels::gemm_transposed_f32`] of vectors and outputs that are not empty. Threads take vectors, each of them
    /// whole: what they decode twice is little beside the products of a batch. A single vector is
    /// [`Self::gemv_transposed_f32`].
    ///
    /// # Errors
    /// [`Error::Shape`] as in [`Kernels::gemm_transposed_f32`]; [`Error::OutOfMemory`] for a single vector.
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

    /// [`Kernels::gemm_transposed`] of vectors and outputs that are not empty, which are quantized in buffers of the lengths
    /// that [`Gradients`] says. Threads share the work as in [`Self::gemm_transposed_f32`].
    ///
    /// # Errors
    /// [`Error::Shape`] as in [`Kernels::quantize_gradients`] and [`Kernels::gemm_transposed`]; [`Error::OutOfMemory`] for a
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

    /// [`Kernels::gemm_dense_add`], `x` `[cols, batch]`.
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

    /// [`Kernels::gemm_transposed_dense_add`]. Threads take vectors.
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

    /// [`Kernels::dequantize`].
    pub(crate) fn dequantize<T: Float>(&self, m: &Nf4Matrix<'_>, out: &mut [T]) -> Result<(), ShapeError> {
        let run = |rows, out: &mut [T]| self.kernels.dequantize(&m.row_range(rows)?, out);
        self.by_rows(work(m, 1, cost::DEQUANTIZE), 0..m.rows(), m.cols(), out, &run)
    }

    /// [`Kernels::gemv_transposed_f32`].
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

    /// [`Kernels::quantize`], split between blocks.
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
