//! The fine-tuning trace of kind `sgd`, with the optimizers of this crate.

use nf4::optim::{AdamW, Sgd};
use nf4::{Arithmetic, Error, Kernels, LoRAAdapter, LoRAScaling, QLoRALayer, Tensor};

use crate::layers::{close, owned, tensor};
use crate::support::{Case, Checker, Quantized, Tensors};

/// As fractions of the largest value, against the trace in f64: the loss of a step, `A` and `B` after steps, and the
/// first gradients.
const LOSS_TOLERANCE: f64 = 1e-5;
const PARAM_TOLERANCE: f64 = 1e-4;
const GRADIENT_TOLERANCE: f64 = 3e-6;

enum Optimizer {
    Sgd(Sgd),
    AdamW(AdamW),
}

impl Optimizer {
    /// The optimizer `name` with the settings of the case.
    fn new(case: &Case, name: &str) -> Self {
        let settings = &case.info[name];
        let number =
            |field: &str| settings[field].as_f64().unwrap_or_else(|| panic!("{}: no {name}.{field}", case.id()));
        match name {
            "sgd" => Self::Sgd(Sgd::new(number("lr"))),
            "adamw" => {
                let betas = [0, 1].map(|i| settings["betas"][i].as_f64().unwrap());
                let (eps, weight_decay) = (number("eps"), number("weight_decay"));
                Self::AdamW(AdamW { betas, eps, weight_decay, ..AdamW::new(number("lr")) })
            }
            other => panic!("{}: optimizer {other}", case.id()),
        }
    }

    fn step(&mut self, params: Vec<&mut Tensor>) -> Result<(), Error> {
        match self {
            Self::Sgd(sgd) => sgd.step(params),
            Self::AdamW(adam) => adam.step(params),
        }
    }
}

/// Both optimizers, and that other kernels give the same bits to the end.
pub(crate) fn traces(c: &mut Checker, case: &Case, file: &Tensors, base: &Quantized) {
    for name in ["sgd", "adamw"] {
        let (trace, scalar) =
            (Trace::run(c.kernels, case, file, base, name), Trace::run(Kernels::scalar(), case, file, base, name));
        let steps = case.number("steps");
        let reference = |what: &str| file.values::<f64>(&format!("{name}.f64.{what}"));
        close(c, &format!("{name} loss"), "loss", &trace.losses, &reference("loss"), LOSS_TOLERANCE);
        for (at, param) in ["A", "B"].into_iter().enumerate() {
            let gradient = format!("grad_{param}_first");
            let got = &trace.first_gradients[at];
            close(c, &format!("{name} {gradient}"), "first gradient", got, &reference(&gradient), GRADIENT_TOLERANCE);
            let end = &trace.params[steps - 1][at];
            close(c, &format!("{name} {param}"), "parameter", end, &reference(param), PARAM_TOLERANCE);
            c.same_as_scalar(&format!("{name} {param}"), end, |_| scalar.params[steps - 1][at].clone());
            let snapshot = format!("{name}.f64.{param}_after_");
            for (key, expected) in file.iter().filter(|(key, _)| key.starts_with(&snapshot)) {
                let step: usize = key[snapshot.len()..].parse().unwrap();
                close(c, key, "parameter", &trace.params[step - 1][at], &expected.values(), PARAM_TOLERANCE);
            }
        }
    }
}

struct Trace {
    /// Before each step.
    losses: Vec<f32>,
    /// Of `A` and `B`.
    first_gradients: [Vec<f32>; 2],
    /// `A` and `B` after each step.
    params: Vec<[Vec<f32>; 2]>,
}

impl Trace {
    fn run(kernels: Kernels, case: &Case, file: &Tensors, base: &Quantized, name: &str) -> Self {
        let (rank, batch, shape) = (case.number("rank"), case.number("batch"), [base.rows, base.cols]);
        let alpha = case.info["alpha"].to_string().parse().unwrap();
        let (a, b) = (file.values("A0"), file.values("B0"));
        let adapter = LoRAAdapter::from_parts(a, b, shape[0], shape[1], rank, alpha, LoRAScaling::Standard).unwrap();
        let layer = QLoRALayer::from_parts(owned(base), adapter).unwrap();
        let mut layer = layer.with_kernels(kernels).with_arithmetic(Arithmetic::F32);
        let mut optimizer = Optimizer::new(case, name);
        let (inputs, targets) = (file.values::<f32>("X"), file.values::<f32>("Y"));
        let samples = inputs.len() / base.cols;
        let mut trace = Self { losses: Vec::new(), first_gradients: Default::default(), params: Vec::new() };
        for step in 0..case.number("steps") {
            let first = (step * batch) % samples;
            let rows = first..samples.min(first + batch);
            let x = tensor(&inputs[rows.start * base.cols..rows.end * base.cols]);
            let target = &targets[rows.start * base.rows..rows.end * base.rows];
            let y = layer.forward(&x);
            let n = target.len() as f32;
            let error: Vec<f32> = y.data().iter().zip(target).map(|(y, t)| y - t).collect();
            let squares: f64 = error.iter().map(|e| f64::from(*e).powi(2)).sum();
            #[allow(clippy::cast_possible_truncation, reason = "rounding is meant")]
            trace.losses.push((squares / f64::from(n)) as f32);
            layer.zero_grad();
            layer.backward(&x, &tensor(&error.iter().map(|e| 2.0 * e / n).collect::<Vec<_>>()));
            if step == 0 {
                trace.first_gradients = [layer.lora_a(), layer.lora_b()].map(|p| p.grad().unwrap().to_vec());
            }
            optimizer.step(layer.trainable_params()).unwrap();
            trace.params.push([layer.lora_a(), layer.lora_b()].map(|p| p.data().to_vec()));
        }
        trace
    }
}
