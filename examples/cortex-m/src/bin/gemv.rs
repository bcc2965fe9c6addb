//! The smallest firmware that multiplies: a matrix in flash, activations quantized and multiplied, nothing else. Its sizes are
//! those of the kernels, and `.ci/embedded.sh` checks that nothing in it can panic.
#![no_std]
#![no_main]

use core::hint::black_box;

use cortex_m_rt::entry;
use cortex_m_semihosting::debug;
use nf4::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix, ShapeError};
use panic_semihosting as _;

const ROWS: usize = 64;
const COLS: usize = 384;
const BLOCK: BlockSize = BlockSize::B64;

static PACKED: [u8; ROWS * COLS / 2] = [0x7f; ROWS * COLS / 2];
static ABSMAX: [f32; ROWS * COLS / BLOCK.get()] = [1.0; ROWS * COLS / BLOCK.get()];

#[entry]
fn main() -> ! {
    static mut VALUES: [i16; Activations::values_len(COLS, BLOCK)] = [0; Activations::values_len(COLS, BLOCK)];
    static mut SCALES: [f32; Activations::scales_len(COLS, BLOCK)] = [0.0; Activations::scales_len(COLS, BLOCK)];
    static mut X: [f32; COLS] = [1.0; COLS];
    static mut Y: [f32; ROWS] = [0.0; ROWS];

    let ok = product(black_box(X), VALUES, SCALES, Y).is_ok();
    black_box(Y);
    debug::exit(if ok { debug::EXIT_SUCCESS } else { debug::EXIT_FAILURE });
    loop {
        cortex_m::asm::wfi();
    }
}

/// A function of its own, so that its size can be read: the kernels are compiled for the shapes, and may be inlined here.
#[inline(never)]
fn product(x: &[f32], values: &mut [i16], scales: &mut [f32], y: &mut [f32]) -> Result<(), ShapeError> {
    let kernels = Kernels::detect();
    let weight = Nf4Matrix::new(black_box(&PACKED), Absmax::Plain(black_box(&ABSMAX)), ROWS, COLS, BLOCK)?;
    let activations = kernels.quantize_activations(x, BLOCK, values, scales)?;
    kernels.gemv(&weight, &activations, y)
}
