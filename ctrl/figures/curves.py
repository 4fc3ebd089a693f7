"""Curves: training, sweeps, accuracy by timestep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from ctrl.figures.style import INK, METHOD_COLOURS, METRIC_NAMES, PALE, STYLE, method_colours, method_name, save

NOISY = ("log_prob", "kl_nats", "var_log_w")  # of the trajectories of one update: shown as a running mean


def training(histories: Mapping[str, Sequence[dict]], path: Path, num_classes: int | None = None) -> None:
    """Log-probability, path KL and var log w (0 at the exact optimum) of each update, the probe's figures and the classifier's softening.

    histories: adapter -> rows of history.jsonl. A line is a running mean, what is pale behind it every update.
    """
    colours = method_colours(list(histories))
    names = ("log_prob", "kl_nats", "var_log_w", "oracle_accuracy", "kid_rejection", "temperature")
    names = [name for name in names if any(row.get(name) is not None for rows in histories.values() for row in rows)]
    columns = math.ceil(len(names) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * columns, 4.4), layout="constrained")
        panels = dict(zip(names, figure.subplots(2, columns, sharex=True, squeeze=False).flat, strict=False))
        for name, axes in panels.items():
            for adapter, rows in histories.items():
                points = pd.DataFrame([(r["update"], r[name]) for r in rows if r.get(name) is not None], columns=["update", name])
                noisy = name in NOISY and len(points) >= 20
                if noisy:
                    axes.plot(points["update"], points[name], color=colours[adapter], alpha=0.25, linewidth=0.7)
                line = points[name].rolling(max(1, len(points) // 15), min_periods=1, center=True).mean() if noisy else points[name]
                marker = "o" if name in ("oracle_accuracy", "kid_rejection") else None
                axes.plot(
                    points["update"], line, color=colours[adapter], linewidth=1.5, marker=marker, markersize=2.5, label=method_name(adapter)
                )
            axes.set_title(METRIC_NAMES[name], loc="left")
            axes.set_xlabel("update")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelbottom=True)
        for axes in figure.axes[len(names) :]:
            axes.remove()
        for name, low, high in (("oracle_accuracy", 0, 1.02), ("kl_nats", 0, None), ("temperature", 0, None)):
            if name in panels:
                panels[name].set_ylim(low, high)
        if num_classes and "oracle_accuracy" in panels:
            axes = panels["oracle_accuracy"]
            axes.axhline(1 / num_classes, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.annotate(
                "chance", (1, 1 / num_classes), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6.5, color=PALE
            )
        if "kl_nats" in panels and panels["kl_nats"].get_ylim()[1] > 50:  # a policy without a KL leaves no room for the others
            panels["kl_nats"].set_yscale("symlog", linthresh=10)
            panels["kl_nats"].yaxis.set_major_formatter("{x:g}")  # powers of ten are formulas, which the style does not set
        if "var_log_w" in panels:
            panels["var_log_w"].set_yscale("log")
            panels["var_log_w"].yaxis.set_major_formatter("{x:g}")
            panels["var_log_w"].yaxis.set_minor_formatter(NullFormatter())
        if len(histories) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(histories)))
        save(figure, path)


def accuracy_by_timestep(rows: Sequence[dict], num_classes: int, path: Path) -> None:
    """Accuracy and negative log-likelihood of a classifier of noisy latents at the sampler's timesteps, with those of a blind guess.

    rows: "timestep", "accuracy", "nll" in nats and "n", the number of images, of each step.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.5), layout="constrained")
        blind = {"accuracy": 1 / num_classes, "nll": math.log(num_classes)}
        for axes, name, title in zip(figure.subplots(1, 2), blind, ("accuracy", "−log p(y | x_t) / nats"), strict=True):
            axes.plot([r["timestep"] for r in rows], [r[name] for r in rows], color=METHOD_COLOURS["ctrl"], marker="o", markersize=3.5)
            axes.axhline(blind[name], color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.annotate("chance", (0, blind[name]), xycoords=("axes fraction", "data"), va="bottom", fontsize=6.5, color=PALE)
            axes.set_title(f"{title} (n = {rows[0]['n']})", loc="left")
            axes.set_xlabel("timestep t of 1000: more is noisier")
            axes.set_ylim(0, 1.02 if name == "accuracy" else None)
        save(figure, path)


def _sweep(
    rows: Sequence[dict], x: str, x_label: str, names: Sequence[str], path: Path, best: float | None, ideal: Mapping[str, float]
) -> None:
    """One panel for each of `names` that the rows have, against row[x] on a log axis; a row holds numbers or {"value", "lo", "hi"}."""
    rows = sorted(rows, key=lambda row: row[x])
    names = [n for n in names if any(row.get(n) is not None for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(2.3 * len(names), 3), 2.3), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            given = [(row[x], row[name]) for row in rows if row.get(name) is not None]
            figures = [(at, v if isinstance(v, Mapping) else {"value": v}) for at, v in given]
            at, value = [a for a, _ in figures], [f["value"] for _, f in figures]
            axes.plot(at, value, color=METHOD_COLOURS["ctrl"], marker="o", markersize=3.5, linewidth=1.3, zorder=3)
            bounds = [(a, f["lo"], f["hi"]) for a, f in figures if f.get("lo") is not None]
            axes.vlines(*(zip(*bounds, strict=True) if bounds else ([], [], [])), color=METHOD_COLOURS["ctrl"], linewidth=1, alpha=0.7)
            if name in ideal:
                axes.axhline(ideal[name], color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            if best is not None:
                axes.axvline(best, color=INK, linewidth=0.8, linestyle=(0, (1, 1.5)))
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator([row[x] for row in rows]))
            axes.set_xticks([row[x] for row in rows], [f"{row[x]:g}" for row in rows])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(METRIC_NAMES[name], loc="left")
            axes.set_xlabel(x_label)
        save(figure, path)


IDEAL = {"accuracy": 1.0, "r2": 1.0, "kid_rejection": 0.0, "kid_rejection_within": 0.0, "diversity": 1.0}


def gamma_sweep(evaluations: Sequence[dict], path: Path) -> None:
    """Accuracy, distance to rejection, diversity and KL against gamma, with 95 % intervals; dashed: the exact law's value.

    evaluations: the JSON of scripts/evaluate.py for adapters, whose "settings" hold gamma.
    """
    rows = [{"gamma": e["settings"]["gamma"]} | e["metrics"] for e in evaluations]
    names = ("accuracy", "r2", "kid_rejection", "kid_rejection_within", "diversity", "kl_nats")
    _sweep(rows, "gamma", "gamma", names, path, None, IDEAL)


def tuning_sweep(sweep: Sequence[dict], method: str, best: float, path: Path) -> None:
    """The figures of each scale that was tried for a guided method; the dotted line is the scale that was chosen.

    sweep: rows with "scale", the metrics' values.
    """
    names = ("accuracy", "r2", "kid_rejection", "kid_rejection_within", "diversity", "prompt_accuracy", "clip_score")
    _sweep(sweep, "scale", f"scale of {method_name(method)}", names, path, best, IDEAL)
