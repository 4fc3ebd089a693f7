"""Build the offline dataset: score images by the oracle, bin the scores into labels, split by a hash of the pixels, report the refused.

Of a label that a column of the images' table holds, train the judge that is the oracle from then on.
"""

import argparse
import hashlib
import os
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ctrl import classifier, data, errors, io, judge_fit, tracking
from ctrl.device import device_of
from ctrl.figures import histogram
from ctrl.labels import factors_of
from ctrl.pictures import load_images
from scripts.common import add_config_argument, load_config


def train_judges(table: pd.DataFrame, report: dict, config: dict, folder: Path, output: Path) -> None:
    """Writes the judge of each column into `folder`, which will be `output`, and adds it to the report."""
    columns = [factor for factor in factors_of(report) if "column" in factor]
    if not columns:
        return
    share = table[table["split"].str.startswith(data.JUDGE)]
    moved = f"{data.relative(output)}/"  # images that were cropped are still in `folder`
    images = load_images(folder / path.removeprefix(moved) if path.startswith(moved) else path for path in share["path"])
    settings, splits = config["classifier"] | {"network": config["label"]["judge"]["network"]}, share["split"].str.removeprefix(data.JUDGE)
    for factor in columns:
        name, num_bootstrap = factor["oracle"], config["evaluation"]["num_bootstrap"]
        print(f"judge of {name}: {settings['network']}, learns from {(splits == 'train').sum()} images", flush=True)
        trained, quality = judge_fit.train(
            images, share[f"score_{name}"].to_numpy(), splits, factor, settings, config["seed"] + 1, num_bootstrap, device_of(os.environ)
        )
        place = folder / "judge" / name
        place.mkdir(parents=True)
        classifier.save(place, trained)
        digest = io.read_json(place / "config.json")["sha256"]
        factor |= {"judge": data.relative(output / "judge" / name), "sha256": digest, "judge_quality": quality}
        for measure, figure in quality.items():
            interval = f" [{figure['lo']:.3f}, {figure['hi']:.3f}]" if "lo" in figure else ""
            print(f"judge of {name}: {measure} {figure['value']:.3f}{interval}, n = {figure['n']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder of images with metadata.csv, metadata.parquet (file_name, prompt) or samples.parquet",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for metadata.parquet, report.json and histogram.png")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads of a judge's training (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = load_config(args)
    with tracking.run(config, config["experiment"], "build_dataset", tracking_uri=config["mlflow"]["tracking_uri"]) as run:
        settings = config["dataset"]
        with io.atomic_folder(args.output) as folder:

            def store(name: str, image: Image.Image) -> Path:
                file = Path("images") / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.png"
                (folder / file).parent.mkdir(exist_ok=True)
                image.save(folder / file)
                return args.output / file

            table, report = data.build(
                args.images, settings["image_size"], config["label"], settings["splits"], settings["captions"],
                settings["resize"] == "crop", store, settings["limit"],
            )  # fmt: skip
            train_judges(table, report, config, folder, args.output)
            io.write_parquet(folder / "metadata.parquet", table)
            io.write_json(folder / "report.json", report)
            histogram.histogram(table, report).savefig(folder / "histogram.png", dpi=150)
        run.log_metrics({"num_images": report["num_images"], "num_refused": len(report["refused"])})
        run.log_artifact(args.output)
    print(f"{args.output}: {report['num_images']} images, {len(report['refused'])} refused")
    if report.get("kind") == "continuous":
        print(
            f"  {report['low']:.4g} to {report['high']:.4g} {report['unit']}: " + ", ".join(f"{n} {s}" for s, n in report["counts"].items())
        )
        return
    for name, *counts in zip(report["label_names"], *report["counts"].values(), strict=True):
        print(f"  {name:>20}: " + ", ".join(f"{n} {split}" for split, n in zip(report["counts"], counts, strict=True)))


if __name__ == "__main__":
    errors.main(main, lower="classifier.batch_size")
