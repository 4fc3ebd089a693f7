"""p(y | x): the head's mathematics, gradients down to the pixels, training on real images, calibration, and files on disk."""

import io as memory
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import logistic
from torch.autograd import gradcheck

from ctrl import classifier as classifiers
from ctrl import data, io, metrics, oracles
from ctrl.classifier import Classifier, interval_log_probs, straight_through
from ctrl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"num_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
EDGES = torch.tensor([-1.0, 0.0, 2.0])


def describe(network: str = "dct", head: str = "density", **more) -> dict:
    return {"network": network, "head": head, "num_classes": 4, "descending": True, "edges": [0.9, 1.0, 1.1]} | more


# ---------------------------------------------------------------------------------------------------------------- pixels


def test_straight_through_is_what_a_file_keeps_and_passes_the_gradient(tmp_path):
    x = (torch.randn(1, 3, 8, 8) * 2).requires_grad_()
    seen = straight_through(x)
    oracles.to_pil(x)[0].save(tmp_path / "x.png")
    assert torch.equal(seen.detach(), data.load_images([tmp_path / "x.png"]) / 127.5 - 1)
    weights = torch.randn_like(seen)
    (seen * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_the_classifier_sees_the_file(trained, real):
    x = real[0][:4] / 127.5 - 1 + 0.003 * torch.randn(4, 3, 32, 32)
    stored = torch.stack([torch.from_numpy(np.array(p)) for p in oracles.to_pil(x)]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(trained[0].log_probs(x), trained[0].log_probs(stored))


# ------------------------------------------------------------------------------------------------------------------ heads


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
    head = classifiers.DensityHead(4)
    head.prepare(torch.tensor([0.0, 2.0]), [0.5, 1.0, 1.5])
    outputs = torch.tensor([[-5.0, 0.0], [5.0, 0.0]])  # in standard deviations (1) around the mean (1)
    head.log_scale.data.fill_(-2)
    one = torch.ones(())
    assert head.log_probs(outputs, one, False).argmax(1).tolist() == [0, 3]
    assert head.log_probs(outputs, one, True).argmax(1).tolist() == [3, 0]
    mean, sd = head.logistic(torch.tensor([[0.5, 0.0], [0.5, 100.0], [0.5, -100.0]]))
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
        mean, scale = classifier.head.logistic(outputs)
        expected = interval_log_probs(mean, 3 * scale, classifier.head.edges).flip(1)
    classifier.temperature.fill_(1.5)
    assert torch.allclose(classifier.log_probs(images, 2.0), expected, atol=1e-5)
    y = torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(classifier.log_prob(images, y, 2.0), classifier.log_probs(images, 2.0)[range(5), y])
    entropies = [-(p.exp() * p).sum(1).mean().item() for p in (classifier.log_probs(images, t) for t in (0.5, 1.0, 4.0))]
    assert head == "density" or entropies == sorted(entropies)


# -------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("head", ["density", "softmax"])
@pytest.mark.parametrize("network", ["dct", "cnn"])
def test_gradient_by_finite_differences(network, head):
    """Without the rounding log p is smooth: its gradient along random directions is its slope."""
    torch.manual_seed(0)
    classifier = Classifier(describe(network, head, num_classes=3, edges=[0.4, 0.6])).double()
    classifier.rounding = False
    for p in classifier.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    if network == "dct":
        classifier.network.scale.fill_(0.1)
        classifier.network.bound.fill_(0.5)
    if head == "density":
        classifier.head.edges.copy_(torch.tensor([0.4, 0.6]))
    images, y, h = torch.rand(2, 3, 8, 8).double() * 1.6 - 0.8, torch.tensor([0, 2]), 1e-6
    classifier.outputs = lambda x: classifier.network(classifier.network.features(x))  # stays in double precision
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier.log_prob(x, y).sum(), x)
    for _ in range(5):
        v = torch.randn_like(images)
        with torch.no_grad():
            slope = (classifier.log_prob(images + h * v, y) - classifier.log_prob(images - h * v, y)).sum() / (2 * h)
        assert (gradient * v).sum().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("head", ["density", "softmax"])
def test_clip(tmp_path, head, tiny_clip):
    description = describe("clip", head, clip={"model": tiny_clip, "pretrained": None})
    images = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8)
    scores = images.float().mean(dim=(1, 2, 3)).numpy() / 255
    edges = np.quantile(scores, [0.25, 0.5, 0.75]).tolist()
    labels = oracles.score_to_label(scores, edges, True)
    classifier, _ = classifiers.fit(
        images,
        scores,
        labels,
        ["train", "train", "val", "calibration"] * 10,
        description | {"edges": edges},
        SETTINGS | {"num_epochs": 2},
        0,
    )
    x = (images[:2] / 127.5 - 1).requires_grad_()
    embedding = classifier.network.features(x)
    assert embedding.shape == (2, 24) and torch.allclose(embedding.norm(dim=1), torch.ones(2))
    classifier.log_prob(x, torch.tensor([0, 3])).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    classifiers.save(tmp_path / "out", classifier)
    assert not any("clip" in k for k in io.load_tensors(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(classifiers.load(tmp_path / "out").log_probs(x), classifier.log_probs(x))


# --------------------------------------------------------------------------------------------------------------- training


def test_learns_jpeg_sizes_of_real_images(trained, real):
    """A quarter of the data and of the epochs of the default; with all of them the accuracy is 0.96."""
    classifier, history, labels = trained
    images, scores, splits, _ = real
    val = np.flatnonzero(splits == "val")
    result = classifiers.evaluate(classifiers.predict(classifier, images[val]), torch.from_numpy(labels[val]))
    assert result["n"] == 400 and result["after"]["accuracy"] > 0.92 and result["after"]["ece"] < 0.05
    assert result["after"]["nll"] < 0.25 and len(history) == 20 and history[-1]["epoch"] == 19
    mean, scale = classifier.head.logistic(classifier.outputs(images[val] / 127.5 - 1))
    z = (torch.from_numpy(scores[val]) - mean) / (scale * math.pi / math.sqrt(3))
    assert scale.max() < 0.02 and 0.8 < z.std() < 1.3


def test_mean_follows_the_oracle_on_images_unlike_the_training_images(trained, real):
    """Blurred, faded and noisy images: the reward must point the right way where fine-tuning may lead."""
    images = real[0][2::6][:100] / 127.5 - 1
    torch.manual_seed(0)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    for changed in (blurred, (images + 1) * 0.5 - 1, (images + 0.1 * torch.randn(100, 1, 32, 32)).clamp(-1, 1)):
        sizes = torch.tensor([oracles.jpeg_size_kb(image) for image in oracles.to_pil(changed)])
        mean, _ = trained[0].head.logistic(trained[0].outputs(changed))
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
    states = [classifiers.fit(images, scores, labels, splits, describe(edges=edges), few, seed)[0].state() for seed in (3, 3, 4)]
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
    classifier, _ = classifiers.fit(images, scores, labels, splits, description, settings, 0)
    result = classifiers.evaluate(classifiers.predict(classifier, images[2::4]), torch.from_numpy(labels[2::4]))
    assert result["after"]["accuracy"] > 0.85


def test_the_best_epoch_on_val_is_kept(real):
    """A learning rate that ruins the fit in the second epoch: what is returned is the first."""
    images, scores, splits, edges = (part[:600] if len(part) > 3 else part for part in real)
    labels = oracles.score_to_label(scores, edges, True)
    settings = SETTINGS | {"num_epochs": 4, "learning_rate": 0.3}
    wild, history = classifiers.fit(images, scores, labels, splits, describe(edges=edges), settings, 0)
    rows = torch.from_numpy(np.flatnonzero(splits == "val"))
    loss = wild.head.loss(wild.outputs(images[rows] / 127.5 - 1), torch.tensor(scores)[rows].float(), torch.from_numpy(labels)[rows])
    assert loss.item() == pytest.approx(min(row["val_loss"] for row in history), abs=1e-3)


def test_missing_split_and_odd_sizes():
    images, scores = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), np.linspace(0, 1, 6)
    with pytest.raises(UserError, match="no image in its split calibration"):
        classifiers.fit(images, scores, [0] * 6, ["train", "val"] * 3, describe(), SETTINGS, 0)
    with pytest.raises(UserError, match="multiples of 8 pixels, not 12x8; take cnn"):
        odd = torch.zeros(6, 3, 8, 12, dtype=torch.uint8)
        classifiers.fit(odd, scores, [0] * 6, ["train", "val", "calibration"] * 2, describe(), SETTINGS, 0)


# ------------------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_calibration_undoes_a_wrong_temperature(factor):
    """Labels drawn from softmax(z); a classifier that says softmax(factor z) needs the temperature `factor`."""
    classifier = Classifier(describe(head="softmax"))
    z = 2 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert classifiers.calibrate(classifier, factor * z, labels) == pytest.approx(factor, rel=0.06)
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
    assert classifiers.calibrate(classifier, torch.stack([mean, 0 * mean], dim=1), labels) == pytest.approx(
        5 * math.sqrt(3) / math.pi, rel=0.1
    )


def test_calibration_sees_the_calibration_split_alone(real):
    """Other labels on the other splits change the network's weights, but not which rows set the temperature."""
    images, scores, splits, edges = (part[:600] if len(part) > 3 else part for part in real)
    labels, few = oracles.score_to_label(scores, edges, True), SETTINGS | {"num_epochs": 1}
    wrong = np.where(splits == "calibration", labels, 3 - labels)  # the density head learns from scores, not labels
    temperatures = [classifiers.fit(images, scores, y, splits, describe(edges=edges), few, 0)[0].temperature for y in (labels, wrong)]
    assert torch.equal(*temperatures)


# ---------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def saved(trained, tmp_path):
    classifiers.save(tmp_path / "classifier", trained[0])
    return tmp_path / "classifier"


def test_saved_and_loaded(saved, trained, real):
    loaded = classifiers.load(saved)
    x = real[0][:8] / 127.5 - 1
    assert torch.equal(loaded.log_probs(x), trained[0].log_probs(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    config = io.read_json(saved / "config.json")
    assert config["network"] == "dct" and config["temperature"] == pytest.approx(trained[0].temperature.item())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def describe_as(folder: Path, **changed) -> None:
    io.write_json(folder / "config.json", io.read_json(folder / "config.json") | changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is corrupt"),
        (lambda f: (f / "config.json").write_text("[]"), "corrupt or of another version"),
        (lambda f: (f / "config.json").write_text('{"network": "dct"}'), "corrupt or of another version"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is corrupt"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]), "model.safetensors is corrupt"),
        (lambda f: flip_a_bit(f / "model.safetensors"), "its weights are not those that config.json names"),
        (lambda f: describe_as(f, network="cnn"), "another version .*network.linear.weight"),
        (lambda f: describe_as(f, head="softmax"), "another version .*size mismatch"),
        (lambda f: describe_as(f, num_classes=3), "another version .*size mismatch"),
        (lambda f: describe_as(f, network="x"), "another version .'x'"),
    ],
)
def test_load_refuses(saved, change, message):
    change(saved)
    with pytest.raises(UserError, match=message) as refused:
        classifiers.load(saved)
    assert str(saved) in str(refused.value)


def test_reliability_diagram_draws_a_panel_for_each_set():
    log_probs = torch.randn(50, 3).log_softmax(1)
    panel = ({"before": log_probs, "after": log_probs}, torch.randint(0, 3, (50,)))
    figure = classifiers.reliability_diagram({"val": panel, "generated": panel})
    assert [axes.get_title() for axes in figure.axes] == ["val (n = 50)", "generated (n = 50)"]
    figure.savefig(memory.BytesIO())


@pytest.fixture
def pair():
    """Two classifiers with random weights: sizes in three bins, brightness in two."""
    torch.manual_seed(0)
    size = {"network": "dct", "head": "softmax", "num_classes": 3, "descending": True, "edges": [1.0, 1.2]}
    shade = {"network": "pixels", "head": "density", "num_classes": 2, "descending": False, "edges": [0.5]}
    parts = [classifiers.Classifier(size), classifiers.Classifier(shade)]
    for part in parts:
        for p in part.parameters():
            p.data.normal_(std=0.1)
    return classifiers.Product(parts).eval().requires_grad_(False)


def test_a_product_multiplies_the_factors_that_are_set(pair, tmp_path):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    size, shade = (factor.log_probs(images, 2.0) for factor in pair.factors)
    joint = pair.log_probs(images, 2.0)
    assert torch.allclose(joint.exp().sum(1), torch.ones(4))
    codes = pair.space.check([(2, 1), (2, None), (None, 1), None])
    expected = torch.stack([size[0, 2] + shade[0, 1], size[1, 2], shade[2, 1], torch.tensor(0.0)])
    assert torch.allclose(pair.log_prob(images, codes, 2.0), expected) and torch.allclose(joint[0, 5], expected[0])
    free = pair.space.covers[codes[1]]
    assert torch.allclose(joint[1, free].exp().sum().log(), expected[1]), "the margin of the joint law"
    classifiers.save(tmp_path, pair)
    assert torch.equal(classifiers.load(tmp_path).log_probs(images), pair.log_probs(images))


def test_pixels_see_brightness(real):
    images, _, splits, _ = real
    scores = images.float().mean((1, 2, 3)).numpy() / 255
    edges = [float(np.median(scores))]
    description = {"network": "pixels", "head": "density", "num_classes": 2, "descending": False, "edges": edges}
    settings = {"num_epochs": 3, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
    labels = (scores >= edges[0]).astype(int)
    classifier, _ = classifiers.fit(images, scores, labels, splits, description, settings, seed=0)
    log_probs = classifiers.predict(classifier, images)["after"]
    assert (log_probs.argmax(1).numpy() == labels).mean() > 0.99
    scale = classifier.head.logistic(classifier.outputs(images[:50].float() / 127.5 - 1))[1] * classifier.temperature
    assert (scale > 0.9 * classifier.head.MIN_SCALE * classifier.head.score_sd).all(), "no step that nothing climbs"
