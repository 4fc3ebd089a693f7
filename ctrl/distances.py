"""How far samples are from the exact p_gamma(x | y) of a Gaussian mixture: from exact samples, and from the density on a grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl.mixture import GaussianMixture, SoftmaxLinear


def sliced_wasserstein(a: Tensor, b: Tensor, num_axes: int = 64) -> float:
    """Mean over directions of the 1-Wasserstein distance of the projections; equally many samples, shapes (N, D)."""
    axes = torch.randn(a.shape[1], num_axes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    return ((a.double() @ axes).sort(0)[0] - (b.double() @ axes).sort(0)[0]).abs().mean().item()


def grid_probabilities(mixture: GaussianMixture, label: SoftmaxLinear, y: int, gamma: float, edges: Tensor, fine: int = 4) -> Tensor:
    """p_gamma(x | y) of every cell of a square grid with `edges` (G + 1,) on both axes, by midpoints of `fine`² parts; shape (G, G)."""
    width = (edges[1] - edges[0]) / fine
    points = edges[0] + width * (torch.arange(fine * (len(edges) - 1)) + 0.5)
    x = torch.cartesian_prod(points, points).double()
    log_p = mixture.log_density(x) + gamma * label.log_probs(x)[:, y]
    size = len(edges) - 1
    return log_p.softmax(0).view(size, fine, size, fine).sum((1, 3))


def total_variation(samples: Tensor, probabilities: Tensor, edges: Tensor) -> float:
    """½ Σ |share of samples − probability| over the cells of a grid; what lies outside counts as one more cell."""
    counts = torch.histogramdd(samples.float().contiguous(), bins=[edges.float(), edges.float()]).hist / len(samples)
    return 0.5 * ((counts - probabilities).abs().sum() + (1 - counts.sum())).item()


def compare(
    mixture: GaussianMixture, label: SoftmaxLinear, gamma: float, drawn: Sequence[Tensor], truth: Sequence[Tensor], num_cells: int = 40
) -> dict[str, float]:
    """Means over the labels of the distances of one method's samples to exact ones and, in two dimensions, to the exact density."""
    figures = {"sliced_wasserstein": sum(map(sliced_wasserstein, drawn, truth)) / len(drawn)}
    if mixture.dim == 2:
        edges = torch.linspace(-4, 4, num_cells + 1)
        densities = [grid_probabilities(mixture, label, y, gamma, edges) for y in range(len(drawn))]
        figures["total_variation"] = sum(total_variation(x, p, edges) for x, p in zip(drawn, densities, strict=True)) / len(drawn)
    return figures
