"""What the exact law would score: the pretrained model's images in the pool, weighted by p̂(y | x)^gamma within each (subject, label).

Self-normalised importance sampling: accuracy of the oracle, and the KL divergence in nats from the pretrained law of x_0, for every gamma.
At the optimum of CTRL's objective the path KL is that same number: given x_0, the two laws of the path do not differ.
"""

import argparse
import math
from pathlib import Path

import torch

from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.io import read_parquet
from ctrl.pictures import load_images
from scripts.cells import load_cells
from scripts.loading import load_oracle


def weighted(log_p: torch.Tensor, hits: torch.Tensor, gamma: float) -> tuple[float, float, float]:
    """Accuracy, KL in nats and effective sample size of the law that weights images by exp(gamma · log_p); both arguments (N,)."""
    log_w = gamma * log_p.double()
    p = log_w.softmax(0)
    kl = (p * p.clamp(min=1e-300).log()).sum() + math.log(len(p))
    return (p * hits).sum().item(), kl.item(), (1 / p.square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("results/compressibility"), help="folder of an experiment (default: %(default)s)"
    )
    parser.add_argument("--gammas", type=float, nargs="+", default=[1, 3, 10, 30], help="(default: 1 3 10 30)")
    args = parser.parse_args()
    pool, classifier = read_parquet(args.results / "pool/samples.parquet"), classifiers.load(args.results / "classifier")
    images = load_images([args.results / "pool" / name for name in pool["file_name"]]).float() / 127.5 - 1
    labels, cells = torch.as_tensor(load_oracle(args.results / "dataset")(images)), load_cells(args.results / "cells.json")
    log_p = torch.cat([classifier.log_probs(part) for part in images.split(256)])
    print(f"{len(cells)} (subject, label) pairs, {len(images)} images of the pretrained model")
    for gamma in args.gammas:
        rows = []
        for subject, y in cells:
            mine = torch.tensor((pool["subject"] == subject).tolist())
            rows.append(weighted(log_p[mine, y], labels[mine] == y, gamma))
        accuracy, kl, size = torch.tensor(rows).mean(0).tolist()
        print(f"gamma {gamma:g}: accuracy {accuracy:.3f}, KL {kl:.2f} nats, {size:.1f} effective images a pair")


if __name__ == "__main__":
    errors.main(main)
