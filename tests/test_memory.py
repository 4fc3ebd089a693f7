"""A lack of memory: the error names the setting to lower."""

import re

import numpy as np
import pytest
import torch
import yaml

from ctrl import errors
from tests.repository import ROOT

NO_MEMORY = {
    "torch": lambda: torch.empty(2**50),
    "numpy": lambda: np.zeros(2**50),
    "python": lambda: bytearray(2**50),
    "cuda": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_lack_of_memory_names_the_setting_to_lower(kind, capsys):
    with pytest.raises(SystemExit) as stopped:
        errors.main(NO_MEMORY[kind], lower="sampler.batch_size")
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.startswith("error: out of memory: lower sampler.batch_size, or give the job more")
    assert text.count("\n") == 1


def test_the_settings_to_lower_exist():
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    named = {path.name: re.findall(r'lower="(.*?)"', path.read_text()) for path in ROOT.glob("scripts/*.py")}
    assert {"finetune.py", "sample.py", "tune.py", "train_classifier.py", "evaluate.py"} <= {name for name, found in named.items() if found}
    for key in (key for found in named.values() for text in found for key in re.findall(r"\b[a-z_]+\.[a-z_]+\b", text)):
        section, name = key.split(".")
        assert name in config[section], key
