//! Restoring any codes with any scales, into every type: every instruction set gives the bits of the definition,
//! whatever the split by rows.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::{CODEBOOK, Float, Kernels, bf16, f16};
use nf4_fuzz::{Bytes, Matrix, Scales, Shape, bits};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    shape: Shape,
    scales: Scales,
    /// First row and number of rows of a part.
    rows: (u16, u16),
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let matrix = Matrix::new(input.shape, 1 << 14, input.scales, &mut Bytes::new(input.bytes));
    let start = usize::from(input.rows.0) % (matrix.rows + 1);
    let end = start + usize::from(input.rows.1) % (matrix.rows - start + 1);
    check::<f32>(&matrix, start, end);
    check::<f16>(&matrix, start, end);
    check::<bf16>(&matrix, start, end);
});

fn check<T: Float>(matrix: &Matrix, start: usize, end: usize) {
    let absmax = matrix.dequantized();
    let weight = |i: usize| T::from_f32(CODEBOOK[usize::from(matrix.code(i))] * absmax[i / matrix.block_size.get()]);
    let expected: Vec<T> = (0..matrix.rows * matrix.cols).map(weight).collect();
    let expected = bits(&expected);
    for k in Kernels::available() {
        let mut out = vec![T::from_f32(3.0); expected.len()];
        k.dequantize(&matrix.view(), &mut out).expect("the lengths fit");
        assert_eq!(bits(&out), expected, "{}", k.isa());

        let part = matrix.view().row_range(start..end).expect("inside");
        let mut out = vec![T::from_f32(3.0); (end - start) * matrix.cols];
        k.dequantize(&part, &mut out).expect("the lengths fit");
        assert_eq!(bits(&out), expected[start * matrix.cols..end * matrix.cols], "rows {start}..{end}, {}", k.isa());
    }
}
