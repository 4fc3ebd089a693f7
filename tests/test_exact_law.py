"""The pretrained model's images, weighted: cases known by hand."""

import math

import pytest
import torch

from scripts.exact_law import weighted

HITS = torch.tensor([True, False, True, False])


def test_no_weight_is_the_pretrained_law():
    assert weighted(torch.tensor([-1.0, -2.0, -3.0, -4.0]), HITS, 0.0) == pytest.approx((0.5, 0.0, 4.0))


def test_certain_labels():
    """Half of the images have the label: their law is log 2 away."""
    log_p = torch.where(HITS, 0.0, -1000.0)
    assert weighted(log_p, HITS, 1.0) == pytest.approx((1.0, math.log(2), 2.0))


def test_gamma_is_a_power():
    """Weights 1/2 and 1/4 to the power of 2: shares 4/5 and 1/5."""
    log_p = torch.tensor([0.5, 0.25]).log()
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert weighted(log_p, HITS[:2], 2.0) == pytest.approx((0.8, kl, 1 / (0.64 + 0.04)))
