//! The layer that the firmware in `examples/cortex-m` holds in flash: what its file is made from, and its bits here.
//!
//! `NF4_WRITE=1 cargo test --test cortex_m` writes the file.

#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "support/generator.rs"]
mod generator;
#[path = "../examples/cortex-m/src/layer.rs"]
mod layer;

use std::path::Path;

use generator::Generator;
use layer::{BLOCK, COLS, RANK, ROWS, SCALE};
use nf4::{Absmax, Activations, Kernels, Nf4Matrix};
use safetensors::SafeTensors;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The first rows of a real matrix, the first of the activations that it meets in its model, an adapter of made-up numbers,
/// and the outputs.
fn file() -> Vec<u8> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/minilm/layer0_query.safetensors");
    let source = std::fs::read(source).unwrap();
    let source = SafeTensors::deserialize(&source).unwrap();
    let tensor = |name| source.tensor(name).unwrap().data();
    let packed = &tensor("packed")[..ROWS * COLS / 2];
    let absmax = floats(&tensor("absmax")[..ROWS * COLS / BLOCK.get() * 4]);
    let x = floats(&tensor("x")[..COLS * 4]);
    let mut generator = Generator(7);
    let (mut a, mut b) = (vec![0.0; RANK * COLS], vec![0.0; ROWS * RANK]);
    generator.fill(&mut a);
    generator.fill(&mut b);
    a.iter_mut().chain(&mut b).for_each(|w| *w /= 64.0);

    let kernels = Kernels::scalar();
    let weight = Nf4Matrix::new(packed, Absmax::Plain(&absmax), ROWS, COLS, BLOCK).unwrap();
    let mut values = vec![0; Activations::values_len(COLS, BLOCK)];
    let mut scales = vec![0.0; Activations::scales_len(COLS, BLOCK)];
    let (mut low_rank, mut y) = ([0.0; RANK], [0.0; ROWS]);
    let activations = kernels.quantize_activations(&x, BLOCK, &mut values, &mut scales).unwrap();
    kernels.gemv(&weight, &activations, &mut y).unwrap();
    kernels.gemv_dense(&a, &x, &mut low_rank).unwrap();
    kernels.gemv_dense_add(&b, &low_rank, SCALE, &mut y).unwrap();

    let floats = [&absmax[..], &a, &b, &x, &y].into_iter().flatten().flat_map(|x| x.to_le_bytes());
    packed.iter().copied().chain(floats).collect()
}

#[test]
fn the_file_has_the_committed_bytes() {
    let (path, file) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/cortex-m/data/layer.bin"), file());
    if std::env::var_os("NF4_WRITE").is_some() {
        std::fs::write(&path, &file).unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == file, "{} is not what it is made from", path.display());
}

#[test]
fn every_isa_gives_the_bits_that_the_firmware_expects() {
    let weight = layer::weight().unwrap();
    let mut buffers = layer::Buffers::new();
    for kernels in Kernels::available() {
        buffers.base(kernels, &weight, &layer::X).unwrap();
        buffers.add_adapter(kernels, &layer::X).unwrap();
        assert_eq!(layer::wrong(&buffers.y), 0, "outputs of {} with other bits", kernels.isa());
    }
}
