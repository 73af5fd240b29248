"""Rewards for ddpo-pytorch, flow_grpo and its children: DiffusionNFT, DiffusionOPSD, Edit-R1, BFR_RL, old TRL.

- Read: ddpo-pytorch 1958463, flow_grpo ac4c86e and 74db691, DiffusionNFT 24af555, Edit-R1 4217f25, BFR_RL ee5a624,
  TRL's DDPO and AlignProp trainers as of 0.23.
- Range: float NCHW in [0, 1] (BFR_RL: [-1, 1]), or uint8 NHWC arrays.
- References: a key of each sample's metadata, or the source images of the edit scripts (`"ref_images"`).
- Failure: `on_nan="raise"`; "mean", "worst" or a number on request. NaN is never passed on: with a global standard
  deviation one NaN makes every advantage NaN.

flow_grpo keeps its rewards in a local variable, so that there is nothing to register with. Replace the function, before
the training script looks it up, and leave in `config.reward_fn` only what you want besides (`{}` for nothing):

```python
import flow_grpo.rewards
from iqareward.adapters.flow_grpo import install

install(flow_grpo.rewards, {"qalign": 0.5, "ssim": 0.5}, references="gt_path", groups="input_id")
```

Their tracker groups by prompt text, and in restoration all prompts are alike. `groups` passes each sample's input id
along as one more component; change the trainer's `stat_tracker.update(prompts, ...)` to
`stat_tracker.update(gathered_rewards["groups"], ...)`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from iqareward.adapters._values import (
    OnNan,
    ValueRange,
    check_on_nan,
    column,
    find_reward,
    score,
    settle,
)
from iqareward.images import to_images
from iqareward.rewards.catalog import on_unit_scale
from iqareward.rewards.threads import ProcessLock
from iqareward.types import Reward
from iqareward.weighting import LossWeights, weighted_advantages

Fn: TypeAlias = Callable[..., tuple[Any, dict[str, Any]]]
REF_IMAGES = "ref_images"
# their trainers send every component through float32
LARGEST_ID = 2**24


def reward_function(
    reward: str | Reward,
    *,
    references: str | None = None,
    value_range: ValueRange = (0.0, 1.0),
    on_nan: OnNan = "raise",
    device: torch.device | str | None = None,
) -> Fn:
    """A plain `fn(images, prompts, metadata) -> (scores, {})`, safe in their thread pools.

    Calls from several threads take turns, so that a pool of eight does not hold eight batches on the device.

    Args:
        reward: name or sum of the catalogue, or a reward.
        references: the key of `metadata` that holds each sample's reference (path, PIL image, array or tensor), or
            `"ref_images"` for the fourth argument of the edit scripts.
        value_range: of floating-point images and references.
        on_nan: what an image without a score becomes: "raise" (default: training stops), "mean", "worst", a number.
        device: for weights of rewards that are loaded by name.

    Returns:
        The function; its scores are a float32 array `(N,)`, or a tensor with its graph if the reward is differentiable.

    Example:
        >>> fn = reward_function("ssim", references="clean")
        >>> images = torch.full((2, 3, 32, 32), 0.5)
        >>> scores, info = fn(images, ["", ""], [{"clean": image} for image in images])
        >>> scores.dtype, scores.shape
        (dtype('float32'), (2,))
    """
    check_on_nan(on_nan, allowed=("raise", "mean", "worst"), who="reward_function")
    judge = find_reward(reward, who="reward_function", references=references, device=device)
    lock = ProcessLock()

    def fn(
        images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
    ) -> tuple[Any, dict[str, Any]]:
        found = None if references is None else _references(references, metadata, ref_images)
        with lock:
            scores = score(judge, images, value_range=value_range, references=found, prompts=prompts, on_nan=on_nan)
        return (scores if judge.differentiable else scores.cpu().numpy()), {}

    return fn


def edit_reward_function(reward: str | Reward, **options: Any) -> Fn:
    """`reward_function` with the arguments as Edit-R1 orders them: `fn(ref_images, images, prompts, metadatas)`.

    Args:
        reward: name or sum of the catalogue, or a reward.
        options: as in `reward_function`.

    Returns:
        The function, `-> (float32 (N,), {})`.
    """
    ordered = reward_function(reward, **options)

    def fn(ref_images: Any, images: Any, prompts: Any, metadatas: Any) -> tuple[Any, dict[str, Any]]:
        return ordered(images, prompts, metadatas, ref_images)

    return fn


def install(
    module: Any,
    rewards: Mapping[str, float] | Sequence[tuple[float, str | Reward]],
    *,
    references: str | None = None,
    groups: str | None = None,
    value_range: ValueRange = (0.0, 1.0),
    on_nan: OnNan = "raise",
) -> None:
    """Replace `module.multi_score` by one that adds our rewards to those of the trainer's `config.reward_fn`.

    Every reward stays a component of its own, unweighted; `avg` is the weighted sum of theirs and ours, without NaN.

    Args:
        module: `flow_grpo.rewards` or what a child calls it; call `install` before the script reads `multi_score`.
        rewards: name -> weight, or (weight, name or reward) pairs. Where several are added, named ones must lie in
            [-1, 1], as in `iqareward.load`: `"psnr[10, 50]"`.
        references: as in `reward_function`.
        groups: the key of `metadata` that holds each sample's input id, an integer below 2**24; passed on as component
            `groups`.
        value_range: of floating-point images and references.
        on_nan: as in `reward_function`; also for a NaN in `avg` that comes from their rewards.

    Raises:
        ValueError: the module has no `multi_score` of its own, or an option is unknown; when the script builds its
            rewards: two have one name, one needs references and there are none, or one is not on the scale of a sum.
    """
    original = getattr(module, "multi_score", None)
    if original is None or original.__module__ == __name__:
        found = "none" if original is None else "ours, from an earlier call"
        raise ValueError(
            f"install expected a module with its own `multi_score` (e.g. flow_grpo.rewards), found {found}. "
            "Call it once, with all rewards."
        )
    check_on_nan(on_nan, allowed=("raise", "mean", "worst"), who="install")
    pairs = [(weight, name) for name, weight in rewards.items()] if isinstance(rewards, Mapping) else list(rewards)

    def multi_score(device: Any, score_dict: Mapping[str, float]) -> Fn:
        theirs = original(device, score_dict) if len(score_dict) else None
        ours = _named(pairs, score_dict, references, on_nan, device)

        def fn(
            images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            more = () if ref_images is None else (ref_images,)  # older versions have no fourth argument
            details: dict[str, Any] = {}
            if theirs:
                details.update(theirs(images, prompts, metadata, *more, only_strict=only_strict)[0])
            pixels = to_images(images, value_range=value_range)
            found = None if references is None else _references(references, metadata, ref_images)
            found = None if found is None else to_images(found, value_range=value_range)
            parts = [_flat(details["avg"])] if theirs else []
            for name, (weight, one) in ours.items():
                scores = _flat(one(pixels, prompts, metadata, found)[0])
                parts.append(weight * scores)
                details[name] = scores.numpy()
            if groups is not None:
                details["groups"] = _ids(column(groups, metadata, who="install"))
            details["avg"] = settle(torch.stack(parts).sum(0), on_nan, name="avg").numpy()
            return details, {}

        return fn

    module.multi_score = multi_score


def weighted_samples(advantages: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """What to `samples.update(...)` after the advantages are known, for training with a weight per sample.

    Their loop masks, permutes and splits every tensor of `samples`, so that `sample["sft_weight"]` reaches the inner
    loop, to multiply a supervised loss there. Keep rows with an SFT weight out of its filter
    `mask = advantages.abs().sum(1) != 0`, which drops every row without RL. DiffusionNFT takes r in place of
    advantages: `iqareward.weighting.optimality_probability`.

    Args:
        advantages: `samples["advantages"]`, `(N, T)` or `(N,)` (ddpo-pytorch).
        weights: from a weighter, for the N rows.

    Returns:
        `{"advantages": as given, times the RL weight, "sft_weight": (N,)}`.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.5]), sft=torch.tensor([0.0, 0.5]))
        >>> weighted_samples(torch.ones(2, 3), weights)["advantages"][1]
        tensor([0.5000, 0.5000, 0.5000])
    """
    return {
        "advantages": weighted_advantages(advantages, weights),
        "sft_weight": weights.sft.to(advantages.device, advantages.dtype),
    }


def _named(
    pairs: Sequence[tuple[float, str | Reward]],
    taken: Collection[str],
    references: str | None,
    on_nan: OnNan,
    device: Any,
) -> dict[str, tuple[float, Fn]]:
    """Name -> weight and function, for pixels in [0, 1] and references as the fourth argument."""
    source = None if references is None else REF_IMAGES
    named: dict[str, tuple[float, Fn]] = {}
    for weight, reward in pairs:
        judge = find_reward(reward, who="install", references=references, device=device)
        if judge.name in named or judge.name in taken:
            raise ValueError(f"install expected rewards with unique names, got {judge.name!r} twice.")
        if len(pairs) + len(taken) > 1 and isinstance(reward, str) and reward != (part := on_unit_scale(reward, judge)):
            raise ValueError(
                f"install adds scores of different scales: {reward!r} may leave [-1, 1]. Write {part!r}: the first "
                "score in brackets becomes 0, the second 1."
            )
        named[judge.name] = (float(weight), reward_function(judge, references=source, on_nan=on_nan))
    return named


def _references(source: str, metadata: Any, ref_images: Any) -> Any:
    if source != REF_IMAGES:
        return column(source, metadata, who="reward_function")
    if ref_images is None:
        raise ValueError(
            "reward_function expected the source images as its fourth argument (references='ref_images'), got none. "
            "Only the edit and Kontext scripts pass them; name a key of the metadata instead."
        )
    return ref_images


def _flat(values: Any) -> Tensor:
    """One float32 number per sample on the CPU, from a list, array or tensor `(N,)` or `(N, 1)`."""
    return torch.as_tensor(values).detach().to("cpu", torch.float32).reshape(-1)


def _ids(ids: Any) -> np.ndarray:
    array = np.asarray([int(i) for i in ids], dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= LARGEST_ID):
        raise ValueError(
            f"expected input ids in [0, 2**24), which float32 can tell apart, got {array.min()} to {array.max()}. "
            "Number the inputs of the dataset from 0."
        )
    return array.astype(np.float32)
