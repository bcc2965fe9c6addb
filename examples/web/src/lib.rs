//! A layer for JavaScript: it asks for the addresses of the buffers, fills them, and calls [`forward`].
//!
//! Addresses are only handed out, never taken, so nothing here can be wrong about memory.

use std::cell::RefCell;

use nf4::{Absmax, Activations, BlockSize, Isa, Kernels, Nf4Matrix, ShapeError};

thread_local! {
    static LAYER: RefCell<Layer> = RefCell::default();
}

/// A matrix, a vector and their product, in buffers that keep their addresses from one [`resize`] to the next.
#[derive(Default)]
struct Layer {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    inputs: Vec<f32>,
    values: Vec<i16>,
    scales: Vec<f32>,
    outputs: Vec<f32>,
    weights: Vec<f32>,
}

impl Layer {
    fn new(rows: usize, cols: usize, block_size: usize) -> Result<Self, ShapeError> {
        let block_size = BlockSize::new(block_size)?;
        let elements = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
        Ok(Self {
            rows,
            cols,
            block_size,
            packed: vec![0; nf4::packed_len(elements)],
            absmax: vec![0.0; block_size.blocks(elements)],
            inputs: vec![0.0; cols],
            values: vec![0; Activations::values_len(cols, block_size)],
            scales: vec![0.0; Activations::scales_len(cols, block_size)],
            outputs: vec![0.0; rows],
            weights: Vec::new(),
        })
    }

    fn forward(&mut self) -> Result<(), ShapeError> {
        let kernels = Kernels::detect();
        let absmax = Absmax::Plain(&self.absmax);
        let matrix = Nf4Matrix::new(&self.packed, absmax, self.rows, self.cols, self.block_size)?;
        let (values, scales) = (&mut self.values, &mut self.scales);
        let activations = kernels.quantize_activations(&self.inputs, self.block_size, values, scales)?;
        kernels.gemv(&matrix, &activations, &mut self.outputs)
    }

    fn dequantize(&mut self) -> Result<(), ShapeError> {
        let absmax = Absmax::Plain(&self.absmax);
        let matrix = Nf4Matrix::new(&self.packed, absmax, self.rows, self.cols, self.block_size)?;
        self.weights.resize(self.rows * self.cols, 0.0);
        Kernels::detect().dequantize(&matrix, &mut self.weights)
    }
}

fn with<T>(f: impl FnOnce(&mut Layer) -> T) -> T {
    LAYER.with_borrow_mut(f)
}

/// Makes room for another layer: 1, or 0 if there is no such shape. Invalidates all addresses.
#[unsafe(no_mangle)]
pub extern "C" fn resize(rows: usize, cols: usize, block_size: usize) -> u32 {
    let layer = Layer::new(rows, cols, block_size);
    u32::from(layer.map(|layer| with(|l| *l = layer)).is_ok())
}

/// Address of the packed codes, two a byte.
#[unsafe(no_mangle)]
pub extern "C" fn packed() -> *mut u8 {
    with(|l| l.packed.as_mut_ptr())
}

/// Address of the absmax, one f32 a block.
#[unsafe(no_mangle)]
pub extern "C" fn absmax() -> *mut f32 {
    with(|l| l.absmax.as_mut_ptr())
}

/// Address of the input vector.
#[unsafe(no_mangle)]
pub extern "C" fn inputs() -> *mut f32 {
    with(|l| l.inputs.as_mut_ptr())
}

/// Address of what [`forward`] computes.
#[unsafe(no_mangle)]
pub extern "C" fn outputs() -> *const f32 {
    with(|l| l.outputs.as_ptr())
}

/// Computes the outputs: 1, or 0 if the shapes do not fit.
#[unsafe(no_mangle)]
pub extern "C" fn forward() -> u32 {
    u32::from(with(Layer::forward).is_ok())
}

/// Restores the weights as f32 and returns their address, or 0. Invalidates views of the memory, which may grow.
#[unsafe(no_mangle)]
pub extern "C" fn dequantize() -> *const f32 {
    with(|l| l.dequantize().map_or(core::ptr::null(), |()| l.weights.as_ptr()))
}

/// Whether the kernels of this module are those for 128-bit SIMD.
#[unsafe(no_mangle)]
pub extern "C" fn is_simd() -> u32 {
    u32::from(Kernels::detect().isa() == Isa::Simd128)
}
