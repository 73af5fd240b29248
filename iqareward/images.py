"""Convert images from pipelines, files and data sets to float RGB in [0, 1]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iqareward.image_files import read_image, to_array

ImageLike: TypeAlias = Any
"""PIL image, path, ndarray, tensor, a sequence of these, or an object with `.images` (a diffusers pipeline output)."""

_INTEGER_MAX = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}


def to_images(
    images: ImageLike,
    *,
    value_range: tuple[float, float] | None = None,
    device: torch.device | str | None = None,
) -> Tensor | list[Tensor]:
    """Convert images to float32 RGB in [0, 1], ready for every reward.

    Ranges are never guessed: integers are scaled by their dtype (uint8 by 255, uint16 by 65535, bool by 1), floats by
    the `value_range` that you state. Layout follows the type: tensors are channels-first, ndarrays channels-last.
    Grey images are repeated to three channels, transparent ones are laid on white, EXIF rotation is applied, ICC
    profiles are not. Nothing is clamped, resized or rounded, and gradients flow through tensors. Files are read with
    all their bits (`iqareward.image_files.read_image`); a PIL image has at most 8 of a colour.

    Args:
        images: a PIL image or path; an ndarray `[H, W]`, `[H, W, C]` or `[B, H, W, C]`; a tensor `[H, W]`,
            `[C, H, W]` or `[B, C, H, W]`; a sequence of single images; or an object with `.images` (a diffusers
            output). C is 1 or 3, or 4 (RGBA) for integers: floats with 4 channels are taken for latents and refused.
        value_range: (black, white) of floating-point input, e.g. `(-1, 1)`; required for it, not used for integers.
        device: where to put the result (integers travel as integers); None = where the tensor is, CPU for others.

    Returns:
        `[B, 3, H, W]` float32 if all images have one size (B = 1 for a single image), else a list of `[3, H, W]`.

    Raises:
        TypeError: not an image, or an integer dtype whose range is unclear.
        ValueError: a shape that is not an image's, floats without `value_range`, or a file that cannot be read
            (`UnreadableImageError`).

    Example:
        >>> import numpy as np
        >>> to_images(np.full((4, 6, 3), 255, dtype=np.uint8)).shape
        torch.Size([1, 3, 4, 6])
        >>> to_images(torch.zeros(2, 3, 4, 6), value_range=(-1, 1)).mean()
        tensor(0.5000)
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"to_images expected `value_range` as (black, white) with black < white, got {value_range}.")
    if isinstance(getattr(images, "images", None), (list, np.ndarray, Tensor)):
        images = images.images  # a diffusers pipeline output
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        rows = [_one_image(item, index, value_range, device) for index, item in enumerate(images)]
        if not rows:
            raise ValueError("to_images expected at least one image, got an empty sequence.")
        return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows
    return _unit_rgb(_channels_first(images, "images"), value_range, device)


def _one_image(item: ImageLike, index: int, value_range: tuple[float, float] | None, device: Any) -> Tensor:
    """An item of a sequence as `[3, H, W]`."""
    tensor = _channels_first(item, f"images[{index}]")
    if tensor.shape[0] != 1:
        raise ValueError(
            f"to_images expected single images in a sequence, got a batch of {tensor.shape[0]} as images[{index}]. "
            "Pass batches on their own."
        )
    return _unit_rgb(tensor, value_range, device).squeeze(0)


def _channels_first(image: ImageLike, where: str) -> Tensor:
    """`[B, C, H, W]` in the input's own dtype and range."""
    if isinstance(image, (str, Path)):
        image = read_image(image)
    if isinstance(image, Image.Image):
        image = to_array(image)
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"to_images expected `{where}` as an ndarray [H, W], [H, W, C] or [B, H, W, C] with C = 1, 3 or 4 "
                f"(channels last), got {list(image.shape)}. For channels-first data pass torch.from_numpy(array)."
            )
        native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(np.array(native, copy=True, order="C")).movedim(-1, -3)
    elif isinstance(image, Tensor):
        tensor = image[None] if image.ndim == 2 else image
        if tensor.ndim not in (3, 4) or tensor.shape[-3] not in (1, 3, 4):
            raise ValueError(
                f"to_images expected `{where}` as a tensor [H, W], [C, H, W] or [B, C, H, W] with C = 1, 3 or 4 "
                f"(channels first), got {list(image.shape)}. Move the channel axis with tensor.movedim(-1, -3)."
            )
    else:
        raise TypeError(
            f"to_images expected `{where}` as a PIL image, path, ndarray or tensor, got {type(image).__name__}."
        )
    if 0 in tensor.shape[-2:]:
        raise ValueError(f"to_images expected `{where}` with at least one pixel, got {list(image.shape)}.")
    return tensor if tensor.ndim == 4 else tensor[None]


def _unit_rgb(tensor: Tensor, value_range: tuple[float, float] | None, device: Any) -> Tensor:
    """`[B, C, H, W]` of any supported dtype as float32 RGB in [0, 1]."""
    tensor = tensor if device is None else tensor.to(device)
    if tensor.dtype in _INTEGER_MAX:
        unit = tensor.float().div_(_INTEGER_MAX[tensor.dtype])  # in place: a photograph takes 12 bytes a pixel
    elif not tensor.is_floating_point():
        raise TypeError(
            f"to_images cannot know the range of {tensor.dtype}. "
            "Convert to uint8 or uint16, or to float with an explicit value_range."
        )
    elif value_range is None:
        raise ValueError(
            f"to_images expected `value_range` for {tensor.dtype} images: (0, 1), (-1, 1) or (0, 255). "
            "It is never guessed from the pixels, because a dark image in [-1, 1] looks like any other."
        )
    else:
        black, white = value_range
        unit = tensor.float() if (black, white) == (0, 1) else (tensor.float() - black) / (white - black)
    channels = unit.shape[1]
    if channels == 4 and tensor.is_floating_point():
        raise ValueError(
            f"to_images expected floating-point images with 1 or 3 channels, got {list(tensor.shape)}. "
            "Decode latents first; drop or apply an alpha channel yourself."
        )
    if channels == 4:
        alpha = unit[:, 3:]
        return unit[:, :3] * alpha + (1 - alpha)
    return unit.expand(-1, 3, -1, -1).contiguous() if channels == 1 else unit


def drop_broken_gradients(images: Tensor) -> Tensor:
    """The same images; in the backward pass an image whose gradient is not finite gets none.

    Put it between a model and a reward: an image that the reward cannot score, or where it has no derivative, would
    make the gradient of all weights NaN. Each image's score depends on that image only, so the others lose nothing.

    Args:
        images: `[B, ...]` of the model, or one image `[3, H, W]`, with or without a graph.

    Example:
        >>> images = torch.tensor([[4.0], [0.0]], requires_grad=True)
        >>> drop_broken_gradients(images).sqrt().sum().backward()  # sqrt has no derivative at 0
        >>> images.grad
        tensor([[0.2500],
                [0.0000]])
    """
    if not images.requires_grad:
        return images
    images = images.view_as(images)  # the hook stays with this use of the images
    images.register_hook(_drop_broken)
    return images


def _drop_broken(gradient: Tensor) -> Tensor:
    rows = gradient if gradient.ndim != 3 else gradient[None]
    finite = rows.isfinite().flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (rows.ndim - 1)), rows, 0.0).view_as(gradient)
