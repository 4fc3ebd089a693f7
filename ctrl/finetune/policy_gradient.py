"""Policy gradients, for labels known only through a black box: the reward needs no gradient, and no classifier (Black et al. 2023, "DDPO").

    J = E[ gamma · r(x_0, y) − kl_weight · Σ_t KL_t ],    x_0:T ~ psi                                       arXiv 2305.13301
    ∇J = E[ Σ_t A_t ∇ log psi(x_s | x_t) − kl_weight · ∇ KL_t ],    A_t = gamma · r − kl_weight · Σ_later KL − baseline

A step is paid for what comes after it: the reward, and the KL of the later steps; its own KL is differentiated at a fixed x_t. The
advantage is not divided by its spread, which would change gamma.

The same trajectories serve several updates, by the clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347):
min(ρ_t A_t, clip(ρ_t, 1 − clip, 1 + clip) A_t). ρ_t = psi(x_s | x_t) / psi_old(x_s | x_t) is the ratio of *one step's* densities, its
log-probabilities summed over the dimensions of x. The KL is not clipped. In the first of these updates ρ_t = 1, and ∇J has no bias.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl.process import Denoiser, Process


def rollout(process: Process, psi: Denoiser, pre: Denoiser, noise: Tensor, active: Sequence[bool] | None = None) -> dict[str, Tensor]:
    """Trajectories of `noise` with shape (N + 1, B, *), without gradients: eps with shape (N, B, *), x_0 (B, *), log_ratio (B,).

    `eps_pre` is the pretrained model's along the same path, `kl_nats` with shape (N, B) the divergence of each step. Where `active` says
    that psi does not differ from pre, only pre is run.
    """
    with torch.no_grad():
        x, all_eps, all_eps_pre, kl, log_ratio = noise[0], [], [], [], noise.new_zeros(noise.shape[1])
        for i in range(process.num_steps):
            eps = eps_pre = pre(x, i)
            if active is None or active[i]:
                eps = psi(x, i)
                kl.append(process.kl(i, eps, eps_pre))
                log_ratio = log_ratio + process.log_ratio(i, eps, eps_pre, noise[i + 1])
            else:
                kl.append(torch.zeros_like(log_ratio))
            all_eps.append(eps)
            all_eps_pre.append(eps_pre)
            x = process.step(i, x, eps, noise[i + 1])
    eps, eps_pre, kl = torch.stack(all_eps), torch.stack(all_eps_pre), torch.stack(kl)
    return {"noise": noise, "eps": eps, "eps_pre": eps_pre, "kl_nats": kl, "log_ratio": log_ratio, "x_0": x}


def advantages(reward: Tensor, kl: Tensor, groups: Tensor, gamma: float, kl_weight: float = 1.0) -> Tensor:
    """A_t with shape (N, B): `gamma · reward` (B,) less `kl_weight` times the `kl` (N, B) of the later steps, and less a baseline.

    The baseline is the mean of the *others* in the same of `groups` (B,), such as labels, so that it has no bias; who is alone in a group
    is compared with the whole batch.
    """
    later = kl.flip(0).cumsum(0).flip(0) - kl
    value = gamma * reward - kl_weight * later
    _, index = groups.unique(return_inverse=True)
    total = value.new_zeros(len(value), int(index.max()) + 1).index_add_(1, index, value)
    others, number = total[:, index] - value, torch.bincount(index)[index] - 1
    alone = number == 0
    others = torch.where(alone, value.sum(1, keepdim=True) - value, others)
    number = torch.where(alone, len(reward) - 1, number)
    return value - others / number.clamp(min=1)


def policy_gradient(
    process: Process,
    psi: Denoiser,
    path: dict[str, Tensor],
    advantage: Tensor,
    clip: float,
    kl_weight: float = 1.0,
    share: float = 1.0,
    active: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Adds the gradient of −`share` times the sum of the surrogate over the batch to every trained parameter's `.grad`.

    `path` is a `rollout` of an earlier or of the present psi, `advantage` its A_t with shape (N, B). A graph spans one step: the memory
    does not grow with their number. Returns `clipped` with shape (B,), the share of its active steps whose gradient the clip took away.
    """
    acts = [i for i in range(process.num_steps) if active is None or active[i]]
    x, noise, clipped = path["noise"][0], path["noise"], 0.0
    for i in range(process.num_steps):
        eps_old = path["eps"][i]
        if i in acts:
            eps = psi(x, i)
            ratio = (-process.log_ratio(i, eps_old, eps, noise[i + 1])).exp()
            free, bounded = ratio * advantage[i], ratio.clamp(1 - clip, 1 + clip) * advantage[i]
            loss = kl_weight * process.kl(i, eps, path["eps_pre"][i]) - torch.minimum(free, bounded)
            (share * loss.sum()).backward()
            clipped = clipped + (bounded < free).double() / len(acts)
        x = process.step(i, x, eps_old, noise[i + 1])
    return {"clipped": clipped}
