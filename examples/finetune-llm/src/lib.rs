//! Fine-tunes language models of the Llama family on NF4 weights, on a CPU.
//!
//! The model is read as `nf4-llama` reads it. Its linear layers and variables are those of `nf4-candle`, and the whole of it
//! is one operation for candle's autograd, with a backward of its own. [`run`] is the program: read the data, train, evaluate,
//! save. Everything that decides a run is in [`Settings`], so that one that was stopped goes on with the same losses.

mod arguments;
mod attention;
mod block;
mod checkpoint;
mod data;
mod head;
mod linear;
mod model;
mod ops;
mod optimizer;
mod pack;
mod plot;
mod progress;
mod settings;
mod train;

pub use arguments::{Arguments, ArithmeticName};
pub use checkpoint::{Checkpoint, History};
pub use data::{Data, Document};
pub use model::{Adapters, Llama};
pub use optimizer::{Optimizer, Schedule};
pub use pack::{Sequence, Stream};
pub use settings::Settings;
pub use train::run;
