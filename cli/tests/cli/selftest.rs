//! `selftest`: that it runs every instruction set, and sees a difference (which unit tests show).

use nf4::Kernels;

use crate::run::{json, nf4};

const HASHES: [(&str, &str); 3] =
    [("hash", "4045a7867415edb5"), ("hash_8x8", "534327dad5096746"), ("hash_transposed_16x4", "50d0d391386cdb92")];

#[test]
fn every_instruction_set() {
    let report = json(&["selftest", "--shapes", "5", "--rounds", "1"]);
    assert_eq!(report["good"], true);
    for (name, hash) in HASHES {
        assert_eq!(report[name], hash);
    }
    assert!(!report["machine"]["processor"].as_str().unwrap().is_empty());
    let sets = report["instruction_sets"].as_array().unwrap();
    let names: Vec<_> = Kernels::available().map(|kernels| kernels.isa().name()).collect();
    assert_eq!(sets.iter().map(|set| set["isa"].as_str().unwrap()).collect::<Vec<_>>(), names);
    for set in sets {
        for (name, hash) in HASHES {
            assert_eq!(set[name], hash, "{set}");
        }
        assert!(set["one_vector"]["gmac_per_s"].as_f64().unwrap() > 0.0, "{set}");
    }
    println!("checked {names:?} on {}", report["machine"]["processor"]);
}

#[test]
fn one_screen() {
    let outcome = nf4(&["selftest", "--shapes", "2", "--rounds", "0", "--seed", "9"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.lines().count() < 24, "{}", outcome.stdout);
    assert!(outcome.stdout.contains("4045a7867415edb5") && outcome.stdout.contains("2 equal"), "{}", outcome.stdout);
    assert!(outcome.stdout.ends_with("All instruction sets return the same bits.\n"), "{}", outcome.stdout);
}
