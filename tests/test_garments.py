"""The embedded images, and IDX files that are missing or corrupt."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ctrl import data, garments, pictures
from ctrl.errors import UserError

IDX = Path(__file__).parent.parent / "resources" / "fashion-mnist"


def write_idx(folder: Path, n: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), np.uint8)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(i % 10 for i in range(n))))


def test_unpack(tmp_path):
    write_idx(tmp_path / "idx", 30)
    table = garments.unpack(tmp_path / "idx", "t10k", ["{}", "a {}"], 32, tmp_path / "images")
    read = data.read_table(tmp_path / "images")
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert set(read.columns) == {"file_name", "prompt", "subject"} and read["subject"].tolist() == garments.GARMENTS * 3
    assert {p.replace(s, "{}") for p, s in zip(read["prompt"], read["subject"], strict=True)} == {"{}", "a {}"}
    expected, _ = garments.read_idx(tmp_path / "idx", "t10k")
    assert torch.equal(pictures.load_images(tmp_path / "images" / name for name in read["file_name"]), expected)


def test_unpack_bad_files(tmp_path):
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz is missing"):
        garments.unpack(tmp_path, "t10k", ["{}"], 32, tmp_path / "images")
    write_idx(tmp_path / "idx", 30)
    path = tmp_path / "idx" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="are corrupt"):
        garments.unpack(tmp_path / "idx", "t10k", ["{}"], 32, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_embedded_images_are_there():
    images, labels = garments.read_idx(IDX, "t10k")
    assert images.shape == (10_000, 3, 32, 32) and labels.bincount().tolist() == [1000] * 10
