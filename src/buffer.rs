//! Buffers whose size a file or a caller decides: where there is no room for one, an error with the numbers, not the end
//! of the process.

use alloc::vec::Vec;

use nf4_kernels::ShapeError;

/// An empty vector with exactly the room for `rows * cols` values.
pub(crate) fn reserved<T>(rows: usize, cols: usize) -> Result<Vec<T>, ShapeError> {
    let overflow = ShapeError::Overflow { rows, cols };
    let mut values = Vec::new();
    values.try_reserve_exact(rows.checked_mul(cols).ok_or(overflow)?).map_err(|_| overflow)?;
    Ok(values)
}

/// `rows * cols` zeros.
pub(crate) fn zeros<T: Copy + Default>(rows: usize, cols: usize) -> Result<Vec<T>, ShapeError> {
    let mut values = reserved(rows, cols)?;
    values.resize(rows * cols, T::default());
    Ok(values)
}

/// Grows a buffer to at least `len` values; the new ones are zero.
pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> Result<(), ShapeError> {
    if buffer.len() < len {
        let overflow = ShapeError::Overflow { rows: 1, cols: len };
        buffer.try_reserve_exact(len - buffer.len()).map_err(|_| overflow)?;
        buffer.resize(len, T::default());
    }
    Ok(())
}
