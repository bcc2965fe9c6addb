//! Names of modules and tensors: parts with dots between them.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;

/// `prefix.name`, or only the name in a file with one layer.
pub(super) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// The module that a tensor `module.part` is of; the empty one in a file with one layer.
pub(super) fn module_of<'n>(name: &'n str, part: &str) -> Option<&'n str> {
    let rest = name.strip_suffix(part)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

/// Whether `part`, itself one or more parts, is the end of a name.
pub(super) fn ends_with(name: &str, part: &str) -> bool {
    name.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The last part of a name.
pub(super) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}
