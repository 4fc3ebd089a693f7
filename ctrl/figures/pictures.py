"""Pictures side by side, with what was measured on each."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ctrl.bins import measured_labels
from ctrl.evaluation import Samples, factor_scores
from ctrl.figures.style import INK, PALE, STYLE, WRONG, label_colours, label_name, oracle_name, save


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
    """The measured score (of each factor) and its colour: ink where it is what was requested, red where it is not.

    Of a continuous label also what was asked for.
    """
    if report.get("kind") == "continuous":
        if requested is None:
            return f"{row['score']:.4g}", INK
        near = abs(row["score"] - row["asked"]) <= report["tolerance"]
        return f"{row['score']:.4g} ({row['asked']:.4g})", INK if near else WRONG
    scores = factor_scores(pd.DataFrame([row]), report)
    text = "\n".join(f"{score[0]:.4g}" for score in scores.values())
    return text, INK if requested is None or measured_labels(scores, report)[0] == requested else WRONG


def grid_figure(
    samples: Samples, cells: Sequence[tuple[str, int]], subjects: Sequence[str], report: dict, title: str, per_cell: int = 3
) -> Figure:
    """Subjects by labels, the first `per_cell` pictures of each cell with their measured score; hatched where a cell is never asked for.

    cells: the (subject, label) pairs that are asked for; report: the dataset's report.json.
    """
    left, top, step, row_height = 2.3, 1.5 + 0.25 * len(report.get("factors", [])), 1.08, 1.46  # a line of the headings for each factor
    group = per_cell * step + 0.5
    num_classes = report["num_classes"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(left + num_classes * group, top + len(subjects) * row_height + 0.75, 0.62)
        axes.text(0.25, 0.45, title, fontsize=10, fontweight="bold", va="center", color=INK)
        for y, colour in enumerate(label_colours(num_classes)):
            x = left + y * group
            axes.add_patch(Rectangle((x, top - 0.2), per_cell * step - 0.08, 0.07, color=colour))
            between = "\n" if "factors" in report else "  "
            axes.text(x, top - 0.38, f"asked for label {y}:{between}{label_name(report, y)}", fontsize=8, va="bottom", color=INK)
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
        asked = " (asked for)" if report.get("kind") == "continuous" else ""
        note = (
            f"below each picture: {oracle_name(report)}{asked}, red where it misses the label; hatched: hardly any by the pretrained model"
        )
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
    heading = f"with CTRL, asked for the {oracle_name(report, with_unit=False)}"
    width = start + max(num_classes * step, 0.118 * len(heading)) + 0.25
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(width, top + len(subjects) * row_height, 0.72)
        axes.text(left, 0.38, "pretrained", fontsize=10, fontweight="bold", va="center", color=INK)
        axes.text(
            start,
            0.38,
            heading,
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
