"""Put the evaluations of all methods into one table: CSV for programs, Markdown and LaTeX for people."""

import argparse
from pathlib import Path

from ctrl import errors, tables
from ctrl.io import read_json, write_text
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--methods", type=Path, default=Path("config/methods.tsv"), help="what each method is; gives the rows' order")
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="JSON files of scripts/evaluate.py, one a method")
    parser.add_argument(
        "--adapters", type=Path, nargs="*", default=[], help="folders of adapters; MLflow's model registry takes each, with the table"
    )
    parser.add_argument("--output-csv", type=Path, required=True, help="every figure, with its interval in <metric>_lo and <metric>_hi")
    parser.add_argument("--output-md", type=Path, required=True, help="the main figures, as a Markdown table")
    parser.add_argument("--output-tex", type=Path, required=True, help="the main figures, as a LaTeX tabular (booktabs)")
    args = parser.parse_args()
    config = load_config(args)

    table = tables.build(tables.read_methods(args.methods), [read_json(path) for path in args.evaluations])
    with run(config, config["experiment"], "tabulate", {}, config["mlflow"]["tracking_uri"]) as log:
        write_text(args.output_csv, tables.to_csv(table))
        write_text(args.output_md, tables.to_markdown(table))
        write_text(args.output_tex, tables.to_latex(table))
        for path in (args.output_csv, args.output_md, args.output_tex):
            log.log_artifact(path)
        for folder in args.adapters:
            tags = {"gamma": read_json(folder / "adapter.json")["gamma"], "experiment": config["experiment"]}
            values = {row["method"]: row for row in table.to_dict("records")}.get(folder.name, {})
            tags |= {key: f"{values[key]:.3f}" for key in ("accuracy", "kid_rejection", "kl_nats") if key in values}
            log.register_model(folder, f"{config['experiment']}-{folder.name}", args.output_md.read_text(), tags)
    print(args.output_md.read_text(), end="")


if __name__ == "__main__":
    errors.main(main)
