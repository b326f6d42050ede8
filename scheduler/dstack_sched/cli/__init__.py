"""The command line: one module a verb; each wires adapters into a use case and prints its result.

Exit status: 0 done; 1 the thing asked for is not so (infeasible, SLO missed); 2 bad usage or input.
"""

from __future__ import annotations

import sys

import typer

from dstack_sched.errors import DstackError

app = typer.Typer(
    name="dstackctl",
    help="D-STACK for Triton: share a GPU among models in space and time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of `dstackctl`."""
    try:
        app()
    except DstackError as error:
        print(f"dstackctl: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(0)
