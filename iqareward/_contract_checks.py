"""The single checks of `testing.check_reward`: each returns None if passed, a reason if skipped, and raises if
failed."""

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iqareward.types import Images, Reward

MEMBERS = ("name", "needs_references", "needs_prompts", "differentiable", "bounds", "__call__")
_MISSING = object()


def expect(condition: object, message: str) -> None:
    """`assert` that also holds under `python -O`."""
    if not condition:
        raise AssertionError(message)


@dataclass(frozen=True)
class Case:
    """A reward under test and what to test it on."""

    reward: Reward
    images: Tensor
    references: Tensor | None
    degraded: Tensor | None
    close: dict[str, Any]

    def score(self, images: Images | None = None, references: Images | None = None, **keywords: Any) -> Tensor:
        """Scores of `images` (default: all) with their references, passed as trainers pass them.

        Of copies, so that a reward that writes into its images fails the check for that and no other.
        """
        images = _copy(self.images if images is None else images)
        references = self.references if references is None else references
        references = None if references is None else _copy(references)
        scores = self.reward(images, references=references, **self.columns(images), **keywords)
        expect(isinstance(scores, Tensor), f"scores must be a tensor, got {type(scores).__name__}")
        expect(
            scores.shape == (len(images),),
            f"a {'batch' if isinstance(images, Tensor) else 'list'} of {len(images)} must give scores of shape "
            f"[{len(images)}], got {list(scores.shape)}",
        )
        return scores

    def columns(self, images: Images) -> dict[str, Any]:
        """Prompts, and grey pictures of half the size as inputs if the reward looks at them."""
        columns: dict[str, Any] = {"prompts": [""] * len(images)}
        if getattr(self.reward, "needs_inputs", False):
            columns["inputs"] = [torch.full_like(image[:, ::2, ::2].detach(), 0.5) for image in images]
        return columns

    def assert_same(self, actual: Tensor, expected: Tensor, when: str) -> None:
        """Fail with the condition in the message unless scores agree, NaN with NaN."""
        actual, expected = actual.detach().double(), expected.detach().double()
        same = torch.isclose(actual, expected, **self.close)
        expect(same.all(), f"the score changes {when}: {expected.tolist()} becomes {actual.tolist()}")


def why_no_reward(reward: object) -> str:
    """What a newcomer may take for a reward, and what to do about it; "" if it has all that a reward has."""
    if isinstance(reward, str):
        return f"it is the string {reward!r}. Load it first: iqareward.load({reward!r})"
    if isinstance(reward, type):
        return f"it is the class {reward.__name__}. Pass an instance: {reward.__name__}(...)"
    missing = [name for name in MEMBERS if fact(reward, name, _MISSING) is _MISSING]
    kind, name = type(reward).__name__, str(fact(reward, "__name__", ""))
    this = "None" if reward is None else f"the {kind} {name}" if name else f"of type {kind}"
    if callable(reward) and len(missing) == len(MEMBERS) - 1:
        metric = name if name.isidentifier() else "metric"
        return (
            f"it is {this} and has none of {', '.join(missing)}. Wrap it in NoReference({metric}, "
            f"higher_is_better=...) or FullReference({metric}, higher_is_better=...)"
        )
    if missing:
        return f"a reward has {', '.join(MEMBERS)}; it is {this} and lacks {', '.join(missing)}"
    return ""


def fact(reward: object, name: str, default: object) -> Any:
    """An attribute; "" for a property that fails: it is there, and the check that reads it says how it fails."""
    try:
        return getattr(reward, name, default)
    except Exception:
        return ""


def raised(error: BaseException) -> str:
    """What a reward has raised; its exception may be one that cannot be shown."""
    try:
        return f"it raised {type(error).__name__}: {error}"
    except Exception:
        return f"it raised {type(error).__name__}, whose message cannot be shown"


def facts(case: Case) -> str | None:
    reward = case.reward
    expect(
        not isinstance(reward, nn.Module),
        "a reward must not be an nn.Module (TRL takes any module for a text reward model); keep it in `reward.model`",
    )
    expect(isinstance(reward.name, str) and reward.name, f"`name` must be a non-empty str, got {reward.name!r}")
    for fact in ("needs_references", "needs_prompts", "differentiable"):
        value = getattr(reward, fact)
        expect(isinstance(value, bool), f"`{fact}` must be a bool, got {value!r}")
    bounds: Any = reward.bounds
    numbers = isinstance(bounds, Sequence) and all(bound is None or isinstance(bound, int | float) for bound in bounds)
    expect(
        numbers and len(bounds) == 2 and (None in bounds or bounds[0] < bounds[1]),
        f"`bounds` must be (low, high), each a number or None, got {bounds!r}",
    )


def pickling(case: Case) -> str | None:
    # first of all scoring checks: a reward must be picklable before its weights are loaded
    copy = pickle.loads(pickle.dumps(case.reward))
    expect(copy.name == case.reward.name, f"the unpickled copy of {case.reward.name!r} is named {copy.name!r}")
    scores = Case(copy, case.images, case.references, None, case.close).score()
    case.assert_same(scores, case.score(), "after pickling")


def output(case: Case) -> str | None:
    scores = case.score()
    expect(scores.dtype == torch.float32, f"scores must be float32, got {scores.dtype}")
    expect(scores.device == case.images.device, f"scores must be on {case.images.device}, got {scores.device}")
    expect(scores.isfinite().all(), f"ordinary images must get finite scores, got {scores.tolist()}")


def bounds(case: Case) -> str | None:
    low, high = case.reward.bounds
    for images in (case.images, case.degraded, torch.zeros_like(case.images), torch.ones_like(case.images)):
        if images is None:
            continue
        scores = case.score(images)
        scores = scores[~scores.isnan()]
        expect(scores.isfinite().all(), f"scores must be finite or NaN, never infinite, got {scores.tolist()}")
        for bound, beyond in ((low, torch.lt), (high, torch.gt)):
            if bound is not None:
                rounding = 1e-5 * max(1.0, abs(bound)) * (-1 if beyond is torch.lt else 1)
                outside = scores[beyond(scores, bound + rounding)]
                expect(not outside.numel(), f"{outside.tolist()} lies outside the bounds {(low, high)}")


def keywords(case: Case) -> str | None:
    scores = case.score(metadata=[{}], trainer_state=None, a_keyword_nobody_uses=1)
    case.assert_same(scores, case.score(), "with unknown keywords")


def untouched(case: Case) -> str | None:
    def overshoot(images: Tensor) -> Tensor:  # so that clamping in place would show
        return images.detach() * 1.4 - 0.2

    images, references = overshoot(case.images), None if case.references is None else overshoot(case.references)
    columns = case.columns(images)
    case.reward(images, references=references, **columns)
    case.reward(list(images), references=None if references is None else list(references), **columns)  # of views
    expect(torch.equal(images, overshoot(case.images)), "it wrote into `images`")
    if references is not None and case.references is not None:
        expect(torch.equal(references, overshoot(case.references)), "it wrote into `references`")


def repeat(case: Case) -> str | None:
    case.assert_same(case.score(), case.score(), "from call to call")


def one_and_none(case: Case) -> str | None:
    rows = range(len(case.images))
    alone = [case.score(case.images[i : i + 1], _rows(case.references, [i])) for i in rows]
    case.assert_same(torch.cat(alone), case.score(), "when images are scored one at a time")
    nothing = case.images[:0]
    wanted = f"an empty batch, {list(nothing.shape)}, must give shape [0]"
    try:
        case.score(nothing, _rows(case.references, []))
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{wanted}; {raised(error)}") from error


def order(case: Case) -> str | None:
    backwards = list(range(len(case.images)))[::-1]
    scores = case.score(case.images[backwards], _rows(case.references, backwards))
    case.assert_same(scores, case.score()[backwards], "with the order of the batch")


def sequences(case: Case) -> str | None:
    height, width = case.images.shape[2:]
    references = None if case.references is None else list(case.references)
    case.assert_same(
        case.score(list(case.images), references), case.score(), "when a list is passed instead of a batch"
    )
    half = (..., slice(0, max(1, height // 2)), slice(0, max(1, width // 2)))  # may be too small to score: NaN is right
    mixed = [case.images[0][half], *case.images[1:]]
    mixed_references = None if references is None else [references[0][half], *references[1:]]
    scores = case.score(mixed, mixed_references)
    case.assert_same(scores[1:], case.score()[1:], "beside an image of another size")


def layouts(case: Case) -> str | None:
    images = case.images.contiguous(memory_format=torch.channels_last)
    case.assert_same(case.score(images), case.score(), "with the memory layout of the images")


def half_precision(case: Case) -> str | None:
    for dtype in (torch.bfloat16, torch.float16):
        images, references = case.images.to(dtype), None if case.references is None else case.references.to(dtype)
        exact = case.score(images.float(), None if references is None else references.float())
        scores = case.score(images, references)
        expect(scores.dtype == torch.float32, f"{dtype} images must give float32 scores, got {scores.dtype}")
        case.assert_same(scores, exact, f"when the same pixels come as {dtype}")


def threads(case: Case) -> str | None:
    device = case.images.device.type
    states = [
        nullcontext, torch.no_grad, torch.enable_grad, torch.inference_mode,
        lambda: torch.autocast(device, dtype=torch.bfloat16),
    ]  # fmt: skip

    def score_in(state: Callable[[], Any]) -> Tensor:
        with state():
            return case.score()

    expected = case.score()
    with ThreadPoolExecutor(max_workers=len(states)) as pool:
        for scores in pool.map(score_in, states * 2):
            case.assert_same(scores.detach(), expected.detach(), "in threads under the caller's autocast or grad mode")


def graph(case: Case) -> str | None:
    images = case.images.clone().requires_grad_()
    scores = torch.zeros(())
    for mode, form in product((torch.enable_grad, torch.no_grad), (images, list(images))):
        with mode():
            scores = case.score(form)
        if scores.requires_grad != case.reward.differentiable:
            wanted = "a graph to the pixels" if case.reward.differentiable else "no graph"
            where = f"for a {type(form).__name__} under {mode.__name__}"
            raise AssertionError(f"differentiable={case.reward.differentiable} promises {wanted}, also {where}")
    if not case.reward.differentiable:
        return None
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    expect(gradient.isfinite().all(), "the gradient has non-finite values")
    zero = (gradient.flatten(1) == 0).all(1).nonzero().flatten().tolist()
    expect(not zero, f"the gradient of images {zero} is zero at every pixel")


def isolation(case: Case) -> str | None:
    for value in (torch.nan, torch.inf):
        images = case.images.clone()
        images[0, 0, 0, 0] = value
        scores = case.score(images)
        expect(scores[0].isnan(), f"an image with a {value} pixel must score NaN, got {scores[0].item()}")
        case.assert_same(scores[1:], case.score()[1:], f"when another image has a {value} pixel")


def missing_references(case: Case) -> str | None:
    if not case.reward.needs_references:
        return "needs no references"
    try:
        case.reward(case.images)
    except ValueError:
        return None
    raise AssertionError("a call without `references` must raise ValueError")


def direction(case: Case) -> str | None:
    if case.degraded is None:
        return "no degraded images were given"
    good, bad = case.score(), case.score(case.degraded)
    lower = int((bad < good).sum())
    expect(2 * lower > len(good), f"only {lower} of {len(good)} degraded images score lower; is the sign right?")


def _copy(images: Images) -> Images:
    with torch.inference_mode(False), torch.enable_grad():  # under the caller's mode they would lose the graph
        return images.clone() if isinstance(images, Tensor) else [image.clone() for image in images]


def _rows(references: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if references is None else references[rows]


class Check(NamedTuple):
    title: str
    run: Callable[[Case], str | None]
    only_given: bool = False  # scores the given images and no others; if none has a score, the images are at fault


ALL = (
    Check("states its facts and is no nn.Module", facts),
    Check("survives pickling", pickling, only_given=True),
    Check("leaves its inputs untouched", untouched, only_given=True),
    Check("gives [B] finite float32 on the images' device", output, only_given=True),
    Check("stays within its bounds, also on black and white images", bounds),
    Check("ignores unknown keywords", keywords),
    Check("gives the same score twice", repeat),
    Check("gives the same score alone and in a batch, and none for an empty batch", one_and_none),
    Check("does not depend on the order", order),
    Check("accepts lists and mixed sizes", sequences),
    Check("does not depend on the memory layout", layouts),
    Check("computes in float32 whatever comes in", half_precision),
    Check("does not depend on thread, autocast or grad mode", threads),
    Check("builds a graph exactly when differentiable", graph),
    Check("answers NaN for a broken image without touching others", isolation),
    Check("refuses missing references", missing_references),
    Check("scores degraded images lower", direction),
)
