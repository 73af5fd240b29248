"""LPIPS and DISTS as plain networks: distances between features of two images."""

from collections.abc import Sequence
from itertools import starmap
from typing import final

import torch
from torch import Tensor, nn

from iqareward.rewards.backbones import BACKBONES, FeatureTrunk
from iqareward.weight_files import WeightFile

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class LPIPSNetwork(nn.Module):
    """LPIPS: squared differences of unit-length feature vectors, weighted per channel by learned heads.

    Args:
        net: `"alex"`, `"vgg"` or `"squeeze"`.
        backbone: torchvision's state dict of the network.
        heads: state dict of the lpips package: `lin{k}.model.1.weight` `[1, C, 1, 1]`.

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
        https://arxiv.org/abs/1801.03924
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, backbone: WeightFile, heads: WeightFile) -> None:
        super().__init__()
        self.trunk = FeatureTrunk(net, backbone)
        shapes = {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(BACKBONES[net].widths)}
        self.heads = nn.ParameterList(head.float() for head in heads.take(shapes).values())
        # ImageNet's statistics, for pixels in [-1, 1]
        self.register_buffer("shift", _per_channel([2 * mean - 1 for mean in _IMAGENET_MEAN]))
        self.register_buffer("scale", _per_channel([2 * std for std in _IMAGENET_STD]))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances `[B]` >= 0 of pairs `[B, 3, H, W]` in [-1, 1]; 0 = identical."""
        pairs = self.trunk.pairs((images - self.shift) / self.scale, (references - self.shift) / self.scale)
        layers = [_difference(*next(pairs), head) for head in self.heads]
        return torch.stack(layers).sum(0)


@final
class DISTSNetwork(nn.Module):
    """DISTS: one minus the similarity of the means (texture) and covariances (structure) of VGG-16 features.

    Args:
        backbone: torchvision's state dict of VGG-16.
        weights: learned `alpha` and `beta` `[1, 1475, 1, 1]`, as in the DISTS-pytorch package.

    References:
        Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", 2020,
        https://arxiv.org/abs/2004.07728
    """

    mean: Tensor
    std: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, backbone: WeightFile, weights: WeightFile) -> None:
        super().__init__()
        self.trunk = FeatureTrunk("vgg", backbone)
        for index, layer in enumerate(self.trunk.features):
            if isinstance(layer, nn.MaxPool2d):
                self.trunk.features[index] = _HanningPool()
        channels = (1, 3 + sum(BACKBONES["vgg"].widths), 1, 1)  # of the image itself and of the compared layers
        learned = weights.take({"alpha": channels, "beta": channels})
        total = learned["alpha"].sum() + learned["beta"].sum()
        if not total > 0:  # the weights are divided by it
            raise ValueError(f"{weights.path} expected `alpha` and `beta` with a positive sum, got {total.item()}.")
        self.register_buffer("alpha", learned["alpha"].float() / total)
        self.register_buffer("beta", learned["beta"].float() / total)
        self.register_buffer("mean", _per_channel(_IMAGENET_MEAN))
        self.register_buffer("std", _per_channel(_IMAGENET_STD))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances `[B]` of pairs `[B, 3, H, W]` in [0, 1]; 0 = identical."""
        pairs = self.trunk.pairs((images - self.mean) / self.std, (references - self.mean) / self.std)
        layers = [_similarities(images, references), *starmap(_similarities, pairs)]
        texture, structure = zip(*layers, strict=True)
        similarity = self.alpha * torch.cat(texture, 1) + self.beta * torch.cat(structure, 1)
        return 1 - similarity.sum((1, 2, 3))


@final
class _HanningPool(nn.Module):
    """L2 pooling of stride 2 with a 3 x 3 Hanning window: DISTS's max pooling without aliasing."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25], device="cpu")
        self.register_buffer("window", torch.outer(row, row))

    def forward(self, features: Tensor) -> Tensor:
        kernel = self.window.expand(features.shape[1], 1, 3, 3)
        power = nn.functional.conv2d(features.square(), kernel, stride=2, padding=1, groups=features.shape[1])
        return (power + 1e-12).sqrt()  # inside the root, for a finite gradient at 0


def _similarities(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Texture and structure similarity of every channel of `[B, C, H, W]`, each `[B, C, 1, 1]`."""
    mean_a, mean_b = first.mean((2, 3), keepdim=True), second.mean((2, 3), keepdim=True)
    a, b = first - mean_a, second - mean_b
    variances = a.square().add_(b.square()).mean((2, 3), keepdim=True)
    # centred before multiplying: E[ab] - E[a]E[b] loses more digits in float32 than the constant 1e-6 has
    covariance = (a * b).mean((2, 3), keepdim=True)
    texture = (2 * mean_a * mean_b + 1e-6) / (mean_a.square() + mean_b.square() + 1e-6)
    return texture, (2 * covariance + 1e-6) / (variances + 1e-6)


def _difference(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
    """Weighted squared difference of the directions of two maps `[B, C, H, W]`, averaged over positions: `[B]`."""
    return (_unit(first).sub_(_unit(second)).square() * head).sum(1).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    """Feature vectors of length 1, or 0. The norm's gradient is defined at 0, that of a root of squares is not."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
