"""Seconds and memory, measured on this machine: of any function, and of one update by each trainer."""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ctrl.base import Base
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.finetune import loop
from ctrl.finetune.gradients import gradient_function, supervised_gradient, updates_per_draw
from ctrl.finetune.recipe import optimizer_of
from ctrl.finetune.task import Examples, LogProb, Task
from ctrl.pairs import draw

STATUS = Path("/proc/self/status")


def seconds(function: Callable[[], object], device: torch.device | str = "cpu", repeats: int = 2) -> float:
    """The median time of `repeats` calls, after one that is not counted."""
    times = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def update_function(task: Task, log_prob: LogProb, config: dict, size: int) -> Callable[[int], dict[str, float]]:
    """`gradient(update)` of one micro-batch of `size` trajectories, or of random examples for the trainer `supervised`."""
    config = config | {"batch_size": size, "micro_batch_size": size}
    if config["trainer"] != "supervised":
        return gradient_function(task, log_prob, config)
    prompts, _, labels = draw(task.cells, task.templates, size, torch.Generator().manual_seed(task.seed))
    x_0 = torch.randn(size, *task.control.base.latent_shape, device=task.control.base.device)
    return supervised_gradient(task, Examples(x_0, prompts, labels), config)


def timed_updates(config: dict, number: int) -> list[int]:
    """The updates to time, by their numbers: in the middle of `number` equal parts of the training, so that its short and its long steps
    count with their shares; where several learn from the same trajectories, all of these."""
    group = updates_per_draw(config)
    middles = [int((k + 0.5) / number * config["num_updates"]) // group * group for k in range(number)]
    return [first + k for first in middles for k in range(group)]


def update_seconds(task: Task, log_prob: LogProb, config: dict, size: int, repeats: int = 1) -> float:
    """Seconds an update of the finetune section `config`, scaled up from one of `size` trajectories: long steps at first, then all."""
    gradient, device, group = update_function(task, log_prob, config, size), task.control.base.device, updates_per_draw(config)

    def updates_of_a_draw(first: int) -> None:
        for k in range(group):
            gradient(first + k)

    starts = 0, (config["num_updates"] - 1) // group * group
    coarse, last = (seconds(lambda u=u: updates_of_a_draw(u), device, repeats) / group for u in starts)
    share = config["coarse"]["end"]
    return config["batch_size"] / size * (share * coarse + (1 - share) * last)


def timed_rows(control: Control, config: dict, gradient: Callable[[int], dict[str, float]], number: int) -> list[dict]:
    """The rows of the training loop for `number` updates by `gradient(k)`, after gradient(0), which warms up and is not among them."""
    with tempfile.TemporaryDirectory() as folder:
        return loop.run(
            control.parameters(), [optimizer_of(control, config)], gradient, lambda k: {}, number + 1, Path(folder),
            config["max_grad_norm"], number + 1, number + 1, "cost",
        )[1:]  # fmt: skip


class Killed(UserError):
    """A process that ended without an answer."""


def alone(function: Callable, *arguments: object) -> object:
    """`function(*arguments)` in a new process, whose peak memory is that of nothing else. Raises Killed where it was killed.

    It is a fork of a process that did nothing but load the libraries, once, which takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise Killed("its process was killed, perhaps for its memory") from error


def peak_memory_mb(base: Base) -> float:
    """The most memory that this process held; unlike `getrusage`'s, the machine's own figure does not start at the parent's."""
    if base.device.type == "cuda" or not STATUS.exists():
        return base.peak_memory_mb()
    return status_mb("VmHWM")


def status_mb(key: str) -> float:
    """What Linux says of this process, in MB: VmRSS is what it holds, VmHWM the most that it held."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key)) / 2**10


def free_memory_mb(device: torch.device | str = "cpu") -> float | None:
    """What a new process can still take: of the GPU, or of the machine or this container; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**10
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        used = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("anon "))
        return min(free, (int((group / "memory.max").read_text()) - used) / 2**20)
    except (OSError, StopIteration, ValueError):  # no container, or one without a limit
        return free


def update_cost(task: Task, log_prob: LogProb, config: dict) -> dict:
    """What an update of the finetune section `config` costs: measured on one micro-batch, scaled to `batch_size`.

    Timed are an update of long steps and one of the sampler's own, after one that is not counted, and each with those that learn from the
    same trajectories. Time grows with the number of micro-batches, memory does not; but `policy_gradient` keeps its trajectories.
    """
    base, size, batch, num = task.control.base, config["micro_batch_size"], config["batch_size"], config["num_updates"]
    reuse = updates_per_draw(config)
    share = config["coarse"]["end"]
    phases = [(share, 0), (1 - share, math.ceil(share * num / reuse) * reuse)]
    weights = {first + k: weight / reuse for weight, first in phases if weight for k in range(reuse)}
    numbers, gradient, before = [min(weights), *weights], update_function(task, log_prob, config, size), peak_memory_mb(base)
    rows = timed_rows(task.control, config, lambda k: gradient(numbers[k]), len(weights))
    seconds = sum(weight * row["seconds"] for weight, row in zip(weights.values(), rows, strict=True)) * batch / size
    peak = memory = peak_memory_mb(base)
    if config["trainer"] == "policy_gradient":
        memory += (batch - size) * (3 * task.process.num_steps + 1) * math.prod(base.latent_shape) * 4 / 2**20
    return {
        "trainer": config["trainer"],
        "batch_size": batch,
        "micro_batch_size": size,
        "gradient_checkpointing": config["gradient_checkpointing"],
        "reuse": reuse,
        "num_updates": num,
        "seconds_per_update": seconds,
        "hours": seconds * num / 3600,
        "memory_mb": memory,
        "measured_memory_mb": peak,
        "memory_before_mb": before,
        "device": base.device_name,
    }
