//! The frozen part of a layer, an NF4 weight and a bias, and the one forward that every layer on it has.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use nf4_kernels::{Float, Kernels};

use crate::adapter::lora::{LoRAAdapter, to_f32};
use crate::error::{Error, check_batch, check_finite, check_len};
use crate::layer::scratch::{Scratch, Work};
use crate::parallel;
use crate::weight::base::Base;
use crate::weight::quantized::Quantized4Bit;

/// Rows of the base product that are finished at a time, on the stack.
const ROWS: usize = 128;

/// How a forward multiplies by the base weight. Adapters and bias are f32 in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// The 16x4 product: 16-bit codebook times activations of 14 bits with an f32 scale for each 64, about as precise
    /// as f16 activations, and the faster one. Where blocks straddle rows it is the f32 product. See
    /// [`nf4_kernels::spec`].
    #[default]
    SixteenByFour,
    /// The f32 product: f32 codebook, f32 activations. See [`nf4_kernels::spec`].
    F32,
}

/// `y = W x + bias` with a packed `W` `[d_out, d_in]`, and what adapters add to it.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) weight: Quantized4Bit,
    pub(crate) bias: Option<Box<[f32]>>,
    pub(crate) kernels: Kernels,
    pub(crate) arithmetic: Arithmetic,
}

/// An adapter in a forward, and how much of it counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) adapter: &'a LoRAAdapter,
    pub(crate) weight: f32,
}

impl Term<'_> {
    /// The factor of its `B (A x)`.
    fn factor(&self) -> f32 {
        self.adapter.scale() * self.weight
    }
}

impl Linear {
    pub(crate) fn new(weight: Quantized4Bit) -> Self {
        Self { weight, bias: None, kernels: Kernels::detect(), arithmetic: Arithmetic::default() }
    }

    pub(crate) fn with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        check_len("bias", self.d_out(), bias.len())?;
        check_finite("bias", &bias)?;
        Ok(Self { bias: Some(bias.into_boxed_slice()), ..self })
    }

    pub(crate) fn d_out(&self) -> usize {
        self.weight.rows()
    }

    pub(crate) fn d_in(&self) -> usize {
        self.weight.cols()
    }

    /// `Ok` if the adapter was made for this weight, and has the tensors that it was made with.
    pub(crate) fn check_adapter(&self, adapter: &LoRAAdapter) -> Result<(), Error> {
        let (base, adapter_shape) = ([self.d_out(), self.d_in()], [adapter.d_out(), adapter.d_in()]);
        if base != adapter_shape {
            return Err(Error::Mismatch { base, adapter: adapter_shape });
        }
        adapter.check()
    }

    /// What [`LoRAAdapter`] needs of the weight.
    pub(crate) fn base(&self) -> Base<'_> {
        Base::Packed(self.weight.view(), self.kernels)
    }

    /// Bytes of the bias.
    pub(crate) fn bias_bytes(&self) -> usize {
        self.bias.as_deref().map_or(0, size_of_val)
    }

    /// Scratch for batches of f32 vectors whose adapters have ranks that add up to at most `rank`.
    pub(crate) fn scratch(&self, rank: usize, batch: usize) -> Result<Scratch, Error> {
        let mut scratch = Scratch::new();
        scratch.try_reserve([self.d_out(), self.d_in()], self.weight.block_size(), rank, batch)?;
        Ok(scratch)
    }

    /// Number of vectors in `x` if it has whole vectors and `y` one output for each of them.
    ///
    /// Vectors without inputs are counted by their outputs; if there are no outputs either, there are none.
    pub(crate) fn check_batch<X, Y>(&self, x: &[X], y: &[Y]) -> Result<usize, Error> {
        let batch = if self.d_in() == 0 && self.d_out() > 0 {
            check_len("input", 0, x.len())?;
            y.len() / self.d_out()
        } else {
            check_batch(x.len(), self.d_in())?
        };
        check_len("output", batch.saturating_mul(self.d_out()), y.len())?;
        Ok(batch)
    }

    /// `y[n] = W x[n] + sum of what the adapters of vector n add + bias`, where `terms` gives these adapters. `x` is
    /// `[batch, d_in]`, `y` `[batch, d_out]`.
    ///
    /// An adapter with weight `w` adds `f B (A x)`, `f = w * scale`; with `DoRA` and the gains `g` of the rows, `w`
    /// times what it alone would change, which is `w (g - 1) W x + f g B (A x)`.
    ///
    /// A row and a vector have the same bits whatever is computed beside them:
    ///
    /// 1. the base product;
    /// 2. with `DoRA`: times 1, less `w`, plus `w g` of each such adapter in turn, in f64 and rounded to f32 (for one of
    ///    weight 1 that is `g`);
    /// 3. plus each term in turn, by [`Kernels::gemv_dense`] with `A` and [`Kernels::gemv_dense_add`] with `B` and the
    ///    factor `f`, with `DoRA` `f * g`;
    /// 4. plus the bias, if there is one;
    /// 5. rounded to `Y`. Every NaN becomes the one of [`Float::from_f32`].
    pub(crate) fn forward<'a, Y: Float, T: Iterator<Item = Term<'a>>>(
        &self,
        x: &[f32],
        terms: impl Fn(usize) -> T,
        work: &mut Work,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let batch = self.check_batch(x, y)?;
        let (d_out, d_in, kernels) = (self.d_out(), self.d_in(), self.kernels);
        let rank = self.check_terms(batch, &terms)?;
        if batch == 0 {
            // Rows without columns may be more than a loop gets through.
            return Ok(());
        }
        let block_size = self.weight.block_size();
        let buffers = work.buffers([d_out, d_in], block_size, rank, batch)?;
        let activations = match self.arithmetic {
            Arithmetic::F32 => None,
            Arithmetic::SixteenByFour => {
                Some(kernels.quantize_activations_batch(x, d_in, block_size, buffers.values, buffers.scales)?)
            }
        };
        for n in 0..batch {
            let (x, mut low_rank) = (&x[n * d_in..][..d_in], &mut buffers.low_rank[n * rank..][..rank]);
            for term in terms(n) {
                let product;
                (product, low_rank) = low_rank.split_at_mut(term.adapter.rank());
                kernels.gemv_dense(term.adapter.a().data(), x, product)?;
            }
        }
        let (view, product) = (self.weight.view(), buffers.product);
        match &activations {
            _ if d_in == 0 => product.fill(0.0),
            Some(activations) => parallel::gemm(kernels, &view, activations, product)?,
            None => parallel::gemm_f32(kernels, &view, x, product)?,
        }
        for first in (0..d_out).step_by(ROWS) {
            let rows = first..d_out.min(first + ROWS);
            for n in 0..batch {
                let mut sums = [0.0; ROWS];
                let sums = &mut sums[..rows.len()];
                let products = product[first * batch + n..].iter().step_by(batch);
                sums.iter_mut().zip(products).for_each(|(s, p)| *s = *p);
                scale_rows(terms(n), rows.clone(), sums)?;
                let mut low_rank = &buffers.low_rank[n * rank..][..rank];
                for term in terms(n) {
                    let (rank, product) = (term.adapter.rank(), low_rank.split_at(term.adapter.rank()));
                    low_rank = product.1;
                    let b = &term.adapter.b().data()[rows.start * rank..rows.end * rank];
                    match term.adapter.gains()? {
                        None => kernels.gemv_dense_add(b, product.0, term.factor(), sums)?,
                        Some(gains) => {
                            let mut products = [0.0; ROWS];
                            kernels.gemv_dense(b, product.0, &mut products[..rows.len()])?;
                            let factors = gains[rows.clone()].iter().map(|g| term.factor() * g);
                            sums.iter_mut().zip(factors).zip(products).for_each(|((s, f), p)| *s += f * p);
                        }
                    }
                }
                if let Some(bias) = &self.bias {
                    sums.iter_mut().zip(&bias[rows.clone()]).for_each(|(s, b)| *s += b);
                }
                let y = &mut y[n * d_out..][rows.clone()];
                y.iter_mut().zip(sums).for_each(|(y, s)| *y = Y::from_f32(*s));
            }
        }
        Ok(())
    }

    /// As [`Self::forward`], for inputs of any type, which are first converted to f32; exact.
    pub(crate) fn forward_as<'a, X: Float, Y: Float, T: Iterator<Item = Term<'a>>>(
        &self,
        x: &[X],
        terms: impl Fn(usize) -> T,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.check_batch(x, y)?;
        let (inputs, work) = scratch.inputs(x.len())?;
        inputs.iter_mut().zip(x).for_each(|(input, x)| *input = x.to_f32());
        self.forward(inputs, terms, work, y)
    }

    /// The largest sum of ranks that a vector has, if all adapters fit and have no stale norms.
    fn check_terms<'a, T: Iterator<Item = Term<'a>>>(
        &self,
        batch: usize,
        terms: &impl Fn(usize) -> T,
    ) -> Result<usize, Error> {
        let mut largest = 0;
        for n in 0..batch {
            let mut sum = 0_usize;
            for Term { adapter, .. } in terms(n) {
                self.check_adapter(adapter)?;
                adapter.gains()?;
                sum = sum.saturating_add(adapter.rank());
            }
            largest = largest.max(sum);
        }
        Ok(largest)
    }
}

/// Step 2 of [`Linear::forward`], for some rows.
fn scale_rows<'a>(terms: impl Iterator<Item = Term<'a>>, rows: Range<usize>, sums: &mut [f32]) -> Result<(), Error> {
    let mut factors = [1.0_f64; ROWS];
    let mut any = false;
    for Term { adapter, weight } in terms {
        let Some(gains) = adapter.gains()? else { continue };
        let weight = f64::from(weight);
        factors.iter_mut().zip(&gains[rows.clone()]).for_each(|(f, g)| *f = *f - weight + weight * f64::from(*g));
        any = true;
    }
    if any {
        sums.iter_mut().zip(factors).for_each(|(s, f)| *s *= to_f32(f));
    }
    Ok(())
}
