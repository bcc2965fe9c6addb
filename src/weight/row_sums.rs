//! Weighted sums of the rows of a dense f32 matrix, the form of every product in a gradient.

use nf4_kernels::{Float, spec::ROW_CHUNK};

/// Columns whose sums are held at a time, on the stack.
const SPAN: usize = 32;

/// `out += sum over j of factor(j) * rows[j]`, where `rows` is row-major and each row as long as `out`.
///
/// The order is that of the transposed product in [`nf4_kernels::spec`]: rows are summed in chunks of [`ROW_CHUNK`], and
/// in fours within a chunk, `s = s + ((p[0] + p[1]) + (p[2] + p[3]))` with `p[j] = factor(j) * rows[j]`, every operation
/// rounded to f32; then `out = out + s`. So the bits are the same everywhere, and `R` rows round a term at most `4 +
/// ceil(min(R, 512) / 4) + ceil(R / 512)` times. Every NaN is [`f32::NAN`].
pub(crate) fn add_rows(out: &mut [f32], factor: impl Fn(usize) -> f32, rows: &[f32]) {
    let cols = out.len();
    if cols == 0 {
        return;
    }
    for (s, out) in out.chunks_mut(SPAN).enumerate() {
        let mut row = 0;
        // Where `ROW_CHUNK` rows are longer than the address space, there are fewer rows than that.
        for chunk in rows.chunks(cols.saturating_mul(ROW_CHUNK)) {
            let mut sums = [0.0; SPAN];
            for four in chunk.chunks(cols.saturating_mul(4)) {
                let mut products = [[0.0; SPAN]; 4];
                for (products, values) in products.iter_mut().zip(four.chunks_exact(cols)) {
                    let factor = factor(row);
                    for (product, value) in products.iter_mut().zip(&values[s * SPAN..][..out.len()]) {
                        *product = factor * value;
                    }
                    row += 1;
                }
                let [p0, p1, p2, p3] = &products;
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum += (p0[c] + p1[c]) + (p2[c] + p3[c]);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = f32::from_f32(*out + sum);
            }
        }
    }
}
