"""Arrivals from Triton's counters: what came between two readings, tolerant of resets and of backlogs.

Triton counts a request when it is answered. Under overload that is what the server manages, not what is asked
of it, so what waits is counted too: arrived = answered + failed + growth of what waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def arrivals(statistics: Mapping[str, Any], model: str) -> int:
    """Rows answered plus requests failed since the model was loaded, over its versions.

    Rows (batch items) are what a plan's rates count; a failed request counts as one, its rows are not known.
    """
    entries = _entries(statistics, model)
    return sum(int(entry.get("inference_count", 0)) for entry in entries) + failures(statistics, model)


def failures(statistics: Mapping[str, Any], model: str) -> int:
    """Requests failed (rejected ones too) since the model was loaded, over its versions."""
    entries = _entries(statistics, model)
    return sum(_requests(entry, "fail") for entry in entries)


@dataclass(frozen=True, slots=True)
class Counts:
    """One reading of a model's counters, over its versions. rows: answered. failed: requests.
    rows_per_request: of those answered, 1 before there are any."""

    rows: int
    failed: int
    rows_per_request: float

    @classmethod
    def of(cls, statistics: Mapping[str, Any], model: str) -> Counts:
        """From Triton's statistics."""
        entries = _entries(statistics, model)
        rows = sum(int(entry.get("inference_count", 0)) for entry in entries)
        answered = sum(_requests(entry, "success") for entry in entries)
        return cls(rows, failures(statistics, model), rows / answered if rows and answered else 1.0)


def _entries(statistics: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    return [entry for entry in statistics.get("model_stats", ()) if entry.get("name") == model]


def _requests(entry: Mapping[str, Any], kind: str) -> int:
    return int(entry.get("inference_stats", {}).get(kind, {}).get("count", 0))


class CounterDelta:
    """Growth of a counter that may start again at 0 (a reload). What came between the last reading before a
    reset and the reset itself is lost, never counted twice and never negative."""

    def __init__(self) -> None:
        self._last: int | None = None
        self.was_reset = False  # at the last reading: its growth is what is left, not what came

    def step(self, count: int) -> int | None:
        """Growth since the reading before; None at the first."""
        last, self._last = self._last, count
        if last is None:
            return None
        self.was_reset = count < last
        return count if self.was_reset else count - last


class ArrivalMeter:
    """One model's arrivals as (seconds, rows) steps, from readings of its counters and of its backlog.

    How many rows a failed request had is not counted: as many as those answered, on average.
    """

    def __init__(self) -> None:
        self._rows, self._failed = CounterDelta(), CounterDelta()
        self._waiting = 0
        self._read_at_us = 0
        self._owed = 0.0  # rows seen waiting that left without being counted: taken off what comes next

    def step(self, counts: Counts, waiting: int, now_us: int) -> tuple[float, float] | None:
        """What arrived since the reading before; None at the first, where no time has passed, and over a
        reset: what came before it is lost, and half a count must not pass for a rate that fell."""
        rows, failed = self._rows.step(counts.rows), self._failed.step(counts.failed)
        seconds = (now_us - self._read_at_us) / 1e6
        more, self._waiting = waiting - self._waiting, waiting
        self._read_at_us = now_us
        reset = self._rows.was_reset or self._failed.was_reset
        if rows is None or failed is None or seconds <= 0 or reset:
            return None
        arrived = rows + failed * counts.rows_per_request + more - self._owed
        # The two readings are not of one moment: rows between them must not make a rate negative.
        self._owed = max(0.0, -arrived)
        return seconds, max(arrived, 0.0)
