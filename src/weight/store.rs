//! Slices that a weight owns, borrows for `'static`, or shares with the owner of a mapped file.

use alloc::boxed::Box;
#[cfg(target_has_atomic = "ptr")]
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
#[cfg(target_has_atomic = "ptr")]
use core::ops::Range;

use bytemuck::Pod;

use crate::buffer::reserved;
use crate::error::Error;

/// Bytes that several weights can share, such as a mapped file or a buffer that was read once.
///
/// `as_ref` must return the same bytes every time, at the same address. If it does not, results are wrong or operations
/// return errors, but memory stays safe.
#[cfg(target_has_atomic = "ptr")]
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// The storage of a weight: a slice of `u8` or `f32` that is owned, `'static`, or a range of [`SharedBytes`].
///
/// ```
/// use std::sync::Arc;
/// use nf4::{SharedBytes, Store};
///
/// let file: SharedBytes = Arc::new([7_u8; 64]); // a mapped file, say
/// let packed = Store::<u8>::shared(file, 32..64)?;
/// assert_eq!((packed.as_slice(), packed.memory_bytes()), (&[7; 32][..], 0));
/// # Ok::<(), nf4::Error>(())
/// ```
#[derive(Clone)]
pub struct Store<T: 'static>(Place<T>);

#[derive(Clone)]
enum Place<T: 'static> {
    Owned(Box<[T]>),
    Static(&'static [T]),
    /// The range has whole values of `T`, aligned and in the byte order of this machine.
    #[cfg(target_has_atomic = "ptr")]
    Shared(SharedBytes, Range<usize>),
}

impl<T: Pod> Store<T> {
    /// The values.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        match &self.0 {
            Place::Owned(values) => values,
            Place::Static(values) => values,
            // Empty if the owner no longer returns the bytes that it did, so that the next check of a length fails.
            #[cfg(target_has_atomic = "ptr")]
            Place::Shared(owner, range) => cast((**owner).as_ref(), range).unwrap_or_default(),
        }
    }

    /// Bytes on the heap that this store owns; 0 if its values are static or shared.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        match &self.0 {
            Place::Owned(values) => size_of_val(&**values),
            _ => 0,
        }
    }
}

#[cfg(target_has_atomic = "ptr")]
impl Store<u8> {
    /// Stores a range of shared bytes, without a copy.
    ///
    /// # Errors
    /// [`Error::Range`] if the range does not lie in the bytes.
    pub fn shared(owner: SharedBytes, range: Range<usize>) -> Result<Self, Error> {
        part(&owner, &range)?;
        Ok(Self(Place::Shared(owner, range)))
    }
}

#[cfg(target_has_atomic = "ptr")]
impl Store<f32> {
    /// Stores little-endian values in a range of shared bytes. They are copied only if their address is not a multiple of
    /// 4, or if the machine is big-endian.
    ///
    /// # Errors
    /// [`Error::Range`] if the range does not lie in the bytes; [`Error::Shape`] if it does not hold whole values;
    /// [`Error::OutOfMemory`] if the values must be copied and there is no memory for them.
    pub fn shared(owner: SharedBytes, range: Range<usize>) -> Result<Self, Error> {
        let bytes = part(&owner, &range)?;
        if !bytes.len().is_multiple_of(4) {
            let expected = bytes.len().next_multiple_of(4);
            return Err(
                nf4_kernels::ShapeError::Length { what: "bytes of f32 values", expected, got: bytes.len() }.into()
            );
        }
        if cfg!(target_endian = "little") && cast::<f32>((*owner).as_ref(), &range).is_some() {
            return Ok(Self(Place::Shared(owner, range)));
        }
        Self::from_le_bytes(bytes)
    }
}

impl Store<f32> {
    /// Copies little-endian values at any address; an incomplete last value is dropped.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn from_le_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let (values, _) = bytes.as_chunks();
        let mut copy = reserved(1, values.len())?;
        copy.extend(values.iter().map(|value| f32::from_le_bytes(*value)));
        Ok(copy.into())
    }
}

impl<T> From<Vec<T>> for Store<T> {
    /// Takes over the values of a vector, and frees its spare capacity.
    fn from(values: Vec<T>) -> Self {
        Self(Place::Owned(values.into_boxed_slice()))
    }
}

impl<T> From<&'static [T]> for Store<T> {
    /// Refers to the values without a copy; they may be in flash.
    fn from(values: &'static [T]) -> Self {
        Self(Place::Static(values))
    }
}

impl<T> fmt::Debug for Store<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Owned(values) => write!(f, "Store({} owned)", values.len()),
            Place::Static(values) => write!(f, "Store({} static)", values.len()),
            #[cfg(target_has_atomic = "ptr")]
            Place::Shared(_, range) => write!(f, "Store(bytes {range:?} shared)"),
        }
    }
}

#[cfg(target_has_atomic = "ptr")]
fn part<'a>(owner: &'a SharedBytes, range: &Range<usize>) -> Result<&'a [u8], Error> {
    let bytes = (**owner).as_ref();
    let (start, end, len) = (range.start, range.end, bytes.len());
    bytes.get(range.clone()).ok_or(Error::Range { start, end, len })
}

/// The values in a range of bytes, if it lies in them and the address suits the type.
#[cfg(target_has_atomic = "ptr")]
fn cast<'a, T: Pod>(bytes: &'a [u8], range: &Range<usize>) -> Option<&'a [T]> {
    bytemuck::try_cast_slice(bytes.get(range.clone())?).ok()
}
