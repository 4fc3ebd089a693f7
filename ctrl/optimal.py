"""The best that a controlled process of few steps can do, in one dimension, where dynamic programming finds it.

A controlled step is a Gaussian as wide as the pretrained one: it moves the mean of x_s and cannot narrow its law. The exact conditional
process does narrow it (x_s must end where y holds), so that with long steps no policy reaches p_gamma, however it is trained; with short
ones all of the difference goes away. This module says how much of a gap is the sampler's, and not the trainer's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.process import Process


def best_control(process: Process, log_prob: Callable[[Tensor], Tensor], gamma: float, active: Sequence[bool], grid: Tensor) -> dict:
    """The policy with the highest E[gamma log p(y | x_0)] − KL, on a pretrained model of N(0, 1).

    `grid` with shape (G,) is even, ascending, finer than every sigma of the process, and wide enough to hold all the mass; `log_prob` maps
    it to nats with shape (G,). Returns the laws of x_0 on it, `controlled`, `exact` (p_gamma) and `pretrained`, each with shape (G,), and
    the KL in nats of the first (over paths) and of the second, `kl` and `exact_kl`.
    """
    x, width = grid.double(), (grid[1] - grid[0]).item()
    means, transitions = [], []
    for i in range(process.num_steps):
        mean = process.mean(i, x, (1 - process.abar_t[i]).sqrt() * x)  # E[eps | x_t] of N(0, 1)
        means.append(mean)
        sigma = max(process.sigma(i), width)  # a step without noise is smoothed by a cell
        transitions.append(lambda centres, sigma=sigma: (-0.5 * ((x - centres[:, None]) / sigma).square()).softmax(1))
    value, targets = -gamma * log_prob(x).double(), []
    for i in reversed(range(process.num_steps)):  # Bellman: where to, for the least KL of this step plus what is left to pay
        left, target = transitions[i](x) @ value, means[i]
        if active[i]:
            cost = (x - means[i][:, None]).square() / (2 * process.sigma(i) ** 2) + left
            value, best = cost.min(1)
            target = x[best]
        else:
            value = transitions[i](means[i]) @ value
        targets.append(target)
    controlled = pretrained = (-0.5 * x.square()).softmax(0)
    kl = 0.0
    for i, target in enumerate(reversed(targets)):
        if active[i]:
            kl += (controlled @ (target - means[i]).square()).item() / (2 * process.sigma(i) ** 2)
        controlled, pretrained = controlled @ transitions[i](target), pretrained @ transitions[i](means[i])
    log_exact = torch.log_softmax(pretrained.clamp(min=1e-300).log() + gamma * log_prob(x).double(), 0)
    exact_kl = (log_exact.exp() * (log_exact - pretrained.clamp(min=1e-300).log())).sum().item()
    return {"controlled": controlled, "exact": log_exact.exp(), "pretrained": pretrained, "kl": kl, "exact_kl": exact_kl}


def log_interval(x: Tensor, low: float, high: float, scale: float) -> Tensor:
    """log p(low ≤ score < high | x) in nats for score ~ Logistic(x, `scale`), as the density head of a classifier says it."""
    share = -torch.expm1(torch.tensor((low - high) / scale, dtype=x.dtype))  # of sigmoid(a) − sigmoid(b), exact in the tails
    logs = torch.nn.functional.logsigmoid
    return logs((high - x) / scale) + logs((x - low) / scale) + share.log()
