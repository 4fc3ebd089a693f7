"""Two processes that share a batch do the update that one does alone, but for rounding; and SIGTERM ends both at the same update."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from ctrl.finetune import loop
from ctrl.io import load_metadata, load_tensors
from tests.repository import ROOT

RUN = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from ctrl import base as bases
from ctrl import errors
from ctrl.control import Control
from ctrl.finetune.recipe import train
from ctrl.finetune.task import Examples, Task
from scripts.training import join_processes

def main():
    folder, first = Path(sys.argv[2]), join_processes()
    base = bases.load(sys.argv[1])
    control = Control(base, 2, 4, ["to_q", "to_v", "conv1"], min_timestep=260)
    start = {name: p.detach().clone() for name, p in control.parameters().items()}
    for name in sys.argv[3:]:
        for key, p in control.parameters().items():
            p.data.copy_(start[key] + (0.01 if "lora_B" in key or key.startswith("class_embedding") else 0))
            p.grad = None
        config = dict(
            batch_size=5, micro_batch_size=2, kl_weight=1.0, kl_reduction="sum", gamma=5.0, truncation=None, num_terms=2,
            trainer="backprop" if name == "endless" else name, policy_gradient=dict(reuse=2, clip=0.2), gradient_checkpointing=False,
            efficient_adjoint=dict(num_levels=2),
            speed=dict(autocast=False, tf32=False, channels_last=False, compile=False, fused_adamw=False, decode_size=None),
            betas=[0.9, 0.99], num_updates=100_000 if name == "endless" else 4, coarse=dict(stride=2, end=0.5), max_adjoint_norm=1.0,
            temperature=dict(start=0.8, hold=0.2, end=0.6), warmup_updates=0, decay="none", weight_decay=0.1, learning_rate=1e-3,
            embedding_learning_rate=1e-2, max_grad_norm=1.0, checkpoint_every=100_000, probe=dict(every=2),
            control_variate=name == "adjoint", unguided_jacobian=False)
        log_prob = lambda x_0, y, temperature: -(base.decode(x_0).mean(dim=(1, 2, 3)) - y).square() / temperature
        task = Task(control, base.process(4), [("coat", 0), ("coat", 1), ("bag", 1)], ["{}", "a {}"], 1.0, 0)
        latents = torch.randn(12, *base.latent_shape, generator=torch.Generator().manual_seed(0))
        shown = [lambda row: print(name, row["update"], flush=True)] if first else []
        train(task, log_prob, lambda update: {"probe": float(update)}, config, folder / name, "s", shown,
              Examples(latents, ["coat"] * 12, torch.arange(12) % 2))

errors.main(main)
"""
TRAINERS = ["backprop", "adjoint", "efficient_adjoint", "policy_gradient", "supervised"]
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def start(tiny_sd, folder, processes: int) -> subprocess.Popen:
    """RUN in one process, or in two that `accelerate launch` starts, on the CPU by gloo."""
    folder.mkdir()
    (folder / "run.py").write_text(RUN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(LAUNCH if processes > 1 else []), folder / "run.py", tiny_sd, folder, *TRAINERS, "endless"]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=(folder / "stderr.txt").open("w"), text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_sd, tmp_path_factory):
    """Folders of the same trainings by one process and by two; the last one, which would not end, was ended by SIGTERM."""
    folders = {number: tmp_path_factory.mktemp("parallel") / str(number) for number in (1, 2)}
    running = {number: start(tiny_sd, folder, number) for number, folder in folders.items()}
    for number, process in running.items():
        for line in process.stdout:
            if line == "endless 3\n":
                os.killpg(process.pid, signal.SIGTERM)  # to every process, as SLURM does
                break
        process.communicate(timeout=120)
        assert process.returncode == (143 if number == 1 else 1), (folders[number] / "stderr.txt").read_text()[-3000:]
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_do_the_updates_of_one(trained, trainer):
    one, two = (load_tensors(folder / trainer / "checkpoints" / loop.CHECKPOINT) for folder in trained.values())
    assert one.keys() == two.keys() and any("class_embedding" in key for key in one) and any("lora_A" in key for key in one)
    moments = [key for key in one if key.endswith("exp_avg")]
    assert max(one[key].abs().max() for key in moments) > 0, "something was learned"
    for key in one:
        scale = one[key].abs().max().item()
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-4 * scale + 1e-7), key
    rows = [[json.loads(line) for line in (folder / trainer / "history.jsonl").read_text().splitlines()] for folder in trained.values()]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys() and a["unet_forward"] == b["unet_forward"] and a.get("unet_backward") == b.get("unet_backward")
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4, nan_ok=True), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_sigterm_ends_every_process_at_the_same_update_with_a_checkpoint(trained, number):
    done = int(load_metadata(trained[number] / "endless" / "checkpoints" / loop.CHECKPOINT)["done"])
    assert 3 <= done < 100_000
    assert len((trained[number] / "endless" / "history.jsonl").read_text().splitlines()) == done
    stopped = re.findall(r"SIGTERM: stopped after update (\d+) of 100000", (trained[number] / "stderr.txt").read_text())
    assert stopped == [str(done)] * number
