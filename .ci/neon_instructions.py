#!/usr/bin/env python3
"""Counts the instructions of the inner loops of the 16x4 product on NEON, read off the disassembly.

No emulator tells the speed of a CPU, so this is what is checked instead. A loop is found by what it does, not by a
name: a span of 64 weights takes 8 table lookups, and 16 widening multiplies for each vector of a batch. A loop over a
panel of decoded weights has no lookups, and multiplies several rows with one vector. Vector
instructions are those with vector registers, but loads, which are printed apart; an access to the stack would be a
spill.

    .ci/neon_instructions.py [--target-dir DIR]     builds nf4-kernels with the setup of .ci/targets.sh
    .ci/neon_instructions.py --disassembly FILE     reads what `objdump -d --no-show-raw-insn` printed
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

LOOKUPS, MULTIPLIES = 8, 16

# 8 lookups, 8 to join low and high bytes, 4 to split codes.
DECODE_LIMIT = 20

# For each vector: 16 multiplies; conversion, product with the scales and addition, two each.
PRODUCT_LIMIT = 22

# For each vector: absmax times activation scale.
SCALAR_LIMIT = 1

# For one vector: with plain and with nested absmax.
LOOPS = 3

BUILD = """
set -euo pipefail
. .ci/packages.sh
. .ci/targets.sh
use_aarch64
export CARGO_TARGET_DIR="${1:-$CARGO_TARGET_DIR}"
cargo build -q --locked --release -p nf4-kernels --target "$target"
aarch64-linux-gnu-objdump -d -C --no-show-raw-insn "$CARGO_TARGET_DIR/$target/release/libnf4_kernels.rlib"
"""


def functions(disassembly):
    """Names of functions, with (address, mnemonic, operands) of their instructions."""
    name, body = None, []
    for line in disassembly.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if name:
                yield name, body
            name, body = start[1], []
        elif name and (found := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line)):
            body.append((int(found[1], 16), found[2], found[3]))
    if name:
        yield name, body


def inner_loops(body):
    """The instructions of each loop without another loop in it: from the target of a branch back to the branch."""
    index = {address: i for i, (address, _, _) in enumerate(body)}
    ranges = set()
    for end, (address, mnemonic, operands) in enumerate(body):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if re.match(r"(b|b\.\w+|cbn?z|tbn?z)$", mnemonic) and target and int(target[1], 16) <= address:
            if int(target[1], 16) in index:
                ranges.add((index[int(target[1], 16)], end))
    for start, end in sorted(ranges):
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in ranges):
            yield body[start:end + 1]


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
        multiplies = sum(self.vector[m] for m in ["smull", "smull2", "smlal", "smlal2"])
        self.is_panel = "::add_panel" in function
        # Elsewhere, a loop without lookups is over the vectors of a half span, which a row has one of.
        self.is_product = multiplies > 0 and (self.is_panel or self.vector["tbl"] > 0)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-dir", default="", help="where to build")
    parser.add_argument("--disassembly", help="a file to read instead of building")
    args = parser.parse_args()
    if args.disassembly:
        disassembly = Path(args.disassembly).read_text(encoding="utf-8")
    else:
        command = ["bash", "-c", BUILD, "bash", args.target_dir]
        root = Path(__file__).resolve().parent.parent
        disassembly = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    loops = [Loop(name, body) for name, code in functions(disassembly) for body in inner_loops(code)]
    loops = [loop for loop in loops if loop.is_product]
    failed = False
    for loop in loops:
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
    sys.exit(failed)


if __name__ == "__main__":
    main()
