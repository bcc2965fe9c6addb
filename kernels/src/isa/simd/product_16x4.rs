//! The loops of the 16x4 products over rows, columns and vectors.

use super::steps::Steps;
use super::steps_16x4::Steps16x4;
use crate::absmax::Absmax;
use crate::activations::Activations;
use crate::format::{NESTED_BLOCK, canonical};
use crate::matrix::Nf4Matrix;
use crate::spec::{self, SPAN};

/// The 16x4 product of a row-aligned matrix.
#[inline(always)]
pub(in crate::isa) fn gemv<S: Steps16x4>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    if activations.group() == SPAN {
        gemv_groups::<S, 1>(steps, matrix, activations, out);
    } else {
        gemv_groups::<S, 2>(steps, matrix, activations, out);
    }
}

#[inline(always)]
fn gemv_groups<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let (values, scales) = (activations.values(), activations.scales());
    let zero = steps.load(&[0.0; 8]);
    let shift = matrix.groups_per_block_log2();
    if scales.is_empty() {
        return out.fill(0.0);
    }
    match matrix.absmax() {
        Absmax::Plain(absmax) => {
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let absmax = &absmax[blocks];
                let absmax = |group| absmax[group >> shift];
                *out = result(steps, add_columns::<S, GROUPS>(steps, zero, packed, values, scales, absmax));
            }
        }
        Absmax::Nested(nested) if scales.len().is_multiple_of(GROUPS) => {
            // What the codes stand for, in one nested block after the other: a look-up in place of a calculation.
            let (mut decoded, mut decoded_block) = ([0.0; 256], usize::MAX);
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let (mut lanes, mut start) = (zero, 0);
                while start < scales.len() {
                    let block = blocks.start + (start >> shift);
                    let nested_block = block / NESTED_BLOCK;
                    if nested_block != decoded_block {
                        (decoded, decoded_block) = (nested.values(nested_block), nested_block);
                    }
                    let end = scales.len().min(((nested_block + 1) * NESTED_BLOCK - blocks.start) << shift);
                    let columns = start * (SPAN / GROUPS)..end * (SPAN / GROUPS);
                    let (packed, values) = (&packed[columns.start / 2..columns.end / 2], &values[columns]);
                    let codes = &nested.codes()[block..];
                    let absmax = |group| decoded[usize::from(codes[group >> shift])];
                    lanes = add_columns::<S, GROUPS>(steps, lanes, packed, values, &scales[start..end], absmax);
                    start = end;
                }
                *out = result(steps, lanes);
            }
        }
        // A nested block may end in the middle of a span.
        Absmax::Nested(_) => {
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let absmax = |group| matrix.absmax_of_group(blocks.start, group);
                *out = result(steps, add_columns::<S, GROUPS>(steps, zero, packed, values, scales, absmax));
            }
        }
    }
}

/// The output of a row.
#[inline(always)]
fn result<S: Steps16x4>(steps: &Steps<S>, lanes: S::Lanes) -> f32 {
    canonical(steps.add_lanes(lanes) * spec::WEIGHT_STEP)
}

/// How many bytes ahead of their use packed bytes are prefetched. On Zen 4, 2 KB made products from DRAM 1.3 times as fast, with rows of
/// more than a page 1.7 times, and took 2 percent of the speed in cache; 1 KB and 4 KB gained less.
pub(in crate::isa) const AHEAD: usize = 2048;

/// Adds consecutive columns of a row to the lanes: whole groups, as many as there are scales. `absmax` gives that of a
/// group.
#[inline(always)]
fn add_columns<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    lanes: S::Lanes,
    packed: &[u8],
    values: &[i16],
    scales: &[f32],
    absmax: impl Fn(usize) -> f32,
) -> S::Lanes {
    let mut lanes = [lanes];
    let (packed, half) = packed.as_chunks();
    let (values, _) = values.as_chunks();
    let (scales, scales_rest) = scales.as_chunks::<GROUPS>();
    let mut group = 0;
    for ((packed, values), scales) in packed.iter().zip(values).zip(scales) {
        steps.prefetch(packed, AHEAD);
        // The last first: its check covers the others, whose loads the compiler can then join.
        let last = absmax(group + GROUPS - 1);
        let absmax = core::array::from_fn(|i| if i == GROUPS - 1 { last } else { absmax(group + i) });
        lanes = steps.add_span::<GROUPS, 1>(lanes, packed, one(values), &absmax, one(scales));
        group += GROUPS;
    }
    if let ([scale], [.., values]) = (scales_rest, values)
        && GROUPS == 2
    {
        // The other half of the span has products of 0, which change no lane.
        let packed = &padded(half);
        lanes = steps.add_span::<2, 1>(lanes, packed, one(values), &[absmax(group), 0.0], &[[*scale, 0.0]]);
    }
    lanes[0]
}

#[inline(always)]
fn one<T>(x: &T) -> &[T; 1] {
    core::array::from_ref(x)
}

/// The packed bytes of half a span, with zeros after them.
#[inline(always)]
pub(in crate::isa) fn padded(half: &[u8]) -> [u8; SPAN / 2] {
    let mut packed = [0; SPAN / 2];
    packed[..half.len()].copy_from_slice(half);
    packed
}

/// Spans of all vectors of a tile: 16 KB of activations.
const SPANS: usize = 128;
/// Rows of all vectors of a tile: 32 KB of lanes.
const ROWS: usize = 1024;

/// The activations and their scales of some vectors in a tile: of each span those of all vectors.
#[repr(align(64))]
struct Panel<const GROUPS: usize> {
    values: [[i16; SPAN]; SPANS],
    scales: [[f32; GROUPS]; SPANS],
}

/// The 16x4 product of a row-aligned matrix and a batch.
///
/// Up to eight vectors at a time: the 64 weights of a span are decoded into registers, once for all eight, and the
/// lanes of the vectors stay in registers too. The activations of a tile of columns are brought together on the stack,
/// in the order of use, aligned, and small enough for the nearest cache; so a tile of rows shares them. The lanes of a
/// row wait on the stack from one tile of columns to the next, so that they are added to in the order of [`gemv`].
#[inline(always)]
pub(in crate::isa) fn gemm<S: Steps16x4>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    if activations.group() == SPAN {
        gemm_groups::<S, 1>(steps, matrix, activations, out);
    } else {
        gemm_groups::<S, 2>(steps, matrix, activations, out);
    }
}

#[inline(always)]
fn gemm_groups<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let mut first = 0;
    while first < activations.batch() {
        let left = S::VECTORS.min(activations.batch() - first);
        match left {
            8.. => steps.gemm_vectors::<GROUPS, 8>(matrix, activations, first, out),
            4.. => steps.gemm_vectors::<GROUPS, 4>(matrix, activations, first, out),
            3 => steps.gemm_vectors::<GROUPS, 3>(matrix, activations, first, out),
            2 => steps.gemm_vectors::<GROUPS, 2>(matrix, activations, first, out),
            _ => steps.gemm_vectors::<GROUPS, 1>(matrix, activations, first, out),
        }
        first += if (5..8).contains(&left) { 4 } else { left };
    }
}

/// The products with the `N` vectors from `first` on.
#[inline(always)]
pub(in crate::isa) fn gemm_vectors<S: Steps16x4, const GROUPS: usize, const N: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first: usize,
    out: &mut [f32],
) {
    let vectors: [Activations<'_>; N] = core::array::from_fn(|n| activations.vector(first + n));
    let mut panel = Panel { values: [[0; SPAN]; SPANS], scales: [[0.0; GROUPS]; SPANS] };
    let mut lanes = [[0.0; 8]; ROWS];
    let (lanes, _) = lanes.as_chunks_mut::<N>();
    let mut absmax = [[0.0; GROUPS]; SPANS];
    let width = SPANS / N * SPAN;
    let piece = |row, column| {
        let (packed, first_block) = matrix.aligned_row(row);
        (&packed[column / 2..matrix.cols().min(column + width) / 2], first_block)
    };
    for (tile, out) in out.chunks_mut(lanes.len() * activations.batch()).enumerate() {
        let first_row = tile * lanes.len();
        let lanes = &mut lanes[..out.len() / activations.batch()];
        lanes.fill([[0.0; 8]; N]);
        for column in (0..matrix.cols()).step_by(width) {
            let columns = (matrix.cols() - column).min(width);
            let (first_group, groups) = (column / (SPAN / GROUPS), columns / (SPAN / GROUPS));
            fill_panel(&mut panel, &vectors, column);
            for (row, lanes) in (first_row..).zip(&mut *lanes) {
                let (packed, first_block) = piece(row, column);
                // The next row's piece is one that a prefetcher of the processor does not expect.
                if row + 1 < matrix.rows() {
                    let (next, _) = piece(row + 1, column);
                    (0..next.len()).step_by(64).for_each(|line| steps.prefetch(next, line));
                }
                matrix.group_absmax_rest(first_block, first_group, &mut absmax.as_flattened_mut()[..groups]);
                add_tile(steps, lanes, packed, &panel, &absmax);
            }
        }
        for (out, lanes) in out.chunks_mut(activations.batch()).zip(lanes) {
            for (out, lanes) in out[first..].iter_mut().zip(lanes) {
                *out = result(steps, steps.load(lanes));
            }
        }
    }
}

/// Brings together what a tile needs of each vector, from `column` on.
#[inline(always)]
fn fill_panel<const GROUPS: usize, const N: usize>(
    panel: &mut Panel<GROUPS>,
    vectors: &[Activations<'_>; N],
    column: usize,
) {
    for (n, vector) in vectors.iter().enumerate() {
        let values = vector.values()[column..].as_chunks::<SPAN>().0;
        for (panel, values) in panel.values.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            panel[n] = *values;
        }
        let scales = vector.scales()[column / (SPAN / GROUPS)..].chunks(GROUPS);
        for (panel, scales) in panel.scales.as_chunks_mut::<N>().0.iter_mut().zip(scales) {
            // A group that is not there has a scale of 0.
            panel[n] = core::array::from_fn(|g| scales.get(g).copied().unwrap_or(0.0));
        }
    }
}

/// Adds the products of the columns of a row in a tile and `N` vectors to their lanes.
#[inline(always)]
fn add_tile<S: Steps16x4, const GROUPS: usize, const N: usize>(
    steps: &Steps<S>,
    lanes: &mut [[f32; 8]; N],
    packed: &[u8],
    panel: &Panel<GROUPS>,
    absmax: &[[f32; GROUPS]; SPANS],
) {
    let mut sums = [steps.load(&[0.0; 8]); N];
    for (sum, lanes) in sums.iter_mut().zip(&*lanes) {
        *sum = steps.load(lanes);
    }
    let (packed, half) = packed.as_chunks();
    let mut panels = panel.values.as_chunks::<N>().0.iter().zip(panel.scales.as_chunks::<N>().0).zip(absmax);
    for (packed, ((values, scales), absmax)) in packed.iter().zip(&mut panels) {
        sums = steps.add_span(sums, packed, values, absmax, scales);
    }
    if let (false, Some(((values, scales), absmax))) = (half.is_empty(), panels.next()) {
        // The other half of the span has a product of 0, which changes no lane.
        sums = steps.add_span(sums, &padded(half), values, absmax, scales);
    }
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        steps.store(lanes, sum);
    }
}
