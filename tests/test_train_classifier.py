"""scripts/train_classifier.py on a small dataset of real images: what it measures, writes and refuses."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import errors, io, oracles, tracking


def write_dataset(folder: Path, real) -> None:
    images, scores, splits, edges = real
    (folder / "images").mkdir(parents=True)
    paths = [folder / "images" / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, oracles.to_pil(images / 127.5 - 1), strict=True):
        image.save(path, compress_level=1)
    labels = oracles.score_to_label(scores, edges, True)
    table = pd.DataFrame({"path": [str(p) for p in paths], "split": splits, "score_jpeg_size": scores, "label": labels})
    io.write_parquet(folder / "metadata.parquet", table)
    report = {"edges": edges, "num_classes": 4, "descending": True, "oracle": "jpeg_size", "unit": "kB", "image_size": 32}
    io.write_json(folder / "report.json", report | {"label_names": list("abcd")})


class Silent:
    log_metrics = log_artifact = lambda self, *args: None


@pytest.fixture
def script(tmp_path, real, monkeypatch):
    from scripts import train_classifier

    monkeypatch.setattr(tracking, "run", lambda *args: nullcontext(Silent()))
    write_dataset(tmp_path / "dataset", [part[:600] if len(part) > 3 else part for part in real])
    (tmp_path / "config.json").write_text('{"classifier": {"num_epochs": 2}}')
    argv = ["train_classifier.py", "--config", str(tmp_path / "config.json"), "--dataset", str(tmp_path / "dataset")]

    def call(*args):
        monkeypatch.setattr(sys, "argv", [*argv, "--num-threads", str(torch.get_num_threads()), "--output", str(tmp_path / "out"), *args])
        errors.main(train_classifier.main)
        return io.read_json(tmp_path / "out" / "metrics.json")

    return call


def test_script_measures_held_out_and_generated_images(script, tmp_path, real):
    assert script()["generated"] is None
    images, _, _, _ = real
    (tmp_path / "pool" / "images").mkdir(parents=True)
    for i, image in enumerate(oracles.to_pil(images[700:750] / 127.5 - 1)):
        image.save(tmp_path / "pool" / "images" / f"{i:06d}.png")
    io.write_parquet(tmp_path / "pool" / "samples.parquet", pd.DataFrame({"file_name": [f"images/{i:06d}.png" for i in range(50)]}))
    result = script("--generated", str(tmp_path / "pool"))
    assert result["val"]["n"] == 100 and result["generated"]["n"] == 50
    for part in ("val", "generated"):
        for when in ("before", "after"):
            assert set(result[part][when]) == {"accuracy", "nll", "ece"} and result[part][when]["accuracy"] > 0.7
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json", "metrics.json", "reliability.png"}
    with Image.open(tmp_path / "out" / "reliability.png") as image:
        assert image.width > 1.5 * image.height
    assert classifiers.load(tmp_path / "out").log_probs(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_script_refuses_in_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("--generated", str(tmp_path / "nowhere"))
    assert "nowhere/samples.parquet is missing" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "dataset" / "images" / "7.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        script()
    assert stopped.value.code == 2 and "7.png: missing file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
