//! Files in which a few bytes stand thousands of times: what takes time that grows faster than they do shows.

use rustix::time::{ClockId, clock_gettime};

/// Tensors of a file.
const TENSORS: usize = 1 << 15;

/// Modules of an adapter, and entries of its lists.
const MODULES: usize = 1 << 13;

/// What tensors are called after the number of their layer: plain, parts of 4-bit weights and of other formats, or deep.
const PARTS: [&str; 12] = [
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "qweight",
    "scales",
    "bias",
    "weight.weight.absmax",
    "experts.down_proj",
    "a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a",
];

/// What expressions are made of.
const FRAGMENTS: [&str; 8] = ["[a-z.]{0,9}", ".*", "layers", "[0-9]+", "(a|[^b]){3}", ".", "\\\\w{1,20}", "x?"];

/// A safetensors file of tensors without a value, whose names end as the bytes say, in turn.
pub fn tensors(bytes: &[u8]) -> Vec<u8> {
    let part = |i: usize| PARTS[bytes.get(i % bytes.len().max(1)).map_or(0, |b| usize::from(*b)) % PARTS.len()];
    file((0..TENSORS).map(|i| (format!("layers.{i}.{}", part(i)), "[0]", 0)))
}

/// Configuration and tensors of an adapter with many modules, and with as many names, tokens or expressions as a field may
/// have.
pub fn adapter(bytes: &[u8]) -> (String, Vec<u8>) {
    let (kind, bytes) = bytes.split_first().map_or((0, bytes), |(kind, rest)| (kind % 5, rest));
    let modules = (0..MODULES).map(|i| format!("base_model.model.layers.{i}.self_attn.q_proj"));
    let pairs = modules.flat_map(|m| ["A", "B"].map(|part| (format!("{m}.lora_{part}.weight"), "[1,1]", 4)));
    let list = |before: &str, after: &str| -> String {
        (0..MODULES).map(|i| format!("\"{before}{i}\"{after}")).collect::<Vec<_>>().join(",")
    };
    let (config, file) = match kind {
        0 => {
            let text: String = bytes.iter().take(300).map(|b| FRAGMENTS[usize::from(*b) % FRAGMENTS.len()]).collect();
            let expressions: Vec<String> = (0..16).map(|i| format!("\"({text}){i}\":1")).collect();
            (format!("\"rank_pattern\":{{{}}}", expressions.join(",")), file(pairs))
        }
        1 => (format!("\"alpha_pattern\":{{{}}}", list("j", ":1")), file(pairs)),
        2 => {
            let [parameters, modules] = ["p", "m"].map(|kind| list(kind, ""));
            (format!("\"target_parameters\":[{parameters}],\"target_modules\":[{modules},\"q_proj\"]"), file(pairs))
        }
        3 => {
            let whole = (0..MODULES).map(|i| (format!("base_model.model.m{i}.weight"), "[1]", 4));
            (format!("\"modules_to_save\":[{}]", list("m", "")), file(whole))
        }
        _ => {
            let rows = |i| format!("base_model.model.e{i}.token_adapter.trainable_tokens_delta");
            let tokens = (0..MODULES).map(|i| (rows(i), "[1,1]", 4));
            (format!("\"trainable_token_indices\":{{{}}}", list("e", ":[0]")), file(tokens))
        }
    };
    (format!("{{\"r\":1,{config}}}"), file)
}

/// A file of F32 tensors: names, shapes, and bytes, which are zeros.
fn file(tensors: impl Iterator<Item = (String, &'static str, usize)>) -> Vec<u8> {
    let (mut entries, mut end) = (Vec::new(), 0);
    for (name, shape, bytes) in tensors {
        let start = end;
        end += bytes;
        entries.push(format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

/// Seconds on the processor that an input may take: many times what any needs in a time that grows with its length alone.
const LIMIT: f64 = 15.0;

/// Runs something, and panics if it took too long; the time is that of this process alone.
pub fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = seconds();
    let result = run();
    let taken = seconds() - start;
    assert!(taken < LIMIT, "{what} took {taken:.1} s");
    result
}

fn seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
