//! Operations on more arguments than candle's have.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// The tensor `value`, as a function of any number of variables whose gradients are computed together.
///
/// candle's operations have at most three arguments. Here, `backward` is called once, when the gradient of the value is known,
/// with that gradient, and returns the gradient of every variable: as many values as it has, in f32, which are rounded to the
/// type of the variable. So all of a model can be one operation, which keeps what it likes from forward to backward, and still
/// trains the variables of a [`VarMap`](candle_nn::VarMap).
///
/// ```
/// use candle_core::{Device, Tensor, Var};
///
/// let vars = [1.0_f32, 2.0, 3.0, 4.0].map(|x| Var::new(x, &Device::Cpu).unwrap());
/// let tensors = vars.each_ref().map(|var| var.as_tensor().clone());
/// let product = Tensor::new(24.0_f32, &Device::Cpu)?;
/// let product = nf4_candle::function(&product, &tensors, |dy| {
///     let dy = dy.to_scalar::<f32>()?;
///     Ok([24.0, 12.0, 8.0, 6.0].map(|factor| vec![dy * factor]).to_vec())
/// })?;
/// let gradients = (product * 0.5)?.backward()?;
/// assert_eq!(gradients.get(&vars[2]).unwrap().to_scalar::<f32>()?, 4.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A message if a tensor is not on the CPU; in the backward, the errors of `backward`, and a message if it returns gradients of
/// another number or length.
pub fn function(
    value: &Tensor,
    variables: &[Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Vec<f32>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    // A copy, which starts with the first value and ends with the last.
    let value = value.detach().force_contiguous()?;
    let (storage, layout) = value.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(Error::Msg("function: not on the CPU".to_string()).bt()) };
    function_of((storage.clone(), layout.shape().clone()), variables, backward)
}

/// [`function`], with a value that is no tensor yet.
pub(crate) fn function_of(
    (value, shape): (CpuStorage, Shape),
    variables: &[Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Vec<f32>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let gradients = Gradients::default();
    let mut token = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (place, variable) in variables.iter().enumerate() {
        token = token.apply_op2(variable, Tie { place, gradients: gradients.clone() })?;
    }
    let (value, backward) = (Mutex::new(Some(value)), Box::new(backward));
    token.apply_op1(Root { value, shape, variables: variables.len(), gradients, backward })
}

/// Where the root leaves the gradients, and each tie takes its own.
type Gradients = Arc<Mutex<Vec<Vec<f32>>>>;

/// The end of the chain, with the value and the backward.
struct Root {
    /// Until it has become a tensor.
    value: Mutex<Option<CpuStorage>>,
    shape: Shape,
    variables: usize,
    gradients: Gradients,
    backward: Box<dyn Fn(&Tensor) -> Result<Vec<Vec<f32>>> + Send + Sync>,
}

impl CustomOp1 for Root {
    fn name(&self) -> &'static str {
        "function"
    }

    fn cpu_fwd(&self, _token: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        let value = value.ok_or_else(|| Error::Msg("a function has one value".to_string()).bt())?;
        Ok((value, self.shape.clone()))
    }

    fn bwd(&self, token: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let gradients = (self.backward)(dy)?;
        if gradients.len() != self.variables {
            let msg = format!("{} gradients of {} variables", gradients.len(), self.variables);
            return Err(Error::Msg(msg).bt());
        }
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
        // The ties come after this, because their results led here.
        token.zeros_like().map(Some)
    }
}

/// A link of the chain, which leads from the token to a variable.
struct Tie {
    place: usize,
    gradients: Gradients,
}

impl CustomOp2 for Tie {
    fn name(&self) -> &'static str {
        "variable of a function"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(
        &self,
        token: &Tensor,
        variable: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        let gradient = gradients.get_mut(self.place).map(std::mem::take).unwrap_or_default();
        let gradient = Tensor::from_vec(gradient, variable.shape(), variable.device())?.to_dtype(variable.dtype())?;
        Ok((token.track_op().then(|| dy.clone()), Some(gradient)))
    }
}
