"""Generated pictures for tests of metrics."""

import torch
from torch import Tensor, nn


def textures(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth colour patches `[count, 3, side, side]`."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=rng)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def noisy(images: Tensor, strength: float = 0.05) -> Tensor:
    rng = torch.Generator().manual_seed(7)
    return (images + strength * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def traps(side: int) -> dict[str, Tensor]:
    """Batches of three `[3, 3, side, side]` on which metrics lose digits: nearly flat, striped, text; and textures."""
    rng = torch.Generator().manual_seed(3)
    flat = 0.5 + torch.tensor([0.01, 0.001, 0.003]).view(3, 1, 1, 1) * torch.randn(3, 3, side, side, generator=rng)
    lines = torch.arange(side) // torch.tensor([[2], [4], [7]]) % 2
    letters = (torch.rand(3, 1, side // 4 + 1, side // 4 + 1, generator=rng) < 0.8).float().repeat(1, 3, 4, 4)
    stripes = lines.float()[:, None, None].expand(-1, 3, side, -1).contiguous()
    return {
        "nearly flat": flat,
        "stripes": stripes,
        "text": letters[..., :side, :side],
        "textures": textures(3, side // 8 * 8 + 8)[..., :side, :side],
    }


TRAPS = ("nearly flat", "stripes", "text", "textures")
