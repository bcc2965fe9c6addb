//! The scales of the blocks of a weight, and their storage.

use alloc::boxed::Box;

use nf4_kernels::{Absmax, DYNAMIC_MAP, Kernels, NESTED_BLOCK, NestedAbsmax, ShapeError};

use crate::buffer::zeros;
use crate::error::Error;
use crate::weight::store::Store;

/// The scales of a quantized weight, one per block, plain or double-quantized: part of a [`Quantized4Bit`].
///
/// The bytes are owned, static or shared ([`Store`]). [`Self::view`] borrows them as an [`Absmax`].
///
/// [`Quantized4Bit`]: crate::Quantized4Bit
#[derive(Debug, Clone)]
pub struct AbsmaxBuf(Storage);

#[derive(Debug, Clone)]
enum Storage {
    Plain(Store<f32>),
    Nested {
        codes: Store<u8>,
        absmax: Store<f32>,
        /// `None` stands for [`DYNAMIC_MAP`].
        map: Option<Box<[f32; 256]>>,
        offset: f32,
    },
}

impl AbsmaxBuf {
    /// Plain scales, one f32 per block.
    #[must_use]
    pub fn plain(absmax: impl Into<Store<f32>>) -> Self {
        Self(Storage::Plain(absmax.into()))
    }

    /// Double-quantized scales as files hold them: one code per block, one f32 per [`NESTED_BLOCK`] codes, the quant map,
    /// and the offset; see [`NestedAbsmax`]. The quant map (1 KiB) is copied only if a bit of it differs from
    /// [`DYNAMIC_MAP`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `absmax` does not have `ceil(codes.len() / 256)` values.
    pub fn nested(
        codes: impl Into<Store<u8>>,
        absmax: impl Into<Store<f32>>,
        quant_map: &[f32; 256],
        offset: f32,
    ) -> Result<Self, Error> {
        let (codes, absmax) = (codes.into(), absmax.into());
        NestedAbsmax::new(codes.as_slice(), quant_map, absmax.as_slice(), offset)?;
        let same = quant_map.iter().zip(&DYNAMIC_MAP).all(|(a, b)| a.to_bits() == b.to_bits());
        Ok(Self(Storage::Nested { codes, absmax, map: (!same).then(|| Box::new(*quant_map)), offset }))
    }

    /// Double-quantizes plain scales, bit for bit as `bitsandbytes` does on a CPU.
    ///
    /// A NaN or infinity makes every scale NaN; [`Quantized4Bit`](crate::Quantized4Bit) accepts neither.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    #[doc(alias("compress_statistics", "quantize_blockwise"))]
    pub fn double_quantize(absmax: &[f32]) -> Result<Self, Error> {
        let mut codes = zeros(1, absmax.len())?;
        let mut nested = zeros(1, absmax.len().div_ceil(NESTED_BLOCK))?;
        let offset = Kernels::detect().quantize_absmax(absmax, &mut codes, &mut nested)?;
        Ok(Self(Storage::Nested { codes: codes.into(), absmax: nested.into(), map: None, offset }))
    }

    /// A borrowed view of the scales.
    ///
    /// # Panics
    /// If the owner of shared bytes no longer returns the bytes that it did.
    #[must_use]
    pub fn view(&self) -> Absmax<'_> {
        self.try_view().expect("the constructors checked the lengths")
    }

    /// Like [`Self::view`], but returns an error.
    pub(crate) fn try_view(&self) -> Result<Absmax<'_>, ShapeError> {
        match &self.0 {
            Storage::Plain(absmax) => Ok(Absmax::Plain(absmax.as_slice())),
            Storage::Nested { codes, absmax, map, offset } => {
                let map = map.as_deref().unwrap_or(&DYNAMIC_MAP);
                Ok(Absmax::Nested(NestedAbsmax::new(codes.as_slice(), map, absmax.as_slice(), *offset)?))
            }
        }
    }

    /// Whether the scales are double-quantized.
    #[must_use]
    pub fn is_nested(&self) -> bool {
        matches!(self.0, Storage::Nested { .. })
    }

    /// Bytes of the scales: 4 per block, or with double quantization 1 per block, 4 per [`NESTED_BLOCK`] blocks, and 1024
    /// for a quant map other than [`DYNAMIC_MAP`].
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        match &self.0 {
            Storage::Plain(absmax) => size_of_val(absmax.as_slice()),
            Storage::Nested { codes, absmax, .. } => {
                codes.as_slice().len() + size_of_val(absmax.as_slice()) + self.map_bytes()
            }
        }
    }

    /// The part of [`Self::data_bytes`] on the heap that these scales own.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        match &self.0 {
            Storage::Plain(absmax) => absmax.memory_bytes(),
            Storage::Nested { codes, absmax, .. } => codes.memory_bytes() + absmax.memory_bytes() + self.map_bytes(),
        }
    }

    fn map_bytes(&self) -> usize {
        match &self.0 {
            Storage::Nested { map: Some(map), .. } => size_of_val(&**map),
            _ => 0,
        }
    }
}
