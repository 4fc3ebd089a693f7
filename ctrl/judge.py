"""A judge: it stands for the people who labelled the images, where generated ones are to be labelled, too.

What a table says ends with its images. So a share of them, from which nothing else learns, trains a network of its own, which is the oracle
of all that is generated: another one than the classifier that CTRL climbs, on other images. How often it is right is measured on a part of
its share that it did not learn from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from ctrl import classifier as classifiers
from ctrl import metrics, own
from ctrl.classifier_fit import fit
from ctrl.errors import UserError
from ctrl.io import read_json
from ctrl.networks import to_float
from ctrl.oracles import score_to_label

DESCRIBED = ("oracle", "unit", "num_classes", "descending", "edges", "label_names", "low", "high")  # of a factor, if it has it


def train(
    images: Tensor, scores: np.ndarray, splits: Sequence[str], factor: dict, settings: dict, seed: int, num_bootstrap: int, device: str
) -> tuple[classifiers.Classifier, dict]:
    """The judge of a factor of report.json, and how often it is right: {measure: {value, lo, hi, n}}, of accuracy, or r2 of a number.

    images: uint8, shape (N, 3, H, W), of the judge's share; `scores` (N,) what the table says of them, `splits` their part of the share:
    that of `calibration` is what it is measured on. settings: those of the classifier with the judge's network. The names of classes are
    told apart by a softmax, a number by a Gaussian.
    """
    nominal, network = factor.get("nominal", False), settings["network"]
    description = {key: factor[key] for key in DESCRIBED if key in factor} | {"network": network, "head": HEADS[nominal]}
    if network == "clip":
        description["clip"] = settings["clip"]
    if own.is_own(network):
        description["network_sha256"] = own.digest(network)
    labels = scores if factor.get("kind") == "continuous" else score_to_label(scores, factor["edges"], factor["descending"])
    judge, _ = fit(images, scores, labels, splits, description, settings, seed, device)
    held_out = np.flatnonzero(np.asarray(splits) == "calibration")
    given = torch.from_numpy(np.asarray(scores, dtype=np.float64)[held_out])
    found = scores_of(judge, images[held_out])
    return judge, quality(given, found, factor, num_bootstrap, seed)


HEADS = {True: "softmax", False: "gaussian"}


def quality(given: Tensor, found: Tensor, factor: dict, num_bootstrap: int, seed: int) -> dict:
    """How often the scores `found` (N,) have the label of those `given` (N,), with a 95 % bootstrap interval; R² of a continuous label."""
    if factor.get("kind") == "continuous":
        name, statistic = "r2", metrics.r2
    else:
        name, statistic = "accuracy", metrics.accuracy
        given, found = (torch.from_numpy(score_to_label(x.numpy(), factor["edges"], factor["descending"])) for x in (given, found))
    lo, hi = metrics.bootstrap(lambda rows: statistic(given[rows], found[rows]), len(given), num_bootstrap, seed)
    return {name: {"value": statistic(given, found), "lo": lo, "hi": hi, "n": len(given)}}


@torch.no_grad()
def scores_of(judge: classifiers.Classifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """The scores, float64 (N,), of uint8 images (N, 3, H, W): the number of the likeliest class, or the mean of a number's Gaussian."""
    device = judge.temperature.device
    outputs = torch.cat([judge.outputs(to_float(batch.to(device))) for batch in images.split(batch_size)])
    found = judge.head.location_scale(outputs)[0] if isinstance(judge, classifiers.Density) else outputs.argmax(1)
    return found.double().cpu()


def scorer(folder: str, sha256: str) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """The function from pictures to scores (N,) of the judge in `folder`; UserError where it is not the one with that `sha256`."""
    judge = classifiers.load(Path(folder))
    if read_json(Path(folder) / "config.json")["sha256"] != sha256:
        raise UserError(f"{folder} has changed since the results that name it were made: make them again")
    judge = judge.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        if not images:
            return np.zeros(0)
        pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return scores_of(judge, torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()

    return score


def figures(factors: Sequence[dict]) -> dict[str, dict]:
    """For the table: judge_accuracy_{oracle}, or judge_r2_{oracle}, of each factor that a judge measures."""
    return {f"judge_{name}_{f['oracle']}": figure for f in factors for name, figure in f.get("judge_quality", {}).items()}


def scores_of_column(values: pd.Series, column: str, edges: object) -> tuple[np.ndarray, list[str] | None]:
    """The scores (N,) of what a table's column says, as text, and the names of its classes where `edges` is `values`.

    Then a score is the number of a class, in alphabetical order, or in that of numbers. UserError where it holds no numbers otherwise.
    """
    text = values.str.strip()
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    if edges != "values":
        if not np.isfinite(numbers).all():
            wrong = text[~np.isfinite(numbers)].iloc[0]
            raise UserError(f"the column {column} has {wrong[:50]!r}, which is no number: set label.edges: values, for a label a value")
        return numbers, None
    names = sorted(set(text), key=(lambda name: float(name)) if np.isfinite(numbers).all() else None)
    if wrong := [name for name in names if "," in name or len(name) > 100]:
        raise UserError(f"the column {column} has {wrong[0][:120]!r}: the names of labels hold no comma and 100 characters at most")
    codes = {name: k for k, name in enumerate(names)}
    return text.map(codes).to_numpy(dtype=np.float64), names
