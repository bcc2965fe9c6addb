//! Which weights are quantized: those of which transformers makes a 4-bit layer when it loads the model.
//!
//! transformers replaces the modules that are exactly `nn.Linear`, or `Conv1D`, except those that one of three lists skips:
//!
//! 1. `llm_int8_skip_modules` in `config.json`, or, without one, the output embedding, what is tied, and the last module;
//! 2. modules that the architecture keeps in f32.
//!
//! A file does not name the classes of modules. [`Architecture`] knows them for every architecture of transformers; for
//! others they are guessed from [`names`], with a warning. Whatever is not known to be a `Linear`, and may be one, is left as
//! it is and listed in `llm_int8_skip_modules`, so that the model loads in any case. The list is written only if
//! transformers would otherwise choose other modules.

mod architecture;
mod names;
mod renames;

use std::collections::{BTreeMap, HashMap};

use anyhow::{Result, bail};
use nf4::checkpoint::{SkippedModules, TensorInfo};
use safetensors::Dtype;
use serde_json::{Map, Value};

use architecture::{Architecture, Kind, star};

/// How the weight of a module is laid out in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[out, in]`, as `nn.Linear` has it.
    Linear,
    /// `[in, out]`, as `Conv1D` has it; transformers transposes it, and quantizes what `nn.Linear` would have.
    Transposed,
}

/// What the user wants otherwise than transformers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wishes<'a> {
    /// More modules to leave.
    pub(crate) skip: &'a [String],
    /// Quantize the output embedding as well.
    pub(crate) head: bool,
}

/// What becomes of a model's weights.
#[derive(Debug)]
pub(crate) struct Rule {
    quantized: HashMap<String, Layout>,
    /// `llm_int8_skip_modules`; `None` if transformers' own choice is right.
    pub(crate) skip_modules: Option<Vec<String>>,
    /// What the user should know, one sentence each.
    pub(crate) warnings: Vec<String>,
}

/// A tensor of the file that has two dimensions, or belongs to a module that has.
#[derive(Debug)]
struct Weight<'a> {
    tensor: &'a str,
    /// The name of the module in the model, which may differ from that in the file.
    module: String,
    fate: Fate,
    /// Why it stays, if the user should know.
    reason: Option<Reason>,
}

/// What can become of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is quantized unless its module is skipped.
    Quantize(Layout),
    /// It stays, though its module is or may be a `Linear`; so the module has to be skipped.
    Leave,
    /// It stays, and its module is no `Linear`.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// transformers has one parameter for all experts of a layer, which is no `Linear`.
    Experts,
    /// Loading joins, cuts or permutes it.
    Converted,
    /// The architecture has no such module, as far as is known.
    Unknown,
    /// It is not of a type, or not of a shape, that can be quantized.
    Unfit,
}

impl Rule {
    /// The rule for the tensors of a model, and its `config.json`.
    ///
    /// # Errors
    /// If an entry of the list of modules to skip is no regular expression, or the head is to be quantized and has no
    /// weight of its own.
    pub(crate) fn new(
        config: Option<&Map<String, Value>>,
        tensors: &[(&str, &TensorInfo)],
        wishes: Wishes<'_>,
    ) -> Result<Self> {
        let architecture = match config {
            Some(config) => Architecture::new(config, tensors.iter().map(|(name, _)| *name))?,
            None => None,
        };
        let mut weights = Vec::new();
        for &(tensor, info) in tensors {
            match &architecture {
                Some(architecture) => by_architecture(architecture, tensor, info, &mut weights)?,
                None => weights.extend(by_name(tensor, info)),
            }
        }
        let warning = || unknown_architecture(config);
        let warnings: Vec<String> = architecture.is_none().then(warning).flatten().into_iter().collect();
        let own = Own::new(architecture.as_ref(), &weights, wishes)?;
        own.rule(weights, wishes, architecture.as_ref(), warnings)
    }

    /// How the weight of a 4-bit layer is laid out; `None` if the tensor stays as it is.
    pub(crate) fn layout(&self, tensor: &str) -> Option<Layout> {
        self.quantized.get(tensor).copied()
    }
}

/// What transformers leaves by itself.
#[derive(Debug)]
struct Own {
    /// Unless there is another list: with the output embedding and without it.
    list: Vec<String>,
    without_head: Vec<String>,
    /// In any case.
    always: &'static [&'static str],
    /// Whether all that is known for certain.
    is_exact: bool,
}

impl Own {
    fn new(architecture: Option<&Architecture<'_>>, weights: &[Weight<'_>], wishes: Wishes<'_>) -> Result<Self> {
        let (without_head, head) = match architecture {
            Some(architecture) => architecture.defaults(),
            None => (Vec::new(), names::HEADS.map(str::to_owned).to_vec()),
        };
        if wishes.head {
            let tied = architecture.is_some_and(Architecture::is_tied);
            let skip = SkippedModules::new(&head)?;
            let mut found = false;
            for weight in weights {
                found |= skip.has(&weight.module)?;
            }
            if tied || !found {
                let why = if tied { "it is tied to the embedding" } else { "there is none" };
                bail!("the output head cannot be quantized: {why} ({})", head.join(", "));
            }
        }
        let list = without_head.iter().chain(&head).cloned().collect();
        let always = architecture.map_or(&[][..], Architecture::always);
        Ok(Self { list, without_head, always, is_exact: architecture.is_some_and(Architecture::is_exact) })
    }

    /// The rule, once all weights are known.
    fn rule(
        self,
        weights: Vec<Weight<'_>>,
        wishes: Wishes<'_>,
        architecture: Option<&Architecture<'_>>,
        mut warnings: Vec<String>,
    ) -> Result<Rule> {
        let always = self.always.iter().map(|&entry| entry.to_owned());
        let by_itself = SkippedModules::new(self.list.iter().cloned().chain(always.clone()))?;
        // What has to be listed: what stays and would not without it.
        let mut left = BTreeMap::<String, (Vec<&str>, bool)>::new();
        for weight in weights.iter().filter(|w| w.fate == Fate::Leave) {
            if wishes.head || !by_itself.has(&weight.module)? {
                left.entry(star(&weight.module)).or_default().0.push(&weight.module);
            }
        }
        for weight in &weights {
            if let (Some(group), Fate::Quantize(_)) = (left.get_mut(&star(&weight.module)), weight.fate) {
                group.1 = true;
            }
        }
        let is_needed = !wishes.skip.is_empty() || wishes.head || !self.is_exact || !left.is_empty();
        let own = if wishes.head { self.without_head } else { self.list };
        let mut entries: Vec<String> = own.into_iter().chain(wishes.skip.iter().cloned()).collect();
        for (starred, (modules, has_others)) in left {
            // Many layers have one entry, if it means no other module.
            if modules.len() > 1 && !has_others {
                entries.push(starred.replace('*', r"\d+"));
            } else {
                entries.extend(modules.into_iter().map(str::to_owned));
            }
        }
        let list: Vec<String> = SkippedModules::new(entries)?.entries().map(str::to_owned).collect();
        let skip = SkippedModules::new(list.iter().cloned().chain(always))?;

        let mut quantized = HashMap::new();
        for weight in &weights {
            if let Fate::Quantize(layout) = weight.fate
                && !skip.has(&weight.module)?
            {
                quantized.insert(weight.tensor.to_owned(), layout);
            }
        }
        for entry in wishes.skip {
            let entry_alone = SkippedModules::new([entry])?;
            let mut hits = false;
            for weight in &weights {
                hits |= weight.fate != Fate::Other && entry_alone.has(&weight.module)?;
            }
            if !hits {
                warnings.push(format!(
                    "--skip {entry}: no Linear layer has a name that ends so, or that this expression matches"
                ));
            }
        }
        warnings.extend(about_left(&weights, architecture));
        Ok(Rule { quantized, skip_modules: is_needed.then_some(list), warnings })
    }
}

/// What a tensor is to an architecture.
fn by_architecture<'a>(
    architecture: &Architecture<'_>,
    tensor: &'a str,
    info: &TensorInfo,
    weights: &mut Vec<Weight<'a>>,
) -> Result<()> {
    let loaded = architecture.loaded(tensor)?;
    let mut add = |module: &str, fate, reason| {
        weights.push(Weight { tensor, module: module.to_owned(), fate, reason });
    };
    if is_float(info)
        && info.shape.len() > 1
        && has_part(&loaded.name, "experts")
        && architecture.kind(module_of(&loaded.name)).is_none()
    {
        add(&loaded.name, Fate::Other, Some(Reason::Experts));
        return Ok(());
    }
    if let Some(targets) = &loaded.converted {
        for module in targets.iter().map(|target| module_of(target)) {
            let is_linear = matches!(architecture.kind(module), Some(Kind::Linear | Kind::Conv1D))
                || architecture.is_linear_with_other_settings(module);
            if is_linear {
                add(module, Fate::Leave, Some(Reason::Converted));
            }
        }
        return Ok(());
    }
    let Some(module) = loaded.name.strip_suffix(".weight") else { return Ok(()) };
    let layout = match architecture.kind(module) {
        Some(Kind::Linear) => Layout::Linear,
        Some(Kind::Conv1D) => Layout::Transposed,
        Some(Kind::Other) => {
            add(module, Fate::Other, None);
            return Ok(());
        }
        None if info.shape.len() != 2 => return Ok(()),
        None if architecture.is_linear_with_other_settings(module) => Layout::Linear,
        None => {
            add(module, Fate::Leave, Some(Reason::Unknown));
            return Ok(());
        }
    };
    // The parts of a 4-bit layer are renamed as the weight is, or it cannot be stored under this name.
    let part = architecture.loaded(&format!("{tensor}.absmax"))?;
    let follows = tensor.ends_with(".weight") && part.name == format!("{}.absmax", loaded.name);
    if !follows {
        add(module, Fate::Leave, Some(Reason::Converted));
    } else if !is_fit(info) {
        add(module, Fate::Leave, Some(Reason::Unfit));
    } else {
        add(module, Fate::Quantize(layout), None);
    }
    Ok(())
}

/// What a tensor seems to be.
fn by_name<'a>(tensor: &'a str, info: &TensorInfo) -> Option<Weight<'a>> {
    let module = tensor.strip_suffix(".weight").filter(|module| !module.is_empty() && info.shape.len() == 2)?;
    let (fate, reason) = match names::kind(module) {
        Kind::Linear if is_fit(info) => (Fate::Quantize(Layout::Linear), None),
        Kind::Linear => (Fate::Leave, Some(Reason::Unfit)),
        Kind::Conv1D | Kind::Other => (Fate::Leave, None),
    };
    Some(Weight { tensor, module: module.to_owned(), fate, reason })
}

/// Whether a weight can be quantized.
fn is_fit(info: &TensorInfo) -> bool {
    is_float(info) && info.shape.len() == 2 && !info.shape.contains(&0)
}

fn is_float(info: &TensorInfo) -> bool {
    [Dtype::F32, Dtype::F16, Dtype::BF16].contains(&info.dtype)
}

/// The module that a tensor belongs to, if it is a `weight`.
fn module_of(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

fn has_part(name: &str, part: &str) -> bool {
    name.split('.').any(|p| p == part)
}

/// What to say of a model that the table does not have.
fn unknown_architecture(config: Option<&Map<String, Value>>) -> Option<String> {
    let config = config?;
    let version = architecture::version();
    let why = match (architecture::named(config), config.get("model_type").and_then(Value::as_str)) {
        (Some(name), _) => {
            format!("the architecture {name} is not among those of transformers {version} that are known here")
        }
        (None, Some(name)) => {
            format!("the model_type {name} is not among those of transformers {version} that are known here")
        }
        (None, None) => "config.json names no architecture".to_owned(),
    };
    Some(format!(
        "{why}: what to quantize was guessed from the names of the tensors; embeddings, routers and experts stay as they are"
    ))
}

/// What to say of the weights that stay as they are for other reasons than that somebody wants it.
fn about_left(weights: &[Weight<'_>], architecture: Option<&Architecture<'_>>) -> Vec<String> {
    let mut left = BTreeMap::<Reason, (usize, Vec<String>)>::new();
    for weight in weights {
        if let Some(reason) = weight.reason {
            let (count, names) = left.entry(reason).or_default();
            *count += 1;
            let name = star(weight.tensor);
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let name = architecture.map_or("the model", |a| a.name);
    let sentence = |(reason, (count, names)): (Reason, (usize, Vec<String>))| {
        let why = match reason {
            Reason::Experts => {
                "transformers has one parameter for all experts of a layer, and makes no 4-bit layer of it".to_owned()
            }
            Reason::Converted => {
                "transformers joins or rearranges them when it loads them, and loads no 4-bit ones".to_owned()
            }
            Reason::Unknown => format!("{name} of transformers has no such modules"),
            Reason::Unfit => "they are not matrices in F32, F16 or BF16".to_owned(),
        };
        format!("{count} weights stay as they are, because {why}: {}", names.join(", "))
    };
    left.into_iter().map(sentence).collect()
}

#[cfg(test)]
mod tests;
