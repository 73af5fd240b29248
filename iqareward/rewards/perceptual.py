"""LPIPS, ST-LPIPS, DISTS, and the metrics of the piq package as rewards."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from iqareward.optional import require
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel, plain_defaults
from iqareward.rewards.options import name_with
from iqareward.types import Bounds
from iqareward.weight_files import Shape, WeightFile, weight_file

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Working memory without and with a graph, counted by tests/test_memory.py, the clean copies included.
_BYTES_PER_PIXEL = {
    "alex": (128, 192), "squeeze": (320, 640), "vgg": (1152, 2176), "dists": (1664, 2944),
    "stlpips": (896, 1536), "stlpips_vgg": (1408, 3840),
}  # fmt: skip


class _Backbone(NamedTuple):
    """A classifier of torchvision and the layers whose activations are compared.

    Attributes:
        function: its name in `torchvision.models`.
        url: address of its ImageNet weights there.
        taps: indices of the compared layers in `.features`.
        widths: their channels.
        min_side: smallest image side that leaves every compared layer a pixel.
    """

    function: str
    url: str
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    min_side: int


_SITE = "https://download.pytorch.org/models"
BACKBONES = {
    "alex": _Backbone("alexnet", f"{_SITE}/alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "vgg": _Backbone("vgg16", f"{_SITE}/vgg16-397923af.pth", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "squeeze": _Backbone(
        "squeezenet1_1",
        f"{_SITE}/squeezenet1_1-b8a52dc0.pth",
        (1, 4, 7, 9, 10, 11, 12),
        (64, 128, 256, 384, 384, 512, 512),
        17,
    ),
}
# The layers that ST-LPIPS compares, counted with the blurs that it inserts, and its smallest images.
_SHIFT_TOLERANT = {
    "alex": BACKBONES["alex"]._replace(taps=(2, 6, 10, 12, 14), min_side=21),
    "vgg": BACKBONES["vgg"]._replace(taps=(3, 9, 17, 25, 33), min_side=18),
}
# What other files put before or instead of torchvision's "features.": lpips and stlpips_pytorch, DISTS-pytorch, ours.
_PREFIX = re.compile(r"^(?:net\.slice\d+\.|stage\d+\.|trunk\.features\.)")
_HEAD = re.compile(r"^heads\.(\d+)$")  # ours


class _FeatureDistance(ImageReward):
    """Minus a distance between features of a pretrained network."""

    needs_references = True
    bounds: Bounds = (None, 0.0)

    @property
    def model(self) -> nn.Module:
        """The network; loads it if need be."""
        return self._loader.get()

    def _load_later(
        self, load: partial[nn.Module], weights: str | Path | None, model: nn.Module | None, device: Any
    ) -> None:
        if model is not None and weights is not None:
            raise ValueError(f"{self.name} expected either `model`, or files of weights, got both.")
        build = load if model is None else partial(_moved, model)
        self.model_loader = LazyModel(build, device, name=self.name, is_built=model is not None)

    def _score(self, images: Tensor, references: Tensor) -> Tensor:
        distances = self._loader.ready(images)(images, references)
        # some networks return [B, 1, 1, 1]; rounding can make the distance of identical images -1e-7
        return -distances.reshape(images.shape[0]).clamp(min=0)


@final
class LPIPSReward(_FeatureDistance):
    """Minus the LPIPS distance to the reference: 0 for identical images, seldom below -1.

    Same figures as the lpips package, whose heads of version 0.1 are used, but always fed the right range, loadable
    from a file, and with a finite gradient where features are zero.

    Args:
        net: Backbone: `"alex"` is the fastest and closest to human judgements, `"vgg"` is the usual training loss.
        weights: File with torchvision's ImageNet weights of the backbone, or a folder or hub id with that file; None =
            from torch's cache, or downloaded. A file that holds the heads too, such as the state dict of
            `lpips.LPIPS(...)` or of `.model`, brings both.
        heads: File with the heads; None = those that `weights` holds, else those of the lpips package.
        model: Your own network instead, `model(images, references)` on [-1, 1] giving B distances, such as
            `lpips.LPIPS(...)`. It is frozen and put into eval mode.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU (a `model` given stays where it is).
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: an unknown `net`, or `model` together with `weights` or `heads`.

    Example:
        >>> LPIPSReward("alex").bounds  # nothing is loaded yet
        (None, 0.0)

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
        https://arxiv.org/abs/1801.03924
    """

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        *,
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        model: nn.Module | None = None,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if net not in BACKBONES:
            raise ValueError(f"LPIPSReward expected `net` to be one of {', '.join(BACKBONES)}, got {net!r}.")
        self.name = name_with(self, "lpips" if net == "alex" else f"lpips_{net}", weights=weights, heads=heads)
        self.differentiable, self.batch_size = differentiable, batch_size
        self.min_side, self.bytes_per_pixel = BACKBONES[net].min_side, _BYTES_PER_PIXEL[net][differentiable]
        self._load_later(partial(_lpips, net, weights, heads), weights or heads, model, device)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Minus the distance of each pair."""
        return self._score(2 * images - 1, 2 * references - 1)


@final
class STLPIPSReward(_FeatureDistance):
    """Minus the ST-LPIPS distance to the reference: LPIPS that shifts of a pixel hardly change; 0 for identical images.

    Backbone and heads were trained for it, with blurs before the subsampling; same figures as the authors' package,
    whose weights are used.

    Args:
        net: Backbone, `"alex"` or `"vgg"`.
        weights: File with the authors' weights, such as `alex_shift_tolerant.pth`, or a folder or hub id with that
            file; None = that of the installed package stlpips_pytorch.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: an unknown `net`.

    Example:
        >>> STLPIPSReward().bounds  # nothing is loaded yet
        (None, 0.0)

    References:
        Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", 2022, https://arxiv.org/abs/2207.13686
    """

    def __init__(
        self,
        net: Literal["alex", "vgg"] = "alex",
        *,
        weights: str | Path | None = None,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if net not in _SHIFT_TOLERANT:
            raise ValueError(f"STLPIPSReward expected `net` to be one of {', '.join(_SHIFT_TOLERANT)}, got {net!r}.")
        name = "stlpips" if net == "alex" else f"stlpips_{net}"
        self.name = name_with(self, name, weights=weights)
        self.differentiable, self.batch_size = differentiable, batch_size
        self.min_side, self.bytes_per_pixel = _SHIFT_TOLERANT[net].min_side, _BYTES_PER_PIXEL[name][differentiable]
        self._load_later(partial(_stlpips, net, weights), weights, None, device)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Minus the distance of each pair."""
        return self._score(2 * images - 1, 2 * references - 1)


@final
class DISTSReward(_FeatureDistance):
    """Minus the DISTS distance to the reference: 0 for identical images; forgives resampled texture.

    Same figures as the DISTS-pytorch package (its weights are used), with covariances that keep their digits.

    Args:
        weights: File with torchvision's ImageNet weights of VGG-16, or a folder or hub id with that file; None = from
            torch's cache, or downloaded. A file that holds alpha and beta too, such as the state dict of
            `DISTS_pytorch.DISTS()` or of `.model`, brings both.
        heads: File with alpha and beta; None = those that `weights` holds, else those of the DISTS-pytorch package.
        model: Your own network instead, `model(images, references)` on [0, 1] giving B distances. It is frozen and put
            into eval mode. DISTS-pytorch's own class passes gradients only if called with `require_grad=True`.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU (a `model` given stays where it is).
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: `model` together with `weights` or `heads`.

    Example:
        >>> DISTSReward().bounds  # nothing is loaded yet
        (None, 0.0)

    References:
        Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", 2020,
        https://arxiv.org/abs/2004.07728
    """

    min_side = BACKBONES["vgg"].min_side

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        model: nn.Module | None = None,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.name = name_with(self, "dists", weights=weights, heads=heads)
        self.differentiable, self.batch_size = differentiable, batch_size
        self.bytes_per_pixel = _BYTES_PER_PIXEL["dists"][differentiable]
        self._load_later(partial(_dists, weights, heads), weights or heads, model, device)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Minus the distance of each pair."""
        return self._score(images, references)


class _Metric(NamedTuple):
    function: str  # in piq
    higher_is_better: bool
    min_side: int
    double: bool = False  # in float64, each image on its own


# min_side: SR-SIM, DSS and IW-SSIM raise or divide by zero below; the others stay defined down to a pixel, but their
# smallest filters (wavelength 6, Prewitt and Scharr kernels after a down-scaling) then see hardly anything but border.
_METRICS = {
    "fsim": _Metric("fsim", True, 8),
    "vsi": _Metric("vsi", True, 8),
    "mdsi": _Metric("mdsi", False, 8),
    # piq normalises SR-SIM's saliency by the extremes of the whole batch, so a score would depend on its neighbours (by
    # 0.3 on nearly flat images). In float32 all three lose digits on nearly flat or striped images: up to 0.02 in
    # IW-SSIM (which inverts a covariance), 0.02 in SR-SIM, 3e-4 in DSS, and other ones in another batch. The metrics
    # above agree with float64 within 1e-6 there.
    "srsim": _Metric("srsim", True, 40, double=True),
    "dss": _Metric("dss", True, 32, double=True),
    "iwssim": _Metric("information_weighted_ssim", True, 161, double=True),
}


@final
class PIQReward(ImageReward):
    """Closeness to the reference by a metric of the piq package: fsim, vsi, mdsi, srsim, dss or iwssim.

    An image that equals its reference has exactly the best score. Otherwise scores are NaN where the reference is one
    flat colour, because these metrics compare structure and would call a black and a white image the same, and where
    the metric has no value, as for IW-SSIM on stripes and nearly empty images. Scores carry no gradient: piq's is
    non-finite on many ordinary photographs (FSIM 16 of 30, VSI 18 of 30).

    Args:
        metric: `"fsim"`, `"vsi"`, `"srsim"`, `"dss"`, `"iwssim"`: similarity, 1 = identical; `"mdsi"`: minus the
            deviation, 0 = identical.
        differentiable: only False.
        batch_size: images per call of piq; None = as many as fit the budget of memory. SR-SIM, DSS and IW-SSIM are
            always computed one image at a time, in float64.

    Raises:
        ValueError: an unknown metric, or `differentiable=True`.
        ImportError: piq is not installed.

    Example:
        >>> import torch
        >>> reward = PIQReward("vsi")
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1., 1.])

    References:
        Zhang et al., "FSIM: A Feature Similarity Index for Image Quality Assessment", 2011,
        https://doi.org/10.1109/TIP.2011.2109730
        Zhang et al., "VSI: A Visual Saliency-Induced Index for Perceptual Image Quality Assessment", 2014,
        https://doi.org/10.1109/TIP.2014.2346028
        Nafchi et al., "Mean Deviation Similarity Index", 2016, https://arxiv.org/abs/1608.07433
        Zhang and Li, "SR-SIM: A fast and high performance IQA index based on spectral residual", 2012,
        https://doi.org/10.1109/ICIP.2012.6467149
        Balanov et al., "Image quality assessment based on DCT subband similarity", 2015,
        https://doi.org/10.1109/ICIP.2015.7351172
        Wang and Li, "Information Content Weighting for Perceptual Image Quality Assessment", 2011,
        https://doi.org/10.1109/TIP.2010.2092435
    """

    needs_references = True
    bytes_per_pixel = 256  # FSIM's working memory; the others take less, or one image at a time

    def __init__(self, metric: str, *, differentiable: bool = False, batch_size: int | None = None) -> None:
        if metric not in _METRICS:
            raise ValueError(f"PIQReward expected `metric` to be one of {', '.join(_METRICS)}, got {metric!r}.")
        if differentiable:
            raise ValueError(
                f"PIQReward({metric!r}) expected differentiable=False, got True: piq's gradient has NaN on ordinary "
                "images. Differentiable alternatives: ssim, ms_ssim, gmsd, haarpsi, LPIPSReward, DISTSReward."
            )
        require("piq", extra="perceptual", purpose=f"PIQReward({metric!r})")
        self.name, self.min_side = metric, _METRICS[metric].min_side
        self.batch_size = 1 if _METRICS[metric].double else batch_size
        self.bounds: Bounds = (0.0, 1.0) if _METRICS[metric].higher_is_better else (None, 0.0)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Piq's value of each pair, higher is better."""
        metric = _METRICS[self.name]
        pair = (images.double(), references.double()) if metric.double else (images, references)
        with plain_defaults(f"PIQReward({self.name!r})"):
            piq = require("piq", extra="perceptual", purpose=f"PIQReward({self.name!r})")
            try:
                values = getattr(piq, metric.function)(*pair, data_range=1.0, reduction="none")
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                # IW-SSIM, one image at a time, inverts a covariance that is singular for one with too little content
                values = images.new_full((1,), torch.nan)
        # similarities overshoot 1 by a rounding error
        scores = values.clamp(0, 1) if metric.higher_is_better else torch.neg(values.clamp(min=0))
        flat = (references.amax((2, 3)) == references.amin((2, 3))).all(1)
        identical = (images == references).flatten(1).all(1)
        best = 1.0 if metric.higher_is_better else 0.0
        return torch.where(identical, best, torch.where(flat, torch.nan, scores))


class _FeatureTrunk(nn.Module):
    """The layers of a backbone up to the last compared one, `features` on the meta device."""

    def __init__(
        self,
        backbone: _Backbone,
        features: nn.Sequential,
        weights: WeightFile,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.taps, self.features = backbone.taps, features
        try:
            found = _taken(weights, {key: value.shape for key, value in self.named_parameters()})
        except ValueError as error:
            raise ValueError(f"expected weights of {backbone.function}: {error}") from error
        self.load_state_dict({key: value.float() for key, value in found.items()}, strict=False, assign=True)
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32, device="cpu").view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32, device="cpu").view(1, 3, 1, 1))

    def pairs(self, images: Tensor, references: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both batches as they are, and their activations in the compared layers, shallow to deep.

        Layer by layer for both, so that a pair of activations can be dropped before the next one is computed: all of
        them together are ten times what the images take.
        """
        yield images, references
        images, references = (images - self.mean) / self.std, (references - self.mean) / self.std
        for index, layer in enumerate(self.features):
            images = layer(images)
            references = layer(references)
            if index in self.taps:
                yield images, references


@final
class _LPIPS(nn.Module):
    """Squared differences of unit-length feature vectors, weighted per channel by learned heads."""

    def __init__(self, backbone: _Backbone, features: nn.Sequential, weights: WeightFile, heads: WeightFile) -> None:
        super().__init__()
        mean, std = [2 * mean - 1 for mean in _IMAGENET_MEAN], [2 * std for std in _IMAGENET_STD]  # pixels in [-1, 1]
        self.trunk = _FeatureTrunk(backbone, features, weights, mean, std)
        shapes = {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(backbone.widths)}
        self.heads = nn.ParameterList(head.float() for head in _taken(heads, shapes).values())

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances `[B]` >= 0 of pairs `[B, 3, H, W]` in [-1, 1]; 0 = identical."""
        pairs = self.trunk.pairs(images, references)
        next(pairs)  # the images themselves are not compared
        layers = [_difference(*next(pairs), head) for head in self.heads]
        return torch.stack(layers).sum(0)


@final
class _DISTS(nn.Module):
    """One minus the similarity of the means (texture) and covariances (structure) of VGG-16 features."""

    def __init__(self, backbone: WeightFile, weights: WeightFile) -> None:
        super().__init__()
        layers = [_HanningPool() if isinstance(layer, nn.MaxPool2d) else layer for layer in _layers("vgg")]
        self.trunk = _FeatureTrunk(BACKBONES["vgg"], nn.Sequential(*layers), backbone, _IMAGENET_MEAN, _IMAGENET_STD)
        channels = (1, 3 + sum(BACKBONES["vgg"].widths), 1, 1)  # of the image itself and of the compared layers
        learned = weights.take({"alpha": channels, "beta": channels})
        total = learned["alpha"].sum() + learned["beta"].sum()
        if not total > 0:  # the weights are divided by it
            raise ValueError(f"{weights.path} expected `alpha` and `beta` with a positive sum, got {total.item()}.")
        self.alpha = nn.Buffer(learned["alpha"].float() / total)
        self.beta = nn.Buffer(learned["beta"].float() / total)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances `[B]` of pairs `[B, 3, H, W]` in [0, 1]; 0 = identical."""
        texture, structure = zip(*starmap(_similarities, self.trunk.pairs(images, references)), strict=True)
        similarity = self.alpha * torch.cat(texture, 1) + self.beta * torch.cat(structure, 1)
        return 1 - similarity.sum((1, 2, 3))


@final
class _HanningPool(nn.Module):
    """L2 pooling of stride 2 with a 3 x 3 Hanning window: DISTS's max pooling without aliasing."""

    def __init__(self) -> None:
        super().__init__()
        self.window = _hanning_window()

    def forward(self, features: Tensor) -> Tensor:
        kernel = self.window.expand(features.shape[1], 1, 3, 3)
        power = nn.functional.conv2d(features.square(), kernel, stride=2, padding=1, groups=features.shape[1])
        return (power + 1e-12).sqrt()  # inside the root, for a finite gradient at 0


@final
class _BlurredSubsampling(nn.Module):
    """Every second position after a blur by a 3 x 3 Hanning window; borders are continued by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.window = _hanning_window()

    def forward(self, features: Tensor) -> Tensor:
        kernel = self.window.expand(features.shape[1], 1, 3, 3)
        padded = nn.functional.pad(features, (2, 2, 2, 2), mode="reflect")
        return nn.functional.conv2d(padded, kernel, stride=2, groups=features.shape[1])


def _hanning_window() -> nn.Buffer:
    row = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float32, device="cpu")
    return nn.Buffer(torch.outer(row, row))


def _layers(net: str) -> nn.Sequential:
    """The layers of a backbone, without memory: weights are assigned; a random start costs time and random numbers."""
    models = require("torchvision.models", extra="perceptual", purpose=f"the {net} backbone")
    with torch.device("meta"):
        return getattr(models, BACKBONES[net].function)(weights=None).features[: BACKBONES[net].taps[-1] + 1]


def _shift_tolerant_layers(net: str) -> nn.Sequential:
    """A backbone whose poolings, and first convolution, keep every position until a blur has followed."""
    layers = list[nn.Module]()
    for layer in _layers(net):
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            layer.stride = 1
            layers.append(_BlurredSubsampling())
        elif isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):  # AlexNet's first one, of stride 4
            layer.stride = (1, 1)
            layers.append(_BlurredSubsampling())
    return nn.Sequential(*layers)


def _taken(file: WeightFile, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors of a file by torchvision's and lpips's names, whichever of the names that are around it uses."""
    names = {_HEAD.sub(r"lin\1.model.1.weight", _PREFIX.sub("features.", key)): key for key in sorted(file.keys())}
    found = file.take({names.get(key, key): shape for key, shape in shapes.items()})
    return dict(zip(shapes, found.values(), strict=True))


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


def _moved(model: nn.Module, device: torch.device | None) -> nn.Module:
    return model.to(device=device, dtype=torch.float32)


def _lpips(net: str, weights: str | Path | None, heads: str | Path | None, device: torch.device) -> nn.Module:
    backbone = _backbone_weights(net, weights, purpose="LPIPSReward")
    if heads is not None:
        learned = weight_file(heads)
    elif {"lin0.model.1.weight", "heads.0"} & backbone.keys():
        learned = backbone
    else:
        learned = packaged_weights("lpips", f"weights/v0.1/{net}.pth", purpose="LPIPSReward")
    return _LPIPS(BACKBONES[net], _layers(net), backbone, learned).to(device)


def _stlpips(net: str, weights: str | Path | None, device: torch.device) -> nn.Module:
    name = f"weights/vST0.0/{net}_shift_tolerant.pth"
    file = (
        packaged_weights("stlpips_pytorch", name, purpose="STLPIPSReward") if weights is None else weight_file(weights)
    )
    return _LPIPS(_SHIFT_TOLERANT[net], _shift_tolerant_layers(net), file, file).to(device)


def _dists(weights: str | Path | None, heads: str | Path | None, device: torch.device) -> nn.Module:
    backbone = _backbone_weights("vgg", weights, purpose="DISTSReward")
    if heads is not None:
        learned = weight_file(heads)
    elif {"alpha"} & backbone.keys():
        learned = backbone
    else:
        learned = packaged_weights("DISTS_pytorch", "weights.pt", purpose="DISTSReward")
    return _DISTS(backbone, learned).to(device)


def cached_file(net: str) -> Path:
    """Where torch keeps a backbone's weights once they are downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].url.rsplit("/", 1)[-1]


def _backbone_weights(net: str, path: str | Path | None, *, purpose: str) -> WeightFile:
    """ImageNet weights that the user names, or torchvision's own: from torch's cache, or downloaded into it."""
    if path is not None:
        return weight_file(path)
    url, file = BACKBONES[net].url, cached_file(net)
    try:
        if not file.is_file():
            torch.hub.load_state_dict_from_url(
                url, progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except (OSError, RuntimeError) as error:  # the latter where the file does not have the published hash
        raise OSError(
            f"{purpose} needs the ImageNet weights of {BACKBONES[net].function}, which are not in torch's cache and "
            f"could not be downloaded. Download {url} elsewhere and put it at {file}, or pass "
            f"weights='<path of the file>'. The reason: {error}"
        ) from error
    return WeightFile(file)


def packaged_weights(package: str, file: str, *, purpose: str) -> WeightFile:
    """The tensors of a file that an installed package brings, without importing the package.

    Older builds of DISTS-pytorch put the file into `sys.prefix`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        require(package, extra="perceptual", purpose=purpose)  # raises the error that names the extra
        raise ImportError(f"{purpose} needs the folder of `{package}`, which is installed without one.")
    paths = [folder / file for folder in (*map(Path, spec.submodule_search_locations), Path(sys.prefix))]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{purpose} expected one of {', '.join(map(str, paths))}. Reinstall {package}.")
    return WeightFile(found)
