//! Kind `minilm`: real weights and real activations.

use nf4::{CODEBOOK, DYNAMIC_MAP};

use crate::support::{Case, Checker, NestedScales, Quantized, Scales, Tensors, quantize};
use crate::{layers, products, second_level};

pub(crate) fn minilm(c: &mut Checker, case: &Case) {
    let (file, block_size) = (case.tensors(), case.block_size());
    let weight = file.get("weight");
    let (rows, cols) = weight.matrix_shape();
    let (packed, absmax) = quantize(c.kernels, weight, block_size);
    c.equal("packed", &packed, &file.values("packed"));
    c.equal("absmax", &absmax, &file.values("absmax"));
    c.equal("nested_code", &DYNAMIC_MAP, &file.values("nested_code"));
    let nested = NestedScales::from_reference(&file);
    second_level::quantized(c, &absmax, &nested);
    second_level::restored(c, &nested, &file.values("absmax_dequantized"));
    c.holds("code", file.find("code").is_none_or(|t| t.values::<f32>() == CODEBOOK), || "another codebook".to_owned());

    let plain = Quantized { packed, scales: Scales::Plain(absmax), rows, cols, block_size };
    let double = Quantized { scales: Scales::Nested(nested), ..plain.clone() };
    output(c, case, &file, &plain, ["dequantized_rows", "dequantized_bit_sum", "y64"]);
    output(c, case, &file, &double, ["dequantized_dq_rows", "dequantized_dq_bit_sum", "y64_dq"]);
}

/// Some rows of the restored weight, a checksum of all, and the outputs.
fn output(c: &mut Checker, case: &Case, file: &Tensors, layer: &Quantized, [rows, bit_sum, y64]: [&str; 3]) {
    let weights = layer.dequantized(c.kernels);
    let chosen: Vec<f32> = file
        .values::<i64>("rows")
        .into_iter()
        .flat_map(|row| weights.chunks(layer.cols).nth(usize::try_from(row).unwrap()).unwrap().to_vec())
        .collect();
    c.equal(rows, &chosen, &file.values(rows));
    check_bit_sum(c, bit_sum, &weights, case.info[bit_sum].as_u64());
    check_bit_sum(c, bit_sum, &weights, file.metadata(bit_sum).map(|sum| sum.parse().unwrap()));
    let bias = file.find("bias").map(|b| b.to_f32());
    products::check(c, y64, layer, file.get("x"), bias.as_deref(), file.get(y64));
    layers::linear(c, y64, layer, file.get("x"), bias.as_deref(), file.get(y64));
}

/// The sum of all bit patterns, modulo 2^64.
pub(crate) fn check_bit_sum(c: &mut Checker, name: &str, weights: &[f32], expected: Option<u64>) {
    let sum = weights.iter().fold(0_u64, |sum, w| sum.wrapping_add(u64::from(w.to_bits())));
    c.holds(name, Some(sum) == expected, || format!("expected {expected:?}, got {sum}"));
}
