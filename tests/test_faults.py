"""What can fail under a run: inputs, clock, numbers, a second run. One line each, and nothing is left half written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import config_file, data, io, pictures, tracking
from ctrl.errors import UserError
from ctrl.finetune import loop
from tests.repository import NUM_IMAGES, ROOT, copy_repository, environment, snakemake
from tests.test_disks import train


def test_the_configuration_does_not_change_under_a_running_workflow(tmp_path):
    path, locks = tmp_path / "results" / "one" / "config.json", tmp_path / "locks"
    locks.mkdir()
    config_file.write(path, {"a": 1}, locks, False)
    (locks / "0.output.lock").write_text(f"{tmp_path}/results/other/table.csv\n")
    config_file.write(path, {"a": 2}, locks, False)
    (locks / "0.input.lock").write_text(f"ctrl/io.py\n{path.parent}/table.csv\n")
    config_file.write(path, {"a": 2}, locks, False)
    with pytest.raises(UserError, match="a workflow runs in .* by another configuration: wait for its end"):
        config_file.write(path, {"a": 3}, locks, False)
    assert json.loads(path.read_text()) == {"a": 2} and os.listdir(path.parent) == ["config.json"]
    config_file.write(path, {"a": 3}, locks, True)
    assert json.loads(path.read_text()) == {"a": 3}


HOLD = """
import sys, time
from ctrl import io
with io.atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, env=environment(ROOT))
    assert first.stdout.readline() == "holding\n"
    with pytest.raises(UserError, match="another process is writing .*out: wait for it, or end it"), io.atomic_folder(out):
        pytest.fail("the body is not begun")
    assert (tmp_path / ".out.tmp" / "half").exists(), "the first one's work is untouched"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with io.atomic_folder(out) as folder:
        (folder / "whole").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["whole"]


def test_pictures_that_go_while_they_are_read(tmp_path):
    """Of a table's images one goes when the first is looked at: it is refused, and the others are kept."""
    for k in range(3):
        Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / f"{k}.png")
    table = pd.DataFrame({"file_name": [f"{k}.png" for k in range(3)], "prompt": ["x"] * 3})

    def oracle(images) -> np.ndarray:
        (tmp_path / "2.png").unlink(missing_ok=True)
        return np.ones(len(images))

    kept, _ = data.examine(tmp_path, table.iloc[[0, 1]], 8, oracle)
    late, gone = data.examine(tmp_path, table, 8, oracle)
    assert len(kept) == len(late) == 2 and {"file_name": "2.png", "reason": "missing file"} in gone
    with pytest.raises(UserError, match="2.png: missing file"):
        pictures.load_images([tmp_path / "0.png", tmp_path / "2.png"])


def test_a_picture_that_goes_between_two_looks_at_it(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    opened = Image.open

    def late(path, **keywords):
        Path(path).unlink()
        return opened(path, **keywords)

    monkeypatch.setattr(data.Image, "open", late)
    with pytest.raises(pictures.Refused, match="unreadable: FileNotFoundError"):
        pictures.read_image(tmp_path / "a.png")


def test_a_clock_that_goes_back(tmp_path, monkeypatch):
    """Times come from a clock that cannot be set; a run's end in MLflow is never before its start."""
    clock = [time.time()]

    def back() -> float:
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", back)
    _, history = train(tmp_path / "run")
    assert all(0 <= row["seconds"] < 60 for row in history)
    with tracking.run({}, "e", "n", tracking_uri="http://127.0.0.1:9", folder=tmp_path, patience_seconds=0):
        pass
    (journal,) = tmp_path.glob("mlflow-unsent/*/journal.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert next(line["end"][1] for line in lines if "end" in line) >= lines[0]["header"]["start_ms"]


def test_a_learning_rate_that_breaks_the_numbers_keeps_the_last_good_checkpoint(control, base, tmp_path):
    """A real adapter, whose learning rate is absurd from the fifth update on."""
    process = base.process(2)
    optimizer = torch.optim.AdamW(control.groups(1e-2, 1e-2))

    def gradient(update: int) -> dict[str, float]:
        labels = torch.tensor([0, 1])
        x = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(update))
        loss = control.denoiser(process, ["coat", "bag"], labels)(x, 0).square().mean()
        loss.backward()
        return {"loss": loss.item()}

    with pytest.raises(
        UserError, match=r"update [45]: .* is not finite; the last checkpoint is kept; lower finetune.learning_rate"
    ) as caught:
        arguments = (control.parameters(), [optimizer], gradient, lambda u: {}, 8, tmp_path, 1.0, 2, 8, "s")
        loop.run(*arguments, rate=lambda update: 1.0 if update < 4 else 1e38)
    assert "\n" not in str(caught.value)
    kept = tmp_path / "checkpoints" / loop.CHECKPOINT
    assert io.load_metadata(kept)["done"] == "4"
    assert all(torch.isfinite(tensor).all() for tensor in io.load_tensors(kept).values())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("faults") / "repository")


ARGUMENTS = ("--cores", "1", "--configfile", "config/smoke.yaml")
IMAGES, DATASET = "results/smoke/images/metadata.csv", "results/smoke/dataset/report.json"


@pytest.mark.slow
def test_two_workflows_in_one_folder(repository):
    """The second start is refused in words, whether it wants the same or has another configuration; the first one ends well."""
    command = [sys.executable, "-m", "snakemake", IMAGES, *ARGUMENTS]
    first = subprocess.Popen(
        command, cwd=repository, env=environment(repository), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in first.stdout:
        lines.append(line)
        if "rule unpack_images" in line:
            break
    first.send_signal(signal.SIGSTOP)
    second = snakemake(repository, IMAGES, *ARGUMENTS)
    (repository / "config" / "other.yaml").write_text("seed: 1\n")
    other = snakemake(repository, "-n", IMAGES, *ARGUMENTS, "config/other.yaml")
    first.send_signal(signal.SIGCONT)
    out = first.communicate(timeout=300)[0]
    assert first.returncode == 0, out[-3000:]
    assert second.returncode != 0 and "Directory cannot be locked" in second.stdout and "--unlock" in second.stdout
    assert other.returncode == 2 and "error: a workflow runs in results/smoke by another configuration" in other.stdout
    assert json.loads((repository / "results/smoke/config.json").read_text())["seed"] == 0
    assert len(list((repository / "results/smoke/images").glob("*.png"))) == NUM_IMAGES


@pytest.mark.slow
def test_file_times_from_a_clock_that_was_ahead(repository):
    """Snakemake says which file is from the future, and keeps nothing that it would have to make again each time."""
    if not (repository / IMAGES).exists():
        assert snakemake(repository, IMAGES, *ARGUMENTS).returncode == 0
    tomorrow = time.time() + 86_400
    os.utime(repository / IMAGES, (tomorrow, tomorrow))
    done = snakemake(repository, DATASET, *ARGUMENTS)
    assert done.returncode != 0 and "clock skew" in done.stdout and IMAGES in done.stdout and not (repository / DATASET).exists()
    os.utime(repository / IMAGES)
    done = snakemake(repository, DATASET, *ARGUMENTS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Nothing to be done" in snakemake(repository, "-n", DATASET, *ARGUMENTS).stdout
