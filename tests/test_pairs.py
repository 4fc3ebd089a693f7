"""Which prompts are asked for with which labels."""

import itertools
from collections import Counter

import pytest
import torch

from ctrl.errors import UserError
from ctrl.pairs import SEED_OFFSETS, draw, possible_cells, stream_of, table_of_cells, table_of_subjects

CELLS = [("coat", 0), ("bag", 0), ("coat", 1)]


def test_impossible_cells_are_left_out():
    p = torch.tensor([[0.9, 0.1], [0.99, 0.01]])
    assert possible_cells(p, ["coat", "bag"], ["large", "small"], 0.05) == [("coat", 0), ("coat", 1), ("bag", 0)]


def test_a_label_that_no_subject_can_take_is_an_error():
    with pytest.raises(UserError, match=r"no subject gives the label small with probability 0.05 or more .*at most 0.01"):
        possible_cells(torch.tensor([[0.99, 0.01]]), ["coat"], ["large", "small"], 0.05)
    with pytest.raises(UserError, match="label small with probability 1e-06 or more"):
        possible_cells(torch.tensor([[1.0, 0.0]]), ["coat"], ["large", "small"], 0)


def test_labels_are_uniform_then_subjects():
    prompts, subjects, labels = draw(CELLS, ["{}", "a {}"], 8000, torch.Generator().manual_seed(0))
    counts = Counter(zip(subjects, labels.tolist(), strict=True))
    assert set(counts) == set(CELLS)
    assert counts["coat", 1] == pytest.approx(4000, abs=200) and counts["bag", 0] == pytest.approx(2000, abs=200)
    assert Counter(p.startswith("a ") for p in prompts)[True] == pytest.approx(4000, abs=200)
    assert all(s in p for s, p in zip(subjects, prompts, strict=True))


def test_draws_follow_from_the_generator():
    first, second = (draw(CELLS, ["{}"], 50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[2], second[2])


def test_table_asks_every_label_equally_often_with_shared_seeds():
    table = table_of_cells(CELLS, ["{}", "a {}"], 5, 100)
    assert table["label"].value_counts().to_dict() == {0: 5, 1: 5}
    assert set(zip(table["subject"], table["label"], strict=True)) == set(CELLS)
    assert table.groupby("label")["seed"].apply(list).to_dict() == {0: [100, 101, 102, 103, 104], 1: [100, 101, 102, 103, 104]}
    assert table["prompt"].nunique() == 4


def test_no_two_streams_of_seeds_meet_however_many_prompts_there_are():
    first = [offset + reference for offset in SEED_OFFSETS.values() for reference in (0, 500_000)]
    streams = sorted((stream_of(start, k) for start in first for k in range(60)), key=lambda stream: stream.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(streams)) and {len(s) for s in streams} == {20_000}
    tables = [range(start, start + 20_000) for start in first]  # what the methods are asked for has the first seeds of its set
    assert [stream_of(start, 0) for start in first] == tables


def test_table_of_subjects_has_its_own_seed_for_each_row():
    table = table_of_subjects(["coat", "bag"], ["{}"], 3, 7)
    assert table["seed"].tolist() == list(range(7, 13)) and (table["label"] == -1).all()
