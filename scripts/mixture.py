"""Run one method on the config's Gaussian mixture, for every gamma and label, and measure its distance to the exact p_gamma(x | y)."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from ctrl import errors
from ctrl.io import write_json, write_parquet
from ctrl.mixture import GaussianMixture, SoftmaxLinear
from ctrl.proof import METHODS, Problem, compare_sets
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config

EXACT_SEED = 1_000_000  # what methods are compared with; `exact` draws it too, and `exact_reference` is independent of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--method", required=True, choices=list(METHODS))
    parser.add_argument(
        "--output", type=Path, required=True, help="parquet to write: label, gamma, x0, x1, ...; figures in a JSON beside it"
    )
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of checkpoints; a killed run goes on from there")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    config = load_config(args)
    if config["base"]["kind"] != "gaussian_mixture":
        raise errors.UserError(f"base.kind is {config['base']['kind']}; this script needs a gaussian_mixture, as in config/mixture.yaml")
    torch.set_num_threads(args.num_threads)
    base, num = config["base"], config["num_samples"]
    mixture = GaussianMixture.from_config(base["weights"], base["means"], base["covariances"])
    label = SoftmaxLinear.from_config(config["label"]["weight"], config["label"]["bias"], mixture.dim)
    shift, scale = mixture.moments()
    standard = mixture.affine(shift, scale), label.affine(shift, scale)
    seed = EXACT_SEED if args.method == "exact" else 100_000_000 * config["seed"] + 1 + list(METHODS).index(args.method)

    tables, figures = [], []
    with run(config, config["experiment"], f"mixture {args.method}", {"method": args.method}, config["mlflow"]["tracking_uri"]) as tracker:
        for number, gamma in enumerate(config["gammas"]):
            problem = Problem(
                *standard, config["sampler"]["num_steps"], config["finetune"], config["seed"], args.checkpoints, config["particles"]
            )
            draw = METHODS[args.method](problem, gamma)
            drawn, distances = compare_sets(problem, gamma, draw, num, config["num_sets"], (seed, EXACT_SEED))
            row = {"method": args.method, "gamma": gamma, "n": num * label.num_classes, "sets": config["num_sets"]} | distances
            figures.append(row | problem.figures)
            tracker.log_metrics({key: value for key, value in figures[-1].items() if isinstance(value, float)}, number)
            for y, z in enumerate(drawn):
                x = shift + scale * z.double()
                columns = {f"x{d}": x[:, d].numpy() for d in range(mixture.dim)}
                tables.append(pd.DataFrame({"label": y, "gamma": float(gamma), **columns}))
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        write_json(args.output.with_suffix(".json"), figures)
        write_parquet(args.output, pd.concat(tables, ignore_index=True))
        tracker.log_artifact(args.output)


if __name__ == "__main__":
    errors.main(main)
