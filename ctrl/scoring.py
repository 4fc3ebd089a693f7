"""From an oracle's name to the function that scores pictures: of ctrl.oracles, the aesthetic predictor, the user's file, or a judge."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from json import dumps, loads

import numpy as np
from PIL import Image

from ctrl import aesthetic, judge, own
from ctrl.errors import UserError
from ctrl.names import COLUMN, factor_of
from ctrl.oracles import ORACLES, get_oracle

KEYS = ("oracle", "file", "sha256", "aesthetic", "column", "judge")  # of a factor in report.json: how it is measured
Score = Callable[[Sequence[Image.Image]], np.ndarray]  # RGB pictures -> their scores, float64 with shape (N,)


def described(oracle: str, label: Mapping) -> dict:
    """What a dataset's report.json says of an oracle, beside its bins: `oracle`, its name, and what its function takes, if anything.

    `label` is the config's section. A file of the user's own goes by its name without folder and ending, a column by its own.
    """
    name = factor_of(oracle)
    if name != oracle and name in (*ORACLES, "aesthetic"):
        raise UserError(f"label.oracle: {oracle} has the name of an oracle of the project: give it another name")
    if oracle.startswith(COLUMN):
        return {"oracle": name, "column": name}
    if own.is_own(oracle):
        return {"oracle": name, "file": oracle, "sha256": own.digest(oracle)}
    if oracle == "aesthetic":
        return {"oracle": oracle, "aesthetic": dict(label["aesthetic"])}
    get_oracle(oracle)  # raises where there is none
    return {"oracle": oracle}


def scorer(factor: Mapping | str) -> Score:
    """The function of a factor of report.json, or of an oracle's name alone; UserError where it cannot be had."""
    factor = {"oracle": factor} if isinstance(factor, str) else factor
    return _scorer(dumps({key: factor[key] for key in KEYS if key in factor}, sort_keys=True))


@lru_cache(maxsize=8)
def _scorer(factor: str) -> Score:
    factor = loads(factor)
    if "column" in factor and "sha256" not in factor:
        raise UserError(f"the column {factor['column']} has no judge yet: make the dataset by scripts/build_dataset.py")
    if "column" in factor:
        return judge.scorer(factor["judge"], factor["sha256"])
    if "file" in factor:
        return own_scorer(factor["file"], factor.get("sha256"))
    if factor["oracle"] == "aesthetic" and "aesthetic" in factor:
        return aesthetic.scorer(factor["aesthetic"])
    function = get_oracle(factor["oracle"])

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.array(list(pool.map(function, images)), dtype=np.float64)

    return score


def own_scorer(path: str, sha256: str | None = None) -> Score:
    """`score(images)` of the file at `path`; a UserError names the file and the line that failed, or what it returned instead of scores."""
    function = own.load(path, "score", sha256)

    def score(images: Sequence[Image.Image]) -> np.ndarray:
        if not images:
            return np.zeros(0)
        with own.explained(path):
            returned = function(list(images))
        try:
            scores = np.asarray([float(value) for value in returned], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: score returned {type(returned).__name__}: it must return a number for each image") from error
        if len(scores) != len(images):
            raise UserError(f"{path}: score returned {len(scores)} numbers for {len(images)} images: it must return one for each")
        if not np.isfinite(scores).all():
            raise UserError(f"{path}: score returned {scores[~np.isfinite(scores)][0]} for an image: scores must be finite")
        return scores

    return score
