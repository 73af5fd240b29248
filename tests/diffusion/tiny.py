"""The smallest models that have every part of the real ones, with seeded random weights."""

import diffusers
import torch
from torch import nn

from iqareward.diffusion import DDIM, Autoencoder, PixelPolicy

SIZE = 16


def seeded(build, seed=0) -> nn.Module:
    """The module that `build` makes, with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def unet(channels=8) -> nn.Module:
    """A conditional pixel UNet."""
    return seeded(
        lambda: diffusers.UNet2DModel(
            SIZE,
            6,
            3,
            block_out_channels=(channels, channels),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    )


def pixel_policy(prediction_type="epsilon") -> PixelPolicy:
    """A pixel policy of the given prediction type."""
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False)
    return PixelPolicy(unet(), DDIM(scheduler))


def autoencoder() -> Autoencoder:
    """An autoencoder with factor 2 and 4 latent channels."""
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return Autoencoder(seeded(lambda: diffusers.AutoencoderKL(**blocks, **options), seed=1))


def policy_of(kind: str):
    """A policy by name: "pixel", or a file of `examples/policies` with tiny networks."""
    if kind == "pixel":
        return pixel_policy()
    from tests.diffusion.policies import kinds

    return kinds.policy_of(kind)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
