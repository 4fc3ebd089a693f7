"""Oracles: what an image measures (a score), and the label that a score falls in. They are the truth; a classifier only guesses it."""

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ctrl.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and a figure needs no more than the oracles' names
    from torch import Tensor


def jpeg_size_kb(image: Image.Image) -> float:
    """Size as JPEG of quality 95 in kB (1000 bytes), at the image's own resolution; the compressibility of DDPO, arXiv 2305.13301."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


def brightness(image: Image.Image) -> float:
    """Mean of all pixels and of R, G and B, in 0..1."""
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean() / 255)


ORACLES: dict[str, Callable[[Image.Image], float]] = {"jpeg_size": jpeg_size_kb, "brightness": brightness}
UNITS = {"jpeg_size": "kB"}  # of those that have one


def get_oracle(name: str) -> Callable[[Image.Image], float]:
    """The oracle of that name; UserError where there is none."""
    if name not in ORACLES:
        raise UserError(f"label.oracle: no oracle {name!r}; choose one of {', '.join(ORACLES)}, aesthetic, or give a Python file")
    return ORACLES[name]


def to_pil(images: "Tensor") -> list[Image.Image]:
    """RGB pictures of 256 levels from uint8, or from a tensor in [-1, 1] whose values outside are clamped, with shape (B, 3, H, W)."""
    return [Image.fromarray(p) for p in pixels(images).permute(0, 2, 3, 1).cpu().numpy()]


def pixels(images: "Tensor") -> "Tensor":
    """256 levels, uint8, of a tensor in [-1, 1]; values outside are clamped. What is uint8 stays as it is."""
    if not images.is_floating_point():
        return images
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()


def check_edges(edges: Sequence[float]) -> np.ndarray:
    """Bin edges as an array with shape (K - 1,); UserError where they are not finite and strictly ascending."""
    array = np.asarray(edges, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all() or (np.diff(array) <= 0).any():
        raise UserError(f"label.edges are out of order: {list(edges)}; list at least one, ascending, each once")
    return array


def score_to_label(score: np.ndarray, edges: Sequence[float], descending: bool = False) -> np.ndarray:
    """Labels (int64, shape (N,)) of scores with shape (N,): bin k is [edges[k-1], edges[k]), the outer ones are open.

    Ascending counts bins from the lowest score, descending from the highest.
    """
    edges = check_edges(edges)
    label = np.searchsorted(edges, np.asarray(score, dtype=np.float64), side="right").astype(np.int64)
    return len(edges) - label if descending else label


def distance_to_bin(score: np.ndarray, label: np.ndarray, edges: Sequence[float], descending: bool = False) -> np.ndarray:
    """How far scores with shape (N,) lie outside the bins of `label`, shape (N,), in the oracle's unit; 0 inside."""
    bins = len(edges) - np.asarray(label) if descending else np.asarray(label)
    bounds = np.concatenate([[-np.inf], check_edges(edges), [np.inf]])
    return np.maximum(0, np.maximum(bounds[bins] - score, score - bounds[bins + 1]))


def label_names(edges: Sequence[float], descending: bool = False, unit: str = "") -> list[str]:
    """What each label means, in the order of the labels: `>= 1.2 kB`, `1.1-1.2 kB`, ..., `< 0.9 kB`."""
    e = [f"{x:.4g}" for x in check_edges(edges)]
    names = [f"< {e[0]}", *(f"{low}-{high}" for low, high in pairwise(e)), f">= {e[-1]}"]
    names = [f"{name} {unit}".strip() for name in names]
    return names[::-1] if descending else names
