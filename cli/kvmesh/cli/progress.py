"""A progress bar on stderr, for whatever takes longer than two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from kvmesh.cli.render import console


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int = 1) -> None: ...


@contextmanager
def progress_bar(title: str, total: int, hidden: bool = False) -> Iterator[Advance]:
    """Gives a function that advances the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps=1: bar.advance(task, steps)
