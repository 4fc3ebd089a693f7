"""Oracles measure pictures, and bins make labels of what they measured."""

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl import oracles
from ctrl.errors import UserError

GREY_LEVELS = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)


def test_jpeg_size_is_the_file_in_units_of_1000_bytes(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    image.save(tmp_path / "x.jpg", quality=95)
    assert oracles.jpeg_size_kb(image) == (tmp_path / "x.jpg").stat().st_size / 1000
    assert (
        oracles.jpeg_size_kb(image)
        > oracles.jpeg_size_kb(image.resize((16, 16)).resize((32, 32)))
        > oracles.jpeg_size_kb(Image.new("RGB", (32, 32)))
    )
    grey = image.convert("L")
    assert oracles.jpeg_size_kb(grey) == oracles.jpeg_size_kb(grey.convert("RGB"))


def test_brightness():
    assert oracles.brightness(Image.new("RGB", (4, 4), (255, 255, 255))) == 1
    assert oracles.brightness(Image.new("RGB", (4, 4), (255, 0, 0))) == pytest.approx(1 / 3)


def test_to_pil_is_the_inverse_of_loading_for_every_level():
    image = oracles.to_pil(GREY_LEVELS.float() / 127.5 - 1)[0]
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), GREY_LEVELS[0].permute(1, 2, 0).numpy())


def test_to_pil_rounds_and_clamps():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0, 0.4 / 127.5, 0.6 / 127.5]).view(1, 1, 1, 7).expand(2, 3, 1, 7)
    images = oracles.to_pil(x)
    assert len(images) == 2 and images[0].size == (7, 1)
    assert np.asarray(images[1])[0, :, 1].tolist() == [0, 0, 128, 255, 255, 128, 128]


def test_published_bins():
    scores = np.array([200, 110, 109.99, 85, 84.99, 60, 59.99, 0])
    assert oracles.score_to_label(scores, [60, 85, 110], descending=True).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert oracles.score_to_label(scores, [60, 85, 110]).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert oracles.label_names([60, 85, 110], True, "kB") == [">= 110 kB", "85-110 kB", "60-85 kB", "< 60 kB"]
    assert oracles.label_names([0.5]) == ["< 0.5", ">= 0.5"]


def test_distance_to_bin_by_hand():
    scores, labels = np.array([50.0, 60.0, 90.0, 120.0, 59.0]), np.array([3, 3, 3, 0, 2])
    assert oracles.distance_to_bin(scores, labels, [60, 85, 110], descending=True).tolist() == [0, 0, 30, 0, 1]
    assert oracles.distance_to_bin(scores, labels, [60, 85, 110]).tolist() == [60, 50, 20, 60, 26]


@pytest.mark.parametrize("edges", [[2, 1], [1, 1], [], [1, float("nan")], [float("inf")], [[1, 2]]])
def test_edges_out_of_order(edges):
    with pytest.raises(UserError, match="label.edges are out of order"):
        oracles.score_to_label(np.zeros(1), edges)


def test_unknown_oracle():
    with pytest.raises(UserError, match="'beauty'; choose one of jpeg_size, brightness"):
        oracles.get_oracle("beauty")
    assert oracles.get_oracle("jpeg_size") is oracles.jpeg_size_kb
    assert oracles.UNITS.keys() <= oracles.ORACLES.keys()
