//! One module an instruction set. They have the same functions in the same files; `scalar.rs` is the plainest to read,
//! and what the others must equal to the bit. What those with vectors share of the products is in `products.rs` and
//! `products_f32.rs`.
//!
//! Every function takes arguments whose shapes the callers in `kernels.rs` have checked.

mod products;
mod products_f32;
pub(crate) mod scalar;
mod steps;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;

#[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
pub(crate) mod neon;

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub(crate) mod simd128;

#[cfg(nf4_dsp)]
pub(crate) mod cortex_m_dsp;
