"""From the configuration and files to the objects of the library: what several scripts load alike."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctrl import base as base_models
from ctrl import classifier as classifiers
from ctrl.base import Base
from ctrl.bins import measured_labels
from ctrl.control import Control
from ctrl.device import device_of
from ctrl.errors import UserError
from ctrl.finetune.speed import prepare
from ctrl.generate import MakeDenoiser
from ctrl.io import read_json
from ctrl.labels import Continuous, Factors, factors_of
from ctrl.oracles import to_pil
from ctrl.process import Process
from ctrl.scoring import scorer


def load_base(config: dict, num_threads: int | None = None) -> tuple[Base, Process]:
    """The pretrained model of the config, on a GPU if there is one, and its reverse process."""
    if num_threads:
        torch.set_num_threads(num_threads)
    device = device_of(os.environ)
    asked, sampler = config["base"], config["sampler"]
    base = base_models.load(asked["path"], asked["revision"], asked["dtype"], device, asked["variant"], asked["config"], asked["t5"])
    return base, base.process(sampler["num_steps"], sampler["eta"], sampler["spacing"])


def load_method(name: str, path: Path) -> pd.Series:
    """The row of methods.tsv; UserError naming the known ones where there is none of that name."""
    table = pd.read_csv(path, sep="\t", keep_default_na=False).set_index("method")
    if name not in table.index:
        raise UserError(f"--method: {path} has no method {name!r}; it has {', '.join(table.index)}")
    return table.loc[name]


def strength_of(asked: float | None, method: pd.Series) -> float:
    """The strength to sample with: the one that was asked for, else the method's."""
    strength = float(method["strength"]) if asked is None else asked
    if not 0 <= strength < math.inf:
        raise UserError(f"--strength is {strength:g}; it goes from 0 (the pretrained model) over 1 (the trained one) to more")
    if method["family"] not in ("finetune", "resampled") and strength != 1:
        raise UserError(f"--strength is {strength:g}, but method {method.name} is not fine-tuned by CTRL; leave it out")
    return strength


def load_oracle(dataset: Path) -> Callable[[Tensor], np.ndarray]:
    """The function from images in [-1, 1] with shape (B, 3, H, W) to their labels, with the bins of a dataset's report.json."""
    report = read_json(dataset / "report.json")
    scorers = {factor["oracle"]: scorer(factor) for factor in factors_of(report)}

    def labels_of(images: Tensor) -> np.ndarray:
        pictures = to_pil(images)
        return measured_labels({name: score(pictures) for name, score in scorers.items()}, report)

    return labels_of


def log_prob_of_latents(base: Base, classifier: classifiers.Classifier | classifiers.Product) -> Callable[[Tensor, Tensor, float], Tensor]:
    """log p̂(y | decode(x_0)) in nats with shape (B,), from latents, labels and a factor on the temperature; differentiable."""
    return lambda x_0, y, temperature=1.0: classifier.log_prob(base.decode(x_0), y, temperature)


def guidance_log_prob(base: Base, classifier: classifiers.Classifier | classifiers.Product) -> Callable[[Tensor, Tensor], Tensor]:
    """The same as guidance wants it, at most 0: of a continuous label relative to the most likely one."""
    if isinstance(classifier, classifiers.Density):
        return lambda x_0, y: classifier.log_ratio(base.decode(x_0), y)
    return log_prob_of_latents(base, classifier)


def agreement_of_latents(
    base: Base, oracle: Callable[[Tensor], np.ndarray], space: Factors | Continuous
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """1 where the oracle's label of decode(x_0) agrees with the asked one, else 0, with shape (B,); a black box, without a gradient."""

    @torch.no_grad()
    def agreement(x_0: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
        return space.agrees(y.cpu(), torch.as_tensor(oracle(base.decode(x_0)))).float().to(y.device)

    return agreement


def reward_of_latents(
    base: Base, trainer: str, classifier: classifiers.Classifier | classifiers.Product | None, dataset: Path, space: Factors | Continuous
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """What `trainer` climbs: the oracle's agreement for policy gradients, else the classifier's log p̂."""
    if trainer == "policy_gradient":
        return agreement_of_latents(base, load_oracle(dataset), space)
    return log_prob_of_latents(base, classifier)


def new_control(base: Base, process: Process, space: Factors | Continuous, config: dict) -> Control:
    """An untrained control on `base` by the config's finetune section; it acts at no step without noise, where there is no density."""
    settings = config["finetune"]
    if (lowest := process.lowest_noisy_timestep) == math.inf:
        raise UserError(
            f"sampler: none of the {process.num_steps} steps adds noise at eta {process.eta:g}, and no label could act: raise num_steps"
        )
    min_timestep = max(settings["min_timestep"], lowest)
    control = Control(base, space, settings["lora"]["rank"], settings["lora"]["target_modules"], config["seed"], min_timestep)
    prepare(control, settings)
    return control


def pretrained_denoiser(base: Base, process: Process, config: dict) -> MakeDenoiser:
    """The pretrained model, whatever the labels."""
    return lambda prompts, labels: base.denoiser(process, prompts, config["sampler"]["guidance_scale"])


def adapter_denoiser(control: Control, process: Process, config: dict, strength: float) -> MakeDenoiser:
    """The pretrained model with a trained control."""
    scale = config["sampler"]["guidance_scale"]
    return lambda prompts, labels: control.denoiser(process, prompts, labels, scale, strength)


def label_guidance_denoiser(control: Control, process: Process, config: dict, scale: float) -> MakeDenoiser:
    """Classifier-free guidance on the label, by an adapter that was trained for it."""
    guidance_scale = config["sampler"]["guidance_scale"]
    return lambda prompts, labels: control.guided_denoiser(process, prompts, labels, scale, guidance_scale)
