"""A restoration problem small enough to train hundreds of models at once: denoise four 2-D points of four modes each.

A sample is x [4, 2]; every point comes from one of the modes (+-1, +-1), spread by 0.1. The model sees y = x + sigma n
with sigma in [0.1, 1.5] and proposes a ~ N(mu(y, sigma), s^2). SFT regresses mu to x, down to the posterior mean; the
no-reference reward is the smoothed log-density of the modes, an ideal reward. All tensors carry leading dimensions
[arm, seed], so that every arm of a seed sees the same data and the same exploration noise.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

POINTS, WIDTH = 4, 48
MODE_SPREAD, REWARD_BANDWIDTH, EXPLORATION = 0.1, 0.5, 0.1
# 0 is an ideal reward; 0.5 also rewards contrast, which a policy can exploit.
REWARD_BIAS = 0.0
MODES = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
ROLLOUTS, BATCH, TEST = 8, 32, 1024
SFT_STEPS, RL_STEPS, LEARNING_RATE = 1000, 500, 3e-3


class Batch(NamedTuple):
    """clean and noisy `[seed, B, 4, 2]`, sigma `[seed, B]`."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor


def draw(generator: torch.Generator, seeds: int, num: int) -> Batch:
    """`num` fresh samples for each of `seeds`."""
    modes = torch.tensor(MODES)[torch.randint(4, (seeds, num, POINTS), generator=generator)]
    clean = modes + MODE_SPREAD * torch.randn(seeds, num, POINTS, 2, generator=generator)
    sigma = 0.1 + 1.4 * torch.rand(seeds, num, generator=generator)
    noisy = clean + sigma[..., None, None] * torch.randn(seeds, num, POINTS, 2, generator=generator)
    return Batch(clean, noisy, sigma)


def reward(points: Tensor) -> Tensor:
    """Smoothed log-density of the modes, mean over the points; `[..., 4, 2] -> [...]`, higher is better."""
    # exp(-|a - m|^2 / 2h^2) summed over the four corners factorises over the two coordinates.
    scaled = points / REWARD_BANDWIDTH**2
    log_cosh = torch.nn.functional.softplus(2 * scaled) - scaled - math.log(2)
    log_density = log_cosh - (points.square() + 1) / (2 * REWARD_BANDWIDTH**2)
    return log_density.sum(-1).mean(-1) + REWARD_BIAS * points.abs().mean((-2, -1))


def distance(points: Tensor, clean: Tensor) -> Tensor:
    """Root mean squared error per sample, `[..., 4, 2] -> [...]`."""
    return (points - clean).square().mean((-2, -1)).sqrt()


class Models(NamedTuple):
    """Parameters of all networks, each `[arm, seed, in, out]`, and their Adam state."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


def new_models(generator: torch.Generator, seeds: int) -> Models:
    """One freshly initialised network per seed, arm dimension 1."""
    shapes = ((4, WIDTH), (WIDTH + 1, WIDTH), (WIDTH + 1, 2))
    return with_arms([torch.randn(1, seeds, *shape, generator=generator) / math.sqrt(shape[0]) for shape in shapes], 1)


def with_arms(parameters: list[Tensor], num_arms: int) -> Models:
    """The same networks for each of `num_arms` arms, with a fresh optimiser."""
    copies = [p.detach().expand(num_arms, *p.shape[1:]).clone().requires_grad_() for p in parameters]
    return Models(copies, [torch.zeros_like(p) for p in copies], [torch.zeros_like(p) for p in copies])


def predict(models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    """mu `[arm, seed, B, 4, 2]` and the features below the last layer `[arm, seed, B * 4, WIDTH + 1]`."""
    seeds, num = batch.sigma.shape
    log_sigma = batch.sigma.log()[..., None, None].expand(seeds, num, POINTS, 1)
    rows = torch.cat([batch.noisy, log_sigma, torch.ones_like(log_sigma)], -1).reshape(1, seeds, num * POINTS, 4)
    for weight in models.parameters[:-1]:
        rows = torch.nn.functional.silu(rows @ weight)
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    return (rows @ models.parameters[-1]).reshape(-1, seeds, num, POINTS, 2), rows


def descend(models: Models, loss: Tensor, step: int, num_steps: int) -> None:
    """One Adam step on all networks, the learning rate falling to zero along a cosine."""
    rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    gradients = torch.autograd.grad(loss, models.parameters)
    with torch.no_grad():
        for parameter, gradient, first, second in zip(models.parameters, gradients, *models[1:], strict=True):
            first.lerp_(gradient, 0.1)
            second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            correction = math.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-rate * correction)


def pretrain(seeds: range, num_steps: int | None = None) -> Models:
    """The SFT model of every seed; by default trained to its plateau."""
    generator = torch.Generator().manual_seed(seeds.start)
    models = new_models(generator, len(seeds))
    for step in range(num_steps or SFT_STEPS):
        batch = draw(generator, len(seeds), 2 * BATCH)
        descend(models, (predict(models, batch)[0] - batch.clean).square().mean((2, 3, 4)).sum(), step, SFT_STEPS)
    return models


class Rollouts(NamedTuple):
    """One RL step: prediction and last features, and actions, rewards, distances to x of every rollout."""

    mean: Tensor
    features: Tensor
    actions: Tensor
    rewards: Tensor
    distances: Tensor


def roll_out(models: Models, batch: Batch, generator: torch.Generator) -> Rollouts:
    """K rollouts per sample, `actions [arm, seed, B, K, 4, 2]`, with the same noise in every arm."""
    mean, features = predict(models, batch)
    noise = torch.randn(*batch.sigma.shape, ROLLOUTS, POINTS, 2, generator=generator)
    actions = mean.detach().unsqueeze(3) + EXPLORATION * noise
    distances = distance(actions, batch.clean.unsqueeze(2))
    return Rollouts(mean, features, actions, reward(actions), distances)


def training(models: Models, seeds: range) -> Iterator[tuple[int, Batch, Rollouts]]:
    """Batches and rollouts of the RL phase; the caller descends between two of them."""
    generator = torch.Generator().manual_seed(1_000_000 + seeds.start)
    for step in range(RL_STEPS):
        batch = draw(generator, len(seeds), BATCH)
        yield step, batch, roll_out(models, batch, generator)


def calibration(models: Models, seeds: range) -> Tensor:
    """Difficulty of 256 samples per seed before RL, `[seed, 256]`."""
    generator = torch.Generator().manual_seed(2_000_000 + seeds.start)
    return roll_out(models, draw(generator, len(seeds), 256), generator).distances.mean(-1)[0].detach()


def test_scores(models: Models, seeds: range) -> tuple[Tensor, Tensor]:
    """Distance and reward of mu on the test samples, `[arm, seed, TEST]` each."""
    batch = draw(torch.Generator().manual_seed(3_000_000 + seeds.start), len(seeds), TEST)
    with torch.no_grad():
        mean, _ = predict(models, batch)
    return distance(mean, batch.clean), reward(mean)
