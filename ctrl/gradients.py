"""The gradient of a classifier: how large it is along a sampler's trajectories, and whether it is right."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ctrl.base import Base
from ctrl.classifier import Classifier, Product
from ctrl.pairs import draw
from ctrl.process import Denoiser, Process
from ctrl.sampling import noise_of

MAX_ERROR = 1e-2  # of a derivative, relative, against finite differences


def norms(g: Tensor) -> Tensor:
    """The norm of each row of `g` with shape (B, *), shape (B,)."""
    return g.detach().double().flatten(1).norm(dim=1).cpu()


def gradient_norms(process: Process, denoiser: Denoiser, log_prob: Callable[[Tensor], Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Norms, in nats per unit of latent, of gradients of log p̂(y | decode(.)) along pretrained trajectories from `noise` (N + 1, B, *).

    `x_0` with shape (1, B): by the last latent. `look_ahead` (N, B): ∇_{x_t} log p̂(y | decode(x̂_0(x_t))), what reconstruction guidance
    sees. `adjoint` (N, B): the gradient by x_0 carried back through the sampler, g_t = (∂mu_pre/∂x_t)ᵀ g_s, what fine-tuning sees.
    `latents` are the x_0 themselves.
    """
    path = [noise[0]]
    with torch.no_grad():
        for i in range(process.num_steps):
            path.append(process.step(i, path[i], denoiser(path[i], i), noise[i + 1]))
    with torch.enable_grad():
        x_0 = path[-1].detach().requires_grad_()
        (g,) = torch.autograd.grad(log_prob(x_0).sum(), x_0)
        found, ahead, adjoint = {"x_0": norms(g)[None]}, [], []
        for i in reversed(range(process.num_steps)):
            x_t = path[i].detach().requires_grad_()
            eps = denoiser(x_t, i)
            (g_ahead,) = torch.autograd.grad(log_prob(process.predict_x0(i, x_t, eps)).sum(), x_t, retain_graph=True)
            (g,) = torch.autograd.grad(process.mean(i, x_t, eps), x_t, g)
            ahead.append(norms(g_ahead))
            adjoint.append(norms(g))
    return found | {"look_ahead": torch.stack(ahead[::-1]), "adjoint": torch.stack(adjoint[::-1]), "latents": x_0.detach()}


def pretrained_gradients(
    base: Base, process: Process, log_prob: Callable[[Tensor, Tensor], Tensor], cells: Sequence[tuple[str, int]],
    templates: Sequence[str], guidance_scale: float, num: int, batch_size: int, seed: int,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """`gradient_norms` of `num` trajectories, `batch_size` at a time, and the label that each is asked for, (num,).

    Prompts and labels are drawn as in training; `log_prob(x_0, y)` has shape (B,), in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, _, y = draw(cells, templates, num, generator)
    seeds, parts = torch.randint(2**62, (num,), generator=generator), []
    for rows in torch.arange(num).split(batch_size):
        noise = noise_of(seeds[rows].tolist(), base.latent_shape, process.num_steps, base.device)
        denoiser, labels = base.denoiser(process, [prompts[k] for k in rows], guidance_scale), y[rows].to(base.device)
        parts.append(gradient_norms(process, denoiser, lambda x, labels=labels: log_prob(x, labels), noise))
    return {key: torch.cat([part[key] for part in parts], dim=int(key != "latents")) for key in parts[0]}, y


def summary(values: Tensor) -> dict[str, float]:
    """n, mean, and the 5, 50 and 95 % points of `values` with shape (B,); NaN where one of them is no number."""
    points = values.double().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"n": len(values), "mean": values.double().mean().item(), **dict(zip(("p5", "median", "p95"), points, strict=True))}


def parts_of(classifier: Classifier | Product) -> list[Classifier]:
    return list(classifier.factors) if isinstance(classifier, Product) else [classifier]


@contextmanager
def smooth(classifier: Classifier | Product) -> Iterator[None]:
    """Inside, the classifier computes in double precision, and sees the pixels as they are instead of their 256 levels."""
    for part in parts_of(classifier):
        part.rounding = False
    classifier.double()
    try:
        yield
    finally:
        classifier.float()
        for part in parts_of(classifier):
            part.rounding = True


def derivative_errors(log_prob: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, step: float, floor: float = 1e-3) -> Tensor:
    """How far the gradient of `log_prob` is off along `directions` with shape (D, B, *), against central differences; shape (B,).

    Root mean squares over the directions: of the error, divided by that of the differences, or by `floor` where they are below it.
    """
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(log_prob(x).sum(), x)
    with torch.no_grad():
        slopes = (g * directions).flatten(2).sum(2)
        differences = torch.stack([(log_prob(x + step * v) - log_prob(x - step * v)) / (2 * step) for v in directions])
        error, size = (part.square().mean(0).sqrt() for part in (slopes - differences, differences))
        return (error / size.clamp(min=floor)).cpu()


def finite_differences(classifier: Classifier | Product, images: Tensor, y: Tensor, num_directions: int = 4, seed: int = 0) -> dict:
    """Checks the classifier's gradient by the pixels of `images` with shape (B, 3, H, W), for labels (B,), along random directions.

    `relative_error` is of the smooth function behind the 256 levels, in double precision; `passed` where 95 % of the images are within
    MAX_ERROR. `rounding` says what the levels do: by how many nats they change log p, and how far the gradient is from what a step of
    one level in every pixel does, with and without them.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_directions, *images.shape, generator=generator).to(images.device)
    level = 1 / 127.5
    with smooth(classifier):
        exact = images.double()
        errors = derivative_errors(lambda x: classifier.log_prob(x, y), exact, directions.double(), 1e-7)
        one_level = derivative_errors(lambda x: classifier.log_prob(x, y), exact, directions.sign().double(), level)
        with torch.no_grad():
            log_p = classifier.log_prob(exact, y)
    rounded = derivative_errors(lambda x: classifier.log_prob(x, y), images, directions.sign(), level)
    with torch.no_grad():
        moved = (classifier.log_prob(images, y).double() - log_p).abs().mean().item()
    relative = summary(errors)
    return {
        "n": len(images),
        "num_directions": num_directions,
        "relative_error": relative,
        "passed": relative["p95"] <= MAX_ERROR,
        "rounding": {"nats": moved, "error_of_one_level": rounded.median().item(), "without_rounding": one_level.median().item()},
    }
