//! The 16x4 product of a few vectors: two rows in each register, four rows at a time.
//!
//! The weights of a span of two rows are decoded into registers, where up to four vectors meet them. Their activations
//! are loaded into both halves of a register, once for all four rows.

use core::arch::x86_64::*;

use super::codes::{codebook, look_up_columns};
use super::registers::*;
use crate::absmax::Absmax;
use crate::activations::Activations;
use crate::format::canonical;
use crate::isa::avx2::prefetch;
use crate::isa::simd::product_16x4::padded;
use crate::matrix::Nf4Matrix;
use crate::spec::{SPAN, WEIGHT_STEP};

/// Rows that share the loads of the activations.
const ROWS: usize = 4;

/// Packed bytes and first block of each row.
type Rows<'a> = [(&'a [u8], usize); ROWS];

/// Groups of a row whose factors are made at once.
const TILE: usize = 32;

/// The factors of some vectors: of each row those of a tile.
type Factors<const N: usize> = [[[f32; TILE]; ROWS]; N];

/// The products of the rows from `first_row` on and all vectors; `out` has the outputs of these rows.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
pub(super) fn multiply<const GROUPS: usize>(
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first_row: usize,
    out: &mut [f32],
) {
    let batch = activations.batch();
    for (row, out) in (first_row..).step_by(ROWS).zip(out.chunks_mut(ROWS * batch)) {
        let last_row = row + out.len() / batch - 1;
        // Where there are less than four, the last row stands in for those that are missing.
        let rows = core::array::from_fn(|r| matrix.aligned_row(last_row.min(row + r)));
        // How far it is to the next rows.
        let ahead = if last_row + 1 < matrix.rows() { ROWS * matrix.cols() / 2 } else { 0 };
        let mut vector = 0;
        while vector < batch {
            vector += match batch - vector {
                4.. => four_rows::<GROUPS, 4>(matrix, rows, activations, vector, ahead, out),
                3 => four_rows::<GROUPS, 3>(matrix, rows, activations, vector, ahead, out),
                2 => four_rows::<GROUPS, 2>(matrix, rows, activations, vector, ahead, out),
                _ => four_rows::<GROUPS, 1>(matrix, rows, activations, vector, ahead, out),
            };
        }
    }
}

/// The products of four rows and the `N` vectors from `first` on. Returns `N`.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn four_rows<const GROUPS: usize, const N: usize>(
    matrix: &Nf4Matrix<'_>,
    rows: Rows<'_>,
    activations: &Activations<'_>,
    first: usize,
    ahead: usize,
    out: &mut [f32],
) -> usize {
    let mut lanes = [[_mm512_setzero_ps(); 2]; N];
    let mut factors = [[[0.0; TILE]; ROWS]; N];
    let (values, scales) = vectors::<N>(activations, first);
    for first_group in (0..scales[0].len()).step_by(TILE) {
        make_factors(matrix, rows, scales, first_group, &mut factors);
        let first_span = first_group / GROUPS;
        let (a, b, c, d) = pieces(rows, first_span, TILE / GROUPS);
        for (span, (((a, b), c), d)) in (0..TILE / GROUPS).zip(a.0.iter().zip(b.0).zip(c.0).zip(d.0)) {
            let packed = [a, b, c, d];
            // A line of the cache has two spans.
            if span.is_multiple_of(2) {
                for packed in packed {
                    prefetch(packed, ahead);
                }
            }
            add_span::<GROUPS, N>(&mut lanes, packed, values, first_span + span, &factors, span);
        }
        // Half a span ends a row. The absmax and scales of its other half are 0, so its products change no lane.
        if GROUPS == 2 && !a.1.is_empty() {
            let packed = [&padded(a.1), &padded(b.1), &padded(c.1), &padded(d.1)];
            add_span::<GROUPS, N>(&mut lanes, packed, values, first_span + a.0.len(), &factors, a.0.len());
        }
    }
    for (n, lanes) in lanes.into_iter().enumerate() {
        let (a, b) = (add_lanes(lanes[0]), add_lanes(lanes[1]));
        for (out, sum) in out.chunks_exact_mut(activations.batch()).zip([a[0], a[1], b[0], b[1]]) {
            out[first + n] = canonical(sum * WEIGHT_STEP);
        }
    }
    N
}

/// Adds the products of a span of four rows and `N` vectors to their lanes. The span is one of a row, and one of a tile.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_span<const GROUPS: usize, const N: usize>(
    lanes: &mut [[__m512; 2]; N],
    packed: [&[u8; SPAN / 2]; ROWS],
    values: [&[[i16; SPAN]]; N],
    span: usize,
    factors: &Factors<N>,
    span_of_tile: usize,
) {
    // Not a loop, so that the lanes stay in registers.
    add_pair::<GROUPS, N, 0>(lanes, packed, values, span, factors, span_of_tile);
    add_pair::<GROUPS, N, 1>(lanes, packed, values, span, factors, span_of_tile);
}

/// As [`add_span`], for the first or the second pair of rows.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_pair<const GROUPS: usize, const N: usize, const PAIR: usize>(
    lanes: &mut [[__m512; 2]; N],
    packed: [&[u8; SPAN / 2]; ROWS],
    values: [&[[i16; SPAN]]; N],
    span: usize,
    factors: &Factors<N>,
    span_of_tile: usize,
) {
    let (low, high) = (2 * PAIR, 2 * PAIR + 1);
    let weights = look_up_columns(two_spans(packed[low], packed[high]), codebook());
    for n in 0..N {
        let values = values[n][span].as_chunks().0;
        let mut sums = _mm512_madd_epi16(weights[0], broadcast_i16(&values[0]));
        for i in 1..4 {
            sums = add_products(sums, weights[i], broadcast_i16(&values[i]));
        }
        let factors = spread::<GROUPS>(&factors[n][low], &factors[n][high], span_of_tile);
        lanes[n][PAIR] = _mm512_add_ps(lanes[n][PAIR], _mm512_mul_ps(_mm512_cvtepi32_ps(sums), factors));
    }
}

/// The factor of each lane of two rows: of one group, or of two for the two halves of a row.
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
fn spread<const GROUPS: usize>(low: &[f32; TILE], high: &[f32; TILE], span: usize) -> __m512 {
    let (low, high) = (low.as_chunks::<GROUPS>().0[span], high.as_chunks::<GROUPS>().0[span]);
    let last = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low[GROUPS - 1]), _mm512_set1_ps(high[GROUPS - 1]));
    if GROUPS == 1 {
        last
    } else {
        let first = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low[0]), _mm512_set1_ps(high[0]));
        _mm512_mask_blend_ps(0xf0f0, first, last)
    }
}

/// [`crate::spec::add_lanes`] of the lanes of two rows.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_lanes(lanes: __m512) -> [f32; 2] {
    // Each lane of a row meets the one that is four, two and one away.
    let four = _mm512_add_ps(lanes, _mm512_shuffle_f32x4::<0b10_11_00_01>(lanes, lanes));
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
    [_mm512_cvtss_f32(one), _mm512_cvtss_f32(_mm512_shuffle_f32x4::<0b10>(one, one))]
}

/// The factors of the groups from `first_group` on, and 0 where a row has no more of them.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn make_factors<const N: usize>(
    matrix: &Nf4Matrix<'_>,
    rows: Rows<'_>,
    scales: [&[f32]; N],
    first_group: usize,
    factors: &mut Factors<N>,
) {
    let (mut restored, mut last) = ([[0.0; TILE]; ROWS], [0.0; TILE]);
    let absmax = absmax_of_tile(matrix, rows, first_group, scales[0].len(), &mut restored);
    for n in 0..N {
        let scales = tile_of(&scales[n][first_group..], &mut last);
        for row in 0..ROWS {
            for i in 0..2 {
                let [absmax, scales] = [absmax[row], scales].map(|x| &x.as_chunks::<16>().0[i]);
                let product = _mm512_mul_ps(load_f32(absmax), load_f32(scales));
                store_f32(&mut factors[n][row].as_chunks_mut().0[i], product);
            }
        }
    }
}

// What follows has no features of its own, so that its closures are inlined: the compiler does not inline one with
// features into the function of the standard library that calls it.

/// The values and the scales of `N` vectors.
#[inline(always)]
fn vectors<'a, const N: usize>(
    activations: &Activations<'a>,
    first: usize,
) -> ([&'a [[i16; SPAN]]; N], [&'a [f32]; N]) {
    let vectors: [_; N] = core::array::from_fn(|n| activations.vector(first + n));
    (vectors.map(|vector| vector.values().as_chunks().0), vectors.map(|vector| vector.scales()))
}

/// Of each row the spans from one on, up to a number of them, and the bytes of half a span if one follows.
#[inline(always)]
fn pieces(rows: Rows<'_>, first: usize, spans: usize) -> (Piece<'_>, Piece<'_>, Piece<'_>, Piece<'_>) {
    let start = first * SPAN / 2;
    let [a, b, c, d] = rows.map(|(packed, _)| packed[start..packed.len().min(start + spans * SPAN / 2)].as_chunks());
    (a, b, c, d)
}

type Piece<'a> = (&'a [[u8; SPAN / 2]], &'a [u8]);

/// The absmax of a tile of four rows: a part of the matrix if there is one for each group, else `restored`.
#[inline(always)]
fn absmax_of_tile<'a>(
    matrix: &Nf4Matrix<'a>,
    rows: Rows<'_>,
    first_group: usize,
    groups: usize,
    restored: &'a mut [[f32; TILE]; ROWS],
) -> [&'a [f32; TILE]; ROWS] {
    if let Absmax::Plain(absmax) = matrix.absmax()
        && matrix.groups_per_block_log2() == 0
        && first_group + TILE <= groups
        && let [Some(a), Some(b), Some(c), Some(d)] =
            rows.map(|(_, block)| absmax.get(block + first_group..).and_then(|absmax| absmax.first_chunk()))
    {
        [a, b, c, d]
    } else {
        restore(matrix, rows, first_group, groups, restored);
        restored.each_ref()
    }
}

/// The absmax of a tile of four rows, and 0 after the end of a row.
#[inline(never)]
fn restore(matrix: &Nf4Matrix<'_>, rows: Rows<'_>, first: usize, groups: usize, out: &mut [[f32; TILE]; ROWS]) {
    for ((_, first_block), out) in rows.into_iter().zip(out) {
        if first + TILE <= groups {
            *out = matrix.group_absmax(first_block, first);
        } else {
            matrix.group_absmax_rest(first_block, first, &mut out[..groups - first]);
        }
    }
}

/// The first of some scales, with zeros after the last one.
#[inline(always)]
fn tile_of<'a>(scales: &'a [f32], last: &'a mut [f32; TILE]) -> &'a [f32; TILE] {
    match scales.first_chunk() {
        Some(tile) => tile,
        None => {
            last[..scales.len()].copy_from_slice(scales);
            last
        }
    }
}
