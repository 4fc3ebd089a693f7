"""Label spaces: which labels there are, and where the null label stands."""

import numpy as np
import pytest
import torch

from ctrl.errors import UserError
from ctrl.labels import Categorical

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


@pytest.mark.parametrize("labels", [4, -1, [0, 7], 1.0, [0.5], "tiny", ["1"], True, torch.tensor([1.0]), np.array([2.5])])
def test_check_names_what_is_wrong_and_what_exists(labels):
    with pytest.raises(UserError, match=r"no label .*0 \(huge\), 1 \(large\), 2 \(small\), 3 \(tiny\)"):
        SPACE.check(labels)


def test_bad_spaces():
    with pytest.raises(UserError, match="at least 2"):
        Categorical(1)
    with pytest.raises(UserError, match="2 label names for 3 classes"):
        Categorical(3, ("a", "b"))
    assert "0 to 2" in Categorical(3).describe()
