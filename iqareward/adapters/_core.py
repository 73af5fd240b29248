"""Code that all adapters share: find the reward, convert the trainer's values, and handle images without a score."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from iqareward.images import ImageLike, drop_broken_gradients, to_images
from iqareward.rewards.calls import COLUMNS, Call
from iqareward.rewards.catalog import load
from iqareward.rewards.core import check_names
from iqareward.rewards.loading import ImageDevice
from iqareward.rewards.specs import Spec
from iqareward.types import Groups, Images, Reward, Scores, needs

_LOGGER = logging.getLogger(__name__)

ValueRange: TypeAlias = tuple[float, float]
"""(black, white) of floating-point pixels."""

OnNan: TypeAlias = Literal["raise", "mean", "worst", "nan"] | float
"""The value that a trainer receives for an image without a score. Every value but NaN is logged.

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

    `sources` are the adapter's settings that say where `references`, `inputs`, `prompts`, `ids` and `tasks` come from,
    by these names. A column that is missing there is one that the trainer lacks, except for prompts. An adapter whose
    calls always hold whole groups names the source of their ids.
    """

    def __init__(
        self,
        reward: Spec | Reward,
        *,
        who: str,
        sources: Mapping[str, Any] | None = None,
        value_range: ValueRange | None = UNIT,
        on_nan: OnNan = "raise",
        policies: Sequence[str] = ("raise", "mean", "worst"),
        device: torch.device | str | None = None,
        moves_images: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_on_nan(on_nan, policies, who=who)
        self.reward = reward if callable(reward) else load(reward, device=device, differentiable=differentiable)
        check_names(who, [self.reward])
        self.who, self.sources = who, dict(sources or {})
        self.value_range = value_range
        self.on_nan: OnNan = on_nan
        self._device = ImageDevice(device if moves_images else None, name=who)
        self._check_reward(differentiable)

    def __call__(self, images: ImageLike, *, no_image: float = torch.nan, **columns: Any) -> Scores:
        """`[B]` scores; an image of a sequence may be None and gets `no_image`, where NaN counts as not scored."""
        rows, call = self.present(images, **columns)
        if call is not None and len(rows) == len(images):
            return self.with_policy(call.score(self.reward))
        scores = torch.full((len(images),), no_image)
        if call is not None:
            scores[rows] = call.score(self.reward).detach().cpu()
        return self.with_policy(scores)

    def present(self, images: ImageLike, **columns: Any) -> tuple[Sequence[int], Call | None]:
        """The rows of the images that are not None, and the call that scores them."""
        if isinstance(images, list | tuple) and any(image is None for image in images):
            rows = [row for row, image in enumerate(images) if image is not None]
            images = [images[row] for row in rows]
            columns = {
                name: values if values is None else [values[row] for row in rows] for name, values in columns.items()
            }
        else:
            rows = range(len(images))
        return rows, self.call(images, **columns) if len(rows) else None

    def call(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        ids: Sequence[Any] | Tensor | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Call:
        """Images and what else the reward needs, converted; an image without a score gets no gradient."""
        converted = self.images(images)
        device = converted[0].device
        return Call(
            converted,
            self._needed("references", references, device),
            self._needed("inputs", inputs, device),
            prompts,
            numbered(ids) if needs(self.reward, "ids") else None,
            tasks if needs(self.reward, "tasks") else None,
        )

    def images(self, images: ImageLike, device: torch.device | None = None) -> Images:
        """Images as the reward takes them, on `device` or where this adapter moves them."""
        converted = to_images(images, value_range=self.value_range, device=device or self._device.get())
        if isinstance(converted, Tensor):
            return drop_broken_gradients(converted)
        return [drop_broken_gradients(image) for image in converted]

    def _needed(self, name: str, images: ImageLike | None, device: torch.device) -> Images | None:
        """A column of images if the reward needs it; the reward itself says that it is missing."""
        needed = images is not None and needs(self.reward, name)
        return self.images(images, device) if needed else None

    def columns(self, metadata: Any, **fields: Any) -> dict[str, Any]:
        """The columns of one call by name, each from where its source says; see `column`.

        Ids and tasks are looked up only if the reward needs them, because their sources are not the user's.
        """
        return {
            name: column(source, metadata, who=self.who, **fields)
            for name, source in self.sources.items()
            if name not in ("ids", "tasks") or needs(self.reward, name)
        }

    def with_policy(self, scores: Scores) -> Scores:
        """The scores, with what `on_nan` says in place of those that are not finite."""
        return apply_policy(scores, self.on_nan, name=self.reward.name)

    def _check_reward(self, differentiable: bool) -> None:
        for name in COLUMNS:
            source = self.sources.get(name, True if name == "prompts" else None)
            if needs(self.reward, name) and source is None:
                asks = name in self.sources and name != "ids"  # their source is the adapter's own
                hint = f"Say where they come from with {name}=..., or choose" if asks else "Choose"
                why = ", because its calls need not hold all rollouts of an input" if name == "ids" else ""
                raise ValueError(
                    f"{self.who} got reward {self.reward.name!r}, which needs `{name}`, and has none{why}. {hint} "
                    "another reward (`iqareward list`)."
                )
        if differentiable and not self.reward.differentiable:
            raise ValueError(
                f"{self.who} expected a differentiable reward, got {self.reward.name!r}, whose gradient to the pixels "
                "would be zero. Build it with differentiable=True."
            )


def numbered(ids: Sequence[Any] | Tensor | None) -> Groups | None:
    """Group ids as integers: tensors as they are, anything else that can be hashed in order of first appearance."""
    if ids is None or isinstance(ids, Tensor):
        return ids
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(one, len(numbers)) for one in ids]


def apply_policy(scores: Scores, on_nan: OnNan, *, name: str) -> Scores:
    """Replace every score that is not finite by what `on_nan` says."""
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
    """One value per sample: the trainer's own field of that name, or that key of each sample's metadata.

    `fields` are None where this call of the trainer has no such field. Metadata is a mapping for each sample, or one
    mapping of whole columns.
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
