"""The figures of the results; each function draws one from tables and arrays and writes it as a PNG."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from PIL import Image
from torch import Tensor

from ctrl.data import measured_labels
from ctrl.evaluation import Samples, factor_scores
from ctrl.io import write_bytes
from ctrl.labels import Factors
from ctrl.oracles import UNITS

DPI = 150
STYLE = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.linewidth": 0.7, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "legend.frameon": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "hatch.linewidth": 0.5,
}  # fmt: skip
INK, PALE, WRONG = "#222222", "#8a8a8a", "#c8102e"
METHOD_COLOURS = {"pretrained": "#8a8a8a", "rejection": "#222222", "ctrl": "#d1495b", "reconstruction_guidance": "#2e86ab"}
FURTHER_COLOURS = ("#edae49", "#66a182", "#8d6cab", "#e07a5f", "#4f6d7a", "#b5838d")
ORACLE_NAMES = {"jpeg_size": "JPEG size", "brightness": "brightness"}
METRIC_NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "kid_rejection": "KID to rejection", "kid_rejection_within": "KID within cells",
    "diversity": "diversity", "prompt_accuracy": "prompt accuracy", "clip_score": "CLIP score", "kl_nats": "path KL / nats",
    "log_prob": "log p̂(y | x) / nats", "oracle_accuracy": "oracle's accuracy on the probe", "temperature": "temperature of the classifier",
}  # fmt: skip


def method_name(method: str) -> str:
    """A method's name for people: `reconstruction guidance`, `CTRL, γ = 1`."""
    return re.sub(r"^CTRL gamma([\d.]+)$", r"CTRL, γ = \1", re.sub(r"^ctrl\b", "CTRL", method.replace("_", " ")))


def label_name(report: dict, label: int, with_unit: bool = True) -> str:
    """What a label means, for people: `≥ 1.3 kB`, `1.2–1.3 kB`."""
    name = re.sub(r"(?<=\d)-(?=\d)", "–", report["label_names"][label].replace(">=", "≥"))
    if "factors" in report:
        return name.replace(", ", "\n")
    return name if with_unit else name.removesuffix(f" {UNITS.get(report['oracle'], '')}").strip()


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in every figure for those that METHOD_COLOURS knows."""
    further = iter(FURTHER_COLOURS * (1 + len(methods) // len(FURTHER_COLOURS)))
    return {m: METHOD_COLOURS[m] if m in METHOD_COLOURS else next(further) for m in methods}


def label_colours(num_classes: int) -> list[tuple[float, ...]]:
    """One colour a label, dark to light along viridis: label 0 is the darkest."""
    return [matplotlib.colormaps["viridis"](0.05 + 0.8 * k / max(1, num_classes - 1)) for k in range(num_classes)]


def oracle_name(report: dict, with_unit: bool = True) -> str:
    """What the oracle measures, with its unit: `JPEG size / kB`; with several factors, all of them."""
    if "factors" in report:
        return " · ".join(oracle_name(factor, with_unit) for factor in report["factors"])
    name, unit = ORACLE_NAMES.get(report["oracle"], report["oracle"]), UNITS.get(report["oracle"], "")
    return f"{name} / {unit}" if with_unit and unit else name


def bins_of(report: dict) -> list[tuple[float, float]]:
    """The (lower, upper) edge of each label's bin, the outermost infinite."""
    edges = [-math.inf, *report["edges"], math.inf]
    bins = list(pairwise(edges))
    return bins[::-1] if report["descending"] else bins


def save(figure: Figure, path: Path | str) -> None:
    """Writes a PNG of DPI dots an inch, with at most 256 colours (a third of the size, for these pictures), atomically."""
    buffer, out = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    write_bytes(path, out.getvalue())


# ------------------------------------------------------------------------------------------------------------- pictures


def draw_picture(axes: Axes, image: Tensor, x: float, y: float, caption: str = "", colour: str = INK) -> None:
    """A uint8 image (3, H, W) as a unit square with its upper left corner at (x, y), y downwards, pixels kept; a caption below."""
    picture = axes.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + 1, y + 1, y), interpolation="nearest", zorder=2)
    picture.set_gid("picture")
    axes.text(x + 0.5, y + 1.06, caption, ha="center", va="top", fontsize=6, color=colour)


def draw_impossible(axes: Axes, x: float, y: float, width: float) -> None:
    """A hatched box for a cell that is never asked for."""
    box = Rectangle((x, y), width, 1, facecolor="#f4f4f4", edgecolor="#c4c4c4", hatch="////", linewidth=0, zorder=1)
    box.set_gid("impossible")
    axes.add_patch(box)


def _canvas(width: float, height: float, inches_a_unit: float) -> tuple[Figure, Axes]:
    """An empty figure whose data coordinates are pictures: x to the right, y downwards from the upper left corner."""
    figure = Figure(figsize=(width * inches_a_unit, height * inches_a_unit))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.axis("off")
    return figure, axes


def _caption(row: pd.Series, requested: int | None, report: dict) -> tuple[str, str]:
    """The measured score (of each factor) and its colour: ink where it lies in the requested label's bin, red where it does not."""
    scores = factor_scores(pd.DataFrame([row]), report)
    text = " · ".join(f"{score[0]:.4g}" for score in scores.values())
    return text, INK if requested is None or measured_labels(scores, report)[0] == requested else WRONG


def grid_figure(
    samples: Samples, cells: Sequence[tuple[str, int]], subjects: Sequence[str], report: dict, title: str, per_cell: int = 3
) -> Figure:
    """Subjects by labels, the first `per_cell` pictures of each cell with their measured score; hatched where a cell is never asked for.

    cells: the (subject, label) pairs that are asked for; report: the dataset's report.json.
    """
    left, top, step, row_height = 2.3, 1.5, 1.08, 1.46
    group = per_cell * step + 0.5
    num_classes = report["num_classes"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(left + num_classes * group, top + len(subjects) * row_height + 0.75, 0.62)
        axes.text(0.25, 0.45, title, fontsize=10, fontweight="bold", va="center", color=INK)
        for y, colour in enumerate(label_colours(num_classes)):
            x = left + y * group
            axes.add_patch(Rectangle((x, top - 0.2), per_cell * step - 0.08, 0.07, color=colour))
            axes.text(x, top - 0.38, f"asked for label {y}:  {label_name(report, y)}", fontsize=8, va="bottom", color=INK)
        asked = {(s, int(y)) for s, y in cells}
        for row, subject in enumerate(subjects):
            at = top + row * row_height
            axes.text(left - 0.2, at + 0.5, subject, ha="right", va="center", fontsize=8.5, color=INK)
            for y in range(num_classes):
                if (subject, y) not in asked:
                    draw_impossible(axes, left + y * group, at, per_cell * step - 0.08)
                    continue
                here = np.flatnonzero((samples.table["subject"] == subject) & (samples.table["label"] == y))[:per_cell]
                for k, i in enumerate(here):
                    text, colour = _caption(samples.table.iloc[i], y, report)
                    draw_picture(axes, samples.images[i], left + y * group + k * step, at, text, colour)
        note = f"below each picture: {oracle_name(report)}, red where it misses the label; hatched: the pretrained model has hardly any"
        axes.text(0.25, top + len(subjects) * row_height + 0.3, note, fontsize=7, va="center", color=PALE)
    return figure


def grid(
    samples: Samples, cells: Sequence[tuple[str, int]], subjects: Sequence[str], report: dict, title: str, path: Path, per_cell: int = 3
) -> None:
    """Writes `grid_figure`."""
    save(grid_figure(samples, cells, subjects, report, title, per_cell), path)


def _pick(samples: Samples, subject: str, label: int | None, seeds: Sequence[int]) -> int | None:
    """The row of a subject (and a label), if possible with one of `seeds`, the earlier the better."""
    table = samples.table
    here = table.index[(table["subject"] == subject) & ((table["label"] == label) if label is not None else True)]
    rows = {int(table["seed"][i]): i for i in here[::-1]}
    index = next((rows[s] for s in seeds if s in rows), here[0] if len(here) else None)
    return None if index is None else table.index.get_loc(index)


def teaser_figure(pretrained: Samples, ctrl: Samples, subjects: Sequence[str], report: dict, num_pretrained: int = 2) -> Figure:
    """For a few subjects: what the pretrained model draws, and what the control draws for each label, with the measured scores.

    The first pictures are shown, none is chosen; where both methods were given the same seed for a subject, it is used.
    """
    left, top, step, row_height, gap = 2.0, 1.25, 1.14, 1.44, 0.8
    num_classes, start = report["num_classes"], left + num_pretrained * step + gap
    width = start + max(num_classes * step + 0.25, 5)  # of the heading
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(width, top + len(subjects) * row_height, 0.72)
        axes.text(left, 0.38, "pretrained", fontsize=10, fontweight="bold", va="center", color=INK)
        axes.text(
            start,
            0.38,
            f"with CTRL, asked for the {oracle_name(report, with_unit=False)}",
            fontsize=10,
            fontweight="bold",
            va="center",
            color=INK,
        )
        axes.text(left, top - 0.3, oracle_name(report), fontsize=7, va="bottom", color=PALE)
        for y, colour in enumerate(label_colours(num_classes)):
            axes.add_patch(Rectangle((start + y * step, top - 0.2), 1, 0.09, color=colour))
            axes.text(
                start + y * step + 0.5, top - 0.3, label_name(report, y, with_unit=False), ha="center", fontsize=7.5, va="bottom", color=INK
            )
        for row, subject in enumerate(subjects):
            at = top + row * row_height
            axes.text(left - 0.2, at + 0.5, subject, ha="right", va="center", fontsize=9, color=INK)
            own = ctrl.table[ctrl.table["subject"] == subject]
            seeds = own["seed"].value_counts(sort=False).sort_values(ascending=False, kind="stable").index.tolist()
            before = pretrained.table[pretrained.table["subject"] == subject].drop_duplicates("seed")
            order = before.assign(rank=[seeds.index(s) if s in seeds else len(seeds) for s in before["seed"]]).sort_values(
                "rank", kind="stable"
            )
            for k, index in enumerate(order.index[:num_pretrained]):
                i = pretrained.table.index.get_loc(index)
                draw_picture(axes, pretrained.images[i], left + k * step, at, *_caption(pretrained.table.iloc[i], None, report))
            for y in range(num_classes):
                if (i := _pick(ctrl, subject, y, seeds)) is None:
                    draw_impossible(axes, start + y * step, at, 1)
                    continue
                draw_picture(axes, ctrl.images[i], start + y * step, at, *_caption(ctrl.table.iloc[i], y, report))
    return figure


def teaser(pretrained: Samples, ctrl: Samples, subjects: Sequence[str], report: dict, path: Path) -> None:
    """Writes `teaser_figure`."""
    save(teaser_figure(pretrained, ctrl, subjects, report), path)


def choose_subjects(cells: Sequence[tuple[str, int]], num_subjects: int = 5) -> list[str]:
    """The subjects that can take the most labels, in the order of `cells`' subjects: rows for `teaser`."""
    count = pd.Series([s for s, _ in cells]).value_counts(sort=False)
    return [s for s in count.index if s in set(count.sort_values(ascending=False, kind="stable").index[:num_subjects])]


def prompts_grid(images: Sequence[Tensor], names: Sequence[str], title: str, path: Path) -> None:
    """One row of uint8 images (N, 3, H, W) for each name."""
    left, top = 2.3, 0.9
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(left + 1.06 * max(map(len, images)) + 0.2, top + 1.06 * len(names) + 0.2, 0.5)
        axes.text(0.25, 0.42, title, fontsize=10, fontweight="bold", va="center", color=INK)
        for row, (pictures, name) in enumerate(zip(images, names, strict=True)):
            axes.text(left - 0.2, top + 1.06 * row + 0.5, name, ha="right", va="center", fontsize=8.5, color=INK)
            for k, image in enumerate(pictures):
                draw_picture(axes, image, left + 1.06 * k, top + 1.06 * row)
    save(figure, path)


# --------------------------------------------------------------------------------------------------------------- labels


def sizes(tables: Mapping[str, pd.DataFrame], report: dict, path: Path, num_bins: int = 48) -> None:
    """Histograms of the measured score: a column for each method, a row for each requested label, its bin shaded, the share in it.

    tables: method -> table with the columns label (requested) and score. Several factors: `scatter_of_factors` instead.
    """
    if "factors" in report:
        return scatter_of_factors(tables, report, path)
    num_classes, colours = report["num_classes"], label_colours(report["num_classes"])
    scores = np.concatenate([t["score"] for t in tables.values()])
    low, high = np.quantile(scores, [0.001, 0.999]) + np.array([-0.03, 0.03]) * np.ptp(scores)
    cuts = [low, *(e for e in report["edges"] if low < e < high), high]
    counts = [max(1, round(num_bins * (b - a) / (high - low))) for a, b in pairwise(cuts)]
    grid = np.concatenate([*(np.linspace(a, b, n, endpoint=False) for (a, b), n in zip(pairwise(cuts), counts, strict=True)), [high]])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.1 * len(tables), 0.8 + 1.05 * num_classes), layout="constrained")
        panels = figure.subplots(num_classes, len(tables), sharex=True, sharey="row", squeeze=False)
        for column, (method, table) in enumerate(tables.items()):
            for y, (start, end) in enumerate(bins_of(report)):
                axes, own = panels[y, column], table.loc[table["label"] == y, "score"].to_numpy()
                axes.axvspan(max(start, low), min(end, high), color=colours[y], alpha=0.16, linewidth=0)
                for edge in report["edges"]:
                    axes.axvline(edge, color="#777777", linewidth=0.6, linestyle=(0, (3, 2)))
                axes.hist(own.clip(low, high), bins=grid, color=colours[y], linewidth=0)
                axes.set(xlim=(low, high), yticks=[])
                axes.grid(False)
                if len(own):
                    share = ((own >= start) & (own < end)).mean()
                    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
                    axes.text(0.97, 0.93, f"{share:.0%}", transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=box)
                if column == 0:
                    axes.set_ylabel(f"label {y}\n{label_name(report, y)}", rotation=0, ha="right", va="center", labelpad=8)
            panels[0, column].set_title(method_name(method), fontweight="bold")
        for axes in panels[:, 0]:  # room for the shares above the bars; a row has one y axis
            axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        figure.supxlabel(f"measured {oracle_name(report)}   (shaded: what was asked for; dashed: edges of the bins)", fontsize=8)
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


# --------------------------------------------------------------------------------------------------------------- curves


def training(histories: Mapping[str, Sequence[dict]], path: Path, num_classes: int | None = None) -> None:
    """Log-probability, path KL, oracle's accuracy on the probe and the classifier's softening, against the update.

    histories: adapter -> rows of history.jsonl. A line is a running mean, what is pale behind it every update.
    """
    colours = method_colours(list(histories))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        for axes, name in zip(panels.flat, ("log_prob", "kl_nats", "oracle_accuracy", "temperature"), strict=True):
            for adapter, rows in histories.items():
                points = pd.DataFrame([(r["update"], r[name]) for r in rows if r.get(name) is not None], columns=["update", name])
                noisy = name in ("log_prob", "kl_nats") and len(points) >= 20
                if noisy:
                    axes.plot(points["update"], points[name], color=colours[adapter], alpha=0.25, linewidth=0.7)
                line = points[name].rolling(max(1, len(points) // 15), min_periods=1, center=True).mean() if noisy else points[name]
                marker = "o" if name == "oracle_accuracy" else None
                axes.plot(
                    points["update"], line, color=colours[adapter], linewidth=1.5, marker=marker, markersize=2.5, label=method_name(adapter)
                )
            axes.set_title(METRIC_NAMES[name], loc="left")
        panels[1, 0].set_ylim(0, 1.02)
        if num_classes:
            panels[1, 0].axhline(1 / num_classes, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            panels[1, 0].annotate(
                "chance", (1, 1 / num_classes), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6.5, color=PALE
            )
        panels[0, 1].set_ylim(bottom=0)
        if panels[0, 1].get_ylim()[1] > 50:  # a policy without a KL term leaves no room for the others
            panels[0, 1].set_yscale("symlog", linthresh=10)
        panels[1, 1].set_ylim(bottom=0)
        for axes in panels[1]:
            axes.set_xlabel("update")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(histories) > 1:
            panels[0, 0].legend(loc="lower right")
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


IDEAL = {"accuracy": 1.0, "kid_rejection": 0.0, "kid_rejection_within": 0.0, "diversity": 1.0}


def gamma_sweep(evaluations: Sequence[dict], path: Path) -> None:
    """Accuracy, distance to rejection, diversity and KL against gamma, with 95 % intervals; dashed: the exact law's value.

    evaluations: the JSON of scripts/evaluate.py for adapters, whose "settings" hold gamma.
    """
    rows = [{"gamma": e["settings"]["gamma"]} | e["metrics"] for e in evaluations]
    names = ("accuracy", "kid_rejection", "kid_rejection_within", "diversity", "kl_nats")
    _sweep(rows, "gamma", "gamma", names, path, None, IDEAL)


def tuning_sweep(sweep: Sequence[dict], method: str, best: float, path: Path) -> None:
    """The figures of each scale that was tried for a guided method; the dotted line is the scale that was chosen.

    sweep: rows with "scale", the metrics' values.
    """
    names = ("accuracy", "kid_rejection", "kid_rejection_within", "diversity", "prompt_accuracy", "clip_score")
    _sweep(sweep, "scale", f"scale of {method_name(method)}", names, path, best, IDEAL)
