"""Measure a base model of garments: autoencoder on held-out images, samples beside real ones; write the figures and its model card."""

import argparse
from pathlib import Path

import torch

from ctrl import base as base_models
from ctrl import base_quality, errors, features
from ctrl.figures import pictures
from ctrl.garments import read_idx
from ctrl.io import write_json, write_text
from scripts.common import read_yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the diffusers folder to measure")
    parser.add_argument("--images", type=Path, default=Path("resources/fashion-mnist"), help="folder of the real test images (t10k, IDX)")
    parser.add_argument(
        "--train-images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the training images"
    )
    parser.add_argument("--garments", type=Path, default=Path("resources/garments"), help="folder of the independent garment classifier")
    parser.add_argument(
        "--pretrain-config", type=Path, default=Path("config/pretrain.yaml"), help="how the base was trained: prompts, updates"
    )
    parser.add_argument("--num-samples", type=int, default=2000, help="pictures to draw, subjects and prompts in turn")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[50], help="DDIM steps; each number is measured, the first is shown")
    parser.add_argument("--eta", type=float, default=1.0, help="of DDIM; 1 is ancestral")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="on the prompt; 1 is unguided")
    parser.add_argument("--output", type=Path, required=True, help="folder for quality.json, samples.png and README.md (the model card)")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    settings = read_yaml(args.pretrain_config)
    try:
        test, train = read_idx(args.images, "t10k"), read_idx(args.train_images, "train")
    except FileNotFoundError as error:
        raise errors.UserError(error) from error
    network = features.load(args.garments)
    base = base_models.load(args.base, device="cuda" if torch.cuda.is_available() else "cpu")

    quality, samples, table = base_quality.check(
        base, test, train, network.to(base.device), settings["prompts"], args.num_samples, args.num_steps, args.eta, args.guidance_scale
    )
    write_json(args.output / "quality.json", quality)
    rows = [samples[torch.tensor((table["subject"] == s).tolist())][:12] for s in network.subjects]
    title = f"{args.num_steps[0]} steps, guidance {args.guidance_scale:g}: the first samples"
    pictures.prompts_grid(rows, network.subjects, title, args.output / "samples.png")
    notes = (args.base / "notes.md").read_text() if (args.base / "notes.md").exists() else ""
    write_text(args.output / "README.md", base_quality.model_card(quality, str(args.base), settings, notes))
    first = quality["samples"][0]
    print(
        f"{args.output}: agreement {first['agreement']['value']:.3f}, quartile ratios {[round(r, 3) for r in first['quartile_ratios']]}, ",
        end="",
    )
    print(f"JPEG correlation of the autoencoder {quality['autoencoder']['pearson']:.3f}")


if __name__ == "__main__":
    errors.main(main)
