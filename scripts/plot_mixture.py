"""The proof's table (distance of every method to the exact law, beside its noise floor) and picture."""

import argparse
from pathlib import Path

from ctrl import errors
from ctrl.figures import mixture
from ctrl.io import read_json, read_parquet, write_text
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument(
        "--samples", type=Path, nargs="+", required=True, help="parquet files of scripts/mixture.py, their JSON beside them"
    )
    parser.add_argument("--gamma", type=float, help="of the picture (default: the config's largest)")
    parser.add_argument("--output-csv", type=Path, required=True)
    parser.add_argument("--output-md", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    config = load_config(args)
    samples = {path.stem: read_parquet(path) for path in args.samples}
    figures = [row for path in args.samples for row in read_json(path.with_suffix(".json"))]
    if not any(row["method"] == "exact_reference" for row in figures):
        raise errors.UserError("methods: exact_reference is missing; its distance to `exact` is the noise floor of every other one")
    table = mixture.table_of_distances(figures)
    text = mixture.markdown(table)
    mixture.densities(samples, table, args.gamma or max(config["gammas"]), args.output)
    write_text(args.output_csv, table.to_csv(index=False))
    write_text(args.output_md, text)
    print(text)


if __name__ == "__main__":
    errors.main(main)
