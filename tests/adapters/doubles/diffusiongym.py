"""diffusiongym 2.0 at 035ac5b, its successor at 85391c0: rollouts that are scored, and what trains on the scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DDTensor:
    """A batch of samples or latents."""

    data: Tensor

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class RewardBatch:
    rewards: Tensor
    valid: Tensor | None = None
    metadata: Mapping[str, Any] | None = None


def modules() -> dict[str, ModuleType]:
    """The successor, for `pages.package`."""
    module = ModuleType("reward")
    module.RewardBatch = RewardBatch
    return {"diffusiongym__core__reward": module}


def release_costs(reward: Any, images: Tensor, conditioning: dict[str, Any], reward_scale: float = 1.0) -> Tensor:
    """Release 2.0: the costs of each trajectory, of which the last is the reward, without running costs."""
    rewards, valids = reward(DDTensor(images), DDTensor(images), **conditioning)
    rewards, valids = rewards.cpu(), valids.cpu()
    assert rewards.shape == valids.shape == (len(images),)
    return torch.cat([torch.zeros(1, len(images)), -reward_scale * rewards[None]]).flip(0).cumsum(0).flip(0)


def evaluate_terminal(reward: Any, images: Tensor, conditioning: dict[str, Any]) -> RewardBatch:
    """FlowEnvironment: decoded samples, their latents and the conditioning, by keyword."""
    return reward(sample=DDTensor(images), latent=DDTensor(images), conditioning=conditioning)


class FlowEnvironment:
    """An environment whose noise is 0, for a policy that is one velocity."""

    def make_forward_batch(self, x_data: DDTensor, *, conditioning: Mapping[str, Any]) -> Any:
        return SimpleNamespace(x_t=x_data, t=torch.zeros(len(x_data)), target_velocity=DDTensor(-x_data.data))

    def predict_velocity(self, model: Tensor, *, x_t: DDTensor, t: Tensor, conditioning: Mapping[str, Any]) -> DDTensor:
        return DDTensor(model.expand_as(x_t.data))

    def velocity_error(self, predicted: DDTensor, target: DDTensor) -> Tensor:
        return (predicted.data - target.data).square().mean(1)


class FlowGRPO:
    """Advantages among the valid samples of each block, and a policy loss whose gradient is that of each sample."""

    def __init__(self, group_size: int, rollout: tuple[Tensor, RewardBatch]) -> None:
        self.group_size, self.latent, self.reward = group_size, DDTensor(rollout[0]), rollout[1]
        self.gradients = torch.zeros(len(rollout[0]))

    def collect(self, *, context: Any, dynamics: Any, n: int, time_grid: Any, conditioning: Mapping[str, Any]) -> Any:
        batch = self.reward
        weights = torch.ones_like(batch.rewards) if batch.valid is None else batch.valid.float()
        rewards, weights = batch.rewards.view(-1, self.group_size), weights.view(-1, self.group_size)
        count = weights.sum(1, keepdim=True)
        centred = rewards - (rewards * weights).sum(1, keepdim=True) / count.clamp_min(1)
        std = ((centred.square() * weights).sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        advantages = (centred / (std + 1e-4)).where(count >= 2, 0.0).flatten()
        if batch.valid is not None:
            advantages = advantages.where(batch.valid, 0.0)
        rollout = SimpleNamespace(terminal_latent=self.latent, reward=batch)
        return SimpleNamespace(rollout=rollout, advantages=advantages)

    def update(self, *, context: Any, experience: Any) -> dict[str, float]:
        log_probs = torch.zeros(len(experience.advantages), requires_grad=True)
        (-experience.advantages * log_probs.exp()).sum().backward()
        self.gradients = log_probs.grad
        batch = experience.rollout.reward
        valid = batch.rewards if batch.valid is None else batch.rewards[batch.valid]
        fraction = 1.0 if batch.valid is None else batch.valid.float().mean().item()
        return {"r_mean": valid.mean().item(), "valid_frac": fraction}

    def synchronize_rollout_policy(self, *, context: Any) -> None:
        pass


def train(batch: RewardBatch, group_size: int) -> tuple[Tensor, dict[str, float]]:
    """One iteration: the gradient by each sample's log-probability, and what is logged."""
    algorithm = FlowGRPO(group_size, (torch.zeros(len(batch.rewards), 2), batch))
    experience = algorithm.collect(context=None, dynamics=None, n=len(batch.rewards), time_grid=None, conditioning={})
    metrics = algorithm.update(context=None, experience=experience)
    return algorithm.gradients, metrics


def nft_probability(batch: RewardBatch) -> Tensor:
    """DiffusionNFT: r of every sample, valid or not, from rewards normalised by the valid ones."""
    valid = batch.rewards if batch.valid is None else batch.rewards[batch.valid]
    spread = max(valid.square().mean().item() - valid.mean().item() ** 2, 1e-6) ** 0.5
    return 0.5 + 0.5 * ((batch.rewards - valid.mean()) / (spread + 1e-8)).clamp(-1, 1)
