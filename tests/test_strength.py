"""The strength dial: the gamma of equal accuracy by hand, what cannot be compared, the page, strength 0 as the script draws it."""

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from ctrl import strength
from ctrl.errors import UserError
from ctrl.io import read_parquet, write_json
from ctrl.strength_page import section
from scripts import compare_strengths, loading, sample
from tests.test_adapter import adapter, process, spacing  # noqa: F401
from tests.test_figures import NoTracking, call, size_of


def evaluation(accuracy, diversity, gamma=10.0, strength=1.0, half=0.02, n=64):
    figures = {"accuracy": (accuracy, half), "diversity": (diversity, 2 * half), "kl_nats": (3.0, None)}
    metrics = {
        name: {"value": value, "n": n, "lo": None if wide is None else value - wide, "hi": None if wide is None else value + wide}
        for name, (value, wide) in figures.items()
    }
    return {
        "method": f"gamma {gamma:g} strength {strength:g}",
        "settings": {"gamma": gamma, "strength": strength},
        "n": n,
        "metrics": metrics,
    }


GAMMAS = [evaluation(0.9, 0.9, 100.0), evaluation(0.6, 1.1, 1.0), evaluation(0.8, 1.0, 10.0)]
STRENGTHS = [
    evaluation(0.8, 1.0),
    evaluation(0.7, 1.0, strength=0.5),
    evaluation(0.3, 1.2, strength=0.0),
    evaluation(0.95, 0.5, strength=2.0),
]


@pytest.fixture
def table():
    return strength.compare(STRENGTHS, GAMMAS)


def test_the_gamma_of_equal_accuracy_is_linear_in_log_gamma(table):
    row = table[table["setting"] == 0.5].iloc[0]
    assert row["nearest_gamma"] == pytest.approx(math.sqrt(10))  # 0.7 lies halfway between 0.6 at gamma 1 and 0.8 at gamma 10
    # From where the upper ends (0.62, 0.82) meet 0.68 to where the lower ends (0.58, 0.78) meet 0.72.
    assert row["nearest_gamma_lo"] == pytest.approx(10**0.3) and row["nearest_gamma_hi"] == pytest.approx(10**0.7)
    assert row["diversity_difference"] == pytest.approx(1.0 - 1.05)
    wide = math.hypot(0.04, 0.04)
    assert row["diversity_difference_lo"] == pytest.approx(-0.05 - wide) and row["diversity_difference_hi"] == pytest.approx(-0.05 + wide)
    assert row["kl_nats_difference"] == pytest.approx(0) and pd.isna(row["kl_nats_difference_lo"]), "no interval where one has none"


def test_the_trained_strength_is_its_own_gamma(table):
    row = table[(table["dial"] == "strength") & (table["setting"] == 1)].iloc[0]
    assert row["nearest_gamma"] == pytest.approx(10) and row["diversity_difference"] == pytest.approx(0)


def test_without_a_gamma_as_accurate_there_is_nothing_to_compare(table):
    for setting in (0.0, 2.0):
        row = table[(table["dial"] == "strength") & (table["setting"] == setting)].iloc[0]
        assert row[[c for c in table if c.startswith("nearest") or "difference" in c]].isna().all()
    assert table["dial"].tolist() == ["strength"] * 4 + ["gamma"] * 3
    assert table["setting"].tolist() == [0, 0.5, 1, 2, 1, 10, 100]
    assert (table["accuracy_n"] == 64).all()


def test_a_curve_that_falls_again_counts_from_the_lowest_gamma():
    assert strength.crossing([0.0, 1.0, 2.0], [0.5, 0.9, 0.7], 0.8) == pytest.approx(0.75)
    assert strength.crossing([0.0, 1.0], [0.5, 0.5], 0.5) == 0 and strength.crossing([2.0], [0.5], 0.5) == 2
    assert strength.crossing([0.0, 1.0], [0.5, 0.9], 0.91) is None


def test_the_interval_of_a_difference_takes_the_ends_that_face_each_other():
    value, lo, hi = strength.difference((1.0, 0.7, 1.1), (0.5, 0.4, 0.9))
    assert (value, lo, hi) == pytest.approx((0.5, 0.5 - math.hypot(0.3, 0.4), 0.5 + math.hypot(0.1, 0.1)))


@pytest.mark.parametrize(
    ("strengths", "gammas", "says"),
    [
        (STRENGTHS + STRENGTHS[:1], GAMMAS, "two evaluations with strength 1"),
        (STRENGTHS, GAMMAS + GAMMAS[:1], "two evaluations with gamma 100"),
        ([*STRENGTHS, evaluation(0.5, 1, 3.0, 1.5)], GAMMAS, "gamma 3 and 10"),
        (STRENGTHS, [evaluation(0.5, 1, 3.0, 1.5)], "its strength is not 1"),
        (STRENGTHS, [{"method": "mpgd", "settings": {}, "metrics": {}}], "'mpgd' has no strength and gamma"),
        ([{"method": "cfg", "settings": {"gamma": 1.0, "strength": None}, "metrics": {}}], GAMMAS, "'cfg' has no strength"),
    ],
)
def test_what_cannot_be_compared_is_one_line(strengths, gammas, says):
    with pytest.raises(UserError, match=says) as caught:
        strength.compare(strengths, gammas)
    assert "\n" not in str(caught.value)


def test_the_page_says_what_the_figures_say(table):
    text = section(table)
    assert "| strength 0.5 | 64 | 0.700 [0.680, 0.720] | 1.000 [0.960, 1.040] | 3.000 |" in text
    assert "| 0.5 | 3.162 [1.995, 5.012] | −0.050 [−0.107, 0.007] | 0.000 |" in text
    assert "Strength 0 is less accurate than each of the gammas. Beside gamma 1, the nearest in accuracy: diversity 1.200" in text
    assert "Strength 2 is more accurate than each of the gammas. Beside gamma 100, the nearest in accuracy: diversity 0.500" in text
    assert "0.500 [0.460, 0.540] against 0.900 [0.860, 0.940]; path KL / nats 3.000 against 3.000." in text
    assert "In diversity the largest difference is −0.050 [−0.107, 0.007], at strength 0.5 (gamma 3.16); every interval holds 0." in text
    assert "In path KL / nats the largest difference is 0.000, at strength 0.5 (gamma 3.16).\n" in text, "it has no interval"
    assert "At equal accuracy these images do not tell the dial from training." in text
    far = strength.compare([*STRENGTHS[:1], evaluation(0.7, 0.8, strength=0.5)], GAMMAS)
    assert "its interval does not hold 0 at strength 0.5" in section(far)
    assert "At equal accuracy the dial differs from training in diversity." in section(far)


def test_the_page_without_any_gamma_as_accurate():
    text = section(strength.compare([evaluation(0.1, 1.0, strength=0.0)], GAMMAS))
    assert "| 0 | – | – | – |" in text and "largest difference" not in text and "At equal accuracy" not in text


def test_the_script(tmp_path, monkeypatch, capsys):
    for k, e in enumerate(STRENGTHS + GAMMAS):
        write_json(tmp_path / f"{k}.json", e)
    paths = [tmp_path / f"{k}.json" for k in range(7)]
    out = ["--output-csv", tmp_path / "out.csv", "--output-figure", tmp_path / "out.png"]
    call(monkeypatch, compare_strengths, "--strengths", *paths[:4], "--gammas", *paths[4:], *out)
    assert "strength 0.5 (n = 64): accuracy 0.700, that of gamma 3.16" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "out.csv")
    assert section(written) == section(strength.compare(STRENGTHS, GAMMAS))
    assert size_of(tmp_path / "out.png") == (810, 450), "two panels: there is no KID"
    (tmp_path / "out.csv").unlink()
    with pytest.raises(SystemExit):
        call(monkeypatch, compare_strengths, "--strengths", paths[0], paths[0], "--gammas", *paths[4:], *out)
    assert not (tmp_path / "out.csv").exists() and "two evaluations" in capsys.readouterr().err


METHOD = pd.Series({"family": "finetune", "strength": "1"}, name="ctrl")


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_strength_below_nothing_is_refused(wrong):
    with pytest.raises(UserError, match="--strength is .*; it goes from 0"):
        loading.strength_of(wrong, METHOD)


def test_only_a_finetuned_method_has_a_strength():
    assert loading.strength_of(None, METHOD) == 1 and loading.strength_of(0.0, METHOD) == 0
    pretrained = pd.Series({"family": "pretrained", "strength": "1"}, name="pretrained")
    assert loading.strength_of(1.0, pretrained) == 1
    with pytest.raises(UserError, match="method pretrained is not fine-tuned"):
        loading.strength_of(2.0, pretrained)


class NoMetrics(NoTracking):
    def log_metrics(self, *figures):
        pass


def draw(monkeypatch, tmp_path, output, *words):
    """The images of scripts/sample.py, and its table."""
    monkeypatch.setattr(sample, "run", NoMetrics)
    words = ["--config", tmp_path / "c.json", "--split", "val", "--cells", tmp_path / "cells.json", "--per-label", 3, *words]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words), "--output", str(tmp_path / output)])
    sample.main()
    table = read_parquet(tmp_path / output / "samples.parquet")
    return [(tmp_path / output / name).read_bytes() for name in table["file_name"]], table


def test_strength_0_is_the_pretrained_model_bit_for_bit(tiny_sd, adapter, tmp_path, monkeypatch):  # noqa: F811
    config = {
        "base": {"path": str(tiny_sd)}, "sampler": {"num_steps": 4, "guidance_scale": 2.0, "batch_size": 4},
        "prompts": {"subjects": ["coat", "bag"], "templates": {"train": ["{}"], "val": ["a {}"], "test": ["{}"]}},
    }  # fmt: skip
    write_json(tmp_path / "c.json", config)
    write_json(tmp_path / "cells.json", {"labels": [0, 1, 2], "cells": [["coat", 0], ["bag", 0], ["bag", 2]]})
    expected, rows = draw(monkeypatch, tmp_path, "pretrained", "--method", "pretrained")
    write_json(adapter[0] / "adapter.json", adapter[1] | {"peak_memory_mb": 100.0})
    dialled = ["--method", "ctrl", "--adapter", adapter[0], "--strength"]
    images, table = draw(monkeypatch, tmp_path, "zero", *dialled, 0)
    assert images == expected and table["seed"].tolist() == rows["seed"].tolist()
    assert (table["nfe_forward"] == rows["nfe_forward"]).all(), "no pass of the adapter"
    stronger, table = draw(monkeypatch, tmp_path, "more", *dialled, 1.5)
    assert stronger != expected and (table["nfe_forward"] > rows["nfe_forward"]).all()
    with pytest.raises(UserError, match="--strength is -1"):
        draw(monkeypatch, tmp_path, "less", *dialled, -1)
    assert not (tmp_path / "less").exists()


def test_the_kl_is_that_of_the_strengthened_policy(control, base):
    """One step of a policy whose eps differs by a known amount: strength lambda costs lambda² times the nats."""
    from ctrl.generate import path_figures

    steps = base.process(4)
    rows = pd.DataFrame({"prompt": ["coat"] * 2, "subject": ["coat"] * 2, "label": [0, 0], "seed": [1, 2]})
    torch.manual_seed(0)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
        control.base.network.class_embedding.weight[-1] = 0
    active = [i == 0 for i in range(4)]  # x_T is the same for every strength

    def kl(strength):
        def psi(prompts, labels):
            return control.denoiser(steps, prompts, labels, strength=strength)

        pre = lambda prompts, labels: control.base_denoiser(steps, prompts)  # noqa: E731
        return np.array(path_figures(base, steps, rows, psi, pre, lambda x, y: x.mean((1, 2, 3)), 1.0, 2, active)["kl_nats"]["values"])

    assert (kl(1.0) > 0).all() and not kl(0.0).any()
    assert kl(2.0) == pytest.approx(4 * kl(1.0), rel=1e-4) and kl(0.5) == pytest.approx(kl(1.0) / 4, rel=1e-4)
