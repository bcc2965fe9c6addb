use nf4::*;
fn rng(s: &mut u64) -> f32 { let mut t=0.0; for _ in 0..4 { *s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); t += (*s >> 40) as f32 / (1u64<<24) as f32 - 0.5;} t }
#[test]
fn smoke() {
    let mut s = 1;
    for bs in BlockSize::ALL { for (rows, cols) in [(3usize,4096usize),(5,8192),(7, 96),(4,63),(1,64),(9,160)] {
        let w: Vec<f32> = (0..rows*cols).map(|_| rng(&mut s)).collect();
        let x: Vec<f32> = (0..cols).map(|_| rng(&mut s)).collect();
        let mut outs = vec![];
        for k in [Kernels::scalar()].into_iter().chain(Kernels::available()) {
            let n = rows*cols;
            let (mut p, mut a) = (vec![0u8; n.div_ceil(2)], vec![0f32; bs.blocks(n)]);
            k.quantize(&w, bs, &mut p, &mut a).unwrap();
            let h: Vec<f16> = w.iter().map(|x| f16::from_f32(*x)).collect();
            let (mut p2, mut a2) = (vec![0u8; n.div_ceil(2)], vec![0f32; bs.blocks(n)]);
            k.quantize(&h, bs, &mut p2, &mut a2).unwrap();
            let m = Nf4Matrix::new(&p, Absmax::Plain(&a), rows, cols, bs).unwrap();
            let mut d = vec![0f32; n]; k.dequantize(&m, &mut d).unwrap();
            let mut dh = vec![f16::ZERO; n]; k.dequantize(&m, &mut dh).unwrap();
            let mut db = vec![bf16::ZERO; n]; k.dequantize(&m, &mut db).unwrap();
            let (mut v, mut sc) = (vec![0i16; Activations::values_len(cols, bs)], vec![0f32; Activations::scales_len(cols, bs)]);
            let act = k.quantize_activations(&x, bs, &mut v, &mut sc).unwrap();
            let mut y = vec![0f32; rows]; k.gemv(&m, &act, &mut y).unwrap();
            let mut y2 = vec![0f32; rows]; k.gemv_f32(&m, &x, &mut y2).unwrap();
            let mut y3 = vec![0f32; rows]; k.gemv_dense(&d, &x, &mut y3).unwrap();
            for (a,b) in y.iter().zip(&y3) { assert!((a-b).abs() < 1e-3*40.0, "{a} {b}"); }
            for (a,b) in y2.iter().zip(&y3) { assert!((a-b).abs() < 1e-4, "{a} {b}"); }
            outs.push((k.isa(), (p.clone(), a.iter().map(|x|x.to_bits()).collect::<Vec<_>>(), p2.clone(), d.clone(), dh, db, v.clone(), y.clone(), y2, y3)));
        }
        for o in &outs { assert!(o.1 == outs[0].1, "{} {bs:?} {rows}x{cols}", o.0); }
    }}
}
