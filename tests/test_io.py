"""Files are complete or absent: what is written comes back, and a failure leaves what was there before."""

import errno
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from ctrl import errors, io
from ctrl.errors import UserError

WRITERS = {
    "json": lambda path: io.write_json(path, {"a": list(range(10_000))}),
    "text": lambda path: io.write_text(path, "long " * 10_000),
    "parquet": lambda path: io.write_parquet(path, pd.DataFrame({"x": np.random.default_rng(0).normal(size=10_000)})),
    "tensors": lambda path: io.save_tensors(path, {"x": torch.randn(10_000)}),
}


def raise_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_round_trips(tmp_path):
    io.write_json(tmp_path / "new" / "a.json", {"n": np.int64(3), "x": torch.tensor([1.5]), "nan": float("nan"), "p": tmp_path, "b": True})
    assert io.read_json(tmp_path / "new" / "a.json") == {"n": 3, "x": [1.5], "nan": None, "p": str(tmp_path), "b": True}
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "ß"]}, index=[5, 6])
    io.write_parquet(tmp_path / "t.parquet", table)
    pd.testing.assert_frame_equal(io.read_parquet(tmp_path / "t.parquet"), table.reset_index(drop=True))
    tensors = {"w": torch.randn(3, 4).T, "i": torch.arange(3)}
    io.save_tensors(tmp_path / "t.safetensors", tensors, {"base": "abc"})
    back = io.load_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())
    assert io.load_metadata(tmp_path / "t.safetensors") == {"base": "abc"}
    io.write_text(tmp_path / "a.txt", "é")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é"
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_refused_by_the_system(tmp_path):
    """The operating system itself refuses files above 1 kB: in a process of its own, as pytest itself may write to such a file."""
    code = """
import resource, sys
from pathlib import Path
from test_io import WRITERS
from ctrl.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
for kind, write in WRITERS.items():
    path = Path(sys.argv[1]) / kind
    path.write_text("before")
    try:
        write(path)
    except UserError as error:
        print(kind, error)
"""
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, env=path)
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == len(WRITERS)
    assert all(line.startswith(f"{kind} cannot write {tmp_path / kind}") for kind, line in zip(WRITERS, lines, strict=True)), lines
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(WRITERS, "before")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", WRITERS)
def test_disk_full_leaves_nothing(tmp_path, kind, call, monkeypatch):
    monkeypatch.setattr(os, call, raise_full)
    with pytest.raises(UserError, match="out: No space left on device"):
        WRITERS[kind](tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.write_text(tmp_path / "out", "text")
    assert os.listdir(tmp_path) == []


def test_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        io.write_text(tmp_path / "file" / "a.txt", "text")


def test_atomic_folder_replaces_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "folder"
    with io.atomic_folder(path) as folder:
        assert folder.parent == path.parent and not path.exists()
        (folder / "a").write_text("a")
    with io.atomic_folder(path) as folder:
        assert (path / "a").exists() and not os.listdir(folder)
        (folder / "b").write_text("b")
    assert os.listdir(path) == ["b"] and os.listdir(path.parent) == ["folder"]


FAILURES = {
    "disk full": (lambda folder: raise_full(), UserError),
    "disk full in Rust": (
        lambda folder: (_ for _ in ()).throw(SafetensorError("I/O error: No space left on device (os error 28)")),
        UserError,
    ),
    "program": (lambda folder: {}["x"], KeyError),
    "missing input": (lambda folder: (folder / "missing").read_text(), FileNotFoundError),
    "user": (lambda folder: io.read_json(folder / "missing"), UserError),
}


@pytest.mark.parametrize("name", FAILURES)
def test_atomic_folder_keeps_the_old_one_on_failure(tmp_path, name):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "before").write_text("")
    fail, expected = FAILURES[name]
    with pytest.raises(expected, match="folder" if expected is UserError else None), io.atomic_folder(path) as folder:
        (folder / "half").write_text("")
        fail(folder)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["before"]


def test_a_folder_with_an_identity_is_gone_on_with_by_the_same_run_alone(tmp_path):
    path = tmp_path / "out"
    for identity, found in (("a", []), ("a", ["half"]), ("b", []), ("b", ["half"])):
        with pytest.raises(ValueError), io.atomic_folder(path, identity) as folder:
            assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == found
            (folder / "half").write_text("")
            raise ValueError
    assert not path.exists()
    with io.atomic_folder(path, "b") as folder:
        (folder / "rest").write_text("")
    assert sorted(os.listdir(path)) == ["half", "rest"] and sorted(os.listdir(tmp_path)) == ["out"]
    with pytest.raises(ValueError), io.atomic_folder(path, "b") as folder:
        assert os.listdir(folder) == [".identity"], "what is done is no part of the next run"
        raise ValueError
    assert sorted(os.listdir(path)) == ["half", "rest"]
    with io.atomic_folder(path) as folder:
        assert os.listdir(folder) == [], "a run without an identity begins anew"


def test_what_a_killed_run_left_is_cleared(tmp_path):
    code = (
        f"import os; from ctrl import io\nwith io.atomic_folder({str(tmp_path / 'out')!r}) as f: (f / 'half').write_text(''); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.tmp"]
    with io.atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["whole"]


@pytest.mark.parametrize("read", [io.read_json, io.read_parquet, io.load_tensors, io.load_metadata])
def test_missing_and_corrupt(tmp_path, read):
    path = tmp_path / "file"
    with pytest.raises(UserError, match="file is missing"):
        read(path)
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    for content in (b"", b"\xff\x00{", b"garbage" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match="file is corrupt"):
            read(path)


def test_truncated_tensors(tmp_path):
    io.save_tensors(tmp_path / "x", {"x": torch.randn(1000)})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(UserError, match="corrupt"):
        io.load_tensors(tmp_path / "x")


def test_main_prints_one_line(capsys):
    def fail():
        raise UserError("no\nprompt column")

    with pytest.raises(SystemExit) as stopped:
        errors.main(fail)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: no prompt column\n"
    errors.main(lambda: None)
    with pytest.raises(ZeroDivisionError):
        errors.main(lambda: 1 / 0)


def test_a_file_of_tensors_is_the_same_in_every_process():
    """The library orders metadata by a hash that is new in each process; PEFT keeps the names of layers in a set."""
    code = """
import hashlib, sys, torch
from ctrl.io import canonical
from safetensors.torch import load, save
data = canonical(save({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.float16)}, {k: "v" for k in "qwertyuiop"}))
assert load(data)["a"].tolist() == [0, 1, 2] and load(data)["b"].tolist() == [1, 1]
print(hashlib.sha256(data).hexdigest())
"""
    made = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(made) == 1
