"""Estimate how long `make paper` will take: measures an image and an update of each trainer here, times what the configuration asks."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ctrl import control as controls
from ctrl import errors, estimate, measure, tables
from ctrl.base import Base
from ctrl.config import for_adapter
from ctrl.cores import jobs_at_once
from ctrl.finetune.task import Task
from ctrl.guidance.reconstruction import reconstruction_guidance
from ctrl.process import Process
from ctrl.sampling import noise_of, sample
from scripts.common import add_config_argument, cores_of, load_config
from scripts.loading import load_base, pretrained_denoiser


def measured(base: Base, process: Process, config: dict, adapters: Sequence[str], size: int) -> tuple[dict, dict]:
    """Seconds of an image of each kind (see `estimate.image_cost`), and of an update of each of `adapters`, from `size` at a time."""
    cells = [(s, y) for s in config["prompts"]["subjects"] for y in range(config["label"]["num_classes"])]
    prompts, labels = [config["prompts"]["templates"]["train"][0].format(cells[0][0])] * size, torch.zeros(size, dtype=torch.long)
    noise = noise_of(range(size), base.latent_shape, process.num_steps, base.device)
    pretrained = pretrained_denoiser(base, process, config)(prompts, labels)

    def stand_in(x_0: torch.Tensor, y: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """The decoder is what a classifier's gradient costs most; there may be no classifier yet."""
        return -base.decode(x_0).square().flatten(1).mean(1)

    guided = reconstruction_guidance(pretrained, process, stand_in, 1.0)
    image = {
        name: measure.seconds(lambda d=denoiser: base.decode(sample(process, d, noise)), base.device) / size
        for name, denoiser in (("plain", pretrained), ("guided", guided))
    }
    with torch.no_grad():
        look = measure.seconds(lambda: stand_in(noise[0]), base.device) / size
    image["weighed"] = image["plain"] + process.num_steps * look
    lora, seed = config["finetune"]["lora"], config["seed"]
    lowest = max(config["finetune"]["min_timestep"], process.lowest_noisy_timestep)
    control = controls.Control(base, config["label"]["num_classes"], lora["rank"], lora["target_modules"], seed, lowest)
    task = Task(control, process, cells, config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"], seed)
    update, known = {}, {}
    for adapter in adapters:
        settings = for_adapter(config, adapter)["finetune"]
        costly = (
            "trainer", "coarse", "num_terms", "control_variate", "truncation", "gradient_checkpointing", "batch_size", "policy_gradient",
            "efficient_adjoint", "unguided_jacobian",
        )  # fmt: skip
        key = json.dumps({name: settings[name] for name in costly})
        if key not in known:  # gamma and the learning rates cost nothing
            known[key] = measure.update_seconds(task, stand_in, settings, size)
        update[adapter] = known[key]
    return image, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--methods", type=Path, default=Path("config/methods.tsv"), help="table of methods (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder whose finished jobs are not counted (default: results/{experiment})")
    parser.add_argument(
        "--num-images", type=int, metavar="N",
        help="images, and trajectories of an update, measured at a time (default: 32; no more than sampler.batch_size or micro_batch_size)",
    )  # fmt: skip
    parser.add_argument("--cores", type=cores_of, default="all", help="of the run, as in `snakemake --cores` (default: %(default)s)")
    args = parser.parse_args()
    at_once = jobs_at_once(args.cores)
    config = load_config(args)
    size = args.num_images or min(32, config["sampler"]["batch_size"], config["finetune"]["micro_batch_size"])
    if config["base"]["kind"] != "stable_diffusion":
        raise errors.UserError("--config: the long run is of images; a Gaussian mixture has no estimate")
    methods = tables.read_methods(args.methods).to_dict("records")
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--help"], check=True, capture_output=True)
    start = time.perf_counter() - started

    base, process = load_base(config, args.cores // at_once)
    image, update = measured(base, process, config, estimate.adapters_of(config, methods), size)
    left, results = [0.0], args.results or Path("results") / config["experiment"]
    for job in estimate.jobs(config, methods, image, update, start):
        done = (results / job.output).exists()
        left.append(0.0 if done else job.seconds)
        print(f"{'done' if done else estimate.duration(job.seconds):>12}  {job.name}")
    whole = estimate.duration(max(sum(left) / at_once, *left))
    print(f"{whole:>12}  in all, {at_once} at once, estimated from {size} images at a time on {base.device_name}. {estimate.LEFT_OUT}")


if __name__ == "__main__":
    errors.main(main, lower="--num-images")
