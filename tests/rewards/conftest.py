"""Weights that several test files share."""

from pathlib import Path

import pytest
import torch

from iqareward.rewards.perceptual import BACKBONES


@pytest.fixture(scope="session")
def backbone_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weight files of the three backbones, seeded."""
    models = pytest.importorskip("torchvision.models")
    rng, folder, files = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("weights"), {}
    for net, backbone in BACKBONES.items():
        with torch.device("meta"):
            features = getattr(models, backbone.function)(weights=None).features
        weights = {}
        for key, shape in ((f"features.{key}", value.shape) for key, value in features.state_dict().items()):
            scale = (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.05  # keeps the size of activations
            weights[key] = scale * torch.randn(shape, generator=rng)
        files[net] = folder / f"{net}.pth"
        torch.save(weights, files[net])
    return files
