//! The 16x4 and the f32 product of a vector.

use nf4::{Activations, Kernels};

use crate::truth::Row;
use crate::{
    ActivationBuffers, KINDS, Quantized, beside_scalar, bits, dequantized, for_all_shapes, gemv, gemv_f32, inputs,
};

#[test]
fn products_are_the_same_bits_everywhere() {
    for_all_shapes("products", beside_scalar(), |k, rows, cols, block_size, g| {
        for (weight_kind, kind) in KINDS.iter().flat_map(|w| KINDS.map(|x| (*w, x))) {
            if weight_kind != "bell" && kind != "bell" && weight_kind != kind {
                continue;
            }
            let weights = inputs(weight_kind, rows * cols, g);
            let q = Quantized::new(Kernels::scalar(), &weights, rows, cols, block_size);
            let x = inputs(kind, cols, g);
            let what = format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}, {}", k.isa());
            let mut buffers = [0, 1].map(|_| ActivationBuffers::new(cols, block_size));
            let [here, there] = &mut buffers;
            let expected = there.quantize(Kernels::scalar(), &x, block_size);
            let activations = here.quantize(k, &x, block_size);
            let values = |a: &Activations<'_>| (0..cols).map(|c| a.get(0, c)).collect::<Vec<_>>();
            assert_eq!(values(&activations), values(&expected), "activations {what}");
            assert_eq!(bits(activations.scales()), bits(expected.scales()), "scales {what}");
            for matrix in [q.plain(), q.nested()] {
                let (y, expected) = (gemv(k, &matrix, &activations), gemv(Kernels::scalar(), &matrix, &expected));
                assert_eq!(bits(&y), bits(&expected), "16x4 {what}");
                let (y, expected) = (gemv_f32(k, &matrix, &x), gemv_f32(Kernels::scalar(), &matrix, &x));
                assert_eq!(bits(&y), bits(&expected), "f32 {what}");
            }
        }
    });
}

#[test]
fn products_lie_within_their_bounds() {
    for_all_shapes("bounds", Kernels::available(), |k, rows, cols, block_size, g| {
        for (weight_kind, kind) in
            [("bell", "bell"), ("subnormal", "huge"), ("bell", "subnormal"), ("sparse", "sparse"), ("zero", "bell")]
        {
            let q = Quantized::new(k, &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, cols, g);
            let mut buffers = ActivationBuffers::new(cols, block_size);
            let activations = buffers.quantize(k, &x, block_size);
            for matrix in [q.plain(), q.nested()] {
                let (fast, exact) = (gemv(k, &matrix, &activations), gemv_f32(k, &matrix, &x));
                for (r, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
                    let row = Row::of(&matrix, &q.packed, r);
                    let what =
                        || format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}, row {r}, {}", k.isa());
                    row.f32(&x).check(*exact, what);
                    if matrix.is_row_aligned() {
                        row.sixteen_by_four(&activations).check(*fast, what);
                    } else {
                        assert_eq!(fast.to_bits(), exact.to_bits(), "straddling rows take the f32 path: {}", what());
                    }
                }
            }
        }
    });
}

#[test]
fn results_do_not_depend_on_how_rows_are_split() {
    for_all_shapes("splits", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        let x = inputs("bell", cols, g);
        let mut buffers = ActivationBuffers::new(cols, block_size);
        let activations = buffers.quantize(k, &x, block_size);
        for matrix in [q.plain(), q.nested()] {
            let whole = (gemv(k, &matrix, &activations), gemv_f32(k, &matrix, &x), dequantized::<f32>(k, &matrix));
            for row in 0..=rows {
                let (top, bottom) = matrix.split_at_row(row).unwrap();
                let joined = |mut a: Vec<f32>, b: Vec<f32>| {
                    a.extend(b);
                    bits(&a)
                };
                let fast = joined(gemv(k, &top, &activations), gemv(k, &bottom, &activations));
                assert_eq!(fast, bits(&whole.0), "16x4, {rows} x {cols}, {block_size:?} at {row}");
                let exact = joined(gemv_f32(k, &top, &x), gemv_f32(k, &bottom, &x));
                assert_eq!(exact, bits(&whole.1), "f32, {rows} x {cols}, {block_size:?} at {row}");
                let mut weights = dequantized::<f32>(k, &top);
                weights.extend(dequantized::<f32>(k, &bottom));
                assert_eq!(weights, whole.2, "dequantize, {rows} x {cols}, {block_size:?} at {row}");
            }
        }
    });
}
