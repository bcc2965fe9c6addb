#!/usr/bin/env python3
"""Writes architectures.json: of which class transformers makes each module, for every model that it knows.

    python cli/data/architectures.py [--only CLASS...] [--out FILE]

It needs the packages of tests/upstream/requirements.txt. Every class is built on the meta device from its default
configuration, which allocates nothing. What the tool `nf4` reads from the file, and only that, is written:

    transformers   the version
    types          for each `model_type`: the class that is meant without `architectures`, and the one without a head
    same           classes that are in all respects like another one, which is in `classes`
    classes        for each class
        linear     modules that are `nn.Linear` and no subclass, which become 4-bit layers: {parent: "child child"}
        conv1d     those that are `Conv1D`, whose weights are transposed before they are quantized
        other      other modules with a two-dimensional `weight`: embeddings, subclasses, routers
        models     {path: class} of models within the model, with the key of their section of config.json if they have
                   one: {path: [class, key]}; the fields above leave out what is in them, and have what other classes
                   make of this one beside what it makes of itself
        prefix     `base_model_prefix`: checkpoints may have it or not
        skip       what transformers leaves by itself (`get_keys_to_not_convert`), as far as it is a `Linear`
        head       those of them that are the output embedding
        keep       `_keep_in_fp32_modules`, which are always left
        tied       whether the head is tied to the embedding if config.json does not say
        renames    indices in `renames`: what happens to the names of a checkpoint when it is loaded, in order, before
                   what is in `legacy`
        source     a key of `leaves`
    renames        [sources, targets, kind], or [sources, targets, kind, scope, prefix], with kind `rename`, `group` or
                   `convert` (tensors are joined, cut or permuted)
    legacy         the same, for every model
    leaves         for each source file: attributes that are only ever an `nn.Linear`, and of which the default
                   configuration makes no module; they are there with others

Numbers in names are `*`.
"""
import argparse
import ast
import importlib
import json
import logging
import multiprocessing
import os
import pkgutil
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import GroupWeightRename, WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

MODELS = Path(importlib.import_module("transformers.models").__path__[0])


def star(name):
    """The name without numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def source_files():
    return [(package, path.stem) for package in sorted(m.name for m in pkgutil.iter_modules([str(MODELS)]))
            for path in sorted((MODELS / package).glob("modeling_*.py"))]


def model_classes(package, stem):
    """The models that a file defines, without the abstract ones."""
    module = importlib.import_module(f"transformers.models.{package}.{stem}")
    return {name: c for name, c in sorted(vars(module).items())
            if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__
            and not name.endswith("PreTrainedModel") and c.config_class is not None}


# --- one class

def kind(module):
    """What `replace_with_bnb_linear` makes of a module, or would have to know of it."""
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    weight = getattr(module, "weight", None)
    return "other" if isinstance(weight, nn.Parameter) and weight.ndim == 2 else None


def config_key(config, child):
    """The section of config.json that a model within a model is made from."""
    return next((key for key, value in vars(config).items() if value is child.config), None)


def modules(model, inline):
    """Kinds of modules by name, and the models within the model; what is in those is left out, but for classes `inline`."""
    kinds, children = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{child}.") for child in children)
        if name and isinstance(module, PreTrainedModel) and type(module).__name__ not in inline and not inside:
            key = config_key(model.config, module)
            children[name] = [type(module).__name__, key] if key else type(module).__name__
        elif not inside and (what := kind(module)):
            kinds[name] = what
    return kinds, {star(name): child for name, child in children.items()}


def patterns(kinds):
    """{kind: {parent: "child child"}}, with numbers only where they tell kinds apart."""
    seen = {}
    for name, what in kinds.items():
        seen.setdefault(star(name), set()).add(what)
    tables = {}
    for name, what in kinds.items():
        name = star(name) if len(seen[star(name)]) == 1 else name
        parent, _, child = name.rpartition(".")
        children = tables.setdefault(what, {}).setdefault(parent, [])
        if child not in children:
            children.append(child)
    return {what: {parent: " ".join(names) for parent, names in table.items()} for what, table in tables.items()}


def rename(transform):
    what = "convert" if isinstance(transform, WeightConverter) else "rename"
    if isinstance(transform, GroupWeightRename):
        what = "group"
    elif type(transform).__name__ not in ("WeightRenaming", "PrefixChange", "WeightConverter"):
        what = "convert"  # a kind of its own; whatever it names is left as it is
    scope = [] if transform.scope_prefix is None else [transform.scope_prefix, transform.base_model_prefix]
    return [transform.source_patterns, transform.target_patterns, what, *scope]


def describe(cls, source, inline=frozenset()):
    """What architectures.json says about a class, and in `all` the kinds of all its modules."""
    with torch.device("meta"), initialization.no_init_weights():
        model = cls(cls.config_class())
    kinds, children = modules(model, inline)
    linear = [n for n, m in model.named_modules(remove_duplicate=False) if kind(m) in ("linear", "conv1d")]
    skip = sorted({star(key) for key in get_keys_to_not_convert(model)
                   if any(not should_convert_module(name, [key]) for name in linear)})
    output = model.get_output_embeddings()
    head = {star(n) for n, m in model.named_modules(remove_duplicate=False) if output is not None and m is output}
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    return {
        **patterns(kinds),
        "models": children,
        "prefix": model.base_model_prefix,
        "skip": skip,
        "head": sorted(head & set(skip)),
        "keep": sorted(model._keep_in_fp32_modules or []),
        "tied": any(star(name) in head for name in tied),
        "renames": [rename(t) for t in get_model_conversion_mapping(model, add_legacy=False)],
        "source": source,
        "all": {star(n): what for n, m in model.named_modules(remove_duplicate=False) if (what := kind(m))},
    }


# --- attributes that no default configuration makes a module of

def called(node):
    """Names of the classes that an expression makes an object of, such as `nn.Linear`."""
    if isinstance(node, ast.IfExp):
        return called(node.body) | called(node.orelse)
    if isinstance(node, ast.Call):
        return {ast.unparse(node.func)}
    return {"None"} if isinstance(node, ast.Constant) and node.value is None else {"?"}


def linear_attributes(package, stem):
    made = {}
    for node in ast.walk(ast.parse((MODELS / package / f"{stem}.py").read_text())):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    made.setdefault(target.attr, set()).update(called(node.value))
    return {name for name, classes in made.items()
            if "nn.Linear" in classes and classes <= {"nn.Linear", "nn.Identity", "None"}}


# --- all of them

def describe_file(task):
    package, stem, only, inline = task
    described, failed = {}, {}
    try:
        found = model_classes(package, stem)
    except ImportError as error:  # it needs another package
        return {}, {stem: str(error)}, (stem, set())
    for name, cls in found.items():
        if only and name not in only:
            continue
        try:
            described[name] = describe(cls, stem, inline)
        except Exception as error:  # it needs another package too, or has no default configuration
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return described, failed, (stem, linear_attributes(package, stem))


def types(classes):
    """The class that is meant by a `model_type`, and the one without a head, if they are described."""
    names = {}
    heads = [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
             modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
             modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES]
    first = lambda value: value[0] if isinstance(value, (tuple, list)) else value
    for model_type, base in modeling_auto.MODEL_MAPPING_NAMES.items():
        base = first(base)
        head = next((first(h[model_type]) for h in heads if model_type in h), base)
        found = [name if name in classes else None for name in (head, base)]
        if any(found):
            names[model_type] = [found[0] or found[1], found[1] or found[0]]
    return names


def owner(classes, name, module):
    """The class of the innermost model that holds a module, and the module's name in there."""
    for path, child in sorted(classes[name]["models"].items(), reverse=True):
        parts, inside = path.split("."), module.split(".")
        if len(inside) > len(parts) and inside[:len(parts)] == parts:
            return owner(classes, child if isinstance(child, str) else child[0], ".".join(inside[len(parts):]))
    return name, module


def complete(classes):
    """Adds to each class what others make of it, and checks that the table then gives back every module."""
    for name, what in classes.items():
        for module, is_kind in what["all"].items():
            inner, rest = owner(classes, name, module)
            parent, _, child = rest.rpartition(".")
            known = [k for k in ("linear", "conv1d", "other")
                     if child in classes[inner].get(k, {}).get(parent, "").split()]
            if not known:
                names = classes[inner].setdefault(is_kind, {})
                names[parent] = f"{names.get(parent, '')} {child}".strip()
            elif known != [is_kind]:
                print(f"{name}: {module} is {is_kind}, but {known} in {inner}")
    for what in classes.values():
        del what["all"]


def compress(classes, attributes):
    """Equal classes once, equal renames once."""
    renames, leaves = {}, {}
    for what in classes.values():
        what["renames"] = [renames.setdefault(json.dumps(step), len(renames)) for step in what["renames"]]
        known = {leaf for table in ("linear", "conv1d", "other") for names in what.get(table, {}).values()
                 for leaf in names.split()}
        leaves.setdefault(what["source"], set(attributes[what["source"]])).difference_update(known)
    leaves = {source: " ".join(sorted(names)) for source, names in sorted(leaves.items()) if names}
    for name, what in classes.items():
        if what["source"] not in leaves:
            del what["source"]
        classes[name] = {key: value for key, value in what.items() if value not in ("", [], {}, False)}
    first, same = {}, {}
    for name, what in sorted(classes.items()):
        text = json.dumps(what, sort_keys=True)
        if text in first:
            same[name] = first[text]
        else:
            first[text] = name
    return {name: classes[name] for name in sorted(first.values())}, same, [json.loads(step) for step in renames], leaves


def gather(tasks):
    classes, failed, attributes = {}, {}, {}
    with multiprocessing.Pool() as pool:
        for described, not_described, (stem, names) in pool.imap_unordered(describe_file, tasks):
            classes |= described
            failed |= not_described
            attributes[stem] = names
    return dict(sorted(classes.items())), dict(sorted(failed.items())), attributes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="CLASS")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    classes, failed, attributes = gather([(*file, frozenset(args.only), frozenset()) for file in source_files()])
    # Models within models that cannot be described by themselves are described with what holds them.
    children = lambda what: {c if isinstance(c, str) else c[0] for c in what["models"].values()}
    inline = frozenset()
    while absent := frozenset().union(*map(children, classes.values())) - classes.keys():
        inline |= absent
        again = {name: what["source"] for name, what in classes.items() if children(what) & absent}
        tasks = [(package, stem, frozenset(again), inline) for package, stem in source_files() if stem in again.values()]
        classes |= gather(tasks)[0]
    complete(classes)
    for name, error in failed.items():
        print(f"not described: {name}: {error}")
    models = types(classes)
    total = len(classes)
    classes, same, renames, leaves = compress(classes, attributes)
    table = {"transformers": transformers.__version__, "types": models, "same": same, "leaves": leaves,
             "renames": renames, "legacy": [rename(t) for t in get_checkpoint_conversion_mapping("legacy")], "classes": classes}
    # One line an entry, so that a change shows what changed.
    lines = []
    for key, value in table.items():
        entry = lambda v: json.dumps(v, ensure_ascii=True, separators=(",", ":"))
        if isinstance(value, dict):
            lines.append(f'"{key}":{{\n' + ",\n".join(f"{entry(k)}:{entry(v)}" for k, v in value.items()) + "\n}")
        elif isinstance(value, list):
            lines.append(f'"{key}":[\n' + ",\n".join(map(entry, value)) + "\n]")
        else:
            lines.append(f'"{key}":{entry(value)}')
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{args.out}: {total} classes ({len(classes)} different), {len(failed)} not described, "
          f"{args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
