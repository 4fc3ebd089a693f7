"""Two jobs at a time without a GPU, one with it."""

import argparse

import pytest

from ctrl import cores
from scripts import common


@pytest.mark.parametrize(
    ("tools", "available", "expected"), [((), 1, 1), ((), 2, 2), ((), 16, 2), (("nvidia-smi",), 16, 1), (("rocm-smi",), 2, 1)]
)
def test_a_gpu_is_given_to_one_job_at_a_time(tools, available, expected, monkeypatch):
    monkeypatch.setattr(cores.shutil, "which", lambda tool: tool if tool in tools else None)
    assert cores.jobs_at_once(available) == expected


def test_cores_are_a_number_or_all():
    assert common.cores_of("3") == 3
    assert common.cores_of("all") >= 1
    for text in ("0", "-1", "1.5", "some", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="neither a number"):
            common.cores_of(text)
