"""Labels that people gave: read from a column, learned by a judge on images of its own, and measured by it from then on."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import columns, data, errors, io, judge, judged, play, scoring, tables
from ctrl.bins import describe_factor
from ctrl.config import merge, resolve
from ctrl.errors import UserError
from ctrl.figures import histogram
from scripts import build_dataset
from scripts.common import DEFAULTS, SCHEMA, read_yaml
from tests.test_build_dataset import recorder  # noqa: F401 (a fixture)
from tests.test_own_network import NETWORK

SHARES = {"train": 0.6, "val": 0.2, "calibration": 0.2}
LABEL = {"oracle": "column:mood", "edges": "values", "num_classes": 3, "descending": True, "judge": {"share": 0.4, "network": "pixels"}}
MOODS = ["sad", "calm", "glad"]  # the darker, the sadder


def write_folder(folder: Path, n: int = 240, size: int = 16) -> pd.DataFrame:
    """Images of three brightnesses and noise, with what people say of each in words (`mood`) and as a number (`joy`)."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        level = 50 + 70 * (i % 3)
        Image.fromarray((level + rng.integers(-15, 16, (size, size + 2 * (i % 2), 3))).astype(np.uint8)).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "prompt": "a face", "mood": MOODS[i % 3], "joy": str((i % 3) / 2)})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "metadata.csv", index=False)
    return table


def store(name: str, image: Image.Image) -> Path:
    image.save(Path("cropped") / name)
    return Path("cropped") / name


@pytest.fixture
def folder(tmp_path, monkeypatch, recorder) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cropped").mkdir()
    write_folder(tmp_path / "faces")
    return tmp_path / "faces"


def build(folder: Path, **label) -> tuple[pd.DataFrame, dict]:
    return data.build(folder, 16, LABEL | label, SHARES, crop=True, store=store)


def test_what_people_say_is_the_label(folder):
    table, report = build(folder)
    assert report["label_names"] == ["calm", "glad", "sad"] and report["nominal"] and report["edges"] == [0.5, 1.5]
    said = [MOODS[int(name[:3]) % 3] for name in table["file_name"]]
    assert [report["label_names"][y] for y in table["label"]] == said
    assert report["oracle"] == "mood" and report["counts"]["train"] == [
        ((table["split"] == "train") & (table["label"] == y)).sum() for y in range(3)
    ]


def test_the_judges_share_is_of_no_use_to_others_and_moves_nobody(folder):
    table, _ = build(folder)
    apart = table["split"].str.startswith("judge_")
    assert 0.3 < apart.mean() < 0.5 and set(table["split"]) == {*data.SPLITS, *(f"judge_{s}" for s in data.SPLITS)}
    other, _ = build(folder, judge={"share": 0.2, "network": "pixels"})
    assert (other["split"].str.removeprefix("judge_") == table["split"].str.removeprefix("judge_")).all()
    assert other["split"].str.startswith("judge_").sum() < apart.sum()
    assert not (other["split"].str.startswith("judge_") & ~apart).any(), "a larger share holds every smaller one"


def test_an_image_that_nobody_labelled_is_refused(folder):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    table.loc[[4, 7], "mood"] = ["", "  "]
    table.to_csv(folder / "metadata.csv", index=False)
    rows, report = build(folder)
    reason = "no label in the column mood"
    assert report["refused"] == [{"file_name": name, "reason": reason} for name in ("004.png", "007.png")]
    assert "004.png" not in set(rows["file_name"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"oracle": "column:temper"}, "has no column temper"),
        ({"num_classes": 4}, r"the column mood has 3 values \(calm, glad, sad\), and label.num_classes is 4: set it to 3"),
        ({"edges": "quantiles"}, "'sad', which is no number: set label.edges: values"),
        ({"oracle": "column:brightness"}, "has the name of an oracle of the project"),
        ({"judge": {"share": 0.001, "network": "pixels"}}, "the split judge_.* is empty; .* label.judge.share"),
    ],
)
def test_refused(folder, label, message):
    with pytest.raises(UserError, match=message):
        build(folder, **label)


def test_a_comma_would_end_a_name(folder):
    with pytest.raises(UserError, match="hold no comma"):
        columns.scores_of(pd.Series(["a, b", "c"]), "mood", "values")


def test_numbers_that_are_names_are_in_their_order():
    scores, names = columns.scores_of(pd.Series(["10", "9", " 9", "-1"]), "stage", "values")
    assert names == ["-1", "9", "10"] and scores.tolist() == [2, 1, 1, 0]


def call(monkeypatch, label: dict, classifier: dict) -> None:
    """scripts/build_dataset.py on the folder faces, with a config of these sections."""
    settings = {"num_epochs": 12, "batch_size": 16, "learning_rate": 1e-2, **classifier}
    config = {"dataset": {"kind": "folder", "path": "faces", "image_size": 16, "resize": "crop", "splits": SHARES}}
    config |= {
        "label": label,
        "classifier": settings,
        "mlflow": {"tracking_uri": "sqlite:///mlflow.db"},
        "evaluation": {"num_bootstrap": 50},
    }
    Path("config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["build_dataset", "--config", "config.json", "--images", "faces", "--output", "out/dataset"])
    errors.main(build_dataset.main)


def test_the_judge_measures_what_nobody_labelled(folder, monkeypatch, capsys):
    call(monkeypatch, LABEL, {"network": "pixels", "head": "softmax"})
    report = io.read_json(Path("out/dataset/report.json"))
    figure = report["judge_quality"]["accuracy"]
    table = io.read_parquet(Path("out/dataset/metadata.parquet"))
    assert figure["n"] == (table["split"] == "judge_calibration").sum() and figure["value"] > 0.9
    assert f"judge of mood: accuracy {figure['value']:.3f}" in capsys.readouterr().out
    pictures = [Image.fromarray(np.full((16, 16, 3), level, dtype=np.uint8)) for level in (45, 118, 195)]
    assert scoring.scorer(report)(pictures).tolist() == [2, 0, 1], "sad, calm, glad"
    before = {path: path.read_bytes() for path in Path("out/dataset").rglob("*.*")}
    call(monkeypatch, LABEL, {"network": "pixels", "head": "softmax"})
    assert {path: path.read_bytes() for path in Path("out/dataset").rglob("*.*")} == before


def test_another_judge_is_noticed(folder, monkeypatch):
    call(monkeypatch, LABEL, {"network": "pixels", "head": "softmax", "num_epochs": 1})
    report = io.read_json(Path("out/dataset/report.json"))
    changed = classifiers.load(Path(report["judge"]))
    changed.temperature += 1
    classifiers.save(Path(report["judge"]), changed)
    with pytest.raises(UserError, match="out/dataset/judge/mood has changed"):
        scoring.scorer(report)


def test_a_column_of_numbers_has_bins(folder, monkeypatch):
    binned = {"oracle": "column:joy", "edges": [0.25, 0.75], "judge": LABEL["judge"]}
    call(monkeypatch, binned, {"network": "pixels", "head": "density"})
    report = io.read_json(Path("out/dataset/report.json"))
    assert report["label_names"] == [">= 0.75", "0.25-0.75", "< 0.25"] and "nominal" not in report
    assert report["judge_quality"]["accuracy"]["value"] > 0.9
    assert abs(scoring.scorer(report)([Image.fromarray(np.full((16, 16, 3), 120, dtype=np.uint8))])[0] - 0.5) < 0.2


def test_the_play_page_reads_an_image_by_the_judge(folder, monkeypatch):
    call(monkeypatch, LABEL, {"network": "pixels", "head": "softmax"})
    report = io.read_json(Path("out/dataset/report.json"))
    for level, name in zip((45, 195), ("sad", "glad"), strict=True):
        asked = report["label_names"].index(name)
        (reading,) = play.read(Image.fromarray(np.full((16, 16, 3), level, dtype=np.uint8)), report, [asked])
        assert reading.verdict == name and reading.met


def test_a_network_of_the_users_own_judges_until_its_file_changes(folder, monkeypatch, capsys):
    Path("mine.py").write_text(NETWORK)
    own_network = {**LABEL, "judge": {"share": 0.4, "network": "mine.py"}}
    call(monkeypatch, own_network, {"network": "pixels", "head": "softmax", "learning_rate": 0.1, "num_epochs": 40})
    report = io.read_json(Path("out/dataset/report.json"))
    assert report["judge_quality"]["accuracy"]["value"] > 0.9
    gray = [Image.fromarray(np.full((16, 16, 3), 45, dtype=np.uint8))]
    assert report["label_names"][int(scoring.scorer(report)(gray)[0])] == "sad"
    Path("mine.py").write_text(NETWORK + "# changed")
    with pytest.raises(UserError, match=r"judge cannot be loaded: mine.py has changed"):
        judge.scorer(report["judge"], report["sha256"])


def test_a_judge_that_is_gone_names_what_makes_it_again(folder, monkeypatch):
    call(monkeypatch, LABEL, {"network": "pixels", "head": "softmax"})
    report = io.read_json(Path("out/dataset/report.json"))
    (Path(report["judge"]) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors.*`snakemake --forcerun build_dataset` makes it again"):
        judge.scorer(report["judge"], report["sha256"])


def test_a_column_of_numbers_is_a_number(folder, monkeypatch):
    number = {"kind": "continuous", "oracle": "column:joy", "judge": LABEL["judge"]}
    call(monkeypatch, number, {"network": "pixels", "head": "gaussian"})
    report = io.read_json(Path("out/dataset/report.json"))
    assert report["kind"] == "continuous" and report["judge_quality"]["r2"]["value"] > 0.8


def test_the_table_says_how_far_to_trust_it():
    figures = judged.figures([{"oracle": "mood", "judge_quality": {"accuracy": {"value": 0.9, "lo": 0.8, "hi": 0.95, "n": 60}}}, {}])
    assert list(figures) == ["judge_accuracy_mood"]
    methods = pd.DataFrame([dict.fromkeys(tables.DESCRIPTION, "no") | {"method": "ctrl"}])
    table = tables.build(methods, [{"method": "ctrl", "n": 5, "metrics": {"accuracy": {"value": 1.0}} | figures}])
    text = tables.to_markdown(table)
    assert "on further ones its accuracy is 0.900 [0.800, 0.950]" in text and "| judge" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": {"oracle": "column:mood"}}, "dataset.kind embedded; only a folder has a table"),
        ({"label": {"edges": "values"}}, "jpeg_size measures a number"),
        (
            {"label": {"oracle": "column:mood", "edges": "values"}, "dataset": {"kind": "folder", "path": "faces"}},
            "classifier.head density; labels without an order take softmax",
        ),
        ({"label": {"oracle": "column:a b"}}, "label.oracle"),
        ({"label": {"judge": {"share": 1}}}, "label.judge.share"),
    ],
)
def test_configurations_that_contradict_themselves(change, message):
    with pytest.raises(UserError, match=message):
        resolve(merge(read_yaml(DEFAULTS), change), json.loads(SCHEMA.read_text()))


def test_names_without_order_have_no_nearest_bin():
    factor = describe_factor({"oracle": "mood", "column": "mood", "num_classes": 3}, np.zeros(3), np.ones(3, bool), ["a", "b", "c"])
    assert factor["nominal"] and factor["descending"] is False and factor["column"] == "mood"


@pytest.mark.slow
def test_the_whole_chain(tmp_path_factory):
    """CTRL towards what people said of garments, in the workflow: here, that they are dark or light."""
    from tests.repository import copy_repository, snakemake

    repository = copy_repository(tmp_path_factory.mktemp("people") / "repository")
    done = snakemake(repository, "results/smoke/images/metadata.csv", "--cores", "2", "--configfile", "config/smoke.yaml")
    assert done.returncode == 0, done.stdout[-3000:]
    os.rename(repository / "results" / "smoke" / "images", repository / "garments")
    table = pd.read_csv(repository / "garments" / "metadata.csv", dtype=str)[:800]
    means = [np.asarray(Image.open(repository / "garments" / name)).mean() for name in table["file_name"]]
    table.assign(mood=["light" if mean > np.median(means) else "dark" for mean in means]).to_csv(
        repository / "garments" / "metadata.csv", index=False
    )
    (repository / "config" / "people.yaml").write_text(
        "experiment: people\ndataset: {kind: folder, path: garments}\n"
        "label: {oracle: 'column:mood', edges: values, num_classes: 2, judge: {network: pixels}}\n"
        "classifier: {network: pixels, head: softmax, num_epochs: 20}\n"
    )
    targets = [f"results/people/evaluation/{name}.json" for name in ("ctrl", "rejection")]
    done = snakemake(repository, *targets, "--cores", "2", "--configfile", "config/smoke.yaml", "config/people.yaml", timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    report = json.loads((repository / "results/people/dataset/report.json").read_text())
    assert report["label_names"] == ["dark", "light"] and report["judge_quality"]["accuracy"]["value"] > 0.8
    rejection = json.loads((repository / targets[1]).read_text())["metrics"]
    assert rejection["accuracy"]["value"] == 1 and rejection["judge_accuracy_mood"] == report["judge_quality"]["accuracy"]
    adapter = json.loads((repository / "results/people/adapters/ctrl/adapter.json").read_text())
    assert adapter["label_names"] == ["dark", "light"] and adapter["judges"] == {"judge_accuracy_mood": rejection["judge_accuracy_mood"]}
    assert "mood is what people said" in (repository / "results/people/adapters/ctrl/README.md").read_text()


@pytest.mark.parametrize("name", ["score", "digest", "path", "prompt"])
def test_a_column_may_have_any_name(folder, name):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    table.assign(**{name: table["mood"]}).to_csv(folder / "metadata.csv", index=False)
    _, report = build(folder, oracle=f"column:{name}")
    assert report["label_names"] == ["calm", "glad", "sad"] and report["oracle"] == name


def test_numbers_with_gaps_in_a_parquet_table(folder):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    stage = pd.array([None if k == 5 else k % 3 for k in range(len(table))], dtype="Int64")
    (folder / "metadata.csv").unlink()
    for values in (stage, stage.astype("float64")):
        table.assign(stage=values).to_parquet(folder / "metadata.parquet")
        _, report = build(folder, oracle="column:stage")
        assert report["label_names"] == ["0", "1", "2"] and [r["file_name"] for r in report["refused"]] == ["005.png"]


def test_a_number_written_in_two_ways_is_one_label():
    scores, names = columns.scores_of(pd.Series(["1", "1.0", "0.5"]), "stage", "values")
    assert names == ["0.5", "1"] and scores.tolist() == [1, 1, 0]


def test_a_label_that_the_judge_would_never_say(folder):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    rows, _ = build(folder)
    rare = rows.loc[rows["split"] == "train", "file_name"].head(3)
    table.loc[table["file_name"].isin(rare), "mood"] = "blue"
    table.to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(UserError, match="no image of the judge has blue in the column mood: add some, or raise label.judge.share"):
        build(folder, num_classes=4)


def test_the_judge_knows_combinations_that_are_held_out(folder):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    table.assign(side=["left", "right"] * (len(table) // 2)).to_csv(folder / "metadata.csv", index=False)
    nominal = {"edges": "values", "descending": True}
    factors = [{"oracle": "column:mood", "num_classes": 3, **nominal}, {"oracle": "column:side", "num_classes": 2, **nominal}]
    rows, report = build(folder, factors=factors, held_out=[[1, 0]])
    held_out = rows[rows["label"] == 2]
    assert report["label_names"][2] == "mood glad, side left" and len(held_out) == 40
    assert set(held_out["split"]) == {"held_out", *(f"judge_{s}" for s in data.SPLITS)}
    assert [factor["oracle"] for factor in report["factors"]] == ["mood", "side"]


def test_dollars_are_no_formula(folder):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    table.assign(mood=table["mood"].map({"sad": "$", "calm": "$$", "glad": "$$$"})).to_csv(folder / "metadata.csv", index=False)
    figure = histogram.histogram(*build(folder))
    figure.savefig("histogram.png")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.split(" (")[0] for text in legend] == [r"0: \$", r"1: \$\$", r"2: \$\$\$"], "an escaped dollar is drawn as one"


def test_a_judge_without_an_interval_has_a_note():
    methods = pd.DataFrame([dict.fromkeys(tables.DESCRIPTION, "no") | {"method": "ctrl_policy_gradient"}])
    figure = judged.figures([{"oracle": "joy_hi", "judge_quality": {"r2": {"value": 0.5, "n": 9}}}])
    text = tables.to_markdown(tables.build(methods, [{"method": "ctrl_policy_gradient", "n": 5, "metrics": figure}]))
    assert "joy_hi is what people said" in text and "its R² is 0.500. The policy gradient was rewarded by it" in text
