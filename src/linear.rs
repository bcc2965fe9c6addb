//! The frozen part of a layer, an NF4 weight and a bias, and the one forward that every layer on it has.

use alloc::boxed::Box;
use alloc::vec::Vec;

use nf4_kernels::{Float, Kernels};

use crate::adapter::LoRAAdapter;
use crate::error::{Error, check_batch, check_finite, check_len};
use crate::quantized::Quantized4Bit;
use crate::scratch::{Scratch, Work};

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

/// An adapter in a forward, and the factor of its `B (A x)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) adapter: &'a LoRAAdapter,
    pub(crate) factor: f32,
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

    /// Bytes of the bias.
    pub(crate) fn bias_bytes(&self) -> usize {
        self.bias.as_deref().map_or(0, size_of_val)
    }

    /// Scratch for batches of f32 vectors whose adapters have ranks that add up to at most `rank`.
    pub(crate) fn scratch(&self, rank: usize, batch: usize) -> Scratch {
        let mut scratch = Scratch::new();
        scratch.reserve([self.d_out(), self.d_in()], self.weight.block_size(), rank, batch);
        scratch
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

    /// `y[n] = g (W x[n] + sum of factor * B (A x[n])) + bias`, where `terms` gives the adapters of vector `n` and `g`
    /// is `row_factors`, one a row. `x` is `[batch, d_in]`, `y` `[batch, d_out]`.
    ///
    /// A row and a vector have the same bits whatever is computed beside them:
    ///
    /// 1. the base product;
    /// 2. plus each term in turn, by [`Kernels::gemv_dense`] with `A` and [`Kernels::gemv_dense_add`] with `B`;
    /// 3. times the row factor, if there are any; this is where `DoRA` comes in;
    /// 4. plus the bias, if there is one;
    /// 5. rounded to `Y`. Every NaN becomes the one of [`Float::from_f32`].
    pub(crate) fn forward<'a, Y: Float, T: Iterator<Item = Term<'a>>>(
        &self,
        x: &[f32],
        terms: impl Fn(usize) -> T,
        row_factors: Option<&[f32]>,
        work: &mut Work,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let batch = self.check_batch(x, y)?;
        let (d_out, d_in, kernels) = (self.d_out(), self.d_in(), self.kernels);
        let rank = self.check_terms(batch, &terms)?;
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
            Some(activations) => kernels.gemm(&view, activations, product)?,
            None => kernels.gemm_f32(&view, x, product)?,
        }
        for first in (0..d_out).step_by(ROWS) {
            let rows = first..d_out.min(first + ROWS);
            for n in 0..batch {
                let mut sums = [0.0; ROWS];
                let sums = &mut sums[..rows.len()];
                let products = product[first * batch + n..].iter().step_by(batch);
                sums.iter_mut().zip(products).for_each(|(s, p)| *s = *p);
                let mut low_rank = &buffers.low_rank[n * rank..][..rank];
                for Term { adapter, factor } in terms(n) {
                    let (rank, product) = (adapter.rank(), low_rank.split_at(adapter.rank()));
                    low_rank = product.1;
                    let b = &adapter.b().data()[rows.start * rank..rows.end * rank];
                    kernels.gemv_dense_add(b, product.0, factor, sums)?;
                }
                if let Some(factors) = row_factors {
                    sums.iter_mut().zip(&factors[rows.clone()]).for_each(|(s, g)| *s *= g);
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
        row_factors: Option<&[f32]>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.check_batch(x, y)?;
        let (inputs, work) = scratch.inputs(x.len())?;
        inputs.iter_mut().zip(x).for_each(|(input, x)| *input = x.to_f32());
        self.forward(inputs, terms, row_factors, work, y)
    }

    /// The largest sum of ranks that a vector has, if all adapters fit.
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
                sum = sum.saturating_add(adapter.rank());
            }
            largest = largest.max(sum);
        }
        Ok(largest)
    }
}
