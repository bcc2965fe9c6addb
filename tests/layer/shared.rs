//! Weights on bytes that somebody else owns, and inputs that several layers share.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use nf4::{
    Absmax, AbsmaxBuf, Adapters, Arithmetic, BlockSize, Error, Inputs, InputsBuf, MultiAdapterLayer, QLoRALayer,
    Quantized4Bit, Scratch, ShapeError, SharedBytes, Store, bf16,
};

use crate::{adapter, all_kernels, bits, layer, normal};

const D_OUT: usize = 37;
const D_IN: usize = 128;

/// The parts of a weight one after the other, from the first address on that is `offset` above a multiple of 4.
struct File {
    bytes: SharedBytes,
    start: usize,
    /// Lengths of the packed codes, of the codes of the scales, if there are any, and of the f32 values.
    lens: [usize; 3],
    nested: Option<([f32; 256], f32)>,
}

impl File {
    fn new(weight: &Quantized4Bit, offset: usize) -> Self {
        let (codes, floats, nested) = match weight.absmax().view() {
            Absmax::Nested(n) => (n.codes().to_vec(), n.absmax().to_vec(), Some((*n.quant_map(), n.offset()))),
            Absmax::Plain(floats) => (Vec::new(), floats.to_vec(), None),
            _ => panic!("another kind of scales"),
        };
        let floats: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        let parts = [weight.packed(), &codes, &floats].concat();
        let mut bytes = vec![0xee; parts.len() + 16];
        let lens = [weight.packed().len(), codes.len(), floats.len()];
        // What has to be aligned is the last part.
        let floats_at = bytes.as_ptr().addr() + lens[0] + lens[1];
        let start = 4 + (4 + offset - floats_at % 4) % 4;
        bytes[start..start + parts.len()].copy_from_slice(&parts);
        Self { bytes: Arc::new(bytes), start, lens, nested }
    }

    fn weight(&self, block_size: BlockSize) -> Result<Quantized4Bit, Error> {
        let [packed, codes, floats] = self.lens;
        let [a, b, c, d] = [0, packed, packed + codes, packed + codes + floats].map(|at| self.start + at);
        let bytes = |range| Store::<u8>::shared(self.bytes.clone(), range);
        let floats = Store::<f32>::shared(self.bytes.clone(), c..d)?;
        let absmax = match &self.nested {
            Some((map, offset)) => AbsmaxBuf::nested(bytes(b..c)?, floats, map, *offset)?,
            None => AbsmaxBuf::plain(floats),
        };
        Quantized4Bit::from_parts(bytes(a..b)?, absmax, D_OUT, D_IN, block_size)
    }
}

#[test]
fn shared_weights_have_the_bits_of_owned_ones_at_every_alignment() {
    let x = normal(3 * D_IN, 1.0, 4);
    for (block_size, double_quant) in [(BlockSize::B64, false), (BlockSize::B32, true), (BlockSize::B256, true)] {
        let owned = layer(D_OUT, D_IN, 3, block_size, double_quant);
        let base = owned.base_weight_quantized();
        for offset in 0..4 {
            let file = File::new(base, offset);
            let weight = file.weight(block_size).unwrap();
            let name = format!("{block_size:?}, double quantization {double_quant}, offset {offset}");
            // The codes are those of the file itself, and the scales are too where their address allows it.
            assert_eq!(weight.packed().as_ptr(), (*file.bytes).as_ref()[file.start..].as_ptr(), "{name}");
            let aligned = offset == 0 && cfg!(target_endian = "little");
            assert_eq!(weight.memory_bytes(), if aligned { 0 } else { file.lens[2] }, "{name}");
            assert_eq!(weight.data_bytes(), base.data_bytes(), "{name}");
            assert_eq!(weight.bits_per_weight(), base.bits_per_weight(), "{name}");

            let mut shared = QLoRALayer::from_parts(weight.clone(), adapter(D_OUT, D_IN, 3)).unwrap();
            let (stats, of_owned) = (shared.memory_stats(), owned.memory_stats());
            assert_eq!(stats.base_quantized_bytes, of_owned.base_quantized_bytes, "{name}");
            assert_eq!(stats.total_bytes, weight.memory_bytes() + stats.lora_bytes, "{name}");
            assert_eq!(bits(&shared.merge_to_f32()), bits(&owned.merge_to_f32()), "{name}");
            for k in all_kernels() {
                shared = shared.with_kernels(k);
                assert_eq!(outputs(&shared, &x), outputs(&owned, &x), "{name}, {}", k.isa());
            }
            // The file outlives whoever opened it.
            let bytes = Arc::downgrade(&file.bytes);
            drop((file, weight));
            assert!(bytes.upgrade().is_some(), "{name}");
            drop(shared);
            assert!(bytes.upgrade().is_none(), "{name}: the last layer frees the file");
        }
    }
}

fn outputs(layer: &QLoRALayer, x: &[f32]) -> Vec<u32> {
    let mut y = vec![f32::NAN; x.len() / layer.d_in() * layer.d_out()];
    layer.forward_into(x, &mut layer.scratch(x.len() / layer.d_in()), &mut y).unwrap();
    bits(&y)
}

/// Bytes in flash.
static PACKED: [u8; 128] = [0x3c; 128];
static ABSMAX: [f32; 4] = [0.5, 1.0, 0.25, 2.0];

#[test]
fn static_weights_stay_where_they_are() {
    let absmax = AbsmaxBuf::plain(&ABSMAX[..]);
    let weight = Quantized4Bit::from_parts(&PACKED[..], absmax, 4, 64, BlockSize::B64).unwrap();
    assert_eq!((weight.memory_bytes(), weight.data_bytes()), (0, 128 + 16));
    assert_eq!(weight.packed().as_ptr(), PACKED.as_ptr());
    let owned = AbsmaxBuf::plain(ABSMAX.to_vec());
    let owned = Quantized4Bit::from_parts(PACKED.to_vec(), owned, 4, 64, BlockSize::B64).unwrap();
    assert_eq!(bits(&weight.dequantize()), bits(&owned.dequantize()));
}

#[test]
fn ranges_that_do_not_fit_are_errors() {
    let bytes: SharedBytes = Arc::new([0_u8; 10]);
    let u8s = |range| Store::<u8>::shared(bytes.clone(), range).map(drop).unwrap_err().to_string();
    let f32s = |range| Store::<f32>::shared(bytes.clone(), range).map(drop).unwrap_err().to_string();
    assert_eq!(u8s(3..11), "bytes 3..11 do not lie in 0..10");
    assert_eq!(f32s(11..11), "bytes 11..11 do not lie in 0..10");
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is wrong with it")]
    let reversed = 5..3;
    assert_eq!(u8s(reversed), "bytes 5..3 do not lie in 0..10");
    assert_eq!(f32s(0..7), "bytes of f32 values: expected length 8, got 7");
    assert_eq!(f32s(2..usize::MAX), format!("bytes 2..{} do not lie in 0..10", usize::MAX));
    assert!(Store::<u8>::shared(bytes.clone(), 10..10).unwrap().as_slice().is_empty());
    assert!(Store::<f32>::shared(bytes.clone(), 1..1).unwrap().as_slice().is_empty());
}

#[test]
fn values_that_are_not_finite_are_found_in_shared_scales_too() {
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        for offset in 0..4 {
            let mut file = vec![0; 64 + 16];
            let start = (4 + offset - file.as_ptr().addr() % 4) % 4;
            file[start + 4..start + 8].copy_from_slice(&bad.to_le_bytes());
            let file: SharedBytes = Arc::new(file);
            let absmax = AbsmaxBuf::plain(Store::<f32>::shared(file.clone(), start..start + 8).unwrap());
            let packed = Store::<u8>::shared(file, 8..72).unwrap();
            let error = Quantized4Bit::from_parts(packed, absmax, 2, 64, BlockSize::B64).unwrap_err();
            assert_eq!(error.to_string(), format!("absmax: value 1 is {name}, which is not finite"));
        }
    }
}

/// Bytes that become fewer after some calls, which no owner may do.
struct Shrinks(Vec<u8>, AtomicUsize);

impl AsRef<[u8]> for Shrinks {
    fn as_ref(&self) -> &[u8] {
        let left = self.1.load(Ordering::Relaxed);
        if left == 0 { &self.0[..9] } else { &self.0 }
    }
}

#[test]
fn an_owner_that_breaks_its_word_causes_errors_and_no_panic() {
    let owner = Arc::new(Shrinks(vec![1; 64 + 64], AtomicUsize::new(1)));
    let bytes: SharedBytes = owner.clone();
    let packed = Store::<u8>::shared(bytes, 0..128).unwrap();
    let absmax = AbsmaxBuf::plain(vec![1.0; 4]);
    let weight = Quantized4Bit::from_parts(packed, absmax, 4, 64, BlockSize::B64).unwrap();
    let mut layer = QLoRALayer::from_parts(weight.clone(), adapter(4, 64, 2)).unwrap();
    let mut scratch = layer.scratch(1);
    owner.1.store(0, Ordering::Relaxed);
    let gone = "packed codes: expected length 128, got 0";
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert_eq!(message(layer.forward_into(&[1.0; 64], &mut scratch, &mut [0.0; 4])), gone);
    assert_eq!(message(layer.merge_rows_into(0..1, &mut [0.0_f32; 64])), gone);
    assert_eq!(message(layer.refresh_dora()), gone);
    assert_eq!(message(weight.dequantize_rows(0..1, &mut [0.0_f32; 64])), gone);
    let x = nf4::Tensor::zeros(64, false);
    assert_eq!(message(layer.try_backward(&x, &nf4::Tensor::zeros(4, false)).map(drop)), gone);
    let mut multi = MultiAdapterLayer::new(weight);
    assert_eq!(message(multi.try_forward(&x, Adapters::Active).map(drop)), gone);
    assert_eq!(message(multi.add("a", adapter(4, 64, 2)).map(drop)), gone);
}

/// Layers that share their inputs, as those of an attention block do.
#[test]
fn shared_inputs_give_the_bits_of_a_forward() {
    for k in all_kernels() {
        for (d_in, arithmetic) in
            Arithmetic::ALL.into_iter().flat_map(|arithmetic| [D_IN, 96, 40].map(|d_in| (d_in, arithmetic)))
        {
            // One group, several block sizes and numbers of outputs.
            let layers: Vec<_> = [(40, 4, BlockSize::B64), (1, 2, BlockSize::B128), (130, 9, BlockSize::B4096)]
                .map(|(d_out, rank, block)| layer(d_out, d_in, rank, block, true))
                .map(|layer| layer.with_kernels(k).with_arithmetic(arithmetic))
                .into();
            let mut buffers = InputsBuf::new();
            buffers.reserve(d_in, BlockSize::B64, 5).unwrap();
            assert_eq!(buffers.memory_bytes(), InputsBuf::bytes(d_in, BlockSize::B64, 5));
            let mut scratch = Scratch::new();
            layers.iter().for_each(|l| scratch.reserve(l.d_out(), 0, BlockSize::B64, l.rank(), 5).unwrap());
            for batch in [5, 1, 0] {
                let x: Vec<bf16> = normal(batch * d_in, 1.0, 4).iter().map(|x| bf16::from_f32(*x)).collect();
                let inputs = layers[0].quantize_inputs(&x, &mut buffers).unwrap();
                assert_eq!((inputs.batch(), inputs.d_in()), (batch, d_in));
                for layer in &layers {
                    let [mut y, mut expected] =
                        [vec![f32::NAN; batch * layer.d_out()], vec![0.0; batch * layer.d_out()]];
                    layer.forward_shared(&inputs, &mut scratch, &mut y).unwrap();
                    layer.forward_into(&x, &mut layer.scratch(batch), &mut expected).unwrap();
                    assert_eq!(bits(&y), bits(&expected), "{}, {arithmetic:?}, {d_in} inputs, batch {batch}", k.isa());
                }
                let mut multi = MultiAdapterLayer::new(layers[0].base_weight_quantized().clone())
                    .with_kernels(k)
                    .with_arithmetic(arithmetic);
                let id = multi.add("a", layers[0].adapter().clone()).unwrap();
                let (mut y, choice) = (vec![f32::NAN; batch * multi.d_out()], vec![Some(id); batch]);
                multi.forward_shared(&inputs, Adapters::PerVector(&choice), &mut scratch, &mut y).unwrap();
                let mut expected = vec![0.0; y.len()];
                layers[0].forward_shared(&inputs, &mut scratch, &mut expected).unwrap();
                assert_eq!(bits(&y), bits(&expected), "{}", k.isa());
            }
        }
    }
}

#[test]
fn inputs_of_another_layer_that_do_not_fit_are_errors() {
    let prepared = layer(3, 64, 1, BlockSize::B64, false);
    let mut buffers = InputsBuf::new();
    let small = prepared.quantize_inputs(&[0.0; 64], &mut buffers).map(drop).unwrap_err();
    assert_eq!(small.to_string(), "scratch for activation values: expected length 64, got 0");
    let small = prepared.quantize_inputs(&[bf16::ZERO; 64], &mut buffers).map(drop).unwrap_err();
    assert_eq!(small.to_string(), "scratch for inputs: expected length 64, got 0");
    buffers.reserve(64, BlockSize::B64, 2).unwrap();
    let ragged = prepared.quantize_inputs(&[0.0; 65], &mut buffers).map(drop).unwrap_err();
    assert_eq!(ragged.to_string(), "a batch of vectors of 64 values cannot have 65");

    let message = |layer: QLoRALayer, inputs: &Inputs<'_>| {
        let (mut scratch, mut y) = (layer.scratch(1), vec![0.0; layer.d_out()]);
        layer.forward_shared(inputs, &mut scratch, &mut y).unwrap_err().to_string()
    };
    let inputs = prepared.quantize_inputs(&[0.5; 64], &mut buffers).unwrap();
    assert_eq!(message(layer(3, 128, 1, BlockSize::B64, false), &inputs), "input: expected length 128, got 64");
    let group = "activations are quantized in groups of 64, but the matrix's block size needs groups of 32";
    assert_eq!(message(layer(3, 64, 1, BlockSize::B32, false), &inputs), group);
    // In f32 they serve any layer.
    let (floats, mut y) = (layer(3, 64, 1, BlockSize::B32, false).with_arithmetic(Arithmetic::F32), [0.0; 3]);
    floats.forward_shared(&inputs, &mut floats.scratch(1), &mut y).unwrap();

    let mut buffers = InputsBuf::new();
    buffers.reserve(64, BlockSize::B64, 1).unwrap();
    let unquantized = floats.quantize_inputs(&[0.5; 64], &mut buffers).unwrap();
    let arithmetic = "the inputs were quantized for the f32 arithmetic, but the layer uses 16x4";
    assert_eq!(message(prepared.clone(), &unquantized), arithmetic);
    let coarse = prepared.clone().with_arithmetic(Arithmetic::EightByEight);
    let bytes = coarse.quantize_inputs(&[0.5; 64], &mut buffers).unwrap();
    let arithmetic = "the inputs were quantized for the 8x8 arithmetic, but the layer uses 16x4";
    assert_eq!(message(prepared.clone(), &bytes), arithmetic);
    // They do not depend on the block size.
    let mut y = [[0.0; 3]; 2];
    let other = layer(3, 64, 1, BlockSize::B32, false).with_arithmetic(Arithmetic::EightByEight);
    other.forward_shared(&bytes, &mut other.scratch(1), &mut y[0]).unwrap();
    other.forward_into(&[0.5; 64], &mut other.scratch(1), &mut y[1]).unwrap();
    assert_eq!(bits(&y[0]), bits(&y[1]));

    // Other kernels have the same bits, or refuse what is in another order.
    for [one, other] in all_kernels().iter().flat_map(|a| all_kernels().into_iter().map(|b| [*a, b])) {
        let (one, other) = (prepared.clone().with_kernels(one), prepared.clone().with_kernels(other));
        let x = normal(64, 1.0, 4);
        let inputs = one.quantize_inputs(&x, &mut buffers).unwrap();
        let mut y = [[0.0; 3]; 2];
        one.forward_shared(&inputs, &mut one.scratch(1), &mut y[0]).unwrap();
        match other.forward_shared(&inputs, &mut other.scratch(1), &mut y[1]) {
            Ok(()) => assert_eq!(bits(&y[0]), bits(&y[1]), "{} and {}", one.kernels().isa(), other.kernels().isa()),
            Err(error) => assert_eq!(error, Error::Shape(ShapeError::Order)),
        }
    }
}
