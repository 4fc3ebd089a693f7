"""A continuous label: its space, embedding, density, requests, and what they do in an adapter."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ctrl
from ctrl import classifier as classifiers
from ctrl import control as controls
from ctrl import coverage, generate, labels, metrics, targets
from ctrl.adapter import write_adapter
from ctrl.bins import describe_continuous
from ctrl.classifier_fit import fit
from ctrl.control import Control
from ctrl.embedding import FourierEmbedding
from ctrl.errors import UserError
from ctrl.heads import GaussianHead
from ctrl.labels import Continuous
from ctrl.oracles import to_pil
from ctrl.pairs import draw, possible_ranges, table_of_targets
from ctrl.sampling import noise_of, sample
from tests.trained import TRAINED

SPACE = Continuous(1.0, 2.0, 1.4, 0.25, extrapolation=0.1, tolerance=0.05, oracle="jpeg_size", unit="kB")
PROMPTS = ["coat", "a bag", "bag"]


# ---------------------------------------------------------------------------------------------------------- the label space


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1.5, [1.5]),
        (1, [1.0]),
        ([1.0, None], [1.0, math.nan]),
        (None, [math.nan]),
        (np.array([1.2, 2.1]), [1.2, 2.1]),
        (torch.tensor([0.9, 2.0]), [0.9, 2.0]),
        ([np.float64(1.25)], [1.25]),
    ],
)
def test_labels_are_float32_and_none_is_nan(given, expected):
    checked = SPACE.check(given)
    assert checked.dtype == torch.float32 and checked.shape == (len(expected),)
    assert torch.allclose(checked, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("wrong", [0.89, 2.11, math.nan, math.inf, "1.5", ["1.5"], True, [1.5, -7], [[1.5]], torch.tensor([math.nan]), {}])
def test_wrong_labels_are_named_in_one_line(wrong):
    with pytest.raises(UserError, match=r"no label .*numbers from 0\.9 to 2\.1 kB \(seen: 1 to 2\)") as refused:
        SPACE.check(wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [{"low": 2.0}, {"sd": 0.0}, {"high": math.inf}, {"mean": math.nan}, {"extrapolation": -0.1}])
def test_wrong_spaces(wrong):
    with pytest.raises(UserError, match="a continuous label needs"):
        Continuous(**{"low": 1.0, "high": 2.0, "mean": 1.4, "sd": 0.25} | wrong)


def test_agreement_is_within_the_tolerance_and_null_agrees_with_all():
    asked, measured = torch.tensor([1.0, 1.0, 1.0, math.nan]), torch.tensor([1.04, 0.94, 1.06, 9.0])
    assert SPACE.agrees(asked, measured).tolist() == [True, False, False, True]


def test_the_space_of_a_report():
    scores = np.linspace(0, 1, 1001)
    label = {"oracle": "jpeg_size", "range": None, "extrapolation": 0.1, "tolerance": 0.01, "num_classes": 4}
    space = labels.space_of(json.loads(json.dumps(describe_continuous(label, scores))))
    assert (space.low, space.high, space.mean) == pytest.approx((0.01, 0.99, 0.5)) and space.unit == "kB"
    assert labels.space_of(describe_continuous(label | {"range": [0.2, 0.4]}, scores)).limits == pytest.approx((0.18, 0.42))
    with pytest.raises(UserError, match="nothing to control"):
        describe_continuous(label, np.ones(5))


# ------------------------------------------------------------------------------------------------------------ the embedding


def test_the_embedding_is_zero_at_the_start_and_always_for_null():
    embedding, y = FourierEmbedding(1.4, 0.25, 8, seed=3), SPACE.check([1.0, None, 2.0])
    assert not embedding(y).any()
    torch.nn.init.normal_(embedding.out.weight)
    out = embedding(y)
    assert not out[1].any() and out[0].any() and not torch.allclose(out[0], out[2])
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in embedding.parameters()), "NaN stays out of the gradients"
    embedding.zero_grad()
    embedding(y[1:2]).sum().backward()
    assert not any(p.grad.any() for p in embedding.parameters()), "the null label teaches nothing"


def test_the_embedding_follows_from_its_seed():
    state = torch.get_rng_state()
    first, same, other = (FourierEmbedding(0.0, 1.0, 4, seed).hidden.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------- the density


def test_nll_and_coverage_by_hand():
    mean, sd, scores = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    # -log N(0; 0, 1) = log sqrt(2 pi); -log N(3; 1, 4) = log sqrt(2 pi) + log 2 + 1/2
    assert metrics.gaussian_nll(mean, sd, scores) == pytest.approx(0.5 * math.log(2 * math.pi) + (math.log(2) + 0.5) / 2)
    pit = metrics.gaussian_pit(mean, sd, scores)
    assert pit.tolist() == pytest.approx([0.5, 0.8413447], abs=1e-6)
    # one sd off: outside the central 50 % and 68.26 %, inside 68.28 %
    assert [metrics.coverage(pit, level) for level in (0.5, 0.6826, 0.6828, 0.95)] == [0.5, 0.5, 1.0, 1.0]


def test_r2_against_a_spread():
    asked, reached = torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.2])
    assert metrics.r2(asked, reached, torch.tensor([0.5, 0.5])) == pytest.approx(1 - 0.05 / 0.5)
    assert metrics.r2(asked, reached) == pytest.approx(1 - 0.05 / 0.5)  # around their mean these spread as much


def test_head_by_hand_and_its_temperature():
    head, outputs = GaussianHead(), torch.tensor([[0.5, 0.0]])
    head.prepare(torch.tensor([0.0, 2.0]))  # mean 1, sd 1
    head.start(0.2)  # N(1.5, 0.2²)
    expected = -0.5 * (0.1 / 0.2) ** 2 - math.log(0.2) - 0.5 * math.log(2 * math.pi)
    assert head.log_prob(outputs, torch.tensor([1.6]), 1.0).item() == pytest.approx(expected, abs=1e-5)
    softer = -0.5 * (0.1 / 0.6) ** 2 - math.log(0.6) - 0.5 * math.log(2 * math.pi)
    assert head.log_prob(outputs, torch.tensor([1.6]), 9.0).item() == pytest.approx(softer, abs=1e-5), "sd · sqrt(T)"
    z = torch.tensor([-1.0, 3.0]) * 0.2 + 1.5
    assert head.best_temperature(outputs.expand(2, 2), z) == pytest.approx(5.0, rel=1e-4), "the mean of 1 and 9"
    assert head.best_temperature(outputs, torch.tensor([1.5])) == pytest.approx((5e-3 / 0.2) ** 2, rel=1e-3), "never a point"


@pytest.mark.parametrize("relative", [False, True])
def test_gradient_of_the_density_by_finite_differences(relative):
    torch.manual_seed(0)
    density = classifiers.new({"network": "dct", "head": "gaussian"}).double()
    density.rounding = False
    for p in density.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    density.network.scale.fill_(0.1)
    density.network.bound.fill_(0.5)
    density.outputs = lambda x: density.network(density.network.features(x))  # stays in double precision
    images, y, h = torch.rand(2, 3, 8, 8).double() * 1.6 - 0.8, torch.tensor([0.3, 0.9]), 1e-6
    function = density.log_ratio if relative else density.log_prob
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, y).sum(), x)
    for _ in range(5):
        v = torch.randn_like(images)
        with torch.no_grad():
            slope = (function(images + h * v, y) - function(images - h * v, y)).sum() / (2 * h)
        assert (gradient * v).sum().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def density(real):
    images, scores, splits, _ = real
    settings = {"num_epochs": 5, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
    return fit(images, scores, scores, splits, {"network": "dct", "head": "gaussian"}, settings, seed=0)[0]


def test_fitted_density_is_calibrated_on_images_it_never_saw(density, real, tmp_path):
    images, scores, splits, _ = real
    held_out = torch.tensor(scores[splits == "val"])
    laws = coverage.predict(density, images[splits == "val"])
    figures = coverage.evaluate(laws, held_out)
    assert figures["n"] == 400 and figures["after"]["r2"] > 0.98
    assert figures["after"]["nll"] < -math.log(scores.std()) - 1, "far below that of the scores alone"
    assert figures["after"]["coverage_50"] == pytest.approx(0.5, abs=0.12) and figures["after"]["coverage_95"] == pytest.approx(
        0.95, abs=0.05
    )
    assert figures["before"]["rmse"] == figures["after"]["rmse"]
    classifiers.save(tmp_path, density)
    loaded, x, y = classifiers.load(tmp_path), images[:4] / 127.5 - 1, torch.tensor(scores[:4])
    assert isinstance(loaded, classifiers.Density) and torch.equal(loaded.log_prob(x, y), density.log_prob(x, y))
    mean, sd = (part[:4] for part in coverage.predict(density, images[:4])["after"])
    assert loaded.log_ratio(x, mean).abs().max() < 1e-6 and torch.allclose(
        loaded.log_ratio(x, mean + 2 * sd), torch.tensor(-2.0), atol=1e-3
    )
    figure = coverage.coverage_figure({"val": (laws, held_out)})
    assert "n = 400" in figure.axes[0].get_title() and len(figure.axes) == 2


# --------------------------------------------------------------------------------------------------------------- the requests


def test_ranges_are_quantiles_within_the_bounds():
    scores = {"coat": np.linspace(0, 1, 101), "bag": np.full(50, 0.5)}
    assert possible_ranges(scores, [0.05, 0.95], (0.1, 2.0), 3, 0.1) == {"coat": (pytest.approx(0.1), pytest.approx(0.95))}
    with pytest.raises(UserError, match=r"label\.tolerance"):
        possible_ranges(scores, [0.05, 0.95], (0.0, 1.0), 4, 0.2)


def test_training_draws_uniformly_in_each_range():
    cells = [("coat", (1.0, 2.0)), ("bag", (5.0, 5.5))]
    prompts, subjects, y = draw(cells, ["{}", "a {}"], 6000, torch.Generator().manual_seed(0))
    of = {s: y[torch.tensor([t == s for t in subjects])] for s in ("coat", "bag")}
    assert len(of["coat"]) == pytest.approx(3000, abs=200) and all(s in p for s, p in zip(subjects, prompts, strict=True))
    for (_, (low, high)), values in zip(cells, of.values(), strict=True):
        assert low <= values.min() and values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    again = draw(cells, ["{}", "a {}"], 6000, torch.Generator().manual_seed(0))
    assert torch.equal(again[2], y) and again[0] == prompts


def test_the_table_asks_for_a_grid_and_a_little_beyond():
    settings = ({"coat": (1.0, 2.0), "bag": (4.0, 6.0)}, {"coat": 0.3, "bag": 0.6}, 3)
    table = table_of_targets(*settings, 0.1, ["{}"], 4, 100)
    values = table.groupby(["subject", "target"])["label"].unique().map(lambda v: round(float(v[0]), 9)).to_dict()
    assert values == {(s, k): w for s, ws in (("coat", [0.9, 1, 1.5, 2, 2.1]), ("bag", [3.8, 4, 5, 6, 6.2])) for k, w in enumerate(ws, -1)}
    assert table["target"].value_counts().eq(4).all() and sorted(set(table["seed"])) == [100, 101, 102, 103]
    inside = table_of_targets(*settings, 0.0, ["{}"], 4, 100)
    assert sorted(set(inside["target"])) == [0, 1, 2] and set(inside["spread"]) == {0.3, 0.6}


def test_errors_by_hand():
    table = pd.DataFrame({"target": [-1, 0, 1], "label": [0.9, 1.0, 2.0], "score": [1.0, 1.1, 2.2], "spread": 0.5, "subject": "coat"})
    table = targets.by_target(table)
    assert table["label"].tolist() == [-1, 0, 1] and table["asked"].tolist() == [0.9, 1.0, 2.0]
    apart = targets.beyond(table, 2)
    assert apart.tolist() == [True, False, False]
    found = targets.figures(table[~apart].reset_index(), 0.15, lambda f: f(torch.arange(2)))
    assert found == pytest.approx({"within_tolerance": 0.5, "mae": 0.15, "rmse": math.sqrt(0.025), "r2": 1 - 0.05 / 0.5})
    assert targets.figures_beyond(table[apart].reset_index(), lambda f: f(torch.arange(1))) == pytest.approx(
        {"mae_beyond": 0.1, "rmse_beyond": 0.1}
    )


def test_rejection_takes_what_is_near_enough(base):
    """Scores come in turn; a draw is taken for the target that it is within the tolerance of, and its cost is all draws since the last."""
    rows = pd.DataFrame({"prompt": "coat", "subject": "coat", "label": [1.0, 2.0, 2.0], "target": [0, 1, 1], "seed": 0})
    scores = iter([[1.2, 2.05, 1.04, 2.2], [1.96, 1.0, 2.0, 2.0]])

    def nothing(prompts, labels, seeds):
        return torch.zeros(len(prompts), *base.latent_shape), {}

    drawn = list(generate.reject(base, rows, nothing, 4, lambda images: next(scores), range(7, 100), tolerance=0.05))
    table = pd.concat([part for _, part in drawn])
    assert list(zip(table["label"], table["seed"], strict=True)) == [(2.0, 8), (1.0, 9), (2.0, 11)]


# -------------------------------------------------------------------------------------------------------------- the adapter


@pytest.fixture
def process(base):
    return base.process(4)


@pytest.fixture
def noise(base, process):
    return noise_of([1, 2, 3], base.latent_shape, process.num_steps)


def scrambled(base) -> Control:
    control = Control(base, SPACE, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
    return control


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_at_the_start_it_is_the_base_bit_for_bit(base, process, noise, guidance_scale):
    before = sample(process, base.denoiser(process, PROMPTS, guidance_scale), noise)
    control, y = Control(base, SPACE, 4, ["to_q", "conv1"]), torch.tensor([1.0, 1.5, 2.0])
    assert torch.equal(sample(process, control.denoiser(process, PROMPTS, y, guidance_scale), noise), before)
    assert all(name.startswith("class_embedding.") or "lora_" in name for name in control.parameters())
    groups = control.groups(1e-3, 1e-2)
    assert sum(len(g["params"]) for g in groups) == len(control.parameters()) and len(groups[1]["params"]) == 3


def test_trained_it_depends_on_the_label_and_the_base_is_still_there(base, process, noise):
    before = sample(process, base.denoiser(process, PROMPTS), noise)
    control = scrambled(base)
    draws = [
        sample(process, control.denoiser(process, PROMPTS, SPACE.check([y] * 3), strength=s), noise)
        for y, s in ((1.0, 1), (2.0, 1), (2.0, 0))
    ]
    assert not torch.allclose(draws[0], draws[1], atol=1e-3) and torch.equal(draws[2], before)
    assert torch.equal(sample(process, control.base_denoiser(process, PROMPTS), noise), before)


@pytest.fixture
def adapter(base, tiny_sd, process, tmp_path) -> tuple[Path, Control]:
    control = scrambled(base)
    sampler = {"num_steps": 4, "eta": 1.0, "guidance_scale": 2.0, "spacing": "scheduler", "timesteps": process.timesteps.tolist()}
    write_adapter(control, tmp_path, controls.describe(control, str(tiny_sd), sampler, control.space.names, TRAINED), "coat")
    return tmp_path, control


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_saved_loaded_and_drawn_by_the_pipeline(tiny_sd, process, adapter, strength):
    folder, control = adapter
    noise = noise_of([3, 4], control.base.latent_shape, process.num_steps)

    def drawn(control):
        psi = control.denoiser(process, ["coat", "bag"], SPACE.check([1.2, 2.1]), 2.0, strength)
        with torch.no_grad():
            return np.stack([np.asarray(i) for i in to_pil(control.base.decode(sample(process, psi, noise)))]).astype(int)

    from ctrl import base as bases

    loaded = controls.load(bases.load(tiny_sd), folder)
    assert loaded.space == SPACE and np.array_equal(drawn(loaded), drawn(control))
    images = ctrl.load(tiny_sd, adapter=folder)(["coat", "bag"], label=[1.2, 2.1], strength=strength, seed=3).images
    assert np.abs(np.stack([np.asarray(i) for i in images]).astype(int) - drawn(control)).max() <= 1


def test_the_pipeline_without_a_label_and_with_wrong_ones(tiny_sd, adapter):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    free, off, on = (np.asarray(pipe("coat", seed=0, **k).images[0]) for k in ({}, {"label": 1.5, "strength": 0}, {"label": 1.5}))
    assert np.array_equal(free, off) and not np.array_equal(free, on)
    for wrong in ("big", 3.0, math.nan, [1.5, 1.6], True, [True]):
        with pytest.raises(ValueError, match="label is"):
            pipe("coat", label=wrong, seed=0)
