//! Only the kernels, in arrays: what firmware does with a weight in its flash.
//!
//!     cargo run --example no_alloc
//!
//! Everything but the printing works without `std` and without a heap, with `default-features = false`.

use nf4::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix, ShapeError};

const ROWS: usize = 4;
const COLS: usize = 64;
const BLOCK: BlockSize = BlockSize::B64;

/// A quantized weight: packed codes, two per byte, and one absmax per block.
static PACKED: [u8; ROWS * COLS / 2] = [0xf8; ROWS * COLS / 2];
static ABSMAX: [f32; ROWS * COLS / 64] = [0.5, 1.0, 1.5, 2.0];

fn main() -> Result<(), ShapeError> {
    let kernels = Kernels::detect();
    let weight = Nf4Matrix::new(&PACKED, Absmax::Plain(&ABSMAX), ROWS, COLS, BLOCK)?;

    let x = [1.0_f32; COLS];
    let mut values = [0_i16; COLS];
    let mut scales = [0.0_f32; COLS / 64];
    assert_eq!((Activations::values_len(COLS, BLOCK), Activations::scales_len(COLS, BLOCK)), (COLS, COLS / 64));
    let activations = kernels.quantize_activations(&x, BLOCK, &mut values, &mut scales)?;

    let mut y = [0.0; ROWS];
    kernels.gemv(&weight, &activations, &mut y)?;
    println!("{} kernels: y = {y:?}", kernels.isa());
    Ok(())
}
