"""Train p_t(y | x_t) on the offline images' latents, noised as at the sampler's steps, for classifier guidance; measure it at each step."""

import argparse
import time
from pathlib import Path

import torch

from ctrl import errors, noisy
from ctrl.data import SPLITS
from ctrl.figures import curves
from ctrl.io import atomic_folder, read_json, read_parquet, write_json
from ctrl.pictures import load_images
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config
from scripts.loading import load_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with metadata.parquet and report.json")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for model.safetensors, config.json, metrics.json, accuracy_by_timestep.png"
    )
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args, started = parser.parse_args(), time.perf_counter()
    config = load_config(args)
    settings, report = config["noisy_classifier"], read_json(args.dataset / "report.json")
    if report.get("kind") == "continuous":
        raise errors.UserError(f"{args.dataset}: its label is continuous; classifier_guidance has a classifier of classes alone")
    num_classes = report["num_classes"]
    base, process = load_base(config, args.num_threads)
    table, latents = read_parquet(args.dataset / "metadata.parquet"), {}
    for split, part in table[table["split"].isin(SPLITS)].groupby("split"):  # the held-out combinations have no use here
        x_0 = base.encode_images(load_images(part["path"]))
        latents[split] = x_0, torch.tensor(part["label"].tolist(), device=x_0.device)
    shape = {"num_classes": num_classes, "latent_channels": base.latent_shape[0]}
    description = shape | {key: settings[key] for key in ("width", "dropout")}

    uri = config["mlflow"]["tracking_uri"]
    with run(config, config["experiment"], "train_noisy_classifier", {"method": "classifier_guidance"}, uri) as tracker:
        classifier, history = noisy.fit(latents, process, description, settings, config["seed"])
        for row in history:
            tracker.log_metrics(row, row["epoch"])
        steps = noisy.evaluate(classifier, process, *latents["val"])
        for row in steps:
            tracker.log_metrics({f"val_{key}": row[key] for key in ("timestep", "accuracy", "nll")}, row["step"])
        best = min(history, key=lambda row: row["calibration_loss"])["epoch"]
        with atomic_folder(args.output) as folder:
            noisy.save(folder, classifier)
            seconds = round(time.perf_counter() - started, 2)
            write_json(folder / "metrics.json", {"val": steps, "epoch": best, "train_seconds": seconds, "history": history})
            curves.accuracy_by_timestep(steps, num_classes, folder / "accuracy_by_timestep.png")
        tracker.log_artifact(args.output)
    for row in steps:
        print(f"t = {row['timestep']:3d} (n = {row['n']}): accuracy {row['accuracy']:.3f}, nll {row['nll']:.3f}")


if __name__ == "__main__":
    errors.main(main, lower="noisy_classifier.batch_size")
