//! The parts of a decoder that candle has no gradient for, or needs many passes for: each is one operation that goes over
//! its rows once, forward and backward. All are f32, and rows are shared between threads.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Error, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// `weight * x / sqrt(mean(x^2) + eps)` over the last dimension; the weight is frozen.
pub(crate) fn rms_norm(x: &Tensor, weight: &Arc<[f32]>, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(RmsNorm { weight: weight.clone(), eps })
}

struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
}

impl RmsNorm {
    fn factor(&self, x: &[f32]) -> f32 {
        1.0 / (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (floats(x, layout)?, self.weight.len());
        let y = rows(x.len(), width, |row, y| {
            let x = &x[row * width..][..width];
            let factor = self.factor(x);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(&*self.weight) {
                *y = weight * (x * factor);
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// With `g = dy * weight` and the factor `f`: `dx = f g - x f^3 mean(g x)`.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = self.weight.len();
        gradient([x, dy], x, |[all_x, dy]| {
            rows(all_x.len(), width, |row, dx| {
                let (x, dy) = (&all_x[row * width..][..width], &dy[row * width..][..width]);
                let factor = self.factor(x);
                let products = x.iter().zip(dy).zip(&*self.weight).map(|((x, dy), weight)| x * (dy * weight));
                let mean = products.sum::<f32>() / width as f32 * factor.powi(3);
                for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(&*self.weight) {
                    *dx = factor * (dy * weight) - x * mean;
                }
            })
        })
        .map(Some)
    }
}

/// Cosines and sines of the rotary embedding, `[positions, pairs]`.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    pub(crate) cos: Arc<[f32]>,
    pub(crate) sin: Arc<[f32]>,
    pub(crate) pairs: usize,
}

/// Rotates each head of `x` `[tokens, heads, head_dim]` by the angles of its token's position.
pub(crate) fn rotate(x: &Tensor, angles: &Angles, positions: &Arc<[usize]>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rotate { angles: angles.clone(), positions: positions.clone(), back: false })
}

struct Rotate {
    angles: Angles,
    positions: Arc<[usize]>,
    back: bool,
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, pairs) = (floats(x, layout)?, self.angles.pairs);
        let width = x.len() / self.positions.len().max(1);
        let y = rows(x.len(), width, |token, y| {
            let at = self.positions[token] * pairs..(self.positions[token] + 1) * pairs;
            let (cos, sin) = (&self.angles.cos[at.clone()], &self.angles.sin[at]);
            let sign = if self.back { -1.0 } else { 1.0 };
            let heads = x[token * width..][..width].chunks_exact(2 * pairs).zip(y.chunks_exact_mut(2 * pairs));
            for (x, y) in heads {
                for i in 0..pairs {
                    let (a, b, sin) = (x[i], x[i + pairs], sign * sin[i]);
                    (y[i], y[i + pairs]) = (a * cos[i] - b * sin, b * cos[i] + a * sin);
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// The rotation back.
    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { angles: self.angles.clone(), positions: self.positions.clone(), back: true };
        dy.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

/// The softmax of `scale * scores` over the last dimension, `[..., tokens, tokens]`, where a token sees itself and those
/// before it.
pub(crate) fn causal_softmax(scores: &Tensor, scale: f32) -> Result<Tensor> {
    scores.contiguous()?.apply_op1(CausalSoftmax { scale })
}

struct CausalSoftmax {
    scale: f32,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, tokens) = (floats(x, layout)?, layout.dims().last().copied().unwrap_or(1));
        let y = rows(x.len(), tokens, |row, y| {
            let seen = row % tokens + 1;
            let x = &x[row * tokens..][..seen];
            let max = x.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
            let mut sum = 0.0;
            for (y, x) in y.iter_mut().zip(x) {
                *y = ((x - max) * self.scale).exp();
                sum += *y;
            }
            y[..seen].iter_mut().for_each(|y| *y /= sum);
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// `dx = scale * y (dy - sum(y dy))`.
    fn bwd(&self, _x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let tokens = y.dims().last().copied().unwrap_or(1);
        gradient([y, dy], y, |[all_y, dy]| {
            rows(all_y.len(), tokens, |row, dx| {
                let seen = row % tokens + 1;
                let (y, dy) = (&all_y[row * tokens..][..seen], &dy[row * tokens..][..seen]);
                let sum: f32 = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
                for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                    *dx = self.scale * y * (dy - sum);
                }
            })
        })
        .map(Some)
    }
}

/// `gate / (1 + e^-gate) * up`.
pub(crate) fn silu_times(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, SiluTimes)
}

struct SiluTimes;

/// Values that a thread takes at a time.
const PART: usize = 1 << 12;

impl CustomOp2 for SiluTimes {
    fn name(&self) -> &'static str {
        "silu-times"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (floats(gate, gate_layout)?, floats(up, up_layout)?);
        let y = rows(gate.len(), PART, |part, y| {
            let start = part * PART;
            for ((y, gate), up) in y.iter_mut().zip(&gate[start..]).zip(&up[start..]) {
                *y = gate / (1.0 + (-gate).exp()) * up;
            }
        });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    /// With `s = 1 / (1 + e^-gate)`: `s (1 + gate (1 - s)) up dy`, and `gate s dy`.
    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sigmoid = |gate: f32| 1.0 / (1.0 + (-gate).exp());
        let of_gate = gradient([gate, up, dy], gate, |[gate, up, dy]| {
            rows(gate.len(), PART, |part, out| {
                let start = part * PART;
                for (((out, gate), up), dy) in out.iter_mut().zip(&gate[start..]).zip(&up[start..]).zip(&dy[start..]) {
                    let s = sigmoid(*gate);
                    *out = s * (1.0 + gate * (1.0 - s)) * up * dy;
                }
            })
        })?;
        let of_up = gradient([gate, dy], up, |[gate, dy]| {
            rows(gate.len(), PART, |part, out| {
                let start = part * PART;
                for ((out, gate), dy) in out.iter_mut().zip(&gate[start..]).zip(&dy[start..]) {
                    *out = gate * sigmoid(*gate) * dy;
                }
            })
        })?;
        Ok((Some(of_gate), Some(of_up)))
    }
}

/// `x W^T`, with a frozen `weight` `[d_out, d_in]`, `x` `[tokens, d_in]`. candle's own product would compute a gradient for
/// the weight too.
pub(crate) fn dense(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op1(Known { value: x.detach().matmul(&weight.t()?)?, weight: weight.clone() })
}

/// An operation whose result was made with candle's product.
struct Known {
    value: Tensor,
    weight: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { return Err(Error::Msg("not on the CPU".to_string()).bt()) };
        Ok((CpuStorage::F32(floats(storage, layout)?.to_vec()), self.value.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.matmul(&self.weight).map(Some)
    }
}

/// `len` zeros, of which `fill` gets each row of `width` values and its number.
fn rows(len: usize, width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut values = vec![0.0; len];
    let few = (PART / width.max(1)).max(1);
    values.par_chunks_mut(width.max(1)).enumerate().with_min_len(few).for_each(|(row, values)| fill(row, values));
    values
}

/// A tensor of the shape of `like`, from the values of others.
fn gradient<const N: usize>(
    of: [&Tensor; N],
    like: &Tensor,
    compute: impl FnOnce([&[f32]; N]) -> Vec<f32>,
) -> Result<Tensor> {
    let mut tensors = Vec::with_capacity(N);
    for tensor in of {
        tensors.push(tensor.contiguous()?);
    }
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else { return Err(Error::Msg("not on the CPU".to_string()).bt()) };
        *slice = floats(storage, layout)?;
    }
    Tensor::from_vec(compute(slices), like.shape(), like.device())
}

/// The values of a contiguous tensor in f32.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let op = "the values of a tensor";
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| Error::RequiresContiguous { op }.bt())?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

    use candle_core::{Device, Var};

    use super::*;

    fn var(shape: &[usize], seed: f32) -> Var {
        let len: usize = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7 + seed).sin()).collect();
        Var::from_slice(&values, shape, &Device::Cpu).unwrap()
    }

    /// Central differences with a step of 1/64 of functions whose third derivatives are below 10 here: off by less than
    /// `10 / 6 / 64^2`, and by rounding of sums below 10 in f32, `64 * 10 * 2^-24 * 8`.
    fn check(vars: &[&Var], f: impl Fn() -> Result<Tensor>) {
        const STEP: f32 = 1.0 / 64.0;
        let weights = var(f().unwrap().dims(), 5.0);
        let loss = || {
            let products = (f().unwrap() * weights.as_tensor()).unwrap().flatten_all().unwrap();
            products.to_vec1::<f32>().unwrap().into_iter().map(f64::from).sum::<f64>()
        };
        let gradients = (f().unwrap() * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        for var in vars {
            let gradient = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let start = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for i in 0..start.len() {
                let moved = |step: f32| {
                    let mut values = start.clone();
                    values[i] += step;
                    var.set(&Tensor::from_slice(&values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                    loss()
                };
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                let error = (difference - f64::from(gradient[i])).abs();
                assert!(error < 1e-3, "{i}: {difference}, {}", gradient[i]);
            }
            var.set(&Tensor::from_slice(&start, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let x = var(&[3, 8], 0.0);
        let weight: Arc<[f32]> = (0..8).map(|i| 0.5 + i as f32 / 8.0).collect();
        check(&[&x], || rms_norm(&x, &weight, 1e-5));

        let heads = var(&[3, 2, 4], 1.0);
        let angles: Vec<f32> = (0..10).map(|i| i as f32 * 0.4).collect();
        let angles = Angles {
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
            pairs: 2,
        };
        let positions: Arc<[usize]> = [0, 1, 4].into();
        check(&[&heads], || rotate(&heads, &angles, &positions));

        let scores = var(&[2, 4, 4], 2.0);
        check(&[&scores], || causal_softmax(&scores, 0.5));

        let inputs = var(&[3, 5], 6.0);
        let weight = var(&[4, 5], 7.0).as_detached_tensor();
        check(&[&inputs], || dense(&inputs, &weight));

        let (gate, up) = (var(&[2, 5], 3.0), var(&[2, 5], 4.0));
        check(&[&gate, &up], || silu_times(&gate, &up));
    }

    #[test]
    fn a_softmax_sees_nothing_later() {
        let y = causal_softmax(&var(&[3, 3], 0.0), 1.0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y[0], [1.0, 0.0, 0.0]);
        assert_eq!(y[1][2], 0.0);
        assert!(y.iter().all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
    }
}
