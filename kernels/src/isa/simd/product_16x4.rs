//! The loops of the 16x4 GEMV over rows and columns.
//!
//! ```text
//! for each row:
//!     lanes = 0
//!     factors = absmax * scale                          for all columns, before their loop
//!     for each span: lanes += f32(decode(packed) . x) * factor
//!     out = add_lanes(lanes) * WEIGHT_STEP
//! ```
//!
//! With factors made before it, the inner loop has one multiplication and one load less for a span, and the registers it
//! needs. Nested absmax is looked up in the loop, because a load with a computed address costs it nothing there.
//! A row at a time: several rows, which share the loads of the activations, were slower on Zen 4.

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

/// The product with `GROUPS` activation groups in a span.
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
        Absmax::Plain(absmax) => gemv_plain::<S, GROUPS>(steps, matrix, absmax, activations, out),
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

/// How many bytes ahead of their use packed bytes are prefetched. On Zen 4, 2 KB made products from DRAM 1.3 times as fast, and
/// 1.7 times with rows of more than a page, and took 2 percent of the speed in cache; 1 KB and 4 KB gained less.
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

/// Factors that are made at a time.
const FACTORS: usize = 128;

/// Spans of a round of the inner loop.
const UNROLLED: usize = 4;

/// The product of a matrix with plain absmax, and columns.
#[inline(always)]
fn gemv_plain<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    absmax: &[f32],
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let (values, scales) = (activations.values(), activations.scales());
    let shift = matrix.groups_per_block_log2();
    let mut factors = [0.0; FACTORS];
    if scales.len() > FACTORS {
        for (row, out) in out.iter_mut().enumerate() {
            let (packed, first_block) = matrix.aligned_row(row);
            let mut lanes = steps.load(&[0.0; 8]);
            for (tile, scales) in scales.chunks(FACTORS).enumerate() {
                let factors = &mut factors[..scales.len()];
                fill_factors(factors, scales, &absmax[first_block + ((tile * FACTORS) >> shift)..], shift);
                let first = tile * FACTORS * (SPAN / GROUPS);
                lanes = add_factored::<S, GROUPS>(steps, lanes, &packed[first / 2..], &values[first..], factors);
            }
            *out = result(steps, lanes);
        }
        return;
    }
    // Those of several short rows at a time: a factor is not stored just before it is loaded, which would stall. Then their
    // outputs, whose additions would else wait for each other at the end of each row.
    let rows = (FACTORS / scales.len()).min(out.len());
    let (mut scales_of_rows, mut lanes_of_rows) = ([0.0; FACTORS], [[0.0; 8]; FACTORS]);
    scales_of_rows.chunks_exact_mut(scales.len()).take(rows).for_each(|row| row.copy_from_slice(scales));
    for (tile, out) in out.chunks_mut(rows.max(1)).enumerate() {
        let factors = &mut factors[..out.len() * scales.len()];
        let (_, first_block) = matrix.aligned_row(tile * rows);
        fill_factors(factors, &scales_of_rows, &absmax[first_block..], shift);
        let lanes_of_rows = &mut lanes_of_rows[..out.len()];
        for ((row, lanes), factors) in (tile * rows..).zip(&mut *lanes_of_rows).zip(factors.chunks_exact(scales.len()))
        {
            let (packed, _) = matrix.aligned_row(row);
            let sums = add_factored::<S, GROUPS>(steps, steps.load(&[0.0; 8]), packed, values, factors);
            steps.store(lanes, sums);
        }
        for (out, lanes) in out.iter_mut().zip(lanes_of_rows) {
            *out = result(steps, steps.load(lanes));
        }
    }
}

/// The products of absmax and activation scale of consecutive groups, the first of which starts a block.
#[inline(always)]
fn fill_factors(factors: &mut [f32], scales: &[f32], absmax: &[f32], shift: u32) {
    match shift {
        0 => fill_blocks::<1>(factors, scales, absmax),
        1 => fill_blocks::<2>(factors, scales, absmax),
        2 => fill_blocks::<4>(factors, scales, absmax),
        _ => {
            let size = 1 << shift;
            for ((factors, scales), absmax) in factors.chunks_mut(size).zip(scales.chunks(size)).zip(absmax) {
                factors.iter_mut().zip(scales).for_each(|(factor, scale)| *factor = absmax * scale);
            }
        }
    }
}

/// As [`fill_factors`], with `N` groups in a block.
#[inline(always)]
fn fill_blocks<const N: usize>(factors: &mut [f32], scales: &[f32], absmax: &[f32]) {
    let blocks = scales.as_chunks::<N>().0.iter().zip(absmax);
    for (factors, (scales, absmax)) in factors.as_chunks_mut::<N>().0.iter_mut().zip(blocks) {
        *factors = scales.map(|scale| absmax * scale);
    }
}

/// Adds the products of consecutive columns of a row to its lanes: of as many groups as there are factors.
#[inline(always)]
fn add_factored<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    mut lanes: S::Lanes,
    packed: &[u8],
    values: &[i16],
    factors: &[f32],
) -> S::Lanes {
    let (factors, half_factor) = factors.as_chunks::<GROUPS>();
    let (packed, half) = packed.split_at(factors.len() * SPAN / 2);
    let (packed, values) = (packed.as_chunks::<{ SPAN / 2 }>().0, values.as_chunks::<SPAN>().0);
    let (rounds, packed_rest) = packed.as_chunks::<UNROLLED>();
    let (values_of_rounds, _) = values.as_chunks::<UNROLLED>();
    let (factors_of_rounds, factors_rest) = factors.as_chunks::<UNROLLED>();
    for ((packed, values), factors) in rounds.iter().zip(values_of_rounds).zip(factors_of_rounds) {
        (0..size_of_val(packed)).step_by(64).for_each(|line| steps.prefetch(packed, AHEAD + line));
        for ((packed, values), factors) in packed.iter().zip(values).zip(factors) {
            lanes = add_one(steps, lanes, packed, values, factors);
        }
    }
    let values = &values[rounds.len() * UNROLLED..];
    for ((packed, values), factors) in packed_rest.iter().zip(values).zip(factors_rest) {
        lanes = add_one(steps, lanes, packed, values, factors);
    }
    if let (&[factor], Some(values)) = (half_factor, values.get(packed_rest.len())) {
        // The other half of the span has products of 0, which change no lane.
        let factors = core::array::from_fn(|group| if group == 0 { factor } else { 0.0 });
        lanes = add_one::<S, GROUPS>(steps, lanes, &padded(&half[..SPAN / 4]), values, &factors);
    }
    lanes
}

#[inline(always)]
fn add_one<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    lanes: S::Lanes,
    packed: &[u8; SPAN / 2],
    values: &[i16; SPAN],
    factors: &[f32; GROUPS],
) -> S::Lanes {
    steps.add_products(lanes, steps.decode_span(packed), steps.load_span(values), factors)
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
