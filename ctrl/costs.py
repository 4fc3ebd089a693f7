"""What an update costs each recipe, beside the published one: ratios, and a table to print."""

from collections.abc import Mapping, Sequence

PUBLISHED = "published"  # the recipe that the others are compared with
COLUMNS = {  # of the printed table: what a row's key is called there, and how it is written
    "name": ("recipe", "{}"), "trainer": ("trainer", "{}"), "num_steps": ("steps", "{}"), "batch_size": ("trajectories an update", "{}"),
    "seconds_per_update": ("s / update", "{:.2f}"), "seconds_per_trajectory": ("s / trajectory", "{:.4f}"),
    "unet_forward": ("forward / update", "{:.0f}"), "unet_backward": ("backward / update", "{:.0f}"),
    "peak_memory_mb": ("peak memory / MB", "{:.0f}"), "memory_before_mb": ("of it before training", "{:.0f}"),
    "training_memory_mb": ("of it by training", "{:.0f}"), "speedup_vs_published": ("speedup vs published", "{:.2f}"),
    "memory_vs_published": ("memory ÷ published", "{:.2f}"), "training_memory_vs_published": ("memory by training ÷ published", "{:.2f}"),
}  # fmt: skip


def with_ratios(rows: Sequence[Mapping]) -> list[dict]:
    """Each row with the memory that training added, and its ratios to the published recipe at the same number of steps.

    A process holds much memory before it trains (libraries, the model), whatever the trainer: `training_memory_mb` is the growth of the
    peak. A ratio to nothing is None.
    """
    rows = [{**row, "training_memory_mb": row["peak_memory_mb"] - row["memory_before_mb"]} for row in rows]
    published = {row["num_steps"]: row for row in rows if row["name"] == PUBLISHED}
    return [
        row
        | {
            "speedup_vs_published": _ratio(published[row["num_steps"]], row, "seconds_per_update"),
            "memory_vs_published": _ratio(row, published[row["num_steps"]], "peak_memory_mb"),
            "training_memory_vs_published": _ratio(row, published[row["num_steps"]], "training_memory_mb"),
        }
        for row in rows
    ]


def _ratio(one: Mapping, other: Mapping, key: str) -> float | None:
    return one[key] / other[key] if other[key] else None


def to_markdown(rows: Sequence[Mapping]) -> str:
    """The rows of `with_ratios` as a table."""
    lines = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    for row in rows:
        cells = ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
