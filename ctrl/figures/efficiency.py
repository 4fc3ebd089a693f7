"""Sample efficiency: what a method is worth against the number of labelled images that it learned from."""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from ctrl.figures.style import METHOD_COLOURS, METRIC_NAMES, STYLE, method_colours, method_name, save

PANELS = ("accuracy", "kid_rejection", "kid_rejection_within")
BOUNDS = {"pretrained": "pretrained", "rejection": "noise floor"}  # rows that learn from no labelled image


def sample_efficiency(table: pd.DataFrame, path: Path) -> None:
    """A panel for each of PANELS that the table has: each method's line with 95 % intervals; dashed, the rows of BOUNDS.

    table: a row a method and number of images, with the columns method, num_images, n, and each metric with its _lo and _hi.
    """
    learned = table[table["num_images"].notna()].sort_values("num_images")
    names, colours = [name for name in PANELS if name in table], method_colours(list(dict.fromkeys(learned["method"])))
    sizes = sorted(set(learned["num_images"].astype(int)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(names) + 0.3, 2.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for k, (method, rows) in enumerate(learned.groupby("method", sort=False)):
                at = rows["num_images"].astype(float) * (0.98, 1.02)[k % 2]  # so that no interval hides another
                axes.plot(at, rows[name], color=colours[method], marker="o", markersize=3.5, linewidth=1.3, label=method_name(method))
                axes.vlines(at, rows[f"{name}_lo"], rows[f"{name}_hi"], color=colours[method], linewidth=1, alpha=0.7)
            for _, row in table[table["method"].isin(list(BOUNDS))].iterrows():
                colour = METHOD_COLOURS[row["method"]]
                axes.axhline(row[name], color=colour, linewidth=0.8, linestyle=(0, (3, 2)), label=BOUNDS[row["method"]], zorder=1)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{METRIC_NAMES[name]} (n = {', '.join(map(str, sorted(set(table['n']))))})", loc="left")
            axes.set_xlabel("labelled training images")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save(figure, path)
