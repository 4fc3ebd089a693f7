"""Which module may import what: arrows point one way."""

import ast
import subprocess
import sys

import pytest

from tests.repository import ROOT

FILES = sorted((ROOT / "ctrl").rglob("*.py"))
LEAVES = ["process", "labels", "oracles", "metrics", "io", "flow", "pipeline"]
ONLY = {  # package: the modules of ctrl that may import it
    "diffusers": {"base", "base_files", "flow", "pretrain", "pretrain_flow", "pipeline"},
    "peft": {"control", "lora"},
    "mlflow": {"mlflow_client"},
    "snakemake": set(),
    "dvc": set(),
    "yaml": set(),
    "argparse": set(),
    "gradio": set(),
    "scripts": set(),
}


def name_of(path) -> str:
    return ".".join(path.relative_to(ROOT / "ctrl").with_suffix("").parts).removesuffix(".__init__")


def imported(path) -> set[str]:
    """Full names of all that a file imports, also inside functions; `from ctrl import io` counts as ctrl.io."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "ctrl" else {node.module}
    return names


def siblings(path) -> set[str]:
    return {name.split(".", 1)[1] for name in imported(path) if name.startswith("ctrl.")}


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_no_sibling(leaf):
    assert siblings(ROOT / "ctrl" / f"{leaf}.py") <= {"errors"}


@pytest.mark.parametrize("package", ONLY)
def test_packages_have_their_importers(package):
    importers = {name_of(path) for path in FILES if package in {name.split(".")[0] for name in imported(path)}}
    assert importers <= ONLY[package]


def test_guidance_knows_the_process_alone():
    for path in (ROOT / "ctrl" / "guidance").glob("*.py"):
        assert siblings(path) <= {"process", "errors"}, path


def test_training_knows_no_images():
    allowed = {"process", "sampling", "control", "device", "pairs", "io", "errors"}
    for path in (ROOT / "ctrl" / "finetune").glob("*.py"):
        assert {name for name in siblings(path) if not name.startswith("finetune")} <= allowed, path


def test_no_module_imports_itself_around_a_corner():
    graph = {name_of(path): siblings(path) for path in FILES}
    while ends := [name for name, targets in graph.items() if not targets & set(graph)]:
        for name in ends:
            del graph[name]
    assert not graph


def test_scripts_are_short():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 150, path


LIGHT = ["benchmark_logging", "compare_strengths", "compare_trainers", "plot_efficiency", "plot_mixture", "plot_sweep", "restore"]
LIGHT += ["sync_mlflow", "tabulate_results", "write_methods_page"]


def test_what_tabulates_and_draws_starts_without_torch():
    """It takes seconds to import, and MLflow too: a script that logs imports it in a thread, while it works."""
    heavy = "{'torch', 'diffusers', 'transformers', 'mlflow'}"
    code = f"import sys; {'; '.join(f'import scripts.{name}' for name in LIGHT)}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
