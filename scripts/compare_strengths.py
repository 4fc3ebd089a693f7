"""Compare one adapter at several strengths with adapters trained at several gammas: a table with intervals, and a figure."""

import argparse
from pathlib import Path

from ctrl import errors, strength
from ctrl.figures.strength import dial
from ctrl.io import read_json, write_text
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--strengths", type=Path, nargs="+", required=True, help="JSON files of scripts/evaluate.py, one a strength")
    parser.add_argument("--gammas", type=Path, nargs="+", required=True, help="the same, one a gamma, at strength 1")
    parser.add_argument("--output-csv", type=Path, required=True, help="every figure with n and interval; each strength's nearest gamma")
    parser.add_argument("--output-figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    config = load_config(args)

    table = strength.compare([read_json(path) for path in args.strengths], [read_json(path) for path in args.gammas])
    with run(config, config["experiment"], "compare strengths", {}, config["mlflow"]["tracking_uri"]) as log:
        write_text(args.output_csv, table.to_csv(index=False, float_format="%.6g"))
        dial(table, args.output_figure)
        log.log_artifact(args.output_csv)
        log.log_artifact(args.output_figure)
    for _, row in table[table["dial"] == "strength"].iterrows():
        as_gamma = "no gamma's" if row.isna()["nearest_gamma"] else f"that of gamma {row['nearest_gamma']:.3g}"
        print(f"strength {row['setting']:g} (n = {row['n']}): accuracy {row['accuracy']:.3f}, {as_gamma}")


if __name__ == "__main__":
    errors.main(main)
