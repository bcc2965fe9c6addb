//! What this machine is, as far as a program without privileges can say.

use std::fs;
use std::process::Command;

/// Names and values, in the order in which they are shown.
pub(super) fn describe() -> Vec<(&'static str, String)> {
    let threads = std::thread::available_parallelism().map_or(0, usize::from);
    vec![
        ("nf4", env!("CARGO_PKG_VERSION").to_owned()),
        ("processor", processor().unwrap_or_else(|| "unknown".to_owned())),
        ("system", format!("{} {}, {threads} processors", std::env::consts::ARCH, std::env::consts::OS)),
        ("features", features().join(" ")),
    ]
}

/// The processor's name: from Linux, Apple's systems or Windows.
fn processor() -> Option<String> {
    let sysctl = |name| {
        let output = Command::new("/usr/sbin/sysctl").args(["-n", name]).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|name| !name.is_empty())
    };
    if cfg!(target_vendor = "apple") {
        return sysctl("machdep.cpu.brand_string");
    }
    if cfg!(windows) {
        return std::env::var("PROCESSOR_IDENTIFIER").ok();
    }
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let device = || fs::read_to_string("/proc/device-tree/model").ok();
    name(&info, device().as_deref())
}

/// The name in Linux's `/proc/cpuinfo`. Arm has numbers of the maker and the part there, and perhaps a name of the whole
/// device elsewhere.
fn name(info: &str, device: Option<&str>) -> Option<String> {
    let field = |name: &str| {
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    if let Some(name) = field("model name") {
        let numbers = ["cpu family", "model", "stepping"].map(|name| field(name).unwrap_or_else(|| "?".to_owned()));
        return Some(format!("{name} (family {}, model {}, stepping {})", numbers[0], numbers[1], numbers[2]));
    }
    let arm = field("CPU implementer").zip(field("CPU part")).map(|(maker, part)| format!("Arm {maker} part {part}"));
    let device = device.map(|name| name.trim_end_matches('\0').to_owned());
    match (arm, device) {
        (Some(arm), Some(device)) => Some(format!("{arm}, {device}")),
        (arm, device) => arm.or(device).or_else(|| field("cpu")).or_else(|| field("uarch")),
    }
}

/// The features that kernels use or may use.
fn features() -> Vec<&'static str> {
    macro_rules! detected {
        ($is_detected:ident: $($name:tt)*) => {
            [$(($name, std::arch::$is_detected!($name))),*].into_iter().filter(|f| f.1).map(|f| f.0).collect()
        };
    }
    #[cfg(target_arch = "x86_64")]
    return detected!(is_x86_feature_detected:
        "avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16" "avx512vbmi");
    #[cfg(target_arch = "aarch64")]
    return detected!(is_aarch64_feature_detected: "neon" "fp16" "dotprod" "i8mm" "bf16" "sve" "sve2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Vec::new();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let x86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 68\n\
                   model name\t: AMD Ryzen 9 9950X 16-Core Processor\nstepping\t: 0\n";
        let expected = "AMD Ryzen 9 9950X 16-Core Processor (family 26, model 68, stepping 0)";
        assert_eq!(name(x86, None).unwrap(), expected);
        let arm = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n";
        assert_eq!(name(arm, Some("Raspberry Pi 5 Model B\0")).unwrap(), "Arm 0x41 part 0xd0b, Raspberry Pi 5 Model B");
        assert_eq!(name(arm, None).unwrap(), "Arm 0x41 part 0xd0b");
        assert_eq!(name("cpu\t: POWER9\n", None).unwrap(), "POWER9");
        assert_eq!(name("", None), None);
    }

    #[test]
    fn this_machine() {
        let all = describe();
        println!("{all:?}");
        assert_eq!(all.len(), 4);
        assert!(all[..3].iter().all(|(_, value)| !value.is_empty()));
    }
}
