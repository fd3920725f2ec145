"""What commands print: tables for people, one JSON document for programs."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console


PIPE_WIDTH = 200  # of what is no terminal and names no width: nothing should be cut off for grep


def console(stderr: bool = False) -> "Console":
    """Plain text without colours where the output is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, highlight=False, width=None if narrow else PIPE_WIDTH)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def plain(message: "Message") -> dict[str, Any]:
    """A message as JSON takes it: every field, bytes as hex, enums by name, integers as such."""
    return {
        field.name: _plain_field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _plain_field(field: Any, value: Any) -> Any:
    if field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_value(field, item) for item in value]
    return _plain_value(field, value)


def _plain_value(field: Any, value: Any) -> Any:
    if field.type == field.TYPE_MESSAGE:
        return plain(value)
    if field.type == field.TYPE_ENUM:
        return field.enum_type.values_by_number[value].name
    return value.hex() if isinstance(value, bytes) else value


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns whose name starts with '>' are numbers, set to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        # A narrow terminal folds text, since a name that is cut off cannot be used.
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console().print(table)


def print_markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table for a document; columns as in `print_table`."""
    typer.echo("| " + " | ".join(column.lstrip(">") for column in columns) + " |")
    typer.echo("|" + "|".join("---:" if c.startswith(">") else "---" for c in columns) + "|")
    for row in rows:
        typer.echo("| " + " | ".join(str(cell) for cell in row) + " |")


def size(num_bytes: float) -> str:
    """In binary units, three digits."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if num_bytes < 1024 ** (i + 1)), len(units) - 1)
    value = num_bytes / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 100 else f"{value:.3g} {units[power]}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
