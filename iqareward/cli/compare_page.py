"""The comparison as one HTML document without outside resources."""

# ruff: noqa: RUF001  typographic signs are meant

from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import torch
from torch.nn.functional import interpolate

import iqareward
from iqareward.cli.compare import Comparison
from iqareward.cli.comparison import Difference
from iqareward.demo.embed import picture
from iqareward.demo.palette import DAY, NIGHT
from iqareward.demo.wording import percent, signed
from iqareward.image_files import References
from iqareward.images import to_images

THUMBNAIL = 420  # longest side in the page, in pixels


def render(comparison: Comparison, *, reference: Path | None, num_pairs: int) -> str:
    """The page.

    Args:
        comparison: what was found.
        reference: folder of references, shown beside each pair.
        num_pairs: how many pairs to show, those with the largest disagreement.
    """
    first, second = map(escape, comparison.titles)
    template = resources.files("iqareward.cli").joinpath("compare.html").read_text(encoding="utf-8")
    shown = comparison.order[:num_pairs]
    return Template(template).substitute(
        day=DAY.css(),
        night=NIGHT.css(),
        first=first,
        second=second,
        columns=2 if reference is None else 3,
        lede=_lede(comparison),
        rows="".join(_row(row, first, second) for row in comparison.differences),
        sorted=_sorted(comparison, len(shown)),
        pairs="".join(_pair(comparison, index, reference) for index in shown),
        made=f"Made by <code>iqareward compare</code> {iqareward.__version__}.",
    )


def _lede(comparison: Comparison) -> str:
    counts = {
        name: [row.reward for row in comparison.differences if row.verdict == name] for name in ("first", "second")
    }
    first, second = map(escape, comparison.titles)
    parts = [f"{len(comparison.pairs)} pairs, {len(comparison.rewards)} reward{'s' * (len(comparison.rewards) > 1)}."]
    for name, title in (("second", second), ("first", first)):
        if counts[name]:
            parts.append(f"<b>{title}</b> is better by {', '.join(map(escape, counts[name]))}.")
    if not any(counts.values()):
        parts.append("No reward can tell the two apart with this many pairs.")
    if comparison.unpaired:
        parts.append(f"{comparison.unpaired} images are in only one of the folders.")
    return " ".join(parts)


def _row(row: Difference, first: str, second: str) -> str:
    better = {"first": first, "second": second, "unclear": "unclear"}[row.verdict]
    cells = (
        signed(row.first, 4),
        signed(row.second, 4),
        signed(row.mean, 4),
        f"{signed(row.low, 4)} to {signed(row.high, 4)}",
        percent(row.wins) if row.pairs else "–",
    )
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><td>{escape(row.reward)}</td>{numbers}<td class="verdict {row.verdict}">{better}</td></tr>'


def _sorted(comparison: Comparison, shown: int) -> str:
    if len(comparison.rewards) > 1:
        return f"The {shown} pairs about which the rewards contradict each other most."
    return f"The {shown} pairs that the reward finds furthest apart."


def _pair(comparison: Comparison, index: int, reference: Path | None) -> str:
    pair, titles = comparison.pairs[index], list(comparison.titles)
    files = [pair.first, pair.second]
    if reference is not None:
        files.append(References(reference).find(pair.relative))
        titles.append("reference")
    figures = "".join(
        f"<figure>{_thumbnail(file, title)}<figcaption>{escape(title)}</figcaption></figure>"
        for file, title in zip(files, titles, strict=True)
    )
    lines = []
    for column, name in enumerate(comparison.rewards):
        old, new = comparison.scores[:, index, column]
        tone = "second" if new > old else "first" if new < old else ""
        change = f'<span class="{tone}">({signed(new - old, 4)})</span>'
        lines.append(f"<li>{escape(name)} {signed(old, 4)} → {signed(new, 4)} {change}</li>")
    listed = "".join(lines)
    return (
        f'<article><p>{escape(str(pair.relative))}</p><div class="pictures">{figures}</div><ul>{listed}</ul></article>'
    )


def _thumbnail(file: Path, title: str) -> str:
    image = to_images(file, value_range=(0, 1))[0]
    scale = THUMBNAIL / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(scale * side)) for side in image.shape[1:]]
        with torch.no_grad():
            image = interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return picture(image, f"{title}: {file.name}")
