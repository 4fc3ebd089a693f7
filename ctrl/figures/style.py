"""What all figures share: fonts, colours, the names of methods, labels and metrics, and how a figure is written."""

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from ctrl.io import write_bytes
from ctrl.oracles import UNITS

DPI = 150
STYLE = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.linewidth": 0.7, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "legend.frameon": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "hatch.linewidth": 0.5, "text.parse_math": False,
}  # fmt: skip
INK, PALE, WRONG = "#222222", "#8a8a8a", "#c8102e"
METHOD_COLOURS = {"pretrained": "#8a8a8a", "rejection": "#222222", "ctrl": "#d1495b", "reconstruction_guidance": "#2e86ab"}
FURTHER_COLOURS = ("#edae49", "#66a182", "#8d6cab", "#e07a5f", "#4f6d7a", "#b5838d")
ORACLE_NAMES = {"jpeg_size": "JPEG size", "brightness": "brightness", "aesthetic": "aesthetic score"}
METRIC_NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "r2": "R² against the pretrained spread", "kid_rejection": "KID to rejection",
    "kid_rejection_within": "KID within cells",
    "diversity": "diversity", "prompt_accuracy": "prompt accuracy", "clip_score": "CLIP score", "brisque": "BRISQUE",
    "kl_nats": "path KL / nats", "var_log_w": "var log w / nats²",
    "log_prob": "log p̂(y | x) / nats", "oracle_accuracy": "oracle's accuracy on the probe", "temperature": "temperature of the classifier",
}  # fmt: skip


def method_name(method: str) -> str:
    """A method's name for people: `reconstruction guidance`, `SMC`, `CTRL, γ = 1, resampled`."""
    words = re.sub(r"^(cfg|ctrl|dps|mpgd|smc|svdd)\b", lambda short: short[0].upper(), re.sub(r"_kl\b", " KL", method).replace("_", " "))
    return re.sub(r"^CTRL gamma([\d.]+)( )?", lambda found: f"CTRL, γ = {found[1]}" + (", " if found[2] else ""), words)


def label_name(report: dict, label: int, with_unit: bool = True) -> str:
    """What a label means, for people: `≥ 1.3 kB`, `1.2–1.3 kB`; with several factors a line each, whose names go with the units."""
    lines = re.sub(r"(?<=\d)-(?=\d)", "–", report["label_names"][label].replace(">=", "≥")).split(", ")
    if not with_unit:
        oracles = [factor["oracle"] for factor in report.get("factors") or [report]]
        bare = zip(lines, oracles, strict=True)
        lines = [line.removeprefix(f"{o.replace('_', ' ')} ").removesuffix(f" {UNITS.get(o, '')}").strip() for line, o in bare]
    return "\n".join(lines)


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in every figure for those that METHOD_COLOURS knows."""
    further = iter(FURTHER_COLOURS * (1 + len(methods) // len(FURTHER_COLOURS)))
    return {m: METHOD_COLOURS[m] if m in METHOD_COLOURS else next(further) for m in methods}


def label_colours(num_classes: int) -> list[tuple[float, ...]]:
    """One colour a label, dark to light along viridis: label 0 is the darkest."""
    return [matplotlib.colormaps["viridis"](0.05 + 0.8 * k / max(1, num_classes - 1)) for k in range(num_classes)]


def oracle_name(report: dict, with_unit: bool = True) -> str:
    """What the oracle measures, with its unit: `JPEG size / kB`; with several factors, all of them."""
    if "factors" in report:
        return " · ".join(oracle_name(factor, with_unit) for factor in report["factors"])
    name, unit = ORACLE_NAMES.get(report["oracle"], report["oracle"].replace("_", " ")), UNITS.get(report["oracle"], "")
    return f"{name} / {unit}" if with_unit and unit else name


def bins_of(report: dict) -> list[tuple[float, float]]:
    """The (lower, upper) edge of each label's bin, the outermost infinite."""
    edges = [-math.inf, *report["edges"], math.inf]
    bins = list(pairwise(edges))
    return bins[::-1] if report["descending"] else bins


def save(figure: Figure, path: Path | str) -> None:
    """Writes a PNG of DPI dots an inch, with at most 256 colours (a third of the size, for these pictures), atomically."""
    buffer, out = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    write_bytes(path, out.getvalue())
