"""Two small CNNs that rank how damaged an image is: one is the reward, the other never meets the policy's training."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.restoration import world
from benchmarks.restoration.world import HELD_OUT_JUDGE, JUDGE, Job, Kept
from iqareward.diffusion import Batch, Degradation, Noise, PixelPolicy, Validation, rollout
from iqareward.diffusion.conditions import repeat
from iqareward.diffusion.rollouts import images_of
from iqareward.rewards.metric import NoReference
from iqareward.seeds import generator

MARGIN = 4.0  # of the ranking loss, per unit of damage
BATCH, RATE = 32, 3e-3


def detail(images: Tensor) -> Tensor:
    """What a 3x3 mean takes away, enlarged to the scale of the picture."""
    return 8 * (images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False))


class NarrowJudge(nn.Module):
    """Three strided 3x3 convolutions on the picture and its detail, mean and deviation pooling."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        sizes = [6, width, 2 * width, 2 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.head = nn.Linear(4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`[B]`, higher is better."""
        features = torch.cat([2 * images - 1, detail(images)], 1)
        for layer in self.layers:
            features = F.silu(layer(features))
        return self.head(torch.cat([features.mean((2, 3)), features.flatten(2).std(2)], 1)).squeeze(1)


class WideJudge(nn.Module):
    """Two 5x5 convolutions at full resolution, the second dilated, on the detail alone; mean and largest pooling."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 5)
        self.second = nn.Conv2d(width, width, 5, dilation=2)
        self.head = nn.Sequential(nn.Linear(2 * width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, images: Tensor) -> Tensor:
        """`[B]`, higher is better."""
        features = F.relu(self.second(F.relu(self.first(detail(images)))))
        pooled = torch.cat([features.mean((2, 3)), F.avg_pool2d(features, 3).amax((2, 3))], 1)
        return self.head(pooled).squeeze(1)


def artefacts(images: Tensor, kinds: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """What a policy does to please a judge, in any strength: (images, strength `[N]` in [0, 1]), the kinds in turns.

    Without them the score of a judge that has seen natural damage only rises without end with grain and sharpening.
    """
    chance = generator(seed, len(images))
    strength = torch.rand(len(images), generator=chance)
    noise = torch.randn(images.shape, generator=chance)
    rows, columns = (torch.arange(side) for side in images.shape[2:])
    added = {
        "sharpening": 0.5 * detail(images),
        "grain": 0.3 * noise,
        "grid": 0.3 * ((rows[:, None] + columns) % 2 * 2 - 1).expand_as(images),
        "blotches": 0.8 * F.avg_pool2d(noise, 5, 1, 2),
        "contrast": 1.5 * (images - images.mean((2, 3), keepdim=True)),
    }
    kind = torch.arange(len(images)) % len(kinds)
    chosen = torch.stack([added[name] for name in kinds])[kind, torch.arange(len(images))]
    return (images + strength[:, None, None, None] * chosen).clamp(0, 1), strength


def rank(judge: nn.Module, versions: Tensor, damage: Tensor, *, updates: int, seed: int, device: str) -> None:
    """Learn that of two images the one with less damage is better, in half of the cases two versions of one scene.

    Args:
        judge: the network.
        versions: `[V, N, 3, H, W]`, V versions of N scenes.
        damage: `[V, N]`.
        updates: optimiser steps.
        seed: of the comparisons.
        device: of the judge.
    """
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    kinds, count = damage.shape
    for update in range(updates):
        chance = generator(seed, update)
        version = torch.randint(kinds, (2, BATCH), generator=chance)
        scene = torch.randint(count, (2, BATCH), generator=chance)
        scene[1, ::2] = scene[0, ::2]
        scores = judge(versions[version, scene].flatten(0, 1).to(device)).view(2, BATCH)
        worse = (damage[version[1], scene[1]] - damage[version[0], scene[0]]).to(device)
        loss = F.relu(MARGIN * worse.abs() - worse.sign() * (scores[0] - scores[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def material(
    job: Job, policy: PixelPolicy, extra: Sequence[Degradation], kinds: Sequence[str], seed: int
) -> tuple[Tensor, Tensor]:
    """Versions `[V, N, 3, H, W]` of a judge's own scenes and their damage `[V, N]`.

    Clean, degraded like the inputs and in other ways, restored twice as the policy samples in training and once as it
    is tested, and with artefacts on the clean and on a restored version. A restoration counts as half as damaged as its
    input; without restorations a judge takes the smooth images of SFT for flawless and has nothing to teach.
    """
    scale = job.scale
    clean = world.scenes(scale.size, scale.train_inputs // 4, seed)
    sets = [list(world.TASKS.values()), *([task] for task in extra)]
    damaged = [Kept.damaged(clean, tasks, seed + number) for number, tasks in enumerate(sets)]
    half = damaged[0].severity / 2
    validation = Validation(damaged[0], {}, num_steps=2 * scale.steps, inputs_at_once=64)
    tested = validation.restore(policy, *validation.batches, seed=seed)
    batch = Batch(tuple(range(len(clean))), damaged[0].degraded.to(job.device))
    noise = Noise.of_groups(batch.ids, 2, seed=seed, device=job.device)
    condition = repeat(policy.condition(batch, Noise(batch.ids, seed=seed, device=job.device)), 2)
    sample = rollout(policy, condition, noise, num_steps=scale.steps, eta=1.0).sample
    first, second = images_of(policy, sample, condition).cpu().view(-1, 2, *clean.shape[1:]).unbind(1)
    (on_clean, mild), (on_restored, more) = (artefacts(images, kinds, seed + 1) for images in (clean, first))
    versions = [clean, tested, first, second, on_clean, on_restored, *(kept.degraded for kept in damaged)]
    damage = [torch.zeros(len(clean)), half, half, half, mild, half + more, *(kept.severity for kept in damaged)]
    return torch.stack(versions), torch.stack(damage)


def trained_judge(job: Job, policy: PixelPolicy, member: int = 0) -> NoReference:
    """The reward, which knows the damage of the tasks; other members of an ensemble have other weights and scenes."""
    name = "judge" + (f"-{member}" if member else "")
    make = partial(material, extra=(), kinds=("sharpening", "grain", "grid"))
    return _trained(NarrowJudge, name, make, JUDGE + 10 * member, job, policy)


def held_out_judge(job: Job, policy: PixelPolicy) -> NoReference:
    """Never in a reward; another architecture, scenes, weights, artefacts, and it knows JPEG and mixtures."""
    extra = [Degradation(tasks) for tasks in (("jpeg",), ("blur", "noise"), ("resize", "jpeg"))]
    make = partial(material, extra=extra, kinds=("sharpening", "blotches", "contrast"))
    return _trained(WideJudge, "held_out", make, HELD_OUT_JUDGE, job, policy)


def _trained(
    build: type[nn.Module],
    name: str,
    make: Callable[..., tuple[Tensor, Tensor]],
    purpose: int,
    job: Job,
    policy: PixelPolicy,
) -> NoReference:
    """Trained once per seed on the restorations of the frozen model `policy`, then read from its file; frozen."""
    seed, file = 100 * job.seed + purpose, job.shared / f"{name}-{job.seed}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
    network.to(job.device)
    if not file.exists():
        versions, damage = make(job, policy, seed=seed)
        rank(network, versions, damage, updates=job.scale.judge_updates, seed=seed, device=job.device)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), file)
    network.load_state_dict(load_file(file, device=job.device))
    network.requires_grad_(False).eval()
    return NoReference(network, higher_is_better=True, name=name, differentiable=True)
