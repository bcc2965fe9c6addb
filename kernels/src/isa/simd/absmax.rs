//! The absmax of four rows, made ahead of a loop that has rows in the lanes of its registers.
//!
//! Double-quantized ones are looked up and scaled here, four at a time, so that no loop over weights has to know of them.

use crate::absmax::{Absmax, NestedAbsmax};
use crate::format::{NESTED_BLOCK, get_or, get_range};

/// Pieces whose blocks are looked up at once, where blocks have several.
const TILE: usize = 32;

/// Writes the absmax of consecutive pieces of four rows, of which there are `1 << shift` in a block. `first` has the numbers
/// of the rows' first pieces in the tensor.
#[inline(always)]
pub(in crate::isa) fn of_rows(absmax: Absmax<'_>, first: [usize; 4], shift: u32, out: &mut [[f32; 4]]) {
    if shift == 0 {
        return of_blocks(absmax, first, out);
    }
    // Where blocks do not straddle rows, those of all rows start at the same pieces.
    let [a, b, c, d] = first;
    let inside = a & ((1 << shift) - 1);
    if ((a ^ b) | (a ^ c) | (a ^ d)) & ((1 << shift) - 1) != 0 {
        for (piece, out) in out.iter_mut().enumerate() {
            let value = |first: usize| absmax.get_inside((first + piece) >> shift);
            *out = [value(a), value(b), value(c), value(d)];
        }
        return;
    }
    let (mut block, mut inside) = (first.map(|first| first >> shift), inside);
    for out in out.chunks_mut(TILE) {
        let mut blocks = [[0.0; 4]; TILE];
        let count = ((inside + out.len() - 1) >> shift) + 1;
        of_blocks(absmax, block, &mut blocks[..count]);
        for (piece, out) in (inside..).zip(&mut *out) {
            *out = blocks[(piece >> shift) % TILE];
        }
        inside += out.len();
        block = block.map(|block| block + (inside >> shift));
        inside &= (1 << shift) - 1;
    }
}

/// [`of_rows`] with one piece in a block.
#[inline(always)]
fn of_blocks(absmax: Absmax<'_>, first: [usize; 4], out: &mut [[f32; 4]]) {
    match absmax {
        Absmax::Plain(absmax) => join(first.map(|first| get_range(absmax, first..first + out.len())), out),
        Absmax::Nested(nested) => look_up(&nested, first, out),
    }
}

/// The values of four rows side by side.
#[inline(always)]
fn join([a, b, c, d]: [&[f32]; 4], out: &mut [[f32; 4]]) {
    for ((((a, b), c), d), out) in a.iter().zip(b).zip(c).zip(d).zip(out) {
        *out = [*a, *b, *c, *d];
    }
}

/// [`of_blocks`] for double-quantized absmax.
#[inline(always)]
fn look_up(nested: &NestedAbsmax<'_>, first: [usize; 4], out: &mut [[f32; 4]]) {
    let (mut first, mut out) = (first, out);
    while !out.is_empty() {
        // Up to where a row gets to its next nested block.
        let left = first.iter().map(|first| NESTED_BLOCK - first % NESTED_BLOCK).fold(out.len(), usize::min);
        let (now, later) = out.split_at_mut(left);
        let scales = first.map(|first| get_or(nested.absmax(), first / NESTED_BLOCK, f32::NAN));
        let [a, b, c, d] = first.map(|first| get_range(nested.codes(), first..first + left));
        for ((((a, b), c), d), out) in a.iter().zip(b).zip(c).zip(d).zip(now) {
            let values = [*a, *b, *c, *d].map(|code| nested.quant_map()[usize::from(code)]);
            *out = core::array::from_fn(|row| values[row] * scales[row] + nested.offset());
        }
        (first, out) = (first.map(|first| first + left), later);
    }
}
