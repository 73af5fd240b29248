"""Check the image arguments of a reward and group them by shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from iqareward.types import Images

Buckets = list[tuple[Tensor, ...]]


def shape_buckets(name: str, images: Images, references: Images | None) -> tuple[Buckets, list[int] | None]:
    """Group images (and references) of equal shape into batches.

    Args:
        name: The reward's name, for error messages.
        images: `[B, 3, H, W]`, or a sequence of `[3, H, W]`.
        references: None, or of the same shapes and device.

    Returns:
        One `(images,)` or `(images, references)` pair of `[b, 3, H, W]` per shape, in order of first appearance; and
        for each input image its row in the concatenation of the buckets, or None if that is the order already.
    """
    rows = checked_rows(name, images, references)
    if isinstance(rows, tuple):
        return ([rows] if rows[0].shape[0] else []), None
    members: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(rows[0]):
        members.setdefault(image.shape, []).append(index)
    buckets = [tuple(torch.stack([column[i] for i in indices]) for column in rows) for indices in members.values()]
    position = {index: row for row, index in enumerate(i for indices in members.values() for i in indices)}
    order = [position[index] for index in range(len(rows[0]))]
    return buckets, None if order == list(range(len(order))) else order


def checked_rows(name: str, images: Images, references: Images | None) -> tuple[Tensor, ...] | list[Sequence[Tensor]]:
    """Images and references after all checks of shape, dtype and device: batches as they are, anything else as rows.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: shapes or devices are wrong or do not match.
    """
    if isinstance(images, Tensor) and (references is None or isinstance(references, Tensor)):
        batch = (images,) if references is None else (images, references)
        for argument, tensor in zip(("images", "references"), batch, strict=False):
            _check_tensor(name, argument, tensor, ndim=4)
        _check_match(name, *batch)
        return batch
    rows = [_as_rows(name, "images", images)]
    if references is not None:
        rows.append(_as_rows(name, "references", references))
        if len(rows[0]) != len(rows[1]):
            raise ValueError(f"{name} expected as many references as images ({len(rows[0])}), got {len(rows[1])}.")
    for index, row in enumerate(zip(*rows, strict=True)):
        _check_match(name, *row, index=index)
        if row[0].device != rows[0][0].device:
            raise ValueError(
                f"{name} expected all images on one device ({rows[0][0].device}), "
                f"got images[{index}] on {row[0].device}."
            )
    return rows


def _as_rows(name: str, argument: str, images: Images) -> Sequence[Tensor]:
    """A batch or a sequence as a list of checked `[3, H, W]` tensors."""
    if isinstance(images, Tensor):
        _check_tensor(name, argument, images, ndim=4)
        return images.unbind(0)
    if not isinstance(images, Sequence):
        raise TypeError(
            f"{name} expected `{argument}` as a tensor [B, 3, H, W] or a sequence of [3, H, W] tensors, "
            f"got {type(images).__name__}. Convert with iqareward.to_images(...)."
        )
    for index, image in enumerate(images):
        _check_tensor(name, f"{argument}[{index}]", image, ndim=3)
    return images


def _check_tensor(name: str, argument: str, image: Tensor, *, ndim: int) -> None:
    shape = "[B, 3, H, W]" if ndim == 4 else "[3, H, W]"
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} expected `{argument}` as a torch.Tensor {shape}, got {type(image).__name__}. "
            "Convert with iqareward.to_images(...)."
        )
    if image.ndim != ndim or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(
            f"{name} expected `{argument}` of shape {shape} with H, W >= 1, got {list(image.shape)}. "
            "Convert with iqareward.to_images(...)."
        )
    if not image.is_floating_point():
        raise TypeError(
            f"{name} expected `{argument}` floating-point in [0, 1], got {image.dtype}. "
            "Convert with iqareward.to_images(...), which scales integers by their dtype."
        )


def _check_match(name: str, images: Tensor, references: Tensor | None = None, *, index: int | None = None) -> None:
    if references is None:
        return
    where = "" if index is None else f"[{index}]"
    if images.shape != references.shape:
        raise ValueError(
            f"{name} expected `references{where}` of the shape of `images{where}` {list(images.shape)}, "
            f"got {list(references.shape)}. Resize or repeat the references."
        )
    if images.device != references.device:
        raise ValueError(
            f"{name} expected `references{where}` on the device of `images{where}` ({images.device}), "
            f"got {references.device}. Move them with references.to(images.device)."
        )
