//! Every instruction set gives the same bits, for any input, and they lie within the derived bounds of float64.
//!
//! Scalar code is compared with independent truth here and in `reference`; the other instruction sets with scalar code.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "shapes are small, and tests panic")]

#[path = "../support/generator.rs"]
mod generator;
#[allow(dead_code, reason = "only products of exact inputs are tested")]
#[path = "../support/truth.rs"]
mod truth;

mod batches;
mod conversions;
mod eight_by_eight;
mod element_types;
mod products;
mod transposed;
mod transposed_16x4;

use generator::Generator;
use nf4::{Absmax, Activations, BlockSize, DYNAMIC_MAP, Float, Kernels, NestedAbsmax, Nf4Matrix};

/// Rows x columns: empty, one element, shorter than a block, odd, straddling, partial, aligned for some or for all block
/// sizes, a stride of eight spans and one more, more than a panel of the f32 product.
const SHAPES: [(usize, usize); 20] = [
    (0, 64),
    (3, 0),
    (1, 1),
    (1, 63),
    (5, 33),
    (2, 65),
    (4, 32),
    (9, 96),
    // With blocks of 32, the first nested block ends in the middle of a span.
    (86, 96),
    (3, 128),
    (1, 160),
    (7, 320),
    (3, 480),
    (4, 1000),
    (3, 1056),
    (2, 4096),
    (5, 576),
    (1, 4160),
    (2, 8192),
    (2, 12_352),
];

/// What the inputs are like.
const KINDS: [&str; 8] = ["bell", "any bits", "zero", "subnormal", "huge", "sparse", "infinite", "one NaN"];

fn inputs(kind: &str, n: usize, g: &mut Generator) -> Vec<f32> {
    let mut values: Vec<f32> = (0..n)
        .map(|_| match kind {
            "any bits" => f32::from_bits(g.next() as u32),
            "zero" => f32::from_bits((g.next() as u32) & 0x8000_0000),
            "subnormal" => f32::from_bits((g.next() as u32) & 0x803f_ffff),
            "huge" => g.value() * 1e37,
            "sparse" if !g.next().is_multiple_of(50) => 0.0,
            _ => g.value(),
        })
        .collect();
    let at = if n == 0 { 0 } else { g.next() as usize % n };
    match (kind, values.get_mut(at)) {
        ("infinite", Some(x)) => *x = f32::NEG_INFINITY,
        ("one NaN", Some(x)) => *x = -f32::NAN,
        _ => {}
    }
    values
}

/// The bits of floats, for exact comparison.
fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// A quantized tensor and its shape.
struct Quantized {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    codes: Vec<u8>,
    nested: Vec<f32>,
    offset: f32,
}

impl Quantized {
    fn new<T: Float>(k: Kernels, weights: &[T], rows: usize, cols: usize, block_size: BlockSize) -> Self {
        let blocks = block_size.blocks(rows * cols);
        let (mut packed, mut absmax) = (vec![0; (rows * cols).div_ceil(2)], vec![0.0; blocks]);
        k.quantize(weights, block_size, &mut packed, &mut absmax).unwrap();
        let (mut codes, mut nested) = (vec![0; blocks], vec![0.0; blocks.div_ceil(256)]);
        let offset = k.quantize_absmax(&absmax, &mut codes, &mut nested).unwrap();
        Self { rows, cols, block_size, packed, absmax, codes, nested, offset }
    }

    fn plain(&self) -> Nf4Matrix<'_> {
        self.matrix(Absmax::Plain(&self.absmax))
    }

    fn nested(&self) -> Nf4Matrix<'_> {
        let nested = NestedAbsmax::new(&self.codes, &DYNAMIC_MAP, &self.nested, self.offset).unwrap();
        self.matrix(Absmax::Nested(nested))
    }

    fn matrix<'a>(&'a self, absmax: Absmax<'a>) -> Nf4Matrix<'a> {
        Nf4Matrix::new(&self.packed, absmax, self.rows, self.cols, self.block_size).unwrap()
    }

    /// Everything, as bits.
    fn bits(&self) -> (Vec<u8>, Vec<u32>, Vec<u8>, Vec<u32>, u32) {
        let (absmax, nested) = (bits(&self.absmax), bits(&self.nested));
        (self.packed.clone(), absmax, self.codes.clone(), nested, self.offset.to_bits())
    }
}

/// Buffers that activations live in.
struct ActivationBuffers(Vec<i16>, Vec<f32>);

impl ActivationBuffers {
    fn new(cols: usize, block_size: BlockSize) -> Self {
        let (values, scales) = (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
        Self(vec![0x5555; values], vec![9.0; scales])
    }

    fn quantize<'a>(&'a mut self, k: Kernels, x: &'a [f32], block_size: BlockSize) -> Activations<'a> {
        k.quantize_activations(x, block_size, &mut self.0, &mut self.1).unwrap()
    }
}

fn dequantized<T: Float>(k: Kernels, matrix: &Nf4Matrix<'_>) -> Vec<u32> {
    let mut out = vec![T::from_f32(3.0); matrix.rows() * matrix.cols()];
    k.dequantize(matrix, &mut out).unwrap();
    bits(&out)
}

fn gemv(k: Kernels, matrix: &Nf4Matrix<'_>, activations: &Activations<'_>) -> Vec<f32> {
    let mut out = vec![3.0; matrix.rows()];
    k.gemv(matrix, activations, &mut out).unwrap();
    out
}

fn gemv_f32(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut out = vec![3.0; matrix.rows()];
    k.gemv_f32(matrix, x, &mut out).unwrap();
    out
}

/// What is compared with portable code, which is compared with independent truth.
fn beside_scalar() -> impl Iterator<Item = Kernels> {
    Kernels::available().filter(|k| *k != Kernels::scalar())
}

/// Every which case is run: every one, unless `NF4_EVERY` says otherwise, as for emulators that take a second for a
/// millisecond.
fn every() -> usize {
    std::env::var("NF4_EVERY").map_or(1, |every| every.parse().unwrap())
}

/// Runs `test` on every shape and block size with each of these kernels, and says on which instruction sets.
fn for_all_shapes(
    what: &str,
    kernels: impl Iterator<Item = Kernels>,
    mut test: impl FnMut(Kernels, usize, usize, BlockSize, &mut Generator),
) {
    for k in kernels {
        let mut g = Generator(what.len() as u64);
        let all = SHAPES.iter().flat_map(|shape| BlockSize::ALL.map(|block_size| (*shape, block_size)));
        let mut count = 0;
        for ((rows, cols), block_size) in all.step_by(every()) {
            test(k, rows, cols, block_size, &mut g);
            count += 1;
        }
        println!("{what}: {count} shapes and block sizes on {}", k.isa());
    }
}

#[test]
fn required_isas_are_present() {
    let present: Vec<_> = Kernels::available().map(|k| k.isa().name()).collect();
    println!("instruction sets: {present:?}");
    for isa in std::env::var("NF4_REQUIRE_ISA").unwrap_or_default().split(',').filter(|isa| !isa.is_empty()) {
        assert!(present.contains(&isa), "{isa} is required, but there are only {present:?}");
    }
}
