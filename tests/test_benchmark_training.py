"""The benchmark of the trainers: its recipes, what it times, its ratios and figure, and one line for a name that there is not."""

import argparse
import os
import subprocess
import sys

import pytest

from ctrl import classifier as classifiers
from ctrl import errors, io
from ctrl.costs import PUBLISHED, to_markdown, with_ratios
from ctrl.figures.trainers import memory_by_steps
from ctrl.finetune.gradients import gradient_function
from ctrl.finetune.task import Task
from ctrl.measure import timed_updates
from scripts.benchmark_training import recipes
from scripts.common import DEFAULTS, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES
from tests.repository import ROOT
from tests.test_train_classifier import write_dataset

CONFIG = read_yaml(DEFAULTS)


def arguments(*adapters, config=(), **changes):
    return argparse.Namespace(
        config=[DEFAULTS, *config], adapters=list(adapters), **{"micro_batch_size": None, "gradient_checkpointing": None} | changes
    )


def row(name, seconds, memory, num_steps=10, before=100):
    cost = {"seconds_per_update": seconds, "peak_memory_mb": memory, "memory_before_mb": before, "seconds_per_trajectory": seconds / 8}
    passes = {"unet_forward": 80, "unet_backward": 40}
    how = {"trainer": "backprop", "batch_size": 8, "micro_batch_size": 4, "gradient_checkpointing": False}
    return {"name": name, "num_steps": num_steps, **cost, **passes, **how}


def test_recipes_are_the_configured_ones_and_the_published():
    found = {name: config["finetune"] for name, config in recipes(arguments("ctrl", "ctrl_adjoint")).items()}
    assert list(found) == ["ctrl", "ctrl_adjoint", PUBLISHED]
    assert [settings["trainer"] for settings in found.values()] == ["backprop", "adjoint", "backprop"]
    assert [settings["kl_reduction"] for settings in found.values()] == ["sum", "sum", "mean"]
    assert found[PUBLISHED]["truncation"] == [1, 6] and found["ctrl"]["truncation"] is None


def test_memory_is_compared_at_the_settings_of_the_published_recipe(tmp_path):
    """Or at those asked for; never with more trajectories at a time than the smallest batch has."""

    def settings(**changes):
        found = [config["finetune"] for config in recipes(arguments("ctrl", "ctrl_policy_gradient", **changes)).values()]
        shared = {(one["micro_batch_size"], one["gradient_checkpointing"]) for one in found}
        assert len(shared) == 1, "the same for all"
        return shared.pop()

    (tmp_path / "c.yaml").write_text("adapters: {published: {micro_batch_size: 4, gradient_checkpointing: true}}")
    assert settings() == (CONFIG["finetune"]["micro_batch_size"], False)
    assert settings(config=[tmp_path / "c.yaml"]) == (4, True)
    assert settings(config=[tmp_path / "c.yaml"], micro_batch_size=8, gradient_checkpointing=False) == (8, False)
    assert settings(micro_batch_size=1000) == (CONFIG["finetune"]["batch_size"], False)


def test_ratios_are_to_the_published_recipe_at_the_same_steps():
    rows = [row("ctrl", 2.0, 300), row(PUBLISHED, 10.0, 600), row("ctrl", 8.0, 900, 50), row(PUBLISHED, 4.0, 600, 50)]
    found = with_ratios(rows)
    assert [r["speedup_vs_published"] for r in found] == [5.0, 1.0, 0.5, 1.0]
    assert [r["memory_vs_published"] for r in found] == [0.5, 1.0, 1.5, 1.0]
    assert [r["training_memory_mb"] for r in found] == [200, 500, 800, 500]
    assert [r["training_memory_vs_published"] for r in found] == [0.4, 1.0, 1.6, 1.0]


def test_the_table_has_a_row_a_recipe_and_a_dash_where_there_is_no_ratio():
    lines = to_markdown(with_ratios([row("ctrl", 2.0, 300), row(PUBLISHED, 10.0, 100)])).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| 300 | 100 | 200 | 5.00 | 3.00 | – |") and lines[3].endswith("| 100 | 100 | 0 | 1.00 | 1.00 | – |")


@pytest.mark.parametrize("trainer", ["backprop", "policy_gradient"])
def test_updates_are_timed_with_all_that_learn_from_the_same_trajectories(control, trainer):
    settings = CONFIG["finetune"] | {"trainer": trainer, "num_updates": 21, "batch_size": 2, "micro_batch_size": 1}
    numbers = timed_updates(settings, 2)
    assert numbers == ([5, 15] if trainer == "backprop" else [4, 5, 14, 15])
    assert timed_updates(settings | {"policy_gradient": {"reuse": 3, "clip": 0.2}, "trainer": "policy_gradient"}, 1) == [9, 10, 11]
    task = Task(control, control.base.process(4), [(SUBJECTS[0], 0)], TEMPLATES, 1.0, 0)
    gradient = gradient_function(task, lambda x_0, y, temperature: -x_0.square().flatten(1).mean(1), settings)
    assert all(gradient(number)["unet_backward"] > 0 for number in numbers), "the first of them draws"


def test_memory_is_drawn_against_the_steps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ctrl.figures.trainers.save", lambda figure, path: drawn.append(figure))
    memory_by_steps(
        with_ratios([row(name, 1.0, 100 + size * n, n) for n in (50, 10) for name, size in (("ctrl", 4), (PUBLISHED, 2))]), tmp_path
    )
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"CTRL": [[10, 40], [50, 200]], "published": [[10, 20], [50, 100]]}
    assert "4 trajectories at a time, without checkpointing" in drawn[0].axes[0].get_title(loc="left")


@pytest.mark.parametrize(("name", "says"), [("ctr", "no recipe 'ctr'; the config has ctrl, cfg"), ("cfg", "learns from labelled images")])
def test_what_cannot_be_compared_is_one_line(name, says):
    with pytest.raises(errors.UserError, match=says):
        recipes(arguments(name))


@pytest.mark.slow
def test_the_picture_is_drawn_of_what_was_measured(tmp_path, real, trained):
    """Two recipes at two numbers of steps, each in a process of its own."""
    write_dataset(tmp_path / "dataset", [part[:600] if len(part) > 3 else part for part in real])
    classifiers.save(tmp_path / "classifier", trained[0])
    io.write_json(tmp_path / "cells.json", {"labels": [0, 1, 2, 3], "cells": [["pullover", 0], ["coat", 1], ["bag", 2], ["sneaker", 3]]})
    small = {"batch_size": 4, "micro_batch_size": 4}
    io.write_json(tmp_path / "config.json", {"finetune": small, "adapters": {"published": small}})
    given = [text for name in ("classifier", "cells.json", "dataset") for text in (f"--{name.split('.')[0]}", tmp_path / name)]
    wanted = ["--adapters", "ctrl_adjoint", "--num-steps", "3", "6", "--updates", "1", "--num-threads", "1"]
    files = ["--figure", tmp_path / "f.png", "--json", tmp_path / "f.json"]
    command = [sys.executable, "-m", "scripts.benchmark_training", "--config", tmp_path / "config.json", *given, *wanted, *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = io.read_json(tmp_path / "f.json")["recipes"]
    assert [(r["name"], r["num_steps"]) for r in rows] == [(n, s) for s in (3, 6) for n in ("ctrl_adjoint", PUBLISHED)]
    assert (tmp_path / "f.png").stat().st_size > 1000
