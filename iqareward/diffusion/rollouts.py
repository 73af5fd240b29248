"""Sample several restorations of each input, score them and compare them with each other and with the reference."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from iqareward.advantages import RewardMemory, combine_advantages, group_advantages
from iqareward.difficulty import pass_rate, reference_distance
from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition, check_condition, repeat, select
from iqareward.diffusion.finite import is_count, require_options
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.core import Policy
from iqareward.diffusion.processes import Step, Transition
from iqareward.groups import finite_or_nan, gather_rows
from iqareward.rewards.batching import Overlapped
from iqareward.rewards.core import refuse_groups
from iqareward.rewards.rank import RankInGroup
from iqareward.types import Reward, needs


@dataclass(frozen=True)
class Trajectory:
    """The paths of N rollouts.

    Only latents and log-probabilities are kept: the network's activations are recomputed step by step in training.

    Attributes:
        latents: T + 1 tensors `[N, ...]` fp32, from the start to the sample.
        log_probs: `[T, N]` fp32, per element (see `Transition.log_prob`); 0 at deterministic steps.
        schedule: The T steps.
        etas: The eta of each step; 0 outside of the window.
        stds: Standard deviation of each step; 0 where it was deterministic.
        clean: Maps a step in `keep_clean` to the clean latents `[N, ...]` predicted there.
    """

    latents: tuple[Tensor, ...]
    log_probs: Tensor
    schedule: tuple[Step, ...]
    etas: tuple[float, ...]
    stds: tuple[float, ...]
    clean: dict[int, Tensor] = field(default_factory=dict)

    @property
    def sample(self) -> Tensor:
        """`[N, ...]` the latents of the restored images."""
        return self.latents[-1]

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The steps that drew noise; a policy gradient learns from these only."""
        return tuple(index for index, std in enumerate(self.stds) if std > 0)

    def rows(self, rows: slice) -> "Trajectory":
        """The paths of these rollouts."""
        clean = {step: latents[rows] for step, latents in self.clean.items()}
        return replace(
            self, latents=tuple(each[rows] for each in self.latents), log_probs=self.log_probs[:, rows], clean=clean
        )


@torch.no_grad()
def rollout(
    policy: Policy,
    condition: Condition,
    noise: Noise,
    *,
    num_steps: int | None = None,
    eta: float | None = None,
    window: range | None = None,
    keep_clean: Sequence[int] = (),
) -> Trajectory:
    """Restore each row once, and keep the trajectory of the latents.

    A row's noise follows from its id and copy alone, so its rollout is the same in any batch, on any number of
    processes and after a resume.

    Args:
        policy: The model.
        condition: N rows: the result of `policy.condition`, each repeated for every rollout of its input.
        noise: N rows.
        num_steps: Sampling steps; those of the sampler that the policy ships with, if not given.
        eta: Noise of each step, as the policy takes it; that of its own sampler, if not given.
        window: Steps that are stochastic, while the others follow the ODE (MixGRPO); all if not given.
        keep_clean: Steps whose prediction of the clean latents is kept, for stepwise rewards.

    Returns:
        A `Trajectory`; decode its `sample` with `policy.decode`.

    Raises:
        ValueError: The window or `keep_clean` leaves the schedule.

    Example:
        >>> from iqareward.diffusion import Batch, build_restorer
        >>> policy, noise = build_restorer((8, 16)), Noise((7, 7, 9, 9), (0, 1, 0, 1))
        >>> condition = policy.condition(Batch(noise.ids, torch.rand(4, 3, 8, 8)), noise)
        >>> trajectory = rollout(policy, condition, noise, num_steps=4, eta=1.0)
        >>> trajectory.sample.shape, trajectory.stochastic
        (torch.Size([4, 3, 8, 8]), (0, 1, 2))

    References:
        Li et al., MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE, 2025,
        https://arxiv.org/abs/2507.21802
    """
    schedule = tuple(policy.schedule(condition, policy.num_steps if num_steps is None else num_steps))
    window = range(len(schedule)) if window is None else window
    if len(window) and not (min(window) >= 0 and max(window) < len(schedule)):
        raise ValueError(f"rollout expected `window` within range({len(schedule)}), got {window}.")
    if any(step >= len(schedule) for step in keep_clean):
        raise ValueError(f"rollout expected `keep_clean` within range({len(schedule)}), got {tuple(keep_clean)}.")
    eta = policy.eta if eta is None else eta
    etas = tuple(eta if index in window else 0.0 for index in range(len(schedule)))
    latents = policy.start(condition, noise)
    path, log_probs, stds, clean = [latents.float()], [], [], {}
    for index, (step, step_eta) in enumerate(zip(schedule, etas, strict=True)):
        transition = policy.step(path[-1], step, condition, eta=step_eta)
        mean = transition.mean
        path.append(mean + transition.std * noise(index, mean.shape[1:]) if transition.std else mean)
        log_probs.append(transition.log_prob(path[-1]))
        stds.append(transition.std)
        if index in keep_clean:
            clean[index] = transition.clean
    return Trajectory(tuple(path), torch.stack(log_probs), schedule, etas, tuple(stds), clean)


def replay(policy: Policy, trajectory: Trajectory, index: int, condition: Condition) -> Transition:
    """Step `index` of a trajectory under the policy as it is now, given the condition of its rows."""
    return policy.step(trajectory.latents[index], trajectory.schedule[index], condition, eta=trajectory.etas[index])


@dataclass(frozen=True)
class RolloutConfig:
    """Options for sampling restorations during training.

    Args:
        group_size: Rollouts per input.
        num_steps: Sampling steps; those of the sampler that the policy ships with, if None.
        eta: Noise of each step, as the policy takes it; the policy's `exploration`, if not given.
        window: Steps that are stochastic; all if not given.
        reward_steps: Steps whose predicted clean image is scored as well; only the sample if empty.
        inputs_at_once: Inputs sampled and scored together; all if not given.

    Raises:
        ValueError: An option is out of its range, or `reward_steps` do not rise.

    Example:
        >>> RolloutConfig(group_size=8, num_steps=10, window=range(2, 6)).inputs_at_once is None
        True
    """

    group_size: int = 8
    num_steps: int | None = 10
    eta: float | None = None
    window: range | None = None
    reward_steps: tuple[int, ...] = ()
    inputs_at_once: int | None = None

    def __post_init__(self) -> None:
        steps, count = self.reward_steps, "as an integer >= 1"
        end = math.inf if self.num_steps is None else self.num_steps
        rising = list(steps) == sorted(set(steps)) and all(0 <= step < end for step in steps)
        requirements = {
            "group_size": (count, is_count(self.group_size)),
            "num_steps": (f"{count}, or None", self.num_steps is None or is_count(self.num_steps)),
            "eta": ("in [0, inf), or None", self.eta is None or 0 <= self.eta < math.inf),
            "reward_steps": ("in [0, num_steps) and in rising order", rising),
            "inputs_at_once": (f"{count}, or None", self.inputs_at_once is None or is_count(self.inputs_at_once)),
        }
        require_options(self, requirements)


@dataclass(frozen=True)
class Rollouts:
    """Some rollouts of an experience, as an objective learns from them: every field has one row per rollout.

    Attributes:
        batch: The input of each rollout.
        condition: Its condition.
        noise: Fresh random numbers for each rollout.
        trajectory: Its path.
        advantages: `[S, n]`, one row per scored step, the sample last; 0 where unknown.
        group_size: Rollouts per input, side by side; all of an input are here if the objective has `whole_groups`.
    """

    batch: Batch
    condition: Condition
    noise: Noise
    trajectory: Trajectory
    advantages: Tensor
    group_size: int

    def __len__(self) -> int:
        return len(self.batch)

    def advantage_of(self, step: int) -> Tensor:
        """`[n]` advantages of a step: that of the first scored image after it, or else of the sample."""
        # The clean image predicted at a step follows from the latents before it, so it rewards the steps up to there.
        scored = [*self.trajectory.clean, len(self.trajectory.schedule)]
        return self.advantages[next(row for row, after in enumerate(scored) if after > step)]


@dataclass(frozen=True)
class Experience:
    """B inputs of one size with K rollouts each, N = B * K rows, the rollouts of an input side by side.

    Attributes:
        batch: The inputs; `references` are what SFT learns from.
        condition: Their condition, from the policy.
        trajectory: The N rollouts.
        rewards: `[S, N]` fp32, NaN = not scored; one row per scored step, the sample last. The weighted sum of several.
        parts: `[R, S, N]` fp32, each reward alone.
        distances: `[N]` >= 0 from the samples to the references, NaN where unknown.
        advantages: `[S, N]`, 0 where unknown.
        has_signal: `[B]` whether the rewards of an input differ at all.
        group_size: Rollouts per input, K.
        reachable: `[B, 3, H, W]`, what rewards were given as references, if that is not those of the batch.
    """

    batch: Batch
    condition: Condition
    trajectory: Trajectory
    rewards: Tensor
    parts: Tensor
    distances: Tensor
    advantages: Tensor
    has_signal: Tensor
    group_size: int
    reachable: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def num_rollouts(self) -> int:
        """N."""
        return len(self.batch) * self.group_size

    @property
    def difficulty(self) -> Tensor:
        """`[B]` >= 0, mean distance of an input's samples to its reference; NaN where unknown."""
        return self.distances.view(len(self), -1).nanmean(1)

    def pass_rate(self, distance: float) -> Tensor:
        """`[B]` share of an input's samples within `distance` of the reference; NaN where unknown."""
        inputs = torch.arange(len(self), device=self.distances.device).repeat_interleave(self.group_size)
        return pass_rate(-self.distances, inputs, threshold=-distance)[:: self.group_size]

    def rollouts(self, rows: slice, *, seed: int) -> Rollouts:
        """These rollouts, with their inputs repeated; `seed` is that of the fresh noise."""
        size = self.group_size
        inputs = slice(rows.start // size, -(-rows.stop // size))
        mine = slice(rows.start - inputs.start * size, rows.stop - inputs.start * size)
        noise = Noise.of_groups(self.batch.ids[inputs], size, seed=seed, device=self.rewards.device)
        batch = self.batch if self.reachable is None else replace(self.batch, references=self.reachable)
        return Rollouts(
            batch.select(inputs).repeat(size).select(mine),
            select(repeat(select(self.condition, inputs), size), mine),
            noise.rows(mine),
            self.trajectory.rows(rows),
            self.advantages[:, rows],
            size,
        )


def images_of(policy: Policy, latents: Tensor, condition: Condition) -> Tensor:
    """Images `[N, 3, H, W]` fp32 in [0, 1] of clean latents."""
    return policy.decode(latents, condition).float().clamp(0, 1)


def checked_scores(scores: Any, *, name: str, count: int) -> Tensor:
    """The `[count]` scores of a reward in fp32, NaN where not finite; an error if they are anything else."""
    expected = f"The reward {name!r} was expected to return a tensor [{count}] of real numbers, one per image, got"
    if not isinstance(scores, Tensor) or scores.is_complex():
        raise TypeError(f"{expected} {scores.dtype if isinstance(scores, Tensor) else type(scores).__name__}.")
    if scores.shape != (count,):
        raise ValueError(f"{expected} the shape {list(scores.shape)}.")
    return finite_or_nan(scores.float())


def columns_for(reward: Callable[..., Any], batch: Batch) -> dict[str, Any]:
    """What belongs to the images of `batch` and the reward takes, as keyword arguments.

    `references`, `prompts`, `ids` and `tasks` go to every reward of the library, and `inputs`, the degraded images, to
    those that need them; a plain function gets those that it names.
    """
    columns: dict[str, Any] = {
        "references": batch.references,
        "inputs": batch.degraded,
        "prompts": None if batch.prompts is None else list(batch.prompts),
        "ids": list(batch.ids),
        "tasks": None if batch.tasks is None else list(batch.tasks),
    }
    columns = {name: value for name, value in columns.items() if value is not None}
    if isinstance(reward, Reward):
        taken = set(columns)
    else:
        # the call of a module takes anything, its `forward` does not
        called = reward.forward if isinstance(reward, nn.Module) else reward
        parameters = inspect.signature(called).parameters.values()
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        taken = set(columns) if every else {parameter.name for parameter in parameters}
    if isinstance(reward, Reward) and not needs(reward, "inputs"):
        taken -= {"inputs"}  # they would be moved, hashed or sent for nothing
    return {name: value for name, value in columns.items() if name in taken}


def scored(reward: Callable[..., Any], images: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """Score images of `batch`; the scores `[N]` are there when the result is called, at once unless overlapped."""
    name, count = getattr(reward, "name", type(reward).__name__), images.shape[0]
    columns = columns_for(reward, batch)
    if isinstance(reward, Overlapped):
        pending = reward.submit(images, **columns)
        return lambda: checked_scores(pending.result(), name=name, count=count)
    scores = checked_scores(reward(images, **columns), name=name, count=count)
    return lambda: scores


def scored_alone(reward: Callable[..., Any], images: Tensor, batch: Batch) -> Tensor:
    """Scores `[N]` of images that have no other rollouts of their input beside them.

    Of a `RankInGroup` they are those of the reward inside; any other reward that compares rollouts gives NaN.
    """
    reward = reward.reward if isinstance(reward, RankInGroup) else reward
    if needs(reward, "ids"):
        return torch.full((images.shape[0],), torch.nan, device=images.device)
    return scored(reward, images, batch)()


@dataclass(frozen=True)
class Sampled:
    """Rollouts of a batch with their scores, not yet compared with each other; fields as in `Experience`."""

    batch: Batch
    condition: Condition
    trajectory: Trajectory
    parts: Tensor
    distances: Tensor
    reachable: Tensor | None = None


@torch.no_grad()
def collect(
    policy: Policy,
    rewards: Sequence[Callable[..., Any]],
    batch: Batch,
    config: RolloutConfig,
    *,
    seed: int,
    distance: Callable[[Tensor, Batch], Tensor],
    reachable: bool = False,
) -> Sampled:
    """Sample the inputs part by part; an `Overlapped` reward scores each part while the next is sampled.

    Args:
        policy: The model.
        rewards: Each scores the images.
        batch: The inputs.
        config: How they are sampled.
        seed: Seed of the noise.
        distance: `distance(images, inputs)` `[N]`: how far restored images are from where they should be.
        reachable: Compare with the references as the policy can reach them at best, encoded and decoded.
    """
    size = config.group_size
    condition = check_condition(
        policy.condition(batch, Noise(batch.ids, seed=seed, device=batch.degraded.device).of(0)),
        len(batch),
        caller=type(policy).__name__,
    )
    trajectories, distances, pending, reached = [], [], [], []
    at_once = config.inputs_at_once or len(batch)
    for start in range(0, len(batch), at_once):
        part = slice(start, min(start + at_once, len(batch)))
        inputs, own = batch.select(part), select(condition, part)
        if reachable and inputs.references is not None:
            reached.append(policy.reconstruct(inputs.references, own).float().clamp(0, 1))
            inputs = replace(inputs, references=reached[-1])
        side_by_side, own = inputs.repeat(size), repeat(own, size)
        trajectory = rollout(
            policy,
            own,
            Noise.of_groups(inputs.ids, size, seed=seed, device=batch.degraded.device),
            num_steps=config.num_steps,
            eta=policy.exploration if config.eta is None else config.eta,
            window=config.window,
            keep_clean=config.reward_steps,
        )

        # Step by step, because the images of all steps would not fit into memory at once.
        def score(images: Tensor, inputs: Batch = side_by_side) -> list[Callable[[], Tensor]]:
            return [scored(reward, images, inputs) for reward in rewards]

        steps = [score(images_of(policy, latents, own)) for latents in trajectory.clean.values()]
        images = images_of(policy, trajectory.sample, own)
        pending.append([*steps, score(images)])
        distances.append(distance(images, side_by_side))
        trajectories.append(trajectory)
    device = batch.degraded.device
    parts = [
        torch.stack([torch.stack([scores().to(device) for scores in step]) for step in steps], 1) for steps in pending
    ]
    best = torch.cat(reached) if reached else None
    return Sampled(batch, condition, _joined(trajectories), torch.cat(parts, 2), torch.cat(distances), best)


def compare(
    sampled: Sequence[Sampled],
    config: RolloutConfig,
    *,
    weights: Sequence[float],
    std_floor: float,
    memory: RewardMemory | None = None,
) -> list[Experience]:
    """Compare each rollout with the others of its input, with the statistics of all processes.

    Several rewards are normalised one by one before they are added. Each scored step is compared with the same step of
    the other rollouts only. A `memory` compares the sample with the input's own history instead, and is updated.
    """
    size = config.group_size
    parts = torch.cat([each.parts for each in sampled], 2)  # [R, S, N]
    usable = torch.cat([each.batch.usable for each in sampled]).repeat_interleave(size)
    parts = torch.where(usable, parts, torch.nan)
    distances = torch.where(usable, torch.cat([each.distances for each in sampled]), torch.nan)
    ids = [input_id for each in sampled for input_id in each.batch.ids]
    groups = torch.tensor(ids).to(parts.device, non_blocking=True).repeat_interleave(size)
    (gathered, everyones), mine = gather_rows(parts.permute(2, 1, 0).flatten(1).contiguous(), groups)
    columns = gathered.unflatten(1, (parts.shape[1], parts.shape[0]))  # [N of all, S, R]
    found = []
    for step in columns.unbind(1):
        if len(weights) == 1:
            found.append(group_advantages(weights[0] * step[:, 0], everyones, std_floor=std_floor))
        else:
            found.append(combine_advantages(step, everyones, weights=weights, std_floor=std_floor))
    total = _weighted_sum(parts, weights)
    if memory is not None:
        last = _weighted_sum(columns[:, -1].T[:, None], weights)[0]
        memory.update(last, everyones)
        found[-1] = memory.advantages(last, everyones)
    advantages = torch.stack([part.values for part in found])[:, mine]
    has_signal = found[-1].has_signal[mine].view(len(ids), -1).any(1)
    experiences, first = [], 0
    for each in sampled:
        inputs = slice(first, first + len(each.batch))
        rows = slice(inputs.start * size, inputs.stop * size)
        first = inputs.stop
        experiences.append(
            Experience(
                each.batch,
                each.condition,
                each.trajectory,
                total[:, rows],
                parts[:, :, rows],
                distances[rows],
                advantages[:, rows],
                has_signal[inputs],
                size,
                each.reachable,
            )
        )
    return experiences


def _weighted_sum(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """`[S, N]` of `[R, S, N]`; NaN where a reward is missing."""
    return sum((weight * part for weight, part in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    latents = tuple(torch.cat(step) for step in zip(*(part.latents for part in parts), strict=True))
    clean = {step: torch.cat([part.clean[step] for part in parts]) for step in parts[0].clean}
    return replace(parts[0], latents=latents, log_probs=torch.cat([part.log_probs for part in parts], 1), clean=clean)


def reference_distances(metric: Callable[..., Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """The distance of restored images to their ground truth by `metric`, as `collect` takes it."""

    def distance(images: Tensor, batch: Batch) -> Tensor:
        if batch.references is None:
            raise ValueError(
                f"The inputs {sorted(set(batch.ids))[:5]} have no ground truth, so their difficulty is unknown. Give "
                "the trainer `input_quality`, a reward that tells how good the degraded images are."
            )
        return reference_distance(images, batch.references, metric)

    return distance


def input_distances(quality: Reward, *, best: float | None = None) -> Callable[[Tensor, Batch], Tensor]:
    """How far degraded images are from perfect quality, for inputs without ground truth; the same for all rollouts."""
    refuse_groups("input_quality", quality)
    top = quality.bounds[1] if best is None else best
    if top is None:
        raise ValueError(
            f"input_quality expected a reward that is bounded above, got {quality.name!r}. Bound it with Calibrated."
        )

    def distance(images: Tensor, batch: Batch) -> Tensor:
        columns = {key: value for key, value in columns_for(quality, batch).items() if key != "references"}
        scores = checked_scores(quality(batch.degraded, **columns), name=quality.name, count=len(batch))
        return (top - scores).clamp(min=0)

    return distance
