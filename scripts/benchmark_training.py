"""What an update costs each trainer, and the published recipe: seconds, UNet passes, peak memory, each measured in a process of its own.

Updates differ in their number of trajectories, and in how much they teach: `speedup_vs_published` compares the seconds of an update alone.
What decides memory beside the trainer, the trajectories at a time and gradient checkpointing, is the same for all: the published recipe's.
It takes a finished experiment and computes every recipe by this package; benchmarks/training_step.py has the published code's own step.
"""

import argparse
import json
from pathlib import Path

from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.config import for_adapter, merge
from ctrl.costs import PUBLISHED, to_markdown, with_ratios
from ctrl.figures import trainers as figures
from ctrl.finetune.gradients import gradient_function
from ctrl.finetune.task import Task
from ctrl.io import read_json, write_text
from ctrl.labels import space_of
from ctrl.measure import Killed, alone, timed_rows, timed_updates
from scripts.cells import load_training_cells
from scripts.common import add_config_argument, load_config
from scripts.loading import load_base, new_control, reward_of_latents
from scripts.training import check_labels


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--cells", type=Path, required=True, help="cells.json: the (subject, label) pairs to train on")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json, for the labels")
    parser.add_argument(
        "--adapters", nargs="+", default=["ctrl", "ctrl_adjoint"], metavar="NAME",
        help="recipes to measure beside the published one: ctrl, or a name under the config's `adapters` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--updates", type=int, default=4,
        help="timed draws of trajectories, each with all updates that learn from it, spread over the training (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--num-steps", type=int, nargs="+", metavar="N", help="sampling steps to measure at (default: the config's)")
    parser.add_argument("--micro-batch-size", type=int, help="trajectories at a time, of every recipe (default: the published one's)")
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="of every recipe (default: as the published one has it)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG to draw: memory by training against the number of steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - prints them instead of the table")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def recipes(args: argparse.Namespace) -> dict[str, dict]:
    """The configuration of each recipe, the published one last; all with the same trajectories at a time and gradient checkpointing."""
    config = load_config(args)
    for name in args.adapters:
        if name != "ctrl" and name not in config["adapters"]:
            raise errors.UserError(f"--adapters: no recipe {name!r}; the config has {', '.join(['ctrl', *config['adapters']])}")
        if for_adapter(config, name)["finetune"]["trainer"] == "supervised":
            raise errors.UserError(f"--adapters: {name} learns from labelled images, not from trajectories: there is nothing to compare")
    found = {name: for_adapter(config, name) for name in dict.fromkeys([*args.adapters, PUBLISHED])}
    shared = {key: found[PUBLISHED]["finetune"][key] for key in ("micro_batch_size", "gradient_checkpointing")}
    shared |= {key: getattr(args, key) for key in shared if getattr(args, key) is not None}
    smallest = min(one["finetune"]["batch_size"] for one in found.values())
    shared["micro_batch_size"] = min(shared["micro_batch_size"], smallest)  # more at a time than there are would be fewer for one
    return {name: merge(one, {"finetune": shared}) for name, one in found.items()}


def measure(config: dict, args: argparse.Namespace) -> dict:
    """The cost of an update, on average over `timed_updates`, after a small one that is not timed."""
    settings = config["finetune"]
    base, process = load_base(config, args.num_threads)
    classifier = classifiers.load(args.classifier).to(base.device)
    space, cells = space_of(read_json(args.dataset / "report.json")), load_training_cells(args.cells, settings["ask_held_out"])
    check_labels(args, space, cells)
    control = new_control(base, process, space, config)
    templates, guidance_scale = config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"]
    task = Task(control, process, cells, templates, guidance_scale, config["seed"])
    log_prob = reward_of_latents(base, settings["trainer"], classifier, args.dataset, space)
    small = settings | {"batch_size": settings["micro_batch_size"]}
    warm_up, gradient = gradient_function(task, log_prob, small), gradient_function(task, log_prob, settings)
    numbers = [0, *timed_updates(settings, args.updates)]
    before = base.peak_memory_mb()
    history = timed_rows(control, settings, lambda k: (gradient if k else warm_up)(numbers[k]), len(numbers) - 1)
    mean = {key: sum(row[key] for row in history) / len(history) for key in ("seconds", "unet_forward", "unet_backward")}
    return {
        "trainer": settings["trainer"],
        "num_steps": process.num_steps,
        "batch_size": settings["batch_size"],
        "micro_batch_size": settings["micro_batch_size"],
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "seconds_per_update": mean["seconds"],
        "seconds_per_trajectory": mean["seconds"] / settings["batch_size"],
        "unet_forward": mean["unet_forward"],
        "unet_backward": mean["unet_backward"],
        "peak_memory_mb": base.peak_memory_mb(),
        "memory_before_mb": before,
        "device": base.device_name,
    }


def measure_alone(name: str, config: dict, args: argparse.Namespace) -> dict:
    """`measure` in a new process, whose peak memory is that of nothing else."""
    try:
        return {"name": name} | alone(measure, config, args)
    except Killed as error:
        raise errors.UserError(f"{name} at {config['sampler']['num_steps']} steps: {error}; lower --micro-batch-size") from error


def main() -> None:
    args = parse()
    if min(args.updates, *(args.num_steps or [1]), 1 if args.micro_batch_size is None else args.micro_batch_size) < 1:
        raise errors.UserError("--updates, --num-steps and --micro-batch-size must be 1 or more")
    found, rows = recipes(args), []
    for num_steps in args.num_steps or [None]:
        for name, config in found.items():
            rows.append(measure_alone(name, merge(config, {"sampler": {"num_steps": num_steps}} if num_steps else {}), args))
    shared = {key: found[PUBLISHED]["finetune"][key] for key in ("micro_batch_size", "gradient_checkpointing")}
    result = {"device": rows[0]["device"], "updates": args.updates, **shared, "recipes": with_ratios(rows)}
    if args.json != "-":
        how = f"{shared['micro_batch_size']} trajectories at a time, gradient checkpointing {shared['gradient_checkpointing']}"
        print(f"{result['device']}, {args.updates} draws of trajectories each; every recipe with {how}\n\n{to_markdown(result['recipes'])}")
    if args.figure:
        figures.memory_by_steps(result["recipes"], args.figure)
    text = json.dumps(result, indent=2) + "\n"
    if args.json == "-":
        print(text, end="")
    elif args.json:
        write_text(Path(args.json), text)


if __name__ == "__main__":
    errors.main(main, lower="--micro-batch-size")
