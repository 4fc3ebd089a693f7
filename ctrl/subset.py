"""The first few labelled images of an offline dataset, for what a method learns from how many."""

import pandas as pd
from PIL import Image

from ctrl.data import SPLITS
from ctrl.errors import UserError
from ctrl.pictures import image_digest, load_images

MIN_HELD_OUT = 10  # images that `val` and `calibration` keep at least: fewer choose no epoch and calibrate no temperature


def digests_of(table: pd.DataFrame) -> pd.Series:
    """The digest of each image of a dataset's table, by which the splits were drawn."""

    def one(path: str) -> bytes:
        return image_digest(Image.fromarray(load_images([path])[0].permute(1, 2, 0).contiguous().numpy()))

    return table["path"].map(one)


def subset(table: pd.DataFrame, report: dict, size: int, digests: pd.Series) -> tuple[pd.DataFrame, dict]:
    """`size` images of the training split, the same share of `val` and `calibration` (MIN_HELD_OUT at least), and their report.

    In each split the first by `digests` stay, so that a subset is part of every larger one. Bins and labels stay as they are. UserError
    where there are no more than `size` training images, or where a label that was among them is no longer.
    """
    if report.get("kind") == "continuous":
        raise UserError("sample_sizes: they are for labels that are classes; label.kind is continuous")
    split, num_train = table["split"], sum(report["counts"]["train"])
    if not 0 < size < num_train:
        raise UserError(f"sample_sizes: {size} must be from 1 to {num_train - 1}: of {num_train} training images, all are a row anyway")
    keep = []
    for name in SPLITS:
        rows = digests[split == name].sort_values().index
        keep += rows[: size if name == "train" else max(round(size / num_train * len(rows)), MIN_HELD_OUT)].tolist()
    chosen = table.loc[sorted(keep)].reset_index(drop=True)
    names = report["label_names"]
    counts = {s: chosen.loc[chosen["split"] == s, "label"].value_counts().reindex(range(len(names)), fill_value=0).tolist() for s in SPLITS}
    for k, (n, of) in enumerate(zip(counts["train"], report["counts"]["train"], strict=True)):
        if of and not n:
            raise UserError(f"sample_sizes: label {k} ({names[k]}) has no image among {size}; raise the size")
    return chosen, report | {"num_images": len(chosen), "counts": counts, "refused": []}
