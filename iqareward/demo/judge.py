"""A judge small enough to be trained on the spot: which of two damaged versions of a scene is the better one?"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iqareward.diffusion.noise import generator
from iqareward.diffusion.progress import progress_bar
from iqareward.rewards.metric import NoReference

DETAIL_GAIN = 8.0  # fine detail is small beside the picture itself
BATCH, RATE = 64, 3e-3


class Judge(nn.Module):
    """Three convolutions on a picture and its fine detail, their mean and spread, one number."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`[B]`, higher is better, for images `[B, 3, H, W]` in [0, 1]."""
        detail = DETAIL_GAIN * (images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False))
        features = F.silu(self.second(F.silu(self.first(torch.cat([2 * images - 1, detail], 1)))))
        features = F.silu(self.third(features))
        pooled = torch.cat([features.mean((2, 3)), features.flatten(2).std(2)], 1)
        return self.head(pooled).squeeze(1)


def train_judge(pairs: Tensor, restored: Tensor, severity: Tensor, *, num_updates: int, seed: int) -> NoReference:
    """A no-reference reward that has learnt to rank degrees of damage, restorations among them, frozen.

    The loss is logistic in the difference of two scores, weighted with the difference of their damage (RankIQA ranks
    with a hinge). A restoration counts as half as damaged as its input: without it a judge takes the smooth pictures
    that SFT makes for flawless and has nothing to teach.

    Args:
        pairs: `[2, N, 3, H, W]`, damaged and clean versions of scenes in [0, 1].
        restored: `[N, 3, H, W]` restorations of the damaged ones.
        severity: `[N]` in [0, 1], how damaged they are.
        num_updates: optimiser steps.
        seed: of weights and order.

    Returns:
        A reward without bounds, higher is better.

    References:
        Liu, van de Weijer, Bagdanov, RankIQA: Learning from Rankings for No-reference Image Quality Assessment, 2017,
        https://arxiv.org/abs/1707.08347
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    images = torch.cat([*pairs, restored])
    damage = torch.cat([severity, torch.zeros_like(severity), severity / 2])
    with progress_bar("training a judge", num_updates) as advance:
        for update in range(num_updates):
            rows = torch.randint(len(images), (2, BATCH), generator=generator(seed, update))
            # Half of the comparisons are between versions of one scene, which only damage tells apart.
            rows[1, ::2] = (rows[0, ::2] + len(severity)) % len(images)
            scores = judge(images[rows.flatten()]).view(2, BATCH)
            better = damage[rows[1]] - damage[rows[0]]
            loss = (better.abs() * F.softplus(-better.sign() * (scores[0] - scores[1]))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance({})
    judge.requires_grad_(False).eval()
    return NoReference(judge, higher_is_better=True, name="judge")
