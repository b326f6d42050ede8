"""What every scheduling policy looks like from outside: events in, decisions out, one instance a GPU."""

from __future__ import annotations

from typing import Any, Protocol

from dstack_sched.domain.decision import Decision
from dstack_sched.domain.event import Event
from dstack_sched.engine.run_times import Seen


class Engine(Protocol):
    """A pure state machine. `handle` is the only door to its state; it reads no clock.

    The caller feeds events in the order of their times (a time earlier than the last one is taken as the
    last one) and carries out the decisions in the order given. The same events give the same decisions.
    """

    def handle(self, event: Event, now_us: int) -> list[Decision]:
        """Take one event in and answer with what to do now. Unknown instances are ignored, not errors:
        a message may cross a departure on its way."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """The state for people and tools: {"policy", "now_us", "capacity_percent", "granted_percent",
        "standing_percent" (held by standing grants, under which nothing runs),
        "models": {NAME: {...}}, "instances": {NAME: {...}}}, plain JSON types only."""
        ...

    def run_times(self, model: str) -> tuple[Seen, ...]:
        """What the runs of a model took, alone and beside co-runners; of all its instances."""
        ...

    def check_invariants(self) -> None:
        """Raise AssertionError, with the story that led there, if the state is impossible."""
        ...
