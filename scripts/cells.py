"""What is asked for: cells.json, the (subject, label) pairs of the table and of the training."""

from pathlib import Path

import pandas as pd

from ctrl.errors import UserError
from ctrl.io import read_json
from ctrl.pairs import table_of_cells, table_of_targets


def load_cells(path: Path) -> list[tuple[str, int]]:
    """The (subject, label) pairs of cells.json that the table asks for."""
    cells = read_cells(path)
    return check_cells(cells["cells"], cells["labels"], path)


def read_cells(path: Path) -> dict:
    """cells.json; UserError where it lists no pairs."""
    content = read_json(path)
    if not isinstance(content, dict) or not content.get("ranges", content.get("cells")):
        raise UserError(f"{path} has no (subject, label) pair: run scripts/estimate_cells.py again, with a lower cells.min_probability")
    return content


def of_subjects(cells: dict, held_out: bool, path: Path) -> dict:
    """cells.json for the subjects that are held out, where there are any, or for the others."""
    if not (further := cells.get("held_out_subjects", [])):
        return cells
    chosen = {
        **cells,
        "cells": [cell for cell in cells["cells"] if (cell[0] in further) == held_out],
        "free": [cell for cell in cells.get("free", []) if (cell[0] in further) == held_out],
        "subjects": [subject for subject in cells.get("subjects", []) if (subject in further) == held_out],
    }
    if "ranges" in cells:
        chosen["ranges"] = {subject: limits for subject, limits in cells["ranges"].items() if (subject in further) == held_out}
    if not chosen.get("ranges", chosen["cells"]):
        which = "is held out" if held_out else "is left to train on"
        raise UserError(f"{path}: no (subject, label) pair {which}; see prompts.held_out and cells.min_probability")
    return chosen


def load_requests(
    path: Path, templates: list[str], per_label: int, first_seed: int, beyond: bool = False, held_out: bool = False
) -> pd.DataFrame:
    """The rows that every method is asked for by cells.json; `beyond`: of a continuous label, also targets beyond a subject's range.

    `held_out`: of the subjects that are held out, where there are any.
    """
    cells = of_subjects(read_cells(path), held_out, path)
    if "ranges" not in cells:
        return table_of_cells(check_cells(cells["cells"], cells["labels"], path), templates, per_label, first_seed)
    extrapolation = cells["extrapolation"] if beyond else 0.0
    return table_of_targets(cells["ranges"], cells["spread"], len(cells["labels"]), extrapolation, templates, per_label, first_seed)


def load_training_cells(path: Path, ask_held_out: bool = True) -> list[tuple]:
    """The pairs to train on: with several factors also labels that leave some of them free; held-out combinations if `ask_held_out`.

    Of a continuous label: (subject, (low, high)).
    """
    every = read_cells(path)
    cells = of_subjects(every, False, path)
    if "ranges" in cells:
        return [(subject, tuple(limits)) for subject, limits in cells["ranges"].items()]
    held_out = [] if ask_held_out else cells.get("held_out", [])
    training = [c for c in check_cells(cells["cells"] + cells.get("free", []), cells["labels"], path) if c[1] not in held_out]
    if not training:
        raise UserError(f"{path}: no (subject, label) pair is left to train on; set finetune.ask_held_out, or label.held_out to fewer")
    if lost := sorted({y for _, y in every["cells"]} - {y for _, y in training} - set(held_out)):
        only = ", ".join(sorted({subject for subject, y in every["cells"] if y == lost[0]}))
        raise UserError(
            f"{path}: label {lost[0]} is possible for {only} alone, held out from training; hold out other subjects (prompts.held_out)"
        )
    return training


def check_cells(pairs: list, labels: list[int], path: Path) -> list[tuple[str, int]]:
    """`pairs` as tuples; UserError for the first that is no subject with one of the file's `labels`."""
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{path}: {pair!r} is no pair of a subject and a label; make it again by scripts/estimate_cells.py")
        if type(pair[1]) is not int or pair[1] not in labels:
            raise UserError(f"{path}: {pair[0]!r} asks for label {pair[1]!r}, but the labels are {', '.join(map(str, labels))}")
    return [(subject, label) for subject, label in pairs]
