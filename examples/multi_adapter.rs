//! Two adapters on one 4-bit base: switched, summed, and one for each vector of a batch.
//!
//!     cargo run --example multi_adapter

use nf4::{Adapters, BlockSize, Error, LoRAAdapter, LoRAScaling, MultiAdapterLayer, Quantized4Bit, Tensor};

const D_OUT: usize = 4;
const D_IN: usize = 128;

fn main() -> Result<(), Error> {
    let base = Quantized4Bit::quantize(&[0.01_f32; D_OUT * D_IN], D_OUT, D_IN, BlockSize::B64, false)?;
    let mut layer = MultiAdapterLayer::new(base);
    for (name, b) in [("french", 0.01), ("german", 0.02)] {
        let (a, b) = (vec![0.5; D_IN], vec![b; D_OUT]); // of rank 1
        layer.add(name, LoRAAdapter::from_parts(a, b, D_OUT, D_IN, 1, 1.0, LoRAScaling::Standard)?)?;
    }

    let x = Tensor::from_vec(vec![1.0; D_IN], false);
    let show = |what: &str, y: &Tensor| println!("{what:<24}{:?}", y.data());
    show("no adapter", &layer.forward(&x, Adapters::Active));
    layer.set_active(&["german"])?;
    show("german", &layer.forward(&x, Adapters::Active));
    layer.set_active(&["french", "german"])?;
    layer.set_adapter_weight("german", 0.5)?;
    show("french + 0.5 german", &layer.forward(&x, Adapters::Active));

    // A server's batch: every request with its own adapter, or with none.
    let ids = [layer.id("french"), None];
    let requests = Tensor::from_vec([x.data(), x.data()].concat(), false);
    show("french; none", &layer.forward(&requests, Adapters::PerVector(&ids)));
    Ok(())
}
