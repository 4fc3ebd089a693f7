"""The offline data: an image folder with its table, splits that never leak, the checks on all of it, and its labels."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ctrl import columns, scoring
from ctrl.bins import describe_continuous, describe_factor, measured_labels
from ctrl.errors import UserError
from ctrl.folders import is_inside
from ctrl.io import read_parquet
from ctrl.labels import Factors
from ctrl.oracles import score_to_label
from ctrl.pictures import Refused, image_digest, image_files, read_image

SPLITS = ("train", "val", "calibration")
JUDGE = "judge_"  # before the splits of the images from which the judge of a column learns, and nothing else
SAID = "said: "  # before a column's name, once it is a label
HELD_OUT = "held_out"  # the split of images that nothing is trained on: of a combination of labels to be reached without examples
TABLES = ("metadata.csv", "metadata.parquet", "samples.parquet")  # of an image folder, the first that exists


def choose_split(digest: bytes, shares: dict[str, float]) -> str:
    """The split of an image, drawn with probabilities `shares` (by the names in SPLITS) by the first 8 bytes of its digest."""
    u, total = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name in SPLITS[:-1]:
        total += shares[name]
        if u < total:
            return name
    return SPLITS[-1]


def read_table(folder: Path, captions: bool = True, labels: Sequence[str] = ()) -> pd.DataFrame:
    """The table of an image folder in Hugging Face's convention (or of generated samples): file_name, prompt and `labels`, all text.

    A column `text` serves as `prompt` where there is none. Without `captions` neither a table nor that column is needed: the prompts are
    empty. UserError where the folder, its table or a column is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}: name a folder of images with a {TABLES[0]}")
    path = next((folder / name for name in TABLES if (folder / name).exists()), None)
    if path is None and not captions and not labels:
        return pd.DataFrame({"file_name": image_files(folder)}, dtype=str).assign(prompt="")
    if path is None:
        needed = ", ".join(["file_name", *["prompt"] * captions, *labels])
        otherwise = ", or set dataset.captions: false" if captions and not labels else ""
        raise UserError(
            f"{folder} has no table of {'labels' if labels else 'prompts'}: add a {TABLES[0]} with the columns {needed}{otherwise}"
        )
    try:
        table = read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, OverflowError) as error:  # pandas' own are ValueErrors
        raise UserError(f"{path} is no readable CSV: {error}") from error
    if "prompt" not in table and "text" in table:
        table = table.rename(columns={"text": "prompt"})
    if "prompt" not in table and not captions:
        table = table.assign(prompt="")
    text = ["file_name", "prompt", *labels]
    for column in text:
        if column not in table:
            raise UserError(f"{path} has no column {column} (it has {', '.join(map(str, table.columns)) or 'none'}): add it")
    try:
        return table.assign(**{column: [columns.as_text(value) for value in table[column]] for column in text})
    except ValueError as error:
        raise UserError(f"{path} holds a {' or '.join(text)} that is no text: {error}") from error


def examine(
    folder: Path, table: pd.DataFrame, image_size: int, score: Callable[[list[Image.Image]], np.ndarray], captions: bool = True,
    crop: bool = False, store: Callable[[str, Image.Image], Path] | None = None, limit: int | None = None, labels: Sequence[str] = (),
    batch_size: int = 256,
) -> tuple[pd.DataFrame, list[dict]]:  # fmt: skip
    """Decodes and scores every image of `table`: the rows kept, with the columns digest, score and path; {file_name, reason} of the others.

    `score` makes of pictures an array, a row each. Of equal images (pixel by pixel) the first one stays. Files without a row in the table
    are refused too, and rows that say nothing in one of the columns `labels`. `store` writes an image that was cropped, and says where.
    With a `limit` only so many rows are looked at, drawn by a hash of their names.
    """

    def decoded(file_name: str) -> Image.Image | str:
        try:
            if not is_inside(folder, file_name):
                raise Refused("outside of the folder")
            return read_image(folder / file_name, image_size, crop)
        except Refused as error:
            return str(error)

    refused, first, kept, columns = [], {}, [], {"digest": [], "score": [], "path": []}
    names, prompts = table["file_name"].tolist(), table["prompt"].tolist()
    unlabelled = {column: (table[column].str.strip() == "").to_numpy() for column in labels}
    rows = sorted(sorted(range(len(names)), key=lambda row: hashlib.sha256(names[row].encode()).digest())[:limit])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), batch_size):
            part, new = rows[start : start + batch_size], []
            for row, image in zip(part, pool.map(decoded, [names[row] for row in part]), strict=True):
                name, digest = names[row], b"" if isinstance(image, str) else image_digest(image)
                reason = image if isinstance(image, str) else "no prompt" if captions and not prompts[row].strip() else None
                missing = next((column.removeprefix(SAID) for column, empty in unlabelled.items() if empty[row]), None)
                reason = reason or (missing and f"no label in the column {missing}")
                if reason is None and digest in first:
                    reason = f"duplicate of {first[digest]}"
                if reason is not None:
                    refused.append({"file_name": name, "reason": reason})
                    continue
                first[digest] = name
                kept.append(row)
                new.append(image)
                columns["digest"].append(digest)
                columns["path"].append(relative(store(name, image) if crop and store else folder / name))
            columns["score"] += list(score(new)) if new else []
    listed = {os.path.normpath(name) for name in names}
    refused += [{"file_name": name, "reason": "not in the table"} for name in image_files(folder) if name not in listed]
    return table.iloc[kept].assign(**columns).reset_index(drop=True), refused


def build(
    folder: Path, image_size: int, label: dict, shares: dict[str, float], captions: bool = True, crop: bool = False,
    store: Callable[[str, Image.Image], Path] | None = None, limit: int | None = None,
) -> tuple[pd.DataFrame, dict]:  # fmt: skip
    """The offline dataset of an image folder: a table and its report. For the last four arguments see `read_table`, `examine`.

    `label` holds oracle, edges, num_classes and descending, or `factors`, a list of such, and `held_out`, combinations of their labels
    whose images get the split HELD_OUT; where an oracle is a column of the folder's table, also `judge`, whose `share` of all images is
    set apart, with JUDGE before the names of its splits. `shares` are the shares of SPLITS, there too. Quantile edges are those of the
    training split, before anything is held out. The table has file_name, path (relative to the working directory), prompt, subject where
    the folder has it, split, score_{oracle} of each factor, label (of ctrl.labels). UserError where no image remains, or a label or a split
    has none.
    """
    folder, factors = Path(folder), label.get("factors") or [label]
    factors = [{k: v for k, v in f.items() if k not in scoring.KEYS} | scoring.described(f["oracle"], label) for f in factors]
    said = [f["column"] for f in factors if "column" in f]
    table = read_table(folder, captions, said)
    rows, scores, names_of, refused = score_images(folder, table, factors, image_size, captions, crop, store, limit)
    split = draw_splits(rows["digest"], shares, label["judge"]["share"] if said else 0.0, folder)
    splits = (*SPLITS, *([JUDGE + s for s in SPLITS] if said else []))
    if label.get("kind") == "continuous":
        y = scores[factors[0]["oracle"]]
        described, counts = describe_continuous(factors[0], y[split == "train"]), {s: int((split == s).sum()) for s in splits}
    else:
        factors = [describe_factor(f, scores[f["oracle"]], split == "train", names_of.get(f["oracle"])) for f in factors]
        y, described, counts = labelled(factors, scores, split, label.get("held_out") or [], splits)
    report = {"num_images": len(rows), **described, "image_size": image_size, "counts": counts, "refused": refused}
    return table_of(rows, split, scores, y), report


def score_images(
    folder: Path, table: pd.DataFrame, factors: list[dict], image_size: int, captions: bool, crop: bool,
    store: Callable[[str, Image.Image], Path] | None, limit: int | None,
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, list[str]], list[dict]]:  # fmt: skip
    """The rows that `examine` keeps, the scores (N,) of each factor by its oracle, the names of a column's values, and what is refused.

    UserError where no image remains.
    """
    functions = {f["oracle"]: scoring.scorer(f) for f in factors if "column" not in f}
    said = {f["column"]: f["edges"] for f in factors if "column" in f}

    def measured(images: list[Image.Image]) -> np.ndarray:
        return np.stack([score(images) for score in functions.values()], 1) if functions else np.zeros((len(images), 0))

    table = table.assign(**{SAID + column: table[column] for column in said})  # a column may have a name that `examine` gives
    rows, refused = examine(folder, table, image_size, measured, captions, crop, store, limit, [SAID + column for column in said])
    if rows.empty:
        examples = "; ".join(f"{r['file_name']}: {r['reason']}" for r in refused[:3])
        raise UserError(f"all {len(refused)} images of {folder} are refused ({examples or 'its table is empty'}): nothing to learn from")
    scores = dict(zip(functions, np.array(rows["score"].tolist(), dtype=np.float64).reshape(len(rows), -1).T, strict=True))
    read = {column: columns.scores_of(rows[SAID + column], column, edges) for column, edges in said.items()}
    return rows, scores | {c: values for c, (values, _) in read.items()}, {c: names for c, (_, names) in read.items()}, refused


def labelled(
    factors: list[dict], scores: dict[str, np.ndarray], split: np.ndarray, held_out: list, splits: Sequence[str]
) -> tuple[np.ndarray, dict, dict]:
    """The classes (N,) of scores, what the report says of them, and their numbers in each of `splits`; for held_out see `build`.

    Sets `split` (N,) of what is held out. UserError where a label has no image to learn from.
    """
    space, y = Factors.from_report({"factors": factors}), measured_labels(scores, {"factors": factors})
    names, held_out = space.names, space.check(held_out).tolist()
    of_judge = np.array([s.startswith(JUDGE) for s in split])
    split[np.isin(y, held_out) & ~of_judge] = HELD_OUT  # a judge stands for people, who know every combination
    check_judged(factors, scores, split)
    counts = {s: np.bincount(y[split == s], minlength=len(names)).tolist() for s in (*splits, *([HELD_OUT] if held_out else []))}
    for k, n in enumerate(counts["train"]):
        if n == 0 and k not in held_out:
            if any("nominal" in f for f in factors):
                raise UserError(f"label {k} ({names[k]}) has no image in the training split: add images of it")
            spans = (f"the scores span {score.min():.4g} to {score.max():.4g}" for score in scores.values())
            raise UserError(f"label {k} ({names[k]}) has no image in the training split; {', '.join(spans)}: move label.edges")
    if len(factors) == 1:
        return y, factors[0], counts
    return y, {"num_classes": len(names), "label_names": list(names), "held_out": held_out, "factors": factors}, counts


def draw_splits(digests: Sequence[bytes], shares: dict[str, float], judge_share: float, folder: Path) -> np.ndarray:
    """The split of each image, (N,); UserError where one of them has no image.

    The judge's images are drawn by further bytes of the digest: its share moves no image from one of SPLITS to another.
    """
    judged = [int.from_bytes(digest[8:16], "big") / 2**64 < judge_share for digest in digests]
    split = np.array([JUDGE * of + choose_split(digest, shares) for of, digest in zip(judged, digests, strict=True)], dtype=object)
    for s in (*SPLITS, *([JUDGE + s for s in SPLITS] if judge_share else [])):
        if not (split == s).any():
            share = f"dataset.splits.{s.removeprefix(JUDGE)}" + (" or label.judge.share" if s.startswith(JUDGE) else "")
            raise UserError(f"{folder}: the split {s} of its {len(split)} images is empty; add images or raise {share}")
    return split


def check_judged(factors: Sequence[dict], scores: dict[str, np.ndarray], split: np.ndarray) -> None:
    """Raises UserError where a judge would never learn one of its labels, and so never say it."""
    for factor in (f for f in factors if "column" in f):
        y = score_to_label(scores[factor["oracle"]][split == JUDGE + "train"], factor["edges"], factor["descending"])
        if unseen := set(range(factor["num_classes"])) - set(y.tolist()):
            name = factor["label_names"][min(unseen)]
            raise UserError(f"no image of the judge has {name} in the column {factor['column']}: add some, or raise label.judge.share")


def table_of(rows: pd.DataFrame, split: np.ndarray, scores: dict[str, np.ndarray], y: np.ndarray) -> pd.DataFrame:
    """The dataset's table, from the kept rows of `examine`."""
    table = pd.DataFrame({"file_name": rows["file_name"], "path": rows["path"], "prompt": rows["prompt"]})
    if "subject" in rows:
        table["subject"] = rows["subject"]
    return table.assign(split=split, **{f"score_{name}": score for name, score in scores.items()}, label=y)


def relative(path: Path) -> str:
    """`path` from the working directory where it lies inside it, else absolute."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
