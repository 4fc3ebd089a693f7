"""The text of the workflow: every module that alters a result is an input of its rule, and rules run scripts alone."""

import ast
import re
from pathlib import Path

import pytest

from tests.repository import ROOT

LOGGING = ("journal", "mlflow_client", "tracking")
INFRASTRUCTURE = {
    "scripts/common.py",
    *(
        f"ctrl/{name}.py"
        for name in ("config", "contradictions", "device", "errors", "folders", "hub", "io", "names", "schema", "__init__", *LOGGING)
    ),
}
SAMPLERS = {f"ctrl/guidance/{name}.py" for name in ("classifier", "mpgd", "particles", "reconstruction")}
SCORING = {
    f"ctrl/{name}.py" for name in ("aesthetic", "classifier", "clip", "dct", "heads", "judge", "networks", "oracles", "own", "scoring")
}
EXEMPT = {  # imported, but without a say in the result of these rules
    "check_base": {"ctrl/aesthetic.py", "ctrl/brisque.py"},  # it looks whether their weights are there
    "estimate_cells": {"ctrl/metrics.py"},
    "finetune": {
        *(f"ctrl/{name}.py" for name in ("brisque", "evaluation", "features", "metrics", "noisy", "targets")),
        *SAMPLERS,
    },  # the probe is no part of it
    "train_noisy_classifier": {
        *(
            f"ctrl/{name}.py"
            for name in (
                "adapter_files",
                "brisque",
                "classifier",
                "clip",
                "control",
                "dct",
                "embedding",
                "evaluation",
                "features",
                "heads",
                "lora",
                "metrics",
                "networks",
                "oracles",
            )
        ),
        *(f"ctrl/figures/{name}.py" for name in ("__init__", "style", "curves")),
        "ctrl/finetune/objective.py",
        "ctrl/finetune/speed.py",
        *SAMPLERS,
    },
    "sample": {"ctrl/metrics.py", "ctrl/finetune/speed.py"},
    "tune": {"ctrl/finetune/speed.py"} | {f"ctrl/figures/{name}.py" for name in ("__init__", "style", "curves")},
    "plot_figures": {"ctrl/figures/__init__.py", "ctrl/brisque.py", "ctrl/features.py", "ctrl/metrics.py"},
    "plot_sweep": {"ctrl/figures/__init__.py"},
    "compare_strengths": {"ctrl/figures/__init__.py"},
    "compare_trainers": {"ctrl/figures/__init__.py"},
    "plot_efficiency": {"ctrl/figures/__init__.py", "ctrl/oracles.py"},
    "subset_dataset": {"ctrl/labels.py", *SCORING},
}


def imports(path: str) -> set[str]:
    """Modules of this repository that a file imports, as paths."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.replace(".", "/") + ".py" for name in names if name.split(".")[0] in ("ctrl", "scripts")}
    return {path for path in paths if (ROOT / path).exists()}


def closure(path: str) -> set[str]:
    seen, open_paths = set(), [path]
    while open_paths:
        if (path := open_paths.pop()) not in seen:
            seen.add(path)
            open_paths += imports(path)
    return seen


def code_lists() -> dict:
    """The variables of common.smk that list code."""
    text = (ROOT / "workflow/rules/common.smk").read_text()
    namespace = {"Path": Path}
    exec(text[text.index("def lib(") : text.index("def files_of(")], namespace)
    return namespace


@pytest.mark.parametrize("rule", sorted(code_lists()["CODE"]))
def test_every_module_that_alters_a_result_is_an_input(rule):
    lists = code_lists()
    listed = set(lists["CODE"][rule]) | (set(lists["CONTROL"] + lists["GUIDANCE"]) if rule == "sample" else set())
    assert all((ROOT / path).exists() for path in listed), "a listed file is missing"
    script = lists["CODE"][rule][0]
    assert closure(script) - INFRASTRUCTURE - EXEMPT.get(rule, set()) <= listed


def test_rules_are_shell_commands_only():
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        assert not re.search(r"^ +(script|run|message|notebook|wrapper):", path.read_text(), re.MULTILINE), path
    assert len((ROOT / "workflow/rules/common.smk").read_text().splitlines()) < 150
