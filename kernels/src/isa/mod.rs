//! The instruction sets, and a map of their operations.
//!
//! A [`Table`] holds the functions of one instruction set. `scalar/` is portable Rust and the easiest to read; all others
//! must equal it to the bit. Instruction sets with vector registers share the loops over rows, columns and blocks in `simd/`,
//! and have their own steps inside the loops, and entries that compile the loops for them.
//!
//! | operation | loops | steps, in the folder of the instruction set |
//! |---|---|---|
//! | `quantize` | `simd/quantize.rs` | `conversions.rs`: `widen`, `encode` |
//! | `dequantize` | `simd/dequantize.rs` | `conversions.rs`: `book`, `decode` |
//! | `quantize_activations`, `quantize_activations_8x8` | `simd/activations.rs` | `conversions.rs`: `widen`, `arrange_i16`; `steps_8x8.rs`: `narrow` |
//! | `gemv`, `gemm` (16x4) | `simd/product_16x4.rs`, `batch_16x4.rs`, `panel_16x4.rs` | `steps_16x4.rs` |
//! | `gemv_8x8`, `gemm_8x8` | `simd/product_8x8.rs`, `batch_8x8.rs` | `steps_8x8.rs`: `add_quads`, `decode_rows`, `add_panel` |
//! | `gemv_f32`, `gemm_f32`, `gemv_transposed_f32` | `simd/product_f32.rs` | `steps_f32.rs`; `conversions.rs`: `widen` |
//! | `gemm_transposed_f32`, `gemm_transposed_dense_add` | `simd/product_transposed.rs` | `conversions.rs`: `decode`, `add`, `mul`; in `avx512/` `columns.rs` |
//! | `gemm_transposed` (16x4) | `simd/transposed_16x4.rs` | `steps_transposed.rs` |
//! | `gemv_dense`, `gemm_dense` | `simd/product_dense.rs` | `conversions.rs`: `widen` |
//! | `gemm_dense_add` | `simd/product_columns.rs` | as the transposed products |
//! | `mean`, `quantize_absmax` | `double_quant.rs`, one for all | |
//!
//! `avx512/` multiplies a batch by loops of its own, which put rows into the lanes of a register (`panel.rs`, `panel_f32.rs`),
//! has wider steps for 8x8 and the transposed products (`columns.rs`), and takes all else from `avx2/`. `neon/` has three
//! kinds of steps for 8x8: `steps_8x8.rs`, and for CPUs with more than NEON `dotprod.rs` and `i8mm.rs`. `cortex_m_dsp/`
//! multiplies both kinds of integers by loops of its own, two rows at a time, and takes all else from `scalar/`. The inner
//! loops, as they are compiled, stand in `asm/`, those of the 16x4 products of x86-64 with the cycles that they are modelled to
//! take.
//!
//! An arithmetic for packed weights takes three files: its traits, `simd/steps_NAME.rs`, its loops,
//! `simd/product_NAME.rs`, and its steps, `steps_NAME.rs` in the folder of each instruction set.

use cfg_if::cfg_if;

#[cfg(all(test, target_arch = "x86_64", target_feature = "sse2"))]
mod environment;
mod scalar;
mod table;

pub(crate) use scalar::product_dense::store_dense;
pub(crate) use table::FEW_COLUMNS;
pub use table::Isa;
pub(crate) use table::Table;

/// A table, and the function that detects whether this CPU has its instruction set; `None` if the target guarantees it.
type Entry = (&'static Table, Option<fn() -> bool>);

// Every instruction set that this target can have, the best first. Only this place lists them.
cfg_if! {
    // Soft-float targets do not pass vectors in registers, and the assembly needs 64-bit pointers.
    if #[cfg(all(target_arch = "x86_64", target_feature = "sse2", target_pointer_width = "64"))] {
        mod avx2;
        mod avx512;
        mod simd;
        mod x86_features;
        use x86_features::{has_avx_vnni, has_avx2, has_avx512_vnni, has_avx512_vnni_of_intel};
        pub(crate) static TABLES: &[Entry] = &[
            (&avx512::INTEL, Some(has_avx512_vnni_of_intel)),
            (&avx512::TABLE, Some(has_avx512_vnni)),
            (&avx2::AVX_VNNI, Some(has_avx_vnni)),
            (&avx2::TABLE, Some(has_avx2)),
            PORTABLE,
        ];
    } else if #[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))] {
        mod aarch64_features;
        mod neon;
        mod simd;
        use aarch64_features::{has_dotprod, has_i8mm};
        pub(crate) static TABLES: &[Entry] = &[
            (&neon::I8MM, Some(has_i8mm)),
            (&neon::DOTPROD, Some(has_dotprod)),
            (&neon::TABLE, None),
            PORTABLE,
        ];
    } else if #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))] {
        mod simd;
        mod simd128;
        pub(crate) static TABLES: &[Entry] = &[(&simd128::TABLE, None), PORTABLE];
    } else if #[cfg(nf4_dsp)] {
        mod cortex_m_dsp;
        pub(crate) static TABLES: &[Entry] = &[(&cortex_m_dsp::TABLE, None), PORTABLE];
    } else {
        pub(crate) static TABLES: &[Entry] = &[PORTABLE];
    }
}

/// The portable code, which runs on every CPU.
pub(crate) const PORTABLE: Entry = (&scalar::TABLE, None);
