"""Write the page on all methods: formula, needs, reference and row of each, and what the figures say. No number is typed."""

import argparse
import os
from pathlib import Path

import pandas as pd

from ctrl import efficiency, errors, methods_page, strength_page, tables, tuning_page
from ctrl.io import read_json, write_text
from scripts.common import DEFAULTS, add_config_argument, load_config


def read_table(path: Path, option: str, columns: set[str], script: str) -> pd.DataFrame:
    """The CSV behind an option; UserError where it is missing or another table than that of `script`."""
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{option}: {path} cannot be read ({error}); give the CSV of {script}") from error
    if missing := columns - set(table):
        raise errors.UserError(f"{option}: {path} has no column {sorted(missing)[0]}; give the CSV of {script}")
    return table


def captioned(figure: Path, captions: Path, page: Path, config: dict) -> tuple[str, str]:
    """A picture's link from the page's folder, and its caption in the report."""
    if not figure.exists():
        raise errors.UserError(f"--figures: {figure} is missing; check the path, or run the step that draws it")
    caption = captions / f"{figure.stem}.rst"
    text = " ".join(caption.read_text().split()) if caption.exists() else figure.stem.replace("_", " ")
    text = text.replace('{{ snakemake.config["finetune"]["gamma"] }}', f"{config['finetune']['gamma']:g}")
    return os.path.relpath(figure.resolve(), page.resolve().parent), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--table", type=Path, required=True, help="CSV of scripts/tabulate_results.py; methods without a row were not run")
    parser.add_argument("--methods", type=Path, default=Path("config/methods.tsv"), help="table of methods (default: %(default)s)")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, help="samples.json of the methods, for the devices")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="adapter.json of the adapters, for the devices")
    parser.add_argument("--command", required=True, help="the command that made the results")
    parser.add_argument("--tuning", type=Path, nargs="*", default=[], help="JSON of scripts/tune.py, for a section on the scales")
    parser.add_argument("--strength", type=Path, help="CSV of scripts/compare_strengths.py, for the section on the strength dial")
    parser.add_argument("--efficiency", type=Path, help="sample_efficiency.csv of scripts/plot_efficiency.py, for a section on it")
    parser.add_argument("--figures", type=Path, nargs="*", default=[], help="pictures to show")
    parser.add_argument("--trainers", type=Path, help="Markdown of scripts/compare_trainers.py, to be part of the page")
    parser.add_argument("--captions", type=Path, default=Path("workflow/report"), help="folder of captions (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    config, defaults = load_config(args), load_config(argparse.Namespace(config=[DEFAULTS]))
    table = read_table(args.table, "--table", {"method", "n"}, "scripts/tabulate_results.py")
    sections = [tuning_page.section([read_json(path) for path in args.tuning])] if args.tuning else []
    if args.strength:
        columns = {"dial", "setting", "gamma", "n", "nearest_gamma"}
        sections.append(strength_page.section(read_table(args.strength, "--strength", columns, "scripts/compare_strengths.py")))
    if args.efficiency:
        known = read_table(args.efficiency, "--efficiency", {"method", "n", "num_images"}, "scripts/plot_efficiency.py")
        sections.append(efficiency.section(known))
    if unknown := set(table["method"]) - set((methods := tables.read_methods(args.methods))["method"]):
        raise errors.UserError(f"--table: {args.table} has a row {sorted(unknown)[0]!r}, which {args.methods} does not know")

    def devices(paths: list[Path]) -> str:
        return " and ".join(sorted({read_json(path)["device"] for path in paths}))

    origin = [f"Written by `scripts/write_methods_page.py` from the results of `{args.command}`: every figure is the table's."]
    origin.append(f"Sampled on: {devices(args.samples)}." + (f" Trained on: {devices(args.adapters)}." if args.adapters else ""))
    if changed := methods_page.differences(config, defaults):
        origin.append(f"Settings that are not those of `config/config.yaml`: {', '.join(f'`{line}`' for line in changed)}.")
    if args.trainers and not args.trainers.exists():
        raise errors.UserError(f"--trainers: {args.trainers} is missing; write it with scripts/compare_trainers.py")
    if args.trainers:
        sections.append(f"## The trainers compared\n\n{args.trainers.read_text()}")
    figures = [captioned(path, args.captions, args.output, config) for path in args.figures]
    write_text(args.output, methods_page.page(methods, table, config, origin, figures, sections))


if __name__ == "__main__":
    errors.main(main)
