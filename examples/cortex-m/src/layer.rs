//! A layer in flash: the first rows of the query projection of all-MiniLM-L6-v2 (see `tests/data/README.md`), in NF4, with a
//! `LoRA` adapter, an input and the output's expected bits.
//!
//! The test `cortex_m` of the crate around this one writes `data/layer.bin` and runs this same file on its machine.

use nf4::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix, ShapeError};

pub(crate) const ROWS: usize = 64;
pub(crate) const COLS: usize = 384;
pub(crate) const RANK: usize = 8;
pub(crate) const BLOCK: BlockSize = BlockSize::B64;
/// The factor of the adapter.
pub(crate) const SCALE: f32 = 2.0;

/// The parts of the file follow each other; numbers are little-endian.
const ABSMAX_AT: usize = ROWS * COLS / 2;
const A_AT: usize = ABSMAX_AT + size_of_val(&ABSMAX);
const B_AT: usize = A_AT + size_of_val(&A);
const X_AT: usize = B_AT + size_of_val(&B);
const Y_AT: usize = X_AT + size_of_val(&X);
const LEN: usize = Y_AT + size_of_val(&EXPECTED);
const FILE: &[u8; LEN] = include_bytes!("../data/layer.bin");

pub(crate) static PACKED: [u8; ROWS * COLS / 2] = *FILE.first_chunk().expect("the file starts with the packed codes");
static ABSMAX: [f32; ROWS * COLS / BLOCK.get()] = floats(ABSMAX_AT);
/// `[RANK, COLS]`
pub(crate) static A: [f32; RANK * COLS] = floats(A_AT);
/// `[ROWS, RANK]`
pub(crate) static B: [f32; ROWS * RANK] = floats(B_AT);
pub(crate) static X: [f32; COLS] = floats(X_AT);
pub(crate) static EXPECTED: [f32; ROWS] = floats(Y_AT);

/// Converts when compiled, so that the numbers stand in flash, aligned.
const fn floats<const N: usize>(start: usize) -> [f32; N] {
    let mut floats = [0.0; N];
    let mut i = 0;
    while i < N {
        let at = start + 4 * i;
        floats[i] = f32::from_le_bytes([FILE[at], FILE[at + 1], FILE[at + 2], FILE[at + 3]]);
        i += 1;
    }
    floats
}

/// The weight in flash.
pub(crate) fn weight() -> Result<Nf4Matrix<'static>, ShapeError> {
    Nf4Matrix::new(&PACKED, Absmax::Plain(&ABSMAX), ROWS, COLS, BLOCK)
}

/// All the RAM that a forward needs, besides the stack.
pub(crate) struct Buffers {
    pub(crate) values: [i16; Activations::values_len(COLS, BLOCK)],
    pub(crate) scales: [f32; Activations::scales_len(COLS, BLOCK)],
    pub(crate) low_rank: [f32; RANK],
    pub(crate) y: [f32; ROWS],
}

impl Buffers {
    pub(crate) const fn new() -> Self {
        Self {
            values: [0; Activations::values_len(COLS, BLOCK)],
            scales: [0.0; Activations::scales_len(COLS, BLOCK)],
            low_rank: [0.0; RANK],
            y: [0.0; ROWS],
        }
    }

    /// `W x`
    pub(crate) fn base(&mut self, kernels: Kernels, weight: &Nf4Matrix<'_>, x: &[f32]) -> Result<(), ShapeError> {
        let activations = kernels.quantize_activations(x, BLOCK, &mut self.values, &mut self.scales)?;
        kernels.gemv(weight, &activations, &mut self.y)
    }

    /// `+ SCALE * B (A x)`
    pub(crate) fn add_adapter(&mut self, kernels: Kernels, x: &[f32]) -> Result<(), ShapeError> {
        kernels.gemv_dense(&A, x, &mut self.low_rank)?;
        kernels.gemv_dense_add(&B, &self.low_rank, SCALE, &mut self.y)
    }
}

/// How many outputs do not have the expected bits.
pub(crate) fn wrong(y: &[f32]) -> usize {
    EXPECTED.iter().zip(y).filter(|(e, y)| e.to_bits() != y.to_bits()).count() + EXPECTED.len().abs_diff(y.len())
}
