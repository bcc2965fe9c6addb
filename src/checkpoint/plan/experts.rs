//! Pairs for experts: those of fused parameters, and those of layers whose experts are fused in the file.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use super::super::error::CheckpointError;
use super::super::names::{Ends, join, last};
use super::super::peft::{Factors, PeftAdapter, PeftModule};
use super::{Builder, Change, Pair};

/// The parts of a fused parameter of experts, in its order, as files have them for each expert.
const FUSED: [(&str, &[&[&str]]); 2] =
    [("gate_up_proj", &[&["gate_proj", "w1"], &["up_proj", "w3"]]), ("down_proj", &[&["down_proj", "w2"]])];

impl Builder<'_> {
    /// The pair of a layer of one expert, in a file that has all experts in one tensor.
    pub(super) fn add_to_fused(&mut self, module: &str, pair: &PeftModule, name: &str) -> Result<(), CheckpointError> {
        let Some((owner, expert, parameter, part, parts)) = fused_expert(name) else {
            return Err(self.missing(&join(name, "weight")));
        };
        let tensor = join(&owner, parameter);
        self.check_is_float(&tensor)?;
        let planned = self.planned_mut(&tensor)?;
        let [d_out, d_in] = [pair.adapter().d_out(), pair.adapter().d_in()];
        let shape = &planned.info.shape;
        let expected = [*shape.first().unwrap_or(&0), d_out.saturating_mul(parts), d_in];
        if *shape != expected || expert >= expected[0] || pair.lora_bias().is_some() {
            let (expected, got) = (expected.to_vec(), shape.clone());
            return Err(CheckpointError::Shape {
                tensor: format!("{tensor}, for the adapter of {module}"),
                expected,
                got,
            });
        }
        let first = (expert * parts + part) * d_out;
        let pair = Pair::Module { module: module.to_owned(), transposed: false };
        planned.changes.push(Change::LowRank { rows: first..first + d_out, pair });
        self.touched.push(owner);
        Ok(())
    }

    /// The pairs of the parameters of a module.
    pub(super) fn add_parameters(
        &mut self,
        adapter: &PeftAdapter,
        targets: &Ends<'_, ()>,
        module: &str,
        name: &str,
    ) -> Result<(), CheckpointError> {
        let mut free: Vec<String> = self.candidates(targets, module, name);
        for (depth, factors) in adapter.factors(module).iter().enumerate() {
            let place = |parameter: &String| self.parameter(adapter, module, name, parameter, depth, factors);
            let found: Vec<(String, Vec<(String, Change)>)> =
                free.iter().filter_map(|parameter| Some((parameter.clone(), place(parameter)?))).collect();
            let shapes = || format!("A {:?} and B {:?}", factors.a_shape, factors.b_shape);
            let [(parameter, changes)] = &*found else {
                let what = if found.is_empty() { "no parameter" } else { "more than one parameter" };
                let names: Vec<&str> = free.iter().map(String::as_str).collect();
                let reason = format!("{} fit {what} of target_parameters that it has ({})", shapes(), names.join(", "));
                return Err(CheckpointError::Unexpected { tensor: name.to_owned(), reason });
            };
            for (tensor, change) in changes {
                self.check_is_float(tensor)?;
                self.planned_mut(tensor)?.changes.push(change.clone());
            }
            free.retain(|other| other != parameter);
        }
        self.touched.push(name.to_owned());
        Ok(())
    }

    /// The parameters of a module that the configuration targets.
    fn candidates(&self, targets: &Ends<'_, ()>, module: &str, name: &str) -> Vec<String> {
        let prefix = format!("{name}.");
        let in_file = self.plan.range(prefix.clone()..).map_while(|(tensor, _)| tensor.strip_prefix(&prefix));
        let own = in_file.filter(|rest| !rest.contains('.')).map(str::to_owned);
        let fused = FUSED.iter().map(|(parameter, _)| (*parameter).to_owned());
        let all: BTreeSet<String> = own.chain(fused).collect();
        let targeted = |parameter: &String| targets.of(&join(module, parameter)).next().is_some();
        all.into_iter().filter(targeted).collect()
    }

    /// What a pair does to the tensors of a parameter, if its shapes fit.
    fn parameter(
        &self,
        adapter: &PeftAdapter,
        module: &str,
        name: &str,
        parameter: &str,
        depth: usize,
        factors: &Factors,
    ) -> Option<Vec<(String, Change)>> {
        let key = join(module, parameter);
        let (rank, alpha) = (adapter.config().rank(&key), adapter.config().alpha(&key));
        let ([columns, d_in], d_out) = (factors.a_shape, factors.b_shape[0]);
        let experts = columns / rank;
        if experts == 0 || experts * rank != columns {
            return None;
        }
        let change = |rows: Range<usize>, expert, first, transposed| Change::LowRank {
            rows,
            pair: Pair::Expert { module: module.to_owned(), depth, expert, experts, rank, alpha, first, transposed },
        };
        let tensor = join(name, parameter);
        if let Some(planned) = self.plan.get(&tensor) {
            let [count, rows, cols] = match *planned.info.shape {
                [rows, cols] => [1, rows, cols],
                [count, rows, cols] => [count, rows, cols],
                _ => return None,
            };
            let plain = [rows, cols] == [d_out, d_in];
            // Where both fit, the class of the model decides.
            let transposed = [cols, rows] == [d_out, d_in] && (!plain || self.has_transposed_experts);
            if count != experts || !(plain || transposed) {
                return None;
            }
            let each = (0..count).map(|e| (tensor.clone(), change(e * rows..(e + 1) * rows, e, 0, transposed)));
            return Some(each.collect());
        }
        // The file has a tensor for each expert and part.
        let (_, parts) = FUSED.iter().find(|(known, _)| *known == parameter)?;
        let mut changes = Vec::new();
        for expert in 0..experts {
            let mut first = 0;
            for synonyms in *parts {
                let tensor = synonyms
                    .iter()
                    .map(|part| format!("{name}.{expert}.{part}.weight"))
                    .find(|t| self.plan.contains_key(t))?;
                let [rows, cols] = self.plan[&tensor].matrix;
                if cols != d_in {
                    return None;
                }
                changes.push((tensor, change(0..rows, expert, first, false)));
                first += rows;
            }
            if first != d_out {
                return None;
            }
        }
        let next = format!("{name}.{experts}.{}.weight", parts[0][0]);
        (!self.plan.contains_key(&next)).then_some(changes)
    }
}

/// The experts that a layer of one of them belongs to, its number, the fused parameter, and which part of how many of
/// that it is.
pub(super) fn fused_expert(module: &str) -> Option<(String, usize, &'static str, usize, usize)> {
    let (expert, part) = module.rsplit_once('.')?;
    let (owner, number) = expert.rsplit_once('.')?;
    let number = number.parse().ok().filter(|_| last(owner) == "experts")?;
    FUSED.iter().find_map(|(parameter, parts)| {
        let at = parts.iter().position(|synonyms| synonyms.contains(&part))?;
        Some((owner.to_string(), number, *parameter, at, parts.len()))
    })
}
