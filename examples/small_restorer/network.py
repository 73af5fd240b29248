"""A network that restores photographs on a processor: convolutions alone, at 1/2, 1/4 and 1/8 of the resolution."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2  # side of the squares of pixels that become channels
WIDTHS, DEPTHS = (32, 64, 96), (1, 2, 4)  # channels of each resolution, and blocks on the way down and up
FREQUENCIES = 8  # of the time


class Norm(nn.LayerNorm):
    """Normalises the channels of each place."""

    def forward(self, input: Tensor) -> Tensor:
        """Of the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, shifted by the time."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = Norm(width)  # without it the network learns several times as slowly
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(time_width, width)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Of the same shape."""
        inner = self.first(self.norm(features)) + self.time(time)[:, :, None, None]
        return features + self.second(F.silu(inner))


class Level(nn.Module):
    """Blocks before and after the coarser levels, whose answer is added between them."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], time_width: int) -> None:
        super().__init__()
        width, depth = widths[0], depths[0]
        self.before = nn.ModuleList(Block(width, time_width) for _ in range(depth))
        self.after = nn.ModuleList(Block(width, time_width) for _ in range(depth))
        self.inner = None
        if len(widths) > 1:
            self.down = nn.Conv2d(width, widths[1], 2, stride=2)
            self.inner = Level(widths[1:], depths[1:], time_width)
            self.up = nn.ConvTranspose2d(widths[1], width, 2, stride=2)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Of the same shape."""
        for block in self.before:
            features = block(features, time)
        if self.inner is not None:
            features = features + self.up(self.inner(self.down(features), time))
        for block in self.after:
            features = block(features, time)
        return features


class SmallUNet(nn.Module):
    """Six channels in, three out, for images of any sides divisible by 8; at first its answer is 0.

    It has the call of a `diffusers.UNet2DModel`.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS, patch: int = PATCH) -> None:
        super().__init__()
        self.patch, time_width = patch, 64
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, time_width), nn.SiLU())
        self.first = nn.Conv2d(6 * patch**2, widths[0], 3, padding=1)
        self.body = Level(widths, depths, time_width)
        self.last = nn.Conv2d(widths[0], 3 * patch**2, 3, padding=1)
        for values in self.last.parameters():
            nn.init.zeros_(values)

    def forward(self, pixels: Tensor, times: Tensor) -> SimpleNamespace:
        """`.sample` is the answer `[N, 3, H, W]` for `pixels` `[N, 6, H, W]` and `times` `[N]`."""
        angles = times.float()[:, None] * torch.logspace(0, -2, FREQUENCIES, device=times.device)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(pixels.dtype))
        features = self.body(self.first(F.pixel_unshuffle(pixels, self.patch)), time)
        return SimpleNamespace(sample=F.pixel_shuffle(self.last(features), self.patch))
