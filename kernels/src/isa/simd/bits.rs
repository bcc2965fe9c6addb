//! Elements of 16 bits as integers, which is what registers are loaded from and stored to.

use half::slice::HalfFloatSliceExt;

/// The bits of some `f16` or `bf16`.
#[inline(always)]
pub(in crate::isa) fn bits<T, const N: usize>(x: &[T; N]) -> &[u16; N]
where
    [T]: HalfFloatSliceExt,
{
    &x.reinterpret_cast().as_chunks().0[0]
}

/// As [`bits`], to be written.
#[inline(always)]
pub(in crate::isa) fn bits_mut<T, const N: usize>(x: &mut [T; N]) -> &mut [u16; N]
where
    [T]: HalfFloatSliceExt,
{
    &mut x.reinterpret_cast_mut().as_chunks_mut().0[0]
}
