"""The small restorer: four steps of residual shifting on pixels, from the damaged photograph to the restored one."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.small_restorer.network import SmallUNet
from iqareward.diffusion import PixelPolicy, ResShift

WEIGHTS = Path(__file__).with_name("weights")
STEPS, KAPPA = 4, 0.2  # KAPPA: noise at the start, for pixels in [-1, 1]


def build(*, seed: int = 0) -> PixelPolicy:
    """The restorer with random weights; at first it leaves every photograph as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet()
    process = ResShift(steps=STEPS, kappa=KAPPA, min_noise_level=KAPPA)
    return PixelPolicy(network, process, residual=True, num_steps=STEPS, eta=1.0)


def load(name: str = "converged") -> PixelPolicy:
    """The trained restorer: "converged", or "early", which stopped after a twentieth of the updates."""
    policy = build()
    policy.model.load_state_dict(
        {key: value.float() for key, value in load_file(WEIGHTS / f"{name}.safetensors").items()}
    )
    return policy
