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
    return computed(name, MODELS[name])


@pytest.mark.parametrize("card", CARDS)
def test_a_preset_takes_the_largest_batches_that_fit(card, fitting):
    preset = yaml.safe_load((ROOT / f"config/memory/{card}gb.yaml").read_text())
    assert preset["finetune"]["gradient_checkpointing"] == "blocks"
    training, guidance = (fitting[what][f"{card} GB"] for what in ("blocks", "reconstruction guidance"))
    assert preset["finetune"]["micro_batch_size"] == training["micro_batch_size"]
    assert preset["sampler"]["batch_size"] == guidance["batch_size"]
    assert max(training["memory_mb"], guidance["memory_mb"]) <= card * 1e9 / 2**20


@pytest.mark.parametrize("task", ["compressibility", "multitask", "continuous"])
@pytest.mark.parametrize("card", CARDS)
def test_a_preset_lies_over_every_task(card, task):
    files = [ROOT / f"config/stable_diffusion/{task}.yaml", ROOT / f"config/memory/{card}gb.yaml"]
    settings = load_config(Namespace(config=files))["finetune"]
    assert settings["batch_size"] % settings["micro_batch_size"] == 0 and settings["speed"]["decode_size"] == 1
