//! The element types that weights come in.

use half::{bf16, f16};

use crate::kernels::{Dequantize, Quantize, Table};

/// An element type that weights can be quantized from and restored to: `f32`, [`struct@f16`], [`bf16`]. Sealed.
pub trait Float: Copy + Send + Sync + sealed::Sealed + 'static {
    /// The value as f32; exact.
    fn to_f32(self) -> f32;

    /// The nearest value of this type, ties to even, subnormals kept, overflow to infinity; every NaN becomes the one
    /// quiet NaN `0x7fc0_0000` (f32), `0x7e00` (f16), `0x7fc0` (bf16).
    fn from_f32(x: f32) -> Self;
}

pub(crate) mod sealed {
    /// Picks the entry of the dispatch table for the type.
    pub trait Sealed: Sized {
        #[doc(hidden)]
        fn quantize(table: &super::Table) -> super::Quantize<Self>;
        #[doc(hidden)]
        fn dequantize(table: &super::Table) -> super::Dequantize<Self>;
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
    fn quantize(table: &Table) -> Quantize<Self> {
        table.quantize_f32
    }
    fn dequantize(table: &Table) -> Dequantize<Self> {
        table.dequantize_f32
    }
}

impl sealed::Sealed for f16 {
    fn quantize(table: &Table) -> Quantize<Self> {
        table.quantize_f16
    }
    fn dequantize(table: &Table) -> Dequantize<Self> {
        table.dequantize_f16
    }
}

impl sealed::Sealed for bf16 {
    fn quantize(table: &Table) -> Quantize<Self> {
        table.quantize_bf16
    }
    fn dequantize(table: &Table) -> Dequantize<Self> {
        table.dequantize_bf16
    }
}
