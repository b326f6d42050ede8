"""`dstackctl backend install`: put the backend `dstack` into an existing Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.server_install import install_backend
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, print_json, say

backend = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The Triton backend `dstack`. Example: dstackctl backend install /opt/tritonserver/backends",
)
app.add_typer(backend, name="backend")


@backend.callback()
def _root() -> None:
    """The Triton backend `dstack`."""


@backend.command()
def install(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Triton's backend directory: /opt/tritonserver/backends.")
    ],
    link: Annotated[bool, typer.Option("--link", help="Link to this checkout instead of copying.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Copy the backend into DIR/dstack; an older one of ours there is replaced.

    The Python environment that Triton's stub uses (the first python3 on its PATH) needs onnxruntime.

    Example: dstackctl backend install /opt/tritonserver/backends
    """
    target = install_backend(directory, link=link)
    if json_output:
        print_json({"version": 1, "backend": str(target), "link": link})
    else:
        say(f"{target}: installed; a running Triton takes it at the next load of a model")
