"""Keys of a configuration that are fine alone and contradict each other."""

import json

from ctrl.errors import UserError, redact
from ctrl.names import COLUMN, factor_of

MIXTURE = {"base": ("weights", "means", "covariances"), "label": ("weight", "bias"), None: ("gammas", "num_samples", "num_sets", "methods")}
AMOUNTS_TO = {  # what ctrl.proof does
    "sampler": {"eta": 1.0, "guidance_scale": 1.0, "spacing": "scheduler"},
    "finetune": {
        "kl_reduction": "sum",
        "kl_weight": 1.0,
        "num_terms": None,
        "truncation": None,
        "max_adjoint_norm": None,
        "unguided_jacobian": False,
    },
}


def check_across(config: dict, where: str = "config") -> None:
    """Raises UserError where two keys that are fine alone contradict each other."""
    check_mixture(config, where)
    check_factors(config["label"], where)
    check_columns(config, where)
    check_continuous(config["label"], config["classifier"]["head"], where)
    check_prompts(config["prompts"], where)
    check_trainer(config["finetune"], where)
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
    asked = config["cluster"]["finetune"]
    if (processes := asked["nodes"] * max(asked["gpus"], 1)) > finetune["batch_size"]:
        raise UserError(
            f"{where}: cluster.finetune is {processes} processes (nodes x gpus), "
            f"finetune.batch_size {finetune['batch_size']}; each takes a share"
        )
    if finetune["gradient_checkpointing"] == "blocks" and finetune["speed"]["compile"]:
        raise UserError(f"{where}: finetune.gradient_checkpointing is blocks, which excludes finetune.speed.compile; set that to false")
    softening = finetune["temperature"]
    if softening["hold"] > softening["end"]:
        raise UserError(f"{where}: finetune.temperature.hold is {softening['hold']}; it must not be above its end, {softening['end']}")


def check_trainer(finetune: dict, where: str) -> None:
    """What a trainer does not take."""
    if finetune["trainer"] == "adjoint" and (finetune["truncation"] or not finetune["kl_weight"]):
        raise UserError(f"{where}: finetune.trainer is adjoint; it takes no truncation (null) and a kl_weight above 0")
    if finetune["trainer"] == "adjoint" and finetune["unguided_jacobian"] and finetune["control_variate"]:
        raise UserError(f"{where}: finetune.unguided_jacobian excludes finetune.control_variate, which walks back through psi; take one")
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


def check_prompts(prompts: dict, where: str) -> None:
    """A subject is trained on or held out."""
    if both := [subject for subject in prompts["held_out"] if subject in prompts["subjects"]]:
        raise UserError(f"{where}: prompts.held_out has {both[0]}, which is among prompts.subjects, too; take it out of one of them")


def check_sizes(config: dict, where: str = "config") -> None:
    """Raises UserError where the section finetune is at odds with itself or the sampler.

    Recipes of adapters are there for every config: their truncation ends with the steps there are, their last micro-batch may be smaller.
    """
    finetune, num_steps = config["finetune"], config["sampler"]["num_steps"]
    check_unguided(config, where)
    if finetune["truncation"] and finetune["truncation"][1] > num_steps:
        raise UserError(f"{where}: finetune.truncation is {finetune['truncation']}; sampler.num_steps has only {num_steps} steps")
    if finetune["batch_size"] % (part := finetune["micro_batch_size"]):
        raise UserError(f"{where}: finetune.micro_batch_size is {part}; it must divide finetune.batch_size, {finetune['batch_size']}")


def check_unguided(config: dict, where: str) -> None:
    """Where it would change nothing, nobody asks for it: a recipe that inherits it for another trainer does not."""
    finetune = config["finetune"]
    if finetune["unguided_jacobian"] and (finetune["trainer"] != "adjoint" or config["sampler"]["guidance_scale"] == 1):
        raise UserError(f"{where}: finetune.unguided_jacobian is for finetune.trainer adjoint, under a sampler.guidance_scale other than 1")


def check_factors(label: dict, where: str) -> None:
    """Factors measure different things, and what is held out are some of their combinations."""
    factors = label["factors"] or []
    names = [factor_of(factor["oracle"]) for factor in factors]
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


def check_columns(config: dict, where: str) -> None:
    """A column is of the table of the user's own images; a label a value is of a column, and told apart by a softmax."""
    label, dataset, head = config["label"], config["dataset"], config["classifier"]["head"]
    for factor in label["factors"] or [label]:
        oracle, nominal = factor["oracle"], factor["edges"] == "values"
        if oracle.startswith(COLUMN) and dataset["kind"] != "folder":
            raise UserError(
                f"{where}: label.oracle is {oracle}, dataset.kind {dataset['kind']}; only a folder has a table with such a column"
            )
        if nominal and not oracle.startswith(COLUMN):
            raise UserError(f"{where}: label.edges is values; {oracle} measures a number: take quantiles, or edges")
        if nominal and head != "softmax":
            raise UserError(f"{where}: label.edges is values, classifier.head {head}; labels without an order take softmax")


def check_continuous(label: dict, head: str, where: str) -> None:
    """A continuous label is one number, and its classifier a density."""
    continuous = label["kind"] == "continuous"
    if continuous and label["factors"]:
        raise UserError(f"{where}: label.kind is continuous; it takes no label.factors (null)")
    if continuous != (head == "gaussian"):
        raise UserError(f"{where}: label.kind is {label['kind']}, classifier.head {head}; a continuous label's is gaussian, and only its")


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


def check_proof(config: dict, where: str) -> None:
    """With a Gaussian mixture some keys do nothing: they are what they amount to."""
    for section, values in AMOUNTS_TO.items() if config["base"]["kind"] == "gaussian_mixture" else ():
        for name, value in values.items():
            if config[section][name] != value:
                given, only = json.dumps(config[section][name]), json.dumps(value)
                raise UserError(f"{where}: {section}.{name} is {given}; with base.kind gaussian_mixture it can only be {only}")
