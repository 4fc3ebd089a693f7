"""Cells of a file: pairs of a subject and one of the file's labels, or one line."""

import pytest

from ctrl.errors import UserError
from ctrl.io import write_json
from scripts.cells import load_cells, load_training_cells

CELLS = {"labels": [0, 1, 3], "cells": [["coat", 0], ["bag", 1]], "free": [["bag", 3]], "held_out": [0]}


def write(folder, **changes):
    write_json(folder / "cells.json", CELLS | changes)
    return folder / "cells.json"


def test_the_table_asks_for_the_cells_and_training_also_for_what_leaves_factors_free(tmp_path):
    assert load_cells(write(tmp_path)) == [("coat", 0), ("bag", 1)]
    assert load_training_cells(write(tmp_path)) == [("coat", 0), ("bag", 1), ("bag", 3)]
    assert load_training_cells(write(tmp_path), ask_held_out=False) == [("bag", 1), ("bag", 3)]


@pytest.mark.parametrize("label", [-1, 2, 0.0, 1.5, True, "1", None, [0]])
def test_a_wrong_label_is_one_line(tmp_path, label):
    for load, key in ((load_cells, "cells"), (load_training_cells, "cells"), (load_training_cells, "free")):
        with pytest.raises(UserError, match=r"cells.json: 'coat' asks for label .*, but the labels are 0, 1, 3"):
            load(write(tmp_path, **{key: [["coat", label]]}))


@pytest.mark.parametrize("cell", [["coat"], ["coat", 0, 1], "coat", 0, [0, "coat"]])
def test_a_wrong_cell_is_one_line(tmp_path, cell):
    with pytest.raises(UserError, match="is no pair of a subject and a label"):
        load_cells(write(tmp_path, cells=[cell]))
