//! The values of candle's tensors as slices, and back.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Error, Layout, Result, Shape, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// What is not a shape of candle: an error of the library in candle's type.
pub(crate) fn wrap(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(error).bt()
}

/// The shape `[..., d_out]` of the outputs for inputs of shape `[..., d_in]`.
pub(crate) fn output_shape(op: &'static str, input: &Shape, [d_out, d_in]: [usize; 2]) -> Result<Shape> {
    let Some((last, front)) = input.dims().split_last().filter(|(last, _)| **last == d_in) else {
        let msg = format!("{op}: an input of shape {input:?} does not end with {d_in} values");
        return Err(Error::Msg(msg).bt());
    };
    // A layer without inputs is not worth a rule of its own.
    debug_assert_eq!(*last, d_in);
    Ok(front.iter().copied().chain([d_out]).collect::<Vec<_>>().into())
}

/// The values of a contiguous tensor as f32, which is exact; borrowed if that is their type.
pub(crate) fn floats<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    let Some((start, end)) = layout.contiguous_offsets() else { return Err(Error::RequiresContiguous { op }.bt()) };
    Ok(match storage {
        CpuStorage::F32(values) => Cow::Borrowed(&values[start..end]),
        CpuStorage::F16(values) => Cow::Owned(values[start..end].to_f32_vec()),
        CpuStorage::BF16(values) => Cow::Owned(values[start..end].to_f32_vec()),
        other => return Err(unsupported(op, candle_core::backend::BackendStorage::dtype(other))),
    })
}

/// Calls `f` with the values of a tensor as f32, in order.
pub(crate) fn with_floats<T>(op: &'static str, tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(Error::Msg(format!("{op}: not on the CPU")).bt()) };
    f(&floats(op, storage, layout)?)
}

/// Values of a type that candle stores and `nf4` computes with.
pub(crate) trait Element: nf4::Float + Default {
    fn store(values: Vec<Self>) -> CpuStorage;
}

impl Element for f32 {
    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F32(values)
    }
}

impl Element for f16 {
    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F16(values)
    }
}

impl Element for bf16 {
    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::BF16(values)
    }
}

/// A function that writes outputs in any of the types.
pub(crate) trait Fill {
    fn fill<Y: Element>(self, y: &mut [Y]) -> std::result::Result<(), nf4::Error>;
}

/// `len` outputs of this type.
pub(crate) fn filled(op: &'static str, dtype: DType, len: usize, fill: impl Fill) -> Result<CpuStorage> {
    fn of<Y: Element>(len: usize, fill: impl Fill) -> Result<CpuStorage> {
        let mut y = vec![Y::default(); len];
        fill.fill(&mut y).map_err(wrap)?;
        Ok(Y::store(y))
    }
    match dtype {
        DType::F32 => of::<f32>(len, fill),
        DType::F16 => of::<f16>(len, fill),
        DType::BF16 => of::<bf16>(len, fill),
        other => Err(unsupported(op, other)),
    }
}

fn unsupported(op: &'static str, dtype: DType) -> Error {
    Error::UnsupportedDTypeForOp(dtype, op).bt()
}
