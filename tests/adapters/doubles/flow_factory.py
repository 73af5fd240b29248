"""Flow-Factory at 5f6cda1: what calls a reward model, gathers groups and reads rewards; a0b2bc5 where that differs."""

import importlib
import inspect
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


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


@dataclass
class RewardArguments:
    """An entry of `rewards:`; keys that it does not know end in `extra_kwargs`."""

    name: str
    reward_model: str
    weight: float = 1.0
    device: Any = "cuda"
    batch_size: int = 16
    num_workers: int = 1
    async_reward: bool = False
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
class BaseSample:
    """A sample of a0b2bc5, whose group is a hash of its prompt and condition images; other keys are in extra_kwargs."""

    prompt: str = ""
    image: Tensor | None = None
    all_latents: Tensor | None = None
    extra_kwargs: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, key: str) -> Any:
        if key in self.__dict__.get("extra_kwargs", {}):
            return self.extra_kwargs[key]
        raise AttributeError(f"{type(self).__name__!r} has no attribute {key!r}")

    @property
    def unique_id(self) -> int:
        conditions = getattr(self, "condition_images", None) or []
        return zlib.crc32(self.prompt.encode() + b"".join(image.numpy().tobytes() for image in conditions))

    def to_dict(self) -> dict[str, Any]:
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "extra_kwargs"}
        return {**own, **self.extra_kwargs}


@dataclass
class PlannedSample(BaseSample):
    """A sample of 5f6cda1, whose group the sampler has planned."""

    sampling_group_id: int | None = None

    @property
    def unique_id(self) -> int:
        return super().unique_id if self.sampling_group_id is None else self.sampling_group_id


@dataclass
class I2ISample(BaseSample):
    condition_images: list[Tensor] | None = None


@dataclass
class PlannedI2ISample(PlannedSample):
    condition_images: list[Tensor] | None = None


def samples(
    images: Sequence[Tensor],
    ids: Sequence[int],
    truth: Sequence[Tensor] | None = None,
    *,
    planned: bool = True,
    **columns: Any,
) -> list[Any]:
    """Samples of a restoration run: the degraded input as condition image, columns of the dataset as JSON."""
    rows = []
    for index, (image, group) in enumerate(zip(images, ids, strict=True)):
        extra = {key: values[index] for key, values in columns.items()}
        settings: dict[str, Any] = {"prompt": "restore", "image": image, "all_latents": torch.zeros(2)}
        settings["extra_kwargs"] = {"metadata": json.dumps(extra)} if extra else {}
        if planned:
            settings["sampling_group_id"] = group
        if truth is None:
            rows.append((PlannedSample if planned else BaseSample)(**settings))
        else:
            rows.append((PlannedI2ISample if planned else I2ISample)(**settings, condition_images=[truth[index]]))
    return rows


class RewardProcessor:
    """Partition by class, fields by signature, batches or whole groups; a score that is not finite is an error."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.pointwise = {name: model for name, model in models.items() if isinstance(model, PointwiseRewardModel)}
        self.groupwise = {name: model for name, model in models.items() if isinstance(model, GroupwiseRewardModel)}
        self.fields_seen: set[str] = set()

    def compute_rewards(self, rows: list[Any], workers: int = 0) -> dict[str, Tensor]:
        """On one rank; with `workers` as the buffer of `async_reward` does it, one model in several threads."""
        results = {}
        with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
            run = pool.map if workers else map
            for name, model in self.pointwise.items():
                size = model.config.batch_size
                batches = [rows[start : start + size] for start in range(0, len(rows), size)]
                results[name] = torch.cat(list(run(lambda batch, model=model: self._call(model, batch), batches)))
            for name, model in self.groupwise.items():
                groups = self._groups(rows)
                ranks = run(lambda places, model=model: self._call(model, [rows[i] for i in places]), groups)
                results[name] = torch.full((len(rows),), torch.nan)
                for places, values in zip(groups, ranks, strict=True):
                    results[name][places] = values
        return results

    def compute_gathered(self, ranks: Sequence[list[Any]]) -> dict[str, list[Tensor]]:
        """With groups spread over ranks: gather the required fields, rank i computes groups i, i + W, ..., scatter."""
        required = {one for model in self.groupwise.values() for one in model.required_fields}
        rows = [row for part in ranks for row in part]
        if isinstance(rows[0], PlannedSample):
            required.add("sampling_group_id")
        gathered = [type(row)(**{name: getattr(row, name) for name in required}) for row in rows]
        groups, results = self._groups(gathered), {}
        for name, model in self.groupwise.items():
            total = torch.zeros(len(rows))
            for rank in range(len(ranks)):  # summed by an all-reduce
                for places in groups[rank :: len(ranks)]:
                    total[places] += self._call(model, [gathered[place] for place in places])
            results[name] = list(total.chunk(len(ranks)))
        return results

    def _groups(self, rows: list[Any]) -> list[list[int]]:
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.unique_id, []).append(place)
        return list(places.values())

    def _call(self, model: Any, rows: list[Any]) -> Tensor:
        parameters = inspect.signature(model.__call__).parameters
        everything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        names = [name for name in rows[0].to_dict() if everything or name in parameters]
        given = {name: [getattr(row, name) for row in rows] for name in names}
        given = {name: values for name, values in given.items() if all(value is not None for value in values)}
        if "condition_images" in given:
            given["condition_images"] = [torch.stack(images) for images in given["condition_images"]]
        assert model.use_tensor_inputs, "the double does not make PIL images"
        self.fields_seen |= set(given)
        output = model(**given)
        scores = torch.as_tensor(getattr(output, "rewards", output), dtype=torch.float32).detach().cpu().reshape(-1)
        if scores.shape != (len(rows),) or not scores.isfinite().all():
            raise RuntimeError("produced NaN/Inf at applicable positions")
        return scores


class AdvantageProcessor:
    """Advantages within the groups; a callable may replace them, and metrics are kept for the log."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.weights, self.metrics = weights or {}, dict[str, float]()

    def compute_advantages(
        self, rows: list[Any], rewards: dict[str, Tensor], store: bool = True, aggregation_func: Any = None
    ) -> Tensor:
        return self._compute_advantages(rows, rewards, store, aggregation_func)

    def _compute_advantages(
        self, rows: list[Any], rewards: dict[str, Tensor], store: bool, aggregation: Any, build_metrics: bool = True
    ) -> Tensor:
        if callable(aggregation):
            if not build_metrics:
                raise ValueError("custom advantage aggregation cannot disable metrics")
            return aggregation(self, rows, rewards, store)
        assert aggregation in (None, "sum", "gdpo")
        if not all(values.isfinite().all() for values in rewards.values()):
            raise RuntimeError("NaN/Inf reward at applicable positions")
        ids = torch.tensor([row.unique_id for row in rows])
        weighted = {name: self.weights.get(name, 1.0) * values for name, values in rewards.items()}
        if aggregation == "sum":
            total = torch.stack(list(weighted.values())).sum(0)
            advantages = self._by_group(total, ids, lambda own: own - own.mean()) / total.std(correction=0).clamp(1e-6)
        else:
            parts = [self.weights.get(name, 1.0) * self._by_group(r, ids, self._normal) for name, r in rewards.items()]
            advantages = self._normal(torch.stack(parts).sum(0))
        self.metrics = {f"train/reward_{name}_mean": float(values.mean()) for name, values in rewards.items()}
        if store:
            for row, advantage in zip(rows, advantages, strict=True):
                row.extra_kwargs["advantage"] = advantage
        return advantages

    @staticmethod
    def _normal(values: Tensor) -> Tensor:
        return (values - values.mean()) / values.std(correction=0).clamp(min=1e-6)

    @staticmethod
    def _by_group(values: Tensor, ids: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        result = torch.zeros_like(values)
        for one in ids.unique():
            result[ids == one] = function(values[ids == one])
        return result


@dataclass
class LatentState:
    components: dict[str, Tensor]


class Adapter:
    """A model whose velocity is the same for every input: the sum of a frozen and a trained vector."""

    def __init__(self, features: int) -> None:
        self.policy = nn.Parameter(torch.zeros(features))

    def train(self) -> None:
        pass

    def get_terminal_state(self, batch: dict[str, Any]) -> LatentState:
        return LatentState({"latent": batch["all_latents"]})

    def build_training_component_times(self, timesteps: Tensor, *, batch: dict[str, Any]) -> Tensor:
        return timesteps / 1000

    def add_forward_process_noise(self, clean: LatentState, times: Tensor) -> Any:
        latent = clean.components["latent"]
        noised = LatentState({"latent": (1 - times[:, None]) * latent})  # the noise is 0
        return SimpleNamespace(state=noised, target_velocity=LatentState({"latent": -latent}))


def forward_velocity_state(trainer: Any, batch: Any, state: LatentState, times: Tensor, *, source: str) -> LatentState:
    return LatentState({"latent": trainer.adapter.policy.expand_as(state.components["latent"])})


def flow_matching_per_sample_loss(adapter: Adapter, velocity: LatentState, noised: Any) -> Tensor:
    return (velocity.components["latent"] - noised.target_velocity.components["latent"]).square().mean(1)


class DiffusionNFTTrainer:
    """Rewards to advantages to r to a loss per row, whose gradient is kept, as `trainers/rl/nft.py` and `abc.py` do."""

    def __init__(self, *, adapter: Adapter, reward_models: dict[str, Any], **training_args: Any) -> None:
        defaults = {"advantage_aggregation": "gdpo", "per_device_batch_size": 4, "adv_clip_range": (-5.0, 5.0)}
        self.training_args = SimpleNamespace(**{**defaults, "reward_optimization_overlap": False, **training_args})
        self.adapter, self.reward_models = adapter, reward_models
        self.reward_processor = RewardProcessor(reward_models)
        self.advantage_processor = AdvantageProcessor()
        self.accelerator = SimpleNamespace(backward=lambda loss: loss.backward(), sync_gradients=True)
        self.optimizer = torch.optim.SGD([adapter.policy], lr=0.0)
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: dict[str, float] = {}
        self.autocast = self.accumulate_gradients = nullcontext

    def run_cycle(self, rows: list[Any]) -> None:
        rewards = self.reward_processor.compute_rewards(rows)
        if self.training_args.reward_optimization_overlap:
            aggregation = self.training_args.advantage_aggregation
            self.advantage_processor._compute_advantages(rows, rewards, True, aggregation, build_metrics=False)
        else:
            self.compute_advantages(rows, rewards)
        self.logged |= self.advantage_processor.metrics
        self.optimize(rows)

    def evaluate(self, rows: list[Any], eval_rewards: dict[str, Any] | None = None) -> None:
        """One image per input, by the training's rewards if there are no others; asynchronous groups must be whole."""
        processor = RewardProcessor(eval_rewards or self.reward_models)
        if any(model.config.async_reward for model in processor.groupwise.values()):
            raise RuntimeError("incomplete async reward groups remain at finalize")
        processor.groupwise = {}
        for name, values in processor.compute_rewards(rows).items():
            self.logged[f"eval/test/reward_{name}_mean"] = float(values.mean())

    def compute_advantages(
        self, rows: list[Any], rewards: dict[str, Tensor], store: bool = True, aggregation_func: Any = None
    ) -> Tensor:
        aggregation = aggregation_func or self.training_args.advantage_aggregation
        return self.advantage_processor.compute_advantages(rows, rewards, store, aggregation)

    def optimize(self, rows: list[Any]) -> None:
        low, high = self.training_args.adv_clip_range
        for batch in self._iter_prefetched_batches(rows, self.training_args.per_device_batch_size):
            clean = self.adapter.get_terminal_state(batch)
            for timesteps in self._sample_timesteps(len(batch["prompt"])):
                times = self.adapter.build_training_component_times(timesteps, batch=batch)
                noised = self.adapter.add_forward_process_noise(clean, times)
                new = forward_velocity_state(self, batch, noised.state, times, source="policy").components["latent"]
                r = (batch["advantage"].clamp(low, high) / high / 2 + 0.5).clamp(0, 1)
                target, old = noised.target_velocity.components["latent"], new.detach()
                negative = (2 * old - new - target).square().mean(1)
                losses = r * (new - target).square().mean(1) + (1 - r) * negative
                self.accelerator.backward(losses.mean())
                self._apply_optimizer_step({"policy_loss": [losses.detach()]})

    def _sample_timesteps(self, batch_size: int) -> Tensor:
        return torch.full((1, batch_size), 500.0)

    def _iter_prefetched_batches(self, rows: list[Any], size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), size):
            columns = [row.to_dict() for row in rows[start : start + size]]
            batch = {name: [column.get(name) for column in columns] for name in columns[0]}
            yield {
                name: torch.stack(values) if isinstance(values[0], Tensor) else values for name, values in batch.items()
            }

    def _apply_optimizer_step(self, loss_info: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        self.gradients.append({"/".join(loss_info): self.adapter.policy.grad.clone()})
        self.logged |= {f"train/{name}": float(torch.stack(values).mean()) for name, values in loss_info.items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {}


def modules(*, planned: bool = True) -> dict[str, ModuleType]:
    """`flow_factory.*` for `pages.package`; `planned=False` is a0b2bc5, whose samplers leave no id in a sample."""
    rewards, base = ModuleType("rewards"), ModuleType("samples")
    for one in (RewardModelOutput, PointwiseRewardModel, GroupwiseRewardModel):
        setattr(rewards, one.__name__, one)
    base.BaseSample = PlannedSample if planned else BaseSample
    nft, process, matching = ModuleType("nft"), ModuleType("forward_process"), ModuleType("flow_matching")
    train, registry = ModuleType("train"), ModuleType("registry")
    train.main = lambda: None
    registry.trainers = {"nft": DiffusionNFTTrainer}  # by `trainer_type`, which also chooses the training arguments

    def register_trainer(name: str) -> Callable[[type], type]:
        return lambda cls: registry.trainers.update({name: cls}) or cls

    registry.register_trainer = register_trainer
    nft.DiffusionNFTTrainer = DiffusionNFTTrainer
    process.forward_velocity_state = forward_velocity_state
    matching.flow_matching_per_sample_loss = flow_matching_per_sample_loss
    return {
        "flow_factory__rewards": rewards,
        "flow_factory__samples": base,
        "flow_factory__trainers__rl__nft": nft,
        "flow_factory__trainers__forward_process": process,
        "flow_factory__trainers__common__flow_matching": matching,
        "flow_factory__trainers__registry": registry,
        "flow_factory__train": train,
    }
