"""Pictures and drawings as HTML that needs no other file."""

import base64
import io
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from torch import Tensor

from iqareward.demo.degradations import to_pil
from iqareward.demo.figures import panel_svg
from iqareward.demo.palette import DAY, NIGHT

QUALITY = 92
"""Of the embedded JPEG files: high enough that their own loss does not show beside the demonstrated one."""

NARROW = "(max-width: 700px)"
DARK = "(prefers-color-scheme: dark)"


def picture(pixels: Tensor, alt: str) -> str:
    """`[3, H, W]` as an `<img>`."""
    stream = io.BytesIO()
    to_pil(pixels).save(stream, format="JPEG", quality=QUALITY, subsampling=0)
    height, width = pixels.shape[1:]
    source = _data_url("image/jpeg", stream.getvalue())
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'


def drawing(
    draw: Callable[..., None], size: tuple[float, float], alt: str, *, narrow: tuple[float, float] | None = None
) -> str:
    """A panel as a `<picture>` that follows the reader's light or dark mode.

    Args:
        draw: called as `draw(axes, palette=palette)`.
        size: width and height in inches of 96 pixels.
        alt: what the drawing shows, for readers who cannot see it.
        narrow: another size for telephones, where text in a shrunk drawing would be too small.
    """
    sources = [(DARK, size, NIGHT)]
    if narrow is not None:
        sources = [(f"{NARROW} and {DARK}", narrow, NIGHT), (NARROW, narrow, DAY), *sources]
    alternatives = [
        f'<source media="{media}" {_sized("srcset", draw, inches, palette)}>' for media, inches, palette in sources
    ]
    return f'<picture>{"".join(alternatives)}<img {_sized("src", draw, size, DAY)} alt="{escape(alt)}"></picture>'


def _sized(attribute: str, draw: Callable[..., None], size: tuple[float, float], palette: Any) -> str:
    width, height = (round(96 * inches) for inches in size)
    source = _data_url("image/svg+xml", panel_svg(partial(draw, palette=palette), size, palette))
    return f'{attribute}="{source}" width="{width}" height="{height}"'


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
