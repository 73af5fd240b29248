"""RL on the forward process: regression towards good rollouts and away from bad ones (DiffusionNFT)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iqareward.diffusion.experience import Experience
from iqareward.diffusion.noise import generator, noise_per_input
from iqareward.diffusion.policy import Policy, repeat
from iqareward.diffusion.policy_gradient import RLTerm, mean_per_input
from iqareward.diffusion.reference import as_reference
from iqareward.weighting import optimality_probability

SMALLEST_ERROR = 1e-5  # keeps the relative error of a perfect prediction finite


@dataclass(frozen=True)
class ForwardProcess:
    """DiffusionNFT: no log-probabilities and no stochastic sampler, one network pass per term, any number of steps.

    With v the network's answer, v_old the one that sampled and r in [0, 1] the probability that a rollout is good,

        loss = [r * d(v_old + beta * (v - v_old)) + (1 - r) * d(v_old - beta * (v - v_old))] / beta

    where d is the squared distance of the clean latents it stands for to the rollout's, over their mean absolute
    distance. The trainer takes one optimiser step per rollout, so v_old is v without its gradient.

    Args:
        beta: how far the two guesses are from the old one.
        num_terms: times drawn per rollout.
        clip: the advantage that counts as certainly good.

    Example:
        >>> list(ForwardProcess(num_terms=3).terms(None))  # three backward passes per update, whatever the sampler
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
        """One per time drawn."""
        return range(self.num_terms)

    def __call__(
        self, policy: Policy, experience: Experience, term: int, *, seed: int, frozen: nn.Module | None, kl: bool
    ) -> RLTerm:
        """The loss at one random time per rollout, averaged over the rollouts of each input."""
        trajectory, process = experience.trajectory, policy.process
        sample, size = trajectory.sample, trajectory.group_size
        condition = repeat(experience.condition, size)
        noise = noise_per_input(experience.ids, size, sample.shape[1:], seed=seed, step=term, device=sample.device)
        times = draw_times(policy, experience.ids, size, seed=seed, term=term, device=sample.device)
        latents = process.add_noise(sample, noise, times)
        output = policy.predict(latents, times, condition).float()
        old = output.detach()
        change = self.beta * (output - old)
        good, bad = (_distance(process.clean(old + way * change, latents, times), sample) for way in (1, -1))
        probability = optimality_probability(experience.advantages[-1], clip=self.clip)
        loss = (probability * good + (1 - probability) * bad) / self.beta
        divergence = torch.zeros_like(loss)
        if kl:
            with as_reference(policy, frozen):
                before = policy.predict(latents, times, condition).float()
            divergence = (output - before).square().flatten(1).mean(1)
        return RLTerm(mean_per_input(loss, experience), mean_per_input(divergence, experience))


def draw_times(
    policy: Policy, ids: Sequence[int], group_size: int, *, seed: int, term: int, device: torch.device
) -> Tensor:
    """Random training times for each rollout of each input, `[B * K]`, from the seed and the ids alone."""
    # A path longer than that of the noise, so that the two are independent.
    rows = [policy.process.draw_times(group_size, generator(seed, row, term, 1, device=device)) for row in ids]
    return torch.cat(rows)


def _distance(clean: Tensor, sample: Tensor) -> Tensor:
    offset = clean - sample
    scale = offset.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
    return offset.square().flatten(1).mean(1) / scale
