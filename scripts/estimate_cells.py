"""Find which labels each subject can take: the mean of p̂(y | x) over images of the pretrained model, and the cells above a minimum."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.io import read_json, read_parquet, write_json
from ctrl.labels import Factors
from ctrl.oracles import to_pil
from ctrl.pairs import possible_cells, possible_ranges
from ctrl.pictures import load_images
from ctrl.scoring import scorer
from scripts.common import add_config_argument, load_config


def ranges(pool: pd.DataFrame, images: torch.Tensor, report: dict, quantiles: list[float]) -> dict:
    """cells.json of a continuous label: the range and spread of each subject's scores by the oracle, and the targets as cells."""
    scored = pool.assign(score=scorer(report)(to_pil(images)))
    scores = {subject: group["score"].to_numpy() for subject, group in scored.groupby("subject", sort=False)}
    targets, bounds = range(report["num_classes"]), (report["low"], report["high"])
    found = possible_ranges(scores, quantiles, bounds, len(targets), report["tolerance"])
    return {
        "subjects": list(scores),
        "labels": list(targets),
        "label_names": report["label_names"],
        "num_images": [len(s) for s in scores.values()],
        "quantiles": quantiles,
        "ranges": found,
        "spread": {subject: scores[subject].std() for subject in found},
        "extrapolation": report["extrapolation"],
        "cells": [(subject, k) for subject in found for k in targets],
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--pool", type=Path, required=True, help="folder of images of the pretrained model (scripts/sample.py --per-subject)"
    )
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json, for the labels' names")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write: probability of each label for each subject, and cells")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = load_config(args)
    report = read_json(args.dataset / "report.json")
    pool = read_parquet(args.pool / "samples.parquet")
    images = load_images([args.pool / name for name in pool["file_name"]])
    if report.get("kind") == "continuous":
        result = ranges(pool, images, report, config["cells"]["quantiles"])
        write_json(args.output, result | {"held_out_subjects": config["prompts"]["held_out"]})
        print(f"{len(result['ranges'])} of {len(result['subjects'])} subjects have a range of {report['oracle']} to ask for")
        return
    classifier = classifiers.load(args.classifier)
    p = torch.cat([classifier.log_probs(part.float() / 127.5 - 1).exp() for part in images.split(256)])
    space = Factors.from_report(report)
    if p.shape[1] != space.num_classes:
        raise errors.UserError(f"{args.classifier} has {p.shape[1]} labels, {args.dataset} has {space.num_classes}")
    codes = [*range(space.num_classes), *space.partial]
    p = p @ space.covers[codes].to(p).T if space.partial else p
    table = pd.DataFrame(p.numpy(), columns=codes).assign(subject=pool["subject"]).groupby("subject", sort=False).agg("mean")
    names, min_probability = [space.name(code) for code in codes], config["cells"]["min_probability"]
    possible = possible_cells(torch.tensor(table.to_numpy()), list(table.index), names, min_probability)
    cells = [(subject, codes[k]) for subject, k in possible]
    free = [(subject, code) for subject, code in cells if code > space.null]
    counts = pool["subject"].value_counts()
    result = {
        "subjects": list(table.index),
        "labels": codes,
        "label_names": names,
        "num_images": [int(counts[s]) for s in table.index],
        "probability": table.round(5).to_numpy(),
        "min_probability": min_probability,
        "cells": [cell for cell in cells if cell not in free],
        "held_out_subjects": config["prompts"]["held_out"],
    }
    if space.partial:
        result |= {"free": free, "held_out": report["held_out"]}
    write_json(args.output, result)
    print(f"{len(cells)} of {table.size} (subject, label) cells have probability >= {min_probability}")


if __name__ == "__main__":
    errors.main(main, lower="sampler.batch_size")
