"""How far a judge (see ctrl.judge) is to be trusted: in figures, and in words."""

from collections.abc import Mapping, Sequence

PREFIX = "judge_"


def figures(factors: Sequence[Mapping]) -> dict[str, dict]:
    """judge_accuracy_{oracle}, or judge_r2_{oracle}: {value, lo, hi, n} of each factor of report.json that a judge measures."""
    return {f"{PREFIX}{name}_{f['oracle']}": figure for f in factors for name, figure in f.get("judge_quality", {}).items()}


def words(found: Mapping[str, Mapping]) -> list[str]:
    """A sentence on each of these figures; an interval that was not measured is left out."""
    sentences = []
    for key, figure in found.items():
        measure, oracle = key.removeprefix(PREFIX).split("_", 1)
        interval = f" [{figure['lo']:.3f}, {figure['hi']:.3f}]" if {"lo", "hi"} <= figure.keys() else ""
        sentences.append(
            f"{oracle} is what people said. Of generated images a judge says it, which learned from labelled images that no other had; on "
            f"further ones its {'R²' if measure == 'r2' else measure} is {figure['value']:.3f}{interval}."
        )
    return sentences
