//! Operations on several threads, split by rows.
//!
//! Large operations are split by rows into one part per thread; small ones run on the calling thread. No bit depends on
//! that, because operations return the same bits for every split, and sums over rows (in the transposed product) are split
//! at fixed places.

mod executor;
mod operations;
mod threads;

pub(crate) use executor::Executor;
pub(crate) use operations::cost;
#[cfg(feature = "rayon")]
pub use threads::Rayon;
pub use threads::Threads;
