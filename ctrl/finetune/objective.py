"""The objective's settings, and the numbers that say how far a policy is from its optimum."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ctrl.process import Denoiser


def hold(denoiser: Denoiser, parameters: Iterable[nn.Parameter]) -> Denoiser:
    """The same denoiser, whose gradient goes to x_t alone: for its own pass the `parameters` are constants."""
    parameters = list(parameters)

    def held(x_t: Tensor, i: int) -> Tensor:
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            return denoiser(x_t, i)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    return held


def effective_gamma(gamma: float, kl_weight: float, kl_reduction: str, num_dimensions: int) -> float:
    """The gamma of p_gamma ∝ p_pre · p̂^gamma that a recipe amounts to: the published one averages the KL over the latent dimensions.

    Without a KL there is none: infinity, reward maximisation.
    """
    weight = summed_kl_weight(kl_weight, kl_reduction, num_dimensions)
    return gamma / weight if weight else math.inf


def summed_kl_weight(kl_weight: float, kl_reduction: str, num_dimensions: int) -> float:
    """What the KL in nats, summed over dimensions, is multiplied by in the loss."""
    return kl_weight / num_dimensions if kl_reduction == "mean" else kl_weight


def annealed(done: float, start: float, hold: float, end: float) -> float:
    """Factor on the classifier's temperature after a share `done` of the updates: `start` up to `hold`, then geometric to 1 at `end`."""
    if done >= end:
        return 1.0
    if done <= hold:
        return start
    return math.exp(math.log(start) * (1 - (done - hold) / (end - hold)))


def term_weights(active: Sequence[bool], num_terms: int | None, generator: torch.Generator) -> list[float] | None:
    """A weight for each step's KL or regression term: `num_terms` of the active steps, drawn at random, stand for all of them, the others
    have 0. The expectation over the draw is the full sum. None, for no weights: all steps."""
    steps = [i for i, acts in enumerate(active) if acts]
    if num_terms is None or num_terms >= len(steps):
        return None
    kept = {steps[k] for k in torch.randperm(len(steps), generator=generator)[:num_terms].tolist()}
    return [len(steps) / num_terms if i in kept else 0.0 for i in range(len(active))]


def learning_rate_factor(update: int, num_updates: int, warmup: int, decay: str) -> float:
    """Linear warm-up over `warmup` updates; then constant (`none`), or down to 0 at the end: by a half `cosine`, or by a `quadratic`, whose
    long tail takes the noise out of weights that are near their best."""
    done = update / num_updates
    left = {"none": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "quadratic": (1 - done) ** 2}[decay]
    return left * min(1.0, (update + 1) / max(warmup, 1))


def within_cell_variance(log_w: Tensor, cells: Sequence) -> float:
    """Pooled variance of log w = gamma log p̂(y|x_0) − log psi(path)/pre(path) within each (c, y), in nats².

    Zero exactly at the optimum, where log w is the constant log Z(c, y). NaN if no cell has two trajectories.
    """
    groups: dict = {}
    for value, cell in zip(log_w.tolist(), cells, strict=True):
        groups.setdefault(cell, []).append(value)
    squares = sum(torch.tensor(g).double().var(correction=0).item() * len(g) for g in groups.values())
    freedom = len(log_w) - len(groups)
    return squares / freedom if freedom else math.nan
