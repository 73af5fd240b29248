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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from iqareward.rewards._wire_header import parse_header, read_metadata, tensor_names
from iqareward.rewards._wire_json import WireError, read_json
from iqareward.rewards._wire_pixels import packed
from iqareward.types import Images, Scores

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
