"""Pretrain an embedded base model on Fashion-MNIST, as a diffusers folder: a Stable Diffusion in miniature, or, by a config with
`transformer`, on its VAE and text encoder a Stable Diffusion 3."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler
from torch import Tensor

from ctrl import base as bases
from ctrl import errors, pretrain, pretrain_flow
from ctrl.garments import GARMENTS, read_idx


def make_diffusion(config: dict, images: Tensor, labels: Tensor, args: argparse.Namespace, log: Callable) -> None:
    """Tokenizer, text encoder, VAE, UNet."""
    device, prompts = images.device, prompts_of(config)
    tokenizer = pretrain.build_tokenizer([p for row in prompts for p in row], args.output / "tokenizer")
    text_encoder = pretrain.build_text_encoder(len(tokenizer), tokenizer.eos_token_id, config["text_encoder"]).to(device)
    vae = pretrain.build_vae(config["vae"], config["image_size"]).to(device)
    latent_size = config["image_size"] // 2 ** (len(config["vae"]["channels"]) - 1)
    unet = pretrain.build_unet(config["unet"], config["text_encoder"]["width"], config["vae"]["latent_channels"], latent_size).to(device)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing=config["scheduler"]["timestep_spacing"],
    )  # fmt: skip
    pretrain.train_vae(vae, images, config["vae"], args.checkpoints, config["seed"], log)
    pretrain.train_vae(vae, images, config["decoder"], args.checkpoints, config["seed"], log, stage="decoder")
    scale = vae.config.scaling_factor
    latents = tuple(scale * x for x in pretrain.encode_images(vae, images))
    tokens = [tokenizer(row, padding="max_length", truncation=True, return_tensors="pt").input_ids for row in prompts]
    data = (latents, torch.stack(tokens)[labels], scheduler)
    pretrain.train_unet(unet, text_encoder, *data, config["unet"], args.checkpoints, config["seed"], log)
    pretrain.distill_guidance(unet, text_encoder, *data, config["guidance"], args.checkpoints, config["seed"], log)
    pretrain.save_pipeline(args.output, vae, text_encoder, tokenizer, unet, scheduler)


def make_flow(config: dict, images: Tensor, labels: Tensor, args: argparse.Namespace, log: Callable) -> None:
    """A transformer alone; all else is the base's."""
    pipe = pretrain_flow.build_pipeline(bases.load(config["base"]), config).to(images.device)
    latents = tuple(pipe.vae.config.scaling_factor * x for x in pretrain.encode_images(pipe.vae, images))
    text = pretrain_flow.encode_prompts(pipe, [prompt for row in prompts_of(config) for prompt in row])
    for stage, settings in config["stages"].items():
        pretrain_flow.train_transformer(pipe.transformer, latents, text, labels, settings, args.checkpoints, config["seed"], stage, log)
    pipe.save_pretrained(args.output)


def prompts_of(config: dict) -> list[list[str]]:
    """Those of each garment, the empty one last."""
    return [[template.format(name) for template in config["prompts"]] + [""] for name in GARMENTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/pretrain.yaml"), help="every constant, with its meaning")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the .gz files")
    parser.add_argument("--split", choices=["train", "t10k"], default="train")
    parser.add_argument("--output", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for what a restart needs")
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = yaml.safe_load(args.config.read_text())
    torch.manual_seed(config["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = read_idx(args.images, args.split, config["image_size"])

    args.checkpoints.mkdir(parents=True, exist_ok=True)
    history = args.checkpoints / "history.jsonl"

    def log(row: dict) -> None:
        with history.open("a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    make = make_flow if "transformer" in config else make_diffusion
    make(config, images.to(device), labels, args, log)
    (args.output / "history.jsonl").write_text(history.read_text())


if __name__ == "__main__":
    errors.main(main)
