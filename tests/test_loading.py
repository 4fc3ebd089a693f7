"""Cells of a file: pairs of a subject and one of the file's labels, or one line; where to compute, or one line."""

import pytest

from ctrl import device
from ctrl.errors import UserError
from ctrl.io import write_json
from scripts.cells import load_cells, load_requests, load_training_cells

CELLS = {"labels": [0, 1, 3], "cells": [["coat", 0], ["bag", 1]], "free": [["bag", 3]], "held_out": [0]}


def write(folder, **changes):
    write_json(folder / "cells.json", CELLS | changes)
    return folder / "cells.json"


def test_the_table_asks_for_the_cells_and_training_also_for_what_leaves_factors_free(tmp_path):
    assert load_cells(write(tmp_path)) == [("coat", 0), ("bag", 1)]
    assert load_training_cells(write(tmp_path)) == [("coat", 0), ("bag", 1), ("bag", 3)]
    assert load_training_cells(write(tmp_path), ask_held_out=False) == [("bag", 1), ("bag", 3)]


def test_subjects_that_are_held_out_are_asked_for_in_the_table_alone(tmp_path):
    path = write(tmp_path, cells=[["coat", 0], ["coat", 1], ["bag", 1]], held_out_subjects=["bag"])
    assert load_training_cells(path) == [("coat", 0), ("coat", 1)]
    with pytest.raises(UserError, match="label 1 is possible for bag alone"):
        load_training_cells(write(tmp_path, held_out_subjects=["bag"]))
    path = write(tmp_path, cells=[["coat", 0], ["coat", 1], ["bag", 1]], held_out_subjects=["bag"])
    assert set(load_requests(path, ["a {}"], 3, 0)["prompt"]) == {"a coat"}
    table = load_requests(path, ["a {}"], 3, 0, held_out=True)
    assert set(table["prompt"]) == {"a bag"} and table["label"].tolist() == [1, 1, 1]
    nobody = write(tmp_path)
    assert set(load_requests(nobody, ["{}"], 3, 0, held_out=True)["subject"]) == {"coat", "bag"}, "all, where none is held out"
    with pytest.raises(UserError, match="pair is left to train on; see prompts.held_out"):
        load_training_cells(write(tmp_path, held_out_subjects=["bag", "coat"]))
    with pytest.raises(UserError, match="pair is held out; see prompts.held_out"):
        load_requests(write(tmp_path, held_out_subjects=["hat"]), ["{}"], 3, 0, held_out=True)
    ranges = {"coat": [1.0, 2.0], "bag": [2.0, 3.0]}
    path = write(tmp_path, ranges=ranges, spread={"coat": 0.1, "bag": 0.1}, extrapolation=0.1, held_out_subjects=["bag"])
    assert load_training_cells(path) == [("coat", (1.0, 2.0))]
    assert set(load_requests(path, ["{}"], 3, 0, True, held_out=True)["subject"]) == {"bag"}


@pytest.mark.parametrize("label", [-1, 2, 0.0, 1.5, True, "1", None, [0]])
def test_a_wrong_label_is_one_line(tmp_path, label):
    for load, key in ((load_cells, "cells"), (load_training_cells, "cells"), (load_training_cells, "free")):
        with pytest.raises(UserError, match=r"cells.json: 'coat' asks for label .*, but the labels are 0, 1, 3"):
            load(write(tmp_path, **{key: [["coat", label]]}))


@pytest.mark.parametrize("cell", [["coat"], ["coat", 0, 1], "coat", 0, [0, "coat"]])
def test_a_wrong_cell_is_one_line(tmp_path, cell):
    with pytest.raises(UserError, match="is no pair of a subject and a label"):
        load_cells(write(tmp_path, cells=[cell]))


def test_a_gpu_that_torch_cannot_use_is_one_line_and_no_silent_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DRIVER", tmp_path)
    assert device.device_of({}) == "cpu" and device.device_of({"SLURM_JOB_GPUS": ""}) == "cpu"
    with pytest.raises(UserError, match="this job has GPU 3, but torch .* cannot use it: its driver is too old"):
        device.device_of({"SLURM_JOB_GPUS": "3"})
    monkeypatch.setattr(device, "DRIVER", tmp_path / "none")
    assert device.device_of({"SLURM_JOB_GPUS": "3"}) == "cpu", "another maker's, or none at all"
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    assert device.device_of({"SLURM_JOB_GPUS": "3"}) == "cuda"
