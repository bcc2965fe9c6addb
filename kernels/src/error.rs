//! The error of operations whose arguments do not fit each other.

use core::fmt;

/// The error of an operation whose arguments have shapes that do not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShapeError {
    /// A slice has the wrong length.
    Length {
        /// Which slice.
        what: &'static str,
        /// The length that the other arguments require.
        expected: usize,
        /// The length that was given.
        got: usize,
    },
    /// `rows * cols`, or an offset made from it, does not fit in `usize`.
    Overflow {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A block size is not 32, 64, 128, 256, 512, 1024, 2048 or 4096.
    BlockSize {
        /// The number that was given.
        got: usize,
    },
    /// A range of rows is out of bounds.
    Rows {
        /// First row of the range.
        start: usize,
        /// One past the last row of the range.
        end: usize,
        /// Rows of the matrix.
        rows: usize,
    },
    /// Activations were quantized in groups of another length than the matrix needs.
    Group {
        /// Group length of the matrix ([`crate::BlockSize::activation_group`]).
        expected: usize,
        /// Group length of the activations.
        got: usize,
    },
    /// Activations were quantized by the kernels of another instruction set, which need them in another order.
    Order,
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Length { what, expected, got } => write!(f, "{what}: expected length {expected}, got {got}"),
            Self::Overflow { rows, cols } => {
                write!(f, "a matrix of {rows} x {cols} elements does not fit in the address space")
            }
            Self::BlockSize { got } => {
                write!(f, "block size {got}: expected 32, 64, 128, 256, 512, 1024, 2048 or 4096")
            }
            Self::Rows { start, end, rows } => write!(f, "rows {start}..{end} do not lie in 0..{rows}"),
            Self::Group { expected, got } => write!(
                f,
                "activations are quantized in groups of {got}, but the matrix's block size needs groups of {expected}"
            ),
            Self::Order => write!(f, "activations were quantized by the kernels of another instruction set"),
        }
    }
}

impl core::error::Error for ShapeError {}

/// `Ok` if `got == expected`.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), ShapeError> {
    if got == expected { Ok(()) } else { Err(ShapeError::Length { what, expected, got }) }
}
