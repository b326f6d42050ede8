"""What the parts of an instance need of each other, as Protocols. Tests bring fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from dstack_backend.errors import RequestError
from dstack_backend.tensors import Array, DeviceArray

Feeds: TypeAlias = dict[str, Any]  # by input: Array or DeviceArray; where a batch is fed, also a list of them
Outputs: TypeAlias = Mapping[str, "Array | DeviceArray"]


class Request(Protocol):
    """A client's request, as far as the executor needs it. Implemented over Triton's in model.py.

    It is answered once. Before defer() the answer is kept for Triton's thread to return; from then on it is
    sent, from whichever thread answers.
    """

    on_device: bool
    """Whether it brought its inputs, and takes its outputs, in device memory. Known after feeds()."""

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

    def defer(self) -> None:
        """It will be answered after Triton's thread has returned."""
        ...

    def is_cancelled(self) -> bool: ...
    def answer(self, outputs: Outputs) -> None:
        """Outputs may be views: where the answer is sent they are read before this returns, where it is kept
        they are read until the next hand-over of requests."""
        ...

    def fail(self, error: RequestError) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """The right to run one batch of at most batch_size rows at gpu_percent. `token` is the gate's own.

    sm_groups: on these SM groups, bit i for group i; 0: as the session likes.
    """

    batch_size: int
    gpu_percent: float
    token: object = None
    sm_groups: int = 0


class Listener(Protocol):
    """What a gate tells and asks; the executor. A gate may hold its own lock while it calls these."""

    def on_grant(self, permit: Permit) -> None: ...
    def on_shed(self, deadline_before_us: int) -> None:
        """Reject waiting requests whose deadline is before this time. Called without the gate's lock."""
        ...

    def on_plan(self, batch_size: int, slo_us: int, reject_late: bool) -> None:
        """What is in force from now on, for requests to come."""
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

    def take(self) -> Permit | None:
        """A permit that is there without asking anybody, for work that is about to run; or None."""
        ...

    def begin(self, permit: Permit, rows: int, expected_us: int) -> bool:
        """A batch is about to run under this permit. False: it is void, the batch must wait again."""
        ...

    def done(self, permit: Permit, rows: int, late: int, run_us: int) -> None:
        """The permit is used up (rows 0: unused)."""
        ...

    def close(self) -> None: ...
