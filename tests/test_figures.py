"""The figures: right size, right pictures in the right places, impossible cells hatched, no text on other text."""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import errors
from ctrl.evaluation import Samples
from ctrl.figures import curves, labels, pictures, style
from ctrl.io import write_json, write_parquet, write_text
from scripts import plot_figures, plot_sweep

SUBJECTS = ["bag", "coat", "dress"]
REPORT = {
    "oracle": "jpeg_size", "unit": "kB", "edges": [1.0, 1.1, 1.2], "descending": True, "num_classes": 4,
    "label_names": [">= 1.2 kB", "1.1-1.2 kB", "1-1.1 kB", "< 1 kB"],
}  # fmt: skip
CELLS = [(s, y) for s in SUBJECTS for y in range(4) if (s, y) not in {("coat", 3), ("dress", 0), ("dress", 1)}]
SCORES = [1.25, 1.15, 1.05, 0.95]


def make(name="m", per_cell=4, wrong=()):
    """Images that are in their requested bin, but for the rows in `wrong`; seeds are shared by the labels."""
    rows = [
        {"prompt": f"a {s}", "subject": s, "label": y, "seed": 10 * SUBJECTS.index(s) + k, "score": SCORES[y]}
        for s, y in CELLS
        for k in range(per_cell)
    ]
    table = pd.DataFrame(rows)
    table.loc[list(wrong), "score"] = 2.0
    images = torch.randint(256, (len(table), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Samples(Path(name), table, images, {})


def artists(axes, gid):
    return [a for a in axes.get_children() if a.get_gid() == gid]


def overlaps(figure):
    """Pairs of texts whose boxes overlap."""
    figure.canvas.draw()
    texts = [t for axes in figure.axes for t in axes.texts if t.get_text()]
    boxes = [t.get_window_extent() for t in texts]
    return [(a.get_text(), b.get_text()) for i, a in enumerate(texts) for j, b in enumerate(texts[:i]) if boxes[i].overlaps(boxes[j])]


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_grid_draws_every_cell_and_hatches_the_impossible_ones():
    samples = make(wrong=[4])  # asked for label 1
    figure = pictures.grid_figure(samples, CELLS, SUBJECTS, REPORT, "method", per_cell=3)
    axes = figure.axes[0]
    assert len(artists(axes, "picture")) == 3 * len(CELLS)
    hatched = artists(axes, "impossible")
    assert len(hatched) == 3 and all(box.get_hatch() for box in hatched)
    captions = [t for t in axes.texts if t.get_text() in {"2", "1.25", "1.15", "1.05", "0.95"}]
    assert len(captions) == 3 * len(CELLS)
    assert [t.get_text() for t in captions if t.get_color() == style.WRONG] == ["2"]
    assert overlaps(figure) == []


def test_a_picture_keeps_its_pixels(tmp_path):
    """The first picture of the grid, read back from the PNG, is the image with every pixel as a block."""
    samples = make()
    samples.images[:] = 0
    samples.images[0, :, :4] = 255  # upper half white
    figure = pictures.grid_figure(samples, CELLS, SUBJECTS, REPORT, "", per_cell=3)
    picture = artists(figure.axes[0], "picture")[0]
    left, right, bottom, top = picture.get_extent()
    style.save(figure, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    scale = 0.62 * style.DPI
    inside = pixels[int(top * scale) + 3 : int(bottom * scale) - 3, int(left * scale) + 3 : int(right * scale) - 3]
    half = len(inside) // 2
    assert inside[: half - 2].min() > 245 and inside[half + 2 :].max() < 10


def test_grid_has_the_size_of_its_layout(tmp_path):
    pictures.grid(make(), CELLS, SUBJECTS, REPORT, "m", tmp_path / "grid.png")
    width, height = size_of(tmp_path / "grid.png")
    assert width == pytest.approx((2.3 + 4 * (3 * 1.08 + 0.5)) * 0.62 * 150, abs=1)
    assert height == pytest.approx((1.5 + 3 * 1.46 + 0.75) * 0.62 * 150, abs=1)
    assert (tmp_path / "grid.png").stat().st_size < 200_000


def test_teaser_shows_one_seed_across_a_row():
    pretrained, ctrl = make("pretrained"), make("ctrl")
    figure = pictures.teaser_figure(pretrained, ctrl, ["bag", "dress"], REPORT)
    axes = figure.axes[0]
    shown = [picture.get_array() for picture in artists(axes, "picture")]
    assert len(shown) == 2 * 2 + 4 + 2 and len(artists(axes, "impossible")) == 2
    rows = ctrl.table.index[(ctrl.table["subject"] == "bag") & (ctrl.table["seed"] == 0)]
    assert len(rows) == 4
    for drawn, row in zip(shown[2:6], rows, strict=True):
        assert (drawn == ctrl.images[row].permute(1, 2, 0).numpy()).all()
    assert (shown[0] == pretrained.images[0].permute(1, 2, 0).numpy()).all()
    assert overlaps(figure) == []


def test_subjects_of_the_teaser_can_take_most_labels():
    assert pictures.choose_subjects(CELLS, 2) == ["bag", "coat"]


def test_bins_and_names():
    assert style.bins_of(REPORT) == [(1.2, float("inf")), (1.1, 1.2), (1.0, 1.1), (float("-inf"), 1.0)]
    assert style.bins_of(REPORT | {"descending": False})[0] == (float("-inf"), 1.0)
    assert style.label_name(REPORT, 0) == "≥ 1.2 kB" and style.label_name(REPORT, 1, with_unit=False) == "1.1–1.2"
    names = ["ctrl", "ctrl_gamma0.5", "ctrl_gamma1_resampled", "ctrl_adjoint", "reconstruction_guidance", "smc", "cfg"]
    shown = ["CTRL", "CTRL, γ = 0.5", "CTRL, γ = 1, resampled", "CTRL adjoint", "reconstruction guidance", "SMC", "CFG"]
    assert [style.method_name(name) for name in names] == shown
    colours = style.method_colours(["ctrl", "a", "b"])
    assert len(set(colours.values())) == 3 and len(style.method_colours([str(k) for k in range(20)])) == 20


@pytest.mark.parametrize("num_methods", [1, 4])
def test_sizes_and_confusion(tmp_path, num_methods):
    tables = {f"method_{k}": make().table for k in range(num_methods)}
    labels.sizes(tables, REPORT, tmp_path / "sizes.png")
    assert size_of(tmp_path / "sizes.png") == (int(150 * (0.6 + 2.1 * num_methods) + 1e-6), 750)
    labels.confusion({m: np.eye(4, dtype=int).tolist() for m in tables}, REPORT, tmp_path / "confusion.png")
    assert size_of(tmp_path / "confusion.png")[1] == 477  # 3.18 inches


def test_many_methods_go_into_bands(tmp_path):
    labels.sizes({f"method_{k}": make().table for k in range(17)}, REPORT, tmp_path / "sizes.png")
    assert size_of(tmp_path / "sizes.png") == (int(150 * (0.6 + 2.1 * 9) + 1e-6), 1380), "nine and eight, four labels each"


def history(scale=1.0):
    rows = [
        {"update": u, "log_prob": -scale / u, "kl_nats": scale * u / 30, "var_log_w": 90.0 / u, "temperature": 4.0 / u}
        for u in range(1, 31)
    ]
    return [row | ({"oracle_accuracy": row["update"] / 30} if row["update"] % 10 == 0 else {}) for row in rows]


def test_training_curves(tmp_path):
    curves.training({"ctrl": history(), "ctrl_gamma1": history(2.0)}, tmp_path / "training.png", 4)
    assert size_of(tmp_path / "training.png") == (1440, 660), "five panels, in three columns"


def test_a_policy_without_a_kl_leaves_numbers_on_the_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    curves.training({"ctrl": history(), "reward_maximization": history(1000.0)}, tmp_path / "training.png", 4)
    (panel,) = [axes for axes in drawn[0].axes if axes.get_yscale() == "symlog"]
    with matplotlib.rc_context(style.STYLE):
        drawn[0].draw_without_rendering()
        assert [text.get_text() for text in panel.get_yticklabels()][:3] == ["0", "10", "100"]


def test_a_line_of_few_updates_without_a_probe(tmp_path):
    curves.training({"ctrl": [{"update": 1, "log_prob": -1.0, "kl_nats": 0.0, "temperature": 1.0}]}, tmp_path / "training.png")
    assert size_of(tmp_path / "training.png") == (960, 660), "three panels, in two columns"


def evaluation(gamma, value):
    figure = {"value": value, "n": 10, "lo": value - 0.1, "hi": value + 0.1}
    names = ("accuracy", "kid_rejection", "diversity", "kl_nats")
    return {"method": "m", "settings": {"gamma": gamma}, "metrics": dict.fromkeys(names, figure)}


def test_sweeps(tmp_path):
    curves.gamma_sweep([evaluation(10, 0.9), evaluation(1, 0.5)], tmp_path / "gamma.png")
    assert size_of(tmp_path / "gamma.png") == (1380, 345)  # four panels
    sweep = [{"scale": s, "n": 8, "accuracy": 0.5, "kid_rejection": None} for s in (1.0, 10.0)]
    curves.tuning_sweep(sweep, "reconstruction_guidance", 10.0, tmp_path / "tuning.png")
    assert size_of(tmp_path / "tuning.png") == (450, 345)  # one


class NoTracking:
    """Stands in for MLflow."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def log_artifact(self, path):
        assert path.exists()


def call(monkeypatch, script, *words):
    monkeypatch.setattr(script, "run", NoTracking)
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    errors.main(script.main)


def write_samples(folder, samples):
    (folder / "images").mkdir(parents=True)
    names = [f"images/{k:06d}.png" for k in range(len(samples.table))]
    for name, image in zip(names, samples.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    write_parquet(folder / "samples.parquet", samples.table.drop(columns="score").assign(file_name=names))
    return folder


def test_the_script_of_figures(tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "dataset/report.json", REPORT)
    write_json(tmp_path / "cells.json", {"subjects": SUBJECTS, "cells": CELLS})
    write_json(tmp_path / "ctrl.json", evaluation(10, 0.5) | {"method": "ctrl", "confusion": np.eye(4).tolist()})
    write_text(tmp_path / "adapters/ctrl/history.jsonl", "".join(json.dumps(row) + "\n" for row in history()))
    folders = [write_samples(tmp_path / "samples" / name, make()) for name in ("pretrained", "ctrl")]
    words = [
        "--dataset", tmp_path / "dataset", "--cells", tmp_path / "cells.json", "--samples", *folders,
        "--evaluations", tmp_path / "ctrl.json", "--history", tmp_path / "adapters/ctrl/history.jsonl", "--output", tmp_path / "figures",
    ]  # fmt: skip
    call(monkeypatch, plot_figures, *words)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"grid_pretrained.png", "grid_ctrl.png", "sizes.png", "confusion.png", "training.png", "teaser.png"}
    assert "teaser.png" in capsys.readouterr().out


def test_the_script_of_sweeps(tmp_path, monkeypatch, capsys):
    for gamma in (1, 10):
        write_json(tmp_path / f"{gamma}.json", evaluation(gamma, 0.5))
    call(monkeypatch, plot_sweep, "--evaluations", tmp_path / "1.json", tmp_path / "10.json", "--output", tmp_path / "sweep.png")
    assert size_of(tmp_path / "sweep.png") == (1380, 345)
    write_json(tmp_path / "none.json", evaluation(1, 0.5) | {"settings": {}})
    with pytest.raises(SystemExit):
        call(monkeypatch, plot_sweep, "--evaluations", tmp_path / "none.json", "--output", tmp_path / "sweep.png")
    assert "has no gamma" in capsys.readouterr().err


def test_figures_of_two_factors(tmp_path):
    names = {"num_classes": 2, "label_names": ["high", "low"], "edges": [1.0], "descending": True, "unit": ""}
    factors = [names | {"oracle": "jpeg_size"}, names | {"oracle": "brightness", "edges": [0.5]}]
    joint = ["a high, b high", "a high, b low", "a low, b high", "a low, b low"]
    report = {"factors": factors, "num_classes": 4, "label_names": joint, "held_out": [1]}
    rng = np.random.default_rng(0)
    columns = {"label": np.arange(40) % 4, "score_jpeg_size": rng.uniform(0.5, 1.5, 40), "score_brightness": rng.uniform(0, 1, 40)}
    labels.sizes({"ctrl": pd.DataFrame(columns)}, report, tmp_path / "sizes.png")
    metric = {"value": 0.8, "lo": 0.7, "hi": 0.9}
    metrics = dict.fromkeys(("accuracy", "accuracy_jpeg_size", "accuracy_brightness", "accuracy_held_out"), metric)
    labels.factor_accuracies([{"method": "ctrl", "metrics": metrics}], tmp_path / "factors.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000 and (tmp_path / "factors.png").stat().st_size > 1000
    row = pd.Series({"score_jpeg_size": 1.2, "score_brightness": 0.2})
    assert pictures._caption(row, 1, report) == ("1.2\n0.2", style.INK)
    assert pictures._caption(row, 0, report) == ("1.2\n0.2", style.WRONG)
