"""What the doctor's classifier is worth on generated images, and on held-out ones."""

import argparse
from pathlib import Path

import torch

from ctrl import coverage, doctor, doctor_numbers, pairs
from ctrl.classifier import Classifier, Product
from ctrl.doctor import Finding
from ctrl.generate import denoised, generate
from ctrl.io import read_parquet
from ctrl.labels import Continuous
from ctrl.networks import to_float
from ctrl.oracles import pixels
from ctrl.pictures import load_images
from scripts.loading import load_oracle, pretrained_denoiser


def load_held_out(dataset: Path, num: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """`num` uint8 images of the validation split, their labels, and whether there are examples to train on."""
    table = read_parquet(dataset / "metadata.parquet")
    held_out = table[table["split"] == "val"].head(num)
    return load_images(held_out["path"]), torch.tensor(held_out["label"].tolist()), bool((table["split"] == "train").any())


def generated(config: dict, pieces: dict, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the pretrained model on training prompts, uint8 (N, 3, H, W), and the oracle's labels of them (N,)."""
    base, process = pieces["base"]
    templates, subjects = config["prompts"]["templates"]["train"], list(dict.fromkeys(subject for subject, _ in pieces["cells"]))
    first_seed = 100_000_000 * config["seed"] + pairs.SEED_OFFSETS["train"]
    rows = pairs.table_of_subjects(subjects, templates, -(-args.num_images // len(subjects)), first_seed)
    draw = denoised(base, process, pretrained_denoiser(base, process, config))
    images = torch.cat([part.cpu() for part, _ in generate(base, rows, draw, config["sampler"]["batch_size"])])
    labels = torch.as_tensor(load_oracle(args.dataset)(images))
    return pixels(images), labels


@torch.no_grad()
def log_probs(classifier: Classifier | Product, images: torch.Tensor) -> torch.Tensor:
    """log p(y | x) of every label, (N, K), of uint8 images."""
    device = next(classifier.buffers()).device
    return torch.cat([classifier.log_probs(to_float(part.to(device))).cpu() for part in images.split(64)])


def examine(config: dict, pieces: dict, args: argparse.Namespace) -> tuple[dict, list[Finding]]:
    """What the report holds of the classifier on both sets of images, and lines on it."""
    classifier, space = pieces["classifier"], pieces["labels"]
    sets = {"generated": generated(config, pieces, args), "held_out": pieces["dataset"][:2]}
    if isinstance(space, Continuous):
        found = {
            name: doctor_numbers.error_report(coverage.predict(classifier, images)["after"], labels)
            for name, (images, labels) in sets.items()
        }
        return {"errors": found}, doctor_numbers.error_findings(**found, unit=space.unit)
    found = {name: doctor.accuracy_report(log_probs(classifier, images), labels) for name, (images, labels) in sets.items()}
    asked = sorted({label for _, label in pieces["cells"] if label < space.num_classes})
    return {"accuracy": found}, doctor.accuracy_findings(**found, asked=asked, names=[space.name(k) for k in range(space.num_classes)])
