"""Sample efficiency: the table of methods by the number of labelled images that they learned from, and what it says.

No figure is written here: every number of the text comes from the table.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from ctrl.errors import UserError
from ctrl.methods_page import markdown_table, overlap
from ctrl.names import recipe_of, sample_of
from ctrl.tables import SHOWN, number

NAMES = {"ctrl": "CTRL", "cfg": "CFG", "pretrained": "pretrained", "rejection": "rejection (noise floor)"}
METRICS = {"accuracy": -1, "kid_rejection": 1, "kid_rejection_within": 1}  # 1: the lower the better
SHOWN_HERE = ("accuracy", "kid_rejection", "kid_rejection_within", "diversity")
TERMS = (
    "Images are those of the training split. CTRL's classifier also has the same share of the validation split, to choose an epoch by, and "
    "of the calibration split; CFG has neither. Bins, cells, and what fine-tuning does but for the images are the same for every size. "
    "CFG's scale is tuned for each size, on as many images as every other baseline's; some of the seeds measured here are among them.",
    "With pairs (x, y) alone, c unknown, CTRL's rows stay as they are: its classifier sees an image and its label, and its prompts are "
    "the config's, so that other prompts in the dataset give the same files byte for byte. CFG learns from triples (c, x, y): it cannot be "
    "trained at all.",
)


def build(
    evaluations: Sequence[dict], reports: Mapping[str, dict], classifiers: Mapping[str, dict], tunings: Mapping[str, dict]
) -> pd.DataFrame:
    """A row an evaluation: method, num_images (empty for what learns from none), n, each metric with _lo and _hi, and what it learned by.

    evaluations: of scripts/evaluate.py; by the end of a method's name, such as `_n300` or nothing: `reports`, the datasets' report.json,
    and `classifiers`, their metrics.json, from which CTRL's rows have the accuracy on the pretrained model's images, the same for every
    size; `tunings`: of scripts/tune.py by the method's whole name, for `scale`. UserError where one is missing.
    """
    rows = []
    for evaluation in evaluations:
        name = evaluation["method"].removesuffix("_reference")  # another set of the same law
        method, sample = recipe_of(name), sample_of(name)
        row = {"method": method, "n": evaluation["n"]}
        counts = {split: sum(labels) for split, labels in reports.get(sample, {}).get("counts", {}).items()}
        if method in ("ctrl", "cfg") and not (counts and (sample in classifiers if method == "ctrl" else name in tunings)):
            raise UserError(f"the evaluation of {name!r} has no dataset, classifier or tuning beside it; give all of one size")
        if method == "ctrl":
            row |= {f"num_{split}": counts[split] for split in ("val", "calibration")} | accuracies(classifiers[sample])
        if method == "cfg":
            row["scale"] = tunings[name]["best"]["scale"]
        if method in ("ctrl", "cfg"):
            row["num_images"] = counts["train"]
        for metric, figure in evaluation["metrics"].items():
            row |= {metric: figure.get("value"), f"{metric}_lo": figure.get("lo"), f"{metric}_hi": figure.get("hi")}
        rows.append(row)
    first = ["method", "num_images", "num_val", "num_calibration", "n"]
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*first, *(c for c in table if c not in first)]).dropna(axis=1, how="all")
    order = table["method"].map({name: k for k, name in enumerate(("pretrained", "rejection", "cfg", "ctrl"))})
    table = table.assign(order=order).sort_values(["order", "num_images"], kind="stable").drop(columns="order").reset_index(drop=True)
    return table.astype({c: "Int64" for c in first[1:] if c in table})


def accuracies(metrics: dict) -> dict[str, float]:
    """Accuracy on generated images, and their number, by a classifier's metrics.json; with several factors, of each."""
    parts = {"": metrics} if "val" in metrics else {f"_{key}": part for key, part in metrics.items() if isinstance(part, dict)}
    found = {}
    for key, part in parts.items():
        if part["generated"]:
            found |= {f"classifier_accuracy{key}": part["generated"]["after"]["accuracy"], "classifier_n": part["generated"]["n"]}
    return found


def section(table: pd.DataFrame) -> str:
    """The part of a page on `build`'s table, as Markdown: its main figures, and what they say."""
    names = [name for name in SHOWN_HERE if name in table]
    further = [c for c in table if c.startswith("classifier_accuracy")]
    rows = []
    for _, row in table.iterrows():
        own = [f"{row[c]:.3f} (n = {row['classifier_n']:.0f})" if pd.notna(row[c]) else "–" for c in further]
        scale = f"{row['scale']:g}" if pd.notna(row.get("scale")) else "–"
        cells = [count(row["num_images"]), f"{row['n']:.0f}", *(number(row, name) for name in names), *own, scale]
        rows.append([NAMES.get(row["method"], row["method"]), *cells])
    headings = ["method", "labelled images", "n", *(SHOWN[name][0] for name in names), *(c.replace("_", " ") for c in further), "scale"]
    lines = [f"- {text}" for text in (*sentences(table), *TERMS)]
    return "\n".join(["## How many labelled images it takes", "", *markdown_table(headings, rows, 1), "", *lines]) + "\n"


def sentences(table: pd.DataFrame) -> list[str]:
    """Who is ahead at each number of images by each metric, from where on more images change nothing, and who reaches the noise floor."""
    by_size = {method: rows.set_index("num_images").sort_index() for method, rows in table.dropna(subset="num_images").groupby("method")}
    floor, lines = table[table["method"] == "rejection"], []
    for metric in (m for m in METRICS if m in table):
        heading, parts = SHOWN[metric][0].replace(" ×1000", ""), []
        if {"ctrl", "cfg"} <= by_size.keys():
            parts.append(ahead(by_size["ctrl"], by_size["cfg"], metric))
        for method, rows in by_size.items():
            parts.append(worth_of_all(rows, metric, NAMES[method]))
            if metric.startswith("kid_") and len(floor):
                reached = [size for size, row in rows.iterrows() if overlap(row, floor.iloc[0], metric)]
                parts.append(f"{NAMES[method]}'s interval meets the noise floor's with {listed(reached)}")
        lines.append(f"{heading}: {'; '.join(filter(None, parts))}.")
    seconds = {m: rows["train_seconds"].dropna() for m, rows in by_size.items() if "train_seconds" in rows}
    if took := [f"{s.min():.0f} to {s.max():.0f} s for {NAMES[m]}" for m, s in seconds.items() if len(s)]:
        lines.append(f"A training took {', '.join(took)}.")
    return lines


def ahead(ctrl: pd.DataFrame, cfg: pd.DataFrame, metric: str) -> str:
    """The numbers of images at which either is better beyond the intervals."""
    groups: dict[str, list[int]] = {"CTRL": [], "CFG": [], "": []}
    for size in ctrl.index.intersection(cfg.index):
        one, other = ctrl.loc[size], cfg.loc[size]
        better = "CTRL" if METRICS[metric] * (one[metric] - other[metric]) < 0 else "CFG"
        groups["" if overlap(one, other, metric) else better].append(size)
    leads = [f"{name} is ahead with {listed(sizes)} images" for name, sizes in groups.items() if name and sizes]
    return ", ".join(leads + ([f"the intervals overlap with {listed(groups[''])}"] if groups[""] else []))


def worth_of_all(rows: pd.DataFrame, metric: str, name: str) -> str:
    """The smallest number of images from which on every interval overlaps that of all; `rows` are one method's, by number of images."""
    *fewer, every = rows.index
    same = [size for k, size in enumerate(fewer) if all(overlap(rows.loc[s], rows.loc[every], metric) for s in fewer[k:])]
    if not fewer:
        return ""
    told = f"{count(same[0])} images cannot" if same else f"{count(fewer[-1])} images can still"
    return f"{name} with {told} be told from {name} with all {count(every)}"


def count(number: int | None) -> str:
    """`1,000`, or `–` where there is none."""
    return "–" if pd.isna(number) else f"{int(number):,}"


def listed(sizes: Sequence[int]) -> str:
    """`100, 300 and 1,000`, or `none`."""
    texts = [count(size) for size in sizes]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]])) or "none"
