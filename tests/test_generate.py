"""Sampling: an image depends on its seed alone, costs are counted, and rejection is exact."""

import pandas as pd
import pytest
import torch

from ctrl.errors import UserError
from ctrl.generate import denoised, generate, path_figures, reject
from ctrl.sampling import noise_of, path_statistics, sample


@pytest.fixture
def process(base):
    return base.process(3)


def rows_of(*rows):
    return pd.DataFrame(rows, columns=["prompt", "subject", "label", "seed"])


ROWS = rows_of(("coat", "coat", 0, 5), ("a bag", "bag", 1, 6), ("bag", "bag", 0, 7))


def pretrained(base, process):
    return denoised(base, process, lambda prompts, labels: base.denoiser(process, prompts))


def test_noise_depends_on_the_seed_alone():
    together, alone = noise_of([3, 4, 5], (4, 8, 8), 2), noise_of([4], (4, 8, 8), 2)
    assert together.shape == (3, 3, 4, 8, 8) and torch.equal(together[:, 1:2], alone)
    assert not torch.equal(together[:, 0], together[:, 1])


def test_images_do_not_depend_on_their_batch(base, process):
    one, all_ = (torch.cat([i for i, _ in generate(base, ROWS, pretrained(base, process), size)]) for size in (1, 3))
    assert one.shape == (3, 3, 16, 16)
    assert ((one - all_).abs() * 127.5).max() < 0.01, "far below a grey level"


def test_costs_are_per_image(base, process):
    _, table = next(generate(base, ROWS, pretrained(base, process), 3))
    assert (table["nfe_forward"] == 3).all() and (table["nfe_backward"] == 0).all() and (table["seconds"] > 0).all()


def brightness_label(images):
    return (images.mean(dim=(1, 2, 3)) > THRESHOLD).long().tolist()


THRESHOLD = 0.0


@pytest.fixture
def threshold(base, process, monkeypatch):
    """The median brightness of the random base's images, so that both labels occur."""
    rows = rows_of(*[("coat", "coat", 0, s) for s in range(40)])
    images = torch.cat([i for i, _ in generate(base, rows, pretrained(base, process), 40)])
    monkeypatch.setitem(globals(), "THRESHOLD", images.mean(dim=(1, 2, 3)).median().item())


def test_rejection_gives_what_was_asked_for_and_counts_every_draw(base, process, threshold):
    rows = rows_of(*[("coat", "coat", y, 0) for y in (0, 1, 0, 1, 1)])
    images, tables = zip(*reject(base, rows, pretrained(base, process), 8, brightness_label, range(1000, 1200)), strict=True)
    table = pd.concat(tables)
    assert sorted(table["label"]) == [0, 0, 1, 1, 1]
    assert brightness_label(torch.cat(images)) == table["label"].tolist()
    assert table["seed"].is_unique and (table["seed"] >= 1000).all()
    for _, group in table.groupby("label"):
        last = group["seed"].max() - 1000 + 1
        assert group["nfe_forward"].sum() == 3 * last, "all draws up to the last accepted one"


def test_rejected_image_is_that_of_its_seed(base, process, threshold):
    rows = rows_of(("coat", "coat", 1, 0))
    images, table = next(reject(base, rows, pretrained(base, process), 4, brightness_label, range(1000, 1200)))
    again = sample(process, base.denoiser(process, ["coat"]), noise_of(table["seed"], base.latent_shape, 3))
    assert torch.allclose(base.decode(again).clamp(-1, 1), images, atol=1e-4)


def test_hopeless_rejection_gives_up(base, process):
    with pytest.raises(UserError, match="16 draws of 'coat' left 1 rows of label 1"):
        list(reject(base, rows_of(("coat", "coat", 1, 0)), pretrained(base, process), 8, lambda x: [0] * len(x), range(16)))


def test_path_of_the_base_costs_no_nats(control, process):
    base = control.base
    noise = noise_of([1, 2], base.latent_shape, 3)
    pre = control.base_denoiser(process, ["coat", "bag"])
    x_0, kl, log_ratio = path_statistics(process, pre, pre, noise)
    assert torch.equal(x_0, sample(process, pre, noise)) and not kl.any() and not log_ratio.any()


def test_var_log_w_of_the_base_is_the_variance_of_the_reward(control, process):
    rows = rows_of(*[("coat", "coat", 0, s) for s in range(6)])
    pre = lambda prompts, labels: control.base_denoiser(process, prompts)  # noqa: E731
    figures = path_figures(control.base, process, rows, pre, pre, lambda x, y: x.mean(dim=(1, 2, 3)), 3.0, 2)
    x_0 = sample(process, control.base_denoiser(process, ["coat"] * 6), noise_of(range(6), control.base.latent_shape, 3))
    assert figures["kl_nats"] == {"value": 0.0, "n": 6, "values": [0.0] * 6, "seeds": [0, 1, 2, 3, 4, 5]}
    assert figures["var_log_w"]["value"] == pytest.approx(9 * x_0.mean(dim=(1, 2, 3)).var().item(), rel=1e-3)
