//! A borrowed, checked view of a packed matrix.

use core::ops::Range;

use crate::absmax::Absmax;
use crate::error::{ShapeError, check_len};
use crate::format::{BlockSize, code_at, get_range, packed_len};
use crate::spec::{GROUP_8X8, HALF_SPAN, SPAN};

/// A borrowed matrix of NF4 weights `[rows, cols]`, row-major: packed codes and the absmax of their blocks.
///
/// The constructor checks that the parts fit each other, so operations on a view cannot read out of bounds. A view can be
/// split by rows ([`Self::row_range`], [`Self::split_at_row`]) without copying, for instance to share work among threads.
/// Blocks may straddle rows, and a row may start in the middle of a byte.
///
/// ```
/// use nf4_kernels::{Absmax, BlockSize, Nf4Matrix};
/// let (packed, absmax) = ([0x7f; 64], [1.0; 2]);
/// let m = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 2, 64, BlockSize::B64)?;
/// let (top, bottom) = m.split_at_row(1)?;
/// assert_eq!((top.rows(), bottom.rows()), (1, 1));
/// assert!(Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 2, 65, BlockSize::B64).is_err());
/// # Ok::<(), nf4_kernels::ShapeError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Nf4Matrix<'a> {
    packed: &'a [u8],
    absmax: Absmax<'a>,
    /// First row of this view in the tensor that `packed` and `absmax` hold.
    first_row: usize,
    rows: usize,
    cols: usize,
    block_size: BlockSize,
}

impl<'a> Nf4Matrix<'a> {
    /// A view of weights `[rows, cols]`.
    ///
    /// # Errors
    /// [`ShapeError::Overflow`] if `rows * cols` does not fit in `usize`; [`ShapeError::Length`] if `packed` does not
    /// have `ceil(rows * cols / 2)` bytes or `absmax` not one entry for each block that the matrix touches.
    pub fn new(
        packed: &'a [u8],
        absmax: Absmax<'a>,
        rows: usize,
        cols: usize,
        block_size: BlockSize,
    ) -> Result<Self, ShapeError> {
        let elements = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
        check_len("packed codes", packed_len(elements), packed.len())?;
        check_len("absmax", block_size.blocks(elements), absmax.len())?;
        Ok(Self { packed, absmax, first_row: 0, rows, cols, block_size })
    }

    /// Number of rows (outputs).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The number of weights in a block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// The scales of the whole tensor, of which this view is a part.
    #[must_use]
    pub fn absmax(&self) -> Absmax<'a> {
        self.absmax
    }

    /// A view of some of the rows.
    ///
    /// # Errors
    /// [`ShapeError::Rows`] if `range` does not lie in `0..self.rows()`.
    pub fn row_range(&self, range: Range<usize>) -> Result<Self, ShapeError> {
        let Range { start, end } = range;
        if start > end || end > self.rows {
            return Err(ShapeError::Rows { start, end, rows: self.rows });
        }
        Ok(Self { first_row: self.first_row + start, rows: end - start, ..*self })
    }

    /// Views of the rows before `row` and of the rows from `row` on.
    ///
    /// # Errors
    /// [`ShapeError::Rows`] if `row > self.rows()`.
    pub fn split_at_row(&self, row: usize) -> Result<(Self, Self), ShapeError> {
        Ok((self.row_range(0..row)?, self.row_range(row..self.rows)?))
    }

    /// Whether every row starts at the start of a block, so that no two rows share a byte or a block. Otherwise blocks
    /// straddle rows (or the last one is partial), and the 16x4 product is the f32 product; unless the number of columns is
    /// a multiple of 32, both run portable code.
    #[must_use]
    pub fn is_row_aligned(&self) -> bool {
        self.cols.is_multiple_of(self.block_size.get())
    }

    /// Whether every row consists of whole groups of the 8x8 product, which are halves of spans. Then each group lies in one
    /// block and shares no byte with others, even if blocks straddle rows.
    #[inline(always)]
    pub(crate) fn has_whole_groups(&self) -> bool {
        self.cols.is_multiple_of(GROUP_8X8)
    }

    /// The packed bytes and absmax of the halves of spans of a row from one on, where [`Self::has_whole_groups`].
    #[allow(dead_code, reason = "only instruction sets with vectors take several columns at once")]
    #[inline(always)]
    pub(crate) fn halves(&self, row: usize, first: usize) -> impl Iterator<Item = (&'a [u8; HALF_SPAN / 2], f32)> {
        let (matrix, (packed, group)) = (*self, self.grouped_row(row));
        let packed = packed.as_chunks().0.iter().enumerate().skip(first);
        packed.map(move |(half, packed)| (packed, matrix.absmax_of_group_8x8(group + half)))
    }

    /// Flat index, in the whole tensor, of the first element of `row`.
    #[inline(always)]
    pub(crate) fn row_start(&self, row: usize) -> usize {
        (self.first_row + row) * self.cols
    }

    /// Packed bytes and index of the first block of a row of a row-aligned matrix.
    #[inline(always)]
    pub(crate) fn aligned_row(&self, row: usize) -> (&'a [u8], usize) {
        let start = self.row_start(row);
        (get_range(self.packed, start / 2..(start + self.cols) / 2), start >> self.block_size.get().trailing_zeros())
    }

    /// The absmax of an activation group of an aligned row, whose blocks start at `first_block`.
    #[inline(always)]
    pub(crate) fn absmax_of_group(&self, first_block: usize, group: usize) -> f32 {
        self.absmax.get_inside(first_block + (group >> self.groups_per_block_log2()))
    }

    /// The absmax of `N` activation groups of an aligned row from `first_group` on, which is the first group of a block. The
    /// blocks of the row start at `first_block`.
    #[allow(dead_code, reason = "only instruction sets with vectors take several at once")]
    #[inline(always)]
    pub(crate) fn group_absmax<const N: usize>(&self, first_block: usize, first_group: usize) -> [f32; N] {
        let shift = self.groups_per_block_log2();
        let first = first_block + (first_group >> shift);
        if shift == 0 {
            self.absmax.get_array(first)
        } else {
            core::array::from_fn(|i| self.absmax.get_inside(first + (i >> shift)))
        }
    }

    /// Like [`Self::group_absmax`], for any number of groups.
    #[allow(dead_code, reason = "only instruction sets with vectors take several at once")]
    #[inline(always)]
    pub(crate) fn group_absmax_rest(&self, first_block: usize, first_group: usize, out: &mut [f32]) {
        let shift = self.groups_per_block_log2();
        if let (Absmax::Plain(absmax), 0) = (self.absmax, shift) {
            let first = first_block + first_group;
            let absmax = get_range(absmax, first..first + out.len());
            return out.iter_mut().zip(absmax).for_each(|(o, absmax)| *o = *absmax);
        }
        for (group, o) in (first_group..).zip(out) {
            *o = self.absmax.get_inside(first_block + (group >> shift));
        }
    }

    /// Packed bytes of a row, and the number in the tensor of its first group of `SPAN / GROUPS` columns, each of which lies
    /// in one block.
    #[allow(dead_code, reason = "only instruction sets with vectors take several columns at once")]
    #[inline(always)]
    pub(crate) fn span_row<const GROUPS: usize>(&self, row: usize) -> (&'a [u8], usize) {
        let start = self.row_start(row);
        (get_range(self.packed, start / 2..(start + self.cols) / 2), start / (SPAN / GROUPS))
    }

    /// The absmax of `N` groups of `SPAN / GROUPS` columns, by the number of the first in the tensor.
    #[allow(dead_code, reason = "only instruction sets with vectors take several columns at once")]
    #[inline(always)]
    pub(crate) fn span_absmax<const GROUPS: usize, const N: usize>(&self, first: usize) -> [f32; N] {
        let shift = self.block_size.get().trailing_zeros() - (SPAN / GROUPS).trailing_zeros();
        if shift == 0 {
            self.absmax.get_array(first)
        } else {
            core::array::from_fn(|i| self.absmax.get_inside((first + i) >> shift))
        }
    }

    /// As [`Self::span_absmax`], for any number of groups.
    #[allow(dead_code, reason = "only instruction sets with vectors take several columns at once")]
    #[inline(always)]
    pub(crate) fn span_absmax_rest<const GROUPS: usize>(&self, first: usize, out: &mut [f32]) {
        let shift = self.block_size.get().trailing_zeros() - (SPAN / GROUPS).trailing_zeros();
        for (group, o) in (first..).zip(out) {
            *o = self.absmax.get_inside(group >> shift);
        }
    }

    /// The rows of an aligned matrix that has columns: packed bytes and the range of their blocks.
    #[allow(dead_code, reason = "only instruction sets with vectors take a row at once")]
    #[inline(always)]
    pub(crate) fn aligned_rows(&self) -> impl Iterator<Item = (&'a [u8], Range<usize>)> {
        let bytes = self.row_start(0) / 2..self.row_start(self.rows) / 2;
        let packed = get_range(self.packed, bytes).chunks_exact((self.cols / 2).max(1));
        let blocks = self.cols >> self.block_size.get().trailing_zeros();
        let mut start = self.row_start(0) >> self.block_size.get().trailing_zeros();
        packed.map(move |packed| {
            let range = start..start + blocks;
            start = range.end;
            (packed, range)
        })
    }

    /// Packed bytes of a row of whole groups of the 8x8 product, and the number of its first group in the tensor.
    #[inline(always)]
    pub(crate) fn grouped_row(&self, row: usize) -> (&'a [u8], usize) {
        let start = self.row_start(row);
        (get_range(self.packed, start / 2..(start + self.cols) / 2), start / GROUP_8X8)
    }

    /// The absmax of consecutive groups of the 8x8 product, of which the first has the number `first` in the tensor.
    #[allow(dead_code, reason = "only instruction sets with vectors take several at once")]
    #[inline(always)]
    pub(crate) fn fill_absmax_8x8(&self, first: usize, out: &mut [f32]) {
        let shift = self.groups_8x8_per_block_log2();
        match self.absmax {
            Absmax::Plain(absmax) if shift == 0 => {
                out.copy_from_slice(get_range(absmax, first..first + out.len()));
            }
            Absmax::Plain(absmax) if shift == 1 && first.is_multiple_of(2) => {
                let blocks = get_range(absmax, first / 2..first / 2 + out.len().div_ceil(2));
                let (pairs, half) = out.as_chunks_mut::<2>();
                pairs.iter_mut().zip(blocks).for_each(|(pair, absmax)| *pair = [*absmax; 2]);
                half.iter_mut().zip(blocks.last()).for_each(|(half, absmax)| *half = *absmax);
            }
            absmax => {
                for (group, out) in (first..).zip(out) {
                    *out = absmax.get_inside(group >> shift);
                }
            }
        }
    }

    /// The absmax of a group of the 8x8 product, by its number in the tensor.
    #[inline(always)]
    pub(crate) fn absmax_of_group_8x8(&self, group: usize) -> f32 {
        self.absmax.get_inside(group >> self.groups_8x8_per_block_log2())
    }

    #[inline(always)]
    pub(crate) fn groups_8x8_per_block_log2(&self) -> u32 {
        self.block_size.get().trailing_zeros() - GROUP_8X8.trailing_zeros()
    }

    #[inline(always)]
    pub(crate) fn groups_per_block_log2(&self) -> u32 {
        self.block_size.get().trailing_zeros() - self.block_size.activation_group().trailing_zeros()
    }

    /// The code of element `index` of the whole tensor.
    #[inline(always)]
    pub(crate) fn code(&self, index: usize) -> usize {
        code_at(self.packed, index)
    }

    /// Splits the flat elements `start..end` of the whole tensor at block boundaries.
    #[inline(always)]
    pub(crate) fn segments(&self, start: usize, end: usize) -> Segments<'a> {
        Segments { matrix: *self, next: start, end }
    }

    /// All elements of this view, split at block boundaries.
    #[inline(always)]
    pub(crate) fn all_segments(&self) -> Segments<'a> {
        self.segments(self.row_start(0), self.row_start(self.rows))
    }
}

/// Consecutive elements of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment<'a> {
    /// Flat index of the first element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
    /// Scale of the block.
    pub absmax: f32,
    /// The packed bytes, if this is a whole block, which always starts on a byte boundary.
    #[allow(dead_code, reason = "only instruction sets with vectors take a block at once")]
    pub whole: Option<&'a [u8]>,
}

/// Iterator over [`Segment`]s.
#[derive(Debug, Clone)]
pub(crate) struct Segments<'a> {
    matrix: Nf4Matrix<'a>,
    next: usize,
    end: usize,
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Segment<'a>> {
        if self.next >= self.end {
            return None;
        }
        // A power of two, so shifts and masks replace a division per block.
        let size = self.matrix.block_size.get();
        let (start, block) = (self.next, self.next >> size.trailing_zeros());
        let len = (size - (start & (size - 1))).min(self.end - start);
        self.next = start + len;
        let whole = (len == size).then(|| get_range(self.matrix.packed, start / 2..(start + len) / 2));
        Some(Segment { start, len, absmax: self.matrix.absmax.get_inside(block), whole })
    }
}
