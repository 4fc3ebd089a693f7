"""Evaluation of synthetic samples whose figures are known, and of broken ones."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import errors, evaluation, features
from ctrl.errors import UserError
from ctrl.io import write_json, write_parquet
from scripts import evaluate

ROOT = Path(__file__).resolve().parent.parent
REPORT = {
    "oracle": "brightness",
    "edges": [0.25, 0.5, 0.75],
    "descending": False,
    "num_classes": 4,
    "label_names": list("abcd"),
    "unit": "",
}
CONFIG = {"num_bootstrap": 50, "num_neighbours": 3}
SUBJECTS = ["bag", "coat"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return features.GarmentNet(SUBJECTS, [4, 4, 8]).eval()


def write_samples(folder, measured, requested, first_seed=0, noise=20.0):
    """One picture for each subject and label, of noise around the brightness of the measured label."""
    rng = np.random.default_rng(first_seed)
    rows = []
    (folder / "images").mkdir(parents=True)
    for k, (have, want) in enumerate(zip(measured, requested, strict=True)):
        pixels = (have + 0.5) / 4 * 255 + noise * rng.standard_normal((8, 8, 1)).repeat(3, axis=2)
        Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(folder / f"images/{k:06d}.png")
        subject = SUBJECTS[k % 2]
        rows.append(
            {"file_name": f"images/{k:06d}.png", "prompt": f"a {subject}", "subject": subject, "label": want, "seed": first_seed + k}
        )
    table = pd.DataFrame(rows).assign(nfe_forward=10.0, nfe_backward=0.0, seconds=np.repeat([0.1, 0.3], len(rows) // 2))
    write_parquet(folder / "samples.parquet", table)
    write_json(folder / "samples.json", {"method": "m", "train_seconds": 12.5, "var_log_w": None})
    return folder


REQUESTED = np.arange(4).repeat(2).tolist() * 6  # 48 images, 6 a cell


@pytest.fixture
def folders(tmp_path):
    measured = REQUESTED.copy()
    measured[:8] = [0, 0, 0, 0, 2, 2, 3, 3]  # two requests for label 1 give 0
    return write_samples(tmp_path / "m", measured, REQUESTED), write_samples(tmp_path / "reference", REQUESTED, REQUESTED, 1000)


def load(folders):
    return [evaluation.load_samples(f, "brightness", 4) for f in folders]


def test_a_reference_is_held_against_the_cells_that_were_asked_for(folders):
    samples, reference = load(folders)
    few = evaluation.rows_of(samples, (samples.table["label"] < 2).to_numpy())
    with pytest.raises(UserError, match="has none; draw both with the same cells"):
        evaluation.number_cells(few, reference)
    chosen = evaluation.in_cells_of(reference, few.table)
    assert len(chosen.images) == len(chosen.table) == 24 and set(chosen.table["label"]) == {0, 1}
    assert [len(part) for part in evaluation.number_cells(few, chosen)] == [24, 24]


def test_figures(folders, network):
    result = evaluation.evaluate(*load(folders), network, REPORT, CONFIG)
    figures = result["metrics"]
    assert result["n"] == 48
    assert figures["accuracy"]["value"] == pytest.approx(46 / 48)
    assert figures["accuracy"]["lo"] < 46 / 48 < figures["accuracy"]["hi"] <= 1 and figures["accuracy"]["n"] == 48
    assert figures["macro_f1"]["value"] == pytest.approx((24 / 26 + 20 / 22 + 2) / 4)
    assert result["confusion"] == [[12, 0, 0, 0], [2, 10, 0, 0], [0, 0, 12, 0], [0, 0, 0, 12]]
    assert result["per_subject"] == {"bag": {"accuracy": 23 / 24, "n": 24}, "coat": {"accuracy": 23 / 24, "n": 24}}
    misses = result["misses"]
    assert misses["n"] == 2 and 0.1 < misses["median"] <= misses["largest"] < 0.15, "brightness 1/8, half a bin below label 1"
    assert figures["nfe_forward"] == {"value": 10, "n": 48, "lo": None, "hi": None}
    assert figures["nfe"]["value"] == 10
    assert figures["seconds_per_image"]["value"] == pytest.approx(0.2)
    assert figures["seconds_per_image"]["lo"] == pytest.approx(0.1) and figures["seconds_per_image"]["hi"] == pytest.approx(0.3)
    assert figures["train_seconds"]["value"] == 12.5
    assert not {"var_log_w", "frechet_distance", "clip_score"} & set(figures)
    assert {"precision", "recall", "prompt_accuracy", "diversity", "kid_rejection", "kid_rejection_within"} <= set(figures)
    assert 0.7 < figures["diversity"]["value"] < 1.5
    json.dumps(result, allow_nan=False)


def test_frechet_distance_from_2000_images_on(folders, network, monkeypatch):
    monkeypatch.setattr(evaluation, "MIN_FRECHET", 48)
    figures = evaluation.evaluate(*load(folders), network, REPORT, CONFIG)["metrics"]
    assert figures["frechet_distance"]["value"] > 0 and figures["frechet_distance"]["lo"] is None


def test_collapse_and_wrong_labels_show(folders, tmp_path, network):
    collapsed = write_samples(tmp_path / "collapsed", REQUESTED, REQUESTED, 2000, noise=1.0)
    swapped = write_samples(tmp_path / "swapped", [3 - y for y in REQUESTED], REQUESTED, 3000)
    right = write_samples(tmp_path / "right", REQUESTED, REQUESTED, 4000)
    reference = evaluation.load_samples(folders[1], "brightness", 4)
    figures = {}
    for folder in (collapsed, swapped, right):
        samples = evaluation.load_samples(folder, "brightness", 4)
        figures[folder.name] = evaluation.evaluate(samples, reference, network, REPORT, CONFIG)["metrics"]
    assert figures["collapsed"]["accuracy"]["value"] == 1
    assert figures["collapsed"]["diversity"]["value"] < 0.3
    assert figures["right"]["diversity"]["value"] > 0.8
    assert figures["swapped"]["accuracy"]["value"] == 0
    floor = figures["right"]["kid_rejection_within"]["hi"]
    assert figures["swapped"]["kid_rejection_within"]["value"] > floor


def test_costs_of_rejection_have_an_interval():
    table = pd.DataFrame({"nfe_forward": [10.0, 40.0] * 20, "nfe_backward": 0.0, "seconds": np.linspace(1, 2, 40)})
    figures = evaluation.costs(table, {"kl_nats": {"value": 1.4, "n": 40, "lo": 1.3, "hi": 1.5}}, 200, 0)
    assert figures["nfe_forward"]["value"] == 25 and 18 < figures["nfe_forward"]["lo"] < 25 < figures["nfe_forward"]["hi"] < 32
    assert figures["nfe_backward"]["lo"] is None
    assert figures["kl_nats"] == {"value": 1.4, "n": 40, "lo": 1.3, "hi": 1.5}


def test_the_last_effective_sample_size_is_the_one_that_an_image_is_drawn_by():
    table = pd.DataFrame({"effective_sample_size": [[8.0, 2.0], [8.0, 4.0]] * 20})
    found = evaluation.costs(table, {}, 200, 0)["effective_sample_size"]
    assert found["value"] == 3 and 2 < found["lo"] < 3 < found["hi"] < 4 and found["n"] == 40


def test_the_paths_of_a_seed_are_resampled_together():
    values, table = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], pd.DataFrame({"seed": range(6)})
    paths = {"value": 2.0, "n": 6, "values": values}
    together = evaluation.costs(table, {"kl_nats": paths | {"seeds": [0, 0, 1, 1, 2, 2]}}, 400, 0)["kl_nats"]
    apart = evaluation.costs(table, {"kl_nats": paths | {"seeds": [0, 1, 2, 3, 4, 5]}}, 400, 0)["kl_nats"]
    assert set(together) == {"value", "n", "lo", "hi"} and together["value"] == 2 and together["n"] == 6
    assert 1 <= together["lo"] < apart["lo"] < 2 < apart["hi"] < together["hi"] <= 3


def edit(folder, **columns):
    path = folder / "samples.parquet"
    write_parquet(path, pd.read_parquet(path).assign(**columns))


def test_mistakes_are_told_in_one_line(folders, tmp_path, network):
    folder, reference = folders
    with pytest.raises(UserError, match="no folder of samples"):
        evaluation.load_samples(tmp_path / "none", "brightness", 4)
    with pytest.raises(UserError, match="asks for label 3, but the dataset has the labels 0 to 2"):
        evaluation.load_samples(folder, "brightness", 3)
    edit(reference, label=0.5)
    with pytest.raises(UserError, match="its labels are float64, not whole numbers"):
        evaluation.load_samples(reference, "brightness", 4)
    edit(reference, label=REQUESTED)
    samples, right = load(folders)
    with pytest.raises(UserError, match="compared with itself"):
        evaluation.evaluate(samples, samples, network, REPORT, CONFIG)
    samples.table.loc[samples.table["label"] == 2, "label"] = 1
    with pytest.raises(UserError, match="reference has images of 'bag' with label 2, .*/m has none"):
        evaluation.evaluate(samples, right, network, REPORT, CONFIG)
    edit(reference, seed=range(40, 88))
    with pytest.raises(UserError, match="share seeds"):
        evaluation.evaluate(*load(folders), network, REPORT, CONFIG)
    (folder / "images/000003.png").unlink()
    with pytest.raises(UserError, match="000003.png"):
        load(folders)
    write_parquet(folder / "samples.parquet", pd.read_parquet(folder / "samples.parquet").drop(columns="subject"))
    with pytest.raises(UserError, match="no column subject"):
        load(folders)
    write_parquet(folder / "samples.parquet", pd.read_parquet(reference / "samples.parquet").iloc[:0])
    with pytest.raises(UserError, match="no rows"):
        load(folders)
    (folder / "samples.parquet").unlink()
    with pytest.raises(UserError, match=r"samples.parquet is missing"):
        load(folders)


def test_too_few_images_for_the_distances(tmp_path, network):
    few = [write_samples(tmp_path / name, range(4), range(4), seed) for name, seed in (("m", 0), ("reference", 10))]
    with pytest.raises(UserError, match="images_per_label"):
        evaluation.evaluate(*load(few), network, REPORT, CONFIG)


class NoTracking:
    """Stands in for MLflow."""

    def __init__(self, *args):
        self.logged = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def log_metrics(self, values, step=0):
        self.logged |= values

    def log_artifact(self, path):
        assert path.exists()


def test_the_script(folders, tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "dataset/report.json", REPORT)
    write_json(tmp_path / "adapter/adapter.json", {"train_seconds": 99.0, "peak_memory_mb": 500.0})
    write_json(tmp_path / "config.json", {"evaluation": {"num_bootstrap": 20, "features": str(ROOT / "resources/garments")}})
    monkeypatch.setattr(evaluate, "run", NoTracking)

    def call(reference, output):
        given = {
            "config": tmp_path / "config.json", "method": "m", "samples": folders[0], "reference": reference,
            "dataset": tmp_path / "dataset", "adapter": tmp_path / "adapter", "output": output,
        }  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *(str(word) for name, value in given.items() for word in (f"--{name}", value))])
        errors.main(evaluate.main)

    call(folders[1], tmp_path / "m.json")
    assert "m (n = 48): accuracy 0.9583" in capsys.readouterr().out
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["method"] == "m" and result["metrics"]["peak_memory_mb"]["value"] == 500
    with pytest.raises(SystemExit) as exit:
        call(folders[0], tmp_path / "n.json")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "n.json").exists()


def test_cells_are_labels_where_the_images_are_too_few_for_subjects(tmp_path):
    few = [write_samples(tmp_path / name, [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3], seed) for name, seed in (("m", 0), ("r", 10))]
    own, right = evaluation.number_cells(*load(few))
    assert own.tolist() == right.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    many = [write_samples(tmp_path / name, REQUESTED, REQUESTED, seed) for name, seed in (("many", 0), ("many_r", 100))]
    own, right = evaluation.number_cells(*load(many))
    assert own.tolist() == right.tolist() and own.bincount().tolist() == [6] * 8


def test_accuracy_of_each_factor_and_of_what_is_held_out():
    factor = {"num_classes": 2, "label_names": ["high", "low"]}
    report = {"factors": [factor | {"oracle": "jpeg_size"}, factor | {"oracle": "brightness"}], "held_out": [1]}
    requested, measured = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 1, 3, 3, 3])
    figures = evaluation.accuracies_of_factors(requested, measured, report, lambda f: {"value": f(torch.arange(5)), "n": 5})
    assert figures["accuracy_jpeg_size"]["value"] == pytest.approx(4 / 5), "1 asks for 0, 3 has 1"
    assert figures["accuracy_brightness"]["value"] == pytest.approx(4 / 5), "2 asks for 0, 3 has 1"
    assert figures["accuracy_held_out"] == {"value": 0.5, "n": 2}
    assert "accuracy_held_out" not in evaluation.accuracies_of_factors(requested, measured, report | {"held_out": []}, lambda f: {})


def test_two_factors_from_images(tmp_path, network):
    """Whatever their size, pictures as bright as asked for are right in that factor."""
    names = {"num_classes": 2, "label_names": ["high", "low"], "unit": ""}
    size = names | {"oracle": "jpeg_size", "edges": [1e-3], "descending": True}  # all are larger: label 0
    shade = names | {"oracle": "brightness", "edges": [0.5], "descending": True}
    report = {"factors": [size, shade], "num_classes": 4, "held_out": []}
    requested = [0, 1, 2, 3] * 12
    measured = [0 if y % 2 else 3 for y in requested]  # dark where brightness is asked to be low
    folders = [write_samples(tmp_path / name, measured, requested, seed) for name, seed in (("own", 0), ("reference", 1000))]
    own, reference = (evaluation.load_samples(f, ["jpeg_size", "brightness"], 4) for f in folders)
    result = evaluation.evaluate(own, reference, network, report, CONFIG)
    assert result["metrics"]["accuracy_brightness"]["value"] == 1 and result["metrics"]["accuracy_jpeg_size"]["value"] == 0.5
    assert result["metrics"]["accuracy"]["value"] == 0.5 and result["misses"]["jpeg_size"]["n"] == 24
    assert result["misses"]["brightness"] == {"n": 0}
