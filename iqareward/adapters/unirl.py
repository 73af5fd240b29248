"""Rewards for UniRL: a local backend and a differentiable one. `unirl_service` has its reward service.

- Read: Tencent-Hunyuan/UniRL 1a7b501 (2026-06), and its requests as of September 2026. Its classes are subclassed, when
  UniRL is importable.
- Range: `generated["image"].pixels`, float `[B, 3, H, W]` in [0, 1], without its detour over PIL images.
- References: the conditioning image (`references: conditioning`), or a key of each sample's metadata.
- Failure: `on_nan: raise`; mean, worst or a number on request, or nan: UniRL itself stops the step at a reward that is
  not finite.

```yaml
reward:
  _target_: unirl.reward.service.RewardService
  backend:
    _target_: iqareward.adapters.unirl.IQARewardBackend   # or IQADifferentiableBackend, for ReFL and DRaFT
    base_device: cuda
    config:
      _target_: iqareward.adapters.unirl.IQASpec
      reward: "0.7*qalign + 0.3*ssim"
      references: conditioning
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from iqareward.adapters._values import (
    OnNan,
    check_on_nan,
    column,
    find_reward,
    framework,
    score,
)
from iqareward.weighting import LossWeights, weighted_advantages

CONDITIONING = "conditioning"
HOME = "https://github.com/Tencent-Hunyuan/UniRL"
POLICIES = ("raise", "mean", "worst", "nan")
UNIT = (0.0, 1.0)


def track_advantages(advantages: Tensor, weights: LossWeights) -> Tensor:
    """What to store as `RolloutTrack.advantages` in a subclass of the trainer: each sample's, times its RL weight.

    Args:
        advantages: `[N]`, after `RolloutTrack.compute_advantages`.
        weights: from a weighter; the supervised half (`weights.sft`) is for the trainer's own loss.

    Returns:
        `[N]`, in the dtype and on the device of `advantages`.

    Example:
        >>> import torch
        >>> track_advantages(torch.tensor([1.0, -2.0]), LossWeights(rl=torch.tensor([1.0, 0.5]), sft=torch.zeros(2)))
        tensor([ 1., -1.])
    """
    return weighted_advantages(advantages, weights)


@cache
def _spec() -> type:
    base = framework("unirl.reward.base", who="IQASpec", home=HOME).BaseRewardComponentSpec

    @dataclass
    class IQASpec(base):
        """Settings of `IQARewardBackend`; `reward` is a name or sum of the catalogue, or a reward."""

        reward: Any
        references: str | None = None
        on_nan: OnNan = "raise"
        device: str = "auto"
        batch_size: int = 8

    IQASpec.__qualname__ = "IQASpec"
    return IQASpec


class _Judge:
    """The settings of a backend, and its scoring."""

    def __init__(self, who: str, settings: Any, device: Any, *, differentiable: bool) -> None:
        check_on_nan(settings.on_nan, allowed=POLICIES, who=who)
        self.settings = settings
        self.reward = find_reward(
            settings.reward, who=who, references=settings.references, device=device, differentiable=differentiable
        )

    def __call__(self, images: Any, prompts: Sequence[str] | None, metadata: Any, request: Any = None) -> Tensor:
        references = _references(self.settings.references, metadata, request)
        on_nan = self.settings.on_nan
        return score(self.reward, images, value_range=UNIT, references=references, prompts=prompts, on_nan=on_nan)


@cache
def _backend() -> type:
    base = framework("unirl.reward.local.base", who="IQARewardBackend", home=HOME).LocalRewardBackend
    resolve_device = framework("unirl.reward.local.device", who="IQARewardBackend", home=HOME).resolve_device

    class IQARewardBackend(base):
        """Each image's score, higher is better."""

        canonical_model_name = "iqareward"
        differentiable = False

        def __init__(self, *, config: Any, base_device: str) -> None:
            self.settings = config  # the base class loads the model
            super().__init__(device=resolve_device(config.device, base_device), batch_size=config.batch_size)

        def _load_model(self) -> None:
            who = type(self).__name__
            self.judge = _Judge(who, self.settings, self.device, differentiable=self.differentiable)

        def _compute_model_rewards(self, request: Any) -> list[float]:
            # requests had prompts of their own until September 2026; since then the backend chooses among two
            ask = getattr(self, "prompts", lambda request: request.prompts)
            prompts = ask(request) if self.judge.reward.needs_prompts else None
            images = request.generated["image"].pixels.detach()
            return self.judge(images, prompts, request.metadata, request).tolist()

        def offload(self) -> None:
            self._move("offload")

        def onload(self) -> None:
            self._move("onload")

        def _move(self, method: str) -> None:
            if hasattr(self.judge.reward, method):  # a reward of another package may have nothing to move
                getattr(self.judge.reward, method)()

    IQARewardBackend.__qualname__ = "IQARewardBackend"
    return IQARewardBackend


@cache
def _differentiable_backend() -> type:
    class IQADifferentiableBackend(_backend()):
        """`IQARewardBackend` that also gives scores with a graph; a class of its own, because UniRL asks by method."""

        differentiable = True

        def _load_model(self) -> None:
            if self.settings.references == CONDITIONING:
                raise ValueError(
                    "IQADifferentiableBackend expected `references` to be a key of the metadata, got 'conditioning': "
                    "UniRL passes images, prompts and metadata to differentiable rewards, and nothing else."
                )
            super()._load_model()

        def compute_rewards_differentiable(
            self, media_tensor: Tensor, prompts: Sequence[str], records: Sequence[dict[str, Any]] | None = None
        ) -> Tensor:
            """`[B, 3, H, W]` in [0, 1] -> `[B]` with their graph."""
            return self.judge(media_tensor, prompts, records)

    IQADifferentiableBackend.__qualname__ = "IQADifferentiableBackend"
    return IQADifferentiableBackend


def __getattr__(name: str) -> type:
    makers = {
        "IQASpec": _spec,
        "IQARewardBackend": _backend,
        "IQADifferentiableBackend": _differentiable_backend,
    }
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()


def _references(source: str | None, metadata: Sequence[dict[str, Any] | None] | None, request: Any) -> Any:
    """The references of a request: its conditioning images, or a key of its metadata."""
    if source is None:
        return None
    if source != CONDITIONING:
        return column(source, metadata, who="UniRL")
    # `primitives` until September 2026
    media = getattr(request, "conditioning", None) or getattr(request, "primitives", None) or {}
    if media.get("image") is None:
        raise ValueError("UniRL: expected a conditioning image (references: conditioning), got none in this request.")
    return media["image"].pixels
