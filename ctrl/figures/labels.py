"""Requested labels against measured ones: histograms, scatter plots, bars, confusion matrices."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from ctrl.bins import measured_labels
from ctrl.evaluation import factor_scores
from ctrl.figures.style import (
    INK,
    ORACLE_NAMES,
    PALE,
    STYLE,
    bins_of,
    label_colours,
    label_name,
    method_colours,
    method_name,
    oracle_name,
    save,
)
from ctrl.labels import Factors
from ctrl.targets import beyond

ACROSS = 9  # methods side by side


def sizes(tables: Mapping[str, pd.DataFrame], report: dict, path: Path, num_bins: int = 48) -> None:
    """Histograms of the measured score: a column for each method, a row for each requested label, its bin shaded, the share in it.

    More than ACROSS methods go into several bands, one below the other. tables: method -> table with the columns label (requested) and
    score. Several factors: `scatter_of_factors` instead; a continuous label: `scatter_of_targets`.
    """
    if report.get("kind") == "continuous":
        return scatter_of_targets(tables, report, path)
    if "factors" in report:
        return scatter_of_factors(tables, report, path)
    num_classes, colours = report["num_classes"], label_colours(report["num_classes"])
    scores = np.concatenate([t["score"] for t in tables.values()])
    low, high = np.quantile(scores, [0.001, 0.999]) + np.array([-0.03, 0.03]) * np.ptp(scores)
    cuts = [low, *(e for e in report["edges"] if low < e < high), high]
    counts = [max(1, round(num_bins * (b - a) / (high - low))) for a, b in pairwise(cuts)]
    grid = np.concatenate([*(np.linspace(a, b, n, endpoint=False) for (a, b), n in zip(pairwise(cuts), counts, strict=True)), [high]])
    with matplotlib.rc_context(STYLE):
        bands = -(-len(tables) // ACROSS)
        across = -(-len(tables) // bands)
        figure = Figure(figsize=(0.6 + 2.1 * across, 0.8 + 1.05 * num_classes * bands), layout="constrained")
        panels = figure.subplots(bands * num_classes, across, sharex=True, sharey="row", squeeze=False)
        for k, (method, table) in enumerate(tables.items()):
            first, column = num_classes * (k // across), k % across
            for y, (start, end) in enumerate(bins_of(report)):
                axes, own = panels[first + y, column], table.loc[table["label"] == y, "score"].to_numpy()
                axes.axvspan(max(start, low), min(end, high), color=colours[y], alpha=0.16, linewidth=0)
                for edge in report["edges"]:
                    axes.axvline(edge, color="#777777", linewidth=0.6, linestyle=(0, (3, 2)))
                axes.hist(own.clip(low, high), bins=grid, color=colours[y], linewidth=0)
                axes.set(xlim=(low, high), yticks=[])
                if report.get("nominal"):
                    axes.set_xticks(range(num_classes), report["label_names"], fontsize=6)
                axes.grid(False)
                if len(own):
                    share = ((own >= start) & (own < end)).mean()
                    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
                    axes.text(0.97, 0.93, f"{share:.0%}", transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=box)
                if column == 0:
                    axes.set_ylabel(f"label {y}\n{label_name(report, y)}", rotation=0, ha="right", va="center", labelpad=8)
            panels[first, column].set_title(method_name(method), fontweight="bold")
        for axes in panels[-num_classes:, len(tables) - across * (bands - 1) :].flat:
            axes.set_axis_off()
        for axes in panels[:, 0]:  # room for the shares above the bars; a row has one y axis
            axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        figure.supxlabel(f"measured {oracle_name(report)}   (shaded: what was asked for; dashed: edges of the bins)", fontsize=8)
        save(figure, path)


def scatter_of_targets(tables: Mapping[str, pd.DataFrame], report: dict, path: Path) -> None:
    """What was asked for against what was reached, a panel for each method; requests beyond a subject's range are open circles.

    tables: method -> table with the columns asked, score and label, the number of the target.
    """
    both = np.concatenate([t[["asked", "score"]].to_numpy() for t in tables.values()])
    limits = np.quantile(both, [0.001, 0.999]) + np.array([-0.03, 0.03]) * np.ptp(both)
    colours = method_colours(list(tables))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.3 * len(tables), 2.8), layout="constrained")
        for axes, (method, table) in zip(figure.subplots(1, len(tables), sharey=True, squeeze=False)[0], tables.items(), strict=True):
            apart = beyond(table, report["num_classes"])
            axes.plot(limits, limits, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            for rows, face in ((~apart, colours[method]), (apart, "none")):
                part = table[rows]
                axes.scatter(part["asked"], part["score"].clip(*limits), s=6, facecolors=face, edgecolors=colours[method], linewidths=0.5)
            note = f"MAE {(table['score'] - table['asked'])[~apart].abs().mean():.3g} (n = {(~apart).sum()})"
            if apart.any():
                note += f"\nbeyond {(table['score'] - table['asked'])[apart].abs().mean():.3g} (n = {apart.sum()})"
            axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", fontsize=6.5, color=INK)
            axes.set(xlim=limits, ylim=limits, aspect="equal")
            axes.set_title(method_name(method), fontweight="bold")
        figure.supxlabel(f"{oracle_name(report)} asked for   (open circles: beyond the subject's range)", fontsize=8)
        figure.supylabel(f"reached {oracle_name(report)}", fontsize=8)
        save(figure, path)


def scatter_of_factors(tables: Mapping[str, pd.DataFrame], report: dict, path: Path) -> None:
    """The first two measured scores of each image: a column for each method, a row for each requested label, its bins shaded."""
    first, second = report["factors"][:2]
    space, colours = Factors.from_report(report), label_colours(report["num_classes"])
    scores = {method: list(factor_scores(table, report).values())[:2] for method, table in tables.items()}
    limits = [np.quantile(np.concatenate(values), [0.001, 0.999]) for values in zip(*scores.values(), strict=True)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 1.9 * len(tables), 0.8 + 1.5 * len(colours)), layout="constrained")
        panels = figure.subplots(len(colours), len(tables), sharex=True, sharey=True, squeeze=False)
        for (row, column), axes in np.ndenumerate(panels):
            method, table = list(tables.items())[column]
            own, parts = (table["label"] == row).to_numpy(), space.parts[row].tolist()
            (left, right), (low, high) = bins_of(first)[parts[0]], bins_of(second)[parts[1]]
            (left, right), (low, high) = np.clip([left, right], *limits[0]), np.clip([low, high], *limits[1])
            axes.add_patch(Rectangle((left, low), right - left, high - low, color=colours[row], alpha=0.16, linewidth=0))
            x, y = (values[own] for values in scores[method])
            axes.scatter(x.clip(*limits[0]), y.clip(*limits[1]), s=3, color=colours[row], linewidth=0)
            if own.any():
                share = (measured_labels(factor_scores(table[own], report), report) == row).mean()
                axes.text(0.97, 0.95, f"{share:.0%}", transform=axes.transAxes, ha="right", va="top", fontsize=8)
            if row == 0:
                axes.set_title(method_name(method), fontweight="bold")
            if column == 0:
                held = "\n(held out)" if row in report["held_out"] else ""
                name = f"label {space.label(row)}\n{label_name(report, row)}{held}"
                axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        figure.supxlabel(f"measured {oracle_name(first)} (across), {oracle_name(second)} (up); shaded: what was asked for", fontsize=8)
        save(figure, path)


def factor_accuracies(evaluations: Sequence[dict], path: Path) -> None:
    """Accuracy of each factor alone, of all together, and on the held-out combinations, a group of bars each, with 95 % intervals.

    evaluations: the JSON of scripts/evaluate.py for a dataset of several factors.
    """
    names = [n for n in evaluations[0]["metrics"] if n.startswith("accuracy_") and n != "accuracy_held_out"]
    names += ["accuracy", *(["accuracy_held_out"] if "accuracy_held_out" in evaluations[0]["metrics"] else [])]
    ticks = {"accuracy": "all factors", "accuracy_held_out": "held out:\nall factors"}
    colours, width = method_colours([e["method"] for e in evaluations]), 0.8 / len(evaluations)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.3 * len(names), 2.8), layout="constrained")
        axes = figure.subplots()
        for k, evaluation in enumerate(evaluations):
            figures = [evaluation["metrics"][n] for n in names]
            at, value = np.arange(len(names)) + (k + 0.5) * width - 0.4, np.array([f["value"] for f in figures])
            errors = [value - [f["lo"] for f in figures], np.array([f["hi"] for f in figures]) - value]
            method = evaluation["method"]
            axes.bar(at, value, 0.92 * width, yerr=np.maximum(errors, 0), color=colours[method], label=method_name(method), ecolor=PALE)
        axes.set_xticks(range(len(names)), [ticks.get(n) or ORACLE_NAMES.get(n[9:], n[9:]) for n in names])
        axes.set(ylim=(0, 1.05), ylabel="accuracy")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def confusion(counts: Mapping[str, Sequence[Sequence[int]]], report: dict, path: Path) -> None:
    """A confusion matrix for each method, rows as percentages of what was requested. counts: method -> [requested][measured]."""
    num_classes = report["num_classes"]
    ticks = [f"{y}: {label_name(report, y)}" for y in range(num_classes)]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        side = 0.42 * num_classes
        figure = Figure(figsize=(1.5 + (side + 0.35) * len(counts), side + 1.5), layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for axes, (method, matrix) in zip(panels, counts.items(), strict=True):
            matrix = np.asarray(matrix, dtype=float)
            share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
            for i, row in enumerate(share):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color="white" if value > 0.55 else INK)
            axes.set_title(textwrap.fill(method_name(method), max(8, round(12 * side))), fontweight="bold")
            axes.set_xticks(range(num_classes), ticks, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(num_classes), ticks)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("requested label")
        figure.supxlabel("label that the oracle measures", fontsize=8)
        bar = figure.colorbar(picture, ax=panels, shrink=0.75, pad=0.01, aspect=14)
        bar.set_label("share of the requested")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        save(figure, path)
