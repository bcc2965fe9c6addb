//! Packed codes to the 16-bit weights of the 16x4 product, by `vpermw`: it looks sixteen or thirty-two words up in a
//! register, and takes from each only the lowest bits. So nothing has to clear the rest of an index, and no weight is
//! looked up as two bytes.

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::registers::*;
use crate::spec::{CODEBOOK_I16, SPAN};

/// The codebook twice, because `vpermw` takes five bits and a code has four.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn codebook() -> __m512i {
    const TWICE: [i16; 32] = {
        let mut twice = [0; 32];
        let mut k = 0;
        while k < 32 {
            twice[k] = CODEBOOK_I16[k % 16];
            k += 1;
        }
        twice
    };
    load_i16(&TWICE)
}

/// The weights of a span, in the order of the activations.
///
/// ```text
/// low  = unpacklo(bytes, bytes)     words b0 b0, b1 b1, .. b7 b7 of each 128 bits
/// high = unpackhi(bytes, bytes)           b8 b8, .. b15 b15
/// BOOK[low >> 4], BOOK[high >> 4]   even columns: 0 2 .. 14 and 16 18 .. 30 of each 128 bits
/// BOOK[low], BOOK[high]             odd columns
/// ```
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
pub(super) fn look_up_columns(packed: &[u8; SPAN / 2], book: __m256i) -> [__m256i; 4] {
    let packed = must_cast(*packed);
    let (low, high) = (_mm256_unpacklo_epi8(packed, packed), _mm256_unpackhi_epi8(packed, packed));
    [_mm256_srli_epi16::<4>(low), _mm256_srli_epi16::<4>(high), low, high]
        .map(|index| _mm256_permutexvar_epi16(index, book))
}

/// The eight 32-bit words of a span of sixteen rows: word `i` of the result has that of row `r` in lane `r`.
///
/// ```text
/// pairs      rows 0 4 | 1 5 | 2 6 | 3 7       and 8 12 | 9 13 | 10 14 | 11 15, a half each
/// unpack     twice: words i and i + 4 of rows 0-3, 4-7       and of 8-11, 12-15
/// shuffle    word i of rows 0-15
/// ```
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose(rows: [&[u8; 32]; 16]) -> [__m512i; 8] {
    let eight = |rows: &[&[u8; 32]]| {
        let pairs: [__m512i; 4] = core::array::from_fn(|r| two_spans(rows[r], rows[r + 4]));
        let [low_01, low_23] = [0, 2].map(|r| _mm512_unpacklo_epi32(pairs[r], pairs[r + 1]));
        let [high_01, high_23] = [0, 2].map(|r| _mm512_unpackhi_epi32(pairs[r], pairs[r + 1]));
        [
            _mm512_unpacklo_epi64(low_01, low_23),
            _mm512_unpackhi_epi64(low_01, low_23),
            _mm512_unpacklo_epi64(high_01, high_23),
            _mm512_unpackhi_epi64(high_01, high_23),
        ]
    };
    let (above, below) = (eight(&rows[..8]), eight(&rows[8..]));
    core::array::from_fn(|i| {
        let (above, below) = (above[i % 4], below[i % 4]);
        // Quarters 0 and 2 of both, or 1 and 3.
        if i < 4 { _mm512_shuffle_i32x4::<0x88>(above, below) } else { _mm512_shuffle_i32x4::<0xdd>(above, below) }
    })
}

/// The weights of two bytes of each row, which are the low or the high half of a 32-bit word: of the even columns, and
/// of the odd ones.
#[target_feature(enable = "avx512bw")]
#[inline]
pub(super) fn look_up_rows<const HIGH: bool>(words: __m512i, book: __m512i) -> [__m512i; 2] {
    // b0 b0 b1 b1, or b2 b2 b3 b3, of each word.
    let twice = if HIGH {
        _mm512_set4_epi32(0x0f0f_0e0e, 0x0b0b_0a0a, 0x0707_0606, 0x0303_0202)
    } else {
        _mm512_set4_epi32(0x0d0d_0c0c, 0x0909_0808, 0x0505_0404, 0x0101_0000)
    };
    let index = _mm512_shuffle_epi8(words, twice);
    [_mm512_srli_epi16::<4>(index), index].map(|index| _mm512_permutexvar_epi16(index, book))
}
