"""A run that is killed and started again ends with the weights that no interruption would have given, bit for bit."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from ctrl import errors
from ctrl.errors import Stopped, UserError
from ctrl.finetune import loop
from ctrl.io import load_tensors
from tests import warm_python

ROOT = Path(__file__).parent.parent
NUM_UPDATES = 9
RUN = f"""
import os, sys, torch
print(os.getpid(), flush=True)
from pathlib import Path
torch.set_num_threads(1)
from ctrl import base as bases
from ctrl.control import Control
from ctrl import errors
from ctrl.errors import Stopped
from ctrl.finetune import loop
from ctrl.finetune.gradients import gradient_function
from ctrl.finetune.task import Task

base = bases.load(sys.argv[1])
process = base.process(4)
control = Control(base, 2, 4, ["to_q", "to_v", "conv1"], min_timestep=260)
config = dict(batch_size=6, micro_batch_size=3, kl_weight=1.0, kl_reduction="sum", gamma=5.0, truncation=[1, 3], num_terms=2,
              control_variate=True, unguided_jacobian=False,
              trainer=sys.argv[4], policy_gradient=dict(reuse=2, clip=0.2), efficient_adjoint=dict(num_levels=2),
              gradient_checkpointing=False, speed=dict(autocast=False, fused_adamw=False, decode_size=None),
              num_updates=9, coarse=dict(stride=2, end=0.5),
              temperature=dict(start=0.8, hold=0.2, end=0.6), max_adjoint_norm=1.0)
log_prob = lambda x_0, y, temperature: -(base.decode(x_0).mean(dim=(1, 2, 3)) - y).square() / temperature
cells = [("coat", 0), ("coat", 1), ("bag", 1)]
gradient = gradient_function(Task(control, process, cells, ["{{}}", "a {{}}"], 1.0, 0), log_prob, config)
optimizer = torch.optim.AdamW(control.groups(1e-2, 1e-2))
def told(update):
    print(update + 1, flush=True)
    return gradient(update)
loop.run(control.parameters(), [optimizer], told, lambda u: dict(probe=float(u)), {NUM_UPDATES}, Path(sys.argv[2]), 1.0, 2, 3, sys.argv[3])
"""


def start(tiny_sd, folder, settings="a", trainer="backprop"):
    """The run in a process of its own, and that process's number, which is not that of its parent here."""
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(RUN)
    command = warm_python.command(folder / "run.py", str(tiny_sd), str(folder), settings, trainer)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return process, int(process.stdout.readline())


def finish(started):
    process, _ = started
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [int(line) for line in out.split()]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["backprop", "efficient_adjoint", "policy_gradient"])
def test_killed_and_resumed_equals_uninterrupted(tiny_sd, tmp_path, trainer):
    assert finish(start(tiny_sd, tmp_path / "whole", trainer=trainer)) == list(range(1, NUM_UPDATES + 1))
    killed, number = start(tiny_sd, tmp_path / "killed", trainer=trainer)
    for line in killed.stdout:
        if int(line) == 5:
            os.kill(number, signal.SIGKILL)
            break
    killed.communicate()
    assert finish(start(tiny_sd, tmp_path / "killed", trainer=trainer))[0] in (5, 7), "resumes after the last checkpoint, every 2 updates"
    whole, resumed = (load_tensors(tmp_path / name / "checkpoints" / loop.CHECKPOINT) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    rows = [[json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()] for name in ("whole", "killed")]
    assert [r["update"] for r in rows[1]] == list(range(1, NUM_UPDATES + 1)), "every update once"
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


@pytest.mark.slow
def test_checkpoint_of_other_settings_is_not_resumed(tiny_sd, tmp_path):
    finish(start(tiny_sd, tmp_path))
    assert finish(start(tiny_sd, tmp_path, "a")) == [], "finished"
    assert finish(start(tiny_sd, tmp_path, "b")) == list(range(1, NUM_UPDATES + 1))


def toy_run(folder, gradient, **changes):
    weight = torch.nn.Parameter(torch.ones(2))
    settings = {"num_updates": 4, "max_grad_norm": 1.0, "checkpoint_every": 2, "probe_every": 2, "settings": "s"} | changes
    optimizer = torch.optim.SGD([weight], lr=0.5)
    history = loop.run({"weight": weight}, [optimizer], lambda u: gradient(weight, u), lambda u: {}, folder=folder, **settings)
    return weight, history


def test_several_optimizers_resume_bit_for_bit(tmp_path):
    """A square matrix by Muon, a vector by AdamW, each with its momentum; cut off behind the checkpoint of update 2."""

    def trained(folder, cut=None):
        named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in (("vector", 3), ("matrix", (3, 3)))}
        optimizers = [torch.optim.Muon([named["matrix"]], 0.1), torch.optim.AdamW([named["vector"]], 0.1)]

        def gradient(update):
            if update == cut:
                raise KeyboardInterrupt
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(update))
            return {}

        rate = lambda update: 1 / (1 + update)  # noqa: E731
        loop.run(named, optimizers, gradient, lambda u: {}, 4, folder, 1.0, 2, 4, "s", rate=rate)
        return named

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", cut=3)
    resumed = trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gradients_are_clipped(tmp_path):
    def gradient(weight, update):
        weight.grad = torch.tensor([30.0, 40.0])
        return {}

    weight, history = toy_run(tmp_path, gradient, num_updates=1)
    assert history[0]["grad_norm"] == pytest.approx(50)
    assert weight.tolist() == pytest.approx([1 - 0.5 * 0.6, 1 - 0.5 * 0.8])


def test_nan_names_the_update_and_the_tensor_and_spares_the_checkpoint(tmp_path):
    def gradient(weight, update):
        weight.grad = torch.full((2,), float("nan") if update == 3 else 1.0)
        return {}

    with pytest.raises(UserError, match="update 3: the gradient of weight is not finite; the last checkpoint is kept; lower"):
        toy_run(tmp_path, gradient)
    saved = load_tensors(tmp_path / "checkpoints" / loop.CHECKPOINT)
    assert torch.isfinite(saved["parameter/weight"]).all()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def gradient(weight, update):
        weight.grad = torch.ones(2)
        if update == 3:
            monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return {}

    with pytest.raises(UserError, match="No space left"):
        toy_run(tmp_path, gradient)
    monkeypatch.undo()
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [loop.CHECKPOINT]
    assert toy_run(tmp_path, lambda w, u: setattr(w, "grad", torch.ones(2)) or {})[1][-1]["update"] == 4


@pytest.mark.parametrize(("stop_every", "done"), [(1, 2), (3, 3)])
def test_sigterm_leaves_a_checkpoint_at_the_next_update_and_the_next_run_goes_on(tmp_path, stop_every, done):
    def gradient(weight, update, kill=True):
        weight.grad = torch.full((2,), float(update))
        if update == 1 and kill:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    settings = {"checkpoint_every": 100, "probe_every": 100, "num_updates": 5, "stop_every": stop_every}
    with pytest.raises(Stopped, match=rf"stopped after update {done} of 5; .*{loop.CHECKPOINT} has it"):
        toy_run(tmp_path / "stopped", gradient, **settings)
    assert len((tmp_path / "stopped" / "history.jsonl").read_text().splitlines()) == done
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "outside of the loop SIGTERM is what it was"
    resumed, history = toy_run(tmp_path / "stopped", lambda w, u: gradient(w, u, kill=False), **settings)
    whole, _ = toy_run(tmp_path / "whole", lambda w, u: gradient(w, u, kill=False), **settings)
    assert torch.equal(resumed, whole) and [row["update"] for row in history] == [1, 2, 3, 4, 5]


def test_a_stopped_script_says_so_and_ends_as_by_sigterm(capsys):
    def stop():
        raise Stopped("SIGTERM: stopped after update 2 of 5")

    with pytest.raises(SystemExit) as ended:
        errors.main(stop)
    assert ended.value.code == 143 and capsys.readouterr().err == "SIGTERM: stopped after update 2 of 5\n"


def test_a_finished_checkpoint_brings_its_history_back(tmp_path):
    def gradient(weight, update):
        weight.grad = torch.ones(2)
        return {}

    history = toy_run(tmp_path, gradient)[1]
    (tmp_path / "history.jsonl").unlink()
    assert toy_run(tmp_path, gradient)[1] == history
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history
