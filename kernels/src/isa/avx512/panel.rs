//! The 16x4 product of a batch: rows in the lanes of a register.
//!
//! A register holds one of a row's eight lanes, of sixteen rows. So the activations that meet it are two columns, the
//! same for all its rows, and are broadcast by the load; the factors of its rows are one product of a register with a
//! scale, for all lanes of a span; and the lanes of a row meet in additions of whole registers.
//!
//! The weights of thirty-two rows and some spans are decoded into a panel, once for many vectors. Each load then has
//! two uses: two registers of rows meet two vectors. As their sixty-four lanes do not fit into registers, a pass over
//! the panel takes one half of each span, which has lanes 0-3 or 4-7.

use core::arch::x86_64::*;

use super::codes::{codebook, look_up_rows, transpose};
use super::registers::*;
use crate::activations::Activations;
use crate::isa::avx2;
use crate::isa::simd::product_16x4::padded;
use crate::matrix::Nf4Matrix;
use crate::spec::{SPAN, WEIGHT_STEP};

/// Rows of a register.
const LANES: usize = 16;
/// Rows of a panel: two registers.
pub(super) const ROWS: usize = 2 * LANES;
/// Spans of a panel. The weights of a half of them, 16 KB, stay in the nearest cache.
const SPANS: usize = 8;
/// Vectors that share a panel: 64 KB of lanes.
const VECTORS: usize = 64;

/// An f32 of each row of a panel.
type Rows = [[f32; LANES]; 2];

/// Lanes of a vector: of each half of a span four.
type Lanes = [[Rows; 4]; 2];

/// Decoded weights, and the absmax of their groups: in each span of one, or of one for each half.
#[repr(align(64))]
struct Panel {
    /// Of each half, span and lane the four pairs of columns, as `SLOTS` has them. A pair of a row stands together.
    weights: [[[[[[i16; 2 * LANES]; 2]; 4]; 4]; SPANS]; 2],
    absmax: [[Rows; SPANS]; 2],
}

/// The lanes of a tile of vectors.
#[repr(align(64))]
struct Tile([Lanes; VECTORS]);

/// The products of a row-aligned matrix and a batch.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    if activations.group() == SPAN {
        multiply::<1>(matrix, activations, out);
    } else {
        multiply::<2>(matrix, activations, out);
    }
}

/// [`gemm`] with `GROUPS` activation groups in a span.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn multiply<const GROUPS: usize>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let batch = activations.batch();
    let mut panel =
        Panel { weights: [[[[[[0; 2 * LANES]; 2]; 4]; 4]; SPANS]; 2], absmax: [[[[0.0; LANES]; 2]; SPANS]; 2] };
    let mut tile = Tile([[[[[0.0; LANES]; 2]; 4]; 2]; VECTORS]);
    for (first_row, out) in (0..).step_by(ROWS).zip(out.chunks_mut(ROWS * batch)) {
        for first in (0..batch).step_by(VECTORS) {
            let lanes = &mut tile.0[..(batch - first).min(VECTORS)];
            lanes.fill([[[[0.0; LANES]; 2]; 4]; 2]);
            for first_span in (0..matrix.cols().div_ceil(SPAN)).step_by(SPANS) {
                fill_panel::<GROUPS>(&mut panel, matrix, first_row, first_span);
                let pieces = Pieces::<GROUPS>::new(activations, first, first_span);
                add_half::<GROUPS, 0>(&panel, &pieces, lanes);
                add_half::<GROUPS, 1>(&panel, &pieces, lanes);
            }
            for (vector, lanes) in (first..).zip(lanes) {
                for (out, y) in out.chunks_exact_mut(batch).zip(results(lanes).as_flattened()) {
                    out[vector] = *y;
                }
            }
        }
    }
}

/// Decodes the spans from `first_span` on, as many as there are.
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
fn fill_panel<const GROUPS: usize>(panel: &mut Panel, matrix: &Nf4Matrix<'_>, first_row: usize, first_span: usize) {
    // The same columns of the next panel.
    let ahead = if first_row + 2 * ROWS <= matrix.rows() { ROWS * matrix.cols() / 2 } else { 0 };
    for register in 0..2 {
        let rows = rows_of_register(matrix, first_row + register * LANES);
        for eight in 0..GROUPS {
            let absmax = eight_absmax(matrix, &rows, first_span * GROUPS + 8 * eight, matrix.cols() / (SPAN / GROUPS));
            for (i, absmax) in transpose(absmax.each_ref()).into_iter().enumerate() {
                let group = 8 * eight + i;
                store_f32(&mut panel.absmax[group % GROUPS][group / GROUPS][register], _mm512_castsi512_ps(absmax));
            }
        }
        let (whole, halves) = pieces(&rows, first_span);
        for span in 0..whole[0].len() {
            if span.is_multiple_of(2) {
                for row in whole {
                    avx2::prefetch(&row[span], ahead);
                }
            }
            decode_span(panel, span, register, spans(&whole, span));
        }
        if !halves[0].is_empty() {
            decode_span(panel, whole[0].len(), register, halves.map(padded).each_ref());
        }
    }
}

/// Decodes a span of the rows of a register.
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
fn decode_span(panel: &mut Panel, span: usize, register: usize, packed: [&[u8; SPAN / 2]; LANES]) {
    let book = codebook();
    // Each word has two lanes. Words 0 and 1 have columns 0-15 of lanes 0-3, words 2 and 3 the other columns of the
    // same lanes; then come lanes 4-7.
    for (i, words) in transpose(packed).into_iter().enumerate() {
        let (half, part, lane) = (i / 4, i / 2 % 2, i % 2 * 2);
        let weights = &mut panel.weights[half][span];
        for (lane, [even, odd]) in (lane..).zip([look_up_rows::<false>(words, book), look_up_rows::<true>(words, book)])
        {
            store_i16(&mut weights[lane][part][register], even);
            store_i16(&mut weights[lane][2 + part][register], odd);
        }
    }
}

// What follows has no features of its own, so that its closures are inlined: the compiler does not inline one with
// features into the function of the standard library that calls it.

/// Packed bytes and first block of the rows of a register. Where there are less, the last row stands in for those that are
/// missing.
#[inline(always)]
fn rows_of_register<'a>(matrix: &Nf4Matrix<'a>, first_row: usize) -> [(&'a [u8], usize); LANES] {
    core::array::from_fn(|r| matrix.aligned_row((matrix.rows() - 1).min(first_row + r)))
}

/// The absmax of eight groups of each row, as bytes, and 0 after the end of a row.
#[inline(always)]
fn eight_absmax(
    matrix: &Nf4Matrix<'_>,
    rows: &[(&[u8], usize); LANES],
    first_group: usize,
    groups: usize,
) -> [[u8; 32]; LANES] {
    rows.map(|(_, first_block)| {
        let mut absmax = [0.0_f32; 8];
        if first_group + 8 <= groups {
            absmax = matrix.group_absmax(first_block, first_group);
        } else if first_group < groups {
            matrix.group_absmax_rest(first_block, first_group, &mut absmax[..groups - first_group]);
        }
        bytemuck::must_cast(absmax)
    })
}

/// The whole spans of a panel of each row, and the bytes of half a span if one follows.
#[inline(always)]
fn pieces<'a>(
    rows: &[(&'a [u8], usize); LANES],
    first_span: usize,
) -> ([&'a [[u8; SPAN / 2]]; LANES], [&'a [u8]; LANES]) {
    let start = first_span * SPAN / 2;
    let pieces = rows.map(|(row, _)| row[start..row.len().min(start + SPANS * SPAN / 2)].as_chunks());
    (pieces.map(|(whole, _)| whole), pieces.map(|(_, half)| half))
}

/// A span of each row.
#[inline(always)]
fn spans<'a>(whole: &[&'a [[u8; SPAN / 2]]; LANES], span: usize) -> [&'a [u8; SPAN / 2]; LANES] {
    whole.map(|row| &row[span])
}

/// What a panel needs of the vectors from one on.
struct Pieces<'a, const GROUPS: usize> {
    values: &'a [i16],
    scales: &'a [f32],
    /// Of each vector.
    values_len: usize,
    scales_len: usize,
    first_span: usize,
}

impl<'a, const GROUPS: usize> Pieces<'a, GROUPS> {
    fn new(activations: &Activations<'a>, first: usize, first_span: usize) -> Self {
        let (values, scales) = (activations.values(), activations.scales());
        let (values_len, scales_len) = (values.len() / activations.batch(), scales.len() / activations.batch());
        let (values, scales) = (&values[first * values_len..], &scales[first * scales_len..]);
        Self { values, scales, values_len, scales_len, first_span }
    }

    /// The spans of a vector, and the scales of their groups.
    #[inline(always)]
    fn get(&self, vector: usize) -> (&'a [[i16; SPAN]], &'a [f32]) {
        let values = &self.values[vector * self.values_len..][..self.values_len];
        let scales = &self.scales[vector * self.scales_len..][..self.scales_len];
        let spans = &values.as_chunks().0[self.first_span..];
        let scales = &scales[self.first_span * GROUPS..];
        (&spans[..spans.len().min(SPANS)], &scales[..scales.len().min(SPANS * GROUPS)])
    }
}

/// Adds the products of a half of each span of the panel to the lanes of the vectors.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn add_half<const GROUPS: usize, const HALF: usize>(panel: &Panel, pieces: &Pieces<'_, GROUPS>, lanes: &mut [Lanes]) {
    let vectors = lanes.len();
    let ahead = 2 * pieces.values_len * size_of::<i16>();
    let (pairs, rest) = lanes.as_chunks_mut::<2>();
    for (i, lanes) in pairs.iter_mut().enumerate() {
        add_vectors::<GROUPS, HALF, 2>(panel, [pieces.get(2 * i), pieces.get(2 * i + 1)], lanes, ahead);
    }
    for lanes in rest {
        add_vectors::<GROUPS, HALF, 1>(panel, [pieces.get(vectors - 1)], core::array::from_mut(lanes), 0);
    }
}

/// Adds the products of a half of each span of the panel to the lanes of `V` vectors. `ahead` is the way from the values
/// of these vectors to those of the next, in bytes.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_vectors<const GROUPS: usize, const HALF: usize, const V: usize>(
    panel: &Panel,
    vectors: [(&[[i16; SPAN]], &[f32]); V],
    lanes: &mut [Lanes; V],
    ahead: usize,
) {
    let mut sums = [[[_mm512_setzero_ps(); 2]; 4]; V];
    for (sums, lanes) in sums.iter_mut().zip(&*lanes) {
        for (sum, lanes) in sums.as_flattened_mut().iter_mut().zip(lanes[HALF].as_flattened()) {
            *sum = load_f32(lanes);
        }
    }
    // Half a span, at the end of a row, has no group for its second half.
    let groups = vectors[0].1.len();
    let spans = if GROUPS == 2 && HALF == 1 { groups / 2 } else { groups.div_ceil(GROUPS) };
    for (span, (weights, absmax)) in
        panel.weights[HALF].iter().zip(&panel.absmax[HALF * (GROUPS - 1)]).enumerate().take(spans)
    {
        let values: [&[i16; SPAN]; V] = core::array::from_fn(|v| &vectors[v].0[span]);
        let mut factors = [[_mm512_setzero_ps(); 2]; V];
        for v in 0..V {
            prefetch_i16(values[v], ahead);
            let scale = _mm512_set1_ps(vectors[v].1[span * GROUPS + HALF * (GROUPS - 1)]);
            for register in 0..2 {
                factors[v][register] = _mm512_mul_ps(load_f32(&absmax[register]), scale);
            }
        }
        // Not a loop, so that the sums stay in registers.
        macro_rules! lane {
            ($lane:literal) => {
                let mut products = [[_mm512_setzero_si512(); 2]; V];
                for part in 0..4 {
                    let mut pairs = [_mm512_setzero_si512(); V];
                    for v in 0..V {
                        pairs[v] = broadcast_pair(values[v], 8 * part + 4 * HALF + $lane);
                    }
                    for register in 0..2 {
                        let weights = load_i16(&weights[$lane][part][register]);
                        for v in 0..V {
                            products[v][register] = if part == 0 {
                                _mm512_madd_epi16(weights, pairs[v])
                            } else {
                                add_products(products[v][register], weights, pairs[v])
                            };
                        }
                    }
                }
                for v in 0..V {
                    for register in 0..2 {
                        let product = _mm512_mul_ps(_mm512_cvtepi32_ps(products[v][register]), factors[v][register]);
                        sums[v][$lane][register] = _mm512_add_ps(sums[v][$lane][register], product);
                    }
                }
            };
        }
        lane!(0);
        lane!(1);
        lane!(2);
        lane!(3);
    }
    for (lanes, sums) in lanes.iter_mut().zip(sums) {
        for (lanes, sums) in lanes[HALF].as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            store_f32(lanes, *sums);
        }
    }
}

/// Prefetches the span `ahead` bytes after this one.
#[inline(always)]
fn prefetch_i16(values: &[i16; SPAN], ahead: usize) {
    for line in values.as_chunks::<32>().0 {
        avx2::prefetch(bytemuck::bytes_of(line), ahead);
    }
}

/// The outputs of the rows of a panel: the sums of their lanes in the order of [`crate::spec::add_lanes`].
#[target_feature(enable = "avx512f")]
#[inline]
fn results(lanes: &Lanes) -> Rows {
    let mut out = [[0.0; LANES]; 2];
    for (register, out) in out.iter_mut().enumerate() {
        let mut t = [_mm512_setzero_ps(); 4];
        for (i, t) in t.iter_mut().enumerate() {
            *t = _mm512_add_ps(load_f32(&lanes[0][i][register]), load_f32(&lanes[1][i][register]));
        }
        let sum = _mm512_add_ps(_mm512_add_ps(t[0], t[2]), _mm512_add_ps(t[1], t[3]));
        let y = _mm512_mul_ps(sum, _mm512_set1_ps(WEIGHT_STEP));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(y, y);
        store_f32(out, _mm512_mask_blend_ps(nan, y, _mm512_set1_ps(f32::NAN)));
    }
    out
}
