"""Train p(y | x) on the offline dataset, calibrate it on a split of its own, and measure it on held-out and on generated images."""

import argparse
import os
import time
from pathlib import Path

import pandas as pd
import torch

from ctrl import classifier as classifiers
from ctrl import classifier_quality, coverage, errors, io, own, tracking
from ctrl.bins import measured_labels
from ctrl.classifier_fit import fit
from ctrl.device import device_of
from ctrl.labels import factors_of
from ctrl.names import factor_of
from ctrl.oracles import to_pil
from ctrl.pictures import load_images
from ctrl.scoring import scorer
from scripts.common import add_config_argument, load_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with metadata.parquet and report.json")
    parser.add_argument("--generated", type=Path, help="folder of generated images with samples.parquet, to be measured on too")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for model.safetensors, config.json, metrics.json, reliability.png"
    )
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def load_generated(folder: Path, report: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated images, uint8 with shape (N, 3, H, W), and their labels (scores, of a continuous one) by the oracle, (N,)."""
    images = load_images(folder / name for name in io.read_parquet(folder / "samples.parquet")["file_name"])
    scores = scorer(report)(to_pil(images))
    return images, torch.from_numpy(measured_labels({report["oracle"]: scores}, report))


def quality_of(report: dict):
    """The module that measures a classifier of this kind of label."""
    return coverage if report.get("kind") == "continuous" else classifier_quality


def train_factor(report: dict, table: pd.DataFrame, images: torch.Tensor, settings: dict, args, run, seed: int, device: str):
    """The classifier of one factor, its panels for the reliability diagram, and its entry in metrics.json."""
    keys = ("num_classes", "descending", "edges", "oracle", "unit", "label_names", "image_size")
    if report.get("kind") == "continuous":
        keys = ("oracle", "unit", "low", "high", "image_size")
    description = {"network": settings["network"], "head": settings["head"], **{k: report[k] for k in keys}}
    if settings["network"] == "clip":
        description["clip"] = settings["clip"]
    if own.is_own(settings["network"]):
        description["network_sha256"] = own.digest(settings["network"])
    scores = table[f"score_{report['oracle']}"]
    labels = pd.Series(measured_labels({report["oracle"]: scores.to_numpy()}, report), table.index)
    classifier, history = fit(images, scores, labels, table["split"], description, settings, seed, device)
    for row in history:
        run.log_metrics(row, row["epoch"])
    held_out = table[table["split"] == "val"].index.tolist()
    sets = {"val": (images[held_out], torch.tensor(labels[held_out].tolist()))}
    if args.generated:
        sets["generated"] = load_generated(args.generated, report)
    quality = quality_of(report)
    panels = {s: (quality.predict(classifier, x), y) for s, (x, y) in sets.items()}
    results = {s: quality.evaluate(*panel) for s, panel in panels.items()}
    best = min(history, key=lambda row: row["val_loss"])["epoch"]
    return classifier, panels, {"generated": None, **results, "temperature": classifier.temperature.item(), "epoch": best}


def main() -> None:
    args, started = parse(), time.perf_counter()
    config = load_config(args)
    torch.set_num_threads(args.num_threads)
    device = device_of(os.environ)
    report, table = io.read_json(args.dataset / "report.json"), io.read_parquet(args.dataset / "metadata.parquet")
    images = load_images(table["path"])
    settings, factors, quality = config["classifier"], factors_of(report), quality_of(report)
    networks = {factor_of(f["oracle"]): f.get("network") or settings["network"] for f in config["label"]["factors"] or []}

    name, uri = f"train_classifier {settings['network']}", config["mlflow"]["tracking_uri"]
    with tracking.run(config, config["experiment"], name, {"network": settings["network"]}, uri) as run:
        parts, panels, results = [], {}, {}
        for factor in factors:
            factor = factor | {"image_size": report["image_size"]}
            chosen = settings | {"network": networks.get(factor["oracle"], settings["network"])}
            classifier, panel, result = train_factor(factor, table, images, chosen, args, run, config["seed"], device)
            parts.append(classifier)
            several = len(factors) > 1
            panels |= {f"{factor['oracle']}, {s}" if several else s: p for s, p in panel.items()}
            results |= {factor["oracle"]: result} if several else result
        classifier = parts[0] if len(parts) == 1 else classifiers.Product(parts)
        with io.atomic_folder(args.output) as folder:
            classifiers.save(folder, classifier)
            io.write_json(folder / "metrics.json", results | {"train_seconds": round(time.perf_counter() - started, 2)})
            draw = coverage.coverage_figure if quality is coverage else classifier_quality.reliability_diagram
            draw(panels).savefig(folder / "reliability.png", dpi=150)
        run.log_metrics(results)
        run.log_artifact(args.output)
    for name, (predicted, labels) in panels.items():
        figures = ", ".join(f"{k} {v:.3f}" for k, v in quality.evaluate(predicted, labels)["after"].items())
        print(f"{name} (n = {len(labels)}): {figures}")


if __name__ == "__main__":
    errors.main(main, lower="classifier.batch_size")
