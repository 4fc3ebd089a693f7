"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
OURS = {"benchmarks", "ctrl", "scripts", "tests", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
COMES_WITH_ANOTHER = {"packaging"}  # of pytest, in tests alone


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"{line}: a name and a public version, nothing else"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement):
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_the_oldest_python_that_is_promised_can_install_every_pin():
    """Debian 12 has 3.11.2; a release of one package that asks for 3.11.5 makes the whole installation fail there."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pinned = pins()
    asked = {d.name: d.metadata.get("Requires-Python") for d in distributions() if canonicalize_name(d.name) in pinned}
    assert len(asked) > 100
    assert {name: python for name, python in asked.items() if not SpecifierSet(python or "").contains(oldest)} == {}


def test_the_page_to_play_with_has_gradio_and_leaves_the_rest_as_it_is():
    (gradio,) = [Requirement(text) for text in PROJECT["optional-dependencies"]["play"]]
    own, common = pins("constraints-play.txt"), pins()
    assert gradio.name == "gradio" and gradio.specifier.contains(own["gradio"])
    assert {name for name in own if name in common} == {"pillow", "tomlkit"}, "what gradio asks for in another version"
    for requirement in requirements():
        assert requirement.specifier.contains((common | own)[canonicalize_name(requirement.name)])
    assert "-c constraints-play.txt gradio" in (ROOT / "Makefile").read_text()


def test_torch_and_torchvision_are_a_pair():
    assert (pins()["torch"], pins()["torchvision"]) == ("2.14.1", "0.29.1")


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.removeprefix("python=") + ".0")
    assert environment["name"] == PROJECT["name"] == "ctrl-diffusion"


def test_make_installs_the_same():
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / "Makefile").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_imported_package_is_required():
    declared = {canonicalize_name(requirement.name) for requirement in requirements()} | COMES_WITH_ANOTHER | {"gradio"}  # of `play`
    for path in [*ROOT.glob("ctrl/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS:
                assert canonicalize_name(MODULES.get(name, name)) in declared, f"{path.name} imports {name}"
