//! The steps of an instruction set that belong to no arithmetic: registers of f32, and conversions of elements.
//!
//! A trait declares its steps as `unsafe fn`, so that an instruction set can implement them with `#[target_feature]`.
//! The methods of [`Steps`] call them and are safe, because a value of it is the proof that this CPU has the
//! instruction set. So only the traits and their implementations are unsafe code, and the loops are not.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use crate::spec::SPAN;

/// The steps of the instruction set `S`, and the proof that this CPU has it.
pub(in crate::isa) struct Steps<S>(S);

impl<S> Steps<S> {
    /// The proof.
    ///
    /// # Safety
    /// The CPU must have the instruction set that the steps of `S` are compiled for.
    #[inline(always)]
    pub(in crate::isa) unsafe fn new(steps: S) -> Self {
        Self(steps)
    }

    /// The steps, for the methods that call them.
    #[inline(always)]
    pub(super) fn get(&self) -> &S {
        &self.0
    }
}

/// Eight f32 in registers: the lanes of a row, or eight columns.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Lanes {
    type Lanes: Copy;

    unsafe fn load(&self, lanes: &[f32; 8]) -> Self::Lanes;

    unsafe fn store(&self, out: &mut [f32; 8], lanes: Self::Lanes);

    /// [`crate::spec::add_lanes`].
    unsafe fn add_lanes(&self, lanes: Self::Lanes) -> f32;

    /// Prefetches the cache line `ahead` bytes after the start of `data`, whether it lies in it or not. Nothing is
    /// read.
    fn prefetch<T>(&self, data: &[T], ahead: usize);
}

/// Arithmetic on eight f32, and the conversions that are the same for all types of elements.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Floats: Lanes {
    unsafe fn splat(&self, x: f32) -> Self::Lanes;

    unsafe fn add(&self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;

    unsafe fn mul(&self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;

    /// In each lane, the larger of `largest` and the absolute value of `x` by their bits: of non-negative numbers the
    /// larger number, and any NaN above infinity.
    unsafe fn max_abs(&self, largest: Self::Lanes, x: Self::Lanes) -> Self::Lanes;

    /// The largest of the bits of eight lanes.
    unsafe fn largest_bits(&self, x: Self::Lanes) -> u32;

    /// The packed codes of 32 weights times `inverse`: of each the number of thresholds below it, and 15 if it is NaN.
    unsafe fn encode(&self, weights: [Self::Lanes; 4], inverse: f32) -> [u8; 16];

    /// The nearest integers, ties to even, of a span of numbers up to 8191, in the order of the table's slots.
    unsafe fn arrange_i16(&self, x: [Self::Lanes; 8], out: &mut [i16; SPAN]);
}

/// Elements of type `T` as f32.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Widen<T>: Floats {
    /// Eight elements as f32: exact.
    unsafe fn widen(&self, x: &[T; 8]) -> Self::Lanes;
}

/// Packed codes to weights of type `T`.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Decode<T> {
    /// What the sixteen codes of a block stand for.
    type Book: Copy;

    /// The book of a block, whose absmax is finite.
    unsafe fn book(&self, absmax: f32) -> Self::Book;

    /// The weights of 32 codes, in the order of the columns.
    unsafe fn decode(&self, book: &Self::Book, packed: &[u8; 16], out: &mut [T; 32]);
}

/// The registers.
impl<S: Lanes> Steps<S> {
    #[inline(always)]
    pub(super) fn load(&self, lanes: &[f32; 8]) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.load(lanes) }
    }

    #[inline(always)]
    pub(super) fn store(&self, out: &mut [f32; 8], lanes: S::Lanes) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.store(out, lanes) }
    }

    #[inline(always)]
    pub(super) fn add_lanes(&self, lanes: S::Lanes) -> f32 {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.add_lanes(lanes) }
    }

    #[inline(always)]
    pub(super) fn prefetch<T>(&self, data: &[T], ahead: usize) {
        self.0.prefetch(data, ahead);
    }
}

/// The arithmetic.
impl<S: Floats> Steps<S> {
    #[inline(always)]
    pub(super) fn splat(&self, x: f32) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.splat(x) }
    }

    #[inline(always)]
    pub(super) fn add(&self, a: S::Lanes, b: S::Lanes) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.add(a, b) }
    }

    #[inline(always)]
    pub(super) fn mul(&self, a: S::Lanes, b: S::Lanes) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.mul(a, b) }
    }

    #[inline(always)]
    pub(super) fn max_abs(&self, largest: S::Lanes, x: S::Lanes) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.max_abs(largest, x) }
    }

    #[inline(always)]
    pub(super) fn largest_bits(&self, x: S::Lanes) -> u32 {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.largest_bits(x) }
    }

    #[inline(always)]
    pub(super) fn encode(&self, weights: [S::Lanes; 4], inverse: f32) -> [u8; 16] {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.encode(weights, inverse) }
    }

    #[inline(always)]
    pub(super) fn arrange_i16(&self, x: [S::Lanes; 8], out: &mut [i16; SPAN]) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.arrange_i16(x, out) }
    }

    #[inline(always)]
    pub(super) fn widen<T>(&self, x: &[T; 8]) -> S::Lanes
    where
        S: Widen<T>,
    {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.widen(x) }
    }
}

/// The codes.
impl<S> Steps<S> {
    #[inline(always)]
    pub(super) fn book<T>(&self, absmax: f32) -> S::Book
    where
        S: Decode<T>,
    {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.book(absmax) }
    }

    #[inline(always)]
    pub(super) fn decode<T>(&self, book: &S::Book, packed: &[u8; 16], out: &mut [T; 32])
    where
        S: Decode<T>,
    {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.0.decode(book, packed, out) }
    }
}
