//! Tables for look-ups of single bytes: plane `p` holds byte `p` of each entry of a codebook, the lowest first.

use crate::format::CODEBOOK;
use crate::spec::{CODEBOOK_I8, CODEBOOK_I16};

/// The bytes of [`CODEBOOK`].
pub(in crate::isa) const PLANES_F32: [[u8; 16]; 4] = {
    let mut planes = [[0; 16]; 4];
    let mut k = 0;
    while k < 16 {
        [planes[0][k], planes[1][k], planes[2][k], planes[3][k]] = CODEBOOK[k].to_le_bytes();
        k += 1;
    }
    planes
};

/// The bytes of [`CODEBOOK_I16`].
pub(in crate::isa) const PLANES_I16: [[u8; 16]; 2] = {
    let mut planes = [[0; 16]; 2];
    let mut k = 0;
    while k < 16 {
        [planes[0][k], planes[1][k]] = CODEBOOK_I16[k].to_le_bytes();
        k += 1;
    }
    planes
};

/// [`CODEBOOK_I8`], larger by 128.
#[allow(dead_code, reason = "for instruction sets that multiply unsigned by signed integers")]
pub(in crate::isa) const UNSIGNED_BOOK_I8: [u8; 16] = {
    let mut book = [0; 16];
    let mut k = 0;
    while k < 16 {
        book[k] = CODEBOOK_I8[k].cast_unsigned() ^ 0x80;
        k += 1;
    }
    book
};
