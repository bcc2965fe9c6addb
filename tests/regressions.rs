//! What fuzzing and reading found, as the smallest case of each.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "generated values are small")]

#[allow(dead_code, reason = "only the bound of the f32 product is used")]
#[path = "support/truth.rs"]
mod truth;

use nf4::{Absmax, Activations, BlockSize, Kernels, NestedAbsmax, Nf4Matrix};
use truth::Row;

/// Found by the targets `gemv` and `gemm`: with blocks of 32 a row may end with seven and a half of the eight spans of a
/// stride. The padded inputs then filled the stride, the packed bytes did not, and the last 480 columns were left out.
#[test]
fn f32_products_of_rows_that_end_half_a_span_before_a_stride() {
    let mut tested = Vec::new();
    for k in Kernels::available() {
        for cols in [480, 992, 4064, 4096 + 480] {
            let (rows, blocks) = (2, 2 * cols / 32);
            let packed: Vec<u8> = (0..rows * cols / 2).map(|i| (i * 73 % 251) as u8).collect();
            let absmax: Vec<f32> = (0..blocks).map(|b| 0.5 + (b % 7) as f32).collect();
            let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, BlockSize::B32).unwrap();
            let x: Vec<f32> = (0..cols).map(|c| (c as f32 * 0.37).sin()).collect();
            let mut y = vec![3.0; rows];
            k.gemv_f32(&matrix, &x, &mut y).unwrap();
            for (r, y) in y.iter().enumerate() {
                Row::of(&matrix, &packed, r).f32(&x).check(*y, || format!("row {r} of {cols} columns, {}", k.isa()));
            }
        }
        tested.push(k.isa().name());
    }
    println!("instruction sets: {}", tested.join(", "));
}

/// Processors make NaNs of either sign: `inf - inf` is `0xffc0_0000` on x86-64 and `0x7fc0_0000` on Arm.
#[test]
fn a_double_quantized_absmax_that_is_nan_is_the_one_nan() {
    let (inf, negative) = (f32::INFINITY, f32::from_bits(0xffc0_1234));
    for (map, absmax, offset) in [
        (inf, 1.0, -inf),
        (0.0, inf, 1.0),
        (inf, 0.0, 1.0),
        (negative, 1.0, 0.0),
        (1.0, negative, 0.0),
        (1.0, 1.0, negative),
    ] {
        let (map, nested, codes) = ([map; 256], [absmax; 2], [7; 300]);
        let absmax = Absmax::Nested(NestedAbsmax::new(&codes, &map, &nested, offset).unwrap());
        let mut all = [0.0; 300];
        absmax.dequantize(0, &mut all).unwrap();
        let one_by_one = (0..300).map(|block| absmax.get(block));
        for value in one_by_one.chain(all) {
            assert_eq!(value.to_bits(), f32::NAN.to_bits(), "map {}, absmax {}, offset {offset}", map[7], nested[0]);
        }
    }
}

/// A row of blocks of 32 may end half a span into a tile of columns of the 16x4 product of a batch. The other half of that
/// span, which is not there, then had the absmax of an earlier tile; if it was infinite or NaN, its product with nothing made
/// outputs of all rows of the tile NaN. So one absmax is special, each in turn, and only the outputs of its row may be.
#[test]
fn special_absmax_stays_in_its_row() {
    let mut tested = Vec::new();
    for k in Kernels::available() {
        // The tiles of 8, 4, 3 and 2 vectors are 1024, 2048, 2688 and 4096 columns wide.
        for (cols, batch) in [(1056, 8), (2080, 4), (2720, 3), (4128, 2), (4128, 9), (96, 5), (1024, 8), (2112, 6)] {
            let (rows, blocks) = (3, cols / 32);
            let packed: Vec<u8> = (0..rows * cols / 2).map(|i| (i * 73 % 251) as u8).collect();
            let x: Vec<f32> = (0..batch * cols).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut values = vec![0; batch * Activations::values_len(cols, BlockSize::B32)];
            let mut scales = vec![0.0; batch * Activations::scales_len(cols, BlockSize::B32)];
            let activations = k.quantize_activations_batch(&x, cols, BlockSize::B32, &mut values, &mut scales).unwrap();
            // Every block beside a border of tiles, and some others.
            let at =
                (0..blocks).filter(|b| [0, 1, 31].contains(&(b % 32)) || b + 2 >= blocks || [82, 83, 84].contains(b));
            for (special, block) in at.flat_map(|b| [f32::INFINITY, f32::NAN].map(|special| (special, b))) {
                for special_row in 0..rows {
                    let mut absmax = vec![1.5; rows * blocks];
                    absmax[special_row * blocks + block] = special;
                    let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, BlockSize::B32).unwrap();
                    let (mut fast, mut exact) = (vec![3.0; rows * batch], vec![3.0; rows * batch]);
                    k.gemm(&matrix, &activations, &mut fast).unwrap();
                    k.gemm_f32(&matrix, &x, &mut exact).unwrap();
                    for (n, x) in x.chunks(cols).enumerate() {
                        let (mut y, mut z) = (vec![3.0; rows], vec![3.0; rows]);
                        k.gemv(&matrix, &activations.vector(n), &mut y).unwrap();
                        k.gemv_f32(&matrix, x, &mut z).unwrap();
                        for row in 0..rows {
                            let what = format!(
                                "{special} in block {block} of row {special_row}, {cols} columns: output of row {row}, \
                                 vector {n} of {batch}, {}",
                                k.isa()
                            );
                            assert_eq!(fast[row * batch + n].to_bits(), y[row].to_bits(), "16x4, {what}");
                            assert_eq!(exact[row * batch + n].to_bits(), z[row].to_bits(), "f32, {what}");
                            assert!(row == special_row || y[row].is_finite() && z[row].is_finite(), "{what}");
                        }
                    }
                }
            }
        }
        tested.push(k.isa().name());
    }
    println!("instruction sets: {}", tested.join(", "));
}
