"""verl-omni's and verl's configuration, reward loop, advantages and actor, as far as a reward or weight can notice."""

import asyncio
import importlib.util
import inspect
import io
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

VERL: dict[str, Any] = {
    "num_workers": 8,
    "custom_reward_function": {"path": None, "name": "compute_score"},
    "reward_manager": {"source": "register", "name": "naive", "module": {"path": None, "name": None}},
    "reward_model": {"enable": False, "model_path": None},
}
OMNI: dict[str, Any] = VERL | {
    "custom_reward_function": {"path": None, "name": "compute_score", "use_accelerator": False},
    "accelerator_workers": {"enabled": False},
    "reward_functions": {},
    "models": {},
    "reward_manager": {
        "source": "importlib",
        "name": "VisualRewardManager",
        "module": {"path": "pkg://verl_omni.reward_loop.reward_manager"},
    },
}


def merged(defaults: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The defaults with a file of settings over them."""
    result = deepcopy(defaults)
    for key, value in settings.items():
        inner = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inner else value
    return result


def command_line(defaults: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Hydra's overrides `reward.a.b=value`: a key that the defaults lack needs `+`, and only such a key may have it."""
    result = deepcopy(defaults)
    for argument in arguments:
        name, _, value = argument.partition("=")
        first, *path, last = name.removeprefix("+").split(".")
        assert first == "reward"
        place, new = result, False
        for key in path:
            new = new or key not in place
            place = place.setdefault(key, {})
        if (last not in place) != name.startswith("+"):
            raise KeyError(f"Could not {'append to' if name.startswith('+') else 'override'} {name!r}.")
        if new and not name.startswith("+"):
            raise KeyError(f"Could not override {name!r}.")
        place[last] = yaml.safe_load(value)
    return result


def load_extern_object(path: str, name: str) -> Any:
    """`pkg://module`, or a file, which is run anew and is not in `sys.modules`."""
    if path.startswith("pkg://"):
        module = path.removeprefix("pkg://")
        return getattr(OWN_MODULES.get(module) or importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location(f"custom_module_{hash(path)}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


async def _with_kwargs(function: Any, options: dict[str, Any], **call: Any) -> Any:
    return await function(**{**call, **options})


class _Manager:
    """Scores one sample: coroutine functions are awaited, everything else runs in a thread."""

    image_key: str | None = None  # None: a completion

    def __init__(self, reward: dict[str, Any], function: Any) -> None:
        self.reward, self.function = reward, function

    def call(self, response: Any, ground_truth: Any, extra_info: dict[str, Any]) -> dict[str, Any]:
        return {
            "data_source": "photos",
            self.image_key or "solution_str": response,
            "ground_truth": ground_truth,
            "extra_info": {**extra_info, "num_turns": None, "rollout_reward_scores": {}},
        }

    async def run_single(self, *row: Any) -> dict[str, Any]:
        result = await _called(self.function, self.call(*row))
        if not isinstance(result, dict):
            return {"reward_score": result, "reward_extra_info": {"acc": result}}
        return {"reward_score": result["score"], "reward_extra_info": dict(result)}


async def _called(function: Any, call: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**call)
    return await asyncio.get_running_loop().run_in_executor(None, lambda: function(**call))


class RateLimited(_Manager):
    """verl's: one call at a time, and an error is the reward 0."""

    async def run_single(self, *row: Any) -> dict[str, Any]:
        try:
            return await super().run_single(*row)
        except Exception as error:
            return {"reward_score": 0.0, "reward_extra_info": {"error": str(error), "acc": 0.0}}


class VisualRewardManager(_Manager):
    """verl-omni's default, which never looks at `reward_functions`."""

    image_key = "solution_image"

    async def run_single(self, *row: Any) -> dict[str, Any]:
        if row[0].dtype != torch.uint8:
            raise ValueError(f"Expected uint8 pixel responses, got {row[0].dtype}.")
        found = await super().run_single(*row)
        found["reward_extra_info"].pop("score", None)
        return found


class MultiVisualRewardManager(_Manager):
    """A weighted sum of functions; keys of an entry that it does not reserve are arguments of the function."""

    image_key = "solution_image"
    RESERVED = ("path", "name", "weight", "required", "model")

    def __init__(self, reward: dict[str, Any], function: Any) -> None:
        super().__init__(reward, function)
        if not reward["reward_functions"]:
            raise ValueError("MultiRewardManager requires non-empty reward.reward_functions config")
        if sum(entry.get("weight", 1.0) for entry in reward["reward_functions"].values()) <= 0:
            raise ValueError("Total weight of reward functions must be > 0")

    async def run_single(self, *row: Any) -> dict[str, Any]:
        total, infos = 0.0, {}
        for key, entry in self.reward["reward_functions"].items():
            function = load_extern_object(entry["path"], entry["name"])
            call = self.call(*row) | {name: value for name, value in entry.items() if name not in self.RESERVED}
            parameters = inspect.signature(function).parameters.values()
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
                call = {name: value for name, value in call.items() if name in {one.name for one in parameters}}
            try:
                result = await _called(function, call)
                score = float(result["score"] if isinstance(result, dict) else result)
                extra = result if isinstance(result, dict) else {}
                infos |= {f"reward/{key}/{name}": value for name, value in extra.items() if name != "score"}
            except Exception as error:
                if entry.get("required", False):
                    raise RuntimeError(f"Required sub-reward '{key}' failed: {error}") from error
                infos[f"reward/{key}/errors"] = 1
                score = 0.0
            infos[f"reward/{key}"] = score
            total += entry.get("weight", 1.0) * score
        return {"reward_score": total, "reward_extra_info": infos | {"reward/combined": total}}


def _multi_reward_placeholder(**ignored: Any) -> None:
    raise RuntimeError("_multi_reward_placeholder should never be called directly")


REGISTERED = {"naive": _Manager, "dapo": _Manager, "gdpo": _Manager, "rate_limited": RateLimited}
OWN_MODULES = {
    "verl_omni.reward_loop.reward_manager": SimpleNamespace(
        VisualRewardManager=VisualRewardManager, MultiVisualRewardManager=MultiVisualRewardManager
    ),
    "verl_omni.reward_loop.reward_manager.multi": SimpleNamespace(_multi_reward_placeholder=_multi_reward_placeholder),
}


def _manager_class(manager: dict[str, Any]) -> type[_Manager]:
    if manager["source"] == "importlib":
        return load_extern_object(manager["module"]["path"], manager["name"])
    if manager["name"] not in REGISTERED:
        raise ValueError(f"Unknown reward manager: {manager['name']}")
    return REGISTERED[manager["name"]]


async def _default_image_score(data_source: Any, solution_image: Tensor, **ignored: Any) -> float:
    if data_source != "jpeg_compressibility":
        raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
    file = io.BytesIO()
    Image.fromarray(solution_image.movedim(0, -1).numpy()).save(file, "JPEG")
    return -len(file.getvalue()) / 500


class RewardLoop:
    """What the merged configuration under `reward` makes of a batch of responses.

    Attributes:
        gpus: the GPUs of each worker.
    """

    def __init__(self, reward: dict[str, Any], *, num_gpus: int = 8) -> None:
        custom, manager = reward["custom_reward_function"], reward["reward_manager"]
        if reward["reward_model"]["enable"] and not custom["path"]:
            raise ValueError("reward.reward_model.enable=true requires reward.custom_reward_function.path")
        workers, on_gpus = reward["num_workers"], reward.get("accelerator_workers", {}).get("enabled", False)
        if on_gpus and reward["reward_model"]["enable"]:
            raise ValueError("Accelerator reward workers cannot be combined with reward.reward_model.enable=True")
        if on_gpus and workers > num_gpus:
            raise ValueError(f"reward.num_workers ({workers}) exceeds accelerator pool size ({num_gpus})")
        self.gpus = [[worker] if on_gpus else [] for worker in range(workers)]
        function = _default_image_score
        if custom["path"]:
            function = load_extern_object(custom["path"], custom["name"])
            options = dict(custom.get("reward_kwargs", {}))
            asynchronous = inspect.iscoroutinefunction(function)
            function = partial(_with_kwargs, function, options) if asynchronous else partial(function, **options)
        self.manager = _manager_class(manager)(reward, function)

    def __call__(
        self, responses: Sequence[Any], extra_infos: Sequence[dict] | None = None, ground_truths: Any = None, n: int = 1
    ) -> SimpleNamespace:
        """A batch with `rm_scores` `[B, 1]` and a column per name; `n` neighbours are rollouts of one prompt."""
        infos, truths = extra_infos or [{}] * len(responses), ground_truths or [""] * len(responses)

        async def all_at_once() -> list[dict[str, Any]]:
            return await asyncio.gather(*map(self.manager.run_single, responses, truths, infos))

        results = asyncio.run(all_at_once())
        rows = [result["reward_extra_info"] for result in results]
        scores = torch.tensor([result["reward_score"] for result in results], dtype=torch.float32)
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        columns["uid"] = np.array([f"prompt {row // n}" for row in range(len(rows))], dtype=object)
        return SimpleNamespace(batch={"rm_scores": scores[:, None]}, non_tensor_batch=columns)


def logged(batch: SimpleNamespace) -> dict[str, float]:
    """The metrics of a training step that are made of rewards."""
    return {f"critic/{key}/mean": value for key, value in _means(batch).items()}


def validated(batch: SimpleNamespace) -> dict[str, float]:
    """The metrics of a validation that are made of rewards."""
    return {f"val-aux/photos/{key}/mean@1": value for key, value in _means(batch).items()}


def _means(batch: SimpleNamespace) -> dict[str, float]:
    columns = {"rewards": batch.batch["rm_scores"].numpy(), **batch.non_tensor_batch}
    return {key: float(values.mean()) for key, values in columns.items() if np.issubdtype(values.dtype, np.number)}


def _per_group(scores: Tensor, uid: np.ndarray, of: Any) -> Tensor:
    return torch.stack([of(scores[torch.as_tensor(uid == one)]) for one in uid])


def flow_grpo_advantages(batch: SimpleNamespace, steps: int) -> Tensor:
    """`[B, steps]`: minus the mean of the prompt, by the standard deviation of the whole batch."""
    scores, uid = batch.batch["rm_scores"][:, 0], batch.non_tensor_batch["uid"]
    values = (scores - _per_group(scores, uid, torch.mean)) / (scores.std() + 1e-4)
    return values[:, None].expand(-1, steps).clone()


def gdpo_advantages(batch: SimpleNamespace, keys: Sequence[str]) -> Tensor:
    """verl's `[B]`: GRPO for each key of `gdpo_reward_keys`, their sum, whitened over the batch."""
    uid, total = batch.non_tensor_batch["uid"], torch.zeros(())
    for key in keys:
        scores = torch.tensor(np.asarray(batch.non_tensor_batch[key], dtype=np.float32))
        mean, std = (_per_group(scores, uid, of) for of in (torch.mean, torch.std))
        total = total + (scores - mean) / (std + 1e-6)
    return (total - total.mean()) * torch.rsqrt(total.var() + 1e-8)


def trainers(loss_mode: str = "flow_grpo", correction: Tensor | None = None) -> ModuleType:
    """`verl_omni.trainer.diffusion.ray_diffusion_trainer`; `correction` is what `rollout_correction` writes."""
    loss_config = SimpleNamespace(adv_clip_max=5.0, loss_mode=loss_mode)
    actor = SimpleNamespace(actor=SimpleNamespace(diffusion_loss=loss_config))
    module = ModuleType("ray_diffusion_trainer")

    class BaseRayDiffusionTrainer:
        steps, config = 3, SimpleNamespace(actor_rollout_ref=actor)

        def _update_actor(self, batch: SimpleNamespace) -> Tensor:
            """The gradient `[B, steps]` of the loss to the log-probability of each row and step."""
            tensors = batch.batch
            log_probs = tensors["old_log_probs"].clone().requires_grad_()
            for step in range(self.steps):
                data = {key: tensors[key][:, step] for key in ("old_log_probs", "advantages")}
                if tensors.get("rollout_is_weights") is not None:
                    data["rollout_is_weights"] = tensors["rollout_is_weights"][:, step]
                policy_loss(loss_config, log_probs[:, step], **data).backward()
            return log_probs.grad

    class PolicyGradientRayTrainer(BaseRayDiffusionTrainer):
        def fit_step(self, batch: SimpleNamespace) -> Tensor:
            batch.batch["old_log_probs"] = torch.zeros(len(batch.batch["rm_scores"]), self.steps)
            if correction is not None:
                batch.batch["rollout_is_weights"] = correction
            batch.batch["advantages"] = flow_grpo_advantages(batch, self.steps)
            return self._update_actor(batch)

    class DirectPreferenceRayTrainer(BaseRayDiffusionTrainer):
        def fit_step(self, batch: SimpleNamespace) -> Tensor:
            advantages = flow_grpo_advantages(batch, self.steps)
            probability = (advantages[:, 0].clamp(-5, 5) / 5 / 2 + 0.5)[:, None].expand(-1, self.steps)
            batch.batch |= {"advantages": advantages, "reward_prob": probability}
            return self._update_actor(batch)

        def _update_actor(self, batch: SimpleNamespace) -> Tensor:
            """The gradient `[B, steps]` of DiffusionNFT's loss to the prediction, for x0 = 0, xt = 1, t = 1."""
            columns = batch.batch["reward_prob"]
            predictions = torch.zeros(columns.shape, requires_grad=True)
            for step in range(self.steps):
                r, prediction, old = columns[:, step], predictions[:, step], torch.tensor(0.5)
                positive, negative = 1 - (prediction + old) / 2, 1 - (3 * old - prediction) / 2
                (r * positive.square() + (1 - r) * negative.square()).mean().backward()
            return predictions.grad

    vars(module).update({each.__name__: each for each in (PolicyGradientRayTrainer, DirectPreferenceRayTrainer)})
    return module


def policy_loss(
    config: Any, log_prob: Tensor, old_log_probs: Tensor, advantages: Tensor, rollout_is_weights: Tensor | None = None
) -> Tensor:
    """One step's loss; only flow_dppo does not clip advantages, and grpo_guard's scale is that of its step."""
    clipped = (
        advantages if config.loss_mode == "flow_dppo" else advantages.clamp(-config.adv_clip_max, config.adv_clip_max)
    )
    loss = -clipped * (log_prob - old_log_probs).exp()
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights.detach()
    return loss.mean() / (0.5**2 if config.loss_mode == "grpo_guard" else 1.0)
