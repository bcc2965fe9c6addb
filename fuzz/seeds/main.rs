//! Writes the seeds of every target, made from the reference data of the tests, to `corpus/TARGET/`.
//!
//!     cargo run --bin seeds
//!
//! The layouts are those of the inputs in `fuzz_targets/`: their fields in order, little endian, and then the bytes.

use std::fs;
use std::path::{Path, PathBuf};

use nf4::BlockSize;
use nf4::checkpoint::{Dtype, TensorFile, TensorSource};
use nf4_fuzz::files::{ADAPTERS, LAYERS, parts, tensors};
use nf4_fuzz::folder::{Comer, FILES, WORDS};

/// Bytes of a seed at most: what the fuzzer makes inputs of.
const MOST: usize = 8192;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = Seeds { corpus: root.join("corpus") };
    files(&seeds)?;
    commands(&seeds)?;
    poisoned(&seeds)?;
    tall(&seeds)?;
    matrices(&seeds, &root.join("../tests/data/reference"))
}

/// Where seeds go.
struct Seeds {
    corpus: PathBuf,
}

impl Seeds {
    fn write(&self, target: &str, name: &str, seed: &[u8]) -> std::io::Result<()> {
        let folder = self.corpus.join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), &seed[..seed.len().min(MOST)])
    }
}

/// Layers and adapters: whole files, headers, descriptions.
fn files(seeds: &Seeds) -> std::io::Result<()> {
    for (base, file) in LAYERS.into_iter().enumerate() {
        let number = u8::try_from(base).expect("a few");
        let input = |mode: u8, bytes: &[u8]| [&[mode, number], bytes].concat();
        seeds.write("bnb_file", &format!("file{base}"), &input(0, file))?;
        seeds.write("bnb_file", &format!("header{base}"), &input(1, parts(file).0))?;
        let tensors = tensors(file);
        let state = tensors.iter().find(|(name, _)| name.contains("quant_state")).expect("a 4-bit layer").1;
        seeds.write("bnb_file", &format!("state{base}"), &input(2, state.bytes()))?;
        seeds.write("bnb_file", &format!("changes{base}"), &input(3, b"\x90\x00\x01\x20\x01\x04"))?;
    }
    for (name, bytes) in MANY {
        seeds.write("bnb_file", name, &[&[5, 0], bytes].concat())?;
    }
    let config = include_bytes!("../../tests/data/reference/linear4bit/tiny_llama/config.json");
    seeds.write("bnb_file", "config", &[&[4, 0], &config[..]].concat())?;

    for (base, (config, file)) in ADAPTERS.into_iter().enumerate() {
        let number = u8::try_from(base).expect("a few");
        let header = parts(file).0;
        let input = |mode: u8, first: &[u8], second: &[u8]| {
            let len = u16::try_from(first.len()).expect("a small file").to_le_bytes();
            [&[mode, number], &len[..], first, second].concat()
        };
        seeds.write("peft_file", &format!("config{base}"), &input(0, config, &[]))?;
        seeds.write("peft_file", &format!("header{base}"), &input(1, &[], header))?;
        seeds.write("peft_file", &format!("changes{base}"), &input(2, b"\x50\x00\x01", b"\x90\x00\x01"))?;
        seeds.write("peft_file", &format!("both_headers{base}"), &input(3, config, header))?;
        seeds.write("peft_file", &format!("both_files{base}"), &input(4, config, file))?;
    }
    for kind in 0..5 {
        seeds.write("peft_file", &format!("many{kind}"), &[&[5, 0, 0, 0, kind], &[0, 3, 1, 4][..]].concat())?;
    }
    Ok(())
}

/// Names of very many tensors: plain ones, and parts of 4-bit weights whose other parts are missing.
const MANY: [(&str, &[u8]); 2] = [("many_plain", &[0, 8]), ("many_broken", &[1])];

/// Command lines, with no change of a file, and some with very many tensors in one.
fn commands(seeds: &Seeds) -> std::io::Result<()> {
    let lines = [
        &b"inspect dense"[..],
        b"inspect adapter --json",
        b"inspect link.safetensors",
        b"inspect nf4.safetensors",
        b"quantize dense --out out",
        b"quantize link --out empty --force",
        b"quantize dense --out out --force",
        b"quantize nf4.safetensors --out out --force",
        b"quantize dense/model.safetensors --out out --force",
        b"quantize sharded/b.safetensors --out=out --block-size 4096 --double-quant",
        b"quantize dense/model.safetensors --out letter.txt --force --skip weight,x.* --compute-dtype bf16",
        b"quantize \xff.safetensors --out \xff --quantize-head",
        b"dequantize nf4.safetensors --out nf4.safetensors --force",
        b"dequantize sharded --out dense/out --dtype f16 --quiet",
        b"merge base.safetensors --adapter adapter --out out --dtype f32",
        b"merge base.safetensors --adapter adapter --out adapter/adapter_model.safetensors --force",
        b"verify sharded --threads 64",
        b"quantize dense --out out --threads 18446744073709551615",
        b"verify nf4.safetensors base.safetensors",
        b"bench --shape 16x16 --batch 2 --rounds 1",
        b"merge --help",
        b"--version",
    ];
    for (i, line) in lines.iter().enumerate() {
        let words: Vec<Vec<u8>> = line.split(|b| *b == b' ').map(shortened).collect();
        let command = words.join(&0);
        let length = u8::try_from(command.len()).expect("a short line");
        // What happens at the place of the output is in the higher bits.
        for comer in 0..Comer::ALL.len() {
            let change = u8::try_from(7 + 8 * comer).expect("few kinds");
            seeds.write("cli_paths", &format!("line{i}_{comer}"), &[&[0, change, length], &*command].concat())?;
        }
        let of_file = |name: &str| line.windows(name.len()).any(|part| part == name.as_bytes());
        if let Some(file) = FILES.iter().position(|(name, _)| name.ends_with(".safetensors") && of_file(name)) {
            let number = u8::try_from(file).expect("few files");
            for (name, bytes) in MANY {
                let seed = [&[number, 5, length], &*command, bytes].concat();
                seeds.write("cli_paths", &format!("line{i}_{name}"), &seed)?;
            }
        }
    }
    Ok(())
}

/// An argument with a byte for each of the words in it that have one.
fn shortened(mut argument: &[u8]) -> Vec<u8> {
    let mut short = Vec::new();
    while let Some(first) = argument.first() {
        let words = WORDS.iter().enumerate().filter(|(_, word)| argument.starts_with(word));
        let longest = words.max_by_key(|(_, word)| word.len());
        let (byte, len) =
            longest.map_or((*first, 1), |(i, word)| (128 + u8::try_from(i).expect("few words"), word.len()));
        short.push(byte);
        argument = &argument[len..];
    }
    short
}

/// Batches on rows that end in the middle of a span, after a whole tile of columns, with an infinity or NaN as one scale at
/// the edge of a tile: a tile that takes a scale of an earlier one shows in the other rows.
fn poisoned(seeds: &Seeds) -> std::io::Result<()> {
    let moderate = [&[7, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff][..], &[0; 4]].concat();
    let shape = [&3_u16.to_le_bytes()[..], &1056_u16.to_le_bytes(), &[0, 1]].concat();
    for (row, edge, kind) in (0..48_u8).map(|i| (i % 3, i / 3 % 8, 1 + i / 24 * 2)) {
        let poison = [kind, row, edge, row];
        let gemm = [&shape[..], &[0], &moderate, &moderate, &[8], &poison].concat();
        seeds.write("gemm", &format!("poison{kind}_row{row}_edge{edge}"), &gemm)?;
    }
    Ok(())
}

/// Rows of whole groups of columns for the transposed 16x4 product: more than a group, more than a chunk; blocks that straddle
/// them or do not.
fn tall(seeds: &Seeds) -> std::io::Result<()> {
    let moderate = [&[7, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff][..], &[0; 4]].concat();
    for (rows, cols) in [(545_u16, 32_u16), (70, 96), (40, 64)] {
        for (block_size, nested) in [(0, 1), (1, 0), (3, 0)] {
            let shape = [&rows.to_le_bytes()[..], &cols.to_le_bytes(), &[block_size, 0, nested]].concat();
            let name = format!("tall{rows}_block{block_size}");
            seeds.write("gemv", &name, &[&shape[..], &moderate, &moderate, &(rows / 2).to_le_bytes()].concat())?;
            seeds.write("gemm", &name, &[&shape[..], &moderate, &moderate, &[7, 0, 0, 0, 0]].concat())?;
        }
    }
    Ok(())
}

/// Quantized tensors: as weights, as packed matrices, as scales to be quantized once more.
fn matrices(seeds: &Seeds, reference: &Path) -> std::io::Result<()> {
    for folder in ["nf4", "double_quant"] {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(reference.join(folder))?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
        paths.sort();
        for path in paths {
            let bytes = fs::read(&path)?;
            let file = TensorFile::parse(&bytes).expect("a file of the reference");
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name in ASCII");
            if let Some(case) = Case::load(&file) {
                case.write(seeds, name)?;
            }
        }
    }
    Ok(())
}

/// What the reference holds of a quantized tensor.
struct Case {
    /// Index of the type: f32, f16, bf16.
    dtype: u8,
    weights: Vec<u8>,
    rows: u16,
    cols: u16,
    /// Index in `BlockSize::ALL`.
    block_size: u8,
    packed: Vec<u8>,
    absmax: Vec<u8>,
}

impl Case {
    /// `None` for tables.
    fn load(file: &TensorFile<'_>) -> Option<Self> {
        let read = |name: &str| file.read(name).ok().map(|bytes| bytes.into_owned());
        let info = file.info("input")?;
        let (cols, outer) = info.shape.split_last()?;
        let block_size: usize = file.header().metadata().get("blocksize")?.parse().ok()?;
        Some(Self {
            dtype: [Dtype::F32, Dtype::F16, Dtype::BF16].iter().position(|d| *d == info.dtype)?.try_into().ok()?,
            weights: read("input")?,
            rows: outer.iter().product::<usize>().try_into().ok()?,
            cols: u16::try_from(*cols).ok()?,
            block_size: BlockSize::ALL.iter().position(|b| b.get() == block_size)?.try_into().ok()?,
            packed: read("packed")?,
            absmax: read("absmax").or_else(|| read("absmax_f32"))?,
        })
    }

    fn write(&self, seeds: &Seeds, name: &str) -> std::io::Result<()> {
        let Self { dtype, weights, rows, cols, block_size, packed, absmax } = self;
        let elements = u16::try_from(usize::from(*rows) * usize::from(*cols)).unwrap_or(u16::MAX);
        // Any bits, and no patch.
        let floats = [&[0_u8][..], &[0xff, 0xff, 0, 0, 0, 0], &[0xff, 0xff, 0, 0, 0, 0]].concat();
        let quantize = [&[*dtype, *block_size], &elements.to_le_bytes()[..], &floats, weights].concat();
        seeds.write("quantize", name, &quantize)?;
        let scales = u16::try_from(absmax.len() / 4).unwrap_or(u16::MAX).to_le_bytes();
        seeds.write("double_quant", name, &[&scales[..], &floats, absmax].concat())?;

        let shape = [&rows.to_le_bytes()[..], &cols.to_le_bytes(), &[*block_size, 0]].concat();
        let plain = [&[0], &*floats].concat();
        let dequantize = [&shape[..], &plain, &0_u16.to_le_bytes(), &rows.to_le_bytes(), absmax, packed].concat();
        seeds.write("dequantize", name, &dequantize)?;
        // Inputs of about 1.
        let inputs = [&[7], &floats[1..]].concat();
        let x = vec![0x20; 4 * usize::from(*cols)];
        let gemv = [&shape[..], &plain, &inputs, &(rows / 2).to_le_bytes(), &x, absmax, packed].concat();
        seeds.write("gemv", name, &gemv)?;
        let gemm = [&shape[..], &plain, &inputs, &[3, 1, 1, 1, 1], &x, &x, &x, absmax, packed].concat();
        seeds.write("gemm", name, &gemm)?;

        // Every operation, twice; moderate values.
        let operations: Vec<u8> = (0..16).map(|i| i * 7 % 16 + 16 * (i % 6)).collect();
        let [d_out, d_in] = [u8::try_from(rows % 40).expect("below 40"), u8::try_from(cols % 251).expect("below 251")];
        let layer = [&[d_out, d_in, 0, 1 + d_out % 8, *block_size, d_in % 8], &*inputs, &[d_out; 8], &operations];
        seeds.write("layer", name, &layer.concat())?;

        let wide = |size: u16| u64::from(size).to_le_bytes();
        let fitting = [1_u8, 0, 0];
        let matrix = [
            &[1],
            &wide(*rows)[..],
            &wide(*cols),
            &(32_u16 << block_size).to_le_bytes(),
            &[0],
            &fitting.repeat(3),
            &wide(0),
            &wide(*rows),
            &fitting.repeat(8),
            &floats,
            absmax,
            packed,
        ];
        seeds.write("matrix", name, &matrix.concat())
    }
}
