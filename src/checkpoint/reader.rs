//! A reader that computes the bytes of a tensor of a merged model in parts.

use alloc::borrow::{Cow, ToOwned};
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;

use super::error::CheckpointError;
use super::float::FloatType;
use super::header::tensor_bytes;
use super::linear4bit::Linear4bit;
use super::low_rank::LowRank;
use super::peft::{AdaptedTokens, PeftAdapter};
use super::plan::{Change, Origin, Planned};
use super::read::{bytes_in, extend_floats, float_type, info_of, make_room, with_room};
use super::source::TensorSource;
use crate::Quantized4Bit;

/// Rows whose values are held at a time where all of a tensor has to be gone through.
const ROWS: usize = 64;

/// A tensor of a [`MergedModel`](super::MergedModel) that is computed in parts, so that it is never in memory as a whole.
///
/// It has [`Self::units`] units of [`Self::unit_bytes`] bytes, which can be read in any order and by any number of threads.
pub struct TensorReader<'a> {
    name: &'a str,
    origin: Values<'a>,
    matrix: [usize; 2],
    to: Dtype,
    way: Way<'a>,
    allows_overflow: bool,
}

/// Where values come from.
enum Values<'a> {
    Plain { source: &'a dyn TensorSource, tensor: &'a str, dtype: Dtype, len: usize },
    Packed(Quantized4Bit),
}

/// What is done to them.
enum Way<'a> {
    /// Bytes are copied.
    Copy,
    /// Values are converted.
    Convert(FloatType),
    /// Rows are computed; `transposed` once all are there.
    Rows { float: FloatType, steps: Vec<Step<'a>>, transposed: bool },
}

enum Step<'a> {
    LowRank(LowRank<'a>),
    Tokens(&'a AdaptedTokens),
}

impl core::fmt::Debug for TensorReader<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("TensorReader").field("name", &self.name).field("matrix", &self.matrix).finish_non_exhaustive()
    }
}

impl<'a> TensorReader<'a> {
    pub(super) fn new(
        name: &'a str,
        planned: &'a Planned,
        source: &'a dyn TensorSource,
        adapter: Option<&'a PeftAdapter>,
        allows_overflow: bool,
    ) -> Result<Self, CheckpointError> {
        let (to, matrix) = (planned.info.dtype, planned.matrix);
        let adapter = || adapter.ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() });
        let plain = |source: &'a dyn TensorSource, tensor: &'a str| {
            let info = info_of(source, tensor)?;
            let len = tensor_bytes(tensor, info.dtype, &info.shape)?;
            Ok(Values::Plain { source, tensor, dtype: info.dtype, len })
        };
        let origin = match &planned.origin {
            Origin::Base(tensor) => plain(source, tensor)?,
            Origin::Replaced(tensor) => plain(adapter()?.replaced(), tensor)?,
            Origin::AdapterBase(tensor) => plain(adapter()?.bases(), tensor)?,
            Origin::Packed(tensor) => Values::Packed(Linear4bit::load_tensor(source, tensor)?.into_parts().0),
            Origin::AdapterPacked(tensor) => {
                Values::Packed(Linear4bit::load_tensor(adapter()?.bases(), tensor)?.into_parts().0)
            }
        };
        let step = |change: &'a Change| match change {
            Change::LowRank { rows, pair } => LowRank::new(adapter()?, pair, rows.clone()).map(Step::LowRank),
            Change::Tokens { module } => {
                let tokens = adapter()?.tokens().get(module);
                tokens.map(Step::Tokens).ok_or_else(|| CheckpointError::Missing { tensor: module.clone() })
            }
        };
        let way = match &origin {
            Values::Plain { dtype, .. } if planned.changes.is_empty() && *dtype == to => Way::Copy,
            Values::Plain { .. } if planned.changes.is_empty() => Way::Convert(float_type(name, to)?),
            _ => Way::Rows {
                float: float_type(name, to)?,
                steps: planned.changes.iter().map(step).collect::<Result<_, CheckpointError>>()?,
                transposed: planned.transposed,
            },
        };
        let mut reader = Self { name, origin, matrix, to, way, allows_overflow };
        reader.take_norms()?;
        Ok(reader)
    }

    /// The number of units: bytes, values, rows, or a single one for the whole tensor.
    #[must_use]
    pub fn units(&self) -> usize {
        let [rows, cols] = self.matrix;
        match (&self.way, &self.origin) {
            (Way::Copy, Values::Plain { len, .. }) => *len,
            (Way::Convert(_), Values::Plain { len, dtype, .. }) => len / (dtype.bitsize() / 8).max(1),
            (Way::Rows { transposed: true, .. }, _) => usize::from(rows.min(cols) > 0),
            // Rows without columns have no bytes, and so there may be any number of them.
            _ if cols == 0 => 0,
            _ => rows,
        }
    }

    /// Bytes of a unit.
    #[must_use]
    pub fn unit_bytes(&self) -> usize {
        let [rows, cols] = self.matrix;
        match &self.way {
            Way::Copy => 1,
            Way::Convert(float) => float.size(),
            Way::Rows { float, transposed: true, .. } => rows.saturating_mul(cols).saturating_mul(float.size()),
            Way::Rows { float, .. } => cols.saturating_mul(float.size()),
        }
    }

    /// Appends the bytes of some units.
    ///
    /// # Errors
    /// What the source returns; [`CheckpointError::Bytes`] if there are no such units; [`CheckpointError::TooLarge`] for a
    /// finite value that is infinite in the type of the tensor, unless [`MergeOptions::with_overflow`] allows it;
    /// [`CheckpointError::Memory`].
    ///
    /// [`MergeOptions::with_overflow`]: super::MergeOptions::with_overflow
    pub fn read(&self, units: Range<usize>, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        if units.start > units.end || units.end > self.units() {
            let (expected, got) = (units.end as u64, self.units() as u64);
            return Err(CheckpointError::Bytes { what: self.name.to_owned(), expected, got });
        }
        make_room(self.name, out, units.len().saturating_mul(self.unit_bytes()))?;
        match &self.way {
            Way::Copy => {
                out.extend_from_slice(&self.bytes(units)?);
                Ok(())
            }
            Way::Convert(float) => {
                let size = self.value_size();
                let bytes = self.bytes(units.start * size..units.end * size)?;
                let mut values = Vec::new();
                extend_floats(self.name, self.dtype(), &bytes, &mut values)?;
                self.encode(*float, &values, units.start, out)
            }
            Way::Rows { float, transposed: true, .. } => {
                let mut values = with_room(self.name, self.matrix[0].saturating_mul(self.matrix[1]))?;
                self.transpose(&mut values)?;
                self.encode(*float, &values, 0, out)
            }
            Way::Rows { float, .. } => {
                let mut values = Vec::new();
                self.compute(units.clone(), &mut values)?;
                self.encode(*float, &values, units.start * self.matrix[1], out)
            }
        }
    }

    /// The type of the origin, if it is plain.
    fn dtype(&self) -> Dtype {
        match &self.origin {
            Values::Plain { dtype, .. } => *dtype,
            Values::Packed(_) => Dtype::U8,
        }
    }

    fn value_size(&self) -> usize {
        self.dtype().bitsize() / 8
    }

    fn bytes(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        match &self.origin {
            Values::Plain { source, tensor, .. } => bytes_in(*source, tensor, range),
            Values::Packed(weight) => Ok(Cow::Borrowed(&weight.packed()[range])),
        }
    }

    /// The values of some rows of the origin, in `values`, which is cleared first.
    fn origin_rows(&self, rows: Range<usize>, values: &mut Vec<f32>) -> Result<(), CheckpointError> {
        values.clear();
        let cols = self.matrix[1];
        match &self.origin {
            Values::Plain { dtype, .. } => {
                let size = cols * self.value_size();
                extend_floats(self.name, *dtype, &self.bytes(rows.start * size..rows.end * size)?, values)
            }
            Values::Packed(weight) => {
                let len = rows.len().saturating_mul(cols);
                make_room(self.name, values, len)?;
                values.resize(len, 0.0);
                let error = |error| CheckpointError::Layer { layer: self.name.to_owned(), error };
                weight.dequantize_rows(rows, values).map_err(error)
            }
        }
    }

    /// The values of some rows as the adapter makes them.
    fn compute(&self, rows: Range<usize>, values: &mut Vec<f32>) -> Result<(), CheckpointError> {
        self.origin_rows(rows.clone(), values)?;
        let Way::Rows { steps, .. } = &self.way else { return Ok(()) };
        let cols = self.matrix[1];
        for step in steps {
            match step {
                Step::LowRank(pair) => {
                    let part = pair.rows().start.max(rows.start)..pair.rows().end.min(rows.end);
                    for row in part {
                        let weights = &mut values[(row - rows.start) * cols..][..cols];
                        if let Some(overflow) = pair.apply(row, weights).filter(|_| !self.allows_overflow) {
                            let index = row * cols + overflow.column;
                            let (tensor, value) = (self.name.to_owned(), overflow.value);
                            return Err(CheckpointError::TooLarge { tensor, index, value, dtype: Dtype::F32 });
                        }
                    }
                }
                Step::Tokens(tokens) => {
                    for (token, row) in tokens.indices().iter().zip(tokens.values().chunks_exact(cols.max(1))) {
                        if rows.contains(token) {
                            values[(token - rows.start) * cols..][..cols].copy_from_slice(row);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// All values, as columns.
    fn transpose(&self, out: &mut Vec<f32>) -> Result<(), CheckpointError> {
        let [rows, cols] = self.matrix;
        out.resize(rows * cols, 0.0);
        let mut values = Vec::new();
        for start in (0..rows).step_by(ROWS) {
            let end = rows.min(start + ROWS);
            self.compute(start..end, &mut values)?;
            for (row, values) in (start..end).zip(values.chunks_exact(cols)) {
                values.iter().enumerate().for_each(|(col, value)| out[col * rows + row] = *value);
            }
        }
        Ok(())
    }

    /// Goes through all rows once for `DoRA` on a transposed weight, whose norms are those of columns.
    fn take_norms(&mut self) -> Result<(), CheckpointError> {
        let [rows, cols] = self.matrix;
        let needs = |step: &Step<'_>| matches!(step, Step::LowRank(pair) if pair.needs_norms());
        let count = match &self.way {
            Way::Rows { steps, .. } => steps.iter().filter(|step| needs(step)).count(),
            _ => 0,
        };
        if count == 0 {
            return Ok(());
        }
        let (mut squares, mut values) = (with_room(self.name, cols)?, Vec::new());
        squares.resize(cols, 0.0_f64);
        for start in (0..rows).step_by(ROWS) {
            let end = rows.min(start + ROWS);
            self.origin_rows(start..end, &mut values)?;
            let Way::Rows { steps, .. } = &self.way else { return Ok(()) };
            for (row, values) in (start..end).zip(values.chunks_exact(cols.max(1))) {
                for step in steps.iter().filter(|step| needs(step)) {
                    if let Step::LowRank(pair) = step {
                        pair.add_squares(row, values, &mut squares);
                    }
                }
            }
        }
        if let Way::Rows { steps, .. } = &mut self.way {
            for step in steps {
                if let Step::LowRank(pair) = step {
                    pair.set_gains(&squares);
                }
            }
        }
        Ok(())
    }

    /// Appends values in the type of the tensor; `first` is the flat index of the first one.
    fn encode(&self, float: FloatType, values: &[f32], first: usize, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        if let Some(at) = values.iter().position(|value| float.overflows(*value)).filter(|_| !self.allows_overflow) {
            let tensor: String = self.name.to_owned();
            let (index, value) = (first + at, values[at].into());
            return Err(CheckpointError::TooLarge { tensor, index, value, dtype: self.to });
        }
        float.extend_bytes(values, out);
        Ok(())
    }
}
