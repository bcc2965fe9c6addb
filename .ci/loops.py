"""The inner loops of functions, read off a disassembly of x86-64, aarch64 or WebAssembly."""

import re
from collections import namedtuple

Instruction = namedtuple("Instruction", "address mnemonic operands")

# `{vex}` and prefixes belong to the mnemonic; a comment may follow.
LINE = re.compile(r"\s+([0-9a-f]+):\s+((?:\{vex\} |cs |data16 )*\S+)\s*(.*?)(?:\s+# .*)?$")

# Two integers of 16 bits of WebAssembly are `i16x8`, registers of 128 bits `v128`.
WASM_VECTOR = re.compile(r"v128\.|[if](8x16|16x8|32x4|64x2)\.")


def functions(disassembly):
    """Names of functions, with their instructions. Several have one name where the compiler makes one for each type."""
    name, body = None, []
    for line in disassembly.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if name:
                yield name, body
            name, body = start[1], []
        elif name and (found := LINE.match(line)):
            body.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    if name:
        yield name, body


def jump_target(instruction):
    """Where a jump of x86-64 or a branch of aarch64 goes, if that is a place in the code."""
    if not re.match(r"j|b$|b\.|cbn?z$|tbn?z$", instruction.mnemonic):
        return None
    target = re.search(r"(?:^|, |\t)([0-9a-f]+)(?: <|$)", instruction.operands)
    return int(target[1], 16) if target else None


def loops_of_jumps(body):
    """From the target of a jump back to the jump."""
    index = {instruction.address: i for i, instruction in enumerate(body)}
    for end, instruction in enumerate(body):
        start = index.get(jump_target(instruction))
        if start is not None and start <= end:
            yield start, end


def loops_of_blocks(body):
    """From `loop` to its `end`."""
    open_blocks = []
    for i, instruction in enumerate(body):
        if instruction.mnemonic in ("block", "loop", "if", "try"):
            open_blocks.append(i)
        elif instruction.mnemonic == "end" and open_blocks:
            start = open_blocks.pop()
            if body[start].mnemonic == "loop":
                yield start, i


def inner_loops(body):
    """The instructions of each loop without another loop in it."""
    ranges = {*loops_of_jumps(body), *loops_of_blocks(body)}
    for start, end in sorted(ranges):
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in ranges):
            yield body[start:end + 1]


def labelled(loop):
    """Mnemonics and operands, without `nop`; a jump goes to the top of the loop, to a place inside or to one outside."""
    addresses = {instruction.address for instruction in loop}
    for instruction in loop:
        mnemonic, operands = instruction.mnemonic, re.sub(r"\s*//.*| <.*", "", instruction.operands)
        if "nop" in mnemonic:
            continue
        target = jump_target(instruction)
        if target is not None or mnemonic.startswith("j"):
            place = "1b" if target == loop[0].address else "inside" if target in addresses else "outside"
            operands = re.sub(r"[0-9a-f]+$", place, operands)
        yield mnemonic, operands


def listing(isa, body):
    """Lines to show, without what other code moves: constants, distances, and which register holds an address or a count."""
    if isa.startswith("simd128"):
        return wasm_listing(body)
    lines = []
    for mnemonic, operands in body:
        for pattern, text in ARM if isa.startswith("neon") else X86:
            operands = re.sub(pattern, text, operands)
        lines.append(f"    {mnemonic:<16}{operands}".rstrip())
    return ["1:", *lines]


X86 = [
    (r"\[rip\+0x[0-9a-f]+\]", "[constant]"),
    (r"\[(rsp|rbp)[^]]*\]", "[stack]"),
    (r"\[r(?!sp|bp|ip)[^]]*\]", "[memory]"),
    (r"(?<=,)0x[0-9a-f]{3,}$", "constant"),
    (r"\br(?:[abcd]x|[sd]i|[sb]p|\d+)[dwb]?\b|\be[abcd]x\b|\be[sd]i\b|\b[abcd]l\b", "r"),
]

ARM = [
    (r"\[(sp|x29)[^]]*\](, #-?\w+)?!?", "[stack]"),
    (r"\[x[^]]*\](, #-?\w+)?!?", "[memory]"),
    (r"#0x[0-9a-f]{3,}", "constant"),
    (r"\b[xw](\d+|zr)\b", "r"),
]


def wasm_listing(body):
    """The vector instructions in their order, without operands; the rest is counted."""
    vectors = [mnemonic for mnemonic, _ in body if WASM_VECTOR.match(mnemonic)]
    return [*(f"    {mnemonic}" for mnemonic in vectors), f"    ({len(body) - len(vectors)} without vectors)"]
