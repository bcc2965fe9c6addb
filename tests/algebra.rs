//! Laws that hold for every matrix and every layer, on shapes and values that `proptest` draws: where the arithmetic is
//! exact as equality of bits, elsewhere within bounds that follow from `kernels/SPEC.md`.
//!
//! The draws are the same on every run; `fuzz/` is where chance explores.

#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests panic, and their numbers are small")]

#[path = "support/generator.rs"]
mod generator;
#[path = "layer/truth.rs"]
mod layer_truth;

use generator::Generator;
use layer_truth::EPS;
use layer_truth::products::{self as truth, Row, Truth};
use nf4::{
    Activations, Activations8x8, Adapters, Arithmetic, BlockSize, Kernels, LoRAAdapter, LoRAScaling, MultiAdapterLayer,
    Nf4Matrix, QLoRALayer, Quantized4Bit, Tensor, spec,
};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() }
}

/// A matrix of any shape, plain or with double quantization.
#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    double_quant: bool,
    kernels: Kernels,
    seed: u64,
}

impl Case {
    fn generator(&self) -> Generator {
        Generator(self.seed)
    }

    fn values(&self, n: usize) -> Vec<f32> {
        let mut values = vec![0.0; n];
        self.generator().fill(&mut values);
        values
    }

    /// The weights are the values of the seed, the inputs those of the next.
    fn weights(&self) -> Vec<f32> {
        self.values(self.rows * self.cols)
    }

    fn inputs(&self, n: usize) -> Vec<f32> {
        Self { seed: self.seed ^ u64::MAX, ..self.clone() }.values(n)
    }

    fn quantized(&self) -> Quantized4Bit {
        Quantized4Bit::quantize(&self.weights(), self.rows, self.cols, self.block_size, self.double_quant).unwrap()
    }

    fn adapter(&self, rank: usize, seed: u64) -> LoRAAdapter {
        let case = Self { seed: self.seed ^ seed, ..self.clone() };
        let (a, b) = (case.values(rank * self.cols), case.inputs(self.rows * rank));
        LoRAAdapter::from_parts(a, b, self.rows, self.cols, rank, 4.0, LoRAScaling::RsLoRA).unwrap()
    }

    fn layer(&self, rank: usize, arithmetic: Arithmetic) -> QLoRALayer {
        let layer = QLoRALayer::from_parts(self.quantized(), self.adapter(rank, 1)).unwrap();
        layer.with_kernels(self.kernels).with_arithmetic(arithmetic)
    }
}

fn case() -> impl Strategy<Value = Case> {
    // Any number of columns, and as often a number of whole groups, so that rows are aligned.
    let cols = prop_oneof![1..200_usize, (1..9_usize).prop_map(|n| n * 32), (1..5_usize).prop_map(|n| n * 64)];
    let kernels = select(Kernels::available().collect::<Vec<_>>());
    (1..13_usize, cols, select(&BlockSize::ALL[..]), any::<bool>(), kernels, any::<u64>()).prop_map(
        |(rows, cols, block_size, double_quant, kernels, seed)| Case {
            rows,
            cols,
            block_size,
            double_quant,
            kernels,
            seed,
        },
    )
}

/// A case whose rows are whole blocks.
fn aligned_case() -> impl Strategy<Value = Case> {
    (case(), select(&BlockSize::ALL[..3]), 1..6_usize).prop_map(|(case, block_size, blocks)| Case {
        block_size,
        cols: blocks * block_size.get(),
        ..case
    })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The products, of a batch of any size, `[rows, batch]`.
fn gemm(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let (cols, block_size) = (matrix.cols(), matrix.block_size());
    let batch = x.len() / cols;
    let mut values = vec![0; batch * Activations::values_len(cols, block_size)];
    let mut scales = vec![0.0; batch * Activations::scales_len(cols, block_size)];
    let activations = k.quantize_activations_batch(x, cols, block_size, &mut values, &mut scales).unwrap();
    let mut y = vec![3.0; matrix.rows() * batch];
    k.gemm(matrix, &activations, &mut y).unwrap();
    y
}

fn gemm_8x8(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let cols = matrix.cols();
    let batch = x.len() / cols;
    let mut values = vec![0; batch * Activations8x8::values_len(cols)];
    let mut scales = vec![0.0; batch * Activations8x8::scales_len(cols)];
    let activations = k.quantize_activations_8x8_batch(x, cols, &mut values, &mut scales).unwrap();
    let mut y = vec![3.0; matrix.rows() * batch];
    k.gemm_8x8(matrix, &activations, &mut y).unwrap();
    y
}

fn gemm_f32(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut y = vec![3.0; matrix.rows() * (x.len() / matrix.cols())];
    k.gemm_f32(matrix, x, &mut y).unwrap();
    y
}

fn transposed(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut y = vec![3.0; matrix.cols()];
    k.gemv_transposed_f32(matrix, x, &mut y).unwrap();
    y
}

fn rows(matrix: &Nf4Matrix<'_>, codes: &[u8]) -> Vec<Row> {
    (0..matrix.rows()).map(|r| Row::of(matrix, codes, r)).collect()
}

/// What the f32 product may be off, for each row.
fn f32_truth(q: &Quantized4Bit, x: &[f32]) -> Vec<Truth> {
    rows(&q.view(), q.packed()).iter().map(|row| row.f32(x)).collect()
}

proptest! {
    #![proptest_config(config())]

    /// A power of two rounds nothing: it comes out of every product.
    #[test]
    fn products_are_homogeneous(case in case(), exponent in -30..30_i32, negative: bool) {
        let (k, q) = (case.kernels, case.quantized());
        let factor = 2.0_f32.powi(exponent) * if negative { -1.0 } else { 1.0 };
        // Adding +0 makes one of the two zeros.
        let scaled = |x: &[f32]| x.iter().map(|x| x * factor + 0.0).collect::<Vec<f32>>();
        let x = case.inputs(2 * case.cols);
        for product in [gemm, gemm_8x8, gemm_f32] {
            let (y, z) = (product(k, &q.view(), &x), product(k, &q.view(), &scaled(&x)));
            prop_assert_eq!(bits(&z.iter().map(|z| z + 0.0).collect::<Vec<_>>()), bits(&scaled(&y)));
        }
        let x = case.inputs(case.rows);
        let (y, z) = (transposed(k, &q.view(), &x), transposed(k, &q.view(), &scaled(&x)));
        prop_assert_eq!(bits(&z.iter().map(|z| z + 0.0).collect::<Vec<_>>()), bits(&scaled(&y)));
    }

    /// `W (x + z) = W x + W z`, where `x + z` is exact: within the bounds of the three products.
    #[test]
    fn the_f32_product_is_additive(case in case()) {
        let q = case.quantized();
        // Integers below 2^12, so that a sum of two is exact.
        let mut g = case.generator();
        let mut integers = || (0..case.cols).map(|_| (g.next() >> 52) as f32 - 2048.0).collect::<Vec<f32>>();
        let (x, z) = (integers(), integers());
        let sum: Vec<f32> = x.iter().zip(&z).map(|(x, z)| x + z).collect();
        let [x, z, sum] = [x, z, sum].map(|x| (gemm_f32(case.kernels, &q.view(), &x), f32_truth(&q, &x)));
        for r in 0..case.rows {
            let [a, b, c] = [&x, &z, &sum].map(|(y, truth)| (f64::from(y[r]), truth[r].bound));
            prop_assert!((a.0 + b.0 - c.0).abs() <= a.1 + b.1 + c.1, "row {r}: {a:?} + {b:?}, {c:?}");
        }
    }

    /// `<W x, z> = <x, W^T z>`, within the bounds of both products.
    #[test]
    fn the_transposed_product_is_the_adjoint(case in case()) {
        let q = case.quantized();
        let (x, z) = (case.inputs(case.cols), case.values(case.rows));
        let (y, t) = (gemm_f32(case.kernels, &q.view(), &x), transposed(case.kernels, &q.view(), &z));
        let matrix = rows(&q.view(), q.packed());
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let weighted = |x: &[f32], bound: &dyn Fn(usize) -> f64| {
            x.iter().enumerate().map(|(i, x)| f64::from(x.abs()) * bound(i)).sum::<f64>()
        };
        let of_rows = weighted(&z, &|r| matrix[r].f32(&x).bound);
        let allowed = of_rows + weighted(&x, &|c| truth::transposed(&matrix, c, &z).bound);
        let off = (dot(&y, &z) - dot(&x, &t)).abs();
        prop_assert!(off <= allowed, "off by {off:e}, allowed {allowed:e}");
    }

    /// Rows cut at any places, and vectors too, give the bits of the whole.
    #[test]
    fn cuts_change_no_bit(
        case in case(),
        mut cuts in prop::collection::vec(0..13_usize, 0..5),
        batch in 1..6_usize,
        at in 0..6_usize,
    ) {
        let (k, q) = (case.kernels, case.quantized());
        let x = case.inputs(batch * case.cols);
        cuts.retain(|cut| *cut <= case.rows);
        cuts.extend([0, case.rows]);
        cuts.sort_unstable();
        let weights = q.dequantize::<f32>();
        for product in [gemm, gemm_8x8, gemm_f32] {
            let whole = product(k, &q.view(), &x);
            let mut joined = Vec::new();
            for cut in cuts.windows(2) {
                // A cut of a cut: first what is left, then a part of that.
                let rest = q.view().row_range(cut[0]..case.rows).unwrap();
                let part = rest.row_range(0..cut[1] - cut[0]).unwrap();
                joined.extend(product(k, &part, &x));
                let mut out = vec![0.0; part.rows() * case.cols];
                k.dequantize(&part, &mut out).unwrap();
                prop_assert_eq!(bits(&out), bits(&weights[cut[0] * case.cols..cut[1] * case.cols]));
            }
            prop_assert_eq!(bits(&joined), bits(&whole));

            let at = at.min(batch);
            let (first, last) = x.split_at(at * case.cols);
            let (first, last) = (product(k, &q.view(), first), product(k, &q.view(), last));
            for r in 0..case.rows {
                let row = [&first[r * at..][..at], &last[r * (batch - at)..][..batch - at]].concat();
                prop_assert_eq!(bits(&row), bits(&whole[r * batch..][..batch]));
            }
        }
    }

    /// The transposed product of many rows is the sum over its chunks of rows, in order.
    #[test]
    fn transposed_products_are_sums_of_chunks(case in case(), more in 0..1200_usize) {
        let case = Case { rows: case.rows + more, cols: case.cols % 70 + 1, ..case };
        let (k, q) = (case.kernels, case.quantized());
        let x = case.inputs(case.rows);
        let mut sum = vec![0.0; case.cols];
        for (chunk, x) in x.chunks(spec::ROW_CHUNK).enumerate() {
            let first = chunk * spec::ROW_CHUNK;
            let part = q.view().row_range(first..first + x.len()).unwrap();
            for (sum, y) in sum.iter_mut().zip(transposed(k, &part, x)) {
                *sum += y;
            }
        }
        prop_assert_eq!(bits(&sum), bits(&transposed(k, &q.view(), &x)));
    }

    /// Rows of whole blocks in another order: the same codes, scales and outputs in that order.
    #[test]
    fn rows_may_be_permuted(case in aligned_case(), order in Just((0..12).collect::<Vec<usize>>()).prop_shuffle()) {
        let (k, cols) = (case.kernels, case.cols);
        // A mean is a sum in order, so double quantization is of the whole.
        let case = Case { double_quant: false, ..case };
        let order: Vec<usize> = order.into_iter().filter(|r| *r < case.rows).collect();
        let weights = case.weights();
        let permuted: Vec<f32> = order.iter().flat_map(|r| weights[r * cols..(r + 1) * cols].to_vec()).collect();
        let q = case.quantized();
        let p = Quantized4Bit::quantize(&permuted, case.rows, cols, case.block_size, false).unwrap();
        let x = case.inputs(3 * cols);
        for product in [gemm, gemm_8x8, gemm_f32] {
            let (y, z) = (product(k, &q.view(), &x), product(k, &p.view(), &x));
            for (r, z) in order.iter().zip(z.chunks(3)) {
                prop_assert_eq!(bits(z), bits(&y[r * 3..][..3]));
            }
        }
        for (r, bytes) in order.iter().zip(p.packed().chunks(cols / 2)) {
            prop_assert_eq!(bytes, &q.packed()[r * cols / 2..][..cols / 2]);
        }
    }

    /// Among the restored weights of a block is its absmax, so they quantize to what they came from.
    #[test]
    fn quantizing_again_changes_nothing(case in case(), exponent in -100..100_i32) {
        let weights: Vec<f32> = case.weights().iter().map(|w| w * 2.0_f32.powi(exponent)).collect();
        let quantize = |w: &[f32]| Quantized4Bit::quantize(w, case.rows, case.cols, case.block_size, false).unwrap();
        let q = quantize(&weights);
        let restored = q.dequantize::<f32>();
        let again = quantize(&restored);
        prop_assert_eq!(again.packed(), q.packed());
        prop_assert_eq!(bits(&again.dequantize::<f32>()), bits(&restored));
    }

    /// A merged weight, multiplied exactly, lies as near to the exact output as the rounding of each weight to f32
    /// allows, and so as near to the forward as that does.
    #[test]
    fn a_merge_is_the_layer(case in case(), rank in 1..20_usize, fast: bool) {
        let layer = case.layer(rank, if fast { Arithmetic::SixteenByFour } else { Arithmetic::F32 });
        let x = case.inputs(case.cols);
        let y = layer.forward(&Tensor::from_vec(x.clone(), false));
        let expected = layer_truth::forward(&layer, &x);
        layer_truth::check(&format!("{case:?}"), &expected, y.data());
        for ((row, e), y) in layer.merge_to_f32().chunks(case.cols).zip(&expected).zip(y.data()) {
            let terms = || row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            // Sums of f64 round far less than a thousandth of EPS.
            let rounding = EPS * 1.001 * terms().map(f64::abs).sum::<f64>();
            let merged: f64 = terms().sum();
            prop_assert!((merged - e.exact).abs() <= rounding, "{merged}, {e:?}");
            prop_assert!((merged - f64::from(*y)).abs() <= rounding + 1.001 * e.bound, "{merged}, {y}, {e:?}");
        }
    }

    /// What two adapters give together is what each adds alone, and one adapter of both ranks gives the same.
    #[test]
    fn adapters_add_up(case in case(), rank in 1..9_usize, other in 1..9_usize) {
        let x = case.inputs(case.cols);
        let (a, b) = (case.adapter(rank, 1), case.adapter(other, 2));
        let mut layer = MultiAdapterLayer::new(case.quantized()).with_kernels(case.kernels);
        layer.add("a", a.clone()).unwrap();
        layer.add("b", b.clone()).unwrap();
        layer.set_active(&["a", "b"]).unwrap();
        let y = layer.forward(&Tensor::from_vec(x.clone(), false), Adapters::Active);
        let alone = |adapter: &LoRAAdapter| {
            let layer = QLoRALayer::from_parts(case.quantized(), adapter.clone()).unwrap();
            layer.with_kernels(case.kernels)
        };
        let mut expected = layer_truth::forward(&alone(&a), &x);
        layer_truth::add_adapter(&b, &x, &mut expected);
        layer_truth::check(&format!("{case:?}"), &expected, y.data());

        // A of both on top of each other; the rows of B side by side, each with its own scale.
        let stacked_a = [a.a().data(), b.a().data()].concat();
        let sides = a.b().data().chunks(rank).zip(b.b().data().chunks(other));
        let stacked_b = sides.flat_map(|(p, q)| {
            let scaled = |x: &[f32], scale: f32| x.iter().map(|x| x * scale).collect::<Vec<_>>();
            [scaled(p, a.scale()), scaled(q, b.scale())].concat()
        });
        let ranks = rank + other;
        let (stacked_b, alpha) = (stacked_b.collect(), ranks as f64);
        let stacked =
            LoRAAdapter::from_parts(stacked_a, stacked_b, case.rows, case.cols, ranks, alpha, LoRAScaling::Standard).unwrap();
        let stacked = alone(&stacked);
        let z = stacked.forward(&Tensor::from_vec(x.clone(), false));
        // Scaling B rounds each of its values once: a share of EPS of every term of B (A x).
        let rounded = stacked.adapter().b().data().chunks(ranks).map(|b| {
            let term = |(b, a): (&f32, &[f32])| {
                let u: f64 = a.iter().zip(&x).map(|(a, x)| (f64::from(*a) * f64::from(*x)).abs()).sum();
                f64::from(b.abs()) * u
            };
            EPS * 1.001 * b.iter().zip(stacked.adapter().a().data().chunks(case.cols)).map(term).sum::<f64>()
        });
        let truth = layer_truth::forward(&stacked, &x);
        for ((((y, z), e), t), rounded) in y.data().iter().zip(z.data()).zip(&expected).zip(&truth).zip(rounded) {
            let allowed = 1.001 * (e.bound + t.bound) + rounded;
            prop_assert!((f64::from(*y) - f64::from(*z)).abs() <= allowed, "{y}, {z}, allowed {allowed}");
        }
    }
}

#[cfg(feature = "safetensors")]
mod files {
    use nf4::checkpoint::{FloatType, Linear4bit, PeftAdapter, TensorFile, to_safetensors};

    use super::*;

    proptest! {
        #![proptest_config(config())]

        /// A layer and its adapter, written and read, are the same layer.
        #[test]
        fn a_file_is_the_layer(case in case(), rank in 1..9_usize) {
            let layer = case.layer(rank, Arithmetic::default());
            let base = layer.base_weight_quantized();
            let file = to_safetensors(&Linear4bit::new(base.clone(), FloatType::F32).tensors("m")).unwrap();
            let adapter = PeftAdapter::new([("m".to_owned(), layer.adapter().clone())]).unwrap();
            let (config, adapter) = adapter.to_files(FloatType::F32).unwrap();

            let read = Linear4bit::load(&TensorFile::parse(&file).unwrap(), "m").unwrap();
            let adapter = PeftAdapter::load(config.as_bytes(), &TensorFile::parse(&adapter).unwrap()).unwrap();
            let again = adapter.layer("m", read).unwrap().with_kernels(case.kernels);
            prop_assert_eq!(again.base_weight_quantized().packed(), base.packed());
            prop_assert_eq!(again.base_weight_quantized().block_size(), base.block_size());
            prop_assert_eq!(again.is_double_quantized(), layer.is_double_quantized());
            prop_assert_eq!(again.scale().to_bits(), layer.scale().to_bits());
            prop_assert_eq!(bits(&again.merge_to_f32()), bits(&layer.merge_to_f32()));
            let x = Tensor::from_vec(case.inputs(3 * case.cols), false);
            prop_assert_eq!(bits(again.forward(&x).data()), bits(layer.forward(&x).data()));
        }
    }
}
