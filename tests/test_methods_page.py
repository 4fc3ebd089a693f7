"""The page on all methods: each has its formula, and every sentence follows from the figures, whichever way they fall."""

import pandas as pd
import pytest

from ctrl import methods_page, tables
from ctrl.errors import UserError
from scripts import write_methods_page
from scripts.common import DEFAULTS, read_yaml
from tests.repository import ROOT

CONFIG = read_yaml(DEFAULTS)
METHODS = tables.read_methods(ROOT / "config/methods.tsv")


def row(method, accuracy, half=0.02, **more):
    figures = {"accuracy": accuracy, "accuracy_lo": accuracy - half, "accuracy_hi": accuracy + half, "nfe": 10.0}
    return {"method": method, "n": 64, **figures, **more}


def test_every_shipped_method_has_a_formula_and_needs():
    for _, method in METHODS.iterrows():
        assert methods_page.mechanism(method, CONFIG) in methods_page.FORMULAS, method["method"]
        assert methods_page.needs(method, CONFIG)


def test_a_method_is_described_by_what_the_config_makes_of_it():
    by_name = METHODS.set_index("method", drop=False)
    assert methods_page.mechanism(by_name.loc["ctrl_adjoint"], CONFIG) == "adjoint"
    unguided = {**CONFIG, "adapters": {**CONFIG["adapters"], "ctrl_adjoint": {"trainer": "adjoint", "unguided_jacobian": True}}}
    assert methods_page.mechanism(by_name.loc["ctrl_adjoint"], unguided) == "unguided" and "unguided" in methods_page.FORMULAS
    assert methods_page.mechanism(by_name.loc["reward_maximization"], CONFIG) == "reward"
    with_kl = {**CONFIG, "adapters": {**CONFIG["adapters"], "reward_maximization": {}}}
    assert methods_page.mechanism(by_name.loc["reward_maximization"], with_kl) == "backprop"
    assert "triples" in methods_page.needs(by_name.loc["cfg"], CONFIG) and "pairs" in methods_page.needs(by_name.loc["ctrl"], CONFIG)
    noisy = {**by_name.loc["mpgd"], "learns_xt_to_y": "yes"}
    assert "noisy x_t" in methods_page.needs(noisy, CONFIG)


@pytest.mark.parametrize(("half", "overlapping"), [(0.02, False), (0.03, True)])
def test_the_best_and_whom_it_cannot_be_told_from(half, overlapping):
    first = methods_page.sentences(pd.DataFrame([row("ctrl", 0.90, half), row("mpgd", 0.95, half), row("rejection", 1.0)]))
    second = methods_page.sentences(pd.DataFrame([row("ctrl", 0.95, half), row("mpgd", 0.90, half), row("rejection", 1.0)]))
    assert first[0].startswith("The most accurate is `mpgd`: accuracy 0.950") and second[0].startswith("The most accurate is `ctrl`")
    assert ("overlap its own: `ctrl`." in first[0]) is overlapping and ("No other" in first[0]) is not overlapping


def test_distances_are_held_against_the_floor_and_diversity_against_one():
    def with_kid(method, kid, diversity):
        return row(method, 0.9, kid_rejection=kid, kid_rejection_lo=kid - 0.001, kid_rejection_hi=kid + 0.001, diversity=diversity)

    table = pd.DataFrame([with_kid("rejection", 0.0, 1.0), with_kid("ctrl", 0.0015, 1.2), with_kid("mpgd", 0.009, 0.9)])
    text = "\n".join(methods_page.sentences(table))
    assert "nearest to the exact images is `ctrl`: KID to rejection ×1000 1.5 [0.5, 2.5]" in text and "cannot be told" in text
    assert "diversity is nearest to 1 is `mpgd`" in text
    far = table.assign(kid_rejection_lo=table["kid_rejection"], kid_rejection_hi=table["kid_rejection"])
    assert "it can be told from the exact law" in "\n".join(methods_page.sentences(far))


def test_costs_are_relative_to_the_pretrained_model():
    table = pd.DataFrame([row("pretrained", 0.3), row("mpgd", 0.9) | {"nfe": 25.0}, row("ctrl", 0.9, train_seconds=61.6)])
    assert methods_page.costs(table) == [
        "For one pass of the pretrained model an image takes, forward and backward together: 2.5 by `mpgd`, 1.0 by `ctrl`.",
        "Training took 62 s for `ctrl`.",
    ]


def test_the_page_lists_what_was_not_run_and_its_tables_are_tables():
    text = methods_page.page(
        METHODS, pd.DataFrame([row("pretrained", 0.25), row("ctrl", 0.875)]), CONFIG, ["From a test."], [("a.png", "A.")]
    )
    missing = next(line for line in text.splitlines() if line.startswith("Not run"))
    assert "`mpgd`" in missing and "`ctrl`" not in missing and "`pretrained`" not in missing
    assert "| `ctrl` | 64 | 0.875 [0.855, 0.895] |" in text and "![A.](a.png)" in text
    block = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in block[: len(METHODS) + 2]} == {7}
    with_trainers = methods_page.page(
        METHODS, pd.DataFrame([row("ctrl", 0.9)]), CONFIG, [], sections=["## The trainers compared\n\nTwo trainers.\n"]
    )
    assert "## The trainers compared\n\nTwo trainers.\n" in with_trainers and "trainers compared" not in text
    complete = pd.DataFrame([row(name, 0.5) for name in METHODS["method"]])
    assert "Not run" not in methods_page.page(METHODS, complete, CONFIG, [])


def test_differences_name_what_is_not_the_default():
    assert methods_page.differences({"a": {"b": 1, "c": [2]}, "d": 3}, {"a": {"b": 1, "c": [1]}, "d": 3}) == ["a.c: [2]"]


def test_the_script_says_where_and_refuses_another_table(tmp_path, monkeypatch):
    (tmp_path / "samples.json").write_text('{"device": "a certain CPU"}')
    pd.DataFrame([row("pretrained", 0.25)]).to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame([row("nobody", 0.25)]).to_csv(tmp_path / "other.csv", index=False)
    (tmp_path / "c.yaml").write_text("sampler: {num_steps: 7}")
    monkeypatch.chdir(ROOT)
    page = tmp_path / "methods.md"

    def write(table):
        files = ["--table", tmp_path / table, "--samples", tmp_path / "samples.json", "--config", tmp_path / "c.yaml"]
        monkeypatch.setattr("sys.argv", ["write_methods_page.py", *map(str, files), "--command", "make demo", "--output", str(page)])
        write_methods_page.main()

    for table, part in (("other.csv", "'nobody'"), ("nowhere.csv", "cannot be read")):
        with pytest.raises(UserError, match=part):
            write(table)
        assert not page.exists()
    write("t.csv")
    text = page.read_text()
    assert "a certain CPU" in text and "`make demo`" in text and "`sampler.num_steps: 7`" in text
