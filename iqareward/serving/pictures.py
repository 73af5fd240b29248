"""Encoded pictures from foreign bytes: lossless formats only, unless somebody asked for JPEG."""

import io
import warnings
from collections.abc import Iterable, Sequence

from PIL import Image
from torch import Tensor

from iqareward.images import to_images
from iqareward.rewards.wire import Limits
from iqareward.serving.errors import ServiceError

BYTES_PER_PIXEL = 3  # of RGB as it would have come uncompressed: what a picture counts for `Limits.max_bytes`


def decode_pictures(files: Iterable[bytes], limits: Limits, *, allow_lossy: bool) -> list[Tensor]:
    """PNG and lossless WebP files (JPEG too if allowed) as `[3, H, W]` float32 in [0, 1], like `iqareward.to_images`.

    Args:
        files: the contents of one file per image.
        limits: `max_images`, `max_pixels` of each, and `max_bytes` of all of them uncompressed. Sizes are read from the
            files' headers, so a small file cannot become a large picture.
        allow_lossy: whether JPEG and lossy WebP are taken; their artefacts are part of what a reward then scores.

    Raises:
        ServiceError: something else (415), too much of it (413), or broken (422); `index` says which file.
    """
    images: list[Tensor] = []
    room = limits.max_bytes
    for index, content in enumerate(files):
        if index == limits.max_images:
            raise ServiceError(413, "too_many_images", f"expected at most {limits.max_images} images.")
        picture = _open(content, index, allow_lossy)
        pixels = picture.width * picture.height
        room -= pixels * BYTES_PER_PIXEL
        if pixels > limits.max_pixels or room < 0:
            raise ServiceError(
                413,
                "too_many_pixels",
                f"expected at most {limits.max_pixels} pixels in an image and {limits.max_bytes} bytes uncompressed, "
                f"got {picture.width} x {picture.height}.",
                index=index,
            )
        try:
            images.append(to_images(picture, value_range=(0, 1))[0])
        except Exception as error:  # Pillow's decoders raise nearly anything for broken files
            raise _broken(index, error) from error
    return images


def decode_pairs(
    images: Sequence[bytes], references: Sequence[bytes], limits: Limits, *, allow_lossy: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Images and, if there are any, references, which must be as many and of the same sizes.

    Raises:
        ServiceError: as `decode_pictures`, or images and references that do not match (422).
    """
    if not images:
        raise ServiceError(422, "no_images", "expected at least one image.")
    if references and len(references) != len(images):
        raise ServiceError(
            422, "bad_references", f"expected one reference per image ({len(images)}), got {len(references)}."
        )
    pictures, truths = (decode_pictures(files, limits, allow_lossy=allow_lossy) for files in (images, references))
    for index, (picture, truth) in enumerate(zip(pictures, truths, strict=False)):
        if picture.shape != truth.shape:
            sizes = f"{list(truth.shape)} for {list(picture.shape)}"
            raise ServiceError(
                422, "bad_references", f"expected a reference of the image's size, got {sizes}.", index=index
            )
    return pictures, truths or None


def _open(content: bytes, index: int, allow_lossy: bool) -> Image.Image:
    """The picture with its header read and no pixel decoded."""
    formats = ("PNG", "WEBP", "JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked next
            picture = Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:  # Pillow's own limit, far beyond any sensible one of ours
        raise ServiceError(413, "too_many_pixels", str(error), index=index) from None
    except Image.UnidentifiedImageError:
        raise ServiceError(
            415, "unsupported_picture", "expected a PNG or a lossless WebP file; Pillow reads none.", index=index
        ) from None
    except Exception as error:
        raise _broken(index, error) from error
    if getattr(picture, "n_frames", 1) != 1:
        raise ServiceError(415, "unsupported_picture", "expected a still picture, got an animation.", index=index)
    if not allow_lossy and not _is_lossless(picture.format, content):
        raise ServiceError(
            415,
            "lossy_picture",
            f"expected a PNG or a lossless WebP file, got a lossy {picture.format}: its artefacts would be scored. "
            "Send the original pixels, or start the server with --jpeg always.",
            index=index,
        )
    return picture


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


def _broken(index: int, error: Exception) -> ServiceError:
    return ServiceError(422, "broken_picture", f"the picture cannot be decoded ({error}).", index=index)
