//! A model with dense weights only: 4-bit layers restored, an adapter merged.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::float::read_floats;
use super::header::tensor_bytes;
use super::quant_state::{COMPANIONS, WEIGHT};
use super::source::{TensorSource, bytes_of, info_of};
use super::{CheckpointError, FloatType, Linear4bit, PeftAdapter, QuantState, join, linear4bit_prefixes};
use crate::QLoRALayer;
use crate::buffer::{reserved, zeros};

/// Rows that are merged at a time.
const ROWS: usize = 64;

/// The tensors of a model whose 4-bit layers are restored and to which an adapter, if there is one, is added, all
/// floats in one type. It is a [`TensorSource`]: types and shapes are known at once, each tensor is computed when it is
/// read, and [`super::write_safetensors`] or [`super::write_gguf`] makes a file of them.
///
/// A weight is `dequantize(base) + scale * B A`, with `DoRA` each row times its magnitude over its norm, rounded once
/// to f32 and once more to f16 or bf16. Other float tensors are rounded to the type; integers stay.
///
/// Reading a merged weight takes its bytes, those of the packed weight, of the adapter, and 64 rows of f32; that of a
/// dense base takes it in f32.
#[derive(Clone)]
pub struct MergedModel<'a> {
    source: &'a dyn TensorSource,
    adapter: Option<&'a PeftAdapter>,
    float: FloatType,
    infos: BTreeMap<String, TensorInfo>,
}

impl core::fmt::Debug for MergedModel<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MergedModel").field("float", &self.float).field("infos", &self.infos).finish_non_exhaustive()
    }
}

impl<'a> MergedModel<'a> {
    /// The model in `source` with `adapter`, in the type `float`. Only descriptions are read.
    ///
    /// # Errors
    /// Those of [`QuantState::load`] for a 4-bit layer; [`CheckpointError::Missing`] for a module of the adapter that
    /// the model does not have, and for a base bias that a `lora_bias` needs, as in PEFT; [`CheckpointError::Layer`]
    /// for a module of another shape.
    pub fn new(
        source: &'a dyn TensorSource,
        adapter: Option<&'a PeftAdapter>,
        float: FloatType,
    ) -> Result<Self, CheckpointError> {
        let mut model = Self { source, adapter, float, infos: BTreeMap::new() };
        let mut companions = BTreeMap::new();
        for prefix in linear4bit_prefixes(source) {
            let state = QuantState::load(source, &prefix)?;
            model.add(join(&prefix, WEIGHT), float.dtype(), state.shape)?;
            companions.extend(COMPANIONS.map(|name| (join(&prefix, name), ())));
        }
        for name in source.names().filter(|name| !companions.contains_key(*name)) {
            if !model.infos.contains_key(name) {
                let info = info_of(source, name)?;
                model.add(name.to_owned(), converted(info.dtype, float), info.shape.clone())?;
            }
        }
        for (name, tensor) in adapter.iter().flat_map(|a| a.replaced()) {
            model.add(name.clone(), converted(tensor.dtype(), float), tensor.shape().to_vec())?;
        }
        model.check_adapter()?;
        Ok(model)
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: Vec<usize>) -> Result<(), CheckpointError> {
        let data_offsets = (0, tensor_bytes(&name, dtype, &shape)?);
        self.infos.insert(name, TensorInfo { dtype, shape, data_offsets });
        Ok(())
    }

    fn check_adapter(&self) -> Result<(), CheckpointError> {
        let Some(adapter) = self.adapter else { return Ok(()) };
        for (module, part) in adapter.modules() {
            let name = join(module, WEIGHT);
            let shape = &*info_of(self, &name)?.shape;
            let (cols, outer) = shape.split_last().unwrap_or((&1, &[]));
            let mut base = [outer.iter().product(), *cols];
            if adapter.config().fan_in_fan_out() && !self.is_packed(module) {
                base.reverse();
            }
            let got = [part.adapter().d_out(), part.adapter().d_in()];
            if base != got {
                let error = crate::Error::Mismatch { base, adapter: got };
                return Err(CheckpointError::Layer { layer: module.to_owned(), error });
            }
            if part.lora_bias().is_some() {
                info_of(self, &join(module, "bias"))?;
            }
        }
        Ok(())
    }

    /// Whether the weight of a module is a 4-bit one.
    fn is_packed(&self, module: &str) -> bool {
        self.source.info(&join(module, super::quant_state::STATE)).is_some()
    }

    /// The weight of a 4-bit layer.
    fn packed(&self, module: &str) -> Result<Vec<u8>, CheckpointError> {
        let layer = Linear4bit::load(self.source, module)?;
        let [rows, cols] = layer.state().matrix_shape()?;
        // Rows without columns have no bytes, and so there may be any number of them.
        let rows = if cols == 0 { 0 } else { rows };
        let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
        let (weight, _) = layer.into_parts();
        let mut bytes = reserved(rows, cols.saturating_mul(self.float.size())).map_err(error)?;
        let mut tile = zeros(ROWS.min(rows), cols).map_err(error)?;
        let mut write = |get: &dyn Fn(core::ops::Range<usize>, &mut [f32]) -> Result<(), crate::Error>| {
            for start in (0..rows).step_by(ROWS) {
                let end = rows.min(start + ROWS);
                let tile = &mut tile[..(end - start) * cols];
                get(start..end, tile).map_err(error)?;
                self.float.extend_bytes(tile, &mut bytes);
            }
            Ok(())
        };
        match self.adapter.and_then(|adapter| adapter.module(module)) {
            None => write(&|rows, tile| weight.dequantize_rows(rows, tile))?,
            Some(part) => {
                let layer = QLoRALayer::from_parts(weight, part.adapter().clone()).map_err(error)?;
                write(&|rows, tile| layer.merge_rows_into(rows, tile))?;
            }
        }
        Ok(bytes)
    }

    /// The weight of a dense layer with an adapter.
    fn dense(&self, adapter: &PeftAdapter, module: &str) -> Result<Vec<u8>, CheckpointError> {
        let name = join(module, WEIGHT);
        let (mut weight, _) = read_floats(self.origin(&name), &name)?;
        let shape = &info_of(self, &name)?.shape;
        let (cols, outer) = shape.split_last().unwrap_or((&1, &[]));
        adapter.merge_dense(module, &mut weight, [outer.iter().product(), *cols])?;
        Ok(self.encoded(&weight))
    }

    /// Where a tensor comes from: the adapter, if it was trained as a whole, or the base.
    fn origin(&self, name: &str) -> &dyn TensorSource {
        match self.adapter {
            Some(adapter) if adapter.replaced().contains_key(name) => adapter.replaced(),
            _ => self.source,
        }
    }

    fn encoded(&self, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.float.extend_bytes(values, &mut bytes);
        bytes
    }
}

impl TensorSource for MergedModel<'_> {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.infos.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let info = info_of(self, name)?;
        let origin = self.origin(name);
        if let Some(module) = module_of(name, WEIGHT) {
            let adapter = self.adapter.filter(|adapter| adapter.module(module).is_some());
            if self.is_packed(module) && !self.adapter.is_some_and(|a| a.replaced().contains_key(name)) {
                return self.packed(module).map(Cow::Owned);
            }
            if let Some(adapter) = adapter {
                return self.dense(adapter, module).map(Cow::Owned);
            }
        }
        let part = module_of(name, "bias").and_then(|module| self.adapter?.module(module));
        if let Some(part) = part.filter(|part| part.lora_bias().is_some()) {
            let bias = part.add_to_bias(Some(read_floats(origin, name)?.0));
            return Ok(Cow::Owned(self.encoded(&bias.unwrap_or_default())));
        }
        if info_of(origin, name)?.dtype == info.dtype {
            return bytes_of(origin, name);
        }
        Ok(Cow::Owned(self.encoded(&read_floats(origin, name)?.0)))
    }
}

/// The type of a tensor of the base in the merged model.
fn converted(dtype: Dtype, float: FloatType) -> Dtype {
    if FloatType::from_dtype(dtype).is_some() || dtype == Dtype::F64 { float.dtype() } else { dtype }
}

/// The module that a tensor `module.part` is of; the empty one in a file with one layer.
fn module_of<'n>(name: &'n str, part: &str) -> Option<&'n str> {
    let rest = name.strip_suffix(part)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}
