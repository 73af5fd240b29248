"""Rewards that compare the rollouts of one input with each other: by their scores, or two images at a time."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from iqareward.advantages import win_rates
from iqareward.groups import check_ids
from iqareward.rewards.calls import Call
from iqareward.rewards.combine import exact
from iqareward.rewards.core import BaseReward, Wrapper, numbers, reward_mode, sanitize
from iqareward.types import Images, Reward, Scores

_ALONE = "no image has another scored image with the same id to be compared with"


@final
class RankInGroup(Wrapper):
    """The share of the other rollouts of its input that each image beats, from 0 to 1, where a tie counts half.

    Only the order of the scores within an input matters, so neither their scale nor an outlier does, and rewards of
    different scales can be added. It also means that the worst of eight good images gets 0, and that the mean of an
    input is always 0.5: watch the reward itself, in validation for instance, to see progress.

    An advantage that is divided by its standard deviation amplifies differences that are mere noise. With `margin` they
    are ties: an input whose images differ by no more than that gets 0.5 for each of them.

    An image without a score has no rank and counts as neither beaten nor better. An image whose input has no other
    scored image gets NaN, because there is nothing to compare it with; 0.5 would claim that it is average.

    Args:
        reward: Any reward that is not differentiable.
        margin: Differences of its scores that are not larger than this are ties. Measure it: score the same content
            twice, for instance after a shift by one pixel, and take the typical difference.
        name: Name of the result; by default made of the reward's name and `margin`.

    Raises:
        ValueError: The reward is differentiable (a rank has no gradient), or `margin` is negative or not finite.

    Example:
        >>> import torch, iqareward
        >>> clean = torch.full((4, 3, 16, 16), 0.5)
        >>> images = clean + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1)
        >>> RankInGroup(iqareward.load("psnr"))(images, references=clean, ids=[7, 7, 7, 9])
        tensor([1.0000, 0.5000, 0.0000,    nan])
    """

    def __init__(self, reward: Reward, *, margin: float = 0.0, name: str | None = None) -> None:
        super().__init__(reward)
        if reward.differentiable:
            raise ValueError(
                f"RankInGroup expected a reward without gradients, got {reward.name} with differentiable=True: the "
                "gradient of a rank is zero."
            )
        (self.margin,) = numbers("RankInGroup", margin=margin)
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"RankInGroup expected a finite `margin` >= 0 in units of the reward, got {margin}.")
        self.name = name or f"rank({reward.name}{f', margin={exact(self.margin)}' if margin else ''})"
        self.bounds, self.needs_ids = (0.0, 1.0), True

    def score_call(self, call: Call) -> Scores:
        ids = check_ids(self.name, call.check(self.name).ids)  # pyright: ignore[reportArgumentType]  # needs_ids
        scores = call.score(self.reward)
        with reward_mode(differentiable=False, device_type=scores.device.type):
            ids = ids.to(scores.device, non_blocking=True)
            ranks = win_rates(scores, ids, margin=self.margin).float()
        self._watch.look(self.name, ranks, call.images, call.references, call.inputs, otherwise=_ALONE)
        return ranks


@final
class PairsInGroup(BaseReward):
    """How often each image wins against other rollouts of its input, for a judge that compares two images.

    The score is the mean probability with which the judge prefers the image. It needs no model of how preferences
    arise. A Bradley-Terry fit, which also accounts for the strength of each opponent, would matter if images met few
    and unequal opponents; here all rollouts of an input meet each other, or equally many drawn without regard to them.

    Args:
        compare: `compare(first, second, **columns)` gets two lists of as many images, float32 `[3, H, W]` in [0, 1] on
            the device of the images, and returns `[P]` probabilities in [0, 1] that the first of each pair is better;
            anything else is no answer. A module-level function, or a method of an object, which is moved with this
            reward if it has `to`, `offload` and `onload`.
        columns: Which of "references", "inputs", "prompts" and "tasks" `compare` takes by these names, one per pair.
        pairs_per_image: An even number: each image meets this many others, its neighbours in a ring of the input's
            images in their order, so that the cost grows with their number and not with its square. The score then
            depends on who its neighbours are. None = all others.
        swap: Ask for each pair in both orders and average, because many judges prefer a position. Without it, each
            image of an odd group or a ring is first as often as second.
        batch_size: The most pairs per call of `compare`.
        max_bytes: The most bytes of images per call of `compare`, but at least one pair.
        name: Name of the reward; by default the `__name__` of `compare`.

    Raises:
        ValueError: An option is out of range, or `compare` has no name. When scoring: it does not return one number per
            pair.

    Example:
        >>> import torch
        >>> def prefer_brighter(first, second):
        ...     brightness = [torch.stack([image.mean() for image in images]) for images in (first, second)]
        ...     return torch.sigmoid(20 * (brightness[0] - brightness[1]))
        >>> images = torch.tensor([0.2, 0.4, 0.4, 0.9]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
        >>> PairsInGroup(prefer_brighter)(images, ids=[1, 1, 1, 2])
        tensor([0.0180, 0.7410, 0.7410,    nan])
    """

    bounds = (0.0, 1.0)
    needs_ids = True

    def __init__(
        self,
        compare: Callable[..., Tensor],
        *,
        columns: Sequence[str] = (),
        pairs_per_image: int | None = None,
        swap: bool = True,
        batch_size: int = 8,
        max_bytes: int = 2**29,
        name: str | None = None,
    ) -> None:
        if not callable(compare):
            raise TypeError(
                f"PairsInGroup expected a function compare(first, second), got {compare!r}. RankInGroup(reward) ranks "
                "the scores of a reward."
            )
        self.name = name or getattr(compare, "__name__", "")
        known = ("references", "inputs", "prompts", "tasks")
        if not self.name:
            raise ValueError(f"PairsInGroup expected `name`, because {compare!r} has no __name__.")
        sequence: Any = columns
        if isinstance(columns, str) or not isinstance(sequence, Iterable) or not set(columns) <= set(known):
            raise ValueError(f"PairsInGroup expected `columns` as a list of names out of {known}, got {columns!r}.")
        numbers("PairsInGroup", batch_size=batch_size, max_bytes=max_bytes, pairs_per_image=pairs_per_image or 0)
        if pairs_per_image is not None and (pairs_per_image < 2 or pairs_per_image % 2):
            raise ValueError(
                f"PairsInGroup expected `pairs_per_image` as an even number >= 2 or None, got {pairs_per_image}."
            )
        if batch_size < 1 or max_bytes < 1:
            raise ValueError(f"PairsInGroup expected batch_size and max_bytes >= 1, got {batch_size} and {max_bytes}.")
        self.compare, self.columns = compare, tuple(columns)
        self.pairs_per_image, self.swap = pairs_per_image, swap
        self.batch_size, self.max_bytes = batch_size, max_bytes
        for column in columns:
            setattr(self, f"needs_{column}", True)

    def score_call(self, call: Call) -> Scores:
        ids = check_ids(self.name, call.check(self.name).ids)  # pyright: ignore[reportArgumentType]  # needs_ids
        if not len(call):
            return torch.zeros(0, device=call.device)
        with reward_mode(differentiable=False, device_type=str(call.device and call.device.type)):
            cleaned, valid = _cleaned(call)
            # who meets whom is decided on the host, which waits for the device, as most judges do anyway
            groups: dict[int, list[int]] = {}
            for row, (one, usable) in enumerate(zip(ids.tolist(), valid.tolist(), strict=True)):
                if usable:
                    groups.setdefault(one, []).append(row)
            pairs = [pair for rows in groups.values() for pair in _ring(rows, self.pairs_per_image)]
            wins = self._ask(cleaned, pairs)
            if self.swap:
                wins = (wins + 1 - self._ask(cleaned, [(later, earlier) for earlier, later in pairs])) / 2
            met = wins.isfinite().double()
            wins = torch.where(wins.isfinite(), wins, 0.0)
            first, second = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(wins.device).unbind(1)
            points = torch.zeros(2, len(call), dtype=torch.float64, device=wins.device)
            points.index_add_(1, first, torch.stack([wins, met])).index_add_(1, second, torch.stack([met - wins, met]))
            scores = (points[0] / points[1]).float()
        reason = f"{_ALONE}, or the judge answered with no probability in [0, 1]"
        self._watch.look(self.name, scores, call.images, call.references, call.inputs, otherwise=reason)
        return scores

    def _ask(self, call: Call, pairs: list[tuple[int, int]]) -> Tensor:
        """`[P]` float64 answers."""
        answers, start = [torch.zeros(0, dtype=torch.float64, device=call.device)], 0
        asked = call.rows([first for first, _ in pairs])
        # two rollouts of an input are about as large as each other
        for piece in asked.pieces(self.batch_size, self.max_bytes // 2) if pairs else ():
            opponents = [call.images[second] for _, second in pairs[start : start + len(piece)]]
            columns = {name: getattr(piece, name) for name in self.columns}
            found = self.compare(piece.images, opponents, **columns)
            if not isinstance(found, Tensor) or found.shape != (len(piece),):
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"{self.name} expected `compare` to return a tensor with one probability per pair, shape "
                    f"[{len(piece)}], got {got}."
                )
            answers.append(torch.where((found >= 0) & (found <= 1), found, torch.nan).to(answers[0]))
            start += len(piece)
        return torch.cat(answers)

    def _moved(self) -> Iterable[Any]:
        return (getattr(self.compare, "__self__", self.compare),)


def _ring(rows: Sequence[int], pairs_per_image: int | None) -> list[tuple[int, int]]:
    """The pairs to compare: each row with its next ones in a ring of all."""
    size, pairs = len(rows), list[tuple[int, int]]()
    farthest = size // 2 if pairs_per_image is None else min(size, pairs_per_image) // 2
    for step in range(1, farthest + 1):
        starts = size // 2 if 2 * step == size else size  # the opposite row of a ring is met from both sides
        pairs += [(rows[start], rows[(start + step) % size]) for start in range(starts)]
    return pairs


def _cleaned(call: Call) -> tuple[Call, Tensor]:
    """The call with rows of clean images, and `[B]` whether all images of a row may be scored."""
    valid: list[Tensor] = []

    def clean(images: Images | None) -> list[Tensor] | None:
        if images is None:
            return None
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        found = [sanitize(batch) for batch in batches]
        valid.append(torch.cat([each for _, each in found]))
        return [row for batch, _ in found for row in batch]

    rows: Any = clean(call.images)
    call = replace(call, images=rows, references=clean(call.references), inputs=clean(call.inputs))
    return call, torch.stack(valid).all(0)
