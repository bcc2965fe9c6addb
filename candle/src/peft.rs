//! The two files of a PEFT adapter.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use candle_core::{Error, Result};
use nf4::checkpoint::{FloatType, PeftAdapter, TensorFile};

use crate::QLoRALinear;
use crate::values::wrap;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The adapter of these layers, with the values that their variables have now and the names of their modules.
///
/// # Errors
/// [`nf4::Error::NotFinite`] if a value is NaN or infinite; [`nf4::checkpoint::CheckpointError::Unsupported`] if some
/// layers have `rsLoRA` scaling and others not, which PEFT cannot say.
pub fn peft_adapter<'a>(layers: impl IntoIterator<Item = &'a QLoRALinear>) -> Result<PeftAdapter> {
    let modules = layers.into_iter().map(|layer| Ok((layer.name().to_string(), layer.adapter()?)));
    PeftAdapter::new(modules.collect::<Result<Vec<_>>>()?).map_err(wrap)
}

/// Reads `adapter_config.json` and `adapter_model.safetensors` in a directory. [`PeftAdapter::module`] then has the adapter
/// of each module, for [`QLoRALinear::new`].
///
/// # Errors
/// If a file is missing or not what its name says; the message names it.
pub fn load_peft(directory: impl AsRef<Path>) -> Result<PeftAdapter> {
    let read = |name: &str| {
        let path = directory.as_ref().join(name);
        fs::read(&path).map_err(|error| Error::from(error).with_path(path))
    };
    let (config, tensors) = (read(CONFIG)?, read(TENSORS)?);
    let at = |error| wrap(error).with_path(&directory);
    PeftAdapter::load(&config, &TensorFile::parse(&tensors).map_err(at)?).map_err(at)
}

/// Writes both files of an adapter into a directory, which is made if it is not there. Values are rounded to `float`.
///
/// Each file is written beside its place, synced, and renamed, so that none is ever half there; the tensors come first. For
/// both at once, write into a new directory and rename that.
///
/// # Errors
/// If a file cannot be written; those of [`PeftAdapter::to_files`].
pub fn save_peft(adapter: &PeftAdapter, directory: impl AsRef<Path>, float: FloatType) -> Result<()> {
    let directory = directory.as_ref();
    let (config, tensors) = adapter.to_files(float).map_err(wrap)?;
    fs::create_dir_all(directory).map_err(|error| Error::from(error).with_path(directory))?;
    for (name, bytes) in [(TENSORS, tensors.as_slice()), (CONFIG, config.as_bytes())] {
        let (path, partial) = (directory.join(name), directory.join(format!("{name}.partial")));
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&partial, &path)
        };
        write().map_err(|error| Error::from(error).with_path(&path))?;
    }
    Ok(())
}
