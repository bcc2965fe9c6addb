//! Nothing is read or written beyond a slice: every slice of every operation stands flush against a page that nobody
//! may touch, first with its start, then with its end. An access of one byte too many ends the process.
//!
//! Slices also stand a few elements from such a page, at odd addresses, between bytes that must not change.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "support/generator.rs"]
mod generator;

use core::ops::Range;

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use generator::Generator;
use mmap_rs::{MmapMut, MmapNone, MmapOptions};
use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, Float, Kernels, NestedAbsmax, Nf4Matrix, bf16, f16,
};

/// What bytes beside a slice hold.
const CANARY: u8 = 0xa5;

/// How far beside a slice that is looked.
const BESIDE: usize = 64;

/// Where in its memory a slice stands: its distance in elements from the closed page before it, or behind it.
#[derive(Debug, Clone, Copy)]
enum Place {
    Start(usize),
    End(usize),
}

/// Memory between two closed pages, with room for one slice at a time.
struct Fenced {
    before: MmapNone,
    memory: MmapMut,
    behind: MmapNone,
    slice: Range<usize>,
}

impl Fenced {
    fn new(bytes: usize) -> Self {
        let page = MmapOptions::page_size();
        let bytes = bytes.next_multiple_of(page);
        let mut memory = MmapOptions::new(bytes + 2 * page).unwrap().map_mut().unwrap();
        let behind = memory.split_off(page + bytes).unwrap();
        let before = memory.split_to(page).unwrap();
        let close = |page: MmapMut| page.make_none().map_err(|(_, error)| error).unwrap();
        memory.fill(CANARY);
        Self { before: close(before), memory, behind: close(behind), slice: 0..0 }
    }

    /// A slice with any content. It takes the place of the one before it, beside which nothing may have been written.
    fn take<T: Pod>(&mut self, len: usize, place: Place) -> &mut [T] {
        assert!(self.is_intact(), "written beside a slice");
        let (bytes, room) = (len * size_of::<T>(), self.memory.len());
        let start = match place {
            Place::Start(elements) => elements * size_of::<T>(),
            Place::End(elements) => room - bytes - elements * size_of::<T>(),
        };
        self.slice = start..start + bytes;
        self.memory[start.saturating_sub(BESIDE)..room.min(start + bytes + BESIDE)].fill(CANARY);
        cast_slice_mut(&mut self.memory[self.slice.clone()])
    }

    /// A slice with this content.
    fn put<T: Pod>(&mut self, content: &[T], place: Place) -> &mut [T] {
        let slice = self.take(content.len(), place);
        slice.copy_from_slice(content);
        slice
    }

    /// Whether what stands beside the slice is what was there when it was taken.
    fn is_intact(&self) -> bool {
        let Range { start, end } = self.slice;
        let mut beside = self.memory[start.saturating_sub(BESIDE)..start]
            .iter()
            .chain(&self.memory[end..self.memory.len().min(end + BESIDE)]);
        beside.all(|byte| *byte == CANARY)
    }
}

/// Fenced memory for every slice that an operation may have.
struct Memory {
    weights: Fenced,
    packed: Fenced,
    absmax: Fenced,
    codes: Fenced,
    map: Fenced,
    nested: Fenced,
    inputs: Fenced,
    values: Fenced,
    scales: Fenced,
    bytes_8x8: Fenced,
    scales_8x8: Fenced,
    out: Fenced,
}

impl Memory {
    fn new() -> Self {
        let fenced = || Fenced::new(1 << 18);
        Self {
            weights: fenced(),
            packed: fenced(),
            absmax: fenced(),
            codes: fenced(),
            map: fenced(),
            nested: fenced(),
            inputs: fenced(),
            values: fenced(),
            scales: fenced(),
            bytes_8x8: fenced(),
            scales_8x8: fenced(),
            out: fenced(),
        }
    }

    fn is_intact(&self) -> bool {
        let Self { weights, packed, absmax, codes, map, nested, inputs, values, scales, bytes_8x8, scales_8x8, out } =
            self;
        [weights, packed, absmax, codes, map, nested, inputs, values, scales, bytes_8x8, scales_8x8, out]
            .iter()
            .all(|f| f.is_intact())
    }
}

/// A shape, with ordinary memory that holds what goes in.
struct Case {
    rows: usize,
    cols: usize,
    block_size: BlockSize,
    batch: usize,
    weights: Vec<f32>,
    inputs: Vec<f32>,
}

impl Case {
    fn new(rows: usize, cols: usize, block_size: BlockSize, batch: usize) -> Self {
        let mut g = Generator((rows + cols) as u64);
        let mut values = |n| (0..n).map(|_| g.value()).collect();
        Self { rows, cols, block_size, batch, weights: values(rows * cols), inputs: values(batch * cols) }
    }

    fn name(&self, k: Kernels, place: Place) -> String {
        let Self { rows, cols, block_size, batch, .. } = self;
        format!("{rows} x {cols}, {block_size:?}, batch {batch}, {place:?}, {}", k.isa())
    }

    /// Every conversion of weights of type `T`; returns all results, one after the other.
    fn conversions<T>(&self, k: Kernels, place: Place, memory: &mut Memory) -> Vec<u8>
    where
        T: Float + Pod,
    {
        let Self { rows, cols, block_size, .. } = *self;
        let blocks = block_size.blocks(rows * cols);
        let Memory { weights, packed, absmax, codes, map, nested, out, .. } = memory;
        let content: Vec<T> = self.weights.iter().map(|w| T::from_f32(*w)).collect();
        let weights = weights.put(&content, place);
        let (packed, absmax) = (packed.take((rows * cols).div_ceil(2), place), absmax.take(blocks, place));
        k.quantize(weights, block_size, packed, absmax).unwrap();
        let mut results = [bytes(packed), bytes(absmax)].concat();

        let (codes, nested) = (codes.take(blocks, place), nested.take(blocks.div_ceil(256), place));
        let offset = k.quantize_absmax(absmax, codes, nested).unwrap();
        results.extend([bytes(codes), bytes(nested)].concat());
        k.quantize_absmax_with_offset(absmax, 0.25, codes, nested).unwrap();
        results.extend([bytes(codes), bytes(nested)].concat());

        let map = <&[f32; 256]>::try_from(&*map.put(&DYNAMIC_MAP, place)).unwrap();
        let nested = Absmax::Nested(NestedAbsmax::new(codes, map, nested, offset).unwrap());
        for absmax in [Absmax::Plain(absmax), nested] {
            let matrix = Nf4Matrix::new(packed, absmax, rows, cols, block_size).unwrap();
            // The whole, and what is left when rows before it are cut off.
            for first in [0, rows / 2] {
                let part = matrix.row_range(first..rows).unwrap();
                let out = out.take::<T>((rows - first) * cols, place);
                k.dequantize(&part, out).unwrap();
                results.extend(bytes(out));
            }
            let out = out.take::<f32>(blocks - blocks / 2, place);
            absmax.dequantize(blocks / 2, out).unwrap();
            results.extend(bytes(out));
        }
        results
    }

    /// Every product with quantized weights.
    fn products(&self, k: Kernels, place: Place, memory: &mut Memory) -> Vec<u8> {
        let Self { rows, cols, block_size, batch, .. } = *self;
        let blocks = block_size.blocks(rows * cols);
        let Memory { packed, absmax, codes, map, nested, inputs, values, scales, bytes_8x8, scales_8x8, out, .. } =
            memory;
        let (packed, absmax) = (packed.take((rows * cols).div_ceil(2), place), absmax.take(blocks, place));
        let (codes, nested) = (codes.take(blocks, place), nested.take(blocks.div_ceil(256), place));
        k.quantize(&self.weights, block_size, packed, absmax).unwrap();
        let offset = k.quantize_absmax(absmax, codes, nested).unwrap();
        let map = <&[f32; 256]>::try_from(&*map.put(&DYNAMIC_MAP, place)).unwrap();
        let nested = Absmax::Nested(NestedAbsmax::new(codes, map, nested, offset).unwrap());

        let mut results = Vec::new();
        for absmax in [Absmax::Plain(absmax), nested] {
            let matrix = Nf4Matrix::new(packed, absmax, rows, cols, block_size).unwrap();
            for first in [0, rows / 2] {
                let part = matrix.row_range(first..rows).unwrap();
                let rows = part.rows();
                for batch in [1, batch] {
                    let inputs = &*inputs.put(&self.inputs[..batch * cols], place);
                    let values = values.take(batch * Activations::values_len(cols, block_size), place);
                    let scales = scales.take(batch * Activations::scales_len(cols, block_size), place);
                    let activations = k.quantize_activations_batch(inputs, cols, block_size, values, scales).unwrap();
                    // Not the values: their order depends on the target.
                    results.extend(bytes(activations.scales()));
                    let y = out.take::<f32>(rows * batch, place);
                    if batch == 1 {
                        k.gemv(&part, &activations, y).unwrap();
                        results.extend(bytes(y));
                        k.gemv_f32(&part, inputs, y).unwrap();
                    } else {
                        k.gemm(&part, &activations, y).unwrap();
                        results.extend(bytes(y));
                        k.gemm_f32(&part, inputs, y).unwrap();
                    }
                    results.extend(bytes(y));

                    let values = bytes_8x8.take::<i8>(batch * Activations8x8::values_len(cols), place);
                    let scales = scales_8x8.take(batch * Activations8x8::scales_len(cols), place);
                    let activations = k.quantize_activations_8x8_batch(inputs, cols, values, scales).unwrap();
                    results.extend(bytes(activations.scales()));
                    if batch == 1 {
                        k.gemv_8x8(&part, &activations, y).unwrap();
                    } else {
                        k.gemm_8x8(&part, &activations, y).unwrap();
                    }
                    results.extend(bytes(y));
                }
                // One input a row; where there are fewer columns than rows, they come from the weights.
                let x = &*inputs.put(&[&self.inputs[..], &self.weights].concat()[..rows], place);
                let y = out.take::<f32>(cols, place);
                k.gemv_transposed_f32(&part, x, y).unwrap();
                results.extend(bytes(y));
            }
        }
        results
    }

    /// The products with dense matrices of every element type.
    fn dense(&self, k: Kernels, place: Place, memory: &mut Memory) -> Vec<u8> {
        let products = [Self::dense_of::<f32>, Self::dense_of::<f16>, Self::dense_of::<bf16>];
        products.into_iter().flat_map(|products| products(self, k, place, memory)).collect()
    }

    fn dense_of<T: Float + Pod>(&self, k: Kernels, place: Place, memory: &mut Memory) -> Vec<u8> {
        let Self { rows, cols, batch, .. } = *self;
        let content: Vec<T> = self.weights.iter().map(|w| T::from_f32(*w)).collect();
        let a = &*memory.weights.put(&content, place);
        let x = &*memory.inputs.put(&self.inputs[..cols], place);
        let y = memory.out.take::<f32>(rows, place);
        k.gemv_dense(a, x, y).unwrap();
        let mut results = bytes(y).to_vec();
        k.gemv_dense_add(a, x, 0.5, y).unwrap();
        results.extend(bytes(y));
        let x = &*memory.inputs.put(&self.inputs, place);
        let y = memory.out.take::<f32>(rows * batch, place);
        k.gemm_dense(a, x, batch, y).unwrap();
        results.extend(bytes(y));
        let a = &*memory.weights.put(&self.weights, place);
        k.gemm_dense_add(a, x, batch, 0.5, y).unwrap();
        results.extend(bytes(y));
        results
    }
}

fn bytes<T: Pod>(slice: &[T]) -> &[u8] {
    cast_slice(slice)
}

/// Runs `operations` with all kernels and at all places, and compares what they give.
fn run(cases: impl Iterator<Item = Case>, operations: fn(&Case, Kernels, Place, &mut Memory) -> Vec<u8>) {
    let mut memory = Memory::new();
    let (mut runs, kernels) = (0, Kernels::available().collect::<Vec<_>>());
    for (i, case) in cases.enumerate() {
        let expected = operations(&case, Kernels::scalar(), Place::Start(0), &mut memory);
        for k in &kernels {
            // Up to 31 elements from the page: every alignment of a byte in a register of 256 bits.
            let odd = i % 31 + 1;
            for place in [Place::Start(0), Place::End(0), Place::Start(odd), Place::End(odd)] {
                let results = operations(&case, *k, place, &mut memory);
                assert!(memory.is_intact(), "written beside a slice: {}", case.name(*k, place));
                assert!(results == expected, "other bits than elsewhere: {}", case.name(*k, place));
                runs += 1;
            }
        }
    }
    let isas: Vec<_> = kernels.iter().map(|k| k.isa().name()).collect();
    println!("{runs} runs on {}", isas.join(", "));
}

/// Columns with every kind of rest: of a register, a group, a span, a stride of spans, a panel.
const COLS: [usize; 47] = [
    1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 80, 95, 96, 97, 100, 127, 128, 129,
    160, 192, 224, 255, 256, 257, 320, 512, 544, 576, 1000, 1024, 1056, 2048, 2112, 4096, 4160,
];

fn cases() -> impl Iterator<Item = Case> {
    let shapes = COLS.iter().enumerate().flat_map(|(i, cols)| {
        // Tiles of four and of eight rows, and rests of them; few rows if they are long.
        let rows = if *cols < 1000 { [1, 2, 3, 4, 5, 7, 8, 9, 11][i % 9] } else { [1, 2, 3][i % 3] };
        BlockSize::ALL.map(|block_size| Case::new(rows, *cols, block_size, [2, 3, 4, 5, 8, 9][i % 6]))
    });
    // More vectors than a tile of the products of a batch has; more rows than a chunk of the transposed product; more
    // blocks than share a nested absmax.
    let many = [(5, 64, 131), (5, 96, 131), (515, 33, 2), (514, 64, 2), (513, 96, 2), (9, 1024, 3), (4, 8192, 2)];
    shapes.chain(many.into_iter().flat_map(|(rows, cols, batch)| {
        [BlockSize::B32, BlockSize::B64].map(|block_size| Case::new(rows, cols, block_size, batch))
    }))
}

#[test]
fn conversions_of_f32_stay_inside() {
    run(cases(), Case::conversions::<f32>);
}

#[test]
fn conversions_of_f16_stay_inside() {
    run(cases(), Case::conversions::<f16>);
}

#[test]
fn conversions_of_bf16_stay_inside() {
    run(cases(), Case::conversions::<bf16>);
}

#[test]
fn products_stay_inside() {
    run(cases(), Case::products);
}

#[test]
fn dense_products_stay_inside() {
    let shapes = (1..=12).flat_map(|rows| (1..=40).chain([63, 64, 65, 333]).map(move |cols| (rows, cols)));
    run(shapes.map(|(rows, cols)| Case::new(rows, cols, BlockSize::B64, 1 + (rows + cols) % 4)), Case::dense);
}

/// That the pages are closed, and touch the slices: else the tests above would show nothing.
#[cfg(target_os = "linux")]
#[test]
fn slices_touch_closed_pages() {
    let mut fenced = Fenced::new(1);
    let (before, behind) = (fenced.before.end(), fenced.behind.start());
    let slice = fenced.take::<u8>(33, Place::Start(0)).as_ptr_range();
    assert_eq!(slice.start.addr(), before);
    let slice = fenced.take::<u8>(33, Place::End(0)).as_ptr_range();
    assert_eq!(slice.end.addr(), behind);

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let rights = |address: usize| {
        maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
            (start..end).contains(&address).then_some(&rest[..3])
        })
    };
    for (address, expected) in [(before - 1, "---"), (before, "rw-"), (behind - 1, "rw-"), (behind, "---")] {
        assert_eq!(rights(address), Some(expected), "{address:x} in\n{maps}");
    }
}
