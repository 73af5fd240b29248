"""What `latency` times: every reward that can be built without a download, beside what a user would call instead."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._classical_peers import PEERS, Peer, function, rgb
from iqareward import load
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.perceptual import BACKBONES, DISTSReward, LPIPSReward

Score = Callable[[Tensor, Tensor], object]


class Subject(NamedTuple):
    """A reward and its peers, all called as `score(images, references)`; `make` is called once, in a quiet moment.

    Attributes:
        name: of the reward.
        make: builds the call.
        peers: other libraries' calls that compute the same.
        batches: sizes of batches that are worth their time.
        sizes: sides of the square images.
    """

    name: str
    make: Callable[[], Score]
    peers: dict[str, Callable[[], Score]]
    batches: tuple[int, ...] = (1, 8, 32)
    sizes: tuple[int, ...] = (256, 512)


def subjects(folder: Path) -> list[Subject]:
    """All of them; seeded backbones are written to `folder`, because speed does not depend on weights."""
    native = [name for name, entry in CATALOG.items() if not entry.weights and not entry.extra]
    classical = [Subject(name, _reward(name), _same(PEERS.get(name, []))) for name in native]
    piq = [
        Subject(name, _reward(name), {"piq": _any(function(f"piq.{raw}", rgb, reduction="none"))}, batches=(1, 8))
        for name, raw in _PIQ.items()
    ]
    return [*classical, *piq, *_feature_distances(folder), *_multimodal()]


_PIQ = {
    "fsim": "fsim",
    "vsi": "vsi",
    "mdsi": "mdsi",
    "srsim": "srsim",
    "dss": "dss",
    "iwssim": "information_weighted_ssim",
}


def _reward(name: str) -> Callable[[], Score]:
    def make() -> Score:
        reward = load(name)
        return lambda images, references: reward(images, references=references)

    return make


def _same(peers: list[Peer]) -> dict[str, Callable[[], Score]]:
    return {peer.library: _any(peer.make) for peer in peers if peer.same}


def _any(make: Callable[[], Callable[..., Any]]) -> Callable[[], Score]:
    """A peer's call, whether it takes references or not."""

    def build() -> Score:
        metric = make()

        def score(images: Tensor, references: Tensor) -> object:
            try:
                return metric(images, references)
            except TypeError:
                return metric(images)

        return score

    return build


def _seeded_backbone(net: str, folder: Path) -> Path:
    import torchvision

    file = folder / f"{net}.pth"
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = getattr(torchvision.models, BACKBONES[net].function)(weights=None).features.state_dict()
        torch.save({f"features.{name}": value for name, value in weights.items()}, file)
    return file


def _feature_distances(folder: Path) -> list[Subject]:
    def ours(reward: Any) -> Score:
        return lambda images, references: reward(images, references=references)

    def package(net: str) -> Score:
        import lpips

        with warnings.catch_warnings():  # lpips names torchvision's weights as in 2021
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        return lambda images, references: network(images, references, normalize=True)

    found = []
    for net in ("alex", "vgg"):
        name = "lpips" if net == "alex" else f"lpips_{net}"
        weights = _seeded_backbone(net, folder)
        make = lambda net=net, weights=weights: ours(LPIPSReward(net, weights=weights))  # noqa: E731
        found.append(Subject(name, make, {"lpips": lambda net=net: package(net)}, batches=(1, 8), sizes=(256,)))
    vgg = _seeded_backbone("vgg", folder)
    # DISTS_pytorch downloads its backbone when it is built, so there is nothing to compare with offline.
    found.append(Subject("dists", lambda: ours(DISTSReward(weights=vgg)), {}, batches=(1, 8), sizes=(256,)))
    return found


def _multimodal() -> list[Subject]:
    """Q-Align at a quarter of its width and depth, beside the authors' protocol on the same network."""
    from benchmarks._qalign_reference import reference_scores
    from benchmarks.bench_qalign import MEDIUM, random_model
    from iqareward import QAlignReward

    def ours() -> Score:
        reward = QAlignReward(random_model(MEDIUM, torch.get_default_device(), torch.float32))
        return lambda images, references: reward(images)

    def reference() -> Score:
        model = random_model(MEDIUM, torch.get_default_device(), torch.float32)

        def score(images: Tensor, references: Tensor) -> object:
            levels = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
            return reference_scores(model, [Image.fromarray(picture) for picture in levels])

        return score

    return [Subject("qalign (1/4)", ours, {"authors' protocol": reference}, batches=(1, 8), sizes=(512,))]
