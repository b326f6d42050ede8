"""What the verbs share: options, where state lives, JSON, tables, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dstack_sched.errors import InputError

DEFAULT_GRPC_URL = "127.0.0.1:8001"


def default_state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$XDG_STATE_HOME/dstack, else ~/.local/state/dstack."""
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "dstack"


StateOption = Annotated[
    Path,
    typer.Option(
        "--state",
        default_factory=default_state_dir,
        show_default="~/.local/state/dstack",
        metavar="DIR",
        help="Where profiles and journals are kept.",
    ),
]
UrlOption = Annotated[
    str,
    typer.Option("--url", metavar="HOST:PORT", help="Triton's gRPC endpoint."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
TritonServerOption = Annotated[
    Path | None,
    typer.Option(
        "--tritonserver",
        metavar="PATH",
        help="Triton's directory or binary; default: /opt/tritonserver, else the nvidia-pytriton wheel.",
    ),
]


def state_dir(path: Path) -> Path:
    """Make the state directory (0700). Raises InputError where it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"state directory {path}: {error.strerror}; choose another with --state DIR"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"state directory {path} is not writable; choose another with --state DIR")
    return path


def console() -> Console:
    """Where tables go: stdout; plain and 110 columns wide when it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=110, no_color=True, highlight=False)


def say(text: str) -> None:
    """One line for people, on stderr, so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def print_json(document: Any) -> None:
    """The one JSON document of a verb, on stdout."""
    print(json.dumps(document, indent=2, sort_keys=False, allow_nan=False))  # noqa: T201


def cell(value: Any) -> str:
    """A table cell: floats with three significant digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Columns of text (the first one always) are left-aligned, columns of numbers right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        text = index == 0 or any(isinstance(row[index], str) for row in rows)
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    return table


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One table on stdout."""
    console().print(make_table(title, columns, rows))


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr; silent when stderr is not a terminal."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        yield bar
