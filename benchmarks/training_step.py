"""What a training step costs: our default, our preset `published`, and the published code's own step, each in a process of its own.

On a CPU it takes the embedded base, by the config's sampler; on a GPU, or with --image-size, config/stable_diffusion/compressibility.yaml
and a UNet, VAE and text encoder of that model's architecture with random weights (time and memory do not depend on the values): 50 steps of
512x512 pixels with guidance. The classifier is untrained. Every variant has as many trajectories an update and at a time, so that
`speedup_vs_published` (seconds an update, and images a second alike) and `memory_vs_published` (peak of the process, or of the GPU) are of
like with like; what an update teaches is not compared here. scripts/benchmark_training.py compares the trainers on a finished experiment.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, or as a module

from benchmarks.published import published_gradient
from ctrl import base as bases
from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.base_files import Source
from ctrl.config import for_adapter, merge
from ctrl.costs import PUBLISHED, to_markdown, with_ratios
from ctrl.finetune.gradients import counted, gradient_function
from ctrl.finetune.speed import wanted
from ctrl.finetune.task import Task
from ctrl.labels import Factors
from ctrl.measure import alone, peak_memory_mb, seconds, timed_rows, timed_updates
from scripts.common import DEFAULTS, add_config_argument, load_config, read_yaml
from scripts.loading import log_prob_of_latents, new_control

PLAIN = {"speed": {"channels_last": False, "compile": False}}  # the rest of speed is our trainers' alone
VARIANTS = {  # recipe, and what differs from its config; the last one is the published code's own step
    "default": ("ctrl", {}),
    "default, passes computed again": ("ctrl", {"finetune": {"gradient_checkpointing": True}}),
    "default, bfloat16 weights": ("ctrl", {"base": {"dtype": "bfloat16"}}),
    "published preset": (PUBLISHED, {}),
    PUBLISHED: (PUBLISHED, {"finetune": PLAIN}),
}
GPU = DEFAULTS.parent / "stable_diffusion" / "compressibility.yaml"


def stable_diffusion(image_size: int, device: str, dtype: str) -> bases.Base:
    """Stable Diffusion 1.5's architecture with random weights; the tokenizer and the scheduler are the embedded base's."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    embedded = bases.load("resources/mini-sd").pipe
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):  # random weights are drawn where they stay, and as what they stay: else the peak would be of the making
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 4, sample_size=image_size,
        )  # fmt: skip
        unet = UNet2DConditionModel(sample_size=image_size // 8, cross_attention_dim=768)
        networks = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}
    torch.set_default_dtype(torch.float32)
    for network in networks.values():
        network.requires_grad_(False).eval()
    pipe = StableDiffusionPipeline(
        **networks, tokenizer=embedded.tokenizer, scheduler=embedded.scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return bases.Base(pipe.to(device), Source("Stable Diffusion 1.5, random weights", Path(), "StableDiffusionPipeline"))


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large product of matrices, measured."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)


def with_cpu_seconds(gradient: Callable[[int], dict[str, float]], update: int) -> dict[str, float]:
    """The figures of an update with the time that the CPU worked on it, which other jobs on the machine hardly change."""
    started = time.process_time()
    return gradient(update) | {"cpu_seconds": time.process_time() - started}


def measure(name: str, config: dict, args: argparse.Namespace) -> dict:
    """The figures of one variant."""
    torch.set_num_threads(args.num_threads)
    device, settings = "cuda" if torch.cuda.is_available() else "cpu", config["finetune"]
    dtype = config["base"]["dtype"]

    def make() -> bases.Base:
        return stable_diffusion(args.image_size, device, dtype) if args.image_size else bases.load(args.base, dtype=dtype, device=device)

    base = make()
    process = base.process(config["sampler"]["num_steps"], config["sampler"]["eta"], config["sampler"]["spacing"])
    control = new_control(base, process, Factors.of(4), config)
    cells = [(subject, y) for subject in config["prompts"]["subjects"] for y in range(4)]
    task = Task(control, process, cells, config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"], config["seed"])
    described = {"network": "dct", "head": "density", "num_classes": 4, "descending": True, "edges": [0.9, 1.1, 1.3]}
    log_prob = log_prob_of_latents(base, classifiers.new(described).to(device).eval().requires_grad_(False))
    if name == PUBLISHED:
        copy = make()
        copy.passes = base.passes  # one count of both copies
        gradient = counted(control, published_gradient(task, copy, log_prob, settings))
    else:
        gradient = gradient_function(task, log_prob, settings)
    numbers = timed_updates(settings, args.updates)
    before = peak_memory_mb(base)
    rows = timed_rows(control, settings, lambda k: with_cpu_seconds(gradient, numbers[max(k - 1, 0)]), len(numbers))
    peak, spent = peak_memory_mb(base), sum(row["seconds"] for row in rows) / len(rows)
    with FlopCounterMode(display=False) as counter:  # after the peak: it keeps figures of its own
        for number in numbers:
            gradient(number)
    cast = name != PUBLISHED and wanted(settings["speed"]["autocast"], torch.device(device))
    available, flops = matmul_flops(device, torch.bfloat16 if cast else base.dtype), counter.get_total_flops() / len(numbers)
    return {
        "name": name, "trainer": settings["trainer"], "num_steps": process.num_steps, "batch_size": settings["batch_size"],
        "micro_batch_size": settings["micro_batch_size"], "gradient_checkpointing": name == PUBLISHED or settings["gradient_checkpointing"],
        "seconds_per_update": spent, "seconds_per_trajectory": spent / settings["batch_size"],
        "cpu_seconds_per_update": sum(row["cpu_seconds"] for row in rows) / len(rows), "images_per_second": settings["batch_size"] / spent,
        "peak_memory_mb": peak, "memory_before_mb": before,
        **{way: sum(row[way] for row in rows) / len(rows) for way in ("unet_forward", "unet_backward")},
        "flops_per_update": flops, "matmul_flops_per_second": available, "share_of_matmul": flops / spent / available,
        "device": base.device_name,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    gpu = torch.cuda.is_available()
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--base", type=Path, default=None if gpu else Path("resources/mini-sd"), help="a diffusers folder (default: see above)"
    )
    which.add_argument("--image-size", type=int, help="pixels of Stable Diffusion 1.5's architecture (default: 512 on a GPU, see above)")
    parser.add_argument("--num-steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--batch-size", type=int, help="trajectories an update, all at a time (default: 32 of the embedded base, else 4)")
    parser.add_argument("--updates", type=int, default=4, help="timed, spread over the training (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures instead of the table")
    args = parser.parse_args()
    if gpu and not args.base:
        args.image_size = args.image_size or 512
    args.batch_size = args.batch_size or (4 if args.image_size else 32)
    if min(args.batch_size, args.updates, args.num_threads, args.num_steps or 1) < 1:
        raise errors.UserError("--batch-size, --num-steps, --updates and --num-threads must be 1 or more")
    if args.image_size and (args.image_size < 64 or args.image_size % 64):
        raise errors.UserError(f"--image-size must be a multiple of 64, not {args.image_size}")
    return args


def main() -> None:
    args, rows = parse(), []
    own = {"finetune": {"batch_size": args.batch_size, "micro_batch_size": args.batch_size}}
    if args.num_steps:
        own["sampler"] = {"num_steps": args.num_steps}
    config = merge(load_config(args), read_yaml(GPU) if args.image_size else {})
    started = time.strftime("%Y-%m-%d")
    for name, (recipe, differs) in VARIANTS.items():
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        rows.append(alone(measure, name, merge(for_adapter(config, recipe), own, differs), args))
    rows = with_ratios(rows)
    best = rows[0]
    ratios = {key: best[key] for key in ("speedup_vs_published", "memory_vs_published", "training_memory_vs_published")}
    for key in ("cpu_seconds_per_update", "flops_per_update"):
        ratios[f"{key}_vs_published"] = best[key] / rows[-1][key]
    if args.json:
        print(json.dumps({"device": best["device"], "date": started, "torch": torch.__version__, **ratios, "variants": rows}, indent=2))
    else:
        print(f"{best['device']}, {args.updates} updates of each variant\n\n{to_markdown(rows)}")


if __name__ == "__main__":
    errors.main(main, lower="--batch-size")
