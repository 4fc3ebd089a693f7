"""Train the independent garment classifier, on real training images only: features of the distances, and prompt_accuracy."""

import argparse
import math
import time
from pathlib import Path

import torch

from ctrl import errors, features
from ctrl.garments import GARMENTS, read_idx
from ctrl.io import atomic_folder, write_text

CARD = """---
license: mit
library_name: pytorch
tags: [image-classification, fashion-mnist]
---
# Garment classifier

A convolutional network of {num_parameters:,} parameters that names the ten garments of Fashion-MNIST in 32x32 images. No method of this
repository is trained on it. It gives `prompt_accuracy` (is the image still what the prompt says?) and, by the {num_features} pooled values
of its last layer, the features of `kid_rejection`, `precision`, `recall` and `diversity`.

| figure | value |
|---|---|
| accuracy on {num_test:,} real test images | {accuracy:.4f}, 95 % interval {lo:.4f} to {hi:.4f} |
| accuracy on the {num_train:,} augmented training images, last epoch | {train_accuracy:.4f} |
| epochs, batch, peak learning rate, seed | {num_epochs}, {batch_size}, {learning_rate}, {seed} |

Trained on the training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (MIT licence), padded with black from
28 to 32 pixels, shifted by up to 2 pixels, a tenth of them with a square of 8 pixels erased; AdamW, one cycle of the learning rate. The
test images took no part in the training. Weights in half precision, read by `ctrl.features.load`. To train it again:

    python scripts/train_garments.py --output resources/garments
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the .gz files")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write: model.safetensors, config.json, README.md")
    parser.add_argument("--num-epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images an update")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at its peak")
    parser.add_argument("--limit", type=int, default=None, help="use only so many images of each split, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    try:
        (images, labels), test = read_idx(args.images, "train"), read_idx(args.images, "t10k")
    except FileNotFoundError as error:
        raise errors.UserError(error) from error

    net = features.GarmentNet(GARMENTS)
    history, started = [], time.monotonic()

    def log(epoch: int, loss: float, accuracy: float) -> None:
        history.append({"epoch": epoch, "loss": loss, "train_accuracy": accuracy})
        print(f"epoch {epoch}/{args.num_epochs}  loss {loss:.4f}  accuracy {accuracy:.4f}  {time.monotonic() - started:.0f} s", flush=True)

    used = slice(args.limit)
    features.fit(net, images[used], labels[used], args.num_epochs, args.batch_size, args.learning_rate, args.seed, log)
    n = len(test[1][used])
    p = features.count_correct(net, test[0][used], test[1][used]) / n
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    figures = {
        "accuracy": p, "lo": p - half, "hi": p + half, "num_test": n, "num_train": len(labels[used]), "num_features": net.widths[-1],
        "train_accuracy": history[-1]["train_accuracy"], "num_parameters": sum(x.numel() for x in net.parameters()),
        "num_epochs": args.num_epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate, "seed": args.seed,
    }  # fmt: skip
    with atomic_folder(args.output) as folder:
        features.save(net, folder, figures | {"seconds": time.monotonic() - started, "history": history})
        write_text(folder / "README.md", CARD.format(**figures))
    print(f"{args.output}: accuracy {p:.4f} on {n} real test images")


if __name__ == "__main__":
    errors.main(main)
