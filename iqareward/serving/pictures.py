"""Encoded pictures from foreign bytes: lossless formats only, unless somebody asked for JPEG."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from iqareward.image_files import UnreadableImageError, open_image, read_image
from iqareward.images import to_images
from iqareward.serving.errors import ServiceError
from iqareward.serving.memory import Reservation
from iqareward.serving.wire import Limits

FORMATS = ("PNG", "WEBP", "JPEG", "MPO")  # MPO: the JPEG of a camera, with a preview behind it
UINT8_BYTES, FLOAT_BYTES = 3, 12  # of a pixel


def decode_pictures(files: Iterable[bytes], limits: Limits, memory: Reservation, *, allow_lossy: bool) -> list[Tensor]:
    """PNG and lossless WebP files (JPEG too if allowed) as `[3, H, W]`.

    Args:
        files: the contents of one file per image.
        limits: `max_pixels` of each, and `max_bytes` of all of them decoded. Sizes are read from the files' headers,
            so a small file cannot become a large picture.
        memory: grows by what the pictures take, before they are decoded.
        allow_lossy: whether JPEG and lossy WebP are taken; their artefacts are part of what a reward then scores.

    Returns:
        uint8, but float32 in [0, 1] of files with transparency or 16 bits; `as_floats` of it is what
        `iqareward.to_images` makes of the file.

    Raises:
        ServiceError: something else (415), too much of it (413), too much at the moment (429), or broken (422); `index`
            says which file.
    """
    contents = list(files)
    pixels = [_pixels(content, index, limits, allow_lossy) for index, content in enumerate(contents)]
    total = 0
    for index, count in enumerate(pixels):
        total += UINT8_BYTES * count
        _check_total(total, limits, index)
    memory.grow(total)
    images: list[Tensor] = []
    for index, (content, count) in enumerate(zip(contents, pixels, strict=True)):
        try:
            array = _without_full_opacity(read_image(content, formats=FORMATS))
            if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3):
                images.append(_channels_first(array))
                continue
            more = (FLOAT_BYTES - UINT8_BYTES) * count
            total += more
            _check_total(total, limits, index)
            memory.grow(more)
            images.append(to_images(array)[0])
        except UnreadableImageError as error:
            raise _broken(index, error) from error
    return images


def decode_pairs(
    images: Sequence[bytes], references: Sequence[bytes], limits: Limits, memory: Reservation, *, allow_lossy: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Images and, if there are any, references, which must be as many and of the same sizes.

    Raises:
        ServiceError: as `decode_pictures`, too many images (413), or images and references that do not match (422).
    """
    if not images:
        raise ServiceError(422, "no_images", "expected at least one image.")
    if len(images) > limits.max_images:
        raise ServiceError(413, "too_many_images", f"expected at most {limits.max_images} images, got {len(images)}.")
    if references and len(references) != len(images):
        raise ServiceError(
            422, "bad_references", f"expected one reference per image ({len(images)}), got {len(references)}."
        )
    try:
        decoded = decode_pictures([*images, *references], limits, memory, allow_lossy=allow_lossy)
    except ServiceError as error:
        if error.index is not None:
            error.index %= len(images)
        raise
    pictures, truths = decoded[: len(images)], decoded[len(images) :]
    for index, (picture, truth) in enumerate(zip(pictures, truths, strict=False)):
        if picture.shape != truth.shape:
            sizes = f"{list(truth.shape)} for {list(picture.shape)}"
            raise ServiceError(
                422, "bad_references", f"expected a reference of the image's size, got {sizes}.", index=index
            )
    return pictures, truths or None


def _pixels(content: bytes, index: int, limits: Limits, allow_lossy: bool) -> int:
    """The number of pixels of a file that may be decoded, from its header."""
    try:
        with open_image(content, formats=FORMATS) as picture:
            kind, (width, height) = picture.format, picture.size
    except UnreadableImageError as error:
        cause = error.__cause__
        if isinstance(cause, Image.DecompressionBombError):  # Pillow's own limit, far beyond any sensible one of ours
            raise ServiceError(413, "too_many_pixels", str(cause), index=index) from None
        if cause is None or isinstance(cause, UnidentifiedImageError):  # no picture, or not one still picture
            raise ServiceError(
                415, "unsupported_picture", f"expected a still PNG or lossless WebP file: {error.reason}.", index=index
            ) from None
        raise _broken(index, error) from error
    if not allow_lossy and not _is_lossless(kind, content):
        raise ServiceError(
            415,
            "lossy_picture",
            f"expected a PNG or a lossless WebP file, got a lossy {kind}: its artefacts would be scored. "
            "Send the original pixels, or start the server with --jpeg always.",
            index=index,
        )
    if width * height > limits.max_pixels:
        raise ServiceError(
            413, "too_many_pixels", f"expected at most {limits.max_pixels} pixels, got {width} x {height}.", index=index
        )
    return width * height


def _check_total(total: int, limits: Limits, index: int) -> None:
    if total > limits.max_bytes:
        raise ServiceError(
            413, "too_many_pixels", f"expected at most {limits.max_bytes} bytes when decoded; send fewer.", index=index
        )


def _without_full_opacity(array: np.ndarray) -> np.ndarray:
    opaque = array.ndim == 3 and array.shape[2] == 4 and array[..., 3].min() == np.iinfo(array.dtype).max
    return array[..., :3] if opaque else array


def _channels_first(array: np.ndarray) -> Tensor:
    height, width = array.shape[:2]
    colors = array.reshape(height, width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.array(np.broadcast_to(colors, (3, height, width)), order="C"))  # always a copy


def _is_lossless(kind: str | None, content: bytes) -> bool:
    """Whether the file holds the pixels that went in. WebP is RIFF: pixels in a chunk `VP8L`, or `VP8 ` if lossy."""
    if kind != "WEBP":
        return kind == "PNG"
    position = 12
    while position + 8 <= len(content):
        chunk, size = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        if chunk in (b"VP8L", b"VP8 "):
            return chunk == b"VP8L"
        position += 8 + size + size % 2
    return False


def _broken(index: int, error: UnreadableImageError) -> ServiceError:
    return ServiceError(422, "broken_picture", f"the picture cannot be decoded ({error.reason}).", index=index)
