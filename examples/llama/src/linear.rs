//! The linear layers of a model: packed as NF4, or as the checkpoint left them.

use alloc::string::ToString;
use alloc::vec::Vec;

use nf4::checkpoint::{CheckpointError, Linear4bit, TensorSource};
use nf4::{Adapters, Arithmetic, InputsBuf, Kernels, LoRAAdapter, MultiAdapterLayer, Quantized4Bit, Scratch};

use crate::error::{Error, buffer};
use crate::matrix::{Matrix, TILE};
use crate::threads::Pool;
use crate::weights::vector;

/// A linear layer with any number of adapters.
#[derive(Debug)]
pub(crate) struct Linear {
    base: Base,
    /// For each adapter of the model, what it adds to this layer.
    adapters: Vec<Adapter>,
}

#[derive(Debug)]
enum Base {
    Packed(MultiAdapterLayer),
    /// Not quantized by the checkpoint.
    Dense {
        matrix: Matrix,
        bias: Option<Vec<f32>>,
        kernels: Kernels,
        pool: Pool,
    },
}

#[derive(Debug)]
enum Adapter {
    None,
    Packed(nf4::AdapterId),
    Dense(LoRAAdapter),
}

/// What all layers of a model have in common.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) pool: Pool,
    pub(crate) arithmetic: Arithmetic,
    pub(crate) kernels: Kernels,
    /// Whether weights that are not packed are to be.
    pub(crate) quantize: bool,
}

/// Buffers of the forwards of any layer.
#[derive(Debug, Default)]
pub(crate) struct LinearScratch {
    inputs: InputsBuf,
    scratch: Scratch,
    /// `A x` of one vector.
    low_rank: Vec<f32>,
    /// Products with a dense matrix.
    pub(crate) tile: Vec<f32>,
    /// The adapter of each vector, in a layer.
    chosen: Vec<Option<nf4::AdapterId>>,
}

/// Construction.
impl Linear {
    /// Reads `module`, which must have the shape `[d_out, d_in]`.
    pub(crate) fn load(
        source: &dyn TensorSource,
        module: &str,
        [d_out, d_in]: [usize; 2],
        bias: bool,
        settings: &Settings,
    ) -> Result<Self, Error> {
        let bias_name = alloc::format!("{module}.bias");
        let fail = Error::layer(module);
        if source.info(&alloc::format!("{module}.weight.absmax")).is_some() {
            let layer = Linear4bit::load(source, module)?;
            let got = [layer.weight().rows(), layer.weight().cols()];
            if got != [d_out, d_in] {
                let (tensor, expected) = (alloc::format!("{module}.weight"), alloc::vec![d_out, d_in]);
                return Err(CheckpointError::Shape { tensor, expected, got: got.to_vec() }.into());
            }
            let (weight, found) = layer.into_parts();
            check_bias(&bias_name, bias, found.is_some())?;
            return Self::packed(weight, found, settings).map_err(fail);
        }
        let matrix = Matrix::load(source, &alloc::format!("{module}.weight"), [d_out, d_in])?;
        let has_bias = source.info(&bias_name).is_some();
        check_bias(&bias_name, bias, has_bias)?;
        let bias = if has_bias { Some(vector(source, &bias_name, d_out)?) } else { None };
        if settings.quantize {
            let weight = matrix.quantize().map_err(&fail)?;
            return Self::packed(weight, bias, settings).map_err(fail);
        }
        Ok(Self {
            base: Base::Dense { matrix, bias, kernels: settings.kernels, pool: settings.pool.clone() },
            adapters: Vec::new(),
        })
    }

    /// A layer on a packed weight.
    pub(crate) fn packed(
        weight: Quantized4Bit,
        bias: Option<Vec<f32>>,
        settings: &Settings,
    ) -> Result<Self, nf4::Error> {
        let layer = MultiAdapterLayer::new(weight).with_arithmetic(settings.arithmetic).with_kernels(settings.kernels);
        let layer = match &settings.pool.0 {
            Some(threads) => layer.with_threads(threads.clone()),
            None => layer,
        };
        let layer = match bias {
            Some(bias) => layer.with_bias(bias)?,
            None => layer,
        };
        Ok(Self { base: Base::Packed(layer), adapters: Vec::new() })
    }

    /// Adds the next adapter of the model; `None` if it leaves this layer as it is.
    pub(crate) fn add(&mut self, name: &str, adapter: Option<&LoRAAdapter>) -> Result<(), nf4::Error> {
        self.adapters.push(match (&mut self.base, adapter) {
            (_, None) => Adapter::None,
            (Base::Packed(layer), Some(adapter)) => Adapter::Packed(layer.add(name, adapter.clone())?),
            (Base::Dense { .. }, Some(adapter)) => Adapter::Dense(adapter.clone()),
        });
        Ok(())
    }

    /// `Ok` if an adapter fits.
    pub(crate) fn check(&self, adapter: &LoRAAdapter) -> Result<(), nf4::Error> {
        let (base, got) = (self.shape(), [adapter.d_out(), adapter.d_in()]);
        if base == got { Ok(()) } else { Err(nf4::Error::Mismatch { base, adapter: got }) }
    }

    /// Whether the weight is not packed, so that an adapter with a magnitude (`DoRA`) cannot join it.
    pub(crate) fn is_dense(&self) -> bool {
        matches!(self.base, Base::Dense { .. })
    }

    /// `[d_out, d_in]`.
    fn shape(&self) -> [usize; 2] {
        match &self.base {
            Base::Packed(layer) => [layer.d_out(), layer.d_in()],
            Base::Dense { matrix, .. } => matrix.shape(),
        }
    }

    /// Bytes of weights, scales and adapters, wherever they are.
    pub(crate) fn data_bytes(&self) -> usize {
        match &self.base {
            Base::Packed(layer) => layer.base_weight_quantized().data_bytes(),
            Base::Dense { matrix, .. } => matrix.data_bytes(),
        }
    }
}

/// Forward.
impl Linear {
    /// The outputs `[rows, d_out]` of `x` `[rows, d_in]`, each row with its adapter.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        adapters: &[Option<usize>],
        scratch: &mut LinearScratch,
        y: &mut [f32],
    ) -> Result<(), nf4::Error> {
        forward_all([(self, y)], x, adapters, scratch)
    }

    fn forward_dense(
        &self,
        x: &[f32],
        adapters: &[Option<usize>],
        low_rank: &mut [f32],
        tile: &mut [f32],
        y: &mut [f32],
    ) -> Result<(), nf4::Error> {
        let Base::Dense { matrix, bias, kernels, pool } = &self.base else { return Ok(()) };
        matrix.product(*kernels, pool, x, tile, y)?;
        let [d_out, d_in] = matrix.shape();
        for ((x, y), adapter) in x.chunks_exact(d_in).zip(y.chunks_exact_mut(d_out)).zip(adapters) {
            if let Some(Adapter::Dense(adapter)) = adapter.and_then(|n| self.adapters.get(n)) {
                let low_rank = &mut low_rank[..adapter.rank()];
                kernels.gemv_dense(adapter.a().data(), x, low_rank)?;
                kernels.gemv_dense_add(adapter.b().data(), low_rank, adapter.scale(), y)?;
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        Ok(())
    }
}

/// The outputs of several layers for the same inputs, which are quantized once.
pub(crate) fn forward_all<const N: usize>(
    layers: [(&Linear, &mut [f32]); N],
    x: &[f32],
    adapters: &[Option<usize>],
    buffers: &mut LinearScratch,
) -> Result<(), nf4::Error> {
    let LinearScratch { inputs, scratch, low_rank, tile, chosen } = buffers;
    // The first packed layer quantizes for all with its group of inputs.
    let packed = |linear: &Linear| match &linear.base {
        Base::Packed(layer) => Some(layer.base_weight_quantized().block_size().activation_group()),
        Base::Dense { .. } => None,
    };
    let first = layers.iter().find_map(|(linear, _)| packed(linear).map(|group| (*linear, group)));
    let shared = match first {
        Some((Linear { base: Base::Packed(layer), .. }, group)) => Some((layer.quantize_inputs(x, inputs)?, group)),
        _ => None,
    };
    for (linear, y) in layers {
        let Base::Packed(layer) = &linear.base else {
            linear.forward_dense(x, adapters, low_rank, tile, y)?;
            continue;
        };
        for (chosen, adapter) in chosen.iter_mut().zip(adapters) {
            *chosen = match adapter.and_then(|n| linear.adapters.get(n)) {
                Some(Adapter::Packed(id)) => Some(*id),
                _ => None,
            };
        }
        let chosen = Adapters::PerVector(&chosen[..adapters.len()]);
        match &shared {
            Some((inputs, group)) if packed(linear) == Some(*group) => {
                layer.forward_shared(inputs, chosen, scratch, y)?
            }
            _ => layer.forward_into(x, chosen, scratch, y)?,
        }
    }
    Ok(())
}

impl LinearScratch {
    /// Grows the buffers so that batches of `rows` vectors fit for a layer.
    pub(crate) fn reserve(&mut self, linear: &Linear, rows: usize) -> Result<(), Error> {
        let [d_out, d_in] = linear.shape();
        let fail = Error::layer("workspace");
        let mut rank = 0;
        match &linear.base {
            Base::Packed(layer) => {
                let block_size = layer.base_weight_quantized().block_size();
                let ranks = layer.names().filter_map(|name| layer.adapter(name)).map(LoRAAdapter::rank);
                let largest = ranks.max().unwrap_or(0);
                self.inputs.reserve(d_in, block_size, rows).map_err(&fail)?;
                self.scratch.reserve(d_out, d_in, block_size, largest, rows).map_err(&fail)?;
            }
            Base::Dense { pool, .. } => {
                self.reserve_tile(pool.count())?;
                for adapter in &linear.adapters {
                    if let Adapter::Dense(adapter) = adapter {
                        rank = rank.max(adapter.rank());
                    }
                }
            }
        }
        if self.low_rank.len() < rank {
            self.low_rank = buffer("low-rank products", rank)?;
        }
        if self.chosen.len() < rows {
            self.chosen = buffer("adapters", rows)?;
        }
        Ok(())
    }

    /// Makes the buffer of products with dense matrices.
    pub(crate) fn reserve_tile(&mut self, threads: usize) -> Result<(), Error> {
        let len = TILE.saturating_mul(threads);
        if self.tile.len() < len {
            self.tile = buffer("products with a dense matrix", len)?;
        }
        Ok(())
    }

    /// Bytes on the heap.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.inputs.memory_bytes()
            + self.scratch.memory_bytes()
            + size_of_val(&*self.low_rank)
            + size_of_val(&*self.tile)
            + size_of_val(&*self.chosen)
    }
}

fn check_bias(name: &str, expected: bool, found: bool) -> Result<(), Error> {
    match (expected, found) {
        (true, false) => Err(CheckpointError::Missing { tensor: name.to_string() }.into()),
        (false, true) => {
            let reason = "a bias that config.json does not name".to_string();
            Err(Error::Unsupported { what: name.to_string(), reason })
        }
        _ => Ok(()),
    }
}
