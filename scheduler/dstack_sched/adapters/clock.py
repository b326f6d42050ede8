"""The real clock: ports.Clock."""

from __future__ import annotations

import time


class SystemClock:
    """CLOCK_MONOTONIC for decisions, wall time for records that people read."""

    def now_us(self) -> int:
        return time.monotonic_ns() // 1000

    def wall_time_s(self) -> float:
        return time.time()

    def sleep_s(self, seconds: float) -> None:
        time.sleep(seconds)
