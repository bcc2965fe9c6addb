//! The one forward that every layer has.

use core::ops::Range;

use nf4_kernels::{Float, Kernels};

use crate::adapter::joined::Joined;
use crate::error::{Error, check_batch, check_len};
use crate::layer::scratch::{Scratch, Work};
use crate::parallel::cost;
use crate::round::to_f32;
use crate::tensor::Tensor;
use crate::weight::base::Base;
use crate::weight::inputs::Inputs;

/// Rows and vectors that are finished at a time, 4 KB on the stack.
const ROWS: usize = 128;
const VECTORS: usize = 8;

/// `y = W x + bias` with a frozen `W` `[d_out, d_in]`, plus what adapters add.
///
/// An adapter with weight `w` adds `f B (A x)`, `f = w * scale`; with `DoRA` and the gains `g` of the rows, `w` times
/// what it alone would change, which is `w (g - 1) W x + f g B (A x)`.
///
/// An output is computed as follows, and has the same bits whatever else is computed in the same call:
///
/// 1. the base product;
/// 2. with `DoRA`: times 1, less `w`, plus `w g` of each such adapter in turn, in f64 and rounded to f32 (for one of
///    weight 1 that is `g`);
/// 3. plus each adapter in turn, by [`Kernels::gemv_dense`] with `A` and [`Kernels::gemv_dense_add`] with `B` and the factor
///    `f`, with `DoRA` `f * g`; vectors that share their adapters by the products of a batch, which have the same bits;
/// 4. plus the bias, if there is one;
/// 5. rounded to the type of the outputs. Every NaN becomes the quiet NaN that [`Float::from_f32`] returns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Forward<'a> {
    pub(crate) base: Base<'a>,
    pub(crate) bias: Option<&'a [f32]>,
}

/// An adapter in a forward, and its weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) adapter: &'a Joined,
    pub(crate) weight: f32,
}

impl Term<'_> {
    fn rank(&self) -> usize {
        self.adapter.adapter().rank()
    }

    /// The factor of its `B (A x)`.
    fn factor(&self) -> f32 {
        self.adapter.adapter().scale() * self.weight
    }
}

/// The same adapter with the same weight.
impl PartialEq for Term<'_> {
    fn eq(&self, other: &Self) -> bool {
        core::ptr::eq(self.adapter, other.adapter) && self.weight.to_bits() == other.weight.to_bits()
    }
}

/// Whether the products with adapters are made for all vectors together: if these have the same adapters, none of them
/// `DoRA`, and are enough to be worth it.
fn share_adapters<'t, T: Iterator<Item = Term<'t>>>(batch: usize, terms: &impl Fn(usize) -> T) -> bool {
    batch >= VECTORS
        && terms(0).all(|term| term.rank() <= Kernels::FEW_COLUMNS && !term.adapter.adapter().is_dora())
        && (1..batch).all(|n| terms(n).eq(terms(0)))
}

/// The three ways to call it. `terms` gives the adapters of a vector.
impl Forward<'_> {
    /// The outputs `[batch, d_out]` of a tensor `[batch, d_in]`; `rank` is the largest sum of ranks that a vector has.
    pub(crate) fn of_tensor<'t, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        x: &Tensor,
        rank: usize,
        terms: &(impl Fn(usize) -> T + Sync),
    ) -> Result<Tensor, Error> {
        let batch = self.batch_of_tensor(x.len())?;
        let mut y = Tensor::try_zeros(batch, self.base.d_out())?;
        self.of_slice(x.data(), terms, &mut self.scratch(rank, batch)?, y.data_mut())?;
        Ok(y)
    }

    /// The outputs `[batch, d_out]` of a slice `[batch, d_in]`.
    pub(crate) fn of_slice<'t, X: Float, Y: Float, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        x: &[X],
        terms: &(impl Fn(usize) -> T + Sync),
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let batch = self.batch_of(x.len(), y.len())?;
        let adapters = self.largest_rank(batch, terms)? > 0;
        let inputs = self.base.prepare(x, batch, adapters, &mut scratch.inputs)?;
        self.run(&inputs, terms, &mut scratch.work, y)
    }

    /// Scratch for batches of vectors whose adapters have ranks that add up to at most `rank`.
    pub(crate) fn scratch(&self, rank: usize, batch: usize) -> Result<Scratch, Error> {
        let mut scratch = Scratch::new();
        self.base.reserve(batch, &mut scratch.inputs)?;
        scratch.work.reserve(self.base.d_out(), rank, batch)?;
        Ok(scratch)
    }

    /// The number of vectors in the `x` values of a tensor. Without inputs it is one.
    pub(crate) fn batch_of_tensor(&self, x: usize) -> Result<usize, Error> {
        if x == 0 && self.base.d_in() == 0 { Ok(1) } else { check_batch(x, self.base.d_in()) }
    }

    /// The number of vectors in `x` values that have `y` outputs.
    ///
    /// Vectors without inputs are counted by their outputs; if there are no outputs either, there are none.
    pub(crate) fn batch_of(&self, x: usize, y: usize) -> Result<usize, Error> {
        let (d_out, d_in) = (self.base.d_out(), self.base.d_in());
        if d_in > 0 || d_out == 0 {
            return check_batch(x, d_in);
        }
        check_len("input", 0, x)?;
        check_len("output", y - y % d_out, y)?;
        Ok(y / d_out)
    }

    /// The outputs of inputs that were prepared before.
    pub(crate) fn run<'t, X: Float, Y: Float, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        x: &Inputs<'_, X>,
        terms: &(impl Fn(usize) -> T + Sync),
        work: &mut Work,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let (d_out, batch) = (self.base.d_out(), x.batch());
        check_len("input", self.base.d_in(), x.d_in())?;
        check_len("output", batch.saturating_mul(d_out), y.len())?;
        let rank = self.largest_rank(batch, terms)?;
        if y.is_empty() {
            // There may be more rows or vectors than a loop gets through.
            return Ok(());
        }
        let (low_rank, product) = work.buffers(d_out, rank, batch)?;
        let executor = self.base.executor();
        let products = batch.saturating_mul(rank).saturating_mul(cost::DENSE);
        let together = share_adapters(batch, terms);
        if together {
            self.base.product(x, product)?;
            self.add_terms_together(terms(0), x.all(), low_rank, product)?;
        } else {
            let work = products.saturating_mul(self.base.d_in());
            executor.by_rows(work, 0..batch, rank, low_rank, &|vectors: Range<usize>, low_rank: &mut [f32]| {
                let mut vectors = vectors.zip(low_rank.chunks_exact_mut(rank.max(1)));
                vectors.try_for_each(|(n, low_rank)| self.multiply_by_a(x.vector(n), terms(n), low_rank))
            })?;
            self.base.product(x, product)?;
        }
        if batch == 1 {
            self.finish(terms(0), low_rank, 0..d_out, product)?;
            round(product, y);
            return Ok(());
        }
        let (terms, products) =
            (|n| terms(n).take(if together { 0 } else { usize::MAX }), if together { 0 } else { products });
        let work = products.saturating_add(batch.saturating_mul(cost::OUTPUT)).saturating_mul(d_out);
        executor.by_rows(work, 0..batch, d_out, y, &|vectors, y| {
            self.finish_vectors(vectors, &terms, (low_rank, rank), product, y)
        })
    }
}

/// Its steps.
impl Forward<'_> {
    /// The largest sum of ranks of a vector, if all adapters fit and no norms are stale.
    fn largest_rank<'t, T: Iterator<Item = Term<'t>>>(
        &self,
        batch: usize,
        terms: &impl Fn(usize) -> T,
    ) -> Result<usize, Error> {
        (0..batch).try_fold(0, |largest, n| {
            let rank = terms(n).try_fold(0_usize, |sum, term| {
                term.adapter.fresh(&self.base)?;
                Ok::<_, Error>(sum.saturating_add(term.rank()))
            })?;
            Ok(largest.max(rank))
        })
    }

    /// The first half of step 3: `A x` of each adapter.
    fn multiply_by_a<'t>(
        &self,
        x: &[f32],
        terms: impl Iterator<Item = Term<'t>>,
        mut low_rank: &mut [f32],
    ) -> Result<(), Error> {
        for term in terms {
            let product;
            (product, low_rank) = low_rank.split_at_mut(term.rank());
            self.base.kernels().gemv_dense(term.adapter.pair(&self.base)?.a, x, product)?;
        }
        Ok(())
    }

    /// Step 3 for all vectors at once, which have the same adapters, none of them `DoRA`.
    fn add_terms_together<'t>(
        &self,
        terms: impl Iterator<Item = Term<'t>>,
        x: &[f32],
        mut low_rank: &mut [f32],
        products: &mut [f32],
    ) -> Result<(), Error> {
        let (executor, batch) = (self.base.executor(), products.len() / self.base.d_out());
        for term in terms {
            let (pair, rank) = (term.adapter.pair(&self.base)?, term.rank());
            let product;
            (product, low_rank) = low_rank.split_at_mut(rank * batch);
            executor.gemm_dense(pair.a, x, [batch, self.base.d_in()], product)?;
            executor.gemm_dense_add(pair.b, product, [batch, rank], term.factor(), products)?;
        }
        Ok(())
    }

    /// Steps 2 to 5 for some vectors of a batch, whose outputs `y` are `[vectors.len(), d_out]`.
    ///
    /// Tiles of rows are the outer loop: what it reads of `product`, whose rows are as long as the batch, then stays in the
    /// cache for the next vectors.
    fn finish_vectors<'t, Y: Float, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        vectors: Range<usize>,
        terms: &impl Fn(usize) -> T,
        (low_rank, rank): (&[f32], usize),
        product: &[f32],
        y: &mut [Y],
    ) -> Result<(), Error> {
        let d_out = self.base.d_out();
        let batch = product.len() / d_out;
        for first in (0..d_out).step_by(ROWS) {
            let rows = first..d_out.min(first + ROWS);
            let products = &product[rows.start * batch..rows.end * batch];
            for (tile, y) in y.chunks_mut(VECTORS * d_out).enumerate() {
                let start = vectors.start + tile * VECTORS;
                let mut sums = [[0.0; ROWS]; VECTORS];
                for (row, products) in products.chunks_exact(batch).enumerate() {
                    sums.iter_mut().zip(&products[start..]).for_each(|(sums, product)| sums[row] = *product);
                }
                for (n, (sums, y)) in (start..).zip(sums.iter_mut().zip(y.chunks_exact_mut(d_out))) {
                    let sums = &mut sums[..rows.len()];
                    self.finish(terms(n), &low_rank[n * rank..][..rank], rows.clone(), sums)?;
                    round(sums, &mut y[rows.clone()]);
                }
            }
        }
        Ok(())
    }

    /// Steps 2 to 4, for some rows of a vector.
    fn finish<'t>(
        &self,
        terms: impl Iterator<Item = Term<'t>> + Clone,
        low_rank: &[f32],
        rows: Range<usize>,
        sums: &mut [f32],
    ) -> Result<(), Error> {
        self.scale_rows(terms.clone(), &rows, sums)?;
        self.add_terms(terms, low_rank, &rows, sums)?;
        if let Some(bias) = self.bias {
            sums.iter_mut().zip(&bias[rows]).for_each(|(sum, b)| *sum += b);
        }
        Ok(())
    }

    /// Step 2.
    fn scale_rows<'t>(
        &self,
        terms: impl Iterator<Item = Term<'t>> + Clone,
        rows: &Range<usize>,
        sums: &mut [f32],
    ) -> Result<(), Error> {
        if !terms.clone().any(|term| term.adapter.adapter().is_dora()) {
            return Ok(());
        }
        for (first, sums) in (rows.start..).step_by(ROWS).zip(sums.chunks_mut(ROWS)) {
            let mut factors = [1.0_f64; ROWS];
            for Term { adapter, weight } in terms.clone() {
                let Some(gains) = adapter.fresh(&self.base)?.gains else { continue };
                let (weight, gains) = (f64::from(weight), &gains[first..first + sums.len()]);
                factors.iter_mut().zip(gains).for_each(|(f, g)| *f = *f - weight + weight * f64::from(*g));
            }
            sums.iter_mut().zip(factors).for_each(|(sum, f)| *sum *= to_f32(f));
        }
        Ok(())
    }

    /// The second half of step 3: `B` times the `A x` of each adapter.
    fn add_terms<'t>(
        &self,
        terms: impl Iterator<Item = Term<'t>>,
        mut low_rank: &[f32],
        rows: &Range<usize>,
        sums: &mut [f32],
    ) -> Result<(), Error> {
        let kernels = self.base.kernels();
        for term in terms {
            let (fresh, rank) = (term.adapter.fresh(&self.base)?, term.rank());
            let product;
            (product, low_rank) = low_rank.split_at(rank);
            let b = &fresh.pair.b[rows.start * rank..rows.end * rank];
            let Some(gains) = fresh.gains else {
                kernels.gemv_dense_add(b, product, term.factor(), sums)?;
                continue;
            };
            let gains = gains[rows.clone()].chunks(ROWS);
            for ((sums, b), gains) in sums.chunks_mut(ROWS).zip(b.chunks(ROWS * rank)).zip(gains) {
                let mut products = [0.0; ROWS];
                kernels.gemv_dense(b, product, &mut products[..sums.len()])?;
                let factors = gains.iter().map(|g| term.factor() * g);
                sums.iter_mut().zip(factors).zip(products).for_each(|((sum, f), p)| *sum += f * p);
            }
        }
        Ok(())
    }
}

/// Step 5.
fn round<Y: Float>(sums: &[f32], y: &mut [Y]) {
    y.iter_mut().zip(sums).for_each(|(y, sum)| *y = Y::from_f32(*sum));
}
