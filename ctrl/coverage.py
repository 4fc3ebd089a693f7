"""How good the density of a continuous label is: likelihood, error, and how often its central intervals hold what they promise."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ctrl import metrics
from ctrl.classifier import Density
from ctrl.networks import to_float

LEVELS = (0.5, 0.8, 0.95)


@torch.no_grad()
def predict(density: Density, images: Tensor, batch_size: int = 256) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and sd, both (N,), in the score's unit, of uint8 images, `before` and `after` calibration."""
    device = density.temperature.device
    outputs = torch.cat([density.outputs(to_float(batch.to(device))) for batch in images.split(batch_size)])
    mean, sd = (part.cpu() for part in density.head.location_scale(outputs))
    return {"before": (mean, sd), "after": (mean, sd * density.temperature.cpu().sqrt())}


def evaluate(laws: dict[str, tuple[Tensor, Tensor]], scores: Tensor) -> dict:
    """Sample size n, and for each of `laws` nll (nats, per unit of the score), rmse, r2 and coverage_50, _80, _95 of `scores` (N,)."""

    def row(mean: Tensor, sd: Tensor) -> dict:
        pit = metrics.gaussian_pit(mean, sd, scores)
        return {
            "nll": metrics.gaussian_nll(mean, sd, scores),
            "rmse": metrics.rmse(scores, mean),
            "r2": metrics.r2(scores, mean),
            **{f"coverage_{100 * level:.0f}": metrics.coverage(pit, level) for level in LEVELS},
        }

    return {"n": len(scores), **{name: row(*law) for name, law in laws.items()}}


def coverage_figure(panels: dict[str, tuple[dict[str, tuple[Tensor, Tensor]], Tensor]]) -> Figure:
    """For each entry of `panels`, (laws, scores): coverage of central intervals against the nominal one, and a histogram of the PIT."""
    figure = Figure(figsize=(4.5 * len(panels), 7), layout="constrained")
    axes, nominal = figure.subplots(2, len(panels), squeeze=False), torch.linspace(0, 1, 41).tolist()
    for (top, bottom), (title, (laws, scores)) in zip(axes.T, panels.items(), strict=True):
        top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for name, (mean, sd) in laws.items():
            pit = metrics.gaussian_pit(mean, sd, scores)
            top.plot(nominal, [metrics.coverage(pit, level) for level in nominal], label=name)
            weights = torch.full_like(pit, 20 / len(pit))
            bottom.hist(pit, bins=torch.linspace(0, 1, 21), weights=weights, histtype="step", label=name)
        bottom.axhline(1, color="grey", linestyle="--", linewidth=1)
        top.set(title=f"{title} (n = {len(scores)})", xlabel="nominal coverage", ylabel="empirical coverage", xlim=(0, 1), ylim=(0, 1))
        bottom.set(xlabel="F(score | x), the probability integral transform", ylabel="density", xlim=(0, 1))
        top.legend(loc="upper left")
    return figure
