"""Configurations as plain dictionaries: laid over each other, completed, and varied for each adapter; the rows of methods.tsv."""

import copy
import csv
import difflib
import math
from pathlib import Path

from ctrl.contradictions import check_across, check_proof, check_sizes, check_unguided
from ctrl.errors import UserError
from ctrl.names import VARIANT, split_strength
from ctrl.schema import check

MIXTURE_DEFAULTS = {
    "num_sets": 8,
    "methods": [
        *("exact", "exact_reference", "pretrained", "ctrl", "ctrl_adjoint", "reconstruction_guidance", "dps", "mpgd", "smc", "svdd"),
        *("cfg", "mean_kl", "reward_maximization"),
    ],
}


def merge(defaults: dict, *overrides: dict) -> dict:
    """`defaults` with each of `overrides` laid over it: mappings key by key, everything else as a whole; the last one wins."""
    merged = copy.deepcopy(defaults)
    for override in overrides:
        for key, value in override.items():
            both = isinstance(merged.get(key), dict) and isinstance(value, dict)
            merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def check_size(config: object, where: str = "config", limit: int = 100_000) -> object:
    """`config` itself; UserError where it holds more than `limit` entries, as a few lines of YAML can, by aliases of aliases."""
    open_nodes, seen = [config], 0
    while open_nodes:
        node = open_nodes.pop()
        seen += 1
        if seen > limit or (isinstance(node, str) and len(node) > limit):
            raise UserError(f"{where}: more than {limit} entries or characters; leave out YAML's aliases (*name), which multiply")
        open_nodes += list(node.values()) if isinstance(node, dict) else node if isinstance(node, list | tuple | set) else []
    return config


def resolve(config: dict, schema: dict, where: str = "config") -> dict:
    """The checked `config` with what follows from it filled in: given bin edges fix the number of classes, several factors multiply it."""
    check(config, schema, where)
    config = copy.deepcopy(config)
    if config["base"]["kind"] == "gaussian_mixture":
        config = merge(MIXTURE_DEFAULTS, config)
    label = config["label"]
    if label["factors"]:
        common = {key: label[key] for key in ("edges", "num_classes", "descending")}
        label["factors"] = [common | factor for factor in label["factors"]]
    for one in label["factors"] or [label]:
        if isinstance(one["edges"], list) and label["kind"] != "continuous":
            one["num_classes"] = len(one["edges"]) + 1
    if label["factors"]:
        label["num_classes"] = math.prod(factor["num_classes"] for factor in label["factors"])
    check_across(config, where)
    check_sizes(config, where)
    check_proof(config, where)
    if unknown := set(config["trainers"]["recipes"]) - {"ctrl", *config["adapters"]}:
        known = ", ".join(["ctrl", *config["adapters"]])
        raise UserError(f"{where}: trainers.recipes has {min(unknown)}; the recipes are {known}")
    for name in config["adapters"]:
        if VARIANT.fullmatch(name)["recipe"] != name or split_strength(name)[1]:
            raise UserError(f"{where}: adapters.{name}: _gamma, _seed, _n and _strength with a number vary a recipe; give it another name")
        variant = for_adapter(config, name)
        check(variant, schema, f"{where}, with adapters.{name} laid over finetune")
        check_across(variant, f"{where}, with adapters.{name} laid over finetune")
        if config["adapters"][name].get("unguided_jacobian"):
            check_unguided(variant, f"{where}, with adapters.{name} laid over finetune")
    return config


def for_adapter(config: dict, name: str) -> dict:
    """The configuration of one adapter: what `adapters` says of its recipe lies over the section `finetune`.

    `ctrl_gamma3_seed1` is the recipe `ctrl` with gamma 3, trained with seed 1; `ctrl_n300` is `ctrl` itself, with fewer labelled images.
    """
    varied = VARIANT.fullmatch(name)
    changes = {"finetune": config["adapters"].get(varied["recipe"], {})}
    if varied["gamma"]:
        changes = merge(changes, {"finetune": {"gamma": float(varied["gamma"])}})
    if varied["seed"]:
        changes["seed"] = int(varied["seed"])
    return merge(config, changes)


def needs_classifier(config: dict) -> bool:
    """Whether the trainer of `config` learns from p(y | x): not from the oracle's own answer, nor from the labelled images alone."""
    return config["finetune"]["trainer"] in ("backprop", "adjoint", "efficient_adjoint")


def read_methods(path: str, schema: dict) -> dict[str, dict]:
    """The rows of methods.tsv by the name of the method; UserError where one does not fit the schema."""
    for row in (rows := list(csv.DictReader(Path(path).read_text().splitlines(), delimiter="\t"))):
        check(row, schema, f"{path}, method {row.get('method')}")
    return {row["method"]: row for row in rows}


def check_scales(methods: dict[str, dict], tuning: dict) -> dict[str, dict]:
    """The rows of methods.tsv, by the method's name; UserError where one has no scales in the section `tuning`, or scales have no row.

    A guidance is tuned once, on the row that bears its name; further rows of the same guidance take that scale.
    """
    tuned = {row["guidance"]: name for name, row in methods.items() if row["family"] in ("guidance", "cfg")}
    if nameless := [name for name in tuned if methods.get(name, {}).get("guidance") != name]:
        name = min(nameless)
        raise UserError(f"config/methods.tsv, method {tuned[name]}: there is no row {name} to tune its guidance on; give it that name")
    if missing := tuned.keys() - tuning.keys():
        name = min(missing)
        raise UserError(f"config/methods.tsv, method {tuned[name]}: no scales to try; add tuning.{name}: {{scale: [...]}} to the config")
    if unknown := tuning.keys() - tuned.keys() - {"num_images"}:
        name, known = min(unknown), [*tuned, "num_images"]
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"config: unknown key tuning.{name}; " + (f"did you mean tuning.{near[0]}?" if near else f"known: {', '.join(known)}")
        )
    return methods
