"""The training loop: optimizers, clipping, NaN guard, history, checkpoints, resume. It knows no trainer, no model and no images.

SIGTERM, by which a cluster announces the end of a job, ends it at the next update with a checkpoint. With several processes (`parallel`)
all of them hold the same weights, and the first one alone writes.

Everything random in update `u` must follow from `u` alone; then weights, optimizers' states and `u` are all that a checkpoint needs.
"""

import itertools
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ctrl.errors import Stopped, UserError
from ctrl.finetune.parallel import is_main, sum_gradients
from ctrl.io import load_metadata, load_tensors, save_tensors, write_text

CHECKPOINT = "checkpoint.safetensors"
SHOWN = ("loss", "log_prob", "kl_nats", "oracle_accuracy")  # beside the progress bar


def check_finite(named: dict[str, Tensor | None], update: int, what: str) -> None:
    """Raises UserError naming the update and the first tensor that holds a NaN or an infinity."""
    if not (tensors := {name: tensor for name, tensor in named.items() if tensor is not None}):
        return
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])  # one answer to wait for, where there is a GPU
    for name, good in zip(tensors, finite.tolist(), strict=True):
        if not good:
            raise UserError(
                f"update {update}: {what} of {name} is not finite; the last checkpoint is kept; lower finetune.learning_rate, "
                "finetune.embedding_learning_rate or finetune.gamma, or soften the classifier (finetune.temperature)"
            )


def places(optimizers: Sequence[Optimizer]) -> list[int]:
    """Where each optimizer's parameters begin among those of all, one after the other."""
    sizes = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    return [sum(sizes[:k]) for k in range(len(sizes))]


def save_checkpoint(path: Path, named: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], metadata: dict[str, str]) -> None:
    """One atomic file: parameters, optimizers' states, and as `metadata` the number of updates done, the history and the run's settings."""
    tensors = {f"parameter/{name}": p.detach() for name, p in named.items()}
    for optimizer, first in zip(optimizers, places(optimizers), strict=True):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{first + i}/{key}": value for key, value in state.items()}
    save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path, named: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], settings: str) -> tuple[int, list[dict]]:
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
            states.setdefault(int(i), {})[name] = value.clone()  # a tensor of the file would keep its place on the disk, deleted or not
    for optimizer, first, end in zip(optimizers, (firsts := places(optimizers)), [*firsts[1:], math.inf], strict=True):
        own = {i - first: state for i, state in states.items() if first <= i < end}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": own})
    return int(metadata["done"]), json.loads(metadata["history"])


@contextmanager
def termination() -> Iterator[threading.Event]:
    """Inside, SIGTERM only sets the event that this gives. (In the main thread: no other may handle signals.)"""
    event, mine = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set()) if mine else None
    try:
        yield event
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def take_step(
    named: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], figures: dict[str, float], update: int, max_grad_norm: float
) -> float:
    """One step of the optimizers by the clipped gradients; returns their norm before that. UserError where a number is not finite."""
    check_finite({key: torch.tensor(figures[key]) for key in ("loss",) if key in figures}, update, "the value")
    check_finite({name: p.grad for name, p in named.items()}, update, "the gradient")
    norm = nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
    check_finite(named, update, "the value")
    return norm.item()


def run(
    named: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
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
    stop_every: int = 1,
) -> list[dict]:
    """Trains `named` parameters in place; returns the history, one dict an update, also written to `history.jsonl` in `folder`.

    `gradient(update)` adds to every `.grad` and returns figures; `probe(update)` returns more, every `probe_every` updates and at the end.
    `settings` is any text that identifies the run: only a checkpoint with the same one is resumed. `rate(update)` is a factor on every
    group's learning rate. Raises Stopped after SIGTERM, with the checkpoint written; `stop_every` is how many updates belong together.
    """
    checkpoint = folder / "checkpoints" / CHECKPOINT
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    done, history = load_checkpoint(checkpoint, named, optimizers, settings)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading makes them anew
    for row, function in itertools.product(history, on_row):  # whoever listens hears of all updates, whichever process made them
        function(row)
    bar = tqdm(initial=done, total=num_updates, desc="fine-tuning", mininterval=2, disable=not is_main())
    with bar, termination() as terminated:
        for update in range(done, num_updates):
            started = time.perf_counter()
            for parameter in named.values():
                parameter.grad = None
            for group, highest in zip(groups, rates, strict=True):
                group["lr"] = highest * rate(update)
            figures = gradient(update)
            stop = sum_gradients(list(named.values()), terminated.is_set())
            norm = take_step(named, optimizers, figures, update, max_grad_norm)
            last, stop = update + 1 == num_updates, stop and (update + 1) % stop_every == 0
            row = {"update": update + 1, **figures, "grad_norm": norm, "seconds": time.perf_counter() - started}
            if ((update + 1) % probe_every == 0 or last) and is_main():
                row |= probe(update)
            history.append(
                {key: round(value, 6) if isinstance(value, float) and math.isfinite(value) else value for key, value in row.items()}
            )
            for function in on_row:
                function(history[-1])
            if ((update + 1) % checkpoint_every == 0 or last or stop) and is_main():
                metadata = {"done": str(update + 1), "history": json.dumps(history), "settings": settings}
                save_checkpoint(checkpoint, named, optimizers, metadata)
                write_history(folder, history)
            if stop and not last:
                raise Stopped(f"SIGTERM: stopped after update {update + 1} of {num_updates}; {checkpoint} has it, and the next run goes on")
            shown = {key: next((f"{row[key]:.3g}" for row in reversed(history) if key in row), "") for key in SHOWN}
            bar.set_postfix({key: text for key, text in shown.items() if text}, refresh=False)
            bar.update()
    if is_main():
        write_history(folder, history)  # a run that was cut off behind its last checkpoint has lost the file with its other outputs
    return history


def write_history(folder: Path, history: Sequence[dict]) -> None:
    """`history.jsonl`, a line an update."""
    write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def discard_checkpoint(folder: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
