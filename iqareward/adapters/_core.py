"""What all adapters share: finding the reward, converting the trainer's values, and images without a score."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from iqareward.images import ImageLike, drop_broken_gradients, to_images
from iqareward.rewards.calls import Call
from iqareward.rewards.catalog import load
from iqareward.rewards.loading import ImageDevice
from iqareward.types import Images, Reward, Scores

_LOGGER = logging.getLogger(__name__)

ValueRange: TypeAlias = tuple[float, float]
"""(black, white) of floating-point pixels."""

OnNan: TypeAlias = Literal["raise", "mean", "worst", "nan"] | float
"""What a trainer receives for an image that was not scored. Every substitute but NaN is logged.

"raise": a ValueError that names the images, so that training stops; the default everywhere.
"mean": the mean of the images scored in the same call, which gives nearly no advantage.
"worst": the lowest score of the same call.
"nan": NaN, for trainers that leave such rows out themselves.
a number: that number.
"""

UNIT: ValueRange = (0.0, 1.0)


@final
class Scorer:
    """A reward as an adapter calls it: with the trainer's images, and scores that the trainer can take.

    Args:
        reward: A name or sum of the catalogue, or any reward.
        who: The adapter's name, for error messages.
        sources: The adapter's settings that say where `references`, `inputs` and `prompts` come from, by these names.
            None means that the user named no source; a column that is missing here is one that the trainer lacks.
            Prompts count as available unless they are listed.
        value_range: Range of floating-point images; None refuses them.
        on_nan: What becomes of images that were not scored.
        policies: The words that `on_nan` may be here.
        device: Where the weights of a reward given by name are loaded.
        moves_images: Whether images are moved to `device` as well.
        differentiable: Whether scores must carry a graph.

    Raises:
        ValueError: The reward needs a column that is not there, has no gradient where one is needed, or `on_nan` is
            unknown.
    """

    def __init__(
        self,
        reward: str | Reward,
        *,
        who: str,
        sources: Mapping[str, object] | None = None,
        value_range: ValueRange | None = UNIT,
        on_nan: OnNan = "raise",
        policies: Sequence[str] = ("raise", "mean", "worst"),
        device: torch.device | str | None = None,
        moves_images: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_on_nan(on_nan, policies, who=who)
        self.reward = find_reward(reward, who=who, sources=sources, device=device, differentiable=differentiable)
        self.value_range = value_range
        self.on_nan: OnNan = on_nan
        self._device = ImageDevice(device if moves_images else None, name=who)

    def __call__(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        *,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        no_image: float = torch.nan,
    ) -> Scores:
        """`[B]` scores; an image of a sequence may be None, and gets `no_image`, where NaN counts as not scored."""
        missing = isinstance(images, list | tuple) and any(image is None for image in images)
        if not missing and len(images):
            return self.settled(self.call(images, references, inputs=inputs, prompts=prompts).score(self.reward))
        scores = torch.full((len(images),), no_image)
        rows = [row for row, image in enumerate(images) if image is not None]
        if rows:
            found, *columns = (
                column if column is None else [column[row] for row in rows]
                for column in (images, references, inputs, prompts)
            )
            call = self.call(found, columns[0], inputs=columns[1], prompts=columns[2])
            scores[rows] = call.score(self.reward).detach().cpu()
        return self.settled(scores)

    def call(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        *,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Call:
        """Convert what the reward needs; an image without a score gets no gradient."""
        converted = self.images(images)
        device = converted[0].device
        return Call(
            converted,
            self.images(references, device) if self.reward.needs_references else None,
            self.images(inputs, device) if getattr(self.reward, "needs_inputs", False) else None,
            prompts,
        )

    def images(self, images: ImageLike, device: torch.device | None = None) -> Images:
        """Images as the reward takes them, on `device` or where this adapter moves them."""
        converted = to_images(images, value_range=self.value_range, device=device or self._device.get())
        if isinstance(converted, Tensor):
            return drop_broken_gradients(converted)
        return [drop_broken_gradients(image) for image in converted]

    def settled(self, scores: Scores) -> Scores:
        """The scores, with what `on_nan` says in place of those that are not finite."""
        return settle(scores, self.on_nan, name=self.reward.name)


def find_reward(
    reward: str | Reward,
    *,
    who: str,
    sources: Mapping[str, object] | None = None,
    device: torch.device | str | None = None,
    differentiable: bool = False,
) -> Reward:
    """Load a reward by its name, or take the object itself; arguments and errors are those of `Scorer`."""
    found = load(reward, device=device, differentiable=differentiable) if isinstance(reward, str) else reward
    sources = {"prompts": True} | dict(sources or {})
    for column in ("references", "inputs", "prompts"):
        if not getattr(found, f"needs_{column}", False) or sources.get(column) is not None:
            continue
        hint = f"Say where they come from with {column}=..., or choose" if column in sources else "Choose"
        raise ValueError(
            f"{who} got reward {found.name!r}, which needs `{column}`, and has none. {hint} another reward "
            "(`iqareward list`)."
        )
    if differentiable and not found.differentiable:
        raise ValueError(
            f"{who} expected a differentiable reward, got {found.name!r}, whose gradient to the pixels would be zero. "
            "Build it with differentiable=True."
        )
    return found


def settle(scores: Scores, on_nan: OnNan, *, name: str) -> Scores:
    """Replace every score that is not finite by what `on_nan` says.

    Raises:
        ValueError: With "raise", any image without a score; with "mean" and "worst", if no image has one.

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
    finite = scores.detach()[scored]
    if on_nan == "mean":
        return torch.where(scored, scores, finite.mean())
    return torch.where(scored, scores, finite.amin() if on_nan == "worst" else float(on_nan))


def check_on_nan(on_nan: Any, policies: Sequence[str], *, who: str) -> None:
    """Refuse an `on_nan` that is neither one of `policies` nor a finite number, before training starts."""
    # NaN fails the comparison; a bool is a mistake
    is_number = type(on_nan) in (int, float) and abs(on_nan) < float("inf")
    if not is_number and on_nan not in policies:
        raise ValueError(f"{who} expected on_nan {', '.join(map(repr, policies))} or a finite number, got {on_nan!r}.")


def column(source: str | None, metadata: Any, *, who: str, **fields: Any) -> Any:
    """One value per sample: a field that the trainer has for all of them, or a key of each sample's metadata.

    Args:
        source: One of `fields`, or a key of the metadata; None gives None.
        metadata: A mapping for each sample, one mapping of whole columns, or None.
        who: The adapter's name, for error messages.
        fields: The trainer's own fields by the name that the user gives them; None if this call has no such field.

    Raises:
        ValueError: The field or key is missing; the message lists the keys that there are.
    """
    if source is None:
        return None
    if source in fields:
        if fields[source] is None:
            raise ValueError(
                f"{who} expected `{source}` for every sample, got none. Name a key of the metadata instead, or use the "
                "trainer's script that passes them."
            )
        return fields[source]
    whole = isinstance(metadata, Mapping)
    rows: Sequence[Any] = [metadata] if whole or metadata is None else metadata
    for row in rows:
        if not isinstance(row, Mapping) or source not in row:
            got = f"keys {sorted(row)}" if isinstance(row, Mapping) else "none"
            raise ValueError(
                f"{who} expected {source!r} in the metadata of every sample, got {got}. "
                "Put it there in the dataset, next to the prompt."
            )
    return rows[0][source] if whole else [row[source] for row in rows]


def framework(module: str, *, who: str, home: str) -> ModuleType:
    """Import a module of a trainer that the user brings along; ImportError says which and where it comes from."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{who} builds on `{module}`, which cannot be imported here ({error}). "
            f"It belongs to the trainer that uses this adapter; install that from {home}."
        ) from error
