"""RL objectives: clipped policy gradient, DiffusionNFT, group DPO, and the gradient of a differentiable reward."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from iqareward._gradients import straight_through
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.core import DiffusionPolicy, Policy, Versions, denoising_loss
from iqareward.diffusion.processes import Step
from iqareward.diffusion.rollouts import Experience, Rollouts, checked_scores, columns_for, replay
from iqareward.images import drop_broken_gradients
from iqareward.seeds import generator
from iqareward.types import Reward
from iqareward.weighting import optimality_probability

_LARGEST_LOG_RATIO = 20.0


class RLTerm(NamedTuple):
    """One term of an RL loss.

    Attributes:
        loss: `[n]`, one per rollout.
        kl: `[n]` >= 0, divergence from the reference policy; 0 if it was not asked for.
        ratio: `[n]` how likely the step is now, relative to when it was sampled; None where there is no such ratio.
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor | None = None


class Objective(ABC):
    """How rewards become a loss: `ClippedPolicyGradient`, `DiffusionNFT`, `GroupDPO` or `DirectRewardGradient`.

    A loss has several terms, for instance one per denoising step, which the trainer computes one by one for a part of
    the rollouts, so that it never holds the activations of all. The model is in eval mode meanwhile.

    Attributes:
        relative: Whether it learns from differences between the rollouts of an input, and so nothing from an input
            whose rewards are all the same.
        keeps_old: Whether rollouts are sampled with older weights, which follow the trained ones by `old_decay`.
        needs_reference: Whether it needs the weights from before RL, even without a KL penalty.
        whole_groups: Whether it needs all rollouts of an input at once.
    """

    relative: ClassVar[bool] = True
    keeps_old: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    @abstractmethod
    def terms(self, experience: Experience) -> Sequence[int]:
        """Numbers of the terms; their mean is the loss."""

    @abstractmethod
    def __call__(self, policy: Policy, rollouts: Rollouts, term: int, *, versions: Versions, kl: bool) -> RLTerm:
        """One term, with a gradient to the model."""

    def old_decay(self, update: int) -> float:
        """Share of the older weights that stays after an update; 0 replaces them by the trained ones."""
        return 0.0


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """PPO's clipped surrogate `[N]`: `-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)`, `ratio = exp(new - old)`.

    The ratio is limited to exp(+-20), because an infinite one would make the gradient NaN, even of clipped rows.

    References:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
    """
    ratio = _ratio(log_probs, old_log_probs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def _ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    return (log_probs - old_log_probs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


@dataclass(frozen=True)
class ClippedPolicyGradient(Objective):
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

    def terms(self, experience: Experience) -> Sequence[int]:
        """The stochastic steps."""
        return experience.trajectory.stochastic[:: self.every]

    def __call__(self, policy: Policy, rollouts: Rollouts, term: int, *, versions: Versions, kl: bool) -> RLTerm:
        """The loss of step `term`."""
        trajectory, condition, reference = rollouts.trajectory, rollouts.condition, None
        if kl:
            with versions.reference():
                reference = replay(policy, trajectory, term, condition)
        transition = replay(policy, trajectory, term, condition)
        log_probs, old = transition.log_prob(trajectory.latents[term + 1]), trajectory.log_probs[term]
        loss = policy_loss(log_probs, old, rollouts.advantage_of(term), clip=self.clip)
        divergence = torch.zeros_like(loss) if reference is None else transition.kl(reference)
        return RLTerm(loss, divergence, _ratio(log_probs.detach(), old))


_SMALLEST_ERROR = 1e-5  # keeps the relative error of a perfect prediction finite


@dataclass(frozen=True)
class DiffusionNFT(Objective):
    """Regression towards good rollouts and away from bad ones: no log-probabilities, and any sampler.

    With v the output of the network, v_old that of the older network that sampled and r in [0, 1] the probability that
    a rollout is good,

        loss = [r * d(v_old + beta * (v - v_old)) + (1 - r) * d(v_old - beta * (v - v_old))] / beta

    where d is the squared distance from the clean latents that an output stands for to those of the rollout, over their
    mean absolute distance. The older weights follow by a moving average.

    Args:
        beta: How far the two guesses are from the old one.
        num_terms: Times drawn per rollout, each with one pass through each network.
        clip: The advantage that counts as certainly good.
        decay_rate: How much the decay of the older weights rises with every update, from 0.
        largest_decay: Where it stops. The two defaults are those of the published configuration.

    Example:
        >>> objective = DiffusionNFT(num_terms=3)
        >>> list(objective.terms(None))  # three backward passes per update, whatever the sampler
        [0, 1, 2]
        >>> [objective.old_decay(update) for update in (0, 100, 9000)]
        [0.0, 0.1, 0.5]

    References:
        Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, 2025,
        https://arxiv.org/abs/2509.16117
    """

    beta: float = 1.0
    num_terms: int = 2
    clip: float = 5.0
    decay_rate: float = 0.001
    largest_decay: float = 0.5

    keeps_old = True

    def terms(self, experience: Experience) -> Sequence[int]:
        """One term per time that is drawn."""
        return range(self.num_terms)

    def __call__(self, policy: Policy, rollouts: Rollouts, term: int, *, versions: Versions, kl: bool) -> RLTerm:
        """The loss at one random time per rollout."""
        model, condition = _diffusion(policy, "DiffusionNFT"), rollouts.condition
        process, sample, anchor = model.process, rollouts.trajectory.sample, model.anchor(condition)
        latents, times, _ = model.noised(sample, condition, rollouts.noise.of(term))
        # before the graph of `output` is recorded, because both exchange the weights
        with versions.old():
            old = model.predict(latents, times, condition).float()
        reference = None
        if kl:
            with versions.reference():
                reference = model.predict(latents, times, condition).float()
        output = model.predict(latents, times, condition).float()
        change = self.beta * (output - old)
        good, bad = (
            _distance(process.clean(old + way * change, latents, times, anchor=anchor), sample) for way in (1, -1)
        )
        probability = optimality_probability(rollouts.advantages[-1], clip=self.clip)
        loss = (probability * good + (1 - probability) * bad) / self.beta
        divergence = torch.zeros_like(loss) if reference is None else _mean_square(output - reference)
        return RLTerm(loss, divergence)

    def old_decay(self, update: int) -> float:
        """`min(decay_rate * update, largest_decay)`."""
        return min(self.decay_rate * update, self.largest_decay)


def _diffusion(policy: Policy, caller: str) -> DiffusionPolicy:
    if not isinstance(policy, DiffusionPolicy):
        raise TypeError(
            f"{caller} expected a DiffusionPolicy, whose samples it adds noise to, got {type(policy).__name__}. Use "
            "ClippedPolicyGradient or GroupDPO with rollouts of eta > 0, or DirectRewardGradient."
        )
    return policy


def _distance(clean: Tensor, sample: Tensor) -> Tensor:
    offset = clean - sample
    scale = offset.detach().abs().flatten(1).mean(1).clamp(min=_SMALLEST_ERROR)
    return _mean_square(offset) / scale


def _mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1)


@dataclass(frozen=True)
class GroupDPO(Objective):
    """Direct preference optimisation over all rollouts of an input, for one-step and multi-step models.

    With d_k the denoising loss of the model for the sample of rollout k, D_k = d_k - d_k of the model before RL, and
    A_k its advantage, the loss of the whole group is

        pairs="sum":  -log sigmoid(-beta / 2 * sum_k A_k * D_k)
        pairs="all":  sum over pairs with A_i > A_j of w_ij * -log sigmoid(-beta / 2 * (D_i - D_j))

    with weights w_ij = A_i - A_j over their sum. The first is GDPO-SR's loss. DP2O-SR learns from many pairs weighted
    by the gap of their rewards; this form of the weights is ours. All rollouts of an input share time and noise, as in
    Diffusion-DPO.

    Where rollouts draw the noise of a single step, as those of a `FeedForwardPolicy` do, the exact log-density of the
    sample takes the place of the denoising loss (ours): d_k = -2 * log p(sample), per element. GDPO-SR's own model has
    its noise before the step, so sample it with `RolloutConfig(eta=0)`.

    Args:
        beta: Strength of the preference; denoising losses change little, so it is large. The default is GDPO-SR's.
        pairs: Which of the two losses.

    Example:
        >>> GroupDPO(pairs="all").whole_groups
        True

    References:
        Yi et al., GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution, 2026,
        https://arxiv.org/abs/2603.16769
        Wu et al., DP2O-SR: Direct Perceptual Preference Optimization for Real-World Image Super-Resolution, 2025,
        https://arxiv.org/abs/2510.18851
        Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization, 2023,
        https://arxiv.org/abs/2311.12908
    """

    beta: float = 5000.0
    pairs: Literal["sum", "all"] = "sum"

    needs_reference = True
    whole_groups = True

    def __post_init__(self) -> None:
        if self.pairs not in ("sum", "all"):
            raise ValueError(f"GroupDPO expected `pairs` to be 'sum' or 'all', got {self.pairs!r}.")

    def terms(self, experience: Experience) -> Sequence[int]:
        """One term."""
        return (0,)

    def __call__(self, policy: Policy, rollouts: Rollouts, term: int, *, versions: Versions, kl: bool) -> RLTerm:
        """The loss of each rollout's group, the same for all of its rollouts."""
        if kl:
            raise ValueError("GroupDPO expected kl_beta=0: its `beta` keeps the model near the reference already.")
        size = rollouts.group_size
        with versions.reference():
            before = self._losses(policy, rollouts)
        change = (self._losses(policy, rollouts) - before).view(-1, size)
        advantages = rollouts.advantages[-1].view(-1, size)
        if self.pairs == "sum":
            loss = -logsigmoid(-self.beta / 2 * (advantages * change).sum(1))
        else:
            gaps = (advantages[:, :, None] - advantages[:, None, :]).clamp(min=0)
            margins = change[:, :, None] - change[:, None, :]
            total = gaps.sum((1, 2)).clamp(min=torch.finfo(gaps.dtype).tiny)
            loss = -(gaps * logsigmoid(-self.beta / 2 * margins)).sum((1, 2)) / total
        loss = loss.repeat_interleave(size)
        return RLTerm(loss, torch.zeros_like(loss))

    def _losses(self, policy: Policy, rollouts: Rollouts) -> Tensor:
        """d_k `[n]`: how badly the policy explains the samples."""
        trajectory, condition = rollouts.trajectory, rollouts.condition
        if len(trajectory.schedule) == 1 and trajectory.stds[0] > 0:
            return -2 * replay(policy, trajectory, 0, condition).log_prob(trajectory.sample)
        shared = Noise(rollouts.noise.ids, seed=rollouts.noise.seed, device=rollouts.noise.device)
        return denoising_loss(_diffusion(policy, "GroupDPO"), trajectory.sample, condition, shared)


_LEAST_NOISE = 0.05  # a step with less can hardly change the image, and gets a gradient to match


@dataclass(frozen=True)
class DirectRewardGradient(Objective):
    """Follow the gradient of a differentiable reward back into the network.

    The last steps of the rollouts are repeated with a gradient and with the noise they had, so the images are those
    that were already scored. One-step and feed-forward policies need no noise for it: `RolloutConfig(eta=0)`.

    Args:
        reward: Built with `differentiable=True`.
        last_steps: K of DRaFT-K, the number of steps that the gradient goes through, counted from the last one that
            starts with at least 5 % noise. The gradient goes through those after it as well, but they hardly change
            the image. 0 is ReFL: one random step in the later half of the steps that count, and the clean image
            predicted there.
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

    def __call__(self, policy: Policy, rollouts: Rollouts, term: int, *, versions: Versions, kl: bool) -> RLTerm:
        """The negative reward; 0 without gradient where not scored."""
        if kl:
            raise ValueError("DirectRewardGradient expected kl_beta=0. Anchor with the SFT weight or LoRA instead.")
        trajectory, condition = rollouts.trajectory, rollouts.condition
        counted = _steps_that_matter(policy, trajectory.schedule)
        if self.last_steps:
            clean = self._continued(policy, rollouts, max(counted - self.last_steps, 0))
        else:
            late = range(counted // 2, counted)
            # the same step for all rows of an update, however they are divided
            choice = torch.randint(len(late), (), generator=generator(rollouts.noise.seed, len(late)))
            clean = replay(policy, trajectory, late[int(choice)], condition).clean
        images = drop_broken_gradients(clamp_straight_through(policy.decode(clean, condition).float()))
        answer = self.reward(images, **columns_for(self.reward, rollouts.batch))
        scores = checked_scores(answer, name=self.reward.name, count=images.shape[0])
        loss = torch.where(scores.isnan(), 0.0, -scores)  # an image that is not scored gets no gradient
        return RLTerm(loss, torch.zeros_like(loss))

    def _continued(self, policy: Policy, rollouts: Rollouts, first: int) -> Tensor:
        """The sample, with a gradient through the steps from `first` on."""
        trajectory = rollouts.trajectory

        def advance(latents: Tensor, index: int) -> Tensor:
            step, eta = trajectory.schedule[index], trajectory.etas[index]
            mean, std, _ = policy.step(latents, step, rollouts.condition, eta=eta)
            if std == 0:
                return mean
            # The recorded noise: the step leads where it led, but its mean can move.
            return mean + (trajectory.latents[index + 1] - mean.detach())

        latents = trajectory.latents[first]
        for index in range(first, len(trajectory.schedule)):
            if self.checkpointed:
                # in eval mode nothing is random, so there is no generator state to keep
                latents = checkpoint(advance, latents, index, use_reentrant=False, preserve_rng_state=False)
            else:
                latents = advance(latents, index)
        return latents


def _steps_that_matter(policy: Policy, schedule: Sequence[Step]) -> int:
    """The number of steps up to the last one that has noise to take away; all if none has."""
    process = getattr(policy, "process", None)
    if process is None:
        return len(schedule)
    noisy = [index for index, step in enumerate(schedule) if process.noise_level(step) >= _LEAST_NOISE]
    return noisy[-1] + 1 if noisy else len(schedule)


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
