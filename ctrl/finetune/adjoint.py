"""Adjoint matching: sample without gradients, walk back through the *pretrained* model, regress (Domingo-Enrich et al., ICLR 2025).

    g_0 = gamma · ∇ log p̂(y | x_0),    g_t = (∂mu_pre(x_t) / ∂x_t)ᵀ g_s        arXiv 2409.08861, the "lean" adjoint
    loss = Σ_t ‖mu_psi(x_t) − mu_pre(x_t) − sigma_t² g_s‖² / (2 sigma_t²)       at its minimum psi samples p_gamma

With `held`, psi with its parameters held, the walk goes back through psi itself and along the trajectory's own log-ratio instead:

    g_t = ∇_{x_t} [g_s · mu_psi(x_t) − log psi(x_s | x_t) / pre(x_s | x_t)],    x_s = mu_psi(x_t) + sigma_t eps

At the optimum both have the mean ∇ log E[p̂^gamma | x_t]; the lean one scatters around it, this one is it, for one more pass back a step.
No graph spans more than one step, so the memory does not grow with their number.

A large guidance scale of the prompt makes mu_pre steep, and g with it. With `unguided` the walk goes back through the model under the
prompt alone: flatter, cheaper by the way back of the empty prompt, and biased.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.finetune.backprop import bounded
from ctrl.process import Denoiser, Process, Unguided


def adjoint(
    process: Process,
    psi: Denoiser,
    pre: Denoiser,
    log_prob: Callable[[Tensor], Tensor],
    noise: Tensor,
    gamma: float,
    kl_weight: float = 1.0,
    share: float = 1.0,
    active: Sequence[bool] | None = None,
    max_adjoint_norm: float | None = None,
    weights: Sequence[float] | None = None,
    held: Denoiser | None = None,
    unguided: Unguided | None = None,
) -> dict[str, Tensor]:
    """Adds the gradient of `share` times the sum of the loss over the batch to every trained parameter's `.grad`.

    Arguments and result are those of `backprop`, without a truncation; where a weight is 0, nothing is regressed. `kl_weight` scales
    the regularisation: the target shift of mu is sigma_t² g_s / kl_weight. `unguided` is pre in two parts, the first of which the walk goes
    back through; None: through all of pre. Raises ValueError for a `kl_weight` of 0, where there is nothing to regress on, and for
    `unguided` beside `held`.
    """
    if kl_weight <= 0:
        raise ValueError("adjoint matching needs a KL: kl_weight must be above 0; maximise a reward alone by backprop")
    if held is not None and unguided is not None:
        raise ValueError("held walks back through psi itself; unguided is for the walk through pre")
    num_steps, path = process.num_steps, [noise[0]]
    acts = [active is None or active[i] for i in range(num_steps)]
    with torch.no_grad():
        for i in range(num_steps):
            path.append(process.step(i, path[i], (psi if acts[i] else pre)(path[i], i), noise[i + 1]))
    with torch.enable_grad():
        x_0 = path[-1].detach().requires_grad_()
        log_p = log_prob(x_0)
        (g,) = torch.autograd.grad(gamma * log_p.sum(), x_0)
    g, kl, log_ratio = bounded(g, max_adjoint_norm), noise.new_zeros(noise.shape[1]), noise.new_zeros(noise.shape[1])
    terms = [float(act) if weights is None else act * weights[i] for i, act in enumerate(acts)]
    if any(act and not term for act, term in zip(acts, terms, strict=True)):
        log_ratio = log_ratio + torch.nan
    first = next((i for i, term in enumerate(terms) if term), num_steps)  # nobody asks for the adjoint of what lies before
    for i in reversed(range(first, num_steps)):
        x_t = path[i].detach().requires_grad_(i > first)
        with torch.set_grad_enabled(i > first):
            eps_back = eps_pre = pre(x_t, i) if unguided is None or i == first else unguided.prompted(x_t, i)
        if unguided is not None and i > first and terms[i]:
            with torch.no_grad():
                eps_pre = unguided.guide(path[i], i, eps_back)
        g_t = eps = None
        if i > first and (held is None or not acts[i]):
            (g_t,) = torch.autograd.grad(process.mean(i, x_t, eps_back), x_t, g)
        elif i > first:
            with torch.enable_grad():
                eps = eps_held = psi(x_t, i) if terms[i] else held(x_t, i)
                value = (g * process.mean(i, x_t, eps_held)).flatten(1).sum(1)
                value = value - kl_weight * process.log_ratio(i, eps_held, eps_pre, noise[i + 1])
            (g_t,) = torch.autograd.grad(value.sum(), x_t, retain_graph=bool(terms[i]))  # of x_t alone: psi's parameters stand still
        g_t = None if g_t is None else bounded(g_t, max_adjoint_norm)
        if terms[i]:
            eps_pre, sigma, eps = eps_pre.detach(), process.sigma(i), psi(path[i].detach(), i) if eps is None else eps
            miss = process.eps_coefficient(i) * (eps - eps_pre) - sigma**2 / kl_weight * g
            (terms[i] * share * kl_weight * miss.square().sum() / (2 * sigma**2)).backward()
            kl = kl + terms[i] * process.kl(i, eps.detach(), eps_pre)
            log_ratio = log_ratio + process.log_ratio(i, eps.detach(), eps_pre, noise[i + 1])
        g = g_t
    return {"log_prob": log_p.detach(), "kl_nats": kl, "log_ratio": log_ratio, "x_0": x_0.detach()}
