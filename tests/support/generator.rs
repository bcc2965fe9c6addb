//! The generator of the tests' inputs, which the tool has too.
#![allow(dead_code, reason = "every test program uses a part of this")]

include!("../../cli/src/generator.rs");
