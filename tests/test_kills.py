"""A few of the kills of tests/kills.py: everything up to the samples of CTRL, against the undisturbed run of test_smoke."""

import json
import random

import pytest

from tests.kills import contents, differences, disturb
from tests.repository import NUM_IMAGES, copy_repository

NUM_KILLS = 3
TARGET = "results/smoke/samples/ctrl/samples.parquet"


@pytest.mark.slow
def test_a_workflow_that_is_killed_ends_with_the_same_results(finished_smoke, tmp_path):
    repository = copy_repository(tmp_path / "repository")
    disturb(repository, NUM_KILLS, 12, random.Random(1), TARGET)
    made = contents(repository)
    assert {TARGET, "results/smoke/adapters/ctrl/pytorch_lora_weights.safetensors", "results/smoke/cells.json"} <= made.keys()
    assert len(made) > NUM_IMAGES, "every picture"
    assert [name for name in differences(finished_smoke, repository) if name in made] == []
    left = [path.name for path in (repository / "results" / "smoke").rglob(".*")]
    assert left == [], "nothing half written lies about"


def test_a_difference_of_one_bit_is_seen(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "results" / "smoke"
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"\0" if name == "a" else b"\1")
        measured = {"seconds": ord(name), "y": [{"peak_memory_mb": ord(name), "z": 1}]}
        (folder / "x.json").write_text(json.dumps(measured))
        (folder / "x.csv").write_text("n,seconds_per_image\n1,0.5\n" if name == "a" else "n,seconds_per_image\n1,0.7\n")
    (tmp_path / "b" / "results" / "smoke" / "y").write_bytes(b"")
    assert differences(tmp_path / "a", tmp_path / "b") == ["results/smoke/x.png", "results/smoke/y"]
