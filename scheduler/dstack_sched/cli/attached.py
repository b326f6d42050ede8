"""The Triton over whose repository a verb works, as far as there is one, and what it can be told to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.stub_processes import LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.edits import ConfigEdits
from dstack_sched.cli.common import DEFAULT_GRPC_URL, say
from dstack_sched.cli.deployment import locked_edits
from dstack_sched.errors import InputError


@dataclass(frozen=True)
class Attached:
    """server None: none, or one that cannot be told to load. states: model -> state, of such a server.

    advice: what the operator has to do so that changed configs come into force; "" where nothing is.
    """

    server: TritonClient | None
    states: Mapping[str, str] | None
    advice: str

    def check_serves(self, models: Iterable[str], repository: Path) -> None:
        """Errors: InputError where the server does not have one of these models."""
        for model in models:
            if self.server is not None and self.states is not None and model not in self.states:
                raise InputError(
                    f"Triton at {self.server.url} has no model {model}; give the --url of the one that "
                    f"serves {repository}, or stop it and leave --url out"
                )


@contextmanager
def attached(connection: ConnectionOptions | None, repository: Path) -> Iterator[Attached]:
    """The Triton named, else the one at the usual address of this host if it serves this repository.

    Errors: MachineError where the one named does not answer, ServerError where it refuses.
    """
    if connection is None and serves(DEFAULT_GRPC_URL, repository):
        connection = ConnectionOptions(DEFAULT_GRPC_URL)
        say(f"Triton at {DEFAULT_GRPC_URL} serves {repository}")
    if connection is None:
        yield Attached(
            None, None, "no Triton was told: load the models there, or start it, to put the configs in force"
        )
        return
    with TritonClient(connection) as server:
        server.require_ready()
        if server.takes_loads():
            yield Attached(server, server.models(), "")
        else:
            yield Attached(None, None, _advice(connection.url))


@contextmanager
def at_work(
    connection: ConnectionOptions | None, repository: DiskRepository, state: Path
) -> Iterator[tuple[Attached, ConfigEdits]]:
    """The same with the lock on the repository, and nothing half done behind it."""
    with (
        attached(connection, repository.root) as site,
        locked_edits(repository, site.server, state) as edits,
    ):
        yield site, edits


def serves(url: str, repository: Path) -> bool:
    """Whether a Triton of this host that listens there has this repository on its command line."""
    wanted = repository.resolve()
    return any(path.resolve() == wanted for path in LocalStubProcesses(url).repositories())


def _advice(url: str) -> str:
    processes = LocalStubProcesses(url)
    seconds = last(processes.options("--repository-poll-secs"), "15")
    polls = f"Triton at {url} polls its repository and takes the configs by itself"
    starts = (
        f"Triton at {url} reads its repository at its start only: restart it, best with "
        "--model-control-mode=explicit"
    )
    mode = last(processes.options("--model-control-mode"), "")
    if mode == "poll":
        return f"{polls}, within {seconds} s each; dstackctl status shows it"
    if mode or processes.repositories():
        return starts
    return f"{polls} in POLL mode; in NONE mode restart it, best with --model-control-mode=explicit"


def last(values: tuple[str, ...], default: str) -> str:
    """Of an option that is given twice, Triton takes the last."""
    return values[-1] if values else default
