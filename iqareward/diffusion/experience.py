"""What a policy did and what it was worth: rollouts, scored, compared with each other and with the ground truth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iqareward.advantages import RewardMemory, group_advantages
from iqareward.difficulty import pass_rate, reference_distance
from iqareward.diffusion.finite import is_count, require_options
from iqareward.diffusion.policy import Condition, Policy, select
from iqareward.diffusion.rollout import Trajectory, rollout
from iqareward.groups import finite_or_nan, gather_rows
from iqareward.rewards.batching import Overlapped
from iqareward.types import Reward


@dataclass(frozen=True)
class Experience:
    """B inputs of one process with K rollouts each, N = B * K rows, the rollouts of an input side by side.

    Attributes:
        ids: B ids of the inputs.
        references: `[B, 3, H, W]` ground truth.
        condition: of the B inputs.
        trajectory: of the N rollouts.
        rewards: `[S, N]` fp32, NaN = not scored; one row per scored step, the sample last.
        distances: `[N]` >= 0 of the samples to the ground truth, NaN where it cannot be told.
        advantages: `[S, N]`, 0 where nothing can be said.
        active: `[B]` whether the rewards of an input differ at all.
        usable: `[B]` whether all pixels of an input are finite; others weigh nothing.
    """

    ids: tuple[int, ...]
    references: Tensor
    condition: Condition
    trajectory: Trajectory
    rewards: Tensor
    distances: Tensor
    advantages: Tensor
    active: Tensor
    usable: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def difficulty(self) -> Tensor:
        """`[B]` >= 0, mean distance of an input's samples; NaN where it cannot be told."""
        return self.distances.view(len(self), -1).nanmean(1)

    def pass_rate(self, distance: float) -> Tensor:
        """`[B]` share of an input's samples within `distance` of the ground truth; NaN where it cannot be told."""
        size = self.trajectory.group_size
        inputs = torch.arange(len(self), device=self.distances.device).repeat_interleave(size)
        return pass_rate(-self.distances, inputs, threshold=-distance)[::size]

    def rows(self, inputs: slice) -> "Experience":
        """These inputs only."""
        size = self.trajectory.group_size
        rollouts = slice(inputs.start * size, inputs.stop * size)
        return replace(
            self,
            ids=self.ids[inputs],
            references=self.references[inputs],
            condition=select(self.condition, inputs),
            trajectory=self.trajectory.rows(inputs),
            rewards=self.rewards[:, rollouts],
            distances=self.distances[rollouts],
            advantages=self.advantages[:, rollouts],
            active=self.active[inputs],
            usable=self.usable[inputs],
        )


@dataclass(frozen=True)
class Sampling:
    """How inputs are restored during training.

    Args:
        group_size: rollouts per input.
        num_steps: sampling steps.
        eta: noise of each step, as the policy's process takes it.
        window: the steps that are stochastic; all if not given.
        reward_steps: steps whose predicted clean image is scored as well; only the sample if empty.
        inputs_at_once: inputs sampled and scored together; all if not given.

    Raises:
        ValueError: an option is out of its range, or `reward_steps` do not rise.

    Example:
        >>> Sampling(group_size=8, num_steps=10, window=range(2, 6)).eta  # four of ten steps are stochastic
        1.0
    """

    group_size: int = 8
    num_steps: int = 10
    eta: float = 1.0
    window: range | None = None
    reward_steps: tuple[int, ...] = ()
    inputs_at_once: int | None = None

    def __post_init__(self) -> None:
        steps, count = self.reward_steps, "as an integer >= 1"
        rising = list(steps) == sorted(set(steps)) and all(0 <= step < self.num_steps for step in steps)
        requirements = {
            "group_size": (count, is_count(self.group_size)),
            "num_steps": (count, is_count(self.num_steps)),
            "eta": ("in [0, inf)", 0 <= self.eta < math.inf),
            "reward_steps": ("in [0, num_steps) and in rising order", rising),
            "inputs_at_once": (f"{count}, or None", self.inputs_at_once is None or is_count(self.inputs_at_once)),
        }
        require_options(self, requirements)


def images_of(policy: Policy, latents: Tensor) -> Tensor:
    """Images `[N, 3, H, W]` fp32 in [0, 1] of clean latents."""
    return policy.decode(latents).float().clamp(0, 1)


def checked_scores(scores: Any, *, name: str, count: int) -> Tensor:
    """What a reward answered, in fp32 and with NaN, "not scored", for what is not finite there.

    Args:
        scores: the answer, `[count]`.
        name: The reward's name, for error messages.
        count: the number of images it was given.

    Raises:
        TypeError: the answer is no tensor of real numbers.
        ValueError: it has another shape.

    Example:
        >>> checked_scores(torch.tensor([0.5, 1e300], dtype=torch.float64), name="sharpness", count=2)
        tensor([0.5000,    nan])
    """
    expected = (
        f"The reward {name!r} expected to answer with a tensor [{count}] of real numbers, one score per image, got"
    )
    if not isinstance(scores, Tensor) or scores.is_complex():
        raise TypeError(f"{expected} {scores.dtype if isinstance(scores, Tensor) else type(scores).__name__}.")
    if scores.shape != (count,):
        raise ValueError(f"{expected} the shape {list(scores.shape)}.")
    return finite_or_nan(scores.float())


@torch.no_grad()
def collect(
    policy: Policy,
    reward: Reward,
    degraded: Tensor,
    references: Tensor,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    metric: Callable[..., Tensor],
) -> tuple[Trajectory, Condition, Tensor, Tensor]:
    """Sample the inputs part by part, each part scored while the next is sampled if the reward is `Overlapped`.

    Args:
        policy: the model.
        reward: scores each image.
        degraded: `[B, 3, H, W]` in [0, 1].
        references: of the same shape.
        ids: B ids.
        sampling: how.
        seed: of the noise.
        metric: distance of an image to its reference, `metric(images, references) -> [N]`.

    Returns:
        The trajectory, the condition, rewards `[S, N]` (NaN where infinite) and distances to the ground truth `[N]`.

    Raises:
        TypeError: the reward answers with something other than a tensor of real numbers.
        ValueError: it does not answer with one score per image.
    """
    condition = policy.condition(degraded)
    size = sampling.inputs_at_once or len(ids)
    trajectories, distances, pending = [], [], []
    for start in range(0, len(ids), size):
        part = slice(start, min(start + size, len(ids)))
        trajectory = rollout(
            policy,
            degraded[part],
            ids=ids[part],
            group_size=sampling.group_size,
            num_steps=sampling.num_steps,
            eta=sampling.eta,
            seed=seed,
            window=sampling.window,
            keep_clean=sampling.reward_steps,
            condition=select(condition, part),
        )
        side_by_side = references[part].repeat_interleave(sampling.group_size, 0)
        # step by step: the pixels of all steps, and as many copies of the references, would not fit beside each other
        submit = partial(
            _submit, reward, references=side_by_side, degraded=degraded[part], group_size=sampling.group_size
        )
        steps = [submit(images_of(policy, trajectory.clean[step])) for step in sampling.reward_steps]
        images = images_of(policy, trajectory.sample)
        pending.append([*steps, submit(images)])
        distances.append(reference_distance(images, side_by_side, metric))
        trajectories.append(trajectory)
    rewards = torch.cat([torch.stack([scores().to(degraded.device) for scores in steps]) for steps in pending], 1)
    return _joined(trajectories), condition, rewards, torch.cat(distances)


def compare(rewards: Tensor, groups: Tensor, *, std_floor: float, memory: RewardMemory | None) -> tuple[Tensor, Tensor]:
    """Advantages `[S, N]` and whether each row's input is active `[N]`, with the statistics of all processes.

    Each scored step is compared with the same step of the other rollouts only.

    Args:
        rewards: `[S, N]` of this process.
        groups: `[N]` ids of the inputs, with one meaning on all processes.
        std_floor: rewards of an input that spread no more than this say nothing.
        memory: compares the sample with the input's own history instead; it is updated.
    """
    gathered, mine = gather_rows(rewards.T.contiguous(), groups)
    all_rewards, all_groups = gathered
    parts = [group_advantages(step, all_groups, std_floor=std_floor) for step in all_rewards.unbind(1)]
    if memory is not None:
        memory.update(all_rewards[:, -1], all_groups)
        parts[-1] = memory.advantages(all_rewards[:, -1], all_groups)
    values = torch.stack([part.values for part in parts])
    return values[:, mine], parts[-1].active[mine]


def _submit(
    reward: Reward, images: Tensor, references: Tensor, degraded: Tensor, group_size: int
) -> Callable[[], Tensor]:
    name, count = getattr(reward, "name", type(reward).__name__), images.shape[0]
    columns: dict[str, Any] = {"references": references}
    if getattr(reward, "needs_inputs", False):
        columns["inputs"] = degraded.repeat_interleave(group_size, 0)
    if isinstance(reward, Overlapped):
        pending = reward.submit(images, **columns)
        return lambda: checked_scores(pending.result(), name=name, count=count)
    scores = checked_scores(reward(images, **columns), name=name, count=count)
    return lambda: scores


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    latents, log_probs = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("latents", "log_probs"))
    clean = {step: torch.cat([part.clean[step] for part in parts]) for step in parts[0].clean}
    return replace(parts[0], latents=latents, log_probs=log_probs, clean=clean)
