# All Python of the workflow: the checked configuration, the table of methods, which code decides which result.
#
# Needs  config (from the configfiles), config/methods.tsv, workflow/schemas/*.json
# Makes  results/{experiment}/config.json, the complete configuration that every script is given

import json
import os
import sys
from functools import reduce
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs use this Python, activated or not

from ctrl import config_file, own
from ctrl.config import UserError, check_scales, check_size, for_adapter, needs_classifier, read_methods, resolve
from ctrl.names import COLUMN, compared_of, dial_of, factor_of, own_gamma, recipe_of, sample_of, split_strength, sweep_of


def refuse(message: object) -> None:
    """Ends with one line: Snakemake would wrap any exception in a traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


try:
    SCHEMAS = {name: json.loads((ROOT / f"workflow/schemas/{name}.schema.json").read_text()) for name in ("config", "methods")}
    config |= resolve(json.loads(json.dumps(check_size(config), default=str)), SCHEMAS["config"])
    if config["dataset"]["kind"] == "folder" and not Path(config["dataset"]["path"]).is_dir():
        raise UserError(f"config: dataset.path is {config['dataset']['path']}; there is no such folder of images")
    METHODS = check_scales(read_methods("config/methods.tsv", SCHEMAS["methods"]), config["tuning"])
    RESULTS, OWN = f"results/{config['experiment']}", own.files_of(config, sys.argv)
    config_file.write(Path(RESULTS) / "config.json", config, Path(".snakemake/locks"), "--unlock" in sys.argv)
except UserError as error:
    refuse(error)

CONTINUOUS = config["label"]["kind"] == "continuous"
REFERENCE_SEED_OFFSET = 500_000  # what methods are compared with shares no seed with them
DIAL = [] if CONTINUOUS else ["tables/strength.csv", "figures/strength.png"]  # it compares accuracies


wildcard_constraints:
    experiment=config["experiment"],
    method="[A-Za-z0-9_.]+",
    adapter="[A-Za-z0-9_.]+",
    table="results|paper",


# The code whose change alters a result: an input of the rule. (Snakemake does not see edits of an imported package.)
def lib(names: str, folder: str = "ctrl") -> list[str]:
    return [f"{folder}/{name}.py" for name in names.split()]


ORACLES = lib("oracles scoring bins aesthetic own clip judge classifier heads networks dct")
CLASSIFIER, PICTURES = lib("labels") + ORACLES, lib("curves labels pictures style", "ctrl/figures")
CORE = [*lib("base base_files flow labels process sampling generate pairs"), *ORACLES, *lib("cells loading", "scripts")]
GUIDES, TRAINERS = (sorted(map(str, Path(f"ctrl/{folder}").glob("[!_]*.py"))) for folder in ("guidance", "finetune"))
CONTROL = [*lib("control lora adapter_files embedding finetune/objective"), *CLASSIFIER]
GUIDANCE = [*GUIDES, "ctrl/noisy.py", *CLASSIFIER]
DATA, EVALUATION = lib("data columns pictures"), [*lib("evaluation targets metrics features brisque labels pictures"), *ORACLES]
CODE = {
    "check_base": ["scripts/check_base.py", *lib("base_files features clip")],
    "pretrain": ["scripts/pretrain.py", *lib("pretrain pretrain_flow base base_files flow process garments pictures dct")],
    "train_garments": ["scripts/train_garments.py", *lib("features clip garments pictures")],
    "unpack_images": ["scripts/unpack_images.py", *lib("garments pictures")],
    "build_dataset": ["scripts/build_dataset.py", *DATA, *lib("judge_fit classifier_fit metrics figures/histogram"), *CLASSIFIER],
    "train_classifier": ["scripts/train_classifier.py", *CLASSIFIER, *lib("classifier_fit classifier_quality coverage pictures metrics")],
    "train_noisy_classifier": ["scripts/train_noisy_classifier.py", *CORE, *DATA, "ctrl/noisy.py"],
    "estimate_cells": ["scripts/estimate_cells.py", *CLASSIFIER, *lib("pictures pairs")],
    "sample": [*lib("sample guided adapter_figures", "scripts"), *CORE, *lib("image_folder finetune/objective")],
    "tune": [*lib("tune guided", "scripts"), "ctrl/tuning.py", *CORE, *GUIDANCE, *CONTROL, *EVALUATION],
    "finetune": ["scripts/finetune.py", "scripts/training.py", *CORE, *CONTROL, *TRAINERS, *lib("adapter judged pipeline pictures")],
    "mixture": ["scripts/mixture.py", *lib("mixture proof distances process sampling"), *GUIDES, *TRAINERS],
    "evaluate": ["scripts/evaluate.py", *EVALUATION, "ctrl/judged.py"],
    "tabulate": ["scripts/tabulate_results.py", *lib("judged tables")],
    "plot_figures": [*lib("plot_figures cells", "scripts"), *PICTURES, *ORACLES, *lib("evaluation labels pairs pictures targets")],
    "compare_strengths": ["scripts/compare_strengths.py", *lib("strength figures/style figures/strength oracles")],
    "compare_trainers": ["scripts/compare_trainers.py", *lib("trainers costs judged tables figures/trainers figures/style oracles")],
    "subset_dataset": ["scripts/subset_dataset.py", *DATA, *lib("subset bins")],
    "plot_efficiency": ["scripts/plot_efficiency.py", *lib("efficiency judged methods_page tables figures/efficiency figures/style")],
    "plot_sweep": ["scripts/plot_sweep.py", *lib("figures/style figures/curves oracles")],
}


def files_of(folder: str) -> list[str]:
    """The files of a local model, without the figures of its model card; nothing for a name on a hub."""
    files = [path] if (path := Path(folder).expanduser()).is_file() else path.rglob("*")
    return sorted(str(p) for p in files if p.suffix in (".safetensors", ".json", ".txt") and p.name != "quality.json")


def sections(*keys: str, adapter: str = "") -> str:
    """Parts of the configuration (of an adapter) as text, by dotted keys: with it in its params, a rule runs again when they change."""
    parts = {key: reduce(dict.__getitem__, key.split("."), for_adapter(config, adapter) if adapter else config) for key in keys}
    return json.dumps(parts)


def methods(table: str) -> list[str]:
    """The rows of a table: `results` has those of the demo, `paper` all."""
    left_out = {own_gamma(config), *(["classifier_guidance"] if CONTINUOUS else [])}  # `ctrl` by another name; it needs classes
    return [m for m, row in METHODS.items() if not left_out & {m, row["adapter"]} and (table == "paper" or row["run"] == "demo")]


def adapters(table: str) -> list[str]:
    return list(dict.fromkeys(METHODS[name]["adapter"] for name in methods(table) if METHODS[name]["adapter"]))


def row_of(name: str) -> dict:
    """The row of methods.tsv behind a folder of samples: `rejection_reference` is rejection again, `ctrl_gamma3_strength2` CTRL so."""
    name, dialled = (name, {}) if name in METHODS else split_strength(name)
    recipe = recipe_of(name.removesuffix("_reference"))
    row = METHODS["ctrl" if recipe in config["adapters"].keys() - METHODS else recipe]
    return {**(METHODS.get(name) or {**row, "adapter": row["adapter"] and name}), **dialled}


def sample_needs(wildcards) -> dict[str, str]:
    """What sampling by a method takes beside the base model, by the name of the script's argument."""
    noisy = "noisy_" if (row := row_of(wildcards.method))["guidance"] == "classifier_guidance" else ""
    sample = sample_of(wildcards.method)  # `_n300`: of fewer labelled images
    needs = {
        "adapter": row["adapter"] and f"{RESULTS}/adapters/{row['adapter']}/adapter.json",
        "classifier": (row["adapter"] or row["guidance"]) and f"{RESULTS}/{noisy}classifier{sample}/model.safetensors",
        "tuning": row["family"] in ("guidance", "cfg") and f"{RESULTS}/tuning/{row['guidance']}{sample}.json",
        "dataset": row["family"] == "rejection" and f"{RESULTS}/dataset/report.json",
    }
    return {name: path for name, path in needs.items() if path}


def flags(needs: dict[str, str], *only: str) -> list[str]:
    """The same as arguments: the file for the tuning, the folder for all else."""
    return [text for n, p in needs.items() if n in (only or needs) for text in (f"--{n}", p if n == "tuning" else os.path.dirname(p))]


def all_targets(table: str = "results") -> list[str]:
    images = (f"tables/{table}.csv", f"figures{'' if table == 'results' else '_' + table}/teaser.png", "classifier/reliability.png")
    return [f"{RESULTS}/{name}" for name in (("tables/mixture.md", "figures/mixture.png") if "gammas" in config else images)]


def of_classes(target: str, *names: str):
    """The files of a target that compares accuracies: an input function, which refuses a continuous label while planning."""
    line = f"`snakemake {target}` compares accuracies, but label.kind is continuous; give it a config with a label of classes"
    return lambda wildcards: refuse(line) if CONTINUOUS else [f"{RESULTS}/{name}" for name in names]
