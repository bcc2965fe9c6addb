//! Reading of tensors, and what is left over.

use alloc::collections::BTreeSet;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use nf4::checkpoint::{CheckpointError, FloatType, TensorInfo, TensorSource};

use crate::error::Error;

/// `Ok` if the tensor is there and has this shape.
pub(crate) fn check_shape(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<(), Error> {
    let info = info_of(source, name)?;
    if info.shape == shape {
        return Ok(());
    }
    let tensor = name.to_string();
    Err(CheckpointError::Shape { tensor, expected: shape.to_vec(), got: info.shape.clone() }.into())
}

/// The values of a tensor of a float type, exact.
pub(crate) fn floats_of(source: &dyn TensorSource, name: &str) -> Result<Vec<f32>, Error> {
    let float = float_type(source, name)?;
    Ok(float.values(&source.read(name)?))
}

/// The vector `name` of `len` values, which all are finite.
pub(crate) fn vector(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, Error> {
    check_shape(source, name, &[len])?;
    let values = floats_of(source, name)?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(index) => {
            let error = nf4::Error::NotFinite { what: "vector", index, value: values[index] };
            Err(Error::Layer { module: name.to_string(), error })
        }
    }
}

pub(crate) fn float_type(source: &dyn TensorSource, name: &str) -> Result<FloatType, Error> {
    let got = info_of(source, name)?.dtype;
    FloatType::from_dtype(got).ok_or_else(|| {
        let (tensor, expected) = (name.to_string(), "F32, F16 or BF16");
        CheckpointError::Type { tensor, expected, got }.into()
    })
}

fn info_of<'s>(source: &'s dyn TensorSource, name: &str) -> Result<&'s TensorInfo, Error> {
    source.info(name).ok_or_else(|| CheckpointError::Missing { tensor: name.to_string() }.into())
}

/// The names of a checkpoint's tensors that nothing has asked for yet.
#[derive(Debug)]
pub(crate) struct Unused(BTreeSet<String>);

impl Unused {
    pub(crate) fn new(source: &dyn TensorSource) -> Self {
        Self(source.names().map(ToString::to_string).collect())
    }

    /// The tensor `name`, and what stands beside it if it is packed, is used.
    pub(crate) fn take(&mut self, name: &str) {
        self.0.remove(name);
        self.0.retain(|other| other.strip_prefix(name).is_none_or(|rest| !rest.starts_with('.')));
    }

    /// `Ok` if no tensor is left. Old checkpoints have the frequencies of the rotary embedding, which follow from
    /// `config.json`; and a tied head may be there a second time.
    pub(crate) fn check(&self, tied: bool) -> Result<(), Error> {
        let known = |name: &str| name.ends_with(".rotary_emb.inv_freq") || (tied && name.starts_with("lm_head."));
        match self.0.iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                let reason = "no part of the model that config.json describes has this tensor".to_string();
                Err(Error::Unsupported { what: name.clone(), reason })
            }
        }
    }
}
