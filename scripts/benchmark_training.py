"""What an update costs each trainer, and the published recipe: seconds, UNet passes, peak memory, each measured in a process of its own.

Updates differ in their number of trajectories, and in how much they teach: `speedup_vs_published` compares the seconds of an update alone.
"""

import argparse
import json
import tempfile
from pathlib import Path

from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.config import for_adapter, merge
from ctrl.finetune import loop
from ctrl.finetune.recipe import Task, gradient_function, optimizer_of
from ctrl.io import read_json, write_text
from ctrl.labels import Factors
from ctrl.measure import Killed, alone
from scripts.common import ROOT, add_config_argument, load_config
from scripts.loading import load_base, load_cells, log_prob_of_latents, new_control

PUBLISHED = "published"  # the preset that the others are compared with
COLUMNS = {  # of the printed table: what a row's key is called there, and how it is written
    "name": ("recipe", "{}"), "trainer": ("trainer", "{}"), "num_steps": ("steps", "{}"), "batch_size": ("trajectories an update", "{}"),
    "seconds_per_update": ("s / update", "{:.2f}"), "seconds_per_trajectory": ("s / trajectory", "{:.4f}"),
    "unet_forward": ("forward / update", "{:.0f}"), "unet_backward": ("backward / update", "{:.0f}"),
    "peak_memory_mb": ("peak memory / MB", "{:.0f}"), "memory_before_mb": ("of it before training", "{:.0f}"),
    "speedup_vs_published": ("speedup vs published", "{:.2f}"), "memory_vs_published": ("memory ÷ published", "{:.2f}"),
}  # fmt: skip


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
    parser.add_argument("--updates", type=int, default=4, help="timed updates, spread over the whole training (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, nargs="+", metavar="N", help="sampling steps to measure at (default: the config's)")
    parser.add_argument("--micro-batch-size", type=int, help="trajectories at a time (default: the config's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - prints them instead of the table")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def recipes(args: argparse.Namespace) -> dict[str, dict]:
    """The configuration of each recipe, the published one last."""
    config = load_config(args)
    for name in args.adapters:
        if name != "ctrl" and name not in config["adapters"]:
            raise errors.UserError(f"--adapters: no recipe {name!r}; the config has {', '.join(['ctrl', *config['adapters']])}")
        if for_adapter(config, name)["finetune"]["trainer"] == "supervised":
            raise errors.UserError(f"--adapters: {name} learns from labelled images, not from trajectories: there is nothing to compare")
    published = load_config(argparse.Namespace(config=[*args.config, ROOT / "config" / "published.yaml"]))
    return {name: for_adapter(config, name) for name in args.adapters} | {PUBLISHED: published}


def measure(config: dict, args: argparse.Namespace) -> dict:
    """The cost of an update, on average over `args.updates` of them, after a small one that is not timed."""
    settings = config["finetune"]
    base, process = load_base(config, args.num_threads)
    classifier = classifiers.load(args.classifier).to(base.device)
    space, cells = Factors.from_report(read_json(args.dataset / "report.json")), load_cells(args.cells)
    space.check([y for _, y in cells])
    control = new_control(base, process, space, config)
    templates, guidance_scale = config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"]
    task = Task(control, process, cells, templates, guidance_scale, config["seed"])
    log_prob, small = log_prob_of_latents(base, classifier), settings | {"batch_size": settings["micro_batch_size"]}
    warm_up, gradient = gradient_function(task, log_prob, small), gradient_function(task, log_prob, settings)
    # In the middle of equal parts of the training, so that its short and its long steps count with their shares.
    numbers = [0, *(int((k + 0.5) / args.updates * settings["num_updates"]) for k in range(args.updates))]
    before = base.peak_memory_mb()
    with tempfile.TemporaryDirectory() as folder:
        history = loop.run(
            control.parameters(), optimizer_of(control, settings), lambda k: (gradient if k else warm_up)(numbers[k]), lambda k: {},
            len(numbers), Path(folder), settings["max_grad_norm"], len(numbers), len(numbers), "benchmark",
        )[1:]  # fmt: skip
    mean = {key: sum(row[key] for row in history) / len(history) for key in ("seconds", "unet_forward", "unet_backward")}
    return {
        "trainer": settings["trainer"],
        "num_steps": process.num_steps,
        "batch_size": settings["batch_size"],
        "micro_batch_size": settings["micro_batch_size"],
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


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each row with its ratios to the published recipe at the same number of steps."""
    published = {row["num_steps"]: row for row in rows if row["name"] == PUBLISHED}
    return [
        row
        | {
            "speedup_vs_published": published[row["num_steps"]]["seconds_per_update"] / row["seconds_per_update"],
            "memory_vs_published": row["peak_memory_mb"] / published[row["num_steps"]]["peak_memory_mb"],
        }
        for row in rows
    ]


def main() -> None:
    args = parse()
    if min([args.updates, *(args.num_steps or [])]) < 1:
        raise errors.UserError("--updates and --num-steps must be 1 or more")
    rows = []
    for num_steps in args.num_steps or [None]:
        for name, config in recipes(args).items():
            changes = {"sampler": {"num_steps": num_steps}} if num_steps else {}
            changes |= {"finetune": {"micro_batch_size": args.micro_batch_size}} if args.micro_batch_size else {}
            rows.append(measure_alone(name, merge(config, changes), args))
    result = {"device": rows[0]["device"], "updates": args.updates, "recipes": with_ratios(rows)}
    if args.json != "-":
        print(f"{result['device']}, {args.updates} updates each\n\n| " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
        print("| --- | --- |" + " ---: |" * (len(COLUMNS) - 2))
        for row in result["recipes"]:
            print("| " + " | ".join(form.format(row[key]) for key, (_, form) in COLUMNS.items()) + " |")
    text = json.dumps(result, indent=2) + "\n"
    if args.json == "-":
        print(text, end="")
    elif args.json:
        write_text(Path(args.json), text)


if __name__ == "__main__":
    errors.main(main)
