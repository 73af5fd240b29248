"""Agreement with people: scipy's figures, pairs counted by hand, a bootstrap that is one, and the table of QualiSR."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from iqareward.agreement import agreement, pair_accuracy, pearson_after_logistic, spearman
from iqareward.rated import read_rated

NAN = math.nan


@pytest.fixture(scope="module")
def qualisr() -> tuple[dict[str, list[float]], list[float], list[str], list[str]]:
    """Scores with higher better, human scores, inputs and methods."""
    table = read_rated("qualisr")
    scores = {name: table.numbers(name, "score") for name in table.scores}
    scores |= {name: [-value for value in scores[name]] for name in table.lower_is_better}
    return scores, table.numbers("human", "human"), table.columns["input"], table.columns["method"]


def correlated(rng: np.random.Generator, size: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    human = rng.normal(size=size)
    return human + noise * rng.normal(size=size), human


@pytest.mark.parametrize("levels", [None, 5])
def test_spearman_is_that_of_scipy(levels: int | None) -> None:
    """With and without ties, from arrays, lists and tensors; not a number where a value is missing or none varies."""
    scores, human = correlated(np.random.default_rng(0), 200, 1.0)
    if levels:
        scores, human = (np.round(x * levels) for x in (scores, human))
    expected = scipy.stats.spearmanr(scores, human).statistic
    assert spearman(scores, human) == pytest.approx(expected, abs=1e-12)
    assert spearman(torch.from_numpy(scores), human.tolist()) == spearman(scores, human)
    assert math.isnan(spearman([1.0, NAN, 2.0], [1, 2, 3]))
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1, 2, 3]))
    with pytest.raises(ValueError, match=r"one length, got shapes \[2\] and \[3\]"):
        spearman([1, 2], [1, 2, 3])


def test_pearson_after_logistic_is_a_least_squares_fit() -> None:
    """It is what scipy's fit of the four-parameter curve gives, or better, and never below that of a straight line."""

    def curve(x: np.ndarray, low: float, high: float, middle: float, width: float) -> np.ndarray:
        return low + (high - low) / (1 + np.exp(-(x - middle) / width))

    rng = np.random.default_rng(1)
    scores = rng.uniform(0, 10, 300)
    human = curve(scores, 1, 5, 6, 0.8) + 0.4 * rng.normal(size=300)
    fitted, _ = scipy.optimize.curve_fit(curve, scores, human, [1, 5, 5, 1])
    expected = np.corrcoef(curve(scores, *fitted), human)[0, 1]
    found = pearson_after_logistic(scores, human)
    assert found == pytest.approx(expected, abs=2e-3)
    assert found > np.corrcoef(scores, human)[0, 1] + 0.02
    assert pearson_after_logistic(scores, scores) == pytest.approx(1, abs=1e-3)
    assert pearson_after_logistic(-scores, human) < 0.2  # the curve rises: a reversed metric gets no credit


def test_pairs_by_hand() -> None:
    """Only pairs of one group count; human ties and missing scores are left out and counted, score ties are halves."""
    groups = ["a", "b", "a", "a", "b", "c"]
    human = [3, 1, 2, 1, 1, 9]
    found = pair_accuracy([5, 1, 5, 7, 2, 0], human, groups)
    assert found == (0.5 / 3, 3, 1, 1, 0)  # a: a tie and two wrong; b: a human tie; c: alone
    found = pair_accuracy([5, 1, NAN, 4, 2, 0], human, groups)
    assert found == (1.0, 1, 0, 1, 2)
    assert math.isnan(pair_accuracy([1, 2], [1, 2], ["a", "b"]).accuracy)
    assert pair_accuracy([1, 2], [NAN, 2], ["a", "a"]).pairs == 0


def test_pairs_are_those_of_a_loop() -> None:
    """Groups of different sizes in any order give what a double loop counts."""
    rng = np.random.default_rng(2)
    groups, human = rng.integers(0, 9, 80), rng.integers(0, 5, 80).astype(float)
    scores = np.where(rng.random(80) < 0.1, NAN, rng.integers(0, 6, 80).astype(float))
    won, counted = 0.0, 0
    for i in range(80):
        for j in range(i):
            if groups[i] == groups[j] and human[i] != human[j] and np.isfinite(scores[[i, j]]).all():
                product = (scores[i] - scores[j]) * (human[i] - human[j])
                won, counted = won + (product > 0) + 0.5 * (product == 0), counted + 1
    found = pair_accuracy(scores, human, groups)
    assert (found.accuracy, found.pairs) == (pytest.approx(won / counted, abs=1e-12), counted)


def test_each_resample_is_the_figure_of_the_drawn_rows() -> None:
    """The interval of every figure is that of a plain loop which draws groups and copies their rows."""
    rng = np.random.default_rng(3)
    scores, human = correlated(rng, 60, 1.0)
    scores, groups = np.round(2 * scores), np.repeat(np.arange(20), 3)
    ours = agreement({"a": scores}, human, groups, resamples=1_500, seed=1).metrics[0]
    loop, pairs = [], []
    for _ in range(1_500):
        drawn = rng.integers(20, size=20)
        rows = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        loop.append(scipy.stats.spearmanr(scores[rows], human[rows]).statistic)
        copies = np.repeat(np.arange(20), 3)  # two draws of one group are two groups
        pairs.append(pair_accuracy(scores[rows], human[rows], copies).accuracy)
    for figure, values in ((ours.spearman, loop), (ours.pair_accuracy, pairs)):
        assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.03)


def test_interval_covers_the_truth() -> None:
    """Of 60 draws of a population with a known correlation, nearly all intervals hold it."""
    rng = np.random.default_rng(4)
    expected, held = 6 / math.pi * math.asin(math.sqrt(0.5) / 2), 0  # of two normal variables
    for seed in range(60):
        scores, human = correlated(rng, 150, 1.0)
        found = agreement({"a": scores}, human, range(150), resamples=300, seed=seed).metrics[0].spearman
        held += found.low <= expected <= found.high
    assert held >= 52


def test_differences_are_paired() -> None:
    """Two metrics with a common error have a difference that is known far better than either."""
    scores, human = correlated(np.random.default_rng(5), 300, 1.0)
    table = {"a": scores, "b": scores + 0.01 * human, "c": scores.copy()}
    found = {metric.name: metric for metric in agreement(table, human, np.arange(300) // 3, baseline="a").metrics}
    wide = found["b"].spearman.high - found["b"].spearman.low
    difference = found["b"].differences["spearman"]
    assert 0 < difference.high - difference.low < wide / 10
    assert difference.low > 0
    assert set(found["c"].differences.values()) == {(0.0, 0.0, 0.0)}
    assert found["a"].differences == {}


def test_missing_scores_are_counted_and_differences_use_common_rows() -> None:
    """Figures are over the rows that a metric has scored; its difference is over the rows that both have."""
    scores, human = correlated(np.random.default_rng(6), 90, 1.0)
    groups, half = np.repeat(np.arange(30), 3), np.arange(90) < 45
    human = np.where(np.arange(90) == 50, NAN, human)
    found = agreement({"all": scores, "half": np.where(half, scores, NAN)}, human, groups, baseline="all")
    metrics = {metric.name: metric for metric in found.metrics}
    assert (found.images, found.rated, found.groups) == (90, 89, 30)
    assert (metrics["all"].scored, metrics["half"].scored) == (89, 45)
    assert metrics["half"].pairs.unscored == metrics["all"].pairs.pairs - metrics["half"].pairs.pairs == 43
    assert metrics["half"].spearman.value == pytest.approx(spearman(scores[half], human[half]), abs=1e-12)
    assert metrics["half"].differences["spearman"].value == pytest.approx(0, abs=1e-12)


def test_seeds_and_bad_arguments() -> None:
    """One seed gives one result; what does not fit is named."""
    scores, human = correlated(np.random.default_rng(7), 30, 1.0)
    groups = np.arange(30) // 3
    first, again, other = (agreement({"a": scores}, human, groups, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="at least one metric"):
        agreement({}, human, range(30))
    with pytest.raises(ValueError, match="baseline 'b' is not among the metrics a"):
        agreement({"a": scores}, human, range(30), baseline="b")
    with pytest.raises(ValueError, match="a group for each of 30 images, got 3"):
        agreement({"a": scores}, human, range(3))
    with pytest.raises(ValueError, match="two human scores, got 0"):
        agreement({"a": [1.0]}, [NAN], [0])


def test_published_figures_of_qualisr(qualisr: tuple) -> None:
    """Spearman of every metric on the 120 images, to two decimals, as measured from the authors' tables."""
    scores, human, groups, _ = qualisr
    found = {metric.name: metric for metric in agreement(scores, human, groups).metrics}
    expected = {
        "qalign": 0.79, "musiq": 0.55, "unique": 0.48, "arniqa": 0.37, "ahiq": 0.26, "paq2piq": 0.21,
        "lpips_vgg": 0.15, "stlpips_vgg": 0.09, "pieapp": 0.01, "psnr": -0.00, "ssim": -0.06,
    }  # fmt: skip
    for name, value in expected.items():
        assert round(found[name].spearman.value, 2) == value
    for name, interval in {"qalign": (0.71, 0.85), "musiq": (0.42, 0.66), "lpips_vgg": (-0.03, 0.30)}.items():
        assert found[name].spearman[1:] == pytest.approx(interval, abs=0.015)  # another seed moves it by 0.01
    pairs = {"qalign": 0.87, "lpips_vgg": 0.57, "psnr": 0.32}
    assert {name: round(found[name].pair_accuracy.value, 2) for name in pairs} == pairs
    assert next(iter(found)) == "qalign"
    for name in set(expected) - {"qalign"}:
        assert found[name].differences["spearman"].high < 0


def test_within_one_method_of_qualisr(qualisr: tuple) -> None:
    """Q-Align keeps 0.70 to 0.75 within a method; the mean of each method alone orders 0.92 of the pairs."""
    scores, human, groups, methods = qualisr
    by_method = {method: [row for row, each in enumerate(methods) if each == method] for method in set(methods)}
    within = [
        round(spearman([scores["qalign"][row] for row in rows], [human[row] for row in rows]), 2)
        for rows in by_method.values()
    ]
    assert sorted(within) == [0.70, 0.73, 0.75]
    means = {method: np.mean([human[row] for row in rows]) for method, rows in by_method.items()}
    assert round(pair_accuracy([means[method] for method in methods], human, groups).accuracy, 2) == 0.92


def test_soft_minimum_with_a_distance_to_the_input_on_qualisr(qualisr: tuple) -> None:
    """Fidelity to the bicubic input and preference pull apart: with LPIPS to it, Q-Align falls from 0.79 to 0.38."""
    scores, human, *_ = qualisr
    parts = torch.tensor([scores["qalign"], scores["lpips_vgg_bicubic"]], dtype=torch.float64)
    low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
    softened = -0.1 * torch.logsumexp((parts - low) / (high - low) / -0.1, dim=0)
    assert round(spearman(softened, human), 2) == 0.38
