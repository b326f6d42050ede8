"""What an instance counts and measures of itself: written by executor and gate, read by metrics and arbiter.

Counters are plain numbers, each written by code that holds the executor's or the gate's lock, or by one
thread only; a reader may see a value a moment old, never a torn one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

# The stages of a batch, in their order; triton_queue, which comes before them, is seen by Triton alone.
STAGES = ("hand_over", "wait_grant", "gather", "copy_in", "run", "copy_out", "respond")
COUNTED = (
    "requests", "rows", "batches", "failed", "rejected", "cancelled", "late", "grants", "standing_grants",
    "ungated_batches", "unused_grants", "returned",
)  # fmt: skip
LATENCY = "latency"  # timed as a stage is, but of requests, and over all stages
MOST_LEFT = 4096  # batches uncounted, where nobody reads
_FINE = 3  # a histogram's bucket is at most 1/8 of its value wide


class Histogram:
    """Durations in microseconds, exact below 16 us, in buckets of at most 12.5% width above."""

    __slots__ = ("counts", "sum_us", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = 0
        self.sum_us = 0

    def add(self, value_us: int) -> None:
        shift = value_us.bit_length() - _FINE - 1
        key = value_us if shift <= 0 else (shift << _FINE) + (value_us >> shift)
        self.counts[key] = self.counts.get(key, 0) + 1
        self.total += 1
        self.sum_us += value_us


def quantile_us(counts: Mapping[int, int], part: float) -> int:
    """The value that `part` of the durations do not exceed: the upper end of its bucket; 0 for none."""
    left = part * sum(counts.values())
    for key in sorted(counts):
        left -= counts[key]
        if left <= 1e-9:
            return _upper_us(key)
    return 0


def _upper_us(key: int) -> int:
    if key < 2 << _FINE:
        return key
    shift = (key >> _FINE) - 1
    return ((key - (shift << _FINE) + 1) << shift) - 1


@dataclass(slots=True)
class Stats:
    """Totals since the instance started. `sizes`: batches by rows, rounded up to a power of two. returned:
    requests answered by Triton's own thread. `stages`: one value a batch and stage, in microseconds:

    hand_over (reading its requests and queueing them), wait_grant (from there to the making of the batch, the
    mean over its requests), gather (into staging memory), copy_in (to the device), run, copy_out, respond
    (from the end on the device to the last answer, copy_out included). latency: of requests, from their
    arrival in the backend to their answer.
    """

    requests: int = 0
    rows: int = 0
    batches: int = 0
    failed: int = 0
    rejected: int = 0
    cancelled: int = 0
    late: int = 0
    returned: int = 0
    grants: int = 0
    standing_grants: int = 0
    ungated_batches: int = 0
    unused_grants: int = 0
    arbiter_connects: int = 0
    arbiter_disconnects: int = 0
    waiting_rows: int = 0
    gated: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    _left: deque[tuple[int, dict[str, int]]] = field(default_factory=deque)
    _latencies: deque[int] = field(default_factory=deque)
    _folding: Lock = field(default_factory=Lock)
    stages: dict[str, Histogram] = field(
        default_factory=lambda: {stage: Histogram() for stage in (*STAGES, LATENCY)}
    )

    def batch_done(self, rows: int, stage_us: dict[str, int]) -> None:
        """A batch has left; its stages. Called on a request's way: it is counted later, by fold()."""
        self.batches += 1
        self._left.append((rows, stage_us))
        if len(self._left) > MOST_LEFT:
            self.fold()

    def request_done(self, latency_us: int) -> None:
        """A request was answered; counted later, as batch_done() is."""
        self._latencies.append(latency_us)
        if len(self._latencies) > MOST_LEFT:
            self.fold()

    def fold(self) -> None:
        """Count the batches that have left since the last time. Before reading sizes and stages."""
        with self._folding:
            while self._left:
                rows, stage_us = self._left.popleft()
                self.sizes[1 << (rows - 1).bit_length()] += 1
                for stage, value_us in stage_us.items():
                    self.stages[stage].add(value_us)
            while self._latencies:
                self.stages[LATENCY].add(self._latencies.popleft())


class Window:
    """What happened since the last look: rates, batch sizes and stage times of a while."""

    def __init__(self, stats: Stats, now_us: int):
        self._stats = stats
        self._since_us = now_us
        self._counters = dict.fromkeys(COUNTED, 0)
        self._sizes: Counter[int] = Counter()
        self._seen: dict[str, tuple[int, int, dict[int, int]]] = dict.fromkeys(stats.stages, (0, 0, {}))

    def look(self, now_us: int) -> dict[str, Any]:
        """{"interval_s", "per_s": {counter: rate}, "totals": {counter: total}, "batch_rows_mean",
        "batch_sizes": {"up to rows": batches}, "stages_us": {stage: {"mean", "p50", "p99"}},
        "latency_us": the same of requests, "waiting_rows"}. Stages that saw no batch are left out.
        """
        stats = self._stats
        stats.fold()
        seconds = max((now_us - self._since_us) / 1e6, 1e-6)
        totals = {name: getattr(stats, name) for name in COUNTED}
        delta = {name: totals[name] - self._counters[name] for name in COUNTED}
        sizes = dict(stats.sizes)
        times = {stage: seen for stage in stats.stages if (seen := self._times(stage))}
        body = {
            "interval_s": round(seconds, 3),
            "per_s": {name: round(delta[name] / seconds, 2) for name in COUNTED},
            "totals": totals,
            "batch_rows_mean": round(delta["rows"] / delta["batches"], 2) if delta["batches"] else 0.0,
            "batch_sizes": {str(k): n - self._sizes[k] for k, n in sizes.items() if n > self._sizes[k]},
            "latency_us": times.pop(LATENCY, {}),
            "stages_us": times,
            "waiting_rows": stats.waiting_rows,
        }
        self._since_us, self._counters, self._sizes = now_us, totals, Counter(sizes)
        return body

    def _times(self, stage: str) -> dict[str, float]:
        histogram = self._stats.stages[stage]
        total, sum_us, counts = self._seen[stage]
        new = histogram.total - total
        if not new:
            return {}
        now_counts = dict(histogram.counts)
        recent = {key: count - counts.get(key, 0) for key, count in now_counts.items()}
        mean_us = (histogram.sum_us - sum_us) / new
        self._seen[stage] = histogram.total, histogram.sum_us, now_counts
        return {
            "mean": round(mean_us, 1),
            "p50": quantile_us(recent, 0.5),
            "p99": quantile_us(recent, 0.99),
        }
