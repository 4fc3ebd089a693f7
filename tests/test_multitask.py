"""The whole chain with two factors, on few images and steps: each factor has its column, and nothing is trained on what is held out."""

import csv
import json

import pandas as pd
import pytest

from tests.repository import copy_repository, snakemake

pytestmark = pytest.mark.slow
SMALL = """
experiment: smoke_multitask
label: {num_classes: 2}
cells: {min_probability: 0.1}
evaluation: {images_per_label: 6}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    repository = copy_repository(tmp_path_factory.mktemp("multitask") / "repository")
    (repository / "config" / "small.yaml").write_text(SMALL)
    files = [f"config/{name}.yaml" for name in ("smoke", "multitask", "small")]
    done = snakemake(repository, "all", "--cores", "2", "--configfile", *files, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    return repository / "results" / "smoke_multitask"


def test_table_has_each_factor_and_what_is_held_out(results):
    rows = {row["method"]: row for row in csv.DictReader((results / "tables" / "results.csv").open())}
    names = ("accuracy", "accuracy_jpeg_size", "accuracy_brightness", "accuracy_held_out")
    assert all(float(rows["rejection"][name]) == 1 for name in names)
    assert all(0 <= float(row[name]) <= 1 for row in rows.values() for name in names)
    assert float(rows["ctrl"]["accuracy"]) <= min(float(rows["ctrl"][name]) for name in names[1:3])
    assert (results / "figures" / "factors.png").is_file()


def test_the_held_out_combination_is_in_no_training(results):
    table, cells = pd.read_parquet(results / "dataset" / "metadata.parquet"), json.loads((results / "cells.json").read_text())
    assert set(table.loc[table["label"] == 1, "split"]) == {"held_out"} and cells["held_out"] == [1]
    assert 1 in {label for _, label in cells["cells"]}, "the table asks for it"
    assert min(label for _, label in cells["free"]) > 4, "behind the combinations and the null label"
    adapter = json.loads((results / "adapters" / "ctrl" / "adapter.json").read_text())
    assert adapter["num_classes"] == [2, 2] and list(adapter["factors"]) == ["jpeg_size", "brightness"]
