"""Put CTRL and classifier-free guidance with different numbers of labelled images into a table, a figure, and sentences on both."""

import argparse
from pathlib import Path

from ctrl import efficiency, errors, tables
from ctrl.figures.efficiency import sample_efficiency
from ctrl.io import read_json, write_text
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", required=True,
        help="JSON files of scripts/evaluate.py: ctrl, cfg, those with _n{size}, and, to compare with, pretrained and rejection_reference",
    )  # fmt: skip
    parser.add_argument("--reports", type=Path, nargs="+", required=True, help="report.json of dataset and of each dataset_n{size}")
    parser.add_argument(
        "--classifiers", type=Path, nargs="+", required=True, help="metrics.json of classifier and of each classifier_n{size}"
    )
    parser.add_argument("--tuning", type=Path, nargs="+", required=True, help="cfg.json and each cfg_n{size}.json of scripts/tune.py")
    parser.add_argument("--output-csv", type=Path, required=True, help="every figure, with its interval in <metric>_lo and <metric>_hi")
    parser.add_argument("--output-md", type=Path, required=True, help="the main figures and what they say, as Markdown")
    parser.add_argument("--output-figure", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    config = load_config(args)

    reports = {path.parent.name.removeprefix("dataset"): read_json(path) for path in args.reports}
    classifiers = {path.parent.name.removeprefix("classifier"): read_json(path) for path in args.classifiers}
    tunings = {path.stem: read_json(path) for path in args.tuning}
    table = efficiency.build([read_json(path) for path in args.evaluations], reports, classifiers, tunings)
    with run(config, config["experiment"], "sample efficiency", {}, config["mlflow"]["tracking_uri"]) as log:
        write_text(args.output_csv, tables.to_csv(table))
        write_text(args.output_md, efficiency.section(table))
        sample_efficiency(table, args.output_figure)
        for path in (args.output_csv, args.output_md, args.output_figure):
            log.log_artifact(path)
    print(args.output_md.read_text(), end="")


if __name__ == "__main__":
    errors.main(main)
