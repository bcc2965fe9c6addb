//! Inputs in f16 and bf16 give the bits that the same numbers in f32 give.

use core::fmt;

use nf4::{Activations, Activations8x8, BlockSize, Float, Kernels, bf16, f16};

use crate::generator::Generator;
use crate::{KINDS, Quantized, bits, for_all_shapes, inputs};

/// What is computed from a batch of inputs, as bits.
#[derive(PartialEq)]
struct Results {
    values: Vec<i16>,
    values_8x8: Vec<i8>,
    scales: [Vec<u32>; 2],
    /// 16x4, 8x8, f32: of the batch, and of its first vector.
    products: [[Vec<u32>; 2]; 3],
}

impl Results {
    fn new<T: Float>(k: Kernels, q: &Quantized, x: &[T]) -> Self {
        let (cols, block_size, batch) = (q.cols, q.block_size, x.len() / q.cols);
        let mut values = vec![0x5555; batch * Activations::values_len(cols, block_size)];
        let mut values_8x8 = vec![0x55; batch * Activations8x8::values_len(cols)];
        let mut scales = vec![9.0; batch * Activations::scales_len(cols, block_size)];
        let mut scales_8x8 = vec![9.0; batch * Activations8x8::scales_len(cols)];
        let matrix = q.plain();
        let product = |vectors: usize, multiply: &dyn Fn(&mut [f32])| {
            let mut out = vec![3.0; q.rows * vectors];
            multiply(&mut out);
            bits(&out)
        };
        let a = k.quantize_activations_batch(x, cols, block_size, &mut values, &mut scales).unwrap();
        let b = k.quantize_activations_8x8_batch(x, cols, &mut values_8x8, &mut scales_8x8).unwrap();
        assert_eq!((bits(a.inputs()), bits(b.inputs())), (bits(x), bits(x)));
        let (first_a, first_b, first) = (a.vector(0), b.vector(0), &x[..cols]);
        let products = [
            [
                product(batch, &|out| k.gemm(&matrix, &a, out).unwrap()),
                product(1, &|out| k.gemv(&matrix, &first_a, out).unwrap()),
            ],
            [
                product(batch, &|out| k.gemm_8x8(&matrix, &b, out).unwrap()),
                product(1, &|out| k.gemv_8x8(&matrix, &first_b, out).unwrap()),
            ],
            [
                product(batch, &|out| k.gemm_f32(&matrix, x, out).unwrap()),
                product(1, &|out| k.gemv_f32(&matrix, first, out).unwrap()),
            ],
        ];
        let scales = [bits(&scales), bits(&scales_8x8)];
        Self { values, values_8x8, scales, products }
    }
}

/// Compares inputs of a type with the same numbers in f32.
fn check<T: Float>(k: Kernels, q: &Quantized, x: &[T], what: impl fmt::Display) {
    let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let (got, expected) = (Results::new(k, q, x), Results::new(k, q, &wide));
    let Quantized { rows, cols, block_size, .. } = q;
    let what = || format!("{what}, {rows} x {cols}, {block_size:?}, {}", k.isa());
    assert!(got.values == expected.values, "16x4 values, {}", what());
    assert!(got.values_8x8 == expected.values_8x8, "8x8 values, {}", what());
    assert!(got.scales == expected.scales, "scales, {}", what());
    for (name, (got, expected)) in ["16x4", "8x8", "f32"].iter().zip(got.products.iter().zip(&expected.products)) {
        assert_eq!(got, expected, "{name}, {}", what());
    }
}

fn check_kinds<T: Float>(k: Kernels, q: &Quantized, batch: usize, from_bits: fn(u16) -> T, g: &mut Generator) {
    let len = batch * q.cols;
    for kind in KINDS {
        let x: Vec<T> = inputs(kind, len, g).into_iter().map(T::from_f32).collect();
        check(k, q, &x, kind);
    }
    let x: Vec<T> = (0..len).map(|_| from_bits(g.next() as u16)).collect();
    check(k, q, &x, "any bits of the type");
    // Without its infinities and NaN, so that the products are not all NaN.
    let x: Vec<T> = x.iter().map(|x| if x.to_f32().is_finite() { *x } else { T::from_f32(0.0) }).collect();
    check(k, q, &x, "any finite number");
}

#[test]
fn inputs_of_every_type_give_the_bits_of_f32() {
    for_all_shapes("types of inputs", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [1, 3, 13].into_iter().filter(|batch| cols > 0 && (*batch == 1 || rows * cols <= 9000)) {
            check_kinds(k, &q, batch, f16::from_bits, g);
            check_kinds(k, &q, batch, bf16::from_bits, g);
        }
    });
}

#[test]
fn every_half_number_is_quantized_as_in_f32() {
    fn check_all<T: Float>(from_bits: fn(u16) -> T) {
        // In groups with one number each, whose neighbours are zeros, and in groups of numbers of one sign and exponent.
        let all: Vec<T> = (0..=u16::MAX).map(from_bits).collect();
        for k in Kernels::available() {
            let q = Quantized::new(k, &[0.5_f32; 64], 1, 64, BlockSize::B64);
            check(k, &q, &all, "all numbers");
            // Some at a time: hundreds of megabytes of WebAssembly memory have ended in a fault of Node.
            for numbers in all.chunks(1024) {
                let alone: Vec<T> = numbers
                    .iter()
                    .flat_map(|x| core::array::from_fn::<T, 64, _>(|i| if i == 0 { *x } else { T::from_f32(0.0) }))
                    .collect();
                check(k, &q, &alone, "each number alone");
            }
        }
    }
    check_all(f16::from_bits);
    check_all(bf16::from_bits);
}
