//! Methods that several layers have.
//!
//! They are written once as macros, because the layers share fields and not a type: one that users reach through `Deref`
//! would be a name more to learn.

/// The accessors of a layer with one adapter, which is its field `adapter`.
macro_rules! adapter_accessors {
    ($Layer:ident) => {
        /// The adapter.
        impl $Layer {
            /// The adapter.
            #[must_use]
            pub fn adapter(&self) -> &LoRAAdapter {
                self.adapter.adapter()
            }

            /// The adapter, for changing it, or for replacing it by another one of the same shape. With `DoRA`, its norms are
            /// stale afterwards, until [`Self::refresh_dora`].
            pub fn adapter_mut(&mut self) -> &mut LoRAAdapter {
                self.adapter.adapter_mut()
            }

            /// `A`, `[rank, d_in]` row-major.
            #[must_use]
            pub fn lora_a(&self) -> &Tensor {
                self.adapter().a()
            }

            /// `A`, mutably. With `DoRA`, norms are stale afterwards, until [`Self::refresh_dora`].
            pub fn lora_a_mut(&mut self) -> &mut Tensor {
                self.adapter_mut().a_mut()
            }

            /// `B`, `[d_out, rank]` row-major.
            #[must_use]
            pub fn lora_b(&self) -> &Tensor {
                self.adapter().b()
            }

            /// `B`, mutably. With `DoRA`, norms are stale afterwards, until [`Self::refresh_dora`].
            pub fn lora_b_mut(&mut self) -> &mut Tensor {
                self.adapter_mut().b_mut()
            }

            /// The tensors that are trained: `A`, `B` and, with `DoRA`, the magnitude. With `DoRA`, norms are stale afterwards,
            /// until [`Self::refresh_dora`].
            pub fn trainable_params(&mut self) -> Vec<&mut Tensor> {
                self.adapter_mut().trainable_params()
            }

            /// The rank of the adapter.
            #[must_use]
            pub fn rank(&self) -> usize {
                self.adapter().rank()
            }

            /// The factor of `B A`: `alpha / rank` or `alpha / sqrt(rank)`.
            #[must_use]
            pub fn scale(&self) -> f32 {
                self.adapter().scale()
            }
        }
    };
}

/// The settings and accessors of a layer on packed weights, which are in its field `linear`.
macro_rules! packed_base {
    ($Layer:ident) => {
        /// Settings.
        impl $Layer {
            /// Sets the bias, `[d_out]`.
            ///
            /// # Errors
            /// [`Error::Shape`] if `bias` does not have `d_out` values; [`Error::NotFinite`] if one of them is NaN or infinite.
            pub fn with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
                Ok(Self { linear: self.linear.with_bias(bias)?, ..self })
            }

            /// Sets how the base product is computed; without this, by [`Arithmetic::SixteenByFour`].
            #[must_use]
            pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
                self.linear.arithmetic = arithmetic;
                self
            }

            /// Sets the kernels; without this, those of [`Kernels::detect`]. They change the speed, never a bit.
            #[must_use]
            pub fn with_kernels(mut self, kernels: Kernels) -> Self {
                self.linear.executor.kernels = kernels;
                self
            }

            /// Sets the threads on which large operations run. They change the speed, never a bit.
            #[cfg(target_has_atomic = "ptr")]
            #[must_use]
            pub fn with_threads(mut self, threads: alloc::sync::Arc<dyn crate::Threads>) -> Self {
                self.linear.executor.set_threads(threads);
                self
            }
        }

        /// The base.
        impl $Layer {
            /// The quantized base weight, `[d_out, d_in]`.
            #[must_use]
            pub fn base_weight_quantized(&self) -> &Quantized4Bit {
                &self.linear.weight
            }

            /// The bias, `[d_out]`, if there is one.
            #[must_use]
            pub fn bias(&self) -> Option<&[f32]> {
                self.linear.bias.as_deref()
            }

            /// How the base product is computed.
            #[must_use]
            pub fn arithmetic(&self) -> Arithmetic {
                self.linear.arithmetic
            }

            /// The kernels in use.
            #[must_use]
            pub fn kernels(&self) -> Kernels {
                self.linear.kernels()
            }

            /// Number of outputs.
            #[must_use]
            pub fn d_out(&self) -> usize {
                self.linear.d_out()
            }

            /// Number of inputs.
            #[must_use]
            pub fn d_in(&self) -> usize {
                self.linear.d_in()
            }
        }
    };
}

pub(super) use {adapter_accessors, packed_base};
