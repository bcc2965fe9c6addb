//! Layers that stay on the file that they come from.

use std::path::Path;
use std::sync::Arc;

use nf4::SharedBytes;
use nf4::checkpoint::{CheckpointError, Linear4bit, SharedFile, TensorFile, TensorInfo, TensorSource, packed_tensors};

use crate::support::Tree;

/// A file that starts at some distance from where its buffer does.
struct Moved(Vec<u8>, usize);

impl AsRef<[u8]> for Moved {
    fn as_ref(&self) -> &[u8] {
        &self.0[self.1..]
    }
}

fn bits(layer: &Linear4bit) -> Vec<u32> {
    layer.weight().dequantize::<f32>().into_iter().map(f32::to_bits).collect()
}

fn check(path: &Path, moved: usize) {
    let bytes = std::fs::read(path).unwrap();
    let file = TensorFile::parse(&bytes).unwrap();
    let owner: SharedBytes = Arc::new(Moved([vec![0; moved], bytes.clone()].concat(), moved));
    let shared = SharedFile::parse(owner.clone()).unwrap();
    assert_eq!(shared.names().collect::<Vec<_>>(), file.names().collect::<Vec<_>>());
    for tensor in packed_tensors(&shared) {
        let prefix = tensor.strip_suffix("weight").unwrap().trim_end_matches('.');
        let name = format!("{} moved by {moved}, {prefix}", path.display());
        let (expected, got) = (Linear4bit::load(&file, prefix).unwrap(), Linear4bit::load(&shared, prefix).unwrap());
        assert_eq!(bits(&got), bits(&expected), "{name}");
        assert_eq!((got.bias(), got.state()), (expected.bias(), expected.state()), "{name}");
        let (of_file, of_layer) = ((*owner).as_ref().as_ptr_range(), got.weight().packed().as_ptr_range());
        assert!(of_file.start <= of_layer.start && of_layer.end <= of_file.end, "{name}: the codes are a copy");
        // Scales are copied where they are not aligned, and codes of scales never.
        let scales = if got.weight().is_double_quantized() { "nested_absmax" } else { "absmax" };
        let scales = shared.header().get(&format!("{tensor}.{scales}")).unwrap();
        let at = of_file.end.addr() - shared.header().data_len() + scales.data_offsets.0;
        let copied = if at.is_multiple_of(4) && cfg!(target_endian = "little") { 0 } else { scales.shape[0] * 4 };
        assert_eq!(got.weight().memory_bytes(), copied, "{name}");
    }
}

#[test]
fn layers_of_shared_files_are_those_of_read_ones() {
    let mut files = 0;
    for case in Tree::open().cases {
        let name = match case.kind() {
            "linear4bit" | "checkpoint" => "model.safetensors",
            "peft" => "base.safetensors",
            _ => continue,
        };
        (0..4).for_each(|moved| check(&case.path_of(name), moved));
        files += 1;
    }
    assert!(files > 5, "{files} files");
}

/// A source that says that a tensor is elsewhere than it is.
struct Wrong(SharedFile, isize);

impl TensorSource for Wrong {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.0.names()
    }
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.info(name)
    }
    fn read(&self, name: &str) -> Result<std::borrow::Cow<'_, [u8]>, CheckpointError> {
        self.0.read(name)
    }
    fn shared(&self, name: &str) -> Option<(SharedBytes, core::ops::Range<usize>)> {
        let (bytes, range) = self.0.shared(name)?;
        let end = (*bytes).as_ref().len();
        match self.1 {
            0 => Some((bytes, range.start..range.end + 1)),
            _ => Some((bytes, end..end + range.len())),
        }
    }
}

#[test]
fn sources_that_share_something_else_are_errors() {
    let path = Tree::open().cases.into_iter().find(|case| case.kind() == "linear4bit").unwrap();
    let bytes = std::fs::read(path.path_of("model.safetensors")).unwrap();
    let file = SharedFile::parse(Arc::new(bytes)).unwrap();
    let tensor = packed_tensors(&file).remove(0);
    for (wrong, expected) in [(0, "expected"), (1, "do not lie in 0..")] {
        let error = Linear4bit::load_tensor(&Wrong(file.clone(), wrong), &tensor).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(SharedFile::parse(Arc::new([0_u8; 7])).is_err());
}
