//! Tokens per second of llama.cpp, measured as `llama --bench` of examples/llama does: for its `speed.py`.
//!
//! ```text
//! llama_cpp FILE.gguf THREADS
//! ```

use std::ffi::CString;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use llama_cpp_sys_2 as sys;

const PROMPT: usize = 512;
const DECODED: usize = 64;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = CString::new(arguments.next().context("no file")?)?;
    let threads: u16 = arguments.next().context("no number of threads")?.parse()?;
    let model = Model::load(&path, threads)?;
    let vocabulary = u32::try_from(model.vocabulary)?;
    let prompt: Vec<i32> =
        (0..512_u32).map(|i| i32::try_from(i.wrapping_mul(2_654_435_761) % vocabulary)).collect::<Result<_, _>>()?;
    model.read(&prompt)?;

    model.clear();
    let start = Instant::now();
    model.read(&prompt)?;
    println!("{threads} threads, prompt of {PROMPT}: {:.1} tokens/s", PROMPT as f64 / start.elapsed().as_secs_f64());

    model.clear();
    let mut token = model.read(&prompt[..16])?;
    let start = Instant::now();
    for _ in 0..DECODED {
        token = model.read(&[token])?;
    }
    println!("{threads} threads, decoding: {:.1} tokens/s", DECODED as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

/// A model and its context, which live as long as the process.
struct Model {
    context: *mut sys::llama_context,
    vocabulary: usize,
}

impl Model {
    fn load(path: &CString, threads: u16) -> Result<Self> {
        // SAFETY: a callback that ignores its arguments.
        unsafe { sys::llama_log_set(Some(silent), std::ptr::null_mut()) };
        // SAFETY: it has no arguments.
        unsafe { sys::llama_backend_init() };
        // SAFETY: it has no arguments.
        let params = unsafe { sys::llama_model_default_params() };
        // SAFETY: a C string, and parameters as llama.cpp made them.
        let model = unsafe { sys::llama_model_load_from_file(path.as_ptr(), params) };
        ensure!(!model.is_null(), "llama.cpp does not load the file");
        // SAFETY: it has no arguments.
        let mut params = unsafe { sys::llama_context_default_params() };
        (params.n_ctx, params.n_batch) = (1024, 512);
        (params.n_threads, params.n_threads_batch) = (threads.into(), threads.into());
        // SAFETY: a model that is never freed.
        let context = unsafe { sys::llama_init_from_model(model, params) };
        ensure!(!context.is_null(), "llama.cpp makes no context");
        // SAFETY: a model that is never freed.
        let vocab = unsafe { sys::llama_model_get_vocab(model) };
        // SAFETY: a part of the model.
        let vocabulary = usize::try_from(unsafe { sys::llama_vocab_n_tokens(vocab) })?;
        Ok(Self { context, vocabulary })
    }

    /// Forgets all tokens.
    fn clear(&self) {
        // SAFETY: a context that is never freed.
        let memory = unsafe { sys::llama_get_memory(self.context) };
        // SAFETY: a part of the context.
        unsafe { sys::llama_memory_clear(memory, true) };
    }

    /// Continues with tokens, and returns the likeliest next one.
    fn read(&self, tokens: &[i32]) -> Result<i32> {
        let mut tokens = tokens.to_vec();
        // SAFETY: the tokens live until the batch has been decoded, and llama.cpp does not write to them.
        let batch = unsafe { sys::llama_batch_get_one(tokens.as_mut_ptr(), i32::try_from(tokens.len())?) };
        // SAFETY: a context that is never freed.
        let status = unsafe { sys::llama_decode(self.context, batch) };
        ensure!(status == 0, "llama_decode returns {status}");
        // SAFETY: a context that is never freed.
        let logits = unsafe { sys::llama_get_logits_ith(self.context, -1) };
        ensure!(!logits.is_null(), "llama.cpp has no logits");
        // SAFETY: the logits of one token, which stay until the next call of `llama_decode`.
        let logits = unsafe { std::slice::from_raw_parts(logits, self.vocabulary) };
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).context("no vocabulary")?;
        Ok(i32::try_from(best.0)?)
    }
}

extern "C" fn silent(_: sys::ggml_log_level, _: *const std::ffi::c_char, _: *mut std::ffi::c_void) {}
