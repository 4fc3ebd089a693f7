"""Readers on whatever bytes there are: they give what they promise, or one clear line, for NUM_INPUTS inputs each and never another error.

FUZZ_INPUTS=20000 python -m pytest tests/test_fuzz.py tries more.
"""

import argparse
import io as streams
import json
import os
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ctrl import data, io, pictures
from ctrl.adapter_files import EMBEDDING_FILE, LORA_FILE, check_adapter
from ctrl.errors import UserError
from scripts.common import load_config

NUM_INPUTS = int(os.environ.get("FUZZ_INPUTS", 300))
few = settings(max_examples=NUM_INPUTS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
fewer = settings(few, max_examples=NUM_INPUTS // 3)  # inputs that take a while
NAMES = (
    "finetune",
    "gamma",
    "label",
    "edges",
    "dataset",
    "splits",
    "seed",
    "adapters",
    "cfg",
    "tuning",
    "scale",
    "prompts",
    "subjects",
    "x",
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NAMES) | st.dates()
TREES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | SCALARS, part, max_size=4))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4),
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """`whole`, cut, lengthened, or with bytes of it changed; or something else altogether."""
    kind = draw(st.sampled_from(["other", "cut", "longer", "changed"]))
    if kind == "other":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if kind == "longer":
        return whole + draw(st.binary(max_size=50))
    changed = bytearray(whole)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=8)):
        changed[place] = value
    return bytes(changed)


def picture(kind: str) -> bytes:
    out = streams.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures(tmp_path, kind):
    @few
    @given(damaged(picture(kind)))
    def check(content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert pictures.read_image(tmp_path / "a.png").mode == "RGB"
            except pictures.Refused as error:
                assert "\n" not in str(error)

    check()


TABLE = pd.DataFrame({"file_name": ["a.png", "b.png"], "prompt": ["x", 'a "y", z'], "subject": ["x", "y"]})


def parquet() -> bytes:
    out = streams.BytesIO()
    TABLE.to_parquet(out)
    return out.getvalue()


@pytest.mark.parametrize(("name", "whole"), [("metadata.csv", TABLE.to_csv(index=False).encode()), ("metadata.parquet", parquet())])
def test_tables(tmp_path, name, whole):
    @few
    @given(damaged(whole))
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        try:
            table = data.read_table(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            kept, refused = data.examine(tmp_path, table, 16, lambda images: np.zeros(len(images)))
            assert kept.empty and len(refused) >= len(table)

    check()


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@fewer
@given(st.lists(st.text(max_size=30), max_size=5))
def test_names_in_tables(empty_folder, names):
    kept, refused = data.examine(empty_folder, pd.DataFrame({"file_name": names, "prompt": "x"}), 16, lambda images: np.zeros(len(images)))
    assert kept.empty and len(refused) >= len(names)


def one_line_or_a_configuration(path) -> None:
    try:
        assert isinstance(load_config(argparse.Namespace(config=[path])), dict)
    except UserError as error:
        assert "\n" not in str(error)


@fewer
@given(st.dictionaries(st.sampled_from(NAMES) | SCALARS, TREES, max_size=4) | TREES)
def test_configurations(tmp_path_factory, tree):
    import yaml

    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    one_line_or_a_configuration(path)


@few
@given(damaged(b"experiment: a\nfinetune: {gamma: 3, lora: {rank: 2}}\nlabel:\n  edges: [1, 2.5, 3]\nadapters: {x: {gamma: 1}}\n"))
def test_configurations_byte_by_byte(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(content)
    one_line_or_a_configuration(path)


def one_line_or_an_adapter(model, folder) -> None:
    try:
        described, lora, embedding = check_adapter(model, folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert described["rank"] >= 1 and all(torch.isfinite(t).all() for t in (*lora.values(), *embedding.values()))


@pytest.mark.parametrize("name", ["adapter.json", LORA_FILE, EMBEDDING_FILE])
def test_adapters_byte_by_byte(model, adapter, tmp_path, name):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    whole = (adapter / name).read_bytes()

    @fewer
    @given(damaged(whole if name == "adapter.json" else whole[: max(4000, len(whole) // 8)]) | damaged(whole))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        one_line_or_an_adapter(model, folder)

    check()


KEYS = (
    "base",
    "rank",
    "target_modules",
    "num_classes",
    "label_names",
    "factors",
    "continuous",
    "sampler",
    "min_timestep",
    "base_fingerprint",
)


def test_what_an_adapter_says_of_itself(model, adapter, tmp_path):
    folder, said = shutil.copytree(adapter, tmp_path / "adapter"), json.loads((adapter / "adapter.json").read_text())

    @few
    @given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
    def check(changes: dict) -> None:
        (folder / "adapter.json").write_text(json.dumps(said | changes))
        one_line_or_an_adapter(model, folder)

    check()


@pytest.mark.parametrize("read", [io.read_json, io.read_rows, io.read_parquet, io.load_tensors, io.load_metadata])
def test_files_of_results(tmp_path, read):
    io.save_tensors(tmp_path / "whole", {"x": torch.arange(20.0)}, {"a": "b"})
    tensors, text = (tmp_path / "whole").read_bytes(), b'{"a": [1, 2.5, null], "b": {"c": "d"}}'
    whole = {io.read_parquet: parquet(), io.load_tensors: tensors, io.load_metadata: tensors}.get(read, text)

    @few
    @given(damaged(whole))
    def check(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        try:
            read(tmp_path / "file")
        except UserError as error:
            assert "\n" not in str(error)

    check()
