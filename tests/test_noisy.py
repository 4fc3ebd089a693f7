"""The classifier of noisy latents: what it learns where the answer is known, what it is measured on, and its files."""

import math
import sys
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import errors, io, noisy, oracles
from ctrl.errors import UserError
from ctrl.process import Process

ABAR = torch.tensor([0.001, 0.3, 0.99], dtype=torch.float64)
PROCESS = Process(torch.tensor([900, 500, 100]), ABAR, torch.tensor([0.3, 0.99, 1.0], dtype=torch.float64))
DESCRIPTION = {"num_classes": 2, "latent_channels": 2, "width": 8, "dropout": 0.0}
CONFIG = {"num_epochs": 8, "batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.0}


def latents_of(num, seed):
    """The label is the sign of the first channel, which is ±0.5 everywhere."""
    y = torch.randint(2, (num,), generator=torch.Generator().manual_seed(seed))
    x_0 = torch.zeros(num, 2, 4, 4)
    x_0[:, 0] = (y - 0.5)[:, None, None]
    return x_0, y


SPLITS = {name: latents_of(num, seed) for seed, (name, num) in enumerate({"train": 384, "calibration": 64, "val": 400}.items())}


@pytest.fixture(scope="module")
def fitted():
    return noisy.fit(SPLITS, PROCESS, DESCRIPTION, CONFIG, seed=0)


def test_it_is_as_good_as_the_noise_allows(fitted):
    """The mean of the 16 values says all: it is N(±0.5 sqrt(ᾱ), (1 − ᾱ) / 16), so the best accuracy is Phi(2 sqrt(ᾱ / (1 − ᾱ)))."""
    rows = noisy.evaluate(fitted[0], PROCESS, *SPLITS["val"])
    best = [torch.distributions.Normal(0, 1).cdf(2 * (a / (1 - a)) ** 0.5).item() for a in ABAR]
    assert [row["timestep"] for row in rows] == [900, 500, 100] and all(row["n"] == 400 for row in rows)
    for row, accuracy in zip(rows, best, strict=True):
        assert row["accuracy"] == pytest.approx(accuracy, abs=0.06)
    assert rows[0]["nll"] == pytest.approx(math.log(2), abs=0.05) and rows[2]["nll"] < 0.05


def test_log_prob_takes_the_step_and_has_a_gradient(fitted):
    net, (x, y) = fitted[0], SPLITS["val"]
    log_prob, x_t = net.log_prob(PROCESS, y[:5]), noisy.noised(x[:5], ABAR[1].expand(5), torch.Generator().manual_seed(0)).requires_grad_()
    values = log_prob(x_t, 1)
    assert torch.allclose(values, net.log_probs(x_t, ABAR[1].expand(5))[range(5), y[:5]])
    assert not torch.allclose(values, log_prob(x_t, 0), atol=1e-3)
    (g,) = torch.autograd.grad(values.sum(), x_t)
    assert (g[:, 0].mean((1, 2)) * (y[:5] - 0.5)).sum() > 0, "towards the label"


@pytest.mark.parametrize(
    "y", [torch.tensor([0, 2]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([[0, 1]])]
)
def test_wrong_labels_are_one_line(fitted, y):
    with pytest.raises(UserError, match="label"):
        fitted[0].log_prob(PROCESS, y)(SPLITS["val"][0][:2], 1)


def test_training_follows_from_the_seed_and_keeps_the_best_epoch(fitted):
    again, history = noisy.fit(SPLITS, PROCESS, DESCRIPTION, CONFIG, seed=0)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fitted[0].state_dict().items()) and history == fitted[1]
    rows = noisy.evaluate(again, PROCESS, *SPLITS["calibration"])
    assert sum(row["nll"] for row in rows) / 3 == pytest.approx(min(row["calibration_loss"] for row in history))


def test_noised_latents_have_the_process_variance():
    x_t = noisy.noised(torch.full((2, 1, 200, 200), 2.0), torch.tensor([0.25, 0.81]), torch.Generator().manual_seed(0))
    assert x_t.mean((1, 2, 3)).tolist() == pytest.approx([1.0, 1.8], abs=0.02)
    assert x_t.var((1, 2, 3)).tolist() == pytest.approx([0.75, 0.19], abs=0.02)


def test_files(fitted, tmp_path):
    noisy.save(tmp_path, fitted[0])
    x, abar = SPLITS["val"][0][:4], ABAR[1].expand(4)
    assert torch.equal(noisy.load(tmp_path).log_probs(x, abar), fitted[0].log_probs(x, abar))
    io.write_json(tmp_path / "config.json", {"network": "dct"})
    with pytest.raises(UserError, match="holds no noisy classifier .*width"):
        noisy.load(tmp_path)


def test_bad_data_is_refused():
    with pytest.raises(UserError, match="no image in its split calibration"):
        noisy.fit(SPLITS | {"calibration": latents_of(0, 0)}, PROCESS, DESCRIPTION, CONFIG, 0)
    with pytest.raises(UserError, match="loss is nan in epoch 0: lower noisy_classifier.learning_rate"):
        noisy.fit(SPLITS | {"train": (SPLITS["train"][0] * math.nan, SPLITS["train"][1])}, PROCESS, DESCRIPTION, CONFIG, 0)


class Tracker:
    log_metrics = log_artifact = lambda self, *args: None


def test_script_measures_every_step_of_the_sampler(tiny_sd, tmp_path, monkeypatch):
    from scripts import train_noisy_classifier

    monkeypatch.setattr(train_noisy_classifier, "run", lambda *args: nullcontext(Tracker()))
    (tmp_path / "dataset").mkdir()
    pixels = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    paths = [str(tmp_path / "dataset" / f"{i}.png") for i in range(40)]
    for path, image in zip(paths, oracles.to_pil(pixels), strict=True):
        image.save(path)
    table = pd.DataFrame({"path": paths, "split": ["train", "train", "val", "calibration"] * 10, "label": [0, 1, 1, 0] * 10})
    table.loc[40] = [str(tmp_path / "never_read.png"), "held_out", 1]
    io.write_parquet(tmp_path / "dataset" / "metadata.parquet", table)
    io.write_json(tmp_path / "dataset" / "report.json", {"num_classes": 2})
    io.write_json(
        tmp_path / "config.json",
        {"base": {"path": str(tiny_sd)}, "sampler": {"num_steps": 3}, "noisy_classifier": {"num_epochs": 1, "width": 8}},
    )
    argv = [
        "train_noisy_classifier.py",
        "--config",
        tmp_path / "config.json",
        "--dataset",
        tmp_path / "dataset",
        "--output",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--num-threads", str(torch.get_num_threads())])
    errors.main(train_noisy_classifier.main)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "metrics.json",
        "accuracy_by_timestep.png",
    }
    metrics = io.read_json(tmp_path / "out" / "metrics.json")
    assert [row["step"] for row in metrics["val"]] == [0, 1, 2] and all(row["n"] == 10 for row in metrics["val"])
    with Image.open(tmp_path / "out" / "accuracy_by_timestep.png") as image:
        assert image.width > 2 * image.height
    assert noisy.load(tmp_path / "out").description == {"num_classes": 2, "latent_channels": 4, "width": 8, "dropout": 0.3}
