"""From scores to labels: bins and ranges chosen on the training split, as report.json holds them, and the labels of scores by these."""

from collections.abc import Sequence

import numpy as np
import torch

from ctrl import oracles, scoring
from ctrl.errors import UserError
from ctrl.labels import Factors, factors_of, space_of


def bin_edges(scores: np.ndarray, edges: Sequence[float] | str, num_classes: int) -> list[float]:
    """Given `edges`, checked; or, for `quantiles`, those that cut `scores` with shape (N,) into `num_classes` equal shares.

    Quantiles lie halfway between two scores that occur (sizes are whole bytes), so that no score lies on an edge.
    """
    if edges != "quantiles":
        return oracles.check_edges(edges).tolist()
    values = np.unique(scores)
    above = np.searchsorted(values, np.quantile(scores, np.arange(1, num_classes) / num_classes)).clip(1, max(len(values) - 1, 1))
    found = (values[above - 1] + values[above.clip(max=len(values) - 1)]) / 2
    if (np.diff(found) <= 0).any() or len(values) < num_classes:
        raise UserError(f"label.edges: quantiles of the scores coincide ({', '.join(f'{e:.4g}' for e in found)}); lower label.num_classes")
    return found.tolist()


def describe_factor(label: dict, scores: np.ndarray, train: np.ndarray, names: Sequence[str] | None = None) -> dict:
    """A factor of the report: the bins of one oracle's `scores`, by those with `train`, both with shape (N,).

    With `names` the scores are their numbers: each is a label of its own (`nominal`).
    """
    if names is not None:
        if len(names) != label["num_classes"]:
            raise UserError(
                f"the column {label['oracle']} has {len(names)} values ({', '.join(names)[:200]}), and label.num_classes is "
                f"{label['num_classes']}: set it to {len(names)}"
            )
        described = {**source_of(label), "unit": "", "num_classes": len(names), "descending": False, "nominal": True}
        return {**described, "edges": [k + 0.5 for k in range(len(names) - 1)], "label_names": list(names)}
    edges = bin_edges(scores[train], label["edges"], label["num_classes"])
    unit = oracles.UNITS.get(label["oracle"], "")
    named = oracles.label_names(edges, label["descending"], unit)
    described = {**source_of(label), "unit": unit, "num_classes": len(named), "descending": label["descending"]}
    return {**described, "edges": edges, "label_names": named}


def describe_continuous(label: dict, scores: np.ndarray) -> dict:
    """A continuous label in the report, from the training split's `scores` with shape (N,): see `ctrl.labels.Continuous`.

    The range is the one given, or from the 1 % to the 99 % quantile. `num_classes` and `label_names` are those of the table's targets.
    """
    if not np.ptp(scores) > 0:
        raise UserError(f"label.oracle: {label['oracle']} is {scores[0]:.4g} for all training images; there is nothing to control")
    low, high = np.quantile(scores, [0.01, 0.99]).tolist() if label["range"] is None else label["range"]
    num = label["num_classes"]
    described = {
        "kind": "continuous", **source_of(label), "unit": oracles.UNITS.get(label["oracle"], ""), "low": low, "high": high,
        "mean": float(scores.mean()), "sd": float(scores.std()), "extrapolation": label["extrapolation"], "tolerance": label["tolerance"],
    }  # fmt: skip
    space_of(described)  # raises where they contradict each other
    names = [f"target {k + 1} of {num}" for k in range(num)]
    return described | {"num_classes": num, "label_names": names}


def source_of(factor: dict) -> dict:
    """What of a factor says how it is measured: the arguments of ctrl.scoring.scorer."""
    return {key: factor[key] for key in scoring.KEYS if key in factor}


def measured_labels(scores: dict[str, np.ndarray], report: dict) -> np.ndarray:
    """The labels' codes, int64 (N,), of images whose `scores` (N,) the oracles measured, by the bins of a dataset's report.json.

    A continuous label is the score.
    """
    if report.get("kind") == "continuous":
        return scores[report["oracle"]]
    factors = factors_of(report)
    parts = [torch.from_numpy(oracles.score_to_label(scores[f["oracle"]], f["edges"], f["descending"])) for f in factors]
    return Factors.from_report(report).codes(parts).numpy()
