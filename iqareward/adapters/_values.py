"""What all adapters do alike: find the reward, convert pixels, score, and settle what an unscored image becomes."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from iqareward.images import ImageLike, drop_broken_gradients, to_images
from iqareward.rewards.calls import Call
from iqareward.rewards.catalog import load
from iqareward.types import Reward, Scores

_LOGGER = logging.getLogger(__name__)

ValueRange: TypeAlias = tuple[float, float]
"""(black, white) of floating-point pixels."""

OnNan: TypeAlias = Literal["raise", "mean", "worst", "nan"] | float
"""What a trainer receives for an image that was not scored (NaN). Everything but "raise" and "nan" is logged.

"raise": a ValueError that names the images, so that training stops; the default everywhere.
"mean": the mean of the images scored in the same call: close to no advantage.
"worst": the lowest score of the same call: unscored images are to be avoided.
"nan": NaN, for trainers that leave such rows out themselves.
a number: that number.
"""


def find_reward(
    reward: str | Reward,
    *,
    who: str,
    references: object = None,
    device: torch.device | str | None = None,
    differentiable: bool = False,
) -> Reward:
    """The reward of a name or sum of the catalogue, or the object itself; refuses one that cannot work here.

    Args:
        reward: `"qalign"`, `"0.7*qalign + 0.3*ssim"`, or an object with the reward contract.
        who: the adapter, for messages.
        references: the adapter's setting that says where references come from; None = nowhere.
        device: for weights of rewards that are loaded by name.
        differentiable: whether scores must carry a graph.

    Raises:
        ValueError: the reward needs references and the adapter has none, or has no gradient where one is needed.
    """
    found = load(reward, device=device, differentiable=differentiable) if isinstance(reward, str) else reward
    if found.needs_references and references is None:
        raise ValueError(
            f"{who} got reward {found.name!r}, which compares with references, and no `references`. "
            "Say where they come from with references=..., or choose a no-reference reward (`iqareward list`)."
        )
    if getattr(found, "needs_inputs", False):
        raise ValueError(
            f"{who} got reward {found.name!r}, which compares with the degraded inputs, and has none. "
            "Choose another one, or use the loop of iqareward.diffusion."
        )
    if differentiable and not found.differentiable:
        raise ValueError(
            f"{who} expected a differentiable reward, got {found.name!r}. Build it with differentiable=True."
        )
    return found


def score(
    reward: Reward,
    images: ImageLike,
    *,
    value_range: ValueRange | None,
    references: ImageLike | None = None,
    prompts: Sequence[str] | None = None,
    on_nan: OnNan = "raise",
) -> Scores:
    """Scores `[B]` of whatever a trainer hands over; an image without a score gets no gradient.

    Args:
        reward: with the contract of this library.
        images: anything that `iqareward.to_images` takes.
        value_range: (black, white) of floating-point images and references; None refuses floats.
        references: as images, one per image.
        prompts: one per image.
        on_nan: what becomes of images that were not scored.
    """
    converted = to_images(images, value_range=value_range)
    if isinstance(converted, Tensor):
        converted, device = drop_broken_gradients(converted), converted.device
    else:
        converted, device = [drop_broken_gradients(image) for image in converted], converted[0].device
    if references is not None:
        references = to_images(references, value_range=value_range, device=device)
    scores = Call(converted, references, prompts=prompts).score(reward)
    return settle(scores, on_nan, name=reward.name)


def settle(scores: Scores, on_nan: OnNan, *, name: str) -> Scores:
    """Replace every score that is not finite by what `on_nan` says.

    Args:
        scores: `[B]`, NaN = not scored.
        on_nan: see `OnNan`.
        name: The reward's name, for messages.

    Raises:
        ValueError: with "raise", for any image without a score; with "mean" and "worst", if no image has one.

    Example:
        >>> settle(torch.tensor([1.0, float("nan"), 3.0]), "mean", name="niqe")
        tensor([1., 2., 3.])
    """
    if on_nan == "nan":
        return torch.where(scores.isfinite(), scores, torch.nan)
    scored = scores.detach().isfinite()
    missing = torch.nonzero(~scored).flatten().tolist()
    if not missing:
        return scores
    what = f"{name} could not score images {missing} of {scores.shape[0]}"
    if on_nan == "raise" or (on_nan in ("mean", "worst") and len(missing) == scores.shape[0]):
        raise ValueError(
            f"{what}: non-finite pixels, pixels far outside the expected range, or sides too small for the metric. "
            f"Mend the images, or choose what they count as with on_nan= (now {on_nan!r})."
        )
    _LOGGER.warning("%s; on_nan=%r", what, on_nan)
    return torch.where(scored, scores, _substitute(scores.detach()[scored], on_nan))


def check_on_nan(on_nan: Any, *, allowed: Sequence[str], who: str) -> None:
    """Refuse, before training starts, a word that `settle` or this trainer does not know.

    Raises:
        ValueError: `on_nan` is neither one of `allowed` nor a finite number.
    """
    number = type(on_nan) in (int, float) and abs(on_nan) < float(
        "inf"
    )  # NaN fails the comparison; a bool is a mistake
    if not number and on_nan not in allowed:
        raise ValueError(f"{who} expected on_nan {', '.join(map(repr, allowed))} or a finite number, got {on_nan!r}.")


def column(key: str, rows: Sequence[Any] | Mapping[str, Any] | None, *, who: str) -> Any:
    """The entry `key` of each sample's metadata, or of one mapping of whole columns.

    Raises:
        ValueError: a sample has no such entry; the message lists those that it has.
    """
    if isinstance(rows, Mapping):
        return column(key, [rows], who=who)[0]
    rows = [None] if rows is None else rows
    for row in rows:
        if not isinstance(row, Mapping) or key not in row:
            got = f"keys {sorted(row)}" if isinstance(row, Mapping) else "none"
            raise ValueError(
                f"{who} expected {key!r} in the metadata of every sample, got {got}. "
                "Put it there in the dataset, next to the prompt."
            )
    return [row[key] for row in rows]


def framework(module: str, *, who: str, home: str) -> ModuleType:
    """Import a module of a trainer that the user brings along; ImportError says which and where it comes from."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{who} builds on `{module}`, which cannot be imported here ({error}). "
            f"It belongs to the trainer that uses this adapter; install that from {home}."
        ) from error


def _substitute(scored: Scores, on_nan: OnNan) -> Tensor:
    if on_nan == "mean":
        return scored.mean()
    if on_nan == "worst":
        return scored.amin()
    return scored.new_tensor(float(on_nan))
