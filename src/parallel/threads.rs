//! The threads that operations run on: a trait, and what there is without one.

/// A thread pool on which layers run large operations.
///
/// Without one, operations run on the calling thread or, with the feature `rayon`, on the current `rayon` pool.
///
/// ```
/// use std::sync::Arc;
/// use nf4::{QLoRALayer, Tensor, Threads};
///
/// /// A new thread for every split: simple, and slower than a pool.
/// struct Spawn(usize);
///
/// impl Threads for Spawn {
///     fn count(&self) -> usize {
///         self.0
///     }
///     fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
///         std::thread::scope(|scope| {
///             scope.spawn(b);
///             a();
///         });
///     }
/// }
///
/// let layer = QLoRALayer::new(Tensor::zeros(64 * 64, false), 64, 64, 4, 8.0).with_threads(Arc::new(Spawn(2)));
/// # assert_eq!(layer.forward(&Tensor::zeros(64, false)).len(), 64);
/// ```
pub trait Threads: Send + Sync {
    /// The number of threads: an operation is split into at most this many parts.
    fn count(&self) -> usize;

    /// Calls both functions once, in parallel if a thread is free, and returns when both have returned. Calls are nested:
    /// `a` and `b` may call this again to split their work further.
    ///
    /// No pool can change a result: a function that is called twice does nothing the second time, and one that was not
    /// called is called afterwards.
    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send));

    /// The least work per part, in multiply-adds of the 16x4 product: operations with less than twice this run on one
    /// thread. The default is for threads that sleep while there is no work; less pays if they are awake.
    fn least_work(&self) -> usize {
        LEAST
    }
}

/// The current `rayon` pool: the one in which the caller runs (see `rayon::ThreadPool::install`), or the global one.
#[cfg(feature = "rayon")]
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

#[cfg(feature = "rayon")]
impl Threads for Rayon {
    fn count(&self) -> usize {
        rayon::current_num_threads()
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        rayon::join(a, b);
    }
}

/// The calling thread.
#[cfg(not(feature = "rayon"))]
pub(super) struct ThisThread;

#[cfg(not(feature = "rayon"))]
impl Threads for ThisThread {
    fn count(&self) -> usize {
        1
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        a();
        b();
    }
}

/// [`Threads::least_work`] of threads that sleep; on a core with AVX2 this takes 70 microseconds. Called
/// from outside of the pool, two sleeping threads did work of 70 microseconds at 0.75 times the speed of one thread, of
/// 140 microseconds at 0.9 to 1.3 times, and of 220 microseconds at 1.1 to 1.7 times. Measured with
/// `cargo bench --features rayon --bench kernels -- --ratios` on two cores of a virtual machine.
const LEAST: usize = 1 << 21;
