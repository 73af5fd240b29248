"""Rewards for ddpo-pytorch, flow_grpo and its forks: DiffusionNFT, DiffusionOPSD, Edit-R1, BFR_RL, GenRL, old TRL.

flow_grpo keeps its rewards in a local variable, so there is no registry to add to. `install` replaces the function
that builds them; call it before the training script looks that function up.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from iqareward.adapters._core import UNIT, OnNan, Scorer, ValueRange, apply_policy, check_on_nan, column
from iqareward.images import to_images
from iqareward.rewards.catalog import load, on_unit_scale
from iqareward.rewards.specs import Spec
from iqareward.rewards.threads import ProcessLock
from iqareward.types import Reward, Scores

__all__ = ["install", "reward_function"]

_Function: TypeAlias = Callable[..., tuple[Any, dict[str, Any]]]
# input ids travel through float32, which cannot tell larger ones apart
_LARGEST_ID = 2**24


def reward_function(
    reward: Spec | Reward,
    *,
    references: str | None = None,
    inputs: str | None = None,
    value_range: ValueRange = UNIT,
    on_nan: OnNan = "raise",
    device: torch.device | str | None = None,
) -> _Function:
    """A plain `fn(images, prompts, metadata) -> (scores, {})` that is safe in their thread pools.

    Calls from several threads take turns, so that a pool of eight does not hold eight batches on the device.

    Args:
        reward: A name or sum of the catalogue, or any reward.
        references: The key of `metadata` that holds each sample's ground truth (path, PIL image, array or tensor), or
            `"ref_images"` for the fourth argument of the edit scripts.
        inputs: The same for the degraded image, for rewards that need it.
        value_range: Range of floating-point images, references and inputs.
        on_nan: What an image without a score becomes: "raise" (training stops), "mean", "worst", or a number. NaN is
            not allowed: with a global standard deviation one NaN makes every advantage NaN.
        device: Where weights of rewards given by name live.

    Returns:
        The function. Its scores are a float32 array `(N,)`, or a tensor with its graph if the reward is differentiable.

    Example:
        >>> fn = reward_function("ssim", references="clean")
        >>> images = torch.full((2, 3, 32, 32), 0.5)
        >>> scores, info = fn(images, ["", ""], [{"clean": image} for image in images])
        >>> scores.dtype, scores.shape
        (dtype('float32'), (2,))
    """
    sources = {"references": references, "inputs": inputs}
    scorer = Scorer(
        reward, who="reward_function", sources=sources, value_range=value_range, on_nan=on_nan, device=device
    )
    score = _taking_turns(scorer)

    def fn(
        images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
    ) -> tuple[Any, dict[str, Any]]:
        scores = score(images, prompts=prompts, **scorer.columns(metadata, ref_images=ref_images))
        return (scores if scorer.reward.differentiable else scores.cpu().numpy()), {}

    return fn


def install(
    module: Any,
    rewards: Mapping[str, Any] | Sequence[tuple[float, Spec | Reward]],
    *,
    references: str | None = None,
    inputs: str | None = None,
    groups: str | None = None,
    value_range: ValueRange = UNIT,
    on_nan: OnNan = "raise",
) -> None:
    """Replace `module.multi_score` by one that adds our rewards to those of the trainer's `config.reward_fn`.

    Every reward stays a component of its own, unweighted; `avg` is the weighted sum of theirs and ours, without NaN.

    Args:
        module: `flow_grpo.rewards`, or the same module of a child under its own name.
        rewards: Name -> weight, or name -> options with `weight` among them, or (weight, name or reward) pairs. Where
            several are added, named ones are calibrated as in a sum of `iqareward.load`.
        references: As in `reward_function`.
        inputs: As in `reward_function`.
        groups: The key of `metadata` that holds each sample's input id, an integer below 2**24; passed on as component
            `groups`. Evaluations (`only_strict=False`) may lack it.
        value_range: As in `reward_function`.
        on_nan: As in `reward_function`; also for a NaN in `avg` that comes from their rewards.

    Raises:
        ValueError: The module has no `multi_score` of its own, or `on_nan` is unknown. When the script builds its
            rewards: two have one name, one needs a column that is not named, or one is not on the scale of a sum.
    """
    original = getattr(module, "multi_score", None)
    if original is None or original.__module__ == __name__:
        found = "none" if original is None else "ours, from an earlier call"
        raise ValueError(
            f"install expected a module with its own `multi_score` (e.g. flow_grpo.rewards), found {found}. "
            "Call it once, with all rewards."
        )
    check_on_nan(on_nan, ("raise", "mean", "worst"), who="install")
    try:
        terms = map(_weighted, rewards.items()) if isinstance(rewards, Mapping) else rewards
        pairs = [(float(weight), reward) for weight, reward in terms]
    except (TypeError, ValueError) as error:
        raise TypeError(
            "install expected `rewards` as a mapping of names to weights, such as {'ssim': 1.0}, or as a list of "
            f"(weight, reward) pairs, got {rewards!r}."
        ) from error
    # the loop of BFR_RL has read one or the other
    totals = ("avg", "total_scores") if hasattr(module, "face_reward_remote") else ("avg",)
    sources = {"references": references, "inputs": inputs}

    def multi_score(device: Any, score_dict: Mapping[str, float]) -> _Function:
        theirs = original(device, score_dict) if len(score_dict) else None
        ours = _ours(pairs, score_dict, sources, on_nan, device)

        def fn(
            images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            more = () if ref_images is None else (ref_images,)  # older versions have no fourth argument
            details: dict[str, Any] = {}
            if theirs:
                details.update(theirs(images, prompts, metadata, *more, only_strict=only_strict)[0])
            total = [_flat(details["avg"])] if theirs else []
            pixels = to_images(images, value_range=value_range)
            columns: dict[str, Any] = {}
            for name, source in sources.items():  # converted once for all rewards
                found = column(source, metadata, who="install", ref_images=ref_images)
                columns[name] = None if found is None else to_images(found, value_range=value_range)
            for name, (weight, score) in ours.items():
                scores = _flat(score(pixels, prompts=prompts, **columns))
                total.append(weight * scores)
                details[name] = scores.numpy()
            # evaluations pass only_strict=False, but so does train_qwenimage_edit_plus.py while sampling for training
            if groups is not None and (only_strict or any(groups in row for row in metadata or ())):
                details["groups"] = _ids(column(groups, metadata, who="install"))
            average = apply_policy(torch.stack(total).sum(0), on_nan, name="avg").numpy()
            details.update(dict.fromkeys(totals, average))
            return details, {}

        return fn

    module.multi_score = multi_score


def _weighted(item: tuple[str, Any]) -> tuple[Any, Spec]:
    """The weight and the reward of an item of a mapping."""
    name, value = item
    if not isinstance(value, Mapping):
        return value, name
    return value.get("weight", 1.0), {"name": name, **{key: each for key, each in value.items() if key != "weight"}}


def _ours(
    pairs: Sequence[tuple[float, Spec | Reward]],
    taken: Collection[str],
    sources: Mapping[str, str | None],
    on_nan: OnNan,
    device: Any,
) -> dict[str, tuple[float, Callable[..., Scores]]]:
    """Name -> weight and scoring function, after the checks that need the names of the trainer's own rewards."""
    ours: dict[str, tuple[float, Callable[..., Scores]]] = {}
    for weight, reward in pairs:
        if len(pairs) + len(taken) > 1 and not callable(reward):
            reward = on_unit_scale(reward, load(reward, device=device), weight=weight)
        scorer = Scorer(reward, who="install", sources=sources, on_nan=on_nan, device=device)
        name = scorer.reward.name
        if name in ours or name in taken:
            raise ValueError(f"install expected rewards with unique names, got {name!r} twice.")
        ours[name] = (float(weight), _taking_turns(scorer))
    return ours


def _taking_turns(scorer: Scorer) -> Callable[..., Scores]:
    lock = ProcessLock()

    def score(*args: Any, **columns: Any) -> Scores:
        with lock:
            return scorer(*args, **columns)

    return score


def _flat(values: Any) -> Tensor:
    """One float32 number per sample on the CPU, from a list, array or tensor `(N,)` or `(N, 1)`."""
    return torch.as_tensor(values).detach().to("cpu", torch.float32).reshape(-1)


def _ids(ids: Any) -> np.ndarray:
    array = np.asarray([int(i) for i in ids], dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= _LARGEST_ID):
        raise ValueError(
            f"expected input ids in [0, 2**24), which float32 can tell apart, got {array.min()} to {array.max()}. "
            "Number the inputs of the dataset from 0."
        )
    return array.astype(np.float32)
