"""Groups of options: one parameter of a verb, a settings record, becomes several options of its command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.logs import LogOptions

Verb = Callable[..., None]


def option(name: str, kind: Any, default: Any, about: Any) -> inspect.Parameter:
    """One option of a group; `about` is a typer.Option."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, about])


def grouped(
    verb: Verb, parameter: str, options: Sequence[inspect.Parameter], build: Callable[..., Any]
) -> Verb:
    """The verb with `options` in place of `parameter`, which gets what `build` makes of their values."""
    signature = inspect.signature(verb, eval_str=True)
    names = [each.name for each in options]

    @functools.wraps(verb)
    def with_group(**given: Any) -> None:
        values = {name: given.pop(name) for name in names}
        verb(**{parameter: build(**values)}, **given)

    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        parameters += (
            options if each.name == parameter else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        )
    with_group.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_group.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_group


_LOG_OPTIONS = (
    option("log_format", str, "text", typer.Option("--log-format", metavar="text|json", help="Log lines.")),
    option(
        "log_level", str, "info",
        typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
    ),
    option(
        "log_file", Path | None, None,
        typer.Option("--log-file", metavar="FILE", help="Log to here, 5 files of 10 MiB; default: stderr."),
    ),
)  # fmt: skip


def logs(verb: Verb) -> Verb:
    """A verb's parameter `log: LogOptions` becomes --log-format, --log-level, --log-file."""
    return grouped(
        verb,
        "log",
        _LOG_OPTIONS,
        lambda log_format, log_level, log_file: LogOptions(log_format, log_level, log_file),
    )
