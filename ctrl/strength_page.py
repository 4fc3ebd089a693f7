"""The section of the page on the strength dial: tables and sentences that follow from what `ctrl.strength` found. No number is typed."""

from collections.abc import Mapping, Sequence

import pandas as pd

from ctrl.methods_page import COSTS, markdown_table
from ctrl.strength import COMPARED, METRICS
from ctrl.tables import number, shown


def heading(name: str) -> str:
    """What a metric is called on the page."""
    return COSTS[name][0] if name in COSTS else shown(name)[0]


def section(table: pd.DataFrame) -> str:
    """What `compare` found, as a section of the page in Markdown: both curves, the differences at equal accuracy, and what they say."""
    strengths, gammas = (table[table["dial"] == dial] for dial in ("strength", "gamma"))
    names = [name for name in METRICS if table[name].notna().any()]
    compared = [name for name in COMPARED if name in names]
    points = [
        [f"{row['dial']} {row['setting']:g}", f"{row['n']:.0f}", *(number(row, name) for name in names)]
        for _, row in pd.concat([strengths, gammas]).iterrows()
    ]
    apart = [
        [f"{row['setting']:g}", number(row, "nearest_gamma"), *(number(apart_by(row, name), name) for name in compared)]
        for _, row in strengths.iterrows()
    ]
    lines = [
        "## The strength dial",
        "",
        f"`eps_pre + strength · (eps_psi − eps_pre)` of the adapter with gamma = {strengths['gamma'].iloc[0]:g}, beside adapters trained",
        "with other gammas, on validation prompts. The dial needs no training; strengths other than 0 and 1 take two passes a step.",
        "",
        *markdown_table(["", "n", *(heading(name) for name in names)], points, 1),
        "",
        "Which gamma is as accurate as a strength, linear in log gamma between those that were trained, and by how much the strength",
        "differs from it in everything else (strength − gamma). A gamma's interval is left out where an end of it is beyond those trained.",
        "",
        *markdown_table(["strength", "gamma of equal accuracy", *(heading(name) for name in compared)], apart, 0),
        "",
        *(f"- {text}" for text in sentences(strengths, gammas, compared)),
    ]
    return "\n".join(lines) + "\n"


def apart_by(row: Mapping, name: str) -> dict:
    """A strength's difference from its gamma in the metric `name`, as a figure of that metric."""
    return {f"{name}{end}": row[f"{name}_difference{end}"] for end in ("", "_lo", "_hi")}


def sentences(strengths: pd.DataFrame, gammas: pd.DataFrame, compared: Sequence[str]) -> list[str]:
    """What the figures say. Strength 1 is the trained adapter itself, and says nothing."""
    dialled = strengths[strengths["setting"] != 1]
    least, most = (gammas.loc[gammas["accuracy"].agg(extreme)] for extreme in ("idxmin", "idxmax"))
    lines = [beside(row, "less", least, compared) for _, row in dialled[dialled["accuracy"] < least["accuracy"]].iterrows()]
    lines += [beside(row, "more", most, compared) for _, row in dialled[dialled["accuracy"] > most["accuracy"]].iterrows()]
    told, held = [], 0
    for name in compared:
        known = dialled[dialled[f"{name}_difference"].notna()]
        if not len(known):
            continue
        held += 1
        row = known.loc[known[f"{name}_difference"].abs().idxmax()]
        apart = known[(known[f"{name}_difference_lo"] > 0) | (known[f"{name}_difference_hi"] < 0)]
        told += [heading(name)] if len(apart) else []
        where = f"; its interval does not hold 0 at {settings(apart)}" if len(apart) else "; every interval holds 0"
        lines.append(
            f"In {heading(name)} the largest difference is {number(apart_by(row, name), name)}, at strength {row['setting']:g} "
            f"(gamma {row['nearest_gamma']:.3g}){where if known[f'{name}_difference_lo'].notna().all() else ''}."
        )
    if held:
        differs = f"the dial differs from training in {' and '.join(told)}" if told else "these images do not tell the dial from training"
        lines.append(f"At equal accuracy {differs}.")
    return lines


def beside(row: Mapping, word: str, gamma: Mapping, compared: Sequence[str]) -> str:
    """A strength that is less or more accurate than each of the gammas, beside the one at that end."""
    figures = "; ".join(f"{heading(name)} {number(row, name)} against {number(gamma, name)}" for name in compared)
    return (
        f"Strength {row['setting']:g} is {word} accurate than each of the gammas. Beside gamma {gamma['setting']:g}, the nearest in "
        f"accuracy: {figures}."
    )


def settings(rows: pd.DataFrame) -> str:
    """`strength 0.5 and 2`."""
    return "strength " + " and ".join(f"{setting:g}" for setting in rows["setting"])
