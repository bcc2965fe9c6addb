//! Views and operations with lengths that fit and lengths that do not: an error exactly when something does not fit,
//! and then the right answer or none.
#![no_main]

use std::ops::Range;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::{
    Absmax, Activations, BlockSize, CODEBOOK, DYNAMIC_MAP, Float, Kernels, NESTED_BLOCK, NestedAbsmax, Nf4Matrix,
    packed_len,
};
use nf4_fuzz::{Bytes, Floats, bits};

/// The largest buffer that a length may stand for.
const MOST: usize = 1 << 13;

/// A length: with `kind` 0 modulo 4 any, and otherwise the one that fits, if that is not too large.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Length {
    kind: u8,
    any: u16,
}

impl Length {
    fn of(self, fitting: Option<usize>) -> usize {
        let any = usize::from(self.any) % (MOST + 1);
        if self.kind.is_multiple_of(4) { any } else { fitting.filter(|len| *len <= MOST).unwrap_or(any) }
    }
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    /// `kind` odd: sizes without a limit.
    kind: u8,
    rows: u64,
    cols: u64,
    block_size: u16,
    nested: u8,
    lengths: [Length; 3],
    range: (u64, u64),
    operations: [Length; 8],
    floats: Floats,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let limit = |size: u64| if input.kind.is_multiple_of(2) { size % 150 } else { size };
    let [rows, cols, start, end] =
        [input.rows, input.cols, input.range.0, input.range.1].map(|n| usize::try_from(limit(n)).unwrap_or(usize::MAX));
    let sizes = BlockSize::ALL.map(BlockSize::get);
    let block_size = match BlockSize::new(usize::from(input.block_size)) {
        Ok(block_size) => block_size,
        Err(_) => {
            assert!(!sizes.contains(&usize::from(input.block_size)));
            BlockSize::ALL[usize::from(input.block_size) % sizes.len()]
        }
    };
    let mut bytes = Bytes::new(input.bytes);
    let elements = rows.checked_mul(cols);
    let blocks = input.lengths[0].of(elements.map(|n| block_size.blocks(n)));
    let scales =
        input.lengths[1].of(Some(if input.nested.is_multiple_of(2) { blocks } else { blocks.div_ceil(NESTED_BLOCK) }));
    let scales = input.floats.take(scales, &mut bytes);
    let codes = bytes.take(blocks);
    let packed = bytes.take(input.lengths[2].of(elements.map(packed_len)));

    let absmax = if input.nested.is_multiple_of(2) {
        Absmax::Plain(&scales)
    } else {
        let nested = NestedAbsmax::new(&codes, &DYNAMIC_MAP, &scales, 0.25);
        assert_eq!(nested.is_ok(), scales.len() == codes.len().div_ceil(NESTED_BLOCK));
        let Ok(nested) = nested else { return };
        Absmax::Nested(nested)
    };
    let view = Nf4Matrix::new(&packed, absmax, rows, cols, block_size);
    let fits = elements.is_some_and(|n| packed.len() == packed_len(n) && absmax.len() == block_size.blocks(n));
    assert_eq!(view.is_ok(), fits, "{rows} x {cols}, {} bytes, {} scales", packed.len(), absmax.len());
    let Ok(view) = view else { return };

    let part = view.row_range(Range { start, end });
    assert_eq!(part.is_ok(), start <= end && end <= rows);
    assert_eq!(view.split_at_row(start).is_ok(), start <= rows);
    let (view, first) = part.map_or((view, 0), |part| (part, start));

    // The weights of the view, by the definition.
    let code = |i: usize| packed[i / 2] >> (4 - 4 * (i % 2)) & 15;
    let flat = first * cols..(first + view.rows()) * cols;
    let weight = |i: usize| f32::from_f32(CODEBOOK[usize::from(code(i))] * absmax.get(i / block_size.get()));
    let weights: Vec<f32> = flat.map(weight).collect();
    let inputs = input.floats.take(input.operations[0].of(Some(cols)), &mut bytes);
    let mut expected = None;
    for k in Kernels::available() {
        let results = run(k, &view, &weights, &inputs, input.operations);
        let first = expected.get_or_insert_with(|| results.clone());
        assert_eq!(&results, first, "{} and {}", k.isa(), Kernels::detect().isa());
    }
});

/// Every operation, with lengths that may not fit; the bits of those that do.
fn run(k: Kernels, view: &Nf4Matrix<'_>, weights: &[f32], inputs: &[f32], lengths: [Length; 8]) -> Vec<Vec<u32>> {
    let (rows, cols, block_size) = (view.rows(), view.cols(), view.block_size());
    let mut results = Vec::new();
    let mut keep = |what: &str, ok: bool, fits: bool, out: &[f32]| {
        assert_eq!(ok, fits, "{what} of {} values, {rows} x {cols}, {}", out.len(), k.isa());
        if ok {
            results.push(bits(out));
        }
    };
    let [_, weights_len, rows_len, cols_len, values_len, scales_len, batch_len, other] = lengths;

    let mut out = vec![3.0_f32; weights_len.of(Some(weights.len()))];
    let result = k.dequantize(view, &mut out);
    keep("dequantize", result.is_ok(), out.len() == weights.len(), &out);
    assert!(result.is_err() || bits(&out) == bits(weights), "dequantize on {}", k.isa());

    let mut out = vec![3.0; rows_len.of(Some(rows))];
    let result = k.gemv_f32(view, inputs, &mut out);
    keep("gemv_f32", result.is_ok(), inputs.len() == cols && out.len() == rows, &out);

    let t = vec![0.5; rows_len.of(Some(rows))];
    let mut out = vec![3.0; cols_len.of(Some(cols))];
    let result = k.gemv_transposed_f32(view, &t, &mut out);
    keep("transposed", result.is_ok(), t.len() == rows && out.len() == cols, &out);

    let mut out = vec![3.0; rows_len.of(Some(rows))];
    let result = k.gemv_dense(weights, inputs, &mut out);
    let fits = out.len().checked_mul(inputs.len()) == Some(weights.len());
    keep("dense", result.is_ok(), fits, &out);

    let batch = inputs.len().checked_div(cols).unwrap_or(0);
    let mut out = vec![3.0; batch_len.of(rows.checked_mul(batch))];
    let result = k.gemm_f32(view, inputs, &mut out);
    let fits = batch * cols == inputs.len() && rows.checked_mul(batch) == Some(out.len());
    keep("gemm_f32", result.is_ok(), fits, &out);

    // Activations of another number of columns and for another block size, too.
    let columns = other.of(Some(cols));
    let group = if other.any % 5 == 0 { BlockSize::B32 } else { block_size };
    let batch = inputs.len().checked_div(columns).unwrap_or(0);
    let [all_values, all_scales] = [Activations::values_len(columns, group), Activations::scales_len(columns, group)];
    let mut values = vec![0x5555; values_len.of(Some(batch * all_values))];
    let mut scales = vec![3.0; scales_len.of(Some(batch * all_scales))];
    let fits =
        batch * columns == inputs.len() && values.len() == batch * all_values && scales.len() == batch * all_scales;
    let activations = k.quantize_activations_batch(inputs, columns, group, &mut values, &mut scales);
    assert_eq!(activations.is_ok(), fits, "activations of {columns} columns on {}", k.isa());
    let Ok(activations) = activations else { return results };
    keep("scales", true, true, activations.scales());
    let right_group = !view.is_row_aligned() || group.activation_group() == block_size.activation_group();

    let mut out = vec![3.0; rows_len.of(Some(rows))];
    let result = k.gemv(view, &activations, &mut out);
    let one = batch == 1 || cols == 0;
    keep("gemv", result.is_ok(), columns == cols && one && out.len() == rows && right_group, &out);

    let mut out = vec![3.0; batch_len.of(rows.checked_mul(batch))];
    let result = k.gemm(view, &activations, &mut out);
    let fits = columns == cols && rows.checked_mul(batch) == Some(out.len()) && right_group;
    keep("gemm", result.is_ok(), fits, &out);
    results
}
