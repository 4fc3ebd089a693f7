"""A head's label probabilities: intervals of the logistic law, their tails and gradients."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import logistic
from torch.autograd import gradcheck

from ctrl.classifier import Classifier
from ctrl.heads import DensityHead, interval_log_probs

EDGES = torch.tensor([-1.0, 0.0, 2.0])


def describe(network: str = "dct", head: str = "density", **more) -> dict:
    return {"network": network, "head": head, "num_classes": 4, "descending": True, "edges": [0.9, 1.0, 1.1]} | more


def test_interval_probabilities_are_differences_of_the_logistic_distribution_function():
    mean, sd = torch.linspace(-3, 3, 13).double(), torch.linspace(0.2, 2, 13).double()
    cdf = logistic.cdf(EDGES.numpy()[None], mean.numpy()[:, None], sd.numpy()[:, None])
    expected = np.diff(np.pad(cdf, ((0, 0), (1, 1)), constant_values=(0, 1)), axis=1)
    log_probs = interval_log_probs(mean, sd, EDGES)
    np.testing.assert_allclose(log_probs.exp().numpy(), expected, atol=1e-12)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(13).double())


@pytest.mark.parametrize("distance", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_far_tails_have_finite_useful_gradients(distance, side):
    """d scales outside of a bin, log p is about -d and its slope 1 / scale towards the bin, however far."""
    edge = EDGES[-1] if side > 0 else EDGES[0]
    mean, sd = (edge + side * 0.1 * distance).reshape(1).requires_grad_(), torch.full((1,), 0.1)
    log_probs = interval_log_probs(mean, sd, EDGES)
    assert log_probs.isfinite().all()
    for k in range(4):
        (slope,) = torch.autograd.grad(log_probs[0, k], mean, retain_graph=True)
        d = float((mean.detach() - (EDGES[k] if side > 0 else EDGES[k - 1])) / 0.1) if (k < 3 if side > 0 else k > 0) else 0.0
        assert slope.item() == pytest.approx(-side / 0.1 if d else 0.0, rel=0.01, abs=1e-6)
        if d:
            assert log_probs[0, k].item() == pytest.approx(-abs(d), rel=0.05)


def test_gradient_of_the_intervals_by_finite_differences():
    mean, sd = torch.tensor([-30.0, -1.0, 0.5, 1.9, 40.0]).double(), torch.tensor([0.5, 1.0, 0.1, 2.0, 3.0]).double()
    assert gradcheck(lambda m, s: interval_log_probs(m, s, EDGES), (mean.requires_grad_(), sd.requires_grad_()), atol=1e-4, rtol=1e-5)


def test_narrow_bins_stay_finite():
    mean = torch.tensor([0.0, 5.0, -80.0]).requires_grad_()
    log_probs = interval_log_probs(mean, torch.ones(3), torch.tensor([0.0, 1e-6, 1e-5]))
    log_probs.sum().backward()
    assert log_probs.isfinite().all() and mean.grad.isfinite().all()
    assert log_probs[0, 1].exp().item() == pytest.approx(1e-6 / 4, rel=1e-2)


def test_labels_count_from_the_highest_score_where_descending():
    head = DensityHead(4)
    head.prepare(torch.tensor([0.0, 2.0]), [0.5, 1.0, 1.5])
    outputs = torch.tensor([[-5.0, 0.0], [5.0, 0.0]])  # in standard deviations (1) around the mean (1)
    head.log_scale.data.fill_(-2)
    one = torch.ones(())
    assert head.log_probs(outputs, one, False).argmax(1).tolist() == [0, 3]
    assert head.log_probs(outputs, one, True).argmax(1).tolist() == [3, 0]
    mean, sd = head.location_scale(torch.tensor([[0.5, 0.0], [0.5, 100.0], [0.5, -100.0]]))
    assert mean.tolist() == [1.5] * 3 and torch.allclose(sd / math.exp(-2), torch.tensor([1.0, 2.0, 0.5]))


@pytest.mark.parametrize("head", ["density", "softmax"])
def test_temperature_softens(head):
    torch.manual_seed(0)
    classifier = Classifier(describe(head=head))
    with torch.no_grad():
        for p in classifier.parameters():
            p.normal_(0, 0.3)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    outputs = classifier.outputs(images)
    if head == "softmax":
        expected = torch.log_softmax(outputs / 3, dim=1)
    else:
        mean, scale = classifier.head.location_scale(outputs)
        expected = interval_log_probs(mean, 3 * scale, classifier.head.edges).flip(1)
    classifier.temperature.fill_(1.5)
    assert torch.allclose(classifier.log_probs(images, 2.0), expected, atol=1e-5)
    y = torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(classifier.log_prob(images, y, 2.0), classifier.log_probs(images, 2.0)[range(5), y])
    entropies = [-(p.exp() * p).sum(1).mean().item() for p in (classifier.log_probs(images, t) for t in (0.5, 1.0, 4.0))]
    assert head == "density" or entropies == sorted(entropies)
