"""Unpack Fashion-MNIST's IDX files to an image folder with prompts: PNGs and a metadata.csv (file_name, prompt, subject)."""

import argparse
from pathlib import Path

from ctrl import errors, garments, tracking
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--idx", type=Path, default=Path("resources/fashion-mnist"), help="folder of the .gz files (default: %(default)s)")
    parser.add_argument("--split", choices=["train", "t10k"], default="t10k", help="which of the two pairs of files (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="image folder to write")
    args = parser.parse_args()
    config = load_config(args)
    size, templates = config["dataset"]["image_size"], config["prompts"]["templates"]["train"]
    with tracking.run(config, config["experiment"], "unpack_images", tracking_uri=config["mlflow"]["tracking_uri"]) as run:
        table = garments.unpack(args.idx, args.split, templates, size, args.output)
        run.log_metrics({"num_images": len(table)})
        run.log_artifact(args.output / "metadata.csv")
    print(f"{args.output}: {len(table)} images of {table['subject'].nunique()} subjects")


if __name__ == "__main__":
    errors.main(main)
