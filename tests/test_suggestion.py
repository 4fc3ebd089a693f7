"""Settings that follow from what was measured: hand-computed, and a fragment that a config takes."""

import pytest
import torch
import yaml

from ctrl import io, suggestion
from ctrl.config import merge, resolve
from scripts.common import DEFAULTS, SCHEMA, read_yaml

CONFIG = resolve(read_yaml(DEFAULTS), io.read_json(SCHEMA))


def cost(trainer="backprop", size=8, memory=900.0, before=100.0, **others) -> dict:
    settings = {"batch_size": 8, "micro_batch_size": size, "gradient_checkpointing": False, "reuse": 2, "seconds_per_update": 1.0}
    return settings | {"trainer": trainer, "memory_mb": memory, "measured_memory_mb": memory, "memory_before_mb": before} | others


def test_the_largest_micro_batch_that_fits():
    # 100 MB, and 100 more for each trajectory; four fifths of the free memory may be filled
    assert suggestion.fitting(cost(), 1200) == 8 and suggestion.fitting(cost(), 1100) == 4
    assert suggestion.fitting(cost(), 251) == 1 and suggestion.fitting(cost(), 249) is None
    assert suggestion.fitting(cost(size=2, memory=300.0), 1200) == 8 and suggestion.fitting(cost(size=2), None) == 2


def chosen(costs, free, dull=False) -> dict:
    settings = suggestion.trainer_and_memory(costs, free, dull)
    text = suggestion.fragment(settings, CONFIG["adapters"])
    resolve(merge(CONFIG, {"finetune": {"batch_size": 8, "truncation": [1, 2]}}, yaml.safe_load(text)), io.read_json(SCHEMA))
    assert all(f"# {s.reason}" in text for s in settings)
    return yaml.safe_load(text)["finetune"]


def test_the_trainer_that_fits():
    light, heavy = cost("adjoint", 8, 260.0), cost("backprop", 8, 90_000.0)
    recomputed = cost("backprop", 8, 400.0, gradient_checkpointing=True)
    found = chosen({"backprop": cost(), "adjoint": light}, 2000)
    assert found == {"trainer": "backprop", "micro_batch_size": 8, "gradient_checkpointing": False}
    assert chosen({"backprop": heavy, "backprop, recomputed": recomputed, "adjoint": light}, 2000)["gradient_checkpointing"] is True
    by_blocks = {"backprop, recomputed": heavy, "backprop, by blocks": cost("backprop", 8, 400.0, gradient_checkpointing="blocks")}
    assert chosen({"backprop": heavy, **by_blocks, "adjoint": light}, 2000)["gradient_checkpointing"] == "blocks"
    found = chosen({"backprop": heavy, "adjoint": light}, 2000)
    assert found["trainer"] == "adjoint" and found["truncation"] is None
    killed = chosen({"backprop": {"error": "its process was killed"}, "adjoint": light}, 2000)
    assert killed["trainer"] == "adjoint"
    found = chosen({"backprop": cost(), "policy_gradient": cost("policy_gradient", reuse=2)}, 2000, dull=True)
    assert found["trainer"] == "policy_gradient" and found["checkpoint_every"] == 26
    assert suggestion.trainer_and_memory({}, 2000, False) == [] and suggestion.fragment([], CONFIG["adapters"]) == ""


def test_what_is_tried_where_a_training_does_not_fit():
    def tried(level, compiled=False):
        found = suggestion.recomputed({"gradient_checkpointing": level, "speed": {"compile": compiled}})
        return [settings["gradient_checkpointing"] for settings in found.values()]

    assert tried(False) == [True, "blocks"] and tried(True) == ["blocks"] and tried("blocks") == [] and tried(False, "gpu") == [True]


def test_too_much_memory_is_a_line_with_the_setting_to_lower():
    assert suggestion.memory_text("backprop", cost(), 1000) is None and suggestion.memory_text("backprop", cost(), None) is None
    line = suggestion.memory_text("backprop", cost(), 500)
    assert "takes 900 MB for 8 at a time, 500 MB are free" in line
    assert "lower finetune.micro_batch_size (8) or set finetune.gradient_checkpointing: true" in line
    again = suggestion.memory_text("backprop", cost("backprop", 8, 900.0, gradient_checkpointing=True), 500)
    assert again.endswith("(8) or set finetune.gradient_checkpointing: blocks")
    assert "lower finetune.micro_batch_size (8)" in suggestion.memory_text("supervised", cost("supervised"), 500)


def test_the_bound_is_the_median_of_those_that_pull():
    g = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 400.0]])
    assert suggestion.max_adjoint_norm({"adjoint": g}).value == "2"
    assert suggestion.max_adjoint_norm({"adjoint": torch.zeros(2, 3)}).value == "null"


def test_softening_stops_where_the_missing_reward_is_affordable():
    def stake(at_one):
        return suggestion.stakes(lambda temperature: torch.full((4,), -at_one / temperature), torch.full((4,), -1.0), 10.0)

    # gamma (log p of a guess + at_one / T) at T = 10 start, never below 1
    assert stake(40.0)[1.0] == pytest.approx(10 * (40 / 10 - 1)) and stake(40.0)[0.1] == pytest.approx(10 * (40 - 1))
    assert suggestion.temperature_start(stake(40.0), 10.0).value == "{start: 2}"
    assert suggestion.temperature_start(stake(0.5), 10.0).value == f"{{start: {suggestion.STARTS[0]:g}}}"
    assert suggestion.temperature_start(stake(1e6), 10.0).value == f"{{start: {suggestion.STARTS[-1]:g}}}"
