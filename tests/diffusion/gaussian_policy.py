"""A policy on one number whose reward gradient is known: x1 = theta + s e1, x2 = x1 / 2 + theta + s e2."""

import torch
from torch import nn

from iqareward.diffusion import Batch, DiffusionPolicy, Noise, Step, Transition, rollout
from iqareward.diffusion.conditions import repeat
from iqareward.diffusion.rollouts import Experience

NOISE, START, BEST = 0.4, 0.3, 1.0


class Mean(nn.Module):
    """The network: it answers theta whatever it is asked."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(START))

    def forward(self, latents):
        return self.theta.expand_as(latents)


class TwoSteps:
    """The process: keeps nothing of the first noise, then half of the first step."""

    def schedule(self, num_steps):
        return (Step(2.0, 0.0, 0.0), Step(1.0, 0.5, 0.0))

    def transition(self, output, latents, step, *, eta, anchor=None):
        mean = step.now * latents + output
        return Transition(mean, eta, mean)

    def draw_times(self, uniforms):
        return torch.ones_like(uniforms)

    def start(self, noise, anchor=None):
        return noise

    def noise_level(self, step):
        return 1.0

    def scale_input(self, latents, times):
        return latents

    def add_noise(self, clean, noise, times, anchor=None):
        return clean + noise

    def target(self, clean, noise, times, anchor=None):
        return clean

    def clean(self, output, latents, times, anchor=None):
        return output


class GaussianPolicy(DiffusionPolicy):
    """Images are the number itself."""

    num_steps, exploration = 2, NOISE

    def __init__(self):
        self.model, self.process = Mean(), TwoSteps()

    def condition(self, batch, noise):
        return {"latents": batch.degraded}

    def encode(self, images, condition):
        return images

    def predict(self, latents, times, condition):
        return self.model(latents)

    def decode(self, latents, condition):
        return latents


def reward(samples):
    """Quadratic, best at BEST."""
    return -(samples - BEST).square().flatten(1).mean(1)


def exact_gradient(theta=START):
    """d/dtheta of E[reward] with E[x2] = 1.5 theta; the variance does not depend on theta."""
    return -2 * (1.5 * theta - BEST) * 1.5


def batch_of(count: int, shape=(1, 1, 1)) -> Batch:
    """Degraded images of zeros."""
    return Batch(tuple(range(count)), torch.zeros(count, *shape))


def sampled(policy, batch: Batch, group_size: int, **options):
    """The condition of the inputs, and rollouts of them."""
    condition = policy.condition(batch, Noise(batch.ids))
    noise = Noise.of_groups(batch.ids, group_size, seed=0, device="cpu")
    return condition, rollout(policy, repeat(condition, group_size), noise, **options)


def experience_of(batch: Batch, condition, trajectory, advantages, rewards=None) -> Experience:
    """These rollouts with these advantages `[S, N]`."""
    rewards = advantages if rewards is None else rewards
    group_size = trajectory.sample.shape[0] // len(batch)
    distances, has_signal = torch.ones(rewards.shape[1]), torch.ones(len(batch), dtype=torch.bool)
    return Experience(
        batch, condition, trajectory, rewards, rewards[None], distances, advantages, has_signal, group_size
    )


def experience(policy, num_rollouts, advantages=None) -> Experience:
    """Rollouts of one input; advantages are rewards minus the mean of the *other* rollouts."""
    batch = batch_of(1)
    condition, trajectory = sampled(policy, batch, num_rollouts, eta=NOISE)
    rewards = reward(trajectory.sample)
    if advantages is None:
        advantages = (rewards - rewards.mean()) * num_rollouts / (num_rollouts - 1)
    return experience_of(batch, condition, trajectory, advantages[None], rewards[None])
