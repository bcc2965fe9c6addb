#!/usr/bin/env python3
"""Counts the instructions of the inner loops of the 16x4 and the 8x8 product on NEON, read off the disassembly.

No emulator tells the speed of a CPU, so this is what is checked instead. A loop is found by what it does, not by a
name: a span of 64 weights takes 8 table lookups, and 16 widening multiplies for each vector of a batch. A loop over a
panel of decoded weights has no lookups, and multiplies several rows with one vector. Vector
instructions are those with vector registers, but loads, which are printed apart; an access to the stack would be a
spill.

The 8x8 product takes four rows for a vector, or a panel's: per 64 weights of a row 4 `sdot`, or 2 `smmla` (which have two
vectors), or 16 widening multiplies of bytes and 4 `sadalp`. `--cycles` prints, as a table, what Debian's llvm-19 models
for the loops of both products on several CPUs, with all loads from the nearest cache.

    .ci/neon_instructions.py [--target-dir DIR]     builds nf4-kernels with the setup of .ci/targets.sh
    .ci/neon_instructions.py --cycles               ... and models cycles
    .ci/neon_instructions.py --disassembly FILE     reads what `objdump -d --no-show-raw-insn` printed
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from loops import functions, inner_loops

LOOKUPS, MULTIPLIES = 8, 16

# 8 lookups, 8 to join low and high bytes, 4 to split codes.
DECODE_LIMIT = 20

# For each vector: 16 multiplies; conversion, product with the scales and addition, two each.
PRODUCT_LIMIT = 22

# For each vector: absmax times activation scale.
SCALAR_LIMIT = 1

# For one vector: with plain and with nested absmax.
LOOPS = 3

# The 8x8 product: vector instructions at most for 64 weights of a row and a vector.
LIMITS_8X8 = {
    ("neon-dotprod", "one vector"): 20,  # 4 to split codes, 4 look-ups, 2 `movi`, 4 `sdot`; of four rows 6 `addp`, 8 to finish
    ("neon-dotprod", "batch"): 7,  # 28 for four rows
    ("neon-i8mm", "batch"): 7,
    ("neon", "one vector"): 24,
    ("neon", "batch"): 16,
}

# The name that llvm-mca has for a CPU, and the tables that it can have.
CPUS = {
    "cortex-a55": ["neon-dotprod"],
    "neoverse-n1": ["neon-dotprod"],
    "neoverse-n2": ["neon-dotprod", "neon-i8mm"],
    "neoverse-v1": ["neon-dotprod", "neon-i8mm"],
    "apple-m1": ["neon-dotprod"],
}

MCA = "llvm-mca-19"

BUILD = """
set -euo pipefail
. .ci/packages.sh
. .ci/targets.sh
use_aarch64
export CARGO_TARGET_DIR="${1:-$CARGO_TARGET_DIR}"
cargo build -q --locked --release -p nf4-kernels --target "$target"
aarch64-linux-gnu-objdump -d -C --no-show-raw-insn "$CARGO_TARGET_DIR/$target/release/libnf4_kernels.rlib"
"""


class Loop:
    def __init__(self, function, body):
        self.function = function
        self.vector, self.scalar, self.loads, self.other = Counter(), Counter(), Counter(), Counter()
        # The factors that products take from one lane, each as a register and how often it was written before.
        self.scales, writes = set(), Counter()
        for _, mnemonic, operands in body:
            if re.match(r"(ld|st|prf)", mnemonic):
                kind = self.loads
            elif re.search(r"\b[vqd]\d+\b", operands):
                kind = self.vector
            elif re.search(r"\bs\d+\b", operands):
                kind = self.scalar
            else:
                kind = self.other
            kind[mnemonic] += 1
            if mnemonic == "fmul" and (scale := re.search(r"v(\d+)\.s\[", operands)):
                self.scales.add((scale[1], writes[scale[1]]))
            if written := re.match(r"[vqds](\d+)\b", operands):
                writes[written[1]] += 1
        self.body = [(mnemonic, operands) for _, mnemonic, operands in body if mnemonic != "nop"]
        multiplies = sum(self.vector[m] for m in ["smull", "smull2", "smlal", "smlal2"])
        # The 8x8 product has loops of its own.
        multiplies = 0 if self.vector["sadalp"] else multiplies
        self.is_panel = "::add_panel" in function
        # Elsewhere, a loop without lookups is over the vectors of a half span, which a row has one of.
        self.is_product = multiplies > 0 and (self.is_panel or self.vector["tbl"] > 0)
        # Rows of half a span have no loop over spans, so theirs is an inner one; it compares each result with itself, to
        # give NaN the bits that are specified.
        if self.vector["tbl"] < LOOKUPS and self.scalar["fcmp"] > 0:
            self.is_product = False
        # Of a panel, each row is a span that is multiplied with one vector.
        self.spans = max(1, multiplies // MULTIPLIES if self.is_panel else self.vector["tbl"] // LOOKUPS)
        self.vectors = max(1, multiplies // (self.spans * MULTIPLIES))
        known = (0 if self.is_panel else self.spans * LOOKUPS, self.spans * self.vectors * MULTIPLIES)
        self.is_known = (self.vector["tbl"], multiplies) == known
        self.stack = sum(bool(re.search(r"\[(sp|x29)\b", operands)) for _, _, operands in body)

    def groups(self):
        """Activation groups of a span: each has a scale of its own."""
        return max(1, len(self.scales) // (self.spans * self.vectors))

    def problems(self):
        if not self.is_known:
            yield f"not {LOOKUPS} lookups and {MULTIPLIES} multiplies, or multiples of these"
        vector, scalar = (sum(c.values()) / self.spans for c in (self.vector, self.scalar))
        decode_limit = 0 if self.is_panel else DECODE_LIMIT
        limit, scalar_limit = decode_limit + PRODUCT_LIMIT * self.vectors, SCALAR_LIMIT * self.vectors
        if vector > limit:
            yield f"{vector:g} vector instructions for 64 weights, more than {limit}"
        if self.groups() == 1 and scalar > scalar_limit:
            yield f"{scalar:g} scalar floating-point instructions for 64 weights, more than {scalar_limit}"
        if self.stack:
            yield f"accesses to the stack: {self.stack}"

    def print(self):
        spans = f", {self.spans} spans at once" if self.spans > 1 else ""
        spans += ", decoded before" if self.is_panel else ""
        vectors = f", {self.vectors} vectors" if self.vectors > 1 else ""
        print(f"{self.function}: blocks of {'64 or more' if self.groups() == 1 else '32'}{vectors}{spans}")
        kinds = [("vector", self.vector), ("scalar", self.scalar), ("loads", self.loads), ("other", self.other)]
        for name, counts in kinds:
            total = sum(counts.values()) / self.spans
            details = ", ".join(f"{count} {mnemonic}" for mnemonic, count in counts.most_common())
            print(f"  {name} {total:g}: {details}")


class Loop8x8:
    """An inner loop of the 8x8 product, which a span or half a span of several rows takes at once."""

    def __init__(self, function, body):
        self.function = function
        self.body = [(mnemonic, operands) for _, mnemonic, operands in body if mnemonic != "nop"]
        self.counts = counts = Counter(mnemonic for mnemonic, _ in self.body)
        wide = sum(counts[m] for m in ["smull", "smull2", "smlal", "smlal2"])
        self.isa = "neon-i8mm" if counts["smmla"] else "neon-dotprod" if counts["sdot"] else "neon"
        self.kind = "one vector" if counts["tbl"] else "batch"
        # A `sdot` has 16 products, a `smmla` 32, a widening multiply 8.
        products = 16 * counts["sdot"] + 32 * counts["smmla"] + 8 * wide
        self.is_product = products > 0 and (counts["sdot"] + counts["smmla"] > 0 or counts["sadalp"] > 0)
        self.units = products / 64
        self.stack = sum(bool(re.search(r"\[(sp|x29)\b", operands)) for _, operands in self.body)
        self.vector = sum(
            bool(re.search(r"\b[vqd]\d+\b", operands)) and not re.match(r"(ld|st|prf)", mnemonic)
            for mnemonic, operands in self.body
        )

    def problems(self):
        if (limit := LIMITS_8X8.get((self.isa, self.kind))) is None:
            yield "not a known loop"
        elif self.vector / self.units > limit:
            yield f"{self.vector / self.units:.2f} vector instructions for 64 weights and a vector, more than {limit}"
        if self.stack:
            yield f"accesses to the stack: {self.stack}"

    def print(self):
        print(f"{self.function}: 8x8, {self.isa}, {self.kind}")
        details = ", ".join(f"{count} {mnemonic}" for mnemonic, count in self.counts.most_common())
        each = f"{self.vector / self.units:.2f}"
        print(f"  vector {self.vector} for {self.units:g} spans of a row and a vector, {each} each: {details}")


def cycles(body, cpu, units):
    """What llvm-mca models for 64 weights of a row and a vector."""
    lines = ["top:"]
    for mnemonic, operands in body:
        operands = re.sub(r"//.*", "", operands)
        # Where a jump goes is another matter.
        lines.append(f"{mnemonic} {re.sub(r'[0-9a-f]+ <.*>', 'top', operands)}")
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        command = [MCA, "-march=aarch64", "-mattr=+dotprod,+i8mm", f"-mcpu={cpu}", "-iterations=200", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", text)[1]) / 200 / units


def print_cycles(loops_16x4, loops_8x8):
    """A table for docs/performance.md: the loops with most products, the fewest instructions of equals."""
    best = {}
    for loop in loops_16x4:
        if loop.groups() == 1:
            kind = "batch" if loop.is_panel or loop.vectors > 1 else "one vector"
            best.setdefault(("16x4", kind), []).append((loop.body, loop.spans * loop.vectors))
    for loop in loops_8x8:
        best.setdefault((loop.isa, loop.kind), []).append((loop.body, loop.units))

    def modelled(key, cpu):
        return min(cycles(body, cpu, units) for body, units in best[key])

    print("| CPU | one vector: 16x4 | 8x8 | | batch: 16x4 | 8x8, `sdot` | | 8x8, `smmla` | |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for cpu, isas in CPUS.items():
        one, batch = modelled(("16x4", "one vector"), cpu), modelled(("16x4", "batch"), cpu)
        eight = modelled(("neon-dotprod", "one vector"), cpu)
        row = [f"`{cpu}`", f"{one:.1f}", f"{eight:.1f}", f"{one / eight:.1f} x", f"{batch:.1f}"]
        for isa in ("neon-dotprod", "neon-i8mm"):
            eight = modelled((isa, "batch"), cpu) if isa in isas else None
            row += [f"{eight:.1f}", f"{batch / eight:.1f} x"] if eight else ["", ""]
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-dir", default="", help="where to build")
    parser.add_argument("--disassembly", help="a file to read instead of building")
    parser.add_argument("--cycles", action="store_true", help="model cycles, too")
    args = parser.parse_args()
    if args.disassembly:
        disassembly = Path(args.disassembly).read_text(encoding="utf-8")
    else:
        command = ["bash", "-c", BUILD, "bash", args.target_dir]
        root = Path(__file__).resolve().parent.parent
        disassembly = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    bodies = [(name, body) for name, code in functions(disassembly) for body in inner_loops(code)]
    loops_8x8 = [loop for loop in (Loop8x8(name, body) for name, body in bodies) if loop.is_product]
    loops = [loop for loop in (Loop(name, body) for name, body in bodies) if loop.is_product]
    failed = False
    for loop in loops + loops_8x8:
        loop.print()
        for problem in loop.problems():
            print(f"  FAILED: {problem}")
            failed = True
    if not any(loop.is_panel for loop in loops):
        print("FAILED: no inner loop over a panel of decoded weights")
        failed = True
    found = sum(loop.groups() == 1 and loop.vectors == 1 and not loop.is_panel for loop in loops)
    if found < LOOPS:
        print(f"FAILED: {found} inner loops for one vector and blocks of 64 or more, not {LOOPS} or more")
        failed = True
    for isa, kind in sorted(LIMITS_8X8.keys() - {(loop.isa, loop.kind) for loop in loops_8x8}):
        print(f"FAILED: no inner loop of the 8x8 product with {isa} and {kind}")
        failed = True
    if args.cycles:
        print_cycles(loops, loops_8x8)
    sys.exit(failed)


if __name__ == "__main__":
    main()
