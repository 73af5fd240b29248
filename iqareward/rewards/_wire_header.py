"""The safetensors header of a request, checked before any pixel is touched."""

import re
from dataclasses import dataclass
from typing import Any

from iqareward.rewards._wire_json import WireError, read_json

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
