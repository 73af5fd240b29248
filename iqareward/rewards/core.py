"""The reward contract: the base of every reward, and the three kinds of reward built on it.

`ImageReward` scores images by a function on clean batches, `Combined` makes one score of the scores of several rewards,
and `Wrapper` decides when and how another reward is called.
"""

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iqareward.functional._chunks import rows_at_once
from iqareward.functional._fused import clean
from iqareward.rewards.calls import COLUMNS, Bucket, Call, shape_buckets
from iqareward.rewards.loading import LazyModel, as_current
from iqareward.types import Bounds, Groups, Images, Reward, Scores, needs

# Decoders overshoot [0, 1] a little, and such images are clamped. Images that leave it by more than this were never
# in [0, 1] (a forgotten [-1, 1] or [0, 255]); they are not scored, because a clamped one would get a plausible wrong
# number.
RANGE_SLACK = 0.25

_reasons: ContextVar[list[str] | None] = ContextVar("reasons", default=None)


class BaseReward(ABC):
    """The attributes, the call, and the device moves that every reward shares.

    A class of yours derives from `ImageReward`, `Combined` or `Wrapper` rather than from this one.

    Attributes:
        name: short identifier, used as key of components and in logs.
        bounds: (low, high) of every score; None = unbounded on that side.
        needs_references: whether a call without `references` is an error.
        needs_inputs: whether a call without `inputs` is an error.
        needs_prompts: whether a call without `prompts` is an error.
        needs_ids: whether scores depend on the other rollouts of an input, and a call without `ids` is an error.
        needs_tasks: whether a call without `tasks` is an error.
        differentiable: whether scores carry a graph back to the input pixels.
    """

    name: str
    bounds: Bounds = (None, None)
    needs_references: bool = False
    needs_inputs: bool = False
    needs_prompts: bool = False
    needs_ids: bool = False
    needs_tasks: bool = False
    differentiable: bool = False

    _is_offloaded = False

    @final
    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        ids: Groups | None = None,
        tasks: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image.

        Args:
            images: `[B, 3, H, W]` float RGB in [0, 1] on any device, or a sequence of `[3, H, W]`.
            references: The ground truth, with the shapes and the device of `images`.
            inputs: The degraded images that were restored, one per image on the same device; sizes may differ.
            prompts: One text per image.
            ids: One integer per image, the same for all rollouts of an input.
            tasks: What is to be restored in each image, such as "deblur".
            **ignored: Anything else a trainer passes.

        Returns:
            `[B]` float32 on the device of `images`, higher is better, NaN = not scored.

        Raises:
            ValueError: Shapes are wrong, or a column that the reward needs is missing or does not match.
            TypeError: Images are not floating-point tensors.
            RuntimeError: The reward is offloaded.
        """
        return self.score_call(self._call(images, references, inputs, prompts, ids, tasks))

    @property
    def parts(self) -> tuple[Reward, ...]:
        """The rewards whose scores make up this one's, for logs; none unless it is `Combined`."""
        return ()

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, or choose where they will be loaded; undoes `offload` and returns the reward itself."""
        self._each("to", device)
        object.__setattr__(self, "_is_offloaded", False)  # of a frozen dataclass as well
        return self

    def offload(self) -> None:
        """Free the device memory of the weights, for example while the model trains; calls fail until `onload`."""
        object.__setattr__(self, "_is_offloaded", True)
        self._each("offload")

    def onload(self) -> None:
        """Bring the weights back to where they were before `offload`."""
        self._each("onload")
        object.__setattr__(self, "_is_offloaded", False)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_is_offloaded"}

    @abstractmethod
    def score_call(self, call: Call) -> Scores:
        """Score a call.

        Args:
            call: The images, the other columns that the reward needs, and the prompts if there are any.

        Returns:
            `[B]` float32 on the device of the images, higher is better, NaN = not scored.
        """

    @cached_property
    def _watch(self) -> "_UnscoredWatch":
        return _UnscoredWatch()

    def _moved(self) -> Iterable[Any]:
        """The rewards and models that move with this reward."""
        return ()

    def _each(self, method: str, *arguments: Any) -> None:
        for each in self._moved():
            if hasattr(each, method):  # a reward of another package may have nothing to move
                getattr(each, method)(*arguments)

    def _call(
        self,
        images: Images,
        references: Images | None = None,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        ids: Groups | None = None,
        tasks: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Call:
        if self._is_offloaded:
            raise RuntimeError(f"{self.name} is offloaded; call .onload() before scoring.")
        return Call(images, references, inputs, prompts, ids, tasks).for_reward(self)

    def _take_facts(self, rewards: Sequence[Reward]) -> None:
        """Need what any of the rewards needs, and be differentiable if all are."""
        for name in COLUMNS:
            setattr(self, f"needs_{name}", any(needs(reward, name) for reward in rewards))
        self.differentiable = all(reward.differentiable for reward in rewards)


class ImageReward(BaseReward):
    """A reward that scores clean batches with one function; this class does the rest of the contract.

    It checks images of any sizes, groups them by size, cuts the groups to a memory budget, and cleans and moves them
    to where the weights are. An image that cannot be scored gets NaN and affects no other. The function runs in
    float32 without autocast, and with a graph exactly if the reward is `differentiable`, whatever the caller's mode.

    Derive from it: set `name` and the other facts, and write `score_batch`. Weights go into `self.model_loader`.

    Attributes:
        min_side: images with a shorter side are not scored.
        batch_size: images per call of `score_batch`; None = as many as stay in a CPU's cache, or fit the memory budget
            of another device. With `differentiable`, images that do not all fit are scored again in the backward pass,
            part by part, so that only one part's graph exists at a time.
        bytes_per_pixel: memory that `score_batch` needs on a device for each pixel of an image, including the clean
            copies and, with `differentiable`, the graph.
        model_loader: the weights; None if there are none.

    Example:
        >>> import torch
        >>> class Brightness(ImageReward):
        ...     name, bounds = "brightness", (0.0, 1.0)
        ...     def score_batch(self, images):
        ...         return images.mean((1, 2, 3))
        >>> Brightness()([torch.ones(3, 8, 8), torch.full((3, 4, 6), torch.nan)])
        tensor([1., nan])
    """

    min_side: int = 1
    batch_size: int | None = None
    bytes_per_pixel: float = 1024
    model_loader: LazyModel | None = None

    _recomputes_layers = False  # in the backward pass, by itself

    @abstractmethod
    def score_batch(self, images: Tensor, *others: Any, **columns: Any) -> Tensor:
        """Score a clean batch.

        Args:
            images: Float32 `[b, 3, H, W]` in [0, 1], on the device of the weights.
            others: Not used.
            columns: `references` `[b, 3, H, W]`, `inputs` `[b, 3, h, w]`, `prompts`, `tasks` and `ids`, each only if
                the reward needs it.

        Returns:
            `[b]`, higher is better. An image's score must not depend on its batch.
        """

    def score_call(self, call: Call) -> Scores:
        scores = self._rows(self.score_batch, call)
        self._watch.look(self.name, scores, call.images, call.references, call.inputs, min_side=self.min_side)
        return scores

    def _moved(self) -> Iterable[Any]:
        return () if self.model_loader is None else (self.model_loader,)

    @property
    def _loader(self) -> LazyModel:
        assert self.model_loader is not None
        return self.model_loader

    def _rows(self, measure: Callable[..., Tensor], call: Call, *width: int) -> Tensor:
        """`[B, *width]` float32 on the images' device: `measure` of clean batches, and NaN for broken images."""
        if not self.bytes_per_pixel > 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"{self.name} expected `bytes_per_pixel` > 0, and `batch_size` >= 1 or None, got "
                f"{self.bytes_per_pixel} and {self.batch_size}."
            )
        if call.prompts is not None and not self.needs_prompts:
            call = replace(call, prompts=None)
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):  # stacking is part of the graph
            buckets, order = shape_buckets(self.name, call)
        if not buckets:
            return torch.zeros(0, *width, dtype=torch.float32, device=call.device)
        images_on = buckets[0].images.device
        with reward_mode(differentiable=self.differentiable, device_type=images_on.type):
            device = self._device(buckets[0].images)
            with as_current(device):
                return _in_order(self._of_buckets(measure, buckets, device, width).to(images_on), order)

    def _device(self, images: Tensor) -> torch.device:
        """The device to compute on: that of the weights, which are loaded if need be, else that of the images."""
        if self.model_loader is None:
            return images.device
        self._loader.ready(images)
        return self._loader.device

    def _rows_at_once(self, size: Sequence[int], device: torch.device) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return rows_at_once(size, device, bytes_per_pixel=self.bytes_per_pixel)

    def _of_buckets(
        self, measure: Callable[..., Tensor], buckets: list[Bucket], device: torch.device, width: tuple[int, ...]
    ) -> Tensor:
        sizes = [self._rows_at_once(bucket.images.shape[2:], device) for bucket in buckets]
        score: Callable[..., Any] = partial(self._of_piece, measure, device, width)
        fits = sum(bucket.num_rows / size for bucket, size in zip(buckets, sizes, strict=True)) <= 1
        # pieces that fit a CPU's cache do not bound the memory, unless the user chose their size
        bounded = self.batch_size is not None or device.type != "cpu"
        if self.differentiable and bounded and not fits and not self._recomputes_layers:
            score = partial(recomputed, score)
        rows = [score(*piece) for bucket, size in zip(buckets, sizes, strict=True) for piece in bucket.split(size)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _of_piece(
        self, measure: Callable[..., Tensor], device: torch.device, width: tuple[int, ...], *piece: Any
    ) -> Tensor:
        """Clean a piece, measure it, and mask what was not valid."""
        images, references, inputs, labels = piece
        shape = (images.shape[0], *width)
        if min(images.shape[2:]) < self.min_side:
            return torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        same_size = [images] if references is None else [images, references]
        cleaned, checks = clean([batch.to(device) for batch in same_size], -RANGE_SLACK, 1 + RANGE_SLACK)
        valid, columns = checks.all(0), labels if references is None else {"references": cleaned[1], **labels}
        if inputs is not None:
            (given,), checks = clean([inputs.to(device)], -RANGE_SLACK, 1 + RANGE_SLACK)
            valid, columns = valid & checks[0], {**columns, "inputs": given}
        found = measure(cleaned[0], **columns)
        if found.shape != shape:
            raise ValueError(
                f"{self.name} expected its metric to return one score per image, shape {list(shape)}, got "
                f"{list(found.shape)}. Reduce over channels and pixels, never over the batch."
            )
        return masked(found, valid)


class Combined(BaseReward):
    """One score from the scores of several rewards; facts, `to`, `offload` and `onload` follow from the parts.

    Args:
        parts: Rewards with unique names.
        name: The name of the combination.
        bounds: The lowest and highest score it can give; None = unbounded on that side.

    Raises:
        ValueError: There are no parts, or two have the same name.

    Example:
        >>> import torch, iqareward
        >>> class Product(Combined):
        ...     def combine_rows(self, rows):
        ...         return rows.prod(0)
        >>> reward = Product([iqareward.load("ssim"), iqareward.load("haarpsi")], name="product", bounds=(-1.0, 1.0))
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1.])
    """

    def __init__(self, parts: Sequence[Reward], *, name: str, bounds: Bounds) -> None:
        check_names(type(self).__name__, parts)
        self._parts, self.name, self.bounds = tuple(parts), name, bounds
        self._take_facts(parts)

    @property
    def parts(self) -> tuple[Reward, ...]:
        """The rewards whose scores make up this one's."""
        return self._parts

    @final
    def combine(self, scores: Mapping[str, Scores]) -> Scores:
        """The combined score from what `evaluate(self.parts, ...)` gave: components and total from one evaluation.

        Args:
            scores: `[B]` of each part, by its name.

        Returns:
            `[B]` float32, higher is better, NaN = not scored.
        """
        rows = [scores[part.name] for part in self._parts]
        with reward_mode(differentiable=self.differentiable, device_type=rows[0].device.type):
            return self.combine_rows(torch.stack(rows))

    @abstractmethod
    def combine_rows(self, rows: Tensor) -> Scores:
        """One score per image.

        Args:
            rows: `[parts, B]` float32, NaN = not scored.

        Returns:
            `[B]`, NaN where it should be.
        """

    def score_call(self, call: Call) -> Scores:
        return self.combine({part.name: call.score(part) for part in self._parts})

    def _moved(self) -> Iterable[Any]:
        return self._parts


class Wrapper(BaseReward):
    """A reward that decides how another one is called; facts, `to`, `offload` and `onload` are forwarded.

    Args:
        reward: The reward to call.

    Example:
        >>> import torch, iqareward
        >>> class Rounded(Wrapper):
        ...     def score_call(self, call):
        ...         return call.score(self.reward).round()
        >>> Rounded(iqareward.load("ssim"))(torch.ones(1, 3, 16, 16), references=torch.ones(1, 3, 16, 16))
        tensor([1.])
    """

    def __init__(self, reward: Reward) -> None:
        check_names(type(self).__name__, [reward])
        self.reward = reward
        self.name, self.bounds = reward.name, reward.bounds
        self._take_facts([reward])

    def _moved(self) -> Iterable[Any]:
        return (self.reward,)


def masked(found: Tensor, valid: Tensor | None = None) -> Tensor:
    """`found` `[b, ...]` as float32, NaN for rows that are not `valid` `[b]` or not finite."""
    found = found.float()
    intact = found.abs() < torch.inf
    if found.ndim > 1:
        intact = intact.flatten(1).all(1)
    if valid is not None:
        intact = valid & intact
    return torch.where(intact.view(-1, *[1] * (found.ndim - 1)), found, torch.nan)


def _in_order(rows: Tensor, order: list[int] | None) -> Tensor:
    """The rows in the order that `shape_buckets` gave, without copying an index to the device."""
    if order is None:
        return rows
    views = rows.unbind(0)
    return torch.stack([views[i] for i in order])


def check_names(who: str, rewards: Sequence[Reward]) -> None:
    """Refuse an empty list of rewards, anything in place of rewards, and rewards with the same name."""
    if not isinstance(rewards, Iterable):
        raise TypeError(f"{who} expected a list of rewards, got {type(rewards).__name__}.")
    for reward in rewards:
        if isinstance(reward, str):
            raise TypeError(f"{who} expected rewards, got the name {reward!r}. iqareward.load({reward!r}) makes one.")
        if not (callable(reward) and hasattr(reward, "name")):
            raise TypeError(
                f"{who} expected rewards, got {reward!r}. Make one of a metric with NoReference(metric, "
                "higher_is_better=...) or FullReference(metric, higher_is_better=...)."
            )
    names = [reward.name for reward in rewards]
    if not names:
        raise ValueError(f"{who} expected at least one reward, got none.")
    if len(set(names)) < len(names):
        raise ValueError(f"{who} expected rewards with unique names, got {names}. Pass name=... to tell them apart.")


def numbers(who: str, **options: Any) -> tuple[float, ...]:
    """Options that are numbers, as floats; text and all else are refused by name."""
    for argument, value in options.items():
        if (
            isinstance(value, str)
            or not hasattr(value, "__float__")
            or (isinstance(value, Tensor) and value.numel() != 1)
        ):
            raise TypeError(f"{who} expected `{argument}` as a number, got {value!r}.")
    try:
        return tuple(map(float, options.values()))
    except OverflowError as error:  # an integer of hundreds of digits
        names = ", ".join(f"`{argument}`" for argument in options)
        raise ValueError(f"{who} expected numbers that are finite in float64 as {names}, got a larger one.") from error


def refuse_groups(who: str, reward: Any) -> None:
    """Refuse a reward that compares the rollouts of an input, for a caller that does not keep them together."""
    if needs(reward, "ids"):
        raise ValueError(
            f"{who} expected a reward that scores each image on its own, got {reward.name}, which compares the "
            "rollouts of an input with each other and must see them together. Give it the reward inside; wrappers go "
            "inside the comparison, as in RankInGroup(Cached(reward))."
        )


class UnscoredWarning(RuntimeWarning):
    """A reward scored no image of a batch, so that a trainer would learn nothing from it."""


@contextmanager
def collect_reasons() -> Generator[list[str]]:
    """Within the block, a reward that scores no image of a batch adds the reason to a list, in place of the warning.

    Every call is looked at, on any device, and each reward of a sum speaks for itself. Score an image alone to learn
    why it has no score.

    Yields:
        The reasons so far, each `"<name of the reward>: <reason>"`.

    Example:
        >>> import iqareward
        >>> with collect_reasons() as reasons:
        ...     score = iqareward.load("piqe")(torch.zeros(1, 3, 4, 4))
        >>> score, reasons
        (tensor([nan]), ['piqe: the image has a side shorter than 16 pixels'])
    """
    reasons: list[str] = []
    token = _reasons.set(reasons)
    try:
        yield reasons
    finally:
        _reasons.reset(token)


@final
class _UnscoredWatch:
    """Warns once per reward that it scored no image, and why: most often a forgotten conversion of pixels.

    Looking at scores waits for their device. On a CPU that costs nothing, so every call is looked at; on other devices
    only the first one is.
    """

    def __init__(self) -> None:
        self._has_looked = self._has_warned = False

    def __reduce__(self) -> tuple[type["_UnscoredWatch"], tuple[()]]:
        return _UnscoredWatch, ()

    def look(
        self,
        name: str,
        scores: Scores,
        images: Images,
        references: Images | None = None,
        inputs: Images | None = None,
        *,
        min_side: int = 1,
        otherwise: str = "it has no finite value for these images",
    ) -> None:
        """Warn if all scores are NaN; `otherwise` is the reason if the pixels do not show one."""
        if scores.shape[0] == 0 or torch.compiler.is_compiling():
            return
        reasons = _reasons.get()
        if reasons is None and (self._has_warned or (self._has_looked and scores.device.type != "cpu")):
            return
        self._has_looked = True
        if bool(scores.isnan().all()):
            why = "; ".join(why_unscored(images, references=references, inputs=inputs, min_side=min_side)) or otherwise
            if reasons is not None:
                reasons.append(f"{name}: {why}")
                return
            self._has_warned = True
            warnings.warn(f"{name} scored no image of this batch: {why}.", UnscoredWarning, _first_foreign_frame())


def why_unscored(images: Images, *, min_side: int = 1, **others: Images | None) -> Iterator[str]:
    """The reasons, found in the pixels, why images cannot be scored; waits for their device."""
    num_small = sum(min(row.shape[-2:]) < min_side for row in images)
    if num_small:
        yield f"{_some(num_small, len(images), 'images', 'has', 'have')} a side shorter than {min_side} pixels"
    for argument, rows in {"images": images, **others}.items():
        if rows is None:
            continue
        pixels = [row.detach().float() for row in rows]
        spans: list[list[float]] = torch.stack([torch.stack((row.amin(), row.amax())) for row in pixels]).tolist()
        finite = [(low, high) for low, high in spans if math.isfinite(low) and math.isfinite(high)]
        if len(finite) < len(spans):
            num_broken = len(spans) - len(finite)
            yield f"{_some(num_broken, len(spans), argument, 'has', 'have')} NaN or infinite pixels"
        outside = [(low, high) for low, high in finite if low < -RANGE_SLACK or high > 1 + RANGE_SLACK]
        if outside:
            low, high = min(low for low, _ in outside), max(high for _, high in outside)
            looks, value_range = _likely_range(low, high)
            yield (
                f"{_some(len(outside), len(spans), argument, 'lies', 'lie')} outside [0, 1]: values span {low:.4g} to "
                f"{high:.4g}{looks}; convert them with iqareward.to_images({argument}, value_range={value_range})"
            )


def _some(count: int, total: int, argument: str, has: str, have: str) -> str:
    return f"the {argument.removesuffix('s')} {has}" if total == 1 else f"{count} of {total} {argument} {have}"


def _likely_range(low: float, high: float) -> tuple[str, str]:
    """What values from `low` to `high` look like, a decoder's overshoot allowed for, and the range to state."""
    if low >= -0.6 and high <= 1.6:
        return ", which looks like [-1, 1] or like a sampler that overshoots (then clamp)", "(-1, 1)"
    if low >= -1.5 and high <= 1.5:
        return ", which looks like [-1, 1]", "(-1, 1)"
    if low >= -64 and 16 < high <= 320:
        return ", which looks like [0, 255]", "(0, 255)"
    return "", "(black, white)"


def _first_foreign_frame() -> int:
    """The `stacklevel` that makes a warning point at the code that called this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "iqareward":
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def reward_mode(*, differentiable: bool, device_type: str = "cpu") -> Generator[None]:
    """Compute as a reward must: no autocast, no inference mode, a graph exactly when `differentiable`.

    Grad mode and autocast are thread-local, and trainers call rewards from thread pools, so a reward sets both itself.
    Autocast is off on the CPU, on CUDA, since images and weights may be on either, and on the device type named.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(differentiable))
        for kind in dict.fromkeys(("cpu", "cuda", device_type)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def sanitize(images: Tensor) -> tuple[Tensor, Tensor]:
    """Make a batch safe to score, and say which of its images may be scored.

    Args:
        images: `[B, 3, H, W]`, any floating dtype.

    Returns:
        Float32 images in [0, 1], mid-grey where not valid; and `[B]` bool: all pixels finite and within `RANGE_SLACK`
        of [0, 1]. Gradients reach the pixels of valid images that lie in [0, 1], bounds included.
    """
    (cleaned,), valid = clean([images], -RANGE_SLACK, 1 + RANGE_SLACK)
    return cleaned, valid[0]


def recomputed(score: Callable[..., Tensor], *inputs: Any) -> Any:
    """`score(*inputs)`, which is called again in the backward pass, so that its graph is not kept until then."""
    # autograd saves no inference tensors, not even for a graph that is never used
    saved = (each.clone() if isinstance(each, Tensor) and each.is_inference() else each for each in inputs)
    return checkpoint(score, *saved, use_reentrant=False)
