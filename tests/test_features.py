"""The independent networks: the shipped garment classifier, its training, its mistakes, and open_clip as the alternative."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ctrl import features
from ctrl.errors import UserError
from ctrl.garments import GARMENTS, read_idx

ROOT = Path(__file__).resolve().parent.parent
GARMENT_FOLDER = ROOT / "resources/garments"


@pytest.fixture(scope="module")
def network():
    return features.load(GARMENT_FOLDER)


@pytest.fixture(scope="module")
def images():
    pixels, labels = read_idx(ROOT / "resources/fashion-mnist", "t10k")
    return pixels[:1000].contiguous(), labels[:1000]


def test_the_shipped_network_names_real_test_images(network, images):
    config = json.loads((GARMENT_FOLDER / "config.json").read_text())
    assert config["accuracy"] >= 0.91 and config["num_test"] == 10_000
    hits = features.count_correct(network, *images)
    assert hits / 1000 == pytest.approx(config["accuracy"], abs=0.03)
    assert network.subjects == GARMENTS
    assert sum(path.stat().st_size for path in GARMENT_FOLDER.iterdir()) < 2e6
    assert f"{config['accuracy']:.4f}" in (GARMENT_FOLDER / "README.md").read_text()


def test_shapes_and_batches(network, images):
    x = images[0][:7].float() / 127.5 - 1
    assert network.features(x).shape == (7, 128) and network.prompt_logits(x).shape == (7, 10)
    subjects = [GARMENTS[y] for y in images[1][:7]]
    all_at_once = features.compute(network, images[0][:7], subjects, subjects)
    in_batches = features.compute(network, images[0][:7], subjects, subjects, batch_size=3)
    for a, b in zip(all_at_once, in_batches, strict=True):
        torch.testing.assert_close(a, b)
    assert all_at_once[1].tolist() == (network.prompt_logits(x).argmax(1) == images[1][:7]).float().tolist()


def test_grey_images_of_one_or_three_channels_are_alike_and_gradients_reach_the_pixels(network, images):
    x = (images[0][:4].float() / 127.5 - 1).requires_grad_()
    torch.testing.assert_close(network.features(x), network.features(x[:, :1]))
    network.prompt_logits(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())


def test_training_learns_saves_and_loads(tmp_path, images):
    torch.manual_seed(0)
    net, rows = features.GarmentNet(GARMENTS, [8, 8, 16]), []
    half = (images[0][:500], images[1][:500])
    features.fit(net, *half, num_epochs=5, batch_size=50, learning_rate=1e-2, seed=0, log=lambda *row: rows.append(row))
    assert len(rows) == 5 and rows[-1][1] < rows[0][1] and features.count_correct(net, *half) > 200
    features.save(net, tmp_path, {"accuracy": 0.5})
    again = features.load(tmp_path)
    x = images[0][:20].float() / 127.5 - 1
    torch.testing.assert_close(again.prompt_logits(x), net.prompt_logits(x), atol=0.05, rtol=0.05)


def test_augmentation_moves_and_erases():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(50, 1, 8, 8) / 64
    out = features.augment(images, torch.Generator().manual_seed(0), max_shift=1, erase_probability=0.0)
    shifts = {tuple((out[k, 0] == images[0, 0, 3, 3]).nonzero()[0].tolist()) for k in range(50)}
    assert shifts == {(a, b) for a in (2, 3, 4) for b in (2, 3, 4)}
    erased = features.augment(images, torch.Generator().manual_seed(0), max_shift=0, erase_probability=1.0)
    assert ((erased == -1).sum(dim=(1, 2, 3)) == 4).all()
    assert torch.equal(features.augment(images, torch.Generator(), max_shift=0, erase_probability=0.0), images)


def test_mistakes(tmp_path, network):
    with pytest.raises(UserError, match=r"no config\.json"):
        features.load(tmp_path)
    with pytest.raises(UserError, match="does not know the subject 'hat'"):
        network.prompt_scores(torch.zeros(1, 3, 32, 32), ["hat"], ["a hat"])
    shutil.copytree(GARMENT_FOLDER, tmp_path / "corrupt")
    (tmp_path / "corrupt/model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        features.load(tmp_path / "corrupt")
    config = json.loads((GARMENT_FOLDER / "config.json").read_text())
    shutil.copytree(GARMENT_FOLDER, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"widths": [16, 32]}))
    with pytest.raises(UserError, match="does not hold a garment classifier"):
        features.load(tmp_path / "other")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP of open_clip's own classes, small enough for a test, under a name of its own."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return features.load_clip("tiny-test", None)


def test_clip_scores_the_cosine_of_image_and_prompt(tiny_clip):
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    assert tiny_clip.features(images).shape == (3, 16) and tiny_clip.score_name == "clip_score"
    scores = tiny_clip.prompt_scores(images, ["x"] * 3, ["a bag", "a coat", "a bag"])
    assert scores.shape == (3,) and scores.abs().max() <= 1
    text = tiny_clip.model.encode_text(tiny_clip.tokenizer(["a coat"]))
    expected = torch.nn.functional.cosine_similarity(tiny_clip.features(images[1:2]), text)
    torch.testing.assert_close(scores[1:2], expected)
    pixels = ((images + 1) * 127.5).round().byte()
    x, s = features.compute(tiny_clip, pixels, ["x"] * 3, ["a bag", "a coat", "a bag"], batch_size=2)
    assert x.shape == (3, 16) and torch.allclose(s, scores, atol=0.05)


def test_clip_without_its_weights_is_told_in_one_line():
    with pytest.raises(UserError, match="evaluation.features: CLIP ViT-B-32 with weights 'nowhere' cannot be loaded"):
        features.load("clip:ViT-B-32:nowhere")
