"""Check a base, a classifier and data before hours are spent: gradients, labels, memory and time of each trainer, settings to start from.

Ends with one line for each thing that is wrong, and with exit code 1 where a piece cannot be used as it is.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml

from ctrl import classifier as classifiers
from ctrl import doctor, doctor_numbers, errors, measure, suggestion
from ctrl.config import merge, resolve
from ctrl.doctor import Finding
from ctrl.doctor_report import text_of
from ctrl.gradients import finite_differences, pretrained_gradients
from ctrl.io import read_json, write_json
from ctrl.labels import Continuous, space_of
from scripts.cells import load_training_cells
from scripts.common import SCHEMA, add_config_argument, load_config
from scripts.costs import trainer_costs
from scripts.doctor_images import examine, load_held_out
from scripts.loading import load_base, log_prob_of_latents


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--cells", type=Path, required=True, help="cells.json: the (subject, label) pairs to train on")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with metadata.parquet and report.json")
    parser.add_argument("--num-trajectories", type=int, default=64, help="behind the gradients (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=256, help="generated, and held-out, for the accuracy (default: %(default)s)")
    parser.add_argument("--no-trainers", action="store_true", help="leave out the memory and time of the trainers, the longest part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured here")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def load_pieces(config: dict, args: argparse.Namespace) -> tuple[dict, list[Finding]]:
    """Everything that was given, and a line for each piece that cannot be loaded or is broken in itself."""
    loaders = {
        "base": lambda: load_base(config, args.num_threads),
        "classifier": lambda: classifiers.load(args.classifier),
        "cells": lambda: load_training_cells(args.cells),
        "labels": lambda: space_of(read_json(args.dataset / "report.json")),
        "dataset": lambda: load_held_out(args.dataset, args.num_images),
    }
    pieces, findings = {}, []
    for name, load in loaders.items():
        try:
            pieces[name] = load()
        except errors.UserError as error:
            findings.append(Finding(True, f"{name}: {error}"))
        except (KeyError, TypeError) as error:
            findings.append(Finding(True, f"{name}: a file has no {error}: run the step that writes it again"))
    if not findings:
        base = pieces["base"][0]
        pieces["classifier"].to(base.device)
        findings = doctor.check_pieces(base, pieces["classifier"], pieces["labels"], pieces["cells"])
    return pieces, findings


def diagnose(config: dict, pieces: dict, args: argparse.Namespace) -> tuple[dict, list[Finding], list[suggestion.Setting]]:
    """The classifier's gradient, its accuracy on generated and on held-out images; lines on both; settings that follow, if it is of use."""
    (base, process), classifier, space = pieces["base"], pieces["classifier"], pieces["labels"]
    cells, templates, scale = pieces["cells"], config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"]
    log_prob, num = log_prob_of_latents(base, classifier), args.num_trajectories
    size = min(config["finetune"]["micro_batch_size"], config["sampler"]["batch_size"])  # its gradients are those of a guided method
    found, y = pretrained_gradients(base, process, log_prob, cells, templates, scale, num, size, config["seed"])
    continuous, timesteps = isinstance(space, Continuous), process.timesteps.tolist()
    asked, names = doctor_numbers.thirds(y, space.unit) if continuous else (y, doctor.titles(y, space))
    findings = doctor.gradient_findings(found, asked, names, timesteps)
    with torch.no_grad():
        decoded = base.decode(found["latents"][: min(size, 16)])
    differences = finite_differences(classifier, decoded, y[: len(decoded)].to(base.device), seed=config["seed"])
    findings += doctor.finite_difference_findings(differences)

    worth, more = examine(config, pieces, args)
    findings += more
    report = {"gradients": doctor.gradient_report(found, asked, names, timesteps), "finite_differences": differences, **worth}
    if any(finding.bad for finding in findings):
        return report, findings, []
    gamma = config["finetune"]["gamma"]
    guess = doctor_numbers.guess(space, y) if continuous else space.covers[y].double().mean(1).log()

    @torch.no_grad()
    def softened(temperature: float) -> torch.Tensor:
        parts = zip(found["latents"].split(size), y.to(base.device).split(size), strict=True)
        return torch.cat([log_prob(x, labels, temperature) for x, labels in parts])

    start = suggestion.temperature_start(suggestion.stakes(softened, guess, gamma), gamma)
    return report, findings, [suggestion.max_adjoint_norm(found), start]


def main() -> None:
    args = parse()
    config = load_config(args)
    if config["base"]["kind"] != "stable_diffusion":
        raise errors.UserError("--config: the doctor looks at images; on a Gaussian mixture everything is known")
    if min(args.num_trajectories, args.num_images) < 1:
        raise errors.UserError("--num-trajectories and --num-images must be 1 or more")
    free_mb = measure.free_memory_mb("cuda" if torch.cuda.is_available() else "cpu")
    pieces, findings = load_pieces(config, args)
    report = {"free_memory_mb": free_mb}
    if not findings:
        measured, findings, settings = diagnose(config, pieces, args)
        costs = {}
        if not args.no_trainers:
            examples = pieces["dataset"][2]
            pieces.clear()  # what is measured next has the memory to itself
            torch.cuda.empty_cache()
            costs, more = trainer_costs(config, args, examples, free_mb)
            findings += more
        text = suggestion.fragment([*suggestion.trainer_and_memory(costs, free_mb, not settings), *settings], config["adapters"])
        resolve(merge(config, yaml.safe_load(text) or {}), read_json(SCHEMA), "the suggested settings")
        report |= {**measured, "trainers": costs, "suggestion": text}
    report["findings"] = [{"bad": finding.bad, "text": finding.text} for finding in findings]
    print(text_of(report))
    if args.json:
        write_json(args.json, report)
    sys.exit(any(finding.bad for finding in findings))


if __name__ == "__main__":
    errors.main(main, lower="sampler.batch_size")
