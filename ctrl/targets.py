"""How well the requests of a continuous label are met: errors in its unit, within the asked ranges and, apart, beyond them."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctrl import metrics


def by_target(table: pd.DataFrame) -> pd.DataFrame:
    """Samples of a continuous label with the number of the target as `label` and its value as `asked`; other tables as they are."""
    return table.assign(asked=table["label"], label=table["target"].astype(int)) if "target" in table else table


def beyond(table: pd.DataFrame, num_targets: int) -> np.ndarray:
    """Which rows ask for what lies beyond a subject's range; bool (N,)."""
    return ~table["label"].between(0, num_targets - 1).to_numpy()


def columns(table: pd.DataFrame) -> tuple[Tensor, Tensor, Tensor]:
    """What was asked for, what was reached, and the spread of the subject's pretrained scores, each (N,)."""
    asked, reached, spread = (torch.tensor(table[name].to_numpy(np.float64)) for name in ("asked", "score", "spread"))
    return asked, reached, spread


def figures(table: pd.DataFrame, tolerance: float, figure: Callable) -> dict[str, dict]:
    """within_tolerance, mae, rmse, and r2 against the pretrained spread; `figure` makes an entry of the metrics of a statistic of rows."""
    asked, reached, spread = columns(table)
    near = ((asked - reached).abs() <= tolerance).double()
    return {
        "within_tolerance": figure(lambda i: near[i].mean().item()),
        "mae": figure(lambda i: metrics.mae(asked[i], reached[i])),
        "rmse": figure(lambda i: metrics.rmse(asked[i], reached[i])),
        "r2": figure(lambda i: metrics.r2(asked[i], reached[i], spread[i])),
    }


def figures_beyond(table: pd.DataFrame, figure: Callable) -> dict[str, dict]:
    """mae_beyond and rmse_beyond, of requests beyond the ranges."""
    asked, reached, _ = columns(table)
    return {
        "mae_beyond": figure(lambda i: metrics.mae(asked[i], reached[i])),
        "rmse_beyond": figure(lambda i: metrics.rmse(asked[i], reached[i])),
    }


def details(table: pd.DataFrame) -> dict:
    """Mean error and mean absolute error of each subject and of each target's number, with n."""
    error = table.assign(error=table["score"] - table["asked"])

    def by(column: str) -> dict:
        groups = error.groupby(column, sort=False)["error"]
        return {str(key): {"bias": e.mean(), "mae": e.abs().mean(), "n": len(e)} for key, e in groups}

    return {"per_subject": by("subject"), "per_target": by("label")}
