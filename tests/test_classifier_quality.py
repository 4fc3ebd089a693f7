"""The reliability diagram of a classifier."""

import io as memory

import torch

from ctrl.classifier_quality import reliability_diagram


def test_reliability_diagram_draws_a_panel_for_each_set():
    log_probs = torch.randn(50, 3).log_softmax(1)
    panel = ({"before": log_probs, "after": log_probs}, torch.randint(0, 3, (50,)))
    figure = reliability_diagram({"val": panel, "generated": panel})
    assert [axes.get_title() for axes in figure.axes] == ["val (n = 50)", "generated (n = 50)"]
    figure.savefig(memory.BytesIO())
