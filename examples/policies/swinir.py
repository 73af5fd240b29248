"""A published checkpoint of SwinIR, HAT, SCUNet, RealESRGAN or any other network that spandrel recognises."""

from iqareward.diffusion import FeedForwardPolicy


def build(checkpoint: str) -> FeedForwardPolicy:
    """The policy of a checkpoint, all of whose weights train."""
    return FeedForwardPolicy.from_checkpoint(checkpoint)
