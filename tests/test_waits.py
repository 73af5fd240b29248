"""A warm call neither waits for the device nor sends constants there, in bounded memory: metered without a GPU."""

import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import iqareward
from benchmarks.meter import Meter
from iqareward import AdaptiveWeighter, DifficultyMemory, LossWeights, RewardMemory, advantages, difficulty, weighting
from iqareward import schedules as weightings
from iqareward.diffusion import (
    Batch,
    ClippedPolicyGradient,
    DiffusionNFT,
    DirectRewardGradient,
    Noise,
    RolloutConfig,
    SyntheticPairs,
    TrainConfig,
)
from iqareward.functional import gmsd
from iqareward.functional.statistics import STATISTICS
from iqareward.images import drop_broken_gradients
from iqareward.rewards import RankInGroup
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.metric import FullReference
from iqareward.rewards.owl2.preprocess import preprocess
from tests.diffusion import tiny
from tests.diffusion.train_tiny import trainer
from tests.gpu import fake_gpu
from tests.test_devices import FOREIGN, FORMULAS, NO_GRADIENT, OTHERS, VLMS, build

__all__ = ["build"]  # the fixture

pytestmark = [
    fake_gpu,
    # fake scores are what the meter says they are
    pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning"),
]
# Largest memory of a score and of its gradient, in bytes per pixel of a batch; a pixel of an image and its reference
# are 24 themselves. Of networks it is the size of the maps, so that tiny ones say nothing.
PEAKS = {
    "lpips": (160, 190),
    "lpips_vgg": (1800, 3000),
    "stlpips": (1300, 2600),
    "cvvdp": (300, 720),
    "dists": (2300, 3600),
    "quick": (270, 1100),
}
FORMULA_PEAKS = (95, 110)


def places(meter: Meter) -> list[str]:
    return [*map(str, meter.waits + meter.host_constants)]


def scored(meter: Meter, reward: Any, name: str, *, grad: bool = False, mixed: bool = False) -> int:
    """Meter a warm call; gives the number of pixels."""
    side = 168 if name in FORMULAS else 64
    shape = 2, 3, side, side
    images, references = (torch.rand(shape, device="cuda") for _ in range(2))
    batch = [torch.cat([images[0], images[0]], -1), *images] if mixed else images.requires_grad_(grad)
    truth = [torch.cat([references[0], references[0]], -1), *references] if mixed else references

    def call() -> None:
        scores = reward(batch, references=truth, prompts=["the cat"] * len(batch))
        if grad:
            torch.autograd.grad(scores.sum(), images)

    meter.second(call)
    return shape[0] * side * side


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        *((name, False) for name in (*FORMULAS, *OTHERS)),  # scores of the others: tests/vlm/test_rating.py
        *((name, True) for name in (*FORMULAS, *OTHERS, *VLMS)),
    ],
)
def test_rewards(name, grad, build):
    """Every reward of the catalogue and every wrapper; piq's code may wait in lines of its own."""
    if grad and name in NO_GRADIENT:
        pytest.skip("has no gradient")
    with Meter(read=1.0, selected=8) as meter:
        reward = build(name, "cuda", **({"differentiable": True} if grad else {}))
        pixels = scored(meter, reward, name, grad=grad)
    found = places(meter)
    if name in FOREIGN:
        assert all("piq/" in place for place in found)
        return
    assert found == []
    if name in (*FORMULAS, *PEAKS):
        assert meter.peak_bytes < PEAKS.get(name, FORMULA_PEAKS)[grad] * pixels


@pytest.mark.parametrize("name", ["psnr", "ssim", "niqe", "lpips", "qalign", "hpsv2"])
def test_mixed_sizes(name, build):
    """Lists of images of several sizes are put into batches and back without an index on the host."""
    with Meter(read=1.0) as meter:
        scored(meter, build(name, "cuda"), name, mixed=True)
    assert places(meter) == []


def test_every_reward_is_metered(build):
    """A reward of the catalogue, or a public class of rewards, that no name above builds would go unmetered."""
    metered: set[type] = set()
    for name in [*FORMULAS, *OTHERS, *VLMS]:
        queue = [build(name)]
        while queue:
            reward = queue.pop()
            metered.update(type(reward).__mro__)
            queue += [getattr(reward, part) for part in ("reward", "fidelity") if hasattr(reward, part)]
            queue += getattr(reward, "rewards", ())
    classes = {type(iqareward.load(name)) for name in CATALOG}
    presets = {iqareward.QReAlignReward, iqareward.QInsightReward, iqareward.VisualQualityR1Reward}  # of a class above
    assert {kind.__name__ for kind in classes - metered - presets} == set()


class Rows(NamedTuple):
    """What losses and weightings are given."""

    images: Tensor
    scores: Tensor
    groups: Tensor
    has_signal: Tensor
    weights: LossWeights


def rows() -> Rows:
    scores = torch.rand(8, device="cuda")
    weights = LossWeights(torch.rand(8, device="cuda"), torch.rand(8, device="cuda"))
    return Rows(
        torch.rand(8, 3, 40, 64, device="cuda"), scores, torch.arange(8, device="cuda") // 2, scores > 0.5, weights
    )


def weighter(make: Callable[[], Any]) -> Callable[[Rows], Callable[[], object]]:
    """Weights of a batch, the loss that they mix, and an update with what was seen."""

    def begin(x: Rows) -> Callable[[], object]:
        one = make()
        if hasattr(one, "calibrate"):
            one.calibrate(torch.rand(8) + 0.1)

        def call() -> None:
            weights = one(**{one.signal: x.scores}, has_signal=x.has_signal, valid=~x.has_signal)
            weighting.mixed_loss(x.scores, x.scores, weights, x.scores, beta=0.1)
            one.update(**{one.signal: x.scores})

        return call

    return begin


def memory(make: Callable[[], Any]) -> Callable[[Rows], Callable[[], object]]:
    """What an input was worth before."""

    def begin(x: Rows) -> Callable[[], object]:
        one = make()

        def call() -> None:
            one.update(x.scores, x.groups)
            one.recall(x.groups) if hasattr(one, "recall") else one.advantages(x.scores, x.groups)

        return call

    return begin


def pure(function: Callable[[Rows], object]) -> Callable[[Rows], Callable[[], object]]:
    return lambda x: lambda: function(x)


def balance(x: Rows) -> Callable[[], object]:
    one, parameter = weighting.GradientBalance(), x.scores.clone().requires_grad_()
    two = [(parameter * x.scores).sum(), parameter.square().sum()]

    def call() -> object:
        norms = [weighting.gradient_norm(loss, [parameter]) for loss in two]
        one.update(rl_norm=norms[0], sft_norm=norms[1])
        return one.sft_scale

    return call


def broken_gradients(x: Rows) -> object:
    images = x.images.clone().requires_grad_()
    return torch.autograd.grad(drop_broken_gradients(images).sqrt().sum(), images)


FORMULA_OPTIONS = {
    "constant": {"share": 0.5},
    "cosine": {"peak": 0.9, "valley": 0.1, "warmup_steps": 1, "decay_steps": 9},
}
SCHEDULES = [
    name
    for name in weightings.__all__
    if name.islower() and {"difficulty", "pass_rate"} & {*inspect.signature(getattr(weightings, name)).parameters}
]


def schedule(name: str) -> Callable[[], weightings.Schedule]:
    return partial(weightings.Schedule, partial(getattr(weightings, name), **FORMULA_OPTIONS.get(name, {})))


def combined(order: str, x: Rows) -> object:
    two = torch.stack([x.scores] * 2, 1)
    return advantages.combine_advantages(two, x.groups, weights=[0.5, 0.5], order=order)


def grouped(scale: str, x: Rows) -> object:
    return advantages.group_advantages(x.scores, x.groups, scale=scale)


RANK = RankInGroup(FullReference(lambda a, b: (a - b).mean((1, 2, 3)), name="difference", higher_is_better=False))


def of_images(statistic: Callable[[Tensor], Tensor], x: Rows) -> object:
    return statistic(x.images)


def of_scores(score_map: Callable[[Tensor], Tensor], x: Rows) -> object:
    return score_map(x.scores)


CALLS: dict[str, Callable[[Rows], Callable[[], object]]] = {
    **{name: weighter(schedule(name)) for name in SCHEDULES},
    "AdaptiveWeighter": weighter(AdaptiveWeighter),
    "RewardMemory": memory(partial(RewardMemory, 8)),
    "DifficultyMemory": memory(partial(DifficultyMemory, 8, half_life=4)),
    **{f"group_advantages {scale}": pure(partial(grouped, scale)) for scale in ("group", "batch", "none")},
    "rank_advantages": pure(lambda x: advantages.rank_advantages(x.scores, x.groups)),
    "RankInGroup": pure(lambda x: RANK(x.images, x.images, ids=x.groups)),
    "RankInGroup of a list of ids": pure(lambda x: RANK(x.images, x.images, ids=[0, 0, 0, 1, 1, 2, 2, 1])),
    **{order: pure(partial(combined, order)) for order in ("normalize_then_sum", "sum_then_normalize")},
    "weighted_advantages": pure(lambda x: weighting.weighted_advantages(x.scores, x.weights)),
    "mixed_advantages": pure(lambda x: weighting.mixed_advantages(x.scores, x.scores, x.weights)),
    "optimality_probability": pure(lambda x: weighting.optimality_probability(x.scores, x.weights)),
    "drop_broken_gradients": pure(broken_gradients),
    "GradientBalance": balance,
    "reference_distance": pure(lambda x: difficulty.reference_distance(x.images, x.images, groups=x.groups)),
    "pass_rate": pure(lambda x: difficulty.pass_rate(x.scores, x.groups, threshold=0.5)),
    "blind_difficulty": pure(lambda x: difficulty.blind_difficulty(x.scores, best=1.0)),
    **{name: pure(partial(of_images, statistic)) for name, statistic in STATISTICS.items()},
    "preprocess": pure(lambda x: preprocess(x.images, 28)),
    "AffineMap": pure(partial(of_scores, iqareward.AffineMap(0.2, 0.8))),
    "LogisticMap": pure(partial(of_scores, iqareward.LogisticMap(0.5, 0.1))),
    "CDFMap": pure(partial(of_scores, iqareward.CDFMap((0.0, 0.5, 1.0), (0.0, 0.2, 1.0)))),
}


@pytest.mark.parametrize("name", CALLS)
def test_losses_weightings_and_statistics(name):
    """Constants and state are on the device from the first call on."""
    with Meter(read=1.0) as meter:
        meter.second(CALLS[name](rows()))
    assert places(meter) == []


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_policies(kind):
    """A denoising step, and the noising and its inverse, with a prompt that was encoded on the CPU."""
    with Meter() as meter:
        policy = tiny.policy_of(kind).to("cuda")
        batch = Batch((3, 8), torch.rand(2, 3, tiny.SIZE, tiny.SIZE, device="cuda"))
        noise = Noise(batch.ids, device="cuda")

        def step() -> None:
            condition = policy.condition(batch, noise)
            steps = policy.schedule(condition, 4)
            transition = policy.step(policy.start(condition, noise), steps[1], condition, eta=tiny.ETA[kind])
            transition.log_prob(transition.mean)
            clean = policy.encode(policy.decode(transition.clean, condition), condition)
            noisy, times, _ = policy.noised(clean, condition, noise)
            policy.process.clean(policy.predict(noisy, times, condition), noisy, times)

        meter.second(step)
    assert places(meter) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:update 1:RuntimeWarning", "ignore:update 2:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("pixel", ClippedPolicyGradient), ("flow", DiffusionNFT), ("flow-cps", DirectRewardGradient)],
)
def test_updates(kind, objective, tmp_path, monkeypatch):
    """In one part or in two, it waits where it must: for pixels of the host, and for what it logs and decides by."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "device", torch.device("cuda", 0))
    reward = FullReference(gmsd, higher_is_better=False, differentiable=objective is DirectRewardGradient)
    inputs, at_once = (4, 2) if kind == "pixel" else (2, 4)  # the other networks take seconds for each part
    with Meter(read=1.0) as meter:
        run = trainer(
            tmp_path,
            policy=tiny.policy_of(kind),
            pairs=SyntheticPairs(16, size=tiny.SIZE),  # with values that no other test is to see
            reward=reward,
            objective=objective(reward) if objective is DirectRewardGradient else objective(),
            validation=None,
            accelerator=Accelerator(cpu=True),
            rollout_config=RolloutConfig(group_size=2, num_steps=2, inputs_at_once=at_once),
            train_config=TrainConfig(inputs_per_update=inputs, rows_at_once=at_once, balance_every=2, ema_decay=0.9),
        )
        run.weighter.calibrate(torch.rand(8) + 0.1)
        meter.second(run.update)
    waits = Counter(wait.line.split("/")[-1].split(":")[0] for wait in meter.waits)
    assert waits == {"batches.py": 3, "updates.py": 1, "finite.py": 1, "trainer.py": 1}
    assert meter.host_constants == []
