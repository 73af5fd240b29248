"""Rewards for UniRL: a local backend, a differentiable one, and a scorer for its reward service.

The classes are subclasses of UniRL's own, made when UniRL can be imported. `IQASpec` holds the settings of the two
backends; the scorer takes the same ones as arguments, which are the `params` of the service's YAML:

- `reward`: a name or sum of the catalogue, or any reward. `qalign(batch_size=8)` limits the images of a batch.
- `references`, `inputs`: a key of each sample's metadata; in `IQARewardBackend` also `conditioning`, the conditioning
  image, and in `IQAScorer` `history`, the first of two turns.
- `on_nan`: `raise`, `mean`, `worst`, a number, or `nan`. UniRL gives an image with a NaN reward no advantage; until
  September 2026 it stopped the step. Its reward service asks for NaN, the default of `IQAScorer`, and stops the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._core import OnNan, Scorer, framework
from iqareward.rewards.calls import Call

_NAMES = ("IQADifferentiableBackend", "IQARewardBackend", "IQAScorer", "IQASpec")
_POLICIES = ("raise", "mean", "worst", "nan")


@cache
def _classes(spec: ModuleType, local: ModuleType, device: ModuleType) -> dict[str, type]:
    @dataclass
    class IQASpec(spec.BaseRewardComponentSpec):
        """Settings of the backends; `reward` is a name or sum of the catalogue, or any reward."""

        reward: Any
        references: str | None = None
        inputs: str | None = None
        on_nan: OnNan = "raise"
        device: str = "auto"

    class IQARewardBackend(local.LocalRewardBackend):
        """Each image's score, higher is better."""

        canonical_model_name = "iqareward"
        differentiable = False

        def __init__(self, *, config: Any, base_device: str) -> None:
            self.settings = config  # the base class loads the model
            super().__init__(device=device.resolve_device(config.device, base_device))

        def _load_model(self) -> None:
            self.scorer = Scorer(
                self.settings.reward,
                who=type(self).__name__,
                sources={
                    "references": self.settings.references,
                    "inputs": self.settings.inputs,
                    "ids": "group_ids",  # each process gets all samples of a prompt
                },
                on_nan=self.settings.on_nan,
                policies=_POLICIES,
                device=self.device,
                differentiable=self.differentiable,
            )

        def _compute_model_rewards(self, request: Any) -> list[float]:
            # requests had prompts of their own until September 2026; since then the backend chooses among two
            ask = getattr(self, "prompts", lambda request: request.prompts)
            prompts = ask(request) if self.scorer.reward.needs_prompts else None
            # `primitives` until September 2026
            media = getattr(request, "conditioning", None) or getattr(request, "primitives", None) or {}
            condition = None if media.get("image") is None else media["image"].pixels
            groups = getattr(request, "group_ids", None)
            columns = self.scorer.columns(request.metadata, conditioning=condition, group_ids=groups)
            return self.scorer(request.generated["image"].pixels.detach(), prompts=prompts, **columns).tolist()

        def offload(self) -> None:
            self._move("offload")

        def onload(self) -> None:
            self._move("onload")

        def _move(self, method: str) -> None:
            if hasattr(self.scorer.reward, method):  # a reward of another package may have nothing to move
                getattr(self.scorer.reward, method)()

    class IQADifferentiableBackend(IQARewardBackend):
        """`IQARewardBackend` that also gives scores with a graph; a class of its own, because UniRL asks by method."""

        differentiable = True

        def _load_model(self) -> None:
            super()._load_model()
            if "conditioning" in self.scorer.sources.values():
                raise ValueError(
                    "IQADifferentiableBackend expected `references` and `inputs` to be keys of the metadata, got "
                    "'conditioning': UniRL passes images, prompts and metadata to differentiable rewards, and nothing "
                    "else."
                )

        def compute_rewards_differentiable(
            self, media_tensor: Tensor, prompts: Sequence[str], records: Sequence[dict[str, Any]] | None = None
        ) -> Tensor:
            """`[B, 3, H, W]` in [0, 1] -> `[B]` with their graph."""
            return self.scorer(media_tensor, prompts=prompts, **self.scorer.columns(records))

    return _by_name(IQASpec, IQARewardBackend, IQADifferentiableBackend)


@cache
def _service_classes(base: ModuleType) -> dict[str, type]:
    class IQAScorer(base.BaseScorer):
        """Each item's score as its sub-metric `score`, of the image of its last turn."""

        name = "iqareward"
        sub_metric_names = ("score",)

        def __init__(
            self,
            reward: Any,
            references: str | None = None,
            device: str | None = None,
            on_nan: OnNan = "nan",
            inputs: str | None = None,
        ) -> None:
            self.scorer = Scorer(
                reward,
                who="IQAScorer",
                sources={"references": references, "inputs": inputs},
                value_range=None,
                on_nan=on_nan,
                policies=_POLICIES,
                device=device,
            )
            # The service waits for constructors, but gives each request two minutes: load the weights here.
            image = torch.full((1, 3, 256, 256), 0.5)
            Call(image, image, image, ["a photograph"]).score(self.scorer.reward)

        def score(self, items: Sequence[Any]) -> list[dict[str, float]]:
            two_turns = all(len(item.history) > 1 and item.history[0][1] is not None for item in items)
            first = [item.history[0][1] for item in items] if two_turns else None
            columns = self.scorer.columns([item.metadata for item in items], history=first)
            prompts, images = ([item.history[-1][part] for item in items] for part in (0, 1))
            return [{"score": score} for score in self.scorer(images, prompts=prompts, **columns).tolist()]

    return _by_name(IQAScorer)


def _by_name(*classes: type) -> dict[str, type]:
    for one in classes:
        one.__qualname__ = one.__name__  # pickled by name
    return {one.__name__: one for one in classes}


def __getattr__(name: str) -> type:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed = (
        ("reward_service.scorers.base",)
        if name == "IQAScorer"
        else (
            "unirl.reward.base",
            "unirl.reward.local.base",
            "unirl.reward.local.device",
        )
    )
    home = "https://github.com/Tencent-Hunyuan/UniRL"
    modules = [framework(module, who=name, home=home) for module in needed]
    return (_service_classes if name == "IQAScorer" else _classes)(*modules)[name]
