"""A judge: it stands for the people who labelled the images, where generated ones are to be labelled, too.

What a table says ends with its images. So a share of them, from which nothing else learns, trains a network of its own, which is the oracle
of all that is generated: another one than the classifier that CTRL climbs, on other images. How often it is right is measured on a part of
its share that it did not learn from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctrl import classifier as classifiers
from ctrl.errors import UserError
from ctrl.io import read_json
from ctrl.networks import to_float


@torch.no_grad()
def scores_of(judge: classifiers.Classifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """The scores, float64 (N,), of uint8 images (N, 3, H, W): the number of the likeliest class, or the mean of a number's Gaussian."""
    device = judge.temperature.device
    outputs = torch.cat([judge.outputs(to_float(batch.to(device))) for batch in images.split(batch_size)])
    found = judge.head.location_scale(outputs)[0] if isinstance(judge, classifiers.Density) else outputs.argmax(1)
    return found.double().cpu()


def scorer(folder: str, sha256: str) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """The function from pictures to scores (N,) of the judge in `folder`; UserError where it is not the one with that `sha256`."""
    try:
        judge = classifiers.load(Path(folder))
    except UserError as error:
        raise UserError(f"the judge cannot be loaded: {error}; `snakemake --forcerun build_dataset` makes it again") from error
    if read_json(Path(folder) / "config.json")["sha256"] != sha256:
        raise UserError(f"{folder} has changed since the results that name it were made: make them again")
    judge = judge.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        if not images:
            return np.zeros(0)
        pictures = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return scores_of(judge, torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()

    return score
