"""The scale of a guided method: one rule for all of them, on validation prompts."""

from collections.abc import Sequence

TOLERANCE = 0.02  # of accuracy, or of R²: what a few hundred images hardly tell apart


def choose_setting(sweep: Sequence[dict]) -> dict:
    """The row that validation prompts choose, by one rule for every method that has a scale to tune.

    Of the settings whose accuracy (of a continuous label: R²) is within TOLERANCE of the best, the one nearest to the exact law by
    `kid_rejection`, of all images together: so few in each prompt and label say next to nothing of the distance within them.
    """
    name = "accuracy" if "accuracy" in sweep[0] else "r2"
    best = max(row[name] for row in sweep)
    return min((row for row in sweep if row[name] >= best - TOLERANCE), key=lambda row: row["kid_rejection"])
