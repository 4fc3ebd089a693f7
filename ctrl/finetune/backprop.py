"""CTRL's own trainer: differentiate the objective through the sampler (Zhao et al., ICLR 2025, arXiv 2406.12120).

    loss = −gamma · log p̂(y | x_0) + kl_weight · Σ_t KL_t,    x_0:T ~ psi

A gradient by way of the trajectories is noisy. With `held` the loss has the trajectory's own log-ratio log psi/pre in place of its
expectation Σ_t KL_t, and psi's parameters are fixed wherever they do not move x ("sticking the landing", Roeder et al., NeurIPS 2017, arXiv
1703.09194). That adds a gradient with mean 0; and the nearer gamma · log p̂ − log psi/pre is to being the same for all trajectories of a
label, as it is at the optimum, the less is left that is random.

Truncated back-propagation follows only the last K steps of a trajectory. The local KL terms of the steps before that keep their gradient
with respect to the parameters, at a detached x_t.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Pair, Process


def backprop(
    process: Process,
    psi: Denoiser,
    pre: Denoiser,
    log_prob: Callable[[Tensor], Tensor],
    noise: Tensor,
    gamma: float,
    kl_weight: float = 1.0,
    num_grad_steps: Tensor | None = None,
    share: float = 1.0,
    active: Sequence[bool] | None = None,
    max_adjoint_norm: float | None = None,
    weights: Sequence[float] | None = None,
    held: Denoiser | None = None,
    recompute: Callable[[Denoiser], Denoiser] | None = None,
    both: Pair | None = None,
) -> dict[str, Tensor]:
    """Adds the gradient of `share` times the sum of the loss over the batch to every trained parameter's `.grad`.

    `noise` has shape (N + 1, B, *); `log_prob` maps x_0 with shape (B, *) to nats with shape (B,). `num_grad_steps` with shape (B,) is K
    for every trajectory, None for all N. `active` says at which steps psi differs from pre at all: elsewhere only pre is run.
    `max_adjoint_norm` bounds the norm of every trajectory's adjoint g_t = ∂loss/∂x_t, at every step: see `clip_adjoint`.
    `weights` multiply each step's KL (see `objective.term_weights`); where one is 0, pre is not run. `held` is psi with its parameters held
    (see `objective.hold`): it takes the noise of the trajectories out of the gradient, for one more pass a step. `recompute` makes of a
    denoiser one that keeps no activations; it is for the steps that are followed: the graph of another is gone before the next pass.
    `both` is psi and pre in one batch, for less time: it is asked where the gradient of both is needed.
    Returns log_prob, kl_nats, log_ratio (log psi/pre of the path; NaN where steps were left out) and x_0, detached.
    """
    num_steps, x = process.num_steps, noise[0]
    first = torch.zeros(noise.shape[1], dtype=torch.long) if num_grad_steps is None else num_steps - num_grad_steps
    loss, kl, log_ratio = 0.0, x.new_zeros(len(x)), x.new_zeros(len(x))
    whole = psi, pre, held
    for i in range(num_steps):
        follow = i > first  # on the CPU: to ask a GPU would stop it
        freed = bool((i < first).all())  # nothing later depends on this step's graph
        psi, pre, held = whole if freed or recompute is None else (d and recompute(d) for d in whole)
        x = followed(x, follow)
        if active is not None and not active[i]:
            x = clip_adjoint(process.step(i, x, pre(x, i), noise[i + 1]), share, max_adjoint_norm)
            continue
        weight = 1.0 if weights is None else weights[i]
        if weight == 0:
            log_ratio = log_ratio + torch.nan
            with torch.set_grad_enabled(not freed):
                x = clip_adjoint(process.step(i, x, psi(x, i), noise[i + 1]), share, max_adjoint_norm)
            continue
        eps, eps_pre = predictions(psi, pre, both, x, i, not freed, kl_weight > 0)
        kl_i = weight * process.kl(i, eps if kl_weight > 0 else eps.detach(), eps_pre)
        kl = kl + kl_i.detach()
        if held is not None and kl_weight and x.requires_grad:
            kl_i = kl_i + weight * process.martingale(i, held(x, i), eps_pre, noise[i + 1])
        log_ratio = log_ratio + process.log_ratio(i, eps.detach(), eps_pre.detach(), noise[i + 1])
        if freed:
            if kl_weight > 0:
                (share * kl_weight * kl_i.sum()).backward()
            eps = eps.detach()
        elif kl_weight > 0:
            loss = loss + kl_weight * kl_i.sum()
        x = clip_adjoint(process.step(i, x, eps, noise[i + 1]), share, max_adjoint_norm)
    log_p = log_prob(x)
    (share * (loss - gamma * log_p.sum())).backward()
    return {"log_prob": log_p.detach(), "kl_nats": kl, "log_ratio": log_ratio, "x_0": x.detach()}


def predictions(
    psi: Denoiser, pre: Denoiser, both: Pair | None, x: Tensor, i: int, is_followed: bool, has_kl: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """eps of psi and of pre, each with a graph where somebody asks for its gradient: a later step, or the KL of this one."""
    if both is not None and x.requires_grad and has_kl:
        return both(x, i)
    with torch.set_grad_enabled(is_followed or has_kl):
        eps = psi(x, i)
    with torch.set_grad_enabled(x.requires_grad and has_kl):  # without a KL pre is a figure to report, and no more
        return eps, pre(x, i)


def followed(x: Tensor, follow: Tensor) -> Tensor:
    """`x` with shape (B, *), detached but for the trajectories that `follow`, with shape (B,) and on the CPU, says."""
    if follow.all():
        return x
    return torch.where(follow.to(x.device).view(-1, *[1] * (x.ndim - 1)), x, x.detach()) if follow.any() else x.detach()


def clip_adjoint(x: Tensor, share: float, max_norm: float | None) -> Tensor:
    """`x` with shape (B, *), whose gradient is scaled down, each trajectory's by itself, to a norm of `share * max_norm` on its way back.

    A sharp classifier gives most trajectories no gradient and a few that missed their label one hundreds of times the median. Without a
    bound those few are the whole batch, and two batches hardly agree on a direction. The bound is a bias: where it bites, the label counts
    for less than gamma says.
    """
    if max_norm is not None and x.requires_grad:
        x.register_hook(lambda g: bounded(g, share * max_norm))
    return x


def bounded(g: Tensor, max_norm: float | None) -> Tensor:
    """`g` with shape (B, *), each row by itself scaled down to a norm of `max_norm`; None: as it is."""
    if max_norm is None:
        return g
    norm = g.flatten(1).norm(dim=1).clamp(min=1e-30)
    return g * (max_norm / norm).clamp(max=1).view(-1, *[1] * (g.ndim - 1))
