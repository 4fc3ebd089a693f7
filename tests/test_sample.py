"""scripts/sample.py: a run that was cut off is gone on with, and only where it would draw the same images."""

import pytest

from ctrl.errors import UserError
from ctrl.io import write_json
from scripts import sample
from tests.test_strength import draw

CELLS = {"labels": [0, 1, 2], "cells": [["coat", 0], ["bag", 0], ["bag", 2]]}


@pytest.fixture
def asked(tiny_sd, tmp_path):
    """Six images of the pretrained model, two at a time."""
    config = {
        "base": {"path": str(tiny_sd)}, "sampler": {"num_steps": 3, "batch_size": 2},
        "prompts": {"subjects": ["coat", "bag"], "templates": {"train": ["{}"], "val": ["a {}"], "test": ["{}"]}},
    }  # fmt: skip
    write_json(tmp_path / "c.json", config)
    write_json(tmp_path / "cells.json", CELLS)
    return config


def drawn(monkeypatch, tmp_path, output, fail_after=99):
    """What `draw` gives, and the prompts of the images that went through the model before the run ended, or was ended."""
    seen, generate = [], sample.generate

    def counting(base, part, *arguments):
        if len(seen) == fail_after:
            raise UserError("cut off")
        seen.append(part["prompt"].tolist())
        yield from generate(base, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", counting)
        try:
            return draw(patch, tmp_path, output, "--method", "pretrained"), seen
        except UserError as error:
            assert "cut off" in str(error)
            return None, seen


def test_a_run_that_was_cut_off_draws_only_what_is_missing(asked, tmp_path, monkeypatch):
    (expected, table), parts = drawn(monkeypatch, tmp_path, "whole")
    assert len(expected) == 6 and len(parts) == 3
    assert drawn(monkeypatch, tmp_path, "cut", fail_after=2) == (None, parts[:2]) and not (tmp_path / "cut").exists()
    (images, again), rest = drawn(monkeypatch, tmp_path, "cut")
    assert rest == parts[2:] and images == expected, "the other images are not drawn again, and all are the same, bit for bit"
    assert again.drop(columns="seconds").equals(table.drop(columns="seconds"))
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert left == ["images", "samples.json", "samples.parquet"], "nothing that only the run needed"


def test_what_another_run_left_is_not_gone_on_with(asked, tmp_path, monkeypatch):
    drawn(monkeypatch, tmp_path, "cut", fail_after=2)
    write_json(tmp_path / "c.json", asked | {"sampler": asked["sampler"] | {"num_steps": 4}})
    (images, table), parts = drawn(monkeypatch, tmp_path, "cut")
    assert len(parts) == 3 and (table["nfe_forward"] == 4).all() and len(images) == 6
