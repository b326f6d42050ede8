"""The command line: one module a verb; each wires adapters into a use case and prints its result.

Exit status: 0 done; 1 the thing asked for is not so (infeasible, SLO missed); 2 bad usage or input.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

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

# One module a verb, imported when it is asked for: `dstackctl arbiter` must not wait for cvxpy and gRPC.
VERBS = (
    "adopt",
    "apply",
    "arbiter",
    "backend",
    "bench",
    "demo",
    "doctor",
    "gpus",
    "mps",
    "plan",
    "profile",
    "revert",
    "run",
    "serve",
    "simulate",
    "status",
)


@app.callback()
def _root() -> None:
    """With a callback, typer keeps verbs apart even where only one is registered."""


def register(arguments: Sequence[str]) -> None:
    """Import the module of the verb that is named first in the arguments; all of them for anything else."""
    named = next((each for each in arguments if not each.startswith("-")), None)
    for verb in (named,) if named in VERBS else VERBS:
        importlib.import_module(f"dstack_sched.cli.{verb}")


def main() -> None:
    """Entry point of `dstackctl`."""
    try:
        register(sys.argv[1:])
        app()
    except DstackError as error:
        print(f"dstackctl: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(0)
