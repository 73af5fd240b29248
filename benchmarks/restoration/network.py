"""A restoration network that a processor can train: half the resolution from the first layer, no attention."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2  # side of the squares of pixels that become channels
FREQUENCIES = 8  # of the time


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, shifted by the time."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(time_width, width)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Of the same shape."""
        inner = self.first(F.silu(features)) + self.time(time)[:, :, None, None]
        return features + self.second(F.silu(inner))


class SmallUNet(nn.Module):
    """Six channels in, three out, for images of any sides divisible by 4; at first its answer is 0.

    It has the call of a `diffusers.UNet2DModel`, and about a seventh of the cost of the smallest useful one.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, 2 * width), nn.SiLU())
        self.first = nn.Conv2d(6 * PATCH**2, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.before, self.after = Block(width, 2 * width), Block(width, 2 * width)
        self.middle = nn.ModuleList(Block(2 * width, 2 * width) for _ in range(depth))
        self.last = nn.Conv2d(width, 3 * PATCH**2, 3, padding=1)
        for values in self.last.parameters():
            nn.init.zeros_(values)

    def forward(self, pixels: Tensor, times: Tensor) -> SimpleNamespace:
        """`.sample` is the answer `[N, 3, H, W]` for `pixels` `[N, 6, H, W]` and `times` `[N]`."""
        angles = times.float()[:, None] * torch.logspace(0, -3, FREQUENCIES, device=times.device)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        fine = self.before(self.first(F.pixel_unshuffle(pixels, PATCH)), time)
        coarse = self.down(fine)
        for block in self.middle:
            coarse = block(coarse, time)
        fine = self.after(fine + self.up(coarse), time)
        return SimpleNamespace(sample=F.pixel_shuffle(self.last(F.silu(fine)), PATCH))
