//! The scales of the blocks, plain or double-quantized.

use crate::error::{ShapeError, check_len};
use crate::format::{NESTED_BLOCK, canonical, get_or};

/// A borrowed view of the scales of a weight matrix, the absmax of its blocks: plain f32, or double-quantized.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Absmax<'a> {
    /// One f32 per block.
    Plain(&'a [f32]),
    /// One byte per block, which is looked up in the quant map and scaled.
    Nested(NestedAbsmax<'a>),
}

/// A borrowed view of double-quantized scales, one byte per block.
///
/// The absmax of block `b` is `quant_map[codes[b]] * absmax[b / 256] + offset`, with both operations rounded to f32.
#[doc(alias("state2", "compress_statistics"))]
#[derive(Debug, Clone, Copy)]
pub struct NestedAbsmax<'a> {
    codes: &'a [u8],
    quant_map: &'a [f32; 256],
    absmax: &'a [f32],
    offset: f32,
}

impl<'a> NestedAbsmax<'a> {
    /// A view of double-quantized absmax: `codes` has one byte per block, `absmax` one f32 per [`NESTED_BLOCK`] codes, and
    /// `quant_map` is that of the file ([`DYNAMIC_MAP`](crate::DYNAMIC_MAP) in files that this library writes).
    ///
    /// Values may be NaN or infinite; results are then what IEEE 754 says.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `absmax` does not have `ceil(codes.len() / 256)` values.
    pub fn new(codes: &'a [u8], quant_map: &'a [f32; 256], absmax: &'a [f32], offset: f32) -> Result<Self, ShapeError> {
        check_len("nested absmax", codes.len().div_ceil(NESTED_BLOCK), absmax.len())?;
        Ok(Self { codes, quant_map, absmax, offset })
    }

    /// One code per block.
    #[must_use]
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The quant map, with 256 entries.
    #[doc(alias = "nested_quant_map")]
    #[must_use]
    pub fn quant_map(&self) -> &'a [f32; 256] {
        self.quant_map
    }

    /// One scale per [`NESTED_BLOCK`] codes.
    #[must_use]
    pub fn absmax(&self) -> &'a [f32] {
        self.absmax
    }

    /// The mean that was subtracted before quantization.
    #[doc(alias = "nested_offset")]
    #[must_use]
    pub fn offset(&self) -> f32 {
        self.offset
    }

    /// The absmax of each code in a nested block.
    #[allow(dead_code, reason = "only instruction sets with vectors decode many at once")]
    #[inline(always)]
    pub(crate) fn values(&self, nested_block: usize) -> [f32; 256] {
        let absmax = get_or(self.absmax, nested_block, f32::NAN);
        self.quant_map.map(|value| value * absmax + self.offset)
    }

    #[inline(always)]
    fn get(&self, block: usize) -> f32 {
        self.quant_map[usize::from(self.codes[block])] * self.absmax[block / NESTED_BLOCK] + self.offset
    }
}

impl Absmax<'_> {
    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(a) => a.len(),
            Self::Nested(n) => n.codes.len(),
        }
    }

    /// Whether there are no blocks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The absmax of `block`. If it is nested, every NaN is [`f32::NAN`].
    ///
    /// # Panics
    /// If `block >= self.len()`.
    #[inline]
    #[must_use]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(a) => a[block],
            Self::Nested(n) => canonical(n.get(block)),
        }
    }

    /// Like [`Self::get`], for a block that checked shapes guarantee to exist: without a panic (see [`get_or`]), and with
    /// the processor's own NaN.
    #[inline(always)]
    pub(crate) fn get_inside(&self, block: usize) -> f32 {
        match self {
            Self::Plain(a) => get_or(a, block, f32::NAN),
            Self::Nested(n) => {
                let code = usize::from(get_or(n.codes, block, 0));
                n.quant_map[code] * get_or(n.absmax, block / NESTED_BLOCK, f32::NAN) + n.offset
            }
        }
    }

    /// Writes the absmax of the blocks `first..first + out.len()` to `out`, with the bits of [`Self::get`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if there are fewer blocks.
    pub fn dequantize(&self, first: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if first > self.len() || out.len() > self.len() - first {
            let expected = self.len().saturating_sub(first);
            return Err(ShapeError::Length { what: "dequantized absmax", expected, got: out.len() });
        }
        for (block, o) in (first..).zip(out) {
            *o = self.get(block);
        }
        Ok(())
    }

    /// The absmax of the `N` blocks from `first` on, in few instructions, for inner loops.
    #[allow(dead_code, reason = "only instruction sets with vectors take several at once")]
    #[inline(always)]
    pub(crate) fn get_array<const N: usize>(&self, first: usize) -> [f32; N] {
        match self {
            Self::Plain(a) => a[first..first + N].as_chunks().0[0],
            Self::Nested(n) if first % NESTED_BLOCK <= NESTED_BLOCK - N => {
                let scale = n.absmax[first / NESTED_BLOCK];
                let codes: [u8; N] = n.codes[first..first + N].as_chunks().0[0];
                codes.map(|code| n.quant_map[usize::from(code)] * scale + n.offset)
            }
            Self::Nested(n) => core::array::from_fn(|i| n.get(first + i)),
        }
    }
}
