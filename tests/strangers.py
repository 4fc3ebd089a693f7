"""Small pieces of a stranger's make for tests: a pickle that betrays itself, an adapter on the tiny base, a way to damage a copy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ctrl import control as controls
from ctrl.adapter import write_adapter
from tests.trained import TRAINED

SAMPLER = {"num_steps": 2, "eta": 1.0, "guidance_scale": 1.0, "spacing": "scheduler"}


class Betrayer:
    """What is unpickled writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def new_adapter(tiny_sd: Path, folder: Path, prompt: str = "coat", names=("a", "b", "c")) -> Path:
    """A scrambled adapter of three labels on the tiny base."""
    from ctrl import base

    control = controls.Control(base.load(tiny_sd), 3, 4, ["to_q", "to_v", "conv1"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in control.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        control.base.network.class_embedding.weight[-1] = 0
    sampler = SAMPLER | {"timesteps": control.base.process(2).timesteps.tolist()}
    folder.mkdir(parents=True)
    write_adapter(control, folder, controls.describe(control, str(tiny_sd), sampler, names, TRAINED), prompt)
    return folder


def copy_of(folder: Path, target: Path, change: Callable[[Path], object]) -> Path:
    """A changed copy of a folder."""
    shutil.copytree(folder, target)
    change(target)
    return target


def edit_json(name: str, **changes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def edit_tensors(name: str, change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / name)), folder / name)


def as_pickle(name: str, pickle: str, witness: Path) -> Callable[[Path], None]:
    """Puts a malicious pickle into the place of a file of weights."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        torch.save({"weight": Betrayer(witness)}, folder / pickle)

    return change


def one_line(caught) -> str:
    """The text of a caught error, which is one line that a terminal takes."""
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1500
    return text
