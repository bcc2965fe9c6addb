//! Packed matrices of any bytes, and their products in f64.

use arbitrary::Arbitrary;
use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, NESTED_BLOCK, NestedAbsmax, Nf4Matrix, packed_len,
    spec,
};

use crate::input::{Bytes, Floats, Shape};
use crate::layer_truth::products::{self as truth, Row};

/// How the scales of a matrix are made.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Scales {
    /// Odd: nested; with the second bit the map is not the usual one, but made of the same floats as the scales.
    pub nested: u8,
    pub floats: Floats,
}

/// A matrix, and vectors to multiply it with.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Product {
    shape: Shape,
    scales: Scales,
    pub inputs: Floats,
}

impl Product {
    /// The vectors of a batch, and then a matrix of at most `elements` elements.
    pub fn take(&self, elements: usize, batch: usize, bytes: &mut Bytes<'_>) -> (Vec<f32>, Matrix) {
        let (_, cols) = self.shape.dimensions(elements);
        let x = self.inputs.take(batch * cols, bytes);
        (x, Matrix::new(self.shape, elements, self.scales, bytes))
    }
}

/// A matrix that owns its bytes.
#[derive(Debug)]
pub struct Matrix {
    pub packed: Vec<u8>,
    pub rows: usize,
    pub cols: usize,
    pub block_size: BlockSize,
    /// One f32 a block, or for nested scales one for each 256.
    pub absmax: Vec<f32>,
    nested: Option<(Vec<u8>, Box<[f32; 256]>, f32)>,
}

impl Matrix {
    /// Any scales, and then any codes.
    pub fn new(shape: Shape, elements: usize, scales: Scales, bytes: &mut Bytes<'_>) -> Self {
        let (rows, cols) = shape.dimensions(elements);
        let block_size = shape.block_size();
        let blocks = block_size.blocks(rows * cols);
        let floats = scales.floats;
        let (absmax, nested) = if scales.nested.is_multiple_of(2) {
            (floats.take(blocks, bytes), None)
        } else {
            let absmax = floats.take(blocks.div_ceil(NESTED_BLOCK), bytes);
            let offset = floats.take(1, bytes)[0];
            let mut map = Box::new(DYNAMIC_MAP);
            if scales.nested & 2 != 0 {
                map.copy_from_slice(&floats.take(256, bytes));
            }
            (absmax, Some((bytes.take(blocks), map, offset)))
        };
        Self { packed: bytes.take(packed_len(rows * cols)), rows, cols, block_size, absmax, nested }
    }

    pub fn scales(&self) -> Absmax<'_> {
        match &self.nested {
            None => Absmax::Plain(&self.absmax),
            Some((codes, map, offset)) => {
                Absmax::Nested(NestedAbsmax::new(codes, map, &self.absmax, *offset).expect("made to fit"))
            }
        }
    }

    pub fn view(&self) -> Nf4Matrix<'_> {
        Nf4Matrix::new(&self.packed, self.scales(), self.rows, self.cols, self.block_size).expect("made to fit")
    }

    /// Makes the scale of an element this value, or the parts that it is dequantized from.
    pub fn poison(&mut self, row: usize, column: usize, value: f32) {
        let block = (row * self.cols + column) / self.block_size.get();
        let scale = if self.nested.is_some() { block / NESTED_BLOCK } else { block };
        self.absmax[scale] = value;
    }

    /// The scale of each block.
    pub fn dequantized(&self) -> Vec<f32> {
        let scales = self.scales();
        (0..scales.len()).map(|block| scales.get(block)).collect()
    }

    /// The code of flat element `index`.
    pub fn code(&self, index: usize) -> u8 {
        if index.is_multiple_of(2) { self.packed[index / 2] >> 4 } else { self.packed[index / 2] & 15 }
    }

    fn row(&self, row: usize) -> Row {
        let (flat, scales) = (row * self.cols..(row + 1) * self.cols, self.scales());
        Row {
            codes: flat.clone().map(|i| self.code(i)).collect(),
            absmax: flat.map(|i| scales.get(i / self.block_size.get())).collect(),
        }
    }

    /// Panics if a 16x4 product lies further from the truth than the specification allows.
    pub fn check_gemv(&self, activations: &Activations<'_>, y: &[f32]) {
        if is_tame(&self.dequantized(), activations.inputs(), self.cols) {
            for (r, y) in y.iter().enumerate() {
                let truth = if self.view().is_row_aligned() {
                    self.row(r).sixteen_by_four(activations)
                } else {
                    self.row(r).f32(activations.inputs())
                };
                truth.check(*y, || format!("16x4, row {r}"));
            }
        }
    }

    /// The same of the 8x8 product.
    pub fn check_gemv_8x8(&self, activations: &Activations8x8<'_>, y: &[f32]) {
        let x = activations.inputs();
        if is_tame(&self.dequantized(), x, self.cols) {
            for (r, y) in y.iter().enumerate() {
                let row = self.row(r);
                let truth = if self.cols.is_multiple_of(spec::GROUP_8X8) {
                    row.eight_by_eight(activations)
                } else {
                    row.f32(x)
                };
                truth.check(*y, || format!("8x8, row {r}"));
            }
        }
    }

    /// The same of the f32 product.
    pub fn check_gemv_f32(&self, x: &[f32], y: &[f32]) {
        if is_tame(&self.dequantized(), x, self.cols) {
            y.iter().enumerate().for_each(|(r, y)| self.row(r).f32(x).check(*y, || format!("f32, row {r}")));
        }
    }

    /// The same of the transposed products, in f32 and in 16x4.
    pub fn check_transposed(&self, x: &[f32], exact: &[f32], fast: &[f32]) {
        if is_tame(&self.dequantized(), x, self.rows) {
            let rows: Vec<Row> = (0..self.rows).map(|r| self.row(r)).collect();
            for (c, (exact, fast)) in exact.iter().zip(fast).enumerate() {
                let in_f32 = truth::transposed(&rows, c, x);
                in_f32.check(*exact, || format!("transposed f32, column {c}"));
                let whole_groups = self.cols.is_multiple_of(32);
                let truth = if whole_groups { truth::transposed_16x4(&rows, c, x) } else { in_f32 };
                truth.check(*fast, || format!("transposed 16x4, column {c}"));
            }
        }
    }
}

/// Whether the bounds of the specification hold for sums of `terms` products of these scales and inputs: they are
/// finite, and nothing overflows, as the largest of what is added is small enough: `32767 * absmax * x` in a lane of
/// 16x4, and `x` itself in one of the f32 product, which multiplies by the scale last.
pub fn is_tame(scales: &[f32], x: &[f32], terms: usize) -> bool {
    let largest = |values: &[f32]| values.iter().fold(0.0_f64, |m, v| if m.is_nan() { m } else { m.max_or_nan(*v) });
    let inputs = largest(x) * terms as f64 * 2.0;
    let products = largest(scales) * f64::from(spec::CODEBOOK_I16[15]) * inputs;
    inputs < f64::from(f32::MAX) && products < f64::from(f32::MAX)
}

trait MaxOrNan {
    /// The larger of this and `|v|`, and NaN if `v` is not finite.
    fn max_or_nan(self, v: f32) -> f64;
}

impl MaxOrNan for f64 {
    fn max_or_nan(self, v: f32) -> f64 {
        if v.is_finite() { self.max(f64::from(v.abs())) } else { f64::NAN }
    }
}

/// The dense product of a row, checked as above.
pub fn check_dense(a: &[f32], x: &[f32], y: f32) {
    if is_tame(a, x, x.len()) {
        truth::dense(a, x).check(y, || "dense".to_owned());
    }
}
