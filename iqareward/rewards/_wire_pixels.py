"""Pixels in as few bytes as hold them exactly."""

import torch
from torch import Tensor

VALUES_IN_CACHE = 2**16  # of a tensor that are worked on at a time; the client shares its cores with a trainer


def packed(images: Tensor) -> Tensor:
    """The smallest of uint8, float16 and float32 that holds the same float32 values, on the CPU."""
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(
            f"encode_request expected uint8 or floating-point images, got {images.dtype}. "
            "Convert with iqareward.to_images(...)."
        )
    images = images.detach().cpu().contiguous()
    if images.dtype not in (torch.uint8, torch.float16):
        images = images.float()
        levels = _levels(images)
        images = images if levels is None else levels
    return images


def _levels(images: Tensor) -> Tensor | None:
    """The v of float images that are exactly v / 255, as uint8; None as soon as one value is something else."""
    levels = torch.empty(images.shape, dtype=torch.uint8)
    for values, found in zip(
        images.view(-1).split(VALUES_IN_CACHE), levels.view(-1).split(VALUES_IN_CACHE), strict=True
    ):
        found.copy_((values * 255).round_().clamp_(0, 255))  # NaN becomes some level, and differs below
        # compared as bits: -0.0 == 0.0, and a wire that loses a sign is not lossless
        if not torch.equal(found.float().div_(255).view(torch.int32), values.view(torch.int32)):
            return None
    return levels
