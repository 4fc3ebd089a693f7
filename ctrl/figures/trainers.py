"""Trainers compared: accuracy and distance against what training took, and memory against the number of steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ctrl.figures.style import METRIC_NAMES, PALE, STYLE, method_colours, method_name, save

COSTS = {"seconds": "training / s, without probes", "passes": "images through the UNet, forward + backward"}


def mean_curve(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over seeds of each column, at the updates that every seed has."""
    together = pd.concat(curves).groupby("update")
    return together.mean()[together.size() == len(curves)].reset_index()


def written(number: float, position: int = 0) -> str:
    """2,000, and millions as 2M."""
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number:,.0f}"


def comparison(curves: Mapping[str, Sequence[pd.DataFrame]], target: float, path: Path) -> None:
    """Accuracy and KID of the probe against seconds and UNet passes: a colour a recipe, a thin line a seed, a thick one their mean.

    curves: recipe -> for each seed a table with the columns update, seconds, passes, accuracy, kid_rejection, there. The dashed line is
    the `target` accuracy; a triangle on it where every seed of a recipe is there, on average.
    """
    colours = method_colours(list(curves))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        panels = figure.subplots(2, 2, sharex="col", sharey="row")
        for row, (name, factor) in zip(panels, (("accuracy", 1), ("kid_rejection", 1000)), strict=True):
            for axes, cost in zip(row, COSTS, strict=True):
                for recipe, its in curves.items():
                    for curve in its:
                        axes.plot(curve[cost], factor * curve[name], color=colours[recipe], linewidth=0.6, alpha=0.5)
                    mean = mean_curve(its)
                    axes.plot(mean[cost], factor * mean[name], color=colours[recipe], linewidth=1.8, label=method_name(recipe))
                    first = [curve[curve["there"]][cost].min() for curve in its]
                    if name == "accuracy" and not pd.isna(first).any():
                        axes.plot(sum(first) / len(first), target, "v", color=colours[recipe], markersize=5, gid="reached", zorder=4)
                axes.axhline(target if name == "accuracy" else 0, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_formatter(written)  # powers of ten are formulas, which the style does not set
        seeds = max(map(len, curves.values()))
        panels[0, 0].set_title(f"{METRIC_NAMES['accuracy']} on the probe ({seeds} seeds)", loc="left")
        panels[1, 0].set_title(f"{METRIC_NAMES['kid_rejection']} ×1000, of the probe", loc="left")
        panels[0, 0].set_ylim(0, 1.02)
        panels[0, 0].annotate(f"{target:g}", (0, target), xycoords=("axes fraction", "data"), va="bottom", fontsize=6.5, color=PALE)
        if panels[1, 0].get_ylim()[1] > 100:  # a policy without a KL leaves no room for the others
            panels[1, 0].set_yscale("symlog", linthresh=10)
            panels[1, 0].yaxis.set_major_formatter("{x:g}")
        for axes, label in zip(panels[1], COSTS.values(), strict=True):
            axes.set_xlabel(label)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(curves))
        save(figure, path)


def memory_by_steps(rows: Sequence[Mapping], path: Path) -> None:
    """Memory that training adds, of each recipe, against the number of sampling steps.

    rows: with name, num_steps, training_memory_mb, and alike in all micro_batch_size and gradient_checkpointing.
    """
    colours = method_colours(list(dict.fromkeys(row["name"] for row in rows)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for name, colour in colours.items():
            points = sorted((row["num_steps"], row["training_memory_mb"]) for row in rows if row["name"] == name)
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=method_name(name))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sampling steps")
        checkpointing = {False: "without checkpointing", True: "with checkpointing"}.get(level := rows[0]["gradient_checkpointing"])
        how = f"{rows[0]['micro_batch_size']} trajectories at a time, {checkpointing or f'checkpointing by {level}'}"
        axes.set_title(f"peak memory above that before training / MB\n{how}", loc="left")
        axes.legend()
        save(figure, path)
