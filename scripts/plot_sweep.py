"""Draw accuracy, distance to rejection samples, diversity and KL against gamma, or a guided method's figures against its scale."""

import argparse
from pathlib import Path

from ctrl import errors
from ctrl.figures import curves
from ctrl.io import read_json
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_argument(parser)
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", required=True,
        help="JSON files of scripts/evaluate.py --adapter, one a gamma; or one JSON file of scripts/tune.py",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    config = load_config(args)

    evaluations = [read_json(path) for path in args.evaluations]
    tuned = evaluations[0] if "sweep" in evaluations[0] else None
    for path, evaluation in zip(args.evaluations, evaluations, strict=True):
        if not tuned and not (evaluation.get("settings") or {}).get("gamma"):
            raise errors.UserError(f"{path} has no gamma among its settings; evaluate the samples with --adapter")
    with run(config, config["experiment"], f"sweep {args.output.stem}", {}, config["mlflow"]["tracking_uri"]) as log:
        if tuned:
            curves.tuning_sweep(tuned["sweep"], tuned["method"], tuned["best"]["scale"], args.output)
        else:
            curves.gamma_sweep(evaluations, args.output)
        log.log_artifact(args.output)
    print(args.output)


if __name__ == "__main__":
    errors.main(main)
