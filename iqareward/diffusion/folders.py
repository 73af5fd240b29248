"""Pairs of image files: which file is the ground truth of which, and crops that show the same place of both."""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iqareward.diffusion.degradations import Degradation, DegradationModel
from iqareward.diffusion.pairs import Item, PairSet
from iqareward.image_files import UnreadableImageError, find_images, read_image
from iqareward.images import to_images
from iqareward.seeds import id_list, uniform

READERS = 8  # threads that read a batch; Pillow decodes outside the interpreter lock
RULES: dict[str, tuple[str, str | None]] = {
    "same names": ("{name}", "{name}"),
    "div2k": ("{name}x#", "{name}"),
    "realsr": ("{name}_LR#", "{name}_HR"),
    "gopro": ("blur/{name}", "sharp/{name}"),
    "rain100": ("rain-{name}", "norain-{name}"),
    "reside": ("{name}_*_*", "{name}"),
    "no references": ("{name}", None),
}
"""Patterns of the degraded image and of its ground truth."""

_TABLES = {".csv": ",", ".tsv": "\t"}


class _Row(NamedTuple):
    """Where an input comes from."""

    name: str
    lq: Path | None
    gt: Path | None
    prompt: str
    task: str


@dataclass(frozen=True)
class FolderPairs(PairSet):
    """Pairs from image files: degraded images with their ground truth, without one, or made from it as it is read.

    A rule says which file is the ground truth of which. It is two patterns, of the degraded image and of its ground
    truth, without suffixes: `{word}` stands for one or more characters, which are the same in both, `*` for any
    characters and `#` for digits, none of them across folders. Both files may lie in any folder inside, the same for
    both. Known layouts have names:

    | `rule` | degraded | ground truth |
    |---|---|---|
    | `"same names"` | `{name}` in `degraded_folder` | `{name}` |
    | `"div2k"` | `{name}x#`, such as `0001x4.png` | `{name}` |
    | `"realsr"` | `{name}_LR#` | `{name}_HR` |
    | `"gopro"` | `blur/{name}` | `sharp/{name}` |
    | `"rain100"` | `rain-{name}` | `norain-{name}` |
    | `"reside"` | `{name}_*_*`, several for each | `{name}` |
    | `"no references"` | `{name}` | none |

    If both patterns are the same and there is no `degraded_folder`, the files are ground truth, and `degradation` makes
    the degraded images. Each id is one random crop of one file: with C crops per file, ids k * C to k * C + C - 1
    belong to file k, in the order of the names.

    Args:
        source: A folder, searched with all folders inside; or a table of files, as `.csv` or `.tsv` with a header or as
            a sequence of mappings, with `lq` or `gt` or both, and optionally `prompt` and `task`. Relative paths start
            at the folder of the table.
        size: Side of the ground truth's crop in pixels, a multiple of `scale`; None = whole images.
        degradation: How ground truth without a degraded file is degraded.
        seed: Integer >= 0; it decides crops, severities and noise.
        degraded_folder: The folder of the degraded images, if it is not `source`.
        crops: Number of crops of each file.
        rule: Name of a layout, or the two patterns; a field `{task}` in them names the task. Not used with a table.
        scale: How many times larger than the degraded file the ground truth is, exactly.
        one_severity: Whether an input has one severity that drives all of `degradation`; otherwise each of its steps
            draws its own strength, which for published degradations is as published.
        prompt: Prompt of every input that has no other; empty = none.
        task: Task of every input that has no other; empty = none.

    Raises:
        ValueError: There is no image, a folder cannot be searched whole, a file has no partner or several, or an option
            is out of its range.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 32), "red").save(f"{folder}/1.png")
        ...     Image.new("RGB", (10, 8), "red").save(f"{folder}/1x4.png")
        ...     item = FolderPairs(folder, size=16, rule="div2k", scale=4)[0]
        >>> item["lq"].shape, item["gt"].shape
        (torch.Size([3, 4, 4]), torch.Size([3, 16, 16]))
    """

    source: str | Path | Sequence[Mapping[str, Any]]
    size: int | None = None
    degradation: DegradationModel = field(default_factory=Degradation)
    seed: int = 0
    degraded_folder: str | Path | None = None
    crops: int = 1
    rule: str | tuple[str, str | None] = "same names"
    scale: int = 1
    one_severity: bool = True
    prompt: str = ""
    task: str = ""

    def __post_init__(self) -> None:
        if self.crops < 1 or self.scale < 1 or (self.size is not None and self.size < 1):
            raise ValueError(
                f"FolderPairs expected size >= 1, crops >= 1 and scale >= 1, got {self.size}, {self.crops} and "
                f"{self.scale}."
            )
        if self.size is None and self.crops > 1:
            raise ValueError(f"FolderPairs expected crops=1 for whole images, got {self.crops}. Give a size.")
        made = any(row.lq is None for row in self._rows)  # a missing file is an error now, not after hours
        scale = self.degradation.scale if made else self.scale
        if self.size is not None and (self.size % scale or self.size % self.scale):
            raise ValueError(f"FolderPairs expected a size that is a multiple of the scale {scale}, got {self.size}.")

    @cached_property
    def names(self) -> list[str]:
        """The files, of a pair the degraded one, in the order of the ids; relative to their folder."""
        return [row.name for row in self._rows]

    def severities(self, ids: Sequence[int]) -> Tensor:
        """How strongly `degradation` degrades each input, `[B]` uniform in [0, 1), larger = worse."""
        return uniform(id_list("FolderPairs", ids), seed=self.seed, purpose="severity")

    def __len__(self) -> int:
        return len(self._rows) * self.crops

    @cached_property
    def _rows(self) -> list[_Row]:
        if isinstance(self.source, str | Path):
            source = Path(self.source)
            rows = _read_table(source) if source.suffix.lower() in _TABLES else self._search(source)
        else:
            rows = [_table_row(cells, Path(), f"row {place}") for place, cells in enumerate(self.source)]
        if not rows:
            raise ValueError(f"FolderPairs expected at least one image, found none in {self.source}.")
        return [row._replace(prompt=row.prompt or self.prompt, task=row.task or self.task) for row in rows]

    def _search(self, source: Path) -> list[_Row]:
        lq_pattern, gt_pattern = _patterns(self.rule)
        if gt_pattern is None:
            if self.degraded_folder is not None:
                raise ValueError("FolderPairs expected no `degraded_folder` without references. Give it as `source`.")
            return [_Row(found.name, found.path, None, "", found.task) for found in _matching(source, lq_pattern)]
        if self.degraded_folder is None and lq_pattern == gt_pattern:
            return [_Row(found.name, None, found.path, "", found.task) for found in _matching(source, gt_pattern)]
        degraded = _matching(Path(self.degraded_folder or source), lq_pattern)
        paths = {found.path for found in degraded}
        truths: dict[str, list[_Found]] = {}
        for found in _matching(source, gt_pattern):
            if found.path not in paths:
                truths.setdefault(found.stem, []).append(found)
        wanted = {found.name: found.folders + gt_pattern.format(**found.words) for found in degraded}
        pairs = [(found, truths.get(wanted[found.name], [])) for found in degraded]
        stems = Counter(found.stem for found in degraded)
        unused = set(truths) - set(wanted.values())
        problems = [
            *(f"{found.path} has no ground truth {source / wanted[found.name]}" for found, own in pairs if not own),
            *(f"{truths[stem][0].path} is the ground truth of no degraded image" for stem in sorted(unused)),
            *(
                f"{own[0].path} and {own[1].path} are both ground truth of {found.name}"
                for found, own in pairs
                if own[1:]
            ),
            *(f"{found.path} is not the only image of that name" for found in degraded if stems[found.stem] > 1),
        ]
        if problems:
            raise ValueError(
                f"FolderPairs expected one ground truth for each degraded image by the rule {self.rule!r}, but "
                f"{len(problems)} of {len(degraded)} do not fit, the first being: {problems[0]}. Add, rename or remove "
                "files."
            )
        return [_Row(found.name, found.path, own[0].path, "", found.task or own[0].task) for found, own in pairs]

    def _items(self, ids: list[int]) -> list[Item]:
        rows = [self._rows[input_id // self.crops] for input_id in ids]
        corners = uniform(ids, 2, seed=self.seed, purpose="crop").tolist()
        with ThreadPoolExecutor(READERS) as readers:
            items = list(readers.map(self._crops, rows, corners))
        to_make: dict[torch.Size, list[int]] = {}
        for place, item in enumerate(items):
            if "lq" not in item:
                to_make.setdefault(item["gt"].shape, []).append(place)
        for places in to_make.values():
            own = [ids[place] for place in places]
            severities = self.severities(own) if self.one_severity else None
            references = torch.stack([items[place]["gt"] for place in places])
            degraded = self.degradation(references, severities, own, seed=self.seed)
            for place, image in zip(places, degraded, strict=True):
                items[place] = {"lq": image} | items[place]
        texts = ({"prompt": row.prompt, "task": row.task} for row in rows)
        return [item | {key: text for key, text in own.items() if text} for item, own in zip(items, texts, strict=True)]

    def _crops(self, row: _Row, corner: tuple[float, float]) -> dict[str, Any]:
        """The crops of the files, at the same place of both; a cell of the grid is a pixel of the degraded image."""
        images = {key: _read(path) for key, path in (("lq", row.lq), ("gt", row.gt)) if path is not None}
        cell = self.degradation.scale if row.lq is None else 1
        grid = images.get("lq", images.get("gt"))
        assert grid is not None  # a row has a file
        height, width = grid.shape[:2]
        if len(images) == 2 and images["gt"].shape[:2] != (height * self.scale, width * self.scale):
            raise ValueError(
                f"FolderPairs expected {row.gt} to be {self.scale} times {row.lq}, {width * self.scale} x "
                f"{height * self.scale}, got {images['gt'].shape[1]} x {images['gt'].shape[0]}. Set `scale`, or resize "
                "it."
            )
        enlarged = 1 if row.lq is None else self.scale
        if self.size is None:
            tall, wide = height // cell * cell, width // cell * cell
        else:
            tall = wide = self.size // enlarged
        if not 0 < tall <= height or not 0 < wide <= width:
            least = f"{max(tall, 1)} x {max(wide, 1)}"
            raise ValueError(
                f"FolderPairs expected images of at least {least}, got {row.lq or row.gt} of {width} x {height}. Lower "
                "`size` or remove the file."
            )
        top, left = (int(at * (free + 1)) for at, free in zip(corner, (height - tall, width - wide), strict=True))
        crops = {
            key: image[top * unit : (top + tall) * unit, left * unit : (left + wide) * unit]
            for (key, image), unit in zip(images.items(), (1, enlarged), strict=False)
        }
        return {key: to_images(crop, value_range=(0, 1))[0] for key, crop in crops.items()}


class _Found(NamedTuple):
    """A file that matches a pattern."""

    name: str  # relative to the folder that was searched
    path: Path
    folders: str  # those before the pattern, ending with "/", or empty
    words: dict[str, str]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).with_suffix("").as_posix()

    @property
    def task(self) -> str:
        return self.words.get("task", "")


def _matching(folder: Path, pattern: str) -> list[_Found]:
    """The images under a folder whose paths without suffix end as `pattern` says, sorted."""
    if not folder.is_dir():
        raise ValueError(f"FolderPairs expected a folder of images, got {folder}.")
    files, problems = find_images([folder])
    for path, problem in problems.items():  # a part of the data must not be missing without a word
        raise ValueError(f"FolderPairs cannot use {path}: {problem}. Repair or remove it.")
    expression, found = _expression(pattern), list[_Found]()
    for name in sorted(relative.as_posix() for relative in files.values()):
        match = expression.fullmatch(PurePosixPath(name).with_suffix("").as_posix())
        if match:
            words = {key: text for key, text in match.groupdict().items() if key != "_folders"}
            found.append(_Found(name, folder / name, match["_folders"] or "", words))
    if not found:
        raise ValueError(f"FolderPairs expected images named as {pattern!r} in {folder}, got none of {len(files)}.")
    return found


def _expression(pattern: str) -> re.Pattern[str]:
    parts, words = ["(?P<_folders>(?:[^/]+/)*)"], set[str]()
    for text in re.split(r"(\{[a-z]+\}|[*#])", pattern):
        word = text[1:-1] if re.fullmatch(r"\{[a-z]+\}", text) else ""
        if word:
            parts.append(f"(?P={word})" if word in words else f"(?P<{word}>[^/]+)")
            words.add(word)
        else:
            parts.append({"*": "[^/]*", "#": "[0-9]+"}.get(text) or re.escape(text))
    return re.compile("".join(parts))


def _patterns(rule: str | tuple[str, str | None]) -> tuple[str, str | None]:
    patterns = RULES.get(rule) if isinstance(rule, str) else rule
    if patterns is None or len(patterns) != 2:
        raise ValueError(f"FolderPairs expected `rule` as two patterns or one of {', '.join(RULES)}, got {rule!r}.")
    degraded, truth = patterns
    words = set(re.findall(r"\{([a-z]+)\}", degraded))
    if truth is not None and (re.search("[*#]", truth) or not set(re.findall(r"\{(.*?)\}", truth)) <= words):
        raise ValueError(
            f"FolderPairs expected the pattern of the ground truth to follow from {degraded!r}, got {truth!r}. Use the "
            "words of the first pattern, and no * or #."
        )
    return degraded, truth


def _read_table(path: Path) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file, delimiter=_TABLES[path.suffix.lower()]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"FolderPairs could not read the table {path}: {error}.") from error
    return [_table_row(cells, path.parent, f"{path}, row {place}") for place, cells in enumerate(table, 1)]


def _table_row(cells: Mapping[str, Any], folder: Path, where: str) -> _Row:
    files = {key: folder / cells[key] for key in ("lq", "gt") if cells.get(key)}
    if not files:
        raise ValueError(f"FolderPairs expected a file as 'lq' or 'gt' in {where}, got the columns {list(cells)}.")
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"FolderPairs expected files, but {where} names {path}, which is not there.")
    lq, gt = files.get("lq"), files.get("gt")
    return _Row(str(lq or gt), lq, gt, cells.get("prompt") or "", cells.get("task") or "")


def _read(path: Path) -> np.ndarray:
    try:
        pixels = read_image(path)
    except UnreadableImageError as error:
        raise ValueError(f"FolderPairs could not read {error}. Repair or remove the file.") from error
    if pixels.dtype == np.float32 and not 0 <= pixels.min() <= pixels.max() <= 1:  # false for NaN too
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"FolderPairs expected floats in [0, 1], got {path} with {span}. Scale them.")
    return pixels
