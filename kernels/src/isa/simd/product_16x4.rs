//! The loops of the 16x4 GEMV over rows and columns.
//!
//! ```text
//! for R rows:
//!     lanes[R] = 0
//!     for each span:
//!         x = activations of the span                   in registers
//!         for each row: lanes[row] += f32(decode(packed[row]) . x) * (absmax[row] * scale)
//!     out = add_lanes(lanes) * WEIGHT_STEP
//! ```
//!
//! Rows share the loads of the activations and hide each other's latencies. Where a block has several groups, or absmax is
//! nested, it is one row at a time, because the look-up of absmax needs the registers.

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
    match (activations.group() == SPAN, S::ROWS) {
        (true, 4) => gemv_groups::<S, 1, 4>(steps, matrix, activations, out),
        (true, _) => gemv_groups::<S, 1, 2>(steps, matrix, activations, out),
        (false, 4) => gemv_groups::<S, 2, 4>(steps, matrix, activations, out),
        (false, _) => gemv_groups::<S, 2, 2>(steps, matrix, activations, out),
    }
}

/// The product with `GROUPS` activation groups in a span, where it can be `R` rows at a time.
#[inline(always)]
fn gemv_groups<S: Steps16x4, const GROUPS: usize, const R: usize>(
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
        Absmax::Plain(absmax) if shift == 0 => {
            let (several, rest) = out.as_chunks_mut::<R>();
            let first_of_rest = several.len() * R;
            for (tile, out) in several.iter_mut().enumerate() {
                *out = rows::<S, GROUPS, R>(steps, matrix, activations, absmax, tile * R);
            }
            for (row, out) in (first_of_rest..).zip(rest) {
                [*out] = rows::<S, GROUPS, 1>(steps, matrix, activations, absmax, row);
            }
        }
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
    let mut lanes = lanes;
    let (packed, half) = packed.as_chunks();
    let (values, _) = values.as_chunks();
    let (scales, scales_rest) = scales.as_chunks::<GROUPS>();
    let mut group = 0;
    for ((packed, values), scales) in packed.iter().zip(values).zip(scales) {
        steps.prefetch(packed, AHEAD);
        // The last first: its check covers the others, whose loads the compiler can then join.
        let last = absmax(group + GROUPS - 1);
        let absmax = core::array::from_fn(|i| if i == GROUPS - 1 { last } else { absmax(group + i) });
        lanes = steps.add_span(lanes, steps.decode_span(packed), steps.load_span(values), &absmax, scales);
        group += GROUPS;
    }
    if let ([scale], [.., values]) = (scales_rest, values)
        && GROUPS == 2
    {
        // The other half of the span has products of 0, which change no lane.
        let (weights, values) = (steps.decode_span(&padded(half)), steps.load_span(values));
        lanes = steps.add_span(lanes, weights, values, &[absmax(group), 0.0], &[*scale, 0.0]);
    }
    lanes
}

/// The outputs of `R` rows from `first_row` on, where a block is a group and `absmax` is that of all blocks.
#[inline(always)]
fn rows<S: Steps16x4, const GROUPS: usize, const R: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    absmax: &[f32],
    first_row: usize,
) -> [f32; R] {
    let rows: [_; R] = core::array::from_fn(|row| matrix.aligned_row(first_row + row));
    // The same columns of the next rows.
    let ahead = (R * matrix.cols() / 2).max(AHEAD);
    let mut lanes = [steps.load(&[0.0; 8]); R];
    let values = activations.values().as_chunks::<SPAN>().0;
    let (scales, half_scales) = activations.scales().as_chunks::<GROUPS>();
    // Slices of one length, so that the loop has no checks.
    let spans = scales.len();
    let packed = rows.map(|(packed, _)| &packed.as_chunks::<{ SPAN / 2 }>().0[..spans]);
    let of_row = |first_block: usize| &absmax[first_block..][..activations.scales().len()];
    let absmax = rows.map(|(_, first_block)| of_row(first_block).as_chunks::<GROUPS>());
    let blocks = absmax.map(|(blocks, _)| &blocks[..spans]);
    let (whole, half_values) = values.split_at(spans);
    for span in 0..spans {
        let x = steps.load_span(&whole[span]);
        for ((lanes, packed), absmax) in lanes.iter_mut().zip(&packed).zip(&blocks) {
            steps.prefetch(&packed[span], ahead);
            *lanes = steps.add_span(*lanes, steps.decode_span(&packed[span]), x, &absmax[span], &scales[span]);
        }
    }
    if let (&[scale], [values]) = (half_scales, half_values) {
        // The other half of the span has products of 0, which change no lane.
        let padded_group = |x| -> [f32; GROUPS] { core::array::from_fn(|group| if group == 0 { x } else { 0.0 }) };
        let (x, scales) = (steps.load_span(values), padded_group(scale));
        for ((lanes, (packed, _)), (_, half_absmax)) in lanes.iter_mut().zip(rows).zip(absmax) {
            let weights = steps.decode_span(&padded(packed.as_chunks::<{ SPAN / 2 }>().1));
            *lanes = steps.add_span(*lanes, weights, x, &padded_group(half_absmax[0]), &scales);
        }
    }
    lanes.map(|lanes| result(steps, lanes))
}

/// The output of a row.
#[inline(always)]
pub(super) fn result<S: Steps16x4>(steps: &Steps<S>, lanes: S::Lanes) -> f32 {
    canonical(steps.add_lanes(lanes) * spec::WEIGHT_STEP)
}

/// The packed bytes of half a span, with zeros after them.
#[inline(always)]
pub(in crate::isa) fn padded(half: &[u8]) -> [u8; SPAN / 2] {
    let mut packed = [0; SPAN / 2];
    packed[..half.len()].copy_from_slice(half);
    packed
}
