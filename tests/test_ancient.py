"""workflow/rules/ancient.smk: one command makes anew all that the change of a configuration asks for."""

import shutil

import pytest

from tests.repository import ROOT, snakemake

pytestmark = pytest.mark.slow

SNAKEFILE = """
include: "ancient.smk"

rule all:
    input: "c"

rule first:
    output: "a"
    params: config["first"]
    shell: "echo {params} > {output}"

rule second:
    input: ancient("a")
    output: "b"
    params: config["second"]
    shell: "echo {params} > {output}"

rule third:
    input: "b"
    output: "c"
    params: config["third"]
    shell: "echo {params} > {output}"
"""


def test_what_is_behind_an_ancient_input_has_its_own_reasons(tmp_path):
    shutil.copy(ROOT / "workflow/rules/ancient.smk", tmp_path)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)

    def ran(first: int, second: int, third: int) -> list[str]:
        values = [f"first={first}", f"second={second}", f"third={third}"]
        done = snakemake(tmp_path, "all", "--cores", "1", "--config", *values)
        assert done.returncode == 0, done.stdout
        return [name for name in ("first", "second", "third") if f"rule {name}:" in done.stdout]

    assert ran(1, 1, 1) == ["first", "second", "third"]
    assert ran(2, 1, 1) == ["first"], "ancient it still is"
    assert ran(3, 1, 2) == ["first", "third"]
    assert ran(4, 2, 2) == ["first", "second", "third"]
    assert ran(4, 2, 2) == [], "the command before has done all"
