//! Facts of the format: block sizes, codebook, decision thresholds, nibble order.
//!
//! Everything here was fixed by `bitsandbytes`; this file is the only place that states it. The packed bytes hold two
//! codes each, **the first in the high four bits**; blocks are cut from the flat, row-major tensor and do not care
//! about rows.

use core::ops::Range;

use crate::ShapeError;

/// The NF4 codebook of `bitsandbytes` 0.50 (`get_4bit_type("nf4")`), as f32: code `k` stands for `CODEBOOK[k] *
/// absmax`.
///
/// The sixteen values are quantiles of the normal distribution, scaled to `[-1, 1]` and with an exact zero at code 7
/// (Dettmers et al., "`QLoRA`: Efficient Finetuning of Quantized LLMs", 2023, appendix E).
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

/// The decision thresholds: `THRESHOLDS[k]` lies midway between `CODEBOOK[k]` and `CODEBOOK[k + 1]` (the f32 sum,
/// rounded, then halved). A scaled value's code is the number of thresholds strictly below it.
pub const THRESHOLDS: [f32; 15] = {
    let mut t = [0.0; 15];
    let mut k = 0;
    while k < 15 {
        t[k] = (CODEBOOK[k] + CODEBOOK[k + 1]) / 2.0;
        k += 1;
    }
    t
};

/// The code of zero, which also fills the last half byte of a tensor with an odd number of elements.
pub(crate) const ZERO_CODE: u8 = 7;

/// The floor that `bitsandbytes` puts under absmax before it divides: `1e-38` rounded to f32, a subnormal.
pub(crate) const ABSMAX_FLOOR: f32 = 1e-38;

/// Number of absmax values that share one nested absmax (the block size of double quantization; fixed in
/// `bitsandbytes`).
pub const NESTED_BLOCK: usize = 256;

/// Number of weights in a block that shares one absmax.
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

    /// Weights in a block.
    #[must_use]
    pub const fn get(self) -> usize {
        self as usize
    }

    /// Columns that share one activation scale in the 16x4 multiply: 64, or 32 when the block is 32.
    #[must_use]
    pub const fn group(self) -> usize {
        match self {
            Self::B32 => 32,
            _ => 64,
        }
    }

    /// Blocks that `elements` weights occupy; the last may be partial.
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

/// Bytes that hold `elements` packed codes.
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

/// `values[index]`, for an index that the checked shapes put inside.
///
/// Should it lie outside nevertheless, a build with debug assertions panics, and any other takes `missing`: so that the
/// products contain no panic, and firmware that only multiplies links nothing of that machinery.
#[inline(always)]
pub(crate) fn get_or<T: Copy>(values: &[T], index: usize, missing: T) -> T {
    debug_assert!(index < values.len(), "index {index} of {}", values.len());
    values.get(index).copied().unwrap_or(missing)
}

/// As [`get_or`], for a range; what is missing is an empty slice.
#[inline(always)]
pub(crate) fn get_range<T>(values: &[T], range: Range<usize>) -> &[T] {
    debug_assert!(range.start <= range.end && range.end <= values.len(), "range {range:?} of {}", values.len());
    values.get(range).unwrap_or_default()
}

/// The code of a value already divided by its block's absmax: the number of thresholds strictly below it, and 15 for
/// NaN, for which no comparison holds (as in `bitsandbytes`).
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must count")]
pub(crate) fn nearest_code(scaled: f32) -> u8 {
    THRESHOLDS.iter().map(|&t| u8::from(!(scaled <= t))).sum()
}

/// The largest absolute value of a block from the bits of all absolute values, the largest taken as integers: that is
/// the order of non-negative floats, with every NaN above infinity. All NaNs become the one NaN that this library
/// writes.
#[inline(always)]
pub(crate) fn absmax_from_bits(bits: u32) -> f32 {
    canonical(f32::from_bits(bits))
}

/// The factor that scales a full block to `[-1, 1]`; NaN stays NaN and infinity gives 0.
///
/// That of a block of zeros may be any finite number. It is 0, because the inverse of the floor, which is subnormal, would
/// be infinite where subnormal numbers count as zeros.
#[inline(always)]
pub(crate) fn inverse_absmax(absmax: f32) -> f32 {
    if absmax == 0.0 { 0.0 } else { 1.0 / floored(absmax) }
}

/// `max(absmax, 1e-38)` that keeps NaN, of an absmax that is not negative. As integers, because where subnormal numbers
/// count as zeros the floor would be lost.
#[inline(always)]
pub(crate) fn floored(absmax: f32) -> f32 {
    f32::from_bits(absmax.to_bits().max(ABSMAX_FLOOR.to_bits()))
}

/// Replaces every NaN by [`f32::NAN`]: processors disagree on sign and payload of the NaNs that they make.
#[inline(always)]
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::NAN } else { x }
}
