"""Adapters that lie about their tensors, labels or sizes: refused in one line."""

import json
import os
import struct

import pytest
import torch

import ctrl
from ctrl import io
from ctrl.errors import UserError
from tests.strangers import copy_of, edit_json, edit_tensors, one_line

LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "label_embedding.safetensors"


def header(size: int, text: bytes = b"{}"):
    """A safetensors file whose header claims `size` bytes."""
    return lambda name: lambda folder: (folder / name).write_bytes(struct.pack("<Q", size) + text)


def huge(shape: list[int]):
    """One whose tensor claims a shape that the file does not hold."""
    text = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**50]}}).encode()
    return header(len(text), text)


def replaced(key: str, tensor: torch.Tensor):
    return lambda tensors: {name: tensor.clone() if name.endswith(key) else value for name, value in tensors.items()}


KEY = "conv1.lora_A.weight"
BAD_ADAPTERS = {
    "an oversized header": (header(2**62)(LORA), "corrupt"),
    "a header of 200 MB": (header(200_000_000)(EMBEDDING), "corrupt"),
    "a tensor of a petabyte": (huge([2**48])(LORA), "corrupt"),
    "a negative shape": (huge([-1, 4])(EMBEDDING), "corrupt"),
    "a wrong rank": (edit_json("adapter.json", rank=5), "has the shape"),
    "an absurd rank": (edit_json("adapter.json", rank=10**9), "rank"),
    "no rank": (edit_json("adapter.json", rank=None), "rank"),
    "other layers": (edit_json("adapter.json", target_modules=["to_q"]), "its layers are not those"),
    "a pattern of layers": (edit_json("adapter.json", target_modules="(a+)+$"), "target_modules"),
    "more labels": (edit_json("adapter.json", label_names=list("abcd")), "has the shape"),
    "a label without a name": (edit_json("adapter.json", label_names=["a", 1, "c"]), "label_names"),
    "an endless sampler": (edit_json("adapter.json", sampler={"num_steps": 10**12}), "sampler"),
    "another base": (edit_json("adapter.json", base_fingerprint="0" * 16), "another base|not for this one"),
    "no mapping": (lambda folder: (folder / "adapter.json").write_text("[1]"), "does not describe an adapter"),
    "brackets": (lambda folder: (folder / "adapter.json").write_text("[" * 100_000), "corrupt"),
    "a wrong shape": (edit_tensors(LORA, replaced(KEY, torch.zeros(4, 3, 3, 3))), "has the shape"),
    "NaN": (edit_tensors(EMBEDDING, replaced("weight", torch.full((4, 64), float("nan")))), "shape|finite"),
    "whole numbers": (edit_tensors(EMBEDDING, lambda t: {"weight": t["weight"].int()}), "finite numbers"),
    "a further tensor": (edit_tensors(LORA, lambda t: t | {"unet.conv_in.weight": torch.zeros(1)}), "its layers are not those"),
    "a missing tensor": (edit_tensors(EMBEDDING, lambda t: {"w": t["weight"]}), "its layers are not those"),
    "an empty file": (lambda folder: (folder / LORA).write_bytes(b""), "corrupt"),
    "a folder for a file": (lambda folder: ((folder / LORA).unlink(), (folder / LORA).mkdir()), "is a folder"),
    "a link out of it": (lambda folder: ((folder / LORA).unlink(), (folder / LORA).symlink_to("/etc/passwd")), "outside of"),
    "a link to a parent": (lambda folder: (folder / "more").symlink_to(".."), "outside of"),
    "a pipe": (lambda folder: ((folder / LORA).unlink(), os.mkfifo(folder / LORA)), "neither a file nor a folder"),
    "an endless device": (lambda folder: ((folder / LORA).unlink(), (folder / LORA).symlink_to("/dev/zero")), "outside of"),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapters_are_refused_in_one_line(model, adapter, tmp_path, name):
    from ctrl.adapter_files import check_adapter

    change, says = BAD_ADAPTERS[name]
    with pytest.raises(UserError, match=says) as caught:
        check_adapter(model, copy_of(adapter, tmp_path / "adapter", change))
    one_line(caught)


def test_a_lora_whose_header_asks_for_more_is_refused(model, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    from ctrl.adapter_files import check_adapter

    said = json.loads(io.load_metadata(adapter / LORA)["lora_adapter_metadata"])
    for number, change in enumerate([{"r": 10**6}, {"lora_alpha": 1}, {"target_modules": "(a+)+$"}, {"use_dora": True}, {"r": "x"}]):
        text = json.dumps(said | {f"unet.{key}": value for key, value in change.items()})
        folder = copy_of(adapter, tmp_path / str(number), lambda _: None)
        save_file(load_file(adapter / LORA), folder / LORA, {"lora_adapter_metadata": text})
        with pytest.raises(UserError, match="its header asks for another LoRA"):
            check_adapter(model, folder)


def test_the_good_adapter_is_taken_also_from_the_hubs_cache(tiny_sd, adapter, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    copy_of(adapter, blobs, lambda _: None)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert ctrl.load(tiny_sd, snapshot).control["rank"] == 4
