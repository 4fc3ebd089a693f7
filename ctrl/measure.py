"""Seconds, measured on this machine: of any function, and of one update by each trainer."""

import statistics
import time
from collections.abc import Callable

import torch

from ctrl.finetune.recipe import Examples, LogProb, Task, gradient_function, supervised_gradient, updates_per_draw


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
    prompts = [task.templates[0].format(subject) for subject, _ in task.cells]
    x_0 = torch.randn(len(prompts), *task.control.base.latent_shape, device=task.control.base.device)
    return supervised_gradient(task, Examples(x_0, prompts, torch.tensor([y for _, y in task.cells])), size)


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
