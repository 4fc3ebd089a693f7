"""DVC around the workflow, on a finished small experiment: record, push, fetch elsewhere, change, compare. The remote is a folder."""

import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT, snakemake
from tests.warm_python import environment_of_jobs

pytestmark = pytest.mark.slow
SMOKE = ("--configfile", "config/smoke.yaml")
NOTHING = "Data and pipelines are up to date."


def call(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A command in `folder`; stderr goes to stdout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "SNAKEMAKE", "DVC", "GIT"))} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        **environment_of_jobs(),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **{f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False
    )  # fmt: skip


def must(folder: Path, *command: str) -> str:
    done = call(folder, *command)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def restore(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return call(folder, sys.executable, "scripts/restore.py", *SMOKE, *arguments)


def digests(results: Path) -> dict[str, str]:
    """What DVC keeps of an experiment: everything but logs, and what says when and on which machine."""
    out = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_file() and not name.startswith(("logs/", "benchmarks/", "report", "config.json")) and ".snakemake" not in name:
            out[name] = hashlib.md5(path.read_bytes()).hexdigest()
    return out


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def project(finished_smoke, remote, tmp_path_factory):
    """A finished experiment in a git repository, recorded and pushed, as docs/dvc.md says."""
    project = tmp_path_factory.mktemp("dvc") / "project"
    shutil.copytree(finished_smoke, project, symlinks=True)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    stages = (project / "dvc.yaml").read_text()
    stages = stages.replace("results/compressibility", "results/smoke").replace(" all\n", f" all {' '.join(SMOKE)}\n")
    (project / "dvc.yaml").write_text(
        stages.replace("      - config/config.yaml:\n", "      - config/config.yaml:\n      - config/smoke.yaml:\n")
    )
    must(project, "git", "init", "-q", "--initial-branch", "master")
    must(project, "dvc", "remote", "add", "--default", "store", str(remote))
    must(project, "dvc", "commit", "--force", "--quiet")
    must(project, "git", "add", ".")
    must(project, "git", "commit", "-qm", "The first run")
    must(project, "dvc", "push")
    return project


@pytest.fixture(scope="module")
def clone(project):
    clone = project.parent / "clone"
    must(project.parent, "git", "clone", "-q", str(project), str(clone))
    done = restore(clone)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.endswith("snakemake and dvc have nothing to do\n")
    return clone


def test_repro_has_nothing_to_do_after_a_recorded_run(project):
    assert NOTHING in must(project, "dvc", "repro")


def test_a_restored_clone_has_the_same_bytes_and_nothing_to_do(project, clone):
    recorded = digests(project / "results" / "smoke")
    assert len(recorded) > 1000 and digests(clone / "results" / "smoke").items() <= recorded.items()
    assert {"tables/results.csv", "adapters/ctrl/adapter.json", "samples/ctrl/samples.parquet"} <= digests(
        clone / "results" / "smoke"
    ).keys()
    assert NOTHING in must(clone, "dvc", "status")
    assert "Nothing to be done" in snakemake(clone, "-n", "--cores", "1", "all", *SMOKE).stdout


def test_a_label_edge_changes_what_depends_on_it_alone(clone):
    (clone / "config" / "edge.yaml").write_text("label: {edges: [1.25]}\n")
    done = snakemake(clone, "-n", "--cores", "1", "all", *SMOKE, "config/edge.yaml")
    (clone / "config" / "edge.yaml").unlink()
    assert done.returncode == 0, done.stdout
    rules = set(re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.MULTILINE))
    assert {"build_dataset", "train_classifier", "estimate_cells", "finetune", "tabulate"} <= rules
    assert not {"unpack_images", "sample_pool"} & rules
    assert "Nothing to be done" in snakemake(clone, "-n", "--cores", "1", "all", *SMOKE).stdout


def flip(path: Path) -> None:
    """One bit of a file, whose mode stays as it is."""
    mode, content = path.stat().st_mode, bytearray(path.read_bytes())
    content[100] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def test_a_corrupted_cache_file_is_found_and_fetched_again(clone, remote):
    weights = clone / "results" / "smoke" / "classifier" / "model.safetensors"
    sound = weights.read_bytes()
    digest = hashlib.md5(sound).hexdigest()
    name = f"files/md5/{digest[:2]}/{digest[2:]}"
    flip(clone / ".dvc" / "cache" / name)
    weights.unlink()
    done = restore(clone)
    assert done.returncode == 0 and f"{digest[2:]}: corrupted; removed, to be fetched again" in done.stdout, done.stdout
    assert weights.read_bytes() == sound

    kept = (remote / name).read_bytes()
    flip(remote / name)
    flip(clone / ".dvc" / "cache" / name)
    weights.unlink()
    done = restore(clone)
    (remote / name).chmod(0o644)
    (remote / name).write_bytes(kept)
    assert done.returncode == 2 and "error: " in done.stdout and digest[2:] in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_nothing_is_marked_as_up_to_date_where_something_differs(clone):
    page, config = clone / "results" / "smoke" / "tables" / "results.md", clone / "config" / "config.yaml"
    recorded = page.read_text(), config.read_text()
    page.write_text("better figures")
    done = restore(clone)
    assert done.returncode == 2 and done.stdout.count("error: ") == 1, done.stdout
    assert page.read_text() == "better figures", "what differs is replaced only by --force"
    config.write_text(recorded[1].replace("seed: 0 ", "seed: 1 "))
    done = restore(clone, "--force")
    assert done.returncode == 2 and "config/config.yaml" in done.stdout, done.stdout
    config.write_text(recorded[1])
    done = restore(clone, "--force")
    assert done.returncode == 0 and page.read_text() == recorded[0], done.stdout


def test_experiments_over_gamma(project):
    said = must(project, "dvc", "exp", "run", "--name", "gamma3", "-S", "config/config.yaml:finetune.gamma=3")
    rules = set(re.findall(r"^(?:local)?rule (\w+):", said, re.MULTILINE))
    assert {"finetune", "sample", "evaluate", "tabulate"} <= rules, said[-3000:]
    assert not {"unpack_images", "build_dataset", "train_classifier", "sample_pool", "tune", "sample_val"} & rules
    rows = list(csv.DictReader(io.StringIO(must(project, "dvc", "exp", "show", "--csv"))))
    gammas = {row["Experiment"] or row["rev"]: float(row["finetune.gamma"]) for row in rows}
    assert gammas == {"workspace": 3, "master": 10, "gamma3": 3}
    assert all(row["results/smoke/metrics/ctrl.json:accuracy"] for row in rows if row["rev"] == "workspace")
    assert NOTHING in must(project, "dvc", "status")
    page = must(project, "dvc", "plots", "diff", "HEAD", "workspace", "--out", "dvc_plots")
    text = (project / "dvc_plots" / "index.html").read_text()
    assert "index.html" in page and "accuracy by method" in text and "teaser_png" in text
