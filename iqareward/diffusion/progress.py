"""The bar that a run shows: how far it is and the figures that matter."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

# Few and short, so that a line of 80 columns keeps its bar.
FIGURES = {"reward": "reward", "difficulty": "difficulty", "sft_share": "sft", "active": "active"}
FIGURES_OF_SFT = {"sft_loss": "loss"}


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, shown: bool = True) -> Generator[Callable[..., None]]:
    """A bar on the error stream; call what it yields with the record of each update.

    Args:
        description: what is running.
        total: updates in all.
        done: updates done before, after a resume.
        shown: False draws nothing, e.g. on all processes but one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True), disable=not shown
    ) as bar:
        task = bar.add_task(description, total=total, completed=done, figures="")

        def advance(record: dict[str, Any]) -> None:
            names = FIGURES if "reward" in record else FIGURES_OF_SFT
            figures = "  ".join(f"{short} {record[name]:.3g}" for name, short in names.items() if name in record)
            bar.advance(task)
            if figures:
                bar.update(task, figures=figures)
            if record.get("alarms"):
                bar.console.print(f"update {record.get('update')}: {record['alarms']}", markup=False)

        yield advance
