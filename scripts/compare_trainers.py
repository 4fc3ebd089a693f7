"""Compare trainers over several seeds: accuracy and distance against seconds and UNet passes, and a table of where each recipe ends."""

import argparse
from pathlib import Path

from ctrl import errors, trainers
from ctrl.figures import trainers as figures
from ctrl.io import read_json, read_rows, write_text
from ctrl.tables import to_csv
from ctrl.tracking import run
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--adapters", type=Path, nargs="+", required=True,
        help="folders with adapter.json and history.jsonl, named after a recipe and its seed, such as ctrl_adjoint_seed1",
    )  # fmt: skip
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="JSON of scripts/evaluate.py, one an adapter")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--output-csv", type=Path, required=True, help="table for programs to write")
    parser.add_argument("--output-md", type=Path, required=True, help="table for people to write, with what it says")
    args = parser.parse_args()
    config, evaluations = load_config(args), {e["method"]: e for e in map(read_json, args.evaluations)}
    if missing := [folder.name for folder in args.adapters if folder.name not in evaluations]:
        raise errors.UserError(f"--evaluations: there is none of {missing[0]}; score its samples with scripts/evaluate.py")
    runs = [
        trainers.Run(folder.name, read_rows(folder / "history.jsonl"), read_json(folder / "adapter.json"), evaluations[folder.name])
        for folder in args.adapters
    ]
    target, max_kid = (config["trainers"][key] for key in ("target", "max_kid"))
    table = trainers.build(runs, target, max_kid)
    curves = {recipe: [one.curve(target, max_kid) for one in its] for recipe, its in trainers.by_recipe(runs).items()}
    with run(config, config["experiment"], "compare trainers", {}, config["mlflow"]["tracking_uri"]) as log:
        figures.comparison(curves, target, args.output)
        write_text(args.output_csv, to_csv(table))
        write_text(args.output_md, trainers.to_markdown(table))
        for file in (args.output, args.output_csv, args.output_md):
            log.log_artifact(file)
    print(args.output_md.read_text(), end="")


if __name__ == "__main__":
    errors.main(main)
