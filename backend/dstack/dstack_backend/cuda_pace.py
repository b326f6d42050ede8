"""How long a program runs, so that who waits for it can sleep through most of it.

The driver waits for an event by spinning: a core for every model that is busy. Sleeping instead costs 50 to
300 microseconds at the end of each run. So a waiter sleeps until shortly before the end that it expects, and
through short runs not at all.
"""

from __future__ import annotations

import time

SPIN_NS = 500_000  # left to spinning: a sleeper is late by its timer's slack and the scheduler
LEAST_NS = 1_500_000  # not worth sleeping for: runs below 2 ms are waited for awake


class Pace:
    """Device time of a program's runs: near the shortest of late, for one that sleeps too long loses time."""

    def __init__(self) -> None:
        self.run_us = 0

    def learn(self, run_us: int) -> None:
        slower = run_us > self.run_us > 0
        self.run_us += (run_us - self.run_us) // 8 if slower else run_us - self.run_us

    def behind(self, ahead: Finish | None) -> Finish:
        """The end of a run that begins now, or when the one ahead of it ends."""
        return Finish(self, time.monotonic_ns(), ahead)


class Finish:
    """When a run is expected to end, by what is known when it is asked."""

    def __init__(self, pace: Pace, launched_ns: int, ahead: Finish | None):
        self.pace, self._launched_ns, self._ahead = pace, launched_ns, ahead
        self._reached_ns = 0

    def expected_ns(self) -> int:
        if self._reached_ns:
            return self._reached_ns
        start_ns = max(self._launched_ns, self._ahead.expected_ns() if self._ahead else 0)
        return start_ns + self.pace.run_us * 1000

    def doze(self) -> None:
        """Sleep until shortly before the expected end."""
        left_ns = self.expected_ns() - SPIN_NS - time.monotonic_ns()
        if left_ns > LEAST_NS:
            time.sleep(left_ns / 1e9)

    def reached(self) -> None:
        """It has ended, or nobody will wait for it."""
        self._reached_ns = self._reached_ns or time.monotonic_ns()
        self._ahead = None
