"""One rule chooses every scale, and the page shows what it chose from."""

import pytest

from ctrl.tuning import choose_setting
from ctrl.tuning_page import section


def sweep(name, *rows):
    return [{"scale": scale, "n": 8, name: value, "kid_rejection": kid, "kid_rejection_within": 1 - kid} for scale, value, kid in rows]


@pytest.mark.parametrize("name", ["accuracy", "r2"])
def test_chosen_setting_is_nearest_to_the_law_among_the_accurate(name):
    """Nearest by the distance of all images together, not by that within cells, which says the opposite here."""
    assert choose_setting(sweep(name, (1, 0.50, 0.0), (2, 0.93, 0.5), (3, 0.94, 0.9), (4, 0.90, 0.1)))["scale"] == 2
    assert choose_setting(sweep(name, (1, 0.93, 0.5), (2, 0.96, 0.9)))["scale"] == 2, "the other is not as accurate"


def test_section_has_every_scale_and_the_chosen_one_in_bold():
    rows = sweep("accuracy", (0.1, 0.72, 0.0007), (0.5, 0.95, 0.004))
    rows[0] |= {"accuracy_lo": 0.7, "accuracy_hi": 0.75}
    lines = section([{"method": "mpgd", "best": {"scale": 0.5}, "sweep": rows}])
    assert "| `mpgd` | 0.1 | 8 | 0.720 [0.700, 0.750] | 0.7 | 999.3 |" in lines and "|  | **0.5** | 8 | 0.950 | 4.0 | 996.0 |" in lines
    assert "0.02 of the best accuracy" in lines
