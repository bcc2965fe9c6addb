//! Memory of a size that a file or an option asks for: an error, where there is none, instead of the end of the process.

use std::io::{Error, ErrorKind, Result};

/// `len` values in a vector.
pub(crate) fn filled<T: Clone>(len: usize, value: T) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| out_of_memory(len.saturating_mul(size_of::<T>())))?;
    values.resize(len, value);
    Ok(values)
}

/// Makes a buffer longer or shorter.
pub(crate) fn resize<T: Clone>(values: &mut Vec<T>, len: usize, value: T) -> Result<()> {
    let more = len.saturating_sub(values.len());
    values.try_reserve(more).map_err(|_| out_of_memory(len.saturating_mul(size_of::<T>())))?;
    values.resize(len, value);
    Ok(())
}

/// `Ok` if there are now about as many bytes to be had: to be asked before the work of a library that cannot return this
/// error itself.
pub(crate) fn probe(bytes: usize) -> Result<()> {
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| out_of_memory(bytes))
}

fn out_of_memory(bytes: usize) -> Error {
    Error::new(ErrorKind::OutOfMemory, format!("no memory for {bytes} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is() {
        assert_eq!(filled(3, 7_u16).unwrap(), [7; 3]);
        for len in [usize::MAX, usize::MAX / 8 + 1, isize::MAX as usize / 4] {
            let error = filled(len, 0_u64).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
            assert!(error.to_string().contains(&len.saturating_mul(8).to_string()), "{error}");
            let mut values = vec![1_u64];
            assert_eq!(resize(&mut values, len, 0).unwrap_err().kind(), ErrorKind::OutOfMemory);
            assert_eq!(values, [1]);
        }
        let mut values = vec![1_u8];
        resize(&mut values, 3, 2).unwrap();
        assert_eq!(values, [1, 2, 2]);
        assert_eq!(probe(isize::MAX as usize).unwrap_err().kind(), ErrorKind::OutOfMemory);
        probe(1000).unwrap();
    }
}
