#!/usr/bin/env python3
"""The inner loops of the hot functions as the compiler makes them, and the table of rungs.

    .ci/assembly.py             compares the files of kernels/asm with what is built now
    BLESS=1 .ci/assembly.py     writes them

A loop of kernels/asm is what runs most of the time, in a form that says what a reviewer wants to see: which vector
instructions there are, in which order, and whether one spills a register. Constants, distances and places on the stack
are left out, because they move when other code changes. HOT says which loops there are; a new one takes a line there.

Compilers differ, so one is pinned: Debian's `rustc-web`, whose version the files name. With another version nothing is
compared, which is said aloud. The cycles are those that `llvm-mca` (Debian's llvm-19) models for the same loops, with all
loads from the nearest cache. It knows nothing of what a loop does not show, and is kinder to some CPUs than to others:
the ratios of two loops on one CPU are what counts.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loops import functions, inner_loops, labelled, listing

FOLDER = Path("kernels/asm")
MCA = "llvm-mca-19"

# Products of 16-bit integers in one instruction, by the register that it writes.
PRODUCTS = {"x": 8, "y": 16, "z": 32}

# Builds for a target, and prints the disassembly. The aarch64 build is that of the step which counts instructions. Of
# WebAssembly, Debian's compiler has no `core`.
BUILD = """
set -euo pipefail
. .ci/packages.sh
export RUSTC=$(from_package rustc-web rustc) CARGO_TARGET_DIR=target/assembly/$1
unset RUSTFLAGS
dis="objdump -d -C -M intel --no-show-raw-insn"
"$RUSTC" --version >&2
build=(cargo build -q --locked --release -p nf4-kernels --target "$1")
case $1 in
    aarch64-*)
        CARGO_TARGET_DIR=target/aarch64
        dis="aarch64-linux-gnu-objdump -d -C --no-show-raw-insn"
        ;;
    wasm32-*)
        export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-C target-feature=+simd128"
        build+=(-Zbuild-std=core)
        dis="llvm-objdump-19 -d -C --no-show-raw-insn"
        ;;
esac
"${build[@]}"
$dis "$CARGO_TARGET_DIR/$1/release/libnf4_kernels.rlib"
"""

# What is built, and the files that show its loops.
TARGETS = {
    "x86_64-unknown-linux-gnu": ["avx2", "avx-vnni", "avx512-vnni"],
    "aarch64-unknown-linux-gnu": ["neon", "neon-dotprod", "neon-i8mm"],
    "wasm32-unknown-unknown": ["simd128"],
}

VNNI = r"(\{vex\} )?vpdpwssd"
BYTE_VNNI = r"(\{vex\} )?vpdpbusd"
WASM = r"i32x4\.dot_i16x8_s"

# The loops, by file: an operation, the name of the function, and what the loop has most of among those of the function. Of
# equals the shortest is taken: a name has an instance for each type of elements, and for groups of half a span. With `min`
# the loop has least of it.
HOT = {
    "avx2": [
        ("16x4, one vector", r"avx2::entries::gemv$", "vpmaddwd"),
        ("16x4, eight vectors", r"Steps16x4 for .*Avx2<_>>::few_vectors$", "vpmaddwd"),
        ("16x4, a batch", r"Panels16x4 for .*Avx2<_>>::add_panel$", "vpmaddwd"),
        ("8x8, one vector", r"Steps8x8 for .*Avx2<_>>::add_quads$", "vpmaddubsw", min),
        ("8x8, a batch", r"Avx2<_>>::add_(panel|groups)$", "vpmaddubsw"),
        ("f32, one vector", r"avx2::entries::gemv_f32$", "vmulps"),
        ("f32, a batch", r"avx2::entries::gemm_f32$", "vmulps"),
        ("Transposed f32, one vector", r"avx2::entries::gemv_transposed_f32$", "vmulps"),
        ("Transposed f32, a batch", r"avx2::entries::gemm_transposed_f32$", "vmulps"),
        ("Transposed 16x4", r"IntegerColumns for .*Avx2.*>::add_vectors$", "vpmaddwd"),
        ("Dequantize to f32", r"avx2::entries::dequantize_f32$", "vpunpck"),
        ("Dequantize to f16 and bf16", r"avx2::entries::dequantize$", "vpunpck"),
        ("Quantize", r"avx2::entries::quantize$", "vcmp"),
    ],
    "avx-vnni": [
        ("16x4, one vector", r"avx2::entries::gemv_vnni$", VNNI),
        ("16x4, eight vectors", r"Steps16x4 for .*Avx2<_>>::few_vectors$", VNNI),
        ("16x4, a batch", r"Panels16x4 for .*Avx2<_>>::add_panel$", VNNI),
        ("8x8, one vector", r"Steps8x8 for .*Avx2<_>>::add_quads$", BYTE_VNNI, min),
        ("8x8, a batch", r"Avx2<_>>::add_(panel|groups)$", BYTE_VNNI),
    ],
    "avx512-vnni": [
        ("16x4, one vector", r"avx512::gemv$", "vpermw"),
        ("16x4, one vector, on Intel", r"avx512::gemv$", "vpshufb"),
        ("16x4, eight vectors", r"Steps16x4 for .*Avx512<_>>::few_vectors$", "vpermw"),
        ("16x4, a batch", r"avx512::panel::add_half$", VNNI),
        ("8x8, one vector", r"Steps8x8 for .*Avx512>::add_quads$", BYTE_VNNI, min),
        ("8x8, a batch", r"avx512::steps_8x8::add_groups$", BYTE_VNNI),
        ("f32, a batch", r"avx512::panel_f32::", "vmulps"),
        ("Transposed f32, a batch", r"avx512::gemm_transposed_f32$", "vmulps"),
        ("Transposed 16x4", r"IntegerColumns for .*Avx512>::add_vectors$", VNNI),
    ],
    "neon": [
        ("16x4, one vector", r"neon::entries::gemv$", "smlal"),
        ("16x4, four vectors", r"Steps16x4 for .*::Neon>::few_vectors$", "smlal"),
        ("16x4, a batch", r"Panels16x4 for .*::Neon>::add_panel$", "smlal"),
        ("8x8, one vector", r"steps_8x8::Plain as .*::add_quads$", "smlal"),
        ("8x8, a batch", r"steps_8x8::Plain as .*::add_panel$", "smlal"),
        ("f32, one vector", r"neon::entries::gemv_f32$", "tbl"),
        ("f32, a batch", r"neon::entries::gemm_f32$", "fmul"),
        ("Transposed f32, one vector", r"neon::entries::gemv_transposed_f32$", "tbl"),
        ("Transposed f32, a batch", r"neon::entries::gemm_transposed_f32$", "fmul"),
        ("Transposed 16x4", r"IntegerColumns for .*::Neon>::add_vectors$", "smlal"),
        ("Dequantize to f32", r"neon::entries::dequantize$", "tbl"),
        ("Quantize", r"neon::entries::quantize$", "uzp1"),
    ],
    "neon-dotprod": [
        ("8x8, one vector", r"Dotprod as .*Steps8x8>::add_quads$", "sdot"),
        ("8x8, a batch", r"Dotprod as .*Steps8x8>::add_panel$", "sdot"),
    ],
    "neon-i8mm": [("8x8, a batch", r"I8mm as .*Steps8x8>::add_panel$", "smmla")],
    "simd128": [
        ("16x4, one vector", r"simd128::entries::gemv$", WASM),
        ("16x4, four vectors", r"Steps16x4>::few_vectors::<1, 4>$", WASM),
        ("16x4, a batch", r"Panels16x4>::add_panel::<1>$", WASM),
        ("8x8, one vector", r"Steps8x8>::add_quads", WASM),
        ("8x8, a batch", r"Steps8x8>::add_panel|simd128::steps_8x8::add_vectors", WASM),
        ("f32, one vector", r"simd128::entries::gemv_f32::<f32>$", r"f32x4\.mul"),
        ("f32, a batch", r"simd128::entries::gemm_f32::<f32>$", r"f32x4\.mul"),
        ("Transposed f32, one vector", r"simd128::entries::gemv_transposed_f32$", r"f32x4\.mul"),
        ("Transposed f32, a batch", r"simd128::entries::gemm_transposed_f32$", r"f32x4\.mul"),
        ("Transposed 16x4", r"IntegerColumns>::add_vectors", WASM),
        ("Dequantize to f32", r"simd128::entries::dequantize::<f32>$", "i8x16.swizzle"),
        ("Quantize", r"simd128::entries::quantize::<f32>$", r"v128\.store$"),
    ],
}

# The committed hash of the test vector, which every rung gives.
HASH = re.compile(r"\b4045a7867415edb5\b")

# CPU, the name that llvm-mca has for it, the table that `Kernels::detect` takes, and where that table was tested.
CPUS = [
    ("Skylake", "skylake", "avx2", "hardware of the same instruction set"),
    ("Zen 3", "znver3", "avx2", "hardware"),
    ("Ice Lake", "icelake-server", "avx512-vnni", "parts in Bochs"),
    ("Alder Lake", "alderlake", "avx-vnni", "parts in Bochs"),
    ("Sapphire Rapids", "sapphirerapids", "avx512-vnni", "parts in Bochs"),
    ("Zen 4", "znver4", "avx512-vnni", "hardware; parts in Bochs"),
    ("Zen 5", "znver5", "avx512-vnni", "parts in Bochs"),
]
INTEL = ["skylake", "icelake-server", "alderlake", "sapphirerapids"]
NEEDS = {
    "avx2": "AVX2, F16C",
    "avx-vnni": "AVX2, F16C, AVX-VNNI",
    "avx512-vnni": "AVX2, F16C, AVX-512 F, BW, VL, VNNI",
}


class Loop:
    def __init__(self, body):
        self.body = body
        multiplies = [operands for mnemonic, operands in body if re.match(rf"vpmaddwd|{VNNI}", mnemonic)]
        self.products = sum(PRODUCTS[operands[0]] for operands in multiplies)
        if byte := [operands for mnemonic, operands in body if re.match(rf"vpmaddubsw|{BYTE_VNNI}", mnemonic)]:
            # The weights that one vector looks up, because what sums start with is made of products too.
            looked_up = [operands for mnemonic, operands in body if mnemonic == "vpshufb"]
            self.products = sum(2 * PRODUCTS[operands[0]] for operands in looked_up or byte)

    def units(self):
        """64 columns of a row and of a vector."""
        return self.products / 64

    def vector_instructions(self):
        """Those that compute: what only loads costs no port that computes."""
        loads = ("vmov", "vbroadcast", "vpbroadcast")
        vectors = [(m, o) for m, o in self.body if re.search(r"\b[xyz]mm\d", o)]
        return sum(not (m.startswith(loads) and "[" in o) for m, o in vectors)

    def cycles(self, cpu):
        """Modelled, for a unit."""
        runs = 200
        # What jumps out of the loop, or over a prefetch, is assembled as a jump back.
        body = [f"{m} {'top' if m.startswith('j') else o}" for m, o in self.body]
        text = [".intel_syntax noprefix", "top:", *body]
        with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
            file.write("\n".join(text) + "\n")
            file.flush()
            command = [MCA, "-march=x86-64", f"-mcpu={cpu}", f"-iterations={runs}", file.name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(re.search(r"Total Cycles:\s+(\d+)", output)[1]) / runs / self.units()


def choose(loops, hot):
    """The loops of a file, by operation."""
    chosen = {}
    for operation, function, most, *least in hot:
        found = []
        for name, body in loops:
            if re.search(function, name) and (count := sum(bool(re.match(most, mnemonic)) for mnemonic, _ in body)):
                found.append((count if least else -count, len(body), body))
        if not found:
            sys.exit(f"no loop in {function} has {most}")
        chosen[operation] = min(found)[2]
    return chosen


def rungs(chosen, compiler, mca, digest):
    lines = [
        "# Rungs of the 16x4 and 8x8 products on x86-64",
        "",
        "Which table a CPU gets, and what its inner loops cost for 64 weights of a row and a vector: vector instructions that",
        "compute, and cycles that `llvm-mca` models for the loops in this folder, those of `avx2` beside them. `.ci/assembly.py`",
        f"makes these tables, from {compiler} and {mca}. All rungs give the test vector's hash `{digest}`.",
        "",
        "The models of CPUs have errors. That of Sapphire Rapids knows one port for 512-bit products, where a Xeon was measured",
        "to start two in a cycle, as that of Ice Lake says; those of Zen 4 and Zen 5 are one, take a port that computes for",
        "each value that a load broadcasts, start a `vpdpbusd` of 512 bits every second cycle, and one `vpermw` of 256 bits in a",
        "cycle, of which a Zen 4 was measured to start two: there, 16x4 of one vector is faster than with `avx2`.",
    ]
    for arithmetic in ("16x4", "8x8"):
        lines += [
            "",
            f"| {arithmetic} on | table | needs | one vector: instructions | cycles | AVX2 | batch: instructions | cycles | AVX2 | tested on |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        for name, cpu, isa, tested in CPUS:
            row = [name, f"`{isa}`", NEEDS[isa]]
            for operation in (f"{arithmetic}, one vector", f"{arithmetic}, a batch"):
                intel = f"{operation}, on Intel" if cpu in INTEL else operation
                loop, avx2 = Loop(chosen[isa].get(intel, chosen[isa][operation])), Loop(chosen["avx2"][operation])
                row += [f"{loop.vector_instructions() / loop.units():.1f}", f"{loop.cycles(cpu):.2f}", f"{avx2.cycles(cpu):.2f}"]
            lines.append("| " + " | ".join(row + [tested]) + " |")
    return "\n".join(lines) + "\n"


def page(isa, loops, compiler):
    lines = [f"# Inner loops: `{isa}`", "", f"As {compiler} compiles them."]
    for operation, body in loops.items():
        lines += ["", f"{operation}:", "", "```text", *listing(isa, body), "```"]
    return "\n".join(lines) + "\n"


def build(target):
    """The version of the compiler, and all inner loops."""
    done = subprocess.run(["bash", "-c", BUILD, "bash", target], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    compiler = re.search(r"rustc \S+", done.stderr)[0]
    return compiler, [(name, list(labelled(loop))) for name, body in functions(done.stdout) for loop in inner_loops(body)]


def main():
    with ThreadPoolExecutor() as pool:
        compilers, loops = zip(*pool.map(build, TARGETS))
    compiler = compilers[0]
    mca = re.search(r"LLVM version \S+", subprocess.run([MCA, "--version"], capture_output=True, text=True, check=True).stdout)[0]
    digest = HASH.search(Path("docs/determinism.md").read_text())[0]
    chosen = {isa: choose(loops, HOT[isa]) for isas, loops in zip(TARGETS.values(), loops) for isa in isas}
    files = {f"{isa}.md": page(isa, loops, compiler) for isa, loops in chosen.items()}
    files["rungs.md"] = rungs(chosen, compiler, mca, digest)
    if os.environ.get("BLESS"):
        FOLDER.mkdir(exist_ok=True)
        for name, text in files.items():
            (FOLDER / name).write_text(text)
            print(f"wrote {FOLDER / name}")
        return
    blessed = (FOLDER / "rungs.md").read_text()
    if f"from {compiler} and {mca}." not in blessed:
        print(f"NOT COMPARED: this is {compiler} with {mca}, and {FOLDER} was made by others")
        return
    changed = [name for name, text in files.items() if (FOLDER / name).read_text() != text]
    for name in changed:
        subprocess.run(["diff", "-u", str(FOLDER / name), "-"], input=files[name], text=True, check=False)
    if changed:
        sys.exit(f"changed: {', '.join(changed)}. If that is well, BLESS=1 {sys.argv[0]} writes the files again.")
    print(f"as committed: {', '.join(files)}; {compiler}, {mca}")


if __name__ == "__main__":
    main()
