"""Trainers compared: how soon each recipe reaches an accuracy near to the exact images, and where it ends, over several seeds.

The clock is that of the updates alone, without probes; a pass is one image through the UNet, forward or backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ctrl.costs import PUBLISHED
from ctrl.errors import UserError
from ctrl.names import recipe_of

MIN_DIVERSITY = 0.9  # at the end, for a recipe to count as there
FINAL = {  # of the evaluation at the end: metric -> (heading, factor, decimals)
    "accuracy": ("accuracy", 1, 3), "kid_rejection": ("KID to rejection ×1000", 1000, 1), "diversity": ("diversity", 1, 3),
    "kl_nats": ("path KL / nats", 1, 2),
}  # fmt: skip
COST = {  # of the whole training, but for `to_target`: up to the first probe at the target accuracy
    "seconds": ("training / s", 1, 0), "unet_forward": ("forward passes", 1, 0), "unet_backward": ("backward passes", 1, 0),
    "peak_memory_mb": ("peak memory / MB", 1, 0), "seconds_to_target": ("s to {target:g} (probe)", 1, 0),
    "passes_to_target": ("passes to {target:g} (probe)", 1, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: its adapter's name, the rows of its history.jsonl, its adapter.json, and its evaluation on validation prompts."""

    name: str
    history: Sequence[Mapping]
    adapter: Mapping
    evaluation: Mapping

    @property
    def recipe(self) -> str:
        return recipe_of(self.name)

    def curve(self, target: float, max_kid: float | None = None) -> pd.DataFrame:
        """A row a probe: update, accuracy, kid_rejection (NaN where there is none), and seconds and passes since the start.

        `there` says whether the accuracy is `target` or more, and the KID `max_kid` or less: maximising the reward is accurate soon.
        """
        rows, seconds, passes = [], 0.0, 0
        for row in self.history:
            seconds, passes = seconds + row["seconds"], passes + row["unet_forward"] + row["unet_backward"]
            if "oracle_accuracy" in row:
                figures = {"accuracy": row["oracle_accuracy"], "kid_rejection": row.get("kid_rejection", float("nan"))}
                rows.append({"update": row["update"], "seconds": seconds, "passes": passes, **figures})
        if not rows:
            raise UserError(f"the history of {self.name} has no probe; train it with scripts/finetune.py")
        curve = pd.DataFrame(rows)
        return curve.assign(there=(curve["accuracy"] >= target) & (max_kid is None or curve["kid_rejection"] <= max_kid))

    def figures(self, target: float, max_kid: float | None = None) -> dict[str, float | None]:
        """The figures of FINAL and COST; None where there is none. `target` and `max_kid` are those of `curve`."""
        metrics, curve = self.evaluation["metrics"], self.curve(target, max_kid)
        there = curve[curve["there"]]
        reached = {f"{key}_to_target": there.iloc[0][key] if len(there) else None for key in ("seconds", "passes")}
        passes = {f"unet_{way}": self.adapter["unet_passes"][way] for way in ("forward", "backward")}
        cost = {"seconds": sum(row["seconds"] for row in self.history), "peak_memory_mb": self.adapter["peak_memory_mb"]}
        return {name: metrics.get(name, {}).get("value") for name in FINAL} | cost | passes | reached


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each recipe, in the order in which they are given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.recipe, []).append(run)
    return found


def build(runs: Sequence[Run], target: float = 0.95, max_kid: float | None = None) -> pd.DataFrame:
    """A row a recipe: recipe, trainer, seeds, n images of a seed, num_probe; the mean of each figure over seeds, its `_min` and `_max`.

    Seconds and passes are counted to the first probe with `target` accuracy at a KID of `max_kid`. What not every seed reached has no mean:
    `seeds_at_target` says how many did. UserError where the runs' devices differ: their seconds cannot be compared.
    """
    if len(devices := sorted({run.adapter["device"] for run in runs})) > 1:
        raise UserError(f"the adapters were trained on {' and '.join(devices)}; seconds cannot be compared: train on one machine")
    if any("accuracy" not in run.evaluation["metrics"] for run in runs):
        raise UserError("trainers are compared by their accuracy; a continuous label has none")
    rows = []
    for recipe, its in by_recipe(runs).items():
        settings, table = its[0].adapter["finetune"], pd.DataFrame([run.figures(target, max_kid) for run in its], dtype=float)
        row = {"recipe": recipe, "trainer": settings["trainer"], "seeds": len(its), "n": min(run.evaluation["n"] for run in its)}
        row |= {"num_probe": settings["probe"]["num_images"], "target": target, "max_kid": max_kid}
        row |= {"seeds_at_target": int(table["seconds_to_target"].notna().sum())}
        for name in (*FINAL, *COST):
            column = table[name]
            known = column.notna().all()
            row |= {f"{name}{end}": of() if known else None for end, of in (("", column.mean), ("_min", column.min), ("_max", column.max))}
        rows.append(row | {"device": devices[0]})
    return pd.DataFrame(rows)


def cell(row: Mapping, name: str) -> str:
    """The mean over seeds with its range: `0.953 [0.931, 0.973]`; `–` where there is none, with how many seeds had it."""
    _, factor, decimals = (FINAL | COST)[name]
    if pd.isna(row[name]):
        return f"– ({row['seeds_at_target']} of {row['seeds']} seeds)" if name.endswith("_to_target") else "–"
    mean, low, high = (f"{factor * row[f'{name}{end}']:.{decimals}f}".replace("-", "−") for end in ("", "_min", "_max"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def sentences(table: pd.DataFrame) -> list[str]:
    """Which recipe is the soonest, and how many times sooner than the published one."""
    target, max_kid = table["target"][0], table["max_kid"][0]
    near = "" if pd.isna(max_kid) else f" at a KID of {1000 * max_kid:g} (×1000) or less"
    good = table[table["seconds_to_target"].notna() & (table["diversity"] >= MIN_DIVERSITY)]
    goal = f"{target:g} accuracy{near} on the probe in every seed, at a mean final diversity of {MIN_DIVERSITY} or more"
    if not len(good):
        return [f"No recipe reached {goal}."]
    best = good.loc[good["seconds_to_target"].astype(float).idxmin()]
    lines = [f"The soonest to reach {goal}, is `{best['recipe']}`: after {cell(best, 'seconds_to_target')} s."]
    published = table[table["recipe"] == PUBLISHED]
    if len(published) and best["recipe"] != PUBLISHED:
        other = published.iloc[0]
        memory = best["peak_memory_mb"] / other["peak_memory_mb"]
        if pd.isna(other["seconds_to_target"]):
            reached, least = f"{other['seeds_at_target']} of {other['seeds']}", other["seconds"] / best["seconds_to_target"]
            lines.append(
                f"`{PUBLISHED}` reached that in {reached} seeds, in {cell(other, 'seconds')} s of training: {least:.1f} times as long."
            )
        else:
            times, passes = (other[f"{key}_to_target"] / best[f"{key}_to_target"] for key in ("seconds", "passes"))
            lines.append(
                f"`{PUBLISHED}` took {times:.1f} times as many seconds and {passes:.1f} times as many passes to the same accuracy, "
                f"and ends at a diversity of {cell(other, 'diversity')}."
            )
        lines.append(f"Its peak memory, of the whole process, is {memory:.2f} times that of `{PUBLISHED}`.")
    return lines


def to_markdown(table: pd.DataFrame) -> str:
    """The table of `build` for people, with what it says."""
    names = [name for name in (*FINAL, *COST) if table[name].notna().any() or name.endswith("_to_target")]
    headings = ["recipe", "trainer", "seeds", *((FINAL | COST)[name][0].format(target=table["target"][0]) for name in names)]
    lines = ["| " + " | ".join(headings) + " |", "| --- | --- |" + " ---: |" * (len(headings) - 2)]
    for _, row in table.iterrows():
        lines.append("| " + " | ".join([f"`{row['recipe']}`", row["trainer"], str(row["seeds"]), *(cell(row, n) for n in names)]) + " |")
    probes = " or ".join(map(str, sorted(set(table["num_probe"]))))
    notes = [
        f"Mean over seeds, and in brackets the lowest and the highest; n = {min(table['n'])} images of a seed, on validation prompts.",
        f"Seconds are those of the updates on {table['device'][0]}, probes left out; a pass is one image through the UNet, once forward or",
        f"once backward. The probe is {probes} images. " + " ".join(sentences(table)),
    ]
    return "\n".join([*lines, "", *notes]) + "\n"
