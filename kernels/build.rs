//! Sets `cfg(nf4_dsp)` where the target has Arm's DSP extension.
//!
//! A stable compiler does not show `target_feature = "dsp"`, and no other `cfg` tells `thumbv7em` from `thumbv7m`, so the name
//! of the target decides: every ARMv7E-M core has the extension. Where it is optional (ARMv8-M), build with
//! `RUSTFLAGS="-C target-cpu=cortex-m33 --cfg nf4_dsp"`, or with a compiler that shows the feature.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(nf4_dsp)");
    let variable = |name| env::var(name).unwrap_or_default();
    let arm = variable("CARGO_CFG_TARGET_ARCH") == "arm";
    let named = variable("TARGET").starts_with("thumbv7em-");
    let shown = variable("CARGO_CFG_TARGET_FEATURE").split(',').any(|feature| feature == "dsp");
    if arm && (named || shown) {
        println!("cargo::rustc-cfg=nf4_dsp");
    }
}
