//! A tree of reference data: `manifest.json` and the files that it names.

use core::panic::AssertUnwindSafe;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nf4::{BlockSize, Kernels};
use serde_json::Value;

use super::compare::Checker;
use super::tensors::Tensors;

/// The kernels to test: all that this CPU has.
///
/// Fails if one is missing that the environment variable `NF4_REQUIRE_ISA` names (`avx2`, or `neon,scalar`), so that
/// a test machine without it cannot pass in silence.
pub(crate) fn kernels() -> Vec<Kernels> {
    let available: Vec<Kernels> = Kernels::available().collect();
    let required = std::env::var("NF4_REQUIRE_ISA").unwrap_or_default();
    for isa in required.split(',').map(str::trim).filter(|isa| !isa.is_empty()) {
        assert!(available.iter().any(|k| k.isa().name() == isa), "required ISA {isa} is missing; found {available:?}");
    }
    available
}

/// All cases of a tree.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
    pub(crate) cases: Vec<Case>,
}

impl Tree {
    /// The tree that the environment variable `NF4_REFERENCE` names, or the one in the repository.
    pub(crate) fn open() -> Self {
        let root = std::env::var_os("NF4_REFERENCE")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference"), PathBuf::from);
        let path = root.join("manifest.json");
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut manifest: Value = serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let Value::Array(cases) = manifest["cases"].take() else { panic!("{}: no cases", path.display()) };
        let cases = cases.into_iter().map(|info| Case { root: root.clone(), info }).collect();
        Self { root, cases }
    }
}

/// One case: its line of the manifest, and access to its files.
#[derive(Debug)]
pub(crate) struct Case {
    root: PathBuf,
    pub(crate) info: Value,
}

impl Case {
    pub(crate) fn id(&self) -> &str {
        self.info["id"].as_str().expect("a case without an id")
    }

    pub(crate) fn kind(&self) -> &str {
        self.info["kind"].as_str().unwrap_or_else(|| panic!("{}: no kind", self.id()))
    }

    /// Whether the input holds NaN or infinity: what `bitsandbytes` made of it was recorded, but is not a requirement.
    pub(crate) fn is_undefined(&self) -> bool {
        self.info["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == "undefined"))
    }

    pub(crate) fn number(&self, field: &str) -> usize {
        let value = self.info[field].as_u64().unwrap_or_else(|| panic!("{}: no number {field}", self.id()));
        usize::try_from(value).unwrap()
    }

    pub(crate) fn block_size(&self) -> BlockSize {
        BlockSize::new(self.number("blocksize")).unwrap_or_else(|e| panic!("{}: {e}", self.id()))
    }

    /// Rows and columns: everything before the last dimension of `shape`, and the last one.
    pub(crate) fn matrix_shape(&self) -> (usize, usize) {
        let shape = self.info["shape"].as_array().unwrap_or_else(|| panic!("{}: no shape", self.id()));
        let mut dims = shape.iter().map(|d| usize::try_from(d.as_u64().unwrap()).unwrap());
        let cols = dims.next_back().unwrap_or(1);
        (dims.product(), cols)
    }

    /// The only tensor file of a case that has one.
    pub(crate) fn tensors(&self) -> Tensors {
        let files = self.files();
        assert_eq!(files.len(), 1, "{}: number of files", self.id());
        Tensors::load(&files[0])
    }

    /// The tensor file of this name.
    pub(crate) fn tensors_in(&self, name: &str) -> Tensors {
        Tensors::load(&self.path_of(name))
    }

    /// The path of the file of this name.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        let found = self.files().into_iter().find(|f| f.file_name().is_some_and(|n| n == name));
        found.unwrap_or_else(|| panic!("{}: no file {name}", self.id()))
    }

    /// The paths of all files, whose sizes are checked.
    fn files(&self) -> Vec<PathBuf> {
        let files = self.info["files"].as_array().unwrap_or_else(|| panic!("{}: no files", self.id()));
        let path = |file: &Value| {
            let path = self.root.join(file["file"].as_str().unwrap());
            let size = std::fs::metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).len();
            assert_eq!(Some(size), file["bytes"].as_u64(), "size of {}", path.display());
            path
        };
        files.iter().map(path).collect()
    }
}

/// Runs `check` over every case of a kind on every ISA, prints what was compared, and fails with all differences.
pub(crate) fn check_kind(kind: &str, check: impl Fn(&mut Checker, &Case)) {
    let tree = Tree::open();
    let cases: Vec<&Case> = tree.cases.iter().filter(|c| c.kind() == kind).collect();
    assert!(!cases.is_empty(), "{}: no case of kind {kind}", tree.root.display());
    let mut failures = Vec::new();
    for kernels in kernels() {
        let (mut passed, mut comparisons, mut largest) = (0, 0, BTreeMap::new());
        for case in &cases {
            let mut checker = Checker::new(kernels, case.id());
            if std::panic::catch_unwind(AssertUnwindSafe(|| check(&mut checker, case))).is_err() {
                checker.holds("case", false, || "panicked, see above".to_owned());
            }
            checker.holds("case", checker.comparisons > 0, || "nothing was compared".to_owned());
            comparisons += checker.comparisons - 1;
            passed += usize::from(checker.failures.is_empty());
            failures.append(&mut checker.failures);
            for (measure, value) in checker.largest {
                let all: &mut f64 = largest.entry(measure).or_insert(0.0);
                *all = all.max(value);
            }
        }
        let errors: String =
            largest.iter().map(|(m, v)| format!("; {m} error up to {v:.3} of what is allowed")).collect();
        let (isa, total) = (kernels.isa(), cases.len());
        println!("reference {kind} on {isa}: {passed} of {total} cases passed, {comparisons} comparisons{errors}");
    }
    let shown = failures.len().min(40);
    assert!(failures.is_empty(), "{} comparisons failed:\n{}", failures.len(), failures[..shown].join("\n"));
}
