"""The offline dataset: what is kept, what is refused and why, and that nothing leaks between the splits."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ctrl import bins, data, oracles, pictures
from ctrl.errors import UserError
from ctrl.figures import histogram

SHARES = {"train": 0.8, "val": 0.1, "calibration": 0.1}
LABEL = {"oracle": "jpeg_size", "edges": "quantiles", "num_classes": 4, "descending": True}


def write_folder(folder: Path, n: int, size: int = 8, seed: int = 0) -> pd.DataFrame:
    """`n` images of growing contrast, and their metadata.csv."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = 128 + (rng.integers(-127, 128, (size, size, 3)) * (i + 1) / n)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    table = pd.DataFrame({"file_name": [f"{i:03d}.png" for i in range(n)], "prompt": [f"a picture {i}" for i in range(n)]})
    table.to_csv(folder / "metadata.csv", index=False)
    return table


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "images"
    write_folder(folder, 120)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "images"))


def build(folder: Path, size: int = 8, shares: dict = SHARES, **label) -> tuple[pd.DataFrame, dict]:
    return data.build(folder, size, LABEL | label, shares)


def test_scores_labels_and_counts(folder):
    table, report = build(folder)
    assert list(table.columns) == ["file_name", "path", "prompt", "split", "score_jpeg_size", "label"]
    with Image.open(folder / "017.png") as image:
        assert table["score_jpeg_size"][17] == oracles.jpeg_size_kb(image)
    expected = 3 - sum((table["score_jpeg_size"] >= e).astype(int) for e in report["edges"])
    assert (table["label"] == expected).all()
    assert report["refused"] == [] and report["num_images"] == 120 and report["num_classes"] == 4
    for split, counts in report["counts"].items():
        assert counts == [((table["split"] == split) & (table["label"] == y)).sum() for y in range(4)]
    train = table[table["split"] == "train"]
    assert train["label"].value_counts().max() - train["label"].value_counts().min() <= 4
    assert not set(report["edges"]) & set(train["score_jpeg_size"])


def test_paths_load_from_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, _ = build(Path("images"))
    assert table["path"][0] == "images/000.png"
    images = pictures.load_images(table["path"])
    assert images.shape == (120, 3, 8, 8) and images.dtype == torch.uint8
    np.testing.assert_array_equal(images[5].permute(1, 2, 0).numpy(), np.asarray(Image.open(folder / "005.png")))
    monkeypatch.chdir(folder)
    table, _ = build(folder.parent / "images")
    assert table["path"][0] == "000.png"
    monkeypatch.chdir("/")
    assert Path(build(folder)[0]["path"][0]).is_file()


def test_every_refused_file_is_named_with_its_reason(folder):
    table = pd.read_csv(folder / "metadata.csv")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image at all")
    (folder / "cut.png").write_bytes((folder / "100.png").read_bytes()[:-40])
    Image.new("RGB", (9, 8)).save(folder / "wide.png")
    shutil.copy(folder / "003.png", folder / "copy.png")
    with Image.open(folder / "004.png") as image:
        image.save(folder / "again.bmp")  # the same pixels in another format
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "silent.png")
    Image.new("RGB", (8, 8), (3, 2, 1)).save(folder / "unlisted.png")
    (folder / "inner.png").mkdir()
    names = ["empty.png", "text.png", "cut.png", "wide.png", "copy.png", "again.bmp", "gone.png", "inner.png"]
    more = pd.DataFrame({"file_name": [*names, "silent.png"], "prompt": [*["x"] * len(names), ""]})
    pd.concat([table, more]).to_csv(folder / "metadata.csv", index=False)
    kept, report = build(folder)
    reasons = {r["file_name"]: r["reason"] for r in report["refused"]}
    assert kept["file_name"].tolist() == table["file_name"].tolist()
    assert reasons.pop("text.png").startswith("unreadable") and reasons.pop("cut.png").startswith("unreadable")
    assert reasons == {
        "empty.png": "empty",
        "wide.png": "wrong size: 9x8, not 8x8",
        "copy.png": "duplicate of 003.png",
        "again.bmp": "duplicate of 004.png",
        "gone.png": "missing file",
        "inner.png": "missing file",
        "silent.png": "no prompt",
        "unlisted.png": "not in the table",
    }


def test_splits_follow_the_pixels_and_nothing_else(folder, tmp_path):
    table, _ = build(folder)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shuffled = table.sample(frac=1, random_state=1)
    for i, name in enumerate(shuffled["file_name"]):
        with Image.open(folder / name) as image:
            image.save(renamed / f"{i}.bmp")
    pd.DataFrame({"file_name": [f"{i}.bmp" for i in range(120)], "text": "other"}).to_parquet(renamed / "metadata.parquet")
    again, _ = build(renamed)
    assert again["split"].tolist() == shuffled["split"].tolist() and (again["prompt"] == "other").all()


def test_shares():
    digests = [np.random.default_rng(i).bytes(32) for i in range(4000)]
    splits = pd.Series([data.choose_split(d, SHARES) for d in digests]).value_counts(normalize=True)
    assert splits["train"] == pytest.approx(0.8, abs=0.03) and splits["val"] == pytest.approx(0.1, abs=0.02)
    assert data.choose_split(b"\x00" * 32, SHARES) == "train" and data.choose_split(b"\xff" * 32, SHARES) == "calibration"
    assert {pictures.choose(d, ["a", "b", "c"]) for d in digests[:50]} == {"a", "b", "c"}


def test_numbers_in_file_names_and_prompts_stay_text(tmp_path):
    write_folder(tmp_path / "images", 3)
    (tmp_path / "images" / "metadata.csv").write_text("file_name,prompt\n000.png,1\n001.png,NA\n002.png,null\n")
    table = data.read_table(tmp_path / "images")
    assert table["prompt"].tolist() == ["1", "NA", "null"] and table["file_name"][0] == "000.png"


def test_generated_samples_and_subjects(folder):
    table = pd.read_csv(folder / "metadata.csv").assign(subject="bag", seed=1, label=-1)
    (folder / "metadata.csv").unlink()
    table.to_parquet(folder / "samples.parquet")
    built, report = build(folder, oracle="brightness", descending=False)
    assert (built["subject"] == "bag").all() and set(built["label"]) == {0, 1, 2, 3} and report["unit"] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "images is missing: name a folder"),
        (lambda f: (f / "metadata.csv").unlink(), "has no table of prompts: add a metadata.csv"),
        (lambda f: (f / "metadata.csv").write_text("file_name,caption\n000.png,x\n"), r"no column prompt \(it has file_name, caption\)"),
        (lambda f: (f / "metadata.csv").write_text("prompt\nx\n"), "no column file_name"),
        (lambda f: (f / "metadata.csv").write_text(""), "no readable CSV"),
        (lambda f: (f / "metadata.csv").write_bytes(b"file_name,prompt\n\xff\xfe,\xff\n"), "no readable CSV"),
        (lambda f: (f / "metadata.csv").rename(f / "metadata.parquet"), "metadata.parquet is corrupt"),
        (lambda f: (f / "metadata.csv").write_text("file_name,prompt\n"), "all 120 images of .* are refused .*000.png: not in the table"),
        (lambda f: (f / "metadata.csv").write_text("file_name,prompt\nx.png,x\ny.png,y\n"), "all .* refused .x.png: missing file; y.png"),
        (lambda f: (f / "metadata.csv").write_text("file_name,prompt\n000.png,x\n"), "split .* of its 1 images is empty"),
    ],
)
def test_bad_folders(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        build(folder)


def test_all_of_the_wrong_size(folder):
    with pytest.raises(UserError, match="all 120 images .* wrong size: 8x8, not 32x32"):
        build(folder, 32)


def test_a_label_without_images(folder):
    with pytest.raises(UserError, match=r"label 0 \(>= 900 kB\) has no image in the training split; the scores span"):
        build(folder, edges=[0.7, 900])
    with pytest.raises(UserError, match="out of order"):
        build(folder, edges=[2, 1])


def test_histogram_counts_every_image(folder):
    table, report = build(folder)
    axes = histogram.histogram(table, report).axes[0]
    assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(120)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        f"{y}: {name} (n = {(table['label'] == y).sum()})" for y, name in enumerate(report["label_names"])
    ]
    histogram.histogram(table, report).savefig(io.BytesIO())


FACTORS = [LABEL | {"num_classes": 2}, {"oracle": "brightness", "edges": [0.5], "num_classes": 2, "descending": False}]


def test_two_factors_are_one_label_and_what_is_held_out_is_in_no_split(folder):
    table, report = data.build(folder, 8, {"factors": FACTORS, "held_out": [[0, 1]]}, SHARES)
    size = report["factors"][0]
    parts = np.stack([table["score_jpeg_size"] < size["edges"][0], table["score_brightness"] >= 0.5], 1).astype(int)
    assert (table["label"] == 2 * parts[:, 0] + parts[:, 1]).all()
    assert report["num_classes"] == 4 and report["held_out"] == [1] and report["label_names"][1].startswith("jpeg size >= ")
    assert ((table["split"] == "held_out") == (table["label"] == 1)).all() and report["counts"]["train"][1] == 0
    assert report["counts"]["held_out"][1] == (table["label"] == 1).sum() > 0
    assert bins.measured_labels({n: table[f"score_{n}"] for n in ("jpeg_size", "brightness")}, report).tolist() == table["label"].tolist()
    assert len(histogram.histogram(table, report).axes) == 2
    _, whole = data.build(folder, 8, {"factors": FACTORS, "held_out": []}, SHARES)
    assert whole["held_out"] == [] and "held_out" not in whole["counts"]


def test_one_factor_is_the_single_label(folder):
    table, report = data.build(folder, 8, LABEL, SHARES)
    same, described = data.build(folder, 8, {"factors": [LABEL]}, SHARES)
    assert table.equals(same) and report == described


def test_larger_images_are_cropped_if_asked_for_and_captions_may_be_missing(tmp_path):
    rng = np.random.default_rng(0)
    folder, stored = tmp_path / "photos", {}
    (folder / "deeper").mkdir(parents=True)
    for k in range(60):
        size = [(16, 16), (40, 20), (18, 64)][k % 3]
        pixels = 128 + rng.integers(-127, 128, (size[1], size[0], 3)) * (k + 1) / 60
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "deeper" / f"{k:02d}.png")
    Image.new("RGB", (8, 300)).save(folder / "narrow.png")

    def store(name: str, image: Image.Image) -> Path:
        stored[name] = image
        image.save(tmp_path / f"{len(stored)}.png")
        return tmp_path / f"{len(stored)}.png"

    with pytest.raises(UserError, match="has no table of prompts: .* or set dataset.captions: false"):
        data.build(folder, 16, LABEL, SHARES)
    table, report = data.build(folder, 16, LABEL, SHARES, False, True, store)
    assert report["num_images"] == len(stored) == 60 and report["refused"] == [
        {"file_name": "narrow.png", "reason": "too small: 8x300, not at least 16x16"}
    ]
    assert (table["prompt"] == "").all() and pictures.load_images(table["path"]).shape == (60, 3, 16, 16)
    for name, path, score in zip(table["file_name"], table["path"], table["score_jpeg_size"], strict=True):
        with Image.open(path) as image:
            assert image.tobytes() == stored[name].tobytes() and oracles.jpeg_size_kb(image) == score
    middle = Image.open(folder / "deeper" / "01.png").crop((10, 0, 30, 20)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(middle, int) - np.asarray(stored["deeper/01.png"])).max() <= 2


def test_a_limit_takes_the_same_images_whatever_their_order(folder):
    table, report = data.build(folder, 8, LABEL, SHARES, limit=50)
    assert report["num_images"] == 50 and report["refused"] == [] and table["file_name"].is_monotonic_increasing
    pd.read_csv(folder / "metadata.csv").iloc[::-1].to_csv(folder / "metadata.csv", index=False)
    turned, _ = data.build(folder, 8, LABEL, SHARES, limit=50)
    assert set(turned["file_name"]) == set(table["file_name"]) != {f"{k:03d}.png" for k in range(50)}
    fewer, _ = data.build(folder, 8, LABEL, SHARES, limit=40)
    assert set(fewer["file_name"]) < set(table["file_name"])


def test_a_table_without_prompts_serves_where_captions_are_not_asked_for(folder):
    pd.read_csv(folder / "metadata.csv").drop(columns="prompt").to_csv(folder / "metadata.csv", index=False)
    table, _ = data.build(folder, 8, LABEL, SHARES, captions=False)
    assert len(table) == 120 and (table["prompt"] == "").all()
