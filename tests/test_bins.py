"""Bins by quantiles."""

import numpy as np
import pytest

from ctrl import bins
from ctrl.errors import UserError


def test_quantiles_of_the_training_split_alone():
    assert bins.bin_edges(np.arange(8.0), "quantiles", 4) == [1.5, 3.5, 5.5]
    assert bins.bin_edges(np.arange(8.0), [1, 2.5], 4) == [1, 2.5]
    assert bins.bin_edges(np.array([0.0] * 6 + [1.0] * 2), "quantiles", 2) == [0.5]


@pytest.mark.parametrize("scores", [np.zeros(10), np.r_[np.zeros(50), 1.0], np.array([1.0])])
def test_quantiles_that_coincide(scores):
    with pytest.raises(UserError, match="quantiles of the scores coincide.*lower label.num_classes"):
        bins.bin_edges(scores, "quantiles", 3)
