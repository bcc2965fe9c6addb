// The generator of the test vector and of the tests' inputs. It needs neither `std` nor a heap, and gives the same values on
// every machine. The tests include it from `tests/support/generator.rs`.

/// `SplitMix64` (Steele, Lea, Flood 2014), and from it values that are exact in f32 on every machine.
pub(crate) struct Generator(pub u64);

impl Generator {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A multiple of `2^-21` in `[-2, 2)`, bell-shaped: the sum of four uniform 21-bit parts of a draw and the next. One in
    /// sixteen is sixteen times as large.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "below 2^24, exact")]
    pub(crate) fn value(&mut self) -> f32 {
        let (a, b) = (self.next(), self.next());
        let parts = [a, a >> 21, b, b >> 21].map(|p| (p & 0x1f_ffff) as i32);
        let sum = parts.iter().sum::<i32>() - (1 << 22);
        let value = sum as f32 / (1 << 21) as f32;
        if (a >> 60) == 0 { value * 16.0 } else { value }
    }

    pub(crate) fn fill(&mut self, out: &mut [f32]) {
        out.iter_mut().for_each(|x| *x = self.value());
    }

    /// Uniform in `[0, 1)`.
    #[allow(clippy::cast_precision_loss, reason = "24 bits, exact")]
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 16_777_216.0
    }

    /// About normal with deviation 1: the sum of twelve uniform numbers, less 6. Unlike with a logarithm and a cosine, the
    /// bits are the same on every machine.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}
