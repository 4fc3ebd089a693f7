"""A folder of images with their table, drawn part by part: what is done is not drawn again."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from ctrl.io import read_parquet, write_parquet
from ctrl.oracles import to_pil

PARTS = "parts"  # a table of each part that is done


def write_images(
    parts: Sequence[pd.DataFrame], draw: Callable[[int], Iterable[tuple[Tensor, pd.DataFrame]]], folder: Path, bar: tqdm,
    peak_memory_mb: Callable[[], float],
) -> tuple[pd.DataFrame, float]:  # fmt: skip
    """Writes images/*.png and samples.parquet into an existing folder; returns the table, and the peak memory of all runs that drew it.

    `draw(k)` gives the images of `parts[k]` and their rows. A part that is done leaves its table in the folder, and is not drawn again
    until `forget_parts`.
    """
    done, tables, first = folder / PARTS, [], 0
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
            write_parquet(finished, pd.concat(batches, ignore_index=True).assign(peak_memory_mb=peak_memory_mb()))
        else:
            bar.update(len(part))
        tables.append(read_parquet(finished))
        first += len(part)
    samples = pd.concat(tables, ignore_index=True)
    peak = samples.pop("peak_memory_mb").max()
    write_parquet(folder / "samples.parquet", samples)
    return samples, peak


def forget_parts(folder: Path) -> None:
    """Removes what only a run that goes on needs: the last thing before a folder is whole."""
    shutil.rmtree(folder / PARTS)
