"""Build the offline dataset: score images by the oracle, bin the scores into labels, split by a hash of the pixels, report the refused."""

import argparse
import hashlib
from pathlib import Path

from PIL import Image

from ctrl import data, errors, io, tracking
from ctrl.figures import histogram
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder of images with metadata.csv, metadata.parquet (file_name, prompt) or samples.parquet",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for metadata.parquet, report.json and histogram.png")
    args = parser.parse_args()
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
    errors.main(main)
