"""Fewer labelled images: nested subsets with the bins of the whole, what needs no prompts, and the table, text and figure on it all."""

import sys
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import data, efficiency, errors, io, pictures, tracking
from ctrl.classifier_fit import fit
from ctrl.errors import UserError
from ctrl.figures.efficiency import sample_efficiency
from ctrl.labels import factors_of
from ctrl.subset import MIN_HELD_OUT, digests_of, subset
from tests.repository import ROOT
from tests.test_figures import size_of

SHARES = {"train": 0.6, "val": 0.2, "calibration": 0.2}
LABEL = {"oracle": "jpeg_size", "edges": "quantiles", "num_classes": 3, "descending": True}


def write_images(folder, num_images: int = 300) -> None:
    """16x16 pixels of noise between nearly none and much, so that their sizes differ."""
    generator, rows = np.random.default_rng(0), []
    folder.mkdir()
    for k in range(num_images):
        noise = generator.normal(128, 1 + 60 * k / num_images, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "prompt": f"a {('coat', 'bag')[k % 2]}"})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset of 300 images, its report, and their digests."""
    folder = tmp_path_factory.mktemp("efficiency") / "images"
    write_images(folder)
    table, report = data.build(folder, 16, LABEL, SHARES)
    return table, report, digests_of(table)


def test_subsets_are_nested_and_keep_the_bins(whole):
    table, report, digests = whole
    previous, num_train = set(), sum(report["counts"]["train"])
    for size in (20, 50, num_train - 1):
        chosen, described = subset(table, report, size, digests)
        assert previous < set(chosen["file_name"]), "each has all images of the smaller ones"
        previous = set(chosen["file_name"])
        assert (chosen["split"] == "train").sum() == sum(described["counts"]["train"]) == size
        for split in ("val", "calibration"):
            given = sum(report["counts"][split])
            assert sum(described["counts"][split]) == max(round(size / num_train * given), MIN_HELD_OUT)
        assert all(described[key] == report[key] for key in ("edges", "label_names", "num_classes", "oracle", "image_size"))
        merged = chosen.merge(table, on="file_name", suffixes=("", "_whole"))
        assert (merged["label"] == merged["label_whole"]).all() and (merged["split"] == merged["split_whole"]).all()
        assert described["num_images"] == len(chosen) and [len(c) for c in described["counts"].values()] == [3, 3, 3]


def test_the_pixels_alone_choose_a_subset(whole):
    table, report, digests = whole
    shuffled = table.sample(frac=1, random_state=1)
    assert digests.tolist() == digests_of(table).tolist()
    again = subset(shuffled, report, 20, digests.loc[shuffled.index])[0]
    first = digests[table["split"] == "train"].sort_values().index[:20]
    assert set(again.loc[again["split"] == "train", "file_name"]) == set(table.loc[first, "file_name"])


@pytest.mark.parametrize("size", [0, -3, "all", "more"])
def test_a_size_that_is_none_is_one_line(whole, size):
    table, report, digests = whole
    size = {"all": sum(report["counts"]["train"]), "more": 10_000}.get(size, size)
    with pytest.raises(UserError, match=f"sample_sizes: {size} must be from 1 to {sum(report['counts']['train']) - 1}") as caught:
        subset(table, report, size, digests)
    assert "\n" not in str(caught.value)


def test_a_label_without_an_image_is_named(whole):
    table, report, digests = whole
    with pytest.raises(UserError, match=r"label \d \(.*\) has no image among 2; raise the size"):
        subset(table, report, 2, digests)


def test_a_held_out_label_may_have_none(whole):
    table, report, digests = whole
    out = table["split"].where(table["label"] != 2, data.HELD_OUT)
    counts = report["counts"] | {"train": [*report["counts"]["train"][:2], 0]}
    chosen, described = subset(table.assign(split=out), report | {"counts": counts}, 20, digests)
    assert set(chosen["label"]) == {0, 1} and described["counts"]["train"][2] == 0 and data.HELD_OUT not in set(chosen["split"])


@pytest.mark.parametrize(("network", "head"), [("dct", "density"), ("cnn", "softmax")])
def test_a_classifier_of_a_handful(whole, network, head):
    """Fewer images than a batch and than features, and labels that the calibration split may not have."""
    table, report, digests = whole
    chosen, described = subset(table, report, 12, digests)
    calibration = chosen[chosen["split"] == "calibration"]
    chosen = chosen.drop(calibration.index[calibration["label"] == calibration["label"].iloc[0]])
    description = factors_of(described)[0] | {"network": network, "head": head, "image_size": 16}
    settings = {"num_epochs": 2, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 1e-4}
    images = pictures.load_images(chosen["path"])
    trained, _ = fit(images, chosen["score_jpeg_size"].tolist(), chosen["label"].tolist(), chosen["split"], description, settings, 0)
    log_probs = trained.log_prob(images / 127.5 - 1, torch.zeros(len(images), dtype=torch.int64))
    assert log_probs.isfinite().all()


# --- pairs: nobody knows c ---


class Silent:
    log_metrics = log_artifact = log_image = lambda self, *args: None


def write_dataset(folder, table, report) -> None:
    folder.mkdir()
    io.write_parquet(folder / "metadata.parquet", table)
    io.write_json(folder / "report.json", report)


@pytest.fixture
def two_datasets(whole, tmp_path, monkeypatch):
    """Folders `known` and `constant`: the same images, with their prompts and with one prompt for all."""
    table, report, digests = whole
    chosen, described = subset(table, report, 40, digests)
    write_dataset(tmp_path / "known", chosen, described)
    write_dataset(tmp_path / "constant", chosen.assign(prompt="a coat"), described)
    monkeypatch.setattr(tracking, "run", lambda *args: nullcontext(Silent()))
    return tmp_path


def call(monkeypatch, script, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    errors.main(script.main)


def train_classifiers(folder, monkeypatch) -> None:
    from scripts import train_classifier

    for name in ("known", "constant"):
        options = ("--config", folder / "c.json", "--dataset", folder / name, "--output", folder / f"classifier_{name}", "--num-threads", 1)
        call(monkeypatch, train_classifier, *options)


def test_the_classifier_needs_no_prompts(two_datasets, monkeypatch):
    io.write_json(two_datasets / "c.json", {"classifier": {"num_epochs": 2}})
    train_classifiers(two_datasets, monkeypatch)
    for file in ("model.safetensors", "config.json"):
        assert (two_datasets / "classifier_known" / file).read_bytes() == (two_datasets / "classifier_constant" / file).read_bytes()


@pytest.mark.slow
def test_ctrl_needs_no_prompts_and_cfg_does(two_datasets, tiny_sd, monkeypatch):
    from scripts import finetune

    settings = {"num_updates": 2, "batch_size": 4, "micro_batch_size": 4, "min_timestep": 0, "probe": {"every": 2, "num_images": 2}}
    settings["lora"] = {"rank": 2, "target_modules": ["to_q", "to_v"]}
    config = {
        "base": {"path": str(tiny_sd)},
        "sampler": {"num_steps": 3},
        "prompts": {"subjects": ["coat", "bag"], "templates": {"train": ["{}", "a {}"]}},
        "classifier": {"num_epochs": 2},
        "dataset": {"image_size": 16},
        "finetune": settings,
        "adapters": {"cfg": {"num_updates": 2, "batch_size": 64, "micro_batch_size": 64}},  # more than there are images
    }
    io.write_json(two_datasets / "c.json", config)
    io.write_json(two_datasets / "cells.json", {"labels": [0, 1, 2], "cells": [["coat", 0], ["bag", 1], ["bag", 2]]})
    train_classifiers(two_datasets, monkeypatch)
    monkeypatch.setattr(finetune, "check_in_plain_diffusers", lambda *arguments: None)  # another process: see test_adapter.py
    files = ("pytorch_lora_weights.safetensors", "label_embedding.safetensors")
    same = {}
    for method in ("ctrl", "cfg"):
        for name in ("known", "constant"):
            call(
                monkeypatch, finetune, "--config", two_datasets / "c.json", "--name", method, "--cells", two_datasets / "cells.json",
                "--classifier", two_datasets / f"classifier_{name}", "--dataset", two_datasets / name,
                "--output", two_datasets / f"{method}_{name}", "--num-threads", 1,
            )  # fmt: skip
        known, constant = ([(two_datasets / f"{method}_{name}" / file).read_bytes() for file in files] for name in ("known", "constant"))
        same[method] = known == constant
    assert same == {"ctrl": True, "cfg": False}


# --- the table, what it says, and the figure ---


def evaluation(method, accuracy, kid, half=0.02):
    metrics = {"accuracy": accuracy, "kid_rejection": kid, "kid_rejection_within": 2 * kid, "train_seconds": None}
    figures = {m: {"value": v, "lo": v - half, "hi": v + half} for m, v in metrics.items() if v is not None}
    return {"method": method, "n": 512, "metrics": figures | {"train_seconds": {"value": 60.4 + accuracy}}}


def made_table():
    """CTRL ahead with 100 images, level with 300, behind with all 1,200."""
    evaluations = [
        evaluation("ctrl", 0.90, 0.045), evaluation("cfg", 0.95, 0.01), evaluation("cfg_n100", 0.50, 0.30),
        evaluation("ctrl_n100", 0.80, 0.20),
        evaluation("cfg_n300", 0.88, 0.05), evaluation("ctrl_n300", 0.89, 0.06), evaluation("rejection_reference", 1.0, 0.0),
        evaluation("pretrained", 0.3, 0.4),
    ]  # fmt: skip
    sizes = {"": 1200, "_n100": 100, "_n300": 300}
    reports = {s: {"counts": {"train": [n // 2, n - n // 2], "val": [n // 10], "calibration": [n // 10]}} for s, n in sizes.items()}
    classifiers_ = {s: {"val": {}, "generated": {"n": 64, "after": {"accuracy": 0.9 + k / 100}}} for k, s in enumerate(sizes)}
    tunings = {f"cfg{s}": {"best": {"scale": 1.0 + k}} for k, s in enumerate(sizes)}
    return evaluations, reports, classifiers_, tunings


def test_the_table_has_what_each_row_learned_from():
    table = efficiency.build(*made_table())
    assert table["method"].tolist() == ["pretrained", "rejection", *["cfg"] * 3, *["ctrl"] * 3]
    assert table["num_images"].isna().tolist() == [True] * 2 + [False] * 6
    assert table["num_images"].dropna().tolist() == [100, 300, 1200] * 2
    ctrl, cfg = (table[table["method"] == m] for m in ("ctrl", "cfg"))
    assert ctrl["num_val"].tolist() == ctrl["num_calibration"].tolist() == [10, 30, 120] and cfg["num_val"].isna().all()
    assert ctrl["classifier_accuracy"].tolist() == [0.91, 0.92, 0.9] and cfg["scale"].tolist() == [2.0, 3.0, 1.0]
    assert ctrl["accuracy_hi"].tolist() == pytest.approx([0.82, 0.91, 0.92]) and set(table["n"]) == {512}


def test_what_is_missing_is_named():
    evaluations, reports, classifiers_, tunings = made_table()
    for missing in ((reports | {}, classifiers_, {"cfg": tunings["cfg"]}), (reports, {"": classifiers_[""]}, tunings), ({}, {}, {})):
        with pytest.raises(UserError, match="has no dataset, classifier or tuning"):
            efficiency.build(evaluations, *missing)


def test_accuracies_of_several_factors():
    part = {"val": {}, "generated": {"n": 8, "after": {"accuracy": 0.75}}}
    assert efficiency.accuracies({"a": part, "b": part, "train_seconds": 3}) == {
        "classifier_accuracy_a": 0.75, "classifier_accuracy_b": 0.75, "classifier_n": 8,
    }  # fmt: skip
    assert efficiency.accuracies({"val": {}, "generated": None}) == {}


def test_sentences_follow_from_the_figures(tmp_path):
    table = efficiency.build(*made_table())
    accuracy, kid, _, seconds = efficiency.sentences(table)
    assert accuracy == (
        "accuracy: CTRL is ahead with 100 images, CFG is ahead with 1,200 images, the intervals overlap with 300; "
        "CFG with 300 images can still be told from CFG with all 1,200; CTRL with 300 images cannot be told from CTRL with all 1,200."
    )
    assert kid.startswith("KID to rejection: CTRL is ahead with 100 images, the intervals overlap with 300 and 1,200;")
    assert "CFG's interval meets the noise floor's with 1,200;" in kid and "CTRL's interval meets the noise floor's with none." in kid
    assert seconds == "A training took 61 to 61 s for CFG, 61 to 61 s for CTRL."
    text = efficiency.section(table)
    assert "| CTRL | 300 | 512 | 0.890 [0.870, 0.910] | 60.0 [40.0, 80.0] | 120.0 [100.0, 140.0] | 0.920 (n = 64) | – |" in text
    assert "| CFG | 1,200 | 512 |" in text and "| rejection (noise floor) | – | 512 | 1.000" in text
    table.to_csv(tmp_path / "t.csv", index=False)
    assert efficiency.section(pd.read_csv(tmp_path / "t.csv")) == text, "from the file, too"
    swapped = table.assign(method=table["method"].replace({"ctrl": "cfg", "cfg": "ctrl"}))
    assert efficiency.sentences(swapped)[0].startswith("accuracy: CTRL is ahead with 1,200 images, CFG is ahead with 100 images")


def test_figure(tmp_path):
    table = efficiency.build(*made_table())
    sample_efficiency(table, tmp_path / "all.png")
    assert size_of(tmp_path / "all.png") == pytest.approx((1260, 390), abs=1)
    sample_efficiency(table[table["num_images"].notna()].drop(columns="kid_rejection_within"), tmp_path / "two.png")
    assert size_of(tmp_path / "two.png") == pytest.approx((855, 390), abs=1)


def test_the_scripts(whole, tmp_path, monkeypatch):
    from scripts import plot_efficiency, subset_dataset

    table, report, _ = whole
    write_dataset(tmp_path / "dataset", table, report)
    call(monkeypatch, subset_dataset, "--dataset", tmp_path / "dataset", "--size", 20, "--output", tmp_path / "dataset_n20")
    assert sum(io.read_json(tmp_path / "dataset_n20" / "report.json")["counts"]["train"]) == 20
    with pytest.raises(SystemExit):
        call(monkeypatch, subset_dataset, "--dataset", tmp_path / "dataset", "--size", 300, "--output", tmp_path / "dataset_n300")
    assert not (tmp_path / "dataset_n300").exists()

    monkeypatch.setattr(plot_efficiency, "run", lambda *args: nullcontext(Silent()))
    evaluations, reports, classifiers_, tunings = made_table()
    files = {"--evaluations": {f"evaluation_val/{e['method']}.json": e for e in evaluations}}
    files["--reports"] = {f"dataset{s}/report.json": r for s, r in reports.items()}
    files["--classifiers"] = {f"classifier{s}/metrics.json": m for s, m in classifiers_.items()}
    files["--tuning"] = {f"tuning/{name}.json": t for name, t in tunings.items()}
    arguments = []
    for flag, contents in files.items():
        arguments.append(flag)
        for name, content in contents.items():
            io.write_json(tmp_path / "results" / name, content)
            arguments.append(tmp_path / "results" / name)
    outputs = {f"--output-{kind}": tmp_path / f"out.{kind}" for kind in ("csv", "md", "figure")}
    call(monkeypatch, plot_efficiency, *arguments, *(text for pair in outputs.items() for text in pair))
    assert outputs["--output-md"].read_text() == efficiency.section(efficiency.build(*made_table()))
    assert len(pd.read_csv(outputs["--output-csv"])) == 8 and size_of(outputs["--output-figure"])[0] == 1260


def test_the_page_on_all_methods_takes_the_section(tmp_path, monkeypatch):
    from scripts import write_methods_page

    table = efficiency.build(*made_table())
    table.to_csv(tmp_path / "efficiency.csv", index=False)
    rows = table[table["method"] == "pretrained"].drop(columns="num_images")
    rows.to_csv(tmp_path / "paper.csv", index=False)
    io.write_json(tmp_path / "samples.json", {"device": "a CPU"})
    monkeypatch.chdir(ROOT)
    arguments = ["--table", tmp_path / "paper.csv", "--samples", tmp_path / "samples.json", "--command", "x", "--output", tmp_path / "p.md"]
    call(monkeypatch, write_methods_page, *arguments)
    without = (tmp_path / "p.md").read_text()
    call(monkeypatch, write_methods_page, *arguments, "--efficiency", tmp_path / "efficiency.csv")
    assert (tmp_path / "p.md").read_text() == without + "\n" + efficiency.section(table)
    with pytest.raises(SystemExit):
        call(monkeypatch, write_methods_page, *arguments, "--efficiency", tmp_path / "paper.csv")
