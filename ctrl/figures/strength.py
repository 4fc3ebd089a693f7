"""The strength dial of one adapter beside adapters trained at several gammas: what is given up for accuracy."""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ctrl.figures.style import INK, METHOD_COLOURS, METRIC_NAMES, PALE, STYLE, save

# Which rows: what they are called, their colour and marker, and where the settings stand beside their points (offset, alignment).
CURVES = {
    "gamma": ("adapters trained at each γ", INK, "s", (4, -8), "left"),
    "strength": ("strength λ of the adapter with γ = {:g}", METHOD_COLOURS["ctrl"], "o", (-4, 4), "right"),
}
IDEAL = {"diversity": 1.0, "kid_rejection_within": 0.0}


def dial(table: pd.DataFrame, path: Path) -> None:
    """Accuracy against diversity, KID within cells and path KL, each point with its setting and 95 % intervals; dashed: the exact law's.

    table: of ctrl.strength.compare. A panel stands for each of the three that the table has.
    """
    names = [name for name in ("diversity", "kid_rejection_within", "kl_nats") if table[name].notna().any()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(2.7 * len(names), 3), 3.0), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, names, strict=True):
            for which in CURVES:
                _curve(axes, table[(table["dial"] == which) & table[name].notna()], name, which)
            if name in IDEAL:
                axes.axvline(IDEAL[name], color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.set_xlabel(METRIC_NAMES[name])
        panels[0].set_ylabel(METRIC_NAMES["accuracy"])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        save(figure, path)


def _curve(axes, rows: pd.DataFrame, name: str, which: str) -> None:
    """Accuracy against `name`, for the settings of one dial in their order."""
    label, colour, marker, offset, alignment = CURVES[which]
    x, y = rows[name].to_numpy(float), rows["accuracy"].to_numpy(float)
    axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.2, zorder=3, label=label.format(rows["gamma"].max()))
    for at, low, high, lines in ((x, "accuracy_lo", "accuracy_hi", axes.vlines), (y, f"{name}_lo", f"{name}_hi", axes.hlines)):
        lines(at, rows[low].to_numpy(float), rows[high].to_numpy(float), color=colour, linewidth=0.8, alpha=0.6)
    for setting, *point in zip(rows["setting"], x, y, strict=True):
        style = {"xytext": offset, "textcoords": "offset points", "ha": alignment, "fontsize": 6.5, "color": colour, "zorder": 4}
        axes.annotate(f"{setting:g}", point, **style, path_effects=[withStroke(linewidth=2, foreground="white")])
