//! Threads that are awake while a model runs.
//!
//! A token needs some two hundred products, most of them shorter than it takes to wake a thread. So all threads of the pool
//! look for work from the beginning of an answer to its end, and sleep while the user types.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use nf4::{Rayon, Threads};
use rayon::Yield;

/// The current `rayon` pool, whose threads are [`awake`].
pub(super) struct Awake;

impl Threads for Awake {
    fn count(&self) -> usize {
        Rayon.count()
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        Rayon.join(a, b);
    }

    fn least_work(&self) -> usize {
        // A few microseconds.
        1 << 16
    }
}

/// Calls `run` while the other threads of the pool look for its work without sleeping.
pub(super) fn awake<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    let done = AtomicBool::new(false);
    let home = rayon::current_thread_index();
    rayon::scope(|scope| {
        scope.spawn_broadcast(|_, context| {
            // On the thread that works: it came here while it waited for another, and goes back.
            if Some(context.index()) != home {
                while !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        spin_loop();
                    }
                }
            }
        });
        let _end = End(&done);
        run()
    })
}

/// Ends the looking, also if `run` panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
