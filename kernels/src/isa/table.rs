//! The table of an instruction set: its name, and a function for each operation.

use core::fmt;

use half::{bf16, f16};

use crate::activations::{Activations, Activations8x8};
use crate::float::sealed::PerFloat;
use crate::gradients::Gradients;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// The name of an instruction set. [`crate::Kernels`], not this, proves that the CPU supports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX2 and AVX-VNNI: Alder Lake, Zen 5 and newer.
    AvxVnni,
    /// x86-64 with AVX2 and, of AVX-512, F, BW, VL and VNNI: Cascade Lake, Ice Lake, Zen 4 and newer.
    Avx512Vnni,
    /// aarch64 with Advanced SIMD.
    Neon,
    /// aarch64 with Advanced SIMD and `dotprod`: Cortex-A55, A76, Neoverse N1, Apple M1 and newer.
    NeonDotprod,
    /// aarch64 with Advanced SIMD, `dotprod` and `i8mm`: Cortex-A510, A710, Neoverse V1, N2, Apple M2 and newer.
    NeonI8mm,
    /// WebAssembly with 128-bit SIMD.
    Simd128,
    /// Arm with the DSP extension: Cortex-M4 and M7, and those M33 and newer that have it.
    CortexMDsp,
}

impl Isa {
    /// The name in lower case, as in benchmark ids: `scalar`, `avx2`, `avx-vnni`, `avx512-vnni`, `neon`,
    /// `neon-dotprod`, `neon-i8mm`, `simd128`, `cortex-m-dsp`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
            Self::Simd128 => "simd128",
            Self::CortexMDsp => "cortex-m-dsp",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The most columns of a matrix for which `gemm_dense_add` is made: its panel of them, for 64 vectors, has 32 KB.
pub(crate) const FEW_COLUMNS: usize = 128;

/// The functions of an instruction set. They are `unsafe` to call only because the CPU must have it; [`crate::Kernels`] has
/// checked the shapes of their arguments.
///
/// An instruction set that only multiplies faster than another overrides what differs:
/// `Table { isa, gemv, gemm, ..avx2::TABLE }`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub isa: Isa,
    /// Where each column of a span stands in the values of [`Activations`]: the order in which `gemv` and `gemm` decode
    /// packed bytes.
    pub slots: &'static [u8; SPAN],
    pub f32: FloatTable<f32>,
    pub f16: FloatTable<f16>,
    pub bf16: FloatTable<bf16>,
    pub mean: unsafe fn(values: &[f32]) -> f32,
    pub quantize_absmax: unsafe fn(absmax: &[f32], offset: f32, codes: &mut [u8], nested_absmax: &mut [f32]),
    /// Only for row-aligned matrices and quantized activations.
    pub gemv: unsafe fn(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]),
    /// As `gemv`, for any batch; `out` is `[rows, batch]`.
    pub gemm: unsafe fn(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]),
    /// As `slots`, of the values of [`Activations8x8`].
    pub slots_8x8: &'static [u8; SPAN],
    /// Only for matrices whose rows are whole groups, and which have columns.
    pub gemv_8x8: unsafe fn(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]),
    /// As `gemv_8x8`, for any batch; `out` is `[rows, batch]`.
    pub gemm_8x8: unsafe fn(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]),
    pub gemv_transposed_f32: unsafe fn(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]),
    /// `inputs` is `[batch, rows]`, `out` `[batch, cols]`; neither is empty.
    pub gemm_transposed_f32: unsafe fn(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]),
    pub quantize_gradients: unsafe fn(inputs: &[f32], rows: usize, values: &mut [i16], scales: &mut [f32]),
    /// Only for matrices whose rows are whole groups of columns; `out` is `[batch, cols]`. Nothing is empty.
    pub gemm_transposed: unsafe fn(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]),
    /// `a` is `[rows, cols]`, `x` `[cols, batch]`, `out` `[rows, batch]`; none is empty.
    pub gemm_dense_add: unsafe fn(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]),
    /// `a` is `[rows, cols]`, `x` `[batch, rows]`, `out` `[batch, cols]`; none is empty.
    pub gemm_transposed_dense_add: unsafe fn(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]),
}

/// The functions that exist for each element type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatTable<T: 'static> {
    pub quantize: unsafe fn(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32]),
    pub dequantize: unsafe fn(matrix: &Nf4Matrix<'_>, out: &mut [T]),
    pub quantize_activations: unsafe fn(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32]),
    pub quantize_activations_8x8: unsafe fn(inputs: &[T], values: &mut [i8], scales: &mut [f32]),
    pub gemv_f32: unsafe fn(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]),
    /// `inputs` is `[batch, cols]` with `cols > 0`, `out` `[rows, batch]`.
    pub gemm_f32: unsafe fn(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]),
    /// `x` is not empty.
    pub gemv_dense: unsafe fn(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32]),
    /// `x` is `[batch, cols]` and not empty, `out` `[rows, batch]`.
    pub gemm_dense: unsafe fn(a: &[T], x: &[f32], batch: usize, out: &mut [f32]),
}

impl PerFloat for Table {
    type Of<T: 'static> = FloatTable<T>;

    fn f32(&self) -> &FloatTable<f32> {
        &self.f32
    }

    fn f16(&self) -> &FloatTable<f16> {
        &self.f16
    }

    fn bf16(&self) -> &FloatTable<bf16> {
        &self.bf16
    }
}
