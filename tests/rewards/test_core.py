"""What every reward has in common: the columns of a call, movers, parts."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import iqareward
from iqareward import (
    AffineMap,
    Cached,
    Calibrated,
    FidelityFloor,
    MicroBatched,
    NoReference,
    Overlapped,
    SoftMin,
)
from iqareward.rewards.calls import Call
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel
from iqareward.testing import check_reward
from iqareward.types import Images, Reward
from tests.owl2.owl2_tiny import SMALL, seeded_model
from tests.tolerances import EXACT, NETWORK_BATCH, OTHER_PACKAGE


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


class Brighter(ImageReward):
    """How much brighter an image is than the picture that was restored, whatever the size of that."""

    name, needs_inputs, bounds, differentiable = "brighter", True, (-1.0, 1.0), False

    def score_batch(self, images: Tensor, inputs: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) - inputs.mean((1, 2, 3))


def linear(device: torch.device) -> nn.Module:
    layer = nn.Linear(3, 1, device=device)
    with torch.no_grad():
        layer.weight.fill_(1 / 3)
        layer.bias.zero_()
    return layer


class Judge(ImageReward):
    """The mean of the pixels, by a network."""

    name, bounds = "judge", (0.0, 1.0)

    def __init__(self) -> None:
        self.model_loader = LazyModel(linear, name=self.name)

    def score_batch(self, images: Tensor) -> Tensor:
        return self.model_loader.ready(images)(images.mean((2, 3))).flatten()


FORMS: dict[str, Callable[[Reward], Reward]] = {
    "itself": lambda reward: reward,
    "sum": lambda reward: iqareward.WeightedSum([(0.5, reward), (0.5, iqareward.load("piqe[-100, 0]"))]),
    "soft minimum": lambda reward: SoftMin([reward, iqareward.load("piqe[-100, 0]")], temperature=0.1),
    "floor": lambda reward: FidelityFloor(reward, iqareward.load("piqe"), floor=-200.0),
    "calibrated": lambda reward: Calibrated(reward, AffineMap(-1.0, 1.0)),
    "cached": Cached,
    "batched": MicroBatched,
    "overlapped": Overlapped,
}


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")  # of a part with one image
@pytest.mark.parametrize("form", FORMS)
def test_inputs_reach_the_reward(form: str) -> None:
    """Of other sizes than the images, whole or as rows; a broken one costs its image alone its score."""
    images, inputs = noise(3, 3, 32, 32), noise(3, 3, 16, 16, seed=1)
    reward = FORMS[form](Brighter())
    scores = reward(images, inputs=inputs)
    if form == "itself":
        torch.testing.assert_close(scores, images.mean((1, 2, 3)) - inputs.mean((1, 2, 3)), **OTHER_PACKAGE)
    assert (scores[1:] != reward(images, inputs=1 - inputs)[1:]).all()
    rows = [inputs[0], inputs[1, :, :12], inputs[2].clone()]
    rows[2][0, 0, 0] = torch.nan
    found = FORMS[form](Brighter())(list(images), inputs=rows)
    torch.testing.assert_close(found[0], scores[0], **OTHER_PACKAGE)
    assert found.isnan().tolist() == [False, False, True]
    with pytest.raises(ValueError, match="expected `inputs`, the degraded images"):
        reward(images)


class Protocol:
    """A reward of no base class, whose columns have no defaults and which knows of no `inputs`."""

    name, needs_references, needs_prompts, differentiable, bounds = "protocol", False, False, False, (0.0, 1.0)

    def __call__(self, images: Images, references: Images | None, prompts: Sequence[str] | None) -> Tensor:
        assert references is None
        assert prompts is None
        return torch.stack([image.mean() for image in images])


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_of_the_protocol_gets_every_column(form: str) -> None:
    """None where the caller has none."""
    reward, images = FORMS[form](Protocol()), noise(2, 3, 32, 32)
    scores = reward(images) if form != "itself" else reward(images, None, prompts=None)
    assert scores.isfinite().all()


def test_bad_inputs_are_refused() -> None:
    """By number, shape and dtype; a reward that does not look at them ignores them."""
    images = noise(2, 3, 16, 16)
    for inputs, error in (
        (noise(3, 3, 8, 8), ValueError),
        (noise(2, 4, 8, 8), ValueError),
        (noise(2, 3, 8, 8).byte(), TypeError),
        ([noise(3, 8, 8), "no image"], TypeError),
    ):
        for reward in (Brighter(), Cached(Brighter())):
            with pytest.raises(error, match="brighter"):
                reward(images, inputs=inputs)
    assert iqareward.load("piqe")(images, inputs="not looked at").shape == (2,)
    with pytest.raises(TypeError, match="positional"):
        Brighter()(images, None, images)


def test_contract_of_a_reward_with_inputs() -> None:
    """The public check gives it what it needs."""
    report = check_reward(Brighter(), noise(4, 3, 32, 32), degraded=0.5 * noise(4, 3, 32, 32))
    assert not report.failed, report


@pytest.mark.parametrize("form", FORMS)
def test_every_form_lends_its_weights(form: str) -> None:
    """After `offload` a call is an error in every form, also one that knows the score already; `onload` undoes it."""
    judge, images = Judge(), noise(2, 3, 32, 32)
    reward = FORMS[form](judge)
    expected = reward(images)
    reward.offload()
    with pytest.raises(RuntimeError, match=r"is offloaded; call \.onload\(\)"):
        reward(images)
    with pytest.raises(RuntimeError, match=r"judge is offloaded"):
        judge(images)
    copy = pickle.loads(pickle.dumps(reward)) if form != "batched" else FORMS[form](Judge())
    torch.testing.assert_close(copy(images), expected, **EXACT)  # a copy has weights of its own
    reward.onload()
    torch.testing.assert_close(reward(images), expected, **EXACT)
    reward.offload()
    assert reward.to("cpu") is reward  # brings the weights back as well
    torch.testing.assert_close(reward(images), expected, **EXACT)


def test_a_reward_without_weights_is_lent_alike() -> None:
    """So that a loop that forgets `onload` fails with every reward."""
    reward = iqareward.load("piqe")
    reward.offload()
    with pytest.raises(RuntimeError, match="piqe is offloaded"):
        reward(noise(1, 3, 32, 32))
    reward.onload()
    assert reward(noise(1, 3, 32, 32)).isfinite().all()


def test_batched_copies_lend_what_scores() -> None:
    """Copies of `MicroBatched` share the weights of one worker; a copy that was never called lends those."""
    first, images = MicroBatched(Judge()), noise(1, 3, 32, 32)
    copy = pickle.loads(pickle.dumps(first))
    first(images)
    copy.offload()
    with pytest.raises(RuntimeError, match="judge is offloaded"):
        first(images)
    copy.onload()
    assert first(images).isfinite().all()
    first.close()


def test_parts_and_total_from_one_evaluation() -> None:
    """Any combination says what it is made of; another reward has no parts."""
    images = noise(2, 3, 32, 32)
    for form in ("sum", "soft minimum", "floor"):
        reward = FORMS[form](Judge())
        total, parts = Call(images).score_with_parts(reward)
        torch.testing.assert_close(total, reward(images), **EXACT)
        assert list(parts) == [part.name for part in reward.parts]
        torch.testing.assert_close(parts["judge"], Judge()(images), **EXACT)
    assert Call(images).score_with_parts(Cached(Judge()))[1] == {}
    judge = type("Mine", (Judge,), {"parts": ("of", "its own")})()  # a class of someone else may mean anything by it
    assert Call(images).score_with_parts(judge)[1] == {}


class Written(TorchDispatchMode):
    """Counts the elements of what operations return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def test_a_gradient_in_many_pieces_costs_one_batch() -> None:
    """Not one for each piece, which would be a hundred times the work for a hundred pieces."""
    images, written = noise(64, 3, 16, 16).requires_grad_(), {}
    for batch_size in (1, 64):
        reward = NoReference(brightness, higher_is_better=True, differentiable=True, batch_size=batch_size)
        scores = reward(images)
        with Written() as counted:
            torch.autograd.grad(scores.sum(), images)
        written[batch_size] = counted.elements
    assert written[1] < 4 * written[64]


def test_batch_size_may_be_changed() -> None:
    """Also of a reward whose network takes one size, on which images of all sizes share its batches."""
    images, sizes = [noise(3, 40, 56), noise(3, 64, 32), noise(3, 40, 56, seed=1)], []
    reward = iqareward.QAlignReward(seeded_model(SMALL), batch_size=1)
    expected = reward(images)
    reward.model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    reward.batch_size = 2
    torch.testing.assert_close(reward(images), expected, **NETWORK_BATCH)
    assert sizes == [2, 1]
