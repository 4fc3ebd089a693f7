"""The block DCT against a real JPEG encoder and against sums by hand."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl import dct


def smooth_noise(size: int = 64) -> Image.Image:
    """Grey, away from black and white, where decoded pixels would be clamped."""
    noise = Image.fromarray(np.random.default_rng(0).integers(60, 196, (size // 4, size // 4), np.uint8))
    return noise.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def encode(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95, 100])
def test_quantisation_table_is_that_of_a_jpeg_file(quality):
    table = encode(smooth_noise(), quality).quantization[0]
    assert dct.quantisation_table(quality).int().flatten().tolist() == list(table)


def test_rounded_coefficients_are_those_in_a_jpeg_file():
    """A decoded JPEG has whole quantisation units, up to its pixels' rounding: the rounded coefficients of what went in."""
    image = smooth_noise()
    stored = dct.block_dct(to_tensor(encode(image, 50)), 50)
    assert (stored - stored.round()).abs().max() < 0.2
    ours = dct.block_dct(to_tensor(image), 50)
    certain = ((ours - ours.round()).abs() < 0.45) & (stored.round() != 0)
    assert certain.sum() > 200
    assert torch.equal(ours.round()[certain], stored.round()[certain])


def test_flat_block_by_hand():
    """A block of grey level 200 has the DC coefficient 8 (200 - 128) / q_00 and nothing else."""
    coefficients = dct.block_dct(torch.full((1, 3, 8, 8), 200 / 127.5 - 1))
    assert coefficients.shape == (1, 1, 8, 8)
    assert coefficients[0, 0, 0, 0].item() == pytest.approx(8 * 72 / 2, abs=1e-3)
    assert coefficients.flatten()[1:].abs().max() < 1e-3


def test_one_cosine_by_hand():
    """128 + 40 cos(pi (j + 1/2) 3 / 8) along x has the one coefficient 40 * sqrt(1/8 * 2/8) * 8 * 4 at (0, 3)."""
    wave = 40 * torch.cos(math.pi / 8 * (torch.arange(8) + 0.5) * 3)
    coefficients = dct.block_dct(((128 + wave) / 127.5 - 1).expand(1, 3, 8, 8))[0, 0] * dct.quantisation_table(95)
    assert coefficients[0, 3].item() == pytest.approx(40 * math.sqrt(2) / 8 * 32, abs=1e-2)
    coefficients[0, 3] = 0
    assert coefficients.abs().max() < 1e-2


def test_orthonormal_and_blocks_in_reading_order():
    assert torch.allclose(dct.dct_matrix() @ dct.dct_matrix().T, torch.eye(8), atol=1e-6)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    blocks = dct.block_dct(images)
    assert blocks.shape == (2, 6, 8, 8)
    assert torch.allclose(blocks[1, 4], dct.block_dct(images[1:, :, 8:, 8:16])[0, 0], atol=1e-5)


def test_luminance_weights():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        x = torch.full((1, 3, 1, 1), -1.0)
        x[0, channel] = 1
        assert dct.luminance(x).item() == pytest.approx(255 * weight, abs=1e-3)
