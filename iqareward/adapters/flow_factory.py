"""Rewards for Flow-Factory, by dotted path in its YAML.

- Read: X-GenGroup/Flow-Factory a0b2bc5 (2026-05) and later classes. It drops what is not a subclass of its own classes
  without a word, so these are real subclasses, made when Flow-Factory is importable.
- Range: lists of float CHW in [0, 1]; sizes may differ. Scores are float32 whatever the `dtype` of the config.
- References: `condition_images` (the degraded input; the first of each sample), or a key of the dataset's columns where
  the version forwards them as JSON `metadata`.
- Failure: `on_nan: raise`; mean, worst or a number on request. Flow-Factory itself passes NaN on to the advantages.

```yaml
rewards:
  - name: quality
    reward_model: iqareward.adapters.flow_factory.IQARewardModel
    weight: 1.0
    reward: "0.7*qalign + 0.3*ssim"   # ours from here on
    references: condition_images
    on_nan: raise
```

`IQARankRewardModel` takes the same keys and `std_floor`; it gives each image its rank among the rollouts of its input,
from -1 to 1, or 0 for all if their scores spread no more than `std_floor`. Values must be plain words and numbers.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._values import check_on_nan, column, find_reward, framework, score
from iqareward.advantages import rank_advantages
from iqareward.schedules.schedule import check_signal
from iqareward.types import Scores
from iqareward.weighting import AdaptiveWeighter, weighted_advantages

CONDITION_IMAGES = "condition_images"
KEYS = ("reward", "references", "on_nan")
HOME = "https://github.com/X-GenGroup/Flow-Factory"


class _Judge:
    """The settings of a YAML entry, and the scoring that both classes share."""

    def __init__(self, who: str, settings: dict[str, Any], device: Any, keys: Sequence[str] = KEYS) -> None:
        if not {"reward"} <= set(settings) <= set(keys):
            raise ValueError(
                f"{who} expected the keys {', '.join(keys)} in its YAML entry, `reward` at least, got {settings}."
            )
        self.who = who
        self.references = settings.get("references")
        self.on_nan = settings.get("on_nan", "raise")
        check_on_nan(self.on_nan, allowed=("raise", "mean", "worst"), who=who)
        self.reward = find_reward(settings["reward"], who=who, references=self.references, device=device)

    def __call__(self, prompt: Any, image: Any, condition_images: Any, metadata: Any) -> Scores:
        if image is None:
            raise ValueError(f"{self.who} scores images; these samples have none. Videos are not supported.")
        references = None
        if self.references == CONDITION_IMAGES:
            if condition_images is None:
                raise ValueError(f"{self.who} expected `condition_images` in every sample, got none.")
            references = [images[0] for images in condition_images]
        elif self.references is not None:
            rows = metadata and [json.loads(row) if isinstance(row, str) else row for row in metadata]
            references = column(self.references, rows, who=self.who)
        return score(
            self.reward, image, value_range=(0.0, 1.0), references=references, prompts=prompt, on_nan=self.on_nan
        )


@cache
def _pointwise() -> type:
    rewards = framework("flow_factory.rewards", who="IQARewardModel", home=HOME)

    class IQARewardModel(rewards.PointwiseRewardModel):
        """Each image's own score, higher is better."""

        required_fields = ("image", "prompt")
        use_tensor_inputs = True

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            self.judge = _Judge("IQARewardModel", config.extra_kwargs, self.device)

        def __call__(
            self, prompt: Any = None, image: Any = None, condition_images: Any = None, metadata: Any = None
        ) -> Any:
            scores = self.judge(prompt, image, condition_images, metadata)
            return rewards.RewardModelOutput(rewards=scores)

    IQARewardModel.__qualname__ = "IQARewardModel"
    return IQARewardModel


@cache
def _groupwise() -> type:
    rewards = framework("flow_factory.rewards", who="IQARankRewardModel", home=HOME)

    class IQARankRewardModel(rewards.GroupwiseRewardModel):
        """Each image's rank among the rollouts of its input, from -1 (worst) to 1 (best)."""

        use_tensor_inputs = True

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            self.judge = _Judge("IQARankRewardModel", config.extra_kwargs, self.device, (*KEYS, "std_floor"))
            self.std_floor = float(config.extra_kwargs.get("std_floor", 0.0))
            # only these fields are gathered from the other processes
            more = {None: (), CONDITION_IMAGES: (CONDITION_IMAGES,)}.get(self.judge.references, ("metadata",))
            self.required_fields = ("image", "prompt", *more)

        def __call__(
            self, prompt: Any = None, image: Any = None, condition_images: Any = None, metadata: Any = None
        ) -> Any:
            scores = self.judge(prompt, image, condition_images, metadata)
            one_group = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
            ranks = rank_advantages(scores, one_group, std_floor=self.std_floor).values
            return rewards.RewardModelOutput(rewards=ranks)

    IQARankRewardModel.__qualname__ = "IQARankRewardModel"
    return IQARankRewardModel


def __getattr__(name: str) -> type:
    if name == "IQARewardModel":
        return _pointwise()
    if name == "IQARankRewardModel":
        return _groupwise()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adaptive_aggregation(
    weighter: AdaptiveWeighter, difficulty: Callable[[Sequence[Any]], Tensor], *, aggregation: str = "gdpo"
) -> Callable[[Any, Sequence[Any], dict[str, Tensor], bool], Tensor]:
    """What `AdvantageProcessor.compute_advantages` takes as `aggregation_func`: its own result, weighted per sample.

    The YAML allows no callable, so pass it in a subclass of the trainer. Each sample's supervised weight is stored
    beside its advantage, in `sample.extra_kwargs["sft_weight"]`. The NFT trainer makes its r from the advantage, so
    they work there too.

    Args:
        weighter: calibrated, or with `calibrate_on_first=True`.
        difficulty: `difficulty(samples) -> [N]`, larger = harder, one value for all rollouts of an input.
        aggregation: how Flow-Factory combines its rewards before that, "gdpo" or "sum".

    Returns:
        `aggregate(processor, samples, rewards, store_to_samples) -> [N]` advantages.

    Raises:
        ValueError: the weighter does not go by difficulty.
    """
    check_signal("adaptive_aggregation", weighter)

    def aggregate(processor: Any, samples: Sequence[Any], rewards: dict[str, Tensor], store_to_samples: bool) -> Tensor:
        advantages = processor.compute_advantages(samples, rewards, store_to_samples, aggregation)
        difficulties = difficulty(samples)
        weights = weighter(difficulties)
        weighter.update(difficulties)
        weighed = weighted_advantages(advantages, weights)
        if store_to_samples:
            for sample, advantage, sft in zip(samples, weighed, weights.sft, strict=True):
                sample.extra_kwargs["advantage"] = advantage
                sample.extra_kwargs["sft_weight"] = sft
        return weighed

    return aggregate
