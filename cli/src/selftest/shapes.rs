//! Operations of random shapes, by one instruction set and by portable code.

use anyhow::Result;
use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, Float, Gradients, Kernels, NESTED_BLOCK, NestedAbsmax,
    Nf4Matrix, bf16, f16,
};

use crate::generator::Generator;

/// The operations and shapes whose results differ from those of portable code in any bit.
pub(super) fn differences(kernels: Kernels, seed: u64, shapes: u32) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for number in 0..shapes {
        let case = Case::new(seed.wrapping_add(u64::from(number)));
        let (ours, expected) = (case.run(kernels)?, case.run(Kernels::scalar())?);
        all.extend(different(&ours, &expected).map(|name| format!("{name} of {case}")));
    }
    Ok(all)
}

/// The operations whose results have not the same bits.
fn different(ours: &[Bits], expected: &[Bits]) -> impl Iterator<Item = &'static str> {
    ours.iter().zip(expected).filter(|(ours, expected)| ours != expected).map(|((name, _), _)| *name)
}

/// A shape, with inputs that its seed stands for.
#[derive(Debug)]
struct Case {
    seed: u64,
    rows: usize,
    cols: usize,
    batch: usize,
    block_size: BlockSize,
}

impl core::fmt::Display for Case {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { seed, rows, cols, batch, block_size } = self;
        write!(f, "{rows} x {cols}, block {}, batch {batch} (--seed {seed} --shapes 1)", block_size.get())
    }
}

/// An operation and the bits of its result.
type Bits = (&'static str, Vec<u32>);

impl Case {
    /// Half of the rows are whole blocks, as in most models; the others straddle.
    fn new(seed: u64) -> Self {
        let mut generator = Generator(seed);
        let mut below = |n: u64| usize::try_from(generator.next() % n).unwrap_or(0);
        let block_size = [32, 64, 64, 64, 128, 256, 512, 4096][below(8)];
        let cols = match below(2) {
            0 => block_size.min(256) * (1 + below(12)),
            _ => 1 + below(1500),
        };
        let block_size = BlockSize::new(block_size).unwrap_or(BlockSize::B64);
        Self { seed, rows: 1 + below(20), cols, batch: 1 + below(10), block_size }
    }

    /// Everything that kernels compute.
    fn run(&self, kernels: Kernels) -> Result<Vec<Bits>> {
        let Self { seed, rows, cols, batch, block_size } = *self;
        let (len, blocks) = (rows * cols, block_size.blocks(rows * cols));
        let mut generator = Generator(seed);
        let mut fill = |len| {
            let mut values = vec![0.0; len];
            generator.fill(&mut values);
            values
        };
        let (weights, inputs) = (fill(len), fill(batch * cols));
        let mut results = Vec::new();

        let (mut packed, mut absmax) = (vec![0; len.div_ceil(2)], vec![0.0; blocks]);
        kernels.quantize(&weights, block_size, &mut packed, &mut absmax)?;
        results.push(("quantize", packed.iter().map(|b| u32::from(*b)).chain(bits(&absmax)).collect()));
        let halves: Vec<bf16> = weights.iter().map(|w| bf16::from_f32(*w)).collect();
        let (mut packed_halves, mut absmax_halves) = (packed.clone(), absmax.clone());
        kernels.quantize(&halves, block_size, &mut packed_halves, &mut absmax_halves)?;
        let codes = packed_halves.iter().map(|b| u32::from(*b));
        results.push(("quantize bf16", codes.chain(bits(&absmax_halves)).collect()));

        let (mut codes, mut outer) = (vec![0; blocks], vec![0.0; blocks.div_ceil(NESTED_BLOCK)]);
        let offset = kernels.quantize_absmax(&absmax, &mut codes, &mut outer)?;
        let scales = codes.iter().map(|b| u32::from(*b)).chain(bits(&outer)).chain([offset.to_bits()]);
        results.push(("double quantization", scales.collect()));

        let (mut values, mut scales) = (
            vec![0; batch * Activations::values_len(cols, block_size)],
            vec![0.0; batch * Activations::scales_len(cols, block_size)],
        );
        let nested = NestedAbsmax::new(&codes, &DYNAMIC_MAP, &outer, offset)?;
        for absmax in [Absmax::Plain(&absmax), Absmax::Nested(nested)] {
            let matrix = Nf4Matrix::new(&packed, absmax, rows, cols, block_size)?;
            results.push(("dequantize", dequantized::<f32>(kernels, &matrix)?));
            results.push(("dequantize to f16", dequantized::<f16>(kernels, &matrix)?));
            results.push(("dequantize to bf16", dequantized::<bf16>(kernels, &matrix)?));
            let mut y = vec![0.0; rows];
            let one = kernels.quantize_activations(
                &inputs[..cols],
                block_size,
                &mut values[..Activations::values_len(cols, block_size)],
                &mut scales[..Activations::scales_len(cols, block_size)],
            )?;
            kernels.gemv(&matrix, &one, &mut y)?;
            results.push(("16x4 product", bits(&y).collect()));
            kernels.gemv_f32(&matrix, &inputs[..cols], &mut y)?;
            results.push(("f32 product", bits(&y).collect()));
            let mut columns = vec![0.0; cols];
            kernels.gemv_transposed_f32(&matrix, &y, &mut columns)?;
            results.push(("transposed f32 product", bits(&columns).collect()));
            let (mut bytes, mut byte_scales) = (
                vec![0; batch * Activations8x8::values_len(cols)],
                vec![0.0; batch * Activations8x8::scales_len(cols)],
            );
            let many = kernels.quantize_activations_8x8_batch(&inputs, cols, &mut bytes, &mut byte_scales)?;
            kernels.gemv_8x8(&matrix, &many.vector(0), &mut y)?;
            results.push(("8x8 product", bits(&y).collect()));
            let mut y = vec![0.0; batch * rows];
            kernels.gemm_8x8(&matrix, &many, &mut y)?;
            results.push(("8x8 product of a batch", bits(&y).collect()));
            let many = kernels.quantize_activations_batch(&inputs, cols, block_size, &mut values, &mut scales)?;
            kernels.gemm(&matrix, &many, &mut y)?;
            results.push(("16x4 product of a batch", bits(&y).collect()));
            kernels.gemm_f32(&matrix, &inputs, &mut y)?;
            results.push(("f32 product of a batch", bits(&y).collect()));
            let mut columns = vec![0.0; batch * cols];
            kernels.gemm_transposed_f32(&matrix, &y, &mut columns)?;
            results.push(("transposed f32 product of a batch", bits(&columns).collect()));
            let (mut values, mut scales) =
                (vec![0; batch * Gradients::values_len(rows)], vec![0.0; batch * Gradients::scales_len(rows)]);
            let gradients = kernels.quantize_gradients(&y, rows, &mut values, &mut scales)?;
            kernels.gemm_transposed(&matrix, &gradients, &mut columns)?;
            results.push(("transposed 16x4 product", bits(&columns).collect()));
        }
        let mut y = vec![0.0; rows];
        kernels.gemv_dense(&weights, &inputs[..cols], &mut y)?;
        results.push(("dense product", bits(&y).collect()));
        // The same inputs, taken for vectors that stand side by side.
        let mut added = vec![1.0; rows * batch];
        kernels.gemm_dense_add(&weights, &inputs, batch, 0.5, &mut added)?;
        results.push(("dense product added to a batch", bits(&added).collect()));
        let mut columns = inputs.clone();
        kernels.gemm_transposed_dense_add(&weights, &y, 1, &mut columns[..cols])?;
        results.push(("transposed dense product", bits(&columns[..cols]).collect()));
        Ok(results)
    }
}

fn bits(values: &[f32]) -> impl Iterator<Item = u32> {
    values.iter().map(|x| x.to_bits())
}

fn dequantized<T: Float>(kernels: Kernels, matrix: &Nf4Matrix<'_>) -> Result<Vec<u32>> {
    let mut out = vec![T::from_f32(0.0); matrix.rows() * matrix.cols()];
    kernels.dequantize(matrix, &mut out)?;
    Ok(out.iter().map(|x| x.to_f32().to_bits()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The comparison sees one changed bit of any result.
    #[test]
    fn a_changed_bit_is_seen() {
        let case = Case::new(3);
        let expected = case.run(Kernels::scalar()).unwrap();
        for kernels in Kernels::available() {
            let ours = case.run(kernels).unwrap();
            assert_eq!(different(&ours, &expected).count(), 0);
            assert_eq!(ours.len(), 30);
            for changed in 0..ours.len() {
                let mut ours = ours.clone();
                let last = ours[changed].1.last_mut().unwrap();
                *last ^= 1;
                assert_eq!(different(&ours, &expected).collect::<Vec<_>>(), [ours[changed].0]);
            }
        }
        // Results depend on the inputs: another seed gives others, in every operation.
        let other = Case { seed: 4, ..case }.run(Kernels::scalar()).unwrap();
        assert_eq!(different(&other, &expected).count(), 30);
        assert!(differences(Kernels::detect(), 0, 10).unwrap().is_empty());
    }
}
