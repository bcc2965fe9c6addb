#!/usr/bin/env python3
"""Pick a small part of a tree of reference data that still has everything once.

    python select.py FULL OUT

Each case has features: its kind, its flags, the pairs of block size and dtype, of distribution and dtype, and so on.
Cases are taken, the one with the fewest bytes for each new feature first, until every feature is covered; cases of
more than LIMIT bytes only for kinds that have no smaller one. OUT gets their files and a manifest.json with their
lines as they were.
"""
import json
import shutil
import sys
from math import prod
from pathlib import Path

LIMIT = 160_000


def size(case):
    return sum(file["bytes"] for file in case["files"])


def features(case):
    kind, dtype = case["kind"], case.get("dtype")
    yield from ((kind, "flag", flag) for flag in case["flags"])
    yield kind, "dtype", dtype
    if kind in ("nf4", "double_quant"):
        shape, block = case["shape"], case["blocksize"]
        elements, cols, nf4 = prod(shape), shape[-1], kind == "nf4"
        yield kind, "block size", block if nf4 else block > 64, nf4 and dtype == "f32"
        yield kind, "distribution", case["dist"], dtype if nf4 else None
        yield kind, "distribution", case["dist"], "partial block" if elements % block and nf4 else None
        yield kind, "rows", block if nf4 else None, "aligned" if cols % block == 0 else "straddling"
        yield kind, "odd", elements % 2, cols % 2
        yield kind, "restored", elements % 2 if nf4 else None, dtype, "dequantized_f16" in case["files"][0]["tensors"]
        yield kind, "dimensions", len(shape), min(cols, 2), min(elements // cols, 2)
        yield kind, "last block", min(elements % block, 2), (elements + 1) % block == 0, elements < block
    if kind == "double_quant":
        yield kind, "nested blocks", min(case["nested_blocks"], 3), case["blocks"] % 256 == 0
    if kind == "double_quant_stats" and case["blocks"] < 5000:
        yield kind, "blocks", case["blocks"]
    if kind == "linear4bit":
        yield kind, "compute", dtype, case["compute"]
        yield kind, "scales", case["double_quant"], case["bias"]
        yield kind, "rows", case["in"] % case["blocksize"] == 0, case["double_quant"]
        yield kind, "odd", case["in"] % 2
    if kind == "peft":
        yield kind, case["use_rslora"], case["use_dora"], case["double_quant"]


def select(cases):
    smallest = {case["kind"]: case for case in sorted(cases, key=size, reverse=True)}
    cases = [case for case in cases if size(case) <= max(LIMIT, size(smallest[case["kind"]]))]
    missing = {f for case in cases for f in features(case)}
    chosen = []

    def bytes_per_feature(case):
        return size(case) / max(len(missing & set(features(case))), 1e-9)

    while missing:
        best = min((c for c in cases if c not in chosen), key=bytes_per_feature)
        chosen.append(best)
        missing -= set(features(best))
    return chosen


def main(full, out):
    text = (full / "manifest.json").read_text()
    cases = json.loads(text)["cases"]
    chosen = {case["id"]: case for case in select(cases)}
    head, lines = text.split(' "cases": [\n')
    lines = [line.rstrip(",") for line in lines.splitlines() if line.startswith("  {")]
    lines = [line for line in lines if json.loads(line)["id"] in chosen]
    for case in chosen.values():
        for file in case["files"]:
            path = out / file["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(full / file["file"], path)
    (out / "manifest.json").write_text(head + ' "cases": [\n' + ",\n".join(lines) + "\n ]\n}\n")
    for kind in dict.fromkeys(case["kind"] for case in cases):
        of_kind = [case for case in chosen.values() if case["kind"] == kind]
        total = sum(case["kind"] == kind for case in cases)
        print(f"{kind:20} {len(of_kind):4} of {total:4} cases {sum(map(size, of_kind)):9} bytes")
    print(f"{len(chosen)} of {len(cases)} cases, {sum(map(size, chosen.values()))} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
