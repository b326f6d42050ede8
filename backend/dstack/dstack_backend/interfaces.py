"""What the parts of an instance need of each other, as Protocols. Tests bring fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from dstack_backend.errors import RequestError
from dstack_backend.tensors import Array

Feeds: TypeAlias = dict[str, Array]
Run: TypeAlias = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]


class Request(Protocol):
    """A client's request, as far as the executor needs it. Implemented over Triton's in model.py."""

    @property
    def wanted(self) -> Sequence[str]:
        """Names of the outputs the client asked for."""
        ...

    @property
    def budget_us(self) -> int:
        """Time the client gives from arrival on, microseconds; 0: none stated. Raises RequestError."""
        ...

    def feeds(self) -> Feeds:
        """The inputs that are present, by name. Raises RequestError."""
        ...

    def is_cancelled(self) -> bool: ...
    def answer(self, outputs: Mapping[str, Array]) -> None: ...
    def fail(self, error: RequestError) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """The right to run one batch of at most batch_size rows. `token` is the gate's own."""

    batch_size: int
    gpu_percent: float
    token: object = None


class Listener(Protocol):
    """What a gate tells and asks; the executor. A gate may hold its own lock while it calls these."""

    def on_grant(self, permit: Permit) -> None: ...
    def on_shed(self, deadline_before_us: int) -> None:
        """Reject waiting requests whose deadline is before this time. Called without the gate's lock."""
        ...

    def state(self) -> tuple[int, int]:
        """Waiting rows, and the earliest deadline (0 when none waits)."""
        ...


class Gate(Protocol):
    """Decides when batches run. The executor never holds its lock while it calls these."""

    def start(self, listener: Listener) -> None: ...
    def work(self) -> None:
        """The queue has changed; the gate asks listener.state()."""
        ...

    def begin(self, permit: Permit, expected_us: int) -> bool:
        """A batch is about to run under this permit. False: it is void, the batch must wait again."""
        ...

    def done(self, permit: Permit, rows: int, late: int, run_us: int) -> None:
        """The permit is used up (rows 0: unused)."""
        ...

    def close(self) -> None: ...
