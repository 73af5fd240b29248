"""Flow-Factory as far as a reward model can notice: base classes, configuration, dispatch and advantages."""

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass
class RewardModelOutput:
    rewards: Any


class BaseRewardModel(ABC):
    required_fields: tuple[str, ...] = ()
    use_tensor_inputs = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.accelerator, self.config = accelerator, config
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> RewardModelOutput: ...


class PointwiseRewardModel(BaseRewardModel):
    pass


class GroupwiseRewardModel(BaseRewardModel):
    pass


def rewards_module() -> ModuleType:
    """A module like `flow_factory.rewards`."""
    module = ModuleType("flow_factory.rewards")
    for one in (RewardModelOutput, PointwiseRewardModel, GroupwiseRewardModel):
        setattr(module, one.__name__, one)
    return module


@dataclass
class RewardArguments:
    """An entry of `rewards:`; keys that it does not know end in `extra_kwargs`."""

    name: str
    reward_model: str
    weight: float = 1.0
    device: Any = "cuda"
    batch_size: int = 16
    num_workers: int = 1
    extra_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> "RewardArguments":
        own = {key: value for key, value in entry.items() if key in cls.__dataclass_fields__}
        extra = {key: value for key, value in entry.items() if key not in own}
        config = cls(**own, extra_kwargs=extra)
        config.device = torch.device(config.device)
        hash(tuple(sorted(extra.items())))  # entries that are alike share one model
        return config


def build(config: RewardArguments) -> Any:
    """The class behind a dotted path, built as the loader does."""
    module, name = config.reward_model.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(config, SimpleNamespace(device=torch.device("cpu")))


@dataclass
class Sample:
    """A sample whose `metadata` arrives, as JSON, only in newer versions."""

    prompt: str
    image: Tensor | None
    unique_id: int
    condition_images: list[Tensor] | None = None
    metadata: str | None = None
    all_latents: Tensor | None = None
    extra_kwargs: dict[str, Any] = field(default_factory=dict)


def samples(
    images: Sequence[Tensor], ids: Sequence[int], truth: Sequence[Tensor] | None = None, **columns: Any
) -> list:
    """Samples of a restoration run: the degraded input as condition image, columns as JSON metadata."""
    rows = []
    for index, (image, unique_id) in enumerate(zip(images, ids, strict=True)):
        metadata = json.dumps({key: values[index] for key, values in columns.items()}) if columns else None
        condition = None if truth is None else [truth[index]]
        rows.append(Sample("restore", image, unique_id, condition, metadata, torch.zeros(2)))
    return rows


class RewardProcessor:
    """Partition by class, fields by signature, batches or whole groups, float32 on the CPU."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.pointwise = {name: model for name, model in models.items() if isinstance(model, PointwiseRewardModel)}
        self.groupwise = {name: model for name, model in models.items() if isinstance(model, GroupwiseRewardModel)}
        self.fields_seen: set[str] = set()

    def compute_rewards(self, rows: list[Sample], workers: int = 0) -> dict[str, Tensor]:
        results = {}
        for name, model in self.pointwise.items():
            size = model.config.batch_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            if workers:  # async_reward: one model, several threads
                with ThreadPoolExecutor(workers) as pool:
                    parts = list(pool.map(lambda batch, model=model: self._call(model, batch), batches))
            else:
                parts = [self._call(model, batch) for batch in batches]
            results[name] = torch.cat(parts)
        for name, model in self.groupwise.items():
            rewards = torch.zeros(len(rows))
            for unique_id in {row.unique_id for row in rows}:
                places = [place for place, row in enumerate(rows) if row.unique_id == unique_id]
                gathered = [self._gathered(model, rows[place]) for place in places]
                rewards[places] = self._call(model, gathered)
            results[name] = rewards
        return results

    def _gathered(self, model: Any, row: Sample) -> Sample:
        """A sample of another process holds the required fields only."""
        kept = {name: getattr(row, name) for name in model.required_fields}
        return Sample(**{"prompt": "", "image": None, "unique_id": row.unique_id, **kept})

    def _call(self, model: Any, rows: list[Sample]) -> Tensor:
        parameters = inspect.signature(model.__call__).parameters
        everything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        names = [name for name in vars(rows[0]) if everything or name in parameters]
        fields = {name: [getattr(row, name) for row in rows] for name in names}
        fields = {name: values for name, values in fields.items() if all(value is not None for value in values)}
        assert model.use_tensor_inputs, "the double does not make PIL images"
        self.fields_seen |= set(fields)
        output = model(**fields)
        output = output.rewards if hasattr(output, "rewards") else output
        return torch.as_tensor(output, device="cpu", dtype=torch.float32)


class AdvantageProcessor:
    """Group-normalised advantages; a callable may replace them."""

    def compute_advantages(
        self, rows: list[Sample], rewards: dict[str, Tensor], store: bool = True, aggregation_func: Any = None
    ) -> Tensor:
        aggregation_func = aggregation_func or "gdpo"
        if callable(aggregation_func):
            return aggregation_func(self, rows, rewards, store)
        assert aggregation_func in ("sum", "gdpo")
        total = torch.stack(list(rewards.values())).sum(0)
        ids = torch.tensor([row.unique_id for row in rows])
        advantages = torch.zeros_like(total)
        for unique_id in ids.unique():
            own = ids == unique_id
            advantages[own] = (total[own] - total[own].mean()) / total.std()
        if store:
            for row, advantage in zip(rows, advantages, strict=True):
                row.extra_kwargs["advantage"] = advantage
        return advantages
