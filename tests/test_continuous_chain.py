"""The whole chain with a continuous label, on few images and steps: errors in its unit, requests beyond the range apart."""

import csv
import json
import subprocess

import pandas as pd
import pytest

from tests.repository import copy_repository, environment, snakemake
from tests.warm_python import command

pytestmark = pytest.mark.slow
SMALL = """
experiment: smoke_continuous
evaluation: {images_per_label: 12}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    repository = copy_repository(tmp_path_factory.mktemp("continuous") / "repository")
    (repository / "config" / "small.yaml").write_text(SMALL)
    files = [f"config/{name}.yaml" for name in ("smoke", "continuous", "small")]
    done = snakemake(repository, "all", "--cores", "2", "--configfile", *files, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    return repository / "results" / "smoke_continuous"


def test_rejection_is_within_the_tolerance_and_the_table_has_the_errors(results):
    rows = {row["method"]: row for row in csv.DictReader((results / "tables" / "results.csv").open())}
    report = json.loads((results / "dataset" / "report.json").read_text())
    assert float(rows["rejection"]["within_tolerance"]) == 1 and 0 < float(rows["rejection"]["mae"]) <= report["tolerance"]
    assert all(0 < float(row["mae"]) <= float(row["rmse"]) and float(row["r2"]) < 1 for row in rows.values())
    assert float(rows["ctrl"]["mae_beyond"]) > 0 and not rows["rejection"]["mae_beyond"], "rejection is not asked beyond the ranges"
    assert "accuracy" not in rows["ctrl"] or not rows["ctrl"]["accuracy"]
    assert (results / "figures" / "sizes.png").is_file() and not (results / "figures" / "confusion.png").exists()


def test_requests_lie_on_each_subjects_grid(results):
    cells = json.loads((results / "cells.json").read_text())
    table = pd.read_parquet(results / "samples" / "ctrl" / "samples.parquet")
    for row in table.itertuples():
        low, high = cells["ranges"][row.subject]
        share = (row.label - low) / (high - low)
        assert share == pytest.approx({-1: -0.1, 0: 0.0, 1: 1.0, 2: 1.1}[row.target])
    metrics = json.loads((results / "classifier" / "metrics.json").read_text())
    assert {"nll", "rmse", "r2", "coverage_50", "coverage_80", "coverage_95"} <= set(metrics["val"]["before"]) & set(
        metrics["val"]["after"]
    )
    adapter = json.loads((results / "adapters" / "ctrl" / "adapter.json").read_text())
    assert adapter["null_label"] is None and adapter["continuous"]["unit"] == "kB" and "num_classes" not in adapter


def test_the_doctor_examines_the_density(results, tmp_path):
    """Its last word is on a classifier of two epochs: it need not be kind."""
    pieces = [text for name in ("classifier", "cells.json", "dataset") for text in (f"--{name.split('.')[0]}", str(results / name))]
    few = ["--no-trainers", "--num-images", "64", "--num-trajectories", "12", "--num-threads", "1"]
    arguments = ["--config", str(results / "config.json"), *pieces, *few, "--json", str(tmp_path / "report.json")]
    repository = results.parent.parent
    done = subprocess.run(
        command("scripts/doctor.py", *arguments), cwd=repository, env=environment(repository), capture_output=True, text=True
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finite_differences"]["passed"] and report["errors"]["generated"]["n"] >= 64 and "its 80 % intervals hold" in done.stdout
    assert {row["name"].split(",")[0] for row in report["gradients"]["labels"].values()} == {
        "lowest third",
        "middle third",
        "highest third",
    }
