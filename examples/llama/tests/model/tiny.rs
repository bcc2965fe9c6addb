//! The tiny models of `tests/data`, without a file system: these tests run in WebAssembly too.

use std::borrow::Cow;

use nf4::checkpoint::{CheckpointError, PeftAdapter, TensorFile, TensorInfo, TensorSource};
use nf4_llama::{AdapterId, Cache, CacheType, Config, Logits, Model, Options, Part, Workspace};

/// A tiny model of a family, and what transformers makes of it.
pub(crate) struct Tiny {
    pub(crate) name: &'static str,
    pub(crate) config: &'static [u8],
    pub(crate) shards: &'static [&'static [u8]],
    pub(crate) reference: &'static [u8],
}

macro_rules! data {
    ($file:literal) => {
        include_bytes!(concat!("../data/", $file))
    };
}

pub(crate) const LLAMA: Tiny = Tiny {
    name: "llama",
    config: data!("llama/config.json"),
    shards: &[data!("llama/model.safetensors")],
    reference: data!("llama/reference.safetensors"),
};

pub(crate) const ALL: [Tiny; 4] = [
    LLAMA,
    Tiny {
        name: "mistral",
        config: data!("mistral/config.json"),
        shards: &[
            data!("mistral/model-00001-of-00003.safetensors"),
            data!("mistral/model-00002-of-00003.safetensors"),
            data!("mistral/model-00003-of-00003.safetensors"),
        ],
        reference: data!("mistral/reference.safetensors"),
    },
    Tiny {
        name: "qwen2",
        config: data!("qwen2/config.json"),
        shards: &[data!("qwen2/model.safetensors")],
        reference: data!("qwen2/reference.safetensors"),
    },
    Tiny {
        name: "qwen3",
        config: data!("qwen3/config.json"),
        shards: &[data!("qwen3/model.safetensors")],
        reference: data!("qwen3/reference.safetensors"),
    },
];

/// The adapters of `llama`, by name: configuration and tensors.
pub(crate) const ADAPTERS: [(&str, &[u8], &[u8]); 2] = [
    ("one", data!("llama/adapter_one/adapter_config.json"), data!("llama/adapter_one/adapter_model.safetensors")),
    ("two", data!("llama/adapter_two/adapter_config.json"), data!("llama/adapter_two/adapter_model.safetensors")),
];

impl Tiny {
    pub(crate) fn load(&self, options: Options) -> Model {
        let shards = Shards(self.shards.iter().map(|bytes| TensorFile::parse(bytes).unwrap()).collect());
        Model::load(Config::parse(self.config).unwrap(), &shards, options, |_, _| {}).unwrap()
    }

    /// With both adapters.
    pub(crate) fn load_with_adapters(&self, options: Options) -> Model {
        let mut model = self.load(options);
        for (name, config, tensors) in ADAPTERS {
            let adapter = PeftAdapter::load(config, &TensorFile::parse(tensors).unwrap()).unwrap();
            model.add_adapter(name, &adapter).unwrap();
        }
        model
    }

    /// The tokens of the reference.
    pub(crate) fn ids(&self) -> Vec<u32> {
        let file = TensorFile::parse(self.reference).unwrap();
        file.read("ids").unwrap().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    }

    /// Logits of the reference, `[tokens, vocabulary]`.
    pub(crate) fn reference(&self, name: &str) -> Vec<f32> {
        let file = TensorFile::parse(self.reference).unwrap();
        file.read(name).unwrap().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// The logits of all tokens, in one pass.
pub(crate) fn logits(model: &Model, ids: &[u32], adapter: Option<AdapterId>, cache: CacheType) -> Vec<f32> {
    let mut workspace = Workspace::new(model, ids.len(), ids.len()).unwrap();
    let mut cache = Cache::new(model.config(), ids.len(), cache).unwrap();
    let parts = &mut [Part { cache: &mut cache, tokens: ids, adapter }];
    model.forward(parts, Logits::All, &mut workspace).unwrap().to_vec()
}

struct Shards(Vec<TensorFile<'static>>);

impl TensorSource for Shards {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.0.iter().flat_map(|file| file.names()))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.iter().find_map(|file| file.info(name))
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let file = self.0.iter().find(|file| file.info(name).is_some());
        file.ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() })?.read(name)
    }
}
