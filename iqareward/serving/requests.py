"""Read and check requests: server settings, errors, memory limits, and parsers of request bodies."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import field
from typing import Annotated, Any, Literal, final

import numpy as np
import pydantic
import torch
from fastapi import Request, Response, UploadFile
from PIL import Image, UnidentifiedImageError
from pydantic.dataclasses import dataclass
from torch import Tensor

from iqareward.image_files import UnreadableImageError, open_image, read_image
from iqareward.images import to_images
from iqareward.serving.client import checked_token
from iqareward.serving.wire import CONTENT_TYPE, Limits, ScoreRequest, decode_request, encode_error, first_error

UINT8_BYTES, FLOAT_BYTES = 3, 12  # of a pixel
_FORMATS = ("PNG", "WEBP", "JPEG", "MPO")  # MPO: the JPEG of a camera, with a preview behind it
_MAX_FIELD_BYTES = 64 * 1024  # of a text in a form
# A body, and its header, of which decoding takes about as long as the way to another thread and back.
_DECODED_AT_ONCE, _HEADER_AT_ONCE = 2**22, 2**14
_JOINED_AT_ONCE = 2**20  # bytes; above it, Python lets other threads run while it joins


class ServiceError(Exception):
    """A request that is answered with an error: HTTP status, code, and a message for the client.

    `index` is the position of the image at fault; after `retry_after` seconds the same request may succeed.
    """

    def __init__(
        self, status: int, code: str, message: str, *, index: int | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.index, self.retry_after = index, retry_after

    def response(self) -> Response:
        """`{"error": {"code", "message", "index"?}}` with the status and the headers that belong to it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        body = encode_error(self.code, self.message, self.index)
        return Response(body, self.status, headers, media_type="application/json")


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Settings:
    """What a server accepts and how long it tries.

    Args:
        limits: limits of one request.
        max_inflight_bytes: memory of all requests that one HTTP process is reading or scoring; the bytes of encoded
            images and of their pixels both count.
        max_inflight_requests: requests that one HTTP process is reading or scoring. As many requests without a body
            may be under way beside these.
        deadline: seconds from arrival to answer; a request may ask for less, not for more.
        jpeg: whether JPEG and lossy WebP files are scored, with their artefacts: `"never"` or `"always"`.
        token: what clients must send; None = anyone who can reach the port may use the server.

    Raises:
        ValueError: an option is out of its range.
    """

    limits: Limits = Limits()
    max_inflight_bytes: int = 2 * 2**30
    max_inflight_requests: pydantic.PositiveInt = 1024
    deadline: pydantic.PositiveFloat = 120.0
    jpeg: Literal["never", "always"] = "never"
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < 2 * self.limits.max_bytes:
            raise ValueError(
                f"Settings expected `max_inflight_bytes` >= {2 * self.limits.max_bytes}, twice `limits.max_bytes` "
                f"because a request may hold files and their pixels, got {self.max_inflight_bytes}."
            )
        if self.token is not None:
            object.__setattr__(self, "token", checked_token(self.token, "Settings"))


@final
class MemoryBudget:
    """Bytes that all requests of a process may hold together."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self.lock = threading.Lock()  # images are decoded in other threads


@final
class Reservation:
    """The bytes that one request holds, counted before it does."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self._nbytes, self._released = budget, 0, False

    def grow(self, nbytes: int) -> None:
        """Reserve more bytes, or raise error 429."""
        budget = self._budget
        with budget.lock:
            # a thread may go on for a moment after its request has ended, and nobody would give back what it takes
            if self._released or budget.used + nbytes > budget.most:
                raise overloaded()
            budget.used += nbytes
            self._nbytes += nbytes

    def release(self) -> None:
        """Give all of it back: the request has ended."""
        with self._budget.lock:
            self._budget.used -= self._nbytes
            self._released = True


@final
class ByteSemaphore:
    """Bytes that are worked on at a time, first come, first served; a request for more than all of them gets all."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._queue, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, nbytes: int) -> AsyncGenerator[None]:
        """Wait until so many bytes are free, and take them."""
        nbytes = min(nbytes, self._most)
        async with self._queue:
            while self._free < nbytes:
                self._freed.clear()
                await self._freed.wait()
            self._free -= nbytes
        try:
            yield
        finally:
            self._free += nbytes
            self._freed.set()


def overloaded() -> ServiceError:
    """The error for a request that finds no place."""
    return ServiceError(429, "overloaded", "the server holds as much as it may; retry.", retry_after=1)


class ScoreForm(pydantic.BaseModel):
    """Image files as a form, for curl: `-F reward=ssim -F images=@a.png -F references=@b.png`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    reward: Annotated[list[str], pydantic.Field(min_length=1, json_schema_extra={"uniqueItems": True})]
    images: Annotated[list[UploadFile], pydantic.Field(min_length=1)]
    references: list[UploadFile] = []
    inputs: list[UploadFile] = []
    prompts: list[str] = []
    deadline: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None


async def _read_body(request: Request) -> bytes:
    """The body of a request, without a copy of it in the request and without holding other requests up."""
    chunks = [chunk async for chunk in request.stream()]
    if sum(map(len, chunks)) <= _JOINED_AT_ONCE:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


async def read_request(request: Request, settings: Settings) -> ScoreRequest:
    """The request in either of its two forms, safetensors or a multipart form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == CONTENT_TYPE:
        body = await _read_body(request)
        if len(body) <= _DECODED_AT_ONCE and int.from_bytes(body[:8], "little") <= _HEADER_AT_ONCE:
            return decode_request(body, settings.limits)
        return await asyncio.to_thread(decode_request, body, settings.limits)
    if kind == "multipart/form-data":
        return await _read_form(request, settings)
    raise ServiceError(
        415, "unsupported_content_type", f"expected {CONTENT_TYPE} or multipart/form-data, got {kind!r:.100}."
    )


async def _read_form(request: Request, settings: Settings) -> ScoreRequest:
    most = 3 * settings.limits.max_images
    async with request.form(max_files=most, max_fields=most, max_part_size=_MAX_FIELD_BYTES) as form:
        fields: dict[str, Any] = {name: form.getlist(name) for name in form}
        if len(fields.get("deadline", ())) == 1:
            (fields["deadline"],) = fields["deadline"]
        try:
            given = ScoreForm.model_validate(fields)
        except pydantic.ValidationError as error:
            raise ServiceError(422, "bad_form", first_error(error)) from None
        columns = {"images": given.images, "references": given.references, "inputs": given.inputs}
        files = {name: [await file.read() for file in column] for name, column in columns.items() if column}
    if len(set(given.reward)) < len(given.reward):
        raise ServiceError(422, "bad_form", "reward: expected each name once")
    for name, column in {**files, "prompts": given.prompts}.items():
        if column and len(column) != len(files["images"]):
            expected = f"expected one of `{name}` per image ({len(files['images'])}), got {len(column)}."
            raise ServiceError(422, f"bad_{name}", expected)
    memory, lossy = request.scope["iqareward.memory"], settings.jpeg == "always"
    decoded = await asyncio.to_thread(decode_files, files, settings.limits, memory, allow_lossy=lossy)
    return ScoreRequest(tuple(given.reward), **decoded, prompts=tuple(given.prompts) or None, deadline=given.deadline)


def decode_files(
    files: Mapping[str, Sequence[bytes]], limits: Limits, memory: Reservation, *, allow_lossy: bool
) -> dict[str, list[Tensor]]:
    """The columns of PNG and lossless WebP files (JPEG too if allowed), each file as `[3, H, W]`.

    Sizes are read from the files' headers and counted before anything is decoded, so a small file cannot become a large
    image. Images are uint8, but float32 in [0, 1] of files with transparency or 16 bits; `as_floats` of them is what
    `iqareward.to_images` makes of the file.

    Raises:
        ServiceError: another format (415), too large (413), too much at the moment (429), broken, or references of
            other sizes (422); `index` says which image.
    """
    if len(files["images"]) > limits.max_images:
        raise ServiceError(
            413, "too_many_images", f"expected at most {limits.max_images} images, got {len(files['images'])}."
        )
    total = 0

    def reserve(nbytes: int, index: int) -> None:
        nonlocal total
        total += nbytes
        if total > limits.max_bytes:
            expected = f"expected at most {limits.max_bytes} bytes when decoded; send fewer."
            raise ServiceError(413, "too_many_pixels", expected, index=index)
        memory.grow(nbytes)

    listed = [(name, index, content) for name, column in files.items() for index, content in enumerate(column)]
    pixels = [_count_pixels(content, index, limits, allow_lossy) for _, index, content in listed]
    for (_, index, _), count in zip(listed, pixels, strict=True):
        reserve(UINT8_BYTES * count, index)
    decoded: dict[str, list[Tensor]] = {name: [] for name in files}
    for (name, index, content), count in zip(listed, pixels, strict=True):
        try:
            array = _without_full_opacity(read_image(content, formats=_FORMATS))
        except UnreadableImageError as error:
            raise _broken(index, error) from error
        if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3):
            decoded[name].append(_channels_first(array))
        else:
            reserve((FLOAT_BYTES - UINT8_BYTES) * count, index)
            decoded[name].append(to_images(array)[0])
    for index, (image, reference) in enumerate(zip(decoded["images"], decoded.get("references", ()), strict=False)):
        if image.shape != reference.shape:
            expected = f"expected a reference of the image's size {list(image.shape)}, got {list(reference.shape)}."
            raise ServiceError(422, "bad_references", expected, index=index)
    return decoded


def _count_pixels(content: bytes, index: int, limits: Limits, allow_lossy: bool) -> int:
    """The number of pixels of a file that may be decoded, from its header."""
    try:
        with open_image(content, formats=_FORMATS) as image:
            kind, (width, height) = image.format, image.size
    except UnreadableImageError as error:
        cause = error.__cause__
        if isinstance(cause, Image.DecompressionBombError):  # Pillow's own limit, far beyond any sensible one of ours
            raise ServiceError(413, "too_many_pixels", str(cause), index=index) from None
        if cause is None or isinstance(cause, UnidentifiedImageError):  # no image, or not one still image
            expected = f"expected a still PNG or lossless WebP file: {error.reason}."
            raise ServiceError(415, "unsupported_image", expected, index=index) from None
        raise _broken(index, error) from error
    if not allow_lossy and not _is_lossless(kind, content):
        expected = (
            f"expected a PNG or a lossless WebP file, got a lossy {kind}: its artefacts would be scored. "
            "Send the original pixels, or start the server with --jpeg always."
        )
        raise ServiceError(415, "lossy_image", expected, index=index)
    if width * height > limits.max_pixels:
        expected = f"expected at most {limits.max_pixels} pixels, got {width} x {height}."
        raise ServiceError(413, "too_many_pixels", expected, index=index)
    return width * height


def _broken(index: int, error: UnreadableImageError) -> ServiceError:
    return ServiceError(422, "broken_image", f"the image cannot be decoded ({error.reason}).", index=index)


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
