"""The proof's table and picture: every method's samples beside the exact ones, with its distance over that of two exact sets."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctrl.figures.style import method_name, save

COLUMNS = {
    "sliced_wasserstein": "sliced Wasserstein", "sliced_wasserstein_se": "± ", "wasserstein_ratio": "÷ floor",
    "total_variation": "total variation", "total_variation_se": "±  ", "variation_ratio": "÷ floor ", "kl_nats": "KL / nats",
    "var_log_w": "var log w", "scale": "scale", "train_seconds": "train / s", "n": "n a set", "sets": "sets",
}  # fmt: skip


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
    """A row a label, a column a method: histograms of the first two coordinates at `gamma`, all on the exact samples' scale."""
    first = next(iter(samples.values()))
    labels = sorted(first["label"].unique())
    exact = first[first["gamma"] == gamma]
    bounds = [tuple(exact[c].quantile([0.0, 1.0]) + np.array([-0.5, 0.5])) for c in ("x0", "x1")]
    ratios = table[table["gamma"] == gamma].set_index("method").get("wasserstein_ratio", pd.Series(dtype=float))
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": True}):
        figure = Figure(figsize=(1.5 * len(samples), 1.5 * len(labels) + 0.5), layout="constrained")
        axes = figure.subplots(len(labels), len(samples), squeeze=False)
        for column, (method, drawn) in enumerate(samples.items()):
            for row, y in enumerate(labels):
                part = drawn[(drawn["label"] == y) & (drawn["gamma"] == gamma)]
                right = exact[exact["label"] == y]
                counts, *_ = np.histogram2d(right["x0"], right["x1"], bins=num_cells, range=bounds)
                panel = axes[row, column]
                panel.hist2d(part["x0"], part["x1"], bins=num_cells, range=bounds, cmap="magma_r", vmin=0, vmax=counts.max())
                panel.set(xticks=[], yticks=[], aspect="auto")
                if column == 0:
                    panel.set_ylabel(f"label {y}")
                if row == 0:
                    ratio = ratios.get(method, np.nan)
                    panel.set_title(method_name(method) + (f"\n{ratio:.1f} × floor" if np.isfinite(ratio) else "\n"), fontsize=8)
        figure.suptitle(f"p(x | y) at γ = {gamma:g}", fontsize=9)
        save(figure, output)
