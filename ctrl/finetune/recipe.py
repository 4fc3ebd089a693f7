"""CTRL from beginning to end: the trainer's gradient, the optimizer, and the loop that runs them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ctrl.control import Control
from ctrl.finetune import loop
from ctrl.finetune.gradients import gradient_function, supervised_gradient, updates_per_draw
from ctrl.finetune.objective import learning_rate_factor
from ctrl.finetune.speed import wanted
from ctrl.finetune.task import Examples, LogProb, Task


def train(
    task: Task, log_prob: LogProb | None, probe: Callable[[int], dict[str, float]], config: dict, folder: Path, identity: str,
    on_row: Sequence[Callable[[dict], None]] = (), examples: Examples | None = None,
) -> list[dict]:  # fmt: skip
    """Trains `task.control` in place by the finetune section `config`; resumes a checkpoint of the same `identity`; returns the history.

    `log_prob(x_0, y, temperature)` gives nats with shape (B,), differentiable but for `policy_gradient`, to which it is a
    black box; `probe` is a `probe_function`. The trainer `supervised` learns from `examples` (`log_prob` may be None), the others from
    trajectories.
    """
    num_updates, warmup, decay = config["num_updates"], config["warmup_updates"], config["decay"]
    online = config["trainer"] != "supervised"
    gradient = gradient_function(task, log_prob, config) if online else supervised_gradient(task, examples, config)
    return loop.run(
        task.control.parameters(), [optimizer_of(task.control, config)], gradient, probe, num_updates, folder, config["max_grad_norm"],
        config["checkpoint_every"], config["probe"]["every"], identity, on_row,
        lambda update: learning_rate_factor(update, num_updates, warmup, decay), updates_per_draw(config),
    )  # fmt: skip


def optimizer_of(control: Control, config: dict) -> torch.optim.Optimizer:
    """AdamW on all that is trained, by the finetune section `config`."""
    groups = control.groups(config["learning_rate"], config["embedding_learning_rate"])
    fused = wanted(config["speed"]["fused_adamw"], control.base.device) or None  # None: torch's choice
    return torch.optim.AdamW(groups, betas=tuple(config["betas"]), weight_decay=config["weight_decay"], fused=fused)
