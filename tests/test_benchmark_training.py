"""The benchmark of the trainers: its recipes, its ratios, and one line for a name that there is not."""

import argparse

import pytest

from ctrl import errors
from scripts.benchmark_training import PUBLISHED, recipes, with_ratios
from scripts.common import DEFAULTS


def arguments(*adapters):
    return argparse.Namespace(config=[DEFAULTS], adapters=list(adapters))


def row(name, seconds, memory, num_steps=10):
    return {"name": name, "num_steps": num_steps, "seconds_per_update": seconds, "peak_memory_mb": memory}


def test_recipes_are_the_configured_ones_and_the_published():
    found = {name: config["finetune"] for name, config in recipes(arguments("ctrl", "ctrl_adjoint")).items()}
    assert list(found) == ["ctrl", "ctrl_adjoint", PUBLISHED]
    assert [settings["trainer"] for settings in found.values()] == ["backprop", "adjoint", "backprop"]
    assert [settings["kl_reduction"] for settings in found.values()] == ["sum", "sum", "mean"]
    assert found[PUBLISHED]["truncation"] == [1, 6] and found["ctrl"]["truncation"] is None


def test_ratios_are_to_the_published_recipe_at_the_same_steps():
    rows = [row("ctrl", 2.0, 300), row(PUBLISHED, 10.0, 600), row("ctrl", 8.0, 900, 50), row(PUBLISHED, 4.0, 600, 50)]
    found = with_ratios(rows)
    assert [r["speedup_vs_published"] for r in found] == [5.0, 1.0, 0.5, 1.0]
    assert [r["memory_vs_published"] for r in found] == [0.5, 1.0, 1.5, 1.0]


@pytest.mark.parametrize(("name", "says"), [("ctr", "no recipe 'ctr'; the config has ctrl, cfg"), ("cfg", "learns from labelled images")])
def test_what_cannot_be_compared_is_one_line(name, says):
    with pytest.raises(errors.UserError, match=says):
        recipes(arguments(name))
