"""What is said of an adapter beside its samples: the cost of its training, and how far its paths are from the optimum."""

import argparse
import math

import pandas as pd

from ctrl import classifier as classifiers
from ctrl.control import Control
from ctrl.finetune.objective import effective_gamma
from ctrl.generate import MakeDenoiser, path_figures
from ctrl.io import read_json
from ctrl.process import Process
from scripts.loading import log_prob_of_latents


def figures_of_adapter(
    control: Control, process: Process, config: dict, args: argparse.Namespace, psi: MakeDenoiser, samples: pd.DataFrame,
    num_images: int = 256,
) -> dict:  # fmt: skip
    """What training cost, and with a classifier at hand how far the paths of some of the samples are from the optimum.

    The paths are those of `psi`, at whatever strength it acts.
    """
    adapter, base, scale = read_json(args.adapter / "adapter.json"), control.base, config["sampler"]["guidance_scale"]
    figures = {"train_seconds": adapter["train_seconds"], "train_peak_memory_mb": adapter["peak_memory_mb"]}
    if args.classifier:
        log_prob = log_prob_of_latents(base, classifiers.load(args.classifier).to(base.device))
        if "target" in samples:  # a continuous label: not what lies beyond the ranges that it was trained for
            samples = samples[samples["target"].between(0, config["label"]["num_classes"] - 1)]
        rows = samples.sample(min(num_images, len(samples)), random_state=0)
        optimum, settings = adapter["gamma"], adapter["finetune"]
        if settings["trainer"] != "supervised":
            dimensions = math.prod(base.latent_shape)
            optimum = effective_gamma(adapter["gamma"], settings["kl_weight"], settings["kl_reduction"], dimensions)
        figures |= path_figures(
            base, process, rows, psi, lambda prompts, y: control.base_denoiser(process, prompts, scale), log_prob, optimum,
            config["sampler"]["batch_size"], [acts and args.strength != 0 for acts in control.active(process)],
        )  # fmt: skip
        if settings["trainer"] == "policy_gradient" or not math.isfinite(optimum):
            figures["var_log_w"] = None  # it climbs another reward, or has no optimum
    return figures
