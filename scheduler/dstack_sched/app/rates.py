"""Arrival rates from Triton's counters: differences over a sliding window, tolerant of resets."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any


def arrivals(statistics: Mapping[str, Any], model: str) -> int:
    """Rows answered plus requests failed since the model was loaded, over its versions.

    Rows (batch items) are what a plan's rates count; a failed request counts as one, its rows are not known.
    """
    total = 0
    for entry in statistics.get("model_stats", ()):
        if entry.get("name") == model:
            failed = entry.get("inference_stats", {}).get("fail", {}).get("count", 0)
            total += int(entry.get("inference_count", 0)) + int(failed)
    return total


class RateMeter:
    """Arrivals per second of one model over the last `window_s`, from a counter that may start again at 0."""

    def __init__(self, window_s: float) -> None:
        self._window_us = int(window_s * 1e6)
        self._samples: deque[tuple[int, int]] = deque()  # (time, arrivals since the meter began)
        self._last_count: int | None = None

    def add(self, count: int, now_us: int) -> None:
        """A reading of the counter. Below the last one it was reset (a reload): it began again at 0."""
        if self._last_count is None:
            total = 0
        else:
            delta = count - self._last_count if count >= self._last_count else count
            total = self._samples[-1][1] + delta
        self._last_count = count
        self._samples.append((now_us, total))
        while len(self._samples) > 2 and self._samples[1][0] <= now_us - self._window_us:
            self._samples.popleft()

    def rate_per_s(self) -> float | None:
        """None until the window is at least half full."""
        if len(self._samples) < 2:
            return None
        (first_us, first), (last_us, last) = self._samples[0], self._samples[-1]
        span_us = last_us - first_us
        if span_us < self._window_us / 2:
            return None
        return (last - first) * 1e6 / span_us
