//! Threads that are awake while a model runs.
//!
//! A token needs some two hundred products, most of them shorter than it takes to wake a thread. So all threads of the pool
//! look for work from the beginning of an answer to its end, and sleep while the user types.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use nf4::{Rayon, Threads};
use rayon::Yield;

/// The current `rayon` pool, whose threads are [`awake`].
#[derive(Debug, Clone, Copy)]
pub struct Awake;

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
pub fn awake<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    let flag = AtomicBool::new(false);
    let done = &flag;
    rayon::scope(|scope| {
        // Inside: a caller that is not of the pool has no place in it.
        let home = rayon::current_thread_index();
        scope.spawn_broadcast(move |_, context| {
            // On the thread that works: it came here while it waited for another, and goes back.
            if Some(context.index()) != home {
                while !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        spin_loop();
                    }
                }
            }
        });
        let _end = End(done);
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

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;
    use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use allocation_counter::measure;
    use nf4::Threads;

    use super::{Awake, awake};
    use crate::cache::{Cache, CacheType};
    use crate::directory::Directory;
    use crate::model::{Model, Options};
    use crate::sample::argmax;
    use crate::workspace::Workspace;

    /// [`Awake`], which splits even what a tiny model has to do, and counts the allocations of every thread.
    #[derive(Default)]
    struct Counted {
        allocations: AtomicU64,
        on_others: AtomicUsize,
    }

    impl Threads for Counted {
        fn count(&self) -> usize {
            Awake.count()
        }

        fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
            let home = rayon::current_thread_index();
            let counted = |run: &mut (dyn FnMut() + Send)| {
                if rayon::current_thread_index() != home {
                    self.on_others.fetch_add(1, Ordering::Relaxed);
                }
                self.allocations.fetch_add(measure(run).count_total, Ordering::Relaxed);
            };
            Awake.join(&mut || counted(a), &mut || counted(b));
        }

        fn least_work(&self) -> usize {
            1
        }
    }

    #[test]
    fn tokens_allocate_nothing_on_any_thread() {
        let directory = Directory::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama").as_ref()).unwrap();
        let threads = Arc::new(Counted::default());
        let options = Options { threads: Some(threads.clone()), ..Options::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.install(|| {
            let model = Model::load(directory.config().unwrap(), &directory, options, |_, _| {}).unwrap();
            let mut workspace = Workspace::new(&model, 1, 1).unwrap();
            let mut cache = Cache::new(model.config(), 128, CacheType::F32).unwrap();
            let mut token = argmax(model.extend(&mut cache, &[1], None, &mut workspace).unwrap());
            threads.allocations.store(0, Ordering::Relaxed);
            let mut tokens = || {
                cache.truncate(0);
                for _ in 0..100 {
                    token = argmax(model.extend(&mut cache, &[token], None, &mut workspace).unwrap());
                }
            };
            // On a busy machine, other threads may not get to it at once.
            for _ in 0..100 {
                let mine = awake(|| measure(&mut tokens));
                assert_eq!((mine.count_total, threads.allocations.load(Ordering::Relaxed)), (0, 0));
                if threads.on_others.load(Ordering::Relaxed) > 0 {
                    return;
                }
            }
            panic!("one thread did all the work");
        });
    }

    /// The caller need not be a thread of the pool: it waits for nothing, and what it returns is returned.
    #[test]
    fn it_may_be_called_from_outside_the_pool() {
        assert_eq!(rayon::current_thread_index(), None);
        assert_eq!(awake(|| 7), 7);
        let ended = std::panic::catch_unwind(|| awake(|| -> () { panic!("planted") }));
        assert!(ended.is_err());
    }
}
