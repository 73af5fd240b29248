"""LPIPS and DISTS as rewards: minus the distance to the reference in the features of a pretrained network."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from iqareward.rewards.backbones import BACKBONES, backbone_weights, packaged_weights
from iqareward.rewards.core import ImageReward
from iqareward.rewards.feature_distances import DISTSNetwork, LPIPSNetwork
from iqareward.rewards.loading import LazyModel
from iqareward.types import Bounds

# Working memory without and with a graph, counted by tests/test_memory.py, the clean copies included.
_BYTES_PER_PIXEL = {"alex": (128, 192), "squeeze": (320, 640), "vgg": (1152, 2176), "dists": (1664, 2944)}


@final
class LPIPSReward(ImageReward):
    """Minus the LPIPS distance to the reference: 0 for identical images, seldom below -1.

    Same figures as the lpips package, whose heads of version 0.1 are used, but always fed the right range, and loadable
    from a file.

    Args:
        net: backbone: `"alex"` is the fastest and closest to human judgements, `"vgg"` is the usual training loss.
        weights: file with torchvision's ImageNet weights of the backbone; None = from torch's cache, or downloaded.
        model: your own network instead, `model(images, references)` on [-1, 1] giving B distances, such as
            `lpips.LPIPS(...)`. It is frozen and put into eval mode.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU (a `model` given stays where it is).
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: an unknown `net`, or both `weights` and `model`.

    Example:
        >>> LPIPSReward("alex").bounds  # nothing is loaded yet
        (None, 0.0)

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
        https://arxiv.org/abs/1801.03924
    """

    needs_references = True
    bounds: Bounds = (None, 0.0)

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        *,
        weights: str | Path | None = None,
        model: nn.Module | None = None,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if net not in BACKBONES:
            raise ValueError(f"LPIPSReward expected `net` to be one of {', '.join(BACKBONES)}, got {net!r}.")
        self.name = "lpips" if net == "alex" else f"lpips_{net}"
        self.differentiable, self.batch_size = differentiable, batch_size
        self.min_side, self.bytes_per_pixel = BACKBONES[net].min_side, _BYTES_PER_PIXEL[net][differentiable]
        self.model_loader = _loader(self.name, partial(_lpips, net, weights), weights, model, device)

    @property
    def model(self) -> nn.Module:
        """The network; loads it if need be."""
        return self._loader.get()

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Minus the distance of each pair."""
        return _minus_distance(self._loader, 2 * images - 1, 2 * references - 1)


@final
class DISTSReward(ImageReward):
    """Minus the DISTS distance to the reference: 0 for identical images; forgives resampled texture.

    Same figures as the DISTS-pytorch package (its weights are used), with covariances that keep their digits.

    Args:
        weights: file with torchvision's ImageNet weights of VGG-16; None = from torch's cache, or downloaded.
        model: your own network instead, `model(images, references)` on [0, 1] giving B distances. It is frozen and put
            into eval mode. DISTS-pytorch's own class passes gradients only if called with `require_grad=True`.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU (a `model` given stays where it is).
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: both `weights` and `model`.

    Example:
        >>> DISTSReward().bounds  # nothing is loaded yet
        (None, 0.0)

    References:
        Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", 2020,
        https://arxiv.org/abs/2004.07728
    """

    name = "dists"
    needs_references = True
    bounds: Bounds = (None, 0.0)

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        model: nn.Module | None = None,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.differentiable, self.batch_size = differentiable, batch_size
        self.min_side, self.bytes_per_pixel = BACKBONES["vgg"].min_side, _BYTES_PER_PIXEL["dists"][differentiable]
        self.model_loader = _loader(self.name, partial(_dists, weights), weights, model, device)

    @property
    def model(self) -> nn.Module:
        """The network; loads it if need be."""
        return self._loader.get()

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Minus the distance of each pair."""
        return _minus_distance(self._loader, images, references)


def _loader(
    name: str, load: partial[nn.Module], weights: str | Path | None, model: nn.Module | None, device: Any
) -> LazyModel:
    if model is None:
        return LazyModel(load, device, name=name)
    if weights is not None:
        raise ValueError(f"{name} expected either `weights` or `model`, got both.")
    return LazyModel(partial(_given, model), device, name=name, is_built=True)


def _given(model: nn.Module, device: torch.device | None) -> nn.Module:
    return model.to(device=device, dtype=torch.float32)


def _lpips(net: str, weights: str | Path | None, device: torch.device) -> nn.Module:
    heads = packaged_weights("lpips", f"weights/v0.1/{net}.pth", purpose="LPIPSReward")
    return LPIPSNetwork(net, backbone_weights(net, weights, purpose="LPIPSReward"), heads).to(device)


def _dists(weights: str | Path | None, device: torch.device) -> nn.Module:
    learned = packaged_weights("DISTS_pytorch", "weights.pt", purpose="DISTSReward")
    return DISTSNetwork(backbone_weights("vgg", weights, purpose="DISTSReward"), learned).to(device)


def _minus_distance(loader: LazyModel, images: Tensor, references: Tensor) -> Tensor:
    distances = loader.ready(images)(images, references)
    # some networks return [B, 1, 1, 1]; rounding can make the distance of identical images -1e-7
    return -distances.reshape(images.shape[0]).clamp(min=0)
