"""A base whose download was cut off, or that lacks a part."""

import shutil
from pathlib import Path

import pytest

from ctrl import base as bases
from ctrl import io
from ctrl.errors import UserError
from tests.strangers import copy_of

UNET = "unet/diffusion_pytorch_model.safetensors"
CUT = {
    "cut short": lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:5000]),
    "an empty file": lambda folder: (folder / UNET).write_bytes(b""),
    "text encoder cut short": lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "weights not there yet": lambda folder: (folder / UNET).unlink(),
    "configuration not there yet": lambda folder: (folder / "vae/config.json").unlink(),
    "half a configuration": lambda folder: (folder / "unet/config.json").write_text('{"in_channels": 4,'),
    "a part not there yet": lambda folder: shutil.rmtree(folder / "text_encoder"),
    "no vocabulary": lambda folder: [file.unlink() for file in (folder / "tokenizer").glob("*.*") if "config" not in file.name],
    "a link to what was not fetched": lambda folder: ((folder / UNET).unlink(), (folder / UNET).symlink_to("blob.incomplete")),
}


@pytest.mark.parametrize("name", CUT)
def test_a_base_whose_download_was_interrupted(tiny_sd, tmp_path, name):
    with pytest.raises(UserError, match=r"^base.path: .*(repeat it|again|interrupted)") as caught:
        bases.load(copy_of(tiny_sd, tmp_path / "base", CUT[name]))
    assert "\n" not in str(caught.value)


def test_a_base_that_lacks_one_tensor_is_not_filled_with_noise(tiny_sd, tmp_path):
    """Libraries only warn of it."""
    for part in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):

        def drop(folder: Path, part=part) -> None:
            tensors = io.load_tensors(folder / part)
            io.save_tensors(folder / part, {k: tensors[k] for k in sorted(tensors)[1:]}, {"format": "pt"})

        with pytest.raises(UserError, match="lacks some of its weights: fetch the model again|cannot be loaded"):
            bases.load(copy_of(tiny_sd, tmp_path / part.split("/")[0], drop))
