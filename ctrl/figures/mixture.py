"""The proof's table and picture: every method's samples beside the exact ones, with its distance over that of two exact sets."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctrl.figures.style import method_name, save

COLUMNS = {
    "sliced_wasserstein": "sliced Wasserstein", "sliced_wasserstein_se": "± ", "wasserstein_ratio": "÷ floor",
    "total_variation": "total variation", "total_variation_se": "±  ", "variation_ratio": "÷ floor ", "kl_nats": "KL / nats",
    "var_log_w": "var log w", "scale": "scale", "train_seconds": "train / s", "n": "n a set", "sets": "sets",
}  # fmt: skip
BAND = 7  # panels side by side that a page still shows large enough


def table_of_distances(figures: Sequence[dict]) -> pd.DataFrame:
    """A row a method and gamma; the distances also over the noise floor: what two exact sets, or an exact set and the grid, differ by."""
    table = pd.DataFrame([{key: value for key, value in row.items() if key != "sweep"} for row in figures])
    floor = table[table["method"] == "exact_reference"].set_index("gamma")
    for ratio, distance in {"wasserstein_ratio": "sliced_wasserstein", "variation_ratio": "total_variation"}.items():
        if distance in table:
            table[ratio] = table[distance] / table["gamma"].map(floor[distance])
    exact = table["method"] == "exact"  # itself
    table.loc[exact, [c for c in ("sliced_wasserstein", "sliced_wasserstein_se", "wasserstein_ratio") if c in table]] = np.nan
    return table[["method", "gamma", *(c for c in COLUMNS if c in table)]]


def markdown(table: pd.DataFrame) -> str:
    """The table for a README."""
    shown = table.rename(columns=COLUMNS)
    lines = ["| " + " | ".join(shown.columns) + " |", "| --- " + "| ---: " * (len(shown.columns) - 1) + "|"]
    for _, row in shown.iterrows():
        cells = [f"{v:.4g}" if isinstance(v, float) and np.isfinite(v) else "" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def densities(samples: dict[str, pd.DataFrame], table: pd.DataFrame, gamma: float, output: Path, num_cells: int = 60) -> None:
    """A row a label, a column a method, in bands of at most BAND methods: histograms of the first two coordinates at `gamma`, all on the
    exact samples' scale and in their frame."""
    first = next(iter(samples.values()))
    labels = sorted(first["label"].unique())
    exact = first[first["gamma"] == gamma]
    bounds = [tuple(exact[c].quantile([0.0, 1.0]) + np.array([-0.5, 0.5])) for c in ("x0", "x1")]
    ratios = table[table["gamma"] == gamma].set_index("method").get("wasserstein_ratio", pd.Series(dtype=float))
    most = [max_count(exact[exact["label"] == y], num_cells, bounds) for y in labels]
    num_bands = math.ceil(len(samples) / BAND)
    width = math.ceil(len(samples) / num_bands)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": True}):
        figure = Figure(figsize=(1.5 * width, (1.5 * len(labels) + 0.3) * num_bands + 0.3), layout="constrained")
        axes = figure.subplots(len(labels) * num_bands, width, squeeze=False)
        for k, (method, drawn) in enumerate(samples.items()):
            for row, y in enumerate(labels):
                panel = axes[k // width * len(labels) + row, k % width]
                density(panel, drawn[(drawn["label"] == y) & (drawn["gamma"] == gamma)], num_cells, bounds, most[row])
                if k % width == 0:
                    panel.set_ylabel(f"label {y}")
                if row == 0:
                    ratio = ratios.get(method, np.nan)
                    panel.set_title(method_name(method) + (f"\n{ratio:.1f} × floor" if np.isfinite(ratio) else "\n"), fontsize=8)
        for k in range(len(samples), num_bands * width):
            for row in range(len(labels)):
                axes[k // width * len(labels) + row, k % width].set_axis_off()
        figure.suptitle(f"p(x | y) at γ = {gamma:g}", fontsize=9)
        save(figure, output)


def max_count(part: pd.DataFrame, num_cells: int, bounds: list[tuple[float, float]]) -> float:
    """Of the cells of a histogram of x0, x1."""
    return np.histogram2d(part["x0"], part["x1"], bins=num_cells, range=bounds)[0].max()


def density(panel: Axes, part: pd.DataFrame, num_cells: int, bounds: list[tuple[float, float]], most: float) -> None:
    """One histogram, which says so where most of the samples lie outside of its frame."""
    panel.hist2d(part["x0"], part["x1"], bins=num_cells, range=bounds, cmap="magma_r", vmin=0, vmax=most)
    panel.set(xticks=[], yticks=[], aspect="auto")
    outside = 1 - np.logical_and(*(part[c].between(*ends) for c, ends in zip(("x0", "x1"), bounds, strict=True))).mean()
    if outside > 0.5:
        panel.text(0.5, 0.5, f"{100 * outside:.0f} % outside", ha="center", va="center", transform=panel.transAxes)
