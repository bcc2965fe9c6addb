// The committed test vector: inputs by a generator, outputs as hashes.
//
// This file needs neither `std` nor a heap, so that firmware and WebAssembly can include it and run the same vector. A change
// of a single bit in any result, on any machine, changes a hash. It is here because the tool's package must hold it; the
// tests include it from `tests/support/vector.rs`.

use super::generator::Generator;
use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, Float, Gradients, Kernels, NestedAbsmax, Nf4Matrix,
    ShapeError, bf16, f16,
};

/// One shape. Inputs come from [`Generator`] seeded with `seed`: first the weights, row by row, then the inputs, then a dense
/// matrix `[rows, cols]`, then the inputs of a batch.
pub(crate) struct Vector {
    pub name: &'static str,
    pub rows: usize,
    pub cols: usize,
    pub block_size: BlockSize,
    pub seed: u64,
    /// The hashes of [`Vector::run`].
    pub expected: [u64; PARTS],
}

/// Hashes of a vector.
const PARTS: usize = 10;

/// Vectors of a batch.
const BATCH: usize = 3;

/// Room for the largest shape.
const MAX: usize = 18 * 1024;
const MAX_COLS: usize = 4160;

pub(crate) const VECTORS: [Vector; 6] = [
    // Strides of eight spans, and a rest.
    vector("b64", 12, 1024 - 64, BlockSize::B64, 1),
    // An odd number of groups: the last span is half empty.
    vector("b32", 11, 608, BlockSize::B32, 2),
    // Several groups in a block.
    vector("b256", 5, 1024, BlockSize::B256, 3),
    // More than one panel of the f32 product, and nested blocks that straddle strides.
    vector("wide", 2, 4160, BlockSize::B64, 4),
    // Blocks straddle rows, rows start in the middle of a byte, the last block is partial.
    vector("straddling", 13, 75, BlockSize::B64, 5),
    // One row that is shorter than a block.
    vector("short", 1, 7, BlockSize::B4096, 6),
];

const fn vector(name: &'static str, rows: usize, cols: usize, block_size: BlockSize, number: usize) -> Vector {
    Vector { name, rows, cols, block_size, seed: number as u64, expected: EXPECTED[number - 1] }
}

#[rustfmt::skip]
const EXPECTED: [[u64; PARTS]; 6] = [
    [
        0x4e82e927f03cdd6, 0x391d367b7d0c7d91, 0xf163faccb486d452, 0x1237225a5ded3956, 0x86385b1615aeff2,
        0x7f6cdd5aad175711, 0xe0ae902470afba8d, 0x265a801cc6a71ea3, 0xc8d01fea11a64650, 0xcb35baa7a5991366,
    ],
    [
        0x9257ab5c399e01e3, 0x6129a221fe8406c9, 0x6fb3a28dcecc75b5, 0x45739eef60974ff5, 0xffccf5ff42431400,
        0x930634af1e5418a1, 0xc637afc95a06046f, 0xa74ea65f158f7f71, 0xb97afcbc3ee073f0, 0x6cd494e7cb998187,
    ],
    [
        0x24359dd3df5ec672, 0x2daf6b8f109af3f6, 0xa03a81c49c5c0d57, 0x63cb5fbbb7a96e2e, 0xe061306f749f3a1,
        0x9dca0e4506d13f83, 0x5681b4791976a4b6, 0x6c7ee245a4fdd67a, 0x5be7a417469b90e8, 0x6c008a74350f220e,
    ],
    [
        0x666738943849bcdb, 0x519f293450863532, 0xbff830b5472c7721, 0x7a6d316a71c4ca61, 0x34f1d6aa157acce,
        0x52d6de64a711e0ed, 0x40707ee3433417e3, 0x26b4654743f16bc9, 0xcc3e4f6e31bc0048, 0x5ed8477ad35ea71d,
    ],
    [
        0xbfdf1e198ee99977, 0x28a622e59633bc5a, 0xf5f320d4e3a36b9a, 0xcbf29ce484222325, 0x4c402b7741a8a673,
        0x4c402b7741a8a673, 0xe654157a576c0fca, 0x3cc334df78eed178, 0xcc8206fbafba2345, 0xcb0d6dbe68107bba,
    ],
    [
        0x906647254ebe7e78, 0x8abf0baf41e92379, 0x96d45d8770777c09, 0xcbf29ce484222325, 0x69d19d77c118d125,
        0x69d19d77c118d125, 0xc1f1a17487be18, 0x4d2b27e8a32e260d, 0xb3ad115f1fe05b39, 0x4d4f2f0f95b2140d,
    ],
];

/// Shapes of the transposed 16x4 product: rows, columns, block size, vectors. Inputs come from one [`Generator`], for each shape
/// first the weights and then the vectors.
const TRANSPOSED: [(usize, usize, BlockSize, usize); 6] = [
    // Two chunks of rows, and the last group of the second is partial.
    (545, 32, BlockSize::B64, 3),
    // Blocks straddle rows, and the last span is half empty.
    (161, 96, BlockSize::B64, 7),
    // Whole groups; blocks of half a span.
    (64, 256, BlockSize::B32, 5),
    // More vectors than a tile has.
    (40, 32, BlockSize::B128, 67),
    // One group, partial; several spans in a block.
    (2, 1024, BlockSize::B256, 1),
    // Rows are no whole groups of columns: the product in f32.
    (33, 75, BlockSize::B64, 2),
];

/// An FNV-1a hash of little-endian bytes.
struct Hash(u64);

impl Hash {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
        self
    }

    fn floats<T: Float>(self, values: &[T]) -> Self {
        values.iter().fold(self, |h, x| h.bytes(&x.to_f32().to_le_bytes()))
    }
}

/// What a machine reports in one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// The hash of all hashes of all vectors, but those of the 8x8 product.
    pub hash: u64,
    /// The hash of those of the 8x8 product.
    pub hash_8x8: u64,
    /// The hash of the transposed 16x4 product.
    pub hash_transposed_16x4: u64,
    /// How many vectors have a changed bit.
    pub changed: usize,
}

impl Summary {
    /// That of every machine.
    pub(crate) const EXPECTED: Self = Self {
        hash: 0x4045_a786_7415_edb5,
        hash_8x8: 0x5343_27da_d509_6746,
        hash_transposed_16x4: 0x50d0_d391_386c_db92,
        changed: 0,
    };
}

impl core::fmt::Display for Summary {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { hash, hash_8x8, hash_transposed_16x4, .. } = self;
        write!(f, "{hash:016x}, 8x8 {hash_8x8:016x}, transposed 16x4 {hash_transposed_16x4:016x}")
    }
}

/// Computes everything.
pub(crate) fn run_all(kernels: Kernels, buffers: &mut Buffers) -> Result<Summary, ShapeError> {
    let (mut hash, mut hash_8x8, mut changed) = (Hash::new(), Hash::new(), 0);
    for vector in &VECTORS {
        let hashes = vector.run(kernels, buffers)?.map(|(_, hash)| hash);
        let [others @ .., eight_by_eight] = &hashes;
        hash = others.iter().fold(hash, |hash, part| hash.bytes(&part.to_le_bytes()));
        hash_8x8 = hash_8x8.bytes(&eight_by_eight.to_le_bytes());
        changed += usize::from(hashes != vector.expected);
    }
    let hash_transposed_16x4 = transposed_16x4(kernels, buffers)?;
    Ok(Summary { hash: hash.0, hash_8x8: hash_8x8.0, hash_transposed_16x4, changed })
}

/// The buffers that [`run_all`] works in, about 360 KB.
pub(crate) struct Buffers {
    weights: [f32; MAX],
    quantized: Quantized,
    f16: [f16; MAX],
    bf16: [bf16; MAX],
    inputs: [f32; MAX_COLS],
    values: [i16; MAX_COLS + 64],
    scales: [f32; MAX_COLS / 32],
    batch_inputs: [f32; BATCH * MAX_COLS],
    batch_values: [i16; BATCH * (MAX_COLS + 64)],
    batch_scales: [f32; BATCH * (MAX_COLS / 32)],
    bytes: [i8; BATCH * (MAX_COLS + 64)],
}

impl Buffers {
    pub(crate) const fn new() -> Self {
        Self {
            weights: [0.0; MAX],
            quantized: Quantized {
                packed: [0; MAX / 2],
                absmax: [0.0; MAX / 32],
                codes: [0; MAX / 32],
                nested: [0.0; MAX / 32 / 256 + 1],
            },
            f16: [f16::ZERO; MAX],
            bf16: [bf16::ZERO; MAX],
            inputs: [0.0; MAX_COLS],
            values: [0; MAX_COLS + 64],
            scales: [0.0; MAX_COLS / 32],
            batch_inputs: [0.0; BATCH * MAX_COLS],
            batch_values: [0; BATCH * (MAX_COLS + 64)],
            batch_scales: [0.0; BATCH * (MAX_COLS / 32)],
            bytes: [0; BATCH * (MAX_COLS + 64)],
        }
    }
}

/// A quantized matrix.
struct Quantized {
    packed: [u8; MAX / 2],
    absmax: [f32; MAX / 32],
    codes: [u8; MAX / 32],
    nested: [f32; MAX / 32 / 256 + 1],
}

impl Quantized {
    /// The matrix of these weights with plain and with nested absmax; the hashes of the quantization (packed codes, absmax) and
    /// of the double quantization (codes, nested absmax, offset).
    fn quantize(
        &mut self,
        kernels: Kernels,
        weights: &[f32],
        cols: usize,
        block_size: BlockSize,
    ) -> Result<([Nf4Matrix<'_>; 2], [u64; 2]), ShapeError> {
        let (rows, blocks) = (weights.len() / cols, block_size.blocks(weights.len()));
        let (packed, absmax) = (&mut self.packed[..weights.len().div_ceil(2)], &mut self.absmax[..blocks]);
        kernels.quantize(weights, block_size, packed, absmax)?;
        let (codes, nested) = (&mut self.codes[..blocks], &mut self.nested[..blocks.div_ceil(256)]);
        let offset = kernels.quantize_absmax(absmax, codes, nested)?;
        let hashes =
            [Hash::new().bytes(packed).floats(absmax).0, Hash::new().bytes(codes).floats(nested).floats(&[offset]).0];
        let nested = NestedAbsmax::new(codes, &DYNAMIC_MAP, nested, offset)?;
        let plain = Nf4Matrix::new(packed, Absmax::Plain(absmax), rows, cols, block_size)?;
        let nested = Nf4Matrix::new(packed, Absmax::Nested(nested), rows, cols, block_size)?;
        Ok(([plain, nested], hashes))
    }
}

/// The hash of all of [`TRANSPOSED`]: for each shape `i16` values in row order and scales of each vector, and the products
/// with plain and with nested absmax.
fn transposed_16x4(kernels: Kernels, buffers: &mut Buffers) -> Result<u64, ShapeError> {
    let (mut generator, mut hash) = (Generator(7), Hash::new());
    for (rows, cols, block_size, batch) in TRANSPOSED {
        let weights = &mut buffers.weights[..rows * cols];
        generator.fill(weights);
        let (matrices, _) = buffers.quantized.quantize(kernels, weights, cols, block_size)?;
        let inputs = &mut buffers.batch_inputs[..batch * rows];
        generator.fill(inputs);
        let values = &mut buffers.batch_values[..batch * Gradients::values_len(rows)];
        let scales = &mut buffers.batch_scales[..batch * Gradients::scales_len(rows)];
        let gradients = kernels.quantize_gradients(inputs, rows, values, scales)?;
        for vector in 0..batch {
            hash = (0..rows).filter_map(|r| gradients.get(vector, r)).fold(hash, |h, q| h.bytes(&q.to_le_bytes()));
            hash = (0..rows).filter_map(|r| gradients.scale(vector, r)).fold(hash, |h, s| h.floats(&[s]));
        }
        let columns = &mut buffers.inputs[..batch * cols];
        for matrix in matrices {
            kernels.gemm_transposed(&matrix, &gradients, columns)?;
            hash = hash.floats(columns);
        }
    }
    Ok(hash.0)
}

impl Vector {
    /// Computes all but the transposed 16x4 product with the given kernels. Returns the name and the hash of each result.
    pub(crate) fn run(
        &self,
        kernels: Kernels,
        buffers: &mut Buffers,
    ) -> Result<[(&'static str, u64); PARTS], ShapeError> {
        let (rows, cols, block_size) = (self.rows, self.cols, self.block_size);
        let n = rows * cols;
        let mut generator = Generator(self.seed);

        let weights = &mut buffers.weights[..n];
        generator.fill(weights);
        let ([plain, nested], [quantize, double_quant]) =
            buffers.quantized.quantize(kernels, weights, cols, block_size)?;

        let (half, brain) = (&mut buffers.f16[..n], &mut buffers.bf16[..n]);
        kernels.dequantize(&plain, weights)?;
        kernels.dequantize(&plain, half)?;
        kernels.dequantize(&nested, brain)?;
        let dequantize = Hash::new().floats(weights).floats(half).floats(brain).0;

        let inputs = &mut buffers.inputs[..cols];
        generator.fill(inputs);
        let values = &mut buffers.values[..Activations::values_len(cols, block_size)];
        let scales = &mut buffers.scales[..Activations::scales_len(cols, block_size)];
        let vector = kernels.quantize_activations(inputs, block_size, values, scales)?;
        let in_order = (0..cols).filter_map(|c| vector.get(0, c));
        let activations = in_order.fold(Hash::new(), |h, q| h.bytes(&q.to_le_bytes())).floats(vector.scales()).0;

        let (y, z) = (&mut [0.0; 64][..rows], &mut [0.0; 64][..rows]);
        kernels.gemv(&plain, &vector, y)?;
        kernels.gemv(&nested, &vector, z)?;
        let gemv = Hash::new().floats(y).floats(z).0;
        kernels.gemv_f32(&plain, inputs, y)?;
        kernels.gemv_f32(&nested, inputs, z)?;
        let gemv_f32 = Hash::new().floats(y).floats(z).0;

        generator.fill(weights);
        kernels.gemv_dense(weights, inputs, y)?;
        z.copy_from_slice(y);
        kernels.gemv_dense_add(weights, inputs, 0.5, z)?;
        let gemv_dense = Hash::new().floats(y).floats(z).0;

        let inputs = &mut buffers.batch_inputs[..BATCH * cols];
        generator.fill(inputs);
        let values = &mut buffers.batch_values[..BATCH * Activations::values_len(cols, block_size)];
        let scales = &mut buffers.batch_scales[..BATCH * Activations::scales_len(cols, block_size)];
        let batch = kernels.quantize_activations_batch(inputs, cols, block_size, values, scales)?;
        let (fast, exact) = (&mut [0.0; 64][..BATCH * rows], &mut [0.0; 64][..BATCH * rows]);
        kernels.gemm(&plain, &batch, fast)?;
        kernels.gemm_f32(&nested, inputs, exact)?;
        let gemm = Hash::new().floats(fast).floats(exact).0;

        let values = &mut buffers.bytes[..Activations8x8::values_len(cols)];
        let scales = &mut buffers.scales[..Activations8x8::scales_len(cols)];
        let vector = kernels.quantize_activations_8x8(&buffers.inputs[..cols], values, scales)?;
        let in_order = (0..cols).filter_map(|c| vector.get(0, c));
        let eight_by_eight = in_order.fold(Hash::new(), |h, q| h.bytes(&q.to_le_bytes())).floats(vector.scales());
        kernels.gemv_8x8(&plain, &vector, &mut fast[..rows])?;
        kernels.gemv_8x8(&nested, &vector, &mut exact[..rows])?;
        let eight_by_eight = eight_by_eight.floats(&fast[..rows]).floats(&exact[..rows]);
        let values = &mut buffers.bytes[..BATCH * Activations8x8::values_len(cols)];
        let scales = &mut buffers.batch_scales[..BATCH * Activations8x8::scales_len(cols)];
        let batch = kernels.quantize_activations_8x8_batch(inputs, cols, values, scales)?;
        kernels.gemm_8x8(&plain, &batch, fast)?;
        kernels.gemm_8x8(&nested, &batch, exact)?;
        let eight_by_eight = eight_by_eight.floats(fast).floats(exact).0;

        let columns = &mut buffers.inputs[..cols];
        kernels.gemv_transposed_f32(&plain, y, columns)?;
        let transposed = Hash::new().floats(columns);
        kernels.gemv_transposed_f32(&nested, y, columns)?;
        let transposed = transposed.floats(columns).0;
        Ok([
            ("quantization", quantize),
            ("dequantization", dequantize),
            ("double quantization", double_quant),
            ("activations", activations),
            ("16x4", gemv),
            ("f32", gemv_f32),
            ("dense", gemv_dense),
            ("batch of 16x4 and f32", gemm),
            ("transposed f32", transposed),
            ("8x8", eight_by_eight),
        ])
    }
}
