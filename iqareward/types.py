"""The types of the library: image batches, scores and rewards."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Images: TypeAlias = Tensor | Sequence[Tensor]
"""`[B, 3, H, W]` float RGB in [0, 1], or a sequence of `[3, H, W]` whose sizes may differ."""

Scores: TypeAlias = Tensor
"""`[B]` float32, higher is better, NaN = not scored."""

Groups: TypeAlias = Union[Tensor, Sequence[int], "NDArray[Any]"]
"""`[B]` integer ids, a tensor of any integer dtype, a list or an array; rows with one id are rollouts of one input."""

Bounds: TypeAlias = tuple[float | None, float | None]
"""(low, high) that no score can leave; None = unbounded on that side."""


@runtime_checkable
class Reward(Protocol):
    """The interface that this library and its adapters expect of a reward.

    Plain attributes describe it; calling it scores images. `iqareward.testing.check_reward` tests the whole contract,
    which `docs/explanation/contract.md` explains.

    Attributes:
        name: short identifier, used as key of components and in logs.
        needs_references: whether a call without `references` is an error.
        needs_prompts: whether a call without `prompts` is an error.
        differentiable: whether scores carry a graph back to the input pixels.
        bounds: (low, high) of every score; None = unbounded.

    `needs_inputs`, `needs_tasks` and `needs_ids` say the same of the other columns; a reward may lack them.

    Example:
        >>> import iqareward
        >>> isinstance(iqareward.load("ssim"), Reward)
        True
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_references(self) -> bool: ...
    @property
    def needs_prompts(self) -> bool: ...
    @property
    def differentiable(self) -> bool: ...
    @property
    def bounds(self) -> Bounds: ...

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image; `[B]` float32, higher is better, NaN where an image could not be scored."""
        ...


def needs(reward: Any, column: str) -> bool:
    """Whether a reward needs a column, such as `inputs`; it may lack the fact, which is False then."""
    return bool(getattr(reward, f"needs_{column}", False))
