"""The reverse process: DDIM as a chain of Gaussians from noise to image, and its log-probabilities and divergences.

Step `i` of `N` goes from training timestep `t = timesteps[i]` to the next earlier one `s` (Song et al., ICLR 2021, arXiv 2010.02502):

    x̂_0    = (x_t − sqrt(1 − ᾱ_t) eps) / sqrt(ᾱ_t)
    sigma_t = eta · sqrt((1 − ᾱ_s) / (1 − ᾱ_t)) · sqrt(1 − ᾱ_t / ᾱ_s)
    mu      = sqrt(ᾱ_s) x̂_0 + sqrt(1 − ᾱ_s − sigma_t²) eps
    x_s     ~ N(mu, sigma_t² I)

With eta = 1 this is DDPM (Ho et al., NeurIPS 2020, arXiv 2006.11239) on the same timesteps.

A denoiser is any function `(x_t, i) -> eps` with `x_t` and `eps` of shape (B, *) and `i` the index of the step. What is trained by
`supervised` also takes an index for each image, an integer tensor with shape (B,).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PURE = 1e-5  # ᾱ below which nothing is left
Denoiser = Callable[[Tensor, int], Tensor]
Pair = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # what psi and pre say of the same x_t, in one batch


class Unguided(NamedTuple):
    """A guided model in two parts: under the prompt alone, and what `guide(x_t, i, eps)` makes of that, for a pass of the empty prompt."""

    prompted: Denoiser
    guide: Callable[[Tensor, int, Tensor], Tensor]


def quadratic_timesteps(num_steps: int, num_train: int = 1000) -> Tensor:
    """`num_steps` distinct timesteps in proportion to (1 − i/N)², from the noisiest on, with shape (N,).

    A controlled step is a Gaussian as wide as the pretrained one, so that what a step does to an image's label can only be as precise as
    the noise that it adds. Short steps where little noise is left let the control come near the exact law with few steps.
    """
    i = torch.arange(num_steps)
    t = (num_train * (1 - i / num_steps).square()).round().long() - 1
    return torch.maximum(t, num_steps - 1 - i)


@dataclass(frozen=True)
class Process:
    """The noise levels of the steps: `timesteps`, `abar_t`, `abar_s`, each with shape (N,), and `eta`; `flow`: see `loss_weight`."""

    timesteps: Tensor
    abar_t: Tensor
    abar_s: Tensor
    eta: float = 1.0
    flow: bool = False

    @classmethod
    def from_alphas(
        cls, alphas_cumprod: Tensor, timesteps: Tensor, final_abar: float, eta: float = 1.0, stride: int | None = None
    ) -> "Process":
        """`alphas_cumprod` of all training steps, the descending `timesteps` to visit, and ᾱ after the last of them.

        `stride` is how many timesteps each step goes down, as in diffusers' DDIM: where the number of steps does not divide that of
        training, it need not end where the next begins. None: to the next of the timesteps.
        """
        alphas_cumprod = alphas_cumprod.double()
        abar_t, final = alphas_cumprod[timesteps], alphas_cumprod.new_tensor([final_abar])
        if stride is None:
            return cls(timesteps, abar_t, torch.cat([abar_t[1:], final]), eta)
        ends = timesteps - stride
        return cls(timesteps, abar_t, torch.where(ends >= 0, alphas_cumprod[ends.clamp(min=0)], final), eta)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def lowest_noisy_timestep(self) -> float:
        """Of the last step that adds noise: below it there is no density, and nothing that a KL could weigh."""
        return min((t.item() for i, t in enumerate(self.timesteps) if self.sigma(i) > 0), default=math.inf)

    def coarse(self, stride: int, active: Sequence[bool]) -> "Process":
        """The same way down in longer steps: every `stride`-th of the `active` steps, and each of the others.

        A noise level that stays keeps its ᾱ_t; what a step leads to is the next level that stays.
        """
        acts = [i for i in range(self.num_steps) if active[i]][::stride]
        kept = [i for i in range(self.num_steps) if i in acts or not active[i]]
        abar_t = self.abar_t[kept]
        return Process(self.timesteps[kept], abar_t, torch.cat([abar_t[1:], self.abar_s[-1:]]), self.eta, self.flow)

    def sigma(self, i: int) -> float:
        """Standard deviation of step `i`."""
        abar_t, abar_s = self.abar_t[i].item(), self.abar_s[i].item()
        return self.eta * ((1 - abar_s) / (1 - abar_t)) ** 0.5 * (1 - abar_t / abar_s) ** 0.5

    def stays(self, i: int) -> bool:
        """Whether step `i` ends at the noise level where it begins, as the last one does of some schedulers: then it moves nothing."""
        return bool(self.abar_t[i] == self.abar_s[i])

    def pure_noise(self, i: int) -> bool:
        """Whether nothing is left of x_0 at step `i`, as where a flow begins: x_t tells nothing of a label, and guidance by it is 0."""
        return self.abar_t[i].item() < PURE

    def loss_weight(self, i: Tensor, x_t: Tensor) -> Tensor | float:
        """Of (eps_psi − eps)² in the loss that the model was trained on: 1, or of a flow what makes it the velocity's error."""
        if not self.flow:
            return 1.0
        alpha, sd = self.scales(i, x_t)
        return ((alpha + sd) / alpha).square()  # eps − eps' = (1 − s) (v − v'), where alpha and sd are in the ratio of 1 − s and s

    def eps_coefficient(self, i: int) -> float:
        """d mu / d eps of step `i`, a scalar: mu = sqrt(ᾱ_s / ᾱ_t) x_t + eps_coefficient · eps. It is negative."""
        abar_t, abar_s = self.abar_t[i].item(), self.abar_s[i].item()
        return max(1 - abar_s - self.sigma(i) ** 2, 0) ** 0.5 - (abar_s * (1 - abar_t) / abar_t) ** 0.5

    def kl_weight(self, i: int) -> float:
        """w_t of KL_t = w_t ‖eps_psi − eps_pre‖², in nats. Raises ValueError for eta = 0, where there is no density."""
        if self.sigma(i) == 0:
            raise ValueError("eta = 0 makes the process deterministic: it has no KL divergence; use eta = 1")
        return self.eps_coefficient(i) ** 2 / (2 * self.sigma(i) ** 2)

    def predict_x0(self, i: int | Tensor, x_t: Tensor, eps: Tensor) -> Tensor:
        """x̂_0, the denoised estimate, with shape (B, *)."""
        alpha, sd = self.scales(i, x_t)
        return (x_t - sd * eps) / alpha

    def scales(self, i: int | Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ᾱ_t) and sqrt(1 − ᾱ_t), to multiply x_t with shape (B, *): one for all images, or one for each if `i` has shape (B,)."""
        abar = self.abar_t[i].reshape(-1, *[1] * (x_t.ndim - 1))
        return abar.sqrt().to(x_t), (1 - abar).sqrt().to(x_t)

    def mean(self, i: int, x_t: Tensor, eps: Tensor) -> Tensor:
        """mu of step `i`, with shape (B, *)."""
        return (self.abar_s[i] / self.abar_t[i]).sqrt().item() * x_t + self.eps_coefficient(i) * eps

    def step(self, i: int, x_t: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        """x_s = mu + sigma_t · noise, with shape (B, *)."""
        return self.mean(i, x_t, eps) + self.sigma(i) * noise

    def kl(self, i: int, eps_psi: Tensor, eps_pre: Tensor) -> Tensor:
        """KL(psi(x_s | x_t) ‖ pre(x_s | x_t)) in nats, summed over all dimensions, with shape (B,)."""
        return self.kl_weight(i) * (eps_psi - eps_pre).square().flatten(1).sum(1)

    def log_ratio(self, i: int, eps_psi: Tensor, eps_pre: Tensor, noise: Tensor) -> Tensor:
        """log psi(x_s | x_t) − log pre(x_s | x_t) in nats at x_s = mu_psi + sigma_t · noise, with shape (B,)."""
        return self.kl(i, eps_psi, eps_pre) + self.martingale(i, eps_psi, eps_pre, noise)

    def martingale(self, i: int, eps_psi: Tensor, eps_pre: Tensor, noise: Tensor) -> Tensor:
        """What the step's noise adds to its log-ratio, (mu_psi − mu_pre) · noise / sigma_t, with mean 0 and shape (B,)."""
        return (self.eps_coefficient(i) / self.sigma(i)) * ((eps_psi - eps_pre) * noise).flatten(1).sum(1)

    def log_prob(self, i: int, x_s: Tensor, x_t: Tensor, eps: Tensor) -> Tensor:
        """log N(x_s; mu, sigma_t² I) in nats, with shape (B,)."""
        sigma = torch.tensor(self.sigma(i), dtype=x_s.dtype, device=x_s.device)
        return torch.distributions.Normal(self.mean(i, x_t, eps), sigma).log_prob(x_s).flatten(1).sum(1)
