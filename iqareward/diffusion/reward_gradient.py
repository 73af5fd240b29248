"""The reward's own gradient, through the last denoising steps (DRaFT-K) or one predicted image (ReFL)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iqareward._gradients import straight_through
from iqareward.diffusion.experience import Experience, checked_scores
from iqareward.diffusion.noise import generator
from iqareward.diffusion.policy import Condition, Policy, repeat
from iqareward.diffusion.policy_gradient import RLTerm, mean_per_input
from iqareward.diffusion.rollout import replay
from iqareward.images import drop_broken_gradients
from iqareward.types import Reward


@dataclass(frozen=True)
class RewardGradient:
    """Follow the gradient of a differentiable reward back into the network.

    The rollouts at hand are the starting points: their last steps are taken again with a gradient and with the noise
    they had, so the images are the ones already scored.

    Args:
        reward: built with `differentiable=True`.
        last_steps: K of DRaFT-K: steps the gradient goes through. 0 is ReFL: one step, chosen at random among the later
            half of the schedule, and the clean image predicted there.
        checkpointed: recompute each step's activations in the backward pass.

    Raises:
        ValueError: the reward is not differentiable.

    Example:
        >>> import iqareward
        >>> RewardGradient(iqareward.load("haarpsi", differentiable=True), last_steps=0).reward.name  # ReFL
        'haarpsi'

    References:
        Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards, 2023,
        https://arxiv.org/abs/2309.17400 (DRaFT-K)
        Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation, 2023,
        https://arxiv.org/abs/2304.05977 (ReFL)
    """

    reward: Reward
    last_steps: int = 1
    checkpointed: bool = True

    relative = False

    def __post_init__(self) -> None:
        if not self.reward.differentiable:
            raise ValueError(
                f"RewardGradient expected a differentiable reward, got {self.reward.name!r}. "
                "Build it with differentiable=True, or use PolicyGradient."
            )

    def terms(self, experience: Experience) -> Sequence[int]:
        """A single one."""
        return (0,)

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """The negative reward, averaged over the rollouts of each input; 0, without gradient, where there is none.

        Raises:
            ValueError: KL is asked for; the reward's gradient has no transition to measure it on.
        """
        if kl:
            raise ValueError("RewardGradient expected kl_beta=0. Anchor with the SFT weight or LoRA instead.")
        trajectory = experience.trajectory
        condition = repeat(experience.condition, trajectory.group_size)
        if self.last_steps:
            clean = self._last_steps(policy, experience, condition)
        else:
            late = range(len(trajectory.schedule) // 2, len(trajectory.schedule))
            choice = torch.randint(len(late), (), generator=generator(seed, len(late)))
            clean = replay(policy, trajectory, late[int(choice)], condition).clean
        images = drop_broken_gradients(clamp_straight_through(policy.decode(clean)))
        references = experience.references.repeat_interleave(trajectory.group_size, 0)
        answer = self.reward(images, references=references)
        scores = checked_scores(answer, name=self.reward.name, count=images.shape[0])
        loss = torch.where(scores.isnan(), 0.0, -scores)  # not scored: says nothing, and its image gets no gradient
        return RLTerm(mean_per_input(loss, experience), torch.zeros_like(experience.difficulty))

    def _last_steps(self, policy: Policy, experience: Experience, condition: Condition) -> Tensor:
        """The sample, with a gradient through its last steps."""
        trajectory = experience.trajectory
        num_steps = len(trajectory.schedule)

        def advance(latents: Tensor, index: int) -> Tensor:
            step, eta = trajectory.schedule[index], trajectory.etas[index]
            times = torch.full((latents.shape[0],), step.time, device=latents.device)
            output = policy.predict(latents, times, condition)
            mean = policy.process.transition(output, latents, step, eta=eta).mean
            # The recorded noise: the step leads where it led, but its mean can move.
            return mean + (trajectory.latents[index + 1] - mean.detach())

        latents: Any = trajectory.latents[max(num_steps - self.last_steps, 0)]
        for index in range(max(num_steps - self.last_steps, 0), num_steps):
            if self.checkpointed:
                latents = checkpoint(advance, latents, index, use_reentrant=False)
            else:
                latents = advance(latents, index)
        return latents


def clamp_straight_through(images: Tensor) -> Tensor:
    """Images clamped to [0, 1] whose gradient passes as if they were not, so that overshoots can come back.

    Pixels that are not finite become NaN, so that their image is not scored.

    Example:
        >>> pixel = torch.tensor([1.5], requires_grad=True)
        >>> clamp_straight_through(pixel).backward()
        >>> pixel.grad
        tensor([1.])
    """
    pixels = images.detach()
    return straight_through(images, pixels.clamp(0, 1).where(pixels.isfinite(), torch.nan))
