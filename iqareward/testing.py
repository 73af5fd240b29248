"""Check that any object, ours or yours, is a reward that keeps the whole contract."""

import pickle
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from iqareward.rewards.calls import COLUMNS
from iqareward.rewards.core import UnscoredWarning, collect_reasons, why_unscored
from iqareward.types import Images, Reward, needs

MIN_IMAGES = 3
_MEMBERS = ("name", "needs_references", "needs_prompts", "differentiable", "bounds", "__call__")
_MISSING = object()


class RewardContractError(AssertionError):
    """A reward breaks the contract; the message lists every failure."""


@dataclass(frozen=True)
class Report:
    """The result of `check_reward`; `str(report)` is a readable list."""

    reward: str
    passed: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.reward}: {len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"]
        lines += [f"  ok    {title}" for title in self.passed]
        lines += [f"  skip  {title}: {reason}" for title, reason in self.skipped]
        for index, (title, reason) in enumerate(self.failed):
            known = reason in (earlier for _, earlier in self.failed[:index])
            lines.append(f"  FAIL  {title}: {'the same' if known else reason}")
        return "\n".join(lines)


def check_reward(
    reward: Reward,
    images: Tensor,
    references: Tensor | None = None,
    *,
    degraded: Tensor | None = None,
    task: str | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Report:
    """Test a reward against the whole contract of this library and list every failure.

    It tests attributes and type; shape, dtype and device of scores, also for one image, none, and mixed sizes; bounds;
    unknown keywords; untouched inputs; the same score alone, in a batch, in another order, in half precision, in
    another memory layout, twice, from threads under other autocast and grad modes, and after pickling; a graph
    exactly when `differentiable`; that non-finite pixels cost one image its score and no other; that a call without
    what the reward needs is refused; and, with `degraded`, the direction. A reward that cannot score the images at
    all, for example because its weights are not here, ends the test with that one reason.

    A reward that needs `ids` compares the rollouts of an input, so its scores depend on their group, here all images.
    They must not depend on the order within it, on other groups in the batch, or on a broken image in it.

    Args:
        reward: Any object; one that is not a reward fails.
        images: `[B, 3, H, W]` float in [0, 1], B >= 3, large enough for the reward to score each of them.
        references: `[B, 3, H, W]`, needed if the reward needs them; different from `images`.
        degraded: `[B, 3, H, W]`, visibly worse versions of `images`; most of them must score lower.
        task: The task that a reward which needs `tasks` gets for every image.
        rtol: Relative tolerance for how far a network's score may move with its batch.
        atol: Absolute tolerance for the same.

    Returns:
        A report to print.

    Raises:
        RewardContractError: with all failures, also for an object that is not a reward: a name, a class, or a metric
            that is not wrapped.
        ValueError: the images are unsuitable, the reward scores none of them, or it needs references or a task and gets
            none.

    Example:
        >>> import torch
        >>> from iqareward.functional import psnr
        >>> from iqareward.rewards.metric import FullReference
        >>> rng = torch.Generator().manual_seed(0)
        >>> references = torch.rand(3, 3, 32, 32, generator=rng) * 0.5 + 0.25
        >>> images = references + 0.01 * torch.randn(3, 3, 32, 32, generator=rng)
        >>> report = check_reward(FullReference(psnr, higher_is_better=True), images, references)
        >>> report.failed
        []
    """
    _check_images(images, references, degraded)
    report = Report(str(fact(reward, "name", "")) or str(fact(reward, "__name__", "")) or type(reward).__name__)
    if problem := _why_no_reward(reward):
        report.failed.append(("is a reward", problem))
        raise RewardContractError(str(report))
    if references is None and fact(reward, "needs_references", False):
        raise ValueError(
            f"check_reward expected `references`, because {report.reward!r} compares with them, got None. Pass the "
            "undamaged versions of `images`."
        )
    if task is None and fact(reward, "needs_tasks", False):
        raise ValueError(f"check_reward expected `task`, because {report.reward!r} scores by task, got None.")
    close = {"rtol": rtol, "atol": atol, "equal_nan": True}
    case = _Case(reward, images.detach(), references, degraded, close, task)
    for check in _CHECKS:
        title = check.__doc__ or check.__name__  # `python -OO` drops docstrings
        try:
            with warnings.catch_warnings():  # some checks score batches that have no score on purpose
                warnings.simplefilter("ignore", UnscoredWarning)
                reason = check(case)
        except UnscoredWarning as unscored:
            raise ValueError(f"check_reward expected images that the reward scores, but {unscored}") from unscored
        except _BrokenError as broken:
            report.failed.append((title, str(broken)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit and asyncio.CancelledError
            report.failed.append((title, raised(error)))
            if check is _output:
                break  # it fails on ordinary images, and would in every other check
        else:
            if reason is None:
                report.passed.append(title)
            else:
                report.skipped.append((title, reason))
    if report.failed:
        raise RewardContractError(str(report))
    return report


def fact(reward: object, name: str, default: object) -> Any:
    """An attribute, or "" for a property that fails: it is there, and the check that reads it says how it fails."""
    try:
        return getattr(reward, name, default)
    except Exception:
        return ""


def raised(error: BaseException) -> str:
    """Say what code that is not ours has raised; its exception may be one that cannot be shown."""
    try:
        return f"it raised {type(error).__name__}: {error}"
    except Exception:
        return f"it raised {type(error).__name__}, whose message cannot be shown"


def _check_images(images: Tensor, references: Tensor | None, degraded: Tensor | None) -> None:
    """Refuse images that no reward could be checked on."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < MIN_IMAGES:
        raise ValueError(f"check_reward expected `images` as a tensor [B, 3, H, W] with B >= {MIN_IMAGES}.")
    for name, batch in {"images": images, "references": references, "degraded": degraded}.items():
        if batch is None:
            continue
        if batch.shape != images.shape:
            raise ValueError(
                f"check_reward expected `{name}` of shape {list(images.shape)} like `images`, got {list(batch.shape)}."
            )
        if not batch.is_floating_point():
            raise ValueError(
                f"check_reward expected `{name}` in floating point, got {batch.dtype}. Convert them with "
                f"iqareward.to_images({name}, value_range=(black, white))."
            )
    reasons = "; ".join(why_unscored(images, references=references, degraded=degraded))
    if reasons:
        raise ValueError(f"check_reward expected images that a reward can score, but {reasons}.")


def _why_no_reward(reward: object) -> str:
    """Say what a newcomer took for a reward, and what to do about it; "" if it has all that a reward has."""
    if isinstance(reward, str):
        return f"it is the string {reward!r}. Load it first: iqareward.load({reward!r})"
    if isinstance(reward, type):
        return f"it is the class {reward.__name__}. Pass an instance: {reward.__name__}(...)"
    missing = [name for name in _MEMBERS if fact(reward, name, _MISSING) is _MISSING]
    kind, name = type(reward).__name__, str(fact(reward, "__name__", ""))
    this = "None" if reward is None else f"the {kind} {name}" if name else f"of type {kind}"
    if callable(reward) and len(missing) == len(_MEMBERS) - 1:
        metric = name if name.isidentifier() else "metric"
        return (
            f"it is {this} and has none of {', '.join(missing)}. Wrap it in NoReference({metric}, "
            f"higher_is_better=...) or FullReference({metric}, higher_is_better=...)"
        )
    if missing:
        return f"a reward has {', '.join(_MEMBERS)}; it is {this} and lacks {', '.join(missing)}"
    return ""


class _BrokenError(Exception):
    """The reward did something else than the contract says."""


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise _BrokenError(message)


@dataclass
class _Case:
    """A reward under test and what to test it on."""

    reward: Reward
    images: Tensor
    references: Tensor | None
    degraded: Tensor | None
    close: dict[str, Any]
    task: str | None = None
    unpickled: Reward | None = None

    def score(self, images: Images | None = None, references: Images | None = None, **keywords: Any) -> Tensor:
        """Scores of `images` (default: all) with their references, passed as trainers pass them.

        They are copies, so that a reward that writes into its images fails the check for that and no other.
        """
        images = _copy(self.images if images is None else images)
        references = self.references if references is None else references
        references = None if references is None else _copy(references)
        scores = self.reward(images, references=references, **self.columns(images) | keywords)
        _expect(isinstance(scores, Tensor), f"scores must be a tensor, got {type(scores).__name__}")
        _expect(
            scores.shape == (len(images),),
            f"a {'batch' if isinstance(images, Tensor) else 'list'} of {len(images)} must give scores of shape "
            f"[{len(images)}], got {list(scores.shape)}",
        )
        return scores

    @cached_property
    def all_scores(self) -> Tensor:
        """Scores of all images by the first call, with which later calls are compared."""
        return self.score().detach()

    def columns(self, images: Images) -> dict[str, Any]:
        """Prompts, and if the reward needs them: grey images of half the size as inputs, one id, one task."""
        columns: dict[str, Any] = {"prompts": [""] * len(images)}
        if needs(self.reward, "inputs"):
            columns["inputs"] = [torch.full_like(image[:, ::2, ::2].detach(), 0.5) for image in images]
        if self.in_groups:
            columns["ids"] = [0] * len(images)
        if needs(self.reward, "tasks"):
            columns["tasks"] = [self.task] * len(images)
        return columns

    @property
    def in_groups(self) -> bool:
        """Whether scores depend on the group."""
        return needs(self.reward, "ids")

    def rows(self, rows: list[int] | slice) -> tuple[Tensor, Tensor | None]:
        """Some of the images and their references."""
        return self.images[rows], None if self.references is None else self.references[rows]

    def expect_same(self, scores: Tensor, when: str, expected: Tensor | None = None) -> None:
        """Fail with the condition in the message unless scores are those of all images, or `expected`, NaN as NaN."""
        expected = (self.all_scores if expected is None else expected).detach().double()
        same = torch.isclose(scores.detach().double(), expected, **self.close)
        _expect(same.all(), f"the score changes {when}: {expected.tolist()} becomes {scores.tolist()}")


def _copy(images: Images) -> Images:
    with torch.inference_mode(False), torch.enable_grad():  # under the caller's mode they would lose the graph
        return images.clone() if isinstance(images, Tensor) else [image.clone() for image in images]


# Each check has its title as docstring. It gives None if passed, or why it does not apply, and raises if failed.


def _facts(case: _Case) -> None:
    """declares its attributes and is not an nn.Module"""
    reward = case.reward
    _expect(
        not isinstance(reward, nn.Module),
        "a reward must not be an nn.Module (TRL takes any module for a text reward model); keep it in `reward.model`",
    )
    _expect(isinstance(reward.name, str) and reward.name, f"`name` must be a non-empty str, got {reward.name!r}")
    for name in ("needs_references", "needs_prompts", "differentiable"):
        value = getattr(reward, name)
        _expect(isinstance(value, bool), f"`{name}` must be a bool, got {value!r}")
    bounds: Any = reward.bounds
    numbers = isinstance(bounds, Sequence) and all(bound is None or isinstance(bound, int | float) for bound in bounds)
    _expect(
        numbers and len(bounds) == 2 and (None in bounds or bounds[0] < bounds[1]),
        f"`bounds` must be (low, high), each a number or None, got {bounds!r}",
    )


def _pickling(case: _Case) -> None:
    """survives pickling"""
    # before the first call: a reward must be picklable before its weights are loaded
    case.unpickled = pickle.loads(pickle.dumps(case.reward))
    name = fact(case.unpickled, "name", "")
    _expect(name == case.reward.name, f"the unpickled copy of {case.reward.name!r} is named {name!r}")


def _output(case: _Case) -> None:
    """gives [B] finite float32 on the images' device"""
    with collect_reasons() as reasons:
        scores = case.all_scores
    if reasons:
        raise UnscoredWarning("; ".join(reasons))
    _expect(scores.dtype == torch.float32, f"scores must be float32, got {scores.dtype}")
    _expect(scores.device == case.images.device, f"scores must be on {case.images.device}, got {scores.device}")
    _expect(scores.isfinite().all(), f"ordinary images must get finite scores, got {scores.tolist()}")


def _untouched(case: _Case) -> None:
    """does not modify its inputs"""

    def overshoot(images: Tensor) -> Tensor:  # so that clamping in place would show
        return images.detach() * 1.4 - 0.2

    images, references = overshoot(case.images), None if case.references is None else overshoot(case.references)
    columns = case.columns(images)
    case.reward(images, references=references, **columns)
    case.reward(list(images), references=None if references is None else list(references), **columns)  # of views
    _expect(torch.equal(images, overshoot(case.images)), "it wrote into `images`")
    if references is not None and case.references is not None:
        _expect(torch.equal(references, overshoot(case.references)), "it wrote into `references`")


def _bounds(case: _Case) -> None:
    """stays within its bounds, including on black and on white images"""
    low, high = case.reward.bounds
    others = (case.degraded, torch.zeros_like(case.images), torch.ones_like(case.images))
    for scores in (case.all_scores, *(case.score(images) for images in others if images is not None)):
        scores = scores[~scores.isnan()]
        _expect(scores.isfinite().all(), f"scores must be finite or NaN, never infinite, got {scores.tolist()}")
        for bound, beyond in ((low, torch.lt), (high, torch.gt)):
            if bound is not None:
                rounding = 1e-5 * max(1.0, abs(bound)) * (-1 if beyond is torch.lt else 1)
                outside = scores[beyond(scores, bound + rounding)]
                _expect(not outside.numel(), f"{outside.tolist()} lies outside the bounds {(low, high)}")


def _same_score(case: _Case) -> None:
    """gives the same score twice, after pickling, and with unknown keywords"""
    case.expect_same(case.score(), "from call to call")
    if case.unpickled is not None:
        copy = _Case(case.unpickled, case.images, case.references, None, case.close, case.task)
        case.expect_same(copy.score(), "after pickling")
    case.expect_same(case.score(metadata=[{}], trainer_state=None, a_keyword_nobody_uses=1), "with unknown keywords")


def _one_and_none(case: _Case) -> None:
    """gives the same score alone and in a batch, and accepts an empty batch"""
    if case.in_groups:
        images, references = case.rows([*range(len(case.images)), 0, 1])  # with a second group
        scores = case.score(images, references, ids=[0] * len(case.images) + [1, 1])
        case.expect_same(scores[:-2], "when another group is in the batch")
    else:
        alone = [case.score(*case.rows([row])) for row in range(len(case.images))]
        case.expect_same(torch.cat(alone), "when images are scored one at a time")
    nothing = case.rows([])
    try:
        case.score(*nothing)
    except _BrokenError:
        raise
    except Exception as error:
        wanted = f"an empty batch, {list(nothing[0].shape)}, must give shape [0]"
        raise _BrokenError(f"{wanted}; {raised(error)}") from error


def _sequences(case: _Case) -> None:
    """accepts lists and mixed sizes"""
    height, width = case.images.shape[2:]
    references = None if case.references is None else list(case.references)
    case.expect_same(case.score(list(case.images), references), "when a list is passed instead of a batch")
    half = (..., slice(0, max(1, height // 2)), slice(0, max(1, width // 2)))  # may be too small to score: NaN is right
    mixed = [case.images[0][half], *case.images[1:]]
    mixed_references = None if references is None else [references[0][half], *references[1:]]
    scores = case.score(mixed, mixed_references)
    if not case.in_groups:
        case.expect_same(scores[1:], "beside an image of another size", case.all_scores[1:])


def _order_and_layout(case: _Case) -> None:
    """does not depend on the order or the memory layout"""
    backwards = list(range(len(case.images)))[::-1]
    case.expect_same(case.score(*case.rows(backwards)), "with the order of the batch", case.all_scores[backwards])
    images = case.images.contiguous(memory_format=torch.channels_last)
    case.expect_same(case.score(images), "with the memory layout of the images")


def _half_precision(case: _Case) -> None:
    """computes in float32 for any input dtype"""
    for dtype in (torch.bfloat16, torch.float16):
        images, references = case.images.to(dtype), None if case.references is None else case.references.to(dtype)
        exact = case.score(images.float(), None if references is None else references.float())
        scores = case.score(images, references)
        _expect(scores.dtype == torch.float32, f"{dtype} images must give float32 scores, got {scores.dtype}")
        case.expect_same(scores, f"when the same pixels come as {dtype}", exact)


def _threads(case: _Case) -> None:
    """does not depend on thread, autocast or grad mode"""
    device = case.images.device.type
    states = [
        nullcontext, torch.no_grad, torch.enable_grad, torch.inference_mode,
        lambda: torch.autocast(device, dtype=torch.bfloat16),
    ]  # fmt: skip

    def score_in(state: Callable[[], Any]) -> Tensor:
        with state():
            return case.score()

    with ThreadPoolExecutor(max_workers=len(states)) as pool:
        for scores in pool.map(score_in, states * 2):
            case.expect_same(scores, "in threads under the caller's autocast or grad mode")


def _graph(case: _Case) -> None:
    """builds a graph if and only if it is differentiable"""
    images = case.images.clone().requires_grad_()
    scores = torch.zeros(())
    for mode, form in product((torch.enable_grad, torch.no_grad), (images, list(images))):
        with mode():
            scores = case.score(form)
        wanted = "a graph to the pixels" if case.reward.differentiable else "no graph"
        where = f"for a {type(form).__name__} under {mode.__name__}"
        _expect(
            scores.requires_grad == case.reward.differentiable,
            f"differentiable={case.reward.differentiable} promises {wanted}, also {where}",
        )
    if case.reward.differentiable:
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        _expect(gradient.isfinite().all(), "the gradient has non-finite values")
        zero = (gradient.flatten(1) == 0).all(1).nonzero().flatten().tolist()
        _expect(not zero, f"the gradient of images {zero} is zero at every pixel")


def _isolation(case: _Case) -> None:
    """gives NaN for a broken image and does not affect the others"""
    for value in (torch.nan, torch.inf):
        images = case.images.clone()
        images[0, 0, 0, 0] = value
        scores = case.score(images)
        _expect(scores[0].isnan(), f"an image with a {value} pixel must score NaN, got {scores[0].item()}")
        others = case.score(*case.rows(slice(1, None))) if case.in_groups else case.all_scores[1:]
        case.expect_same(scores[1:], f"when another image has a {value} pixel", others)


def _missing_columns(case: _Case) -> str | None:
    """refuses a call that lacks a column it needs"""
    given: dict[str, Any] = {"references": case.references, **case.columns(case.images)}
    needed = [name for name in COLUMNS if needs(case.reward, name)]
    for missing in needed:
        try:
            case.reward(case.images, **{name: column for name, column in given.items() if name != missing})
        except ValueError:
            continue
        raise _BrokenError(f"a call without `{missing}` must raise ValueError")
    return None if needed else "it needs only images"


def _direction(case: _Case) -> str | None:
    """scores degraded images lower"""
    if case.degraded is None:
        return "no degraded images were given"
    if case.in_groups:
        pairs, count = torch.cat([case.images, case.degraded]), len(case.images)
        references = None if case.references is None else case.references.repeat(2, 1, 1, 1)
        good, bad = case.score(pairs, references, ids=[*range(count)] * 2).split(count)
    else:
        good, bad = case.all_scores, case.score(case.degraded)
    lower = int((bad < good).sum())
    _expect(2 * lower > len(good), f"only {lower} of {len(good)} degraded images score lower; is the sign right?")
    return None


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _facts, _pickling, _output, _untouched, _bounds, _same_score, _one_and_none, _sequences, _order_and_layout,
    _half_precision, _threads, _graph, _isolation, _missing_columns, _direction,
)  # fmt: skip
