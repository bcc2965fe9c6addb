//! Every case where there are few enough: all 16-bit weights, all packed bytes, all f32 beside a decision threshold,
//! all short rows with all block sizes, on every instruction set.
//!
//! What is expected is written here a second time, from the texts that define it: the constants of `bitsandbytes`, and
//! the formulas of `kernels/SPEC.md`, one operation at a time. Nothing of the library's own tables is used.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests panic, and their numbers are small")]

#[path = "support/generator.rs"]
mod generator;

use generator::Generator;
use nf4::{Absmax, Activations, Activations8x8, BlockSize, Float, Kernels, Nf4Matrix, ShapeError, bf16, f16};

/// The codebook, as `bitsandbytes` prints it.
#[allow(clippy::excessive_precision, reason = "the digits of the source")]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// The thresholds, as bits: `nf4_midpoints` of the reference data, taken from `bitsandbytes` on a CPU.
const THRESHOLDS: [u32; 15] = [
    0xbf59_1cd8, 0xbf1c_5270, 0xbeeb_8480, 0xbead_ea76, 0xbe70_3cec, 0xbe0d_38bc, 0xbd3a_7871, 0x3d22_faff,
    0x3df6_4862, 0x3e50_67e0, 0x3e95_82d4, 0x3ec7_53f9, 0x3f00_6d04, 0x3f24_8daf, 0x3f5c_89da,
];

/// The code of a scaled value: the first whose threshold is not below it. NaN has the last code.
fn code(scaled: f32) -> u8 {
    let first = THRESHOLDS.iter().position(|t| scaled <= f32::from_bits(*t));
    first.unwrap_or(15) as u8
}

/// Codes and absmax of a block. A block that is full is scaled by a reciprocal, one that is not by a division.
fn quantized(block: &[f32], full: bool) -> (Vec<u8>, f32) {
    let floor = 1e-38_f32;
    let (nan, largest) = (block.iter().any(|w| w.is_nan()), block.iter().fold(0.0_f32, |m, w| m.max(w.abs())));
    let absmax = if nan { f32::NAN } else { largest };
    let floored = if absmax < floor { floor } else { absmax };
    let scaled = |w: &f32| if full { w * (1.0 / floored) } else { w / floored };
    let codes = block.iter().map(|w| code(scaled(w))).collect();
    (codes, if full { absmax } else { floored })
}

/// Two codes a byte, the first in the high half; a missing last one is 7.
fn packed(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&7)).collect()
}

fn print_isas() {
    println!("instruction sets: {}", Kernels::available().map(|k| k.isa().name()).collect::<Vec<_>>().join(", "));
}

/// The bits of floats, for exact comparison.
fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// Quantizes blocks of this length and compares each with the definition. `exact` are the values of the weights.
fn check_blocks<T: Float>(weights: &[T], exact: &[f32], len: usize, block_size: BlockSize, what: &str) {
    let full = len == block_size.get();
    let expected: Vec<_> = exact.chunks(len).map(|block| quantized(block, full)).collect();
    for k in Kernels::available() {
        let (mut bytes, mut absmax) = (vec![0; weights.len().div_ceil(2)], vec![0.0; weights.len().div_ceil(len)]);
        if full {
            k.quantize(weights, block_size, &mut bytes, &mut absmax).unwrap();
        } else {
            // Only the last block of a tensor can be partial: each is a tensor.
            let blocks = weights.chunks(len).zip(bytes.chunks_mut(len / 2)).zip(absmax.chunks_mut(1));
            blocks.for_each(|((w, bytes), absmax)| k.quantize(w, block_size, bytes, absmax).unwrap());
        }
        for (i, ((codes, scale), got)) in expected.iter().zip(bytes.chunks(len / 2)).enumerate() {
            let place = || format!("{what}, block {i} of {len}, {block_size:?}, {}", k.isa());
            assert_eq!(got, packed(codes), "{}: {:?}", place(), &exact[i * len..][..codes.len()]);
            assert_eq!(absmax[i].to_bits(), scale.to_bits(), "{}", place());
        }
    }
}

/// All 65,536 values of a type, in blocks whose first element is at least as large as each of `absmax`.
fn check_all_values<T: Float>(of_bits: impl Fn(u16) -> T, exact: impl Fn(u16) -> f32, absmax: &[u16]) {
    print_isas();
    for first in absmax {
        for (len, block_size) in [(32, BlockSize::B32), (64, BlockSize::B64), (30, BlockSize::B32)] {
            let values: Vec<u16> = (0..=u16::MAX).collect();
            let patterns: Vec<u16> = values
                .chunks(len - 1)
                // The last block is filled up.
                .flat_map(|v| [&[*first], v, &vec![0; len - 1 - v.len()]].concat())
                .collect();
            let weights: Vec<T> = patterns.iter().map(|p| of_bits(*p)).collect();
            let exact: Vec<f32> = patterns.iter().map(|p| exact(*p)).collect();
            check_blocks(&weights, &exact, len, block_size, &format!("first {first:#x}"));
        }
    }
}

#[test]
fn all_f16_weights() {
    /// The value of a pattern, from its three fields.
    fn value(pattern: u16) -> f32 {
        let (sign, exponent, fraction) = (pattern >> 15, i32::from(pattern >> 10 & 31), f32::from(pattern & 1023));
        let magnitude = match (exponent, fraction) {
            (31, 0.0) => f32::INFINITY,
            (31, _) => f32::NAN,
            (0, _) => fraction * 2.0_f32.powi(-24),
            _ => (1024.0 + fraction) * 2.0_f32.powi(exponent - 25),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }
    // 0, the least subnormal, the largest subnormal, 1/1024 and less, 1, 3.14, -1000, the largest, infinity.
    let absmax = [0, 1, 0x03ff, 0x13ff, 0x3c00, 0x4248, 0xe3d0, 0x7bff, 0x7c00];
    check_all_values(f16::from_bits, value, &absmax);
}

#[test]
fn all_bf16_weights() {
    let value = |pattern: u16| f32::from_bits(u32::from(pattern) << 16);
    // 0, the least subnormal, about 1e-39, 1e-38 and 1e-30, 0.1, 1, 3.14, -1e10, the largest, infinity.
    let absmax = [0, 1, 0x000b, 0x006d, 0x0da2, 0x3dcd, 0x3f80, 0x4049, 0xd015, 0x7f7f, 0x7f80];
    check_all_values(bf16::from_bits, value, &absmax);
}

#[test]
fn every_f32_beside_a_threshold() {
    print_isas();
    let mut g = Generator(1);
    let mut absmax: Vec<f32> = (0..4000).map(|_| f32::from_bits(g.next() as u32 & 0x7fff_ffff)).collect();
    absmax.retain(|a| a.is_finite());
    // Powers of two, and the f32 around the floor, the least normal, 1 and the largest.
    absmax.extend((1..255).map(|e| f32::from_bits(e << 23)));
    for around in [1e-38_f32, f32::MIN_POSITIVE, 1.0, 0.1, 3.0, 1e-45] {
        absmax.extend((0..9).map(|d| f32::from_bits((around.to_bits() + d).saturating_sub(4))));
    }
    absmax.extend((0..5).map(|d| f32::from_bits(f32::MAX.to_bits() - d)));
    for (len, block_size) in [(32, BlockSize::B32), (16, BlockSize::B32)] {
        let mut weights = Vec::new();
        for a in &absmax {
            // Where the code changes: within an ulp or two of the product, for both ways to scale.
            let mut beside = THRESHOLDS.iter().flat_map(|t| {
                let near = (f32::from_bits(*t) * a).to_bits();
                (0..9).map(move |d| f32::from_bits((near + d).wrapping_sub(4)))
            });
            loop {
                let block: Vec<f32> = beside.by_ref().filter(|x| x.abs() <= *a).take(len - 1).collect();
                if block.is_empty() {
                    break;
                }
                weights.push(*a);
                weights.extend(&block);
                weights.extend(vec![0.0; len - 1 - block.len()]);
            }
        }
        println!("{} weights in blocks of {len}", weights.len());
        check_blocks(&weights, &weights, len, block_size, "beside thresholds");
    }
}

/// A matrix with its codes and scales, one a block.
struct Matrix {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    codes: Vec<u8>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

impl Matrix {
    fn new(rows: usize, cols: usize, block_size: BlockSize, codes: Vec<u8>) -> Self {
        // Scales that differ, and do not round away what they scale.
        let absmax = (0..block_size.blocks(rows * cols)).map(|b| (b % 61 + 1) as f32 / 32.0).collect();
        Self { rows, cols, block_size, packed: packed(&codes), codes, absmax }
    }

    fn view(&self) -> Nf4Matrix<'_> {
        Nf4Matrix::new(&self.packed, Absmax::Plain(&self.absmax), self.rows, self.cols, self.block_size).unwrap()
    }

    fn code(&self, row: usize, column: usize) -> usize {
        usize::from(self.codes[row * self.cols + column])
    }

    fn block(&self, row: usize, column: usize) -> usize {
        (row * self.cols + column) / self.block_size.get()
    }

    /// The weights as f32.
    fn weights(&self) -> Vec<f32> {
        let weight = |(i, code): (usize, &u8)| NF4[usize::from(*code)] * self.absmax[i / self.block_size.get()];
        self.codes.iter().enumerate().map(weight).collect()
    }

    /// "The 16x4 product" of SPEC.md, for finite inputs of which no group is below 2.4e-35.
    fn sixteen_by_four(&self, row: usize, x: &[f32]) -> f32 {
        let group = if self.block_size == BlockSize::B32 { 32 } else { 64 };
        let mut lane = [0.0; 8];
        for first in (0..self.cols).step_by(group) {
            let columns = first..first + group;
            let m = x[columns.clone()].iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (s, factor) = if m == 0.0 { (0.0, 0.0) } else { (m / 8191.0, 8191.0 / m) };
            let mut sums = [None; 8];
            for c in columns {
                let q = (x[c] * factor).round_ties_even() as i32;
                let weight = (f64::from(NF4[self.code(row, c)]) * 32767.0).round() as i32;
                *sums[4 * (c / 32 % 2) + c / 4 % 4].get_or_insert(0) += weight * q;
            }
            let factor = self.absmax[self.block(row, first)] * s;
            for (lane, sum) in lane.iter_mut().zip(sums) {
                if let Some(sum) = sum {
                    *lane += sum as f32 * factor;
                }
            }
        }
        let t: [f32; 4] = core::array::from_fn(|i| lane[i] + lane[i + 4]);
        ((t[0] + t[2]) + (t[1] + t[3])) * (1.0 / 32767.0)
    }

    /// "The 8x8 product" of SPEC.md, for finite inputs of which no group is below 3.7e-37.
    fn eight_by_eight(&self, row: usize, x: &[f32]) -> f32 {
        let mut sums = [0.0, 0.0];
        for first in (0..self.cols).step_by(32) {
            let m = x[first..first + 32].iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (s, factor) = if m == 0.0 { (0.0, 0.0) } else { (m / 127.0, 127.0 / m) };
            let products = (first..first + 32).map(|c| {
                let weight = (f64::from(NF4[self.code(row, c)]) * 124.11).round() as i32;
                weight * (x[c] * factor).round_ties_even() as i32
            });
            sums[first / 32 % 2] += products.sum::<i32>() as f32 * (self.absmax[self.block(row, first)] * s);
        }
        (sums[0] + sums[1]) * (1.0 / 124.11)
    }

    /// "The f32 product" of SPEC.md, of at most one panel of columns.
    fn f32(&self, row: usize, x: &[f32]) -> f32 {
        let mut lane = [0.0; 8];
        let mut next = 0;
        while next < self.cols {
            // A segment: the columns of one span and one block.
            let (first, span, block) = (next, next / 64, self.block(row, next));
            while next < self.cols && next / 64 == span && self.block(row, next) == block {
                next += 1;
            }
            let mut p = [[0.0; 8]; 8];
            let mut present = [false; 8];
            for column in first..next {
                let c = column % 64;
                let (l, j) = (4 * (c / 32) + c / 2 % 4, 4 * (c % 2) + c % 32 / 8);
                p[j][l] = NF4[self.code(row, column)] * x[column];
                present[l] = true;
            }
            for l in (0..8).filter(|l| present[*l]) {
                let sum = ((p[0][l] + p[1][l]) + (p[2][l] + p[3][l])) + ((p[4][l] + p[5][l]) + (p[6][l] + p[7][l]));
                lane[l] += sum * self.absmax[block];
            }
        }
        let t: [f32; 4] = core::array::from_fn(|i| lane[i] + lane[i + 4]);
        0.0 + ((t[0] + t[2]) + (t[1] + t[3]))
    }

    /// "The transposed f32 product" of SPEC.md, of at most one chunk of rows.
    fn transposed(&self, column: usize, x: &[f32]) -> f32 {
        let mut sum = 0.0;
        for first in (0..self.rows).step_by(4) {
            let p: [f32; 4] = core::array::from_fn(|i| match x.get(first + i) {
                Some(x) => NF4[self.code(first + i, column)] * (self.absmax[self.block(first + i, column)] * x),
                None => 0.0,
            });
            sum += (p[0] + p[1]) + (p[2] + p[3]);
        }
        0.0 + sum
    }
}

/// The weights in every type.
fn check_dequantized(m: &Matrix, what: &str) {
    fn restored<T: Float>(k: Kernels, m: &Matrix) -> Vec<u32> {
        let mut out = vec![T::from_f32(3.0); m.codes.len()];
        k.dequantize(&m.view(), &mut out).unwrap();
        bits(&out)
    }
    let weights = m.weights();
    let half: Vec<_> = weights.iter().map(|w| f16::from_f32(*w)).collect();
    let brain: Vec<_> = weights.iter().map(|w| bf16::from_f32(*w)).collect();
    for k in Kernels::available() {
        assert_eq!(restored::<f32>(k, m), bits(&weights), "to f32, {what}, {}", k.isa());
        assert_eq!(restored::<f16>(k, m), bits(&half), "to f16, {what}, {}", k.isa());
        assert_eq!(restored::<bf16>(k, m), bits(&brain), "to bf16, {what}, {}", k.isa());
    }
}

/// The products with a batch of vectors, alone and together.
fn check_products(m: &Matrix, x: &[f32], what: &str) {
    let Matrix { rows, cols, block_size, .. } = *m;
    let (view, batch) = (m.view(), x.len() / cols);
    // [rows, batch].
    let product = |of: &dyn Fn(usize, &[f32]) -> f32| -> Vec<f32> {
        (0..rows).flat_map(|r| x.chunks(cols).map(move |x| of(r, x))).collect()
    };
    let exact = product(&|r, x| m.f32(r, x));
    let aligned = cols.is_multiple_of(block_size.get());
    let fast = if aligned { product(&|r, x| m.sixteen_by_four(r, x)) } else { exact.clone() };
    let grouped = cols.is_multiple_of(32);
    let coarse = if grouped { product(&|r, x| m.eight_by_eight(r, x)) } else { exact.clone() };
    for k in Kernels::available() {
        let what = format!("{what}, {}", k.isa());
        let mut values = vec![0x5555; batch * Activations::values_len(cols, block_size)];
        let mut scales = vec![9.0; batch * Activations::scales_len(cols, block_size)];
        let activations = k.quantize_activations_batch(x, cols, block_size, &mut values, &mut scales).unwrap();
        let mut y = vec![3.0; rows * batch];
        k.gemm(&view, &activations, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&fast), "16x4 batch, {what}");
        let mut bytes = vec![0x55; batch * Activations8x8::values_len(cols)];
        let mut byte_scales = vec![9.0; batch * Activations8x8::scales_len(cols)];
        let eights = k.quantize_activations_8x8_batch(x, cols, &mut bytes, &mut byte_scales).unwrap();
        k.gemm_8x8(&view, &eights, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&coarse), "8x8 batch, {what}");
        k.gemm_f32(&view, x, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&exact), "f32 batch, {what}");
        for (n, x) in x.chunks(cols).enumerate() {
            let vector = |y: &[f32]| bits(&(0..rows).map(|r| y[r * batch + n]).collect::<Vec<_>>());
            let mut y = vec![3.0; rows];
            k.gemv(&view, &activations.vector(n), &mut y).unwrap();
            assert_eq!(bits(&y), vector(&fast), "16x4, vector {n}, {what}");
            k.gemv_8x8(&view, &eights.vector(n), &mut y).unwrap();
            assert_eq!(bits(&y), vector(&coarse), "8x8, vector {n}, {what}");
            k.gemv_f32(&view, x, &mut y).unwrap();
            assert_eq!(bits(&y), vector(&exact), "f32, vector {n}, {what}");
        }
    }
}

fn check_transposed(m: &Matrix, x: &[f32], what: &str) {
    let expected: Vec<f32> = (0..m.cols).map(|c| m.transposed(c, x)).collect();
    for k in Kernels::available() {
        let mut y = vec![3.0; m.cols];
        k.gemv_transposed_f32(&m.view(), x, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&expected), "transposed, {what}, {}", k.isa());
    }
}

/// Every byte at every place of a span; with unit vectors as inputs, so that each weight is an output.
#[test]
fn all_bytes_through_every_decoder() {
    print_isas();
    // Half a span, a span, a stride of eight spans with a span and a half and with a span, rows with straddling blocks.
    for (cols, block_size) in [
        (32, BlockSize::B32),
        (64, BlockSize::B64),
        (608, BlockSize::B32),
        (576, BlockSize::B64),
        (512, BlockSize::B256),
        (66, BlockSize::B64),
    ] {
        let bytes = (0..256 * cols / 2).map(|i| (i / (cols / 2) + i % (cols / 2) * 7) as u8);
        let m = Matrix::new(256, cols, block_size, bytes.flat_map(|b| [b >> 4, b & 15]).collect());
        let what = format!("{cols} columns, {block_size:?}");
        for place in 0..cols / 2 {
            let mut there: Vec<u8> = (0..256).map(|row| m.packed[row * (cols / 2) + place]).collect();
            there.sort_unstable();
            assert!(there.into_iter().eq(0..=u8::MAX), "the test has every byte at every place");
        }
        check_dequantized(&m, &what);
        let units = |n: usize| (0..n * n).map(|i| f32::from(i / n == i % n)).collect::<Vec<f32>>();
        // The first span of the stride, the last, and what comes after the stride.
        let columns = units(cols);
        let columns = columns.chunks(cols).enumerate().filter(|(c, _)| *c < 66 || *c >= 448);
        check_products(&m, &columns.flat_map(|(_, x)| x.to_vec()).collect::<Vec<_>>(), &what);
        for x in units(256).chunks(256).step_by(if cols > 66 { 15 } else { 1 }) {
            check_transposed(&m, x, &what);
        }
    }
}

#[test]
fn all_short_rows_with_all_block_sizes() {
    const ROWS: usize = 3;
    print_isas();
    let mut g = Generator(2);
    for (cols, block_size) in (1..=260).flat_map(|cols| BlockSize::ALL.map(|block_size| (cols, block_size))) {
        let what = format!("{cols} columns, {block_size:?}");
        let codes = (0..ROWS * cols).map(|_| (g.next() >> 60) as u8).collect();
        let m = Matrix::new(ROWS, cols, block_size, codes);
        let (bytes, blocks) = (m.packed.len(), m.absmax.len());
        assert_eq!(m.view().is_row_aligned(), cols % block_size.get() == 0);
        // A byte or a block less or more is refused.
        let view = |bytes: usize, blocks: usize| {
            let (packed, absmax) = (vec![0; bytes], vec![0.0; blocks]);
            Nf4Matrix::new(&packed, Absmax::Plain(&absmax), ROWS, cols, block_size).map(|_| ())
        };
        for got in [bytes - 1, bytes + 1] {
            let error = ShapeError::Length { what: "packed codes", expected: bytes, got };
            assert_eq!(view(got, blocks), Err(error), "{what}");
        }
        for got in [blocks - 1, blocks + 1] {
            let error = ShapeError::Length { what: "absmax", expected: blocks, got };
            assert_eq!(view(bytes, got), Err(error), "{what}");
        }
        check_dequantized(&m, &what);
        let x: Vec<f32> = (0..2 * cols).map(|_| g.value()).collect();
        check_products(&m, &x, &what);
        check_transposed(&m, &[x[0], -x[1], 0.75], &what);
    }
}
