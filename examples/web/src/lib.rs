//! The model for JavaScript, which calls [`reserve`], writes a request or a part of a file at the address, and calls
//! [`request`] or [`part`]. Answers stand at [`answer`] until the next call.
//!
//! Addresses are only handed out, never taken, so nothing here can be wrong about memory.

mod chat;
mod random;
mod threads;

use std::cell::RefCell;

use anyhow::{Context, Result};
use serde_json::Value;

use chat::Chat;

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

#[derive(Default)]
struct State {
    /// What JavaScript writes.
    input: Vec<u8>,
    /// What it reads.
    answer: Vec<u8>,
    chat: Chat,
}

impl State {
    /// Runs a request, `{ "NAME": ARGUMENTS }`, and leaves `{ "ok": ... }` or `{ "error": "..." }`.
    fn request(&mut self) {
        let result = serde_json::from_slice(&self.input).context("request").and_then(|r| self.chat.request(r));
        self.leave(result);
    }

    fn leave(&mut self, result: Result<Value>) {
        let value = match result {
            Ok(value) => serde_json::json!({ "ok": value }),
            Err(error) => serde_json::json!({ "error": format!("{error:#}") }),
        };
        self.answer = value.to_string().into_bytes();
    }
}

fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    STATE.with_borrow_mut(f)
}

/// The address where `len` bytes are to be written; 0 if there is no memory for them.
#[unsafe(no_mangle)]
pub extern "C" fn reserve(len: usize) -> *mut u8 {
    with(|state| {
        state.input.clear();
        if state.input.try_reserve_exact(len).is_err() {
            return core::ptr::null_mut();
        }
        state.input.resize(len, 0);
        state.input.as_mut_ptr()
    })
}

/// Runs the request that was written.
#[unsafe(no_mangle)]
pub extern "C" fn request() {
    with(State::request);
}

/// Takes what was written as the next bytes of the file that is being read.
#[unsafe(no_mangle)]
pub extern "C" fn part() {
    with(|state| {
        let result = state.chat.part(&state.input);
        state.leave(result);
    });
}

/// The address of `len` bytes, aligned to 16, for the stack and the thread-local variables of a thread. They are never freed,
/// because the thread never ends. Can be called before there are thread-local variables.
#[unsafe(no_mangle)]
pub extern "C" fn thread_memory(len: usize) -> *mut u128 {
    Vec::leak(vec![0_u128; len.div_ceil(16)]).as_mut_ptr()
}

/// Becomes a thread of the pool that a request made. Returns when there is none to become.
#[unsafe(no_mangle)]
pub extern "C" fn thread() {
    threads::run();
}

/// The address of the answer to the last call, a text in JSON.
#[unsafe(no_mangle)]
pub extern "C" fn answer() -> *const u8 {
    with(|state| state.answer.as_ptr())
}

/// Its length in bytes.
#[unsafe(no_mangle)]
pub extern "C" fn answer_len() -> usize {
    with(|state| state.answer.len())
}
