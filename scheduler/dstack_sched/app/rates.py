"""Arrivals from Triton's counters: what came between two readings, tolerant of resets and of backlogs.

Triton counts a request when it is answered. Under overload that is what the server manages, not what is asked
of it, so what waits is counted too: arrived = answered + failed + growth of what waits.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    return sum(int(entry.get("inference_stats", {}).get("fail", {}).get("count", 0)) for entry in entries)


def _entries(statistics: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    return [entry for entry in statistics.get("model_stats", ()) if entry.get("name") == model]


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
    """One model's arrivals as (seconds, rows) steps, from readings of its counter and of its backlog."""

    def __init__(self) -> None:
        self._counter = CounterDelta()
        self._waiting = 0
        self._read_at_us = 0
        self._owed = 0  # rows seen waiting that left without being counted: taken off what comes next

    def step(self, count: int, waiting: int, now_us: int) -> tuple[float, float] | None:
        """What arrived since the reading before; None at the first, where no time has passed, and over a
        reset: what came before it is lost, and half a count must not pass for a rate that fell."""
        grown = self._counter.step(count)
        seconds = (now_us - self._read_at_us) / 1e6
        more, self._waiting = waiting - self._waiting, waiting
        self._read_at_us = now_us
        if grown is None or seconds <= 0 or self._counter.was_reset:
            return None
        arrived = grown + more - self._owed
        # The two readings are not of one moment: rows between them must not make a rate negative.
        self._owed = max(0, -arrived)
        return seconds, float(max(arrived, 0))
