"""The doctor on a label that is a number: requests by thirds, the density's errors by hand, and every trainer measured."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import doctor, doctor_numbers, io
from ctrl.classifier import Density
from ctrl.classifier_fit import fit
from ctrl.config import merge, resolve
from ctrl.labels import Continuous, Factors
from scripts.common import DEFAULTS, SCHEMA, read_yaml
from scripts.costs import trainer_cost
from tests.conftest import SUBJECTS
from tests.test_doctor import network, script  # noqa: F401 (a fixture)

SPACE = Continuous(low=0.2, high=0.8, mean=0.5, sd=0.2, extrapolation=0.1, tolerance=0.05, oracle="brightness", unit="kB")


def density(seed: int = 0) -> Density:
    """A density of the brightness, (mean of the pixels + 1) / 2, whose sd is that of noise of 0.1."""
    torch.manual_seed(seed)
    grid = torch.linspace(0, 255, 64)
    images = (grid[:, None, None, None] + 40 * torch.randn(64, 3, 16, 16)).clamp(0, 255).byte()
    scores = images.double().mean((1, 2, 3)) / 255
    settings = {"num_epochs": 60, "batch_size": 16, "learning_rate": 3e-3, "weight_decay": 0.0}
    splits = ["train", "train", "val", "calibration"] * 16
    return fit(images, scores, scores, splits, {"network": "pixels", "head": "gaussian"}, settings, seed=0)[0]


def test_requests_by_thirds():
    group, names = doctor_numbers.thirds(torch.tensor([0.9, 0.1, 0.5, 0.2, 0.6, 0.8]), "kB")
    assert group.tolist() == [2, 0, 1, 0, 1, 2]
    assert names == {0: "lowest third, 0.1 to 0.2 kB", 1: "middle third, 0.5 to 0.6 kB", 2: "highest third, 0.8 to 0.9 kB"}
    assert doctor_numbers.thirds(torch.tensor([0.5, 0.5]), "")[1] == {0: "lowest third, 0.5 to 0.5"}, "one request"


def test_a_guess_is_the_law_of_the_labelled_images():
    y = torch.tensor([0.5, 0.9])
    expected = torch.distributions.Normal(0.5, 0.2).log_prob(y).double()
    assert torch.allclose(doctor_numbers.guess(SPACE, y), expected, atol=1e-6)


def numbers(mean, sd, scores) -> dict:
    mean, scores = torch.tensor(mean, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)
    return doctor_numbers.error_report((mean, torch.full_like(mean, sd)), scores)


def test_errors_by_hand():
    report = numbers([0.0, 1.0, 2.0, 3.0], 1.0, [0.0, 1.0, 2.0, 5.0])
    assert report["n"] == 4 and report["rmse"] == pytest.approx(1.0) and report["spread"] == pytest.approx(3.5**0.5)
    assert report["r2"] == pytest.approx(1 - 1 / 3.5) and report["coverage_80"] == 0.75


@pytest.mark.parametrize(
    ("mean", "sd", "held_out", "bad", "text"),
    [
        ([3.0, 2.0, 1.0, 0.0], 1.0, 0.9, True, "it knows no more of them than their mean"),
        ([0.2, 1.1, 1.9, 2.8], 0.2, 0.99, False, None),
        ([1.0, 1.2, 1.8, 2.0], 1.0, 0.95, False, "R² 0.584 on 100 generated images, 0.950 on 50 held-out ones"),
        ([0.5, 1.5, 2.5, 3.5], 0.01, 0.8, False, "80 % intervals hold 0.000 of 100 generated images' scores: its sd is too narrow"),
        ([0.1, 1.0, 2.0, 3.0], 50.0, 0.99, False, "hold 1.000 of 100 generated images' scores: its sd is too wide"),
    ],
)
def test_what_is_wrong_with_a_density(mean, sd, held_out, bad, text):
    generated = numbers(mean * 25, sd, [0.0, 1.0, 2.0, 3.0] * 25)
    if text is None or ("intervals" not in text and "hold 1" not in text):
        generated["coverage_80"] = 0.8
    lines = doctor_numbers.error_findings(generated, {"n": 50, "r2": held_out}, "kB")
    assert [(f.bad, text in f.text) for f in lines] == ([] if text is None else [(bad, True)]), [f.text for f in lines]


def test_images_of_one_score_teach_nothing():
    (finding,) = doctor_numbers.error_findings(numbers([1.0, 1.0], 1.0, [2.0, 2.0]), {"n": 9, "r2": 0.9}, "kB")
    assert finding.bad and "have the same score" in finding.text


def test_pieces_of_two_kinds_of_label(base):
    lines = [f.text for f in doctor.check_pieces(base, network(2), SPACE, [("coat", 0)])]
    assert "its label is of classes, the dataset's is a number" in lines[0] and lines[1].startswith("cells: their label is of classes")
    lines = [f.text for f in doctor.check_pieces(base, density(), Factors.of(2), [("coat", (0.3, 0.5))])]
    assert "its label is a number, the dataset's is of classes" in lines[0] and lines[1].startswith("cells: their label is a number")
    assert doctor.check_pieces(base, density(), SPACE, [("coat", (0.2, 0.8))]) == []
    (line,) = doctor.check_pieces(base, density(), SPACE, [("coat", (0.2, 0.9))])
    assert "they ask for 0.9, but the dataset has 0.14 to 0.86" in line.text


@pytest.fixture
def numbered(script, tmp_path):  # noqa: F811 (the fixture)
    """The same script, where the label is the brightness itself."""
    report = io.read_json(tmp_path / "dataset/report.json") | {"kind": "continuous", **asdict(SPACE), "unit": ""}
    io.write_json(tmp_path / "dataset/report.json", report)
    table = io.read_parquet(tmp_path / "dataset/metadata.parquet")
    scores = [np.asarray(Image.open(path)).mean() / 255 for path in table["path"]]
    io.write_parquet(tmp_path / "dataset/metadata.parquet", table.assign(label=scores))
    cells = {"labels": [0, 1], "cells": [[s, 0] for s in SUBJECTS], "ranges": {s: [0.3, 0.7] for s in SUBJECTS}, "extrapolation": 0.1}
    io.write_json(tmp_path / "cells.json", cells)
    config = io.read_json(tmp_path / "config.json")
    io.write_json(tmp_path / "config.json", config | {"label": {"kind": "continuous"}, "classifier": {"head": "gaussian"}})
    return script


def test_a_density_is_examined(numbered, tmp_path):
    numbered(density(), "--json", str(tmp_path / "report.json"))
    report = io.read_json(tmp_path / "report.json")
    assert report["finite_differences"]["passed"] and report["errors"]["generated"]["n"] == 4
    assert sum(row["n"] for row in report["gradients"]["labels"].values()) == 4
    assert all("third, 0." in row["name"] for row in report["gradients"]["labels"].values())


@pytest.mark.parametrize("trainer", ["backprop", "adjoint", "efficient_adjoint", "policy_gradient", "supervised"])
def test_every_trainer_of_a_number_is_measured(numbered, tmp_path, trainer):
    classifiers.save(tmp_path / "classifier", density())
    args = SimpleNamespace(num_threads=1, **{name.split(".")[0]: tmp_path / name for name in ("classifier", "cells.json", "dataset")})
    own = {"finetune": {"min_timestep": 600}}  # the last step is the pretrained model's
    config = resolve(merge(read_yaml(DEFAULTS), io.read_json(tmp_path / "config.json"), own), io.read_json(SCHEMA))
    cost = trainer_cost(doctor.recipes(config, True)[trainer], args)
    assert cost["seconds_per_update"] > 0 and cost["batch_size"] >= 1
