"""Write scores as they come, so that an interrupted run loses nothing and can go on."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from rich.console import Console
from rich.table import Table

from iqareward.atomic import write_text


class Writer(Protocol):
    """Takes one image's scores at a time."""

    def write(self, path: str, scores: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class CsvWriter:
    """`path,<reward>,...` with a header; NaN (not scored) is an empty cell."""

    def __init__(self, stream: IO[str], rewards: Sequence[str], *, header: bool) -> None:
        self._stream, self._rewards = stream, rewards
        self._rows = csv.writer(stream, lineterminator="\n")
        if header:
            self._rows.writerow(["path", *rewards])

    def write(self, path: str, scores: Mapping[str, float]) -> None:
        self._rows.writerow([path, *("" if math.isnan(scores[r]) else repr(scores[r]) for r in self._rewards)])
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class JsonWriter:
    """One JSON object a line; NaN (not scored) is null."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, path: str, scores: Mapping[str, float]) -> None:
        clean = {name: None if math.isnan(score) else score for name, score in scores.items()}
        self._stream.write(json.dumps({"path": path, "scores": clean}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class TableWriter:
    """A table for reading, printed when all is scored, also after an interruption."""

    def __init__(self, rewards: Sequence[str]) -> None:
        self._rewards = rewards
        self._table = Table()
        self._table.add_column("image", overflow="fold")
        for reward in rewards:
            self._table.add_column(reward, justify="right")

    def write(self, path: str, scores: Mapping[str, float]) -> None:
        self._table.add_row(path, *("-" if math.isnan(scores[r]) else f"{scores[r]:.4f}" for r in self._rewards))

    def close(self) -> None:
        if self._table.row_count:
            Console().print(self._table)


def scored_paths(file: Path, rewards: Sequence[str]) -> set[str]:
    """The images that a results file already holds; a half-written last line is cut off.

    Args:
        file: `.csv` by `CsvWriter` or JSON lines by `JsonWriter`; may not exist.
        rewards: names that its rows must have.

    Raises:
        ValueError: the file holds other rewards, or something else.
    """
    if not file.exists():
        return set()
    text = file.read_text()
    complete = text[: text.rfind("\n") + 1]
    try:
        if not complete and text and not text.startswith(('{"path"', "path,")):
            raise KeyError("path")
        done = _json_paths(complete, rewards) if complete.startswith("{") else _csv_paths(complete, rewards)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no results file of this command. Choose another --output.") from error
    except _OtherRewardsError as error:
        raise ValueError(f"{file} holds scores of {error}, not of {list(rewards)}. Choose another --output.") from error
    if complete != text:  # only now that the file is known to be ours
        write_text(file, complete)
    return done


class _OtherRewardsError(Exception):
    pass


def _csv_paths(text: str, rewards: Sequence[str]) -> set[str]:
    if not text:
        return set()
    header, *rows = csv.reader(io.StringIO(text))
    if header[0] != "path":
        raise KeyError("path")
    if header[1:] != list(rewards):
        raise _OtherRewardsError(header[1:])
    return {row[0] for row in rows}


def _json_paths(text: str, rewards: Sequence[str]) -> set[str]:
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        if list(row["scores"]) != list(rewards):
            raise _OtherRewardsError(list(row["scores"]))
    return {row["path"] for row in rows}
