"""The workflow's plan (dry runs): its rules, and one line for a mistake in the configuration."""

import re

import pytest

from tests.repository import copy_repository, snakemake

pytestmark = pytest.mark.slow  # each starts Snakemake

DEMO = {
    "check_base": 1,
    "unpack_images": 1,
    "build_dataset": 1,
    "sample_pool": 1,
    "train_classifier": 1,
    "estimate_cells": 1,
    "tune": 1,
    "finetune": 1,
    "sample": 5,  # four rows and the reference
    "sample_val": 1,
    "evaluate": 4,
    "tabulate": 1,
    "plot_figures": 1,
    "all": 1,
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("workflow") / "repository")


def plan(repository, *arguments: str) -> dict[str, int]:
    """The number of jobs of each rule."""
    done = snakemake(repository, "-n", "--cores", "2", *arguments)
    assert done.returncode == 0, done.stdout
    table = done.stdout.split("Job stats:")[1].split("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


CONFIGS = ["config/config.yaml", "config/smoke.yaml", "config/multitask.yaml", "config/continuous.yaml"]


@pytest.mark.parametrize("configfile", CONFIGS)
def test_rules_of_the_demo(repository, configfile):
    assert plan(repository, "all", "--configfile", configfile) == DEMO


@pytest.mark.parametrize("task", ["compressibility", "multitask", "continuous"])
def test_the_tasks_on_stable_diffusion_are_planned_with_their_real_names_and_no_network(repository, task):
    configfile = f"config/stable_diffusion/{task}.yaml"
    published = f"results/sd_{task}/evaluation/published.json"
    done = snakemake(repository, "-n", "-p", "--cores", "2", "all", published, "--configfile", configfile)
    assert done.returncode == 0, done.stdout
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout.split("Job stats:")[1].split("total")[0], re.MULTILINE))
    added = {"generate_images": "1", "finetune": "2", "sample": "6", "evaluate": "5"}
    assert jobs == {name: str(count) for name, count in DEMO.items() if name != "unpack_images"} | added
    assert ("note: label.aesthetic.weights: there is no file" in done.stdout) == (task == "multitask")


def test_another_base_is_laid_over_a_task(repository):
    configs = [f"config/stable_diffusion/{name}.yaml" for name in ("compressibility", "sd3")]
    done = snakemake(repository, "-n", "--cores", "2", "all", "--configfile", *configs)
    assert done.returncode == 0 and "results/sd3_compressibility/" in done.stdout, done.stdout


def test_a_run_that_lacks_the_aesthetic_weights_ends_before_it_begins(repository):
    task = ("--configfile", "config/stable_diffusion/multitask.yaml", "--config", "experiment=lacking")
    done = snakemake(repository, "all", "--cores", "2", *task)
    assert done.returncode == 2 and not (repository / "results" / "lacking").exists()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "there is no file weights/aesthetic.safetensors; docs/your-own.md says where to get it" in line


def test_files_of_ones_own_are_inputs_of_the_rules_that_use_them(repository):
    (repository / "my_oracle.py").write_text("def score(images): ...")
    (repository / "my_network.py").write_text("class Network: ...")
    (repository / "config" / "own.yaml").write_text("label: {oracle: my_oracle.py}\nclassifier: {network: my_network.py}\n")
    done = snakemake(repository, "-n", "--cores", "2", "all", "--configfile", "config/own.yaml")
    assert done.returncode == 0, done.stdout
    blocks = {re.match(r"\w+", block)[0]: block for block in done.stdout.split("\nrule ")[1:]}
    given = {name: re.search(r"input: (.*)", block)[1].split(", ") for name, block in blocks.items() if "input: " in block}
    assert [name for name, files in given.items() if "my_oracle.py" in files] == ["build_dataset"]
    assert [name for name, files in given.items() if "my_network.py" in files] == ["train_classifier"]
    (repository / "my_oracle.py").unlink()
    done = snakemake(repository, "-n", "--cores", "2", "all", "--configfile", "config/own.yaml")
    assert done.returncode == 2 and "error: there is no file my_oracle.py" in done.stdout


def test_the_long_run_adds_rows_and_the_sweep_of_gamma(repository):
    jobs = plan(repository, "paper")
    assert jobs["finetune"] == 8  # gamma 1, 3, 10 and 30, of which the configuration's is `ctrl`; and the four other adapters
    assert jobs["sample_val"] == 9  # the four of the sweep, four further strengths, and the reference
    assert (jobs["sample"], jobs["evaluate"], jobs["evaluate_val"]) == (18, 17, 8)
    assert jobs["tabulate"] == 2
    assert {"plot_sweep", "compare_strengths", "plot_figures", "plot_figures_paper"} <= set(jobs)


def test_every_strength_is_drawn_from_one_adapter(repository):
    name = "results/smoke/samples_val/ctrl_gamma3_strength0.5/samples.parquet"
    done = snakemake(repository, "-n", "-p", "--cores", "2", "strength", name, "--configfile", "config/smoke.yaml")
    assert done.returncode == 0, done.stdout
    commands = re.findall(r"--method ctrl\s+\\?\s*--strength (\S+).*?--adapter (\S+).*?--output (\S+)", done.stdout, re.DOTALL)
    found = {output.split("/")[-1]: (adapter.split("/")[-1], strength) for strength, adapter, output in commands}
    assert found["ctrl_strength0"] == ("ctrl", "0") and found["ctrl_strength1.5"] == ("ctrl", "1.5") and found["ctrl"] == ("ctrl", "1")
    assert found["ctrl_gamma3_strength0.5"] == ("ctrl_gamma3", "0.5")
    assert "ctrl_strength1" not in found, "that is ctrl itself"


def test_the_comparison_of_trainers_trains_each_recipe_with_each_seed(repository):
    jobs = plan(repository, "trainers")
    assert jobs["finetune"] == jobs["evaluate_val"] == 12  # four recipes, three seeds
    assert jobs["sample_val"] == 13 and jobs["compare_trainers"] == 1  # and the reference
    few = plan(repository, "trainers", "--configfile", "config/smoke.yaml")
    assert few["finetune"] == 6 and set(few) == set(jobs)


def test_only_a_trainer_that_learns_from_the_classifier_is_given_it(repository):
    adapters = [f"results/compressibility/adapters/{name}/adapter.json" for name in ("ctrl", "cfg_seed1", "ctrl_policy_gradient")]
    done = snakemake(repository, "-n", "-p", "--cores", "2", *adapters)
    assert done.returncode == 0, done.stdout
    commands = re.findall(r"python scripts/finetune\.py.*?--name (\w+)(.*?)--output", done.stdout, re.DOTALL)
    given = {name: "--classifier results/compressibility/classifier " in rest for name, rest in commands}
    assert given == {"ctrl": True, "cfg_seed1": False, "ctrl_policy_gradient": False}


def test_sample_efficiency_trains_each_method_once_for_each_number_of_images(repository):
    jobs, sizes = plan(repository, "efficiency"), 4
    assert jobs["subset_dataset"] == jobs["train_classifier_subset"] == sizes and jobs["train_classifier"] == 1
    assert jobs["finetune"] == 2 * (sizes + 1), "ctrl and cfg; all images are the ordinary adapters"
    assert jobs["tune"] == sizes + 1, "a scale of its own for each cfg, none for ctrl"
    assert jobs["evaluate_val"] == 2 * (sizes + 1) + 2 and jobs["sample_val"] == jobs["evaluate_val"] + 1, "and the reference"
    assert jobs["build_dataset"] == jobs["estimate_cells"] == jobs["plot_efficiency"] == 1 and not {"sample", "evaluate"} & set(jobs)
    assert not {"subset_dataset", "plot_efficiency"} & set(plan(repository, "paper"))


def test_fewer_images_are_those_of_the_dataset_the_classifier_and_the_scale(repository):
    done = snakemake(repository, "-n", "-p", "--cores", "2", "results/compressibility/samples_val/cfg_n300/samples.parquet")
    assert done.returncode == 0, done.stdout
    blocks = {re.match(r"\w+", block)[0]: block for block in done.stdout.split("\nrule ")[1:]}
    assert "--name cfg_n300" in blocks["finetune"] and "--dataset results/compressibility/dataset_n300" in blocks["finetune"]
    assert "--classifier" not in blocks["finetune"]
    assert "--method cfg " in blocks["tune"] and "--adapter results/compressibility/adapters/cfg_n300" in blocks["tune"]
    assert "--tuning results/compressibility/tuning/cfg_n300.json" in blocks["sample_val"]
    assert "--classifier results/compressibility/classifier " in blocks["estimate_cells"], "cells are those of the experiment"
    done = snakemake(repository, "-n", "-p", "--cores", "2", "results/compressibility/adapters/ctrl_n300/adapter.json")
    assert "--classifier results/compressibility/classifier_n300" in done.stdout


def test_jobs_ask_for_the_gpus_that_the_config_gives_them(repository):
    (repository / "config" / "gpus.yaml").write_text(
        "cluster: {account: a1, gpu: {gpus: 0, partition: p1}, finetune: {gpus: 2, minutes: 7}}"
    )
    done = snakemake(repository, "-n", "-p", "--cores", "2", "all", "--configfile", "config/gpus.yaml")
    assert done.returncode == 0, done.stdout
    blocks = {re.match(r"\w+", block)[0]: block for block in done.stdout.split("\nrule ")[1:]}
    asked = {name: re.search(r"resources: (.*)", block)[1] for name, block in blocks.items() if "resources: " in block}
    assert "gpu=2" in asked["finetune"] and "runtime=7" in asked["finetune"] and "slurm_partition" not in asked["finetune"]
    assert re.search(r"accelerate launch --multi_gpu --num_processes 2 .* scripts/finetune\.py", blocks["finetune"])
    assert [name for name in asked if "gpu=" in asked[name]] == ["finetune"], (
        "0 GPUs are not asked for: a cluster without any has no such word"
    )
    assert [name for name in asked if "slurm_partition=p1" in asked[name]] == [
        name for name in asked if name in ("sample_pool", "train_classifier", "tune", "sample", "sample_val")
    ]
    assert all("slurm_account=a1" in text for name, text in asked.items() if name not in ("all", "check_base")), "what runs here needs none"


def test_several_nodes_are_asked_for_with_the_gpus_of_each(repository):
    def asked(finetune: str) -> str:
        (repository / "config" / "nodes.yaml").write_text(f"cluster: {{finetune: {{nodes: 3, {finetune}}}}}")
        done = snakemake(repository, "-n", "--cores", "2", "all", "--configfile", "config/nodes.yaml")
        assert done.returncode == 0, done.stdout
        return re.search(r"\nrule finetune:.*?resources: (.*?)\n", done.stdout, re.DOTALL)[1]

    with_gpus, without = asked("gpus: 2"), asked("gpus: 0")
    assert "nodes=3" in with_gpus and "gres=gpu:2" in with_gpus and "tasks=" not in with_gpus and not re.search(r"\bgpu=", with_gpus)
    assert "nodes=3" in without and "tasks=3" in without and "gres=" not in without


def test_pretraining_is_a_rule_of_its_own_and_leaves_the_shipped_weights_alone(repository):
    done = snakemake(repository, "-n", "--cores", "2", "pretrain", "train_garments")
    assert done.returncode == 0, done.stdout
    outputs = re.findall(r"output: (.*)", done.stdout)
    assert outputs
    assert all(path.startswith("results/pretrain/") for line in outputs for path in line.split(", "))


@pytest.mark.parametrize(("kind", "first"), [("folder", "build_dataset"), ("generated", "generate_images")])
def test_other_datasets(repository, kind, first):
    images = repository / "my_images"
    images.mkdir(exist_ok=True)
    (images / "metadata.csv").write_text("file_name,prompt\n")
    (repository / "config" / f"{kind}.yaml").write_text(f"dataset: {{kind: {kind}, path: my_images}}")
    jobs = plan(repository, "all", "--configfile", f"config/{kind}.yaml")
    assert first in jobs
    assert "unpack_images" not in jobs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetune: {gama: 3}", "unknown key finetune.gama; did you mean finetune.gamma?"),
        ("finetune: {gamma: 0}", "finetune.gamma is 0; it must be a finite number above 0"),
        ("dataset: {kind: folder, path: no/pictures}", "dataset.path is no/pictures; there is no such folder of images"),
        ("label: {edges: [3.0, 2.0]}", "label.edges is [3.0, 2.0]; it must be a list of 1 or more entries, in ascending order"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(repository, text, says):
    (repository / "config" / "mistake.yaml").write_text(f"experiment: mistaken\n{text}\n")
    done = snakemake(repository, "-n", "--cores", "2", "all", "--configfile", "config/mistake.yaml")
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.stdout
    assert not (repository / "results" / "mistaken").exists()


def test_a_mistake_in_the_table_of_methods_is_one_line(tmp_path):
    repository = copy_repository(tmp_path / "repository")
    table = (repository / "config" / "methods.tsv").read_text()
    (repository / "config" / "methods.tsv").write_text(table.replace("\tguidance\t", "\tguidence\t", 2))
    done = snakemake(repository, "-n", "--cores", "2", "all")
    assert done.returncode != 0
    assert "error: config/methods.tsv, method" in done.stdout


@pytest.mark.parametrize("target", ["strength", "trainers", "efficiency"])
def test_what_compares_accuracies_refuses_a_continuous_label_while_planning(repository, target):
    done = snakemake(repository, "-n", target, "--cores", "1", "--configfile", "config/continuous.yaml")
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert f"`snakemake {target}` compares accuracies, but label.kind is continuous" in line and "Traceback" not in done.stdout
