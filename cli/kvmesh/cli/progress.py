"""A progress bar on stderr, for whatever takes longer than two seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmesh.cli.render import console


@contextmanager
def progress_bar(title: str, total: int, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """Gives a function that advances the bar by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
