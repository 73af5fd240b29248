"""Sample several restorations of each input, score them and compare them with each other and with the reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iqareward.advantages import RewardMemory, group_advantages
from iqareward.difficulty import pass_rate, reference_distance
from iqareward.diffusion.finite import is_count, require_options
from iqareward.diffusion.policies import Condition, Policy, repeat, select
from iqareward.diffusion.processes import Step, Transition
from iqareward.groups import finite_or_nan, gather_rows
from iqareward.rewards.batching import Overlapped
from iqareward.seeds import noise_per_input
from iqareward.types import Reward


@dataclass(frozen=True)
class Trajectory:
    """K rollouts of each of B inputs, N = B * K rows, the rollouts of an input side by side.

    Only latents and log-probabilities are kept: the network's activations are recomputed step by step in training.

    Attributes:
        latents: `[T + 1, N, ...]` fp32, from noise to the sample.
        log_probs: `[T, N]` fp32, per element (see `Transition.log_prob`); 0 at deterministic steps.
        schedule: The T steps.
        etas: The eta of each step; 0 outside of the window.
        stds: Standard deviation of each step; 0 where it was deterministic.
        group_size: Rollouts per input, K.
        clean: Maps a step in `keep_clean` to the clean latents `[N, ...]` predicted there.
    """

    latents: Tensor
    log_probs: Tensor
    schedule: tuple[Step, ...]
    etas: tuple[float, ...]
    stds: tuple[float, ...]
    group_size: int
    clean: dict[int, Tensor] = field(default_factory=dict)

    @property
    def sample(self) -> Tensor:
        """`[N, ...]` the latents of the restored images."""
        return self.latents[-1]

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The steps that drew noise; a policy gradient learns from these only."""
        return tuple(index for index, std in enumerate(self.stds) if std > 0)

    def select(self, inputs: slice) -> "Trajectory":
        """The rollouts of these inputs."""
        rollouts = slice(inputs.start * self.group_size, inputs.stop * self.group_size)
        clean = {step: latents[rollouts] for step, latents in self.clean.items()}
        return replace(self, latents=self.latents[:, rollouts], log_probs=self.log_probs[:, rollouts], clean=clean)


@torch.no_grad()
def rollout(
    policy: Policy,
    degraded: Tensor,
    *,
    ids: Sequence[int],
    group_size: int,
    num_steps: int,
    eta: float,
    seed: int,
    window: range | None = None,
    keep_clean: Sequence[int] = (),
    condition: Condition | None = None,
) -> Trajectory:
    """Restore each input several times, each time with different noise, and keep the trajectory of the latents.

    The noise follows from `seed` and the input's id alone, so an input's rollouts are the same in any batch, on any
    number of processes and after a resume.

    Args:
        policy: The model.
        degraded: `[B, 3, H, W]` in [0, 1].
        ids: B integers >= 0, one per input.
        group_size: Rollouts per input, K.
        num_steps: Sampling steps, T.
        eta: Noise of each step, as `policy.process` takes it; 0 is deterministic after the first noise.
        seed: Seed of the noise; use a different one for every optimiser step.
        window: Steps that are stochastic, while the others follow the ODE (MixGRPO); all if not given.
        keep_clean: Steps whose prediction of the clean latents is kept, for stepwise rewards.
        condition: `policy.condition(degraded)`, if you have it already.

    Returns:
        A `Trajectory` on the device of `degraded`; decode its `sample` with `policy.decode`.

    Raises:
        ValueError: Ids and images differ in number, or the window leaves the schedule.

    Example:
        >>> from iqareward.diffusion import build_restorer
        >>> degraded = torch.rand(2, 3, 8, 8)
        >>> options = dict(group_size=3, num_steps=4, eta=1.0, seed=0)
        >>> trajectory = rollout(build_restorer((8, 16)), degraded, ids=[7, 9], **options)
        >>> trajectory.sample.shape, trajectory.stochastic
        (torch.Size([6, 3, 8, 8]), (0, 1, 2))

    References:
        Li et al., MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE, 2025,
        https://arxiv.org/abs/2507.21802
    """
    if len(ids) != degraded.shape[0]:
        raise ValueError(f"rollout expected one id per image, got {len(ids)} ids for {degraded.shape[0]} images.")
    schedule = tuple(policy.process.schedule(num_steps))
    window = range(len(schedule)) if window is None else window
    if len(window) and not (min(window) >= 0 and max(window) < len(schedule)):
        raise ValueError(f"rollout expected `window` within range({len(schedule)}), got {window}.")
    condition = repeat(policy.condition(degraded) if condition is None else condition, group_size)
    shape = policy.latent_shape(degraded)
    etas = tuple(eta if index in window else 0.0 for index in range(len(schedule)))

    def noise(step: int) -> Tensor:
        return noise_per_input(ids, group_size, shape, seed=seed, step=step, device=degraded.device)

    path, log_probs, stds, clean = [noise(0)], [], [], {}
    for index, (step, step_eta) in enumerate(zip(schedule, etas, strict=True)):
        transition = _take_step(policy, path[-1], step, step_eta, condition)
        fresh = transition.std * noise(index + 1) if transition.std else 0.0
        path.append(transition.mean + fresh)
        log_probs.append(transition.log_prob(path[-1]))
        stds.append(transition.std)
        if index in keep_clean:
            clean[index] = transition.clean
    return Trajectory(torch.stack(path), torch.stack(log_probs), schedule, etas, tuple(stds), group_size, clean)


def _take_step(policy: Policy, latents: Tensor, step: Step, eta: float, condition: Condition) -> Transition:
    """The Gaussian of one step of the policy from `latents` `[N, ...]`; with a gradient to the model if enabled."""
    times = torch.full((latents.shape[0],), step.time, device=latents.device)
    output = policy.predict(latents, times, condition)
    return policy.process.transition(output, latents, step, eta=eta)


def replay(policy: Policy, trajectory: Trajectory, index: int, condition: Condition) -> Transition:
    """Step `index` of a trajectory under the policy as it is now, given the condition of all its rollouts."""
    step, eta = trajectory.schedule[index], trajectory.etas[index]
    return _take_step(policy, trajectory.latents[index], step, eta, condition)


@dataclass(frozen=True)
class Experience:
    """B inputs of one process with K rollouts each, N = B * K rows, the rollouts of an input side by side.

    Attributes:
        ids: B ids of the inputs.
        references: `[B, 3, H, W]` ground truth.
        condition: The condition of the B inputs, from the policy.
        trajectory: The N rollouts.
        rewards: `[S, N]` fp32, NaN = not scored; one row per scored step, the sample last.
        distances: `[N]` >= 0 from the samples to the references, NaN where unknown.
        advantages: `[S, N]`, 0 where unknown.
        has_signal: `[B]` whether the rewards of an input differ at all.
        usable: `[B]` whether all pixels of an input are finite; others get no weight.
    """

    ids: tuple[int, ...]
    references: Tensor
    condition: Condition
    trajectory: Trajectory
    rewards: Tensor
    distances: Tensor
    advantages: Tensor
    has_signal: Tensor
    usable: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def difficulty(self) -> Tensor:
        """`[B]` >= 0, mean distance of an input's samples to its reference; NaN where unknown."""
        return self.distances.view(len(self), -1).nanmean(1)

    def pass_rate(self, distance: float) -> Tensor:
        """`[B]` share of an input's samples within `distance` of the reference; NaN where unknown."""
        size = self.trajectory.group_size
        inputs = torch.arange(len(self), device=self.distances.device).repeat_interleave(size)
        return pass_rate(-self.distances, inputs, threshold=-distance)[::size]

    def select(self, inputs: slice) -> "Experience":
        """The experience of these inputs."""
        size = self.trajectory.group_size
        rollouts = slice(inputs.start * size, inputs.stop * size)
        return replace(
            self,
            ids=self.ids[inputs],
            references=self.references[inputs],
            condition=select(self.condition, inputs),
            trajectory=self.trajectory.select(inputs),
            rewards=self.rewards[:, rollouts],
            distances=self.distances[rollouts],
            advantages=self.advantages[:, rollouts],
            has_signal=self.has_signal[inputs],
            usable=self.usable[inputs],
        )


@dataclass(frozen=True)
class RolloutConfig:
    """Options for sampling restorations during training.

    Args:
        group_size: Rollouts per input.
        num_steps: Sampling steps.
        eta: Noise of each step, as the policy's process takes it.
        window: Steps that are stochastic; all if not given.
        reward_steps: Steps whose predicted clean image is scored as well; only the sample if empty.
        inputs_at_once: Inputs sampled and scored together; all if not given.

    Raises:
        ValueError: An option is out of its range, or `reward_steps` do not rise.

    Example:
        >>> RolloutConfig(group_size=8, num_steps=10, window=range(2, 6)).eta  # four of ten steps are stochastic
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
    """The `[count]` scores of a reward in fp32, NaN where not finite; an error if they are anything else."""
    expected = f"The reward {name!r} was expected to return a tensor [{count}] of real numbers, one per image, got"
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
    config: RolloutConfig,
    *,
    seed: int,
    metric: Callable[..., Tensor],
) -> tuple[Trajectory, Condition, Tensor, Tensor]:
    """Sample the inputs part by part; an `Overlapped` reward scores each part while the next is sampled.

    Returns:
        The trajectory, the condition, rewards `[S, N]` (NaN = not scored) and distances to the references `[N]`.
    """
    condition = policy.condition(degraded)
    size = config.inputs_at_once or len(ids)
    trajectories, distances, pending = [], [], []
    for start in range(0, len(ids), size):
        part = slice(start, min(start + size, len(ids)))
        trajectory = rollout(
            policy,
            degraded[part],
            ids=ids[part],
            group_size=config.group_size,
            num_steps=config.num_steps,
            eta=config.eta,
            seed=seed,
            window=config.window,
            keep_clean=config.reward_steps,
            condition=select(condition, part),
        )
        side_by_side = references[part].repeat_interleave(config.group_size, 0)
        # Step by step, because the images of all steps would not fit into memory at once.
        submit = partial(
            _submit, reward, references=side_by_side, degraded=degraded[part], group_size=config.group_size
        )
        steps = [submit(images_of(policy, trajectory.clean[step])) for step in config.reward_steps]
        images = images_of(policy, trajectory.sample)
        pending.append([*steps, submit(images)])
        distances.append(reference_distance(images, side_by_side, metric))
        trajectories.append(trajectory)
    rewards = torch.cat([torch.stack([scores().to(degraded.device) for scores in steps]) for steps in pending], 1)
    return _joined(trajectories), condition, rewards, torch.cat(distances)


def compare(rewards: Tensor, groups: Tensor, *, std_floor: float, memory: RewardMemory | None) -> tuple[Tensor, Tensor]:
    """Advantages `[S, N]`, and whether each rollout's input has a signal `[N]`, with the statistics of all processes.

    Each scored step is compared with the same step of the other rollouts only. A `memory` compares the sample with the
    input's own history instead, and is updated.
    """
    gathered, mine = gather_rows(rewards.T.contiguous(), groups)
    all_rewards, all_groups = gathered
    parts = [group_advantages(step, all_groups, std_floor=std_floor) for step in all_rewards.unbind(1)]
    if memory is not None:
        memory.update(all_rewards[:, -1], all_groups)
        parts[-1] = memory.advantages(all_rewards[:, -1], all_groups)
    values = torch.stack([part.values for part in parts])
    return values[:, mine], parts[-1].has_signal[mine]


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
