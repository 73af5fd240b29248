"""Pictures and drawings as HTML that needs no other file."""

import base64
import io
import re
from collections.abc import Callable
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
    draw: Callable[[Any], None], size: tuple[float, float], alt: str, *, narrow: tuple[float, float] | None = None
) -> str:
    """A panel as a `<picture>` that follows the reader's light or dark mode.

    Args:
        draw: `draw(axes)`, in the colours of the day.
        size: width and height in inches of 96 pixels.
        alt: what the drawing shows, for readers who cannot see it.
        narrow: another size for telephones, where text in a shrunk drawing would be too small.
    """
    wide = panel_svg(draw, size)
    sources = [(DARK, size, by_night(wide))]
    if narrow is not None:
        slim = panel_svg(draw, narrow)
        sources = [(f"{NARROW} and {DARK}", narrow, by_night(slim)), (NARROW, narrow, slim), *sources]
    alternatives = [f'<source media="{media}" {_sized("srcset", inches, svg)}>' for media, inches, svg in sources]
    return f'<picture>{"".join(alternatives)}<img {_sized("src", size, wide)} alt="{escape(alt)}"></picture>'


def by_night(svg: str) -> str:
    """A drawing in the colours of the day in those of the night; cheaper than drawing it again.

    Example:
        >>> by_night(f"fill: {DAY.ink}") == f"fill: {NIGHT.ink}"
        True
    """
    night = dict(zip(DAY.colours(), NIGHT.colours(), strict=True))
    return re.sub("|".join(night), lambda match: night[match[0]], svg)


def _sized(attribute: str, size: tuple[float, float], svg: str) -> str:
    width, height = (round(96 * inches) for inches in size)
    return f'{attribute}="{_data_url("image/svg+xml", svg.encode())}" width="{width}" height="{height}"'


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
