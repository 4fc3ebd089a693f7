"""The embedded images: Fashion-MNIST's IDX files, as tensors and as an image folder."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ctrl.errors import UserError
from ctrl.io import atomic_folder
from ctrl.pictures import choose, image_digest

GARMENTS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(folder: Path, split: str, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's images (uint8, shape (N, 3, image_size, image_size), padded with black) and labels (int64, shape (N,)).

    Raises FileNotFoundError, naming the Debian package that holds them, where the files are missing.
    """
    paths = [Path(folder) / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: install the Debian package dataset-fashion-mnist, or name its folder with --images"
            )
    with gzip.open(paths[0]) as f:
        pixels = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(paths[1]) as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    pad = (image_size - 28) // 2
    images = F.pad(torch.from_numpy(pixels.copy()), [pad, image_size - 28 - pad] * 2)
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels.astype(np.int64))


def unpack(idx_folder: Path, split: str, templates: Sequence[str], image_size: int, output: Path) -> pd.DataFrame:
    """Writes the images of an IDX file as an image folder: PNGs and metadata.csv with file_name, prompt, subject; returns that table.

    The prompt is the garment's name in one of `templates`. UserError where the IDX files are missing or corrupt.
    """
    try:
        images, labels = read_idx(idx_folder, split, image_size)
    except FileNotFoundError as error:
        raise UserError(error) from error
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"the IDX files in {idx_folder} are corrupt ({error}): restore them") from error
    rows = []
    with atomic_folder(output) as folder:
        for number, (pixels, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)):
            image, subject = Image.fromarray(np.ascontiguousarray(pixels)), GARMENTS[label]
            prompt = choose(image_digest(image), templates).format(subject)
            rows.append({"file_name": f"{number:05d}.png", "prompt": prompt, "subject": subject})
            image.save(folder / rows[-1]["file_name"], compress_level=1)
        table = pd.DataFrame(rows)
        table.to_csv(folder / "metadata.csv", index=False)
    return table
