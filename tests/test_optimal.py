"""The best control in one dimension: against cases known by hand, and the exact law that it comes to with many steps."""

import math

import pytest
import torch

from ctrl.optimal import best_control, log_interval
from ctrl.process import Process

GRID = torch.linspace(-6, 6, 1201, dtype=torch.float64)


def process_of(num_steps):
    """Even in log-SNR; the last step's noise is wider than a cell of the grid."""
    abar = torch.sigmoid(torch.linspace(-9, 5, num_steps + 1, dtype=torch.float64))
    return Process(torch.arange(num_steps).flip(0), abar[:-1], abar[1:])


def test_a_linear_reward_shifts_the_mean_at_any_number_of_steps():
    """Tilting N(0, v) by exp(gamma x) shifts it by gamma v, which Gaussian steps can do, at a KL of gamma² v / 2."""
    for num_steps in (3, 12):
        best = best_control(process_of(num_steps), lambda x: x, 0.7, [True] * num_steps, GRID)
        v = (best["pretrained"] @ GRID.square()).item()
        for law, kl in (("controlled", "kl"), ("exact", "exact_kl")):
            assert best[law] @ GRID == pytest.approx(0.7 * v, abs=0.02)
            assert best[kl] == pytest.approx(0.5 * 0.49 * v, abs=0.02)


def test_without_active_steps_it_is_the_pretrained_model():
    best = best_control(process_of(5), lambda x: log_interval(x, 0.3, 0.8, 0.05), 3.0, [False] * 5, GRID)
    assert torch.equal(best["controlled"], best["pretrained"]) and best["kl"] == 0


def test_more_steps_come_nearer_to_the_exact_law():
    inside = (GRID >= 0.3) & (GRID < 0.9)
    free, accuracy = [], []
    for num_steps in (4, 12, 40):
        process = process_of(num_steps)
        best = best_control(process, lambda x: log_interval(x, 0.3, 0.9, 0.05), 3.0, [True] * num_steps, GRID)
        accuracy.append(best["controlled"][inside].sum().item())
        log_p = log_interval(GRID, 0.3, 0.9, 0.05)
        free.append(best["kl"] - 3 * (best["controlled"] @ log_p).item() - (best["exact_kl"] - 3 * (best["exact"] @ log_p).item()))
    assert accuracy[0] < accuracy[1] < accuracy[2] and accuracy[2] > 0.9
    assert free[0] > free[1] > free[2] > -0.01, "the loss has its minimum at the exact law, which no policy undercuts"


def test_log_interval_is_the_logarithm_of_a_difference_of_logistic_functions():
    x = torch.tensor([-1.0, 0.31, 0.5, 0.8, 1.2], dtype=torch.float64)
    expected = (torch.sigmoid((0.75 - x) / 0.1) - torch.sigmoid((0.3 - x) / 0.1)).log()
    assert torch.allclose(log_interval(x, 0.3, 0.75, 0.1), expected)
    assert math.isfinite(log_interval(torch.tensor([50.0]).double(), 0.3, 0.75, 0.01).item())
