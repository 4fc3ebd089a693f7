"""The strength dial against other gammas: which gamma is as accurate as an adapter at some strength, and how else the two differ.

    eps = eps_pre + lambda · (eps_psi − eps_pre)

With the strength lambda one adapter stands in for those of other gammas, without another training (Reinforcement Learning Guidance,
arXiv 2508.21016). The optimal eps_psi − eps_pre is proportional to gamma to first order alone: beyond it, this is an approximation.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ctrl.errors import UserError

METRICS = ("accuracy", "diversity", "kid_rejection", "kid_rejection_within", "kl_nats")
COMPARED = METRICS[1:]  # at equal accuracy
Bounds = tuple[float, float, float]  # a value, and the ends of its 95 % interval


def compare(strengths: Sequence[Mapping], gammas: Sequence[Mapping]) -> pd.DataFrame:
    """A row a point: `dial` (strength or gamma), its `setting`, `n`, and of each of METRICS the value, `_lo`, `_hi` and `_n`.

    strengths, gammas: evaluations of scripts/evaluate.py, of one adapter at several strengths, and of adapters of several gammas at
    strength 1. Rows of strengths also have `nearest_gamma`, that of equal accuracy, with `_lo` and `_hi`, and `{metric}_difference` to it,
    with `_lo` and `_hi`; empty where no gamma is as accurate. UserError where an evaluation lacks its setting, or two are of one.
    """
    check(strengths, gammas)
    rows = {
        dial: pd.DataFrame([point(e, dial) for e in sorted(evaluations, key=lambda e: e["settings"][dial])])
        for dial, evaluations in (("strength", strengths), ("gamma", gammas))
    }
    curve = rows["gamma"]
    near = pd.DataFrame([nearest(row, curve) for _, row in rows["strength"].iterrows()], dtype=float)
    return pd.concat([pd.concat([rows["strength"], near], axis=1), curve], ignore_index=True)


def check(strengths: Sequence[Mapping], gammas: Sequence[Mapping]) -> None:
    """UserError where the evaluations are not of one adapter's strengths, and of gammas at strength 1."""
    for dial, evaluations in (("strength", strengths), ("gamma", gammas)):
        found = []
        for e in evaluations:
            if any((e.get("settings") or {}).get(name) is None for name in ("strength", "gamma")):
                raise UserError(
                    f"the evaluation of {e['method']!r} has no strength and gamma; draw and evaluate its samples with --adapter"
                )
            if "accuracy" not in e["metrics"]:
                raise UserError(f"the evaluation of {e['method']!r} has no accuracy: a continuous label has no strengths to compare")
            found.append(e["settings"][dial])
        if twice := [value for value in found if found.count(value) > 1]:
            raise UserError(f"there are two evaluations with {dial} {twice[0]:g}; give one")
    if len(of := {e["settings"]["gamma"] for e in strengths}) > 1:
        raise UserError(f"the strengths are of adapters with gamma {' and '.join(f'{g:g}' for g in sorted(of))}; give those of one adapter")
    if dialled := [e["method"] for e in gammas if e["settings"]["strength"] != 1]:
        raise UserError(f"{dialled[0]!r} stands for a gamma, but its strength is not 1")


def point(evaluation: Mapping, dial: str) -> dict:
    """The row of one evaluation, without what is compared."""
    row = {"dial": dial, "setting": evaluation["settings"][dial], "gamma": evaluation["settings"]["gamma"], "n": evaluation["n"]}
    for name in METRICS:
        figure = evaluation["metrics"].get(name, {})
        values = {f"{name}{end}": figure.get(part) for end, part in (("", "value"), ("_lo", "lo"), ("_hi", "hi"), ("_n", "n"))}
        row |= {column: np.nan if value is None else value for column, value in values.items()}
    return row


def crossing(log_gamma: Sequence[float], accuracy: Sequence[float], wanted: float) -> float | None:
    """log gamma where the line through the points first comes to the `wanted` accuracy, from the lowest gamma on; None: it never does."""
    for k in range(len(accuracy) - 1):
        (a, b), (left, right) = accuracy[k : k + 2], log_gamma[k : k + 2]
        if min(a, b) <= wanted <= max(a, b):
            return left if a == b else left + (right - left) * (wanted - a) / (b - a)
    return log_gamma[0] if len(accuracy) == 1 and accuracy[0] == wanted else None


def nearest(row: Mapping, curve: pd.DataFrame) -> dict:
    """The gamma whose adapter is as accurate as `row`, linear in log gamma between those of `curve`, and the differences there.

    Its interval is that of the gammas whose accuracy may be the same: it goes from where the upper ends of the curve meet the lower end of
    the accuracy to where the lower ends meet the upper; an end is empty where they do not meet.
    """
    log_gamma = np.log(curve["setting"]).tolist()

    def gamma_of(ends: str, wanted: float) -> float | None:
        at = None if pd.isna(wanted) or curve[ends].isna().any() else crossing(log_gamma, curve[ends].tolist(), wanted)
        return None if at is None else float(np.exp(at))

    gamma = gamma_of("accuracy", row["accuracy"])
    lo, hi = gamma_of("accuracy_hi", row["accuracy_lo"]), gamma_of("accuracy_lo", row["accuracy_hi"])
    found = {"nearest_gamma": gamma, "nearest_gamma_lo": lo, "nearest_gamma_hi": hi}
    for name in COMPARED:
        known = gamma is not None and pd.notna(row[name]) and curve[name].notna().all()
        at = [np.interp(np.log(gamma), log_gamma, curve[c]) for c in (name, f"{name}_lo", f"{name}_hi")] if known else None
        ends = difference((row[name], row[f"{name}_lo"], row[f"{name}_hi"]), at) if known else (None, None, None)
        found |= dict(zip((f"{name}_difference", f"{name}_difference_lo", f"{name}_difference_hi"), ends, strict=True))
    return found


def difference(one: Bounds, other: Bounds) -> tuple[float, float | None, float | None]:
    """one − other with a 95 % interval from theirs, as of independent estimates (Zou & Donner, Statistics in Medicine 2008).

    Where the two share seeds, and so vary together, it is too wide rather than too narrow. No interval where one has none.
    """
    (a, a_lo, a_hi), (b, b_lo, b_hi) = one, other
    if pd.isna([a_lo, a_hi, b_lo, b_hi]).any():
        return a - b, None, None
    return a - b, a - b - np.hypot(a - a_lo, b_hi - b), a - b + np.hypot(a_hi - a, b - b_lo)
