"""Every method on a Gaussian mixture, and how far each is from the exact p_gamma(x | y) over several sets of samples.

A method is a function of the problem, gamma and a generator. What has a scale to tune sweeps it against exact samples of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ctrl.distances import compare, sliced_wasserstein
from ctrl.finetune import loop
from ctrl.finetune.adjoint import adjoint
from ctrl.finetune.backprop import backprop
from ctrl.finetune.efficient_adjoint import efficient_adjoint, information, levels
from ctrl.finetune.objective import hold, learning_rate_factor, summed_kl_weight, within_cell_variance
from ctrl.finetune.supervised import supervised
from ctrl.guidance.classifier import classifier_guidance
from ctrl.guidance.mpgd import mpgd
from ctrl.guidance.particles import smc, svdd
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, active, exact, noisy_log_prob, process_of, remembering
from ctrl.process import Denoiser
from ctrl.sampling import path_statistics, sample

SCALES = [0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]  # of every method that has one; 1 is right in theory, where there is a theory
MOVES = [0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5]  # as many, where a scale is a move of x_s itself: moves add up over the steps
MUON = 5.0  # learning rate of the square weights, by Muon (Jordan 2024), in units of AdamW's, which the other weights have
NUM_TUNING = 2000  # samples a label and scale


@dataclass
class Problem:
    """Mixture and label in standardised coordinates, x = shift + scale · z; `settings` is the config's finetune section."""

    mixture: GaussianMixture
    label: SoftmaxLinear
    num_steps: int
    settings: dict
    seed: int
    folder: Path
    num_particles: int = 16
    figures: dict = field(default_factory=dict)

    def noise(self, num: int, generator: torch.Generator, num_steps: int | None = None) -> Tensor:
        return torch.randn((num_steps or self.num_steps) + 1, num, self.mixture.dim, generator=generator)


Draw = Callable[[int, int, torch.Generator], Tensor]  # label, number of samples, generator -> samples with shape (number, D)


def draw_exact(problem: Problem, gamma: float) -> Draw:
    return lambda y, num, generator: exact(problem.mixture, problem.label, y, gamma, num, generator)


def sampler(problem: Problem, denoiser_of: Callable[[Tensor], Denoiser]) -> Draw:
    """The common sampling loop, of a denoiser that `denoiser_of` labels with shape (B,) makes."""
    process = process_of(problem.mixture, problem.num_steps)
    return lambda y, num, generator: sample(process, denoiser_of(torch.full((num,), y)), problem.noise(num, generator))


def draw_pretrained(problem: Problem, gamma: float) -> Draw:
    return sampler(problem, lambda y: problem.mixture.denoiser(process_of(problem.mixture, problem.num_steps)))


def train(problem: Problem, name: str, loss: Callable) -> Controlled:
    """A controlled model trained by `loss(process, net, y, generator, share)`, which adds gradients and returns figures; checkpointed."""
    settings = problem.settings
    process = process_of(problem.mixture, problem.num_steps)
    long_steps = process_of(problem.mixture, max(2, problem.num_steps // settings["coarse"]["stride"]))
    net = Controlled(problem.mixture, problem.label.num_classes, seed=problem.seed)
    named, rate = dict(net.named_parameters()), settings["learning_rate"]
    inner = {name for name, p in named.items() if name.startswith("hidden") and p.ndim == 2}
    optimizers = [
        torch.optim.Muon([named[name] for name in sorted(inner)], MUON * rate, weight_decay=settings["weight_decay"]),
        torch.optim.AdamW(
            [p for name, p in named.items() if name not in inner], rate, tuple(settings["betas"]), weight_decay=settings["weight_decay"]
        ),
    ]
    size, num_updates = settings["batch_size"], settings["num_updates"]

    def gradient(update: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(problem.seed * 1_000_003 + update)
        y = torch.randint(problem.label.num_classes, (size,), generator=generator)
        figures = loss(long_steps if update / num_updates < settings["coarse"]["end"] else process, net, y, generator, 1 / size)
        return {key: figures[key].mean().item() for key in ("log_prob", "kl_nats") if key in figures} | {
            "var_log_w": within_cell_variance(figures["log_w"], y.tolist()) if "log_w" in figures else math.nan
        }

    folder = problem.folder / name
    identity = f"{name} {settings} {MUON} {process.abar_t.tolist()} {problem.seed} {problem.mixture}{problem.label}"
    history = loop.run(
        named, optimizers, gradient, lambda update: {}, num_updates, folder, settings["max_grad_norm"],
        settings["checkpoint_every"], num_updates, identity,
        rate=lambda u: learning_rate_factor(u, num_updates, settings["warmup_updates"], settings["decay"]),
    )  # fmt: skip
    loop.discard_checkpoint(folder)
    problem.figures["train_seconds"] = round(sum(row["seconds"] for row in history), 1)
    return net


def draw_trained(
    problem: Problem, gamma: float, trainer: Callable, name: str, kl_weight: float = 1.0, kl_reduction: str = "sum", reward: float = 1.0
) -> Draw:
    """Fine-tuned on `reward` · gamma · log p(y | x_0) − `kl_weight` · KL, the KL summed or averaged over dimensions."""
    kl_weight, settings = summed_kl_weight(kl_weight, kl_reduction, problem.mixture.dim), problem.settings
    process, closed_form = process_of(problem.mixture, problem.num_steps), trainer is efficient_adjoint
    amounts_to = reward * gamma / kl_weight if kl_weight else math.nan  # log w is constant at the optimum of this gamma
    if closed_form:
        noise = problem.noise(1000, torch.Generator().manual_seed(problem.seed + 99))
        m = information(process, problem.mixture.denoiser(process), noise, active(process))

    def loss(process, net, y, generator, share):
        pre, noise = remembering(problem.mixture.denoiser(process)), problem.noise(len(y), generator, process.num_steps)
        psi, acts = net.denoiser(process, y, pre=pre), active(process)
        if closed_form:
            own = levels(acts, settings["efficient_adjoint"]["num_levels"], noise[0].shape, generator) | {"information": m}
        else:
            own = {"held": hold(psi, net.parameters()) if settings["control_variate"] else None}
        figures = trainer(
            process, psi, pre, lambda x: problem.label.log_prob(x, y), noise, reward * gamma, kl_weight, share=share, active=acts, **own
        )
        return figures | ({} if closed_form else {"log_w": amounts_to * figures["log_prob"] - figures["log_ratio"]})

    net = train(problem, f"{name}_gamma{gamma:g}", loss)
    generator = torch.Generator().manual_seed(problem.seed + 77)
    y = torch.arange(problem.label.num_classes).repeat_interleave(1000)
    pre, noise = remembering(problem.mixture.denoiser(process)), problem.noise(len(y), generator)
    x, kl, log_ratio = path_statistics(process, net.denoiser(process, y, pre=pre), pre, noise, active(process))
    log_w = amounts_to * problem.label.log_prob(x, y) - log_ratio
    problem.figures |= {"kl_nats": kl.mean().item(), "var_log_w": within_cell_variance(log_w, y.tolist())}
    return sampler(problem, lambda y: net.denoiser(process, y))


def draw_tuned(problem: Problem, gamma: float, draw_of: Callable[[float], Draw], scales: Sequence[float] = SCALES) -> Draw:
    """The scale that comes nearest to exact samples, which share nothing with those that the table compares with."""
    sweep = []
    for scale in scales:
        generator = torch.Generator().manual_seed(problem.seed + 55)
        pairs = [
            (draw_of(scale)(y, NUM_TUNING, generator), exact(problem.mixture, problem.label, y, gamma, NUM_TUNING, generator))
            for y in range(problem.label.num_classes)
        ]
        sweep.append({"scale": scale, "sliced_wasserstein": sum(sliced_wasserstein(*pair) for pair in pairs) / len(pairs)})
    best = min(sweep, key=lambda row: row["sliced_wasserstein"])["scale"]
    problem.figures |= {"scale": best, "sweep": sweep}
    return draw_of(best)


def draw_guided(problem: Problem, gamma: float, guidance: Callable[..., Denoiser], scales: Sequence[float] = SCALES) -> Draw:
    """`guidance(denoiser, process, log_prob, scale)` by the true log p(y | x)."""
    process = process_of(problem.mixture, problem.num_steps)
    pre = problem.mixture.denoiser(process)

    def guided(y: Tensor, scale: float) -> Denoiser:
        wrapped = guidance(pre, process, lambda x_0: problem.label.log_prob(x_0, y), scale)
        acts = active(process)
        return lambda x_t, i: wrapped(x_t, i) if acts[i] else pre(x_t, i)

    return draw_tuned(problem, gamma, lambda scale: sampler(problem, lambda y: guided(y, scale)), scales)


def draw_classifier_guided(problem: Problem, gamma: float) -> Draw:
    """Classifier guidance by the true p_t(y | x_t): at a gamma and a scale of 1 exact, but for the length of the steps."""
    process = process_of(problem.mixture, problem.num_steps)
    pre = problem.mixture.denoiser(process)

    def guided(y: Tensor, scale: float) -> Denoiser:
        return classifier_guidance(pre, process, noisy_log_prob(problem.mixture, problem.label, process, y), scale)

    return draw_tuned(problem, gamma, lambda scale: sampler(problem, lambda y: guided(y, scale)))


def draw_cfg(problem: Problem, gamma: float) -> Draw:
    """Classifier-free guidance: supervised on fresh labelled samples, as many as the others' trajectories; its scale tuned."""

    def loss(process, net, y, generator, share):
        x_0 = problem.mixture.sample(len(y), generator)
        y = torch.multinomial(problem.label.log_probs(x_0).exp(), 1, generator=generator)[:, 0]
        return supervised(process, net.denoiser(process, y), x_0.float(), generator, share, active(process))

    net, process = train(problem, "cfg", loss), process_of(problem.mixture, problem.num_steps)
    return draw_tuned(problem, gamma, lambda scale: sampler(problem, lambda y: net.denoiser(process, y, scale)))


def draw_chosen(problem: Problem, gamma: float, choose: Callable[..., Tensor]) -> Draw:
    """One of many particles for each sample, by the true log p(y | x): nothing to tune."""
    process, many = process_of(problem.mixture, problem.num_steps), problem.num_particles
    pre = problem.mixture.denoiser(process)

    def draw(y: int, num: int, generator: torch.Generator) -> Tensor:
        noise = problem.noise(num * many, generator)
        return choose(process, pre, lambda x_0: problem.label.log_probs(x_0)[:, y], noise, many, gamma, [generator] * num)

    return draw


METHODS: dict[str, Callable[[Problem, float], Draw]] = {  # seeds follow from the order: what is new comes last
    "exact": draw_exact,
    "exact_reference": draw_exact,
    "pretrained": draw_pretrained,
    "ctrl": partial(draw_trained, trainer=backprop, name="ctrl"),
    "ctrl_adjoint": partial(draw_trained, trainer=adjoint, name="ctrl_adjoint"),
    "reconstruction_guidance": partial(draw_guided, guidance=partial(reconstruction_guidance, weighting="constant")),
    "dps": partial(draw_guided, guidance=reconstruction_guidance, scales=MOVES),
    "cfg": draw_cfg,
    "reward_maximization": partial(draw_trained, trainer=backprop, name="reward_maximization", kl_weight=0.0),
    "mean_kl": partial(draw_trained, trainer=backprop, name="mean_kl", kl_weight=0.01, kl_reduction="mean", reward=0.1),
    "classifier_guidance": draw_classifier_guided,
    "mpgd": partial(draw_guided, guidance=mpgd, scales=MOVES),
    "smc": partial(draw_chosen, choose=lambda *settings: smc(*settings)[0]),
    "svdd": partial(draw_chosen, choose=lambda *settings: svdd(*settings[:5])),  # the best one: it knows no gamma
    "ctrl_efficient_adjoint": partial(draw_trained, trainer=efficient_adjoint, name="ctrl_efficient_adjoint"),
}


def compare_sets(
    problem: Problem, gamma: float, draw: Draw, num: int, num_sets: int, seeds: tuple[int, int]
) -> tuple[list[Tensor], dict[str, float]]:
    """`compare` for `num_sets` independent sets of `num` samples a label, each with exact samples of its own: the distance of a single
    pair of sets varies. Returns the first set, and each distance's mean and standard error ("…_se") over the sets.

    seeds: of the method's samples, and of the exact ones, which every method is compared with.
    """
    truth, labels, rows, first = draw_exact(problem, gamma), range(problem.label.num_classes), [], []
    for k in range(num_sets):
        own, right = (
            [d(y, num, torch.Generator().manual_seed(seed + 10_000_000 * k + 1000 * round(1000 * gamma) + y)) for y in labels]
            for d, seed in zip((draw, truth), seeds, strict=True)
        )
        rows.append(compare(problem.mixture, problem.label, gamma, own, right))
        first = first or own
    figures = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        figures |= {name: values.mean().item(), f"{name}_se": (values.std() / num_sets**0.5).item()}
    return first, figures
