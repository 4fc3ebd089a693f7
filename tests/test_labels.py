"""Label spaces: which labels there are, and where the null label stands."""

import numpy as np
import pytest
import torch

from ctrl.embedding import LabelEmbedding, check_distinct
from ctrl.errors import UserError
from ctrl.labels import Categorical, Factors, check_codes

SPACE = Categorical(4, ("huge", "large", "small", "tiny"))


def test_null_follows_the_labels():
    assert SPACE.null == 4 and SPACE.num_embeddings == 5
    assert Categorical.from_report({"num_classes": 4, "label_names": list(SPACE.names)}) == SPACE


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (2, [2]),
        (None, [4]),
        ([3, None, 0], [3, 4, 0]),
        (torch.tensor([1, 2]), [1, 2]),
        (np.array([0, 3]), [0, 3]),
        ([np.int64(1)], [1]),
        (torch.tensor(1), [1]),
        ([], []),
    ],
)
def test_check_gives_int64(labels, expected):
    checked = SPACE.check(labels)
    assert checked.dtype == torch.int64 and checked.tolist() == expected


@pytest.mark.parametrize(
    "labels",
    [
        4,
        -1,
        [0, 7],
        1.0,
        [0.5],
        "tiny",
        ["1"],
        True,
        torch.tensor([1.0]),
        np.array([2.5]),
        [[0], [1]],
        np.array([[0, 1]]),
        {"a": 1},
        2j,
        torch.tensor([True]),
    ],
)
def test_check_names_what_is_wrong_and_what_exists(labels):
    with pytest.raises(UserError, match=r"no label .*0 \(huge\), 1 \(large\), 2 \(small\), 3 \(tiny\)"):
        SPACE.check(labels)


def test_bad_spaces():
    with pytest.raises(UserError, match="at least 2"):
        Categorical(1)
    with pytest.raises(UserError, match="2 label names for 3 classes"):
        Categorical(3, ("a", "b"))
    assert "0 to 2" in Categorical(3).describe()


PAIR = Factors((Categorical(2, ("large", "small")), Categorical(3, ("dark", "grey", "light"))), ("size", "shade"))


def test_codes_are_combinations_then_the_null_then_what_leaves_a_factor_free():
    full = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert PAIR.num_classes == PAIR.null == 6 and PAIR.num_codes == 3 * 4
    assert [PAIR.label(code) for code in range(6)] == full
    assert PAIR.label(6) == [None, None]
    assert sorted(PAIR.label(c) for c in PAIR.partial if PAIR.label(c)[0] is None) == [[None, 0], [None, 1], [None, 2]]
    assert all(PAIR.code(PAIR.label(code)) == code for code in range(PAIR.num_codes))
    assert PAIR.codes([torch.tensor([0, 1]), torch.tensor([2, 1])]).tolist() == [2, 4]


def test_a_code_with_a_factor_freed_is_that_of_the_others():
    codes = PAIR.check([(1, 2), (1, 2), (1, 2), (1, 2), (None, 0)])
    free = torch.tensor([[False, False], [True, False], [False, True], [True, True], [True, False]])
    assert torch.equal(PAIR.freed(codes, free), PAIR.check([(1, 2), (None, 2), (1, None), None, (None, 0)]))


def test_one_factor_is_the_categorical_label():
    one = Factors((SPACE,), ("size",))
    assert (one.num_classes, one.null, one.num_codes, one.partial) == (4, 4, 5, [])
    assert one.names == SPACE.names and one.describe() == SPACE.describe() and one.label(3) == 3 and one.label(4) is None
    assert one.check([3, None, 0]).tolist() == SPACE.check([3, None, 0]).tolist()
    assert torch.equal(one.rows, torch.arange(5)[:, None]) and torch.equal(one.covers[:4], torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((1, 2), [[1, 2]]),
        ([(1, None), None], [[1, None], [None, None]]),
        ({"shade": 1}, [[None, 1]]),
        ([{"size": 0, "shade": 2}, (None, 0)], [[0, 2], [None, 0]]),
        (torch.tensor([[0, 1], [1, 1]]), [[0, 1], [1, 1]]),
        ((np.int64(0), np.int64(1)), [[0, 1]]),
        ([torch.tensor([0, 1]), (torch.tensor(1), None)], [[0, 1], [1, None]]),
        (None, [[None, None]]),
    ],
)
def test_labels_of_several_factors(labels, expected):
    assert [PAIR.label(code) for code in PAIR.check(labels).tolist()] == expected


@pytest.mark.parametrize(
    "labels",
    [
        3,
        "dark",
        [(0, 3)],
        [(0,)],
        (2, 0),
        (0, 1, 0),
        [(0.5, 1)],
        [(True, 1)],
        {"colour": 1},
        [(0, 1), 5],
        2j,
        [[(0, 1)]],
        {0},
        torch.tensor([0.0, 1.0]),
        torch.tensor([[True, False]]),
        np.array([0, -1]),
        [(0, (1,))],
    ],
)
def test_wrong_labels_of_several_factors(labels):
    with pytest.raises(UserError, match="no label|no factor"):
        PAIR.check(labels)


def test_a_code_covers_the_combinations_that_have_all_it_asks_for():
    assert PAIR.covers[PAIR.null].all()
    assert PAIR.covers[PAIR.code((None, 1))].nonzero()[:, 0].tolist() == [1, 4]
    assert PAIR.covers[PAIR.code((1, None))].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert PAIR.name(PAIR.code((None, 1))) == "shade grey" and PAIR.names[5] == "size small, shade light"


def test_the_embedding_is_the_sum_over_the_factors_that_are_set():
    embedding = LabelEmbedding(PAIR, 8)
    assert embedding.weight.shape == (2 + 3 + 1, 8) and not embedding.weight.any()
    with torch.no_grad():
        embedding.weight[:5] = torch.randn(5, 8)
    both, size, shade = embedding(PAIR.check([(1, 2), (1, None), (None, 2)]))
    assert torch.equal(size, embedding.weight[1]) and torch.equal(shade, embedding.weight[4]) and torch.equal(both, size + shade)
    assert not embedding(PAIR.check(None)).any()
    embedding(PAIR.check([(1, None), None])).sum().backward()
    assert embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == [1], "a free factor gets no gradient"


def test_bad_factors():
    with pytest.raises(UserError, match="different names"):
        Factors((SPACE, SPACE), ("size", "size"))
    with pytest.raises(UserError, match="too many"):
        Factors((Categorical(99), Categorical(99), Categorical(99)))


WRONG_CODES = [
    (torch.tensor([0, -1]), "no label -1"),
    (torch.tensor([0, 3]), "no label 3: the labels' codes are 0 to 2"),
    (torch.tensor([0.0, 1.0]), "whole numbers in a tensor, not torch.float32"),
    (torch.tensor([True, False]), "whole numbers in a tensor, not torch.bool"),
    (torch.tensor([0, 1, 2]), r"the shape \(3,\): one for each of the 2 images"),
    (torch.tensor([[0, 1]]), r"the shape \(1, 2\)"),
    (torch.tensor(1), r"the shape \(\)"),
    ([0, 1], "whole numbers in a tensor, not list"),
]


@pytest.mark.parametrize(("codes", "says"), WRONG_CODES)
def test_wrong_codes_are_one_line(codes, says):
    with pytest.raises(UserError, match=says):
        check_codes(codes, 2, 3)


def test_codes_of_any_whole_type_are_taken():
    checked = check_codes(torch.tensor([0, 2], dtype=torch.uint8), 2, 3)
    assert checked.dtype == torch.int64 and checked.tolist() == [0, 2]
    assert check_codes(torch.tensor([], dtype=torch.int64), 0, 3).shape == (0,)


def test_labels_with_the_same_embedding_are_an_error():
    weight = torch.randn(2 + 3 + 1, 8, generator=torch.Generator().manual_seed(0))
    weight[-1] = 0
    check_distinct(PAIR, {"weight": weight}, "here")
    check_distinct(PAIR, {"weight": weight + 0.01 * torch.tensor([[1.0], [0], [0], [0], [0], [0]])}, "here")
    twins = weight.clone()
    twins[4] = twins[3] + 1e-6
    with pytest.raises(UserError, match=r"here: label of shade 1 \(grey\) changes no image: its embedding is that of label of shade 2"):
        check_distinct(PAIR, {"weight": twins}, "here")
    twins = weight.clone()
    twins[2] = twins[0]  # of another factor: their images differ in what else is asked for
    check_distinct(PAIR, {"weight": twins}, "here")
    dead = weight[[0, 1, 2, 3, 5]].clone()
    dead[1] = 0
    with pytest.raises(UserError, match=r"label 1 \(large\) changes no image: its embedding is that of no label; train with more"):
        check_distinct(Factors((SPACE,)), {"weight": dead}, "here")
