"""Weights as pickles run code when they are read: none is."""

import re

import open_clip
import pytest
import torch

import ctrl
from ctrl import base as bases
from ctrl import clip
from ctrl.errors import UserError
from tests.repository import ROOT
from tests.strangers import Betrayer, as_pickle, copy_of, one_line

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_the_pickle_of_these_tests_does_betray_itself(tmp_path):
    torch.save(Betrayer(tmp_path / "ran"), tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


PICKLED_BASES = {
    "unet": (UNET, "unet/diffusion_pytorch_model.bin"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    "text encoder": ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    "a pickle by another name": (UNET, UNET),
}


@pytest.mark.parametrize("part", PICKLED_BASES)
def test_a_base_of_pickles_is_refused_and_never_read(tiny_sd, tmp_path, part):
    folder = copy_of(tiny_sd, tmp_path / "base", as_pickle(*PICKLED_BASES[part], tmp_path / "ran"))
    with pytest.raises(UserError, match=r"base.path: .* cannot be loaded as a Stable Diffusion: .*safetensors") as caught:
        bases.load(folder)
    one_line(caught)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pickle", ["pytorch_lora_weights.bin", "pytorch_lora_weights.pt", LORA])
def test_an_adapter_of_pickles_is_refused_and_never_read(tiny_sd, adapter, tmp_path, pickle):
    from diffusers import StableDiffusionPipeline

    from ctrl.pipeline import with_labels

    folder = copy_of(adapter, tmp_path / "adapter", as_pickle(LORA, pickle, tmp_path / "ran"))
    with pytest.raises(UserError, match=LORA) as caught:
        ctrl.load(tiny_sd, folder)
    one_line(caught)
    pipe = with_labels(StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None))
    with pytest.raises(Exception):  # noqa: B017 (whatever diffusers says: plain users get its own error)
        pipe.load_control(folder)
    assert not (tmp_path / "ran").exists()


def test_clip_of_pickles_is_refused_and_never_read(tmp_path, tiny_clip, monkeypatch):
    for suffix in (".pt", ".bin", ".npz", ".safetensors"):
        file = tmp_path / f"clip{suffix}"
        torch.save(Betrayer(tmp_path / "ran"), file)
        with pytest.raises(UserError, match="is a pickle|cannot be loaded"):
            clip.load_clip(tiny_clip, str(file))
        # The same behind a tag: what open_clip downloads for it is not read either.
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_, file=file: {"file": str(file)})
        with pytest.raises(UserError, match="is a pickle|cannot be loaded"):
            clip.load_clip(tiny_clip, "some_tag")
        monkeypatch.undo()
    with pytest.raises(UserError, match="give open_clip's own name"):
        clip.load_clip(f"local-dir:{tmp_path}", None)
    assert not (tmp_path / "ran").exists()


def test_every_reader_of_a_library_is_told_to_take_no_pickle():
    """Beside the words in test_no_leaks: calls that load weights without saying so."""
    sources = {path: path.read_text() for path in [*ROOT.glob("ctrl/**/*.py"), *ROOT.glob("scripts/*.py")]}
    for path, text in sources.items():
        assert re.findall(r"\bnp\.load\((?!\w+, allow_pickle=False)", text) == [], path
        assert "create_model(" not in text or path.name == "clip.py", path
    text = sources[ROOT / "ctrl/base_files.py"]
    loads = re.findall(r"(?:from_pretrained|Pipeline\.download)\((.*?)\*\*", text, re.DOTALL)
    assert len(loads) == 2 and all("use_safetensors=True" in load for load in loads)
    assert text.count("from_single_file(") == 1 and '.suffix == ".safetensors"' in text
    assert '"use_safetensors": True' in sources[ROOT / "ctrl/pipeline.py"]
