"""The comparison as one HTML file: crops at full resolution where two images differ most, and a slider between them."""

# ruff: noqa: RUF001  typographic signs are meant

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from html import escape
from itertools import product
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote_from_bytes

import numpy as np
from PIL import Image

import iqareward
from iqareward.cli.compare import COLUMNS, TEXT_COLUMNS, Comparison, listed, summary
from iqareward.cli.text import printable
from iqareward.images import to_images

CROP = 256  # side of a crop in pixels
_MAX_BYTES = 32 * 2**20
_SCALES = (4, 8, 16, 32, 64, 128, 255)  # differences that white can stand for in a map
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1c1b1a; --muted: #66625d; --line: #e3dfd9;
  --better: #0068a6; --worse: #b84c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #151517; --ink: #ece9e4; --muted: #a19c95; --line: #34343a;
  --better: #56b4e9; --worse: #f08a4b; } }
body { max-width: 1120px; margin: 32px auto; padding: 0 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
a { color: inherit; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
.text { text-align: left; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.note, th, figcaption, footer { color: var(--muted); font-size: 14px; font-weight: 400; }
article, footer { border-top: 1px solid var(--line); margin-top: 22px; }
article ul { list-style: none; padding: 0; font-size: 14px; }
.views { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 16px 20px; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; }
img { display: block; image-rendering: pixelated; }
.slider { position: relative; width: fit-content; --at: 50%; }
.slider .over { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.slider::after { content: ""; position: absolute; inset: 0 auto 0 var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px #000; pointer-events: none; }
.slider:focus-within { outline: 3px solid var(--better); }
.slider input { position: absolute; inset: 0; z-index: 1; width: 100%; height: 100%; margin: 0; opacity: 0; }
"""
_SCRIPT = """
for (const range of document.querySelectorAll(".slider input")) {
  const move = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", move);
  move();
}
"""
# of a page that loads nothing and runs no script but its own
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src '$script_source'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
"""
_PAGE = (
    HEAD
    + """\
<body>
<h1>$title</h1>
<div><table>
<thead><tr>$head</tr></thead>
$rows
</table></div>
<p class="note">Higher is better. “Images” counts those that all folders hold and this reward scored in all of them.
Differences are paired with the baseline, <b>$baseline</b>, with a 95&nbsp;% bootstrap interval; the verdict is
“unclear” where it contains zero. “Wins” is the share of images that score higher than in the baseline; ties count
half.</p>
$left_out
<h2>Where to look</h2>
<p>$shown The pairs are taken in turn from the largest gains and losses by each reward, the differences closest to its
median, and the images about which the rewards contradict each other most. A crop shows unscaled pixels where the two
images differ most; the names under it link to the whole images. Drag the line between two images, or focus it and
press ← or →. The map shows the largest difference among the channels of each pixel, in steps of 1/255.</p>
$pairs
<footer><p>Made by <code>iqareward compare</code> $version.</p></footer>
<script>$script</script>
</body>
</html>
"""
)


class _Choice(NamedTuple):
    """An image to look at: the index of its folder from 1 (0 is the baseline), its own index, and the reason."""

    method: int
    image: int
    reason: str


def choose(scores: np.ndarray, rewards: Sequence[str], count: int) -> list[_Choice]:
    """The images to look at, from `[F, N, R]` scores of F folders, the baseline first; NaN = not scored.

    For each folder there are these lists: the images about which the rewards contradict each other most; and for each
    reward its largest gains, its largest losses, and the images whose difference is closest to the median. The lists
    of all folders take turns, each with its next image, until `count` pairs are chosen.
    """
    change = scores[1:] - scores[0]
    keys: dict[str, np.ndarray] = {}  # reason -> `[F - 1, N]`, the largest come first, NaN never
    if len(rewards) > 1:
        keys["strongest contradiction between the rewards"] = _contradiction(change)
    for column, reward in enumerate(rewards):
        values = change[..., column]
        keys[f"largest gain by {reward}"] = np.where(values > 0, values, np.nan)
        keys[f"largest loss by {reward}"] = np.where(values < 0, -values, np.nan)
        known = np.where(np.isfinite(values).any(1, keepdims=True), values, 0.0)
        keys[f"typical by {reward}"] = -np.abs(values - np.nanmedian(known, 1, keepdims=True))
    lists = [
        (reason, method, np.argsort(-row, kind="stable")[: np.isfinite(row).sum()].tolist())
        for reason, rows in keys.items()
        for method, row in enumerate(rows, start=1)
    ]
    chosen: dict[tuple[int, int], _Choice] = {}
    for place, (reason, method, images) in product(range(scores.shape[1]), lists):
        if place < len(images) and len(chosen) < count:
            rank = "" if place == 0 or reason.startswith("typical") else f", rank {place + 1}"
            chosen.setdefault((method, images[place]), _Choice(method, images[place], reason + rank))
    return list(chosen.values())


def _contradiction(change: np.ndarray) -> np.ndarray:
    """Distance between the most and the least favourable reward; NaN unless one says better and one worse.

    Differences are divided by their root mean square per reward, so that rewards in dB and in [0, 1] can be compared.
    """
    scored = np.isfinite(change)
    known = np.where(scored, change, 0.0)
    scale = np.sqrt((known**2).sum(1, keepdims=True) / np.maximum(scored.sum(1, keepdims=True), 1))
    unit = known / np.where(scale > 0, scale, 1.0)
    best, worst = unit.max(2), unit.min(2)
    return np.where((best > 0) & (worst < 0), best - worst, np.nan)


def render(comparison: Comparison, *, folder: Path, num_pairs: int, max_bytes: int = _MAX_BYTES) -> str:
    """The page, for a file in `folder`, from which its links start.

    It shows the `num_pairs` pairs that `choose` takes, without those that would make it larger than `max_bytes`.
    """
    baseline, *methods = map(escaped, comparison.titles)
    parts = {
        "script_source": f"sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}",
        "script": _SCRIPT,
        "style": STYLE,
        "title": f"{listed(methods)} against {baseline}",
        "baseline": baseline,
        "head": "".join(f"<th{_kind(column)}>{column}</th>" for column in COLUMNS),
        "rows": "".join(map(_body, comparison.table())),
        "left_out": _left_out(comparison),
        "version": iqareward.__version__,
    }
    choices, pairs = choose(comparison.scores, comparison.rewards, num_pairs), list[str]()
    room = max_bytes - len(Template(_PAGE).substitute(parts, shown=_shown(99, 99), pairs="").encode())
    for choice in choices:
        pair = _pair(comparison, choice, folder)
        room -= len(pair.encode())
        if room < 0:
            break
        pairs.append(pair)
    return Template(_PAGE).substitute(parts, shown=_shown(len(pairs), len(choices)), pairs="".join(pairs))


def escaped(text: object) -> str:
    return escape(printable(text))


def _kind(column: str, text: str = "") -> str:
    return f' class="text {text if column == "verdict" else ""}"' if column in TEXT_COLUMNS else ""


def _body(group: Sequence[Sequence[str]]) -> str:
    rows = ""
    for row in group:
        cells = zip(COLUMNS, row, strict=True)
        rows += f"<tr>{''.join(f'<td{_kind(column, text)}>{escaped(text)}</td>' for column, text in cells)}</tr>"
    return f"<tbody>{rows}</tbody>"


def _left_out(comparison: Comparison) -> str:
    lines = "".join(f"<li>{escaped(line)}</li>" for line in summary(comparison.problems))
    return (
        f'<details class="note"><summary>Files that were left out</summary><ul>{lines}</ul></details>' if lines else ""
    )


def _shown(shown: int, chosen: int) -> str:
    more = f" {chosen - shown} more did not fit into this page." if shown < chosen else ""
    return f"{shown} pair{'s' * (shown != 1)}.{more}"


def _pair(comparison: Comparison, choice: _Choice, folder: Path) -> str:
    """An image of a folder beside that of the baseline."""
    path, files = list(comparison.images.items())[choice.image]
    sides = [0, choice.method]
    shown = [(comparison.titles[side], files[side]) for side in sides]
    if (reference := comparison.references[choice.image]) is not None:
        shown.append(("reference", reference))
    scores = ""
    for column, reward in enumerate(comparison.rewards):
        digits = max(found.decimals for found in comparison.differences[column])
        old, new = comparison.scores[sides, choice.image, column].tolist()
        if new == new and old == old:
            kind = "better" if new > old else "worse" if new < old else ""
            change = f'{old:.{digits}f} → {new:.{digits}f} <span class="{kind}">({new - old:+.{digits}f})</span>'
            scores += f"<li>{escaped(reward)} {change}</li>"
    try:
        views = _views([_View(name, _link(file, folder), read_pixels(file)) for name, file in shown])
    except (OSError, ValueError) as error:  # the file was there when it was scored
        views = f"<p>{escaped(error)}</p>"
    reason = f"{escaped(comparison.titles[choice.method])}: {escaped(choice.reason)}"
    return f'<article><h3>{escaped(path)}</h3><p class="note">{reason}</p><ul>{scores}</ul>{views}</article>'


def _link(file: Path, folder: Path) -> str:
    """A relative URL, so that the page can move together with the images."""
    return escape(quote_from_bytes(os.fsencode(Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix())))


def read_pixels(file: Path) -> np.ndarray:
    """`[H, W, 3]` uint8."""
    return to_images(file, value_range=(0, 1))[0].clamp_(0, 1).mul_(255).round_().byte().movedim(0, -1).numpy()


class _View(NamedTuple):
    """An image `[H, W, 3]` uint8 with its name and the link to its file."""

    name: str
    link: str
    image: np.ndarray

    def caption(self) -> str:
        return f'<a href="{self.link}">{escaped(self.name)}</a>'

    def crop(self, window: tuple[slice, slice], kind: str = "") -> str:
        return picture(self.image[window], self.name, kind)


def picture(pixels: np.ndarray, name: str, kind: str = "") -> str:
    """`[H, W]` or `[H, W, 3]` uint8 without loss."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    image.save(stream, "WEBP", lossless=True)
    source = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<img class="{kind}" src="{source}" width="{image.width}" height="{image.height}" alt="{escaped(name)}">'


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _views(views: Sequence[_View]) -> str:
    """The crops of the baseline, a folder and perhaps the reference: a slider, the reference and a map."""
    first, second, *references = views
    if first.image.shape != second.image.shape:
        figures = [_figure(view.crop(_window(view.image, view.image)), view.caption()) for view in views]
        sizes = " and ".join(f"{view.image.shape[1]} × {view.image.shape[0]}" for view in views[:2])
        note = f"The two differ in size ({sizes} pixels). These are their centres."
        return f'<p class="note">{note}</p><div class="views">{"".join(figures)}</div>'
    window = _window(first.image, second.image)
    label = f'aria-label="Share of the width that shows {escaped(first.name)}"'
    slider = (
        f'<div class="slider">{first.crop(window)}{second.crop(window, "over")}'
        f'<input type="range" min="0" max="100" value="50" {label}></div>'
    )
    figures = [_figure(slider, first.caption() + second.caption())]
    figures += [
        _figure(view.crop(window), view.caption()) for view in references if view.image.shape == first.image.shape
    ]
    figures.append(_map(first.image[window], second.image[window]))
    rows, columns = window
    height, width = first.image.shape[:2]
    note = (
        f"Columns {columns.start} to {columns.stop} and rows {rows.start} to {rows.stop} of {width} × {height} pixels."
    )
    return f'<p class="note">{note}</p><div class="views">{"".join(figures)}</div>'


def _window(first: np.ndarray, second: np.ndarray) -> tuple[slice, slice]:
    """The window with the largest sum of absolute differences of two images; the centre if they are equal."""
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
    """The largest difference among the channels of each pixel, black to white."""
    steps = np.abs(first.astype(np.int16) - second).max(2)
    if not steps.any():
        return _figure("", "The two are equal.")
    scale = next(scale for scale in _SCALES if scale >= np.quantile(steps, 0.995))
    pixels = np.minimum(steps * 255 // scale, 255).astype(np.uint8)
    return _figure(picture(pixels, "difference"), f"difference: black 0, white ≥ {scale}")
