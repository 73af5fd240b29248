"""The comparison as one HTML file: crops at full resolution where two images differ most, a slider between them."""

# ruff: noqa: RUF001  typographic signs are meant

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import numpy as np
from PIL import Image

import iqareward
from iqareward.cli.compare import COLUMNS, TEXT_COLUMNS, Comparison, listed, summary
from iqareward.cli.comparison import Choice, choose
from iqareward.cli.text import printable
from iqareward.images import to_images

CROP = 256  # side of a crop in pixels
OVERVIEW = 256  # longest side of an overview
MAX_BYTES = 32 * 2**20
SCALES = (4, 8, 16, 32, 64, 128, 255)  # differences that the brightest colour of a map can stand for
COLOURS = ("#000004", "#57106e", "#bc3754", "#f98e09", "#fcffa4")  # of a map, dark to bright: matplotlib's "inferno"


def render(comparison: Comparison, *, folder: Path, num_pairs: int, max_bytes: int = MAX_BYTES) -> str:
    """The page.

    Args:
        comparison: what was found.
        folder: where the page will be, for its links to the images.
        num_pairs: how many pairs to show; `choose` says which.
        max_bytes: a pair that would make the page larger is left out, with those after it.
    """
    template = resources.files("iqareward.cli").joinpath("compare.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    baseline, *methods = map(_text, comparison.titles)
    parts = {
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "colours": ", ".join(COLOURS),
        "title": f"{listed(methods)} against {baseline}",
        "baseline": baseline,
        "lede": _lede(comparison),
        "head": "".join(f"<th{_kind(column, column)}>{column}</th>" for column in COLUMNS),
        "rows": "".join(map(_body, comparison.table())),
        "left_out": _left_out(comparison),
        "made": f"Made by <code>iqareward compare</code> {iqareward.__version__}.",
    }
    choices, pairs = choose(comparison.scores, comparison.rewards, num_pairs), list[str]()
    room = max_bytes - sum(len(part.encode()) for part in (template, *parts.values(), parts["title"], _rule(99, 99)))
    for choice in choices:
        pair = _pair(comparison, choice, folder)
        room -= len(pair.encode())
        if room < 0:
            break
        pairs.append(pair)
    return Template(template).substitute(parts, rule=_rule(len(pairs), len(choices)), pairs="".join(pairs))


def _text(text: object) -> str:
    return escape(printable(text))


def _lede(comparison: Comparison) -> str:
    rewards = comparison.rewards
    counts = {"image": len(comparison.images), "reward": len(rewards)}
    parts = [", ".join(f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items()) + "."]
    for index, title in enumerate(comparison.titles[1:]):
        for verdict in ("better", "worse"):
            rows = zip(rewards, comparison.differences, strict=True)
            if agreeing := [_text(reward) for reward, row in rows if row[index].verdict == verdict]:
                parts.append(f"<b>{_text(title)}</b> is {verdict} by {listed(agreeing)}.")
    if len(parts) == 1:
        parts.append("No reward can tell the folders apart with this many images.")
    return " ".join(parts)


def _kind(column: str, text: str) -> str:
    verdict = f" {text}" if column == "verdict" else ""
    return f' class="text{verdict}"' if column in TEXT_COLUMNS else ""


def _body(group: Sequence[Sequence[str]]) -> str:
    rows = ""
    for row in group:
        cells = (
            f"<td{_kind(column, text)}>{_text(text) if column in TEXT_COLUMNS else _minus(text)}</td>"
            for column, text in zip(COLUMNS, row, strict=True)
        )
        rows += f"<tr>{''.join(cells)}</tr>"
    return f"<tbody>{rows}</tbody>"


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _left_out(comparison: Comparison) -> str:
    if not comparison.problems:
        return ""
    lines = "".join(f"<li>{_text(line)}</li>" for line in summary(comparison.problems))
    return f'<details class="note"><summary>What was left out, and why</summary><ul>{lines}</ul></details>'


def _rule(shown: int, chosen: int) -> str:
    fits = f" {chosen - shown} more did not fit into this page." if shown < chosen else ""
    return f"{shown} pair{'s' * (shown != 1)}.{fits}"


def _pair(comparison: Comparison, choice: Choice, folder: Path) -> str:
    """An image of a method beside that of the baseline."""
    sides = [0, choice.method]
    names = [comparison.titles[side] for side in sides]
    files = [comparison.files[choice.image][side] for side in sides]
    if (reference := comparison.references[choice.image]) is not None:
        names.append("reference")
        files.append(reference)
    scores = ""
    for column, reward in enumerate(comparison.rewards):
        digits = max(found.decimals for found in comparison.differences[column])
        old, new = comparison.scores[sides, choice.image, column].tolist()
        if new == new and old == old:
            kind = "better" if new > old else "worse" if new < old else ""
            change = f'{old:.{digits}f} → {new:.{digits}f} <span class="{kind}">({new - old:+.{digits}f})</span>'
            scores += f"<li>{_text(reward)} {_minus(change)}</li>"
    try:
        views = _views([_View(name, _link(file, folder), _read(file)) for name, file in zip(names, files, strict=True)])
    except (OSError, ValueError) as error:  # the file was there when it was scored
        views = f"<p>{_text(error)}</p>"
    return (
        f"<article><h3>{_text(comparison.images[choice.image])}</h3>"
        f'<p class="note">{_text(names[1])}: {_text(choice.reason)}</p><ul>{scores}</ul>{views}</article>'
    )


class _View(NamedTuple):
    """An image: what to call it, where its file is, `[H, W, 3]` uint8."""

    name: str
    link: str
    image: np.ndarray

    def caption(self) -> str:
        return f'<a href="{self.link}">{_text(self.name)}</a>'

    def crop(self, window: tuple[slice, slice], kind: str = "crop") -> str:
        return _crop(Image.fromarray(self.image[window]), "WEBP", self.name, kind, lossless=True)


def _link(file: Path, folder: Path) -> str:
    """A relative URL, so that the page can move together with the images."""
    relative = Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    return escape(quote_from_bytes(os.fsencode(relative)))


def _read(file: Path) -> np.ndarray:
    """`[H, W, 3]` uint8."""
    return to_images(file, value_range=(0, 1))[0].clamp_(0, 1).mul_(255).round_().byte().movedim(0, -1).numpy()


def _data(image: Image.Image, format: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _crop(image: Image.Image, format: str, alt: str, kind: str = "crop", **options: Any) -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="{kind}" src="{_data(image, format, **options)}" {size} alt="{_text(alt)}">'


def _views(views: Sequence[_View]) -> str:
    """The crops of the baseline, a method and perhaps the reference: a slider, the reference, a map, an overview."""
    first, second, *references = views
    if first.image.shape != second.image.shape:
        figures = [_figure(view.crop(_window(view.image, view.image)), view.caption()) for view in views]
        sizes = " and ".join(f"{view.image.shape[1]} × {view.image.shape[0]}" for view in views[:2])
        note = f"The two differ in size ({sizes} pixels). These are their centres."
        return f'<p class="note">{note}</p><div class="views">{"".join(figures)}</div>'
    window = _window(first.image, second.image)
    label = f'aria-label="Share of the width that shows {_text(first.name)}"'
    slider = (
        f'<div class="slider">{first.crop(window)}{second.crop(window, "crop over")}'
        f'<input type="range" min="0" max="100" value="50" {label}></div>'
    )
    figures = [_figure(slider, first.caption() + second.caption())]
    fitting = (view for view in references if view.image.shape == first.image.shape)
    figures += [_figure(view.crop(window), view.caption()) for view in fitting]
    figures += [_map(first.image[window], second.image[window]), _overview(second, window)]
    return f'<div class="views">{"".join(figures)}</div>'


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _window(first: np.ndarray, second: np.ndarray) -> tuple[slice, slice]:
    """Where two images of one shape differ most, by the sum of absolute differences; the centre if they are equal."""
    sides = [min(CROP, size) for size in first.shape[:2]]
    sums = np.abs(first.astype(np.int16) - second).sum(2, dtype=np.uint32)
    for side in sides:  # sums over windows of this height; the transpose brings the widths next
        # these totals may pass 2^32, but their differences are exact: unsigned integers wrap around
        totals = np.cumsum(np.pad(sums, ((1, 0), (0, 0))), 0, dtype=np.uint32)
        sums = (totals[side:] - totals[:-side]).T
    corner = np.unravel_index(sums.argmax(), sums.shape)
    if not sums.any():
        corner = [(size - side) // 2 for size, side in zip(first.shape, sides, strict=False)]
    rows, columns = (slice(int(start), int(start) + side) for start, side in zip(corner, sides, strict=True))
    return rows, columns


def _map(first: np.ndarray, second: np.ndarray) -> str:
    """The largest difference among the channels of each pixel."""
    steps = np.abs(first.astype(np.int16) - second).max(2)
    if not steps.any():
        return _figure("", "The two are equal.")
    scale = next(scale for scale in SCALES if scale >= np.quantile(steps, 0.995))
    image = Image.fromarray(np.minimum(steps * 255 // scale, 255).astype(np.uint8))
    anchors = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in COLOURS])
    positions = np.linspace(0, len(COLOURS) - 1, 256)
    ramp = [np.interp(positions, range(len(COLOURS)), channel).round() for channel in anchors.T]
    image.putpalette(np.stack(ramp, 1).astype(np.uint8).tobytes())
    return _figure(
        _crop(image, "PNG", "difference", optimize=True),
        f'<span>difference 0<span class="legend"></span>≥ {scale}</span>',
    )


def _overview(view: _View, window: tuple[slice, slice]) -> str:
    """The whole image, small, with the window marked."""
    rows, columns = window
    height, width = view.image.shape[:2]
    if view.image[window].shape == view.image.shape:
        return ""
    small = Image.fromarray(view.image)
    small.thumbnail((OVERVIEW, OVERVIEW))
    crop_width, crop_height = (part.stop - part.start for part in (columns, rows))
    box = f'<rect x="{columns.start}" y="{rows.start}" width="{crop_width}" height="{crop_height}"/>'
    whole = f'<image href="{_data(small, "JPEG", quality=85)}" width="{width}" height="{height}"/>'
    size = f'width="{small.width}" height="{small.height}" viewBox="0 0 {width} {height}"'
    drawing = f'<svg class="overview" {size} role="img" aria-label="where the crop is">{whole}{box}{box}</svg>'
    caption = f"<span>{crop_width} × {crop_height} of {width} × {height} pixels</span>"
    return _figure(f'<a href="{view.link}">{drawing}</a>', caption)
