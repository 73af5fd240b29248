"""verl-omni's reward managers and verl's batch manager, as far as a reward function can notice."""

import asyncio
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def load_extern_object(path: str, name: str) -> Any:
    """`pkg://module` and a name, or an attribute of a module that is given itself."""
    module = importlib.import_module(path.removeprefix("pkg://")) if isinstance(path, str) else path
    return getattr(module, name)


class VisualRewardManager:
    """One sample per call, by keyword; coroutine functions are awaited, everything else runs in a thread."""

    def __init__(self, compute_score: Any, output_type: str = "image", **reward_kwargs: Any) -> None:
        self.compute_score, self.output_type, self.reward_kwargs = compute_score, output_type, reward_kwargs
        self.is_async = inspect.iscoroutinefunction(compute_score)

    async def run_single(self, responses: Tensor, ground_truth: Any = "", extra_info: dict | None = None) -> dict:
        pixels = self.output_type != "latent"
        if pixels and responses.dtype != torch.uint8:
            raise ValueError(f"Expected uint8 pixel responses, got {responses.dtype}.")
        call = {
            "data_source": "photos",
            "solution_image": responses,
            "ground_truth": ground_truth,
            "extra_info": {**(extra_info or {}), "num_turns": None, "rollout_reward_scores": {}},
            **self.reward_kwargs,
        }
        if self.is_async:
            result = await self.compute_score(**call)
        else:
            result = await asyncio.get_running_loop().run_in_executor(None, lambda: self.compute_score(**call))
        extra = {key: value for key, value in result.items() if key != "score"} if isinstance(result, dict) else {}
        return {"reward_score": result["score"] if isinstance(result, dict) else result, "reward_extra_info": extra}


class MultiVisualRewardManager:
    """A weighted sum of functions from YAML; keys that it does not reserve are arguments of the function."""

    RESERVED = ("path", "name", "weight", "required")

    def __init__(self, reward_functions: dict[str, dict[str, Any]]) -> None:
        self.entries = reward_functions

    async def run_single(self, responses: Tensor, ground_truth: Any = "", extra_info: dict | None = None) -> dict:
        total, metrics = 0.0, {}
        for key, entry in self.entries.items():
            fn = load_extern_object(entry["path"], entry["name"])
            call = {"data_source": "", "solution_image": responses, "ground_truth": ground_truth}
            call |= {"extra_info": extra_info or {}}
            call |= {option: value for option, value in entry.items() if option not in self.RESERVED}
            parameters = inspect.signature(fn).parameters.values()
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
                call = {option: value for option, value in call.items() if option in {one.name for one in parameters}}
            try:
                result = await fn(**call) if inspect.iscoroutinefunction(fn) else fn(**call)
                score = float(result["score"] if isinstance(result, dict) else result)
            except Exception as error:
                if entry.get("required", False):
                    raise RuntimeError(f"Required sub-reward '{key}' failed: {error}") from error
                score = 0.0
            metrics[f"reward/{key}"] = score
            total += entry.get("weight", 1.0) * score
        return {"reward_score": total, "reward_extra_info": metrics}


async def reward_worker(manager: Any, images: Sequence[Tensor], **columns: Sequence[Any]) -> list[dict]:
    """All samples at once, one call each."""
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(images))]
    return await asyncio.gather(*(manager.run_single(image, **row) for image, row in zip(images, rows, strict=True)))


def rm_scores(results: list[dict]) -> Tensor:
    """`(batch_size, 1)`, as advantages take them."""
    return torch.tensor([result["reward_score"] for result in results], dtype=torch.float32).unsqueeze(-1)


def batch_reward_manager(compute_score: Any, solution_strs: list[str], extra_infos: list[dict], **kwargs: Any) -> list:
    """verl's: plural keywords, one result per completion, a float or a dict with `score`."""
    count = len(solution_strs)
    results = compute_score(
        data_sources=[""] * count,
        solution_strs=solution_strs,
        ground_truths=[""] * count,
        extra_infos=extra_infos,
        **kwargs,
    )
    assert len(results) == count
    return [result["score"] if isinstance(result, dict) else result for result in results]


def policy_losses(per_sample: Tensor, rollout_is_weights: Tensor, *, num_timesteps: int) -> Tensor:
    """The loss of every step of a micro-batch, which takes its own column of the weights `(B, num_timesteps)`."""
    columns = [rollout_is_weights[:, step] for step in range(num_timesteps)]
    return torch.stack([(per_sample * column).mean() for column in columns])
