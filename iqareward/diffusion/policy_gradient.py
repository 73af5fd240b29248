"""Clipped policy gradient over denoising steps: what GRPO is for a diffusion model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from iqareward.diffusion.experience import Experience
from iqareward.diffusion.policy import Policy, repeat
from iqareward.diffusion.reference import as_reference
from iqareward.diffusion.rollout import replay

LARGEST_LOG_RATIO = 20.0


class RLTerm(NamedTuple):
    """One part of an RL loss: `loss` and divergence from the reference policy, both `[B]`, one value per input."""

    loss: Tensor
    kl: Tensor


class Objective(Protocol):
    """How rewards become a loss; `PolicyGradient`, `ForwardProcess` and `RewardGradient` are three.

    A loss has several terms, e.g. one per denoising step, so that the trainer can go through them one by one without
    holding the activations of all.

    Attributes:
        relative: whether it learns from differences between the rollouts of an input, so that an input whose rewards
            are all the same has nothing to teach.
    """

    @property
    def relative(self) -> bool: ...

    def terms(self, experience: Experience) -> Sequence[int]:
        """Numbers of the terms; their mean is the loss."""
        ...

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """One term, with a gradient to the model."""
        ...


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """PPO's clipped surrogate, `-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)` with `ratio = exp(new - old)`.

    The ratio stops at exp(+-20): an infinite one would make the gradient NaN, even of rows that are clipped.

    Args:
        log_probs: `[N]` of the step under the policy that learns.
        old_log_probs: `[N]` under the policy that took it.
        advantages: `[N]`, higher is better.
        clip: how far the ratio may move; 1e-4 to 1e-5 with log-probabilities per element.

    Returns:
        `[N]` to minimise.

    Example:
        >>> new, old = torch.tensor([0.5, 0.0]), torch.zeros(2)
        >>> policy_loss(new, old, torch.tensor([1.0, 1.0]), clip=0.1)
        tensor([-1.1000, -1.0000])

    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
    """
    ratio = (log_probs - old_log_probs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@dataclass(frozen=True)
class PolicyGradient:
    """Each stochastic step of each rollout, more likely if the rollout's reward is above those of its input.

    With stepwise rewards a step is judged by the first scored image after it, else by the sample.

    Args:
        clip: of the importance ratio.
        every: use every n-th stochastic step only, to save time.

    Example:
        >>> from types import SimpleNamespace
        >>> experience = SimpleNamespace(trajectory=SimpleNamespace(stochastic=(0, 1, 2, 3)))  # of an Experience
        >>> PolicyGradient(every=2).terms(experience)
        (0, 2)

    References:
        Black et al., Training Diffusion Models with Reinforcement Learning, 2023, https://arxiv.org/abs/2305.13301
        Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, 2025, https://arxiv.org/abs/2505.05470
        arXiv 2511.01645 scores every denoising step (its figure; the details are ours).
    """

    clip: float = 1e-4
    every: int = 1

    relative = True

    def terms(self, experience: Experience) -> Sequence[int]:
        """The stochastic steps."""
        return experience.trajectory.stochastic[:: self.every]

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """The loss of step `term`, averaged over the rollouts of each input."""
        trajectory = experience.trajectory
        condition = repeat(experience.condition, trajectory.group_size)
        transition = replay(policy, trajectory, term, condition)
        log_probs = transition.log_prob(trajectory.latents[term + 1])
        # The clean image predicted at a step follows from the latents before it: it judges the steps up to there.
        scored = [*trajectory.clean, len(trajectory.schedule)]
        judged_by = next(row for row, step in enumerate(scored) if step > term)
        loss = policy_loss(log_probs, trajectory.log_probs[term], experience.advantages[judged_by], clip=self.clip)
        divergence = torch.zeros_like(loss)
        if kl:
            with as_reference(policy, frozen):
                divergence_to = replay(policy, trajectory, term, condition)
            divergence = transition.kl(divergence_to)
        return RLTerm(mean_per_input(loss, experience), mean_per_input(divergence, experience))


def mean_per_input(values: Tensor, experience: Experience) -> Tensor:
    """The mean of `values` `[N]` over the rollouts of each input, `[B]`."""
    return values.view(-1, experience.trajectory.group_size).mean(1)
