"""The section of the page on all methods about the scales that were tried, and which was chosen."""

from collections.abc import Mapping, Sequence

import pandas as pd

from ctrl.methods_page import markdown_table
from ctrl.tables import SHOWN, number
from ctrl.tuning import TOLERANCE


def section(tunings: Sequence[Mapping]) -> str:
    """The sweeps as a section in Markdown; each of `tunings` is what scripts/tune.py writes: method, best, sweep."""
    metrics = [name for name in SHOWN if any(name in row for tuning in tunings for row in tuning["sweep"])]
    best = SHOWN["accuracy" if "accuracy" in metrics else "r2"][0]
    rows = []
    for tuning in tunings:
        for k, row in enumerate(tuning["sweep"]):
            scale = f"**{row['scale']:g}**" if row["scale"] == tuning["best"]["scale"] else f"{row['scale']:g}"
            name = "" if k else f"`{tuning['method']}`"
            rows.append([name, scale, str(row["n"]), *(number(pd.Series(row), metric) for metric in metrics)])
    return "\n".join(
        [
            "## The scales",
            "",
            "All scales of a method drew the same validation prompts and seeds. The bold one was chosen: of those within",
            f"{TOLERANCE:g} of the best {best}, the one with the least {SHOWN['kid_rejection'][0]}. 95 % bootstrap intervals in brackets.",
            "",
            *markdown_table(["method", "scale", "n", *(SHOWN[name][0] for name in metrics)], rows, 1),
        ]
    )
