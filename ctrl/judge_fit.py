"""Trains a judge (see ctrl.judge), and measures how often it is right."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ctrl import metrics, own
from ctrl.classifier import Classifier
from ctrl.classifier_fit import fit
from ctrl.judge import scores_of
from ctrl.oracles import score_to_label

HEADS = {True: "softmax", False: "gaussian"}
DESCRIBED = ("oracle", "unit", "num_classes", "descending", "edges", "label_names", "low", "high")  # of a factor, if it has it


def train(
    images: Tensor, scores: np.ndarray, splits: Sequence[str], factor: dict, settings: dict, seed: int, num_bootstrap: int, device: str
) -> tuple[Classifier, dict]:
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


def quality(given: Tensor, found: Tensor, factor: dict, num_bootstrap: int, seed: int) -> dict:
    """How often the scores `found` (N,) have the label of those `given` (N,), with a 95 % bootstrap interval; R² of a continuous label."""
    if factor.get("kind") == "continuous":
        name, statistic = "r2", metrics.r2
    else:
        name, statistic = "accuracy", metrics.accuracy
        given, found = (torch.from_numpy(score_to_label(x.numpy(), factor["edges"], factor["descending"])) for x in (given, found))
    lo, hi = metrics.bootstrap(lambda rows: statistic(given[rows], found[rows]), len(given), num_bootstrap, seed)
    interval = (
        {"lo": lo, "hi": hi} if math.isfinite(lo) and math.isfinite(hi) else {}
    )  # few images may all have one value, where R² is none
    return {name: {"value": statistic(given, found), **interval, "n": len(given)}}
