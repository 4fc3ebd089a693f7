"""Pi(c, y): which prompts are asked for with which labels, in training and in the table.

A label is asked of a subject only where the pretrained model can give it: p_pre(x | c) p(y | x) has no mass to learn from elsewhere.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from ctrl.errors import UserError

# Seeds of different splits never meet: the images of the table share no noise with those that settings were chosen on.
SEED_OFFSETS = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
NEVER = 1e-6  # the classifier gives a label less often: there is nothing to learn from, and rejection would not end


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


def draw(
    cells: Sequence[tuple[str, int]], templates: Sequence[str], size: int, generator: torch.Generator
) -> tuple[list[str], list[str], Tensor]:
    """`size` training prompts, their subjects, and labels with shape (size,): labels uniform, then subjects, then templates."""
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


def table_of_subjects(subjects: Sequence[str], templates: Sequence[str], per_subject: int, first_seed: int) -> pd.DataFrame:
    """Rows without a label (−1): `per_subject` of each subject, templates in turn, every row with its own seed."""
    rows = [(templates[k % len(templates)].format(s), s, -1) for s in subjects for k in range(per_subject)]
    table = pd.DataFrame(rows, columns=["prompt", "subject", "label"])
    return table.assign(seed=range(first_seed, first_seed + len(table)))


def choose_setting(sweep: Sequence[dict], tolerance: float = 0.02) -> dict:
    """The row that validation prompts choose, by one rule for every method.

    Of the settings whose accuracy is within `tolerance` of the best, the one nearest to the exact law (`kid_rejection_within`).
    """
    best = max(row["accuracy"] for row in sweep)
    return min((row for row in sweep if row["accuracy"] >= best - tolerance), key=lambda row: row["kid_rejection_within"])
