"""Seconds and memory, measured on this machine: of any function, and of one update by each trainer."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ctrl.finetune.recipe import Examples, LogProb, Task, gradient_function, supervised_gradient


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


def peak_memory_mb(function: Callable[[], object], device: torch.device | str = "cpu") -> float | None:
    """The most that was held during a call: of the GPU's memory, else of this process; None where Linux does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left would count as this one's
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (OSError, AttributeError):
        return None
    function()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) / 2**10


def update_function(task: Task, log_prob: LogProb, config: dict, size: int) -> Callable[[int], dict[str, float]]:
    """`gradient(update)` of one micro-batch of `size` trajectories, or of random examples for the trainer `supervised`."""
    config = config | {"batch_size": size, "micro_batch_size": size}
    if config["trainer"] != "supervised":
        return gradient_function(task, log_prob, config)
    prompts = [task.templates[0].format(subject) for subject, _ in task.cells]
    x_0 = torch.randn(len(prompts), *task.control.base.latent_shape, device=task.control.base.device)
    return supervised_gradient(task, Examples(x_0, prompts, torch.tensor([y for _, y in task.cells])), size)


def update_seconds(task: Task, log_prob: LogProb, config: dict, size: int, repeats: int = 1) -> float:
    """Seconds an update of the finetune section `config`, scaled up from one of `size` trajectories: long steps at first, then all."""
    gradient, device = update_function(task, log_prob, config, size), task.control.base.device
    coarse, last = (seconds(lambda u=u: gradient(u), device, repeats) for u in (0, config["num_updates"] - 1))
    share = config["coarse"]["end"]
    return config["batch_size"] / size * (share * coarse + (1 - share) * last)


def update_memory_mb(task: Task, log_prob: LogProb, config: dict, size: int) -> tuple[float, float] | None:
    """(memory at no trajectory, more for each trajectory at a time), from updates of `size` and of twice as many; None: see above."""
    last, device = config["num_updates"] - 1, task.control.base.device
    peaks = [peak_memory_mb(lambda n=n: update_function(task, log_prob, config, n)(last), device) for n in (size, 2 * size)]
    if None in peaks:
        return None
    slope = max(peaks[1] - peaks[0], 0.0) / size
    return peaks[0] - slope * size, slope
