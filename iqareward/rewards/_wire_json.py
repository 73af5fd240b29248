"""Strict JSON from foreign bytes, and the one error of the wire format."""

import json
from typing import Any

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
