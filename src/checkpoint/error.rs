//! The error of reading and writing files.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use safetensors::Dtype;

/// What went wrong when a checkpoint, one of its layers, or an adapter was read or written.
///
/// It does not name the file, so a program that knows the path should put that before the message.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file ends before something that its first bytes promise.
    Truncated {
        /// What was cut off.
        what: &'static str,
        /// Bytes that the file should have at least.
        expected: u64,
        /// Bytes that it has.
        got: u64,
    },
    /// The header is longer than the format allows.
    HeaderTooLong {
        /// Bytes that the file says its header has.
        got: u64,
        /// The limit of the format.
        limit: u64,
    },
    /// A text is not the JSON that it should be.
    Json {
        /// The text: a file or a tensor.
        what: String,
        /// What the parser said, with line and column.
        reason: String,
    },
    /// The bytes of a tensor do not start where those of the one before it end, but overlap or leave a gap.
    Offset {
        /// The tensor.
        tensor: String,
        /// Where the tensors before it end.
        expected: u64,
        /// Where it starts.
        got: u64,
    },
    /// A tensor, or the data of a file, does not have the number of bytes that shapes and types need.
    Bytes {
        /// The tensor, or what else.
        what: String,
        /// Bytes that there should be.
        expected: u64,
        /// Bytes that there are.
        got: u64,
    },
    /// A tensor is larger than the address space.
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor is missing.
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// A tensor has a type that it cannot have.
    Type {
        /// The tensor.
        tensor: String,
        /// The types that it may have.
        expected: &'static str,
        /// The type that it has.
        got: Dtype,
    },
    /// A tensor does not have the shape that the rest of the layer needs.
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that it should have.
        expected: Vec<usize>,
        /// The shape that it has.
        got: Vec<usize>,
    },
    /// A field of a JSON object has a value that it cannot have.
    Field {
        /// The file or tensor that holds the object.
        what: String,
        /// The field.
        field: String,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// A codebook is not that of NF4.
    Codebook {
        /// The tensor.
        tensor: String,
        /// The first code that stands for another value.
        index: usize,
        /// The value of NF4.
        expected: f32,
        /// The value in the file.
        got: f32,
    },
    /// A file uses a variant of the format that this library does not implement, and would be misread without it.
    Unsupported {
        /// The file, layer or module.
        what: String,
        /// The variant, by the name that it has in the file.
        variant: String,
    },
    /// A tensor cannot be used.
    Unexpected {
        /// The tensor.
        tensor: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// The model does not have a module or tensor that an adapter changes, under any name that fits.
    NotInModel {
        /// The module or tensor, as the adapter calls it.
        name: String,
        /// The most similar name in the model.
        nearest: Option<String>,
    },
    /// Weights are packed in a format that this library does not decode.
    Foreign {
        /// The tensor, or the section of the configuration.
        tensor: String,
        /// The format.
        format: String,
        /// What shows it, and why the tensor cannot stay as it is.
        reason: String,
    },
    /// A finite value would become infinite in the type of the output.
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Flat index of the first such value.
        index: usize,
        /// The value.
        value: f64,
        /// The type.
        dtype: Dtype,
    },
    /// There is no memory for the contents of a file.
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes that are needed.
        bytes: u64,
    },
    /// The parts of a layer do not fit each other, or are not finite.
    Layer {
        /// The layer or module.
        layer: String,
        /// What was wrong.
        error: crate::Error,
    },
    /// The sink of the bytes failed.
    Write {
        /// What it said.
        reason: String,
    },
    /// The source of the bytes failed.
    Read {
        /// The tensor that was to be read.
        tensor: String,
        /// What the source said.
        reason: String,
    },
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { what, expected, got } => {
                write!(f, "{what}: the file has {got} bytes, but needs at least {expected}")
            }
            Self::HeaderTooLong { got, limit } => write!(f, "a header of {got} bytes: the format allows {limit}"),
            Self::Json { what, reason } => write!(f, "{what}: {reason}"),
            Self::Offset { tensor, expected, got } => {
                let fault = if got < expected { "overlaps" } else { "leaves a gap after" };
                write!(f, "{tensor}: starts at byte {got} of the data and {fault} the tensors that end at {expected}")
            }
            Self::Bytes { what, expected, got } => write!(f, "{what}: expected {expected} bytes, got {got}"),
            Self::Overflow { tensor, shape } => {
                write!(f, "{tensor}: a tensor of shape {} does not fit in the address space", Dims(shape))
            }
            Self::Missing { tensor } => write!(f, "{tensor}: there is no such tensor"),
            Self::Type { tensor, expected, got } => write!(f, "{tensor}: expected type {expected}, got {got}"),
            Self::Shape { tensor, expected, got } => {
                write!(f, "{tensor}: expected shape {}, got {}", Dims(expected), Dims(got))
            }
            Self::Field { what, field, expected, got } => {
                write!(f, "{what}: {field} is {got}, expected {expected}")
            }
            Self::Codebook { tensor, index, expected, got } => write!(
                f,
                "{tensor}: not the codebook of NF4, which has {expected} for code {index}, where this one has {got}"
            ),
            Self::Unsupported { what, variant } => write!(f, "{what}: {variant} is not supported"),
            Self::Unexpected { tensor, reason } => write!(f, "{tensor}: {reason}"),
            Self::NotInModel { name, nearest } => match nearest {
                Some(nearest) => write!(f, "{name} is not in the model; the nearest name there is {nearest}"),
                None => write!(f, "{name} is not in the model"),
            },
            Self::Foreign { tensor, format, reason } => write!(f, "{tensor}: {format}: {reason}"),
            Self::TooLarge { tensor, index, value, dtype } => {
                write!(f, "{tensor}: value {index} is {value:e}, which is infinite as {dtype}")
            }
            Self::Memory { what, bytes } => write!(f, "{what}: no memory for {bytes} bytes"),
            Self::Layer { layer, error } => write!(f, "{layer}: {error}"),
            Self::Write { reason } => f.write_str(reason),
            Self::Read { tensor, reason } => write!(f, "{tensor}: {reason}"),
        }
    }
}

impl core::error::Error for CheckpointError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Layer { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A shape in a message, which shows only the first dimensions.
struct Dims<'a>(&'a [usize]);

impl fmt::Display for Dims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        match self.0.get(..SHOWN) {
            Some(first) if first.len() < self.0.len() => write!(f, "{first:?} and {} more", self.0.len() - SHOWN),
            _ => write!(f, "{:?}", self.0),
        }
    }
}
