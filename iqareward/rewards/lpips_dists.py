"""LPIPS and DISTS as rewards: minus the distance to the reference in the features of a pretrained network."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from iqareward.rewards.backbones import BACKBONES, backbone_weights, packaged_weights
from iqareward.rewards.feature_distances import DISTSNetwork, LPIPSNetwork
from iqareward.rewards.loading import LazyModel, computing_on
from iqareward.rewards.scoring import UnscoredWatch, score_images
from iqareward.types import Bounds, Images, Scores

# Working memory without and with a graph, counted by tests/test_memory.py, the clean copies included.
_BYTES_PER_PIXEL = {"alex": (128, 192), "squeeze": (320, 640), "vgg": (1152, 2176), "dists": (1664, 2944)}


@final
class LPIPSReward:
    """Minus the LPIPS distance to the reference: 0 for identical images, seldom below -1.

    Same figures as the lpips package, whose heads of version 0.1 are used, but always fed the right range, and loadable
    from a file.

    Args:
        net: backbone: `"alex"` is the fastest and closest to human judgements, `"vgg"` is the usual training loss.
        weights: file with torchvision's ImageNet weights of the backbone; None = from torch's cache, or downloaded.
        model: your own network instead, `model(images, references)` on [-1, 1] giving B distances, such as
            `lpips.LPIPS(...)`. It is frozen and put into eval mode.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = where the first images are.
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
    needs_prompts = False
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
        self.differentiable = differentiable
        self.batch_size = batch_size
        self._watch = UnscoredWatch()
        self._min_side = BACKBONES[net].min_side
        self._bytes_per_pixel = _BYTES_PER_PIXEL[net][differentiable]
        build = _build("LPIPSReward", partial(_lpips, net, weights), weights, model)
        self._loader = LazyModel(build, device, name=self.name)

    @property
    def model(self) -> nn.Module:
        """The network; loads it if need be."""
        return self._loader.get()

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image against its reference; `[B]` float32, higher is better, NaN = not scored."""
        return score_images(
            self._score_batch,
            images,
            references,
            name=self.name,
            needs_references=True,
            differentiable=self.differentiable,
            bytes_per_pixel=self._bytes_per_pixel,
            min_side=self._min_side,
            batch_size=self.batch_size,
            device=self._loader.known_device,
            watch=self._watch,
        )

    def _score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        return _minus_distance(self._loader, 2 * images - 1, 2 * references - 1)

    def to(self, device: torch.device | str) -> "LPIPSReward":
        """Move the weights, or choose where they will be loaded; returns the reward itself."""
        self._loader.to(device)
        return self

    def offload(self) -> None:
        """Give the weights' memory on the device back, such as while the model trains; calls fail until `onload`."""
        self._loader.offload()

    def onload(self) -> None:
        """Bring the weights back from host memory to where they were before `offload`."""
        self._loader.onload()


@final
class DISTSReward:
    """Minus the DISTS distance to the reference: 0 for identical images; forgives resampled texture.

    Same figures as the DISTS-pytorch package (its weights are used), with covariances that keep their digits.

    Args:
        weights: file with torchvision's ImageNet weights of VGG-16; None = from torch's cache, or downloaded.
        model: your own network instead, `model(images, references)` on [0, 1] giving B distances. It is frozen and put
            into eval mode. DISTS-pytorch's own class passes gradients only if called with `require_grad=True`.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = where the first images are.
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
    needs_prompts = False
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
        self.differentiable = differentiable
        self.batch_size = batch_size
        self._watch = UnscoredWatch()
        build = _build("DISTSReward", partial(_dists, weights), weights, model)
        self._loader = LazyModel(build, device, name=self.name)

    @property
    def model(self) -> nn.Module:
        """The network; loads it if need be."""
        return self._loader.get()

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image against its reference; `[B]` float32, higher is better, NaN = not scored."""
        return score_images(
            partial(_minus_distance, self._loader),
            images,
            references,
            name=self.name,
            needs_references=True,
            differentiable=self.differentiable,
            bytes_per_pixel=_BYTES_PER_PIXEL["dists"][self.differentiable],
            min_side=BACKBONES["vgg"].min_side,
            batch_size=self.batch_size,
            device=self._loader.known_device,
            watch=self._watch,
        )

    def to(self, device: torch.device | str) -> "DISTSReward":
        """Move the weights, or choose where they will be loaded; returns the reward itself."""
        self._loader.to(device)
        return self

    def offload(self) -> None:
        """Give the weights' memory on the device back, such as while the model trains; calls fail until `onload`."""
        self._loader.offload()

    def onload(self) -> None:
        """Bring the weights back from host memory to where they were before `offload`."""
        self._loader.onload()


def _build(
    who: str, download: partial[nn.Module], weights: str | Path | None, model: nn.Module | None
) -> partial[nn.Module]:
    if model is None:
        return download
    if weights is not None:
        raise ValueError(f"{who} expected either `weights` or `model`, got both.")
    return partial(_given, model)


def _given(model: nn.Module, device: torch.device) -> nn.Module:
    return model.float().to(device)


def _lpips(net: str, weights: str | Path | None, device: torch.device) -> nn.Module:
    heads = packaged_weights("lpips", f"weights/v0.1/{net}.pth", purpose="LPIPSReward")
    return LPIPSNetwork(net, backbone_weights(net, weights, purpose="LPIPSReward"), heads).to(device)


def _dists(weights: str | Path | None, device: torch.device) -> nn.Module:
    learned = packaged_weights("DISTS_pytorch", "weights.pt", purpose="DISTSReward")
    return DISTSNetwork(backbone_weights("vgg", weights, purpose="DISTSReward"), learned).to(device)


def _minus_distance(loader: LazyModel, images: Tensor, references: Tensor) -> Tensor:
    """Minus the network's distance, computed where the network lives, `[B]` where the images are."""
    model = loader.ready(images)
    with computing_on(loader.device):
        distances = model(images.to(loader.device), references.to(loader.device))
    # some networks return [B, 1, 1, 1]; rounding can make the distance of identical images -1e-7
    return torch.neg(distances.reshape(images.shape[0]).clamp(min=0)).to(images.device)
