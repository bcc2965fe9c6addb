//! The error of weights, adapters and layers.

use alloc::boxed::Box;
use core::fmt;

use nf4_kernels::{Float, ShapeError};

/// What went wrong in a weight, adapter, layer or optimizer, with the numbers that do not fit.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A slice, a range or a block size does not fit the operation.
    Shape(ShapeError),
    /// There is no memory for a buffer.
    OutOfMemory {
        /// Size of the buffer in bytes; `usize::MAX` if it is larger.
        bytes: usize,
    },
    /// A range is out of bounds.
    Range {
        /// First byte of the range.
        start: usize,
        /// One past its last byte.
        end: usize,
        /// Number of bytes that there are.
        len: usize,
    },
    /// A matrix does not have `rows * cols` values.
    MatrixLength {
        /// Which matrix.
        what: &'static str,
        /// Rows that it should have.
        rows: usize,
        /// Columns that it should have.
        cols: usize,
        /// Values that it has.
        got: usize,
    },
    /// A base and an adapter differ in `[d_out, d_in]`.
    Mismatch {
        /// `[d_out, d_in]` of the base.
        base: [usize; 2],
        /// `[d_out, d_in]` of the adapter.
        adapter: [usize; 2],
    },
    /// An adapter of rank 0.
    RankZero,
    /// A weight, scale, gradient or setting is NaN or infinite.
    NotFinite {
        /// Which slice it is in.
        what: &'static str,
        /// Flat index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A `LoRA` alpha, or the scale that results from it, is NaN or infinite.
    Alpha {
        /// The alpha that was given.
        got: f64,
    },
    /// The length of a batch is not a multiple of the length of a vector.
    Batch {
        /// Number of values per vector.
        d_in: usize,
        /// Number of values in the batch.
        got: usize,
    },
    /// Inputs were quantized for another arithmetic than the layer uses.
    Arithmetic {
        /// The name of the layer's arithmetic.
        expected: &'static str,
        /// The name of the arithmetic that the inputs were quantized for.
        got: &'static str,
    },
    /// A `DoRA` adapter was changed, but its norms were not recomputed.
    StaleNorms,
    /// No adapter of the layer has this name.
    UnknownAdapter {
        /// The name.
        name: Box<str>,
    },
    /// The adapter with an id was removed from the layer.
    RemovedAdapter,
    /// The layer already has an adapter of this name.
    DuplicateAdapter {
        /// The name.
        name: Box<str>,
    },
    /// An error of one of the adapters of a layer.
    Adapter {
        /// The name of the adapter.
        name: Box<str>,
        /// The error.
        error: Box<Error>,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape(error) => error.fmt(f),
            Self::OutOfMemory { bytes: usize::MAX } => {
                f.write_str("out of memory: a buffer would be larger than the address space")
            }
            Self::OutOfMemory { bytes } => write!(f, "out of memory: there is no room for a buffer of {bytes} bytes"),
            Self::Range { start, end, len } => write!(f, "bytes {start}..{end} do not lie in 0..{len}"),
            Self::MatrixLength { what, rows, cols, got } => {
                write!(f, "{what}: expected {rows} x {cols} values, got {got}")
            }
            Self::Mismatch { base: [out, into], adapter: [a_out, a_into] } => write!(
                f,
                "the base is [d_out, d_in] = [{out}, {into}], but the adapter was made for [{a_out}, {a_into}]"
            ),
            Self::RankZero => f.write_str("rank 0: an adapter needs a rank of at least 1"),
            Self::NotFinite { what, index, value } => {
                write!(f, "{what}: value {index} is {value}, which is not finite")
            }
            Self::Alpha { got } if got.is_finite() => write!(f, "alpha {got} gives a scale that is not finite"),
            Self::Alpha { got } => write!(f, "alpha is {got}, which is not finite"),
            Self::Batch { d_in, got } => write!(f, "a batch of vectors of {d_in} values cannot have {got}"),
            Self::Arithmetic { expected, got } => {
                write!(f, "the inputs were quantized for the {got} arithmetic, but the layer uses {expected}")
            }
            Self::StaleNorms => {
                f.write_str("the norms of a DoRA adapter are stale: call refresh_dora after changing the adapter")
            }
            Self::UnknownAdapter { name } => write!(f, "there is no adapter named `{name}`"),
            Self::RemovedAdapter => f.write_str("the adapter with this id was removed"),
            Self::DuplicateAdapter { name } => write!(f, "there is already an adapter named `{name}`"),
            Self::Adapter { name, error } => write!(f, "adapter `{name}`: {error}"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Shape(error) => Some(error),
            Self::Adapter { error, .. } => Some(error),
            _ => None,
        }
    }
}

impl From<ShapeError> for Error {
    fn from(error: ShapeError) -> Self {
        Self::Shape(error)
    }
}

/// The value of a result, for the infallible twin of a `try_` function.
///
/// # Panics
/// With the message of the error, if there is one.
#[track_caller]
pub(crate) fn or_panic<T>(result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

/// `Ok` if `data` has `rows * cols` values, which must fit in `usize`.
pub(crate) fn check_matrix<T>(what: &'static str, data: &[T], rows: usize, cols: usize) -> Result<(), Error> {
    let expected = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
    if data.len() == expected { Ok(()) } else { Err(Error::MatrixLength { what, rows, cols, got: data.len() }) }
}

/// `Ok` if no value is NaN or infinite.
pub(crate) fn check_finite<T: Float>(what: &'static str, data: &[T]) -> Result<(), Error> {
    match data.iter().position(|x| !x.to_f32().is_finite()) {
        Some(index) => Err(Error::NotFinite { what, index, value: data[index].to_f32() }),
        None => Ok(()),
    }
}

/// `Ok` if `got == expected`.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(ShapeError::Length { what, expected, got }.into()) }
}

/// The number of vectors of `d_in` values in `got` values, if that is a whole number; 0 if there are no values.
pub(crate) fn check_batch(got: usize, d_in: usize) -> Result<usize, Error> {
    match got.checked_rem(d_in) {
        Some(0) => Ok(got / d_in),
        None if got == 0 => Ok(0),
        _ => Err(Error::Batch { d_in, got }),
    }
}
