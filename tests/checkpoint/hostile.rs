//! Files that are wrong: always an error that names what and gives the numbers, never a panic, never memory for a
//! number that the file only claims.

use std::path::PathBuf;

use nf4::checkpoint::{
    CheckpointError, FloatType, Header, Linear4bit, MergeOptions, MergedModel, PeftAdapter, PeftConfig, QuantState,
    QuantizationConfig, TensorData, TensorFile, TensorMap, TensorSource, packed_tensors, to_safetensors,
};
use nf4::{AbsmaxBuf, BlockSize, Quantized4Bit};
use safetensors::Dtype;

use crate::support::Generator;
use crate::tensor;

/// What an error may take: the parsed header, a message.
const MEMORY_LIMIT: u64 = 1 << 16;

/// Runs `load`, which must give an error without taking memory.
fn error_of<T>(load: impl FnOnce() -> Result<T, CheckpointError>) -> CheckpointError {
    let mut error = None;
    let used = allocation_counter::measure(|| error = load().err());
    let error = error.expect("an error");
    assert!(used.bytes_max < MEMORY_LIMIT, "{} bytes for {error}", used.bytes_max);
    error
}

/// `n`, JSON and as much data.
fn file(json: &str, data: usize) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn check(error: &CheckpointError, parts: &[&str]) {
    let message = error.to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message:?} has not all of {parts:?}");
}

#[test]
fn headers_that_lie_about_lengths() {
    let parse = |bytes: &[u8]| error_of(|| TensorFile::parse(bytes));
    check(&parse(&[]), &["header", "0 bytes", "8"]);
    check(&parse(&[1, 0, 0]), &["header", "3 bytes", "8"]);
    check(&parse(&u64::MAX.to_le_bytes()), &["18446744073709551615", "100000000"]);
    check(&parse(&99_999_999_u64.to_le_bytes()), &["8 bytes", "100000007"]);
    check(&parse(&1_000_000_000_000_u64.to_le_bytes()), &["1000000000000"]);
    let whole = file(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#, 24);
    for len in 0..whole.len() {
        parse(&whole[..len]);
    }
    TensorFile::parse(&whole).unwrap();
    check(&parse(&[&*whole, &[0]].concat()), &["data", "24", "25"]);
    // For a reader that streams, too.
    check(&error_of(|| Header::parse(&whole[..20], whole.len() as u64)), &["header", "20 bytes", "65"]);
}

/// Names that no model has, and that work with names would take long for, are neither read nor written.
#[test]
fn names_without_an_end() {
    let [short, long] = [1024, 1025].map(|len| "n".repeat(len));
    let [shallow, deep] = [64, 65].map(|parts| vec!["a"; parts].join("."));
    for (name, is_read) in [(short, true), (long, false), (shallow, true), (deep, false)] {
        let file = file(&format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#), 1);
        let tensor = TensorData::new("one", Dtype::U8, vec![1], vec![0]).unwrap();
        let written = to_safetensors(&TensorMap::from([(name.clone(), tensor)]));
        if is_read {
            assert_eq!(TensorFile::parse(&file).unwrap().names().collect::<Vec<_>>(), [name]);
            written.unwrap();
        } else {
            check(&error_of(|| TensorFile::parse(&file)), &["1024 and 64 are allowed"]);
            check(&written.unwrap_err(), &["1024 and 64 are allowed"]);
        }
    }
}

#[test]
fn headers_that_are_not_what_they_should_be() {
    let parse = |json: &str, data| {
        let file = file(json, data);
        error_of(|| TensorFile::parse(&file))
    };
    check(&parse("hello", 0), &["header", "line 1"]);
    check(&parse("[]", 0), &["header", "object"]);
    check(&parse("\u{1}\u{2}", 0), &["header"]);
    check(&parse(&"[".repeat(10_000), 0), &["header"]);
    check(&parse(r#"{"a":1}"#, 0), &["a:"]);
    check(&parse(r#"{"a":{"dtype":"F31","shape":[],"data_offsets":[0,4]}}"#, 4), &["a:", "F31"]);
    check(&parse(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), &["a:", "-1"]);
    check(&parse(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#, 4), &["a:"]);
    check(&parse(r#"{"__metadata__":{"x":3}}"#, 0), &["header", "3"]);
    let twice =
        r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    check(&parse(twice, 0), &["a", "two tensors"]);
    let mut not_text = file(r#"{"\xff":1}"#, 0);
    not_text[10] = 0xff;
    check(&error_of(|| TensorFile::parse(&not_text)), &["header"]);
}

#[test]
fn places_that_do_not_fit() {
    let parse = |json: &str, data| {
        let file = file(json, data);
        error_of(|| TensorFile::parse(&file))
    };
    let one = |name: &str, place: &str| format!(r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":{place}}}"#);
    let two = |a: &str, b: &str| format!("{{{},{}}}", one("a", a), one("b", b));
    check(&parse(&two("[0,4]", "[2,6]"), 6), &["b: starts at byte 2", "overlaps", "4"]);
    check(&parse(&two("[0,4]", "[5,9]"), 9), &["b: starts at byte 5", "gap", "4"]);
    check(&parse(&two("[0,4]", "[0,4]"), 4), &["b: starts at byte 0", "overlaps"]);
    check(&parse(&two("[1,5]", "[5,9]"), 9), &["a: starts at byte 1", "gap", "0"]);
    check(&parse(&two("[0,4]", "[4,9]"), 9), &["b at 4..9", "expected 4 bytes, got 5"]);
    check(&parse(&two("[4,0]", "[0,4]"), 4), &["a at 4..0", "expected 4"]);
    check(&parse(&two("[0,4]", "[4,8]"), 7), &["data", "8", "7"]);

    let max = usize::MAX;
    let one =
        |shape: &str, end: usize| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
    check(&parse(&one(&format!("[{max},{max}]"), 4), 4), &["a:", "address space", &max.to_string()]);
    check(&parse(&one(&format!("[{max}]"), max), 4), &["a:", "address space"]);
    check(&parse(&one(&format!("[2,{}]", 1_u64 << 62), 4), 4), &["a:", "address space"]);
    // Each tensor is possible, and all of them together wrap around to the length of the file.
    let eighth = max / 8;
    let mut json = String::from("{");
    for i in 0..8 {
        let (start, end) = (i * eighth, (i + 1) * eighth);
        json += &format!(r#""t{i}":{{"dtype":"U8","shape":[{eighth}],"data_offsets":[{start},{end}]}},"#);
    }
    json += &format!(
        r#""t8":{{"dtype":"U8","shape":[15],"data_offsets":[{},{}]}}}}"#,
        8 * eighth,
        8_u128 * eighth as u128 + 15
    );
    check(&parse(&json, 8), &["t8"]);
}

/// The tensors of a nested layer `l`, `[24, 64]`, with a bias.
fn layer() -> TensorMap<'static> {
    let weights: Vec<f32> = (0..24 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    let weight = Quantized4Bit::quantize(&weights, 24, 64, BlockSize::B64, true).unwrap();
    let layer = Linear4bit::new(weight, FloatType::F16).with_bias(vec![1.0; 24], FloatType::BF16).unwrap();
    TensorFile::parse(&to_safetensors(&layer.tensors("l")).unwrap()).map(|file| owned(&file)).unwrap()
}

fn owned(file: &TensorFile<'_>) -> TensorMap<'static> {
    let tensors = file.header().iter().map(|(name, info)| {
        let bytes = file.read(name).unwrap().into_owned();
        (name.to_owned(), TensorData::new(name, info.dtype, info.shape.clone(), bytes).unwrap())
    });
    tensors.collect()
}

const STATE: &str = "l.weight.quant_state.bitsandbytes__nf4";

/// The layer with other text instead of some of its JSON.
fn with_state(from: &str, to: &str) -> TensorMap<'static> {
    let mut tensors = layer();
    let text = String::from_utf8(tensors[STATE].bytes().to_vec()).unwrap();
    assert!(text.contains(from), "{text}");
    let text = text.replacen(from, to, 1);
    let data = TensorData::new(STATE, Dtype::U8, vec![text.len()], text.into_bytes()).unwrap();
    tensors.insert(STATE.to_owned(), data);
    tensors
}

fn load_error(tensors: &TensorMap<'_>) -> CheckpointError {
    let error = error_of(|| Linear4bit::load(tensors, "l"));
    // The same through a file.
    let file = to_safetensors(tensors).unwrap();
    let again = Linear4bit::load(&TensorFile::parse(&file).unwrap(), "l").unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    error
}

#[test]
fn states_with_other_values() {
    let check = |from: &str, to: &str, parts: &[&str]| check(&load_error(&with_state(from, to)), parts);
    Linear4bit::load(&layer(), "l").unwrap();
    for size in ["0", "-64", "63", "96", "16", "8192", "18446744073709551615", "1e3", "64.5", "\"64\"", "null"] {
        check("\"blocksize\": 64", &format!("\"blocksize\": {size}"), &[STATE, "blocksize", "is ", "4096"]);
    }
    check("\"blocksize\": 64", "\"blocksize\": 32", &["l.weight.absmax", "[48]", "[24]"]);
    check("\"quant_type\": \"nf4\"", "\"quant_type\": \"fp4\"", &[STATE, "quant_type", "fp4", "nf4"]);
    check("\"nf4\"", "3", &["quant_type is 3"]);
    check("\"dtype\": \"float16\"", "\"dtype\": \"float8\"", &[STATE, "dtype", "float8", "bfloat16"]);
    check("[24, 64]", "[24, 63]", &["l.weight", "[24, 63]", "756 bytes, got 768"]);
    check("[24, 64]", "[24, -64]", &["shape", "-64"]);
    check("[24, 64]", "[4294967296, 4294967296, 2]", &[STATE, "4294967296", "address space"]);
    check("[24, 64]", "[18446744073709551615, 18446744073709551615]", &[STATE, "address space"]);
    check("[24, 64]", "[18446744073709551615]", &["l.weight", "18446744073709551615"]);
    check("[24, 64]", "null", &["shape is null"]);
    check("[24, 64]", "\"24\"", &["shape is \"24\""]);
    check("[24, 64]", "[64, 24]", &["l.bias", "[64]", "[24]"]);
    for offset in ["NaN", "Infinity", "-Infinity"] {
        check("\"nested_offset\": ", &format!("\"nested_offset\": {offset}, \"x\": "), &[STATE, "NaN or Infinity"]);
    }
    for offset in ["1e39", "-1e300", "null", "\"0.5\"", "[]"] {
        let to = format!("\"nested_offset\": {offset}, \"x\": ");
        check("\"nested_offset\": ", &to, &[STATE, "nested_offset", "finite"]);
    }
    check("\"nested_blocksize\": 256", "\"nested_blocksize\": 128", &["nested_blocksize is 128", "256"]);
    check("\"nested_dtype\": \"float32\"", "\"nested_dtype\": \"float16\"", &["nested_dtype", "float16", "float32"]);
    check("\"nested_offset\"", "\"offset\"", &["nested_offset is missing"]);
    check("{", "", &[STATE, "column"]);
    check("{", "[{", &[STATE]);
    check("\"blocksize\"", "\"block\"", &["blocksize is missing"]);
}

#[test]
fn companions_that_are_missing_or_wrong() {
    for name in [
        "l.weight",
        "l.weight.absmax",
        "l.weight.quant_map",
        "l.weight.nested_absmax",
        "l.weight.nested_quant_map",
        STATE,
    ] {
        let mut tensors = layer();
        tensors.remove(name);
        check(&load_error(&tensors), &[name, "no such tensor"]);
        for (float, len) in [(FloatType::F32, 3), (FloatType::BF16, 24), (FloatType::F32, 0)] {
            let mut tensors = layer();
            tensors.extend([tensor(name, float, &[len], 1.0)]);
            check(&load_error(&tensors), &[name]);
        }
    }
    let mut tensors = layer();
    tensors.extend([tensor("l.bias", FloatType::F32, &[25], 1.0)]);
    check(&load_error(&tensors), &["l.bias", "[24]", "[25]"]);
    let bias = TensorData::new("l.bias", Dtype::I64, vec![24], vec![0; 192]).unwrap();
    tensors.insert("l.bias".to_owned(), bias);
    check(&load_error(&tensors), &["l.bias", "I64", "F32"]);
    tensors.extend([tensor("l.bias", FloatType::F32, &[24], f32::INFINITY)]);
    check(&load_error(&tensors), &["l.bias", "inf", "0"]);
}

#[test]
fn other_codebooks_and_scales_that_are_not_finite() {
    let mut tensors = layer();
    tensors.extend([tensor("l.weight.quant_map", FloatType::F32, &[16], -0.25)]);
    check(&load_error(&tensors), &["l.weight.quant_map", "NF4", "code 0", "-0.25"]);
    let mut tensors = layer();
    tensors.extend([tensor("l.weight.nested_absmax", FloatType::F32, &[1], f32::NAN)]);
    check(&load_error(&tensors), &["l.weight", "absmax", "NaN"]);
    let mut tensors = layer();
    let state = tensors.remove(STATE).unwrap();
    tensors.insert(STATE.replace("nf4", "fp4"), state);
    check(&load_error(&tensors), &["l.weight", "FP4"]);
    assert_eq!(packed_tensors(&tensors), ["l.weight"]);
    check(&error_of(|| MergedModel::new(&tensors, None, &MergeOptions::new())), &["l.weight", "FP4"]);
}

#[test]
fn configurations_that_are_not_json() {
    let config = |text: &str| error_of(|| QuantizationConfig::from_config(text.as_bytes()));
    check(&config("{"), &["config.json", "line 1"]);
    check(&config("[]"), &["config.json", "object"]);
    check(&config(r#"{"quantization_config": 3}"#), &["config.json", "quantization_config is 3"]);
    let with = |fields: &str| {
        config(&format!(
            r#"{{"quantization_config": {{"quant_method": "bitsandbytes", "load_in_4bit": true, {fields}}}}}"#
        ))
    };
    check(&with(r#""x": 1"#), &["fp4"]);
    check(
        &with(r#""bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "int8""#),
        &["bnb_4bit_compute_dtype", "int8"],
    );
    check(&with(r#""bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": "x""#), &["llm_int8_skip_modules"]);
    check(&error_of(|| QuantizationConfig::default().insert_into(b"nonsense")), &["config.json"]);
    check(&error_of(|| PeftAdapter::load(b"\xff\xfe", &TensorMap::new())), &["adapter_config.json"]);
}

/// A few bytes of a regular expression can ask for much memory, and many such for as many times that.
#[test]
fn expressions_that_compile_to_much() {
    let config = |count: usize, expression: &str| {
        let entries: Vec<String> = (0..count).map(|i| format!(r#""{expression}{i}":4"#)).collect();
        format!(r#"{{"peft_type":"LORA","r":8,"rank_pattern":{{{}}}}}"#, entries.join(","))
    };
    for (count, expression) in [(1, r"\\w{1000}"), (400, r"\\w{20}"), (1, "((a{100}){100}){100}")] {
        let mut error = None;
        let config = config(count, expression);
        let used = allocation_counter::measure(|| error = PeftConfig::parse(config.as_bytes()).err());
        check(&error.expect("an error"), &["rank_pattern", "size limit"]);
        assert!(used.bytes_max < 4 << 20, "{} bytes for {count} times {expression}", used.bytes_max);
    }
    for (count, expression) in [(1, r"\\w{20}"), (300, "model.layers.3.mlp.experts.")] {
        PeftConfig::parse(config(count, expression).as_bytes()).unwrap();
    }
}

/// Each expression may take 16 KiB, so there may be 4096 in 64 MiB; names are compared, and may be as many as the file has.
#[test]
fn more_expressions_than_there_is_memory_for() {
    let config = |field: &str, keys: &mut dyn Iterator<Item = String>| {
        let entries: Vec<String> = keys.map(|key| format!(r#"{}:4"#, serde_json::json!(key))).collect();
        format!(r#"{{"peft_type":"LORA","r":8,"{field}":{{{}}}}}"#, entries.join(","))
    };
    let parse = |config: &str| {
        let mut result = None;
        let used = allocation_counter::measure(|| result = Some(PeftConfig::parse(config.as_bytes())));
        (result.unwrap(), used.bytes_max)
    };
    for field in ["rank_pattern", "alpha_pattern"] {
        let expressions = |count| config(field, &mut (0..count).map(|i| format!("layers.[0-9].e{i}")));
        let (result, used) = parse(&expressions(4097));
        check(&result.unwrap_err(), &[field, "an object with 4097", "at most 4096"]);
        assert!(used < 4 << 20, "{used} bytes");
        let (result, used) = parse(&expressions(4096));
        let config = result.unwrap();
        let expected = if field == "rank_pattern" { (4, 8.0) } else { (8, 4.0) };
        assert_eq!((config.rank("m.layers.3.e9"), config.alpha("m.layers.3.e9")), expected);
        assert!(used < 64 << 20, "{used} bytes");
    }
    // Names and expressions together, in their order.
    let names = (0..20_000).map(|i| format!("model.layers.3.mlp.experts.{i}"));
    let (result, used) = parse(&config("rank_pattern", &mut names.chain(["lm_head|x[0-9]".to_owned()])));
    let ranks = result.unwrap();
    assert!(used < 16 << 20, "{used} bytes");
    assert_eq!(["model.layers.3.mlp.experts.19999", "x7", "y7"].map(|module| ranks.rank(module)), [4, 4, 8]);
    // The text of one: a class of two bytes is parsed to thousands.
    for (key, parts) in [
        (r"\w".repeat(2049), ["4098 bytes", "4096 bytes"]),
        (r"\w".repeat(2048), ["not one", "size limit"]),
        ("(".repeat(4096), ["not one", "rank_pattern"]),
    ] {
        let (result, used) = parse(&config("rank_pattern", &mut [key].into_iter()));
        check(&result.unwrap_err(), &parts);
        assert!(used < 64 << 20, "{used} bytes");
    }
    let long = "a".repeat(1 << 16);
    let (result, _) = parse(&config("rank_pattern", &mut [long.clone()].into_iter()));
    assert_eq!(result.unwrap().rank(&format!("m.{long}")), 4);
}

/// No byte of the file bounds their number.
#[test]
fn rows_without_columns() {
    for (rows, nested) in [(1 << (usize::BITS - 24), false), (usize::MAX, true)] {
        let absmax = if nested { AbsmaxBuf::double_quantize(&[]).unwrap() } else { AbsmaxBuf::plain(vec![]) };
        let weight = Quantized4Bit::from_parts(Vec::new(), absmax, rows, 0, BlockSize::B64).unwrap();
        let layer = Linear4bit::new(weight, FloatType::F32);
        let file = to_safetensors(&layer.tensors("l")).unwrap();
        let file = TensorFile::parse(&file).unwrap();
        for float in [FloatType::F32, FloatType::BF16] {
            let merged = MergedModel::new(&file, None, &MergeOptions::new().with_dtype(float)).unwrap();
            assert_eq!(merged.info("l.weight").unwrap().shape, [rows, 0]);
            assert!(merged.read("l.weight").unwrap().is_empty());
            assert!(TensorFile::parse(&to_safetensors(&merged).unwrap()).is_ok());
        }
    }
}

/// Real files with bytes changed: whatever comes of it, no panic, and not more memory than the file has a use for.
#[test]
fn changed_bytes() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference");
    let read = |name: &str| std::fs::read(root.join(name)).unwrap();
    let config = read("peft/rank8_dora/adapter_config.json");
    let cases = [read("linear4bit/f32_nodq_odd/model.safetensors"), read("peft/rank8_dora/adapter_model.safetensors")];
    let mut generator = Generator(1);
    let mut random = |below: usize| usize::try_from(generator.next() >> 33).unwrap() % below;
    let mut loaded = 0;
    for original in cases {
        let header = usize::try_from(u64::from_le_bytes(original[..8].try_into().unwrap())).unwrap() + 8;
        for round in 0..3000 {
            let mut bytes = original.clone();
            let mut config = config.clone();
            for _ in 0..=random(3) {
                // Mostly in the header, where the numbers are.
                let at = if round % 4 == 0 { random(bytes.len()) } else { random(header) };
                bytes[at] =
                    if round % 2 == 0 { b"0123456789,:[]{}\"-eN"[random(20)] } else { bytes[at] ^ (1 << random(8)) };
            }
            if round % 3 == 0 {
                let at = random(config.len());
                config[at] ^= 1 << random(8);
            }
            let used = allocation_counter::measure(|| {
                let Ok(file) = TensorFile::parse(&bytes) else { return };
                for tensor in packed_tensors(&file) {
                    let _ = QuantState::load(&file, &tensor);
                    loaded += usize::from(Linear4bit::load_tensor(&file, &tensor).is_ok());
                }
                let _ = PeftAdapter::load(&config, &file);
            });
            assert!(used.bytes_max < 1 << 20, "{} bytes", used.bytes_max);
        }
    }
    assert!(loaded > 0, "every change was refused: the test changes too much");
}
