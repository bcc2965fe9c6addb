//! `selftest`: that it runs every instruction set, and sees a difference (which unit tests show).

use nf4::Kernels;

use crate::run::{json, nf4};

#[test]
fn every_instruction_set() {
    let report = json(&["selftest", "--shapes", "5", "--rounds", "1"]);
    assert_eq!(report["good"], true);
    assert_eq!((&report["hash"], &report["hash_8x8"]), (&"4045a7867415edb5".into(), &"534327dad5096746".into()));
    assert!(!report["machine"]["processor"].as_str().unwrap().is_empty());
    let sets = report["instruction_sets"].as_array().unwrap();
    let names: Vec<_> = Kernels::available().map(|kernels| kernels.isa().name()).collect();
    assert_eq!(sets.iter().map(|set| set["isa"].as_str().unwrap()).collect::<Vec<_>>(), names);
    for set in sets {
        assert_eq!((&set["hash"], &set["hash_8x8"]), (&report["hash"], &report["hash_8x8"]));
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
