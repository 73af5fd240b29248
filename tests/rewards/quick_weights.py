"""A file of seeded weights for `QuickReward`."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from iqareward.rewards.quick import QuickNetwork


def quick_weights(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = QuickNetwork()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    save_file(network.state_dict(), folder / "quick.safetensors")
    return folder / "quick.safetensors"
