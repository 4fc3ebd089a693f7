"""Pretrain a Stable Diffusion 3 in miniature on Fashion-MNIST, on the embedded base's VAE and text encoder, as a diffusers folder."""

import argparse
import json
from pathlib import Path

import torch
import yaml

from ctrl import base as bases
from ctrl import errors, pretrain, pretrain_flow
from ctrl.garments import GARMENTS, read_idx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/pretrain_flow.yaml"), help="every constant, with its meaning")
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

    base = bases.load(config["base"])
    pipe = pretrain_flow.build_pipeline(base, config).to(device)
    images, labels = read_idx(args.images, args.split, config["image_size"])
    latents = tuple(pipe.vae.config.scaling_factor * x for x in pretrain.encode_images(pipe.vae, images.to(device)))
    text = pretrain_flow.encode_prompts(pipe, [t.format(name) for name in GARMENTS for t in [*config["prompts"], ""]])

    args.checkpoints.mkdir(parents=True, exist_ok=True)
    history = args.checkpoints / "history.jsonl"

    def log(row: dict) -> None:
        with history.open("a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    for stage, settings in config["stages"].items():
        pretrain_flow.train_transformer(pipe.transformer, latents, text, labels, settings, args.checkpoints, config["seed"], stage, log)
    pipe.save_pretrained(args.output)
    (args.output / "history.jsonl").write_text(history.read_text())


if __name__ == "__main__":
    errors.main(main)
