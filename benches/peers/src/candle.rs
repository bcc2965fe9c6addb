//! `candle-core`: quantized tensors. The number of threads is that of the environment.

use std::borrow::Cow;

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};

use crate::measure::{BATCHES, Entry, Peer, Problem};
use crate::run::locked_version;

struct Candle {
    format: GgmlDType,
    converted: Option<QTensor>,
    matrices: Vec<QMatMul>,
    inputs: Vec<Tensor>,
    output: Option<Tensor>,
}

impl Peer for Candle {
    fn product(&mut self, matrix: usize, batch: usize) {
        let index = BATCHES.iter().position(|b| *b == batch).expect("a known batch");
        self.output = Some(self.matrices[matrix].forward(&self.inputs[index]).expect("the shapes fit"));
    }

    fn output(&self, _: usize) -> Vec<f32> {
        let output = self.output.as_ref().expect("there was a product");
        output.flatten_all().and_then(|t| t.to_vec1()).expect("outputs are f32")
    }

    fn quantize(&mut self, weights: &[f32]) -> bool {
        // A copy of the weights, as the function takes a tensor: some percent of its time.
        let weights = Tensor::from_slice(weights, weights.len(), &Device::Cpu);
        self.converted = Some(weights.and_then(|w| QTensor::quantize(&w, self.format)).expect("whole blocks"));
        true
    }

    fn dequantize(&mut self) {
        let quantized = self.converted.as_ref().expect("something was quantized");
        self.output = Some(quantized.dequantize(&Device::Cpu).expect("a known format"));
    }
}

pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let entry = |(name, format)| {
        let (shape, cpu) = ((problem.rows, problem.cols), Device::Cpu);
        let weights = Tensor::from_slice(&problem.weights, shape, &cpu)?;
        let quantized = QTensor::quantize(&weights, format)?;
        let bytes = quantized.storage_size_in_bytes();
        let weights = quantized.dequantize(&cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let matrix = |_| {
            let storage = QStorage::from_data(Cow::from(quantized.data()?.to_vec()), &cpu, format)?;
            Ok(QMatMul::from_qtensor(QTensor::new(storage, shape)?)?)
        };
        let matrices = (0..problem.copies(bytes)).map(matrix).collect::<Result<_>>()?;
        let input = |batch| Ok(Tensor::from_slice(problem.inputs(batch), (batch, problem.cols), &cpu)?);
        let inputs = BATCHES.into_iter().map(input).collect::<Result<_>>()?;
        let peer = Candle { format, converted: None, matrices, inputs, output: None };
        let version = locked_version("candle-core");
        Entry::new("candle", &version, name, bytes, problem, Box::new(peer)).check(problem, &weights)
    };
    [("candle Q4_0", GgmlDType::Q4_0), ("candle Q4_K", GgmlDType::Q4K)].into_iter().map(entry).collect()
}
