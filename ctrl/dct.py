"""The 8x8 block cosine transform that JPEG uses, in torch: the same numbers that decide a file's size, but differentiable."""

import math

import torch
from torch import Tensor

# ITU-T T.81 (1992), Annex K, Table K.1: luminance quantisation at "quality 50".
LUMINANCE_Q50 = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float32,
)


def quantisation_table(quality: int) -> Tensor:
    """Luminance table of libjpeg (and so Pillow) at `quality` in 1..100, with shape (8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality  # whole numbers, as libjpeg
    return ((LUMINANCE_Q50 * scale + 50) / 100).floor().clamp(1, 255)


def dct_matrix(size: int = 8) -> Tensor:
    """Orthonormal DCT-II matrix D with shape (size, size): `D @ block @ D.T` transforms a block."""
    k = torch.arange(size, dtype=torch.float32)
    d = torch.cos(math.pi / size * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    d[0] /= math.sqrt(2)
    return d


def luminance(images: Tensor) -> Tensor:
    """Y of JPEG's YCbCr, in 0..255, with shape (B, H, W), from RGB in [-1, 1] with shape (B, 3, H, W)."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("bchw,c->bhw", (images + 1) * 127.5, weights)


def block_dct(images: Tensor, quality: int = 95) -> Tensor:
    """Quantisation units of every 8x8 block's DCT coefficients: what JPEG rounds to integers.

    Takes RGB in [-1, 1] with shape (B, 3, H, W), H and W multiples of 8; returns shape (B, H/8 * W/8, 8, 8).
    """
    y = luminance(images) - 128
    blocks = y.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)
    d = dct_matrix().to(y)
    return d @ blocks @ d.T / quantisation_table(quality).to(y)
