"""The lossless wire format between `RemoteReward` and the reward server: images as safetensors, scores as JSON.

A request is one safetensors document, which any language can write and which cannot carry code:

- tensors `images` `[B, 3, H, W]`, or `images.0`, `images.1`, ... `[3, H, W]` of different sizes; `references` likewise,
  of the same shapes; `inputs`, the degraded images, likewise and of any size;
- uint8 (v stands for v / 255), float16 or float32 in [0, 1]: every value arrives exactly as it was sent;
- in the header's `__metadata__`, under `iqareward`, a JSON object: `{"version": 1, "rewards": ["ssim"],
  "prompts": ["a cat", ...] or null, "deadline": seconds the client still waits or null}`.

An answer is JSON; a score that is NaN, "not scored", is `null`:
`{"scores": {reward: [..]}, "components": {reward: {part: [..]}}, "timings": {step: seconds}}`.
An error is `{"error": {"code", "message", "index"?}}`, where `index` is the position of the image at fault.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated

import pydantic
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from iqareward.types import Bounds, Images, Reward, Scores, needs

CONTENT_TYPE = "application/x-safetensors"
COLUMNS = ("images", "references", "inputs")
MAX_DEADLINE = 86400
_KEY = "iqareward"
_DTYPES = (torch.uint8, torch.float16, torch.float32)
_VALUES_IN_CACHE = 2**16  # of a tensor that are worked on at a time; the client shares its cores with a trainer
_FLOAT32_MAX = torch.finfo(torch.float32).max

# HTTP status of each code; every other code is 422: well formed, but not something that can be scored
_STATUS = {
    "malformed_body": 400, "malformed_metadata": 400,
    "body_too_large": 413, "header_too_large": 413, "too_many_images": 413, "too_many_pixels": 413,
}  # fmt: skip


class WireError(ValueError):
    """A body that is not a request (or an answer): a code, what was expected and came, and the image at fault.

    It is the only exception that decoding raises; `status` is the HTTP status that a server answers with.
    """

    def __init__(self, code: str, message: str, index: int | None = None) -> None:
        super().__init__(code, message, index)  # all three, so that it survives pickling
        self.code, self.message, self.index = code, message, index
        self.status = _STATUS.get(code, 422)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


class AnswerBody(BaseModel):
    """The scores of every image by reward; null means not scored."""

    scores: dict[str, list[Number | None]]
    components: dict[str, dict[str, list[Number | None]]] = {}
    timings: dict[str, Number] = {}


class ErrorDetail(BaseModel):
    """What went wrong; `index` is the position of the image at fault."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # vLLM's codes are numbers

    code: str
    message: str
    index: int | None = None


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetail


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # an unknown field may be misspelt

    version: Annotated[int, Field(ge=1, le=1)]
    rewards: Annotated[list[str], Field(min_length=1)]
    prompts: list[str] | None = None
    deadline: Annotated[float, Field(gt=0, le=MAX_DEADLINE)] | None = None

    @pydantic.field_validator("rewards")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("expected each name once")
        return names


@dataclass(frozen=True)
class RemoteFacts:
    """What a client must know of a reward before it can ask for scores."""

    needs_references: bool
    needs_prompts: bool
    bounds: Bounds
    needs_inputs: bool = False

    @classmethod
    def of(cls, reward: Reward) -> "RemoteFacts":
        """The facts of a reward in this process; a ValueError if it needs what cannot be sent."""
        if unsent := [name for name in ("ids", "tasks") if needs(reward, name)]:
            raise ValueError(
                f"A server cannot score {reward.name}, which needs {' and '.join(map(repr, unsent))}: requests hold "
                "images, references, inputs and prompts. Serve the rewards inside it, and build it in the client "
                "around each RemoteReward."
            )
        needs_inputs = needs(reward, "inputs")
        return cls(reward.needs_references, reward.needs_prompts, reward.bounds, needs_inputs)


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Limits:
    """What a server accepts in one request; a request beyond it is a `WireError` with status 413.

    Args:
        max_bytes: size of the whole body, and of all its decoded pixels.
        max_images: number of images.
        max_pixels: H * W of one image.
        max_header_bytes: size of the safetensors header, which holds names, shapes and prompts.
    """

    max_bytes: pydantic.PositiveInt = 256 * 2**20
    max_images: pydantic.PositiveInt = 1024
    max_pixels: pydantic.PositiveInt = 64 * 2**20
    max_header_bytes: pydantic.PositiveInt = 2**20


_USUAL_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A decoded request; images as sent: uint8, float16 or float32 (see `as_floats`)."""

    rewards: tuple[str, ...]
    images: Images
    references: Images | None = None
    inputs: Images | None = None
    prompts: tuple[str, ...] | None = None
    deadline: float | None = None


@dataclasses.dataclass(frozen=True)
class ScoreAnswer:
    """A decoded answer: `[B]` float32 scores by reward, and by reward and part; seconds by step on the server."""

    scores: dict[str, Scores]
    components: dict[str, dict[str, Scores]] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)


def encode_request(
    images: Images,
    references: Images | None = None,
    prompts: Sequence[str] | None = None,
    *,
    rewards: Sequence[str],
    inputs: Images | None = None,
    deadline: float | None = None,
) -> bytes:
    """One request body; scores of what is decoded from it are bit-identical to scores of what went in.

    Images are uint8 or floating-point. Floats that are exactly v / 255, such as decoded files, travel as uint8: a
    quarter of the bytes.

    Example:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> request = decode_request(encode_request(images, rewards=["ssim"]))
        >>> torch.equal(request.images, images), request.rewards
        (True, ('ssim',))
    """
    if references is not None and isinstance(images, Tensor) != isinstance(references, Tensor):
        images, references = list(images), list(references)
    arrays: dict[str, Tensor] = {}
    for name, column in zip(COLUMNS, (images, references, inputs), strict=True):
        if isinstance(column, Tensor):
            arrays[name] = _packed(column)
        elif column is not None:
            arrays |= {f"{name}.{index}": _packed(row) for index, row in enumerate(column)}
    metadata = {
        "version": 1,
        "rewards": list(rewards),
        "prompts": None if prompts is None else list(prompts),
        "deadline": deadline,
    }
    return safetensors.numpy.save(
        {name: tensor.numpy() for name, tensor in arrays.items()}, {_KEY: json.dumps(metadata)}
    )


def decode_request(body: bytes, limits: Limits = _USUAL_LIMITS) -> ScoreRequest:
    """A request from foreign bytes, or a `WireError` for any body that is not a request within the limits."""
    if len(body) > limits.max_bytes:
        raise WireError("body_too_large", f"expected at most {limits.max_bytes} bytes, got {len(body)}.")
    header_bytes = int.from_bytes(body[:8], "little")
    if limits.max_header_bytes < header_bytes <= len(body):
        raise WireError(
            "header_too_large", f"expected a header of at most {limits.max_header_bytes} bytes, got {header_bytes}."
        )
    try:
        tensors = safetensors.torch.load(body)  # checks the header, its JSON and its offsets
        text = json.loads(body[8 : 8 + header_bytes]).get("__metadata__", {}).get(_KEY, "")
    except Exception as error:  # dtypes that torch does not have are a KeyError
        reason = f"{type(error).__name__}: {error}"
        raise WireError("malformed_body", f"the body is not a safetensors document ({reason:.300})") from None
    metadata = _metadata(text)
    images, references, inputs = (_column(tensors, column, limits) for column in COLUMNS)
    if unknown := sorted(name for name in tensors if name.partition(".")[0] not in COLUMNS):
        raise WireError("unknown_tensor", f"expected tensors `images` or `images.0`, ..., got {unknown[0]!r:.40}.")
    if images is None:
        raise WireError("no_images", "expected tensors `images` or `images.0`, `images.1`, ...")
    if references is not None and _shapes(references) != _shapes(images):
        raise WireError("bad_references", "expected `references` of the form and the shapes of `images`.")
    for name, column in (("inputs", inputs), ("prompts", metadata.prompts)):
        if column is not None and len(column) != len(images):
            raise WireError(f"bad_{name}", f"expected one of `{name}` per image ({len(images)}), got {len(column)}.")
    prompts = None if metadata.prompts is None else tuple(metadata.prompts)
    return ScoreRequest(tuple(metadata.rewards), images, references, inputs, prompts, metadata.deadline)


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
        "timings": answer.timings,
    }
    return json.dumps(document, allow_nan=False).encode()


def decode_answer(body: bytes) -> ScoreAnswer:
    """An answer from a server's bytes with null as NaN, or the `WireError` `malformed_answer`."""
    try:
        document = AnswerBody.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise WireError("malformed_answer", first_error(error)) from None
    return ScoreAnswer(
        {name: _scores(row) for name, row in document.scores.items()},
        {name: {part: _scores(row) for part, row in parts.items()} for name, parts in document.components.items()},
        document.timings,
    )


def encode_error(code: str, message: str, index: int | None = None) -> bytes:
    """The JSON of an error; `index` is the position of the image at fault, if there is one."""
    return (
        ErrorBody(error=ErrorDetail(code=code, message=message, index=index))
        .model_dump_json(exclude_none=True)
        .encode()
    )


def first_error(error: pydantic.ValidationError) -> str:
    """The place and the reason of the first thing that does not fit a model."""
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))
    got = "" if found["type"] == "missing" else f", got {found['input']!r:.80}"
    return f"{place or 'document'}: {found['msg']}{got}"


def _metadata(text: object) -> _Metadata:
    try:
        return _Metadata.model_validate_json(text)  # pyright: ignore[reportArgumentType]
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)[0]
        field = str(found["loc"][0]) if found["loc"] else ""
        codes = {"": "malformed_metadata", "version": "unsupported_version"}
        code = "unknown_field" if found["type"] == "extra_forbidden" else codes.get(field, f"bad_{field}")
        raise WireError(code, first_error(error)) from None


def _column(tensors: dict[str, Tensor], column: str, limits: Limits) -> Tensor | list[Tensor] | None:
    """The batch of that name, or its single images in order, within the limits."""
    names = [name for name in tensors if name.partition(".")[0] == column]
    if not names:
        return None
    if names == [column]:
        rows = tensors[column]
        _check_image(rows, None, limits)
    else:
        numbered = [f"{column}.{index}" for index in range(len(names))]
        if set(numbered) != set(names):
            raise WireError("bad_tensors", f"expected either `{column}` or all of `{column}.0`, `{column}.1`, ...")
        rows = [tensors[name] for name in numbered]
        for index, row in enumerate(rows):
            _check_image(row, index, limits)
    if len(rows) > limits.max_images:
        raise WireError("too_many_images", f"expected at most {limits.max_images} images, got {len(rows)}.")
    return rows


def _check_image(tensor: Tensor, index: int | None, limits: Limits) -> None:
    """Check `[3, H, W]` of the single image `index`, or a batch `[B, 3, H, W]`."""
    shape = list(tensor.shape)
    if tensor.dtype not in _DTYPES:
        raise WireError("bad_dtype", f"expected one of {[*map(str, _DTYPES)]}, got {tensor.dtype}.", index)
    if len(shape) != (4 if index is None else 3) or shape[-3] != 3 or min(shape) < 1:
        expected = "[B, 3, H, W]" if index is None else "[3, H, W]"
        raise WireError("bad_shape", f"expected images {expected} with B, H, W >= 1, got {shape!r:.80}.", index)
    if shape[-2] * shape[-1] > limits.max_pixels:
        raise WireError("too_many_pixels", f"expected at most {limits.max_pixels} pixels, got {shape!r:.80}.", index)


def _shapes(images: Tensor | list[Tensor]) -> list[torch.Size]:
    return [images.shape] if isinstance(images, Tensor) else [image.shape for image in images]


def _packed(images: Tensor) -> Tensor:
    """The smallest of uint8, float16 and float32 that holds the same float32 values, on the CPU."""
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(
            f"encode_request expected uint8 or floating-point images, got {images.dtype}. "
            "Convert with iqareward.to_images(...)."
        )
    images = images.detach().cpu().contiguous()
    if images.dtype in (torch.uint8, torch.float16):
        return images
    images = images.float()
    levels = torch.empty(images.shape, dtype=torch.uint8)
    for values, found in zip(
        images.view(-1).split(_VALUES_IN_CACHE), levels.view(-1).split(_VALUES_IN_CACHE), strict=True
    ):
        found.copy_((values * 255).round_().clamp_(0, 255))  # NaN becomes some level, and differs below
        # compared as bits: -0.0 == 0.0, and a wire that loses a sign is not lossless
        if not torch.equal(found.float().div_(255).view(torch.int32), values.view(torch.int32)):
            return images
    return levels


def _json_numbers(scores: Scores) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in scores.tolist()]


def _scores(row: list[float | None]) -> Scores:
    return torch.tensor([math.nan if value is None else value for value in row], dtype=torch.float32)
