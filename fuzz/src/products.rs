//! The products of one vector and of batches on one instruction set, into outputs with guards beside them.

use nf4::{Activations, Activations8x8, Gradients, Kernels, Nf4Matrix, ShapeError};

/// The products in the order of the functions here. The last two are transposed: they have an output per column.
pub const PRODUCTS: [&str; 5] = ["16x4", "8x8", "f32", "transposed f32", "transposed 16x4"];

/// Runs something with `len` outputs, filled with what no result consists of, between values that have to stay.
///
/// # Panics
/// If an error is returned, or something was written beside the outputs.
pub fn guarded(len: usize, run: impl FnOnce(&mut [f32]) -> Result<(), ShapeError>) -> Vec<f32> {
    /// How many values stand on each side: an odd number, so that vectors of outputs are not aligned.
    const BESIDE: usize = 19;
    const GUARD: f32 = f32::from_bits(0x5a5a_5a5a);
    let mut all = vec![GUARD; len + 2 * BESIDE];
    run(&mut all[BESIDE..][..len]).expect("the lengths fit");
    let out = all[BESIDE..][..len].to_vec();
    all.drain(BESIDE..BESIDE + len);
    assert!(all.iter().all(|guard| guard.to_bits() == GUARD.to_bits()), "written beside {len} outputs");
    out
}

/// Activations of the 16x4 product: `use_them` gets those of `inputs`, `[batch, cols]`.
pub fn quantized<R>(
    k: Kernels,
    matrix: &Nf4Matrix<'_>,
    inputs: &[f32],
    use_them: impl FnOnce(&Activations<'_>) -> R,
) -> R {
    let (cols, block_size) = (matrix.cols(), matrix.block_size());
    let batch = inputs.len().checked_div(cols).unwrap_or(0);
    let mut values = vec![0x5555; batch * Activations::values_len(cols, block_size)];
    let mut scales = vec![-1.0; batch * Activations::scales_len(cols, block_size)];
    let activations = k.quantize_activations_batch(inputs, cols, block_size, &mut values, &mut scales);
    use_them(&activations.expect("the lengths fit"))
}

/// The same of the 8x8 product.
pub fn quantized_8x8<R>(k: Kernels, cols: usize, inputs: &[f32], use_them: impl FnOnce(&Activations8x8<'_>) -> R) -> R {
    let batch = inputs.len().checked_div(cols).unwrap_or(0);
    let mut values = vec![0x55; batch * Activations8x8::values_len(cols)];
    let mut scales = vec![-1.0; batch * Activations8x8::scales_len(cols)];
    let activations = k.quantize_activations_8x8_batch(inputs, cols, &mut values, &mut scales);
    use_them(&activations.expect("the lengths fit"))
}

/// The inputs of the transposed 16x4 product.
fn quantized_gradients<R>(k: Kernels, rows: usize, inputs: &[f32], use_them: impl FnOnce(&Gradients<'_>) -> R) -> R {
    let batch = inputs.len().checked_div(rows).unwrap_or(0);
    let mut values = vec![0x5555; batch * Gradients::values_len(rows)];
    let mut scales = vec![-1.0; batch * Gradients::scales_len(rows)];
    let gradients = k.quantize_gradients(inputs, rows, &mut values, &mut scales);
    use_them(&gradients.expect("the lengths fit"))
}

/// The products with the vector `x`, and the transposed ones with `t`.
pub fn of_vector(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32], t: &[f32]) -> [Vec<f32>; 5] {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    [
        quantized(k, matrix, x, |x| guarded(rows, |y| k.gemv(matrix, x, y))),
        quantized_8x8(k, cols, x, |x| guarded(rows, |y| k.gemv_8x8(matrix, x, y))),
        guarded(rows, |y| k.gemv_f32(matrix, x, y)),
        guarded(cols, |y| k.gemv_transposed_f32(matrix, t, y)),
        quantized_gradients(k, rows, t, |t| guarded(cols, |y| k.gemm_transposed(matrix, t, y))),
    ]
}

/// The products with the vectors `x`, `[batch, cols]`, each `[rows, batch]`; and the transposed ones with `t`,
/// `[batch, rows]`, which are `[batch, cols]`.
pub fn of_batch(k: Kernels, matrix: &Nf4Matrix<'_>, batch: usize, x: &[f32], t: &[f32]) -> [Vec<f32>; 5] {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    [
        quantized(k, matrix, x, |x| guarded(rows * batch, |y| k.gemm(matrix, x, y))),
        quantized_8x8(k, cols, x, |x| guarded(rows * batch, |y| k.gemm_8x8(matrix, x, y))),
        guarded(rows * batch, |y| k.gemm_f32(matrix, x, y)),
        guarded(batch * cols, |y| k.gemm_transposed_f32(matrix, t, y)),
        quantized_gradients(k, rows, t, |t| guarded(batch * cols, |y| k.gemm_transposed(matrix, t, y))),
    ]
}
