//! Buffers whose size a file or a caller decides: if there is no memory for one, that is an error and does not abort.

use alloc::vec::Vec;

use nf4_kernels::ShapeError;

use crate::error::Error;

/// An empty vector with room for exactly `rows * cols` values.
pub(crate) fn reserved<T>(rows: usize, cols: usize) -> Result<Vec<T>, Error> {
    let mut values = Vec::new();
    let len = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
    values.try_reserve_exact(len).map_err(|_| out_of_memory::<T>(len))?;
    Ok(values)
}

/// `rows * cols` zeros.
pub(crate) fn zeros<T: Copy + Default>(rows: usize, cols: usize) -> Result<Vec<T>, Error> {
    let mut values = reserved(rows, cols)?;
    values.resize(rows * cols, T::default());
    Ok(values)
}

/// A copy of the values.
pub(crate) fn copy<T: Copy>(values: &[T]) -> Result<Vec<T>, Error> {
    let mut copy = reserved(1, values.len())?;
    copy.extend_from_slice(values);
    Ok(copy)
}

/// Grows a buffer to at least `len` values; the new ones are zero.
pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> Result<(), Error> {
    if buffer.len() < len {
        buffer.try_reserve_exact(len - buffer.len()).map_err(|_| out_of_memory::<T>(len))?;
        buffer.resize(len, T::default());
    }
    Ok(())
}

/// The first `len` values of a buffer, if it is large enough.
pub(crate) fn take<'a, T>(what: &'static str, buffer: &'a mut [T], len: usize) -> Result<&'a mut [T], Error> {
    let got = buffer.len();
    buffer.get_mut(..len).ok_or(ShapeError::Length { what, expected: len, got }.into())
}

fn out_of_memory<T>(len: usize) -> Error {
    Error::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) }
}
