//! An NF4 layer in flash, without a heap: the committed test vector and the layer on every kind of kernels of this core.
//!
//! `cargo run --release --bin layer` runs it on an emulated Cortex-M4. It ends with status 0 if every bit is as expected.
#![no_std]
#![no_main]

#[path = "../../../tests/support/generator.rs"]
mod generator;
mod layer;
mod measure;
#[allow(dead_code, reason = "names of vectors are for tests that fail")]
#[path = "../../../tests/support/vector.rs"]
mod vector;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use nf4::{Activations8x8, Kernels, ShapeError};
use panic_semihosting as _;

use layer::{BLOCK, COLS, ROWS, X};
use measure::Instructions;

#[entry]
fn main() -> ! {
    static mut VECTOR: vector::Buffers = vector::Buffers::new();
    static mut LAYER: layer::Buffers = layer::Buffers::new();

    let timer = cortex_m::Peripherals::take().map(|peripherals| peripherals.SYST);
    let instructions = timer.and_then(Instructions::new);
    if instructions.is_none() {
        hprintln!("instructions are not counted: that needs the emulator with -icount shift=0");
    }
    let mut wrong = 0;
    for kernels in Kernels::available() {
        match run_vectors(kernels, VECTOR).and_then(|w| Ok(w + run_layer(kernels, LAYER, instructions.as_ref())?)) {
            Ok(w) => wrong += w,
            Err(error) => {
                hprintln!("{}: {}", kernels.isa(), error);
                wrong += 1;
            }
        }
    }
    debug::exit(if wrong == 0 { debug::EXIT_SUCCESS } else { debug::EXIT_FAILURE });
    unreachable!("the emulator has ended");
}

/// A line with the hashes of everything that the kernels compute from the test vectors; returns 1 if a bit is wrong.
fn run_vectors(kernels: Kernels, buffers: &mut vector::Buffers) -> Result<usize, ShapeError> {
    let summary = vector::run_all(kernels, buffers)?;
    let same = summary == vector::Summary::EXPECTED;
    hprintln!("vectors {:<13} {} {}", kernels.isa(), summary, if same { "ok" } else { "CHANGED" });
    Ok(usize::from(!same))
}

/// A line with what the layer costs; returns how many of its outputs have wrong bits.
fn run_layer(
    kernels: Kernels,
    buffers: &mut layer::Buffers,
    instructions: Option<&Instructions>,
) -> Result<usize, ShapeError> {
    let (stack, result) = measure::stack(|| forward(kernels, buffers));
    result?;
    let wrong = layer::wrong(&buffers.y);
    let same = if wrong == 0 { "ok" } else { "WRONG" };
    hprintln!("layer   {:<13} {} bytes of buffers, {} of stack, {}", kernels.isa(), size_of_val(buffers), stack, same);
    if let Some(instructions) = instructions {
        let weight = layer::weight()?;
        let layer::Buffers { values, scales, y, .. } = buffers;
        let (quantize, activations) = instructions.count(|| kernels.quantize_activations(&X, BLOCK, values, scales));
        let (gemv, result) = instructions.count(|| kernels.gemv(&weight, &activations?, y));
        result?;
        let (adapter, result) = instructions.count(|| buffers.add_adapter(kernels, &X));
        result?;
        let hundredths = gemv * 100 / (weight.rows() * weight.cols()) as u32;
        hprintln!(
            "layer   {:<13} instructions: activations {}, gemv {} ({}.{:02} a weight), adapter {}",
            kernels.isa(),
            quantize,
            gemv,
            hundredths / 100,
            hundredths % 100,
            adapter,
        );
        count_8x8(kernels, instructions)?;
    }
    Ok(wrong)
}

/// A line with what the weight of the layer costs by the 8x8 product, whose bits the test vectors have.
fn count_8x8(kernels: Kernels, instructions: &Instructions) -> Result<(), ShapeError> {
    let (mut values, mut scales) = ([0; Activations8x8::values_len(COLS)], [0.0; Activations8x8::scales_len(COLS)]);
    let (weight, mut y) = (layer::weight()?, [0.0; ROWS]);
    let (quantize, activations) = instructions.count(|| kernels.quantize_activations_8x8(&X, &mut values, &mut scales));
    let (gemv, result) = instructions.count(|| kernels.gemv_8x8(&weight, &activations?, &mut y));
    result?;
    let hundredths = gemv * 100 / (ROWS * COLS) as u32;
    hprintln!(
        "layer   {:<13} instructions of 8x8: activations {}, gemv {} ({}.{:02} a weight)",
        kernels.isa(),
        quantize,
        gemv,
        hundredths / 100,
        hundredths % 100,
    );
    Ok(())
}

fn forward(kernels: Kernels, buffers: &mut layer::Buffers) -> Result<(), ShapeError> {
    buffers.base(kernels, &layer::weight()?, &X)?;
    buffers.add_adapter(kernels, &X)
}
