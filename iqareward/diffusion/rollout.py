"""Sampling several restorations of each input, and asking again how likely each step of them was."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from iqareward.diffusion.noise import noise_per_input
from iqareward.diffusion.policy import Condition, Policy, repeat
from iqareward.diffusion.transition import Step, Transition


@dataclass(frozen=True)
class Trajectory:
    """K rollouts of each of B inputs, N = B * K rows, the rollouts of an input side by side.

    Only latents and log-probabilities are kept: the network's activations are recomputed step by step in training.

    Attributes:
        latents: `[T + 1, N, ...]` fp32, from noise to the sample.
        log_probs: `[T, N]` fp32, per element (see `Transition.log_prob`); 0 at deterministic steps.
        schedule: T steps.
        etas: noise asked for at each step; 0 outside of the window.
        stds: standard deviation of each step; 0 where it was deterministic.
        group_size: K.
        clean: by step, `[N, ...]` the clean latents predicted there, for the steps asked for.
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
        """The steps that drew noise: all that a policy gradient can learn from."""
        return tuple(index for index, std in enumerate(self.stds) if std > 0)

    def rows(self, inputs: slice) -> "Trajectory":
        """The rollouts of these inputs."""
        rows = slice(inputs.start * self.group_size, inputs.stop * self.group_size)
        clean = {step: latents[rows] for step, latents in self.clean.items()}
        return replace(self, latents=self.latents[:, rows], log_probs=self.log_probs[:, rows], clean=clean)


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
    """Restore each input several times, each time with other noise, and remember how.

    The noise follows from `seed` and the input's id alone, so an input's rollouts are the same in any batch, on any
    number of processes and after a resume.

    Args:
        policy: the model.
        degraded: `[B, 3, H, W]` in [0, 1].
        ids: B integers >= 0, one per input.
        group_size: rollouts per input, K.
        num_steps: sampling steps, T.
        eta: noise of each step, as `policy.process` takes it; 0 is deterministic after the first noise.
        seed: of the noise; another one for every optimiser step.
        window: the steps that are stochastic, the others follow the ODE (MixGRPO); all if not given.
        keep_clean: steps whose prediction of the clean latents is kept, for stepwise rewards.
        condition: `policy.condition(degraded)`, if it is at hand.

    Returns:
        A `Trajectory` on the device of `degraded`; decode its `sample` with `policy.decode`.

    Raises:
        ValueError: ids and images differ in number, or the window leaves the schedule.

    Example:
        >>> from iqareward.diffusion.restorer import build_restorer
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
        transition = take_step(policy, path[-1], step, step_eta, condition)
        fresh = transition.std * noise(index + 1) if transition.std else 0.0
        path.append(transition.mean + fresh)
        log_probs.append(transition.log_prob(path[-1]))
        stds.append(transition.std)
        if index in keep_clean:
            clean[index] = transition.clean
    return Trajectory(torch.stack(path), torch.stack(log_probs), schedule, etas, tuple(stds), group_size, clean)


def take_step(policy: Policy, latents: Tensor, step: Step, eta: float, condition: Condition) -> Transition:
    """The Gaussian of one step of the policy from `latents` `[N, ...]`; with a gradient to the model if enabled."""
    times = torch.full((latents.shape[0],), step.time, device=latents.device)
    output = policy.predict(latents, times, condition)
    return policy.process.transition(output, latents, step, eta=eta)


def replay(policy: Policy, trajectory: Trajectory, index: int, condition: Condition) -> Transition:
    """Step `index` of a trajectory under the policy as it is now.

    Args:
        policy: the model.
        trajectory: from `rollout`.
        index: of the step.
        condition: of all N rows.

    Returns:
        A `Transition`; as long as the model has not changed, its log-probability of `trajectory.latents[index + 1]` is
        `trajectory.log_probs[index]`.
    """
    step, eta = trajectory.schedule[index], trajectory.etas[index]
    return take_step(policy, trajectory.latents[index], step, eta, condition)
