"""Which inputs an update trains on: a new random order every epoch, from the seed and the update's number alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iqareward.diffusion.data.pairs import Pairs
from iqareward.diffusion.finite import usable_rows
from iqareward.diffusion.noise import generator


@dataclass(frozen=True)
class InputOrder:
    """The ids of each update, all inputs once per epoch; those that fill no whole batch wait for another epoch.

    Args:
        num_inputs: ids are integers in [0, num_inputs).
        batch_size: inputs per update, over all processes.
        seed: of the order.

    Raises:
        ValueError: there are fewer inputs than one batch takes.

    Example:
        >>> order = InputOrder(num_inputs=4, batch_size=2, seed=0)
        >>> sorted(order.ids(0) + order.ids(1))
        [0, 1, 2, 3]
    """

    num_inputs: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_inputs:
            raise ValueError(
                f"InputOrder expected 1 <= batch_size <= number of inputs, got {self.batch_size} and "
                f"{self.num_inputs}. Use fewer inputs per update or more images."
            )

    def ids(self, update: int, *, rank: int = 0, world: int = 1) -> list[int]:
        """The inputs of update number `update`; the share of process `rank` of `world`."""
        per_epoch = self.num_inputs // self.batch_size
        epoch, batch = divmod(update, per_epoch)
        order = torch.randperm(self.num_inputs, generator=generator(self.seed, epoch)).tolist()
        start = batch * self.batch_size
        first, last = (self.batch_size * place // world for place in (rank, rank + 1))
        return order[start + first : start + last]


def read_batch(pairs: Pairs, ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Read pairs; one with a pixel that is not finite becomes grey, so that it cannot spoil the others of its batch.

    Args:
        pairs: where to read.
        ids: B inputs.
        device: where the tensors go; they are looked at on the device that they come from.

    Returns:
        Degraded images and references `[B, 3, H, W]`, and `[B]` bool, False for those that became grey: give them no
        weight in the loss.
    """
    images = pairs.batch(ids)
    usable = usable_rows(*images)
    degraded, references = (torch.where(usable.view(-1, 1, 1, 1), rows, 0.5).to(device) for rows in images)
    return degraded, references, usable.to(device)
