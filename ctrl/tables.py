"""The table of results, from the methods' descriptions and their evaluations: as CSV for programs, Markdown and LaTeX for people."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ctrl import judged
from ctrl.errors import UserError

DESCRIPTION = ("method", "family", "fine_tunes", "learns_xt_to_y", "uses_conditional_independence")
METRICS = (
    "accuracy", "macro_f1", "within_tolerance", "mae", "rmse", "r2", "mae_beyond", "rmse_beyond", "kid_rejection",
    "kid_rejection_within", "frechet_distance", "precision", "recall",
    "diversity", "prompt_accuracy", "clip_score", "brisque", "kl_nats", "var_log_w", "effective_sample_size",
    "nfe", "nfe_forward", "nfe_backward", "seconds_per_image", "train_seconds", "peak_memory_mb",
)  # fmt: skip
# The columns that people read: metric -> (heading, factor, decimals, whether to show the interval). Those that no method has are left out.
SHOWN = {
    "accuracy": ("accuracy", 1, 3, True),
    "macro_f1": ("macro-F1", 1, 3, True),
    "within_tolerance": ("within tolerance", 1, 3, True),
    "mae": ("MAE", 1, 4, True),
    "rmse": ("RMSE", 1, 4, True),
    "r2": ("R²", 1, 3, True),
    "mae_beyond": ("MAE beyond", 1, 4, True),
    "kid_rejection": ("KID to rejection ×1000", 1000, 1, True),
    "kid_rejection_within": ("KID within cells ×1000", 1000, 1, True),
    "diversity": ("diversity", 1, 3, True),
    "prompt_accuracy": ("prompt accuracy", 1, 3, True),
    "clip_score": ("CLIP score", 1, 3, True),
    "brisque": ("BRISQUE", 1, 1, True),
    "nfe": ("NFE", 1, 1, False),
    "seconds_per_image": ("s / image", 1, 3, False),
}
FLOOR = "rejection"  # its distance to the reference, an independent set of the same law, is the noise floor


def build(methods: pd.DataFrame, evaluations: Sequence[dict]) -> pd.DataFrame:
    """One row a method, in the order of `methods`: DESCRIPTION, n, each metric, `<metric>_lo` and `<metric>_hi` where there is an interval.

    methods: config/methods.tsv, at least the columns DESCRIPTION; evaluations: the JSON files of scripts/evaluate.py. Methods without
    an evaluation are left out. UserError for an evaluation of an unknown method, or two of one.
    """
    if missing := [c for c in DESCRIPTION if c not in methods]:
        raise UserError(f"the table of methods has no column {missing[0]}; see config/methods.tsv")
    by_method: dict[str, dict] = {}
    for evaluation in evaluations:
        name = evaluation["method"]
        if name not in set(methods["method"]):
            raise UserError(f"there is an evaluation of {name!r}, but no row for it in the table of methods; add one")
        if name in by_method:
            raise UserError(f"there are two evaluations of {name!r}; give one")
        by_method[name] = evaluation
    known = dict.fromkeys([*METRICS, *(name for e in evaluations for name in e["metrics"])])
    rows = []
    for _, method in methods[methods["method"].isin(list(by_method))].iterrows():
        evaluation = by_method[method["method"]]
        row = {c: method[c] for c in DESCRIPTION} | {"n": evaluation["n"]}
        for name in known:
            figure = evaluation["metrics"].get(name, {})
            row |= {name: figure.get("value"), f"{name}_lo": figure.get("lo"), f"{name}_hi": figure.get("hi")}
        rows.append(row)
    if not rows:
        raise UserError("there are no evaluations to tabulate")
    table = pd.DataFrame(rows)
    return table.drop(columns=[c for c in table if c not in (*DESCRIPTION, "n") and table[c].isna().all()])


def read_methods(path: Path) -> pd.DataFrame:
    """config/methods.tsv as text; UserError where it is missing."""
    if not Path(path).exists():
        raise UserError(f"there is no table of methods {path}; see config/methods.tsv")
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def to_csv(table: pd.DataFrame) -> str:
    """`build`'s table with six significant digits, empty where a figure is missing."""
    return table.to_csv(index=False, float_format="%.6g")


def shown(name: str) -> tuple[str, float, int, bool]:
    """The entry of SHOWN; accuracies of single factors and of held-out combinations are shown as the accuracy is."""
    return SHOWN[name] if name in SHOWN else (name.replace("_", " ").replace("accuracy ", "accuracy, "), *SHOWN["accuracy"][1:])


def number(row: pd.Series, name: str) -> str:
    """A figure as people read it: `0.953 [0.931, 0.973]`, or `–` where it is missing."""
    _, factor, decimals, with_interval = shown(name)
    if pd.isna(row.get(name)):
        return "–"
    text = [f"{factor * row[c]:.{decimals}f}" for c in (name, f"{name}_lo", f"{name}_hi") if c in row and not pd.isna(row[c])]
    text = [t.replace("-", "−") if float(t) else t.lstrip("-") for t in text]  # a minus sign, none before zero
    return f"{text[0]} [{text[1]}, {text[2]}]" if with_interval and len(text) == 3 else text[0]


def _shown(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, as text, of the columns that people read."""
    names = [name for name in SHOWN if name in table]
    further = [c for c in table if c.startswith("accuracy_") and not c.endswith(("_lo", "_hi"))]  # of each factor, and held out
    names[1:1] = further if names[:1] == ["accuracy"] else []
    headings = ["method", "fine-tunes", "learns x_t → y", "uses y ⊥ c given x", "n"] + [shown(name)[0] for name in names]
    rows = []
    for _, row in table.iterrows():
        method = f"{row['method']} (noise floor)" if row["method"] == FLOOR else row["method"]
        rows.append([method, *(row[c] for c in DESCRIPTION[2:]), str(row["n"]), *(number(row, name) for name in names)])
    return headings, rows


def policy_gradient(table: pd.DataFrame) -> bool:
    """Whether a method of the table was rewarded by the oracle itself."""
    return table["method"].str.contains("policy_gradient").any()


def _notes(table: pd.DataFrame) -> list[str]:
    notes = ["95 % bootstrap intervals in brackets; n images a method, all on held-out prompts and seeds."]
    praise = " The policy gradient was rewarded by it, so that its own accuracy says little." if policy_gradient(table) else ""
    for column in (c for c in table if c.startswith(judged.PREFIX) and not (c.endswith(("_lo", "_hi")) and c[:-3] in table)):
        ends = {end: table[f"{column}_{end}"].iloc[0] for end in ("lo", "hi") if f"{column}_{end}" in table}
        notes += [sentence + praise for sentence in judged.words({column: {"value": table[column].iloc[0], **ends}})]
    if "mae" in table:
        notes.append(
            "MAE and RMSE of what was reached against what was asked for, in the label's unit; R² is 1 − MSE / the variance "
            "of the pretrained model's own scores of the subject. MAE beyond: on requests beyond a subject's range, which no other "
            "column holds."
        )
    if "kid_rejection" in table:
        notes.append(
            "KID to rejection is the kernel distance to exact samples of the same prompts and labels; it estimates 0 for the exact law and "
            f"can be negative. {FLOOR} is a second, independent set of them: its row is the noise floor."
        )
    if "kid_rejection_within" in table:
        notes.append("KID within cells compares each prompt and label on its own: right images under wrong labels count as wrong there.")
    if "diversity" in table:
        notes.append("Diversity is relative to that reference: 1 is right, collapse is near 0.")
    if "accuracy_held_out" in table:
        notes.append(
            "Accuracy, held out: on the combinations of labels that no training image had, "
            "and no training request where `finetune.ask_held_out` is false."
        )
    if "nfe" in table:
        notes.append("NFE counts the denoiser's passes an image, forward and backward together; the CSV has them apart.")
    return notes


def to_markdown(table: pd.DataFrame) -> str:
    """`build`'s table for people, numbers to the right, with notes below."""
    headings, rows = _shown(table)
    rule = ["---"] * 4 + ["---:"] * (len(headings) - 4)
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in _notes(table)) + "\n"


LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "×": r"$\times$", "→": r"$\to$", "⊥": r"$\perp$", "²": "$^2$"}
LATEX |= {"−": "$-$", "–": "--"}


def _latex(text: str) -> str:
    text = text.replace("x_t", "x@t")
    for plain, escaped in LATEX.items():
        text = text.replace(plain, escaped)
    return text.replace("x@t", "$x_t$")


def to_latex(table: pd.DataFrame) -> str:
    """`build`'s table as a `tabular` with booktabs rules, intervals on a second line of their row; notes as comments above."""
    headings, rows = _shown(table)
    lines = [f"% {note}" for note in _notes(table)]
    lines += [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{llll{'r' * (len(headings) - 4)}}}", r"\toprule"]
    lines += [" & ".join(map(_latex, headings)) + r" \\", r"\midrule"]
    for row in rows:
        values, intervals = zip(*(cell.split(" [") if " [" in cell else (cell, "") for cell in row), strict=True)
        lines.append(" & ".join(map(_latex, values)) + r" \\")
        if any(intervals):
            small = [rf"{{\scriptsize [{_latex(i)}}}" if i else "" for i in intervals]
            lines.append(" & ".join(small) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"
