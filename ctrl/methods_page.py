"""One page on all methods: what each computes and needs, its row of the table, and sentences that follow from the figures.

No figure is written here: every number of the page comes from the table, and so does every "most" and "nearest".
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from ctrl.config import for_adapter
from ctrl.tables import FLOOR, SHOWN, number

# By the sampler's guidance, else by the trainer, else by the family: see `mechanism`.
FORMULAS = {
    "pretrained": "eps(x_t, c)",
    "rejection": "draw x ~ p_pre(x | c) until the oracle says y",
    "classifier_guidance": "eps − scale · sqrt(1 − ᾱ_t) · ∇_{x_t} log p̂_t(y | x_t)",
    "reconstruction_guidance": "x_s + scale · g / sqrt(−log p̂), g = ∇_{x_t} log p̂(y | decode(x̂_0(x_t)))",
    "reconstruction_guidance_constant": "eps − scale · sqrt(1 − ᾱ_t) · ∇_{x_t} log p̂(y | decode(x̂_0(x_t)))",
    "mpgd": "x̂_0 + scale · g / sqrt(−log p̂), g = ∇_{x̂_0} log p̂(y | decode(x̂_0))",
    "smc": "M particles, each weighted by p̂(y | decode(x̂_0(x_t)))^(gamma · ᾱ_t), resampled",
    "svdd": "the best of M candidates by log p̂(y | decode(x̂_0)) at every step",
    "resampled": "one of K paths of psi, drawn by p̂(y | x_0)^gamma · pre(path) / psi(path)",
    "cfg": "eps(x_t, c) + scale · (eps(x_t, c, y) − eps(x_t, c))",
    "backprop": "max_psi E[gamma · log p̂(y | x_0)] − Σ_t E[KL(psi ‖ pre)], through the sampler",
    "adjoint": "min_psi Σ_t ‖mu_psi − mu_pre − sigma_t² g_s‖² / (2 sigma_t²), g_t = (∂mu_pre / ∂x_t)ᵀ g_s, g_0 = gamma · ∇ log p̂(y | x_0)",
    "unguided": "min_psi Σ_t ‖mu_psi − mu_pre − sigma_t² g_s‖² / (2 sigma_t²), g_t = (∂mu_c / ∂x_t)ᵀ g_s, g_0 = gamma · ∇ log p̂(y | x_0)",
    "efficient_adjoint": "min_psi Σ_t w_t ‖eps_psi(x_t) − target(∇ log p*(x_1), z)‖², x_1 ~ psi, noised to x_t by z",
    "policy_gradient": "max_psi E[clip(psi / psi_old) · advantage(oracle agrees)] − Σ_t E[KL(psi ‖ pre)]",
    "reward": "max_psi E[gamma · log p̂(y | x_0)], through the sampler, without a KL",
}
SAMPLING_NEEDS = {
    "pretrained": "nothing",
    "rejection": "the oracle",
    "guidance": "the classifier at sampling, a tuned scale",
    "particles": "the classifier at sampling, M passes a step",
    "resampled": "a trained adapter, the classifier at sampling, 2 K passes a step",
    "cfg": "a trained adapter, a tuned scale",
    "finetune": "a trained adapter",
}
TRAINING_NEEDS = {"supervised": "triples (c, x, y)", "policy_gradient": "the oracle as a reward"}  # else a classifier
# What the sentences ask of the figures: the metric, how far a value is from the best possible, and the superlative.
QUESTIONS: tuple[tuple[str, Callable[[float], float], str], ...] = (
    ("accuracy", lambda v: -v, "most accurate"),
    ("r2", lambda v: -v, "most accurate (R²)"),
    ("kid_rejection", lambda v: v, "nearest to the exact images"),
    ("kid_rejection_within", lambda v: v, "nearest to the exact images within each prompt and label"),
    ("diversity", lambda v: abs(v - 1), "one whose diversity is nearest to 1"),
    ("prompt_accuracy", lambda v: -v, "best at keeping the prompt"),
    ("clip_score", lambda v: -v, "best at keeping the prompt"),
)
# Cost columns: (heading, decimals).
COSTS = {
    "nfe_forward": ("forward passes / image", 1),
    "nfe_backward": ("backward passes / image", 1),
    "seconds_per_image": ("s / image", 3),
    "train_seconds": ("training / s", 0),
    "peak_memory_mb": ("peak memory / MB", 0),
    "kl_nats": ("path KL / nats", 2),
    "var_log_w": ("var log w", 1),
    "effective_sample_size": ("effective sample size", 1),
}

EFFECTIVE = [
    "The effective sample size 1 / Σ w² is that of the weights w by which one of an image's particles or paths is drawn at the end: 1",
    "where one has all the weight, M (of `smc`, since it resampled last) or K where all count alike, as paths do at the exact optimum.",
    "",
]


def mechanism(method: Mapping, config: dict) -> str:
    """The key into FORMULAS of a row of methods.tsv."""
    if method["guidance"] or not method["adapter"]:
        return method["guidance"] or method["family"]
    finetune = for_adapter(config, method["adapter"])["finetune"]
    if finetune["trainer"] == "adjoint" and finetune["unguided_jacobian"]:
        return "unguided"
    return finetune["trainer"] if finetune["kl_weight"] else "reward"


def needs(method: Mapping, config: dict) -> str:
    """What a row of methods.tsv takes beside the pretrained model, in words."""
    parts = [SAMPLING_NEEDS[method["family"]]]
    if method["learns_xt_to_y"] == "yes":
        parts.append("a classifier of noisy x_t")
    if method["adapter"]:
        trainer = for_adapter(config, method["adapter"])["finetune"]["trainer"]
        parts.append(f"to train: {TRAINING_NEEDS.get(trainer, 'a classifier, from pairs (x, y)')}")
    return "; ".join(parts)


def overlap(one: Mapping, other: Mapping, metric: str) -> bool:
    """Whether the 95 % intervals of a metric have a point in common; a figure without an interval is a point."""

    def ends(row: Mapping) -> tuple[float, float]:
        lo, hi = row.get(f"{metric}_lo"), row.get(f"{metric}_hi")
        return (row[metric], row[metric]) if pd.isna(lo) or pd.isna(hi) else (lo, hi)

    (a, b), (c, d) = ends(one), ends(other)
    return a <= d and c <= b


def sentences(table: pd.DataFrame) -> list[str]:
    """What the figures say: which method is best by each metric, who cannot be told from it, and what each costs.

    `table` has the columns of the CSV of `ctrl.tables`. The noise floor is exact by construction, and no candidate.
    """
    candidates, floor = table[table["method"] != FLOOR], table[table["method"] == FLOOR]
    lines = []
    for metric, distance, superlative in QUESTIONS:
        known = candidates[candidates[metric].notna()] if metric in candidates else candidates[:0]
        if len(known) < 2:
            continue
        best = known.loc[known[metric].map(distance).idxmin()]
        heading, n = SHOWN[metric][0], int(best["n"])
        tied = [row["method"] for _, row in known.iterrows() if row["method"] != best["method"] and overlap(row, best, metric)]
        text = f"The {superlative} is `{best['method']}`: {heading} {number(best, metric)} (n = {n})"
        text += f". Intervals that overlap its own: {listed(tied)}." if tied else ". No other method's interval overlaps its own."
        if metric.startswith("kid_") and len(floor):
            row = floor.iloc[0]
            told = "cannot" if overlap(row, best, metric) else "can"
            text += f" The noise floor is {number(row, metric)}: by these intervals it {told} be told from the exact law."
        lines.append(text)
    return lines + costs(table)


def costs(table: pd.DataFrame) -> list[str]:
    """Passes of the network relative to the pretrained model's, and the seconds of training."""
    lines, pretrained = [], table[table["method"] == "pretrained"]
    others = table[(table["method"] != "pretrained") & table["nfe"].notna()] if "nfe" in table else table[:0]
    if len(pretrained) and len(others):
        once = pretrained.iloc[0]["nfe"]
        parts = [f"{row['nfe'] / once:.1f} by `{row['method']}`" for _, row in others.iterrows()]
        lines.append(f"For one pass of the pretrained model an image takes, forward and backward together: {', '.join(parts)}.")
    trained = table[table["train_seconds"].notna()] if "train_seconds" in table else table[:0]
    if len(trained):
        parts = [f"{row['train_seconds']:.0f} s for `{row['method']}`" for _, row in trained.iterrows()]
        lines.append(f"Training took {', '.join(parts)}.")
    return lines


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], num_text: int) -> list[str]:
    """Lines of a Markdown table, the first `num_text` columns to the left, the others, numbers, to the right."""
    rule = ["---"] * num_text + ["---:"] * (len(headings) - num_text)
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in (headings, rule, *rows)]


def page(
    methods: pd.DataFrame, table: pd.DataFrame, config: dict, origin: Sequence[str], figures: Sequence[tuple[str, str]] = (),
    sections: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page as Markdown.

    methods: config/methods.tsv; table: the CSV of `ctrl.tables`, of which rows may be missing: these are listed as not run. origin:
    sentences on where the figures come from; figures: (link, caption); sections: further ones, in Markdown.
    """
    rows = {row["method"]: row for _, row in table.iterrows()}
    run = methods[methods["method"].isin(list(rows))]
    what = []
    for _, m in methods.iterrows():
        formula = FORMULAS.get(mechanism(m, config))
        told = f"`{formula}`" if formula else "see its reference"
        what.append([f"`{m['method']}`", told, needs(m, config), m["learns_xt_to_y"], m["uses_conditional_independence"], m["reference"]])
    quality = [name for name in SHOWN if name in table and name not in (*COSTS, "nfe")]
    cost = [name for name in COSTS if name in table]
    scores = [[f"`{m}`", f"{rows[m]['n']:.0f}", *(number(rows[m], name) for name in quality)] for m in run["method"]]
    prices = [[f"`{m}`", *(plain(rows[m].get(name), COSTS[name][1]) for name in cost)] for m in run["method"]]
    gamma = config["finetune"]["gamma"]
    lines = [
        "# The methods, and what each came to",
        "",
        *(f"{text}  " for text in origin),
        "",
        f"gamma is {gamma:g} where a method's name does not say another; M is {config['particles']}, K is {config['candidates']}. "
        "Scales are chosen on validation prompts.",
        "p̂(y | x) is the classifier, x̂_0 the denoised estimate, psi the controlled and pre the pretrained process.",
        "",
        *markdown_table(["method", "what it does", "what it needs", "learns x_t → y", "uses y ⊥ c given x", "reference"], what, 6),
        "",
        "## Quality",
        "",
        *markdown_table(["method", "n", *(SHOWN[name][0] for name in quality)], scores, 1),
        "",
        f"95 % bootstrap intervals in brackets; n images a method, on held-out prompts and seeds. `{FLOOR}` is exact: its distance to a",
        "second such set is the noise floor. Where intervals overlap, these images do not tell two methods apart.",
        "",
        "## Cost",
        "",
        *markdown_table(["method", *(COSTS[name][0] for name in cost)], prices, 1),
        "",
        *(EFFECTIVE if "effective_sample_size" in cost else []),
        *([f"Not run, of that command: {listed(missing)}.", ""] if (missing := [m for m in methods["method"] if m not in rows]) else []),
        "## What the figures say",
        "",
        *(f"- {text}" for text in sentences(table)),
        *(line for section in sections for line in ("", section.rstrip())),
    ]
    for link, caption in figures:
        lines += ["", f"![{caption}]({link})", "", caption]
    return "\n".join(lines) + "\n"


def plain(value: float | None, decimals: int) -> str:
    """A number without an interval, or `–` where it is missing."""
    return "–" if value is None or pd.isna(value) else f"{value:.{decimals}f}"


def differences(config: Mapping, defaults: Mapping, parent: str = "") -> list[str]:
    """`key: value` of every setting that is not the default, by dotted key."""
    lines = []
    for key, value in config.items():
        name, default = f"{parent}{key}", defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            lines += differences(value, default, f"{name}.")
        elif value != default:
            lines.append(f"{name}: {value}")
    return lines
