"""A GRPO or RLOO run of the restoration agent with adaptive weights, and what the library makes of the same images."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import AdaptiveWeighter
from iqareward.adapters.trl import TRLReward, adaptive_trainer
from iqareward.advantages import group_advantages
from iqareward.groups import group_statistics
from tests.adapters.restoration_agent import SEEN, apply_operations, build

PARTS = {"ssim": 0.7, "haarpsi": 0.3}
DISTANCES = torch.tensor([0.004, 0.01, 0.02])
GENERATIONS = 4


def some_broken(completions: list[str], **columns: Any) -> list[Tensor | None]:
    """The images of `apply_operations`, of which those that were blurred are not finite."""
    images = apply_operations(completions, **columns)
    for row, text in enumerate(completions):
        if images[row] is not None and "blur" in text:
            images[row] = images[row] * torch.nan
    return images


def weighter(mode: Literal["additive", "convex"] = "convex") -> AdaptiveWeighter:
    made = AdaptiveWeighter(mode=mode)
    logs = DISTANCES.log()
    made.load_state_dict(
        made.state_dict() | {"anchor": torch.stack([logs.mean()[None], made.steepness / logs.std()[None]])}
    )  # as by `calibrate`, which would wait for the other processes
    return made


def run(
    trainer: type, folder: Any, *, targets: str | None = None, rewards: Sequence[Any] | None = None, **options: Any
) -> tuple[list[Any], list[Any], Any]:
    """One record per step; (advantages in TRL's order, advantages that the loss reads) of each step; the trainer."""
    distance = TRLReward("gmsd", some_broken, references="clean")
    advantages: list[Any] = []

    class Watched(adaptive_trainer(trainer, weighter(), distance, targets=targets)):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            advantages.append((batch["advantages"].clone(), []))
            return batch

        def compute_loss(self, model, inputs, *args, **more):
            advantages[-1][1].append(inputs["advantages"])
            return super().compute_loss(model, inputs, *args, **more)

    reward = TRLReward("0.7*ssim + 0.3*haarpsi", some_broken, references="clean", name="restored")
    built = build(Watched, folder, [reward] if rewards is None else list(rewards), **options)
    built.train()
    return [record for record in built.state.log_history if "reward" in record], advantages, built


def seen(functions: int = 1) -> list[tuple[list[Tensor | None], list[Image.Image]]]:
    """The images of each step, which the reward functions decoded first, and then the distance."""
    return SEEN[:: functions + 1]


def scores(name: str, restored: Sequence[Tensor | None], clean: Sequence[Image.Image]) -> Tensor:
    """`[B]` scores by the library alone; NaN where there is no image."""
    truths = [iqareward.to_images(truth)[0] for truth in clean]
    images = [truth * torch.nan if image is None else image for image, truth in zip(restored, truths, strict=True)]
    return iqareward.load(name)(images, references=truths)


def shares(restored: Sequence[Tensor | None], clean: Sequence[Image.Image], rewards: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` mean distance of the images of each row's prompt, and its RL weight."""
    groups = torch.arange(len(restored)) // GENERATIONS
    distance = group_statistics(-scores("gmsd", restored, clean), groups).mean
    return distance, weighter()(distance, has_signal=group_statistics(rewards, groups).std > 0).rl


def expected(restored: Sequence[Tensor | None], clean: Sequence[Image.Image], scale: Any) -> tuple[dict, Tensor]:
    """What the trainer should log for the images of one step, and the advantages with their weights."""
    parts = {name: scores(name, restored, clean) for name in PARTS}
    total = sum(weight * parts[name] for name, weight in PARTS.items())
    groups = torch.arange(len(restored)) // GENERATIONS
    distance, share = shares(restored, clean, total)
    missing = torch.tensor([float(image is None) for image in restored])
    log = {f"restored/{name}": part.nanmean() for name, part in parts.items()}
    log |= {"reward": total.nanmean(), "rewards/restored/mean": total.nanmean(), "restored/no_image": missing.mean()}
    log |= {"restored/unscored": total.isnan().float().mean() - missing.mean()}
    log |= {"adaptive/difficulty": distance.nanmean(), "adaptive/rl_share": share.mean()}
    advantages = group_advantages(total, groups, scale=scale).values * share
    return {name: value.item() for name, value in log.items()}, advantages
