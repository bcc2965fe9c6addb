//! What does not fit: an error, and nothing changes.

use nf4::checkpoint::{FloatType, PeftAdapter};
use nf4::{BlockSize, LoRALayer, MultiAdapterLayer, QLoRALayer, Tensor};

use super::State;

impl State<'_> {
    /// Lengths that do not fit.
    pub(super) fn refused(&mut self) {
        let (d_in, d_out, before) = (self.layer.d_in(), self.layer.d_out(), self.bits());
        let long = Tensor::zeros(d_in + 1, false);
        assert!(d_in == 1 || self.layer.try_forward(&long).is_err());
        assert!(self.layer.try_backward(&long, &Tensor::zeros(d_out, false)).is_err() || d_in == 1 && d_out == 0);
        assert!(self.layer.merge_rows_into(0..d_out + 1, &mut vec![0.0_f32; (d_out + 1) * d_in]).is_err());
        let mut scratch = nf4::Scratch::new();
        let result = self.layer.forward_into(&vec![0.0; d_in], &mut scratch, &mut vec![0.0; d_out]);
        assert!(result.is_err() || d_out == 0 || self.layer.d_in() == 0, "no scratch");
        assert_eq!(self.bits(), before, "what is refused changes nothing");
    }

    /// Tensors of the adapter that were replaced by others of another length: an error, whatever uses them.
    pub(super) fn replaced(&mut self, argument: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        let mut layer = self.layer.clone();
        let tensor = match argument % 3 {
            0 => layer.lora_a_mut(),
            1 => layer.lora_b_mut(),
            _ => match layer.adapter_mut().magnitude_mut() {
                Some(magnitude) => magnitude,
                None => return,
            },
        };
        let len = usize::from(self.bytes.byte());
        if tensor.len() == len || d_in + d_out == 0 {
            return;
        }
        *tensor = Tensor::zeros(len, true);
        let (x, dy) = (Tensor::zeros(d_in, false), Tensor::zeros(d_out, false));
        assert!(layer.try_forward(&x).is_err(), "forward");
        assert!(layer.try_backward(&x, &dy).is_err(), "backward");
        assert!(layer.refresh_dora().is_err(), "norms");
        assert!(layer.merge_rows_into(0..d_out, &mut vec![0.0_f32; d_out * d_in]).is_err(), "merge");
        assert!(layer.merge_requantized(BlockSize::B64, false).is_err(), "requantize");
        let (base, _, adapter) = layer.into_parts();
        let weight = base.dequantize();
        assert!(QLoRALayer::from_parts(base.clone(), adapter.clone()).is_err(), "a layer");
        assert!(LoRALayer::from_parts(Tensor::from_vec(weight, false), adapter.clone()).is_err(), "a dense layer");
        assert!(MultiAdapterLayer::new(base.clone()).add("a", adapter.clone()).is_err(), "one of many");
        let peft = PeftAdapter::new([("m".to_owned(), adapter)]);
        assert!(peft.is_err() || peft.is_ok_and(|p| p.to_files(FloatType::F32).is_err()), "files");
    }
}
