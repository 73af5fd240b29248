"""Rewards for Flow-Factory, named by dotted path in its YAML.

Flow-Factory silently ignores what is not a subclass of its own classes, so `IQARewardModel` and `IQARankRewardModel`
are subclasses, made when Flow-Factory can be imported. Their settings are the keys of the YAML entry:

- `reward`: a name or sum of the catalogue as text, options included; Flow-Factory refuses a mapping here.
- `references`, `inputs`: `condition_images` (the first of each sample), or a column of the dataset.
- `on_nan`: `raise`, `mean`, `worst`, or a number. Flow-Factory itself stops at NaN without naming the image.
- `margin` (ranks only): differences of scores that are no larger are ties; see `iqareward.rewards.RankInGroup`.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from iqareward.adapters._core import Scorer, column, framework
from iqareward.rewards.catalog import load
from iqareward.rewards.rank import RankInGroup
from iqareward.schedules import check_signal
from iqareward.types import Scores
from iqareward.weighting import AdaptiveWeighter, weighted_advantages

__all__ = ["adaptive_aggregation"]  # the two classes are made on access

_CONDITION_IMAGES = "condition_images"
_KEYS = ("reward", "references", "inputs", "on_nan")


def adaptive_aggregation(
    weighter: AdaptiveWeighter, difficulty: Callable[[Sequence[Any]], Tensor], *, aggregation: str = "gdpo"
) -> Callable[[Any, Sequence[Any], dict[str, Tensor], bool], Tensor]:
    """Make an aggregation for Flow-Factory's `AdvantageProcessor`: its own advantages, times the RL weight per sample.

    The YAML allows no callable, so assign it to `training_args.advantage_aggregation` in a subclass of the trainer:
    `reward_optimization_overlap`, which cannot use it, is then an error. Each sample's SFT weight is stored beside its
    advantage, in `sample.extra_kwargs["sft_weight"]`, and is a column of the batches that trainers make.

    Args:
        weighter: A calibrated weighter, or one with `calibrate_on_first=True`.
        difficulty: `difficulty(samples) -> [N]`, larger = harder, one value for all rollouts of an input.
        aggregation: How Flow-Factory combines its rewards before that, "gdpo" or "sum".

    Returns:
        `aggregate(processor, samples, rewards, store_to_samples) -> [N]` advantages.

    Raises:
        ValueError: The weighter does not take a difficulty.
    """
    check_signal("adaptive_aggregation", weighter)

    def aggregate(processor: Any, samples: Sequence[Any], rewards: dict[str, Tensor], store_to_samples: bool) -> Tensor:
        advantages = processor.compute_advantages(samples, rewards, store_to_samples, aggregation)
        difficulties = difficulty(samples).to(advantages.device)  # samples may be on the CPU, batches are not
        weights = weighter(difficulties)
        weighter.update(difficulties)
        weighted = weighted_advantages(advantages, weights)
        if store_to_samples:
            for sample, advantage, sft in zip(samples, weighted, weights.sft, strict=True):
                sample.extra_kwargs["advantage"] = advantage
                sample.extra_kwargs["sft_weight"] = sft
        return weighted

    return aggregate


class _Settings:
    """A YAML entry, and the scoring that both classes share."""

    def __init__(self, who: str, entry: dict[str, Any], device: Any, *, ranks: bool = False) -> None:
        keys = (*_KEYS, "margin") if ranks else _KEYS
        if not {"reward"} <= set(entry) <= set(keys):
            raise ValueError(
                f"{who} expected the keys {', '.join(keys)} in its YAML entry, `reward` at least, got {entry}."
            )
        self.who, self.ranks, reward = who, ranks, entry["reward"]
        self.sources = {name: entry.get(name) for name in ("references", "inputs")}
        if ranks:
            loaded: Any = reward if callable(reward) else load(reward, device=device)
            reward = RankInGroup(loaded, margin=float(entry.get("margin", 0.0)))
        sources = {**self.sources, "ids": "the call" if ranks else None}
        on_nan = entry.get("on_nan", "raise")
        self.scorer = Scorer(reward, who=who, sources=sources, on_nan=on_nan, device=device)

    def score(self, prompt: Any, image: Any, condition_images: Any, metadata: Any) -> Scores:
        if image is None:
            raise ValueError(f"{self.who} scores images; these samples have none. Videos are not supported.")
        first = condition_images and [images[0] for images in condition_images]
        rows = metadata and [json.loads(row) if isinstance(row, str) else row for row in metadata]
        columns = {
            name: column(source, rows, who=self.who, condition_images=first) for name, source in self.sources.items()
        }
        one_group = [0] * len(image) if self.ranks else None
        return self.scorer(image, prompts=prompt, ids=one_group, **columns)


@cache
def _classes(rewards: ModuleType, samples: ModuleType) -> dict[str, type]:
    # Before that field existed, gathered samples were grouped by a hash of what was gathered.
    identified = hasattr(samples.BaseSample, "sampling_group_id")

    class IQARewardModel(rewards.PointwiseRewardModel):
        """Each image's own score, higher is better."""

        required_fields = ("image", "prompt")
        use_tensor_inputs = True

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            self.settings = _Settings("IQARewardModel", config.extra_kwargs, self.device)

        def __call__(
            self, prompt: Any = None, image: Any = None, condition_images: Any = None, metadata: Any = None
        ) -> Any:
            scores = self.settings.score(prompt, image, condition_images, metadata)
            return rewards.RewardModelOutput(rewards=scores)

    class IQARankRewardModel(rewards.GroupwiseRewardModel):
        """Each image's rank among the rollouts of its input, from 0 (worst) to 1 (best)."""

        use_tensor_inputs = True

        def __init__(self, config: Any, accelerator: Any) -> None:
            super().__init__(config, accelerator)
            self.settings = _Settings("IQARankRewardModel", config.extra_kwargs, self.device, ranks=True)
            # Where a group is spread over processes, only these fields are gathered; columns are in `extra_kwargs`.
            named = {source for source in self.settings.sources.values() if source is not None}
            more = {source if source == _CONDITION_IMAGES else "extra_kwargs" for source in named}
            if not identified:
                more.add(_CONDITION_IMAGES)
            self.required_fields = ("image", "prompt", *sorted(more))

        def __call__(
            self, prompt: Any = None, image: Any = None, condition_images: Any = None, metadata: Any = None
        ) -> Any:
            ranks = self.settings.score(prompt, image, condition_images, metadata)
            return rewards.RewardModelOutput(rewards=ranks)

    made = {"IQARewardModel": IQARewardModel, "IQARankRewardModel": IQARankRewardModel}
    for name, one in made.items():
        one.__qualname__ = name  # pickled by name
    return made


def __getattr__(name: str) -> type:
    if name not in ("IQARewardModel", "IQARankRewardModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "https://github.com/X-GenGroup/Flow-Factory"
    modules = [framework(f"flow_factory.{part}", who=name, home=home) for part in ("rewards", "samples")]
    return _classes(*modules)[name]
