"""diffusiongym 2.0 at 035ac5b, its successor at 85391c0: rollouts that are scored, and what trains on the scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DDTensor:
    """A batch of samples or latents."""

    data: Tensor


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


def flow_grpo_gradient(batch: RewardBatch, group_size: int) -> Tensor:
    """Advantages among the valid samples of each block, and the gradient by each sample's log-probability."""
    weights = torch.ones_like(batch.rewards) if batch.valid is None else batch.valid.float()
    rewards, weights = batch.rewards.view(-1, group_size), weights.view(-1, group_size)
    count = weights.sum(1, keepdim=True)
    centred = rewards - (rewards * weights).sum(1, keepdim=True) / count.clamp_min(1)
    std = ((centred.square() * weights).sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    advantages = (centred / (std + 1e-4)).where(count >= 2, 0.0).flatten()
    if batch.valid is not None:
        advantages = advantages.where(batch.valid, 0.0)
    log_probs = torch.zeros(len(advantages), requires_grad=True)
    (-advantages * log_probs.exp()).sum().backward()
    return log_probs.grad


def nft_probability(batch: RewardBatch) -> Tensor:
    """DiffusionNFT: r of every sample, valid or not, from rewards normalised by the valid ones."""
    valid = batch.rewards if batch.valid is None else batch.rewards[batch.valid]
    spread = max(valid.square().mean().item() - valid.mean().item() ** 2, 1e-6) ** 0.5
    return 0.5 + 0.5 * ((batch.rewards - valid.mean()) / (spread + 1e-8)).clamp(-1, 1)


def logged(batch: RewardBatch) -> dict[str, float]:
    """What `update` returns besides its loss."""
    valid = batch.rewards if batch.valid is None else batch.rewards[batch.valid]
    fraction = 1.0 if batch.valid is None else batch.valid.float().mean().item()
    return {"r_mean": valid.mean().item(), "valid_frac": fraction}
