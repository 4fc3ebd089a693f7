"""What is trained on what, and the trajectories of an update, which follow from its number alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctrl.control import Control
from ctrl.finetune.objective import hold, within_cell_variance
from ctrl.finetune.speed import autocast
from ctrl.pairs import draw
from ctrl.process import Denoiser, Pair, Process, Unguided
from ctrl.sampling import noise_of

Cells = Sequence[tuple[str, int]] | Sequence[tuple[str, tuple[float, float]]]
LogProb = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained on what: the (subject, label) or (subject, (low, high)) `cells` in prompt `templates`.

    `guidance_scale` is that of the prompt, which both policies have.
    """

    control: Control
    process: Process
    cells: Cells
    templates: Sequence[str]
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Examples:
    """Offline data: latents with shape (N, C, h, w), their prompts, and labels with shape (N,)."""

    x_0: Tensor
    prompts: Sequence[str]
    labels: Tensor


class Policies(NamedTuple):
    """The controlled model, the pretrained one, the former with its parameters held, and the first two in one batch."""

    psi: Denoiser
    pre: Denoiser
    held: Denoiser
    both: Pair


@dataclass(frozen=True)
class Batch:
    """The trajectories of an update: their process, of long or of the sampler's own steps, prompts, subjects, labels and seeds."""

    process: Process
    prompts: Sequence[str]
    subjects: Sequence[str]
    labels: Tensor
    seeds: Tensor
    generator: torch.Generator

    def part(self, task: Task, rows: Tensor, switch: bool | str) -> tuple[Policies, Tensor, Tensor]:
        """Policies, labels and noise of the trajectories `rows`; `switch` is that of autocast."""
        control, prompts, y = task.control, [self.prompts[k] for k in rows], self.labels[rows].to(task.control.base.device)
        psi = control.denoiser(self.process, prompts, y, task.guidance_scale)
        pre = control.base_denoiser(self.process, prompts, task.guidance_scale)
        noise = noise_of(self.seeds[rows].tolist(), control.base.latent_shape, self.process.num_steps, control.base.device)
        denoisers = psi, pre, hold(psi, control.parameters().values()), control.both(self.process, prompts, y, task.guidance_scale)
        return Policies(*(autocast(d, switch, control.base.device) for d in denoisers)), y, noise

    def unguided(self, task: Task, rows: Tensor, switch: bool | str) -> Unguided:
        """The pretrained model of the trajectories `rows` in two parts; `switch` is that of autocast."""
        parts = task.control.unguided(self.process, [self.prompts[k] for k in rows], task.guidance_scale)
        return Unguided(*(autocast(part, switch, task.control.base.device) for part in parts))

    def variance(self, log_w: Tensor) -> dict[str, float]:
        """var_log_w of this batch; nothing for a continuous label, which no two trajectories share."""
        if self.labels.is_floating_point():
            return {}
        return {"var_log_w": within_cell_variance(log_w, list(zip(self.subjects, self.labels.tolist(), strict=True)))}


def batch_function(task: Task, config: dict) -> Callable[[int], Batch]:
    """`batch(update)`, which follows from the update's number alone."""
    # What longer steps teach holds for the sampler's own but for little, and costs less.
    long_steps = task.process.coarse(config["coarse"]["stride"], task.control.active(task.process))

    def batch(update: int) -> Batch:
        process = long_steps if max(update, 0) / config["num_updates"] < config["coarse"]["end"] else task.process
        generator = torch.Generator().manual_seed(task.seed * 1_000_003 + update)
        drawn = draw(task.cells, task.templates, config["batch_size"], generator)
        return Batch(process, *drawn, torch.randint(2**62, (config["batch_size"],), generator=generator), generator)

    return batch


def recomputed(denoiser: Callable) -> Callable:
    """A denoiser that keeps no activations, and computes them again on the way back (gradient checkpointing)."""
    return lambda x_t, i: torch.utils.checkpoint.checkpoint(denoiser, x_t, i, use_reentrant=False)
