//! Every instruction set gives the same bits, for any input, and they lie within the derived bounds of float64.
//!
//! Scalar code is compared with independent truth here and in `reference`; the other instruction sets with scalar code.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "shapes are small, and tests panic")]

#[path = "../support/generator.rs"]
mod generator;
#[allow(dead_code, reason = "only products of exact inputs are tested")]
#[path = "../support/truth.rs"]
mod truth;

mod eight_by_eight;
mod element_types;

use generator::Generator;
use nf4::{Absmax, Activations, BlockSize, DYNAMIC_MAP, Float, Kernels, NestedAbsmax, Nf4Matrix, bf16, f16, spec};
use truth::Row;

/// Rows x columns: empty, one element, shorter than a block, odd, straddling, partial, aligned for some or for all block
/// sizes, a stride of eight spans and one more, more than a panel of the f32 product.
const SHAPES: [(usize, usize); 20] = [
    (0, 64),
    (3, 0),
    (1, 1),
    (1, 63),
    (5, 33),
    (2, 65),
    (4, 32),
    (9, 96),
    // With blocks of 32, the first nested block ends in the middle of a span.
    (86, 96),
    (3, 128),
    (1, 160),
    (7, 320),
    (3, 480),
    (4, 1000),
    (3, 1056),
    (2, 4096),
    (5, 576),
    (1, 4160),
    (2, 8192),
    (2, 12_352),
];

/// What the inputs are like.
const KINDS: [&str; 8] = ["bell", "any bits", "zero", "subnormal", "huge", "sparse", "infinite", "one NaN"];

fn inputs(kind: &str, n: usize, g: &mut Generator) -> Vec<f32> {
    let mut values: Vec<f32> = (0..n)
        .map(|_| match kind {
            "any bits" => f32::from_bits(g.next() as u32),
            "zero" => f32::from_bits((g.next() as u32) & 0x8000_0000),
            "subnormal" => f32::from_bits((g.next() as u32) & 0x803f_ffff),
            "huge" => g.value() * 1e37,
            "sparse" if !g.next().is_multiple_of(50) => 0.0,
            _ => g.value(),
        })
        .collect();
    let at = if n == 0 { 0 } else { g.next() as usize % n };
    match (kind, values.get_mut(at)) {
        ("infinite", Some(x)) => *x = f32::NEG_INFINITY,
        ("one NaN", Some(x)) => *x = -f32::NAN,
        _ => {}
    }
    values
}

/// The bits of floats, for exact comparison.
fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// A quantized tensor and its shape.
struct Quantized {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    codes: Vec<u8>,
    nested: Vec<f32>,
    offset: f32,
}

impl Quantized {
    fn new<T: Float>(k: Kernels, weights: &[T], rows: usize, cols: usize, block_size: BlockSize) -> Self {
        let blocks = block_size.blocks(rows * cols);
        let (mut packed, mut absmax) = (vec![0; (rows * cols).div_ceil(2)], vec![0.0; blocks]);
        k.quantize(weights, block_size, &mut packed, &mut absmax).unwrap();
        let (mut codes, mut nested) = (vec![0; blocks], vec![0.0; blocks.div_ceil(256)]);
        let offset = k.quantize_absmax(&absmax, &mut codes, &mut nested).unwrap();
        Self { rows, cols, block_size, packed, absmax, codes, nested, offset }
    }

    fn plain(&self) -> Nf4Matrix<'_> {
        self.matrix(Absmax::Plain(&self.absmax))
    }

    fn nested(&self) -> Nf4Matrix<'_> {
        let nested = NestedAbsmax::new(&self.codes, &DYNAMIC_MAP, &self.nested, self.offset).unwrap();
        self.matrix(Absmax::Nested(nested))
    }

    fn matrix<'a>(&'a self, absmax: Absmax<'a>) -> Nf4Matrix<'a> {
        Nf4Matrix::new(&self.packed, absmax, self.rows, self.cols, self.block_size).unwrap()
    }

    /// Everything, as bits.
    fn bits(&self) -> (Vec<u8>, Vec<u32>, Vec<u8>, Vec<u32>, u32) {
        let (absmax, nested) = (bits(&self.absmax), bits(&self.nested));
        (self.packed.clone(), absmax, self.codes.clone(), nested, self.offset.to_bits())
    }
}

/// Buffers that activations live in.
struct ActivationBuffers(Vec<i16>, Vec<f32>);

impl ActivationBuffers {
    fn new(cols: usize, block_size: BlockSize) -> Self {
        let (values, scales) = (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
        Self(vec![0x5555; values], vec![9.0; scales])
    }

    fn quantize<'a>(&'a mut self, k: Kernels, x: &'a [f32], block_size: BlockSize) -> Activations<'a> {
        k.quantize_activations(x, block_size, &mut self.0, &mut self.1).unwrap()
    }
}

fn dequantized<T: Float>(k: Kernels, matrix: &Nf4Matrix<'_>) -> Vec<u32> {
    let mut out = vec![T::from_f32(3.0); matrix.rows() * matrix.cols()];
    k.dequantize(matrix, &mut out).unwrap();
    bits(&out)
}

fn gemv(k: Kernels, matrix: &Nf4Matrix<'_>, activations: &Activations<'_>) -> Vec<f32> {
    let mut out = vec![3.0; matrix.rows()];
    k.gemv(matrix, activations, &mut out).unwrap();
    out
}

fn gemv_f32(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let mut out = vec![3.0; matrix.rows()];
    k.gemv_f32(matrix, x, &mut out).unwrap();
    out
}

/// What is compared with portable code, which is compared with independent truth.
fn beside_scalar() -> impl Iterator<Item = Kernels> {
    Kernels::available().filter(|k| *k != Kernels::scalar())
}

/// Emulators that take a second for a millisecond run one case in so many, as `NF4_EVERY` says; all others run all.
fn every() -> usize {
    std::env::var("NF4_EVERY").map_or(1, |every| every.parse().unwrap())
}

/// Runs `test` on every shape and block size with each of these kernels, and says on which instruction sets.
fn for_all_shapes(
    what: &str,
    kernels: impl Iterator<Item = Kernels>,
    mut test: impl FnMut(Kernels, usize, usize, BlockSize, &mut Generator),
) {
    for k in kernels {
        let mut g = Generator(what.len() as u64);
        let all = SHAPES.iter().flat_map(|shape| BlockSize::ALL.map(|block_size| (*shape, block_size)));
        let mut count = 0;
        for ((rows, cols), block_size) in all.step_by(every()) {
            test(k, rows, cols, block_size, &mut g);
            count += 1;
        }
        println!("{what}: {count} shapes and block sizes on {}", k.isa());
    }
}

#[test]
fn required_isas_are_present() {
    let present: Vec<_> = Kernels::available().map(|k| k.isa().name()).collect();
    println!("instruction sets: {present:?}");
    for isa in std::env::var("NF4_REQUIRE_ISA").unwrap_or_default().split(',').filter(|isa| !isa.is_empty()) {
        assert!(present.contains(&isa), "{isa} is required, but there are only {present:?}");
    }
}

#[test]
fn conversions_are_the_same_bits_everywhere() {
    for_all_shapes("conversions", beside_scalar(), |k, rows, cols, block_size, g| {
        for kind in KINDS {
            let weights = inputs(kind, rows * cols, g);
            let half: Vec<f16> = weights.iter().map(|w| f16::from_bits((w.to_bits() >> 7) as u16)).collect();
            let brain: Vec<bf16> = weights.iter().map(|w| bf16::from_bits((w.to_bits() >> 16) as u16)).collect();
            let what = format!("{rows} x {cols}, {block_size:?}, {kind}, {}", k.isa());
            let scalar = Quantized::new(Kernels::scalar(), &weights, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &weights, rows, cols, block_size).bits(), scalar.bits(), "f32 {what}");
            for matrix in [scalar.plain(), scalar.nested()] {
                let expected = dequantized::<f32>(Kernels::scalar(), &matrix);
                assert_eq!(dequantized::<f32>(k, &matrix), expected, "to f32 {what}");
                assert_eq!(dequantized::<f16>(k, &matrix), dequantized::<f16>(Kernels::scalar(), &matrix), "{what}");
                assert_eq!(dequantized::<bf16>(k, &matrix), dequantized::<bf16>(Kernels::scalar(), &matrix), "{what}");
            }
            let scalar = Quantized::new(Kernels::scalar(), &half, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &half, rows, cols, block_size).bits(), scalar.bits(), "f16 {what}");
            let scalar = Quantized::new(Kernels::scalar(), &brain, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &brain, rows, cols, block_size).bits(), scalar.bits(), "bf16 {what}");
        }
    });
}

/// Weights that do not fit in caches may be written past them, by stores that want an alignment; the last block is partial.
#[test]
fn large_weights_are_the_same_bits_at_any_alignment() {
    const N: usize = (33 << 20) / size_of::<f32>() + 33;
    let packed: Vec<u8> = (0..N.div_ceil(2)).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 16) as u8).collect();
    let absmax: Vec<f32> = (0..BlockSize::B64.blocks(N)).map(|i| i as f32 * 0.01 - 1000.0).collect();
    let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 1, N, BlockSize::B64).unwrap();
    let mut expected = vec![0.0; N];
    Kernels::scalar().dequantize(&matrix, &mut expected).unwrap();
    let mut out = vec![0.0_f32; N + 5];
    for k in beside_scalar() {
        for start in [0, 1, 4] {
            out.fill(7.0);
            k.dequantize(&matrix, &mut out[start..start + N]).unwrap();
            assert!(bits(&out[start..start + N]) == bits(&expected), "{} from element {start} on", k.isa());
            assert!(out[..start].iter().chain(&out[start + N..]).all(|x| *x == 7.0), "{} wrote outside", k.isa());
        }
    }
}

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

/// The columns of a product with a batch have the bits of the products with its vectors.
fn check_batch(k: Kernels, q: &Quantized, batch: usize, g: &mut Generator) {
    let Quantized { rows, cols, block_size, .. } = *q;
    let kind = KINDS[g.next() as usize % KINDS.len()];
    let x: Vec<f32> = (0..batch).flat_map(|_| inputs(kind, cols, g)).collect();
    let (values, scales) = (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
    let (mut values, mut scales) = (vec![0x5555; batch * values], vec![9.0; batch * scales]);
    let activations = k.quantize_activations_batch(&x, cols, block_size, &mut values, &mut scales).unwrap();
    for matrix in [q.plain(), q.nested()] {
        let (mut fast, mut exact) = (vec![3.0; rows * batch], vec![3.0; rows * batch]);
        k.gemm(&matrix, &activations, &mut fast).unwrap();
        k.gemm_f32(&matrix, &x, &mut exact).unwrap();
        for n in 0..batch {
            let column = |y: &[f32]| bits(&(0..rows).map(|r| y[r * batch + n]).collect::<Vec<_>>());
            let what = || format!("vector {n} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
            let vector = activations.vector(n);
            let mut buffers = ActivationBuffers::new(cols, block_size);
            let single = buffers.quantize(Kernels::scalar(), vector.inputs(), block_size);
            assert_eq!(column(&fast), bits(&gemv(Kernels::scalar(), &matrix, &single)), "16x4 {}", what());
            let single = gemv_f32(Kernels::scalar(), &matrix, vector.inputs());
            assert_eq!(column(&exact), bits(&single), "f32 {}", what());
        }
    }
}

#[test]
fn batches_give_the_bits_of_single_vectors() {
    for_all_shapes("batches", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [0, 1, 2, 3, 7, 8, 131].into_iter().filter(|_| cols > 0) {
            if batch <= 8 || rows * cols <= 5000 {
                check_batch(k, &q, batch, g);
            }
        }
    });
}

/// More rows than a tile has with eight vectors down to two, and with one.
#[test]
fn batches_give_the_bits_of_single_vectors_over_all_tiles() {
    let g = &mut Generator(11);
    for k in Kernels::available() {
        for (rows, cols, block_size, batches) in
            [(520, 64, BlockSize::B64, 2..=8), (300, 96, BlockSize::B32, 4..=4), (1030, 32, BlockSize::B32, 1..=1)]
        {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            batches.for_each(|batch| check_batch(k, &q, batch, g));
        }
    }
}

/// Panels of decoded weights, one and several in each direction: partial ones of rows, of spans and of vectors, and the
/// last half span of blocks of 32.
#[test]
fn batches_give_the_bits_of_single_vectors_over_all_panels() {
    let g = &mut Generator(12);
    for k in Kernels::available() {
        let shapes = [
            (40, 544, BlockSize::B32),
            (1, 64, BlockSize::B64),
            (7, 1024, BlockSize::B64),
            (8, 1088, BlockSize::B64),
            (9, 1056, BlockSize::B32),
            (40, 576, BlockSize::B64),
            (70, 1088, BlockSize::B64),
            (17, 2080, BlockSize::B32),
            (16, 2048, BlockSize::B128),
            (70, 1024, BlockSize::B256),
            // Blocks that straddle rows, with a last half span and with two panels of the f32 product.
            (37, 352, BlockSize::B256),
            (18, 4192, BlockSize::B128),
        ];
        for (rows, cols, block_size) in shapes.into_iter().step_by(every().min(5)) {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            [12, 31, 32, 64, 67].into_iter().step_by(every().min(4)).for_each(|batch| check_batch(k, &q, batch, g));
        }
        println!("panels on {}", k.isa());
    }
}

#[test]
fn transposed_products_are_the_same_bits_everywhere_and_within_their_bound() {
    for_all_shapes("transposed", Kernels::available(), |k, rows, cols, block_size, g| {
        // More rows than a chunk, of a narrow matrix.
        let rows = if cols <= 96 { rows * 150 } else { rows };
        for kind in ["bell", "any bits", "sparse", "one NaN", "infinite"] {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, rows, g);
            for matrix in [q.plain(), q.nested()] {
                let run = |k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]| {
                    let mut out = vec![3.0; cols];
                    k.gemv_transposed_f32(matrix, x, &mut out).unwrap();
                    out
                };
                let y = run(k, &matrix, &x);
                let what = format!("{rows} x {cols}, {block_size:?}, {kind}, {}", k.isa());
                if k != Kernels::scalar() {
                    assert_eq!(bits(&y), bits(&run(Kernels::scalar(), &matrix, &x)), "{what}");
                }
                // The sum of the chunks, each a view of its own.
                let chunk = |start: usize| {
                    let end = rows.min(start + spec::ROW_CHUNK);
                    run(k, &matrix.row_range(start..end).unwrap(), &x[start..end])
                };
                let mut sum = vec![0.0; cols];
                for start in (0..rows).step_by(spec::ROW_CHUNK) {
                    sum.iter_mut().zip(chunk(start)).for_each(|(sum, c)| *sum = f32::from_f32(*sum + c));
                }
                assert_eq!(bits(&sum), bits(&y), "chunks, {what}");
                if kind == "bell" {
                    let dense: Vec<_> = (0..rows).map(|r| Row::of(&matrix, &q.packed, r)).collect();
                    for (c, y) in y.iter().enumerate() {
                        truth::transposed(&dense, c, &x).check(*y, || format!("column {c}, {what}"));
                    }
                }
            }
        }
    });
}

#[test]
fn transposed_products_of_batches_have_the_bits_of_single_vectors() {
    for_all_shapes("transposed batches", Kernels::available(), |k, rows, cols, block_size, g| {
        let rows = if cols <= 96 { rows * 150 } else { rows };
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [0, 2, 7, 12, 65].into_iter().filter(|batch| *batch <= 7 || rows * cols <= 60_000) {
            let kind = KINDS[g.next() as usize % KINDS.len()];
            let x = inputs(kind, batch * rows, g);
            for matrix in [q.plain(), q.nested()] {
                let mut out = vec![3.0; batch * cols];
                k.gemm_transposed_f32(&matrix, &x, &mut out).unwrap();
                for n in 0..batch {
                    let mut expected = vec![3.0; cols];
                    Kernels::scalar().gemv_transposed_f32(&matrix, &x[n * rows..][..rows], &mut expected).unwrap();
                    let what =
                        || format!("vector {n} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
                    assert_eq!(bits(&out[n * cols..][..cols]), bits(&expected), "{}", what());
                }
            }
        }
    });
}
