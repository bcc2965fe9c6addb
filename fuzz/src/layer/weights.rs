//! Merged weights, and layers through files and on shared bytes.

use std::sync::Arc;

use nf4::checkpoint::{FloatType, Linear4bit, PeftAdapter, TensorFile, to_safetensors};
use nf4::{Absmax, AbsmaxBuf, BlockSize, Quantized4Bit, SharedBytes, Store, f16};

use super::{State, joined, truth};
use crate::bits;

impl State<'_> {
    pub(super) fn merge(&mut self) {
        let merged = self.layer.merge_to_f32();
        if self.tame {
            truth::check_merged(&self.layer, &merged);
        }
        let (d_out, d_in) = (self.layer.d_out(), self.layer.d_in());
        let start = usize::from(self.bytes.byte()) % (d_out + 1);
        let mut rows = vec![f16::ZERO; (d_out - start) * d_in];
        self.layer.merge_rows_into(start..d_out, &mut rows).expect("inside");
        let expected: Vec<f16> = merged[start * d_in..].iter().map(|m| nf4::Float::from_f32(*m)).collect();
        assert_eq!(bits(&rows), bits(&expected), "rows from {start} on");
    }

    pub(super) fn requantize(&mut self, argument: usize) {
        let (block_size, double_quant) = (BlockSize::ALL[argument % 8], argument / 8 == 1);
        let merged = self.layer.merge_to_f32();
        let (d_out, d_in) = (self.layer.d_out(), self.layer.d_in());
        let expected = Quantized4Bit::quantize(&merged, d_out, d_in, block_size, double_quant);
        match (self.layer.merge_requantized(block_size, double_quant), expected) {
            (Ok((got, error)), Ok(expected)) => {
                assert_eq!(got.packed(), expected.packed());
                assert_eq!(bits(&got.dequantize::<f32>()), bits(&expected.dequantize::<f32>()));
                let pairs = got.dequantize::<f32>().into_iter().zip(merged);
                let largest = pairs.map(|(q, m)| (f64::from(q) - f64::from(m)).abs()).fold(0.0, f64::max);
                assert_eq!(error.max_abs_error.to_bits(), largest.to_bits());
            }
            (Err(got), Err(expected)) => assert_eq!(std::mem::discriminant(&got), std::mem::discriminant(&expected)),
            (got, expected) => panic!("requantized {:?}, quantized {:?}", got.err(), expected.err()),
        }
    }

    /// Base and adapter through files, which keep every bit.
    pub(super) fn save(&mut self) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let mut base = Linear4bit::new(base, FloatType::F32);
        if let Some(bias) = bias {
            base = base.with_bias(bias, FloatType::F32).expect("it was checked before");
        }
        let base = to_safetensors(&base.tensors("m")).expect("a layer can be written");
        let base = Linear4bit::load(&TensorFile::parse(&base).expect("just written"), "m").expect("just written");
        let finite = [adapter.a(), adapter.b()]
            .into_iter()
            .chain(adapter.magnitude())
            .all(|t| t.data().iter().all(|v| v.is_finite()));
        let files = PeftAdapter::new([("m".to_owned(), adapter)]).and_then(|adapter| adapter.to_files(FloatType::F32));
        // An empty tensor in a file is one whose values were left elsewhere.
        let empty = self.layer.d_in() == 0 || self.layer.d_out() == 0;
        assert_eq!(files.is_ok(), !empty, "{:?}", files.err());
        let Ok((config, file)) = files else { return };
        let adapter = PeftAdapter::load(config.as_bytes(), &TensorFile::parse(&file).expect("just written"));
        assert_eq!(adapter.is_ok(), finite, "{:?}", adapter.err());
        let Ok(adapter) = adapter else { return };
        let loaded = adapter.layer("m", base).expect("it fitted").with_arithmetic(self.layer.arithmetic());
        let x = self.vector(loaded.d_in());
        assert_eq!(bits(loaded.forward(&x).data()), bits(self.layer.forward(&x).data()), "loaded, and before");
        assert_eq!(bits(&loaded.merge_to_f32()), bits(&self.layer.merge_to_f32()));
    }

    /// The base on bytes that it shares, at any alignment.
    pub(super) fn share(&mut self, argument: usize) {
        let base = self.layer.base_weight_quantized();
        let Absmax::Plain(absmax) = base.absmax().view() else { return };
        let absmax: Vec<u8> = absmax.iter().flat_map(|a| a.to_le_bytes()).collect();
        let start = argument % 4;
        let ends = [start + base.packed().len(), start + base.packed().len() + absmax.len()];
        let file: SharedBytes = Arc::new([&vec![0; start], base.packed(), &absmax].concat());
        let packed = Store::<u8>::shared(file.clone(), start..ends[0]).expect("inside");
        let absmax = AbsmaxBuf::plain(Store::<f32>::shared(file, ends[0]..ends[1]).expect("inside"));
        let shared = Quantized4Bit::from_parts(packed, absmax, base.rows(), base.cols(), base.block_size());
        let shared = shared.expect("the parts of a weight");
        assert_eq!(bits(&shared.dequantize::<f32>()), bits(&base.dequantize::<f32>()));
        let layer = joined(shared, self.layer.adapter().clone()).with_arithmetic(self.layer.arithmetic());
        self.layer = match self.layer.bias() {
            Some(bias) => layer.with_bias(bias.to_vec()).expect("it was checked before"),
            None => layer,
        };
    }
}
