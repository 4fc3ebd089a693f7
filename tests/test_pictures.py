"""Pictures on disk: errors name the file, and every mode becomes RGB."""

import pytest
from PIL import Image

from ctrl import pictures
from ctrl.errors import UserError
from tests.test_data import write_folder


def test_load_images_names_the_file(tmp_path):
    folder = tmp_path / "images"
    write_folder(folder, 2)
    with pytest.raises(UserError, match=r"nothing.png: missing file"):
        pictures.load_images([folder / "000.png", folder / "nothing.png"])
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    with pytest.raises(UserError, match=r"small.png has \(4, 4\) pixels"):
        pictures.load_images([folder / "000.png", folder / "small.png"])
    with pytest.raises(UserError, match="no images"):
        pictures.load_images([])


def test_modes_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"{mode}.tif")
    assert (pictures.load_images(sorted(tmp_path.iterdir())) == 255).all()
