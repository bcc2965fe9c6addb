//! The element types of weights.

use half::{bf16, f16};

/// An element type of weights before quantization and after dequantization: `f32`, [`struct@f16`] or [`bf16`]. This trait
/// is sealed.
pub trait Float: Copy + Send + Sync + sealed::Sealed {
    /// Converts to f32, exactly.
    fn to_f32(self) -> f32;

    /// Rounds to the nearest value of this type, ties to even, keeping subnormals and overflowing to infinity. Every NaN
    /// becomes the quiet NaN `0x7fc0_0000` (f32), `0x7e00` (f16) or `0x7fc0` (bf16).
    fn from_f32(x: f32) -> Self;

    /// The slice itself if this type is f32, which needs no conversion.
    #[must_use]
    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

pub(crate) mod sealed {
    use half::{bf16, f16};

    /// Picks what belongs to this element type from something that exists for each.
    pub trait Sealed: Sized + 'static {
        #[doc(hidden)]
        fn pick<P: PerFloat>(of: &P) -> &P::Of<Self>;
    }

    /// Something that exists for each element type.
    pub trait PerFloat {
        type Of<T: 'static>;
        fn f32(&self) -> &Self::Of<f32>;
        fn f16(&self) -> &Self::Of<f16>;
        fn bf16(&self) -> &Self::Of<bf16>;
    }
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        crate::format::canonical(x)
    }

    #[inline(always)]
    fn as_f32(x: &[Self]) -> Option<&[f32]> {
        Some(x)
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32_const()
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        if x.is_nan() { Self::NAN } else { Self::from_f32_const(x) }
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        if x.is_nan() { Self::NAN } else { Self::from_f32_const(x) }
    }
}

impl sealed::Sealed for f32 {
    #[inline(always)]
    fn pick<P: sealed::PerFloat>(of: &P) -> &P::Of<Self> {
        of.f32()
    }
}

impl sealed::Sealed for f16 {
    #[inline(always)]
    fn pick<P: sealed::PerFloat>(of: &P) -> &P::Of<Self> {
        of.f16()
    }
}

impl sealed::Sealed for bf16 {
    #[inline(always)]
    fn pick<P: sealed::PerFloat>(of: &P) -> &P::Of<Self> {
        of.bf16()
    }
}
