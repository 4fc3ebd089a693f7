"""Pi(c, y): which prompts are asked for with which labels, in training and in the table.

A label is asked of a subject only where the pretrained model can give it: p_pre(x | c) p(y | x) has no mass to learn from elsewhere.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctrl.errors import UserError

# Seeds of different splits never meet: the images of the table share no noise with those that settings were chosen on.
SEED_OFFSETS = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
STREAM, STREAMS = 20_000, 25  # draws of a prompt by rejection at most, and how many such streams lie between two sets of seeds
NEVER = 1e-6  # the classifier gives a label less often: there is nothing to learn from, and rejection would not end


def stream_of(first_seed: int, number: int) -> range:
    """The seeds that rejection draws from for the `number`-th prompt of a set that begins at `first_seed`: no two streams share one.

    As many as STREAMS fit before the next set of seeds begins; the others lie behind those of all sets.
    """
    first = first_seed + (number % STREAMS) * STREAM + (number // STREAMS) * 10**12
    return range(first, first + STREAM)


def possible_cells(probability: Tensor, subjects: Sequence[str], names: Sequence[str], min_probability: float) -> list[tuple[str, int]]:
    """The (subject, number of the label) pairs with p(y | c) ≥ `min_probability`; `probability` has shape (subjects, labels).

    Raises UserError where a label, of these `names`, is left without a subject; what never occurs is not possible, whatever the minimum.
    """
    least = max(min_probability, NEVER)
    cells = [(s, y) for s, row in zip(subjects, probability.tolist(), strict=True) for y, p in enumerate(row) if p >= least]
    if lost := sorted(set(range(probability.shape[1])) - {y for _, y in cells}):
        raise UserError(
            f"cells.min_probability: no subject gives the label {names[lost[0]]} with probability {least:g} or more "
            f"(by the classifier at most {probability[:, lost[0]].max():.2g}); lower it, or choose other label.edges"
        )
    return cells


def subjects_of(cells: Sequence[tuple[str, int]]) -> dict[int, list[str]]:
    """The subjects that can take each label."""
    by_label: dict[int, list[str]] = {}
    for subject, label in cells:
        by_label.setdefault(int(label), []).append(subject)
    return dict(sorted(by_label.items()))


def possible_ranges(
    scores: dict[str, np.ndarray], quantiles: Sequence[float], bounds: tuple[float, float], num_targets: int, tolerance: float
) -> dict[str, tuple[float, float]]:
    """What each subject is asked for of a continuous label: between two quantiles of its pretrained scores (N,), and within `bounds`.

    Subjects with so narrow a range that `num_targets` even targets would be less than two tolerances apart are left out; UserError where
    none is left.
    """
    ranges = {}
    for subject, values in scores.items():
        low, high = np.quantile(values, quantiles).clip(*bounds).tolist()
        if high - low >= 2 * tolerance * (num_targets - 1) and high > low:
            ranges[subject] = (low, high)
    if not ranges:
        raise UserError(f"label.tolerance: no subject's scores spread enough for {num_targets} targets {2 * tolerance:g} apart; lower it")
    return ranges


def draw(cells: Sequence[tuple], templates: Sequence[str], size: int, generator: torch.Generator) -> tuple[list[str], list[str], Tensor]:
    """`size` training prompts, their subjects, and labels with shape (size,): labels uniform, then subjects, then templates.

    `cells` are (subject, label) pairs; or, of a continuous label, (subject, (low, high)): subjects uniform, then labels in their range.
    """
    if isinstance(cells[0][1], tuple):
        uniform = torch.rand(3, size, generator=generator)
        chosen = [cells[int(u * len(cells))] for u in uniform[0].tolist()]
        low, high = torch.tensor([limits for _, limits in chosen]).T
        prompts = [templates[int(u * len(templates))].format(s) for (s, _), u in zip(chosen, uniform[1].tolist(), strict=True)]
        return prompts, [s for s, _ in chosen], low + uniform[2] * (high - low)
    by_label = subjects_of(cells)
    labels = torch.tensor(list(by_label))[torch.randint(len(by_label), (size,), generator=generator)]
    uniform = torch.rand(2, size, generator=generator).tolist()
    subjects = [by_label[y][int(u * len(by_label[y]))] for y, u in zip(labels.tolist(), uniform[0], strict=True)]
    prompts = [templates[int(u * len(templates))].format(s) for s, u in zip(subjects, uniform[1], strict=True)]
    return prompts, subjects, labels


def table_of_cells(cells: Sequence[tuple[str, int]], templates: Sequence[str], per_label: int, first_seed: int) -> pd.DataFrame:
    """The rows that every method is asked for: columns prompt, subject, label, seed; `per_label` rows a label, subjects in turn.

    The rows with number k of each label share their seed, so that a picture can be compared across labels.
    """
    rows = [
        (
            templates[(k // len(subjects)) % len(templates)].format(subjects[k % len(subjects)]),
            subjects[k % len(subjects)],
            y,
            first_seed + k,
        )
        for y, subjects in subjects_of(cells).items()
        for k in range(per_label)
    ]
    return pd.DataFrame(rows, columns=["prompt", "subject", "label", "seed"])


def table_of_targets(
    ranges: dict[str, Sequence[float]], spread: dict[str, float], num_targets: int, extrapolation: float,
    templates: Sequence[str], per_target: int, first_seed: int,
) -> pd.DataFrame:  # fmt: skip
    """`table_of_cells` for a continuous label: column target, 0 to num_targets - 1, evenly over each subject's range, and label, its value.

    With an `extrapolation` there are also the targets -1 and num_targets, so many widths beyond the range. Column spread is the standard
    deviation of the subject's pretrained scores.
    """
    beyond = [-1, num_targets] if extrapolation else []
    cells = [(subject, k) for subject in ranges for k in [*range(num_targets), *beyond]]
    table = table_of_cells(cells, templates, per_target, first_seed).rename(columns={"label": "target"})
    share = table["target"] / (num_targets - 1)
    share = share.mask(table["target"] < 0, -extrapolation).mask(table["target"] == num_targets, 1 + extrapolation)
    low, high = (np.array([ranges[s][k] for s in table["subject"]]) for k in (0, 1))
    return table.assign(label=low + share * (high - low), spread=[spread[s] for s in table["subject"]])


def table_of_subjects(subjects: Sequence[str], templates: Sequence[str], per_subject: int, first_seed: int) -> pd.DataFrame:
    """Rows without a label (−1): `per_subject` of each subject, templates in turn, every row with its own seed."""
    rows = [(templates[k % len(templates)].format(s), s, -1) for s in subjects for k in range(per_subject)]
    table = pd.DataFrame(rows, columns=["prompt", "subject", "label"])
    return table.assign(seed=range(first_seed, first_seed + len(table)))
