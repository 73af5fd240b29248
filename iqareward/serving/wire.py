"""The lossless wire format between `RemoteReward` and the reward server: images as safetensors, scores as JSON.

A request is one safetensors document, which any language can write and which cannot carry code:

- tensors `images` `[B, 3, H, W]`, or `images.0`, `images.1`, ... `[3, H, W]` of different sizes; `references` likewise;
- uint8 (v stands for v / 255), float16 or float32 in [0, 1]: what arrives is bit for bit what was sent;
- in the header's `__metadata__`, under `iqareward`, a JSON object: `{"version": 1, "rewards": ["ssim"],
  "prompts": ["a cat", ...] or null, "deadline": seconds the client still waits or null}`.

An answer is JSON; a score that is NaN, "not scored", is `null`:
`{"scores": {reward: [..]}, "components": {reward: {part: [..]}}, "timings": {step: seconds}}`.
An error is `{"error": {"code", "message", "index"?}}`, `index` being the image at fault.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from iqareward.types import Images, Scores

# HTTP status of each code; every other code is 422: well formed, but not something that can be scored
_STATUS = {
    "malformed_body": 400, "malformed_metadata": 400,
    "body_too_large": 413, "header_too_large": 413, "too_many_images": 413, "too_many_pixels": 413,
}  # fmt: skip


class WireError(ValueError):
    """A body that is not a request (or an answer); the only exception that decoding raises.

    Args:
        code: machine-readable reason, e.g. `"too_many_images"`.
        message: what was expected, what came.
        index: position of the image at fault, where one is.

    Attributes:
        status: the HTTP status that a server answers with.
    """

    def __init__(self, code: str, message: str, index: int | None = None) -> None:
        super().__init__(code, message, index)  # all three, so that it survives pickling
        self.code, self.message, self.index = code, message, index
        self.status = _STATUS.get(code, 422)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def read_json(text: bytes | str, code: str) -> Any:
    """JSON without its traps: no NaN, no duplicate keys, no error but `WireError(code)` however it is nested."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bad syntax, bad UTF-8, integers of thousands of digits; depth
        raise WireError(code, f"expected JSON ({error}).") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice")
    return document


DTYPES = ("U8", "F16", "F32")
COLUMNS = ("images", "references")
MAX_DEADLINE = 86400
_FIELDS = {"version", "rewards", "prompts", "deadline"}
_NUMBERED = re.compile(r"(images|references)\.(0|[1-9][0-9]{0,8})")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, which nothing can encode again


@dataclass(frozen=True)
class Metadata:
    """What a request says beside its pixels."""

    rewards: tuple[str, ...]
    prompts: tuple[str, ...] | None
    deadline: float | None


def parse_header(body: bytes, *, max_bytes: int, max_header_bytes: int) -> dict[str, Any]:
    """The header: 8 bytes of little-endian length, then that much JSON, an object."""
    if len(body) > max_bytes:
        raise WireError("body_too_large", f"expected at most {max_bytes} bytes, got {len(body)}.")
    if len(body) < 8:
        raise WireError("malformed_body", f"expected a safetensors document, got {len(body)} bytes.")
    size = int.from_bytes(body[:8], "little")
    if size > len(body) - 8:
        raise WireError("malformed_body", f"the header claims {size} bytes, the body has {len(body) - 8}.")
    if size > max_header_bytes:
        raise WireError("header_too_large", f"expected a header of at most {max_header_bytes} bytes, got {size}.")
    header = read_json(bytes(body[8 : 8 + size]), "malformed_body")
    if not isinstance(header, dict):
        raise WireError("malformed_body", f"expected a JSON object as header, got {type(header).__name__}.")
    return header


def read_metadata(metadata: object, *, key: str, version: int) -> Metadata:
    """Rewards, prompts and deadline from `__metadata__[key]`; unknown fields are refused, for they may be misspelt."""
    text = metadata.get(key) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise WireError("malformed_metadata", f"expected a JSON text under `{key}` in `__metadata__`.")
    fields = read_json(text, "malformed_metadata")
    if not isinstance(fields, dict):
        raise WireError("malformed_metadata", f"expected a JSON object, got {type(fields).__name__}.")
    if type(fields.get("version")) is not int or fields["version"] != version:
        raise WireError("unsupported_version", f"expected `version` {version}, got {fields.get('version')!r:.40}.")
    if set(fields) - _FIELDS:
        raise WireError(
            "unknown_field", f"expected {sorted(_FIELDS)}, got also {sorted(set(fields) - _FIELDS)!r:.200}."
        )
    rewards, prompts, deadline = fields.get("rewards"), fields.get("prompts"), fields.get("deadline")
    if not _are_texts(rewards) or not rewards or len(set(rewards)) < len(rewards):
        raise WireError("bad_rewards", "expected `rewards` as a list of at least one name, each once.")
    if prompts is not None and not _are_texts(prompts):
        raise WireError("bad_prompts", "expected `prompts` as a list of texts, or null.")
    if deadline is not None and (type(deadline) not in (int, float) or not 0 < deadline <= MAX_DEADLINE):
        raise WireError("bad_deadline", f"expected `deadline` in seconds, above 0 and up to {MAX_DEADLINE}, or null.")
    return Metadata(
        tuple(rewards), None if prompts is None else tuple(prompts), None if deadline is None else float(deadline)
    )


def tensor_names(header: dict[str, Any], *, max_images: int, max_pixels: int) -> dict[str, str | list[str] | None]:
    """For images and references, the name of the batch or the names of the single images in order, or None.

    Args:
        header: of the document, without its metadata.
        max_images: at most this many images.
        max_pixels: at most this many pixels in each.

    Raises:
        WireError: other tensors, a wrong dtype or shape, too much of something, or references that do not match.
    """
    numbered: dict[str, dict[int, str]] = {column: {} for column in COLUMNS}
    for name in header:
        match = _NUMBERED.fullmatch(name)
        if match:
            numbered[match[1]][int(match[2])] = name
        elif name not in COLUMNS:
            raise WireError("unknown_tensor", f"expected tensors `images` or `images.0`, ..., got {name!r:.40}.")
    names: dict[str, str | list[str] | None] = {}
    for column, rows in numbered.items():
        if rows and (column in header or set(rows) != set(range(len(rows)))):
            raise WireError("bad_tensors", f"expected either `{column}` or all of `{column}.0`, `{column}.1`, ...")
        names[column] = [rows[index] for index in range(len(rows))] if rows else column if column in header else None
    if names["images"] is None:
        raise WireError("no_images", "expected tensors `images` or `images.0`, `images.1`, ...")
    shapes = {column: _shapes(header, name, max_images, max_pixels) for column, name in names.items()}
    if names["references"] is not None and shapes["references"] != shapes["images"]:
        raise WireError("bad_references", "expected `references` of the form and the shapes of `images`.")
    return names


def _shapes(
    header: dict[str, Any], names: str | list[str] | None, max_images: int, max_pixels: int
) -> list[list[int]] | None:
    """Checked shapes of a column."""
    if names is None:
        return None
    single = isinstance(names, list)
    rows = names if single else [names]
    count = None if not single else len(rows)
    shapes = [_shape(header[name], index if single else None, max_pixels) for index, name in enumerate(rows)]
    count = shapes[0][0] if count is None else count
    if count > max_images:
        raise WireError("too_many_images", f"expected at most {max_images} images, got {count}.")
    return shapes


def _shape(entry: object, index: int | None, max_pixels: int) -> list[int]:
    """Shape of one tensor: `[B, 3, H, W]`, or `[3, H, W]` of the single image `index`."""
    expected = "[B, 3, H, W]" if index is None else "[3, H, W]"
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise WireError("malformed_body", "expected each tensor as {dtype, shape, data_offsets}.")
    if entry.get("dtype") not in DTYPES:
        raise WireError("bad_dtype", f"expected one of {list(DTYPES)}, got {entry.get('dtype')!r:.40}.", index)
    if len(shape) != (4 if index is None else 3) or shape[-3] != 3 or min(shape) < 1:
        raise WireError("bad_shape", f"expected images {expected} with B, H, W >= 1, got {shape!r:.80}.", index)
    if shape[-2] * shape[-1] > max_pixels:
        raise WireError("too_many_pixels", f"expected at most {max_pixels} pixels, got {shape!r:.80}.", index)
    return shape


def _are_texts(items: object) -> bool:
    return isinstance(items, list) and all(isinstance(item, str) and not _SURROGATE.search(item) for item in items)


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


CONTENT_TYPE = "application/x-safetensors"
VERSION = 1
METADATA_KEY = "iqareward"
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Limits:
    """What a server accepts in one request; a request beyond it is a `WireError` with status 413.

    Args:
        max_bytes: size of the whole body, and of all its decoded pixels in the dtype they then have.
        max_images: number of images.
        max_pixels: H * W of one image.
        max_header_bytes: of the safetensors header, which holds names, shapes and prompts.
    """

    max_bytes: int = 256 * 2**20
    max_images: int = 1024
    max_pixels: int = 64 * 2**20
    max_header_bytes: int = 2**20


@dataclass(frozen=True)
class ScoreRequest:
    """A decoded request.

    Args:
        rewards: names of the rewards asked for, at least one, unique.
        images: `[B, 3, H, W]`, or a list of `[3, H, W]`, as sent: uint8, float16 or float32 (see `as_floats`).
        references: of the same form and shapes as `images`, or None.
        prompts: one per image, or None.
        deadline: seconds after arrival at which the client stops waiting, or None.
    """

    rewards: tuple[str, ...]
    images: Images
    references: Images | None = None
    prompts: tuple[str, ...] | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class ScoreAnswer:
    """A decoded answer.

    Args:
        scores: reward name -> `[B]` float32, NaN = not scored.
        components: reward name -> part -> `[B]` float32.
        timings: step -> seconds on the server.
    """

    scores: dict[str, Scores]
    components: dict[str, dict[str, Scores]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


def encode_request(
    images: Images,
    references: Images | None = None,
    prompts: Sequence[str] | None = None,
    *,
    rewards: Sequence[str],
    deadline: float | None = None,
) -> bytes:
    """One request body; scores of what is decoded from it are bit-identical to scores of what went in.

    Float images that are exactly v / 255, such as decoded files, travel as uint8: a quarter of the bytes.

    Args:
        images: `[B, 3, H, W]` or a sequence of `[3, H, W]`; uint8 meaning v / 255, or floating-point in [0, 1].
        references: of the same shapes, or None.
        prompts: one per image, or None.
        rewards: names of the rewards that the server shall compute.
        deadline: seconds the client will wait, or None.

    Raises:
        TypeError: the images are neither uint8 nor floating-point.

    Example:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> request = decode_request(encode_request(images, rewards=["ssim"]))
        >>> torch.equal(request.images, images), request.rewards
        (True, ('ssim',))
    """
    if references is not None and isinstance(images, Tensor) != isinstance(references, Tensor):
        images, references = list(images), list(references)
    arrays = {}
    for name, column in (("images", images), ("references", references)):
        if isinstance(column, Tensor):
            arrays[name] = packed(column)
        elif column is not None:
            arrays |= {f"{name}.{index}": packed(row) for index, row in enumerate(column)}
    metadata = {
        "version": VERSION,
        "rewards": list(rewards),
        "prompts": None if prompts is None else list(prompts),
        "deadline": deadline,
    }
    return safetensors.numpy.save(
        {name: tensor.numpy() for name, tensor in arrays.items()}, {METADATA_KEY: json.dumps(metadata)}
    )


def decode_request(body: bytes, limits: Limits = Limits()) -> ScoreRequest:
    """A request from foreign bytes; the header is checked before any pixel is touched, and nothing is ever unpickled.

    Args:
        body: the bytes of the request.
        limits: what to accept.

    Raises:
        WireError: for any body that is not a request within the limits; it has a `code` and an HTTP `status`.
    """
    header = parse_header(body, max_bytes=limits.max_bytes, max_header_bytes=limits.max_header_bytes)
    metadata = read_metadata(header.pop("__metadata__", None), key=METADATA_KEY, version=VERSION)
    names = tensor_names(header, max_images=limits.max_images, max_pixels=limits.max_pixels)
    try:
        tensors = safetensors.torch.load(bytes(body))
    except safetensors.SafetensorError as error:  # offsets that overlap, leave holes or end elsewhere
        raise WireError("malformed_body", f"the body is not a safetensors document: {error}") from None
    images, references = (_column(tensors, names[column]) for column in ("images", "references"))
    assert images is not None  # tensor_names refuses a request without images
    if metadata.prompts is not None and len(metadata.prompts) != len(images):
        raise WireError(
            "bad_prompts", f"expected one prompt per image ({len(images)}), got {len(metadata.prompts)} prompts."
        )
    return ScoreRequest(metadata.rewards, images, references, metadata.prompts, metadata.deadline)


def as_floats(images: Images) -> Images:
    """Decoded images as float32 in [0, 1], exactly as `iqareward.to_images` makes them of uint8 pixels."""
    if isinstance(images, Tensor):
        return images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    return [as_floats(image) for image in images]  # pyright: ignore[reportReturnType]


def encode_answer(answer: ScoreAnswer) -> bytes:
    """The JSON of an answer; float32 scores survive exactly, NaN becomes null."""
    document = {
        "scores": {name: _json_numbers(row) for name, row in answer.scores.items()},
        "components": {
            name: {part: _json_numbers(row) for part, row in parts.items()} for name, parts in answer.components.items()
        },
        "timings": dict(answer.timings),
    }
    return json.dumps(document, allow_nan=False).encode()


def decode_answer(body: bytes) -> ScoreAnswer:
    """An answer from a server's bytes, null as NaN.

    Raises:
        WireError: `malformed_answer`, for anything else than an answer.
    """
    code = "malformed_answer"
    document = read_json(body, code)
    if not isinstance(document, dict) or not isinstance(document.get("scores"), dict):
        raise WireError(code, 'expected a JSON object with an object "scores".')
    components, timings = document.get("components", {}), document.get("timings", {})
    if not isinstance(components, dict) or not all(isinstance(parts, dict) for parts in components.values()):
        raise WireError(code, 'expected "components" as {reward: {part: [numbers]}}.')
    if not isinstance(timings, dict) or not all(_is_number(seconds) for seconds in timings.values()):
        raise WireError(code, 'expected "timings" as {step: seconds}.')
    return ScoreAnswer(
        {name: _scores(row) for name, row in document["scores"].items()},
        {name: {part: _scores(row) for part, row in parts.items()} for name, parts in components.items()},
        timings,
    )


def encode_error(code: str, message: str, index: int | None = None) -> bytes:
    """The JSON of an error; `index` is the position of the image at fault, where one is."""
    error: dict[str, Any] = {"code": code, "message": message}
    return json.dumps({"error": error if index is None else error | {"index": index}}).encode()


def _column(tensors: Mapping[str, Tensor], names: str | list[str] | None) -> Tensor | list[Tensor] | None:
    if isinstance(names, list):
        return [tensors[name] for name in names]
    return None if names is None else tensors[names]


def _json_numbers(scores: Scores) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in scores.tolist()]


def _scores(row: object) -> Scores:
    if not isinstance(row, list) or not all(value is None or _is_number(value) for value in row):
        raise WireError("malformed_answer", "expected scores as a list of numbers and nulls.")
    return torch.tensor([math.nan if value is None else value for value in row], dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= FLOAT32_MAX
