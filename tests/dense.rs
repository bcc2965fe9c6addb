//! Products with dense matrices of every element type: on every instruction set, for one vector and for batches, the bits of
//! the definition, written down here once more, and within its bound of float64.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "shapes are small, and tests panic")]

#[path = "support/generator.rs"]
mod generator;
#[allow(dead_code, reason = "only the bounds of dense products are used")]
#[path = "support/truth.rs"]
mod truth;

use generator::Generator;
use nf4::{Float, Kernels, bf16, f16, spec};

/// Rows x columns: none, one, tiles of four rows and rests of them, registers of eight columns and rests of them, and rows
/// longer than what is prefetched.
fn shapes() -> impl Iterator<Item = (usize, usize)> {
    let small = (0..10).flat_map(|rows| (0..34).map(move |cols| (rows, cols)));
    small.chain([(4, 63), (5, 64), (3, 65), (7, 576), (64, 16), (6, 2049), (13, 333)])
}

const BATCHES: [usize; 8] = [0, 1, 2, 3, 4, 5, 8, 17];

const KINDS: [&str; 3] = ["bell", "any bits", "one special"];

/// Elements of a kind, all of which are values of `T`.
fn elements<T: Float>(kind: &str, n: usize, g: &mut Generator) -> Vec<T> {
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-45, 6e-8, f32::MAX];
    let mut values: Vec<T> = (0..n)
        .map(|_| T::from_f32(if kind == "any bits" { f32::from_bits(g.next() as u32) } else { g.value() }))
        .collect();
    if kind == "one special" && n > 0 {
        values[g.next() as usize % n] = T::from_f32(special[g.next() as usize % special.len()]);
    }
    values
}

/// The definition of the specification.
fn product<T: Float>(row: &[T], x: &[f32]) -> f32 {
    let mut lane = [0.0; 8];
    for (c, (a, x)) in row.iter().zip(x).enumerate() {
        lane[c % 8] += a.to_f32() * x;
    }
    let t = [lane[0] + lane[4], lane[1] + lane[5], lane[2] + lane[6], lane[3] + lane[7]];
    (t[0] + t[2]) + (t[1] + t[3])
}

/// The bits of a result, which has only one NaN.
fn bits(y: f32) -> u32 {
    if y.is_nan() { 0x7fc0_0000 } else { y.to_bits() }
}

fn check<T: Float>(name: &str) {
    for k in Kernels::available() {
        let mut g = Generator(7);
        let mut cases = 0;
        for (rows, cols) in shapes() {
            for (kind, batch) in KINDS.iter().flat_map(|kind| BATCHES.map(|batch| (*kind, batch))) {
                let what = format!("{rows} x {cols} {name}, {kind}, batch {batch}, {}", k.isa());
                let (a, x) = (elements::<T>(kind, rows * cols, &mut g), elements::<f32>(kind, batch * cols, &mut g));
                let row = |r: usize| &a[r * cols..(r + 1) * cols];
                let vector = |n: usize| &x[n * cols..(n + 1) * cols];
                let mut out = vec![3.0; rows * batch];
                // No vectors do not say what shape the matrix has.
                k.gemm_dense(&a, &x, batch, &mut out).unwrap();
                for (i, y) in out.iter().enumerate() {
                    let (r, n) = (i / batch, i % batch);
                    assert_eq!(y.to_bits(), bits(product(row(r), vector(n))), "row {r}, vector {n}: {what}");
                }
                for n in 0..batch.min(2) {
                    let (mut y, before) = (vec![3.0; rows], elements::<f32>(kind, rows, &mut g));
                    let mut added = before.clone();
                    k.gemv_dense(&a, vector(n), &mut y).unwrap();
                    k.gemv_dense_add(&a, vector(n), -0.75, &mut added).unwrap();
                    for r in 0..rows {
                        let expected = product(row(r), vector(n));
                        assert_eq!(y[r].to_bits(), bits(expected), "row {r}: {what}");
                        assert_eq!(added[r].to_bits(), bits(before[r] + -0.75 * expected), "row {r}, adding: {what}");
                        if kind == "bell" {
                            let values: Vec<f32> = row(r).iter().map(|a| a.to_f32()).collect();
                            truth::dense(&values, vector(n)).check(y[r], || format!("row {r}: {what}"));
                        }
                    }
                }
                cases += 1;
            }
        }
        println!("{cases} dense products of {name} on {}", k.isa());
    }
}

#[test]
fn products_with_f32() {
    check::<f32>("f32");
}

#[test]
fn products_with_f16() {
    check::<f16>("f16");
}

#[test]
fn products_with_bf16() {
    check::<bf16>("bf16");
}

/// Vectors side by side: registers of vectors and tiles of 64 of them, with rests, and more columns than are few.
#[test]
fn products_added_to_a_batch() {
    const FEW: usize = Kernels::FEW_COLUMNS;
    let shapes = || (0..18).map(|cols| (3, cols)).chain([(0, 5), (1, 64), (5, 67), (2, FEW), (2, FEW + 1), (1, 200)]);
    for k in Kernels::available() {
        let mut g = Generator(9);
        let mut cases = 0;
        for (rows, cols) in shapes() {
            for (kind, batch) in KINDS.iter().flat_map(|kind| [0, 1, 3, 8, 16, 31, 63, 64, 65, 150].map(|n| (*kind, n)))
            {
                let what = format!("{rows} x {cols}, {kind}, batch {batch}, {}", k.isa());
                let (a, x) = (elements::<f32>(kind, rows * cols, &mut g), elements::<f32>(kind, cols * batch, &mut g));
                let before = elements::<f32>(kind, rows * batch, &mut g);
                let mut out = before.clone();
                k.gemm_dense_add(&a, &x, batch, -0.75, &mut out).unwrap();
                for (i, (y, before)) in out.iter().zip(before).enumerate() {
                    let (r, n) = (i / batch, i % batch);
                    let vector: Vec<f32> = x.iter().skip(n).step_by(batch).copied().collect();
                    let expected = before + -0.75 * product(&a[r * cols..][..cols], &vector);
                    assert_eq!(y.to_bits(), bits(expected), "row {r}, vector {n}: {what}");
                }
                cases += 1;
            }
        }
        println!("{cases} dense products added to batches on {}", k.isa());
    }
}

/// The definition of the transposed product, added to what was there.
fn transposed(a: &[f32], cols: usize, c: usize, x: &[f32], before: f32) -> f32 {
    let mut out = before;
    for (a, x) in a.chunks(spec::ROW_CHUNK * cols).zip(x.chunks(spec::ROW_CHUNK)) {
        let mut sum = 0.0;
        for (a, x) in a.chunks(4 * cols).zip(x.chunks(4)) {
            let p = |r: usize| x.get(r).map_or(0.0, |x| a[r * cols + c] * x);
            sum += (p(0) + p(1)) + (p(2) + p(3));
        }
        out += sum;
    }
    out
}

#[test]
fn transposed_products() {
    for k in Kernels::available() {
        let mut g = Generator(8);
        let mut cases = 0;
        for (rows, cols) in shapes().chain([(1030, 17), (512, 4), (513, 64), (66, 200)]) {
            for (kind, batch) in KINDS.iter().flat_map(|kind| BATCHES.map(|batch| (*kind, batch))) {
                let a: Vec<f32> = elements(kind, rows * cols, &mut g);
                let (x, before): (Vec<f32>, Vec<f32>) =
                    (elements(kind, batch * rows, &mut g), elements(kind, batch * cols, &mut g));
                let mut out = before.clone();
                k.gemm_transposed_dense_add(&a, &x, batch, &mut out).unwrap();
                for (i, (y, before)) in out.iter().zip(before).enumerate() {
                    let (n, c) = (i / cols, i % cols);
                    let x = &x[n * rows..][..rows];
                    let expected = if rows == 0 { before.to_bits() } else { bits(transposed(&a, cols, c, x, before)) };
                    let what = || format!("column {c}, vector {n} of {batch}, {rows} x {cols}, {kind}, {}", k.isa());
                    assert_eq!(y.to_bits(), expected, "{}", what());
                    if kind == "bell" {
                        let column: Vec<f32> = (0..rows).map(|r| a[r * cols + c]).collect();
                        truth::transposed_dense(&column, x, before).check(*y, what);
                    }
                }
                cases += 1;
            }
        }
        println!("{cases} transposed dense products on {}", k.isa());
    }
}

/// Every bit pattern of 16 bits, alone in a row of each length up to a register: what is multiplied is exactly its value.
#[test]
fn elements_of_16_bits_are_widened_exactly() {
    fn check<T: Float>(k: Kernels, from_bits: fn(u16) -> T, name: &str) {
        for place in 0..9 {
            let zero = T::from_f32(0.0);
            let a: Vec<T> = (0..=u16::MAX)
                .flat_map(|bits| {
                    let mut row = [zero; 9];
                    row[place] = from_bits(bits);
                    row
                })
                .collect();
            let mut y = vec![3.0; 1 << 16];
            k.gemv_dense(&a, &[1.0; 9], &mut y).unwrap();
            for (element, y) in (0..=u16::MAX).map(from_bits).zip(y) {
                // A sum that starts at +0 has no -0.
                assert_eq!(y.to_bits(), bits(0.0 + element.to_f32()), "{name}, column {place}, {}", k.isa());
            }
        }
    }
    for k in Kernels::available() {
        check(k, f16::from_bits, "f16");
        check(k, bf16::from_bits, "bf16");
    }
}
