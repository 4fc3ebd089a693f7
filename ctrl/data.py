"""Labelled images on disk: IDX files, image folders with metadata, splits that never leak, and the checks on all of them."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GARMENTS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(folder: Path, split: str, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's images (uint8, shape (N, 3, image_size, image_size), padded with black) and labels (int64, shape (N,)).

    Raises FileNotFoundError, naming the Debian package that holds them, where the files are missing.
    """
    paths = [Path(folder) / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: install the Debian package dataset-fashion-mnist, or name its folder with --images")
    with gzip.open(paths[0]) as f:
        pixels = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(paths[1]) as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    pad = (image_size - 28) // 2
    images = F.pad(torch.from_numpy(pixels.copy()), [pad, image_size - 28 - pad] * 2)
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels.astype(np.int64))
