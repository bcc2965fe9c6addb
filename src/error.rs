//! What a layer was given that does not fit, with the numbers.

use alloc::boxed::Box;
use core::fmt;

use nf4_kernels::{Float, ShapeError};

/// Why a layer, or a part of one, could not be made or used.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A slice, a range or a block size does not fit the operation.
    Shape(ShapeError),
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
    /// A base and an adapter, or a shape and an adapter, that differ in `[d_out, d_in]`.
    Mismatch {
        /// `[d_out, d_in]` of the base.
        base: [usize; 2],
        /// `[d_out, d_in]` of the adapter.
        adapter: [usize; 2],
    },
    /// An adapter of rank 0.
    RankZero,
    /// A NaN or infinity where one would spoil results in silence.
    NotFinite {
        /// In what.
        what: &'static str,
        /// Flat index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A `LoRA` alpha that is NaN or infinite.
    Alpha {
        /// The alpha that was given.
        got: f32,
    },
    /// A batch that does not consist of whole vectors.
    Batch {
        /// Values of a vector.
        d_in: usize,
        /// Values of the batch.
        got: usize,
    },
    /// A `DoRA` adapter whose `A`, `B` or magnitude may have changed since the norms of its rows were taken.
    StaleNorms,
    /// A name that no adapter of a layer has.
    UnknownAdapter {
        /// The name.
        name: Box<str>,
    },
    /// A name that another adapter of a layer has.
    DuplicateAdapter {
        /// The name.
        name: Box<str>,
    },
    /// Something about one of the adapters of a layer.
    Adapter {
        /// Its name.
        name: Box<str>,
        /// What.
        error: Box<Error>,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape(error) => error.fmt(f),
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
            Self::Alpha { got } => write!(f, "alpha is {got}, which is not finite"),
            Self::Batch { d_in, got } => write!(f, "a batch of vectors of {d_in} values cannot have {got}"),
            Self::StaleNorms => {
                f.write_str("the norms of a DoRA adapter are stale: call refresh_dora after changing it")
            }
            Self::UnknownAdapter { name } => write!(f, "no adapter has the name `{name}`"),
            Self::DuplicateAdapter { name } => write!(f, "there is already an adapter of the name `{name}`"),
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

/// What the infallible twin of a `try_` function does with its result.
///
/// # Panics
/// If there is an error, with its numbers.
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

/// The number of vectors of `d_in` values in `got` values, if these are whole vectors; 0 if there are no values.
pub(crate) fn check_batch(got: usize, d_in: usize) -> Result<usize, Error> {
    match got.checked_rem(d_in) {
        Some(0) => Ok(got / d_in),
        None if got == 0 => Ok(0),
        _ => Err(Error::Batch { d_in, got }),
    }
}
