"""The scores of a dataset, by label."""

from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctrl import oracles
from ctrl.labels import factors_of


def histogram(table: pd.DataFrame, report: dict) -> Figure:
    """The scores of all images, coloured by label, with the edges and how many images each label has; a panel a factor."""
    factors = factors_of(report)
    figure = Figure(figsize=(8, 4.5 * len(factors)), layout="constrained")
    for axes, factor in zip(figure.subplots(len(factors), 1, squeeze=False)[:, 0], factors, strict=True):
        score = table[f"score_{factor['oracle']}"].to_numpy()
        if report.get("kind") == "continuous":
            axes.hist(score, bins=80, label=f"n = {len(score)}")
            axes.axvspan(report["low"], report["high"], color="grey", alpha=0.15, label="range of the label")
            axes.set(xlabel=f"{report['oracle'].replace('_', ' ')} / {report['unit']}".removesuffix(" / "), ylabel="images")
            axes.legend()
            continue
        _draw_histogram(axes, score, oracles.score_to_label(score, factor["edges"], factor["descending"]), factor)
    return figure


def _draw_histogram(axes: Axes, score: np.ndarray, label: np.ndarray, report: dict) -> None:
    width, names = max(np.ptp(score) / 80, 1e-9), [name.replace("$", r"\$") for name in report["label_names"]]  # no formula
    ends = list(pairwise([score.min(), *report["edges"], score.max() + width]))
    for y, (low, high) in enumerate(ends[::-1] if report["descending"] else ends):
        part = score[label == y]
        bins = np.linspace(low, high, max(round((high - low) / width), 1) + 1)
        axes.hist(part, bins=bins, color=f"C{y % 10}", label=f"{y}: {names[y]} (n = {len(part)})")
    if report.get("nominal"):
        axes.set_xticks(range(report["num_classes"]), names)
    for edge in [] if report.get("nominal") else report["edges"]:
        axes.axvline(edge, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"{edge:.4g}", (edge, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel(f"{report['oracle'].replace('_', ' ')} / {report['unit']}".removesuffix(" / "))
    axes.set_ylabel("images")
    axes.legend(title="label")
