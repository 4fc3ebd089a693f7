"""A disk that is full, or read-only: one line, and what was there before is there still."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import base as bases
from ctrl import config_file, io
from ctrl.errors import UserError
from ctrl.finetune import loop
from tests.repository import copy_repository, snakemake
from tests.strangers import new_adapter
from tests.test_io import WRITERS


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of its own: {done.stderr.strip()} (test_io has the system's own limit on files)")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def train(folder: Path, num_updates: int = 6, at=lambda update: None) -> tuple[torch.Tensor, list[dict]]:
    """A toy run of 10,000 weights, with a checkpoint every second update."""
    weight = torch.nn.Parameter(torch.ones(10_000))

    def gradient(update: int) -> dict[str, float]:
        at(update)
        weight.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(update))
        return {"loss": 1.0}

    optimizer = torch.optim.AdamW([weight], lr=0.1)
    history = loop.run({"weight": weight}, [optimizer], gradient, lambda u: {}, num_updates, folder, 1.0, 2, 2, "s")
    return weight.detach(), history


def test_a_training_on_a_disk_that_fills_up_goes_on_when_there_is_room(small_disk, tmp_path):
    """Checkpoints of 120 kB, atomically written: two fit, and nothing beside them."""

    def fill(update: int) -> None:
        if update == 3:
            (small_disk / "other").write_bytes(b"x" * 120_000)

    with pytest.raises(UserError, match=r"cannot write .*checkpoint.safetensors: No space left on device; free some space") as caught:
        train(small_disk / "run", at=fill)
    assert "\n" not in str(caught.value)
    assert os.listdir(small_disk / "run" / "checkpoints") == [loop.CHECKPOINT], "the one of update 2, whole"
    assert io.load_metadata(small_disk / "run" / "checkpoints" / loop.CHECKPOINT)["done"] == "2"
    (small_disk / "other").unlink()
    done = []
    weight, history = train(small_disk / "run", at=done.append)
    assert done == [2, 3, 4, 5] and [row["update"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(weight, train(tmp_path / "whole")[0])


def write_pictures(folder: Path) -> None:
    for k in range(40):
        noise = np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")


FOLDERS = {
    "pictures": write_pictures,
    "tensors": lambda folder: io.save_tensors(folder / "model.safetensors", {"x": torch.randn(100_000)}),
    "csv": lambda folder: pd.DataFrame({"x": np.random.default_rng(0).normal(size=30_000)}).to_csv(folder / "x.csv"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_does_not_fit_is_absent(small_disk, kind):
    with pytest.raises(UserError, match="No space left on device"), io.atomic_folder(small_disk / "out") as folder:
        FOLDERS[kind](folder)
    assert os.listdir(small_disk) == []


def test_an_adapter_that_does_not_fit_keeps_the_one_before(tiny_sd, small_disk, tmp_path):
    adapter = new_adapter(tiny_sd, tmp_path / "adapter")
    (small_disk / "adapter").mkdir()
    lora = small_disk / "adapter" / "pytorch_lora_weights.safetensors"
    shutil.copy(adapter / lora.name, lora)
    before = lora.read_bytes()
    (small_disk / "other").write_bytes(b"x" * (300_000 - len(before) - 30_000))
    from ctrl import control

    with pytest.raises(UserError, match="cannot write .*pytorch_lora_weights.safetensors: No space left"):
        control.load(bases.load(tiny_sd), adapter).save(small_disk / "adapter")
    assert lora.read_bytes() == before and os.listdir(small_disk / "adapter") == [lora.name]


def test_results_that_are_read_only(small_disk):
    (small_disk / "config.json").write_text("{}")
    make_read_only(small_disk)
    for kind, write in WRITERS.items():
        with pytest.raises(UserError, match=r"cannot write .*: Read-only file system"):
            write(small_disk / kind)
    with pytest.raises(UserError, match="cannot write .*: Read-only file system"), io.atomic_folder(small_disk / "out"):
        pytest.fail("the body is not begun")
    with pytest.raises(UserError, match="cannot write .*: Read-only file system"):
        train(small_disk / "run")
    with pytest.raises(UserError, match="cannot write .*config.json: Read-only file system"):
        config_file.write(small_disk / "config.json", {"a": 1}, small_disk / "locks", False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("disks") / "repository")


ARGUMENTS = ("--cores", "1", "--configfile", "config/smoke.yaml")
IMAGES = "results/smoke/images/metadata.csv"


@pytest.mark.slow
def test_results_of_a_workflow_that_are_read_only(repository, small_disk):
    results = repository / "results"
    if results.exists():
        shutil.rmtree(results)
    results.symlink_to(small_disk)
    make_read_only(small_disk)
    try:
        done = snakemake(repository, IMAGES, *ARGUMENTS)
    finally:
        results.unlink()
    assert done.returncode == 2, done.stdout
    assert "error: cannot write results/smoke/config.json: Read-only file system" in done.stdout and "Traceback" not in done.stdout
