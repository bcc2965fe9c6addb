//! The 16x4 product of a few vectors: two rows in each register, four rows at a time.
//!
//! The weights of a span of two rows are decoded into registers, where up to four vectors meet them. Their activations
//! are loaded into both halves of a register, once for all four rows.
//!
//! Factors are made for a tile of columns before its loop. One vector with nested absmax looks them up in the loop, where
//! loads with computed addresses cost next to nothing: what the codes of a nested block stand for is calculated once.

use core::arch::x86_64::*;

use super::codes::{codebook, look_up_columns};
use super::registers::*;
use crate::absmax::Absmax;
use crate::activations::Activations;
use crate::format::{NESTED_BLOCK, canonical};
use crate::isa::avx2::prefetch_second;
use crate::isa::simd::product_16x4::padded;
use crate::matrix::Nf4Matrix;
use crate::spec::{SPAN, WEIGHT_STEP};

/// Rows that share the loads of the activations.
const ROWS: usize = 4;

/// Packed bytes and first block of each row.
type Rows<'a> = [(&'a [u8], usize); ROWS];

/// Groups of a row whose factors are made at once.
const TILE: usize = 32;

/// Whether this is faster than AVX2. Making a tile of factors takes too long where rows are shorter than a tile, which was 0.7
/// times as fast on Zen 4 with 384 columns, and where blocks are larger than groups, 0.8 times.
#[inline]
pub(super) fn is_worthwhile(matrix: &Nf4Matrix<'_>) -> bool {
    matrix.groups_per_block_log2() == 0 && matrix.cols() >= TILE * matrix.block_size().activation_group()
}

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
    let mut nested = Nested::new();
    for (row, out) in (first_row..).step_by(ROWS).zip(out.chunks_mut(ROWS * batch)) {
        let last_row = row + out.len() / batch - 1;
        // Where there are less than four, the last row stands in for those that are missing.
        let rows = core::array::from_fn(|r| matrix.aligned_row(last_row.min(row + r)));
        // How far it is to the next rows.
        let ahead = if last_row + 1 < matrix.rows() { ROWS * matrix.cols() / 2 } else { 0 };
        let mut vector = 0;
        while vector < batch {
            vector += match batch - vector {
                4.. => four_rows::<GROUPS, 4>(matrix, rows, activations, vector, ahead, &mut nested, out),
                3 => four_rows::<GROUPS, 3>(matrix, rows, activations, vector, ahead, &mut nested, out),
                2 => four_rows::<GROUPS, 2>(matrix, rows, activations, vector, ahead, &mut nested, out),
                _ => four_rows::<GROUPS, 1>(matrix, rows, activations, vector, ahead, &mut nested, out),
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
    nested: &mut Nested,
    out: &mut [f32],
) -> usize {
    let mut lanes = [[_mm512_setzero_ps(); 2]; N];
    let mut factors = [[[0.0; TILE]; ROWS]; N];
    let (values, scales) = vectors::<N>(activations, first);
    for first_group in (0..scales[0].len()).step_by(TILE) {
        let first_span = first_group / GROUPS;
        if N == 1 && nested.set::<GROUPS>(matrix, rows, scales[0], first_group) {
            add_tile::<GROUPS, N, true>(&mut lanes, rows, values, first_span, ahead, &factors, nested);
        } else {
            make_factors::<GROUPS, N>(matrix, rows, scales, first_group, &mut factors);
            add_tile::<GROUPS, N, false>(&mut lanes, rows, values, first_span, ahead, &factors, nested);
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

/// Adds the products of a tile of four rows and `N` vectors to their lanes. The factors are `NESTED` or made before.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_tile<const GROUPS: usize, const N: usize, const NESTED: bool>(
    lanes: &mut [[__m512; 2]; N],
    rows: Rows<'_>,
    values: [&[[i16; SPAN]]; N],
    first_span: usize,
    ahead: usize,
    factors: &Factors<N>,
    nested: &Nested,
) {
    let (a, b, c, d) = pieces(rows, first_span, TILE / GROUPS);
    for (span, (((a, b), c), d)) in (0..TILE / GROUPS).zip(a.0.iter().zip(b.0).zip(c.0).zip(d.0)) {
        let packed = [a, b, c, d];
        // The next four rows, as many bytes of them as two spans of these rows have, in the order of their addresses.
        if span.is_multiple_of(2) {
            for line in 0..ROWS {
                prefetch_second(rows[0].0, ahead + ((first_span + span) / 2 * ROWS + line) * 64);
            }
        }
        add_span::<GROUPS, N, NESTED>(lanes, packed, values, first_span + span, factors, nested, span);
    }
    // Half a span ends a row. The absmax and scales of its other half are 0, so its products change no lane.
    if GROUPS == 2 && !a.1.is_empty() {
        let (packed, span) = ([&padded(a.1), &padded(b.1), &padded(c.1), &padded(d.1)], a.0.len());
        add_span::<GROUPS, N, NESTED>(lanes, packed, values, first_span + span, factors, nested, span);
    }
}

/// Adds the products of a span of four rows and `N` vectors to their lanes. The span is one of a row, and one of a tile.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_span<const GROUPS: usize, const N: usize, const NESTED: bool>(
    lanes: &mut [[__m512; 2]; N],
    packed: [&[u8; SPAN / 2]; ROWS],
    values: [&[[i16; SPAN]]; N],
    span: usize,
    factors: &Factors<N>,
    nested: &Nested,
    span_of_tile: usize,
) {
    // Not a loop, so that the lanes stay in registers.
    add_pair::<GROUPS, N, NESTED, 0>(lanes, packed, values, span, factors, nested, span_of_tile);
    add_pair::<GROUPS, N, NESTED, 1>(lanes, packed, values, span, factors, nested, span_of_tile);
}

/// As [`add_span`], for the first or the second pair of rows.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_pair<const GROUPS: usize, const N: usize, const NESTED: bool, const PAIR: usize>(
    lanes: &mut [[__m512; 2]; N],
    packed: [&[u8; SPAN / 2]; ROWS],
    values: [&[[i16; SPAN]]; N],
    span: usize,
    factors: &Factors<N>,
    nested: &Nested,
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
        let factors = if NESTED {
            let absmax =
                spread(nested.absmax::<GROUPS>(low, span_of_tile), nested.absmax::<GROUPS>(high, span_of_tile));
            let scales = nested.scales.as_chunks::<GROUPS>().0[span_of_tile];
            _mm512_mul_ps(absmax, spread(scales, scales))
        } else {
            spread(factors[n][low].as_chunks::<GROUPS>().0[span_of_tile], factors[n][high].as_chunks().0[span_of_tile])
        };
        lanes[n][PAIR] = _mm512_add_ps(lanes[n][PAIR], _mm512_mul_ps(_mm512_cvtepi32_ps(sums), factors));
    }
}

/// A value for each lane of two rows: that of one group, or of two for the two halves of a row.
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
fn spread<const GROUPS: usize>(low: [f32; GROUPS], high: [f32; GROUPS]) -> __m512 {
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

/// The factors of the groups from `first_group` on, and 0 for the second half of a span that a row does not have.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn make_factors<const GROUPS: usize, const N: usize>(
    matrix: &Nf4Matrix<'_>,
    rows: Rows<'_>,
    scales: [&[f32]; N],
    first_group: usize,
    factors: &mut Factors<N>,
) {
    let (mut restored, mut last) = ([[0.0; TILE]; ROWS], [0.0; TILE]);
    let absmax = absmax_of_tile::<GROUPS>(matrix, rows, first_group, scales[0].len(), &mut restored);
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

/// Nested absmax of a tile of four rows, as codes, and the scales of a vector.
struct Nested {
    /// What the codes of some nested blocks stand for, and which blocks these are.
    decoded: [[f32; 256]; ROWS],
    blocks: [usize; ROWS],
    /// Of each row the place of its block.
    places: [usize; ROWS],
    codes: [[u8; TILE]; ROWS],
    scales: [f32; TILE],
}

impl Nested {
    fn new() -> Self {
        let (decoded, codes) = ([[0.0; 256]; ROWS], [[0; TILE]; ROWS]);
        Self { decoded, blocks: [usize::MAX; ROWS], places: [0; ROWS], codes, scales: [0.0; TILE] }
    }

    /// Takes a tile, if absmax is nested, and in each row of one nested block.
    #[inline(always)]
    fn set<const GROUPS: usize>(
        &mut self,
        matrix: &Nf4Matrix<'_>,
        rows: Rows<'_>,
        scales: &[f32],
        first_group: usize,
    ) -> bool {
        let Absmax::Nested(absmax) = matrix.absmax() else { return false };
        let shift = matrix.groups_per_block_log2();
        let groups = TILE.min(scales.len() - first_group);
        // Half a span needs a product of 0 for its other half.
        if GROUPS == 2 && groups < TILE {
            return false;
        }
        for (r, (_, first_block)) in rows.into_iter().enumerate() {
            let first = first_block + (first_group >> shift);
            let last = first_block + ((first_group + groups - 1) >> shift);
            if first / NESTED_BLOCK != last / NESTED_BLOCK {
                return false;
            }
            // Rows that follow each other often have one block.
            let block = first / NESTED_BLOCK;
            self.places[r] = if r > 0 && self.blocks[self.places[r - 1]] == block { self.places[r - 1] } else { r };
            if self.blocks[self.places[r]] != block {
                self.blocks[r] = block;
                self.decoded[r] = absmax.values(block);
            }
            let codes = &absmax.codes()[first..=last];
            match codes.first_chunk() {
                Some(codes) if shift == 0 => self.codes[r] = *codes,
                _ => {
                    for (group, out) in self.codes[r][..groups].iter_mut().enumerate() {
                        *out = codes[group >> shift];
                    }
                }
            }
        }
        self.scales[..groups].copy_from_slice(&scales[first_group..first_group + groups]);
        true
    }

    /// Of a row, and a span of the tile.
    #[inline(always)]
    fn absmax<const GROUPS: usize>(&self, row: usize, span: usize) -> [f32; GROUPS] {
        self.codes[row].as_chunks::<GROUPS>().0[span]
            .map(|code| self.decoded[self.places[row] % ROWS][usize::from(code)])
    }
}

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

/// The absmax of a tile of four rows: a part of the matrix if there is one for each group, else `restored`. After the end of a
/// row it is anything where no span uses it.
#[inline(always)]
fn absmax_of_tile<'a, const GROUPS: usize>(
    matrix: &Nf4Matrix<'a>,
    rows: Rows<'_>,
    first_group: usize,
    groups: usize,
    restored: &'a mut [[f32; TILE]; ROWS],
) -> [&'a [f32; TILE]; ROWS] {
    if let Absmax::Plain(absmax) = matrix.absmax()
        && matrix.groups_per_block_log2() == 0
        && (first_group + TILE <= groups || GROUPS == 1)
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
