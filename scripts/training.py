"""What a training is given: its processes, what its trainer learns from, and what its probe measures and shows."""

import argparse
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import errors, evaluation, features
from ctrl.base import Base
from ctrl.finetune import parallel
from ctrl.finetune.task import Examples, LogProb
from ctrl.io import read_json, read_parquet
from ctrl.labels import Continuous, Factors, factors_of
from ctrl.oracles import to_pil
from ctrl.pictures import load_images
from scripts.loading import load_oracle, reward_of_latents


def join_processes() -> bool:
    """Meets the other processes of `accelerate launch`, each with a GPU of its own, if there are any; whether this is the first one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found, asked = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if 0 < found < asked:
            raise errors.UserError(f"{asked} processes, but {found} GPUs: lower cluster.finetune.gpus, or accelerate's --num_processes")
        PartialState(cpu=not found, timeout=timedelta(hours=2))  # the others wait for the first one's probe
        if parallel.is_main():
            print(f"data parallel: {parallel.world()[1]} processes share each batch", flush=True)
    return parallel.is_main()


def load_examples(base: Base, dataset: Path) -> Examples:
    """The labelled images that the classifier was trained on, as latents."""
    table = read_parquet(dataset / "metadata.parquet")
    table = table[table["split"] == "train"]
    if not table["prompt"].str.strip().any():
        raise errors.UserError(f"{dataset} has no prompts: classifier-free guidance learns from (prompt, image, label); CTRL needs none")
    latents = base.encode_images(load_images(table["path"]))
    return Examples(latents, table["prompt"].tolist(), torch.tensor(table["label"].tolist()))


def distance_function(args: argparse.Namespace, config: dict) -> Callable[..., dict[str, float]]:
    """`score(images, subjects, labels)` against --reference; no figure without one, or for a continuous label, where no two are alike."""
    report = read_json(args.dataset / "report.json")
    if not args.reference or report.get("kind") == "continuous":
        return lambda *_: {}
    reference = evaluation.load_samples(args.reference, factors_of(report), report["num_classes"])
    return evaluation.distance_to(reference, features.load(config["evaluation"]["features"]))


def learned_from(
    base: Base, space: Factors | Continuous, settings: dict, args: argparse.Namespace
) -> tuple[LogProb | None, Examples | None, list[Path]]:
    """What a trainer learns from: the oracle's agreement, labelled images, or log p̂(y | x); and the files whose content decides on it."""
    report, trainer = args.dataset / "report.json", settings["trainer"]
    if trainer == "supervised":
        return None, load_examples(base, args.dataset), [report, args.dataset / "metadata.parquet"]
    if trainer == "policy_gradient":
        return reward_of_latents(base, trainer, None, args.dataset, space), None, [report]
    classifier = classifiers.load(args.classifier).to(base.device)
    if isinstance(space, Continuous) != isinstance(classifier, classifiers.Density):
        raise errors.UserError(f"of {args.classifier} and {args.dataset} one has a continuous label, the other has not")
    if isinstance(space, Factors) and space.num_classes != classifier.num_classes:
        raise errors.UserError(f"{args.classifier} has {classifier.num_classes} labels, {args.dataset} has {space.num_classes}")
    if settings["factor_weights"]:
        classifier.weights = settings["factor_weights"]
    return reward_of_latents(base, trainer, classifier, args.dataset, space), None, [args.classifier / "config.json"]


def check_labels(args: argparse.Namespace, space: Factors | Continuous, cells: list[tuple]) -> None:
    """UserError where cells and dataset speak of different labels."""
    if isinstance(space, Continuous):
        space.check([y for _, limits in cells for y in limits])
    elif wrong := [y for _, y in cells if not 0 <= y < space.num_codes or y == space.null]:
        raise errors.UserError(f"{args.cells} asks for label {wrong[0]}, but the dataset has the labels 0 to {space.num_codes - 1}")


def score_function(args: argparse.Namespace, config: dict, space: Factors | Continuous, shown: list[Image.Image]) -> Callable:
    """score(images, subjects, labels), for the probe: accuracy, with a continuous label its error, and distances.

    `shown` holds the latest images as one picture.
    """
    oracle, distance = load_oracle(args.dataset), distance_function(args, config)

    def score(images: torch.Tensor, subjects: Sequence[str], labels: torch.Tensor) -> dict[str, float]:
        shown[:] = [contact_sheet(images, labels)]
        measured = torch.as_tensor(oracle(images))
        error = {"oracle_mae": (measured - labels).abs().mean().item()} if isinstance(space, Continuous) else {}
        return {"oracle_accuracy": float(space.agrees(labels, measured).double().mean()), **error} | distance(images, subjects, labels)

    return score


def contact_sheet(images: torch.Tensor, labels: torch.Tensor, columns: int = 8, size: int = 96) -> Image.Image:
    """Images in [-1, 1], (B, 3, H, W), as one picture: a row a label, up to `columns`; with a continuous label all, in ascending order."""
    order = labels.argsort(stable=True)
    rows = list(order.split(columns))
    if not labels.is_floating_point():
        rows = [order[labels[order] == label][:columns] for label in labels.unique()]
    sheet = Image.new("RGB", (columns * size, len(rows) * size), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(to_pil(images[row])):
            sheet.paste(picture.resize((size, size), Image.Resampling.NEAREST if picture.width < size else None), (x * size, y * size))
    return sheet
