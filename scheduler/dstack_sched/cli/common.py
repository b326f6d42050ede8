"""What the verbs share: options, where state lives, JSON, tables, progress."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from dstack_sched.adapters.logs import OURS, fields, logging_active
from dstack_sched.adapters.triton_connection import ConnectionOptions, parse_headers
from dstack_sched.cli.options import grouped, option
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
TritonServerOption = Annotated[
    Path | None,
    typer.Option(
        "--tritonserver",
        metavar="PATH",
        help="Triton's directory or binary; default: /opt/tritonserver, else the nvidia-pytriton wheel.",
    ),
]


# The options that stand for a verb's parameter `connection`: name, type (of the url: by the verb), option.
_CONNECTION_OPTIONS: tuple[tuple[str, Any, Any], ...] = (
    ("url", None, typer.Option("--url", metavar="HOST:PORT", help="Triton's gRPC endpoint.")),
    (
        "header",
        list[str] | None,
        typer.Option(
            "--header",
            metavar="KEY=VALUE",
            help="Sent with each call to Triton, for restricted protocols; KEY=@FILE reads the value there.",
        ),
    ),
    ("tls", bool, typer.Option("--tls", help="Encrypt the connection to Triton.")),
    ("tls_ca", Path | None, typer.Option("--tls-ca", metavar="FILE", help="PEM: who signs Triton's.")),
    ("tls_cert", Path | None, typer.Option("--tls-cert", metavar="FILE", help="PEM: our certificate.")),
    ("tls_key", Path | None, typer.Option("--tls-key", metavar="FILE", help="PEM: its private key.")),
)


def connects(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb's parameter `connection: ConnectionOptions` becomes --url, --header and --tls... on its
    command line; of type `ConnectionOptions | None` it is None where no --url is given."""
    wanted = inspect.signature(verb, eval_str=True).parameters["connection"].annotation
    optional = wanted != ConnectionOptions
    url_kind: Any = str | None if optional else str
    defaults = {"url": None if optional else DEFAULT_GRPC_URL, "tls": False}
    own = [
        option(name, kind or url_kind, defaults.get(name), about) for name, kind, about in _CONNECTION_OPTIONS
    ]

    def connection(url: str | None, header: list[str] | None, **tls: Any) -> ConnectionOptions | None:
        headers = parse_headers(header or ())
        if url is None and (headers or any(tls.values())):
            raise InputError("--header and --tls... say how to reach a Triton: give its --url HOST:PORT too")
        return None if url is None else ConnectionOptions(url, headers, **tls)

    return grouped(verb, "connection", own, connection)


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


def say(text: str, **about: Any) -> None:
    """One line for people, on stderr, so that stdout stays the result; where a log is kept, a line of it with
    the fields `about` it."""
    if logging_active():
        OURS.info("%s", text, extra=fields(**about))
    else:
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
