"""The doctor on a label that is a number: what the density is worth, where classes have accuracies."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ctrl import coverage
from ctrl.doctor import DROP, Finding
from ctrl.labels import Continuous

THIRDS = ("lowest third", "middle third", "highest third")


def thirds(labels: Tensor, unit: str) -> tuple[Tensor, dict[int, str]]:
    """Which third of the requests each of `labels` (B,) is in, (B,), and what each of these is."""
    edges = labels.double().quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    group = torch.bucketize(labels.double(), edges)
    parts = {k: labels[group == k] for k in group.unique().tolist()}
    return group, {k: f"{THIRDS[k]}, {y.min().item():.4g} to {y.max().item():.4g} {unit}".rstrip() for k, y in parts.items()}


def guess(space: Continuous, labels: Tensor) -> Tensor:
    """log p(y), float64 (B,), of one who sees no image: of the Gaussian with the labelled images' mean and sd."""
    z = (labels.double() - space.mean) / space.sd
    return -0.5 * z.square() - math.log(space.sd) - 0.5 * math.log(2 * math.pi)


def error_report(law: tuple[Tensor, Tensor], scores: Tensor) -> dict:
    """n, nll, rmse, r2 and coverage (see `coverage.evaluate`) of the calibrated mean and sd (N,) on `scores` (N,), and their spread."""
    found = coverage.evaluate({"after": law}, scores)
    return {"n": found["n"], "spread": scores.double().std(correction=0).item(), **found["after"]}


def error_findings(generated: Mapping, held_out: Mapping, unit: str) -> list[Finding]:
    """Lines on the reports of generated and of held-out images."""
    n = generated["n"]
    if generated["spread"] == 0:
        return [Finding(True, f"data: all {n} generated images have the same score; nothing can be learned")]
    error = f"RMSE {generated['rmse']:.3g} {unit}".rstrip()
    against = f"{error} on {n} generated images, whose scores spread by {generated['spread']:.3g}"
    if not generated["r2"] > 0:
        text = f"classifier: {against}: it knows no more of them than their mean; check the labels, train it again"
        return [Finding(True, text)]
    findings = []
    if (drop := held_out["r2"] - generated["r2"]) > DROP:
        text = f"R² {generated['r2']:.3f} on {n} generated images, {held_out['r2']:.3f} on {held_out['n']} held-out ones: {drop:.3f} less"
        findings.append(Finding(False, f"classifier: {text}; generated images look different to it (dataset.kind: generated helps)"))
    low, high = within(0.8, n)
    if not low <= generated["coverage_80"] <= high:
        much = "wide" if generated["coverage_80"] > high else "narrow"
        text = f"its 80 % intervals hold {generated['coverage_80']:.3f} of {n} generated images' scores: its sd is too {much} for them"
        findings.append(Finding(False, f"classifier: {text}; train it on more images, or on generated ones (dataset.kind: generated)"))
    return findings


def within(share: float, n: int) -> tuple[float, float]:
    """What a share of `n` images may differ by: DROP, or two standard errors where that is more."""
    slack = max(DROP, 2 * (share * (1 - share) / n) ** 0.5)
    return share - slack, share + slack
