"""UniRL and its reward service, as far as a backend or scorer can notice."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor


class BaseRewardComponentSpec(ABC):  # noqa: B024
    pass


class LocalRewardBackend(ABC):
    """The base class of June 2026; it loads the model while it is constructed."""

    canonical_model_name: str | None = None

    def __init__(self, model_name: str | None = None, device: str = "cuda", batch_size: int = 8, **kwargs: Any) -> None:
        self.model_name = (model_name or self.canonical_model_name or "").lower()
        self.device, self.batch_size, self.model = device, batch_size, None
        self._load_model()

    @abstractmethod
    def _load_model(self) -> None: ...

    @abstractmethod
    def _compute_model_rewards(self, request: Any) -> list[float]: ...

    def compute_rewards(self, request: Any) -> Any:
        rewards = self._compute_model_rewards(request)
        return SimpleNamespace(rewards=rewards, successes=[True] * len(rewards), errors=[None] * len(rewards))

    def offload(self) -> None:
        raise AssertionError("the base class moves `self.model`, which is not where our weights are")


class NewLocalRewardBackend(LocalRewardBackend):
    """The base class since September 2026: it chooses between two prompts of the request."""

    def __init__(self, *args: Any, prompt_source: str = "generation", **kwargs: Any) -> None:
        self.prompt_source = prompt_source
        super().__init__(*args, **kwargs)

    def prompts(self, request: Any) -> list[str]:
        chosen = request.original_prompt if self.prompt_source == "original" else request.generation_prompt
        if chosen is None:
            raise ValueError("the selected prompt is absent from RewardRequest")
        return list(chosen.texts)


@runtime_checkable
class DifferentiableReward(Protocol):
    def compute_rewards_differentiable(
        self, media_tensor: Tensor, prompts: list[str], records: list | None = None
    ) -> Tensor: ...


def resolve_device(spec_device: str, base_device: str) -> str:
    chosen = base_device if spec_device == "auto" else spec_device
    return "cuda" if chosen == "cuda" and torch.cuda.is_available() else "cpu"


def modules(*, new: bool) -> dict[str, ModuleType]:
    """`unirl.reward.*` of June (`new=False`) or September 2026, for `pages.package`."""
    base, local, device = (ModuleType(name) for name in ("base", "local", "device"))
    base.BaseRewardComponentSpec = BaseRewardComponentSpec
    local.LocalRewardBackend = NewLocalRewardBackend if new else LocalRewardBackend
    device.resolve_device = resolve_device
    return {"unirl__reward__base": base, "unirl__reward__local__base": local, "unirl__reward__local__device": device}


def request(images: Tensor, prompts: Sequence[str], condition: Tensor | None, metadata: Any, *, new: bool) -> Any:
    """A RewardRequest of either shape. `images`, the list of PIL images, is what a tensor reward must not touch."""
    media = {} if condition is None else {"image": SimpleNamespace(pixels=condition)}
    texts = SimpleNamespace(texts=list(prompts))
    generated = {"image": SimpleNamespace(pixels=images)}
    if new:
        return SimpleNamespace(
            generated=generated, conditioning=media, original_prompt=None, generation_prompt=texts, metadata=metadata
        )
    return SimpleNamespace(
        generated=generated, primitives={"text": texts, **media}, prompts=list(prompts), metadata=metadata
    )


def score_and_attach(backend: Any, request: Any) -> list[float]:
    """RewardService: a reward that is not finite, or a sample that failed, stops the step."""
    response = backend.compute_rewards(request)
    if not all(response.successes) or not all(math.isfinite(reward) for reward in response.rewards):
        raise RuntimeError("reward failed for a sample")
    assert all(type(reward) is float for reward in response.rewards)
    return response.rewards


def refl_step(backend: Any, images: Tensor, prompts: list[str], metadata: Any = None) -> None:
    """ReFL and DRaFT-K: asked by method, then `-reward.mean()`."""
    if not isinstance(backend, DifferentiableReward):
        raise TypeError(f"{type(backend).__name__} is not a DifferentiableReward")
    rewards = backend.compute_rewards_differentiable(images, list(prompts), records=metadata)
    (-rewards.mean()).backward()


@dataclass(frozen=True)
class ScoreItem:
    history: list[tuple[str, Image.Image | None]]
    metadata: dict | None = None


class BaseScorer(ABC):
    name = ""
    sub_metric_names: tuple[str, ...] = ()

    @abstractmethod
    def score(self, items: list[ScoreItem]) -> list[dict[str, float]]: ...


class Service:
    """The registry and one actor of the reward service."""

    def __init__(self) -> None:
        self.scorers: dict[str, type] = {}

    def modules(self) -> dict[str, ModuleType]:
        base, registry = ModuleType("base"), ModuleType("registry")
        base.BaseScorer = BaseScorer

        def register(name: str, scorer: type) -> None:
            assert issubclass(scorer, BaseScorer)
            if name in self.scorers:
                raise ValueError(f"scorer already registered: {name}")
            self.scorers[name] = scorer

        registry.register = register
        return {"reward_service__scorers__base": base, "reward_service__scorers__registry": registry}

    def score(self, name: str, params: dict[str, Any], items: list[ScoreItem]) -> list[dict[str, float]]:
        scorer = self.scorers[name](**params)
        results = scorer.score(items)
        assert len(results) == len(items)
        assert all(set(result) == set(scorer.sub_metric_names) for result in results)
        return results
