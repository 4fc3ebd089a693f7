"""How good is a conditional sampler: from images, what they were asked to be, and a reference, to named figures with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ctrl import brisque, features, metrics, targets
from ctrl.bins import measured_labels
from ctrl.errors import UserError
from ctrl.folders import is_inside
from ctrl.io import read_json, read_parquet
from ctrl.labels import Factors, factors_of
from ctrl.oracles import distance_to_bin, pixels, to_pil
from ctrl.pictures import load_images
from ctrl.scoring import scorer
from ctrl.targets import by_target

COLUMNS = ("file_name", "prompt", "subject", "label", "seed")
COSTS = {  # column -> metric
    "nfe_forward": "nfe_forward", "nfe_backward": "nfe_backward", "seconds": "seconds_per_image",
    "effective_sample_size": "effective_sample_size",
}  # fmt: skip
SINGLE = ("train_seconds", "peak_memory_mb", "kl_nats", "var_log_w")  # figures of samples.json or adapter.json
MIN_FRECHET = 2000  # images; below, the Frechet distance says more about their number than about their law


@dataclass
class Samples:
    """Generated images: `table` has COLUMNS, score_{oracle} of each factor and as `score` that of the first.

    `images` are uint8 (N, 3, H, W), `info` is samples.json. Of a continuous label, `label` is the number of the target and `asked` its
    value: see ctrl.targets.
    """

    folder: Path
    table: pd.DataFrame
    images: Tensor
    info: dict

    @property
    def labels(self) -> Tensor:
        """The requested labels, int64 (N,)."""
        return torch.tensor(self.table["label"].to_numpy(np.int64))

    @property
    def seeds(self) -> Tensor:
        """int64 (N,); images of one seed share their noise and so depend on each other."""
        return torch.tensor(self.table["seed"].to_numpy(np.int64))


def load_samples(folder: Path | str, oracles: str | Mapping | Sequence[str | Mapping], num_classes: int) -> Samples:
    """Reads a folder of samples and scores every picture by each of `oracles`: names, or factors of the dataset's report.json.

    UserError where the folder, its table, a column or a picture is missing, the table is empty, or a label is not in 0..num_classes - 1.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of samples {folder}; draw them with scripts/sample.py")
    table = read_parquet(folder / "samples.parquet")
    if missing := [c for c in COLUMNS if c not in table]:
        raise UserError(f"{folder / 'samples.parquet'} has no column {missing[0]}; draw the samples again with scripts/sample.py")
    if table.empty:
        raise UserError(f"{folder / 'samples.parquet'} has no rows; draw the samples again with scripts/sample.py")
    table = by_target(table)
    if not pd.api.types.is_integer_dtype(table["label"]):
        raise UserError(f"{folder / 'samples.parquet'}: its labels are {table['label'].dtype}, not whole numbers; draw the samples again")
    beyond = 1 if "asked" in table else 0
    if not table["label"].between(-beyond, num_classes - 1 + beyond).all():
        wrong = min(set(table["label"]) - set(range(num_classes)))
        raise UserError(f"{folder / 'samples.parquet'} asks for label {wrong}, but the dataset has the labels 0 to {num_classes - 1}")
    if wrong := [name for name in table["file_name"] if not is_inside(folder, str(name))]:
        raise UserError(f"{folder / 'samples.parquet'} names {wrong[0]}, which is outside of its folder; draw the samples again")
    images = load_images([folder / name for name in table["file_name"]])
    info = read_json(folder / "samples.json") if (folder / "samples.json").exists() else {}
    return Samples(folder, with_scores(table, images, oracles), images, info)


def with_scores(table: pd.DataFrame, images: Tensor, oracles: str | Mapping | Sequence[str | Mapping]) -> pd.DataFrame:
    """`table` with the columns score_{oracle} of each oracle, measured on uint8 images (N, 3, H, W), and the first of them as `score`."""
    factors = [
        {"oracle": oracle} if isinstance(oracle, str) else oracle
        for oracle in ([oracles] if isinstance(oracles, str | Mapping) else oracles)
    ]
    scores = {f"score_{factor['oracle']}": score_images(images, factor) for factor in factors}
    return table.assign(score=next(iter(scores.values())), **scores)


def factor_scores(table: pd.DataFrame, report: dict) -> dict[str, np.ndarray]:
    """The measured scores (N,) of each factor, by the name of its oracle; `score` alone serves for one factor."""
    names = [factor["oracle"] for factor in factors_of(report)]
    return {name: table["score" if len(names) == 1 else f"score_{name}"].to_numpy(np.float64) for name in names}


def score_images(images: Tensor, oracle: str | Mapping) -> np.ndarray:
    """The oracle's scores (N,) of uint8 images (N, 3, H, W)."""
    return scorer(oracle)(to_pil(images))


def number_cells(samples: Samples, reference: Samples) -> tuple[Tensor, Tensor]:
    """The number of the (subject, label) cell of each image, alike in both sets: int64 (N,), (M,).

    Where hardly any cell has two images in both sets (a trial run), a cell is a label, whatever the subject.
    UserError where the two sets were asked for different cells, or share seeds (their distance would be too small).
    """
    if samples.folder.resolve() == reference.folder.resolve():
        raise UserError(f"{samples.folder} would be compared with itself; the reference must be an independent set")
    if torch.isin(samples.seeds, reference.seeds).any():
        raise UserError(f"{samples.folder} and {reference.folder} share seeds; draw the reference with another --seed-offset")
    keys = [list(zip(s.table["subject"], s.table["label"].astype(int), strict=True)) for s in (samples, reference)]
    for number, (own, other) in enumerate((keys, keys[::-1])):
        if lost := set(own) - set(other):
            here, there = (samples.folder, reference.folder)[:: 1 - 2 * number]
            subject, label = min(lost)
            raise UserError(f"{here} has images of {subject!r} with label {label}, {there} has none; draw both with the same cells")
    return cells_or_labels(*keys)


def cells_or_labels(own: Sequence[tuple[str, int]], other: Sequence[tuple[str, int]]) -> metrics.Pair:
    """The number of each (subject, label) in two sets, alike in both; of the label alone where few have two images in both sets."""
    numbers = {cell: i for i, cell in enumerate(sorted(set(own) | set(other)))}
    x, y = (torch.tensor([numbers[cell] for cell in cells]) for cells in (own, other))
    pairs = (torch.bincount(x, minlength=len(numbers)) >= 2) & (torch.bincount(y, minlength=len(numbers)) >= 2)
    return (x, y) if pairs.double().mean() >= 0.5 else tuple(torch.tensor([label for _, label in cells]) for cells in (own, other))


def distance_to(reference: Samples, network: nn.Module) -> Callable[[Tensor, Sequence[str], Tensor], dict[str, float]]:
    """`score(images, subjects, labels)`: kid_rejection of images in [-1, 1] with shape (N, 3, H, W) to the rejection samples `reference`.

    Labels that leave a factor free have no cell in the reference, and are left out; without two images in any cell there is no figure.
    """
    target = features.extract(network, reference.images)
    cells = list(zip(reference.table["subject"], reference.table["label"].astype(int), strict=True))
    known = set(cells)

    def score(images: Tensor, subjects: Sequence[str], labels: Tensor) -> dict[str, float]:
        asked = list(zip(subjects, labels.tolist(), strict=True))
        if not (rows := [k for k, cell in enumerate(asked) if cell in known]):
            return {}
        try:
            pair = cells_or_labels([asked[k] for k in rows], cells)
            return {"kid_rejection": metrics.kid(features.extract(network, pixels(images[rows])), target, pair)}
        except ValueError:  # a trial run's few images
            return {}

    return score


def evaluate(samples: Samples, reference: Samples, network: nn.Module, report: dict, config: dict, seed: int = 0) -> dict:
    """Every figure of one method against the rejection samples `reference`.

    network: from ctrl.features; report: the dataset's report.json (edges, descending, num_classes); config: the keys num_bootstrap and
    num_neighbours. Returns {"n", "metrics": {name: {"value", "n", "lo", "hi"}}, "confusion": counts [requested][measured],
    "per_subject": {subject: {"accuracy", "n"}}, "misses": {"n", "median", "largest"}: how far outside their bins, in the oracle's unit}.
    Of a continuous label the metrics are those of ctrl.targets, which also says what comes in place of the last three.
    With several factors there are also `accuracies_of_factors`, and misses of each by its oracle.
    lo and hi bound the 95 % bootstrap interval over seeds, or are None.
    """
    continuous, num_bootstrap = report.get("kind") == "continuous", config["num_bootstrap"]
    if continuous:
        apart = targets.beyond(samples.table, report["num_classes"])
        further, samples = rows_of(samples, apart), rows_of(samples, ~apart)
    cells, n = number_cells(samples, reference), len(samples.table)

    def figure_of(samples: Samples) -> Callable[[Callable[[Tensor], float]], dict]:
        def over_seeds(statistic: Callable[[Tensor], float]) -> dict:
            lo, hi = metrics.bootstrap(statistic, len(samples.table), num_bootstrap, seed, clusters=samples.seeds)
            return _figure(statistic(torch.arange(len(samples.table))), len(samples.table), lo, hi)

        return over_seeds

    over_seeds = figure_of(samples)
    if continuous:
        figures, details = targets.figures(samples.table, report["tolerance"], over_seeds), targets.details(samples.table)
        figures |= {} if further.table.empty else targets.figures_beyond(further.table, figure_of(further))
    else:
        figures, details = label_figures(samples, report, over_seeds)
    both = [features.compute(network, s.images, s.table["subject"].tolist(), s.table["prompt"].tolist()) for s in (samples, reference)]
    figures |= compare(both[0][0], both[1][0], cells, (samples.seeds, reference.seeds), config["num_neighbours"], num_bootstrap, seed)
    figures[network.score_name] = over_seeds(lambda i: both[0][1][i].mean().item())
    figures |= costs(samples.table, samples.info, num_bootstrap, seed)
    return {"n": n, "metrics": figures, **details}


def further_figures(samples: Samples, config: dict, seed: int = 0) -> dict[str, dict]:
    """clip_score and brisque, where the config's section asks for them: means over images (with statistics, for the latter)."""
    columns = {}
    if config["clip_score"]:
        network = features.load(config["clip_score"])
        table = samples.table
        columns["clip_score"] = features.prompt_scores(network, samples.images, table["subject"].tolist(), table["prompt"].tolist())
    if config["brisque"]:
        columns["brisque"] = brisque.scores(samples.images, brisque.load(config["brisque"]))
    figures = {}
    for name, values in columns.items():
        there = ~values.isnan()
        if there.any():
            x, seeds = values[there].double(), samples.seeds[there]
            bounds = metrics.bootstrap(lambda i, x=x: x[i].mean().item(), len(x), config["num_bootstrap"], seed, clusters=seeds)
            figures[name] = _figure(x.mean().item(), len(x), *bounds)
    return figures


def in_cells_of(samples: Samples, table: pd.DataFrame) -> Samples:
    """Those of the (subject, label) cells that `table` has: a few images a label need not reach every subject."""
    cells = set(zip(table["subject"], table["label"].astype(int), strict=True))
    own = zip(samples.table["subject"], samples.table["label"].astype(int), strict=True)
    return rows_of(samples, np.array([cell in cells for cell in own], dtype=bool))


def rows_of(samples: Samples, chosen: np.ndarray) -> Samples:
    """Those with `chosen`, bool (N,)."""
    return Samples(samples.folder, samples.table[chosen].reset_index(drop=True), samples.images[torch.tensor(chosen)], samples.info)


def label_figures(samples: Samples, report: dict, over_seeds: Callable) -> tuple[dict, dict]:
    """Of labels that are classes: the metrics, and what else `evaluate` returns."""
    scores, factors = factor_scores(samples.table, report), factors_of(report)
    requested, measured = samples.labels, torch.from_numpy(measured_labels(scores, report))
    figures = {
        "accuracy": over_seeds(lambda i: metrics.accuracy(requested[i], measured[i])),
        "macro_f1": over_seeds(lambda i: metrics.macro_f1(requested[i], measured[i])),
    }
    if len(factors) > 1:
        figures |= accuracies_of_factors(requested, measured, report, over_seeds)
    subjects = samples.table["subject"].to_numpy()
    hits = (requested == measured).numpy()
    parts = Factors.from_report(report).parts[requested].T.numpy()
    misses = {}
    for factor, y in zip(factors, parts, strict=True):
        if factor.get("nominal"):  # one class is no nearer than another
            continue
        outside = distance_to_bin(scores[factor["oracle"]], y, factor["edges"], factor["descending"])
        outside = outside[~hits if len(factors) == 1 else outside > 0]
        half_and_all = {"median": float(np.median(outside)), "largest": float(outside.max())} if len(outside) else {}
        misses[factor["oracle"]] = {"n": len(outside), **half_and_all}
    return figures, {
        "confusion": metrics.confusion_matrix(requested, measured, report["num_classes"]).tolist(),
        "per_subject": {
            s: {"accuracy": float(hits[subjects == s].mean()), "n": int((subjects == s).sum())} for s in dict.fromkeys(subjects)
        },
        "misses": misses if len(factors) > 1 else misses.get(factors[0]["oracle"], {}),
    }


def accuracies_of_factors(requested: Tensor, measured: Tensor, report: dict, figure: Callable) -> dict[str, dict]:
    """accuracy_{oracle} of each factor, and of the combinations that are held out accuracy_held_out; codes with shape (N,).

    `figure` makes an entry of the metrics of a statistic of rows. Held out means: neither in the offline data nor asked for in training.
    """
    space = Factors.from_report(report)
    right = space.parts[requested] == space.parts[measured]
    figures = {f"accuracy_{key}": figure(lambda i, k=k: right[i, k].double().mean().item()) for k, key in enumerate(space.keys)}
    held_out = torch.isin(requested, torch.tensor(report["held_out"], dtype=torch.long))
    if held_out.any():
        joint = right.all(1).double()

        def accuracy(i: Tensor) -> float:
            return (joint[i] * held_out[i]).sum().item() / max(held_out[i].sum().item(), 1)

        figures["accuracy_held_out"] = figure(accuracy) | {"n": int(held_out.sum())}
    return figures


def compare(
    x: Tensor, reference: Tensor, cells: metrics.Pair, seeds: metrics.Pair, num_neighbours: int, num_bootstrap: int, seed: int
) -> dict[str, dict]:
    """Distances between two sets of features (N, D), (M, D), and the method's diversity; see ctrl.metrics for each.

    Intervals of precision and recall are over the images that are tested, the manifold as it is.
    """
    n, settings = len(x), {"cells": cells, "clusters": seeds}
    resampling = {"num_bootstrap": num_bootstrap, "seed": seed}
    figures = {}
    try:
        for name, within in (("kid_rejection", False), ("kid_rejection_within", True)):
            value = metrics.kid(x, reference, **settings, within=within)
            figures[name] = _figure(value, n, *metrics.kid_interval(x, reference, **settings, within=within, **resampling))
        bounds = metrics.diversity_interval(x, reference, **settings, **resampling)
        figures["diversity"] = _figure(metrics.diversity(x, reference, **settings), n, *bounds)
    except ValueError as error:
        raise UserError(f"too few images for the distances: {error}; raise evaluation.images_per_label") from error
    if min(n, len(reference)) >= MIN_FRECHET:
        figures["frechet_distance"] = _figure(metrics.frechet_distance(x, reference), n)
    if min(n, len(reference)) > 2 * num_neighbours:
        tested = {"precision": (x, reference, 0), "recall": (reference, x, 1)}
        for name, (points, support, own) in tested.items():
            inside = metrics.in_manifold(points, support, num_neighbours, seeds[1 - own]).double()
            bounds = metrics.bootstrap(lambda i, hit=inside: hit[i].mean().item(), len(inside), **resampling, clusters=seeds[own])
            figures[name] = _figure(inside.mean().item(), len(inside), *bounds)
    return figures


def costs(table: pd.DataFrame, info: dict, num_bootstrap: int, seed: int) -> dict[str, dict]:
    """What an image cost, from the table's columns, and the run's own figures from `info`.

    Images that were timed together carry the mean of their batch, and are resampled together. What is the same for all has no interval.
    Of the effective sample sizes after each step the last one counts: of the weights that an image is drawn by.
    """
    figures = {}
    if "effective_sample_size" in table:
        table = table.assign(effective_sample_size=table["effective_sample_size"].map(lambda sizes: sizes[-1]))
    for column, name in COSTS.items():
        if column in table:
            values = torch.tensor(table[column].to_numpy(np.float64))
            figures[name] = _figure(values.mean().item(), len(values))
            if values.unique().numel() > 1:
                batches = values if column == "seconds" else None
                bounds = metrics.bootstrap(lambda i, v=values: v[i].mean().item(), len(values), num_bootstrap, seed, clusters=batches)
                figures[name] = _figure(values.mean().item(), len(values), *bounds)
    if "nfe_forward" in figures and "nfe_backward" in figures:
        figures["nfe"] = _figure(figures["nfe_forward"]["value"] + figures["nfe_backward"]["value"], len(table))
    for name in SINGLE:
        if info.get(name) is not None:
            given = info[name] if isinstance(info[name], dict) else {"value": info[name]}
            if "values" in given:
                values, seeds = torch.tensor(given["values"], dtype=torch.float64), torch.tensor(given["seeds"])
                bounds = metrics.bootstrap(lambda i, v=values: v[i].mean().item(), len(values), num_bootstrap, seed, clusters=seeds)
                given = given | dict(zip(("lo", "hi"), bounds, strict=True))
            figures[name] = _figure(given["value"], given.get("n", len(table)), given.get("lo"), given.get("hi"))
    return figures


def _figure(value: float, n: int, lo: float | None = None, hi: float | None = None) -> dict:
    return {"value": value, "n": n, "lo": lo, "hi": hi}


def values_of(evaluation: dict, names: Sequence[str]) -> dict[str, float]:
    """The plain values of those `names` that an evaluation has."""
    return {name: evaluation["metrics"][name]["value"] for name in names if name in evaluation["metrics"]}


def intervals_of(evaluation: dict, names: Sequence[str]) -> dict[str, float]:
    """The ends of the 95 % intervals, as `{name}_lo` and `{name}_hi`, of those `names` that have one."""
    known = {name: evaluation["metrics"].get(name, {}) for name in names}
    return {f"{name}_{end}": figure[end] for name, figure in known.items() for end in ("lo", "hi") if figure.get(end) is not None}
