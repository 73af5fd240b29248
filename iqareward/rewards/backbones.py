"""ImageNet backbones as feature extractors, and where their weights come from."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from iqareward.optional import require
from iqareward.weight_files import WeightFile


class Backbone(NamedTuple):
    """A torchvision classifier and the layers whose activations are compared.

    Attributes:
        function: in `torchvision.models`.
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
    "alex": Backbone("alexnet", f"{_SITE}/alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "vgg": Backbone("vgg16", f"{_SITE}/vgg16-397923af.pth", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "squeeze": Backbone(
        "squeezenet1_1",
        f"{_SITE}/squeezenet1_1-b8a52dc0.pth",
        (1, 4, 7, 9, 10, 11, 12),
        (64, 128, 256, 384, 384, 512, 512),
        17,
    ),
}


@final
class FeatureTrunk(nn.Module):
    """A backbone up to its last compared layer.

    Args:
        net: a key of `BACKBONES`.
        weights: torchvision's state dict of the network, of which the `features.*` are used.

    Raises:
        ValueError: the weights are of another network, or damaged.
    """

    def __init__(self, net: str, weights: WeightFile) -> None:
        super().__init__()
        self.taps = BACKBONES[net].taps
        models = require("torchvision.models", extra="perceptual", purpose=f"the {net} backbone")
        with torch.device("meta"):  # weights are assigned below; a random start costs seconds and random numbers
            self.features = getattr(models, BACKBONES[net].function)(weights=None).features[: self.taps[-1] + 1]
        try:
            found = weights.take({key: value.shape for key, value in self.state_dict().items()})
        except ValueError as error:
            raise ValueError(f"expected torchvision's weights of {BACKBONES[net].function}: {error}") from error
        self.load_state_dict({key: value.float() for key, value in found.items()}, assign=True)

    def pairs(self, images: Tensor, references: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Activations of the compared layers, shallow to deep, of two batches normalised for ImageNet.

        Layer by layer for both, so that a pair of activations can be dropped before the next one is computed: all of
        them together are ten times what the images take.
        """
        for index, layer in enumerate(self.features):
            images = layer(images)
            references = layer(references)
            if index in self.taps:
                yield images, references


def cached_file(net: str) -> Path:
    """Where torch keeps a backbone's weights once they are downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].url.rsplit("/", 1)[-1]


def backbone_weights(net: str, path: str | Path | None, *, purpose: str) -> WeightFile:
    """Torchvision's ImageNet weights: from a file, or from torch's cache, or downloaded into it.

    Args:
        net: a key of `BACKBONES`.
        path: of a `.pth` or `.safetensors` file; None = torchvision's own.
        purpose: who needs them, for the error message.

    Raises:
        OSError: they are not here and cannot be downloaded; says where to put which file.
        ValueError: the file is damaged or holds anything but tensors.
    """
    if path is not None:
        return WeightFile(path)
    url, file = BACKBONES[net].url, cached_file(net)
    try:
        if not file.is_file():
            torch.hub.load_state_dict_from_url(
                url, progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except (OSError, RuntimeError) as error:  # the latter where the file does not have the published hash
        raise OSError(
            f"{purpose} needs the ImageNet weights of {BACKBONES[net].function}, which are not in torch's cache and "
            f"could not be downloaded ({error}). Download {url} elsewhere and put it at {file}, or pass "
            "weights='<path of the file>'."
        ) from error
    return WeightFile(file)


def packaged_weights(package: str, *files: str, purpose: str) -> WeightFile:
    """The tensors of the first of `files` that an installed package brings, without importing it.

    Args:
        package: import name.
        files: paths inside the package's folder; what older builds installed into `sys.prefix` is found as well.
        purpose: who needs them, for the error message.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        require(package, extra="perceptual", purpose=purpose)  # raises the error that names the extra
        raise ImportError(f"{purpose} needs the folder of `{package}`, which is installed without one.")
    folders = [*map(Path, spec.submodule_search_locations), Path(sys.prefix)]
    paths = [folder / file for folder in folders for file in files]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{purpose} expected one of {', '.join(map(str, paths))}. Reinstall {package}.")
    return WeightFile(found)
