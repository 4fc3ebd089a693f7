"""Train a control: CTRL on a pretrained model and a calibrated classifier, to an adapter that plain diffusers loads."""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from ctrl import classifier as classifiers
from ctrl import control as controls
from ctrl import errors
from ctrl.adapter import check_in_plain_diffusers, write_adapter
from ctrl.base import Base
from ctrl.config import for_adapter
from ctrl.data import load_images
from ctrl.finetune import loop
from ctrl.finetune.objective import effective_gamma
from ctrl.finetune.recipe import Examples, Task, train
from ctrl.io import read_json, read_parquet
from ctrl.labels import Continuous, space_of
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config
from scripts.loading import agreement_of_latents, load_base, load_oracle, load_training_cells, log_prob_of_latents, new_control


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--name",
        default="ctrl",
        help="name of the adapter: a recipe (what the config's `adapters` says of it holds) and what it varies, such as ctrl_gamma3_seed1 "
        "(default: %(default)s)",
    )
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--cells", type=Path, required=True, help="cells.json: the (subject, label) pairs to train on")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json, for the labels and the probe's oracle")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter; a checkpoint in it is resumed")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def digest(*parts) -> str:
    """What a run depends on, as a short text: a checkpoint of another run is not resumed."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_examples(base: Base, dataset: Path) -> Examples:
    """The labelled images that the classifier was trained on, as latents."""
    table = read_parquet(dataset / "metadata.parquet")
    table = table[table["split"] == "train"]
    latents = base.encode_images(load_images(table["path"]) / 127.5 - 1)
    return Examples(latents, table["prompt"].tolist(), torch.tensor(table["label"].tolist()))


def check_labels(args: argparse.Namespace, space, classifier, cells: list[tuple]) -> None:
    """UserError where dataset, classifier and cells speak of different labels."""
    if isinstance(space, Continuous) != isinstance(classifier, classifiers.Density):
        raise errors.UserError(f"of {args.classifier} and {args.dataset} one has a continuous label, the other has not")
    if isinstance(space, Continuous):
        space.check([y for _, limits in cells for y in limits])
        return
    if wrong := [y for _, y in cells if not 0 <= y < space.num_codes]:
        raise errors.UserError(f"{args.cells} asks for label {wrong[0]}, but the dataset has the labels 0 to {space.num_codes - 1}")
    if space.num_classes != classifier.num_classes:
        raise errors.UserError(f"{args.classifier} has {classifier.num_classes} labels, {args.dataset} has {space.num_classes}")


def main() -> None:
    args, started = parse(), time.monotonic()
    config = for_adapter(load_config(args), args.name)
    settings, sampler, templates = config["finetune"], config["sampler"], config["prompts"]["templates"]
    if not settings["gamma"] > 0:
        raise errors.UserError(f"--name is {args.name}: gamma must be above 0; 1 is the exact conditional law")
    base, process = load_base(config, args.num_threads)
    classifier, cells = classifiers.load(args.classifier).to(base.device), load_training_cells(args.cells)
    space = space_of(read_json(args.dataset / "report.json"))
    asked = [(subject, limits[1]) for subject, limits in cells] if isinstance(space, Continuous) else cells
    check_labels(args, space, classifier, cells)
    control = new_control(base, process, space, config)
    amounts_to = effective_gamma(settings["gamma"], settings["kl_weight"], settings["kl_reduction"], torch.Size(base.latent_shape).numel())
    print(
        f"gamma {settings['gamma']:g}, KL reduction {settings['kl_reduction']}: this amounts to p(x | c) p(y | x)^{amounts_to:g}",
        flush=True,
    )

    oracle, black_box = load_oracle(args.dataset), settings["trainer"] == "policy_gradient"
    log_prob = agreement_of_latents(base, oracle, space) if black_box else log_prob_of_latents(base, classifier)

    def score(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        measured = torch.as_tensor(oracle(images))
        error = {"oracle_mae": (measured - labels).abs().mean().item()} if isinstance(space, Continuous) else {}
        return {"oracle_accuracy": float(space.agrees(labels, measured).double().mean()), **error}

    task = Task(control, process, cells, templates["train"], sampler["guidance_scale"], config["seed"])
    classifier_config = (args.classifier / "config.json").read_text()
    identity = digest(settings, sampler, templates["train"], cells, base.fingerprint(), config["seed"], classifier_config)
    tags = {"method": args.name, "gamma": settings["gamma"]}
    with run(config, config["experiment"], f"finetune {args.name}", tags, config["mlflow"]["tracking_uri"]) as tracker:

        def track(row: dict) -> None:
            tracker.log_metrics({key: value for key, value in row.items() if key != "update"}, row["update"])

        examples = load_examples(base, args.dataset) if settings["trainer"] == "supervised" else None
        history = train(task, log_prob, score, settings, args.output, identity, [track], examples)
        figures = {
            "name": args.name,
            "gamma": settings["gamma"],
            "effective_gamma": amounts_to,
            "finetune": settings,
            "train_seconds": round(sum(row["seconds"] for row in history), 1),
            "peak_memory_mb": round(base.peak_memory_mb(), 1),
            "device": base.device_name,
            "unet_passes": {way: sum(row[f"unet_{way}"] for row in history) for way in ("forward", "backward")},
            "last": history[-1],
        }
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
    errors.main(main)
