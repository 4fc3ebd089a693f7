"""Small files that unpack to huge ones, and configurations that explode."""

import argparse
import struct
import zlib

import pytest

from ctrl import pictures
from ctrl.errors import UserError
from scripts.common import load_config, read_yaml
from tests.repository import copy_repository, snakemake
from tests.strangers import one_line


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG of any claimed size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png(width, height))
    with pytest.raises(pictures.Refused, match=r"too large: \d+x\d+ pixels|unreadable: DecompressionBombError") as caught:
        pictures.read_image(tmp_path / "bomb.png")
    one_line(caught)
    with pytest.raises(pictures.Refused):
        pictures.read_image(tmp_path / "bomb.png", 32)
    with pytest.raises(UserError, match=r"bomb.png: "):
        pictures.load_images([tmp_path / "bomb.png"])


def test_only_formats_of_pictures_are_opened(tmp_path):
    """Pillow hands PostScript to a program."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(pictures.Refused, match="unreadable: UnidentifiedImageError"):
        pictures.read_image(tmp_path / "a.png")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [
    BOMB, "a: &a\n  b: *a\n", "a: &a [*a]\n", "x: " + "[" * 50_000,
    "x: " + "9" * 5000, "x: !!python/object/apply:os.system [id]\n", "x: !!binary '%%'\n", "x: 2020-13-45\n", "seed: 2020-01-01\n",
    "? [a, b]\n: 1\n", "1: 2\n", "finetune: {1: 2}\n", "x: \x00\n", "seed: !!set {a, b}\n", "x: " + "y" * 200_000,
])  # fmt: skip
def test_configurations_that_explode_or_run_something_are_one_line(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(argparse.Namespace(config=[tmp_path / "config.yaml"]))
    one_line(caught)


@pytest.mark.slow
def test_snakemake_refuses_the_same_bomb(tmp_path):
    repository = copy_repository(tmp_path / "repository")
    (repository / "bomb.yaml").write_text(BOMB)
    done = snakemake(repository, "-n", "--cores", "1", "--configfile", "bomb.yaml", timeout=120)
    assert done.returncode == 2 and "error: config: more than 100000 entries" in done.stdout


def test_read_yaml_keeps_what_is_ordinary(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": [1, 2], "b": [1, 2]}
