"""Configurations as plain dictionaries: laid over each other, and checked against a JSON schema. No file is read here."""

import copy
import csv
import difflib
import json
import math
import operator
import re
from pathlib import Path

import jsonschema

from ctrl.errors import UserError, redact
from ctrl.names import VARIANT


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
        if one["edges"] != "quantiles" and label["kind"] != "continuous":
            one["num_classes"] = len(one["edges"]) + 1
    if label["factors"]:
        label["num_classes"] = math.prod(factor["num_classes"] for factor in label["factors"])
    check_across(config, where)
    check_sizes(config, where)
    if unknown := set(config["trainers"]["recipes"]) - {"ctrl", *config["adapters"]}:
        known = ", ".join(["ctrl", *config["adapters"]])
        raise UserError(f"{where}: trainers.recipes has {min(unknown)}; the recipes are {known}")
    for name in config["adapters"]:
        variant = for_adapter(config, name)
        check(variant, schema, f"{where}, with adapters.{name} laid over finetune")
        check_across(variant, f"{where}, with adapters.{name} laid over finetune")
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


def check(config: dict, schema: dict, where: str = "config") -> None:
    """Raises UserError for the first mistake: the dotted key, its value, the nearest known name of an unknown key, what is allowed.

    Beyond JSON schema: `ascending: true` (each number above the one before), `nondescending: true` (not below it), `sum` (what the
    values of a mapping add up to).
    """
    errors = sorted(_Validator(schema).iter_errors(config), key=lambda error: (error.validator != "additionalProperties", len(error.path)))
    if errors:
        raise UserError(f"{where}: {_describe(errors[0], schema)}")


def check_across(config: dict, where: str = "config") -> None:
    """Raises UserError where two keys that are fine alone contradict each other."""
    check_mixture(config, where)
    check_factors(config["label"], where)
    check_continuous(config["label"], config["classifier"]["head"], where)
    check_prompts(config["prompts"], where)
    if (weights := config["finetune"]["factor_weights"]) and len(weights) != len(config["label"]["factors"] or []):
        raise UserError(f"{where}: finetune.factor_weights is {weights}; it takes a number for each of label.factors")
    dataset, finetune, uri = config["dataset"], config["finetune"], config["mlflow"]["tracking_uri"]
    if uri and redact(uri) != uri:
        raise UserError(
            f"{where}: mlflow.tracking_uri holds a password, which would be kept with the results; give it by MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    if dataset["kind"] == "folder" and not dataset["path"]:
        raise UserError(f"{where}: dataset.path is null; dataset.kind is folder, so it must name a folder of images")
    if config["sampler"]["spacing"] == "quadratic" and config["sampler"]["eta"] != 1:
        raise UserError(f"{where}: sampler.eta is {config['sampler']['eta']}; with sampler.spacing quadratic it must be 1")
    if finetune["trainer"] == "adjoint" and (finetune["truncation"] or not finetune["kl_weight"]):
        raise UserError(f"{where}: finetune.trainer is adjoint; it takes no truncation (null) and a kl_weight above 0")
    unfit = [finetune[key] for key in ("truncation", "num_terms", "control_variate")]
    if finetune["trainer"] == "efficient_adjoint" and (any(unfit) or not (finetune["kl_weight"] and finetune["min_timestep"])):
        raise UserError(
            f"{where}: finetune.trainer is efficient_adjoint; it takes no truncation (null), no num_terms (null) and no control_variate "
            "(false), and a kl_weight and a min_timestep above 0"
        )
    reuse, every = finetune["policy_gradient"]["reuse"], finetune["checkpoint_every"]
    if finetune["trainer"] == "policy_gradient" and (finetune["truncation"] or every % reuse):
        raise UserError(
            f"{where}: finetune.trainer is policy_gradient; it takes no truncation (null), and a checkpoint_every that is a multiple of "
            f"policy_gradient.reuse: not {every} with {reuse}"
        )
    if (gpus := config["cluster"]["finetune"]["gpus"]) > finetune["batch_size"]:
        raise UserError(f"{where}: cluster.finetune.gpus is {gpus}, finetune.batch_size {finetune['batch_size']}; each GPU takes a share")
    if finetune["gradient_checkpointing"] == "blocks" and finetune["speed"]["compile"]:
        raise UserError(f"{where}: finetune.gradient_checkpointing is blocks, which excludes finetune.speed.compile; set that to false")
    softening = finetune["temperature"]
    if softening["hold"] > softening["end"]:
        raise UserError(f"{where}: finetune.temperature.hold is {softening['hold']}; it must not be above its end, {softening['end']}")


def check_prompts(prompts: dict, where: str) -> None:
    """A subject is trained on or held out."""
    if both := [subject for subject in prompts["held_out"] if subject in prompts["subjects"]]:
        raise UserError(f"{where}: prompts.held_out has {both[0]}, which is among prompts.subjects, too; take it out of one of them")


def check_sizes(config: dict, where: str = "config") -> None:
    """Raises UserError where the section finetune is at odds with itself or the sampler in size.

    Recipes of adapters are there for every config: their truncation ends with the steps there are, their last micro-batch may be smaller.
    """
    finetune, num_steps = config["finetune"], config["sampler"]["num_steps"]
    if finetune["truncation"] and finetune["truncation"][1] > num_steps:
        raise UserError(f"{where}: finetune.truncation is {finetune['truncation']}; sampler.num_steps has only {num_steps} steps")
    if finetune["batch_size"] % (part := finetune["micro_batch_size"]):
        raise UserError(f"{where}: finetune.micro_batch_size is {part}; it must divide finetune.batch_size, {finetune['batch_size']}")


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


def check_factors(label: dict, where: str) -> None:
    """Factors measure different things, and what is held out are some of their combinations."""
    factors = label["factors"] or []
    names = [Path(factor["oracle"]).stem for factor in factors]  # of a Python file, what its factor is called
    if len(set(names)) < len(names):
        raise UserError(f"{where}: label.factors names an oracle twice ({', '.join(names)}); two factors of one oracle say the same")
    for y in label["held_out"]:
        if not factors:
            raise UserError(f"{where}: label.held_out is {label['held_out']}; without label.factors there are no combinations to hold out")
        if len(y) != len(factors) or any(part >= factor["num_classes"] for part, factor in zip(y, factors, strict=True)):
            sizes = " x ".join(str(factor["num_classes"]) for factor in factors)
            raise UserError(f"{where}: label.held_out has {y}; a combination holds a label of each factor, and there are {sizes} labels")
    for k, factor in enumerate(factors):
        for y in range(factor["num_classes"]):
            combinations = label["num_classes"] // factor["num_classes"]
            if sum(held[k] == y for held in label["held_out"]) >= combinations:
                raise UserError(f"{where}: label.held_out has all {combinations} combinations of {names[k]} {y}: nothing could teach it")


def check_continuous(label: dict, head: str, where: str) -> None:
    """A continuous label is one number, and its classifier a density."""
    continuous = label["kind"] == "continuous"
    if continuous and label["factors"]:
        raise UserError(f"{where}: label.kind is continuous; it takes no label.factors (null)")
    if continuous != (head == "gaussian"):
        raise UserError(f"{where}: label.kind is {label['kind']}, classifier.head {head}; a continuous label's is gaussian, and only its")


MIXTURE = {"base": ("weights", "means", "covariances"), "label": ("weight", "bias"), None: ("gammas", "num_samples", "num_sets", "methods")}
MIXTURE_DEFAULTS = {
    "num_sets": 8,
    "methods": [
        *("exact", "exact_reference", "pretrained", "ctrl", "ctrl_adjoint", "reconstruction_guidance", "dps", "mpgd", "smc", "svdd"),
        *("cfg", "mean_kl", "reward_maximization"),
    ],
}


def check_mixture(config: dict, where: str) -> None:
    """A Gaussian mixture and its label need all of their keys; every other base takes none of them."""
    mixture = config["base"]["kind"] == "gaussian_mixture"
    if mixture != (config["label"]["kind"] == "softmax_linear"):
        raise UserError(
            f"{where}: base.kind is {config['base']['kind']}, label.kind {config['label']['kind']}; a mixture's is softmax_linear"
        )
    for section, names in MIXTURE.items():
        for name in names:
            key = f"{section}.{name}" if section else name
            if (name in (config[section] if section else config)) != mixture:
                raise UserError(
                    f"{where}: {key} {'is missing' if mixture else 'belongs to base.kind gaussian_mixture alone: leave it out'}"
                )


def nearest(key: str, siblings: list[str], dotted: list[str], parent: str = "") -> str:
    """The known name that is spelled most like `key`: beside it under `parent` if one is close, otherwise anywhere, as a dotted key."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(dotted)}
    close = difflib.get_close_matches(key, siblings, 1)
    if key in leaves:
        return leaves[key]
    if not close and (elsewhere := difflib.get_close_matches(key, leaves, 1)):
        return leaves[elsewhere[0]]
    close = close or difflib.get_close_matches(key, siblings, 1, cutoff=0.0)
    return ".".join([parent, close[0]]) if parent else close[0]


def _describe(error: jsonschema.ValidationError, schema: dict) -> str:
    """One line for one error of jsonschema."""
    key = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        siblings = list(error.schema.get("properties", {}))
        unknown = next(str(name) for name in error.instance if name not in siblings)
        close = nearest(unknown, siblings, _dotted(schema), key)
        return f"unknown key {'.'.join(filter(None, [key, unknown]))}; did you mean {close}? Allowed here: {', '.join(siblings)}"
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"{'.'.join(filter(None, [key, missing]))} is missing"
    if error.validator in ("anyOf", "oneOf"):
        branches = error.validator_value
        deeper = [e for e in error.context if e.validator not in ("type", "const") or len(e.path) > 0]
        if deeper:
            return _describe(deeper[0], schema)
        return f"{key} is {_show(error.instance)}; it must be {' or '.join(_allowed(branch) for branch in branches)}"
    return f"{key} is {_show(error.instance)}; it must be {_allowed(error.schema)}{_hint(error)}"


def _allowed(schema: dict) -> str:
    """In words, what a schema allows; its own `description` where it has one."""
    if "description" in schema:
        return schema["description"]
    if "const" in schema:
        return _show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(_show, schema["enum"]))
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    names = {"object": "a mapping", "array": "a list", "string": "a text", "integer": "a whole number", "number": "a finite number"}
    words = [names.get(name, {"boolean": "true or false"}.get(name, name)) for name in types]
    limits = [
        text.format(schema[name])
        for name, text in {
            "exclusiveMinimum": "above {}",
            "minimum": "at least {}",
            "exclusiveMaximum": "below {}",
            "maximum": "at most {}",
            "pattern": "matching {}",
            "minLength": "of {} or more characters",
            "minItems": "of {} or more entries",
            "maxItems": "of {} or fewer entries",
            "sum": "whose values add up to {}",
        }.items()
        if name in schema
    ]
    limits += ["in ascending order"] if schema.get("ascending") or schema.get("nondescending") else []
    limits += ["without repetitions"] if schema.get("uniqueItems") else []
    limits += [f"each {_allowed(schema['items'])}"] if "items" in schema else []
    limits += ["with the keys " + ", ".join(schema["properties"])] if "properties" in schema else []
    return " ".join([" or ".join(words), ", ".join(limits)]).strip()


def _hint(error: jsonschema.ValidationError) -> str:
    """YAML reads 1e-3 as a text: say how to write it."""
    if error.validator == "type" and "number" in str(error.schema["type"]) and "e" in str(error.instance):
        try:
            value = float(error.instance)
        except ValueError:
            return ""
        if math.isfinite(value):
            better = error.instance if "." in error.instance else error.instance.replace("e", ".0e", 1)
            return f": YAML takes {error.instance} for a text, write {better}"
    return ""


def _show(value: object) -> str:
    """The value as a user wrote it; a text that looks like a number or like nothing in quotes."""
    plain = isinstance(value, str) and not re.fullmatch(r"|[-+.\de]+|true|false|null", value)
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(schema: dict, parent: str = "") -> list[str]:
    """Every key of a schema, dotted, outer ones first."""
    names = []
    for name, inner in schema.get("properties", {}).items():
        key = f"{parent}.{name}" if parent else name
        names += [key, *_dotted(inner, key)]
    return sorted(names, key=lambda key: key.count("."))


def _check_order(in_order):
    def check_order(validator, wanted, values, schema):
        numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        if wanted and numbers and not all(map(in_order, values, values[1:])):
            yield jsonschema.ValidationError(f"{values} is out of order")

    return check_order


def _check_sum(validator, total, values, schema):
    numbers = isinstance(values, dict) and all(isinstance(v, int | float) for v in values.values())
    if numbers and not math.isclose(sum(values.values()), total, abs_tol=1e-9):
        yield jsonschema.ValidationError(f"{values} does not add up to {total}")


def _is_number(checker, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"ascending": _check_order(operator.lt), "nondescending": _check_order(operator.le), "sum": _check_sum},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("number", _is_number),
)
