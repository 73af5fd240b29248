"""A policy on one number whose reward gradient is known: x1 = theta + s e1, x2 = x1 / 2 + theta + s e2."""

import torch
from torch import nn

from iqareward.diffusion import Step, Transition, rollout
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

    def transition(self, output, latents, step, *, eta):
        mean = step.now * latents + output
        return Transition(mean, eta, mean)

    def draw_times(self, num, generator):
        return torch.ones(num)

    def add_noise(self, clean, noise, times):
        return clean + noise

    def target(self, clean, noise, times):
        return clean

    def clean(self, output, latents, times):
        return output


class GaussianPolicy:
    """Images are the number itself."""

    def __init__(self):
        self.model, self.process = Mean(), TwoSteps()

    def latent_shape(self, degraded):
        return (1, 1, 1)

    def condition(self, degraded):
        return {"degraded": degraded}

    def encode(self, images):
        return images

    def predict(self, latents, times, condition):
        return self.model(latents)

    def decode(self, latents):
        return latents

    def sft_loss(self, references, condition, noise, times):
        return (self.model(references) - references).square().flatten(1).mean(1)


def reward(samples):
    """Quadratic, best at BEST."""
    return -(samples - BEST).square().flatten(1).mean(1)


def exact_gradient(theta=START):
    """d/dtheta of E[reward] with E[x2] = 1.5 theta; the variance does not depend on theta."""
    return -2 * (1.5 * theta - BEST) * 1.5


def experience(policy, num_rollouts, advantages=None) -> Experience:
    """Rollouts of one input; advantages are rewards minus the mean of the *other* rollouts."""
    degraded = torch.zeros(1, 1, 1, 1)
    path = rollout(policy, degraded, ids=[0], group_size=num_rollouts, num_steps=2, eta=NOISE, seed=0)
    rewards = reward(path.sample)
    if advantages is None:
        advantages = (rewards - rewards.mean()) * num_rollouts / (num_rollouts - 1)
    distances, active = torch.ones(num_rollouts), torch.ones(1, dtype=torch.bool)
    condition = policy.condition(degraded)
    return Experience((0,), degraded, condition, path, rewards[None], distances, advantages[None], active, active)
