"""Fitting a classifier on real images, and its calibration."""

import math

import numpy as np
import pytest
import torch

from ctrl import metrics, oracles
from ctrl.classifier import Classifier
from ctrl.classifier_fit import calibrate, fit
from ctrl.classifier_quality import evaluate, predict
from ctrl.errors import UserError
from tests.test_heads import describe

SETTINGS = {"num_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}


def test_learns_jpeg_sizes_of_real_images(trained, real):
    """A quarter of the data and of the epochs of the default; with all of them the accuracy is 0.96."""
    classifier, history, labels = trained
    images, scores, splits, _ = real
    val = np.flatnonzero(splits == "val")
    result = evaluate(predict(classifier, images[val]), torch.from_numpy(labels[val]))
    assert result["n"] == 400 and result["after"]["accuracy"] > 0.92 and result["after"]["ece"] < 0.05
    assert result["after"]["nll"] < 0.25 and len(history) == 20 and history[-1]["epoch"] == 19
    mean, scale = classifier.head.location_scale(classifier.outputs(images[val] / 127.5 - 1))
    z = (torch.from_numpy(scores[val]) - mean) / (scale * math.pi / math.sqrt(3))
    assert scale.max() < 0.02 and 0.8 < z.std() < 1.3


def test_mean_follows_the_oracle_on_images_unlike_the_training_images(trained, real):
    """Blurred, faded and noisy images: the reward must point the right way where fine-tuning may lead."""
    images = real[0][2::6][:100] / 127.5 - 1
    torch.manual_seed(0)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    for changed in (blurred, (images + 1) * 0.5 - 1, (images + 0.1 * torch.randn(100, 1, 32, 32)).clamp(-1, 1)):
        sizes = torch.tensor([oracles.jpeg_size_kb(image) for image in oracles.to_pil(changed)])
        mean, _ = trained[0].head.location_scale(trained[0].outputs(changed))
        assert (mean - sizes).abs().mean() < 0.04 and torch.corrcoef(torch.stack([mean, sizes]))[0, 1] > 0.95


def test_steps_along_the_gradient_change_the_real_label(trained, real):
    classifier, _, _ = trained
    x, y = real[0][2::6][:40] / 127.5 - 1, torch.zeros(40, dtype=torch.long)
    before = classifier.log_prob(x, y)
    start = np.array([oracles.jpeg_size_kb(image) for image in oracles.to_pil(x)])
    for _ in range(20):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(classifier.log_prob(x, y, 4.0).sum(), x)
        assert gradient.isfinite().all()
        norms = gradient.flatten(1).norm(dim=1).clamp(min=1e-6)
        x = (x + 0.15 * gradient / norms[:, None, None, None]).detach()
    after = classifier.log_prob(x, y)
    reached = np.array([oracles.jpeg_size_kb(image) for image in oracles.to_pil(x)])
    assert after.mean() > before.mean() and (after > math.log(0.5)).float().mean() > 0.6
    assert reached.mean() > start.mean() + 0.03
    promised = (after.exp() > 0.9).numpy()
    assert (oracles.score_to_label(reached, classifier.description["edges"], True)[promised] == 0).mean() > 0.85


def test_deterministic_and_leaves_the_random_state_alone(real):
    images, scores, splits, edges = (part[:600] if len(part) > 3 else part for part in real)
    labels, few = oracles.score_to_label(scores, edges, True), SETTINGS | {"num_epochs": 2}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    states = [fit(images, scores, labels, splits, describe(edges=edges), few, seed)[0].state() for seed in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize(("network", "head"), [("dct", "softmax"), ("cnn", "density"), ("cnn", "softmax")])
def test_other_networks_and_heads_learn_contrast(network, head):
    torch.manual_seed(0)
    images = (128 + 120 * torch.rand(160, 1, 1, 1) * (2 * torch.rand(160, 3, 8, 8) - 1)).byte()
    scores = images.float().std(dim=(1, 2, 3)).numpy()
    labels = oracles.score_to_label(scores, [35], False)
    assert 0.4 < labels.mean() < 0.6
    description = describe(network, head, num_classes=2, descending=False, edges=[35])
    settings = {"num_epochs": 8 if network == "cnn" else 40, "batch_size": 10, "learning_rate": 3e-3, "weight_decay": 1e-4}
    splits = ["train", "train", "val", "calibration"] * 40
    classifier, _ = fit(images, scores, labels, splits, description, settings, 0)
    result = evaluate(predict(classifier, images[2::4]), torch.from_numpy(labels[2::4]))
    assert result["after"]["accuracy"] > 0.85


def test_the_best_epoch_on_val_is_kept(real):
    """A learning rate that ruins the fit in the second epoch: what is returned is the first."""
    images, scores, splits, edges = (part[:600] if len(part) > 3 else part for part in real)
    labels = oracles.score_to_label(scores, edges, True)
    settings = SETTINGS | {"num_epochs": 4, "learning_rate": 0.3}
    wild, history = fit(images, scores, labels, splits, describe(edges=edges), settings, 0)
    rows = torch.from_numpy(np.flatnonzero(splits == "val"))
    loss = wild.head.loss(wild.outputs(images[rows] / 127.5 - 1), torch.tensor(scores)[rows].float(), torch.from_numpy(labels)[rows])
    assert loss.item() == pytest.approx(min(row["val_loss"] for row in history), abs=1e-3)


def test_missing_split_and_odd_sizes():
    images, scores = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), np.linspace(0, 1, 6)
    with pytest.raises(UserError, match="no image in its split calibration"):
        fit(images, scores, [0] * 6, ["train", "val"] * 3, describe(), SETTINGS, 0)
    with pytest.raises(UserError, match="multiples of 8 pixels, not 12x8; take cnn"):
        odd = torch.zeros(6, 3, 8, 12, dtype=torch.uint8)
        fit(odd, scores, [0] * 6, ["train", "val", "calibration"] * 2, describe(), SETTINGS, 0)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_calibration_undoes_a_wrong_temperature(factor):
    """Labels drawn from softmax(z); a classifier that says softmax(factor z) needs the temperature `factor`."""
    classifier = Classifier(describe(head="softmax"))
    z = 2 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert calibrate(classifier, factor * z, labels) == pytest.approx(factor, rel=0.06)
    assert classifier.temperature.item() == pytest.approx(factor, rel=0.06)
    calibrated = classifier.head.log_probs(factor * z, classifier.temperature, True)
    assert metrics.nll(calibrated, labels) <= metrics.nll((factor * z).log_softmax(1), labels) + 1e-6
    assert metrics.ece(calibrated.exp(), labels) < 0.03


def test_calibration_finds_the_spread_of_a_density():
    classifier = Classifier(describe(edges=[-1.0, 0.0, 1.0]))
    mean = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    scores = mean + 0.5 * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    classifier.head.edges.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    classifier.head.log_scale.data.fill_(math.log(0.1))
    labels = torch.from_numpy(oracles.score_to_label(scores.numpy(), [-1, 0, 1], True))
    assert calibrate(classifier, torch.stack([mean, 0 * mean], dim=1), labels) == pytest.approx(5 * math.sqrt(3) / math.pi, rel=0.1)


def test_calibration_sees_the_calibration_split_alone(real):
    """Other labels on the other splits change the network's weights, but not which rows set the temperature."""
    images, scores, splits, edges = (part[:600] if len(part) > 3 else part for part in real)
    labels, few = oracles.score_to_label(scores, edges, True), SETTINGS | {"num_epochs": 1}
    wrong = np.where(splits == "calibration", labels, 3 - labels)  # the density head learns from scores, not labels
    temperatures = [fit(images, scores, y, splits, describe(edges=edges), few, 0)[0].temperature for y in (labels, wrong)]
    assert torch.equal(*temperatures)


def test_pixels_see_brightness(real):
    images, _, splits, _ = real
    scores = images.float().mean((1, 2, 3)).numpy() / 255
    edges = [float(np.median(scores))]
    description = {"network": "pixels", "head": "density", "num_classes": 2, "descending": False, "edges": edges}
    settings = {"num_epochs": 3, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
    labels = (scores >= edges[0]).astype(int)
    classifier, _ = fit(images, scores, labels, splits, description, settings, seed=0)
    log_probs = predict(classifier, images)["after"]
    assert (log_probs.argmax(1).numpy() == labels).mean() > 0.99
    scale = classifier.head.location_scale(classifier.outputs(images[:50].float() / 127.5 - 1))[1] * classifier.temperature
    assert (scale > 0.9 * classifier.head.MIN_SCALE * classifier.head.score_sd).all(), "no step that nothing climbs"
