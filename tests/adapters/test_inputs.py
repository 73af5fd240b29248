"""A reward that compares with the degraded inputs gets them from the column of each trainer that has one."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from iqareward.adapters import flow_factory, unirl, verl
from iqareward.adapters.diffusers import generate_best
from iqareward.adapters.flow_grpo import install, reward_function
from iqareward.adapters.reward_models import HPSv3Model
from iqareward.adapters.trl import TRLReward
from iqareward.rewards.core import ImageReward
from tests.adapters.doubles import flow_factory as flow_factory_double
from tests.adapters.doubles import flow_grpo as flow_grpo_double
from tests.adapters.doubles import unirl as unirl_double
from tests.adapters.doubles.pages import package
from tests.tolerances import OTHER_PACKAGE


class Gain(ImageReward):
    """How much brighter an image is than its input, which may be smaller."""

    name, needs_inputs, bounds = "gain", True, (-1.0, 1.0)

    def score_batch(self, images: Tensor, inputs: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) - inputs.mean((1, 2, 3))


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INPUTS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
METADATA = [{"degraded": image} for image in INPUTS]


def trl(monkeypatch: pytest.MonkeyPatch) -> object:
    reward = TRLReward(Gain(), "restored", inputs="degraded")
    return reward(completions=["", ""], restored=list(IMAGES), degraded=list(INPUTS))


def flow_grpo(monkeypatch: pytest.MonkeyPatch) -> object:
    return reward_function(Gain(), inputs="degraded")(IMAGES, ["", ""], METADATA)[0]


def flow_grpo_edit_script(monkeypatch: pytest.MonkeyPatch) -> object:
    module = flow_grpo_double.rewards_module()
    install(module, [(1.0, Gain())], inputs="ref_images")
    return module.multi_score("cpu", {})(IMAGES, ["", ""], [{}, {}], list(INPUTS))[0]["avg"]


def flow_factory_yaml(monkeypatch: pytest.MonkeyPatch) -> object:
    package(monkeypatch, **flow_factory_double.modules())
    entry = {"name": "gain", "reward_model": f"{flow_factory.__name__}.IQARewardModel", "device": "cpu"}
    entry |= {"reward": Gain(), "inputs": "condition_images"}
    model = flow_factory_double.build(flow_factory_double.RewardArguments.from_dict(entry))
    samples = flow_factory_double.samples(IMAGES, [0, 1], INPUTS)
    return flow_factory_double.RewardProcessor({"gain": model}).compute_rewards(samples)["gain"]


def verl_omni(monkeypatch: pytest.MonkeyPatch) -> object:
    reward = Gain()

    async def both() -> list[dict[str, float]]:
        pixels = (255 * IMAGES).round().byte()
        calls = (
            verl.compute_score(solution_image=image, extra_info=row, reward=reward, inputs="degraded")
            for image, row in zip(pixels, METADATA, strict=True)
        )
        return await asyncio.gather(*calls)

    return [found["score"] for found in asyncio.run(both())]


def unirl_backend(monkeypatch: pytest.MonkeyPatch) -> object:
    package(monkeypatch, **unirl_double.modules(new=True))
    backend = unirl.IQARewardBackend(config=unirl.IQASpec(Gain(), inputs="conditioning"), base_device="cpu")
    call = unirl_double.request(IMAGES, ["", ""], INPUTS, None, new=True)
    return unirl_double.score_and_attach(backend, call, new=True)


def best_of_one(monkeypatch: pytest.MonkeyPatch) -> object:
    inputs = {"image": INPUTS, "output": IMAGES}
    return generate_best(
        lambda image, output, **call: SimpleNamespace(images=output),
        Gain(), inputs, num_candidates=1, batch_size=2, show_progress=False,
    ).scores[:, 0]  # fmt: skip


ADAPTERS = (trl, flow_grpo, flow_grpo_edit_script, flow_factory_yaml, verl_omni, unirl_backend, best_of_one)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_inputs_reach_the_reward(adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of the reward itself on the same images and inputs."""
    tolerance = {"rtol": 0.0, "atol": 1 / 255} if adapter is verl_omni else OTHER_PACKAGE  # it hands over bytes
    expected = Gain()(IMAGES, inputs=INPUTS)
    torch.testing.assert_close(torch.as_tensor(adapter(monkeypatch)), expected, **tolerance)


@pytest.mark.parametrize(
    "build",
    [
        lambda reward: TRLReward(reward, "restored"),
        reward_function,
        lambda reward: HPSv3Model(reward, device="cpu"),
        lambda reward: generate_best(None, reward, {"image": []}, num_candidates=2),
        lambda reward: asyncio.run(verl.compute_score(solution_image=IMAGES[0], reward=reward)),
    ],
    ids=["TRL", "flow_grpo", "DanceGRPO", "diffusers", "verl"],
)
@pytest.mark.parametrize("reward", [torch.mean, torch.nn.Linear(1, 1)])
def test_what_is_no_reward_is_refused(build, reward) -> None:
    """A function or a network has no name and direction; the message says how to make a reward of it."""
    with pytest.raises(TypeError, match=r"expected rewards, got .*NoReference\(metric"):
        build(reward)


def test_a_trainer_without_inputs_refuses_the_reward() -> None:
    """Before training, with what to do."""
    with pytest.raises(ValueError, match=r"'gain', which needs `inputs`, and has none\. Say where .* inputs="):
        TRLReward(Gain(), "restored")
    with pytest.raises(ValueError, match=r"'gain', which needs `inputs`, and has none\. Choose another reward"):
        HPSv3Model(Gain(), device="cpu")
