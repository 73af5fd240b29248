"""UniRL at 1a7b501 (June 2026) and 0104a7e (September), and its reward service: calls, and what reads our scores."""

import contextlib
import importlib
import io
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

    def get_model_name(self) -> str:
        """What RewardService logs when it starts."""
        return self.model_name

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
    """`unirl.*` of June (`new=False`) or September 2026, for `pages.package`."""
    base, local, device, trainer = (ModuleType(name) for name in ("base", "local", "device", "trainer"))
    trainer.DiffusionTrainer = DiffusionTrainer
    base.BaseRewardComponentSpec = BaseRewardComponentSpec
    local.LocalRewardBackend = NewLocalRewardBackend if new else LocalRewardBackend
    device.resolve_device = resolve_device
    return {
        "unirl__reward__base": base,
        "unirl__reward__local__base": local,
        "unirl__reward__local__device": device,
        "unirl__trainer__diffusion": trainer,
    }


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


@dataclass
class Part:
    """The generated samples of one step."""

    rewards: Tensor
    metadata: list[dict[str, Any]] | None = None
    advantages: Tensor | None = None

    def compute_advantages(self, branch: int, eps: float = 1e-8) -> None:
        """Within groups of `branch` consecutive rows, from the finite rewards; the others get 0."""
        rewards = self.rewards.view(-1, branch)
        finite = rewards.isfinite()
        count = finite.sum(1, keepdim=True)
        mean = rewards.where(finite, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        centred = (rewards - mean).where(finite, 0.0)
        std = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
        self.advantages = (centred / (std.where(count > 1, 1.0) + eps)).flatten()


def score_and_attach(backend: Any, request: Any, *, new: bool) -> Tensor:
    """RewardService: a sample that failed stops the step, and in June a reward that is not finite, too."""
    response = backend.compute_rewards(request)
    finite = new or all(math.isfinite(reward) for reward in response.rewards)
    if not all(response.successes) or not finite:
        raise RuntimeError("Reward computation flagged a sample as failure")
    return torch.tensor(response.rewards, dtype=torch.float32)


class DiffusionTrainer:
    """Rollout, reward, advantage, and the gradient of each row's loss by the score of its sample."""

    def __init__(self, backend: Any, request: Any, branch: int) -> None:
        self.backend, self.request, self.branch = backend, request, branch

    def _rollout_and_score(self, sample: Any, *, rollout_id: int = 0) -> tuple[Any, float]:
        part = Part(score_and_attach(self.backend, self.request, new=True), self.request.metadata)
        part.compute_advantages(self.branch)
        return SimpleNamespace(parts=[part]), float(part.rewards.mean())

    def train_step(self) -> Tensor:
        sample, _ = self._rollout_and_score(None, rollout_id=1)
        log_probs = torch.zeros(len(sample.parts[-1].rewards), requires_grad=True)
        (-sample.parts[-1].advantages * (log_probs - log_probs.detach()).exp()).sum().backward()
        return log_probs.grad


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
    """The reward service, and UniRL's client for it: images over the wire, one actor that imports the scorer itself."""

    def __init__(self) -> None:
        self.registered: dict[str, type] = {}
        self.scorer_modules = {"clip": "reward_service.scorers.clip"}  # edited in the service's registry.py

    def modules(self) -> dict[str, ModuleType]:
        base, registry = ModuleType("base"), ModuleType("registry")
        base.BaseScorer = BaseScorer

        def register(name: str, scorer: type) -> None:
            assert issubclass(scorer, BaseScorer)
            if name in self.registered:
                raise ValueError(f"scorer already registered: {name}")
            self.registered[name] = scorer

        registry.register, registry.SCORER_MODULES = register, self.scorer_modules
        return {"reward_service__scorers__base": base, "reward_service__scorers__registry": registry}

    def actor(self, name: str, params: dict[str, Any]) -> BaseScorer:
        """A scorer, for whose constructor the service waits; a module that cannot be imported is only a warning."""
        with contextlib.suppress(ImportError):
            importlib.import_module(self.scorer_modules.get(name, "reward_service.scorers.base"))
        if name not in self.registered:
            raise KeyError(f"unknown scorer: {name}. available: {sorted(self.registered)}")
        return self.registered[name](**params)

    def score(self, name: str, params: dict[str, Any], items: list[ScoreItem]) -> list[dict[str, float]]:
        """One request, which the service gives up after two minutes."""
        scorer = self.actor(name, params)
        results = scorer.score(items)
        assert len(results) == len(items)
        assert all(set(result) == set(scorer.sub_metric_names) for result in results)
        return results

    def backend(self, name: str, params: dict[str, Any], image_format: str = "JPEG") -> Any:
        """RemoteRewardBackend; a reward that is not finite is a failed sample."""

        def sent(image: Tensor) -> Image.Image:
            buffer = io.BytesIO()
            pixels = (image * 255).round().byte().movedim(0, -1).numpy()
            Image.fromarray(pixels).save(buffer, image_format, quality=95)
            return Image.open(buffer)

        def compute_rewards(request: Any) -> Any:
            images, media = request.generated["image"].pixels, getattr(request, "conditioning", {})
            turns = [[("", sent(image))] for image in images]
            if "image" in media:
                turns = [[("", sent(first)), *turn] for first, turn in zip(media["image"].pixels, turns, strict=True)]
            metadata = request.metadata or [None] * len(images)
            items = [ScoreItem(turn, row) for turn, row in zip(turns, metadata, strict=True)]
            rewards = [next(iter(result.values())) for result in self.score(name, params, items)]
            return SimpleNamespace(rewards=rewards, successes=[math.isfinite(reward) for reward in rewards])

        return SimpleNamespace(compute_rewards=compute_rewards)
