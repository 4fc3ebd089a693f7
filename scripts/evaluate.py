"""Score one method's samples: oracle labels, distances to rejection samples, diversity, prompts, costs, each with an interval."""

import argparse
from pathlib import Path

import torch

from ctrl import errors, evaluation, features, judged
from ctrl.io import read_json, write_json
from ctrl.labels import factors_of
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--method", required=True, help="the method's name, as it goes into the table")
    parser.add_argument("--samples", type=Path, required=True, help="folder with samples.parquet and images/, from scripts/sample.py")
    parser.add_argument("--reference", type=Path, required=True, help="the same of an independent set of rejection samples")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with report.json: the oracle and its bins")
    parser.add_argument("--adapter", type=Path, help="folder with adapter.json, for train_seconds and the peak memory of training")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--output-metrics", type=Path, help="JSON file for the values alone, which `dvc metrics show` puts side by side")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = load_config(args)

    report = read_json(args.dataset / "report.json")
    factors = factors_of(report)
    samples, reference = (evaluation.load_samples(f, factors, report["num_classes"]) for f in (args.samples, args.reference))
    settings = {}
    if args.adapter:
        trained = read_json(args.adapter / "adapter.json")
        peak = max(d.get("peak_memory_mb") or 0 for d in (trained, samples.info)) or None
        settings = {"gamma": trained.get("gamma"), "strength": samples.info.get("strength")}
        samples.info = trained | samples.info | {"peak_memory_mb": peak}
    network = features.load(config["evaluation"]["features"])
    with run(config, config["experiment"], f"evaluate {args.method}", {"method": args.method}, config["mlflow"]["tracking_uri"]) as log:
        result = evaluation.evaluate(samples, reference, network, report, config["evaluation"], config["seed"])
        result["metrics"] |= evaluation.further_figures(samples, config["evaluation"], config["seed"]) | judged.figures(factors)
        result = {"method": args.method, "settings": settings, "label_names": report["label_names"]} | result
        write_json(args.output, result)
        if args.output_metrics:
            write_json(args.output_metrics, evaluation.values_of(result, result["metrics"]))
        log.log_metrics({name: figure["value"] for name, figure in result["metrics"].items()})
        log.log_artifact(args.output)
    shown = evaluation.values_of(
        result, ["accuracy", "macro_f1", "mae", "r2", "mae_beyond", "kid_rejection", "diversity", network.score_name, "brisque"]
    )
    print(f"{args.method} (n = {result['n']}): " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    for factor in factors if result.get("misses") else []:
        misses = result["misses"] if len(factors) == 1 else result["misses"].get(factor["oracle"])
        if misses and misses["n"]:
            unit = f" {factor['unit']}".rstrip()
            print(f"{misses['n']} misses: half within {misses['median']:.3g}{unit} of their bin, all within {misses['largest']:.3g}")


if __name__ == "__main__":
    errors.main(main, lower="evaluation.images_per_label")
