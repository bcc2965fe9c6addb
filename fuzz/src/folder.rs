//! A folder for the command line tool to work in: two models, an adapter, links, and what is none of these.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::files::{ADAPTERS, LAYERS};

/// The files, by their paths below `work`, but for one that stands beside it.
pub const FILES: [(&str, &[u8]); 14] = [
    ("dense/config.json", br#"{"model_type":"llama","torch_dtype":"float32"}"#),
    ("dense/model.safetensors", DENSE),
    ("dense/tokenizer.json", b"{}"),
    ("dense/old.bin", b"weights of another format"),
    ("sharded/config.json", b"{}"),
    (
        "sharded/model.safetensors.index.json",
        br#"{"weight_map":{"weight":"a.safetensors","x.weight":"b.safetensors"}}"#,
    ),
    ("sharded/a.safetensors", LAYERS[0]),
    ("sharded/b.safetensors", DENSE),
    ("nf4.safetensors", LAYERS[1]),
    ("base.safetensors", include_bytes!("../../tests/data/reference/peft/rank1/base.safetensors")),
    ("adapter/adapter_config.json", ADAPTERS[0].0),
    ("adapter/adapter_model.safetensors", ADAPTERS[0].1),
    ("letter.txt", b"dear"),
    ("../letter.txt", b"dear, too"),
];

/// Two tensors of 4 x 4 and 2 elements.
const DENSE: &[u8] = b"\x80\0\0\0\0\0\0\0\
    {\"x.weight\":{\"dtype\":\"F32\",\"shape\":[4,4],\"data_offsets\":[0,64]},\
    \"y\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[64,68]}}        \
    \0\0\x80\x3f\0\0\x80\x3f\0\0\x80\xbf\0\0\0\x3f\0\0\x80\x3f\0\0\x80\x3f\0\0\x80\xbf\0\0\0\x3f\
    \0\0\x80\x3f\0\0\x80\x3f\0\0\x80\xbf\0\0\0\x3f\0\0\x80\x3f\0\0\x80\x3f\0\0\x80\xbf\0\0\0\x3f\x80\x3f\0\x40";

/// Links and what they lead to.
const LINKS: [(&str, &str); 4] =
    [("link", "dense"), ("link.safetensors", "nf4.safetensors"), ("nowhere", "gone"), ("circle", "circle")];

/// What command lines are made of beside single characters.
pub const WORDS: [&[u8]; 63] = [
    b"inspect",
    b"quantize",
    b"dequantize",
    b"merge",
    b"verify",
    b"bench",
    b"--out",
    b"--force",
    b"--json",
    b"--quiet",
    b"--threads",
    b"--block-size",
    b"--double-quant",
    b"--skip",
    b"--quantize-head",
    b"--compute-dtype",
    b"--adapter",
    b"--dtype",
    b"--shape",
    b"--batch",
    b"--rounds",
    b"--help",
    b"--version",
    b"dense",
    b"sharded",
    b"adapter",
    b"letter.txt",
    b"nf4.safetensors",
    b"base.safetensors",
    b"dense/model.safetensors",
    b"dense/config.json",
    b"dense/tokenizer.json",
    b"sharded/a.safetensors",
    b"sharded/b.safetensors",
    b"sharded/model.safetensors.index.json",
    b"adapter/adapter_config.json",
    b"adapter/adapter_model.safetensors",
    b"link",
    b"link.safetensors",
    b"link/model.safetensors",
    b"nowhere",
    b"circle",
    b"empty",
    b"home",
    b"out",
    b"dense/out",
    b"dense/../out",
    b"no/such/folder",
    b"../letter.txt",
    b"..",
    b".safetensors",
    b"f32",
    b"f16",
    b"bf16",
    b"64",
    b"4096",
    b"16x16",
    b"18446744073709551615",
    b"-1",
    b"=",
    b"weight",
    b"\xff",
    LONG,
];

/// A name that no file system takes.
const LONG: &[u8] = &[b'n'; 300];

/// What happens at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comer {
    /// Nothing at all.
    Nothing,
    /// What stands there goes.
    Gone,
    /// A file comes.
    File,
    /// A directory with a letter in it.
    Letters,
    /// A directory without anything in it.
    Empty,
    /// A model as the tool makes them.
    Model,
    /// Such a model, with a directory in it.
    Deep,
    /// A link to a model.
    Link,
    /// A link to nothing.
    Dangling,
    /// The model `dense`, which is moved there.
    Moved,
    /// The file `nf4.safetensors`, which is moved there.
    MovedFile,
}

impl Comer {
    /// All of them, the first of which is nothing.
    pub const ALL: [Self; 11] = [
        Self::Nothing,
        Self::Gone,
        Self::File,
        Self::Letters,
        Self::Empty,
        Self::Model,
        Self::Deep,
        Self::Link,
        Self::Dangling,
        Self::Moved,
        Self::MovedFile,
    ];
}

/// A folder of this process, in the folder for temporary files.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Where the fuzzer itself works.
    home: PathBuf,
    /// What there is at the beginning.
    fresh: Contents,
}

/// All paths; with the bytes of files and the targets of links, and nothing for folders.
pub type Contents = BTreeMap<PathBuf, Option<Vec<u8>>>;

impl Folder {
    /// Writes it.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it writes files")]
    pub fn new() -> Self {
        let root = std::env::temp_dir().join(format!("nf4-fuzz-{}", std::process::id()));
        let home = std::env::current_dir().expect("there is one");
        fs::create_dir_all(&root).expect("a folder for temporary files");
        let root = root.canonicalize().expect("just made");
        let mut folder = Self { root, home, fresh: Contents::new() };
        folder.write();
        folder.fresh = folder.contents();
        folder
    }

    fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    fn write(&self) {
        fs::remove_dir_all(&self.root).expect("it is ours");
        let work = self.work();
        for folder in ["dense/sub", "sharded", "adapter", "empty", "home"] {
            fs::create_dir_all(work.join(folder)).expect("in our folder");
        }
        for (name, bytes) in FILES {
            fs::write(work.join(name), bytes).expect("in our folder");
        }
        fs::write(work.join("home/letter.txt"), "dear").expect("in our folder");
        fs::write(work.join(OsStr::from_bytes(b"\xff.safetensors")), DENSE).expect("in our folder");
        for (link, target) in LINKS {
            symlink(target, work.join(link)).expect("in our folder");
        }
    }

    /// Puts everything back.
    pub fn restore(&self) {
        if self.contents() != self.fresh {
            self.write();
        }
    }

    /// Gives a file other bytes, or takes it away.
    pub fn replace(&self, name: &str, bytes: Option<&[u8]>) {
        let path = self.work().join(name);
        bytes.map_or_else(|| fs::remove_file(&path), |bytes| fs::write(&path, bytes)).expect("in our folder");
    }

    /// Has something come to a place, in place of what is there; not to one that holds the folder of work or what would
    /// come. Returns what was moved.
    pub fn come(&self, place: &Path, comer: Comer) -> Option<PathBuf> {
        let work = self.work();
        let [dense, file] = ["dense", "nf4.safetensors"].map(|name| work.join(name));
        if comer == Comer::Nothing || [&work, &dense, &file].iter().any(|path| path.starts_with(place)) {
            return None;
        }
        if !place.parent().is_some_and(Path::is_dir) || place.starts_with(&dense) {
            return None;
        }
        if place.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            fs::remove_dir_all(place).expect("in our folder");
        } else if place.symlink_metadata().is_ok() {
            fs::remove_file(place).expect("in our folder");
        }
        let directory = |files: &[&str]| {
            fs::create_dir(place).expect("in our folder");
            files.iter().for_each(|name| fs::write(place.join(name), "dear").expect("in our folder"));
        };
        match comer {
            Comer::Nothing | Comer::Gone => {}
            Comer::File => fs::write(place, "dear").expect("in our folder"),
            Comer::Letters => directory(&["letter.txt"]),
            Comer::Empty => directory(&[]),
            Comer::Model => directory(&["config.json", "model.safetensors"]),
            Comer::Deep => {
                directory(&["config.json", "model.safetensors"]);
                fs::create_dir(place.join("letters")).expect("in our folder");
            }
            Comer::Link => symlink(&dense, place).expect("in our folder"),
            Comer::Dangling => symlink("gone", place).expect("in our folder"),
            Comer::Moved => fs::rename(&dense, place).expect("in our folder"),
            Comer::MovedFile => fs::rename(&file, place).expect("in our folder"),
        }
        match comer {
            Comer::Moved => Some(dense),
            Comer::MovedFile => Some(file),
            _ => None,
        }
    }

    /// Runs something in the folder.
    pub fn enter(&self, run: impl FnOnce()) {
        std::env::set_current_dir(self.work()).expect("it is there");
        run();
        std::env::set_current_dir(&self.home).expect("it was there");
    }

    /// What there is now.
    #[must_use]
    pub fn contents(&self) -> Contents {
        let mut all = Contents::new();
        read(&self.root, &mut all);
        all
    }
}

fn read(folder: &Path, all: &mut Contents) {
    for entry in fs::read_dir(folder).expect("in our folder") {
        let path = entry.expect("in our folder").path();
        if path.is_symlink() {
            let target = fs::read_link(&path).expect("a link");
            all.insert(path, Some(target.into_os_string().into_encoded_bytes()));
        } else if path.is_dir() {
            read(&path, all);
            all.insert(path, None);
        } else {
            all.insert(path.clone(), Some(fs::read(&path).expect("a file")));
        }
    }
}
