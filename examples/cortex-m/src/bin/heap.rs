//! The layer of `main.rs` as a [`QLoRALayer`], which owns its data, on a heap of 64 KB.
//!
//! `cargo run --release --features alloc --bin heap` runs it on an emulated Cortex-M4.
#![no_std]
#![no_main]

extern crate alloc;

#[allow(dead_code, reason = "the layer has its own forward and its own buffers")]
#[path = "../layer.rs"]
mod layer;

use alloc::vec;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use nf4::{AbsmaxBuf, Error, Kernels, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit};
use panic_semihosting as _;

use layer::{A, B, COLS, RANK, ROWS, SCALE, X};

#[global_allocator]
static HEAP: emballoc::Allocator<{ 64 * 1024 }> = emballoc::Allocator::new();

#[entry]
fn main() -> ! {
    let ok = Kernels::available().all(|kernels| match run(kernels) {
        Ok(0) => true,
        Ok(wrong) => {
            hprintln!("{}: {} outputs are wrong", kernels.isa(), wrong);
            false
        }
        Err(error) => {
            hprintln!("{}: {}", kernels.isa(), error);
            false
        }
    });
    debug::exit(if ok { debug::EXIT_SUCCESS } else { debug::EXIT_FAILURE });
    unreachable!("the emulator has ended");
}

/// Builds the layer and runs it; returns how many outputs have wrong bits.
fn run(kernels: Kernels) -> Result<usize, Error> {
    let weight = layer::weight()?;
    let mut absmax = vec![0.0; weight.absmax().len()];
    weight.absmax().dequantize(0, &mut absmax)?;
    let base = Quantized4Bit::from_parts(
        layer::PACKED.to_vec(),
        AbsmaxBuf::plain(absmax),
        weight.rows(),
        weight.cols(),
        weight.block_size(),
    )?;
    let alpha = f64::from(SCALE) * RANK as f64;
    let adapter = LoRAAdapter::from_parts(A.to_vec(), B.to_vec(), ROWS, COLS, RANK, alpha, LoRAScaling::Standard)?;
    let layer = QLoRALayer::from_parts(base, adapter)?.with_kernels(kernels);

    let (mut scratch, mut y) = (layer.scratch(1), [0.0; ROWS]);
    layer.forward_into(&X, &mut scratch, &mut y)?;
    let wrong = layer::wrong(&y);
    hprintln!(
        "heap    {:<13} {} bytes of layer, {} of scratch, {}",
        kernels.isa(),
        layer.memory_stats().base_quantized_bytes + layer.memory_stats().lora_bytes,
        scratch.memory_bytes(),
        if wrong == 0 { "ok" } else { "WRONG" },
    );
    Ok(wrong)
}
