"""Two small CNNs that rank how damaged an image is: one is the reward, the other never meets the policy's training."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.restoration.world import HELD_OUT_JUDGE, JUDGE, TASKS, Scale
from iqareward.diffusion.data.degradations import Degradation
from iqareward.diffusion.data.textures import synthetic_images
from iqareward.diffusion.noise import generator
from iqareward.rewards.metric import NoReference

MARGIN = 0.5  # of the ranking loss, per unit of severity


class NarrowJudge(nn.Module):
    """Three strided 3x3 convolutions, average pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.head = nn.Linear(4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`[B]`, higher is better."""
        features = 2 * images - 1
        for layer in self.layers:
            features = F.silu(layer(features))
        return self.head(features.mean((2, 3))).squeeze(1)


class WideJudge(nn.Module):
    """Dilated 5x5 convolutions at full resolution on luma and its high frequencies, mean and deviation pooling."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, width, 5, padding=2)
        self.second = nn.Conv2d(width, width, 5, padding=4, dilation=2)
        self.head = nn.Sequential(nn.Linear(2 * width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, images: Tensor) -> Tensor:
        """`[B]`, higher is better."""
        detail = images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        features = F.relu(self.second(F.relu(self.first(torch.cat([images, 8 * detail], 1)))))
        pooled = torch.cat([features.mean((2, 3)), features.std((2, 3))], 1)
        return self.head(pooled).squeeze(1)


def _rank(judge: nn.Module, scale: Scale, purpose: int, seed: int, tasks: tuple[str, ...], device: str) -> None:
    """Learn that of two damaged versions of one scene the one with the smaller severity is better."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    count = 32
    for update in range(scale.judge_updates):
        chance = generator(seed, purpose, update)
        ids = torch.randint(scale.train_inputs, (count,), generator=chance).tolist()
        clean = synthetic_images(ids, size=scale.size, seed=100 * seed + purpose)
        severity = torch.rand(2, count, generator=chance) * torch.randint(2, (2, count), generator=chance)
        task = tasks[update % len(tasks)]
        versions = [
            torch.where((u > 0).view(-1, 1, 1, 1), Degradation((task,))(clean, u, ids, seed=seed + n), clean)
            for n, u in enumerate(severity)
        ]
        scores = judge(torch.cat(versions).to(device)).view(2, count)
        worse = (severity[1] - severity[0]).to(device)
        loss = F.relu(MARGIN * worse.abs() - worse.sign() * (scores[0] - scores[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained_judges(scale: Scale, seed: int, folder: Path, device: str) -> tuple[NoReference, NoReference]:
    """(the reward, the held-out judge), trained once per seed, then read from `folder`; frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {"judge": NarrowJudge(), "held-out": WideJudge()}
    purposes = {"judge": JUDGE, "held-out": HELD_OUT_JUDGE}
    # The held-out judge has also seen JPEG and blur after noise, the reward's has not.
    seen = {"judge": tuple(task for (task,) in TASKS.values()), "held-out": ("jpeg", "blur", "noise", "resize")}
    for name, network in networks.items():
        file = folder / f"{name}-{seed}.safetensors"
        network.to(device)
        if file.exists():
            network.load_state_dict(load_file(file, device=device))
        else:
            _rank(network, scale, purposes[name], seed, seen[name], device)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), file)
        network.requires_grad_(False).eval()
    first, second = networks.values()
    return (
        NoReference(first, higher_is_better=True, name="judge"),
        NoReference(second, higher_is_better=True, name="held_out"),
    )
