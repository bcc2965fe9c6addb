//! `nf4 verify`: is a model what it says, and is it the same as, or made from, another one?

use core::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Result;
use clap::Args;
use nf4::checkpoint::{ModelConfig, TensorSource};
use serde_json::{Value, json};

use crate::Global;
use crate::flat::{Flat, out_of_reach};
use crate::layers::Layers;
use crate::model::Model;
use crate::progress::Progress;
use crate::report::Prepared;
use crate::text::Text;
use crate::workers::Workers;

/// Decode every 4-bit tensor of a model and look for what is wrong: parts that are missing or do not fit, NaN, infinities,
/// empty weights, and packed bytes in formats that this tool does not understand.
///
/// With a second model, every tensor is also compared with its namesake there. Two 4-bit layers, or two plain tensors, must
/// have the same values bit for bit. If one is a 4-bit layer and the other is plain, each plain weight must be so close to
/// the dequantized one that the layer can have been quantized from it. Weights of a Conv1D, which 4-bit layers hold
/// transposed, are compared as such.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nf4 verify Llama-3.2-1B-nf4
  nf4 verify Llama-3.2-1B-nf4 Llama-3.2-1B     can one have been made from the other?
  nf4 verify a.safetensors b.safetensors       the same bits?

Exit status 3: something was found.")]
pub(crate) struct Verify {
    /// A model directory or a safetensors file
    model: PathBuf,
    /// Another one to compare with
    other: Option<PathBuf>,
}

/// Values that are compared at a time: whole blocks of every size.
const CHUNK: usize = 1 << 17;

/// What a weight without values means.
pub(crate) const NOT_GATHERED: &str =
    "shape [0], which is what a DeepSpeed ZeRO-3 save leaves whose shards were not gathered";

/// What was found in one tensor.
#[derive(Debug, Default, Clone, Copy)]
struct Found {
    nan: u64,
    infinite: u64,
    different: u64,
    /// Largest distance to the other model, and the sums of squares of distances and of values.
    largest: f32,
    squares: [f64; 2],
    /// Index, distance, allowed distance.
    far: Option<(usize, f32, f32)>,
}

impl Verify {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let model = Model::open(&self.model)?;
        let layers = Layers::read(&model);
        let other = self.other.as_deref().map(Model::open).transpose()?;
        let other_layers = other.as_ref().map(Layers::read).unwrap_or_default();
        let mut findings: Vec<String> =
            layers.broken.iter().chain(&other_layers.broken).map(ToString::to_string).collect();
        findings.extend(layers.not_understood().chain(other_layers.not_understood()));
        findings
            .extend(model.names().filter(|name| is_empty(&model, name)).map(|name| format!("{name}: {NOT_GATHERED}")));
        let configs = [Some(&model), other.as_ref()].into_iter().flatten().filter_map(|model| model.config.as_deref());
        let configs = configs.filter_map(|text| ModelConfig::parse(text).ok()).collect::<Vec<_>>();
        let conv1d = |name: &str| configs.iter().any(|config| config.is_conv1d(name));
        let progress = Progress::new("verify", model.data_len(), global.quiet);
        let mut workers: Workers<()> = Workers::new(global.threads);
        let (mut checked, mut list) = (0, Vec::new());
        for name in model.names().filter(|name| !layers.companions.contains(*name)) {
            progress.at(name);
            if layers.broken_parts.contains(name) {
                continue;
            }
            checked += 1;
            let other = other.as_ref().map(|other| (other, &other_layers));
            match check(&model, &layers, other, name, &conv1d, &mut workers) {
                Ok((found, compared)) => {
                    let problems = describe(name, &found, compared.as_deref());
                    list.push(to_json(name, &found, compared.as_deref(), &problems));
                    findings.extend(problems);
                }
                Err(error) => findings.push(format!("{error:#}")),
            }
            let bytes = layers.by_tensor.get(name).map_or_else(
                || model.info(name).map_or(0, |i| (i.data_offsets.1 - i.data_offsets.0) as u64),
                |layer| layer.bytes,
            );
            progress.add(bytes);
        }
        drop(progress);
        if let Some(other) = &other {
            let extra = other.names().filter(|n| !other_layers.companions.contains(*n) && model.info(n).is_none());
            findings.extend(extra.map(|name| format!("{name}: only in {}", other.path.display())));
        }
        let mut text = Text::default();
        for finding in &findings {
            text.line(finding);
        }
        let packed = layers.by_tensor.len();
        let result =
            if findings.is_empty() { "nothing wrong".to_owned() } else { format!("{} findings", findings.len()) };
        text.line(format_args!("{}: {checked} tensors, {packed} of them in 4 bits: {result}", model.path.display()));
        if let (Some(other), true) = (&other, findings.is_empty()) {
            text.line(format_args!("{}: fits", other.path.display()));
        }
        let good = findings.is_empty();
        let json = json!({
            "path": self.model.to_string_lossy(),
            "other": self.other.as_deref().map(Path::to_string_lossy),
            "good": good,
            "tensors": list,
            "layers": packed,
            "findings": findings,
        });
        Ok(Prepared::report(text, json, good))
    }
}

/// Whether a tensor is a weight without any values.
fn is_empty(model: &Model, name: &str) -> bool {
    name.ends_with("weight") && model.info(name).is_some_and(|info| info.shape == [0])
}

/// Checks one tensor, and compares it with that of the same name, whose kind is returned; `conv1d` says whether a plain
/// weight is the transposed one of a 4-bit layer.
fn check(
    model: &Model,
    layers: &Layers,
    other: Option<(&Model, &Layers)>,
    name: &str,
    conv1d: &dyn Fn(&str) -> bool,
    workers: &mut Workers<()>,
) -> Result<(Found, Option<String>)> {
    let mut flat = Flat::open(model, layers, name)?;
    let mut other = match other {
        Some((other, other_layers)) => Some(Flat::open(other, other_layers, name)?),
        None => None,
    };
    if conv1d(name) {
        match (&mut flat, &mut other) {
            (dense @ Flat::Dense { .. }, Some(Flat::Packed(_))) => dense.transpose(),
            (Flat::Packed(_), Some(dense @ Flat::Dense { .. })) => dense.transpose(),
            _ => {}
        }
    }
    if let Some(other) = &other {
        anyhow::ensure!(
            flat.shape() == other.shape() && flat.len() == other.len(),
            "{name}: {} {:?} in one model, {} {:?} in the other",
            flat.kind(),
            flat.shape(),
            other.kind(),
            other.shape()
        );
    }
    let divisible = flat.is_divisible() && other.as_ref().is_none_or(Flat::is_divisible);
    let chunk = if divisible { CHUNK } else { flat.len().max(1) };
    let total = Mutex::new(Found::default());
    workers.run(flat.len(), chunk, |(), part| {
        let found = check_part(&flat, other.as_ref(), part)?;
        let mut total = total.lock().expect("adding does not panic");
        total.add(&found);
        Ok(())
    })?;
    let found = total.into_inner().expect("adding does not panic");
    Ok((found, other.map(|other| other.kind())))
}

fn check_part(flat: &Flat<'_>, other: Option<&Flat<'_>>, part: Range<usize>) -> Result<Found> {
    let start = part.start;
    let values = flat.values(part.clone())?;
    let mut found = Found {
        nan: values.iter().filter(|x| x.is_nan()).count() as u64,
        infinite: values.iter().filter(|x| x.is_infinite()).count() as u64,
        ..Found::default()
    };
    let Some(other) = other else { return Ok(found) };
    let others = other.values(part)?;
    for (a, b) in values.iter().zip(&others) {
        let distance = (a - b).abs();
        found.different += u64::from(a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
        found.largest = found.largest.max(distance);
        found.squares[0] += f64::from(distance).powi(2);
        found.squares[1] += f64::from(*b).powi(2);
    }
    found.far = match (flat, other) {
        (Flat::Packed(layer), Flat::Dense { .. }) => out_of_reach(layer, start, &others, &values),
        (Flat::Dense { .. }, Flat::Packed(layer)) => out_of_reach(layer, start, &values, &others),
        _ => None,
    };
    // Between a layer and a plain tensor a difference is what quantization does.
    if matches!((flat, other), (Flat::Packed(_), Flat::Dense { .. }) | (Flat::Dense { .. }, Flat::Packed(_))) {
        found.different = 0;
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, other: &Self) {
        self.nan += other.nan;
        self.infinite += other.infinite;
        self.different += other.different;
        self.largest = self.largest.max(other.largest);
        self.squares = [self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]];
        self.far = match (self.far, other.far) {
            (Some(a), Some(b)) => Some(if a.0 < b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
    }

    /// Root mean square of the distances relative to that of the values; 0 if all values are 0.
    fn relative(&self) -> f64 {
        let [distances, values] = self.squares;
        if values == 0.0 { 0.0 } else { (distances / values).sqrt() }
    }
}

fn describe(name: &str, found: &Found, compared: Option<&str>) -> Vec<String> {
    let mut problems = Vec::new();
    if found.nan + found.infinite > 0 {
        problems.push(format!("{name}: {} NaN, {} infinite", found.nan, found.infinite));
    }
    if let (Some(kind), true) = (compared, found.different > 0) {
        let (count, largest) = (found.different, found.largest);
        problems.push(format!("{name}: {count} values differ from the other ({kind}), by up to {largest:e}"));
    }
    if let Some((index, distance, allowed)) = found.far {
        problems.push(format!(
            "{name}: weight {index} is {distance:e} from the dequantized one, and at most {allowed:e} is possible"
        ));
    }
    problems
}

fn to_json(name: &str, found: &Found, compared: Option<&str>, problems: &[String]) -> Value {
    let mut json = json!({ "name": name, "nan": found.nan, "infinite": found.infinite, "findings": problems });
    if let Some(kind) = compared {
        json["compared"] = json!({
            "with": kind,
            "different": found.different,
            "largest_difference": found.largest,
            "relative_rms_difference": found.relative(),
        });
    }
    json
}
