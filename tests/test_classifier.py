"""p(y | x): what of a picture it sees, gradients down to the pixels, several factors, files on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctrl import classifier as classifiers
from ctrl import io, oracles, pictures
from ctrl.classifier import Classifier, straight_through
from ctrl.classifier_fit import fit
from ctrl.errors import UserError
from tests.test_heads import describe
from tests.test_labels import WRONG_CODES

SETTINGS = {"num_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}


def test_straight_through_is_what_a_file_keeps_and_passes_the_gradient(tmp_path):
    x = (torch.randn(1, 3, 8, 8) * 2).requires_grad_()
    seen = straight_through(x)
    oracles.to_pil(x)[0].save(tmp_path / "x.png")
    assert torch.equal(seen.detach(), pictures.load_images([tmp_path / "x.png"]) / 127.5 - 1)
    weights = torch.randn_like(seen)
    (seen * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_the_classifier_sees_the_file(trained, real):
    x = real[0][:4] / 127.5 - 1 + 0.003 * torch.randn(4, 3, 32, 32)
    stored = torch.stack([torch.from_numpy(np.array(p)) for p in oracles.to_pil(x)]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(trained[0].log_probs(x), trained[0].log_probs(stored))


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
    classifier, _ = fit(
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
    pair.weights = [1.0, 2.0]
    assert torch.allclose(pair.log_prob(images, codes, 2.0)[::2], torch.stack([size[0, 2] + 2 * shade[0, 1], 2 * shade[2, 1]]))
    classifiers.save(tmp_path, pair)
    assert torch.equal(classifiers.load(tmp_path).log_probs(images), pair.log_probs(images))


@pytest.mark.parametrize(("codes", "says"), WRONG_CODES)
def test_wrong_labels_are_one_line(codes, says):
    """One factor of three labels; of a product's 4 + 1 + 4 codes every wrong one here is wrong too, but 3."""
    one, images = Classifier(describe() | {"num_classes": 3}), torch.zeros(2, 3, 16, 16)
    with pytest.raises(UserError, match=says):
        one.log_prob(images, codes)
    both = classifiers.Product([Classifier(describe() | {"num_classes": 2}) for _ in range(2)])
    if torch.is_tensor(codes) and codes.tolist() == [0, 3]:
        codes, says = torch.tensor([0, 9]), "no label 9: the labels' codes are 0 to 8"
    with pytest.raises(UserError, match=says):
        both.log_prob(images, codes)
