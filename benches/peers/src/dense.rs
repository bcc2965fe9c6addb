//! The crate `gemm`: a dense f32 matrix.

use anyhow::Result;

use crate::foreign::dense_product;
use crate::measure::{BATCHES, Entry, Peer, Problem};
use crate::run::locked_version;

struct Dense {
    matrices: Vec<Vec<f32>>,
    inputs: Vec<f32>,
    cols: usize,
    threads: usize,
    outputs: Vec<f32>,
}

impl Peer for Dense {
    fn product(&mut self, matrix: usize, batch: usize) {
        let matrix = &self.matrices[matrix];
        let outputs = &mut self.outputs[..batch * (matrix.len() / self.cols)];
        dense_product(matrix, &self.inputs[..batch * self.cols], self.cols, self.threads, outputs);
    }

    fn output(&self, batch: usize) -> Vec<f32> {
        self.outputs[..batch * (self.matrices[0].len() / self.cols)].to_vec()
    }
}

pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let bytes = 4 * problem.weights.len();
    let peer = Dense {
        matrices: vec![problem.weights.clone(); problem.copies(bytes)],
        inputs: problem.inputs(BATCHES[2]).to_vec(),
        cols: problem.cols,
        threads: problem.threads,
        outputs: vec![0.0; BATCHES[2] * problem.rows],
    };
    let version = locked_version("gemm");
    let entry = Entry::new("gemm", &version, "gemm, dense f32", bytes, problem, Box::new(peer));
    vec![entry.check(problem, &problem.weights)]
}
