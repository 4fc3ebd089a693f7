"""The reliability diagram of a classifier."""

import io as memory
from pathlib import Path

import torch

from ctrl.classifier_quality import reliability_diagram

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"num_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
EDGES = torch.tensor([-1.0, 0.0, 2.0])


def describe(network: str = "dct", head: str = "density", **more) -> dict:
    return {"network": network, "head": head, "num_classes": 4, "descending": True, "edges": [0.9, 1.0, 1.1]} | more


def test_reliability_diagram_draws_a_panel_for_each_set():
    log_probs = torch.randn(50, 3).log_softmax(1)
    panel = ({"before": log_probs, "after": log_probs}, torch.randint(0, 3, (50,)))
    figure = reliability_diagram({"val": panel, "generated": panel})
    assert [axes.get_title() for axes in figure.axes] == ["val (n = 50)", "generated (n = 50)"]
    figure.savefig(memory.BytesIO())
