"""config/memory: each preset asks for what benchmarks/memory.py computes that its card holds."""

from argparse import Namespace

import pytest
import yaml

from benchmarks.memory import CARDS, MODELS, computed
from ctrl.config import for_adapter
from ctrl.costs import PUBLISHED
from scripts.common import load_config
from tests.repository import ROOT


@pytest.fixture(scope="module")
def fitting():
    name = "Stable Diffusion 1.5"
    return computed(name, MODELS[name])


@pytest.mark.parametrize("card", CARDS)
def test_a_preset_takes_the_largest_batches_that_fit(card, fitting):
    preset = yaml.safe_load((ROOT / f"config/memory/{card}gb.yaml").read_text())
    assert preset["finetune"]["gradient_checkpointing"] == "blocks"
    training, guidance = (fitting[what][f"{card} GB"] for what in ("blocks", "reconstruction guidance"))
    assert preset["finetune"]["micro_batch_size"] == training["micro_batch_size"]
    assert preset["sampler"]["batch_size"] == max(guidance["batch_size"], 1), "none: 0.85 of the card is not enough for one image"
    assert max(training["memory_mb"], guidance["memory_mb"]) <= card * 1e9 / 2**20


@pytest.mark.parametrize("task", ["compressibility", "multitask", "continuous"])
@pytest.mark.parametrize("card", CARDS)
def test_a_preset_lies_over_every_task_and_its_published_recipe(card, task, fitting):
    files = [ROOT / f"config/stable_diffusion/{task}.yaml", ROOT / f"config/memory/{card}gb.yaml"]
    config = load_config(Namespace(config=files))
    settings = config["finetune"]
    assert settings["batch_size"] % settings["micro_batch_size"] == 0 and settings["speed"]["decode_size"] == 1
    published = for_adapter(config, PUBLISHED)["finetune"]
    how = "blocks" if published["gradient_checkpointing"] == "blocks" else "whole passes"
    assert published["gradient_checkpointing"] and published["micro_batch_size"] <= fitting[how][f"{card} GB"]["micro_batch_size"]
