"""What the arbiter remembers: counters and histograms by model, and the last intervals of each GPU.

Everything is bounded and costs well under a microsecond an event. Histograms have fixed bounds and cumulative
sums, the form Prometheus wants; `as_dict` methods give plain JSON types.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dstack_sched.app.interval_ring import Interval, IntervalRing
from dstack_sched.domain.metrics import DECISION_TIME, GRANT_WAIT

WAIT_BOUNDS_US = tuple(round(bound_s * 1e6) for bound_s in GRANT_WAIT.bounds)
DECISION_BOUNDS_US = tuple(round(bound_s * 1e6) for bound_s in DECISION_TIME.bounds)
INTERVALS_KEPT = 32_768
DECISIONS_SAMPLED = 4_096
REPORTS_KEPT = 64
MODELS_COUNTED = 128  # by name, so that a status fits its packet; further ones are counted together
OTHERS = "(others)"
PAGE_ROWS = 200  # a page costs the loop well under a millisecond


class Histogram:
    """Counts of values by upper bound, with their sum. Bounds ascend; the last bucket has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def as_dict(self) -> dict[str, Any]:
        """{"counts": [one more than bounds, not cumulative], "sum", "count"}."""
        return {
            "counts": list(self.counts),
            "sum": self.total,
            "count": sum(self.counts),
        }


@dataclass(slots=True)
class ModelCounters:
    """One model's totals since the arbiter started. granted_rows: sum of the batch sizes granted.
    gpu_percent_ms: share times time it was granted."""

    grants: int = 0
    granted_rows: int = 0
    unused_grants: int = 0
    rows: int = 0
    late_rows: int = 0
    shed_orders: int = 0
    overloads: int = 0
    leases_ended: int = 0
    run_ms: float = 0.0
    gpu_percent_ms: float = 0.0
    wait_us: Histogram = field(default_factory=lambda: Histogram(WAIT_BOUNDS_US))

    def as_dict(self) -> dict[str, Any]:
        return {
            "grants": self.grants,
            "granted_rows": self.granted_rows,
            "unused_grants": self.unused_grants,
            "rows": self.rows,
            "late_rows": self.late_rows,
            "shed_orders": self.shed_orders,
            "overloads": self.overloads,
            "leases_ended": self.leases_ended,
            "run_ms": round(self.run_ms, 3),
            "gpu_percent_ms": round(self.gpu_percent_ms, 1),
            "wait_us": self.wait_us.as_dict(),
        }


class Record:
    """Counters by model and the ring of intervals."""

    def __init__(self) -> None:
        self.models: dict[str, ModelCounters] = {}
        self.gpu_percent_ms: dict[int, float] = {}
        self.intervals = IntervalRing(INTERVALS_KEPT)
        self.decision_ns: deque[int] = deque(maxlen=DECISIONS_SAMPLED)
        self.decision_us = Histogram(DECISION_BOUNDS_US)
        self._asked: dict[str, int] = {}
        self.overload_reports: deque[dict[str, Any]] = deque(maxlen=REPORTS_KEPT)

    def model(self, name: str) -> ModelCounters:
        counters = self.models.get(name)
        if counters is None:
            if len(self.models) >= MODELS_COUNTED:
                name = OTHERS
            counters = self.models.setdefault(name, ModelCounters())
        return counters

    def decided(self, took_ns: int) -> None:
        self.decision_ns.append(took_ns)
        self.decision_us.add(took_ns / 1000)

    def ended(
        self,
        gpu: int,
        model: str,
        instance: str,
        gpu_percent: float,
        start_us: int,
        end_us: int,
        run_us: int,
        rows: int,
        late_rows: int,
        batch_size: int,
        outcome: str,
    ) -> None:
        """A grant is over, whatever the outcome: count its share and keep its interval."""
        share_ms = gpu_percent * (end_us - start_us) / 1000
        counters = self.model(model)
        counters.rows += rows
        counters.late_rows += late_rows
        counters.run_ms += run_us / 1000
        counters.gpu_percent_ms += share_ms
        self.gpu_percent_ms[gpu] = self.gpu_percent_ms.get(gpu, 0.0) + share_ms
        if outcome == "unused":
            counters.unused_grants += 1
        elif outcome == "lease":
            counters.leases_ended += 1
        self.intervals.append(
            gpu, model, instance, gpu_percent, start_us, end_us, rows, late_rows, batch_size, outcome
        )

    def overloaded(self, gpu: int, model: str, reason: str, waited_us: int, now_us: int) -> None:
        self.model(model).overloads += 1
        self.overload_reports.append(
            {"gpu": gpu, "model": model, "reason": reason[:200], "waited_us": waited_us, "at_us": now_us}
        )

    def overloads_since_asked(self) -> dict[str, int]:
        """Model -> overloads since this was asked last; those without one are left out."""
        now = {name: counters.overloads for name, counters in self.models.items()}
        rose = {name: count - self._asked.get(name, 0) for name, count in now.items()}
        self._asked = now
        return {name: count for name, count in rose.items() if count}

    def sequence_before(self, since_us: int) -> int:
        """The `since_sequence` of a page that begins with what ended at since_us or later."""
        return self.intervals.ended_since(since_us) - 1

    def page(self, since_sequence: int, limit: int) -> dict[str, Any]:
        """Intervals with a sequence above the given one, oldest first.

        {"fields", "rows", "next_since": asks for what follows, "more", "lost": how many the ring dropped}
        """
        limit = max(1, min(limit, PAGE_ROWS))
        ring = self.intervals
        oldest = ring.oldest
        first = max(since_sequence + 1, oldest)
        rows = [list(ring[sequence]) for sequence in range(first, min(first + limit, ring.next_sequence))]
        last: int = first + len(rows) - 1 if rows else max(since_sequence, oldest - 1)
        return {
            "fields": list(Interval._fields),
            "rows": rows,
            "next_since": last,
            "more": last + 1 < ring.next_sequence,
            "lost": max(0, oldest - since_sequence - 1) if since_sequence else 0,
        }

    def decision_percentiles(self) -> dict[str, Any]:
        """Time of one engine step: p50 and p99 in us of the last few thousand, and the histogram of all."""
        ordered = sorted(self.decision_ns)
        return {
            "p50": _percentile(ordered, 0.50) / 1000,
            "p99": _percentile(ordered, 0.99) / 1000,
            "histogram": {"le": list(DECISION_BOUNDS_US), **self.decision_us.as_dict()},
        }


def _percentile(ordered: list[int], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
