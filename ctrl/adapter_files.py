"""What an adapter's folder must hold before any of it is used: a stranger may have made it. Nothing in it is ever run."""

import json
from pathlib import Path

import jsonschema
import torch
from torch import Tensor, nn

from ctrl.base import Base
from ctrl.embedding import FourierEmbedding, check_distinct
from ctrl.errors import UserError
from ctrl.folders import check_links
from ctrl.io import load_metadata, load_tensors, read_json
from ctrl.labels import Categorical, Continuous, Factors

LORA_FILE, EMBEDDING_FILE = "pytorch_lora_weights.safetensors", "label_embedding.safetensors"
NAME, NUMBER = {"type": "string", "maxLength": 500}, {"type": "number", "minimum": -1e9, "maximum": 1e9}
NAMES = {"type": "array", "items": NAME, "maxItems": 100_000}
SAMPLER = {
    "num_steps": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "spacing": {"enum": ["scheduler", "quadratic"]},
    "timesteps": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 100_000}, "minItems": 1, "maxItems": 10_000},
    "eta": {"type": "number", "minimum": 0, "maximum": 1},
    "guidance_scale": NUMBER,
}
CONTINUOUS = {
    **dict.fromkeys(("low", "high", "mean", "sd", "extrapolation", "tolerance"), NUMBER),
    **dict.fromkeys(("oracle", "unit"), NAME),
}
BASE_FILES = {**dict.fromkeys(("revision", "variant", "config"), NAME), "t5": {"const": False}}
SCHEMA = {  # of adapter.json; what else it says is for people
    "type": "object",
    "required": ["base", "base_fingerprint", "rank", "target_modules", "min_timestep", "label_names", "sampler"],
    "anyOf": [{"required": ["num_classes"]}, {"required": ["continuous"]}],
    "properties": {
        "base": NAME,
        "base_fingerprint": NAME,
        "base_fingerprint_bfloat16": NAME,
        "base_overlap": NUMBER,
        "base_kind": NAME,
        "base_files": {"type": "object", "properties": BASE_FILES, "additionalProperties": False},
        "rank": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "target_modules": {**NAMES, "minItems": 1},
        "min_timestep": {"type": "number", "minimum": 0},
        "num_classes": {"anyOf": [{"type": "integer", "minimum": 2}, {"type": "array", "items": {"type": "integer"}, "maxItems": 16}]},
        "label_names": NAMES,
        "factors": {"type": "object", "additionalProperties": {**NAMES, "minItems": 2}, "minProperties": 2, "maxProperties": 16},
        "continuous": {"type": "object", "properties": CONTINUOUS, "required": list(CONTINUOUS), "additionalProperties": False},
        "sampler": {"type": "object", "properties": SAMPLER, "required": list(SAMPLER)},
    },
}


def space_of_adapter(described: dict) -> Factors | Continuous:
    """The label space that an adapter.json describes."""
    if "continuous" in described:
        return Continuous(**described["continuous"])
    if named := described.get("factors"):
        return Factors(tuple(Categorical(len(names), tuple(names)) for names in named.values()), tuple(named))
    return Factors((Categorical(len(described["label_names"]), tuple(described["label_names"])),))


def embedding_shapes(space: Factors | Continuous, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a label embedding."""
    if isinstance(space, Continuous):
        hidden, inputs = FourierEmbedding.HIDDEN, 2 * FourierEmbedding.NUM_FREQUENCIES
        return {"hidden.weight": (hidden, inputs), "hidden.bias": (hidden,), "out.weight": (width, hidden)}
    return {"weight": (sum(factor.num_classes for factor in space.factors) + 1, width)}


def lora_shapes(base: Base, rank: int, targets: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a LoRA on the network's layers that `targets` name, as PEFT chooses them: by the end of their name."""
    shapes = {}
    for name, module in base.network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name == t or name.endswith(f".{t}") for t in targets):
            out, inner, *kernel = module.weight.shape
            shapes[f"{base.part}.{name}.lora_A.weight"] = (rank, inner, *kernel)
            shapes[f"{base.part}.{name}.lora_B.weight"] = (out, rank, *(1 for _ in kernel))
    return shapes


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], made_by: str) -> None:
    """Raises UserError unless `tensors` are those of `shapes`, of finite floating-point numbers."""
    again = "take the whole adapter from where it was made, or train it again"
    if wrong := sorted(tensors.keys() ^ shapes.keys()):
        raise UserError(f"{path}: its layers are not those that {made_by} describes, such as {wrong[0][:200]!r}; {again}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has the shape {list(tensor.shape)}, not {list(shapes[name])}; {again}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {name} does not hold finite numbers; {again}")


def check_lora_metadata(path: Path, part: str, rank: int, targets: list[str]) -> None:
    """Raises UserError where the header of a LoRA file asks PEFT for another LoRA than adapter.json describes."""
    try:
        said = json.loads(load_metadata(path).get("lora_adapter_metadata", "{}"))
        found = {key: said.get(f"{part}.{key}") for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}
        usual = [said.get(f"{part}.{key}") for key in ("use_dora", "use_rslora", "layer_replication", "modules_to_save", "auto_mapping")]
        same = not said or (found["r"], found["lora_alpha"], sorted(found["target_modules"])) == (rank, rank, sorted(targets))
        plain = not (found["rank_pattern"] or found["alpha_pattern"] or any(usual))
    except (ValueError, TypeError, AttributeError, RecursionError):
        same = plain = False
    if not (same and plain):
        raise UserError(f"{path}: its header asks for another LoRA than adapter.json describes; take the adapter from where it was made")


def read_described(folder: Path) -> dict:
    """adapter.json of `folder`. UserError where it is missing or describes no adapter, or one that is merged into a copy of its base."""
    path = folder / "adapter.json"
    described = read_json(path)
    if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(described)):
        where = ".".join(map(str, error.absolute_path)) or "it"
        raise UserError(f"{path} does not describe an adapter: {where}: {error.message[:200]}; take the one that was made with the weights")
    if described.get("merged"):  # into a pipeline with code, which diffusers alone loads; on the base it would be used as if it were there
        raise UserError(
            f"{folder} is an adapter that is merged into its own copy of the base {described['base']}: load the whole folder by "
            "plain diffusers, as its README.md says; or take the adapter that it was made of, or its export without --merge"
        )
    return described


def check_adapter(base: Base, folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """adapter.json, LoRA and label embedding of `folder`, for a `base` without one.

    Raises UserError where they are missing, corrupt, merged, links out of the folder, of other layers or shapes than the base's, or made
    for another base, or where a label changes no image.
    """
    folder = Path(folder)
    check_links(folder)
    path, described = folder / "adapter.json", read_described(folder)
    key, dtype = "base_fingerprint", torch.float16
    if "bfloat16" in (described.get("dtype"), str(base.dtype).removeprefix("torch.")) and "base_fingerprint_bfloat16" in described:
        key, dtype = "base_fingerprint_bfloat16", torch.bfloat16  # of the same weights in float16 it may differ
    if (found := base.fingerprint(dtype)) != described[key]:
        raise UserError(
            f"{folder}: the adapter was made for the base {described['base']} (fingerprint {described[key]}), "
            f"not for this one ({found}); load it on that base, or train a new one"
        )
    if base.source.t5 != (made_with := described.get("base_files", {}).get("t5", True)):
        how = "with T5: load that with t5=True" if made_with else "without T5: load that with t5=False"
        raise UserError(f"{folder}: the adapter was made for its base {how} (base.t5 in a configuration)")
    space, rank, targets = space_of_adapter(described), described["rank"], described["target_modules"]
    lora, embedding = load_tensors(folder / LORA_FILE), load_tensors(folder / EMBEDDING_FILE)
    check_tensors(folder / LORA_FILE, lora, lora_shapes(base, rank, targets), str(path))
    check_lora_metadata(folder / LORA_FILE, base.part, rank, targets)
    check_tensors(folder / EMBEDDING_FILE, embedding, embedding_shapes(space, base.time_width), str(path))
    check_distinct(space, embedding, str(folder))
    return described, lora, embedding
