"""Pictures on disk: decoded, checked, and told apart by their pixels."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ctrl.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others are rare, and some start programs
MAX_PIXELS = 50_000_000  # of one picture
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Refused(Exception):
    """An image that cannot be used; the message is the reason in the report."""


def image_files(folder: Path) -> list[str]:
    """The names of all pictures in `folder` and below, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def image_digest(image: Image.Image) -> bytes:
    """SHA-256 of the pixels: whatever follows from it is the same for two files of the same picture."""
    return hashlib.sha256(image.tobytes()).digest()


def choose(digest: bytes, options: Sequence[str]) -> str:
    """One of `options`, drawn by the last 8 bytes of an image's digest, and so independent of its split."""
    return options[int.from_bytes(digest[-8:], "big") % len(options)]


def read_image(path: Path, image_size: int | None = None, crop: bool = False) -> Image.Image:
    """A decoded RGB image; Refused, with the reason, where it is missing, empty, unreadable or not `image_size` pixels square.

    With `crop` a larger image is shrunk until its shorter side has that size, and its middle is taken. The size is that of the header, and
    known before anything is unpacked: a small file may hold a picture of any size.
    """
    try:
        if not path.is_file():
            raise Refused("missing file")
        if path.stat().st_size == 0:
            raise Refused("empty")
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise Refused(f"too large: {file.width}x{file.height} pixels")
            if image_size is None or file.size == (image_size, image_size):
                return file.convert("RGB")
            if not crop:
                raise Refused(f"wrong size: {file.width}x{file.height}, not {image_size}x{image_size}")
            if min(file.size) < image_size:
                raise Refused(f"too small: {file.width}x{file.height}, not at least {image_size}x{image_size}")
            upright = ImageOps.exif_transpose(file).convert("RGB")
            return ImageOps.fit(upright, (image_size, image_size), Image.Resampling.LANCZOS)
    except Refused:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise Refused(f"unreadable: {type(error).__name__}") from error


def load_images(paths: Iterable[Path | str]) -> Tensor:
    """Images of one size as uint8 with shape (N, 3, H, W); UserError naming the file where one cannot be read."""
    paths, images = list(paths), None
    for k, path in enumerate(paths):
        try:
            pixels = torch.from_numpy(np.array(read_image(Path(path)))).permute(2, 0, 1)
        except Refused as error:
            raise UserError(f"{path}: {error}") from error
        if images is None:  # all of them may be most of the memory there is: no second copy
            images = torch.empty(len(paths), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise UserError(
                f"{path} has {tuple(pixels.shape[1:])} pixels, the images before it {tuple(images.shape[2:])}: one size is needed"
            )
        images[k] = pixels
    if images is None:
        raise UserError("no images to load: the table is empty")
    return images
