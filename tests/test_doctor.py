"""The doctor: gradients and accuracies by hand; every piece that is broken on purpose is named in one line."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import doctor, errors, gradients, io
from ctrl.classifier import Classifier, Product
from ctrl.config import merge, resolve
from ctrl.labels import Factors
from ctrl.process import Process
from scripts.common import DEFAULTS, SCHEMA, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES
from tests.repository import ROOT
from tests.test_train_classifier import write_dataset

CONFIG = resolve(read_yaml(DEFAULTS), io.read_json(SCHEMA))
NAMES = {0: "0 (big)", 1: "1 (small)"}
PROCESS = Process(torch.tensor([900, 500, 100]), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5, 0.9, 0.99]), 1.0)


def network(num_classes: int = 2, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    description = {"network": "cnn", "head": "softmax", "num_classes": num_classes, "descending": True}
    return Classifier(description).eval().requires_grad_(False)


def test_gradients_of_a_linear_world():
    """eps = a x makes every step a factor: x̂_0 = c_i x_t, mu = m_i x_t; and log p = w · x_0 has the gradient w."""
    a, w, noise = 0.3, torch.tensor([3.0, 4.0]), torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
    found = gradients.gradient_norms(PROCESS, lambda x, i: a * x, lambda x: (x * w).sum(1), noise)
    c = [(1 - (1 - abar) ** 0.5 * a) / abar**0.5 for abar in (0.1, 0.5, 0.9)]
    m = [PROCESS.mean(i, torch.ones(1, 1), a * torch.ones(1, 1)).item() for i in range(3)]
    assert found["x_0"].shape == (1, 5) and torch.allclose(found["x_0"], torch.tensor(5.0).double())
    assert torch.allclose(found["look_ahead"], 5 * torch.tensor(c).abs().double()[:, None].expand(3, 5), rtol=1e-5)
    carried = [abs(m[0] * m[1] * m[2]), abs(m[1] * m[2]), abs(m[2])]
    assert torch.allclose(found["adjoint"], 5 * torch.tensor(carried).double()[:, None].expand(3, 5), rtol=1e-5)


def of_ones() -> dict:
    return {"x_0": torch.ones(1, 4), "look_ahead": torch.ones(3, 4), "adjoint": torch.ones(3, 4)}


def test_labels_without_a_gradient_share_a_line():
    y, found = torch.tensor([0, 0, 1, 1]), of_ones()
    assert doctor.gradient_findings(found, y, NAMES, [900, 500, 100]) == []
    found["x_0"][0, 0] = 0  # another trajectory of label 0 has one
    assert doctor.gradient_findings(found, y, NAMES, [900, 500, 100]) == []
    for rows in found.values():
        rows[:] = 0
    (finding,) = doctor.gradient_findings(found, y, NAMES, [900, 500, 100])
    assert finding.bad and "label 0 (big), 1 (small) has no gradient at all steps" in finding.text


def test_a_gradient_that_is_lost_at_a_step_is_named_with_label_and_step():
    y, found = torch.tensor([0, 0, 1, 1]), of_ones()
    found["look_ahead"][1, 2:] = 0
    found["adjoint"][0, 0] = torch.nan
    lost, wild = sorted(doctor.gradient_findings(found, y, NAMES, [900, 500, 100]), key=lambda f: f.bad)
    assert not lost.bad and "label 1 (small) has no gradient at x̂_0 of t = 500;" in lost.text
    assert wild.bad and "label 0 (big) has a gradient that is not finite at t = 900;" in wild.text


def test_gradient_report_counts_by_label():
    found = of_ones() | {"x_0": torch.tensor([[1.0, 3.0, 5.0, 5.0]])}
    report = doctor.gradient_report(found, torch.tensor([0, 0, 0, 1]), NAMES, [900, 500, 100])
    row = report["labels"]["0"]
    assert row["n"] == 3 and row["x_0"][0]["mean"] == 3 and row["x_0"][0]["median"] == 3 and len(row["adjoint"]) == 3
    assert row["x_0"][0]["p95"] == pytest.approx(4.8) and report["labels"]["1"]["x_0"][0]["p5"] == 5


@pytest.mark.parametrize("several", [False, True])
def test_a_right_gradient_passes_and_the_classifier_is_left_as_it_was(several):
    classifier = Product([network(2), network(3, seed=1)]) if several else network(3)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = gradients.finite_differences(classifier, images, torch.tensor([0, 1, 2, 1]))
    assert report["passed"] and report["relative_error"]["p95"] < 1e-4 and report["n"] == 4
    assert report["rounding"]["nats"] > 0 and report["rounding"]["error_of_one_level"] > report["relative_error"]["p95"]
    assert all(part.rounding for part in gradients.parts_of(classifier))
    assert all(torch.equal(value, before[key]) and value.dtype == before[key].dtype for key, value in classifier.state_dict().items())


def test_a_wrong_gradient_fails():
    classifier = network()
    body, classifier.network.blocks[1].forward = classifier.network.blocks[1].forward, lambda x: body(x + 0.5 * (x - x.detach()))
    report = gradients.finite_differences(classifier, torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 0, 1]))
    assert not report["passed"] and report["relative_error"]["median"] == pytest.approx(0.5, abs=0.01)
    (finding,) = doctor.finite_difference_findings(report)
    assert finding.bad and "finite differences" in finding.text


def test_nan_is_no_pass():
    error = gradients.derivative_errors(lambda x: x.flatten(1).sum(1) * torch.nan, torch.ones(2, 1), torch.ones(1, 2, 1), 0.1)
    assert error.isnan().all() and not gradients.summary(error)["p95"] <= gradients.MAX_ERROR


def log_probs(guesses) -> torch.Tensor:
    return torch.eye(3)[torch.tensor(guesses)].clamp(min=1e-3).log()


def test_accuracy_against_the_commonest_label():
    report = doctor.accuracy_report(log_probs([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1]))
    assert report["accuracy"] == pytest.approx(0.8) and report["commonest"] == {"label": 1, "share": 0.6}
    assert report["gain"] == pytest.approx(0.2)
    assert [row["n"] for row in report["recall"]] == [2, 3, 0]
    assert (
        report["recall"][0]["recall"] == 1
        and report["recall"][1]["recall"] == pytest.approx(2 / 3)
        and report["recall"][2]["recall"] is None
    )


def findings(guesses, labels, held_out=1.0) -> list[doctor.Finding]:
    report = doctor.accuracy_report(log_probs(guesses), torch.tensor(labels))
    return doctor.accuracy_findings(report, {"n": 1000, "accuracy": held_out}, [0, 1, 2], ["big", "middle", "small"])


def test_a_good_classifier_gives_no_line():
    assert findings([0, 1, 2] * 20, [0, 1, 2] * 20) == []


def test_shuffled_labels_are_no_better_than_the_commonest():
    y = np.random.default_rng(0).permutation([0] * 30 + [1] * 20 + [2] * 20)
    guesses = np.random.default_rng(1).permutation(y)
    (bad,) = [f for f in findings(guesses.tolist(), y.tolist(), held_out=0.4) if f.bad]
    assert "on 70 generated images, the commonest label's share is 0.429: it has learned nothing" in bad.text


def test_far_below_the_held_out_images_is_a_warning():
    guesses, labels = [0, 1, 2, 2] * 20, [0, 1, 2, 1] * 20
    (finding,) = findings(guesses, labels, held_out=0.95)
    assert not finding.bad and "accuracy 0.750 on 80 generated images, 0.950 on 1000 held-out ones" in finding.text
    assert findings(guesses, labels, held_out=0.8) == []


def test_labels_that_are_not_drawn_or_not_recognised_are_named():
    lines = [f.text for f in findings([0, 1, 1, 1] * 20, [0, 1, 1, 0] * 20, held_out=0.75)]
    assert len(lines) == 1 and "none of 80 generated images has label 2 (small)" in lines[0]
    lines = [f.text for f in findings([0, 1, 1] * 20, [0, 1, 2] * 20, held_out=0.7)]
    assert len(lines) == 1 and "it recognises none of 20 generated images of label 2 (small)" in lines[0]
    (finding,) = findings([1] * 9, [1] * 9)
    assert finding.bad and "all 9 generated images have label 1" in finding.text


def test_every_trainer_gets_its_own_recipe():
    found = {name: config["finetune"] for name, config in doctor.recipes(CONFIG, True).items()}
    assert list(found) == ["backprop", "adjoint", "efficient_adjoint", "policy_gradient", "supervised"]
    assert all(name == settings["trainer"] for name, settings in found.items())
    assert found["supervised"]["batch_size"] == CONFIG["adapters"]["cfg"]["batch_size"]
    truncated = merge(CONFIG, {"adapters": {}, "finetune": {"truncation": [1, 3]}}) | {"adapters": {}}
    found = {name: config["finetune"] for name, config in doctor.recipes(truncated, False).items()}
    assert [found[name]["truncation"] for name in found] == [[1, 3], None, None, None] and "supervised" not in found
    assert list(doctor.recipes(merge(truncated, {"finetune": {"kl_weight": 0.0}}), False)) == ["backprop", "policy_gradient"]


@pytest.fixture
def script(tmp_path, tiny_sd, monkeypatch, capsys):
    """The script on the tiny base, two labels and a classifier: its exit code, and the lines on what is wrong."""
    from scripts import doctor as script

    torch.manual_seed(0)
    (tmp_path / "dataset").mkdir()
    rows = []
    for k in range(8):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{k}.png")
        rows.append({"path": str(tmp_path / f"{k}.png"), "prompt": "coat", "split": "val" if k % 2 else "train", "label": k // 2 % 2})
    io.write_parquet(tmp_path / "dataset/metadata.parquet", pd.DataFrame(rows))
    report = {"oracle": "brightness", "unit": "", "num_classes": 2, "descending": True, "edges": [0.5], "label_names": ["light", "dark"]}
    io.write_json(tmp_path / "dataset/report.json", report)
    io.write_json(tmp_path / "cells.json", {"labels": [0, 1], "cells": [[subject, y] for subject in SUBJECTS for y in (0, 1)]})
    changes = {
        "base": {"path": str(tiny_sd)}, "sampler": {"num_steps": 2}, "prompts": {"subjects": SUBJECTS, "templates": {"train": TEMPLATES}},
        "finetune": {"batch_size": 4, "micro_batch_size": 4},
    }  # fmt: skip
    io.write_json(tmp_path / "config.json", changes)

    def call(classifier: Classifier, *more: str) -> tuple[int, str]:
        classifiers.save(tmp_path / "classifier", classifier)
        argv = ["doctor.py", "--config", tmp_path / "config.json", "--num-trajectories", 4, "--num-images", 4, "--no-trainers"]
        argv += ["--num-threads", torch.get_num_threads(), *more]
        argv += [text for name in ("classifier", "cells.json", "dataset") for text in (f"--{name.split('.')[0]}", tmp_path / name)]
        monkeypatch.setattr(sys, "argv", [str(text) for text in argv])
        with pytest.raises(SystemExit) as stopped:
            errors.main(script.main)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("bad: ", "warning: ", "nothing wrong"))]
        return int(stopped.value.code), lines

    return call


def test_a_constant_classifier(script, tmp_path):
    classifier = network()
    classifier.network.linear.weight.zero_()
    code, lines = script(classifier, "--json", str(tmp_path / "report.json"))
    assert code == 1
    (line,) = [line for line in lines if "gradient" in line]
    assert line.startswith("bad: classifier: log p(y | x) of label 0 (light), 1 (dark) has no gradient at all steps")
    report = io.read_json(tmp_path / "report.json")
    assert report["gradients"]["n"] == 4 and report["accuracy"]["generated"]["n"] == 4 and report["suggestion"] == ""


def test_a_weight_that_is_nan(script):
    classifier = network()
    classifier.network.linear.weight[0, 0] = torch.nan
    code, lines = script(classifier)
    assert code == 1 and lines == ["bad: classifier: 1 of its weights are not finite (network.linear.weight): load or train it again"]


@pytest.mark.parametrize("content", ["", "{}", '{"cells": []}'])
def test_empty_cells_and_every_other_broken_piece(script, tmp_path, content):
    (tmp_path / "cells.json").write_text(content)
    (tmp_path / "3.png").unlink()
    code, lines = script(network())
    assert code == 1 and len(lines) == 2 and all(line.startswith("bad: ") for line in lines)
    assert "cells: " in lines[0] and "cells.json" in lines[0] and "3.png: missing file" in lines[1]


def test_labels_that_do_not_fit(base):
    space = Factors.of(2)
    lines = [f.text for f in doctor.check_pieces(base, network(3), space, [("coat", 0), ("coat", 7)])]
    assert len(lines) == 2 and "it has 3 labels, the dataset has 2" in lines[0] and "label 7" in lines[1]
    assert doctor.check_pieces(base, network(2), space, [("coat", 0)]) == []


@pytest.mark.slow
def test_everything_is_measured_on_the_embedded_base(tmp_path, real, trained):
    write_dataset(tmp_path / "dataset", [part[:600] if len(part) > 3 else part for part in real])
    classifiers.save(tmp_path / "classifier", trained[0])
    io.write_json(tmp_path / "cells.json", {"labels": [0, 1, 2, 3], "cells": [["pullover", 0], ["coat", 1], ["bag", 2], ["sneaker", 3]]})
    io.write_json(
        tmp_path / "config.json", {"finetune": {"batch_size": 8, "micro_batch_size": 8}, "adapters": {"cfg": {"micro_batch_size": 8}}}
    )
    arguments = [text for name in ("classifier", "cells.json", "dataset") for text in (f"--{name.split('.')[0]}", tmp_path / name)]
    command = [sys.executable, "scripts/doctor.py", "--config", tmp_path / "config.json", *arguments, "--json", tmp_path / "report.json"]
    command += ["--num-images", "100", "--num-threads", "1"]  # two of them wait for each other where other tests run beside
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = io.read_json(tmp_path / "report.json")
    assert report["finite_differences"]["passed"] and report["accuracy"]["generated"]["accuracy"] > 0.7
    assert list(report["trainers"]) == ["backprop", "adjoint", "efficient_adjoint", "policy_gradient", "supervised"]
    assert all(row["seconds_per_update"] > 0 and row["memory_mb"] > row["memory_before_mb"] > 100 for row in report["trainers"].values())
    suggested = yaml.safe_load(report["suggestion"])["finetune"]
    assert set(suggested) >= {"trainer", "micro_batch_size", "gradient_checkpointing", "max_adjoint_norm", "temperature"}
    resolve(merge(CONFIG, {"finetune": {"batch_size": 8}}, {"finetune": suggested}), io.read_json(SCHEMA))
