"""Rewards that compare rollouts: the win rates reach the advantages of trainers that hand over groups."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

import iqareward
from examples.adapters import cosmos_rl, miles_diffusion
from iqareward.adapters import unirl, verl
from iqareward.adapters.diffusers import generate_best
from iqareward.adapters.flow_grpo import install, reward_function
from iqareward.adapters.reward_models import HPSv3Model
from iqareward.adapters.trl import TRLReward, adaptive_trainer
from iqareward.advantages import win_rates
from iqareward.rewards import PairsInGroup, RankInGroup
from iqareward.rewards.metric import NoReference
from tests.adapters.doubles import cosmos, flow_grpo, miles
from tests.adapters.doubles import unirl as unirl_double
from tests.adapters.doubles.pages import package
from tests.adapters.restoration_agent import SEEN, apply_operations, build
from tests.tolerances import NETWORK_BATCH


def brightness(images: Tensor) -> Tensor:
    """A stand-in for a judge."""
    return images.mean((1, 2, 3))


RANK = RankInGroup(NoReference(brightness, higher_is_better=True))
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def prefer_brighter(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """The same judge as a comparison."""
    return torch.stack([(a.mean() > b.mean()).float() for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize(
    "use",
    [
        lambda: reward_function(RANK),
        lambda: HPSv3Model(RANK, device="cpu"),
        lambda: generate_best(None, RANK, {"image": []}, num_candidates=2),
        lambda: asyncio.run(verl.compute_score(solution_image=torch.zeros(3, 8, 8, dtype=torch.uint8), reward=RANK)),
    ],
    ids=["flow_grpo", "DanceGRPO", "diffusers", "verl"],
)
def test_adapters_of_single_images_refuse_them(use) -> None:
    """With the reason, before an image is scored."""
    with pytest.raises(ValueError, match=r"rank\(brightness\)', which needs `ids`, and has none, because its calls"):
        use()


@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "caller")
def test_flow_grpo_refuses_them() -> None:
    """Its sampler deals the images of a prompt out to all processes, so no call holds a whole group."""
    module = flow_grpo.rewards_module()
    install(module, [(1.0, RANK)])
    with pytest.raises(ValueError, match="which needs `ids`"):
        module.multi_score("cpu", {})


@pytest.mark.trainer("TRL", "1.16.0", "run", "reader")
@pytest.mark.parametrize("reward", [RANK, PairsInGroup(prefer_brighter)])
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_trl_ranks_the_completions_of_a_prompt(reward, tmp_path) -> None:
    """The advantages of a GRPO run are the win rates less their mean; where there is no image there is none."""
    trl = pytest.importorskip("trl")
    SEEN.clear()
    options = {"scale_rewards": "none", "steps": 1, "num_generations": 4}
    trainer = build(trl.GRPOTrainer, tmp_path, [TRLReward(reward, apply_operations, group_size=4)], **options)
    trainer.train()
    images = SEEN[-1][0]
    scores = torch.tensor([torch.nan if image is None else image.mean() for image in images])
    groups = torch.arange(len(images)) // 4
    rates = win_rates(scores, groups)
    mean = torch.stack([rates[groups == group].nanmean() for group in groups])
    expected = (rates - mean).nan_to_num(0.0)
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected, rtol=1e-4, atol=1e-5)


def test_trl_needs_whole_groups() -> None:
    """A part of a group would be ranked against itself."""
    with pytest.raises(ValueError, match=r"got 'rank\(brightness\)' without it. Pass group_size=num_generations"):
        TRLReward(RANK, "restored")
    reward = TRLReward(RANK, "restored", group_size=4)
    assert reward(completions=[""] * 4, restored=[*IMAGES[:3], None])[3] is None
    with pytest.raises(ValueError, match=r"whole groups of 4 completions, got 6.*multiple of num_generations"):
        reward(completions=[""] * 6, restored=list(IMAGES[:6]))
    fidelity = TRLReward(RankInGroup(iqareward.load("ssim")), "restored", references="clean", group_size=4)
    with pytest.raises(ValueError, match="adaptive_trainer expected a reward that scores each image on its own"):
        adaptive_trainer(object, iqareward.AdaptiveWeighter(mode="convex"), fidelity)


@pytest.mark.trainer("UniRL", "0104a7e, 0e713d6", "caller", "reader")
def test_unirl_ranks_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request names each sample's group; without that there is an error."""
    package(monkeypatch, **unirl_double.modules(new=True))
    backend = unirl.IQARewardBackend(config=unirl.IQASpec(RANK), base_device="cpu")
    request = unirl_double.request(IMAGES, [""] * 8, None, None, new=True)
    with pytest.raises(ValueError, match="expected `group_ids` for every sample"):
        unirl_double.score_and_attach(backend, request, new=True)
    request.group_ids = [f"prompt-{row // 4}" for row in range(8)]
    part = unirl_double.Part(unirl_double.score_and_attach(backend, request, new=True))
    rates = win_rates(brightness(IMAGES), torch.arange(8) // 4)
    torch.testing.assert_close(part.rewards, rates)
    part.compute_advantages(4)
    expected = (rates - 0.5) / rates[:4].std(correction=0)
    torch.testing.assert_close(part.advantages, expected)


def miles_samples() -> list[Any]:
    return [miles.Sample(row // 4, "", image[:, None], metadata={"gt_path": image}) for row, image in enumerate(IMAGES)]


@pytest.mark.trainer("miles_diffusion", "153b243", "caller", "reader", "configuration", "async")
def test_miles_ranks_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --group-rm the function gets whole groups; micro-groups are refused."""
    monkeypatch.setattr(miles_diffusion, "REWARD", RANK)
    path, rows = f"{miles_diffusion.__name__}.custom_rm", miles_samples()
    with pytest.raises(ValueError, match="start with --group-rm"):
        asyncio.run(miles.rollout(path, rows))
    options = {"group_rm": True, "n_samples_per_prompt": 4, "grpo_std_normalization": False}
    asyncio.run(miles.rollout(path, rows, **options))
    expected = win_rates(brightness(IMAGES), torch.arange(8) // 4) - 0.5
    _, advantages = miles.post_process(rows, **options)
    torch.testing.assert_close(torch.tensor(advantages), expected)


@pytest.mark.trainer("cosmos-rl", "4903300", "caller", "reader", "configuration", "gradients")
def test_cosmos_ranks_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With group_reward_calculation a call is a group; one by one there is nothing to compare with."""
    monkeypatch.setattr(cosmos_rl, "REWARD", RANK)
    config = cosmos.configuration(group_reward_calculation=True)
    payload = cosmos.rollout(IMAGES, torch.zeros(8, 4, 2, 2))
    cosmos_rl.keep_latents([payload])
    (payload,) = cosmos.locally(config, [cosmos_rl.quality], [payload])
    expected = win_rates(brightness(IMAGES), [0] * 8)
    torch.testing.assert_close(torch.tensor(payload.rewards), expected, **NETWORK_BATCH)
    assert cosmos.train(config, [payload]).argsort().tolist() == expected.argsort().tolist()
    unscored = pytest.warns(iqareward.rewards.UnscoredWarning, match="no image has another")
    with unscored, pytest.raises(ValueError, match="could not score every image"):
        cosmos.locally(cosmos.configuration(), [cosmos_rl.quality], [cosmos.rollout(IMAGES, IMAGES)])
