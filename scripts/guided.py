"""From a row of methods.tsv and the folders that it takes to a denoiser or a sampler: above all, what steers the pretrained model."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ctrl import classifier as classifiers
from ctrl import control as controls
from ctrl import noisy
from ctrl.base import Base
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.generate import Draw, MakeDenoiser
from ctrl.guidance.classifier import classifier_guidance
from ctrl.guidance.mpgd import mpgd
from ctrl.guidance.particles import resample, smc, svdd
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.io import read_json
from ctrl.process import Process
from ctrl.sampling import noise_of, path_statistics
from scripts.loading import adapter_denoiser, guidance_log_prob, label_guidance_denoiser, log_prob_of_latents, pretrained_denoiser

# The values of methods.tsv's column `guidance`: denoisers that wrap a denoiser.
GUIDANCE = {
    "reconstruction_guidance": reconstruction_guidance,
    "reconstruction_guidance_constant": partial(reconstruction_guidance, weighting="constant"),
    "mpgd": mpgd,
}
# Prompts, labels, noise of all particles and a generator for each image -> x_0 of each image, and effective sample sizes with shape (K, B).
Choose = Callable[[list[str], Tensor, Tensor, Sequence[torch.Generator]], tuple[Tensor, Tensor | None]]


def guidance_denoiser(base: Base, process: Process, config: dict, classifier: Path, scale: float, guidance: str) -> MakeDenoiser:
    """The pretrained model under one of GUIDANCE, or under `classifier_guidance` by a folder with a classifier of noisy latents."""
    if guidance == "classifier_guidance":
        net, denoiser = noisy.load(classifier).to(base.device), pretrained_denoiser(base, process, config)
        return lambda prompts, y: classifier_guidance(denoiser(prompts, y), process, net.log_prob(process, y), scale)
    log_prob = guidance_log_prob(base, classifiers.load(classifier).to(base.device))
    pretrained = pretrained_denoiser(base, process, config)
    return lambda prompts, labels: GUIDANCE[guidance](
        pretrained(prompts, labels), process, lambda x_0: log_prob(x_0, labels.to(base.device)), scale
    )


def method_denoiser(
    method: pd.Series, base: Base, process: Process, config: dict, args: argparse.Namespace
) -> tuple[MakeDenoiser, Control | None]:
    """What the method makes of prompts and labels, and its control if it has an adapter."""
    scale = read_json(args.tuning)["best"]["scale"] if method["family"] in ("guidance", "cfg") else None
    if method["family"] == "guidance":
        return guidance_denoiser(base, process, config, args.classifier, scale, method["guidance"]), None
    if method["family"] not in ("finetune", "cfg"):
        return pretrained_denoiser(base, process, config), None
    control = controls.load(base, args.adapter).merge()
    if method["family"] == "cfg":
        return label_guidance_denoiser(control, process, config, scale), control
    return adapter_denoiser(control, process, config, args.strength), control


def draw_of_particles(base: Base, process: Process, batch_size: int, num: int, choose: Choose) -> Draw:
    """An image of `num` particles each; particle 0 has the image's seed, the others seeds behind all, and what resamples a further one.

    About `batch_size` particles go through the network at a time. The column effective_sample_size is what `choose` says of it.
    """
    at_a_time = max(1, batch_size // num)

    def draw_some(prompts: list[str], labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        noise = noise_of([seed + k * 10**10 for seed in seeds for k in range(num)], base.latent_shape, process.num_steps, base.device)
        many = labels.repeat_interleave(num).to(base.device)
        generators = [torch.Generator().manual_seed(seed + num * 10**10) for seed in seeds]
        return choose([prompt for prompt in prompts for _ in range(num)], many, noise, generators)

    def draw(prompts: list[str], labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, dict[str, list]]:
        parts = [slice(start, start + at_a_time) for start in range(0, len(prompts), at_a_time)]
        x_0, sizes = zip(*(draw_some(prompts[part], labels[part], seeds[part]) for part in parts), strict=True)
        return torch.cat(x_0), {} if sizes[0] is None else {"effective_sample_size": torch.cat(sizes, dim=1).T.tolist()}

    return draw


def particle_draw(base: Base, process: Process, config: dict, classifier: Path, method: str) -> Draw:
    """`smc` or `svdd`, with `particles` of the config for each image; of smc the effective sample size after each step."""
    log_prob = log_prob_of_latents(base, classifiers.load(classifier).to(base.device))
    pretrained, num, gamma = pretrained_denoiser(base, process, config), config["particles"], config["finetune"]["gamma"]

    def choose(prompts: list[str], labels: Tensor, noise: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        settings = process, pretrained(prompts, labels), lambda x_0: log_prob(x_0, labels), noise, num
        return (svdd(*settings), None) if method == "svdd" else smc(*settings, gamma, generators)

    return draw_of_particles(base, process, config["sampler"]["batch_size"], num, choose)


def resampled_draw(base: Base, process: Process, config: dict, args: argparse.Namespace) -> Draw:
    """One of `candidates` paths of the adapter for each image, drawn by its weight under the gamma that the adapter was trained for.

    The effective sample size is that of the paths. UserError where there is no such gamma.
    """
    control, adapter = controls.load(base, args.adapter).merge(), read_json(args.adapter / "adapter.json")
    log_prob = log_prob_of_latents(base, classifiers.load(args.classifier).to(base.device))
    gamma, num, scale = adapter["effective_gamma"], config["candidates"], config["sampler"]["guidance_scale"]
    if gamma is None:  # JSON has no infinity
        raise UserError(f"{args.adapter} was trained without a KL: there is no p(x | c) p(y | x)^gamma to weight its paths by")
    psi, active = adapter_denoiser(control, process, config, args.strength), control.active(process)

    @torch.no_grad()
    def choose(prompts: list[str], labels: Tensor, noise: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        pre = control.base_denoiser(process, prompts, scale)
        x, _, log_ratio = path_statistics(process, psi(prompts, labels), pre, noise, active)
        return resample(x, gamma * log_prob(x, labels) - log_ratio, num, generators)

    return draw_of_particles(base, process, config["sampler"]["batch_size"], num, choose)
