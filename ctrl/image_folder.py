"""A folder of images with their table, drawn part by part: what is done is not drawn again."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from ctrl.io import read_parquet, write_parquet
from ctrl.oracles import to_pil


def write_images(
    parts: Sequence[pd.DataFrame], draw: Callable[[int], Iterable[tuple[Tensor, pd.DataFrame]]], folder: Path, bar: tqdm
) -> pd.DataFrame:
    """Writes images/*.png and samples.parquet into an existing folder; returns the table.

    `draw(k)` gives the images of `parts[k]` and their rows. A part that is done leaves its table in the folder, and is not drawn again.
    """
    done, tables, first = folder / "parts", [], 0
    for subfolder in (folder / "images", done):
        subfolder.mkdir(exist_ok=True)
    for k, part in enumerate(parts):
        if not (finished := done / f"{k}.parquet").exists():
            batches, number = [], first
            for images, table in draw(k):
                names = [f"images/{number + i:06d}.png" for i in range(len(table))]
                for image, name in zip(to_pil(images), names, strict=True):
                    image.save(folder / name)
                batches.append(table.assign(file_name=names))
                number += len(table)
                bar.update(len(table))
            write_parquet(finished, pd.concat(batches, ignore_index=True))
        else:
            bar.update(len(part))
        tables.append(read_parquet(finished))
        first += len(part)
    samples = pd.concat(tables, ignore_index=True)
    write_parquet(folder / "samples.parquet", samples)
    shutil.rmtree(done)
    return samples
