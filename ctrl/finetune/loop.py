"""The training loop: optimizer, clipping, NaN guard, history, checkpoints, resume. It knows no trainer, no model and no images.

Everything random in update `u` must follow from `u` alone; then the weights, the optimizer's state and `u` are all that a checkpoint needs.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ctrl.io import load_metadata, load_tensors, save_tensors, write_text

CHECKPOINT = "checkpoint.safetensors"


def check_finite(named: dict[str, Tensor | None], update: int, what: str) -> None:
    """Raises FloatingPointError naming the update and the first tensor that holds a NaN or an infinity."""
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])  # one answer to wait for, where there is a GPU
    for name, good in zip(tensors, finite.tolist(), strict=True):
        if not good:
            raise FloatingPointError(
                f"update {update}: {what} of {name} is not finite; lower the learning rates or gamma, or soften the classifier"
            )


def save_checkpoint(path: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, metadata: dict[str, str]) -> None:
    """One atomic file: parameters, optimizer state, and as `metadata` the number of updates done, the history and the run's settings."""
    tensors = {f"parameter/{name}": p.detach() for name, p in named.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: str) -> tuple[int, list[dict]]:
    """Restores what `save_checkpoint` wrote; returns the number of updates done and the history: 0 and [] where there is nothing to resume.

    A checkpoint of a run with other `settings` is no part of this run, and is left alone until it is overwritten.
    """
    if not path.exists() or (metadata := load_metadata(path))["settings"] != settings:
        return 0, []
    tensors = load_tensors(path)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            states.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    return int(metadata["done"]), json.loads(metadata["history"])


def run(
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[int], dict[str, float]],
    probe: Callable[[int], dict[str, float]],
    num_updates: int,
    folder: Path,
    max_grad_norm: float,
    checkpoint_every: int,
    probe_every: int,
    settings: str,
    on_row: Sequence[Callable[[dict], None]] = (),
    rate: Callable[[int], float] = lambda update: 1.0,
) -> list[dict]:
    """Trains `named` parameters in place; returns the history, one dict an update, also written to `history.jsonl` in `folder`.

    `gradient(update)` adds to every `.grad` and returns figures; `probe(update)` returns more, every `probe_every` updates and at the end.
    `settings` is any text that identifies the run: only a checkpoint with the same one is resumed. `rate(update)` is a factor on every
    group's learning rate.
    """
    checkpoint = folder / "checkpoints" / CHECKPOINT
    rates = [group["lr"] for group in optimizer.param_groups]
    done, history = load_checkpoint(checkpoint, named, optimizer, settings)
    for row, function in itertools.product(history, on_row):  # whoever listens hears of all updates, whichever process made them
        function(row)
    with tqdm(range(done, num_updates), initial=done, total=num_updates, desc="fine-tuning", mininterval=2) as bar:
        for update in bar:
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            for group, highest in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = highest * rate(update)
            figures = gradient(update)
            check_finite({name: p.grad for name, p in named.items()}, update, "the gradient")
            norm = nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
            optimizer.step()
            check_finite(named, update, "the value")
            last = update + 1 == num_updates
            row = {"update": update + 1, **figures, "grad_norm": norm.item(), "seconds": time.perf_counter() - started}
            if (update + 1) % probe_every == 0 or last:
                row |= probe(update)
            history.append(
                {key: round(value, 6) if isinstance(value, float) and math.isfinite(value) else value for key, value in row.items()}
            )
            for function in on_row:
                function(history[-1])
            shown = ("loss", "log_prob", "kl_nats", "oracle_accuracy")
            bar.set_postfix({key: next((f"{r[key]:.3g}" for r in reversed(history) if key in r), "") for key in shown})
            if (update + 1) % checkpoint_every == 0 or last:
                metadata = {"done": str(update + 1), "history": json.dumps(history), "settings": settings}
                save_checkpoint(checkpoint, named, optimizer, metadata)
                write_history(folder, history)
    write_history(folder, history)  # a run that was cut off behind its last checkpoint has lost the file with its other outputs
    return history


def write_history(folder: Path, history: Sequence[dict]) -> None:
    """`history.jsonl`, a line an update."""
    write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def discard_checkpoint(folder: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
