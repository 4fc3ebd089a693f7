"""What the names of adapters and methods say: a recipe, and what it varies.

`ctrl_gamma3_seed1_n300` is the recipe `ctrl` with gamma 3, trained with seed 1 on 300 labelled images; `ctrl_strength0.5` is drawn from the
adapter `ctrl`.
"""

import re
from decimal import Decimal
from pathlib import Path

COLUMN = "column:"  # as an oracle: a column of the table of the user's images follows
VARIANT = re.compile(r"(?P<recipe>.+?)(_gamma(?P<gamma>\d+(\.\d+)?))?(_seed(?P<seed>\d+))?(?P<sample>_n[1-9]\d*)?")
DIALLED = re.compile(r"(?P<method>.+)_strength(?P<strength>\d+(\.\d+)?)")


def decimal(number: float) -> str:
    """As short as can be, without an exponent."""
    return format(Decimal(str(number)).normalize(), "f")


def factor_of(oracle: str) -> str:
    """What is measured, by its oracle: `my_oracle` of my/my_oracle.py, `quality` of column:quality."""
    return Path(oracle).stem.removeprefix(COLUMN)


def recipe_of(name: str) -> str:
    """`ctrl` of `ctrl_gamma3_seed1`: an adapter's name without what it varies."""
    return VARIANT.fullmatch(name)["recipe"]


def sample_of(name: str) -> str:
    """`_n300` of `ctrl_n300`, which learns from 300 labelled images, those of `dataset_n300`; empty for one that learns from all."""
    return VARIANT.fullmatch(name)["sample"] or ""


def split_strength(method: str) -> tuple[str, dict[str, str]]:
    """`ctrl_gamma3` and {"strength": "0.5"} of `ctrl_gamma3_strength0.5`: one adapter serves every strength; {} where there is none."""
    dialled = DIALLED.fullmatch(method)
    return (dialled["method"], {"strength": dialled["strength"]}) if dialled else (method, {})


def sweep_of(config: dict) -> list[str]:
    """The adapters of the sweep of gamma: the configured gamma is `ctrl` itself."""
    return ["ctrl" if gamma == config["finetune"]["gamma"] else f"ctrl_gamma{decimal(gamma)}" for gamma in config["gamma_sweep"]]


def own_gamma(config: dict) -> str:
    """`ctrl_gamma10` where gamma is 10: `ctrl` by another name."""
    return f"ctrl_gamma{decimal(config['finetune']['gamma'])}"


def compared_of(config: dict) -> list[str]:
    """The adapters of the comparison of trainers: the configured seed is the recipe itself."""
    recipes, seeds = config["trainers"]["recipes"], config["trainers"]["seeds"]
    return [name if seed == config["seed"] else f"{name}_seed{seed}" for name in recipes for seed in seeds]


def dial_of(config: dict) -> list[str]:
    """The methods of the strength dial, by strength: 1 is `ctrl` itself."""
    return ["ctrl" if s == 1 else f"ctrl_strength{decimal(s)}" for s in config["strengths"]]
