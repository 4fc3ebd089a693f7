"""The scripts of the offline dataset, as a user runs them."""

import json
import os
import sys
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctrl import errors, io, tracking
from scripts import build_dataset, unpack_images
from tests.test_data import write_folder
from tests.test_garments import write_idx


class Recorder:
    """Stands in for an MLflow run."""

    def __init__(self):
        self.metrics, self.artifacts = {}, []

    def log_metrics(self, metrics: dict, step: int = 0) -> None:
        self.metrics |= metrics

    def log_artifact(self, path) -> None:
        assert path.exists()
        self.artifacts.append(path.name)


@pytest.fixture
def recorder(monkeypatch):
    current = Recorder()

    @contextmanager
    def run(params, experiment, name, tags=None, tracking_uri=None):
        yield current

    monkeypatch.setattr(tracking, "run", run)
    return current


@pytest.fixture
def call(monkeypatch, tmp_path, recorder):
    """Runs a script in an empty folder with a config of 8x8 images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dataset": {"image_size": 8}}))

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--config", "config.json", *args])
        errors.main(script.main)

    return call


def test_dataset_of_a_folder(call, tmp_path, recorder):
    write_folder(tmp_path / "images", 120)
    (tmp_path / "images" / "broken.png").write_bytes(b"x")
    call(build_dataset, "--images", "images", "--output", "out/dataset")
    folder = tmp_path / "out" / "dataset"
    assert sorted(os.listdir(folder)) == ["histogram.png", "metadata.parquet", "report.json"]
    report, table = io.read_json(folder / "report.json"), io.read_parquet(folder / "metadata.parquet")
    assert report["refused"] == [{"file_name": "broken.png", "reason": "not in the table"}]
    assert len(table) == report["num_images"] == sum(map(sum, report["counts"].values())) == 120
    assert table["path"][3] == "images/003.png" and report["oracle"] == "jpeg_size"
    assert recorder.metrics == {"num_images": 120, "num_refused": 1} and recorder.artifacts == ["dataset"]
    with Image.open(folder / "histogram.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    call(build_dataset, "--images", "images", "--output", "out/dataset")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_unpacked_images_are_a_folder(call, tmp_path):
    write_idx(tmp_path / "idx", 150)
    (tmp_path / "config.json").write_text(json.dumps({"dataset": {"image_size": 32}, "label": {"num_classes": 2}}))
    call(unpack_images, "--idx", "idx", "--output", "images")
    call(build_dataset, "--images", "images", "--output", "dataset")
    table = io.read_parquet(tmp_path / "dataset" / "metadata.parquet")
    assert list(table.columns) == ["file_name", "path", "prompt", "subject", "split", "score_jpeg_size", "label"]
    templates = {p.replace(s, "{}") for p, s in zip(table["prompt"], table["subject"], strict=True)}
    assert templates == {"{}", "a {}", "a photo of a {}"}


@pytest.mark.parametrize(
    ("change", "label", "message"),
    [
        (lambda f: f.rename(f.with_name("moved")), {}, "images is missing"),
        (lambda f: pd.DataFrame({"file_name": ["000.png"]}).to_csv(f / "metadata.csv"), {}, "has no column prompt"),
        (lambda f: [p.write_bytes(b"") for p in f.glob("*.png")], {}, "all 120 images of images are refused (000.png: empty"),
        (lambda f: None, {"edges": [0.1, 0.7]}, "(< 0.1 kB) has no image in the training split"),
        (lambda f: None, {"edges": [0.7, 0.6]}, "label.edges"),
        (lambda f: None, {"num_classes": 200}, "quantiles of the scores coincide"),
    ],
)
def test_one_clear_line_and_nothing_written(call, tmp_path, capsys, change, label, message):
    write_folder(tmp_path / "images", 120)
    (tmp_path / "config.json").write_text(json.dumps({"dataset": {"image_size": 8}, "label": label}))
    change(tmp_path / "images")
    with pytest.raises(SystemExit) as stopped:
        call(build_dataset, "--images", "images", "--output", "dataset")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not [p for p in tmp_path.iterdir() if "dataset" in p.name]


def test_missing_idx(call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(unpack_images, "--idx", "nowhere", "--output", "images")
    assert "nowhere/t10k-images-idx3-ubyte.gz is missing" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("script", [build_dataset, unpack_images])
def test_help_names_every_argument(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--config" in text and "--output" in text
