"""An engine that answers as the test says and remembers what it was told."""

from __future__ import annotations

from collections import deque
from typing import Any

from dstack_sched.domain.decision import Decision
from dstack_sched.domain.event import Event


class ScriptedEngine:
    """`answers` holds one list of decisions an event, first in first out; when it is empty, none."""

    def __init__(self) -> None:
        self.answers: deque[list[Decision]] = deque()
        self.events: list[tuple[int, Event]] = []

    def handle(self, event: Event, now_us: int) -> list[Decision]:
        self.events.append((now_us, event))
        return self.answers.popleft() if self.answers else []

    def snapshot(self) -> dict[str, Any]:
        return {"policy": "scripted", "granted_percent": 0.0}

    def run_times(self, model: str) -> tuple:
        return ()

    def check_invariants(self) -> None:
        pass


class PlanMemory:
    """A PlanStore in memory."""

    def __init__(self, plans: dict | None = None, writable: bool = True) -> None:
        self.plans = dict(plans or {})
        self.writable = writable

    def load(self) -> dict:
        return self.plans

    def save(self, plans: dict) -> bool:
        if self.writable:
            self.plans = dict(plans)
        return self.writable
