//! The committed test vector, which the tool has too.

include!("../../cli/src/vector.rs");
