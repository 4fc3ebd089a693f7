"""Pure formulas for conditional samplers and classifiers: tensors in, floats out.

Symbols: `requested` and `measured` are labels with shape (N,); `x` and `y` are features with shapes (N, D) and (M, D); a *cell* is one
(subject, label) pair, numbered; `cells` are two vectors, with shapes (N,) and (M,), that say which cell each row was asked for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # something of x, the same of y

# ---------------------------------------------------------------------------------------------------------------- labels


def accuracy(requested: Tensor, measured: Tensor) -> float:
    """Share of images whose measured label is the requested one; both with shape (N,)."""
    _check_pairs(requested, measured)
    return (requested == measured).double().mean().item()


def confusion_matrix(requested: Tensor, measured: Tensor, num_classes: int) -> Tensor:
    """Counts with shape (num_classes, num_classes), int64: row = requested label, column = measured label; both inputs (N,)."""
    _check_pairs(requested, measured)
    both = torch.stack([requested, measured]).long()
    if both.min() < 0 or both.max() >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, found {int(both.min())}..{int(both.max())}")
    return torch.bincount(both[0] * num_classes + both[1], minlength=num_classes**2).view(num_classes, num_classes)


def macro_f1(requested: Tensor, measured: Tensor) -> float:
    """Unweighted mean of `F1_k = 2 TP_k / (2 TP_k + FP_k + FN_k)` over the labels k that were requested; both inputs (N,).

    A label that was measured but never requested counts as somebody's error, not as a class of its own.
    """
    _check_pairs(requested, measured)
    scores = []
    for k in requested.unique():
        hits = ((requested == k) & (measured == k)).sum()
        scores.append(2 * hits / ((requested == k).sum() + (measured == k).sum()))
    return torch.stack(scores).double().mean().item()


def mae(requested: Tensor, measured: Tensor) -> float:
    """Mean absolute error `mean |requested - measured|` of continuous labels, in their unit; both inputs (N,)."""
    _check_pairs(requested, measured)
    return (requested - measured).double().abs().mean().item()


def rmse(requested: Tensor, measured: Tensor) -> float:
    """Root mean square error `sqrt(mean (requested - measured)^2)`, in the labels' unit; both inputs (N,)."""
    _check_pairs(requested, measured)
    return (requested - measured).double().square().mean().sqrt().item()


def r2(requested: Tensor, measured: Tensor, spread: Tensor | None = None) -> float:
    """Coefficient of determination `1 - sum (requested - measured)^2 / sum (requested - mean)^2`; both inputs (N,).

    1 is perfect, 0 is what a constant at the mean request reaches; undefined (nan) where all requests are equal. With `spread`, a
    standard deviation for each row, `sum spread^2` is below the line instead: then 0 is an error as large as that spread.
    """
    _check_pairs(requested, measured)
    requested, measured = requested.double(), measured.double()
    scale = requested - requested.mean() if spread is None else spread.double()
    return (1 - (requested - measured).square().sum() / scale.square().sum()).item()


def _check_pairs(requested: Tensor, measured: Tensor) -> None:
    if requested.ndim != 1 or requested.shape != measured.shape or not len(requested):
        raise ValueError(f"expected two non-empty vectors of one length, got shapes {tuple(requested.shape)} and {tuple(measured.shape)}")


# ------------------------------------------------------------------------------------------------ distances between laws


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`k(x, y) = (x . y / D + 1)^3` for every pair of rows, shape (N, M), in double precision (Binkowski et al. 2018)."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor, cells: Pair | None = None, clusters: Pair | None = None, within: bool = False) -> float:
    """Kernel distance: the unbiased estimate of MMD² with the cubic polynomial kernel; 0 in mean for equal laws, so it can be negative.

        KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)          without cells

    Where the number of images per cell was fixed beforehand (not drawn), two images of one set fall into the same cell more rarely than
    two draws of the mixture, and the formula above is biased downwards by about 2/N times the excess of k within cells. With cells,
    pairs within and between cells are therefore averaged apart and put together with the shares pi_c of the cells in `x`:

        KID = sum_{c, c'} pi_c pi_c' (K^xx_cc' + K^yy_cc' - 2 K^xy_cc')

    K_cc' = mean of k over the independent pairs of cell c and cell c': unbiased, and `y` is weighted to the mix of `x`. With `within`
    the laws are compared cell by cell instead, `sum_c pi_c (K^xx_cc + K^yy_cc - 2 K^xy_cc)`: the distance between the joint laws of image
    and request, which also notices a method that serves the right images under the wrong labels.

    x, y: features (N, D), (M, D). cells: int (N,) and (M,); those with fewer than two rows in either set are left out. clusters: int
    (N,) and (M,); rows of one cluster (one seed, say) depend on each other, and their pairs are left out as i = j is.
    Source: Binkowski et al. 2018, arXiv 1801.01401, eq. 4; Gretton et al. 2012, JMLR 13, eq. 3.
    """
    sets = _sets(x, y, cells, clusters)
    ones = [torch.ones(1, len(z), dtype=torch.float64) for z, _, _ in sets]
    return _weighted_kid(sets, _kernels(sets, within), ones, within).item()


def kid_interval(
    x: Tensor, y: Tensor, cells: Pair | None = None, clusters: Pair | None = None, within: bool = False,
    num_bootstrap: int = 1000, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile interval of `kid` by the Bayesian bootstrap of both sets' clusters; the kernels are computed once.

    Drawing rows with replacement would put copies of one row into a pair, whose k is far above that of two rows: the estimate would be
    biased. Instead every cluster gets a random weight w (Rubin 1981), pairs get w_i w_j, and i = j stays left out: exchangeable weights
    keep the mean over replicates at the estimate itself. With w = 1 + e, a replicate is KID + L(e) + Q(e), linear and quadratic in e. The
    bootstrap's var L holds var Q twice too much (Arcones & Gine 1992, near equal laws its intervals are sqrt(3) too wide); as
    L = (KID(1 + e) - KID(1 - e)) / 2 and Q are known for each replicate, the replicates are shrunk towards KID by what that is.
    """
    sets = _sets(x, y, cells, clusters)
    weights = [w / _sum_cells(w, c)[:, c] for w, (_, c, _) in zip(_bootstrap_weights(sets, num_bootstrap, seed), sets, strict=True)]
    ones = [1 / torch.bincount(c).double()[c][None] for _, c, _ in sets]
    kernels = _kernels(sets, within)
    value, up = _weighted_kid(sets, kernels, ones, within), _weighted_kid(sets, kernels, weights, within)
    down = _weighted_kid(sets, kernels, [2 * o - w for o, w in zip(ones, weights, strict=True)], within)
    linear, quadratic = ((up - down) / 2).var(), ((up + down) / 2).var()
    shrink = (((linear - 2 * quadratic).clamp(min=0) + quadratic) / up.var().clamp(min=1e-300)).sqrt().clamp(max=1)
    return _percentiles(value + shrink * (up - value))


def _sets(x: Tensor, y: Tensor, cells: Pair | None, clusters: Pair | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rows, cells, clusters) of both sets, restricted to the cells with two rows in each; cells and clusters renumbered from 0."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected features of one width, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    cells = cells or (torch.zeros(len(x), dtype=torch.long), torch.zeros(len(y), dtype=torch.long))
    clusters = clusters or (torch.arange(len(x)), torch.arange(len(y)))
    if [len(c) for c in (*cells, *clusters)] != [len(x), len(y)] * 2:
        raise ValueError(f"{len(x)} and {len(y)} rows, but {[len(c) for c in cells]} cells and {[len(c) for c in clusters]} clusters")
    common = [c for c in cells[0].unique().tolist() if (cells[0] == c).sum() >= 2 and (cells[1] == c).sum() >= 2]
    if not common:
        raise ValueError("no cell has two or more images in both sets")
    table, sets = torch.tensor(common), []
    for z, c, u in zip((x, y), cells, clusters, strict=True):
        keep = torch.isin(c, table)
        sets.append((z[keep].double(), torch.searchsorted(table, c[keep]), u[keep].unique(return_inverse=True)[1]))
    return sets


def _kernels(sets: list[tuple[Tensor, Tensor, Tensor]], within: bool) -> tuple[Tensor, Tensor, Tensor]:
    """k of every pair in x, in y, and of both: (N, N), (M, M), (N, M); `within`, 0 for pairs of two cells."""
    (x, cx, _), (y, cy, _) = sets
    kxx, kyy = (_fill(polynomial_kernel(z, z), c, g) for z, c, g in sets)
    kxy = polynomial_kernel(x, y)
    if within:
        kxx, kyy, kxy = (k * (c[:, None] == d) for k, c, d in ((kxx, cx, cx), (kyy, cy, cy), (kxy, cx, cy)))
    return kxx, kyy, kxy


def _weighted_kid(
    sets: list[tuple[Tensor, Tensor, Tensor]], kernels: tuple[Tensor, Tensor, Tensor], weights: list[Tensor], within: bool
) -> Tensor:
    """`kid` for B sets of weights on the rows, [(B, N), (B, M)], that are normalised in every cell here; returns (B,)."""
    ((_, cx, _), (_, cy, _)), (kxx, kyy, kxy) = sets, kernels
    share = torch.bincount(cx).double() / len(cx)
    u, v = (w / _sum_cells(w, c)[:, c] for w, (_, c, _) in zip(weights, sets, strict=True))  # sum to 1 in every cell
    if within:
        return ((u @ kxx) * u) @ share[cx] + ((v @ kyy - 2 * u @ kxy) * v) @ share[cy]
    u, v = u * share[cx], v * share[cy]  # sum to 1 over all
    return ((u @ kxx) * u).sum(1) + ((v @ kyy) * v).sum(1) - 2 * ((u @ kxy) * v).sum(1)


def _fill(matrix: Tensor, cells: Tensor, clusters: Tensor) -> Tensor:
    """`matrix` (N, N) with each dependent pair (of one cluster, also i = j) replaced by the mean over its cells' independent pairs.

    Any mean over all pairs is then one over the independent pairs, in which every pair of cells keeps its weight.
    """
    independent = clusters[:, None] != clusters
    member = torch.nn.functional.one_hot(cells).double()
    count = member.T @ independent.double() @ member
    if (count == 0).any():
        raise ValueError("two cells without a pair of independent images")
    mean = member.T @ (matrix * independent) @ member / count
    return torch.where(independent, matrix, mean[cells][:, cells])


def _sum_cells(values: Tensor, cells: Tensor) -> Tensor:
    """Sums over the columns of each cell: (B, N) -> (B, C)."""
    return values.new_zeros(len(values), int(cells.max()) + 1).index_add_(1, cells, values)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """`|mu_x - mu_y|² + tr(S_x + S_y - 2 (S_x S_y)^(1/2))` of the Gaussians with the means and covariances of `x` (N, D), `y` (M, D).

    Biased upwards by an amount that falls with N: compare only values of one N, from 2,000 on.
    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6. tr (S_x S_y)^(1/2) is the sum of the square roots of the eigenvalues of the
    symmetric S_x^(1/2) S_y S_x^(1/2).
    """
    x, y = x.double(), y.double()
    sx, sy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(sx)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sy @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * cross).item()


def in_manifold(points: Tensor, support: Tensor, num_neighbours: int = 5, clusters: Tensor | None = None) -> Tensor:
    """Whether each of `points` (N, D) lies in a ball around a row of `support` (M, D) that reaches its k-th nearest other row; bool (N,).

    clusters: int (M,); rows of one cluster are no neighbours of each other.
    """
    clusters = torch.arange(len(support)) if clusters is None else clusters
    same = clusters[:, None] == clusters
    if (~same).sum(1).min() < num_neighbours:
        raise ValueError(f"{len(support)} images are too few for {num_neighbours} neighbours")
    points, support = points.double(), support.double()
    radii = torch.cdist(support, support).masked_fill_(same, torch.inf).kthvalue(num_neighbours, dim=1).values
    return (torch.cdist(points, support) <= radii).any(dim=1)


def precision_recall(x: Tensor, reference: Tensor, num_neighbours: int = 5, clusters: Pair | None = None) -> tuple[float, float]:
    """Precision: share of `x` (N, D) on the k-NN manifold of `reference` (M, D); recall: share of `reference` on that of `x`.

    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, eqs. 1-2. For clusters see `in_manifold`.
    """
    own, right = clusters or (None, None)
    on_reference, on_x = in_manifold(x, reference, num_neighbours, right), in_manifold(reference, x, num_neighbours, own)
    return on_reference.double().mean().item(), on_x.double().mean().item()


def diversity(x: Tensor, reference: Tensor, cells: Pair | None = None, clusters: Pair | None = None) -> float:
    """Mean Euclidean feature distance between two images of one cell, relative to the reference's: 1 is right, collapse is near 0.

        diversity = sum_c n_c d_c(x) / sum_c n_c d_c(reference),      d_c = mean_{i != j in c} |x_i - x_j|

    n_c is the number of rows of `x` (N, D) in cell c; cells and clusters, of `x` and `reference` (M, D), as in `kid`.
    """
    sets = _sets(x, reference, cells, clusters)
    return _weighted_diversity(sets, [torch.ones(1, len(z), dtype=torch.float64) for z, _, _ in sets]).item()


def diversity_interval(
    x: Tensor, reference: Tensor, cells: Pair | None = None, clusters: Pair | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `diversity`, by the Bayesian bootstrap of both sets' clusters (see `kid_interval`)."""
    sets = _sets(x, reference, cells, clusters)
    return _percentiles(_weighted_diversity(sets, _bootstrap_weights(sets, num_bootstrap, seed)))


def _weighted_diversity(sets: list[tuple[Tensor, Tensor, Tensor]], weights: list[Tensor]) -> Tensor:
    count, means = torch.bincount(sets[0][1]).double(), []
    for w, (z, c, g) in zip(weights, sets, strict=True):
        w, distance = w / _sum_cells(w, c)[:, c], _fill(torch.cdist(z, z), c, g) * (c[:, None] == c)
        means.append(((w @ distance) * w) @ count[c])
    return means[0] / means[1]


# ------------------------------------------------------------------------------------------------------------ classifiers


def nll(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood `-mean log p(y_i | x_i)` in nats; log_probabilities (N, K), labels (N,)."""
    return -log_probabilities.double().gather(1, labels.long()[:, None]).mean().item()


def reliability(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> dict[str, Tensor]:
    """Bins of equal width over the top probability `max_k p_k`, for a reliability diagram.

    probabilities (N, K), labels (N,). Returns `edges` (num_bins + 1,), and with shape (num_bins,): `count`, `confidence` (mean top
    probability) and `accuracy` (share of right top labels), nan in empty bins. A bin holds the values in (lower edge, upper edge].
    Source: Guo et al. 2017, arXiv 1706.04599, section 2.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    index = (torch.searchsorted(edges, confidence) - 1).clamp(0, num_bins - 1)
    count = torch.bincount(index, minlength=num_bins)
    sums = [torch.zeros(num_bins, dtype=torch.float64).index_add_(0, index, v) for v in (confidence, (predicted == labels).double())]
    return {"edges": edges, "count": count, "confidence": sums[0] / count, "accuracy": sums[1] / count}


def ece(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error `sum_b (n_b / N) |accuracy_b - confidence_b|` over `reliability`'s bins; (N, K) and (N,)."""
    bins = reliability(probabilities, labels, num_bins)
    return (bins["count"] * (bins["accuracy"] - bins["confidence"]).abs()).nansum().item() / len(labels)


def gaussian_nll(mean: Tensor, sd: Tensor, scores: Tensor) -> float:
    """Mean negative log-density of `scores` under N(mean, sd²), in nats, per unit of the scores; all (N,)."""
    return -torch.distributions.Normal(mean.double(), sd.double()).log_prob(scores.double()).mean().item()


def gaussian_pit(mean: Tensor, sd: Tensor, scores: Tensor) -> Tensor:
    """Probability integral transform F(score) of N(mean, sd²), (N,): uniform in 0..1 where the law is calibrated; all inputs (N,).

    Source: Gneiting et al. 2007, J. R. Stat. Soc. B 69, section 3.
    """
    return torch.distributions.Normal(mean.double(), sd.double()).cdf(scores.double())


def coverage(pit: Tensor, level: float) -> float:
    """Share of the scores inside the central interval of nominal probability `level`, from their `gaussian_pit` (N,)."""
    return ((pit - 0.5).abs() <= level / 2).double().mean().item()


# -------------------------------------------------------------------------------------------------------------- intervals


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, num_bootstrap: int = 1000, seed: int = 0,
    groups: Tensor | None = None, clusters: Tensor | None = None,
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile interval of `statistic(indices)` over resamples of `n` rows with replacement (Efron 1979).

    groups: int (n,), strata; each is resampled on its own and keeps its size (where the design fixed it). clusters: int (n,); the rows
    of one cluster depend on each other and are drawn together (a cluster lies in one group). For statistics of single rows; those of
    pairs of rows have `kid_interval` and `diversity_interval`.
    """
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.arange(n) if clusters is None else clusters.unique(return_inverse=True)[1]
    members = torch.argsort(clusters, stable=True).split(torch.bincount(clusters).tolist())
    strata = torch.zeros(n, dtype=torch.long) if groups is None else groups.unique(return_inverse=True)[1]
    stratum = strata[torch.stack([m[0] for m in members])]
    order, size = torch.argsort(stratum, stable=True), torch.bincount(stratum)
    first, width = (size.cumsum(0) - size)[stratum[order]], size[stratum[order]]
    values = []
    for _ in range(num_bootstrap):
        draw = order[first + (torch.rand(len(order), generator=generator, dtype=torch.float64) * width).long()]
        alone = groups is None and len(members) == n  # then rows are as good as clusters
        values.append(statistic(draw if alone else torch.cat([members[i] for i in draw.tolist()])))
    return _percentiles(torch.tensor(values, dtype=torch.float64))


def _bootstrap_weights(sets: list[tuple[Tensor, Tensor, Tensor]], num_bootstrap: int, seed: int) -> list[Tensor]:
    """Gamma weights on the clusters of both sets, given to their rows; [(num_bootstrap, N), (num_bootstrap, M)].

    Concentration (n_c - 2) / n_c, n_c the mean size of a row's cell, gives the weighted mean of n_c rows the unbiased variance
    s² / n_c (concentration 1, Rubin's, gives less, which matters in small cells).
    """
    generator, weights = torch.Generator().manual_seed(seed), []
    for _, cells, clusters in sets:
        size = torch.bincount(cells).double()[cells].mean()
        concentration = ((size - 2) / size).clamp(min=0.25).expand(num_bootstrap, int(clusters.max()) + 1).contiguous()
        weights.append(torch._standard_gamma(concentration, generator).clamp(min=1e-9)[:, clusters])
    return weights


def _percentiles(values: Tensor) -> tuple[float, float]:
    lo, hi = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return lo, hi
