"""The smallest models that have every part of the real ones, with seeded random weights."""

from dataclasses import dataclass, field
from functools import cache

import diffusers
import torch
from torch import nn

from iqareward.diffusion import (
    DDIM,
    Autoencoder,
    ControlNetPolicy,
    Degradation,
    FixedPrompt,
    FlowCPS,
    FlowPolicy,
    FlowSDE,
    PixelPolicy,
    SyntheticPairs,
)
from iqareward.diffusion.pairs import PairSet

SIZE = 16
KINDS = ("pixel", "controlnet", "flow", "flow-cps")
ETA = {"pixel": 1.0, "controlnet": 0.5, "flow": 0.7, "flow-cps": 0.5}


def seeded(build, seed=0) -> nn.Module:
    """The module that `build` makes, with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def unet(channels=8, levels=1) -> nn.Module:
    """A conditional pixel UNet."""
    return seeded(
        lambda: diffusers.UNet2DModel(
            SIZE,
            6,
            3,
            block_out_channels=(channels,) * levels,
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
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


def controlnet_policy() -> ControlNetPolicy:
    """A latent UNet with a ControlNet whose zero layers are no longer zero, as after training."""
    shared = {"block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
    attention = {"attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    network = seeded(lambda: diffusers.UNet2DConditionModel(8, 4, 4, **shared, **attention, **up))
    embedding = {"conditioning_embedding_out_channels": (4, 8)}
    control = seeded(lambda: diffusers.ControlNetModel(4, **shared, **attention, **embedding), seed=2)
    with torch.no_grad():
        for weight in control.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    prompts = FixedPrompt({"prompt": torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(4))})
    process = DDIM.from_scheduler(
        diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False)
    )
    return ControlNetPolicy(control, network, autoencoder(), process, prompts)


def flow_policy(process=FlowSDE) -> FlowPolicy:
    """A two-layer SD3 transformer that sees the degraded latents."""
    sizes = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8}
    more = {"caption_projection_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 16}
    build = lambda: diffusers.SD3Transformer2DModel(  # noqa: E731
        sample_size=8, patch_size=2, in_channels=8, out_channels=4, **sizes, **more
    )
    generator = torch.Generator().manual_seed(5)
    prompt, pooled = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 8, generator=generator)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    prompts = FixedPrompt({"prompt": prompt, "pooled": pooled})
    return FlowPolicy(seeded(build), autoencoder(), process(scheduler), prompts)


def policy_of(kind: str):
    """A policy by name, also of a file of `examples/policies`."""
    builders = {
        "pixel": pixel_policy,
        "controlnet": controlnet_policy,
        "flow": flow_policy,
        "flow-cps": lambda: flow_policy(FlowCPS),
    }
    if kind in builders:
        return builders[kind]()
    from tests.diffusion.policies import kinds

    return kinds.policy_of(kind)


@dataclass(frozen=True)
class TinyPairs(PairSet):
    """Pairs of `SyntheticPairs`, drawn once in a process: drawing them anew would be a fifth of a tiny run."""

    num_inputs: int
    degradation: Degradation = field(default_factory=Degradation)
    seed: int = 0

    def __len__(self) -> int:
        return self.num_inputs

    def _items(self, ids):
        items = drawn(self)
        return [dict(items[index]) for index in ids]


@cache
def drawn(pairs: TinyPairs):
    """All items of the pairs."""
    return SyntheticPairs(pairs.num_inputs, SIZE, pairs.degradation, pairs.seed).__getitems__(range(len(pairs)))


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
