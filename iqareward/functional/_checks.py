"""Shape and dtype checks shared by every metric: they never read a pixel, so they never wait for a device."""

import torch
from torch import Tensor


def check_images(metric: str, images: Tensor, *, min_side: int = 1, argument: str = "images") -> Tensor:
    """Return `images` in the dtype that the metric computes in (float32, or float64 if given), or say what is wrong."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{metric} expected `{argument}` as a torch.Tensor [B, 3, H, W], got {type(images).__name__}. "
            "Convert with iqareward.to_images(...)."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{metric} expected `{argument}` of shape [B, 3, H, W], got {list(images.shape)}. "
            "Convert with iqareward.to_images(...)."
        )
    if not images.is_floating_point():
        raise TypeError(
            f"{metric} expected floating-point `{argument}` in [0, 1], got {images.dtype}. "
            "Convert with iqareward.to_images(...), which scales integers by their dtype."
        )
    if min(images.shape[2:]) < min_side:
        raise ValueError(
            f"{metric} expected `{argument}` of shape [B, 3, H, W] with H, W >= {min_side}, got {list(images.shape)}. "
            "Resize the images, or score them through iqareward.load(...), which returns NaN for those too small."
        )
    return images if images.dtype == torch.float64 else images.float()


def check_pair(metric: str, images: Tensor, references: Tensor, *, min_side: int = 1) -> tuple[Tensor, Tensor]:
    """Check an (images, references) pair and return both in the dtype that the metric computes in."""
    images = check_images(metric, images, min_side=min_side)
    references = check_images(metric, references, min_side=min_side, argument="references")
    if images.shape != references.shape:
        raise ValueError(
            f"{metric} expected `references` of the shape of `images` {list(images.shape)}, "
            f"got {list(references.shape)}. Repeat or resize the references."
        )
    if images.device != references.device:
        raise ValueError(
            f"{metric} expected `references` on the device of `images` ({images.device}), got {references.device}. "
            "Move them with references.to(images.device)."
        )
    if images.dtype != references.dtype:  # one of them float64: the other follows, exactly
        return images.double(), references.double()
    return images, references
