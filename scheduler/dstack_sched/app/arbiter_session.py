"""What the arbiter keeps of one joined instance and of one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstack_backend import wire
from dstack_sched.app.arbiter_record import Record
from dstack_sched.domain.event import BackendJoined, PlanChanged
from dstack_sched.engine.interface import Engine

EPOCH_SHIFT = 32
ID_MASK = (1 << EPOCH_SHIFT) - 1
TELEMETRY_CHARACTERS = 4_096  # so that a page of them fits into a packet
STARTED_LEASE_US = 2_000_000  # how long a run under a standing grant counts as sound here
MAX_OUTSTANDING = 16  # an instance that never answers; a sound one has 2: one running, one chained behind it


@dataclass(slots=True)
class Outstanding:
    """A grant that was sent and has not ended. wire_id 0: ungranted, found running when it joined. standing:
    given ahead of the work and not begun, nothing runs under it."""

    wire_id: int
    gpu_percent: float
    batch_size: int
    granted_us: int
    lease_until_us: int
    standing: bool = False

    @property
    def epoch(self) -> int:
        return self.wire_id >> EPOCH_SHIFT


@dataclass(slots=True)
class Session:
    """One joined instance. waiting_since_us 0: nothing waits without a grant. free_since_us: when its last
    grant ended. Grants of another epoch came from an engine before this one, which counts them as one batch
    under grant id 0."""

    connection: int
    number: int
    gpu: int
    joined: BackendJoined
    pid: int
    free_since_us: int
    waiting: int = 0
    earliest_deadline_us: int = 0
    waiting_since_us: int = 0
    grants: list[Outstanding] = field(default_factory=list)
    telemetry: Mapping[str, Any] | None = None  # what the instance last told of itself, and when
    telemetry_us: int = 0
    told: wire.Plan | None = None  # what it goes by

    @property
    def running(self) -> list[Outstanding]:
        """Grants that run or run next, in their order."""
        return [grant for grant in self.grants if not grant.standing]

    def note_queue(self, waiting: int, deadline_us: int, now_us: int) -> None:
        """The queue as the instance reports it."""
        self.waiting = waiting
        self.earliest_deadline_us = deadline_us
        if not waiting:
            self.waiting_since_us = 0
        elif not self.waiting_since_us:
            self.waiting_since_us = now_us

    def note_telemetry(self, body: Mapping[str, Any], now_us: int) -> None:
        """What the instance measured of itself; one that tells too much is not kept."""
        if len(repr(body)) <= TELEMETRY_CHARACTERS:
            self.telemetry, self.telemetry_us = body, now_us

    def note_grant(self, grant: Outstanding, now_us: int, record: Record) -> None:
        """A grant was given: count it, and how long its rows waited for it."""
        if len(self.grants) >= MAX_OUTSTANDING:
            self.close(self.grants.pop(0), now_us, record, "lease")
        self.grants.append(grant)
        if grant.standing:
            return
        counters = record.model(self.joined.model)
        counters.grants += 1
        counters.granted_rows += grant.batch_size
        if self.waiting_since_us:
            counters.wait_us.add(now_us - self.waiting_since_us)
            self.waiting_since_us = 0 if grant.batch_size >= self.waiting else now_us

    def note_start(self, wire_id: int, rows: int, now_us: int, record: Record) -> Outstanding | None:
        """A standing grant has begun: from now on it is one like any other."""
        for grant in self.grants:
            if grant.wire_id == wire_id and grant.standing:
                grant.standing = False
                grant.granted_us, grant.lease_until_us = now_us, now_us + STARTED_LEASE_US
                counters = record.model(self.joined.model)
                counters.grants += 1
                counters.granted_rows += rows
                counters.wait_us.add(0)
                return grant
        return None

    def take(self, wire_id: int) -> Outstanding | None:
        """Remove an outstanding grant; None where there is no such."""
        for at, grant in enumerate(self.grants):
            if grant.wire_id == wire_id:
                return self.grants.pop(at)
        return None

    def carries_other_than(self, epoch: int) -> bool:
        """Whether grants of an engine before this one have not ended."""
        return any(grant.epoch != epoch for grant in self.grants)

    def close(
        self, grant: Outstanding, now_us: int, record: Record, outcome: str, done: wire.Done | None = None
    ) -> None:
        """Book a grant that ended, if it ever began. Its time on the device is as reported, within what is
        possible."""
        if grant.standing:
            return
        rows, late_rows, run_us = (done.rows, done.late, done.run_us) if done else (0, 0, 0)
        end_us = max(grant.granted_us, min(now_us, grant.lease_until_us))
        earliest_us = min(max(grant.granted_us, self.free_since_us), end_us)
        start_us = max(earliest_us, end_us - run_us) if run_us else earliest_us
        if outcome == "unused":
            start_us = end_us
        elif now_us > grant.lease_until_us:
            outcome = "lease"
        self.free_since_us = now_us
        record.ended(
            self.gpu, self.joined.model, self.joined.instance, grant.gpu_percent, start_us, end_us, run_us,
            rows, late_rows, grant.batch_size, outcome,
        )  # fmt: skip


@dataclass(slots=True)
class Gpu:
    """One GPU's engine, its plan and the time of its timer (0: none)."""

    engine: Engine
    plan: PlanChanged
    timer_us: int = 0
