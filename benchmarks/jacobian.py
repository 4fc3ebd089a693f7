"""Adjoint matching under prompt guidance: the walk back through the guided model, or through the model under the prompt alone.

On a Gaussian mixture. The "prompt" names all of its components but one: the pretrained model is eps(∅) + w (eps(c) − eps(∅)) of the two
exact denoisers, and draws no law of the mixture itself. p_gamma(x | y) of what it draws is still known, by rejection of its own samples.
Prints, for each guidance scale w and trainer, the sliced Wasserstein distance to that, a mean over independent pairs of sets, in units of
the distance of two exact sets, with its standard error, and var log w.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, or as a module

from ctrl import errors
from ctrl.config import merge
from ctrl.distances import sliced_wasserstein
from ctrl.finetune.adjoint import adjoint
from ctrl.finetune.backprop import backprop
from ctrl.finetune.objective import within_cell_variance
from ctrl.mixture import Controlled, GaussianMixture, SoftmaxLinear, active, process_of
from ctrl.process import Denoiser, Process, Unguided
from ctrl.proof import Problem, train
from ctrl.sampling import path_statistics, sample
from scripts.common import DEFAULTS, read_yaml

PROMPT = (0, 1, 2)  # the components that the prompt names; every label stays likely
NUM_SETS = 4
TRAINERS = {"backprop": (backprop, False), "adjoint": (adjoint, False), "adjoint, unguided Jacobian": (adjoint, True)}


def guided(empty: Denoiser, prompted: Denoiser, scale: float) -> Denoiser:
    """eps(∅) + scale · (eps(c) − eps(∅))."""

    def denoiser(x_t: Tensor, i: int) -> Tensor:
        eps = empty(x_t, i)
        return eps + scale * (prompted(x_t, i) - eps)

    return denoiser


def models(mixture: GaussianMixture, process: Process, scale: float) -> tuple[Denoiser, Denoiser]:
    """The guided model, and that under the prompt alone."""
    chosen = list(PROMPT)
    weights = mixture.weights[chosen] / mixture.weights[chosen].sum()
    prompted = replace(mixture, weights=weights, means=mixture.means[chosen], covariances=mixture.covariances[chosen]).denoiser(process)
    return guided(mixture.denoiser(process), prompted, scale), prompted


def exact(problem: Problem, pre: Denoiser, process: Process, gamma: float, num: int, seed: int) -> list[Tensor]:
    """`num` samples of each label from p_pre(x) p(y | x)^gamma, p_pre what the guided sampler draws.

    Raises UserError where fewer than one path in 1,000 is accepted.
    """
    generator, kept, drawn = torch.Generator().manual_seed(seed), [[] for _ in range(problem.label.num_classes)], 0
    while (least := min(sum(map(len, part)) for part in kept)) < num:
        if least < drawn / 1000:
            raise errors.UserError(f"--gamma: at {gamma:g} a label is too rare, {least} of {drawn} paths; lower it")
        x = sample(process, pre, problem.noise(50_000, generator))
        drawn += len(x)
        for y, part in enumerate(kept):
            part.append(x[torch.rand(len(x), generator=generator).log() < gamma * problem.label.log_probs(x)[:, y]])
    return [torch.cat(part)[:num] for part in kept]


def distance(sets: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sliced Wasserstein distance of each set to its own other, mean over the labels, with shape (NUM_SETS,)."""
    pairs = zip(sets, others, strict=True)
    return torch.tensor([sum(map(sliced_wasserstein, one, other)) / len(one) for one, other in pairs], dtype=torch.float64)


def loss_of(problem: Problem, trainer: Callable, unguided: bool, scale: float, gamma: float) -> Callable:
    """The loss of `ctrl.proof.train`: CTRL's objective with the guided model as the pretrained one."""

    def loss(process: Process, net: Controlled, y: Tensor, generator: torch.Generator, share: float) -> dict[str, Tensor]:
        pre, prompted = models(problem.mixture, process, scale)
        parts = Unguided(prompted, lambda x_t, i, eps: pre(x_t, i))
        own, noise = {"unguided": parts} if unguided else {}, problem.noise(len(y), generator, process.num_steps)
        figures = trainer(
            process, net.denoiser(process, y, pre=pre), pre, lambda x_0: problem.label.log_prob(x_0, y), noise, gamma, share=share,
            active=active(process), **own,
        )  # fmt: skip
        return figures | {"log_w": gamma * figures["log_prob"] - figures["log_ratio"]}

    return loss


def measure(problem: Problem, scale: float, gamma: float, num: int) -> list[dict]:
    """A row for each trainer."""
    process = process_of(problem.mixture, problem.num_steps)
    pre, rows = models(problem.mixture, process, scale)[0], []
    exact_sets = [exact(problem, pre, process, gamma, num, seed) for seed in range(2 * NUM_SETS)]
    right, other = exact_sets[:NUM_SETS], exact_sets[NUM_SETS:]
    y = torch.arange(problem.label.num_classes).repeat_interleave(num)
    floor = distance(right, other).mean()
    for name, (trainer, unguided) in TRAINERS.items():
        psi = train(problem, f"{name} {scale:g}", loss_of(problem, trainer, unguided, scale, gamma)).denoiser(process, y, pre=pre)
        drawn, variances = [], []
        for k in range(NUM_SETS):
            noise = problem.noise(len(y), torch.Generator().manual_seed(1000 + k))
            x, kl, log_ratio = path_statistics(process, psi, pre, noise, active(process))
            drawn.append(x.split(num))
            variances.append(within_cell_variance(gamma * problem.label.log_prob(x, y) - log_ratio, y.tolist()))
        floors = distance(drawn, right) / floor
        row = {"w": scale, "trainer": name, "floors": floors.mean().item(), "se": (floors.std() / NUM_SETS**0.5).item()}
        rows.append(row | {"kl": kl.mean().item(), "var_log_w": sum(variances) / NUM_SETS, "n": len(y)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 7.5], help="of the prompt's guidance (default: %(default)s)")
    parser.add_argument("--gamma", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--updates", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of the sampler (default: %(default)s)")
    parser.add_argument("--num", type=int, default=10_000, help="samples a label (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = merge(read_yaml(DEFAULTS), read_yaml(DEFAULTS.parent / "mixture.yaml"))
    mixture = GaussianMixture.from_config(*(config["base"][key] for key in ("weights", "means", "covariances")))
    label = SoftmaxLinear.from_config(config["label"]["weight"], config["label"]["bias"], mixture.dim)
    moments, settings = mixture.moments(), config["finetune"] | {"num_updates": args.updates, "control_variate": False}
    print("| guidance scale | trainer | sliced Wasserstein ÷ floor | ± | KL / nats | var log w | n a set | sets |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(mixture.affine(*moments), label.affine(*moments), args.steps, settings, config["seed"], Path(folder))
        for scale in args.scales:
            for row in measure(problem, scale, args.gamma, args.num):
                figures = f"{row['floors']:.2f} | {row['se']:.2f} | {row['kl']:.3f} | {row['var_log_w']:.4f} | {row['n']} | {NUM_SETS}"
                print(f"| {row['w']:g} | {row['trainer']} | {figures} |", flush=True)


if __name__ == "__main__":
    errors.main(main, lower="--num")
