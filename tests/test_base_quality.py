"""The measurement of a base model, on a tiny random one whose figures are poor but defined; and its model card."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from ctrl import base as base_models
from ctrl import base_quality, errors, features, pretrain
from ctrl.garments import GARMENTS, read_idx
from scripts import measure_base

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ["{}", "a {}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer([t.format(g) for g in GARMENTS for t in TEMPLATES], folder / "tokenizer")
    text_encoder = pretrain.build_text_encoder(len(tokenizer), tokenizer.eos_token_id, {"width": 32, "layers": 1, "heads": 2})
    vae = pretrain.build_vae({"channels": [16, 16, 16], "latent_channels": 4}, 32)
    unet = pretrain.build_unet({"channels": [16, 32], "layers_per_block": 1, "heads": 2}, 32, 4, 8)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pretrain.save_pipeline(folder, vae, text_encoder, tokenizer, unet, scheduler)
    return folder


@pytest.fixture(scope="module")
def real():
    images, labels = read_idx(ROOT / "resources/fashion-mnist", "t10k")
    return images.contiguous(), labels


def test_real_images_agree_with_themselves(real):
    """Real test images as if they were samples: what a perfect base would get."""
    network = features.load(ROOT / "resources/garments")
    images, labels = real
    half = torch.arange(2000)
    table = pd.DataFrame({"subject": [GARMENTS[y] for y in labels[half]]})
    result = base_quality.check_samples(
        images[half], table, (images[2000:4000], labels[2000:4000]), (images[4000:], labels[4000:]), network
    )
    assert result["agreement"]["value"] > 0.89 and result["agreement"]["lo"] < result["agreement"]["value"] < result["agreement"]["hi"]
    assert result["quartile_ratios"] == pytest.approx([1, 1, 1], abs=0.03)
    assert result["frechet_distance"] == pytest.approx(result["frechet_distance_of_real_training_images"], rel=0.5)
    assert abs(result["kid"]) < 0.01
    assert set(result["agreement_by_subject"]) == set(GARMENTS)


def test_an_identity_autoencoder_is_perfect(folder, real, monkeypatch):
    """With a VAE that keeps the image, every figure is its ideal value."""
    base = base_models.load(folder)

    class Posterior:
        def __init__(self, x):
            self.mean, self.std = x, torch.zeros_like(x)

    class Output:
        def __init__(self, x):
            self.latent_dist = Posterior(x)

    monkeypatch.setattr(base.pipe.vae, "encode", Output)
    monkeypatch.setattr(base.pipe.vae, "decode", lambda z, return_dict: (z,))
    result = base_quality.check_autoencoder(base, real[0][:100])
    assert result["pearson"] == pytest.approx(1) and result["spearman"] == pytest.approx(1)
    assert result["median_ratio"] == 1 and result["pixel_error"] == 0
    x = (real[0][:100].float() / 127.5 - 1) * base.pipe.vae.config.scaling_factor
    assert result["latent_std"] == pytest.approx(x.std().item(), rel=1e-4)


def test_samples_take_subjects_and_prompts_in_turn(folder):
    base = base_models.load(folder)
    images, table = base_quality.draw_samples(base, ["bag", "coat"], TEMPLATES, 5, 2, 1.0, 1.0, batch_size=2)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert table["prompt"].tolist() == ["bag", "coat", "a bag", "a coat", "bag"] and table["seed"].is_unique


def test_weighted_quantiles():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 2.0, 1.0])
    assert base_quality.weighted_quantiles(values, weights, [0.25, 0.5, 0.75]).tolist() == [1, 1, 2]


def test_the_script_writes_figures_grid_and_card(folder, tmp_path, monkeypatch, capsys, real):
    some = [(x[:300], y[:300]) for x, y in (real, real)]
    monkeypatch.setattr(measure_base, "read_idx", lambda folder, split: some.pop())
    words = ["--base", folder, "--num-samples", "20", "--num-steps", "2", "3", "--output", tmp_path / "out", "--num-threads", "1"]
    words += ["--garments", ROOT / "resources/garments", "--pretrain-config", ROOT / "config/pretrain.yaml"]
    monkeypatch.setattr(sys, "argv", ["measure_base.py", *map(str, words)])
    errors.main(measure_base.main)
    quality = json.loads((tmp_path / "out/quality.json").read_text())
    assert [s["num_steps"] for s in quality["samples"]] == [2, 3] and quality["samples"][0]["n"] == 20
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: diffusers\n") and "| 2 steps | 3 steps |" in card
    assert f"{quality['autoencoder']['pearson']:.4f}" in card and f"{quality['samples'][1]['frechet_distance']:.3f}" in card
    with Image.open(tmp_path / "out/samples.png") as image:
        assert image.size[0] == pytest.approx((2.3 + 1.06 * 2 + 0.2) * 0.5 * 150, abs=1)
    assert "agreement" in capsys.readouterr().out
