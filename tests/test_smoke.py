"""The whole chain, every rule, on few images and steps: the files and columns exist, and a second run has nothing to do."""

import csv
import json
import shutil
import sqlite3

import pandas as pd
import pytest

from tests.repository import snakemake

pytestmark = pytest.mark.slow
ARGUMENTS = ("--cores", "2", "--configfile", "config/smoke.yaml")
METHODS = ["pretrained", "rejection", "reconstruction_guidance", "ctrl"]
COLUMNS = ["method", "family", "fine_tunes", "learns_xt_to_y", "uses_conditional_independence", "n"]
METRICS = ["accuracy", "macro_f1", "kid_rejection", "precision", "recall", "diversity", "prompt_accuracy"]
COSTS = ["nfe_forward", "nfe_backward", "seconds_per_image", "peak_memory_mb"]
FILES = [
    "dataset/metadata.parquet",
    "dataset/report.json",
    "dataset/histogram.png",
    "pool/samples.parquet",
    "cells.json",
    "classifier/model.safetensors",
    "classifier/config.json",
    "classifier/metrics.json",
    "classifier/reliability.png",
    "adapters/ctrl/pytorch_lora_weights.safetensors",
    "adapters/ctrl/label_embedding.safetensors",
    "adapters/ctrl/adapter.json",
    "adapters/ctrl/README.md",
    "adapters/ctrl/history.jsonl",
    "adapters/ctrl/pipeline.py",
    "tuning/reconstruction_guidance.json",
    "samples/ctrl/samples.parquet",
    "samples/rejection_reference/samples.parquet",
    "samples_val/rejection/samples.parquet",
    "tables/results.csv",
    "tables/results.md",
    "tables/results.tex",
    "figures/teaser.png",
    "figures/sizes.png",
    "figures/confusion.png",
    "figures/training.png",
    "figures/grid_ctrl.png",
    "figures/grid_rejection.png",
    "config.json",
]


@pytest.fixture(scope="module")
def repository(finished_smoke, tmp_path_factory):
    return shutil.copytree(finished_smoke, tmp_path_factory.mktemp("smoke") / "repository", symlinks=True)


@pytest.fixture(scope="module")
def results(repository):
    return repository / "results" / "smoke"


def test_every_file_is_there(results):
    assert [name for name in FILES if not (results / name).exists()] == []
    assert not list(results.rglob("*.tmp"))
    assert not (results / "adapters" / "ctrl" / "checkpoints").exists()


def test_table(results):
    rows = list(csv.DictReader((results / "tables" / "results.csv").open()))
    assert [row["method"] for row in rows] == METHODS
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    for name in METRICS:
        assert {name, f"{name}_lo", f"{name}_hi"} <= set(rows[0])
        assert all(float(row[f"{name}_lo"]) <= float(row[f"{name}_hi"]) for row in rows)
    assert set(COSTS) <= set(rows[0])
    by_method = {row["method"]: row for row in rows}
    assert float(by_method["rejection"]["accuracy"]) == 1
    assert float(by_method["ctrl"]["kl_nats"]) >= 0
    assert float(by_method["ctrl"]["train_seconds"]) > 0
    assert float(by_method["reconstruction_guidance"]["nfe_backward"]) > 0


def test_samples(results):
    per_label = json.loads((results / "config.json").read_text())["evaluation"]["images_per_label"]
    for method in METHODS:
        table = pd.read_parquet(results / "samples" / method / "samples.parquet")
        assert {"file_name", "prompt", "subject", "label", "seed", "nfe_forward", "nfe_backward", "seconds"} <= set(table)
        assert (table["label"].value_counts() == per_label).all()
        assert all((results / "samples" / method / name).is_file() for name in table["file_name"])
    asked = {tuple(cell) for cell in json.loads((results / "cells.json").read_text())["cells"]}
    assert set(table[["subject", "label"]].itertuples(index=False, name=None)) <= asked


def test_both_sets_of_rejection_samples_differ(results):
    row, reference = (pd.read_parquet(results / "samples" / name / "samples.parquet") for name in ("rejection", "rejection_reference"))
    assert not set(row["seed"]) & set(reference["seed"])


def test_every_script_logged_a_run(repository):
    with sqlite3.connect(repository / "results" / "mlflow.db") as database:
        runs = [name for (name,) in database.execute("select name from runs where status = 'FINISHED'")]
        experiments = {name for (name,) in database.execute("select name from experiments")}
    assert "smoke" in experiments
    assert {"finetune ctrl", "sample ctrl", "evaluate ctrl", "tabulate"} <= set(runs)


def test_a_second_run_has_nothing_to_do(repository):
    done = snakemake(repository, "all", *ARGUMENTS)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_a_change_reruns_what_depends_on_it_and_nothing_else(repository):
    (repository / "config" / "changed.yaml").write_text("tuning: {num_images: 32}\n")
    done = snakemake(repository, "-n", "all", *ARGUMENTS, "config/changed.yaml")
    assert done.returncode == 0, done.stdout
    assert "rule tune:" in done.stdout
    assert "rule finetune:" not in done.stdout
    assert "rule train_classifier:" not in done.stdout


def test_report(repository, results):
    done = snakemake(repository, "all", *ARGUMENTS, "--report", "results/smoke/report.html")
    assert done.returncode == 0, done.stdout
    text = (results / "report.html").read_text()
    for name in ("results.csv", "teaser.png", "grid_ctrl.png", "reliability.png", "training.png"):
        assert name in text


def test_parts_of_the_long_run(repository, results):
    """The sweep of gamma, the strength dial, an adapter trained otherwise, and each kind of sampler that the demo does not have."""
    samplers = [
        f"results/smoke/samples/{name}/samples.parquet" for name in ("mpgd", "classifier_guidance", "smc", "svdd", "ctrl_resampled")
    ]
    done = snakemake(repository, "sweep", "strength", "results/smoke/evaluation/cfg.json", *samplers, *ARGUMENTS, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    assert (results / "figures" / "gamma_sweep.png").is_file() and (results / "figures" / "strength.png").is_file()
    dial = pd.read_csv(results / "tables" / "strength.csv")
    assert dial["setting"].tolist() == [0, 1, 1.5, 1, 10] and dial["kl_nats"].iloc[0] == 0
    adapters = {path.parent.name: json.loads(path.read_text()) for path in (results / "adapters").glob("*/adapter.json")}
    assert adapters["ctrl_gamma1"]["gamma"] == 1
    assert adapters["cfg"]["finetune"]["trainer"] == "supervised" and adapters["ctrl"]["finetune"]["trainer"] == "backprop"
    costs = {
        name: pd.read_parquet(results / "samples" / name / "samples.parquet")
        for name in ("pretrained", "mpgd", "classifier_guidance", "smc", "svdd", "cfg", "ctrl_resampled")
    }
    passes = {name: table["nfe_forward"].mean() for name, table in costs.items()}
    steps = passes["pretrained"]
    assert passes["mpgd"] == steps and costs["mpgd"]["nfe_backward"].max() == 0, "no gradient through the network"
    assert passes["classifier_guidance"] == steps and costs["classifier_guidance"]["nfe_backward"].max() == 0, "nor here"
    measured = json.loads((results / "noisy_classifier" / "metrics.json").read_text())["val"]
    assert len(measured) == steps and (results / "noisy_classifier" / "accuracy_by_timestep.png").is_file()
    assert (costs["smc"]["effective_sample_size"].map(len) == steps + 1).all()
    assert passes["smc"] == passes["svdd"] == 2 * steps, "two particles an image"
    assert passes["cfg"] > steps
    assert 2 * steps < passes["ctrl_resampled"] <= 4 * steps, "two paths an image, each through both models where they differ"
    assert costs["ctrl_resampled"]["effective_sample_size"].map(lambda sizes: 1 <= sizes[0] <= 2.0001).all()


def test_sample_efficiency(repository, results):
    """Each method with fewer labelled images and with all, where the adapters with all are those that there are."""
    trained = (results / "adapters" / "ctrl" / "adapter.json").stat().st_mtime_ns
    done = snakemake(repository, "efficiency", *ARGUMENTS, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    assert (results / "adapters" / "ctrl" / "adapter.json").stat().st_mtime_ns == trained
    table = pd.read_csv(results / "tables" / "sample_efficiency.csv")
    every = sum(json.loads((results / "dataset" / "report.json").read_text())["counts"]["train"])
    assert table["method"].tolist() == ["pretrained", "rejection", "cfg", "cfg", "ctrl", "ctrl"]
    assert table["num_images"].dropna().tolist() == [100, every] * 2
    assert table.loc[table["method"] == "rejection", "accuracy"].item() == 1
    assert table["scale"].notna().tolist() == (table["method"] == "cfg").tolist()
    assert (results / "figures" / "sample_efficiency.png").is_file()
    assert (results / "tables" / "sample_efficiency.md").read_text().startswith("## How many labelled images it takes")
