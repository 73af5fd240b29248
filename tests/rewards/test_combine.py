"""Rewards made of rewards: components stay unweighted, sums and minima are what they say, guards hold."""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqareward import (
    AffineMap,
    ByTask,
    Cached,
    Calibrated,
    CDFMap,
    FidelityFloor,
    FullReference,
    LogisticMap,
    MicroBatched,
    NoReference,
    Overlapped,
    QualityGain,
    SoftMin,
    WeightedSum,
    check_reward,
    evaluate,
    load,
    load_map,
    save_map,
)
from iqareward.rewards import PairsInGroup, RankInGroup
from tests.tolerances import EXACT, OTHER_PACKAGE


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    return images.var(dim=(1, 2, 3))


def error(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


def bright(**options) -> NoReference:
    return NoReference(brightness, higher_is_better=True, bounds=(0.0, 1.0), **options)


def contrasty(**options) -> NoReference:
    return NoReference(contrast, higher_is_better=True, bounds=(0.0, 0.26), **options)


def faithful(**options) -> FullReference:
    return FullReference(error, higher_is_better=False, bounds=(-1.0, 0.0), name="fidelity", **options)


RNG = torch.Generator().manual_seed(0)
IMAGES = torch.rand(5, 3, 8, 8, generator=RNG) * torch.rand(5, 1, 1, 1, generator=RNG)
REFERENCES = (IMAGES * 0.9 + 0.05 * torch.rand(5, 3, 8, 8, generator=RNG)).clamp(0, 1)


def combinations(differentiable: bool) -> list:
    parts = {"differentiable": differentiable}
    return [
        WeightedSum([(0.7, bright(**parts)), (-2.0, contrasty(**parts)), (1.0, faithful(**parts))]),
        SoftMin([bright(**parts), contrasty(**parts)], temperature=0.05),
        FidelityFloor(bright(**parts), faithful(**parts), floor=-0.01),
        Calibrated(faithful(**parts), LogisticMap(-0.01, 0.005)),
        Calibrated(bright(**parts), AffineMap(0.0, 0.9)),
        Calibrated(bright(**parts), CDFMap((0.0, 0.2, 0.9), (0.0, 0.7, 1.0))),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("differentiable", [False, True])
def test_combinations_are_rewards(index: int, differentiable: bool) -> None:
    """Each combination keeps the whole contract of a reward, with and without a graph."""
    assert not check_reward(combinations(differentiable)[index], IMAGES, REFERENCES).failed


def test_evaluate_and_sum() -> None:
    """Components come unweighted by name, and the sum of them is the reward's own score."""
    reward = WeightedSum([(0.7, bright()), (-2.0, contrasty())])
    scores = evaluate(reward.parts, IMAGES)
    torch.testing.assert_close(scores["brightness"], brightness(IMAGES), **OTHER_PACKAGE)
    expected = 0.7 * brightness(IMAGES) - 2 * contrast(IMAGES)
    torch.testing.assert_close(reward(IMAGES), expected, **OTHER_PACKAGE)
    torch.testing.assert_close(reward.combine(scores), reward(IMAGES), **EXACT)
    assert reward.name == "0.7*brightness + -2*contrast"
    assert reward.bounds == (-0.52, 0.7)
    assert (reward.needs_references, combinations(False)[0].needs_references) == (False, True)


def test_names_must_differ() -> None:
    """Two components of one name would overwrite each other, so they are refused."""
    with pytest.raises(ValueError, match="unique names"):
        evaluate([bright(), bright()], IMAGES)
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum([])
    assert list(evaluate([bright(), bright(name="again")], IMAGES)) == ["brightness", "again"]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_weights_are_finite_in_float32(weight: float) -> None:
    """Any other weight would make every score NaN or infinite."""
    with pytest.raises(ValueError, match=r"WeightedSum expected weights that are finite in float32, got \[1\.0, "):
        WeightedSum([(1.0, bright()), (weight, bright(name="again"))])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(0.01, 10.0), st.integers(0, 2**31))
def test_soft_min_lies_between_minimum_and_mean(temperature: float, seed: int) -> None:
    """For any temperature the soft minimum is at least the minimum and at most the mean."""
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    parts = [bright(), contrasty(), NoReference(contrast, higher_is_better=False, name="flat")]
    rows = torch.stack(list(evaluate(parts, images).values()))
    soft = SoftMin(parts, temperature=temperature)(images)
    slack = 1e-5 * (1 + temperature)
    assert (soft >= rows.amin(0) - slack).all()
    assert (soft <= rows.mean(0) + slack).all()


def test_soft_min_limit() -> None:
    """A small temperature gives the plain minimum; a temperature must be positive."""
    rows = torch.stack([brightness(IMAGES), contrast(IMAGES)])
    torch.testing.assert_close(
        SoftMin([bright(), contrasty()], temperature=1e-5)(IMAGES), rows.amin(0), **OTHER_PACKAGE
    )
    with pytest.raises(ValueError, match="temperature"):
        SoftMin([bright()], temperature=0.0)


def test_fidelity_floor_is_lexicographic() -> None:
    """Every image above the floor beats every image below it; below, fidelity decides."""
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.2, 0.9, 1.0)])
    references = torch.tensor([0.1, 0.25, 0.5, 0.5])[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    reward = FidelityFloor(bright(), faithful(), floor=-0.01)
    scores = reward(images, references=references)
    torch.testing.assert_close(scores[:2], torch.tensor([0.1, 0.2]), **OTHER_PACKAGE)
    torch.testing.assert_close(scores[2:], torch.tensor([-0.15, -0.24]), **OTHER_PACKAGE)
    with pytest.raises(ValueError, match=r"low=\.\.\."):
        FidelityFloor(NoReference(contrast, higher_is_better=True), faithful(), floor=0.0)


def test_nan_of_a_part_is_nan_of_the_whole() -> None:
    """What one part could not score is not scored; no part is replaced by a guess."""
    images = IMAGES.clone()
    images[2, 0, 0, 0] = torch.nan
    for reward in combinations(False):
        assert reward(images, references=REFERENCES).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("score_map", [AffineMap(0.0, 1.0), LogisticMap(0.5, 0.1), CDFMap((0.0, 1.0), (0.0, 1.0))])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_score_is_not_calibrated(score_map, value):
    """An infinite reward becomes NaN like a missing one, not the best of all, and neither has a gradient."""
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)

    class Half:
        name, needs_references, needs_prompts, differentiable, bounds = "half", False, False, True, (None, None)

        def __call__(self, images, **_):
            return images.flatten(1).mean(1) + torch.tensor([value, 0.0])

    scores = Calibrated(Half(), score_map)(images)
    assert scores.isnan().tolist() == [True, False]
    scores[1].backward()
    assert images.grad.isfinite().all()
    assert images.grad[1].abs().sum() > 0


@pytest.mark.parametrize("kind", [AffineMap, LogisticMap, CDFMap])
def test_fitted_maps(kind, tmp_path) -> None:
    """A fitted map is monotone, stays in [0, 1], puts the median near 1/2, and survives a file exactly."""
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(1)).exp()
    scores[::100] = torch.nan
    score_map = kind.fit(scores)
    grid = torch.linspace(-5, 50, 500)
    mapped = score_map(grid)
    assert (mapped.diff() >= 0).all()
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    if kind is not AffineMap:  # an affine map keeps the skewness
        assert abs(float(score_map(scores.nanmedian())) - 0.5) < 0.01
    save_map(score_map, tmp_path / "map.json")
    assert load_map(tmp_path / "map.json") == score_map
    assert pickle.loads(pickle.dumps(score_map)) == score_map


def test_cdf_is_the_share_beaten() -> None:
    """The CDF map gives the rank in the frozen set; ties get the middle of their ranks."""
    score_map = CDFMap.fit(torch.arange(101.0), num_knots=101)
    torch.testing.assert_close(
        score_map(torch.tensor([-1.0, 0.0, 25.0, 50.5, 100.0, 200.0])),
        torch.tensor([0.0, 0.0, 0.25, 0.505, 1.0, 1.0]),
        **OTHER_PACKAGE,
    )
    tied = CDFMap.fit(torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0]), num_knots=5)
    assert tied.knots == (0.0, 1.0, 2.0)
    assert tied.levels == (0.0, 0.5, 1.0)


def test_maps_that_cannot_be() -> None:
    """Maps that are not increasing, constant frozen sets and foreign files are refused."""
    with pytest.raises(ValueError, match="low < high"):
        AffineMap(1.0, 1.0)
    with pytest.raises(ValueError, match="scale > 0"):
        LogisticMap(0.0, 0.0)
    with pytest.raises(ValueError, match="strictly increasing"):
        CDFMap((0.0, 0.0), (0.0, 1.0))
    for kind in (AffineMap, LogisticMap, CDFMap):
        with pytest.raises(ValueError, match="at least two different values"):
            kind.fit(torch.tensor([1.0, 1.0, torch.nan]))


NO_MAPS = {
    "empty": b"",
    "a list": b"[]",
    "another kind": b'{"map": "spline"}',
    "unknown key": b'{"map": "affine", "slope": 1}',
    "words": b'{"map": "affine", "low": "a", "high": "b"}',
    "endless": b'{"map": "affine", "low": 0, "high": Infinity}',
    "no center": b'{"map": "logistic", "center": NaN, "scale": 1}',
    "endless knot": b'{"map": "cdf", "knots": [0, Infinity], "levels": [0, 1]}',
    "high level": b'{"map": "cdf", "knots": [0, 1], "levels": [0, 2]}',
    "no text": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
}


def test_scores_at_the_ends_of_a_map_keep_their_gradient() -> None:
    """The end of a range belongs to it: a score there moves, one beyond does not."""
    for score_map in (AffineMap(0.0, 2.0), CDFMap((0.0, 2.0), (0.0, 1.0))):
        scores = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], requires_grad=True)
        score_map(scores).sum().backward()
        torch.testing.assert_close(scores.grad, torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0]), rtol=0, atol=0)


@pytest.mark.parametrize("content", NO_MAPS.values(), ids=NO_MAPS)
def test_files_that_are_no_maps(content: bytes, tmp_path) -> None:
    """A file that is no map, or one whose numbers would spoil every score, says so."""
    path = tmp_path / "map.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="save_map writes one"):
        load_map(path)


def test_names_are_refused_where_rewards_are_expected() -> None:
    """A combination or wrapper of names says how to load them."""
    names: Any = ["ssim", "haarpsi"]
    builds: list[Callable[[], Any]] = [
        lambda: SoftMin(names, temperature=0.1),
        lambda: Calibrated(names[0], AffineMap(0.0, 1.0)),
        *(partial(wrapper, names[0]) for wrapper in (MicroBatched, Cached, Overlapped)),
    ]
    for build in builds:
        with pytest.raises(TypeError, match=r"got the name 'ssim'. iqareward.load"):
            build()


@pytest.mark.parametrize("terms", [{"ssim": 1.0}, [(load("ssim"), 1.0)], [load("ssim")], load("ssim")])
def test_terms_are_pairs_with_the_weight_first(terms: Any) -> None:
    """A weighted sum of anything but (weight, reward) pairs says what it expected."""
    with pytest.raises(TypeError, match=r"expected `terms` as \(weight, reward\) pairs"):
        WeightedSum(terms)


def test_what_is_no_reward_and_no_map_is_refused_by_name(tmp_path) -> None:
    """When it is made, with what was expected, rather than when it scores."""
    for make in (
        lambda: SoftMin([None], temperature=0.1),
        lambda: WeightedSum([(1.0, brightness)]),
        lambda: FidelityFloor(None, faithful(), floor=0.0),
        lambda: Calibrated(None, AffineMap(0.0, 1.0)),
        lambda: evaluate([brightness], IMAGES),
    ):
        with pytest.raises(TypeError, match=r"expected rewards, got .*NoReference"):
            make()
    with pytest.raises(TypeError, match="SoftMin expected a list of rewards, got NoReference"):
        SoftMin(bright(), temperature=0.1)
    for wrong in (None, (10, 50), AffineMap):
        with pytest.raises(TypeError, match="Calibrated expected `score_map` as an AffineMap, LogisticMap or CDFMap"):
            Calibrated(bright(), wrong)
        with pytest.raises(TypeError, match="save_map expected an AffineMap"):
            save_map(wrong, tmp_path / "map.json")


@pytest.mark.parametrize("name", ["ssim", "psnr", "lpips", "fsim"])
def test_an_unknown_option_names_those_there_are(name: str) -> None:
    """In words, without Python's own message."""
    with pytest.raises(ValueError, match=rf"option that {name} does not have: foo\. It has .*batch_size"):
        load(f"{name}(foo=3)")


WRONG_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "temperature": lambda wrong: SoftMin([bright(), faithful()], temperature=wrong),
    "floor": lambda wrong: FidelityFloor(bright(), faithful(), floor=wrong),
    "gamma": lambda wrong: QualityGain(bright(), load("haarpsi"), gamma=wrong),
    "margin": lambda wrong: RankInGroup(bright(), margin=wrong),
    "batch_size": lambda wrong: PairsInGroup(brightness, batch_size=wrong),
    "low": lambda wrong: AffineMap(wrong, 1.0),
    "high": lambda wrong: AffineMap(0.0, wrong),
    "center": lambda wrong: LogisticMap(wrong, 1.0),
    "scale": lambda wrong: LogisticMap(0.0, wrong),
    "knots": lambda wrong: CDFMap((0.0, wrong), (0.0, 1.0)),
    "max_batch": lambda wrong: MicroBatched(bright(), wrong),
    "max_entries": lambda wrong: Cached(bright(), max_entries=wrong),
    "max_pending": lambda wrong: Overlapped(bright(), max_pending=wrong),
}


@pytest.mark.parametrize("wrong", ["a", None, torch.zeros(2)], ids=["text", "None", "two numbers"])
@pytest.mark.parametrize("option", WRONG_NUMBERS)
def test_what_is_no_number_is_refused_by_name(option: str, wrong: Any) -> None:
    """An option that must be a number says its name and what came, not how Python compares types."""
    with pytest.raises(TypeError, match=rf"^\w+ expected `{option}` as a number, got "):
        WRONG_NUMBERS[option](wrong)


@pytest.mark.parametrize(
    "option", ["temperature", "floor", "gamma", "margin", "low", "high", "center", "scale", "knots"]
)
def test_integers_that_no_float_holds_are_refused(option: str) -> None:
    """A whole number of 401 digits is a ValueError that names the option, not an OverflowError."""
    with pytest.raises(ValueError, match=rf"expected numbers that are finite in float64 as .*`{option}`"):
        WRONG_NUMBERS[option](10**400)
    with pytest.raises(ValueError, match="WeightedSum expected weights that are finite"):
        WeightedSum([(10**400, bright())])


def test_numbers_that_would_spoil_every_score_are_refused() -> None:
    """A combination whose scores would all be NaN is not built, nor a map from anything but a tensor."""
    with pytest.raises(ValueError, match="SoftMin expected a finite `temperature`"):
        SoftMin([bright(), faithful()], temperature=torch.inf)
    with pytest.raises(ValueError, match="FidelityFloor expected finite `floor` and `low`"):
        FidelityFloor(bright(), faithful(), floor=torch.nan)
    wrong: Any = [1.0, 2.0]
    with pytest.raises(TypeError, match=r"AffineMap\.fit expected `scores` as a tensor \[N\]"):
        AffineMap.fit(wrong)
    with pytest.raises(ValueError, match=r"CDFMap\.fit expected `num_knots` as an integer"):
        CDFMap.fit(torch.rand(5), num_knots=1)
    knots: Any = [0.0, 2.0]  # a list is as good as a tuple
    torch.testing.assert_close(CDFMap(knots, (0.0, 1.0))(torch.tensor([1.0])), torch.tensor([0.5]), rtol=0, atol=0)
    with pytest.raises(TypeError, match="ByTask expected a mapping of tasks to rewards, got None"):
        ByTask(None)  # pyright: ignore[reportArgumentType]
