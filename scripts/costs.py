"""What an update of each trainer costs with a user's own base, classifier and data, each measured in a process of its own."""

import argparse

from ctrl import classifier as classifiers
from ctrl import doctor, errors, measure, suggestion
from ctrl.config import merge
from ctrl.doctor import Finding
from ctrl.finetune.task import Task
from ctrl.io import read_json
from ctrl.labels import space_of
from scripts.cells import load_training_cells
from scripts.loading import load_base, new_control, reward_of_latents


def trainer_cost(config: dict, args: argparse.Namespace) -> dict:
    """What an update costs; called in a process of its own."""
    base, process = load_base(config, args.num_threads)
    cells = load_training_cells(args.cells, config["finetune"]["ask_held_out"])
    space = space_of(read_json(args.dataset / "report.json"))
    classifier = classifiers.load(args.classifier).to(base.device)
    log_prob = reward_of_latents(base, config["finetune"]["trainer"], classifier, args.dataset, space)
    control, templates = new_control(base, process, space, config), config["prompts"]["templates"]["train"]
    task = Task(control, process, cells, templates, config["sampler"]["guidance_scale"], config["seed"])
    return measure.update_cost(task, log_prob, config["finetune"])


def trainer_costs(config: dict, args: argparse.Namespace, examples: bool, free_mb: float | None) -> tuple[dict, list[Finding]]:
    """The cost of every trainer, or why there is none; of back-propagation also with more checkpointing, where it does not fit."""
    costs, findings = {}, []
    recipes = doctor.recipes(config, examples)

    def add(name: str, recipe: dict) -> bool:
        """Whether it fits."""
        try:
            costs[name] = measure.alone(trainer_cost, recipe, args)
            line = suggestion.memory_text(name, costs[name], free_mb)
        except (errors.UserError, ArithmeticError, RuntimeError) as error:  # a GPU's lack of memory is a RuntimeError
            costs[name], first = {"error": str(error)}, (str(error).splitlines() or [type(error).__name__])[0]
            line = f"trainer {name}: {first}; lower finetune.micro_batch_size ({recipe['finetune']['micro_batch_size']})"
        findings.extend([Finding(False, line)] if line else [])
        return not line

    for name, recipe in recipes.items():
        fits = add(name, recipe)
        if name == "backprop" and not fits:
            for how, settings in suggestion.recomputed(recipe["finetune"]).items():
                if add(how, merge(recipe, {"finetune": settings})):
                    break
    return costs, findings
