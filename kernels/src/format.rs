//! The format: block sizes, codebook, decision thresholds and nibble order.
//!
//! All of it is defined by `bitsandbytes`, and this file is the only place in the code that states it. A packed byte holds
//! two codes, **the first in the high four bits**. Blocks run over the flat, row-major tensor, regardless of rows.

use core::ops::Range;

use crate::ShapeError;

/// The NF4 codebook: code `k` stands for the weight `CODEBOOK[k] * absmax`.
///
/// The sixteen f32 values are those of `bitsandbytes` 0.50 (`get_4bit_type("nf4")`): quantiles of the normal distribution,
/// scaled to `[-1, 1]`, with an exact zero at code 7 (Dettmers et al., "`QLoRA`: Efficient Finetuning of Quantized LLMs",
/// 2023, appendix E).
#[doc(alias("quant_map", "get_4bit_type"))]
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    f32::from_bits(0xbf32_39b1),
    f32::from_bits(0xbf06_6b30),
    f32::from_bits(0xbeca_32a0),
    f32::from_bits(0xbe91_a24d),
    f32::from_bits(0xbe3d_353f),
    f32::from_bits(0xbdba_7871),
    0.0,
    f32::from_bits(0x3da2_faff),
    f32::from_bits(0x3e24_cae3),
    f32::from_bits(0x3e7c_04dd),
    f32::from_bits(0x3ead_033a),
    f32::from_bits(0x3ee1_a4b8),
    f32::from_bits(0x3f10_07ab),
    f32::from_bits(0x3f39_13b3),
    1.0,
];

/// The decision thresholds: the code of a scaled value is the number of thresholds strictly below it.
///
/// `THRESHOLDS[k]` is midway between `CODEBOOK[k]` and `CODEBOOK[k + 1]`: their sum, rounded to f32, and halved.
pub const THRESHOLDS: [f32; 15] = {
    let mut t = [0.0; 15];
    let mut k = 0;
    while k < 15 {
        t[k] = (CODEBOOK[k] + CODEBOOK[k + 1]) / 2.0;
        k += 1;
    }
    t
};

/// The code of zero, which also pads the last byte of a tensor with an odd number of elements.
pub(crate) const ZERO_CODE: u8 = 7;

/// The lower bound that `bitsandbytes` imposes on absmax before dividing: `1e-38` rounded to f32, a subnormal number.
pub(crate) const ABSMAX_FLOOR: f32 = 1e-38;

/// The block size of double quantization: this many absmax share one nested absmax. It is fixed in `bitsandbytes`.
pub const NESTED_BLOCK: usize = 256;

/// The number of weights in a block, which share one absmax.
#[doc(alias = "blocksize")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
#[repr(u16)]
pub enum BlockSize {
    /// 32 weights.
    B32 = 32,
    /// 64 weights, the default of `bitsandbytes`.
    #[default]
    B64 = 64,
    /// 128 weights.
    B128 = 128,
    /// 256 weights.
    B256 = 256,
    /// 512 weights.
    B512 = 512,
    /// 1024 weights.
    B1024 = 1024,
    /// 2048 weights.
    B2048 = 2048,
    /// 4096 weights.
    B4096 = 4096,
}

impl BlockSize {
    /// Every block size, ascending.
    pub const ALL: [Self; 8] =
        [Self::B32, Self::B64, Self::B128, Self::B256, Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// The block size of `weights` weights.
    ///
    /// # Errors
    /// [`ShapeError::BlockSize`] if `weights` is not a power of two from 32 to 4096.
    pub fn new(weights: usize) -> Result<Self, ShapeError> {
        Self::ALL.into_iter().find(|b| b.get() == weights).ok_or(ShapeError::BlockSize { got: weights })
    }

    /// The number of weights in a block.
    #[must_use]
    pub const fn get(self) -> usize {
        self as usize
    }

    /// The number of columns that share one activation scale in the 16x4 product: 64, or 32 for block size 32.
    #[must_use]
    pub const fn activation_group(self) -> usize {
        match self {
            Self::B32 => 32,
            _ => 64,
        }
    }

    /// The number of blocks of `elements` weights; the last one may be partial.
    #[must_use]
    pub const fn blocks(self, elements: usize) -> usize {
        elements.div_ceil(self.get())
    }
}

impl TryFrom<usize> for BlockSize {
    type Error = ShapeError;

    fn try_from(weights: usize) -> Result<Self, ShapeError> {
        Self::new(weights)
    }
}

/// The number of bytes of `elements` packed codes.
#[must_use]
pub const fn packed_len(elements: usize) -> usize {
    elements.div_ceil(2)
}

/// The code of flat element `index`: even elements are in the high half of their byte, odd ones in the low half.
#[inline(always)]
pub(crate) fn code_at(packed: &[u8], index: usize) -> usize {
    let byte = get_or(packed, index / 2, 0);
    usize::from(if index.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
}

/// `values[index]`, for an index that checked shapes guarantee to be in bounds.
///
/// If it is out of bounds nevertheless, this panics with debug assertions and returns `missing` without. So the products
/// contain no panic, and firmware that only multiplies does not link the machinery of panics.
#[inline(always)]
pub(crate) fn get_or<T: Copy>(values: &[T], index: usize, missing: T) -> T {
    debug_assert!(index < values.len(), "index {index} of {}", values.len());
    values.get(index).copied().unwrap_or(missing)
}

/// Like [`get_or`], for a range; if that is out of bounds, the result is an empty slice.
#[inline(always)]
pub(crate) fn get_range<T>(values: &[T], range: Range<usize>) -> &[T] {
    debug_assert!(range.start <= range.end && range.end <= values.len(), "range {range:?} of {}", values.len());
    values.get(range).unwrap_or_default()
}

/// The code of a value that was divided by the absmax of its block: the number of thresholds strictly below it. As in
/// `bitsandbytes`, that of NaN is 15, because no comparison holds for it.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must count")]
pub(crate) fn nearest_code(scaled: f32) -> u8 {
    THRESHOLDS.iter().map(|&t| u8::from(!(scaled <= t))).sum()
}

/// The absmax of a block, from the largest of the bits of all absolute values as integers, which are ordered like
/// non-negative floats, with NaN above infinity. Every NaN becomes the one that this library writes.
#[inline(always)]
pub(crate) fn absmax_from_bits(bits: u32) -> f32 {
    canonical(f32::from_bits(bits))
}

/// The factor that scales a full block to `[-1, 1]`; NaN stays NaN and infinity gives 0.
///
/// The factor of a block of zeros may be any finite number. It is 0, because the inverse of the floor, which is subnormal,
/// would be infinite in an environment that flushes subnormal numbers to zero.
#[inline(always)]
pub(crate) fn inverse_absmax(absmax: f32) -> f32 {
    if absmax == 0.0 { 0.0 } else { 1.0 / floored(absmax) }
}

/// `max(absmax, 1e-38)`, or NaN, of an absmax that is not negative. Integers are compared, because an environment that
/// flushes subnormal numbers to zero would lose the floor.
#[inline(always)]
pub(crate) fn floored(absmax: f32) -> f32 {
    f32::from_bits(absmax.to_bits().max(ABSMAX_FLOOR.to_bits()))
}

/// Replaces every NaN by [`f32::NAN`], because processors disagree on the sign and payload of NaN.
#[inline(always)]
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::NAN } else { x }
}
