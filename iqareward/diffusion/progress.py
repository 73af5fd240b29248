"""Show the progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

# Few and short, so that a line of 80 columns keeps its bar.
FIGURES = {
    "reward": "reward {:.3g}",
    "difficulty": "difficulty {:.3g}",
    "sft_share": "sft {:.3g}",
    "has_signal": "signal {:.3g}",
}
_FIGURES_OF_SFT = {"sft_loss": "loss {:.3g}"}
_PLAIN_FIGURES = {
    "rl_loss": "rl_loss {:.3g}",
    "sft_loss": "sft_loss {:.3g}",
    "reward": "reward {:.3g}",
    "scored": "scored {:.0%}",
}

_Advance = Callable[[Mapping[str, Any]], None]


@contextmanager
def progress_bar(
    description: str, total: int, *, done: int = 0, shown: bool = True, every: float = 10.0
) -> Generator[_Advance]:
    """Show the progress of a run on the error stream; call what it yields with the record of each update.

    On a terminal and in a notebook it is a bar. Elsewhere, for example in the log of a batch job, it is plain lines:
    the first and the last update, and between them at most one in `every` seconds. `done` updates were done before a
    resume.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not shown:
        yield lambda record: None
        return
    # Rich can be told to take any stream for a terminal, for the sake of colours.
    bar = console.is_jupyter or (console.is_interactive and sys.stderr.isatty())
    with _bar(console, description, total, done) if bar else _lines(console, description, total, done, every) as show:
        yield show


@contextmanager
def _bar(console: Any, description: str, total: int, done: int) -> Generator[_Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
        task = bar.add_task(description, total=total, completed=done, figures="")

        def advance(record: Mapping[str, Any]) -> None:
            figures = _figures(record, FIGURES if "reward" in record else _FIGURES_OF_SFT)
            bar.advance(task)
            if figures:
                bar.update(task, figures=figures)
            _show_alarms(console, record)

        yield advance


@contextmanager
def _lines(console: Any, description: str, total: int, done: int, every: float) -> Generator[_Advance]:
    begun = time.monotonic()
    due, count, skipped, waiting = begun, 0, 0, ""

    def advance(record: Mapping[str, Any]) -> None:
        nonlocal due, count, skipped, waiting
        now, count, skipped = time.monotonic(), count + 1, skipped + record.get("skipped", 0)
        pace = (now - begun) / count
        minutes, seconds = divmod(round(pace * (total - done - count)), 60)
        words = [f"{description} {done + count}/{total}", _figures(record, _PLAIN_FIGURES)]
        words += [f"skipped {skipped}"] if "skipped" in record else []
        words += [f"{pace:.3g} s each", f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"]
        waiting = "  ".join(word for word in words if word)
        if now >= due:
            _print(console, waiting)
            due, waiting = now + every, ""
        _show_alarms(console, record)

    try:
        yield advance
    finally:
        if waiting:
            _print(console, waiting)


def _figures(record: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    return "  ".join(words.format(record[name]) for name, words in formats.items() if name in record)


def _show_alarms(console: Any, record: Mapping[str, Any]) -> None:
    if record.get("alarms"):
        _print(console, f"update {record.get('update')}: {record['alarms']}")


def _print(console: Any, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Show a line on the error stream."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
