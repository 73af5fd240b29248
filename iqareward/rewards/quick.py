"""A small convolutional network as a no-reference reward, with weights that are distilled from other rewards."""

from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.options import name_with
from iqareward.types import Bounds
from iqareward.weight_files import weight_file

# Of MobileNetV2, up to its first 96 channels: expansion, channels, number of blocks, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
_TAPS = (0, 1, 2, 4)  # stages whose features are read; every tap has half of the resolution of the one before
_WIDTH = 32  # channels that are read from each
# Working memory without and with a graph, counted by tests/test_memory.py, the clean copies included.
_BYTES_PER_PIXEL = (256, 1024)
_SHIPPED = Path(__file__).with_name("data") / "quick.safetensors"  # its metadata say how it was made


@final
class QuickNetwork(nn.Module):
    """The first blocks of MobileNetV2 without batch normalisation, and a head that rates every neighbourhood.

    The features of four resolutions are pooled to one grid with a step of 16 pixels. Each of its places gets a rating
    and a weight; the weighted mean of the ratings is the rating of the image, whatever its size.

    Example:
        >>> QuickNetwork()(torch.rand(2, 3, 32, 48)).shape
        torch.Size([2])

    References:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018,
        https://arxiv.org/abs/1801.04381
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.stages, self.readers, channels = nn.ModuleList(), nn.ModuleList(), 32
        for place, (expansion, width, count, stride) in enumerate(_STAGES):
            widths = [channels] + [width] * count
            self.stages.append(
                nn.Sequential(*(_Block(widths[k], width, expansion, stride if k == 0 else 1) for k in range(count)))
            )
            channels = width
            if place in _TAPS:
                self.readers.append(nn.Conv2d(width, _WIDTH, 1))
        self.mixer = nn.Conv2d(_WIDTH * len(_TAPS), 64, 1)
        self.rater = nn.Conv2d(64, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Ratings `[B]`, unbounded, of images `[B, 3, H, W]` in [0, 1]."""
        features = F.relu6(self.stem(4 * images - 2))  # about the spread of ImageNet's normalisation
        read: list[Tensor] = []
        for place, stage in enumerate(self.stages):
            features = stage(features)
            if place in _TAPS:
                step = 2 ** (len(_TAPS) - 1 - len(read))
                # activations, not the signed features, whose mean would hide noise
                found = F.relu(self.readers[len(read)](features))
                read.append(F.avg_pool2d(found, step, ceil_mode=True) if step > 1 else found)
        ratings, weights = self.rater(F.relu(self.mixer(torch.cat(read, 1)))).flatten(2).unbind(1)
        weights = F.softplus(weights) + 1e-3
        return (ratings * weights).sum(1) / weights.sum(1)


@final
class _Block(nn.Module):
    """An inverted residual: wider, filtered channel by channel, narrower."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.widen = nn.Conv2d(channels, inner, 1) if expansion > 1 else None
        self.filter = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner)
        self.narrow = nn.Conv2d(inner, width, 1)
        self.is_residual = stride == 1 and channels == width

    def forward(self, features: Tensor) -> Tensor:
        inner = features if self.widen is None else F.relu6(self.widen(features))
        found = self.narrow(F.relu6(self.filter(inner)))
        return features + found if self.is_residual else found


@final
class QuickReward(ImageReward):
    """Quality in [0, 1] by a small convolutional network: no reference, no download, and gradients to the pixels.

    A score is the share of the training images that the teacher found worse: for the weights of the package 0.5 HaarPSI
    + 0.5 MDSI, on degraded and restored photographs. `examples/distill` trains weights on your images and the scores of
    any reward. Trust it on what resembles its training images, and not by its gradient alone.

    Args:
        weights: A file that `examples/distill` wrote, or a folder or hub id with one; None = that of the package.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Example:
        >>> images = torch.zeros(2, 3, 48, 64)
        >>> QuickReward()(images).shape
        torch.Size([2])
    """

    bounds: Bounds = (0.0, 1.0)
    min_side = 32

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.name = name_with(self, "quick", weights=weights)
        self.differentiable, self.batch_size = differentiable, batch_size
        self.bytes_per_pixel = _BYTES_PER_PIXEL[differentiable]
        build = partial(_load, _SHIPPED if weights is None else weights)
        self.model_loader = LazyModel(build, device, name=self.name)

    def score_batch(self, images: Tensor) -> Tensor:
        """Rating of each image, mapped to [0, 1]."""
        return self._loader.ready(images)(images).sigmoid()


def _load(source: str | Path, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        network = QuickNetwork()
    weights = weight_file(source)
    try:
        found = weights.take({key: value.shape for key, value in network.state_dict().items()})
    except ValueError as error:
        raise ValueError(f"QuickReward expected a file that `examples.distill` wrote: {error}") from error
    network.load_state_dict({key: value.float() for key, value in found.items()}, assign=True)
    return network.to(device)
