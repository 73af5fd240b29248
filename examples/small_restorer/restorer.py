"""The small restorer: residual shifting on pixels, from the damaged photograph to the restored one in three steps."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.small_restorer.network import SmallUNet
from iqareward.diffusion import Noise, PixelPolicy, ResShift
from iqareward.diffusion.conditions import Condition

WEIGHTS = Path(__file__).with_name("weights")
LEVELS, STEPS = 4, 3  # noise levels in training, and steps of the sampler, which leaves out the lowest level
KAPPA = 0.1  # noise at the start, for pixels in [-1, 1]
ERROR = 0.1  # typical error of a damaged photograph, for pixels in [-1, 1]


@dataclass(frozen=True, eq=False)
class OftenNoisy(ResShift):
    """Residual shifting that learns from its noisier levels more often: there the restoration is decided."""

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Of 4 levels, from the lowest: 1/16, 3/16, 5/16, 7/16 of the times."""
        return super().draw_times(uniforms.sqrt())


class SmallRestorer(PixelPolicy):
    """A `PixelPolicy` whose network predicts the change to the best linear guess from the noisy and damaged images.

    The guess is `damaged + c * (latents - damaged)` with the c of least squares, if the error of a damaged image has
    the standard deviation `ERROR`. So the network begins with that guess instead of having to learn to pass on what the
    latents already hold.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
        https://arxiv.org/abs/2206.00364 (preconditioning)
    """

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The clean image that the network sees in the latents."""
        signal, noise = self.process.coefficients(self.process.levels(times).to(latents))
        share = signal * ERROR**2 / ((signal * ERROR) ** 2 + noise**2)
        degraded = condition["latents"].to(latents)
        change = super().predict(latents, times, condition).float()
        return change + degraded + share[:, None, None, None] * (latents - degraded)

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The mean absolute error; the squared one would nearly be that of the strongest noise alone."""
        latents, times, clean = self.noised(self.encode(references, condition), condition, noise)
        return (self.predict(latents, times, condition).float() - clean).abs().flatten(1).mean(1)


def build(*, seed: int = 0) -> PixelPolicy:
    """The restorer with random weights; at first it leaves every photograph as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet()
    process = OftenNoisy(steps=LEVELS, kappa=KAPPA, min_noise_level=KAPPA)
    return SmallRestorer(network, process, num_steps=STEPS, eta=1.0)


def load(name: str = "converged") -> PixelPolicy:
    """The trained restorer: "converged", or "early", which stopped after a twentieth of the updates."""
    policy, weights = build(), load_file(WEIGHTS / f"{name}.safetensors")
    policy.model.load_state_dict({key: value.float() for key, value in weights.items()})
    return policy
