"""config/memory: each preset asks for what benchmarks/memory.py computes that its card holds."""

from argparse import Namespace

import pytest
import yaml

from benchmarks.memory import CARDS, MODELS, computed
from scripts.common import load_config
from tests.repository import ROOT


@pytest.fixture(scope="module")
def fitting():
    name = "Stable Diffusion 1.5"
    return computed(name, MODELS[name])["blocks"]


@pytest.mark.parametrize("card", CARDS)
def test_a_preset_takes_the_largest_micro_batch_that_fits(card, fitting):
    preset = yaml.safe_load((ROOT / f"config/memory/{card}gb.yaml").read_text())
    assert preset["finetune"]["gradient_checkpointing"] == "blocks"
    assert preset["finetune"]["micro_batch_size"] == fitting[f"{card} GB"]["micro_batch_size"]
    assert fitting[f"{card} GB"]["memory_mb"] <= card * 1e9 / 2**20


@pytest.mark.parametrize("task", ["compressibility", "multitask", "continuous"])
@pytest.mark.parametrize("card", CARDS)
def test_a_preset_lies_over_every_task(card, task):
    files = [ROOT / f"config/stable_diffusion/{task}.yaml", ROOT / f"config/memory/{card}gb.yaml"]
    settings = load_config(Namespace(config=files))["finetune"]
    assert settings["batch_size"] % settings["micro_batch_size"] == 0 and settings["speed"]["decode_size"] == 1
