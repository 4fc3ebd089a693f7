"""The metrics against values worked out by hand, against scikit-learn and SciPy, and their invariants."""

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics
import torch

from ctrl import metrics


def normal(*shape, seed=0, mean=0.0, sd=1.0):
    return mean + sd * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REQUESTED = torch.tensor([0, 0, 0, 1, 1, 2])
MEASURED = torch.tensor([0, 0, 1, 1, 3, 2])


def test_labels_by_hand():
    assert metrics.accuracy(REQUESTED, MEASURED) == pytest.approx(4 / 6)
    # F1: label 0: 2*2/(3+2) = 0.8; label 1: 2*1/(2+2) = 0.5; label 2: 1; label 3 was never requested
    assert metrics.macro_f1(REQUESTED, MEASURED) == pytest.approx((0.8 + 0.5 + 1) / 3)
    expected = [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert metrics.confusion_matrix(REQUESTED, MEASURED, 4).tolist() == expected


def test_labels_like_sklearn():
    generator = torch.Generator().manual_seed(1)
    requested, measured = torch.randint(5, (2, 300), generator=generator)
    assert metrics.accuracy(requested, measured) == pytest.approx(sklearn.metrics.accuracy_score(requested, measured))
    assert metrics.macro_f1(requested, measured) == pytest.approx(sklearn.metrics.f1_score(requested, measured, average="macro"))
    assert (metrics.confusion_matrix(requested, measured, 5).numpy() == sklearn.metrics.confusion_matrix(requested, measured)).all()


def test_continuous_labels_like_sklearn():
    requested, measured = normal(200), normal(200, seed=1)
    assert metrics.mae(requested, measured) == pytest.approx(sklearn.metrics.mean_absolute_error(requested, measured))
    assert metrics.rmse(requested, measured) == pytest.approx(sklearn.metrics.mean_squared_error(requested, measured) ** 0.5)
    assert metrics.r2(requested, measured) == pytest.approx(sklearn.metrics.r2_score(requested, measured))
    assert metrics.r2(requested, requested) == 1
    assert metrics.r2(requested, requested.mean().expand(200)) == pytest.approx(0)


@pytest.mark.parametrize("wrong", [torch.tensor([0, 4]), torch.tensor([-1, 0])])
def test_confusion_matrix_refuses_labels_out_of_range(wrong):
    with pytest.raises(ValueError, match="0..3"):
        metrics.confusion_matrix(torch.tensor([0, 1]), wrong, 4)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        metrics.accuracy(torch.tensor([]), torch.tensor([]))
    with pytest.raises(ValueError, match="one length"):
        metrics.accuracy(torch.tensor([1, 2]), torch.tensor([1]))


def test_kid_by_hand():
    # D = 1: k(a, b) = (ab + 1)^3. x = {0, 1}, y = {1, 2}: xx: k(0,1) = 1; yy: k(1,2) = 27; xy: 1, 1, 8, 27, mean 37/4
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert metrics.kid(x, y) == pytest.approx(1 + 27 - 2 * 37 / 4)


def test_kid_with_cells_by_hand():
    # two cells of two; k as above. x = {0, 1 | 2, 3}, y = {1, 0 | 3, 2}: within cells xx = yy, between cells too, cross has i = j also
    x, y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[1.0], [0.0], [3.0], [2.0]])
    cells = torch.tensor([7, 7, 9, 9])
    first, second = 2 * 1 - 2 * (1 + 1 + 1 + 8) / 4, 2 * 343 - 2 * (125 + 343 + 343 + 1000) / 4
    assert metrics.kid(x, y, (cells, cells), within=True) == pytest.approx((first + second) / 2)
    assert metrics.kid(x, y, (cells, cells)) == pytest.approx((first + second) / 4)  # shares 1/2, squared; between cells x and y agree


def test_kid_of_one_cell_is_the_plain_one():
    x, y, one = normal(20, 3), normal(30, 3, seed=1), torch.zeros(30, dtype=torch.long)
    assert metrics.kid(x, y, (one[:20], one)) == pytest.approx(metrics.kid(x, y))
    assert metrics.kid(x, y, (one[:20], one), within=True) == pytest.approx(metrics.kid(x, y))


def test_kid_of_one_law_is_zero_in_mean_and_sometimes_negative():
    values = torch.tensor([metrics.kid(normal(60, 4, seed=2 * s), normal(60, 4, seed=2 * s + 1)) for s in range(200)])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert metrics.kid(normal(60, 4), normal(60, 4, seed=1, mean=1)) > values.max()


def mixture(seed, num_cells=6, size=12, shift=0.0):
    """Well separated cells with a fixed number of rows each."""
    cells = torch.arange(num_cells).repeat_interleave(size)
    centres = normal(num_cells, 4, seed=99)
    return centres[cells] + shift + normal(len(cells), 4, seed=seed, sd=0.5), cells


def test_kid_is_unbiased_for_fixed_cells():
    plain, celled, within = [], [], []
    for s in range(200):
        (x, cells), (y, _) = mixture(2 * s), mixture(2 * s + 1)
        plain.append(metrics.kid(x, y))
        celled.append(metrics.kid(x, y, (cells, cells)))
        within.append(metrics.kid(x, y, (cells, cells), within=True))
    for values, zero in ((plain, False), (celled, True), (within, True)):
        values = torch.tensor(values)
        assert bool(values.mean().abs() < 3 * values.std() / 200**0.5) == zero


def test_kid_weights_the_reference_to_the_mix_of_the_images():
    unequal = torch.cat([torch.arange(20), torch.arange(20, 120, 2)])
    weighted, plain = [], []
    for s in range(20):
        (x, cells), (y, _) = mixture(2 * s, size=20), mixture(2 * s + 1, size=20)
        weighted.append(metrics.kid(x, y[unequal], (cells, cells[unequal])))
        plain.append(metrics.kid(x, y[unequal]))
    assert abs(sum(weighted)) < abs(sum(plain)) / 5


def test_kid_within_cells_notices_exchanged_labels():
    (x, cells), (y, _) = mixture(0, size=20), mixture(1, size=20)
    exchanged = 5 - cells
    assert metrics.kid(x, y, (exchanged, cells)) == pytest.approx(metrics.kid(x, y, (cells, cells)), abs=0.05)
    assert metrics.kid(x, y, (exchanged, cells), within=True) > 50 * abs(metrics.kid(x, y, (cells, cells), within=True))


@pytest.mark.parametrize("within", [False, True])
def test_kid_interval_is_not_too_wide_where_the_laws_are_equal(within):
    pairs = [(mixture(2 * s)[0], mixture(2 * s + 1)[0]) for s in range(60)]
    cells = (mixture(0)[1], mixture(0)[1])
    spread = torch.tensor([metrics.kid(x, y, cells, within=within) for x, y in pairs]).std()
    bounds = torch.tensor([metrics.kid_interval(x, y, cells, within=within, num_bootstrap=100) for x, y in pairs[:20]])
    assert 0.75 < (bounds[:, 1] - bounds[:, 0]).mean() / (3.92 * spread) < 1.5


def shared_seeds(seed, num_labels=4, size=10):
    """What a method that ignores the label makes of the same seeds for every label: copies. Returns rows, cells, seeds."""
    x, seeds = normal(size, 4, seed=seed, sd=0.5), torch.arange(size).repeat(num_labels)
    return x[seeds], torch.arange(num_labels).repeat_interleave(size), seeds


def test_kid_is_unbiased_for_copies_of_one_cluster():
    plain, clustered = [], []
    for s in range(200):
        x, cells, seeds = shared_seeds(s)
        y = normal(40, 4, seed=1000 + s, sd=0.5)
        plain.append(metrics.kid(x, y, (cells, cells)))
        clustered.append(metrics.kid(x, y, (cells, cells), (seeds, torch.arange(40))))
    for values, zero in ((plain, False), (clustered, True)):
        values = torch.tensor(values)
        assert bool(values.mean().abs() < 3 * values.std() / 200**0.5) == zero


def test_kid_interval_covers_with_copies():
    def interval(s, clustered):
        x, cells, seeds = shared_seeds(s, num_labels=3, size=40)
        clusters = (seeds if clustered else torch.arange(120), torch.arange(120))
        return metrics.kid_interval(x + 0.5, normal(120, 4, seed=1000 + s, sd=0.5), (cells, cells), clusters, num_bootstrap=100)

    truth = metrics.kid(normal(4000, 4, sd=0.5) + 0.5, normal(4000, 4, seed=1, sd=0.5))
    assert coverage(truth, lambda s: interval(s, True)) >= 0.85
    assert coverage(truth, lambda s: interval(s, False)) < coverage(truth, lambda s: interval(s, True))


@pytest.mark.parametrize("within", [False, True])
def test_kid_leaves_out_cells_with_less_than_two_images(within):
    (x, cells), (y, _) = mixture(0), mixture(1)
    lonely = torch.cat([torch.arange(60), torch.tensor([60])])
    expected = metrics.kid(x[:60], y[:60], (cells[:60], cells[:60]), within=within)
    assert metrics.kid(x, y[lonely], (cells, cells[lonely]), within=within) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no cell"):
        metrics.kid(x, y, (cells, cells + 10))


def coverage(truth, interval, num_trials=100):
    bounds = torch.tensor([interval(s) for s in range(num_trials)])
    assert (bounds[:, 0] < bounds[:, 1]).all()
    return ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).double().mean().item()


def test_kid_interval_covers_the_true_distance():
    # population MMD² of N(0, v) and N(m, v) in one dimension from E k = 1 + 3 E[xy] + 3 E[x²]E[y²] + E[x³]E[y³]
    m, v = 0.3, 0.25
    a, b = [0, v, 0], [m, v + m**2, 3 * m * v + m**3]  # first three moments

    def mean_kernel(p, q):
        return 1 + 3 * p[0] * q[0] + 3 * p[1] * q[1] + p[2] * q[2]

    truth = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)

    def interval(s, mean):
        x, y = normal(100, 1, seed=2 * s, sd=0.5), normal(100, 1, seed=2 * s + 1, mean=mean, sd=0.5)
        return metrics.kid_interval(x, y, num_bootstrap=200)

    assert 0.88 <= coverage(truth, lambda s: interval(s, m)) <= 0.99
    assert 0.88 <= coverage(0, lambda s: interval(s, 0)) <= 1.0


@pytest.mark.parametrize("within", [False, True])
def test_kid_interval_covers_in_small_cells(within):
    large = [torch.cat([mixture(s, size=100, shift=0.3 * h)[0] for s in range(10 * h, 10 * h + 3)]) for h in (0, 1)]
    cells = torch.arange(6).repeat_interleave(100).repeat(3)
    truth = metrics.kid(large[0], large[1], (cells, cells), within=within)

    def interval(s):
        (x, c), (y, _) = mixture(1000 + 2 * s), mixture(1001 + 2 * s, shift=0.3)
        return metrics.kid_interval(x, y, (c, c), within=within, num_bootstrap=200)

    assert 0.86 <= coverage(truth, interval) <= 1.0


def test_kid_interval_lies_around_the_estimate_and_repeats():
    (x, cells), (y, _) = mixture(0), mixture(1, shift=0.5)
    lo, hi = metrics.kid_interval(x, y, (cells, cells), seed=3)
    assert lo < metrics.kid(x, y, (cells, cells)) < hi
    assert (lo, hi) == metrics.kid_interval(x, y, (cells, cells), seed=3)


def test_frechet_distance_by_hand_and_like_scipy():
    x, y = normal(500, 3), normal(400, 3, seed=1, mean=1, sd=2)
    a, b = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    squared = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = squared + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # one dimension: (mean difference)² + (sd difference)²
    u, v = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]])
    assert metrics.frechet_distance(u, v) == pytest.approx(5**2 + (2**0.5 - 18**0.5) ** 2)


def test_precision_and_recall_by_hand():
    # k = 1 in one dimension. Reference {0, 1, 10}: radii 1, 1, 9. Images {0.5, 1.5, 30}: radii 1, 1, 28.5
    x, reference = torch.tensor([[0.5], [1.5], [30.0]]), torch.tensor([[0.0], [1.0], [10.0]])
    assert metrics.in_manifold(x, reference, 1).tolist() == [True, True, False]
    assert metrics.precision_recall(x, reference, 1) == (pytest.approx(2 / 3), 1.0)


def test_precision_and_recall_tell_collapse_from_noise():
    law, collapsed, noisy = normal(300, 4), normal(300, 4, seed=1, sd=0.1), normal(300, 4, seed=2, sd=4)
    same = metrics.precision_recall(normal(300, 4, seed=3), law)
    assert min(same) > 0.8
    precision, recall = metrics.precision_recall(collapsed, law)
    assert precision > 0.95 and recall < 0.1
    assert metrics.precision_recall(noisy, law)[0] < 0.2
    with pytest.raises(ValueError, match="too few"):
        metrics.precision_recall(law, law[:5], 5)


def test_copies_are_no_neighbours():
    x = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    assert metrics.in_manifold(torch.tensor([[4.0]]), x, 1).tolist() == [False]
    assert metrics.in_manifold(torch.tensor([[4.0]]), x, 1, torch.tensor([0, 0, 1, 1])).tolist() == [True]


def test_diversity_by_hand():
    # cell 0: distances 1 against 2, two images; cell 1: three images 0, 1, 2, mean (1 + 1 + 2) / 3, against 4; cell 2 has one image
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [2.0], [50.0]])
    reference = torch.tensor([[0.0], [2.0], [3.0], [7.0], [0.0], [1.0]])
    cells_x, cells_reference = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    expected = (2 * 1 + 3 * 4 / 3) / (2 * 2 + 3 * 4)
    assert metrics.diversity(x, reference, (cells_x, cells_reference)) == pytest.approx(expected)
    assert metrics.diversity(reference, reference, (cells_reference, cells_reference)) == pytest.approx(1)


def test_diversity_scales_and_its_interval_covers():
    x, cells = mixture(0)
    assert metrics.diversity(3 * x, x, (cells, cells)) == pytest.approx(3)
    assert metrics.diversity(0 * x, x, (cells, cells)) == 0

    def interval(s):
        (x, c), (y, _) = mixture(2 * s, size=10), mixture(2 * s + 1, size=10)
        return metrics.diversity_interval(x, y, (c, c), num_bootstrap=200)

    assert 0.88 <= coverage(1.0, interval) <= 1.0


def test_ece_and_reliability_by_hand():
    # top probabilities 0.9, 0.7, 0.6, 0.55; right, wrong, right, wrong. Two bins: all in (0.5, 1]
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.45, 0.55]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0])
    assert metrics.ece(probabilities, labels, 2) == pytest.approx(abs(0.5 - 2.75 / 4))
    # ten bins: (0.5, 0.6] holds 0.6 and 0.55, one of two right; 0.7 wrong; 0.9 right
    assert metrics.ece(probabilities, labels, 10) == pytest.approx((abs(1 - 1.15) + 0.7 + 0.1) / 4)
    bins = metrics.reliability(probabilities, labels, 10)
    assert bins["count"].tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 1, 0]
    assert bins["accuracy"][5] == 0.5 and bins["accuracy"][0].isnan()
    assert bins["confidence"][5] == pytest.approx(0.575)


def test_ece_of_a_calibrated_law_is_small_and_of_a_bold_one_large():
    p = torch.softmax(2 * normal(20000, 4), dim=1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert metrics.ece(p, labels) < 0.02
    bold = torch.softmax(4 * p.log(), dim=1)
    assert metrics.ece(bold, labels) > 0.1
    assert metrics.nll(bold.log(), labels) > metrics.nll(p.log(), labels)
    assert metrics.nll(p.log(), labels) == pytest.approx(sklearn.metrics.log_loss(labels, p))


def test_bootstrap_covers_and_repeats():
    def interval(s):
        values = normal(50, seed=s)
        return metrics.bootstrap(lambda i: values[i].mean().item(), 50, 200, seed=s)

    assert 0.88 <= coverage(0.0, interval) <= 0.99
    assert interval(0) == interval(0)


def test_bootstrap_keeps_the_size_of_every_group():
    groups = torch.tensor([0] * 10 + [1] * 30)
    seen = []
    lo, hi = metrics.bootstrap(lambda i: seen.append(groups[i].sum().item()) or 30.0, 40, 20, 0, groups)
    assert set(seen) == {30} and (lo, hi) == (30, 30)


def test_bootstrap_draws_clusters_together():
    clusters = torch.arange(20).repeat(3)  # three copies of 20 values carry as much as the 20
    values = normal(20)[clusters]

    def width(bounds):
        return bounds[1] - bounds[0]

    narrow = width(metrics.bootstrap(lambda i: values[i].mean().item(), 60, 500))
    wide = width(metrics.bootstrap(lambda i: values[i].mean().item(), 60, 500, clusters=clusters))
    right = width(metrics.bootstrap(lambda i: values[i].mean().item(), 20, 500))
    assert wide == pytest.approx(right, rel=0.1) and wide > 1.5 * narrow
