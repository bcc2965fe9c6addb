#!/usr/bin/env python3
"""The inner loops of the products as the compiler makes them, and the table of rungs.

    .ci/assembly.py             compares the files of kernels/asm with what is built now
    BLESS=1 .ci/assembly.py     writes them

A loop of kernels/asm is what runs most of the time, in a form that says what a reviewer wants to see: which vector
instructions there are, in which order, and whether one spills a register. Constants, distances and places on the stack
are left out, because they move when other code changes. A loop is found by what it does, not by a name.

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
from pathlib import Path

FOLDER = Path("kernels/asm")
MCA = "llvm-mca-19"

# Products of 16-bit integers in one instruction, by the register that it writes.
PRODUCTS = {"x": 8, "y": 16, "z": 32}

BUILD = """
set -euo pipefail
. .ci/packages.sh
export RUSTC=$(from_package rustc-web rustc) CARGO_TARGET_DIR=target/assembly
unset RUSTFLAGS
"$RUSTC" --version >&2
cargo build -q --locked --release -p nf4-kernels --target x86_64-unknown-linux-gnu
objdump -d -C -M intel --no-show-raw-insn target/assembly/x86_64-unknown-linux-gnu/release/libnf4_kernels.rlib
"""

# The committed hash of the test vector, which every rung gives.
HASH = re.compile(r"\b4045a7867415edb5\b")

# CPU, the name that llvm-mca has for it, the table that `Kernels::detect` takes, and where that table was tested.
CPUS = [
    ("Skylake", "skylake", "avx2", "hardware of the same instruction set"),
    ("Zen 3", "znver3", "avx2", "hardware"),
    ("Ice Lake", "icelake-server", "avx512-vnni", "parts in Bochs"),
    ("Alder Lake", "alderlake", "avx-vnni", "parts in Bochs"),
    ("Sapphire Rapids", "sapphirerapids", "avx512-vnni", "hardware; parts in Bochs"),
    ("Zen 4", "znver4", "avx512-vnni", "hardware; parts in Bochs"),
    ("Zen 5", "znver5", "avx512-vnni", "parts in Bochs"),
]
SAID = {"one vector": "one vector", "batch": "a batch"}
NEEDS = {
    "avx2": "AVX2, F16C",
    "avx-vnni": "AVX2, F16C, AVX-VNNI",
    "avx512-vnni": "AVX2, F16C, AVX-512 F, BW, VL, VNNI",
}


class Loop:
    def __init__(self, function, body):
        self.function, self.body = function, body
        self.mnemonics = [mnemonic for mnemonic, _ in body]
        multiplies = [operands for mnemonic, operands in body if re.match(r"vpmaddwd|(\{vex\} )?vpdpwssd", mnemonic)]
        self.products = sum(PRODUCTS[operands[0]] for operands in multiplies)
        self.vnni = any("vpdpwssd" in m for m in self.mnemonics)
        self.wide = any(operands.startswith("z") for operands in multiplies)
        # Products of 8-bit integers: a loop of the 8x8 products.
        self.bytes = any(re.search(r"vpmaddubsw|vpdpbusd", m) for m in self.mnemonics)
        self.look_ups = sum(m in ("vpshufb", "vpermw") for m in self.mnemonics)
        self.floats = self.mnemonics.count("vmulps")
        self.isa = "avx512-vnni" if self.wide else "avx-vnni" if self.vnni else "avx2"

    def units(self):
        """64 columns of a row and of a vector."""
        return self.products / 64

    def vector_instructions(self):
        """Those that compute: what only loads costs no port that computes."""
        loads = ("vmov", "vbroadcast", "vpbroadcast")
        vectors = [(m, o) for m, o in self.body if re.search(r"\b[xyz]mm\d", o)]
        return sum(not (m.startswith(loads) and "[" in o) for m, o in vectors)

    def cycles(self, cpu):
        runs = 200
        text = [".intel_syntax noprefix", "top:"] + [f"{m} {o}" for m, o in self.body]
        with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
            file.write("\n".join(text) + "\n")
            file.flush()
            command = [MCA, "-march=x86-64", f"-mcpu={cpu}", f"-iterations={runs}", file.name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(re.search(r"Total Cycles:\s+(\d+)", output)[1]) / runs

    def listing(self):
        """Without numbers that other code moves."""
        lines = []
        for mnemonic, operands in self.body:
            operands = re.sub(r"\[rip\+0x[0-9a-f]+\]", "[constant]", operands)
            operands = re.sub(r"\[(rsp|rbp)[^]]*\]", "[stack]", operands)
            operands = re.sub(r"\[r(?!sp|bp|ip)[^]]*\]", "[memory]", operands)
            operands = re.sub(r"(?<=,)0x[0-9a-f]{3,}$", "constant", operands)
            # Which register holds an address or a count says nothing.
            operands = re.sub(r"\br(?:[abcd]x|[sd]i|[sb]p|\d+)[dwb]?\b|\be[abcd]x\b|\be[sd]i\b|\b[abcd]l\b", "r", operands)
            lines.append(f"    {mnemonic:<16}{operands}".rstrip())
        return lines


def functions(disassembly):
    name, body = None, []
    for line in disassembly.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if name:
                yield name, body
            name, body = start[1], []
        elif name and (found := re.match(r"\s+([0-9a-f]+):\s+((?:\{vex\} |cs |data16 )*\S+)\s*([^#<]*)", line)):
            body.append((int(found[1], 16), found[2], found[3].strip()))
    if name:
        yield name, body


def inner_loops(disassembly):
    """Loops without another loop in them: from the target of a jump back to the jump."""
    for name, body in functions(disassembly):
        index = {address: i for i, (address, _, _) in enumerate(body)}
        ranges = set()
        for end, (_, mnemonic, operands) in enumerate(body):
            if mnemonic.startswith("j") and re.fullmatch(r"[0-9a-f]+", operands):
                start = index.get(int(operands, 16))
                if start is not None and start <= end:
                    ranges.add((start, end))
        for start, end in sorted(ranges):
            if any((a, b) != (start, end) and start <= a and b <= end for a, b in ranges):
                continue
            addresses = {address for address, _, _ in body[start:end + 1]}
            instructions = []
            for address, mnemonic, operands in body[start:end + 1]:
                if "nop" in mnemonic:
                    continue
                if mnemonic.startswith("j"):
                    target = int(operands, 16) if re.fullmatch(r"[0-9a-f]+", operands) else None
                    operands = "1b" if target == body[start][0] else "inside" if target in addresses else "outside"
                instructions.append((mnemonic, operands))
            yield Loop(name, instructions)


def choose(loops):
    """The loops to show, by instruction set and name."""
    chosen = {}
    for isa in NEEDS:
        own = [loop for loop in loops if loop.isa == isa and loop.products and not loop.bytes]
        decoding = [loop for loop in own if loop.look_ups]
        # One vector multiplies least for each look-up; a batch has most products. The simpler of equals has one
        # group in a span. Batches have loops for one vector that is left over, which are not those of the GEMV.
        gemv = [loop for loop in decoding if "gemv" in loop.function] or decoding
        one = min(gemv, key=lambda l: (l.products / l.look_ups, -l.products, len(l.body)))
        batch = min(own, key=lambda l: (-l.products, len(l.body)))
        chosen[isa] = {"one vector": one, "batch": batch}
    return chosen


def modelled(loop, cpu):
    # What jumps out of the loop, or over a prefetch, is assembled as a jump back.
    body = [(m, "top" if m.startswith("j") else o) for m, o in loop.body]
    return Loop(loop.function, body).cycles(cpu) / loop.units()


def rungs(chosen, compiler, mca, digest):
    lines = [
        "# Rungs of the 16x4 products on x86-64",
        "",
        "Which table a CPU gets, and what its inner loops cost for 64 weights of a row and a vector: vector instructions that",
        "compute, and cycles that `llvm-mca` models for the loops in this folder, those of `avx2` beside them. `.ci/assembly.py`",
        f"makes this table, from {compiler} and {mca}. All rungs give the test vector's hash `{digest}`.",
        "",
        "The models of CPUs have errors. That of Sapphire Rapids knows one port for 512-bit products, where a Xeon was measured",
        "to start two in a cycle, as that of Ice Lake says; those of Zen 4 and Zen 5 are one, and take a port that computes for",
        "each value that a load broadcasts.",
        "",
        "| CPU | table | needs | one vector: instructions | cycles | AVX2 | batch: instructions | cycles | AVX2 | tested on |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, cpu, isa, tested in CPUS:
        row = [name, f"`{isa}`", NEEDS[isa]]
        for kind in ("one vector", "batch"):
            loop, avx2 = chosen[isa][kind], chosen["avx2"][kind]
            row += [f"{loop.vector_instructions() / loop.units():.1f}", f"{modelled(loop, cpu):.2f}", f"{modelled(avx2, cpu):.2f}"]
        lines.append("| " + " | ".join(row + [tested]) + " |")
    return "\n".join(lines) + "\n"


def listing(isa, loops, compiler):
    lines = [f"# Inner loops of the 16x4 products: `{isa}`", "", f"As {compiler} compiles them."]
    for kind, loop in loops.items():
        lines += ["", f"For {SAID[kind]}, {loop.products} products:", "", "```text", "1:", *loop.listing(), "```"]
    return "\n".join(lines) + "\n"


def main():
    build = subprocess.run(["bash", "-c", BUILD], capture_output=True, text=True, check=False)
    if build.returncode:
        sys.exit(build.stderr)
    compiler = re.search(r"rustc \S+", build.stderr)[0]
    mca = re.search(r"LLVM version \S+", subprocess.run([MCA, "--version"], capture_output=True, text=True, check=True).stdout)[0]
    digest = HASH.search(Path("docs/determinism.md").read_text())[0]
    chosen = choose(list(inner_loops(build.stdout)))
    files = {f"{isa}.md": listing(isa, loops, compiler) for isa, loops in chosen.items()}
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
