//! A pure read of bytes: the limit of every product, and what makes times from two processes comparable. A library of
//! its own, so that Python measures with the same code.

use core::hint::black_box;

/// Reads bytes and does nothing else, on one thread or on two of the current pool.
pub fn read(bytes: &[u8], threads: usize) {
    if threads == 1 {
        black_box(xor(bytes));
    } else {
        let (a, b) = bytes.split_at(bytes.len() / 256 * 128);
        rayon::join(|| black_box(xor(a)), || black_box(xor(b)));
    }
}

/// One sum, which the compiler splits as the registers of the CPU allow. Given several, it has moved words between
/// registers all the time.
fn xor(bytes: &[u8]) -> u64 {
    bytes.as_chunks().0.iter().fold(0, |sum, word| sum ^ u64::from_ne_bytes(*word))
}

/// [`read`] for `peers.py`.
///
/// # Safety
///
/// `bytes` points to `len` bytes that nobody writes meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn yardstick_read(bytes: *const u8, len: usize, threads: usize) {
    // SAFETY: the caller's promise.
    read(unsafe { core::slice::from_raw_parts(bytes, len) }, threads);
}
