//! A layer of a 4-bit checkpoint with its PEFT adapter: load, forward, merge.
//!
//!     cargo run --example load_peft
//!
//! The files were written by transformers, bitsandbytes and PEFT.

use core::error::Error;
use std::fs::read;

use nf4::Tensor;
use nf4::checkpoint::{Linear4bit, PeftAdapter, TensorFile};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/reference/peft/rank8_nodq");

fn main() -> Result<(), Box<dyn Error>> {
    let base = read(format!("{FOLDER}/base.safetensors"))?;
    let config = read(format!("{FOLDER}/adapter_config.json"))?;
    let adapter = read(format!("{FOLDER}/adapter_model.safetensors"))?;
    let base = TensorFile::parse(&base)?;
    let adapter = PeftAdapter::load(&config, &TensorFile::parse(&adapter)?)?;

    for (module, _) in adapter.modules() {
        let layer = adapter.layer(module, Linear4bit::load(&base, module)?)?;
        let (d_out, d_in, bits) = (layer.d_out(), layer.d_in(), layer.base_weight_quantized().bits_per_weight());
        println!(
            "{module}: {d_out} x {d_in}, {bits:.2} bits per weight, rank {}, scale {}",
            layer.rank(),
            layer.scale()
        );

        let x: Vec<f32> = (0..d_in).map(|i| (i as f32 * 0.37).sin()).collect();
        let y = layer.forward(&Tensor::from_vec(x.clone(), false));
        let merged = layer.merge_to_f32(); // dequantize(W) + scale * B A, row-major
        let y_merged: Vec<f32> = merged.chunks(d_in).map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
        println!("    first outputs: {:.4?}, without the bias {:.4?} after merging", &y.data()[..3], &y_merged[..3]);
    }
    Ok(())
}
