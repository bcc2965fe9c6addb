//! The operations, each of which checks its arguments and then calls the function of an instruction set.

#![expect(unsafe_code, reason = "calls functions of instruction sets that this CPU was found to have")]

mod activations;
mod conversions;
mod products_16x4;
mod products_8x8;
mod products_dense;
mod products_f32;
mod products_transposed;

use core::fmt;

use crate::error::{ShapeError, check_len};
use crate::isa::{Isa, PORTABLE, TABLES, Table};
use crate::matrix::Nf4Matrix;

/// The operations, implemented for one instruction set: to quantize, to dequantize, and to multiply by packed weights.
///
/// A value proves that this CPU has the instruction set. Results have the same bits on every instruction set; see [`spec`]
/// for the products and for what NaN and infinity do. Operations work in buffers that the caller provides. A value is one
/// pointer, so copies are cheap.
///
/// ```
/// use nf4_kernels::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix};
/// let kernels = Kernels::detect();
/// let (rows, cols, block) = (3, 128, BlockSize::B64);
/// let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
/// let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.3).cos()).collect();
///
/// let (mut packed, mut absmax) = (vec![0; rows * cols / 2], vec![0.0; block.blocks(rows * cols)]);
/// kernels.quantize(&weights, block, &mut packed, &mut absmax)?;
/// let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, block)?;
///
/// let mut values = vec![0; Activations::values_len(cols, block)];
/// let mut scales = vec![0.0; Activations::scales_len(cols, block)];
/// let activations = kernels.quantize_activations(&x, block, &mut values, &mut scales)?;
/// let mut y = [0.0; 3];
/// kernels.gemv(&matrix, &activations, &mut y)?;
/// # let mut z = [0.0; 3];
/// # kernels.gemv_f32(&matrix, &x, &mut z)?;
/// # assert!(y.iter().zip(z).all(|(y, z)| (y - z).abs() < 1e-2), "{y:?} {z:?}");
/// # Ok::<(), nf4_kernels::ShapeError>(())
/// ```
///
/// [`spec`]: crate::spec
#[derive(Clone, Copy)]
pub struct Kernels {
    table: &'static Table,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa()).finish()
    }
}

impl PartialEq for Kernels {
    fn eq(&self, other: &Self) -> bool {
        self.isa() == other.isa()
    }
}

impl Eq for Kernels {}

impl Default for Kernels {
    fn default() -> Self {
        Self::detect()
    }
}

/// Selection.
impl Kernels {
    /// The fastest kernels that this CPU supports. Detection runs once, and does not need `std`.
    #[must_use]
    pub fn detect() -> Self {
        match TABLES[0] {
            (_, Some(_)) => Self::available().next().unwrap_or(Self::scalar()),
            // The target decides, and this is a constant, so that firmware links only the operations that it calls.
            (table, None) => Self { table },
        }
    }

    /// The portable kernels.
    #[must_use]
    pub const fn scalar() -> Self {
        Self { table: PORTABLE.0 }
    }

    /// The kernels of every instruction set that this CPU supports, the fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        TABLES.iter().filter(|(_, supported)| supported.is_none_or(|f| f())).map(|&(table, _)| Self { table })
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.table.isa
    }
}

/// `Ok` if `out` has `rows * batch` elements.
fn check_batch_outputs(matrix: &Nf4Matrix<'_>, batch: usize, out: &[f32]) -> Result<(), ShapeError> {
    let (rows, cols) = (matrix.rows(), batch);
    check_len("outputs", rows.checked_mul(batch).ok_or(ShapeError::Overflow { rows, cols })?, out.len())
}
