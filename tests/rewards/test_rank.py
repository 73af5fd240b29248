"""Win rates within the rollouts of an input: by the scores of a reward, and by a judge that compares two images."""

import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iqareward
from iqareward import Cached, Calibrated, LogisticMap, MicroBatched, NoReference, Overlapped, QualityGain, WeightedSum
from iqareward.advantages import rank_advantages, win_rates
from iqareward.rewards import PairsInGroup, RankInGroup, UnscoredWarning
from iqareward.serving.wire import RemoteFacts
from tests.gpu import on_devices
from tests.rewards.counting import Brightness, flat
from tests.tolerances import EXACT

NAN = torch.nan


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


REWARD = NoReference(brightness, higher_is_better=True, bounds=(0.0, 1.0))


def counted(scores: list[float], ids: list[int], margin: float) -> list[float]:
    """Win rates by the definition."""
    found = []
    for row, score in enumerate(scores):
        others = [other for place, other in enumerate(scores) if place != row and ids[place] == ids[row]]
        others = [other for other in others if other == other]
        points = [0.5 if abs(score - other) <= margin else float(score > other) for other in others]
        found.append(sum(points) / len(points) if points and score == score else NAN)
    return found


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.tuples(st.one_of(st.just(NAN), st.integers(-4, 4)), st.integers(-2, 2)), max_size=16),
    margin=st.sampled_from([0.0, 0.25, 0.5, 3.0]),
)
def test_win_rates_are_counted(rows: list[tuple[float, int]], margin: float) -> None:
    """Against a count by hand, with ties, margins, missing scores and groups in any order. Ranks are 2 * rate - 1."""
    scores, ids = [score / 4 for score, _ in rows], [one for _, one in rows]
    tensor, groups = torch.tensor(scores), torch.tensor(ids, dtype=torch.int64)
    rates = win_rates(tensor, groups, margin=margin)
    torch.testing.assert_close(rates, torch.tensor(counted(scores, ids, margin)), equal_nan=True)
    ranks, has_signal = rank_advantages(tensor, groups)
    torch.testing.assert_close(ranks[has_signal], 2 * win_rates(tensor, groups)[has_signal] - 1)


@on_devices
def test_images_are_ranked_within_their_input(device: str) -> None:
    """Two inputs side by side, one with a broken image, and an input with a single image."""
    images = flat(0.1, 0.9, 0.5, 0.2, 0.8, 0.4).to(device)
    images[4, 0, 0, 0] = NAN
    ranks = RankInGroup(REWARD)(images, ids=[1, 2, 1, 1, 2, 3])
    expected = torch.tensor([0.0, NAN, 1.0, 0.5, NAN, NAN], device=device)
    torch.testing.assert_close(ranks, expected, equal_nan=True, **EXACT)


def test_a_spread_within_the_margin_is_a_tie() -> None:
    """Noise gets 0.5 for all, whereas a larger difference counts."""
    images = flat(0.50, 0.51, 0.505, 0.7)
    assert RankInGroup(REWARD, margin=0.05)(images[:3], ids=[0, 0, 0]).tolist() == [0.5, 0.5, 0.5]
    torch.testing.assert_close(
        RankInGroup(REWARD, margin=0.05)(images, ids=[0] * 4), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    )


def test_monotone_maps_change_nothing() -> None:
    """Whatever the scale of the reward, the ranks are the same."""
    images = flat(*torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist())
    ids = [0, 1, 2] * 4
    expected = RankInGroup(REWARD)(images, ids=ids)
    for other in (Calibrated(REWARD, LogisticMap(0.9, 0.05)), WeightedSum([(1000.0, REWARD)])):
        torch.testing.assert_close(RankInGroup(other)(images, ids=ids), expected, **EXACT)


def prefer_brighter(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Sure of every difference, and of the first of two equal ones; a dark image gets no answer."""
    pairs = [(float(a.mean()), float(b.mean())) for a, b in zip(first, second, strict=True)]
    return torch.tensor([NAN if min(a, b) < 0.05 else float(a >= b) for a, b in pairs])


@pytest.mark.parametrize(
    "reward",
    [
        RankInGroup(REWARD),
        RankInGroup(iqareward.load("psnr"), margin=0.1),
        RankInGroup(iqareward.load("piqe")),
        Overlapped(RankInGroup(REWARD)),
        WeightedSum([(0.5, RankInGroup(REWARD)), (0.5, RankInGroup(iqareward.load("psnr")))]),
        PairsInGroup(prefer_brighter),
        PairsInGroup(prefer_brighter, pairs_per_image=2, batch_size=3),
    ],
    ids=lambda reward: f"{type(reward).__name__} {reward.name}",
)
def test_the_contract_of_a_group_is_kept(reward, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """`check_reward` tests what holds for rewards that compare: order, other groups, broken images."""
    report = iqareward.check_reward(reward, degraded_photographs, photographs)
    assert "refuses a call that lacks a column it needs" in report.passed


def test_the_check_finds_a_reward_that_mixes_groups() -> None:
    """Ranks over the whole batch, as a missing id column would give them."""

    class Mixed(Brightness):
        needs_ids = True

        def __call__(self, images, references=None, *, ids=None, **ignored):
            if ids is None:
                raise ValueError("expected ids")
            return win_rates(REWARD(images), [0] * len(images))

    with pytest.raises(iqareward.testing.RewardContractError, match="when another group is in the batch"):
        iqareward.check_reward(Mixed(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_worse_images_rank_lower(photographs: Tensor, degraded_photographs: Tensor) -> None:
    """The check compares each image with its own degraded version."""
    reward = RankInGroup(iqareward.load("piqe"))
    report = iqareward.check_reward(reward, photographs, degraded=degraded_photographs)
    assert "scores degraded images lower" in report.passed


@pytest.mark.parametrize("wrapper", [Cached, MicroBatched, lambda r: QualityGain(r, iqareward.load("haarpsi[0, 1]"))])
@pytest.mark.parametrize("inside", [RankInGroup(REWARD), WeightedSum([(1.0, RankInGroup(REWARD))])])
def test_what_splits_or_merges_calls_refuses_it(wrapper, inside) -> None:
    """When it is built, with what to do instead; inside the comparison it works."""
    with pytest.raises(ValueError, match="inside"):
        wrapper(inside)
    ranks = RankInGroup(MicroBatched(Cached(REWARD), max_batch=2))(flat(0.1, 0.9, 0.5), ids=[0, 0, 0])
    assert ranks.tolist() == [0.0, 1.0, 0.5]


def test_a_server_refuses_what_requests_cannot_hold() -> None:
    """Ids and tasks, by name."""
    with pytest.raises(ValueError, match=r"'ids'.*RemoteReward"):
        RemoteFacts.of(RankInGroup(REWARD))
    with pytest.raises(ValueError, match="'tasks'"):
        RemoteFacts.of(iqareward.ByTask({"blur": REWARD}))


def test_held_out_images_are_no_group() -> None:
    """The monitor compares inputs with themselves before RL."""
    for options in ({"held_out": {"rank": RankInGroup(REWARD)}}, {"held_out": ["piqe"], "reward": RankInGroup(REWARD)}):
        with pytest.raises(ValueError, match="HackingMonitor expected a reward that scores each image on its own"):
            iqareward.HackingMonitor(**options)


def test_wrong_uses_are_refused() -> None:
    """Gradients, margins, ids that are missing, too many or no integers, and a batch without anything to compare."""
    with pytest.raises(ValueError, match="differentiable"):
        RankInGroup(iqareward.load("ssim", differentiable=True))
    for margin in (-0.1, NAN, torch.inf):
        with pytest.raises(ValueError, match="margin"):
            RankInGroup(REWARD, margin=margin)
    reward = RankInGroup(REWARD)
    with pytest.raises(ValueError, match="`ids`, one integer per image"):
        reward(flat(0.1, 0.2))
    with pytest.raises(ValueError, match=r"rank\(brightness\) expected one id per image \(2\), got 3"):
        reward(flat(0.1, 0.2), ids=[1, 1, 1])
    with pytest.raises(ValueError, match="integers"):
        reward(flat(0.1, 0.2), ids=[0.5, 0.5])
    with pytest.warns(UnscoredWarning, match="no image has another scored image with the same id"):
        assert reward(flat(0.1, 0.2), ids=[1, 2]).isnan().all()


class Labelled(dict):
    """Rows by label, as in a column of pandas."""


@pytest.mark.parametrize(
    "column",
    [torch.tensor(3), 3, "ab", (each for each in (1, 1)), Labelled({7: 1, 9: 1})],
    ids=lambda column: str(type(column)),
)
@pytest.mark.parametrize("name", ["ids", "tasks", "prompts"])
def test_columns_are_lists(name: str, column: object) -> None:
    """One number, one text, and rows by label are named, not indexed or measured."""
    reward = RankInGroup(iqareward.ByTask({"a": REWARD}))
    columns = {"ids": [1, 1], "tasks": ["a", "a"], name: column}
    with pytest.raises(TypeError, match=f"expected `{name}` as a list with one "):
        reward(flat(0.1, 0.2), **columns)


@pytest.mark.parametrize("ids", [["a", "a"], [None, 1], [2**70, 1]])
def test_ids_that_are_no_integers_are_named(ids: list[object]) -> None:
    """Texts, gaps, and integers that 64 bits do not hold."""
    with pytest.raises(TypeError, match=r"rank\(brightness\) expected integers \[B\] as ids"):
        RankInGroup(REWARD)(flat(0.1, 0.2), ids=ids)


class Judge:
    """Compares brightness, counts its calls, and may prefer the first picture."""

    def __init__(self, bias: float = 0.0) -> None:
        self.bias, self.sizes, self.pairs, self.is_offloaded = bias, [], [], False

    def compare(self, first, second, *, references=None, prompts=None) -> Tensor:
        self.sizes.append(len(first))
        self.pairs += [(round(float(a.mean()), 2), round(float(b.mean()), 2)) for a, b in zip(first, second)]
        if references is not None:
            assert [float(reference.mean()) for reference in references] == [0.5] * len(first)
            assert prompts == ["which is better?"] * len(first)
        better = torch.stack([a.mean() - b.mean() for a, b in zip(first, second)])
        return torch.sigmoid(50 * better + self.bias)

    def offload(self) -> None:
        self.is_offloaded = True


def test_each_pair_of_a_group_is_asked_for() -> None:
    """In both orders, in batches of at most so many over all groups, with images of two sizes."""
    judge = Judge()
    images = [*flat(0.1, 0.9, 0.5, 0.3, side=8), *flat(0.2, 0.6, side=6), *flat(0.7)]
    reward = PairsInGroup(judge.compare, batch_size=4, name="judge")
    scores = reward(images, ids=[0, 0, 0, 0, 5, 5, 9])
    expected = torch.tensor([0.0, 1.0, 2 / 3, 1 / 3, 0.0, 1.0, NAN])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-3, equal_nan=True)
    assert judge.sizes == [4, 3, 4, 3]
    assert len({frozenset(pair) for pair in judge.pairs}) == 7
    assert set(judge.pairs) == {pair[::-1] for pair in judge.pairs}


def test_the_order_of_a_pair_cancels() -> None:
    """A judge with a preference for the first picture ranks as one without it."""
    images, ids = flat(0.50, 0.51, 0.52, 0.49), [0] * 4
    for bias in (-1.0, 1.5):
        scores = PairsInGroup(Judge(bias).compare, name="judge")(images, ids=ids)
        order = scores.argsort().tolist()
        assert order == [3, 0, 1, 2]
        torch.testing.assert_close(scores.mean(), torch.tensor(0.5))
    alone = PairsInGroup(Judge(3.0).compare, swap=False, name="judge")(images[:2], ids=[0, 0])
    assert alone[0] > 0.9


@pytest.mark.parametrize(("group_size", "pairs_per_image"), [(8, 2), (8, 4), (5, 2), (4, 4), (3, 8), (6, 4), (2, 2)])
def test_a_ring_bounds_the_cost(group_size: int, pairs_per_image: int) -> None:
    """Each image meets the same number of others, each pair once per order."""
    judge = Judge()
    values = [round(0.1 + 0.1 * row, 2) for row in range(group_size)]
    reward = PairsInGroup(judge.compare, pairs_per_image=pairs_per_image, swap=False, name="judge")
    reward(flat(*values), ids=[0] * group_size)
    met = {value: [set(pair) for pair in judge.pairs if value in pair] for value in values}
    each = min(pairs_per_image, group_size - 1)
    assert all(len(pairs) == each == len({frozenset(pair) for pair in pairs}) for pairs in met.values())


def test_missing_answers_are_left_out() -> None:
    """Of images that cannot be scored, pairs without an answer, and answers that are no probability."""
    images = flat(0.1, 0.9, 0.5, 0.3)
    images[1, 0, 0, 0] = torch.inf
    scores = PairsInGroup(prefer_brighter)(images, ids=[0] * 4)
    torch.testing.assert_close(scores, torch.tensor([0.0, NAN, 1.0, 0.5]), equal_nan=True, **EXACT)
    scores = PairsInGroup(prefer_brighter)(flat(0.01, 0.9, 0.5), ids=[0] * 3)
    torch.testing.assert_close(scores, torch.tensor([NAN, 1.0, 0.0]), equal_nan=True, **EXACT)
    reward = PairsInGroup(lambda a, b: torch.full((len(a),), 7.0), name="seven")
    with pytest.warns(UnscoredWarning, match="no probability"):
        assert reward(images[2:], ids=[0, 0]).isnan().all()


def test_columns_and_moves_reach_the_judge() -> None:
    """References and prompts of each pair; `offload` of the object whose method it is."""
    judge = Judge()
    reward = PairsInGroup(judge.compare, columns=["references", "prompts"], name="judge")
    assert reward.needs_references
    with pytest.raises(ValueError, match="references"):
        reward(flat(0.1, 0.2), ids=[0, 0])
    reward(flat(0.1, 0.2), flat(0.5, 0.5), prompts=["which is better?"] * 2, ids=[0, 0])
    reward.offload()
    assert judge.is_offloaded
    copy = pickle.loads(pickle.dumps(PairsInGroup(prefer_brighter)))
    assert copy(flat(0.1, 0.2), ids=[0, 0]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [{"pairs_per_image": 3}, {"pairs_per_image": 0}, {"batch_size": 0}, {"max_bytes": 0}, {"columns": ["ids"]}],
)
def test_wrong_options_are_named(options) -> None:
    """And a judge without a name, or one that does not answer for every pair."""
    with pytest.raises(ValueError, match=next(iter(options))):
        PairsInGroup(prefer_brighter, **options)
    with pytest.raises(ValueError, match="name"):
        PairsInGroup(partial(prefer_brighter))
    with pytest.raises(TypeError, match=r"a function compare\(first, second\)"):
        PairsInGroup(Judge())
    with pytest.raises(ValueError, match=r"one probability per pair, shape \[1\], got \[\]"):
        PairsInGroup(lambda a, b: torch.tensor(0.5), name="one")(flat(0.1, 0.2), ids=[0, 0])
