"""The TRL reward function by itself: what it takes from TRL's call, and what it answers."""

import asyncio
import inspect
import pickle
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.adapters.trl import AsyncTRLReward, TRLReward, adaptive_trainer, tool_images
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.restoration_agent import apply_operations, as_pil, photographs

pytestmark = pytest.mark.trainer("TRL", "1.16.0", "caller", "async")
IMAGES = photographs(3, side=32)
CLEAN = IMAGES.flip(0)


class NeedsTexts:
    """A reward that scores the length of the text of each image."""

    name, needs_references, needs_prompts, differentiable, bounds = "texts", False, True, False, (0.0, None)

    def __call__(self, images: Tensor, references=None, prompts: Sequence[str] = (), **ignored) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])


class Log(defaultdict[str, list[float]]):
    """TRL's `log_metric`, whose values it averages."""

    def __init__(self) -> None:
        super().__init__(list)

    def __call__(self, name: str, value: float) -> None:
        self[name].append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.items()}


def call(reward, columns, count=3, **more):
    """As TRL calls: everything by keyword, one entry per completion."""
    state = {"trainer_state": object(), "log_extra": lambda column, values: None}
    return reward(
        prompts=["p"] * count, completions=["c"] * count, completion_ids=[[1]] * count, **state, **columns, **more
    )


@pytest.mark.parametrize("kind", ["PIL", "list of one", "uint8", "float"])
def test_images_from_a_column(kind) -> None:
    """Whatever a data set holds as one image per row gives the library's own scores."""
    pixels = (255 * IMAGES).round() / 255
    rows = {
        "PIL": [as_pil(image) for image in IMAGES],
        "list of one": [[as_pil(image)] for image in IMAGES],
        "uint8": list((255 * pixels).round().byte()),
        "float": list(pixels),
    }[kind]
    scores = call(TRLReward("ssim", "restored", references="clean"), {"restored": rows, "clean": list(CLEAN)})
    assert scores == pytest.approx(iqareward.load("ssim")(pixels, references=CLEAN).tolist(), abs=1e-6)


def test_images_of_different_sizes() -> None:
    """A column of images of two sizes is scored in one call."""
    rows = [IMAGES[0], IMAGES[1, :, :20], IMAGES[2]]
    expected = iqareward.load("piqe")(rows).tolist()
    assert call(TRLReward("piqe", "restored"), {"restored": rows}) == pytest.approx(expected)


def test_unscored_is_none_and_no_image_is_what_was_asked_for() -> None:
    """A broken image is left to TRL's nan-aware statistics; a completion without an image earns `no_image`."""
    log = Log()
    rows = [IMAGES[0], IMAGES[1] * torch.nan, None]
    reward = TRLReward("ssim", "restored", references="clean", no_image=-1.0)
    scores = call(reward, {"restored": rows, "clean": list(CLEAN)}, log_metric=log)
    assert scores[0] == pytest.approx(iqareward.load("ssim")(IMAGES[:1], references=CLEAN[:1]).item())
    assert scores[1:] == [None, -1.0]
    assert log.means() == pytest.approx({"ssim/no_image": 1 / 3, "ssim/unscored": 1 / 3})
    assert call(TRLReward("piqe", "restored"), {"restored": [None] * 3}) == [None] * 3


def test_components_are_logged() -> None:
    """Each part of a weighted sum is logged with its mean over the images that it scored."""
    log = Log()
    rows = [IMAGES[0], IMAGES[1], None]
    reward = TRLReward("2*ssim + 1*haarpsi", "restored", references="clean", name="both")
    scores = call(reward, {"restored": rows, "clean": list(CLEAN)}, log_metric=log)
    parts = iqareward.evaluate([iqareward.load("ssim"), iqareward.load("haarpsi")], IMAGES[:2], CLEAN[:2])
    for name, part in parts.items():
        assert log.means()[f"both/{name}"] == pytest.approx(part.mean().item())
    assert scores[:2] == pytest.approx((2 * parts["ssim"] + parts["haarpsi"]).tolist())


def test_tool_images_takes_the_last_image() -> None:
    """Of a transcript in the form TRL writes, the last image that a tool returned counts."""
    first, last = as_pil(IMAGES[0]), as_pil(IMAGES[1])
    transcript = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "denoise", "arguments": {}}}]},
        {"role": "tool", "name": "denoise", "content": [{"type": "image", "image": first}]},
        {"role": "assistant", "content": "once more"},
        {
            "role": "tool",
            "name": "denoise",
            "content": [{"type": "image", "image": last}, {"type": "text", "text": "ok"}],
        },
        {"role": "tool", "name": "denoise", "content": "{'error': 'too often'}"},
    ]
    only_text = [{"role": "assistant", "content": [{"type": "image", "image": first}]}]
    assert tool_images([transcript, only_text, []]) == [last, None, None]
    reward = TRLReward("piqe", tool_images)
    assert reward(completions=[transcript, only_text])[1] is None
    with pytest.raises(TypeError, match="conversational prompts"):
        tool_images(["text"])


def test_prompts_reach_a_reward_that_needs_them() -> None:
    """Texts come from the named column, for the rows that have an image."""
    reward = TRLReward(NeedsTexts(), "restored", prompts="caption")
    columns = {"restored": [IMAGES[0], None, IMAGES[2]], "caption": ["a", "bb", "ccc"]}
    assert call(reward, columns) == [1.0, None, 3.0]


@pytest.mark.parametrize(
    ("build", "columns", "message"),
    [
        (lambda: TRLReward("ssim", "restored"), None, "needs `references`, and has none"),
        (lambda: TRLReward(NeedsTexts(), "restored"), None, "needs `prompts`, and has none"),
        (lambda: TRLReward("piqe", "restored"), {"images": []}, "expected 'restored' in the metadata"),
        (lambda: TRLReward("piqe", "restored"), {"restored": [IMAGES[0]]}, "one image or None per completion"),
        (lambda: TRLReward("piqe", "restored"), {"restored": [list(IMAGES)] * 3}, "got 3 for completion 0"),
        (lambda: adaptive_trainer(object, AdaptiveWeighter(), fidelity("ssim")), None, "mode='convex'"),
        (lambda: adaptive_trainer(object, AdaptiveWeighter(mode="convex"), fidelity("piqe")), None, "upper bound"),
    ],
)
def test_mistakes_are_explained(build, columns, message) -> None:
    """What is missing is named, before training where that is possible."""
    with pytest.raises(ValueError, match=message):
        call(build(), columns)


@pytest.mark.parametrize("distance", ["gmsd", iqareward.load("gmsd")])
def test_a_distance_without_columns_is_refused(distance) -> None:
    """Only a TRLReward says where the images and their ground truth are."""
    with pytest.raises(TypeError, match=r"`fidelity` as a TRLReward.*got .*gmsd.*TRLReward\('gmsd'"):
        adaptive_trainer(object, AdaptiveWeighter(mode="convex"), distance)


def test_only_a_trl_reward_runs_beside_others() -> None:
    """A name or another reward says nothing about where the images are."""
    with pytest.raises(TypeError, match=r"AsyncTRLReward expected a TRLReward, got 'piqe'"):
        AsyncTRLReward("piqe")


def test_a_function_that_returns_no_list_is_named() -> None:
    """Such as one that forgot to return."""
    with pytest.raises(TypeError, match="expected a list with one image or None per completion, got NoneType"):
        call(TRLReward("piqe", lambda **columns: None), {})


def fidelity(name: str) -> TRLReward:
    """A reward function on two columns."""
    return TRLReward(name, "restored", references="clean")


def test_reward_functions_travel_and_have_names() -> None:
    """Both forms can be pickled, and two rewards are two rows in TRL's logs."""
    for reward in (TRLReward("piqe", apply_operations), AsyncTRLReward(TRLReward("niqe", "restored", name="mine"))):
        assert pickle.loads(pickle.dumps(reward)).__name__ == reward.__name__
    assert [TRLReward(name, "restored").__name__ for name in ("piqe", "niqe")] == ["piqe", "niqe"]


def test_who_is_asynchronous() -> None:
    """`inspect` and TRL recognise both forms; an object that only has an async `__call__` is taken for a plain one."""
    trl_utils = pytest.importorskip("trl.trainer.utils")

    class Naive:
        async def __call__(self, **call):
            return [0.0]

    plain, beside = TRLReward("piqe", "restored"), AsyncTRLReward(TRLReward("piqe", "restored"))
    assert [inspect.iscoroutinefunction(form) for form in (plain, beside, Naive())] == [False, True, False]
    assert [trl_utils.is_async_callable(form) for form in (plain, beside)] == [False, True]
    assert inspect.iscoroutinefunction(pickle.loads(pickle.dumps(beside)))
    assert [trl_utils.get_callable_name(form) for form in (plain, beside)] == ["piqe", "piqe"]
    columns = {"restored": list(IMAGES)}
    assert asyncio.run(call(beside, columns)) == call(plain, columns)


def test_async_rewards_run_beside_each_other() -> None:
    """A reward that waits does not hold up the event loop on which TRL gathers all of them."""

    async def both() -> list[str]:
        order = []

        def slow(completions, **columns):
            asyncio.run_coroutine_threadsafe(other(), loop).result(timeout=60)
            order.append("slow")
            return [None] * len(completions)

        async def other() -> None:
            order.append("other")

        loop = asyncio.get_running_loop()
        await call(AsyncTRLReward(TRLReward("piqe", slow)), {})
        return order

    assert asyncio.run(both()) == ["other", "slow"]
