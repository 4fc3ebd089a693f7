"""benchmarks/jacobian.py: the guided model on a mixture, its exact answer by rejection, and a table that has every trainer."""

import pytest
import torch

from benchmarks.jacobian import TRAINERS, exact, measure, models
from ctrl.config import merge
from ctrl.errors import UserError
from ctrl.mixture import GaussianMixture, SoftmaxLinear, process_of
from ctrl.proof import Problem
from scripts.common import DEFAULTS, read_yaml


@pytest.fixture
def problem(tmp_path):
    config = merge(read_yaml(DEFAULTS), read_yaml(DEFAULTS.parent / "mixture.yaml"))
    mixture = GaussianMixture.from_config(*(config["base"][key] for key in ("weights", "means", "covariances")))
    label, moments = SoftmaxLinear.from_config(config["label"]["weight"], config["label"]["bias"], mixture.dim), mixture.moments()
    settings = config["finetune"] | {"num_updates": 2, "control_variate": False, "batch_size": 16}
    return Problem(mixture.affine(*moments), label.affine(*moments), 8, settings, 0, tmp_path)


def test_a_scale_of_one_is_the_prompt_alone_and_others_are_not(problem):
    process, x_t = process_of(problem.mixture, 8), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for scale, equal in ((1.0, True), (3.0, False)):
        guided, prompted = models(problem.mixture, process, scale)
        assert torch.allclose(guided(x_t, 4), prompted(x_t, 4), atol=1e-5) is equal


def test_exact_samples_have_the_label_and_a_rare_one_is_refused(problem):
    process = process_of(problem.mixture, 8)
    pre = models(problem.mixture, process, 3.0)[0]
    for y, part in enumerate(exact(problem, pre, process, 8.0, 100, 0)):
        assert part.shape == (100, 2) and problem.label.log_probs(part)[:, y].exp().mean() > 0.9
    with pytest.raises(UserError, match="too rare"):
        exact(problem, pre, process, 1e6, 10**6, 0)


def test_a_row_for_each_trainer(problem):
    rows = measure(problem, 3.0, 1.0, 50)
    assert [row["trainer"] for row in rows] == list(TRAINERS)
    assert all(row["floors"] > 0 and row["se"] > 0 and row["n"] == 150 for row in rows)
    assert rows[1]["kl"] != rows[2]["kl"], "another Jacobian teaches something else"
