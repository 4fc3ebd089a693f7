"""Choose a guided method's scale on validation prompts: every scale of the config draws the same images, and is scored like the table."""

import argparse
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ctrl import control as controls
from ctrl import errors, features
from ctrl.evaluation import Samples, by_target, evaluate, in_cells_of, intervals_of, load_samples, values_of, with_scores
from ctrl.figures.curves import tuning_sweep
from ctrl.generate import MakeDenoiser, denoised, generate
from ctrl.io import read_json, write_json
from ctrl.labels import factors_of
from ctrl.pairs import SEED_OFFSETS
from ctrl.tracking import run
from ctrl.tuning import choose_setting
from scripts.cells import load_requests
from scripts.common import add_config_argument, load_config
from scripts.guided import guidance_denoiser
from scripts.loading import label_guidance_denoiser, load_base, load_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--method", required=True, help="a guided method of --methods, with its scales in the config's tuning section")
    parser.add_argument("--methods", type=Path, default=Path("config/methods.tsv"), help="table of methods (default: %(default)s)")
    parser.add_argument("--adapter", type=Path, help="folder of the trained adapter, for cfg")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--cells", type=Path, required=True, help="cells.json: the (subject, label) pairs to ask for")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json, whose bins the oracle uses")
    parser.add_argument("--reference", type=Path, required=True, help="folder of rejection samples on the validation prompts")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write: the sweep and the best scale")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    config, method = load_config(args), load_method(args.method, args.methods)
    if method["family"] not in ("guidance", "cfg") or args.method not in config["tuning"]:
        raise errors.UserError(f"--method: {args.method} has no scale to tune (config key tuning.{args.method})")
    base, process = load_base(config, args.num_threads)
    report, network = read_json(args.dataset / "report.json"), features.load(config["evaluation"]["features"])
    oracles = factors_of(report)
    reference = load_samples(args.reference, oracles, report["num_classes"])
    per_label = max(1, min(config["tuning"]["num_images"] // report["num_classes"], config["evaluation"]["images_per_label"]))
    first_seed = 100_000_000 * config["seed"] + SEED_OFFSETS["val"]
    rows = load_requests(args.cells, config["prompts"]["templates"]["val"], per_label, first_seed)

    if method["family"] == "cfg":
        control = controls.load(base, args.adapter).merge()

    def make_denoiser(scale: float) -> MakeDenoiser:
        if method["family"] == "cfg":
            return label_guidance_denoiser(control, process, config, scale)
        return guidance_denoiser(base, process, config, args.classifier, scale, method["guidance"])

    sweep = []
    with run(config, config["experiment"], f"tune {args.method}", {"method": args.method}, config["mlflow"]["tracking_uri"]) as tracker:
        for scale in tqdm(config["tuning"][args.method]["scale"], desc=f"tuning {args.method}", unit="scale"):
            draw = denoised(base, process, make_denoiser(scale))
            images, tables = zip(*generate(base, rows, draw, config["sampler"]["batch_size"]), strict=True)
            pixels = ((torch.cat(images) + 1) * 127.5).round().byte()
            table = by_target(with_scores(pd.concat(tables).assign(file_name=""), pixels, oracles))
            samples = Samples(args.output, table, pixels, {})
            figures = evaluate(samples, in_cells_of(reference, table), network, report, config["evaluation"], config["seed"])
            names = ["accuracy", "macro_f1", "r2", "mae", "kid_rejection", "kid_rejection_within", "diversity", network.score_name]
            values = {"n": len(table), **values_of(figures, names)}
            sweep.append({"scale": scale, **values, **intervals_of(figures, names)})
            tracker.log_metrics(values, len(sweep))
        best = choose_setting(sweep)
        write_json(args.output, {"method": args.method, "num_images": len(rows), "best": {"scale": best["scale"]}, "sweep": sweep})
        figure = args.output.with_suffix(".png")
        tuning_sweep(sweep, args.method, best["scale"], figure)
        tracker.log_artifact(args.output)
        tracker.log_artifact(figure)
    reached = ", ".join(f"{name} {best[name]:.3f}" for name in ("accuracy", "r2") if name in best)
    print(f"{args.method}: scale {best['scale']:g} of {len(sweep)}, {reached} on {best['n']} images")


if __name__ == "__main__":
    errors.main(main, lower="sampler.batch_size")
