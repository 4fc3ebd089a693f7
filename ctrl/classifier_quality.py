"""How good a classifier is: accuracy, likelihood and calibration on labelled images, and the reliability diagram."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ctrl import metrics
from ctrl.classifier import Classifier
from ctrl.networks import to_float


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
    """Log-probabilities (N, K) of uint8 images, `before` and `after` calibration."""
    device = classifier.temperature.device
    outputs = torch.cat([classifier.outputs(to_float(batch.to(device))) for batch in images.split(batch_size)])
    temperatures = {"before": torch.ones_like(classifier.temperature), "after": classifier.temperature}
    return {k: classifier.head.log_probs(outputs, t, classifier.descending).cpu() for k, t in temperatures.items()}


def evaluate(log_probs: dict[str, Tensor], labels: Tensor) -> dict:
    """Sample size n, and accuracy, nll (nats) and ece (15 bins) for each entry of `log_probs`."""
    rows = {
        name: {
            "accuracy": (values.argmax(1) == labels).double().mean().item(),
            "nll": metrics.nll(values, labels),
            "ece": metrics.ece(values.exp(), labels),
        }
        for name, values in log_probs.items()
    }
    return {"n": len(labels), **rows}


def reliability_diagram(panels: dict[str, tuple[dict[str, Tensor], Tensor]]) -> Figure:
    """Accuracy against confidence, before and after calibration; a panel for each entry of `panels`: (log-probabilities, labels).

    Small figures are the number of images in a bin, after calibration.
    """
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, (log_probs, labels)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for name, values in log_probs.items():
            bins = metrics.reliability(values.exp(), labels)
            full = bins["count"] > 0
            label = f"{name}: ECE {metrics.ece(values.exp(), labels):.3f}"
            axes.plot(bins["confidence"][full], bins["accuracy"][full], marker="o", label=label)
        for x, y, n in zip(*(bins[k][full].tolist() for k in ("confidence", "accuracy", "count")), strict=True):
            axes.annotate(f"{n:.0f}", (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=7)
        axes.set(title=f"{title} (n = {len(labels)})", xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc="upper left")
    return figure
