"""RL objectives: a clipped policy gradient, DiffusionNFT, and the gradient of a differentiable reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iqareward._gradients import straight_through
from iqareward.diffusion.policies import Condition, Policy, reference_policy, repeat
from iqareward.diffusion.rollouts import Experience, checked_scores, replay
from iqareward.images import drop_broken_gradients
from iqareward.seeds import generator, noise_per_input
from iqareward.types import Reward
from iqareward.weighting import optimality_probability

_LARGEST_LOG_RATIO = 20.0


class RLTerm(NamedTuple):
    """One term of an RL loss: the loss and the divergence from the reference policy, `[B]` each."""

    loss: Tensor
    kl: Tensor


class Objective(Protocol):
    """How rewards become a loss: `ClippedPolicyGradient`, `DiffusionNFT` or `DirectRewardGradient`.

    A loss has several terms, e.g. one per denoising step, and the trainer computes them one by one, so that it never
    holds the activations of all. `relative` says whether the objective learns from differences between the rollouts of
    an input, so that it learns nothing from an input whose rewards are all the same.
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
    """PPO's clipped surrogate `[N]`: `-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)`, `ratio = exp(new - old)`.

    The ratio is limited to exp(+-20), because an infinite one would make the gradient NaN, even of clipped rows.

    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
    """
    ratio = (log_probs - old_log_probs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@dataclass(frozen=True)
class ClippedPolicyGradient:
    """PPO's clipped loss over the stochastic denoising steps, with advantages among the rollouts of an input (GRPO).

    With stepwise rewards a step gets the reward of the first scored image after it, otherwise that of the sample.

    Args:
        clip: Range of the importance ratio, [1 - clip, 1 + clip].
        every: Use every n-th stochastic step only, to save time.

    Example:
        >>> from types import SimpleNamespace
        >>> experience = SimpleNamespace(trajectory=SimpleNamespace(stochastic=(0, 1, 2, 3)))
        >>> ClippedPolicyGradient(every=2).terms(experience)
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
        # The clean image predicted at a step follows from the latents before it, so it rewards the steps up to there.
        scored = [*trajectory.clean, len(trajectory.schedule)]
        row = next(row for row, step in enumerate(scored) if step > term)
        loss = policy_loss(log_probs, trajectory.log_probs[term], experience.advantages[row], clip=self.clip)
        divergence = torch.zeros_like(loss)
        if kl:
            with reference_policy(policy, frozen):
                divergence_to = replay(policy, trajectory, term, condition)
            divergence = transition.kl(divergence_to)
        return RLTerm(_mean_per_input(loss, experience), _mean_per_input(divergence, experience))


def _mean_per_input(values: Tensor, experience: Experience) -> Tensor:
    """The mean of `values` `[N]` over the rollouts of each input, `[B]`."""
    return values.view(-1, experience.trajectory.group_size).mean(1)


_SMALLEST_ERROR = 1e-5  # keeps the relative error of a perfect prediction finite


@dataclass(frozen=True)
class DiffusionNFT:
    """Regression towards good rollouts and away from bad ones: no log-probabilities, and any sampler.

    With v the output of the network, v_old that of the network that sampled and r in [0, 1] the probability that a
    rollout is good,

        loss = [r * d(v_old + beta * (v - v_old)) + (1 - r) * d(v_old - beta * (v - v_old))] / beta

    where d is the squared distance from the clean latents that an output stands for to those of the rollout, over their
    mean absolute distance. The trainer takes one optimiser step per rollout, so v_old is v without its gradient.

    Args:
        beta: How far the two guesses are from the old one.
        num_terms: Times drawn per rollout, each with one pass through the network.
        clip: The advantage that counts as certainly good.

    Example:
        >>> list(DiffusionNFT(num_terms=3).terms(None))  # three backward passes per update, whatever the sampler
        [0, 1, 2]

    References:
        Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, 2025,
        https://arxiv.org/abs/2509.16117
    """

    beta: float = 1.0
    num_terms: int = 2
    clip: float = 5.0

    relative = True

    def terms(self, experience: Experience) -> Sequence[int]:
        """One term per time that is drawn."""
        return range(self.num_terms)

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """The loss at one random time per rollout, averaged over the rollouts of each input."""
        trajectory, process = experience.trajectory, policy.process
        sample, size = trajectory.sample, trajectory.group_size
        condition = repeat(experience.condition, size)
        noise = noise_per_input(experience.ids, size, sample.shape[1:], seed=seed, step=term, device=sample.device)
        times = _draw_times(policy, experience.ids, size, seed=seed, term=term, device=sample.device)
        latents = process.add_noise(sample, noise, times)
        output = policy.predict(latents, times, condition).float()
        old = output.detach()
        change = self.beta * (output - old)
        good, bad = (_distance(process.clean(old + way * change, latents, times), sample) for way in (1, -1))
        probability = optimality_probability(experience.advantages[-1], clip=self.clip)
        loss = (probability * good + (1 - probability) * bad) / self.beta
        divergence = torch.zeros_like(loss)
        if kl:
            with reference_policy(policy, frozen):
                before = policy.predict(latents, times, condition).float()
            divergence = (output - before).square().flatten(1).mean(1)
        return RLTerm(_mean_per_input(loss, experience), _mean_per_input(divergence, experience))


def sft_loss(
    policy: Policy, ids: Sequence[int], references: Tensor, condition: Condition, *, seed: int, term: int = 0
) -> Tensor:
    """The policy's supervised loss `[B]`, with noise and times that follow from the seed and the ids alone."""
    shape, device = policy.latent_shape(references), references.device
    noise = noise_per_input(ids, 1, shape, seed=seed, step=term, device=device)
    times = _draw_times(policy, ids, 1, seed=seed, term=term, device=device)
    return policy.sft_loss(references, condition, noise, times)


def _draw_times(
    policy: Policy, ids: Sequence[int], group_size: int, *, seed: int, term: int, device: torch.device
) -> Tensor:
    """Random training times for each rollout of each input, `[B * K]`."""
    # A longer path than that of the noise, so that the two are independent.
    generators = (generator(seed, input_id, term, 1, device=device) for input_id in ids)
    return torch.cat([policy.process.draw_times(group_size, own) for own in generators])


def _distance(clean: Tensor, sample: Tensor) -> Tensor:
    offset = clean - sample
    scale = offset.detach().abs().flatten(1).mean(1).clamp(min=_SMALLEST_ERROR)
    return offset.square().flatten(1).mean(1) / scale


@dataclass(frozen=True)
class DirectRewardGradient:
    """Follow the gradient of a differentiable reward back into the network.

    The last steps of the rollouts are repeated with a gradient and with the noise they had, so the images are those
    that were already scored.

    Args:
        reward: Built with `differentiable=True`.
        last_steps: K of DRaFT-K, the number of steps that the gradient goes through. 0 is ReFL: one random step in the
            later half of the schedule, and the clean image predicted there.
        checkpointed: Recompute each step's activations in the backward pass.

    Raises:
        ValueError: The reward is not differentiable.

    Example:
        >>> import iqareward
        >>> DirectRewardGradient(iqareward.load("haarpsi", differentiable=True), last_steps=0).reward.name  # ReFL
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
                f"DirectRewardGradient expected a differentiable reward, got {self.reward.name!r}. "
                "Build it with differentiable=True, or use ClippedPolicyGradient."
            )

    def terms(self, experience: Experience) -> Sequence[int]:
        """One term."""
        return (0,)

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """The negative reward, averaged over the rollouts of each input; 0 without gradient where not scored."""
        if kl:
            raise ValueError("DirectRewardGradient expected kl_beta=0. Anchor with the SFT weight or LoRA instead.")
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
        loss = torch.where(scores.isnan(), 0.0, -scores)  # an image that is not scored gets no gradient
        return RLTerm(_mean_per_input(loss, experience), torch.zeros_like(experience.difficulty))

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

    Args:
        images: Any shape; pixels that are not finite become NaN, so that their image is not scored.

    Returns:
        The clamped images.

    Example:
        >>> pixel = torch.tensor([1.5], requires_grad=True)
        >>> clamp_straight_through(pixel).backward()
        >>> pixel.grad
        tensor([1.])
    """
    pixels = images.detach()
    return straight_through(images, pixels.clamp(0, 1).where(pixels.isfinite(), torch.nan))
