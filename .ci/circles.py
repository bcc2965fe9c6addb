"""Fails if files of a crate use each other in a circle, or if its folders do.

    python3 .ci/circles.py src kernels/src cli/src

A file uses those that its paths from `crate`, `super`, `self` or a child lead to. A module's own children are not counted,
because it declares them; nor is `lib.rs`.
"""

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

TESTS = re.compile(r"^#\[cfg\(test\)\]\nmod \w+ \{.*?^\}", re.S | re.M)
USE = re.compile(r"^\s*(?:pub(?:\([^)]*\))? )?use ([^;]+);", re.M)
PATH = re.compile(r"\b(?:crate|super|self)(?:::\w+)+")


def expand(path):
    """The paths of `a::{b, c::{d, e}}`, one by one."""
    prefix, brace, group = path.partition("{")
    if not brace:
        return [path]
    depth, names = 0, [""]
    for character in group[: group.rindex("}")]:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [prefix + rest for name in names if name.strip() for rest in expand(name.strip())]


def uses(module, code, modules):
    """The modules that the code of a module uses."""
    paths = [path for use in USE.findall(code) for path in expand(" ".join(use.split()))]
    for path in paths + PATH.findall(code):
        names = path.split(" as ")[0].split("::")
        start = () if names[0] == "crate" else module
        if names[0] in ("crate", "self"):
            names.pop(0)
        while names and names[0] == "super":
            start, names = start[:-1], names[1:]
        while names and start + (names[0],) in modules:
            start, names = start + (names[0],), names[1:]
        if start[: len(module)] != module:
            yield start


def modules_of(root):
    modules = {}
    for file in root.rglob("*.rs"):
        module = file.relative_to(root).with_suffix("").parts
        if module not in (("lib",), ("main",)):
            modules[module[:-1] if module[-1] == "mod" else module] = file
    return modules


failed = False
for root in map(Path, sys.argv[1:]):
    modules = modules_of(root)
    used = {}
    for module, file in modules.items():
        code = TESTS.sub("", re.sub(r"//.*", "", file.read_text()))
        used[module] = {other for other in uses(module, code, modules) if other}
    folders = {}
    for module, others in used.items():
        folders.setdefault(module[:1], set()).update(other[:1] for other in others if other[:1] != module[:1])
    for graph in (used, folders):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            print(f"{root}: a circle:", " <- ".join("::".join(module) for module in error.args[1]))
            failed = True
    print(f"{root}: {len(modules)} modules")
sys.exit(failed)
