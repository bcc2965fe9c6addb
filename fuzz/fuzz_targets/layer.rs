//! Random sequences of operations on a layer: results lie within derived bounds of dense arithmetic in f64, every way to
//! compute one gives the same bits, and what is refused changes nothing.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4_fuzz::layer::{Start, State};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    start: Start,
    operations: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let Some(mut state) = State::new(&input.start) else { return };
    for operation in input.operations.iter().take(16) {
        state.step(*operation);
    }
    state.forward();
});
