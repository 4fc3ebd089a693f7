"""The table of results: its columns, its rows' order, how its numbers read, and what it refuses."""

import io
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from ctrl import tables
from ctrl.errors import UserError

METHODS = pd.DataFrame(
    [
        ("pretrained", "pretrained", "no", "no", "–"),
        ("rejection", "rejection", "no", "no", "yes"),
        ("ctrl", "finetune", "yes", "no", "yes"),
        ("ctrl_gamma1", "finetune", "yes", "no", "yes"),
    ],
    columns=list(tables.DESCRIPTION),
)


def figure(value, lo=None, hi=None):
    return {"value": value, "n": 512, "lo": lo, "hi": hi}


def evaluation(method, accuracy=0.5, **more):
    figures = {
        "accuracy": figure(accuracy, accuracy - 0.04, accuracy + 0.04),
        "kid_rejection": figure(-0.00012, -0.003, 0.0041),
        "diversity": figure(0.98, 0.95, 1.01),
        "nfe": figure(10.0),
        "nfe_forward": figure(10.0),
        "seconds_per_image": figure(0.0123, 0.012, 0.013),
    }
    return {"method": method, "n": 512, "metrics": figures | more}


def test_columns_and_order_of_the_csv():
    table = tables.build(
        METHODS, [evaluation("ctrl", 0.95, train_seconds=figure(500.0)), evaluation("pretrained", 0.25), evaluation("rejection", 1.0)]
    )
    read = pd.read_csv(io.StringIO(tables.to_csv(table)), keep_default_na=False, na_values=[""])
    assert read["method"].tolist() == ["pretrained", "rejection", "ctrl"]
    assert read.columns[:6].tolist() == [*tables.DESCRIPTION, "n"]
    assert read.columns[6:9].tolist() == ["accuracy", "accuracy_lo", "accuracy_hi"]
    assert "nfe_forward" in read and "nfe_forward_lo" not in read and "mae" not in read
    assert read["accuracy"].tolist() == [0.25, 1.0, 0.95] and read["accuracy_hi"][0] == pytest.approx(0.29)
    assert read["train_seconds"].isna().tolist() == [True, True, False]
    assert read["n"].tolist() == [512] * 3


def test_a_metric_without_a_name_here_gets_its_column():
    assert tables.build(METHODS, [evaluation("ctrl", sharpness=figure(3.0))])["sharpness"].tolist() == [3.0]


def test_markdown_reads_well():
    text = tables.to_markdown(tables.build(METHODS, [evaluation("rejection", 1.0), evaluation("ctrl", 0.9532, diversity=figure(None))]))
    lines = text.splitlines()
    assert lines[0].startswith("| method | fine-tunes | learns x_t → y | uses y ⊥ c given x | n | accuracy | KID to rejection ×1000 |")
    assert lines[2].startswith(
        "| rejection (noise floor) | no | no | yes | 512 | 1.000 [0.960, 1.040] | −0.1 [−3.0, 4.1] | 0.980 [0.950, 1.010] |"
    )
    assert "| 0.953 [0.913, 0.993] |" in lines[3] and "| – | 10.0 | 0.012 |" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "noise floor" in lines[-3] or "noise floor" in lines[-4]


@pytest.mark.parametrize(("value", "expected"), [(-0.00001, "0.0"), (0.00001, "0.0"), (-0.02, "−20.0"), (float("nan"), "–")])
def test_numbers(value, expected):
    assert tables.number(pd.Series({"kid_rejection": value}), "kid_rejection") == expected


def test_latex_is_balanced_and_escaped():
    text = tables.to_latex(tables.build(METHODS, [evaluation("ctrl_gamma1"), evaluation("rejection")]))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in body}) == 1
    assert r"ctrl\_gamma1" in text and r"\begin{tabular}" in text and r"\bottomrule" in text and "$x_t$" in text
    assert text.count("{") == text.count("}") and text.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path):
    table = tables.to_latex(tables.build(METHODS, [evaluation("ctrl_gamma1"), evaluation("rejection")]))
    (tmp_path / "t.tex").write_text(r"\documentclass{article}\usepackage{booktabs}\begin{document}" + table + r"\end{document}")
    assert subprocess.run(["pdflatex", "-interaction=batchmode", "t.tex"], cwd=tmp_path, check=False).returncode == 0


def test_mistakes():
    with pytest.raises(UserError, match="evaluation of 'nobody'"):
        tables.build(METHODS, [evaluation("nobody")])
    with pytest.raises(UserError, match="two evaluations of 'ctrl'"):
        tables.build(METHODS, [evaluation("ctrl"), evaluation("ctrl")])
    with pytest.raises(UserError, match="no column fine_tunes"):
        tables.build(METHODS.drop(columns="fine_tunes"), [evaluation("ctrl")])
    with pytest.raises(UserError, match="no evaluations"):
        tables.build(METHODS, [])
    with pytest.raises(UserError, match="no table of methods"):
        tables.read_methods(Path("nowhere.tsv"))


def test_the_shipped_methods_have_the_columns():
    methods = tables.read_methods(Path(__file__).resolve().parent.parent / "config/methods.tsv")
    assert set(tables.DESCRIPTION) <= set(methods) and methods["method"].is_unique


def test_accuracies_of_factors_follow_the_accuracy():
    further = {"accuracy_brightness": figure(0.9), "accuracy_held_out": figure(0.5)}
    text = tables.to_markdown(tables.build(METHODS, [evaluation("ctrl", 0.8, **further), evaluation("rejection", 1.0, **further)]))
    assert "| n | accuracy | accuracy, brightness | accuracy, held out |" in text.splitlines()[0]
    assert "no training image had, and no training request where `finetune.ask_held_out` is false" in text
