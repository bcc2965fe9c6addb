//! Kinds `nf4` and `double_quant`: a tensor is quantized and restored.

use nf4::{Absmax, BlockSize, CODEBOOK, DYNAMIC_MAP, Float, Kernels, Nf4Matrix};

use crate::second_level;
use crate::support::{Case, Checker, NestedScales, Tensor, Tensors, quantize, with_float};

/// One quantization and its inverse.
pub(crate) fn nf4(c: &mut Checker, case: &Case) {
    let (file, block_size) = (case.tensors(), case.block_size());
    let input = file.get("input");
    let (packed, absmax) = quantize(c.kernels, input, block_size);
    let reference = (file.values("packed"), file.values("absmax"));
    if case.is_undefined() {
        undefined(c, input, block_size, (&packed, &absmax), (&reference.0, &reference.1));
    } else {
        c.equal("packed", &packed, &reference.0);
        c.equal("absmax", &absmax, &reference.1);
    }
    // Restoring is plain arithmetic, so what was recorded for NaN and infinity holds as well.
    dequantized(c, case, &file, &reference.0, Absmax::Plain(&reference.1));
}

/// The same with double quantization.
pub(crate) fn double_quant(c: &mut Checker, case: &Case) {
    let (file, block_size) = (case.tensors(), case.block_size());
    c.equal("code", &CODEBOOK, &file.values("code"));
    c.equal("nested_code", &DYNAMIC_MAP, &file.values("nested_code"));
    let input = file.get("input");
    let (packed, absmax) = quantize(c.kernels, input, block_size);
    let reference = (file.values("packed"), file.values("absmax_f32"));
    let nested = NestedScales::from_reference(&file);
    if case.is_undefined() {
        undefined(c, input, block_size, (&packed, &absmax), (&reference.0, &reference.1));
        second_level::undefined(c, &absmax);
    } else {
        c.equal("packed", &packed, &reference.0);
        c.equal("absmax_f32", &absmax, &reference.1);
        second_level::quantized(c, &absmax, &nested);
    }
    second_level::restored(c, &nested, &file.values("absmax_dequantized"));
    dequantized(c, case, &file, &reference.0, nested.absmax());
}

/// Every tensor that holds the restored weights, each in its own type.
fn dequantized(c: &mut Checker, case: &Case, file: &Tensors, packed: &[u8], absmax: Absmax<'_>) {
    let (rows, cols) = case.matrix_shape();
    let matrix = Nf4Matrix::new(packed, absmax, rows, cols, case.block_size()).unwrap();
    c.holds("dequantized", file.find("dequantized").is_some(), || "the tensor is missing".to_owned());
    for (name, tensor) in file.iter().filter(|(name, _)| name.starts_with("dequantized")) {
        c.dequantized(name, &matrix, tensor);
        if case.is_undefined() {
            with_float!(tensor.dtype, T => same_on_scalar::<T>(c, name, &matrix));
        }
    }
}

fn same_on_scalar<T: Float + crate::support::Element>(c: &mut Checker, name: &str, matrix: &Nf4Matrix<'_>) {
    let run = |kernels: Kernels| {
        let mut out = vec![T::from_f32(0.0); matrix.rows() * matrix.cols()];
        kernels.dequantize(matrix, &mut out).unwrap();
        out
    };
    c.same_as_scalar(name, &run(c.kernels), run);
}

/// NaN and infinity in the input: what the documentation of [`Kernels::quantize`] says of the blocks that hold them,
/// what `bitsandbytes` gave for the others, and the same bits on every ISA.
fn undefined(c: &mut Checker, input: &Tensor, block_size: BlockSize, got: (&[u8], &[f32]), recorded: (&[u8], &[f32])) {
    c.same_as_scalar("packed", got.0, |k| quantize(k, input, block_size).0);
    c.same_as_scalar("absmax", got.1, |k| quantize(k, input, block_size).1);

    let (mut packed, mut absmax) = (recorded.0.to_vec(), recorded.1.to_vec());
    let size = block_size.get();
    for (b, block) in input.to_f32().chunks(size).enumerate() {
        let has_nan = block.iter().any(|x| x.is_nan());
        if block.iter().all(|x| x.is_finite()) {
            continue;
        }
        absmax[b] = if has_nan { f32::NAN } else { f32::INFINITY };
        for (i, x) in block.iter().enumerate() {
            let code = if has_nan || x.is_infinite() { 15 } else { 7 };
            let (byte, high) = ((b * size + i) / 2, i % 2 == 0);
            packed[byte] = if high { (packed[byte] & 0x0f) | (code << 4) } else { (packed[byte] & 0xf0) | code };
        }
    }
    c.equal("packed, as documented", got.0, &packed);
    c.equal("absmax, as documented", got.1, &absmax);
}
