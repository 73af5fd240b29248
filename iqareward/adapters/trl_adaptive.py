"""Difficulty-adaptive weights in TRL: its trainers take no weight per sample, so a subclass scales their advantages."""

import math
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters.trl import TRLReward
from iqareward.groups import group_statistics
from iqareward.optional import require
from iqareward.schedules.schedule import check_signal
from iqareward.weighting import AdaptiveWeighter, weighted_advantages


def adaptive_trainer(trainer: type, weighter: AdaptiveWeighter, fidelity: TRLReward) -> Any:
    """A subclass of GRPOTrainer or RLOOTrainer that learns more from the prompts whose images are still bad.

    Every advantage is multiplied with the RL share of its prompt, from the mean distance of the prompt's images to the
    ground truth. TRL has no supervised loss, so the other half of the weights is not used; evaluation is not changed.
    `adaptive/difficulty` and `adaptive/rl_share` appear in the logs.

    Args:
        trainer: `trl.GRPOTrainer` or `trl.RLOOTrainer`. Read from 1.16, whose `_calculate_rewards` and
            `_generate_and_score_completions` are extended.
        weighter: in mode "convex"; calibrated, or built with `calibrate_on_first=True`. Its state is not part of TRL's
            checkpoints: save `weighter.state_dict()` beside them.
        fidelity: measures the distance: a reward with references that is bounded above, and better not the one that is
            trained on. It is not one of the `reward_funcs`; its images are decoded once more.

    Returns:
        A class that is built like `trainer`.

    Raises:
        ValueError: the weighter would scale nothing or does not go by difficulty, or the reward is not bounded above.

    Example:
        >>> weighter = AdaptiveWeighter(mode="convex", calibrate_on_first=True)
        >>> fidelity = TRLReward("gmsd", "restored", references="clean")
        >>> adaptive_trainer(object, weighter, fidelity).__name__
        'Adaptiveobject'
    """
    check_signal("adaptive_trainer", weighter)
    best = fidelity.reward.bounds[1]
    if weighter.mode != "convex":
        raise ValueError(
            "adaptive_trainer expected a weighter with mode='convex', got 'additive', whose RL weight is 1 for all. "
            "Build it with AdaptiveWeighter(mode='convex')."
        )
    if best is None or not fidelity.reward.needs_references:
        raise ValueError(
            f"adaptive_trainer expected `fidelity` with references and an upper bound, got {fidelity.reward.name!r}. "
            "Use for example 'gmsd', 'ssim', 'psnr' or 'lpips'."
        )

    class Adaptive(trainer):
        def _calculate_rewards(
            self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, *rest: Any
        ) -> Tensor:
            rewards = super()._calculate_rewards(inputs, prompts, completions, *rest)
            scores = _scores(self, fidelity, inputs, prompts=prompts, completions=completions)
            self._difficulty = _per_prompt(self, (best - scores).abs())
            return rewards

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            if self.model.training:
                weights = weighter(self._difficulty)
                batch["advantages"] = weighted_advantages(batch["advantages"], weights)
                weighter.update(self._difficulty)
                self._metrics["train"]["adaptive/difficulty"].append(self._difficulty.nanmean().item())
                self._metrics["train"]["adaptive/rl_share"].append(weights.rl.mean().item())
            return batch

    Adaptive.__name__ = Adaptive.__qualname__ = f"Adaptive{trainer.__name__}"
    return Adaptive


def _scores(trainer: Any, fidelity: TRLReward, inputs: list[dict[str, Any]], **call: Any) -> Tensor:
    """`[local rows]`, what the reward says to the call that TRL makes of its own reward functions; NaN for None."""
    columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
    if getattr(trainer, "environments", None) is not None:
        columns["environments"] = trainer.environments
    scores = fidelity(**columns, **call)
    return torch.tensor([math.nan if score is None else score for score in scores], device=trainer.accelerator.device)


def _per_prompt(trainer: Any, distances: Tensor) -> Tensor:
    """`[local rows]`, each row's mean over all rows of its prompt, wherever they were generated."""
    accelerate = require("accelerate", extra="trl", purpose="adaptive_trainer")
    everywhere = accelerate.utils.gather(distances)
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    groups = torch.arange(len(everywhere), device=everywhere.device) // size
    start = trainer.accelerator.process_index * len(distances)
    return group_statistics(everywhere, groups).mean[start : start + len(distances)]
