//! Shapes and values from the bytes of the fuzzer.

use arbitrary::Arbitrary;
use nf4::BlockSize;

use crate::generator::Generator;

/// The bytes of the fuzzer while they last, and then those of a generator that they seed: so a short input can be a
/// large matrix.
#[derive(Debug)]
pub struct Bytes<'a> {
    rest: &'a [u8],
    generator: Generator,
    word: [u8; 8],
    used: usize,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Generator").field(&self.0).finish()
    }
}

impl<'a> Bytes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        // FNV-1a
        let seed = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
        Self { rest: bytes, generator: Generator(seed), word: [0; 8], used: 8 }
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        if let Some((first, rest)) = self.rest.split_first() {
            self.rest = rest;
            return *first;
        }
        if self.used == 8 {
            self.word = self.generator.next().to_le_bytes();
            self.used = 0;
        }
        self.used += 1;
        self.word[self.used - 1]
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }
}

/// The shape of a matrix, of every kind: empty, one element, blocks that straddle rows or do not, more columns than a
/// panel of the f32 product has, more rows than a chunk of the transposed one.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Shape {
    pub rows: u16,
    pub cols: u16,
    pub block_size: u8,
    /// Odd: columns are rounded down to whole blocks.
    pub aligned: u8,
}

impl Shape {
    const MAX_COLS: usize = 2 * nf4::spec::PANEL + 130;
    const MAX_ROWS: usize = 2 * nf4::spec::ROW_CHUNK + 77;

    pub fn block_size(&self) -> BlockSize {
        BlockSize::ALL[usize::from(self.block_size) % BlockSize::ALL.len()]
    }

    /// Rows and columns of at most `elements` elements; what the fields say if that is not more.
    pub fn dimensions(&self, elements: usize) -> (usize, usize) {
        let mut cols = usize::from(self.cols) % (Self::MAX_COLS + 1).min(elements + 1);
        if self.aligned % 2 == 1 {
            cols -= cols % self.block_size().get();
        }
        let most = (elements / cols.max(1)).min(Self::MAX_ROWS);
        (usize::from(self.rows) % (most + 1), cols)
    }
}

/// One value that arithmetic treats unlike others, and where it stands: a bug may show only if all others are ordinary.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Poison {
    /// 0 modulo 8: none.
    pub kind: u8,
    pub row: u8,
    /// Index in [`EDGES`], and times eight how many columns before it.
    pub edge: u8,
    pub vector: u8,
}

/// Columns where blocks, groups, tiles and panels begin; the last stands for the end.
const EDGES: [usize; 8] = [0, 32, 64, 512, 1024, 2048, nf4::spec::PANEL, usize::MAX];

impl Poison {
    pub fn value(&self) -> Option<f32> {
        SPECIAL.get(usize::from(self.kind % 8).wrapping_sub(1)).copied()
    }

    pub fn row(&self, rows: usize) -> usize {
        usize::from(self.row) % rows
    }

    pub fn column(&self, cols: usize) -> usize {
        let edge = EDGES[usize::from(self.edge % 8)].min(cols);
        edge.checked_sub(usize::from(self.edge / 8)).unwrap_or(edge) % cols
    }

    pub fn vector(&self, batch: usize) -> usize {
        usize::from(self.vector) % batch
    }
}

/// How four bytes become a float, and values that are put in at places of their own.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Floats {
    /// The kind of all, and times eight that of one value of [`SPECIAL`] at a place of its own: the index of the first
    /// patch, modulo the number of values.
    pub kind: u8,
    /// Index and bits; nothing happens beyond the end.
    pub patches: [(u16, u32); 2],
}

/// Values that arithmetic treats unlike others.
const SPECIAL: [f32; 7] =
    [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 0.0, f32::MIN_POSITIVE, f32::from_bits(1)];

impl Floats {
    /// Any bits: what a seed writes down exactly.
    pub const BITS: Self = Self { kind: 0, patches: [(u16::MAX, 0); 2] };

    pub fn take(&self, len: usize, bytes: &mut Bytes<'_>) -> Vec<f32> {
        let mut values: Vec<f32> = (0..len).map(|_| self.convert(bytes.u32())).collect();
        for (index, bits) in self.patches {
            if let Some(value) = values.get_mut(usize::from(index)) {
                *value = f32::from_bits(bits);
            }
        }
        let place = usize::from(self.patches[0].0) % len.max(1);
        if let (Some(value), Some(special)) = (values.get_mut(place), self.special()) {
            *value = special;
        }
        values
    }

    /// The value that stands at a place of its own.
    pub fn special(&self) -> Option<f32> {
        SPECIAL.get(usize::from(self.kind / 8 % 8).wrapping_sub(1)).copied()
    }

    fn convert(&self, bits: u32) -> f32 {
        let moderate = bits.cast_signed() as f32 / (1 << 30) as f32;
        match self.kind % 8 {
            0 => f32::from_bits(bits),
            // From 2^-24 to 2^24.
            1 => f32::from_bits(bits & 0x807f_ffff | (103 + (bits >> 23) % 48) << 23),
            2 if !bits.is_multiple_of(16) => 0.0,
            3 => moderate * 1e37,
            // Subnormal.
            4 => f32::from_bits(bits & 0x807f_ffff),
            // Around the scale at which activations count as zeros, and products underflow.
            5 => moderate * 1e-35,
            _ => moderate,
        }
    }
}
