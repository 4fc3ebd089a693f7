"""Train a control: CTRL on a pretrained model and a calibrated classifier, to an adapter that plain diffusers loads.

On several GPUs: `accelerate launch --multi_gpu --num_processes N scripts/finetune.py ...`; each process takes its share of every batch.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import distributed

from ctrl import control as controls
from ctrl import errors, judged
from ctrl.adapter import check_in_plain_diffusers, write_adapter
from ctrl.base import Base
from ctrl.config import for_adapter, needs_classifier
from ctrl.embedding import check_distinct
from ctrl.finetune import loop
from ctrl.finetune.objective import effective_gamma
from ctrl.finetune.probe import probe_function
from ctrl.finetune.recipe import train
from ctrl.finetune.task import Task
from ctrl.io import alone, read_json
from ctrl.labels import Continuous, factors_of, space_of
from ctrl.tracking import run
from scripts.cells import load_training_cells
from scripts.common import add_config_argument, contents, digest, load_config
from scripts.loading import load_base, new_control
from scripts.training import check_labels, join_processes, learned_from, score_function


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--name",
        default="ctrl",
        help="name of the adapter: a recipe (what the config's `adapters` says of it holds) and what it varies, such as ctrl_gamma3_seed1 "
        "(default: %(default)s)",
    )
    parser.add_argument("--classifier", type=Path, help="folder of the classifier, for the trainers backprop and adjoint")
    parser.add_argument("--cells", type=Path, required=True, help="cells.json: the (subject, label) pairs to train on")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json, for the labels and the probe's oracle")
    parser.add_argument(
        "--reference", type=Path, help="folder of rejection samples on validation prompts: the probe then also gives kid_rejection"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter; a checkpoint in it is resumed")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def figures_of(name: str, settings: dict, amounts_to: float, history: list[dict], base: Base) -> dict:
    """What adapter.json says of the training."""
    return {
        "name": name,
        "gamma": settings["gamma"],
        "effective_gamma": amounts_to,
        "finetune": settings,
        "train_seconds": round(sum(row["seconds"] for row in history), 1),
        "peak_memory_mb": round(base.peak_memory_mb(), 1),
        "device": base.device_name,
        "unet_passes": {way: sum(row[f"unet_{way}"] for row in history) for way in ("forward", "backward")},
        "last": history[-1],
    }


def main() -> None:
    args, started = parse(), time.monotonic()
    config = for_adapter(load_config(args), args.name)
    settings, sampler, templates = config["finetune"], config["sampler"], config["prompts"]["templates"]
    if not settings["gamma"] > 0:
        raise errors.UserError(f"--name is {args.name}: gamma must be above 0; 1 is the exact conditional law")
    if needs_classifier(config) and not args.classifier:
        raise errors.UserError(f"finetune.trainer is {settings['trainer']}: it also needs --classifier")
    main_process = join_processes()
    base, process = load_base(config, args.num_threads)
    cells = load_training_cells(args.cells, settings["ask_held_out"])
    report = read_json(args.dataset / "report.json")
    space = space_of(report)
    asked = [(subject, limits[1]) for subject, limits in cells] if isinstance(space, Continuous) else cells
    check_labels(args, space, cells)
    control = new_control(base, process, space, config)
    amounts_to = effective_gamma(settings["gamma"], settings["kl_weight"], settings["kl_reduction"], torch.Size(base.latent_shape).numel())
    if main_process:
        print(
            f"gamma {settings['gamma']:g}, KL reduction {settings['kl_reduction']}: this amounts to p(x | c) p(y | x)^{amounts_to:g}",
            flush=True,
        )

    log_prob, examples, files = learned_from(base, space, settings, args)
    shown: list[Image.Image] = []
    score = score_function(args, config, space, shown)
    task = Task(control, process, cells, templates["train"], sampler["guidance_scale"], config["seed"])
    probe = probe_function(replace(task, templates=templates["val"]), score, settings["probe"]["num_images"], settings["micro_batch_size"])
    prompts = templates["train"], templates["val"]
    identity = digest(settings, sampler, config["base"], *prompts, cells, base.fingerprint(), config["seed"], contents(files))
    tags = {"method": args.name, "gamma": settings["gamma"]}
    if not main_process:
        train(task, log_prob, probe, settings, args.output, identity, examples=examples)
        return distributed.destroy_process_group()
    tracking = run(config, config["experiment"], f"finetune {args.name}", tags, config["mlflow"]["tracking_uri"])
    with alone(args.output), tracking as tracker:

        def track(row: dict) -> None:
            tracker.log_metrics({key: value for key, value in row.items() if key != "update"}, row["update"])
            if shown:
                tracker.log_image(shown.pop(), "probe", row["update"])

        track({"update": 0, **probe(0)})  # the pretrained model, beside which the others are looked at
        history = train(task, log_prob, probe, settings, args.output, identity, [track], examples)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        check_distinct(space, base.network.class_embedding.state_dict(), str(args.output))
        figures = figures_of(args.name, settings, amounts_to, history, base)
        if judges := judged.figures(factors_of(report)):
            figures["judges"] = judges
        described = controls.describe(
            control, config["base"]["path"], sampler | {"timesteps": process.timesteps.tolist()}, space.names, figures
        )
        write_adapter(control, args.output, described, templates["train"][0].format(cells[0][0]))
        check_in_plain_diffusers(control, process, args.output, described, asked, templates["train"])
        loop.discard_checkpoint(args.output)
        for file in sorted(args.output.glob("*.*")):
            tracker.log_artifact(file)
    print(f"{args.output}: trained in {time.monotonic() - started:.0f} s, and plain diffusers draws the trainer's own images with it")


if __name__ == "__main__":
    errors.main(main, lower="finetune.micro_batch_size or set finetune.gradient_checkpointing: true, or blocks")
